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

from fastgen import lora, tokenizer
from fastgen.config import SamplingParams
from fastgen.models.spec import Spec
from fastgen.serve import tools as calls
from fastgen.serve.answer import Answer, Echo, Form, Vocabulary
from fastgen.serve.client import Client
from fastgen.serve.metrics import Metrics
from fastgen.serve.protocol import Message, Refused, Tool, plain
from fastgen.types import Adapter

T = TypeVar("T")
LONG = 2**15  # characters of a text that is tokenized beside the others
MAX_LONG = 16  # of those at a time
TOKENIZED = 2**20  # characters of a text that /tokenize takes, if not more can fit the context
PATIENCE = 0.001  # seconds for each character of a text, for which shorter ones that come later go first
MESSAGE = 32  # characters that a message is counted as, beside its own: a template takes as long for them


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a worker is told."""

    address: str  # of the engine's socket
    names: tuple[str, ...]  # the model's; the first one is its own
    keys: tuple[str, ...] = ()
    grace: float = 30.0
    max_body: int = 16 * 2**20
    tool_parser: calls.FamilyName | None = None  # None: by the chat template
    profiles: str | None = None  # the folder of traces
    adapters: str | None = None  # the folder of those that requests may load
    strict_model: bool = False  # whether requests that name another model are refused
    hosts: tuple[str, ...] = ()  # by which the server may be addressed, besides IP addresses; (): any


class TextThread:
    """A thread that works with texts, one after the other and short ones first: no other waits for many long ones."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, name)
        self._waiting: PriorityQueue[tuple[float, int, Future[Any], Callable[[], Any]]] = PriorityQueue()
        self._numbers = itertools.count()  # of what is asked for, so that nothing else of equals is compared

    async def run(self, function: Callable[[], T], size: int = 0) -> T:
        """Returns or raises what `function` does with a text of `size` characters."""
        done: Future[T] = Future()
        self._waiting.put((time.monotonic() + size * PATIENCE, next(self._numbers), done, function))
        self._executor.submit(self._run_first)
        return await asyncio.wrap_future(done)

    def _run_first(self) -> None:
        _, _, done, function = self._waiting.get_nowait()
        if not done.set_running_or_notify_cancel():
            return
        try:
            done.set_result(function())
        except BaseException as e:
            done.set_exception(e)


class Service:
    """What the endpoints use: the engine's client, the tokenizer, and the state of the worker."""

    def __init__(self, options: Options, name: str) -> None:
        self.options = options
        self.client = Client(options.address, name)
        self.metrics = Metrics(lambda changes: self.client.count(changes))
        self.vocabulary = Vocabulary(None)
        # A tokenizer for a thread's own use, since two threads may not share one; and another for long texts, which
        # others do not wait for. Tokenizers release the interpreter.
        self.encoder: Any = None
        self.thread = TextThread("tokenizer")
        self.long_encoder: Any = None
        self.long_thread = TextThread("tokenizer of long texts")
        self.num_long = 0  # long texts that are in work or wait
        self.longest = 0  # characters that can fit the context
        self.family: calls.FamilyName | None = None  # whose form calls have
        self.markers: dict[str, int] = {}  # of calls and reasoning, that are special tokens
        self.special_tokens_in_content = "text"
        self.tooled = False  # whether the chat template was seen to tell of tools
        # Whether it wants arguments of calls as text, with tools and without: a template may be another one with them.
        self.takes_text: dict[bool, bool] = {}
        self.context = self.most = 0
        self.has_adapters = False  # whether the engine has room for them
        self.spec: Spec | None = None
        self.ready = self.draining = False
        self.active = 0  # requests being answered
        self.created = int(time.time())

    async def load(self) -> None:
        """Wait for the engine, and read the tokenizer of its model."""
        info = await self.client.info
        loaded = await self.thread.run(partial(tokenizer.load, Path(info["path"])))
        self.vocabulary, self.context = Vocabulary(loaded), info["context"]
        self.special_tokens_in_content = info["special_tokens_in_content"]
        self.most, self.spec, self.has_adapters = info["most"], info["spec"], info["has_adapters"]
        self.encoder, self.long_encoder = copy.deepcopy(loaded), copy.deepcopy(loaded)
        self.longest = tokenizer.longest_text(loaded, self.context)
        self.family, self.markers = self.options.tool_parser or calls.family(loaded), calls.special(loaded)
        self.ready = True

    async def tokenized(
        self, function: Callable[[Any], T], size: int, param: str, most: int | None = None, *, work: int = 0
    ) -> T:
        """What `function` makes of a tokenizer, in a thread, for a text of `size` characters.

        Refused, before it is looked at, if it has more than `most` (None: those that can fit the context). `work`: how
        many characters take as long, if those are more.
        """
        if size > (limit := self.longest if most is None else most):
            raise self._too_long(size, limit, param)
        work = max(work, size)
        if work <= LONG:
            return await self.thread.run(lambda: function(self.encoder), work)
        if self.num_long >= MAX_LONG:
            raise Refused(429, f"{MAX_LONG} long texts wait to be tokenized: try again later", retry=1)
        self.num_long += 1
        try:
            return await self.long_thread.run(lambda: function(self.long_encoder), work)
        finally:
            self.num_long -= 1

    def _too_long(self, size: int, limit: int, param: str) -> Refused:
        problem = f"{param}: {size} characters are more than the {limit} that are taken with a context of "
        problem += f"{self.context} tokens"
        return Refused(400, problem, param=param, code="context_length_exceeded")

    def check(self) -> Spec:
        """The model's shape. Refused if it is not there yet, or not any more."""
        if self.client.dead:
            raise Refused(503, "the engine has stopped", code="engine_error")
        if not self.ready or self.spec is None:
            raise Refused(503, "the model is being loaded", retry=2)
        return self.spec

    async def names(self) -> tuple[str, ...]:
        """The model's names, and its adapters'."""
        self.check()
        return (*self.options.names, *await self.client.ask("adapters"))

    async def named(self, model: str | None) -> str:
        """The name of what answers a request for `model`: the model, by any of its names, or an adapter.

        Where the model is all that is served, it answers to every name, so that clients need not be told its own. With
        `strict_model`, and where there is room for adapters, which are chosen by name, another name is Refused.
        """
        self.check()
        own = self.options.names[0]
        if not model or model in self.options.names:
            return model or own
        if not (self.options.strict_model or self.has_adapters):
            return own
        if model not in (known := await self.names()):
            problem = f"no model {model!r} here; there is {', '.join(known)}"
            raise Refused(404, problem, param="model", code="model_not_found")
        return model

    async def load_adapter(self, name: str, path: str, *, again: bool) -> None:
        """From a folder within the one of adapters. Refused for what is none, or does not fit."""
        spec, root = self.check(), self._shelf(name)
        try:
            folder = (root / path).resolve()
            if not (folder.is_relative_to(root) and folder.is_dir()):
                raise ValueError(f"{path!r} is no folder within that of --lora-dir")
            tree = await asyncio.to_thread(lora.load, folder, spec, device="cpu")
        except (ValueError, OSError, SafetensorError) as e:
            raise Refused(400, f"lora_path: {e}", param="lora_path") from e
        await self._shelve(name, tree, again=again)

    async def unload_adapter(self, name: str) -> None:
        """Refused if it is not there, or requests use it."""
        self._shelf(name)
        await self._shelve(await self.named(name), None)

    def _shelf(self, name: str) -> Path:
        """The folder of adapters. Refused where they may not come and go, or for the model's own name."""
        if self.options.adapters is None:
            raise Refused(403, "this server was not started with --lora-dir FOLDER")
        if name in self.options.names:
            raise Refused(400, f"lora_name: {name!r} is the model's own name", param="lora_name")
        return Path(self.options.adapters)

    async def _shelve(self, name: str, tree: Adapter | None, *, again: bool = False) -> None:
        """As the engine's "adapter"."""
        if refused := await self.client.ask("adapter", name, tree, again):
            raise Refused(*refused, param="lora_name")

    def fits(self, count: int, param: str = "n") -> None:
        """Refused if so many completions can never be taken; before there is any work with them."""
        if count > self.most:
            problem = f"{param}: {count} completions are more than this server takes at all, {self.most}"
            raise Refused(400, problem, param=param)

    def coder(self, param: str) -> Any:
        """The tokenizer. Refused if there is none."""
        if self.encoder is None:
            raise Refused(400, "this model came without a tokenizer", param=param)
        return self.encoder

    async def chat(self, messages: list[Message], tools: list[Tool], *, enforced: bool = False) -> list[int]:
        """The tokens of messages. Refused if the template does not tell of the tools; enforced calls come anyhow."""
        said, told = plain(messages), [tool.plain() for tool in tools] or None

        def encode(coder: Any) -> list[int]:
            as_text = False
            if any("tool_calls" in message for message in said):
                if (has_tools := bool(told)) not in self.takes_text:
                    render = partial(tokenizer.render, coder, tools=told)
                    self.takes_text[has_tools] = calls.takes_text(render)
                as_text = self.takes_text[has_tools]
            messages = calls.for_template(said, self.family, as_text=as_text)
            if told and not enforced and not self.tooled:
                self.tooled = tokenizer.render(coder, messages, told) != tokenizer.render(coder, messages)
                if not self.tooled:
                    raise Refused(400, "tools: this model's chat template has no place for tools", param="tools")
            if work > LONG and (length := len(tokenizer.render(coder, messages, told))) > self.longest:
                raise self._too_long(length, self.longest, "messages")  # with the functions and calls
            content = self.special_tokens_in_content
            return tokenizer.encode(coder, messages, told, special_tokens_in_content=content)

        size = sum(len(text) for message in said for text in message.values() if isinstance(text, str))
        objects = [told, *(message["tool_calls"] for message in said if "tool_calls" in message)]
        work = size + MESSAGE * len(said) + (len(json.dumps(objects)) if told or len(objects) > 1 else 0)
        try:
            return await self.tokenized(encode, size, "messages", work=work)
        except ValueError as e:
            raise Refused(400, f"messages: {e}", param="messages") from e

    async def encode(self, prompt: Any, param: str) -> list[int]:
        """A prompt's tokens."""
        try:
            if isinstance(prompt, str) and self.encoder is not None:
                tokens = await self.tokenized(lambda coder: tokenizer.encode(coder, prompt), len(prompt), param)
            else:
                tokens = tokenizer.encode(self.encoder, prompt)
        except ValueError as e:
            raise Refused(400, f"{param}: {e}", param=param) from e
        return self.taken(tokens, param)

    async def echo(self, prompt: str | list[int], tokens: list[int]) -> Echo:
        """Returns a prompt as text, and where its tokens begin: of a text, without what the tokenizer put around it."""

        def decode(coder: Any) -> Echo:
            hidden = frozenset[int]()
            if isinstance(prompt, str):
                own = coder(prompt, add_special_tokens=False).input_ids
                begin = next(i for i in range(len(tokens) + 1) if tokens[i : i + len(own)] == own)
                hidden = frozenset(range(len(tokens))) - frozenset(range(begin, begin + len(own)))
            return Vocabulary(coder).echo(tokens, hidden)

        return await self.tokenized(decode, len(prompt), "prompt")

    def taken(self, tokens: list[int], param: str) -> list[int]:
        """Tokens that the model knows, and of which there are not more than the context. Refused if not."""
        vocab = self.check().vocab
        if len(tokens) >= self.context:
            problem = f"{param}: {len(tokens)} tokens leave no room for output in the context of {self.context}"
            raise Refused(400, problem, param=param, code="context_length_exceeded")
        if not 0 <= min(tokens) <= max(tokens) < vocab:
            wrong = next(t for t in tokens if not 0 <= t < vocab)
            raise Refused(400, f"{param}: token {wrong} is outside the vocabulary of {vocab}", param=param)
        return tokens

    async def start(
        self,
        request: Request,
        form: Form,
        model: str,
        prompts: list[list[int]],
        params: SamplingParams,
        names: dict[str, str],
        **options: bool,
    ) -> Answer:
        """Give a call to the engine. Refused if it does not take it."""
        if params.stop and self.encoder is None:
            raise Refused(400, "stop: this model came without a tokenizer; use stop_token_ids", param="stop")
        entry = request.scope["entry"]
        call = entry["id"] = f"{form.prefix}-{entry['id']}"
        answer = Answer(self.client, self.metrics, form, call, model, prompts, params, entry, **options)
        adapter = None if model in self.options.names else model
        await self.client.add(call, prompts, replace(params, stop=(), adapter=adapter), names)  # it knows no text
        self.metrics.prompt_tokens.inc(sum(map(len, prompts)))
        return answer
