"""What an HTTP worker's endpoints use: the engine's client, the tokenizer, and what is refused at once."""

import asyncio
import copy
import itertools
import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import PriorityQueue
from typing import Any, TypeVar

from safetensors import SafetensorError
from starlette.requests import Request

from fastgen import lora
from fastgen.checkpoint.tokenizer import load as load_tokenizer
from fastgen.config import SamplingParams
from fastgen.core import tokenizer
from fastgen.core.model_config import ModelConfig
from fastgen.core.types import Adapter
from fastgen.server import tool_calls as calls
from fastgen.server.engine_client import EngineClient
from fastgen.server.metrics import Metrics
from fastgen.server.requests import APIError, ChatMessage, Tool, to_template_dicts
from fastgen.server.responses import CompletionResponse, EchoedPrompt, ResponseBuilder, TokenDecoder

T = TypeVar("T")
LONG_TEXT_CHARS = 2**15  # characters of a text that is tokenized beside the others
MAX_LONG_TEXTS = 16  # of those at a time
MAX_TOKENIZE_CHARS = 2**20  # characters of a text that /tokenize takes, if not more can fit the context
DELAY_PER_CHAR = 0.001  # seconds for each character of a text, for which shorter ones that come later go first
CHARS_PER_MESSAGE = 32  # characters that a message is counted as, beside its own: a template takes as long for them


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """What a worker is told."""

    engine_address: str  # of the engine's socket
    model_names: tuple[str, ...]  # the model's; the first one is its own
    api_keys: tuple[str, ...] = ()
    grace_seconds: float = 30.0
    max_body_bytes: int = 16 * 2**20
    tool_parser: calls.ToolCallFormat | None = None  # None: by the chat template
    profile_dir: str | None = None  # the folder of traces
    lora_dir: str | None = None  # the folder of those that requests may load
    strict_model: bool = False  # whether requests that name another model are refused
    allowed_hosts: tuple[str, ...] = ()  # by which the server may be addressed, besides IP addresses; (): any


class TokenizerThread:
    """A thread that works with texts, one after the other and short ones first: no other waits for many long ones."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, name)
        self._waiting: PriorityQueue[tuple[float, int, Future[Any], Callable[[], Any]]] = PriorityQueue()
        self._sequence_numbers = itertools.count()  # of what is asked for, so that nothing else of equals is compared

    async def run(self, function: Callable[[], T], num_chars: int = 0) -> T:
        """Returns or raises what `function` does with a text of `size` characters."""
        done: Future[T] = Future()
        self._waiting.put((time.monotonic() + num_chars * DELAY_PER_CHAR, next(self._sequence_numbers), done, function))
        self._executor.submit(self._run_next)
        return await asyncio.wrap_future(done)

    def _run_next(self) -> None:
        _, _, done, function = self._waiting.get_nowait()
        if not done.set_running_or_notify_cancel():
            return
        try:
            done.set_result(function())
        except BaseException as e:
            done.set_exception(e)


class AppState:
    """What the endpoints use: the engine's client, the tokenizer, and the state of the worker."""

    def __init__(self, options: ServerOptions, name: str) -> None:
        self.options = options
        self.engine_client = EngineClient(options.engine_address, name)
        self.metrics = Metrics(lambda changes: self.engine_client.send_counts(changes))
        self.token_decoder = TokenDecoder(None)
        # A tokenizer for a thread's own use, since two threads may not share one; and another for long texts, which
        # others do not wait for. Tokenizers release the interpreter.
        self.tokenizer: Any = None
        self.tokenizer_thread = TokenizerThread("tokenizer")
        self.long_text_tokenizer: Any = None
        self.long_text_thread = TokenizerThread("tokenizer of long texts")
        self.num_long_texts = 0  # long texts that are in work or wait
        self.max_prompt_chars = 0  # characters that can fit the context
        self.tool_call_format: calls.ToolCallFormat | None = None  # whose form calls have
        self.marker_token_ids: dict[str, int] = {}  # of calls and reasoning, that are special tokens
        self.special_tokens_in_content = "text"
        self.template_supports_tools = False  # whether the chat template was seen to tell of tools
        # Whether it wants arguments of calls as text, with tools and without: a template may be another one with them.
        self.wants_text_arguments: dict[bool, bool] = {}
        self.context_length = self.max_completions = 0
        self.supports_adapters = False  # whether the engine has room for them
        self.model_config: ModelConfig | None = None
        self.is_ready = self.is_draining = False
        self.num_active_requests = 0  # requests being answered
        self.created = int(time.time())

    async def load(self) -> None:
        """Wait for the engine, and read the tokenizer of its model."""
        info = await self.engine_client.engine_info
        loaded = await self.tokenizer_thread.run(partial(load_tokenizer, Path(info["path"])))
        self.token_decoder, self.context_length = TokenDecoder(loaded), info["context"]
        self.special_tokens_in_content = info["special_tokens_in_content"]
        self.max_completions, self.model_config, self.supports_adapters = (
            info["most"],
            info["spec"],
            info["supports_adapters"],
        )
        self.tokenizer, self.long_text_tokenizer = copy.deepcopy(loaded), copy.deepcopy(loaded)
        self.max_prompt_chars = tokenizer.max_prompt_chars(loaded, self.context_length)
        self.tool_call_format, self.marker_token_ids = (
            self.options.tool_parser or calls.detect_format(loaded),
            calls.find_marker_token_ids(loaded),
        )
        self.is_ready = True

    async def run_tokenizer(
        self, function: Callable[[Any], T], num_chars: int, param: str, max_chars: int | None = None, *, cost: int = 0
    ) -> T:
        """What `function` makes of a tokenizer, in a thread, for a text of `size` characters.

        Refused, before it is looked at, if it has more than `most` (None: those that can fit the context). `work`: how
        many characters take as long, if those are more.
        """
        if num_chars > (limit := self.max_prompt_chars if max_chars is None else max_chars):
            raise self._too_long_error(num_chars, limit, param)
        cost = max(cost, num_chars)
        if cost <= LONG_TEXT_CHARS:
            return await self.tokenizer_thread.run(lambda: function(self.tokenizer), cost)
        if self.num_long_texts >= MAX_LONG_TEXTS:
            raise APIError(429, f"{MAX_LONG_TEXTS} long texts wait to be tokenized: try again later", retry_after=1)
        self.num_long_texts += 1
        try:
            return await self.long_text_thread.run(lambda: function(self.long_text_tokenizer), cost)
        finally:
            self.num_long_texts -= 1

    def _too_long_error(self, num_chars: int, limit: int, param: str) -> APIError:
        problem = f"{param}: {num_chars} characters are more than the {limit} that are taken with a context of "
        problem += f"{self.context_length} tokens"
        return APIError(400, problem, param=param, code="context_length_exceeded")

    def check_ready(self) -> ModelConfig:
        """The model's shape. Refused if it is not there yet, or not any more."""
        if self.engine_client.is_engine_dead:
            raise APIError(503, "the engine has stopped", code="engine_error")
        if not self.is_ready or self.model_config is None:
            raise APIError(503, "the model is being loaded", retry_after=2)
        return self.model_config

    async def list_model_names(self) -> tuple[str, ...]:
        """The model's names, and its adapters'."""
        self.check_ready()
        return (*self.options.model_names, *await self.engine_client.call_engine("list_adapters"))

    async def resolve_model_name(self, model: str | None) -> str:
        """The name of what answers a request for `model`: the model, by any of its names, or an adapter.

        Where the model is all that is served, it answers to every name, so that clients need not be told its own. With
        `strict_model`, and where there is room for adapters, which are chosen by name, another name is Refused.
        """
        self.check_ready()
        own = self.options.model_names[0]
        if not model or model in self.options.model_names:
            return model or own
        if not (self.options.strict_model or self.supports_adapters):
            return own
        if model not in (known := await self.list_model_names()):
            problem = f"no model {model!r} here; there is {', '.join(known)}"
            raise APIError(404, problem, param="model", code="model_not_found")
        return model

    async def load_adapter(self, name: str, path: str, *, load_inplace: bool) -> None:
        """From a folder within the one of adapters. Refused for what is none, or does not fit."""
        spec, root = self.check_ready(), self._check_adapter_folder(name)
        try:
            folder = (root / path).resolve()
            if not (folder.is_relative_to(root) and folder.is_dir()):
                raise ValueError(f"{path!r} is no folder within that of --lora-dir")
            tree = await asyncio.to_thread(lora.load, folder, spec, device="cpu")
        except (ValueError, OSError, SafetensorError) as e:
            raise APIError(400, f"lora_path: {e}", param="lora_path") from e
        await self._set_adapter(name, tree, load_inplace=load_inplace)

    async def unload_adapter(self, name: str) -> None:
        """Refused if it is not there, or requests use it."""
        self._check_adapter_folder(name)
        await self._set_adapter(await self.resolve_model_name(name), None)

    def _check_adapter_folder(self, name: str) -> Path:
        """The folder of adapters. Refused where they may not come and go, or for the model's own name."""
        if self.options.lora_dir is None:
            raise APIError(403, "this server was not started with --lora-dir FOLDER")
        if name in self.options.model_names:
            raise APIError(400, f"lora_name: {name!r} is the model's own name", param="lora_name")
        return Path(self.options.lora_dir)

    async def _set_adapter(self, name: str, adapter: Adapter | None, *, load_inplace: bool = False) -> None:
        """As the engine's "adapter"."""
        if refused := await self.engine_client.call_engine("set_adapter", name, adapter, load_inplace):
            raise APIError(*refused, param="lora_name")

    def check_num_completions(self, num_completions: int, param: str = "n") -> None:
        """Refused if so many completions can never be taken; before there is any work with them."""
        if num_completions > self.max_completions:
            problem = (
                f"{param}: {num_completions} completions are more than this server takes at all, {self.max_completions}"
            )
            raise APIError(400, problem, param=param)

    def require_tokenizer(self, param: str) -> Any:
        """The tokenizer. Refused if there is none."""
        if self.tokenizer is None:
            raise APIError(400, "this model came without a tokenizer", param=param)
        return self.tokenizer

    async def encode_chat(
        self, messages: list[ChatMessage], tools: list[Tool], *, calls_enforced: bool = False
    ) -> list[int]:
        """The tokens of messages. Refused if the template does not tell of the tools; enforced calls come anyhow."""
        said, told = to_template_dicts(messages), [tool.to_template_dict() for tool in tools] or None

        def encode(coder: Any) -> list[int]:
            as_text = False
            if any("tool_calls" in message for message in said):
                if (has_tools := bool(told)) not in self.wants_text_arguments:
                    render = partial(tokenizer.render, coder, tools=told)
                    self.wants_text_arguments[has_tools] = calls.wants_text_arguments(render)
                as_text = self.wants_text_arguments[has_tools]
            messages = calls.adapt_calls_to_template(said, self.tool_call_format, arguments_as_text=as_text)
            if told and not calls_enforced and not self.template_supports_tools:
                self.template_supports_tools = tokenizer.render(coder, messages, told) != tokenizer.render(
                    coder, messages
                )
                if not self.template_supports_tools:
                    raise APIError(400, "tools: this model's chat template has no place for tools", param="tools")
            if (
                work > LONG_TEXT_CHARS
                and (length := len(tokenizer.render(coder, messages, told))) > self.max_prompt_chars
            ):
                raise self._too_long_error(length, self.max_prompt_chars, "messages")  # with the functions and calls
            content = self.special_tokens_in_content
            return tokenizer.encode(coder, messages, told, special_tokens_in_content=content)

        size = sum(len(text) for message in said for text in message.values() if isinstance(text, str))
        objects = [told, *(message["tool_calls"] for message in said if "tool_calls" in message)]
        work = size + CHARS_PER_MESSAGE * len(said) + (len(json.dumps(objects)) if told or len(objects) > 1 else 0)
        try:
            return await self.run_tokenizer(encode, size, "messages", cost=work)
        except ValueError as e:
            raise APIError(400, f"messages: {e}", param="messages") from e

    async def encode_prompt(self, prompt: Any, param: str) -> list[int]:
        """A prompt's tokens."""
        try:
            if isinstance(prompt, str) and self.tokenizer is not None:
                tokens = await self.run_tokenizer(lambda coder: tokenizer.encode(coder, prompt), len(prompt), param)
            else:
                tokens = tokenizer.encode(self.tokenizer, prompt)
        except ValueError as e:
            raise APIError(400, f"{param}: {e}", param=param) from e
        return self.check_token_ids(tokens, param)

    async def echo_prompt(self, prompt: str | list[int], token_ids: list[int]) -> EchoedPrompt:
        """Returns a prompt as text, and where its tokens begin: of a text, without what the tokenizer put around it."""

        def decode(coder: Any) -> EchoedPrompt:
            hidden = frozenset[int]()
            if isinstance(prompt, str):
                own = coder(prompt, add_special_tokens=False).input_ids
                begin = next(i for i in range(len(token_ids) + 1) if token_ids[i : i + len(own)] == own)
                hidden = frozenset(range(len(token_ids))) - frozenset(range(begin, begin + len(own)))
            return TokenDecoder(coder).echo_prompt(token_ids, hidden)

        return await self.run_tokenizer(decode, len(prompt), "prompt")

    def check_token_ids(self, token_ids: list[int], param: str) -> list[int]:
        """Tokens that the model knows, and of which there are not more than the context. Refused if not."""
        vocab = self.check_ready().vocab_size
        if len(token_ids) >= self.context_length:
            problem = (
                f"{param}: {len(token_ids)} tokens leave no room for output in the context of {self.context_length}"
            )
            raise APIError(400, problem, param=param, code="context_length_exceeded")
        if not 0 <= min(token_ids) <= max(token_ids) < vocab:
            wrong = next(t for t in token_ids if not 0 <= t < vocab)
            raise APIError(400, f"{param}: token {wrong} is outside the vocabulary of {vocab}", param=param)
        return token_ids

    async def submit(
        self,
        request: Request,
        builder: ResponseBuilder,
        model_name: str,
        prompts: list[list[int]],
        sampling: SamplingParams,
        field_names: dict[str, str],
        **options: bool,
    ) -> CompletionResponse:
        """Give a call to the engine. Refused if it does not take it."""
        if sampling.stop and self.tokenizer is None:
            raise APIError(400, "stop: this model came without a tokenizer; use stop_token_ids", param="stop")
        entry = request.scope["entry"]
        call = entry["id"] = f"{builder.id_prefix}-{entry['id']}"
        answer = CompletionResponse(
            self.engine_client, self.metrics, builder, call, model_name, prompts, sampling, entry, **options
        )
        adapter = None if model_name in self.options.model_names else model_name
        await self.engine_client.add(
            call, prompts, replace(sampling, stop=(), adapter=adapter), field_names
        )  # it knows no text
        self.metrics.prompt_tokens.inc(sum(map(len, prompts)))
        return answer
