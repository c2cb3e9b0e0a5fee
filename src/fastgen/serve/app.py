"""The HTTP worker: OpenAI's endpoints, and around them keys, limits, errors and a line in the log for each request."""

import asyncio
import copy
import hmac
import json
import re
import resource
import signal
import socket
import sys
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from fastgen import tokenizer
from fastgen.config import SamplingParams
from fastgen.serve import tools as calls
from fastgen.serve.answer import Answer, Chat, Choice, Completion, Form, Generate, Vocabulary, dump, refuse
from fastgen.serve.client import Client
from fastgen.serve.metrics import Metrics, exposition
from fastgen.serve.protocol import (
    AbortRequest,
    Call,
    CalledFunction,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Function,
    FunctionName,
    GenerateRequest,
    GenerateSampling,
    NamedTool,
    Part,
    ProfileRequest,
    Refused,
    ResponseFormat,
    StreamOptions,
    TokenizeRequest,
    Tool,
    plain,
)
from fastgen.serve.protocol import Message as ChatMessage

TOOLS = (Tool, Function, NamedTool, FunctionName, Call, CalledFunction)
REQUESTS = (
    ChatRequest, CompletionRequest, GenerateRequest, TokenizeRequest, DetokenizeRequest, AbortRequest, ProfileRequest,
)  # fmt: skip
# Names of fields: pydantic's paths to what is wrong hold those of types as well.
FIELDS = {
    name
    for kind in (*REQUESTS, *TOOLS, GenerateSampling, ChatMessage, Part, StreamOptions, ResponseFormat)
    for name in kind.model_fields
}
OPEN = ("/", "/health", "/v1/health")  # without a key: they tell nothing but that there is a server
BODY_SECONDS = 60.0  # to send a request's body
HEAD_SECONDS = 30.0  # to send what comes before it, and to be idle between two requests
PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a worker is told."""

    address: str  # of the engine's socket
    names: tuple[str, ...]  # the model's; the first one is its own
    adapters: tuple[str, ...] = ()  # which are chosen by name, too
    keys: tuple[str, ...] = ()
    grace: float = 30.0
    max_body: int = 16 * 2**20
    tool_parser: calls.FamilyName | None = None  # None: by the chat template
    profiles: str | None = None  # the folder of traces


class Service:
    """What the endpoints use: the engine's client, the tokenizer, and the state of the worker."""

    def __init__(self, options: Options, name: str) -> None:
        self.options = options
        self.client = Client(options.address, name)
        self.metrics = Metrics(options.names[0])
        self.vocabulary = Vocabulary(None)
        self.encoder: Any = None  # a tokenizer for the thread's own use: two threads may not share one
        self.thread = ThreadPoolExecutor(1, "tokenizer")
        self.family: calls.FamilyName | None = None  # whose form calls have
        self.markers: dict[str, int] = {}  # of calls, that are special tokens
        self.tooled = False  # whether the chat template was seen to tell of tools
        self.context = self.most = self.vocab = 0
        self.ready = self.draining = False
        self.active = 0  # requests being answered
        self.created = int(time.time())

    async def load(self) -> None:
        """Wait for the engine, and read the tokenizer of its model."""
        info = await self.client.info
        loaded = await self.in_thread(tokenizer.load, Path(info["path"]))
        self.vocabulary, self.context = Vocabulary(loaded), info["context"]
        self.most, self.vocab = info["most"], info["vocab"]
        self.encoder = copy.deepcopy(loaded)
        self.family, self.markers = self.options.tool_parser or calls.family(loaded), calls.special(loaded)
        self.ready = True

    async def in_thread(self, function: Callable, *arguments: Any) -> Any:
        """Run what takes a while, one after the other; a ValueError of the library is a 400."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, function, *arguments)

    def check(self, model: str | None) -> str:
        """The model's name. Refused if it is another's, or not there yet."""
        if self.client.dead:
            raise Refused(503, "the engine has stopped", code="engine_error")
        if not self.ready:
            raise Refused(503, "the model is being loaded", retry=2)
        if model is not None and model not in (*self.options.names, *self.options.adapters):
            known = ", ".join((*self.options.names, *self.options.adapters))
            raise Refused(404, f"no model {model!r} here; there is {known}", param="model", code="model_not_found")
        return model or self.options.names[0]

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

    async def chat(self, messages: list[ChatMessage], tools: list[Tool], *, enforced: bool = False) -> list[int]:
        """The tokens of messages. Refused if the template does not tell of the tools; enforced calls come anyhow."""
        said, told = calls.for_template(plain(messages), self.family), [tool.plain() for tool in tools] or None

        def encode() -> list[int]:
            if told and not enforced and not self.tooled:
                self.tooled = tokenizer.render(self.encoder, said, told) != tokenizer.render(self.encoder, said)
                if not self.tooled:
                    raise Refused(400, "tools: this model's chat template has no place for tools", param="tools")
            return tokenizer.encode(self.encoder, said, told)

        try:
            return await self.in_thread(encode)
        except ValueError as e:
            raise Refused(400, f"messages: {e}", param="messages") from e

    async def encode(self, prompt: Any, param: str) -> list[int]:
        """A prompt's tokens."""
        try:
            tokens = await self.in_thread(tokenizer.encode, self.encoder, prompt)
        except ValueError as e:
            raise Refused(400, f"{param}: {e}", param=param) from e
        return self.taken(tokens, param)

    def taken(self, tokens: list[int], param: str) -> list[int]:
        """Tokens that the model knows, and of which there are not more than the context. Refused if not."""
        if wrong := [t for t in tokens if not 0 <= t < self.vocab]:
            problem = f"{param}: token {wrong[0]} is outside the vocabulary of {self.vocab}"
            raise Refused(400, problem, param=param)
        if len(tokens) >= self.context:
            problem = f"{param}: {len(tokens)} tokens leave no room for output in the context of {self.context}"
            raise Refused(400, problem, param=param, code="context_length_exceeded")
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
        adapter = model if model in self.options.adapters else None
        await self.client.add(call, prompts, replace(params, stop=(), adapter=adapter), names)  # it knows no text
        self.metrics.prompt_tokens.inc(sum(map(len, prompts)))
        return answer


def _service(request: Request) -> Service:
    return request.app.state.service


router = APIRouter()


@router.post("/chat/completions", response_model=None)
async def chat(body: ChatRequest, request: Request) -> Response:
    """An answer to messages, through the model's chat template."""
    service = _service(request)
    model = service.check(body.model)
    choice, many = body.choice, body.parallel_tool_calls is not False
    form = Chat(service.vocabulary)
    tools = body.tools if choice != "none" else []  # a model that is told of tools would call them
    if tools:
        form = _calling(service, body, choice, many=many)
    params = body.sampling()
    service.fits(params.n)
    tokens = service.taken(
        await service.chat(body.messages, tools, enforced=choice in ("required", "named")), "messages"
    )
    names = {"max_tokens": "max_completion_tokens"} if body.max_completion_tokens is not None else {}
    names |= body.names()
    usage = bool(body.stream_options and body.stream_options.include_usage)
    return await service.start(request, form, model, [tokens], params, names, stream=body.stream, usage=usage)


def _calling(service: Service, body: ChatRequest, choice: str, *, many: bool) -> Chat:
    """The form of an answer with calls, which are enforced if they are required, named, or strict."""
    tools, family = body.tools, service.family
    if choice == "auto" and family is None:
        problem = "tools: the form of this model's calls is not known: start the server with --tool-parser, or give "
        raise Refused(400, problem + "tool_choice=required or a function's name", param="tools")
    if isinstance(body.tool_choice, NamedTool):
        tools, many = [tool for tool in tools if tool.function.name == body.tool_choice.function.name], False
    enforced = choice != "auto" or any(tool.function.strict for tool in tools)
    body.enforce(calls.grammar(family, tools, choice, service.markers, many=many) if enforced else None)
    names = [tool.function.name for tool in tools]
    shown = {id: text for text, id in service.markers.items()}
    reader = partial(calls.Reader, family or "llama", names, None if many else 1)
    return Chat(service.vocabulary, reader, shown, named=choice == "named")


@router.post("/completions", response_model=None)
async def completions(body: CompletionRequest, request: Request) -> Response:
    """How one or several texts, or lists of tokens, go on."""
    service = _service(request)
    params, prompts = body.sampling(), body.prompts
    model = service.check(body.model)
    service.fits(len(prompts) * params.n, "n" if len(prompts) == 1 else "prompt")
    tokens = [await service.encode(prompt, "prompt") for prompt in prompts]
    usage = bool(body.stream_options and body.stream_options.include_usage)

    def echo(choice: Choice) -> str:
        prompt = prompts[choice.index // params.n]
        return prompt if isinstance(prompt, str) else service.vocabulary.decode(prompt)

    form = Completion(service.vocabulary, echo if body.echo else None)
    return await service.start(request, form, model, tokens, params, body.names(), stream=body.stream, usage=usage)


@router.post("/inference/v1/generate", response_model=None)
async def generate(body: GenerateRequest, request: Request) -> Response:
    """Token ids in; token ids and their logprobs out."""
    service = _service(request)
    params = body.sampling()
    model = service.check(body.model)
    service.fits(params.n, "sampling_params.n")
    tokens = await service.encode(body.token_ids, "token_ids")
    names = {"prompt": "token_ids"} | {n: f"sampling_params.{n}" for n in type(body.sampling_params).model_fields}
    form = Generate(service.vocabulary)
    return await service.start(request, form, model, [tokens], params, names, stream=body.stream)


@router.post("/abort", response_model=None)
async def abort(body: AbortRequest, request: Request) -> Response:
    """End a call by its id, wherever it runs; its client gets what there is, with finish_reason abort."""
    service = _service(request)
    service.check(None)
    return _json({"aborted": await service.client.ask("kill", body.request_id)})


@router.post("/profile", response_model=None)
async def profile(body: ProfileRequest, request: Request) -> Response:
    """Trace the engine's next steps. The files are there when those have run, on the server's machine."""
    service = _service(request)
    service.check(None)
    if service.options.profiles is None:
        raise Refused(403, "this server was not started with --profile-dir FOLDER")
    found = await service.client.ask("profile", service.options.profiles, body.steps, body.skip)
    if isinstance(found, tuple):
        raise Refused(*found)
    return _json({"trace": found, "summary": found.removesuffix(".json.gz") + ".txt"})


@router.get("/models", response_model=None)
async def models(request: Request) -> Response:
    """The model, under each of its names, and its adapters."""
    service = _service(request)
    names = (*service.options.names, *service.options.adapters)
    return _json({"object": "list", "data": [_model(service, name) for name in names]})


@router.get("/models/{id:path}", response_model=None)
async def model(id: str, request: Request) -> Response:
    """One of those."""
    service = _service(request)
    return _json(_model(service, service.check(id)))


@router.post("/tokenize", response_model=None)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The tokens of a text or of messages."""
    service = _service(request)
    service.check(body.model)
    coder, prompt = service.coder("prompt"), body.prompt
    if body.messages is not None:
        tokens = await service.chat(body.messages, body.tools)
    else:
        tokens = await service.in_thread(lambda: coder(prompt, add_special_tokens=body.add_special_tokens).input_ids)
    return _json({"count": len(tokens), "max_model_len": service.context, "tokens": tokens})


@router.post("/detokenize", response_model=None)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of tokens, special ones included."""
    service = _service(request)
    service.check(body.model)
    coder = service.coder("tokens")
    vocab = len(coder)
    if wrong := [t for t in body.tokens if not 0 <= t < vocab]:
        raise Refused(400, f"tokens: {wrong[0]} is outside the tokenizer's {vocab}", param="tokens")
    text = await service.in_thread(lambda: Vocabulary(coder).decode(body.tokens, special=True))
    return _json({"prompt": text})


@router.get("/health", response_model=None)
async def health(request: Request) -> Response:
    """200 while requests are taken."""
    service = _service(request)
    if service.draining:
        raise Refused(503, "the server is shutting down")
    service.check(None)
    return _json({"status": "ok"})


@router.get("/metrics", response_model=None)
async def metrics(request: Request) -> Response:
    """For Prometheus; of all workers together."""
    service = _service(request)
    service.check(None)
    stats = await service.client.ask("stats")
    return Response(exposition(stats, service.options.names[0]), media_type=CONTENT_TYPE_LATEST)


@router.get("/status.json", response_model=None)
async def status(request: Request) -> Response:
    """Figures of the moment, for the page at /."""
    service = _service(request)
    service.check(None)
    return _json({"model": service.options.names[0]} | await service.client.ask("stats"))


async def page(request: Request) -> Response:
    """Live figures, for people."""
    return HTMLResponse(PAGE)


def _model(service: Service, name: str) -> dict[str, Any]:
    found = {"id": name, "object": "model", "created": service.created, "owned_by": "fastgen"}
    found |= {"parent": service.options.names[0]} if name in service.options.adapters else {}
    return found | {"max_model_len": service.context or None}


def _json(value: Any) -> Response:
    return Response(dump(value), media_type="application/json")


# --- errors -----------------------------------------------------------------------------------------------------------


async def _on_refused(request: Request, e: Exception) -> Response:
    assert isinstance(e, Refused)
    return refuse(e)


async def _on_http(request: Request, e: Exception) -> Response:
    """No such path or method, or a body that is no JSON."""
    assert isinstance(e, HTTPException)
    what = f"{request.method} {request.url.path}"
    messages = {404: f"there is no {what}", 405: f"{what}: another method is meant", 400: "the body is not valid JSON"}
    found = refuse(Refused(e.status_code, messages.get(e.status_code, str(e.detail))))
    found.headers.update(e.headers or {})
    return found


async def _on_invalid(request: Request, e: Exception) -> Response:
    """What pydantic found first, with the field's name."""
    assert isinstance(e, RequestValidationError)
    first = max(e.errors(), key=lambda error: len(error["loc"]))  # of a union's, that of the branch that came furthest
    where = [str(x) for i, x in enumerate(first["loc"][1:]) if isinstance(x, int) or not i or x in FIELDS]
    if first["type"] == "json_invalid":
        return refuse(Refused(400, f"the body is not valid JSON: {first['ctx']['error']}"))
    said = first["msg"].removeprefix("Value error, ")
    if not where:
        problem = "" if first["type"] == "value_error" else "the body must be a JSON object: "
        return refuse(Refused(400, problem + said))
    if first["type"] == "extra_forbidden":
        where = [str(x) for x in first["loc"][1:]]
    name = ".".join(where)
    got = "" if first["type"] == "missing" else f", got {str(first.get('input'))[:60]!r}"
    problems = {"extra_forbidden": "there is no such parameter", "missing": "is required"}
    return refuse(Refused(400, f"{name}: {problems.get(first['type'], said + got)}", param=name))


async def _on_error(request: Request, e: Exception) -> Response:
    """A mistake of ours. What it was is in the log."""
    return refuse(Refused(500, "internal error"))


# --- around every request ---------------------------------------------------------------------------------------------


class Gate:
    """Keys, the limit of a body, the time to send it, shutting down, and the log, around the app."""

    def __init__(self, app: ASGIApp, service: Callable[[], Service]) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        service = self.service()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        id = given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else uuid.uuid4().hex
        entry: dict[str, Any] = {"id": id, "endpoint": scope["path"], "began": time.monotonic()}
        scope["entry"] = entry
        started = False

        async def named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                entry.setdefault("status", message["status"])
                message["headers"] = [*message["headers"], (b"x-request-id", entry["id"].encode())]
            await send(message)

        service.active += 1
        try:
            try:
                self._admit(service, scope, headers)
                body = await self._body(headers, receive, service.options.max_body)
                if body is not None:
                    await self.app(scope, _replay(body, receive), named)
            except Refused as e:
                await refuse(e)(scope, receive, named)
        except Exception:
            entry["status"] = 500
            traceback.print_exc()
            if not started:
                await refuse(Refused(500, "internal error"))(scope, receive, named)
        finally:
            service.active -= 1
            _log(scope, entry)

    def _admit(self, service: Service, scope: Scope, headers: dict[bytes, bytes]) -> None:
        if service.options.keys and scope["path"] not in OPEN:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            # Every key is compared, whichever fits: the time tells nothing.
            fits = [hmac.compare_digest(key.encode(), given.strip()) for key in service.options.keys]
            if kind.lower() != b"bearer" or not any(fits):
                raise Refused(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        if service.draining and scope["method"] == "POST" and not scope["path"].endswith("/abort"):
            raise Refused(503, "the server is shutting down", retry=5)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive, most: int) -> bytes | None:
        """The whole body; None if the client left before it was complete."""
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > most:
            raise Refused(413, f"a body of {length[:20].decode()} bytes is more than the {most} that are taken")
        parts, size = list[bytes](), 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise Refused(413, f"the body is more than the {most} bytes that are taken")
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError as e:
            raise Refused(408, f"the body did not come within {BODY_SECONDS:.0f} s") from e


def _replay(body: bytes, receive: Receive) -> Receive:
    told = False

    async def replay() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _log(scope: Scope, entry: dict[str, Any]) -> None:
    """A line of JSON; looking at the server's state is not worth one."""
    status = entry.setdefault("status", 499)
    if scope["method"] == "GET" and (status < 400 or scope["path"].endswith("/health")):
        return
    entry["duration"] = round(time.monotonic() - entry.pop("began"), 6)
    if "ttft" in entry:
        entry["ttft"] = round(entry["ttft"], 6)
    line = json.dumps({"time": round(time.time(), 3)} | entry | {"endpoint": scope["path"][:200]})
    sys.stderr.write(f"{line}\n")  # at once, unlike print: other workers write there too
    sys.stderr.flush()


# --- the process ------------------------------------------------------------------------------------------------------


def create(service: Service, loaded: Callable[[], None]) -> ASGIApp:
    """The app, with everything around it. `loaded` is called once requests are taken."""

    async def load() -> None:
        await service.load()
        loaded()

    async def vital(part: Awaitable[None]) -> None:
        """What fails here would leave a worker that answers 503 for good; the supervisor replaces one that ends."""
        try:
            await part
        except Exception:
            traceback.print_exc()
            sys.exit(1)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(vital(part)) for part in (service.client.run(), load())]
        yield
        for task in tasks:
            task.cancel()

    app = FastAPI(title="fastgen", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    app.include_router(router)
    app.include_router(router, prefix="/v1")
    app.add_route("/", page)
    for kind, handler in (
        (Refused, _on_refused),
        (HTTPException, _on_http),
        (RequestValidationError, _on_invalid),
        (Exception, _on_error),
    ):
        app.add_exception_handler(kind, handler)
    return Gate(app, lambda: service)


class _Server(uvicorn.Server):
    """Signals are the worker's: uvicorn's own handling would stop listening at the first one."""

    def capture_signals(self) -> Any:
        """Leave them alone."""
        return nullcontext()


class _Connection(AutoHTTPProtocol):  # type: ignore[valid-type, misc]
    """One that is closed where no request comes: uvicorn waits for a first one, and for the rest of one, for ever."""

    cycle: Any  # the request that is answered, or was last
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Of asyncio.Protocol, as the others."""
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        """Perhaps the last byte of a request's head."""
        super().data_received(data)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """No timer outlives it."""
        self._expect(False)
        super().connection_lost(exc)

    def _expect(self, more: bool = True) -> None:
        if more and (self.cycle is None or self.cycle.response_complete):
            self.late = self.late or self.loop.call_later(HEAD_SECONDS, self.transport.close)
        elif self.late:
            self.late.cancel()
            self.late = None


async def _serve(options: Options, name: str, listener: socket.socket, control: Connection) -> None:
    service = Service(options, name)

    def loaded() -> None:
        with suppress(OSError):  # the supervisor is gone, which `told` hears
            control.send("ready")

    config = uvicorn.Config(
        create(service, loaded),
        log_level="warning",
        access_log=False,
        server_header=False,
        http=_Connection,
        timeout_keep_alive=round(HEAD_SECONDS),
        timeout_graceful_shutdown=1,  # what runs has ended before
    )
    server, loop = _Server(config), asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    async def drain(grace: float) -> None:
        """Take nothing new, finish what runs, and end."""
        service.draining = True
        end = loop.time() + grace
        while service.active and loop.time() < end:
            await asyncio.sleep(0.02)
        service.client.fail(Refused(503, "the server is shutting down", code="shutting_down"))
        end = loop.time() + 2
        while service.active and loop.time() < end:
            await asyncio.sleep(0.02)
        server.should_exit = True

    def begin(grace: float) -> None:
        if not tasks:
            tasks.add(loop.create_task(drain(grace)))

    def told() -> None:
        """The supervisor says that the engine is dead, or is gone itself."""
        loop.remove_reader(control.fileno())
        service.client.dead = True
        service.client.fail(Refused(500, "the engine has stopped", code="engine_error"))
        begin(2)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, begin, options.grace)
    loop.add_reader(control.fileno(), told)
    await server.serve([listener])


def run(options: Options, name: str, listener: socket.socket, control: Connection) -> None:
    """The process."""
    with suppress(ValueError, OSError):  # a connection is a file, and 1024 are soon taken
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asyncio.run(_serve(options, name, listener, control))
