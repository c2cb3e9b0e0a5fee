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

from fastgen.server import reasoning
from fastgen.server import tool_calls as calls
from fastgen.server.app_state import MAX_TOKENIZE_CHARS, AppState
from fastgen.server.metrics import render_metrics
from fastgen.server.middleware import EXCEPTION_HANDLERS, Middleware
from fastgen.server.requests import (
    MAX_DETOKENIZE_TOKENS,
    AbortRequest,
    APIError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerateRequest,
    LoadAdapterRequest,
    NamedToolChoice,
    ProfileRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
)
from fastgen.server.responses import (
    ChatResponseBuilder,
    Choice,
    EchoedPrompt,
    TextResponseBuilder,
    TokenDecoder,
    TokenResponseBuilder,
    dump_json,
)

STATUS_PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")


def _get_app_state(request: Request) -> AppState:
    return request.app.state.service


router = APIRouter()


@router.post("/chat/completions", response_model=None)
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """An answer to messages, through the model's chat template."""
    service = _get_app_state(request)
    model = await service.resolve_model_name(body.model)
    choice, many = body.tool_choice_mode, body.parallel_tool_calls is not False
    shown = {id: text for text, id in service.marker_token_ids.items() if text in reasoning.MARKERS}
    form = ChatResponseBuilder(
        service.token_decoder, visible_special_tokens=shown, may_reason=body.resolve_grammar() is None
    )
    tools = body.tools if choice != "none" else []  # a model that is told of tools would call them
    if tools:
        form = _make_tool_call_builder(service, body, choice, parallel_calls=many)
    params = body.to_sampling_params()
    service.check_num_completions(params.n)
    tokens = service.check_token_ids(
        await service.encode_chat(body.messages, tools, calls_enforced=choice in ("required", "named")), "messages"
    )
    names = {"max_tokens": "max_completion_tokens"} if body.max_completion_tokens is not None else {}
    names |= body.client_field_names()
    usage = bool(body.stream_options and body.stream_options.include_usage)
    versions = body.return_weight_versions
    return await service.submit(
        request,
        form,
        model,
        [tokens],
        params,
        names,
        stream=body.stream,
        include_usage=usage,
        return_weight_versions=versions,
    )


def _make_tool_call_builder(
    app_state: AppState, body: ChatRequest, tool_choice: str, *, parallel_calls: bool
) -> ChatResponseBuilder:
    """The form of an answer with calls, which are enforced if they are required, named, or strict."""
    tools, family = body.tools, app_state.tool_call_format
    if tool_choice == "auto" and family is None:
        problem = "tools: the form of this model's calls is not known: start the server with --tool-parser, or give "
        raise APIError(400, problem + "tool_choice=required or a function's name", param="tools")
    if isinstance(body.tool_choice, NamedToolChoice):
        tools, parallel_calls = [tool for tool in tools if tool.function.name == body.tool_choice.function.name], False
    enforced = tool_choice != "auto" or any(tool.function.strict for tool in tools)
    body.enforce_tool_calls(
        calls.build_grammar(family, tools, tool_choice, app_state.marker_token_ids, parallel_calls=parallel_calls)
        if enforced
        else None
    )
    names = [tool.function.name for tool in tools]
    shown = {id: text for text, id in app_state.marker_token_ids.items()}
    reader = partial(calls.ToolCallParser, family or "llama", names, None if parallel_calls else 1)
    return ChatResponseBuilder(
        app_state.token_decoder,
        reader,
        shown,
        is_function_named=tool_choice == "named",
        may_reason=tool_choice == "auto",
    )


@router.post("/completions", response_model=None)
async def completions(body: CompletionRequest, request: Request) -> Response:
    """How one or several texts, or lists of tokens, go on."""
    service = _get_app_state(request)
    params, prompts = body.to_sampling_params(), body.prompts
    model = await service.resolve_model_name(body.model)
    service.check_num_completions(len(prompts) * params.n, "n" if len(prompts) == 1 else "prompt")
    tokens = [await service.encode_prompt(prompt, "prompt") for prompt in prompts]
    usage = bool(body.stream_options and body.stream_options.include_usage)
    versions = body.return_weight_versions

    echoes = (
        [await service.echo_prompt(prompt, ids) for prompt, ids in zip(prompts, tokens, strict=True)]
        if body.echo
        else []
    )

    def echo(choice: Choice) -> EchoedPrompt:
        return echoes[choice.index // params.n]

    form = TextResponseBuilder(service.token_decoder, echo if body.echo else None)
    return await service.submit(
        request,
        form,
        model,
        tokens,
        params,
        body.client_field_names(),
        stream=body.stream,
        include_usage=usage,
        return_weight_versions=versions,
    )


@router.post("/inference/v1/generate", response_model=None)
async def generate(body: GenerateRequest, request: Request) -> Response:
    """Token ids in; token ids and their logprobs out."""
    service = _get_app_state(request)
    params = body.to_sampling_params()
    model = await service.resolve_model_name(body.model)
    service.check_num_completions(params.n, "sampling_params.n")
    tokens = await service.encode_prompt(body.token_ids, "token_ids")
    names = {"prompt": "token_ids"} | {n: f"sampling_params.{n}" for n in type(body.sampling_params).model_fields}
    form = TokenResponseBuilder(service.token_decoder)
    versions = body.return_weight_versions
    return await service.submit(
        request, form, model, [tokens], params, names, stream=body.stream, return_weight_versions=versions
    )


@router.post("/abort", response_model=None)
async def abort(body: AbortRequest, request: Request) -> Response:
    """End a call by its id, wherever it runs; its client gets what there is, with finish_reason abort."""
    service = _get_app_state(request)
    service.check_ready()
    return _json_response({"aborted": await service.engine_client.call_engine("abort_by_id", body.request_id)})


@router.post("/profile", response_model=None)
async def profile(body: ProfileRequest, request: Request) -> Response:
    """Trace the engine's next steps. The files are there when those have run, on the server's machine."""
    service = _get_app_state(request)
    service.check_ready()
    if service.options.profile_dir is None:
        raise APIError(403, "this server was not started with --profile-dir FOLDER")
    found = await service.engine_client.call_engine("profile", service.options.profile_dir, body.steps, body.skip)
    if isinstance(found, tuple):
        raise APIError(*found)
    return _json_response({"trace": found, "summary": found.removesuffix(".json.gz") + ".txt"})


@router.post("/load_lora_adapter", response_model=None)
async def load_adapter(body: LoadAdapterRequest, request: Request) -> Response:
    """An adapter from a folder on the server's machine, chosen as a model from then on."""
    service = _get_app_state(request)
    await service.load_adapter(body.lora_name, body.lora_path, load_inplace=body.load_inplace)
    return _json_response(_describe_model(service, body.lora_name))


@router.post("/unload_lora_adapter", response_model=None)
async def unload_adapter(body: UnloadAdapterRequest, request: Request) -> Response:
    """Make room for another."""
    await _get_app_state(request).unload_adapter(body.lora_name)
    return _json_response({"unloaded": body.lora_name})


@router.get("/models", response_model=None)
async def list_models(request: Request) -> Response:
    """The model, under each of its names, and its adapters."""
    service = _get_app_state(request)
    return _json_response(
        {"object": "list", "data": [_describe_model(service, name) for name in await service.list_model_names()]}
    )


@router.get("/models/{id:path}", response_model=None)
async def get_model(id: str, request: Request) -> Response:
    """One of those."""
    service = _get_app_state(request)
    return _json_response(_describe_model(service, await service.resolve_model_name(id)))


@router.post("/tokenize", response_model=None)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The tokens of a text or of messages."""
    service = _get_app_state(request)
    await service.resolve_model_name(body.model)
    service.require_tokenizer("prompt")
    if body.messages is not None:
        tokens = await service.encode_chat(body.messages, body.tools)
    else:
        prompt, most = body.prompt or "", max(MAX_TOKENIZE_CHARS, service.max_prompt_chars)
        options = {"add_special_tokens": body.add_special_tokens, "return_attention_mask": False}
        tokens = await service.run_tokenizer(
            lambda coder: coder(prompt, **options).input_ids, len(prompt), "prompt", most
        )
    return _json_response({"count": len(tokens), "max_model_len": service.context_length, "tokens": tokens})


@router.post("/detokenize", response_model=None)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of tokens, special ones included."""
    service = _get_app_state(request)
    await service.resolve_model_name(body.model)
    vocab = len(service.require_tokenizer("tokens"))
    if wrong := [t for t in body.tokens if not 0 <= t < vocab]:
        raise APIError(400, f"tokens: {wrong[0]} is outside the tokenizer's {vocab}", param="tokens")

    def decode(coder: Any) -> str:
        return TokenDecoder(coder).decode(body.tokens)

    text = await service.run_tokenizer(decode, len(body.tokens), "tokens", MAX_DETOKENIZE_TOKENS)
    return _json_response({"prompt": text})


@router.get("/health", response_model=None)
async def health(request: Request) -> Response:
    """200 while requests are taken, and the engine's process answers."""
    service = _get_app_state(request)
    if service.is_draining:
        raise APIError(503, "the server is shutting down")
    service.check_ready()
    if problem := await service.engine_client.check_health():
        raise APIError(503, problem, code="engine_error")
    return _json_response({"status": "ok"})


@router.get("/metrics", response_model=None)
async def metrics(request: Request) -> Response:
    """For Prometheus; of all workers together."""
    service = _get_app_state(request)
    service.check_ready()
    counts, stats = await service.engine_client.call_engine("metrics")
    return Response(render_metrics(counts, stats, service.options.model_names[0]), media_type=CONTENT_TYPE_LATEST)


@router.get("/status.json", response_model=None)
async def status(request: Request) -> Response:
    """Figures of the moment, for the page at /."""
    service = _get_app_state(request)
    service.check_ready()
    return _json_response({"model": service.options.model_names[0]} | await service.engine_client.call_engine("stats"))


async def status_page(request: Request) -> Response:
    """Live figures, for people."""
    return HTMLResponse(STATUS_PAGE)


def _describe_model(app_state: AppState, name: str) -> dict[str, Any]:
    found = {"id": name, "object": "model", "created": app_state.created, "owned_by": "fastgen"}
    found |= {} if name in app_state.options.model_names else {"parent": app_state.options.model_names[0]}
    return found | {"max_model_len": app_state.context_length or None}


def _json_response(value: Any) -> Response:
    return Response(dump_json(value), media_type="application/json")


def create_app(app_state: AppState, on_ready: Callable[[], None]) -> ASGIApp:
    """The app, with everything around it. `loaded` is called once requests are taken."""

    async def load() -> None:
        await app_state.load()
        on_ready()

    async def vital(part: Awaitable[None]) -> None:
        """What fails here would leave a worker that answers 503 for good; the supervisor replaces one that ends."""
        try:
            await part
        except Exception:
            traceback.print_exc()
            sys.exit(1)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(vital(part)) for part in (app_state.engine_client.receive_forever(), load())]
        yield
        for task in tasks:
            task.cancel()

    app = FastAPI(title="fastgen", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = app_state
    app.include_router(router)
    app.include_router(router, prefix="/v1")
    app.add_route("/", status_page)
    for kind, handler in EXCEPTION_HANDLERS.items():
        app.add_exception_handler(kind, handler)
    return Middleware(app, lambda: app_state)
