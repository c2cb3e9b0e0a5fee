"""OpenAI's endpoints."""

import asyncio
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp

from fastgen.serve import reasoning
from fastgen.serve import tools as calls
from fastgen.serve.answer import Chat, Choice, Completion, Echo, Generate, Vocabulary, dump
from fastgen.serve.gate import HANDLERS, Gate
from fastgen.serve.metrics import exposition
from fastgen.serve.protocol import (
    MAX_DECODED,
    AbortRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerateRequest,
    LoadAdapterRequest,
    NamedTool,
    ProfileRequest,
    Refused,
    TokenizeRequest,
    UnloadAdapterRequest,
)
from fastgen.serve.service import TOKENIZED, Service

PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")


def _service(request: Request) -> Service:
    return request.app.state.service


router = APIRouter()


@router.post("/chat/completions", response_model=None)
async def chat(body: ChatRequest, request: Request) -> Response:
    """An answer to messages, through the model's chat template."""
    service = _service(request)
    model = await service.named(body.model)
    choice, many = body.choice, body.parallel_tool_calls is not False
    shown = {id: text for text, id in service.markers.items() if text in reasoning.MARKERS}
    form = Chat(service.vocabulary, shown=shown, reasons=body.guide() is None)
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
    versions = body.return_weight_versions
    return await service.start(
        request, form, model, [tokens], params, names, stream=body.stream, usage=usage, versions=versions
    )


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
    return Chat(service.vocabulary, reader, shown, named=choice == "named", reasons=choice == "auto")


@router.post("/completions", response_model=None)
async def completions(body: CompletionRequest, request: Request) -> Response:
    """How one or several texts, or lists of tokens, go on."""
    service = _service(request)
    params, prompts = body.sampling(), body.prompts
    model = await service.named(body.model)
    service.fits(len(prompts) * params.n, "n" if len(prompts) == 1 else "prompt")
    tokens = [await service.encode(prompt, "prompt") for prompt in prompts]
    usage = bool(body.stream_options and body.stream_options.include_usage)
    versions = body.return_weight_versions

    echoes = [await service.echo(prompt, ids) for prompt, ids in zip(prompts, tokens, strict=True)] if body.echo else []

    def echo(choice: Choice) -> Echo:
        return echoes[choice.index // params.n]

    form = Completion(service.vocabulary, echo if body.echo else None)
    return await service.start(
        request, form, model, tokens, params, body.names(), stream=body.stream, usage=usage, versions=versions
    )


@router.post("/inference/v1/generate", response_model=None)
async def generate(body: GenerateRequest, request: Request) -> Response:
    """Token ids in; token ids and their logprobs out."""
    service = _service(request)
    params = body.sampling()
    model = await service.named(body.model)
    service.fits(params.n, "sampling_params.n")
    tokens = await service.encode(body.token_ids, "token_ids")
    names = {"prompt": "token_ids"} | {n: f"sampling_params.{n}" for n in type(body.sampling_params).model_fields}
    form = Generate(service.vocabulary)
    versions = body.return_weight_versions
    return await service.start(request, form, model, [tokens], params, names, stream=body.stream, versions=versions)


@router.post("/abort", response_model=None)
async def abort(body: AbortRequest, request: Request) -> Response:
    """End a call by its id, wherever it runs; its client gets what there is, with finish_reason abort."""
    service = _service(request)
    service.check()
    return _json({"aborted": await service.client.ask("kill", body.request_id)})


@router.post("/profile", response_model=None)
async def profile(body: ProfileRequest, request: Request) -> Response:
    """Trace the engine's next steps. The files are there when those have run, on the server's machine."""
    service = _service(request)
    service.check()
    if service.options.profiles is None:
        raise Refused(403, "this server was not started with --profile-dir FOLDER")
    found = await service.client.ask("profile", service.options.profiles, body.steps, body.skip)
    if isinstance(found, tuple):
        raise Refused(*found)
    return _json({"trace": found, "summary": found.removesuffix(".json.gz") + ".txt"})


@router.post("/load_lora_adapter", response_model=None)
async def load_adapter(body: LoadAdapterRequest, request: Request) -> Response:
    """An adapter from a folder on the server's machine, chosen as a model from then on."""
    service = _service(request)
    await service.load_adapter(body.lora_name, body.lora_path, again=body.load_inplace)
    return _json(_model(service, body.lora_name))


@router.post("/unload_lora_adapter", response_model=None)
async def unload_adapter(body: UnloadAdapterRequest, request: Request) -> Response:
    """Make room for another."""
    await _service(request).unload_adapter(body.lora_name)
    return _json({"unloaded": body.lora_name})


@router.get("/models", response_model=None)
async def models(request: Request) -> Response:
    """The model, under each of its names, and its adapters."""
    service = _service(request)
    return _json({"object": "list", "data": [_model(service, name) for name in await service.names()]})


@router.get("/models/{id:path}", response_model=None)
async def model(id: str, request: Request) -> Response:
    """One of those."""
    service = _service(request)
    return _json(_model(service, await service.named(id)))


@router.post("/tokenize", response_model=None)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The tokens of a text or of messages."""
    service = _service(request)
    await service.named(body.model)
    service.coder("prompt")
    if body.messages is not None:
        tokens = await service.chat(body.messages, body.tools)
    else:
        prompt, most = body.prompt or "", max(TOKENIZED, service.longest)
        options = {"add_special_tokens": body.add_special_tokens, "return_attention_mask": False}
        tokens = await service.tokenized(lambda coder: coder(prompt, **options).input_ids, len(prompt), "prompt", most)
    return _json({"count": len(tokens), "max_model_len": service.context, "tokens": tokens})


@router.post("/detokenize", response_model=None)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of tokens, special ones included."""
    service = _service(request)
    await service.named(body.model)
    vocab = len(service.coder("tokens"))
    if wrong := [t for t in body.tokens if not 0 <= t < vocab]:
        raise Refused(400, f"tokens: {wrong[0]} is outside the tokenizer's {vocab}", param="tokens")

    def decode(coder: Any) -> str:
        return Vocabulary(coder).decode(body.tokens)

    text = await service.tokenized(decode, len(body.tokens), "tokens", MAX_DECODED)
    return _json({"prompt": text})


@router.get("/health", response_model=None)
async def health(request: Request) -> Response:
    """200 while requests are taken, and the engine's process answers."""
    service = _service(request)
    if service.draining:
        raise Refused(503, "the server is shutting down")
    service.check()
    if problem := await service.client.problem():
        raise Refused(503, problem, code="engine_error")
    return _json({"status": "ok"})


@router.get("/metrics", response_model=None)
async def metrics(request: Request) -> Response:
    """For Prometheus; of all workers together."""
    service = _service(request)
    service.check()
    counts, stats = await service.client.ask("metrics")
    return Response(exposition(counts, stats, service.options.names[0]), media_type=CONTENT_TYPE_LATEST)


@router.get("/status.json", response_model=None)
async def status(request: Request) -> Response:
    """Figures of the moment, for the page at /."""
    service = _service(request)
    service.check()
    return _json({"model": service.options.names[0]} | await service.client.ask("stats"))


async def page(request: Request) -> Response:
    """Live figures, for people."""
    return HTMLResponse(PAGE)


def _model(service: Service, name: str) -> dict[str, Any]:
    found = {"id": name, "object": "model", "created": service.created, "owned_by": "fastgen"}
    found |= {} if name in service.options.names else {"parent": service.options.names[0]}
    return found | {"max_model_len": service.context or None}


def _json(value: Any) -> Response:
    return Response(dump(value), media_type="application/json")


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
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
    return Gate(app, lambda: service)
