"""State of an HTTP worker that endpoints use: the engine's client, the tokenizer and the checks of requests."""

import asyncio
import copy
import itertools
import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import PriorityQueue
from typing import Any, TypeVar

from fastgen.checkpoint.tokenizer import load as load_tokenizer
from fastgen.server import tool_calls
from fastgen.server.engine_client import EngineClient
from fastgen.server.engine_process import EngineInfo, EngineServer
from fastgen.server.errors import APIError
from fastgen.server.metrics import Metrics
from fastgen.server.requests import ChatMessage, Tool, to_template_dicts
from fastgen.server.responses import EchoedPrompt, TokenDecoder
from fastgen.text import chat_template, tokenizer

T = TypeVar("T")
LONG_TEXT_CHARS = 2**15  # characters above which a text is long, and tokenized in a thread of its own
MAX_LONG_TEXTS = 16  # long texts at a time
MAX_TOKENIZE_CHARS = 2**20  # characters that /tokenize accepts, or more if more can fit the context
DELAY_PER_CHAR = 0.001  # seconds of priority that a text loses per character
CHARS_PER_MESSAGE = 32  # characters that take a chat template as long as a message itself


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Options of `fgserve` for its HTTP workers."""

    engine_address: str  # of the engine's socket
    model_names: tuple[str, ...]  # names of the model; responses name the first
    api_keys: tuple[str, ...] = ()
    grace_seconds: float = 30.0
    max_body_bytes: int = 16 * 2**20
    chat_template: str | None = None  # used instead of the tokenizer's
    tool_parser: tool_calls.ToolCallFormat | None = None  # None: detected from the chat template
    profile_dir: str | None = None  # folder of traces
    lora_dir: str | None = None  # folder of LoRA adapters that requests may load
    strict_model: bool = False  # whether requests for other model names are rejected
    allowed_hosts: tuple[str, ...] = ()  # accepted host names besides IP addresses; (): any


class TokenizerThread:
    """A thread that processes one text at a time, short texts first, so that long ones do not delay them."""

    def __init__(self, name: str, tokenizer: Any = None) -> None:
        """`tokenizer` is used by this thread alone."""
        self.tokenizer = tokenizer
        self.num_texts = 0  # in process or waiting
        self._executor = ThreadPoolExecutor(1, name)
        self._waiting: PriorityQueue[tuple[float, int, Future[Any], Callable[[Any], Any]]] = PriorityQueue()
        self._sequence_numbers = itertools.count()  # break ties, since futures cannot be compared

    async def run(self, function: Callable[[Any], T], num_chars: int = 0) -> T:
        """Returns or raises the result of `function` with the tokenizer, for a text of `num_chars` characters."""
        future: Future[T] = Future()
        priority = time.monotonic() + num_chars * DELAY_PER_CHAR
        self._waiting.put((priority, next(self._sequence_numbers), future, function))
        self._executor.submit(self._run_next)
        self.num_texts += 1
        try:
            return await asyncio.wrap_future(future)
        finally:
            self.num_texts -= 1

    def _run_next(self) -> None:
        _, _, future, function = self._waiting.get_nowait()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function(self.tokenizer))
        except BaseException as e:
            future.set_exception(e)


class AppState:
    """The engine's client, tokenizers in threads, and facts about the model. Methods raise APIError."""

    def __init__(self, options: ServerOptions, name: str) -> None:
        self.options = options
        self.engine_client = EngineClient(options.engine_address, name)
        self.metrics = Metrics(lambda counts: self.engine_client.notify_engine(EngineServer.add_counts, counts))
        self.engine_info: EngineInfo  # set once the model is loaded
        self.token_decoder = TokenDecoder(None)
        # Threads must not share a tokenizer. Tokenizers release the GIL, so that long texts do not delay others.
        self.tokenizer_thread = TokenizerThread("tokenizer")
        self.long_text_thread = TokenizerThread("tokenizer of long texts")
        self.max_prompt_chars = 0  # characters that can fit the context
        self.tool_call_format: tool_calls.ToolCallFormat | None = None
        self.marker_token_ids: dict[str, int] = {}  # of tool calls and reasoning, if special tokens
        self.template_supports_tools = False  # whether the chat template is known to render tools
        # Whether the chat template needs arguments as text, without and with tools: it may have a branch for each.
        self.wants_text_arguments: dict[bool, bool] = {}
        self.is_ready = self.is_draining = False
        self.num_active_requests = 0
        self.created = int(time.time())

    async def load(self) -> None:
        """Waits for the engine, then loads the tokenizer of its model."""
        self.engine_info = info = await self.engine_client.engine_info
        loaded = await asyncio.to_thread(load_tokenizer, Path(info.path))
        if loaded is not None and self.options.chat_template is not None:
            loaded.chat_template = self.options.chat_template
        self.token_decoder = TokenDecoder(loaded)
        self.tokenizer_thread.tokenizer, self.long_text_thread.tokenizer = copy.deepcopy(loaded), copy.deepcopy(loaded)
        self.max_prompt_chars = tokenizer.max_prompt_chars(loaded, info.context_length)
        self.tool_call_format = self.options.tool_parser or tool_calls.detect_format(loaded)
        self.marker_token_ids = tool_calls.find_marker_token_ids(loaded)
        self.is_ready = True

    async def run_tokenizer(
        self, function: Callable[[Any], T], num_chars: int, param: str, max_chars: int | None = None, cost: int = 0
    ) -> T:
        """Returns the result of `function` with a tokenizer in a thread, for a text of `num_chars` characters.

        Rejects more than `max_chars` characters (None: as many as can fit the context). `cost` is the number of
        characters that take as long, if larger.
        """
        if num_chars > (limit := self.max_prompt_chars if max_chars is None else max_chars):
            raise self._too_long_error(num_chars, limit, param)
        cost = max(cost, num_chars)
        if cost <= LONG_TEXT_CHARS:
            return await self.tokenizer_thread.run(function, cost)
        if self.long_text_thread.num_texts >= MAX_LONG_TEXTS:
            raise APIError(429, f"{MAX_LONG_TEXTS} long texts wait to be tokenized: try again later", retry_after=1)
        return await self.long_text_thread.run(function, cost)

    def _too_long_error(self, num_chars: int, limit: int, param: str) -> APIError:
        limits = f"the {limit} that are taken with a context of {self.engine_info.context_length} tokens"
        problem = f"{param}: {num_chars} characters are more than {limits}"
        return APIError(400, problem, param=param, code="context_length_exceeded")

    def check_ready(self) -> None:
        """Rejects requests before the model is loaded and after the engine's end."""
        if self.engine_client.is_engine_dead:
            raise APIError(503, "the engine has stopped", code="engine_error")
        if not self.is_ready:
            raise APIError(503, "the model is being loaded", retry_after=2)

    async def list_model_names(self) -> tuple[str, ...]:
        """Returns the model's names and its adapters' names."""
        return (*self.options.model_names, *await self.engine_client.call_engine(EngineServer.list_adapters))

    async def resolve_model_name(self, model: str | None) -> str:
        """Returns the model name or adapter that answers a request for `model`.

        Without adapters and `strict_model`, the model answers to every name, so that clients need no configuration.
        Otherwise an unknown name is rejected: a misspelled adapter must not get the base model.
        """
        default = self.options.model_names[0]
        if not model or model in self.options.model_names:
            return model or default
        if not (self.options.strict_model or self.engine_info.supports_adapters):
            return default
        if model not in (names := await self.list_model_names()):
            problem = f"no model {model!r} here; there is {', '.join(names)}"
            raise APIError(404, problem, param="model", code="model_not_found")
        return model

    def check_num_completions(self, num_completions: int, param: str = "n") -> None:
        """Rejects more completions than the server ever accepts, before any work."""
        if num_completions > (limit := self.engine_info.max_completions):
            problem = f"{param}: {num_completions} completions are more than this server takes at all, {limit}"
            raise APIError(400, problem, param=param)

    def require_tokenizer(self, param: str) -> Any:
        """Returns the tokenizer; rejects requests for a model without one."""
        if self.token_decoder.tokenizer is None:
            raise APIError(400, "this model came without a tokenizer", param=param)
        return self.token_decoder.tokenizer

    async def encode_chat(
        self, messages: list[ChatMessage], tools: list[Tool], template_options: dict[str, Any] | None = None, *,
        calls_enforced: bool = False,
    ) -> list[int]:  # fmt: skip
        """Returns the token ids of messages. Rejects tools that the template ignores, unless calls are enforced.

        `template_options` are those of `chat_template.render`.
        """
        template_options = template_options or {}
        chat, tool_dicts = to_template_dicts(messages), [tool.to_template_dict() for tool in tools] or None
        num_chars = sum(len(text) for message in chat for text in message.values() if isinstance(text, str))
        calls = [call for message in chat for call in message.get("tool_calls", ())]
        cost = num_chars + CHARS_PER_MESSAGE * len(chat) + len(json.dumps([tool_dicts, calls, template_options]))

        def encode(coder: Any) -> list[int]:
            render, has_tools = partial(chat_template.render, coder), bool(tool_dicts)
            if calls and has_tools not in self.wants_text_arguments:
                wants_text = tool_calls.wants_text_arguments(partial(render, tools=tool_dicts))
                self.wants_text_arguments[has_tools] = wants_text
            as_text = bool(calls) and self.wants_text_arguments[has_tools]
            tool_calls.adapt_calls_to_template(chat, self.tool_call_format, arguments_as_text=as_text)
            if tool_dicts and not calls_enforced and not self.template_supports_tools:
                self.template_supports_tools = render(chat, tool_dicts) != render(chat)
                if not self.template_supports_tools:
                    raise APIError(400, "tools: this model's chat template has no place for tools", param="tools")
            # With functions and calls, the rendered text may be too long.
            if (
                cost > LONG_TEXT_CHARS
                and (length := len(render(chat, tool_dicts, **template_options))) > self.max_prompt_chars
            ):
                raise self._too_long_error(length, self.max_prompt_chars, "messages")
            content = self.engine_info.special_tokens_in_content
            prompt = tokenizer.ChatPrompt(chat, tool_dicts, **template_options)
            return tokenizer.encode(coder, prompt, special_tokens_in_content=content)

        try:
            return await self.run_tokenizer(encode, num_chars, "messages", cost=cost)
        except ValueError as e:
            raise APIError(400, f"messages: {e}", param="messages") from e

    async def encode_prompt(self, prompt: Any, param: str, truncate_prompt_tokens: int | None = None) -> list[int]:
        """Returns the token ids of a prompt that the model accepts, or so many last ones."""
        try:
            if isinstance(prompt, str) and self.token_decoder.tokenizer is not None:
                encode = partial(tokenizer.encode, prompt=prompt)
                token_ids = await self.run_tokenizer(encode, len(prompt), param)
            else:
                token_ids = tokenizer.encode(self.token_decoder.tokenizer, prompt)
        except ValueError as e:
            raise APIError(400, f"{param}: {e}", param=param) from e
        return self.check_token_ids(token_ids[-(truncate_prompt_tokens or 0) :], param)

    async def echo_prompt(self, prompt: str | list[int], token_ids: list[int]) -> EchoedPrompt:
        """Returns the prompt's text and token offsets; of a text, without tokens that the tokenizer has added."""

        def decode(coder: Any) -> EchoedPrompt:
            positions = range(len(token_ids))
            if isinstance(prompt, str):
                text_ids = coder(prompt, add_special_tokens=False).input_ids
                start = next(i for i in range(len(token_ids) + 1) if token_ids[i : i + len(text_ids)] == text_ids)
                positions = positions[start : start + len(text_ids)]
            return TokenDecoder(coder).echo_prompt(token_ids, positions)

        return await self.run_tokenizer(decode, len(prompt), "prompt")

    def check_token_ids(self, token_ids: list[int], param: str) -> list[int]:
        """Returns `token_ids`; rejects ids outside the vocabulary and prompts that fill the context."""
        vocab_size, context_length = self.engine_info.model_config.vocab_size, self.engine_info.context_length
        if (count := len(token_ids)) >= context_length:
            problem = f"{param}: {count} tokens leave no room for output in the context of {context_length}"
            raise APIError(400, problem, param=param, code="context_length_exceeded")
        if not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            wrong = next(t for t in token_ids if not 0 <= t < vocab_size)
            raise APIError(400, f"{param}: token {wrong} is outside the vocabulary of {vocab_size}", param=param)
        return token_ids
