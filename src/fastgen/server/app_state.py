"""State of an HTTP worker that endpoints use: the engine's client, the tokenizer and the checks of requests."""

import asyncio
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from starlette.requests import Request

from fastgen import lora
from fastgen.checkpoint.tokenizer import load as load_tokenizer
from fastgen.config import SamplingParams
from fastgen.core import tokenizer
from fastgen.core.model_config import ModelConfig
from fastgen.server import tool_calls
from fastgen.server.engine_client import EngineClient
from fastgen.server.engine_process import EngineServer
from fastgen.server.errors import APIError
from fastgen.server.metrics import Metrics
from fastgen.server.requests import ChatMessage, Tool, to_template_dicts
from fastgen.server.responses import EchoedPrompt, ResponseBuilder, TokenDecoder
from fastgen.server.sse import CompletionResponse
from fastgen.server.tokenizer_thread import TokenizerThread

T = TypeVar("T")
LONG_TEXT_CHARS = 2**15  # characters above which a text is long, and tokenized in a thread of its own
MAX_LONG_TEXTS = 16  # long texts at a time
MAX_TOKENIZE_CHARS = 2**20  # characters that /tokenize accepts, or more if more can fit the context
CHARS_PER_MESSAGE = 32  # characters that take a chat template as long as a message itself


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Options of `fgserve` for its HTTP workers."""

    engine_address: str  # of the engine's socket
    model_names: tuple[str, ...]  # names of the model; responses name the first
    api_keys: tuple[str, ...] = ()
    grace_seconds: float = 30.0
    max_body_bytes: int = 16 * 2**20
    tool_parser: tool_calls.ToolCallFormat | None = None  # None: detected from the chat template
    profile_dir: str | None = None  # folder of traces
    lora_dir: str | None = None  # folder of LoRA adapters that requests may load
    strict_model: bool = False  # whether requests for other model names are rejected
    allowed_hosts: tuple[str, ...] = ()  # accepted host names besides IP addresses; (): any


class AppState:
    """The engine's client, tokenizers in threads, and facts about the model. Methods raise APIError."""

    def __init__(self, options: ServerOptions, name: str) -> None:
        self.options = options
        self.engine_client = EngineClient(options.engine_address, name)
        self.metrics = Metrics(lambda counts: self.engine_client.send_counts(counts))
        self.token_decoder = TokenDecoder(None)
        # Threads must not share a tokenizer. Tokenizers release the GIL, so that long texts do not delay others.
        self.tokenizer: Any = None
        self.tokenizer_thread = TokenizerThread("tokenizer")
        self.long_text_tokenizer: Any = None
        self.long_text_thread = TokenizerThread("tokenizer of long texts")
        self.num_long_texts = 0  # in process or waiting
        self.max_prompt_chars = 0  # characters that can fit the context
        self.tool_call_format: tool_calls.ToolCallFormat | None = None
        self.marker_token_ids: dict[str, int] = {}  # of tool calls and reasoning, if special tokens
        self.special_tokens_in_content = "text"
        self.template_supports_tools = False  # whether the chat template is known to render tools
        # Whether the chat template needs arguments as text, without and with tools: it may have a branch for each.
        self.wants_text_arguments: dict[bool, bool] = {}
        self.context_length = self.max_completions = 0
        self.supports_adapters = False
        self.model_config: ModelConfig | None = None
        self.is_ready = self.is_draining = False
        self.num_active_requests = 0
        self.created = int(time.time())

    async def load(self) -> None:
        """Waits for the engine, then loads the tokenizer of its model."""
        info = await self.engine_client.engine_info
        loaded = await self.tokenizer_thread.run(partial(load_tokenizer, Path(info.path)))
        self.model_config, self.context_length = info.model_config, info.context_length
        self.max_completions, self.supports_adapters = info.max_completions, info.supports_adapters
        self.special_tokens_in_content = info.special_tokens_in_content
        self.token_decoder = TokenDecoder(loaded)
        self.tokenizer, self.long_text_tokenizer = copy.deepcopy(loaded), copy.deepcopy(loaded)
        self.max_prompt_chars = tokenizer.max_prompt_chars(loaded, self.context_length)
        self.tool_call_format = self.options.tool_parser or tool_calls.detect_format(loaded)
        self.marker_token_ids = tool_calls.find_marker_token_ids(loaded)
        self.is_ready = True

    async def run_tokenizer(
        self, function: Callable[[Any], T], num_chars: int, param: str, max_chars: int | None = None, *, cost: int = 0
    ) -> T:
        """Returns the result of `function` with a tokenizer in a thread, for a text of `num_chars` characters.

        Rejects more than `max_chars` characters (None: as many as can fit the context). `cost` is the number of
        characters that take as long, if larger.
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
        limits = f"the {limit} that are taken with a context of {self.context_length} tokens"
        problem = f"{param}: {num_chars} characters are more than {limits}"
        return APIError(400, problem, param=param, code="context_length_exceeded")

    def check_ready(self) -> ModelConfig:
        """Returns the model's config; rejects requests before the model is loaded and after the engine's end."""
        if self.engine_client.is_engine_dead:
            raise APIError(503, "the engine has stopped", code="engine_error")
        if not self.is_ready or self.model_config is None:
            raise APIError(503, "the model is being loaded", retry_after=2)
        return self.model_config

    async def list_model_names(self) -> tuple[str, ...]:
        """Returns the model's names and its adapters' names."""
        self.check_ready()
        return (*self.options.model_names, *await self.engine_client.call_engine(EngineServer.list_adapters))

    async def resolve_model_name(self, model: str | None) -> str:
        """Returns the model name or adapter that answers a request for `model`.

        Without adapters and `strict_model`, the model answers to every name, so that clients need no configuration.
        Otherwise an unknown name is rejected: a misspelled adapter must not get the base model.
        """
        self.check_ready()
        default = self.options.model_names[0]
        if not model or model in self.options.model_names:
            return model or default
        if not (self.options.strict_model or self.supports_adapters):
            return default
        if model not in (names := await self.list_model_names()):
            problem = f"no model {model!r} here; there is {', '.join(names)}"
            raise APIError(404, problem, param="model", code="model_not_found")
        return model

    async def load_adapter(self, name: str, path: str, *, load_inplace: bool) -> None:
        """Loads a LoRA adapter from a folder within `lora_dir`."""
        model_config, root = self.check_ready(), self._check_lora_dir(name)
        try:
            folder = (root / path).resolve()
            if not (folder.is_relative_to(root) and folder.is_dir()):
                raise ValueError(f"{path!r} is no folder within that of --lora-dir")
            adapter = await asyncio.to_thread(lora.load, folder, model_config, device="cpu")
        except (ValueError, OSError, SafetensorError) as e:
            raise APIError(400, f"lora_path: {e}", param="lora_path") from e
        await self.engine_client.call_engine(EngineServer.set_adapter, name, adapter, load_inplace)

    async def unload_adapter(self, name: str) -> None:
        """Removes a LoRA adapter; rejected while requests use it."""
        self._check_lora_dir(name)
        await self.engine_client.call_engine(EngineServer.set_adapter, await self.resolve_model_name(name), None, False)

    def _check_lora_dir(self, name: str) -> Path:
        """Returns the folder of adapters; rejects the model's own names."""
        if self.options.lora_dir is None:
            raise APIError(403, "this server was not started with --lora-dir FOLDER")
        if name in self.options.model_names:
            raise APIError(400, f"lora_name: {name!r} is the model's own name", param="lora_name")
        return Path(self.options.lora_dir)

    def check_num_completions(self, num_completions: int, param: str = "n") -> None:
        """Rejects more completions than the server ever accepts, before any work."""
        if num_completions > (limit := self.max_completions):
            problem = f"{param}: {num_completions} completions are more than this server takes at all, {limit}"
            raise APIError(400, problem, param=param)

    def require_tokenizer(self, param: str) -> Any:
        """Returns the tokenizer; rejects requests for a model without one."""
        if self.tokenizer is None:
            raise APIError(400, "this model came without a tokenizer", param=param)
        return self.tokenizer

    async def encode_chat(
        self, messages: list[ChatMessage], tools: list[Tool], *, calls_enforced: bool = False
    ) -> list[int]:
        """Returns the token ids of messages. Rejects tools that the template ignores, unless calls are enforced."""
        chat, tool_dicts = to_template_dicts(messages), [tool.to_template_dict() for tool in tools] or None
        num_chars = sum(len(text) for message in chat for text in message.values() if isinstance(text, str))
        objects = [tool_dicts, *(message["tool_calls"] for message in chat if "tool_calls" in message)]
        has_calls = len(objects) > 1
        cost = num_chars + CHARS_PER_MESSAGE * len(chat) + (len(json.dumps(objects)) if tool_dicts or has_calls else 0)

        def encode(coder: Any) -> list[int]:
            render, as_text = partial(tokenizer.render, coder), False
            if has_calls:
                if (has_tools := bool(tool_dicts)) not in self.wants_text_arguments:
                    wants_text = tool_calls.wants_text_arguments(partial(render, tools=tool_dicts))
                    self.wants_text_arguments[has_tools] = wants_text
                as_text = self.wants_text_arguments[has_tools]
            messages = tool_calls.adapt_calls_to_template(chat, self.tool_call_format, arguments_as_text=as_text)
            if tool_dicts and not calls_enforced and not self.template_supports_tools:
                self.template_supports_tools = render(messages, tool_dicts) != render(messages)
                if not self.template_supports_tools:
                    raise APIError(400, "tools: this model's chat template has no place for tools", param="tools")
            # With functions and calls, the rendered text may be too long.
            if cost > LONG_TEXT_CHARS and (length := len(render(messages, tool_dicts))) > self.max_prompt_chars:
                raise self._too_long_error(length, self.max_prompt_chars, "messages")
            content = self.special_tokens_in_content
            return tokenizer.encode(coder, messages, tool_dicts, special_tokens_in_content=content)

        try:
            return await self.run_tokenizer(encode, num_chars, "messages", cost=cost)
        except ValueError as e:
            raise APIError(400, f"messages: {e}", param="messages") from e

    async def encode_prompt(self, prompt: Any, param: str) -> list[int]:
        """Returns the token ids of a prompt that the model accepts."""
        try:
            if isinstance(prompt, str) and self.tokenizer is not None:
                limits = len(prompt), param
                token_ids = await self.run_tokenizer(lambda coder: tokenizer.encode(coder, prompt), *limits)
            else:
                token_ids = tokenizer.encode(self.tokenizer, prompt)
        except ValueError as e:
            raise APIError(400, f"{param}: {e}", param=param) from e
        return self.check_token_ids(token_ids, param)

    async def echo_prompt(self, prompt: str | list[int], token_ids: list[int]) -> EchoedPrompt:
        """Returns the prompt's text and token offsets; of a text, without tokens that the tokenizer has added."""

        def decode(coder: Any) -> EchoedPrompt:
            added = frozenset[int]()
            if isinstance(prompt, str):
                text_ids = coder(prompt, add_special_tokens=False).input_ids
                starts = range(len(token_ids) + 1)
                start = next(i for i in starts if token_ids[i : i + len(text_ids)] == text_ids)
                added = frozenset(range(len(token_ids))) - frozenset(range(start, start + len(text_ids)))
            return TokenDecoder(coder).echo_prompt(token_ids, added)

        return await self.run_tokenizer(decode, len(prompt), "prompt")

    def check_token_ids(self, token_ids: list[int], param: str) -> list[int]:
        """Returns `token_ids`; rejects ids outside the vocabulary and prompts that fill the context."""
        vocab_size = self.check_ready().vocab_size
        if (count := len(token_ids)) >= self.context_length:
            problem = f"{param}: {count} tokens leave no room for output in the context of {self.context_length}"
            raise APIError(400, problem, param=param, code="context_length_exceeded")
        if not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            wrong = next(t for t in token_ids if not 0 <= t < vocab_size)
            raise APIError(400, f"{param}: token {wrong} is outside the vocabulary of {vocab_size}", param=param)
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
        """Adds a request to the engine; returns the response, which receives the tokens as it is sent.

        `field_names` maps the library's names in error messages to the client's.
        """
        if sampling.stop and self.tokenizer is None:
            raise APIError(400, "stop: this model came without a tokenizer; use stop_token_ids", param="stop")
        entry = request.scope["entry"]
        id = entry["id"] = f"{builder.id_prefix}-{entry['id']}"
        args = builder, id, model_name, prompts, sampling, entry
        response = CompletionResponse(self.engine_client, self.metrics, *args, **options)
        # The engine knows no text: stop strings end a request from this side.
        adapter = None if model_name in self.options.model_names else model_name
        await self.engine_client.add(id, prompts, replace(sampling, stop=(), adapter=adapter), field_names)
        self.metrics.prompt_tokens.inc(sum(map(len, prompts)))
        return response
