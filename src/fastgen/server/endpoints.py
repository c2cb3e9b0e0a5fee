"""HTTP endpoints: OpenAI's API, token-only generation, tokenization, adapters, health and metrics."""

import asyncio
import sys
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from safetensors import SafetensorError
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp

from fastgen import lora
from fastgen.server import reasoning, responses, tool_calls
from fastgen.server import requests as bodies
from fastgen.server.app_state import MAX_TOKENIZE_CHARS, AppState
from fastgen.server.completion_response import CompletionResponse, json_response
from fastgen.server.engine_process import EngineServer
from fastgen.server.errors import APIError
from fastgen.server.metrics import render_metrics
from fastgen.server.middleware import HANDLED_EXCEPTIONS, Middleware, handle_error
from fastgen.server.responses import ChatResponseBuilder

STATUS_PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
router = APIRouter()


async def _get_app_state(request: Request) -> AppState:  # not a thread, as for a plain function
    request.app.state.app_state.check_ready()
    return request.app.state.app_state


State = Annotated[AppState, Depends(_get_app_state)]


@router.post("/chat/completions")
async def chat_completions(body: bodies.ChatRequest, request: Request, state: State) -> Response:
    """Completes a chat."""
    model, choice = await state.resolve_model_name(body.model), body.tool_choice_mode
    builder, params = _make_chat_builder(state, body), body.to_sampling_params()
    state.check_num_completions(params.n)
    tools = body.tools if choice != "none" else []  # a model that sees tools would call them
    enforced, options = choice in ("required", "named"), body.template_options
    token_ids = await state.encode_chat(body.messages, tools, options, calls_enforced=enforced)
    token_ids = token_ids[-(params.truncate_prompt_tokens or 0) :]
    prompts = [state.check_token_ids(token_ids, "messages")]
    return await CompletionResponse(state, request, body, builder, model, prompts, params).submit()


def _make_chat_builder(state: AppState, body: bodies.ChatRequest) -> ChatResponseBuilder:
    """Makes the builder for a chat; enforces tool calls that are required, named or strict by a grammar."""
    choice, call_format, markers = body.tool_choice_mode, state.tool_call_format, state.marker_token_ids
    may_reason = choice in ("none", "auto") and body.resolve_grammar() is None
    if choice == "none" or not body.tools:
        visible = {id: text for text, id in markers.items() if text in reasoning.MARKERS}
        return ChatResponseBuilder(state.token_decoder, visible_special_tokens=visible, may_reason=may_reason)
    if choice == "auto" and call_format is None:
        problem = "tools: the form of this model's calls is not known: start the server with --tool-parser, or give "
        raise APIError(400, problem + "tool_choice=required or a function's name", param="tools")
    tools, parallel_calls = body.tools, body.parallel_tool_calls is not False
    if isinstance(body.tool_choice, bodies.NamedToolChoice):
        name = body.tool_choice.function.name
        tools, parallel_calls = [tool for tool in tools if tool.function.name == name], False
    grammar = None
    if choice != "auto" or any(tool.function.strict for tool in tools):
        grammar = tool_calls.build_grammar(call_format, tools, choice, markers, parallel_calls=parallel_calls)
    body.enforce_tool_calls(grammar)
    names, max_calls = [tool.function.name for tool in tools], None if parallel_calls else 1
    make_parser = partial(tool_calls.ToolCallParser, call_format or "llama", names, max_calls)
    builder = ChatResponseBuilder(state.token_decoder, make_parser, choice == "named", may_reason)
    builder.visible_special_tokens = {id: text for text, id in markers.items()}
    return builder


@router.post("/completions")
async def completions(body: bodies.CompletionRequest, request: Request, state: State) -> Response:
    """Completes one or several prompts, as text or token ids."""
    params, prompts = body.to_sampling_params(), body.prompts
    model = await state.resolve_model_name(body.model)
    state.check_num_completions(len(prompts) * params.n, "n" if len(prompts) == 1 else "prompt")
    token_ids = [await state.encode_prompt(prompt, "prompt", params.truncate_prompt_tokens) for prompt in prompts]
    pairs = zip(prompts, token_ids, strict=True)
    echoes = [await state.echo_prompt(prompt, ids) for prompt, ids in pairs] if body.echo else []
    builder = responses.TextResponseBuilder(state.token_decoder, echoes)
    return await CompletionResponse(state, request, body, builder, model, token_ids, params).submit()


@router.post("/inference/v1/generate")
async def generate(body: bodies.GenerateRequest, request: Request, state: State) -> Response:
    """Generates from token ids; returns token ids and logprobs."""
    params = body.to_sampling_params()
    model = await state.resolve_model_name(body.model)
    state.check_num_completions(params.n, "sampling_params.n")
    prompts = [await state.encode_prompt(body.token_ids, "token_ids")]
    builder = responses.TokenResponseBuilder(state.token_decoder)
    return await CompletionResponse(state, request, body, builder, model, prompts, params).submit()


@router.post("/abort")
async def abort(body: bodies.AbortRequest, state: State) -> Response:
    """Aborts a request by its id, on any worker; its client receives the output so far, with finish_reason abort."""
    aborted = await state.engine_client.call_engine(EngineServer.abort_by_id, body.request_id)
    return json_response({"aborted": aborted})


@router.post("/profile")
async def profile(body: bodies.ProfileRequest, state: State) -> Response:
    """Traces the engine's next steps. The files appear on the server's machine once these have run."""
    if state.options.profile_dir is None:
        raise APIError(403, "this server was not started with --profile-dir FOLDER")
    args = state.options.profile_dir, body.steps, body.skip
    trace = await state.engine_client.call_engine(EngineServer.profile, *args)
    return json_response({"trace": trace, "summary": trace.removesuffix(".json.gz") + ".txt"})


@router.post("/load_lora_adapter")
async def load_adapter(body: bodies.LoadAdapterRequest, state: State) -> Response:
    """Loads a LoRA adapter from a folder in --lora-dir, or replaces a loaded one; requests select it as their model."""
    root = _get_lora_dir(state, body.lora_name)
    try:
        folder = (root / body.lora_path).resolve()
        if not (folder.is_relative_to(root) and folder.is_dir()):
            raise ValueError(f"{body.lora_path!r} is not a folder inside --lora-dir")
        adapter = await asyncio.to_thread(lora.load, folder, state.engine_info.model_config, device="cpu")
    except (ValueError, OSError, SafetensorError) as e:
        raise APIError(400, f"lora_path: {e}", param="lora_path") from e
    await state.engine_client.call_engine(EngineServer.set_adapter, body.lora_name, adapter, body.load_inplace)
    return json_response(_describe_model(state, body.lora_name))


@router.post("/unload_lora_adapter")
async def unload_adapter(body: bodies.UnloadAdapterRequest, state: State) -> Response:
    """Unloads a LoRA adapter; rejected while requests use it."""
    _get_lora_dir(state, body.lora_name)
    name = await state.resolve_model_name(body.lora_name)
    await state.engine_client.call_engine(EngineServer.set_adapter, name, None, False)
    return json_response({"unloaded": body.lora_name})


def _get_lora_dir(state: AppState, adapter_name: str) -> Path:
    """Returns the folder of adapters; rejects the model's own names."""
    if state.options.lora_dir is None:
        raise APIError(403, "this server was not started with --lora-dir FOLDER")
    if adapter_name in state.options.model_names:
        raise APIError(400, f"lora_name: {adapter_name!r} is the model's own name", param="lora_name")
    return Path(state.options.lora_dir)


@router.get("/models")
async def list_models(state: State) -> Response:
    """Lists the model, under each of its names, and its LoRA adapters."""
    models = [_describe_model(state, name) for name in await state.list_model_names()]
    return json_response({"object": "list", "data": models})


@router.get("/models/{id:path}")
async def get_model(id: str, state: State) -> Response:
    """Describes a model or LoRA adapter."""
    return json_response(_describe_model(state, await state.resolve_model_name(id)))


@router.post("/tokenize")
async def tokenize(body: bodies.TokenizeRequest, state: State) -> Response:
    """Returns the token ids of a text or of messages."""
    await state.resolve_model_name(body.model)
    state.require_tokenizer("prompt")
    if body.messages is not None:
        tokens = await state.encode_chat(body.messages, body.tools, body.template_options)
    else:
        prompt, max_chars = body.prompt or "", max(MAX_TOKENIZE_CHARS, state.max_prompt_chars)
        options = {"add_special_tokens": body.add_special_tokens, "return_attention_mask": False}
        limits = len(prompt), "prompt", max_chars
        tokens = await state.run_tokenizer(lambda coder: coder(prompt, **options).input_ids, *limits)
    return json_response({"count": len(tokens), "max_model_len": state.engine_info.context_length, "tokens": tokens})


@router.post("/detokenize")
async def detokenize(body: bodies.DetokenizeRequest, state: State) -> Response:
    """Returns the text of tokens, including special tokens."""
    await state.resolve_model_name(body.model)
    vocab_size = len(state.require_tokenizer("tokens"))
    if wrong := [t for t in body.tokens if not 0 <= t < vocab_size]:
        raise APIError(400, f"tokens: {wrong[0]} is outside the tokenizer's {vocab_size}", param="tokens")
    limits = len(body.tokens), "tokens", bodies.MAX_DETOKENIZE_TOKENS
    text = await state.run_tokenizer(lambda coder: responses.TokenDecoder(coder).decode(body.tokens), *limits)
    return json_response({"prompt": text})


@router.get("/health")
async def health(request: Request) -> Response:
    """Returns 200 while the server accepts requests and the engine's process answers."""
    if request.app.state.app_state.is_draining:
        raise APIError(503, "the server is shutting down")
    state = await _get_app_state(request)
    if problem := await state.engine_client.check_health():
        raise APIError(503, problem, code="engine_error")
    return json_response({"status": "ok"})


@router.get("/metrics")
async def metrics(state: State) -> Response:
    """Returns the metrics of all workers for Prometheus."""
    counts, stats = await state.engine_client.call_engine(EngineServer.get_metrics)
    return Response(render_metrics(counts, stats, state.options.model_names[0]), media_type=CONTENT_TYPE_LATEST)


@router.get("/status.json")
async def status(state: State) -> Response:
    """Returns current figures, for the page at /."""
    stats = await state.engine_client.call_engine(EngineServer.get_stats)
    return json_response({"model": state.options.model_names[0]} | stats)


async def status_page(request: Request) -> Response:
    """Returns a page with live figures."""
    return HTMLResponse(STATUS_PAGE)


def _describe_model(app_state: AppState, name: str) -> dict[str, Any]:
    model = {"id": name, "object": "model", "created": app_state.created, "owned_by": "fastgen"}
    model |= {} if name in app_state.options.model_names else {"parent": app_state.options.model_names[0]}
    return model | {"max_model_len": app_state.engine_info.context_length}


def create_app(app_state: AppState, on_ready: Callable[[], None]) -> ASGIApp:
    """Creates the app with its middleware; calls `on_ready` once the worker can answer requests."""

    async def run() -> None:
        """Exits on an error, so that the supervisor replaces a worker that could only answer 503."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(app_state.engine_client.receive_forever())
                await app_state.load()
                on_ready()
        except Exception:
            traceback.print_exc()
            sys.exit(1)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(run())
        yield
        task.cancel()

    app = FastAPI(title="fastgen", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.app_state = app_state
    app.include_router(router)
    app.include_router(router, prefix="/v1")
    app.add_route("/", status_page)
    for exception_type in HANDLED_EXCEPTIONS:
        app.add_exception_handler(exception_type, handle_error)
    return Middleware(app, app_state)
