"""Sends responses: JSON bodies, streams of server-sent events, errors; ends a request when its client disconnects."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastgen.core.request import NON_FINITE_LOGITS
from fastgen.sampling_params import SamplingParams
from fastgen.server import metrics
from fastgen.server.app_state import AppState
from fastgen.server.engine_process import EngineServer
from fastgen.server.errors import APIError
from fastgen.server.requests import GenerationRequest
from fastgen.server.responses import Choice, ChoiceDelta, Json, ResponseBuilder, TokenDecoder

MAX_INLINE_LOGPROBS = 4096  # logprobs of a body that is encoded in the event loop; larger bodies use a thread
JSON_CHUNK_ELEMENTS = 64  # list elements encoded at a time in the thread
# Line ends to Python's splitlines, which some clients split streams with: U+0085, U+2028 and U+2029.
LINE_SEPARATOR_ESCAPES = tuple((chr(c).encode(), f"\\u{c:04x}".encode()) for c in (0x85, 0x2028, 0x2029))
ENGINE_ERROR_MESSAGES = {  # by finish reason
    "failed": "the engine failed while it computed this",
    "error": "the model's output is NaN or infinite for this request: its weights, or the adapter's, are broken",
}


def dump_json(value: Any) -> bytes:
    """Encodes a value as JSON without line ends. Text that is not valid Unicode (half a surrogate pair) becomes "?"."""
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    for raw, escaped in LINE_SEPARATOR_ESCAPES:
        data = data.replace(raw, escaped)
    return data


def iter_json_chunks(value: Any) -> Iterator[bytes]:
    """Yields the bytes of `dump_json` in chunks, since other threads wait while the encoder runs."""
    if isinstance(value, dict) and value:
        for i, (name, member) in enumerate(value.items()):
            yield (b"," if i else b"{") + dump_json(name) + b":"
            yield from iter_json_chunks(member)
        yield b"}"
    elif isinstance(value, list) and len(value) > JSON_CHUNK_ELEMENTS:
        for i in range(0, len(value), JSON_CHUNK_ELEMENTS):
            yield (b"," if i else b"[") + dump_json(value[i : i + JSON_CHUNK_ELEMENTS])[1:-1]
        yield b"]"
    else:
        yield dump_json(value)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Makes a response with a JSON body."""
    return Response(dump_json(value), status, headers, media_type="application/json")


def error_response(error: APIError) -> Response:
    """Makes the response for an error."""
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(error.to_body(), error.status, headers)


class CompletionResponse(Response):
    """Response to a request for completions: one JSON body, or a stream of server-sent events.

    Ends with the last choice, with the engine, or when the client disconnects; nothing of the request runs afterwards.
    """

    def __init__(
        self,
        state: AppState,
        request: Request,
        body: GenerationRequest,
        builder: ResponseBuilder,
        model_name: str,
        prompts: list[list[int]],
        sampling: SamplingParams,
    ) -> None:
        self.background = None  # Response.__init__ is not called: there is no body yet
        self.state, self.fields, self.builder, self.prompts, self.sampling = state, body, builder, prompts, sampling
        self.log_entry = request.scope["entry"]  # the request's line in the log, which receives the numbers of tokens
        self.id = self.log_entry["id"] = f"{builder.id_prefix}-{self.log_entry['id']}"
        object_type = builder.chunk_object_type if body.stream else builder.object_type
        # The fields of the body, or of each chunk, around its choices.
        self.envelope = {"id": self.id, "object": object_type, "created": int(time.time()), "model": model_name}
        decoder = builder.token_decoder if builder.has_text else TokenDecoder(None)
        options: Json = {"stream_text": builder.has_text and (body.stream or sampling.logprobs is not None)}
        options["visible_special_tokens"] = builder.visible_special_tokens
        choices = [prompt for prompt in prompts for _ in range(sampling.n)]
        self.choices = [Choice(i, decoder, prompt, sampling, **options) for i, prompt in enumerate(choices)]

    async def submit(self) -> "CompletionResponse":
        """Adds the request to the engine; returns this response, which receives the tokens as it is sent."""
        params, model_name = self.sampling, self.envelope["model"]
        if params.stop and self.state.token_decoder.tokenizer is None:
            raise APIError(400, "stop: this model came without a tokenizer; use stop_token_ids", param="stop")
        # The engine knows no text: stop strings end a request from this side.
        adapter = None if model_name in self.state.options.model_names else model_name
        params = replace(params, stop=(), adapter=adapter)
        await self.state.engine_client.add(self.id, self.prompts, params, self.fields.field_names)
        self.state.metrics.count(metrics.PROMPT_TOKENS, sum(map(len, self.prompts)))
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the response, unless the client disconnects before its end."""
        response = self._send_stream(send) if self.fields.stream else self._send_body(scope, receive, send)
        sending = asyncio.create_task(response)
        disconnected = asyncio.create_task(_wait_for_disconnect(receive))
        try:
            await asyncio.wait({sending, disconnected}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                await sending
            else:
                self.log_entry["status"] = 499  # nginx's status for a client that disconnected
        finally:
            for task in (sending, disconnected):
                task.cancel()
            await asyncio.gather(sending, disconnected, return_exceptions=True)
            self.state.engine_client.close_request(self.id)
            self._record_totals()

    def _record_totals(self) -> None:
        for choice in self.choices:
            self.state.metrics.count(metrics.REQUEST_SUCCESS, label=choice.accumulated.finish_reason or "abort")
        self.state.metrics.observe(metrics.E2E_LATENCY, time.monotonic() - self.log_entry["start_time"])
        self.state.metrics.flush()
        usage = self._build_usage()
        num_tokens = usage["prompt_tokens"], *usage["prompt_tokens_details"].values(), usage["completion_tokens"]
        self.log_entry |= zip(("prompt_tokens", "cached_tokens", "output_tokens"), num_tokens, strict=True)

    async def _iter_deltas(self) -> AsyncGenerator[list[tuple[Choice, ChoiceDelta]]]:
        """Yields what each step added, until every choice has finished."""
        num_unfinished = len(self.choices)
        while num_unfinished:
            deltas = []
            for token_delta in await self.state.engine_client.next_deltas(self.id):
                choice, reason = self.choices[token_delta.choice_index], token_delta.finish_reason
                if choice.accumulated.finish_reason:
                    continue  # tokens after a stop string
                if reason in ENGINE_ERROR_MESSAGES:
                    choice.accumulated.finish_reason = "error"
                    has_details = token_delta.error not in ("", NON_FINITE_LOGITS)
                    message = token_delta.error if has_details else ENGINE_ERROR_MESSAGES[reason]
                    raise APIError(500, message, code="engine_error")
                delta = choice.push(token_delta)
                if self.fields.return_weight_versions and token_delta.weight_version is not None:
                    choice.unsent_weight_versions += [token_delta.weight_version] * len(delta.token_ids)
                self._record_latency(choice, len(delta.token_ids))
                if delta.finish_reason:
                    num_unfinished -= 1
                    if not reason:  # a stop string, which the engine does not know
                        self.state.engine_client.notify_engine(EngineServer.abort, self.id, choice.index)
                deltas.append((choice, delta))
            yield deltas

    def _record_latency(self, choice: Choice, num_tokens: int) -> None:
        now = time.monotonic()
        self.state.metrics.count(metrics.GENERATION_TOKENS, num_tokens)
        if choice.last_token_time is not None:
            self.state.metrics.observe(metrics.INTER_TOKEN_LATENCY, now - choice.last_token_time)
        elif num_tokens and "ttft" not in self.log_entry:
            self.log_entry["ttft"] = now - self.log_entry["start_time"]
            self.state.metrics.observe(metrics.TTFT, self.log_entry["ttft"])
        choice.last_token_time = now if num_tokens else choice.last_token_time

    def _build_usage(self) -> Json:
        """Counts tokens. A prompt counts once, however many completions it has."""
        num_prompt_tokens = sum(map(len, self.prompts))
        num_output_tokens = sum(len(c.accumulated.token_ids) for c in self.choices)
        first_choices = self.choices[:: self.sampling.n]
        num_cached_tokens = sum(c.final_delta.num_cached_tokens for c in first_choices if c.final_delta)
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_output_tokens,
            "total_tokens": num_prompt_tokens + num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
        }

    def _add_weight_versions(self, choice: Choice, choice_json: Json) -> Json:
        """Adds the versions of the weights that sampled the tokens since the last chunk, if requested."""
        if self.fields.return_weight_versions:
            choice_json["weight_versions"], choice.unsent_weight_versions = choice.unsent_weight_versions, []
        return choice_json

    async def _send_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._iter_deltas()) as steps:
                async for _ in steps:
                    pass
        except APIError as e:
            await error_response(e)(scope, receive, send)
            return
        num_tokens, params = sum(len(c.accumulated.token_ids) for c in self.choices), self.sampling
        if params.prompt_logprobs is not None:
            num_tokens += sum(map(len, self.prompts))
        has_logprobs = params.logprobs is not None or params.prompt_logprobs is not None
        if has_logprobs and num_tokens * (1 + (params.logprobs or 0)) > MAX_INLINE_LOGPROBS:
            parts = await asyncio.to_thread(self._encode_body, lambda value: b"".join(iter_json_chunks(value)))
        else:
            parts = self._encode_body(dump_json)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(sum(map(len, parts))).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _encode_body(self, encode: Callable[[Any], bytes]) -> list[bytes]:
        """Returns the parts of the JSON body: the start, each choice, and the end."""
        parts = [dump_json(self.envelope)[:-1] + b',"choices":[']
        for i, choice in enumerate(self.choices):
            prompt_delta = self.choices[i - i % self.sampling.n].final_delta
            choice_json = self._add_weight_versions(choice, self.builder.build_choice(choice, prompt_delta))
            parts.append(b"," * (i > 0) + encode(choice_json))
        return [*parts, b'],"usage":' + dump_json(self._build_usage()) + b"}"]

    async def _send_stream(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        headers.append((b"x-accel-buffering", b"no"))  # nginx would buffer the stream
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        builder, usage = self.builder, {"usage": None} if self.fields.include_usage else {}

        async def send_events(*values: Json, is_last: bool = False) -> None:
            data = b"".join(b"data: " + dump_json(v) + b"\n\n" for v in values) + b"data: [DONE]\n\n" * is_last
            await send({"type": "http.response.body", "body": data, "more_body": True})

        async def send_chunks(choices: list[Json]) -> None:
            if choices:
                await send_events(*(self.envelope | {"choices": [choice]} | usage for choice in choices))

        try:
            await send_chunks([chunk for c in self.choices if (chunk := builder.build_first_chunk(c))])
            async with aclosing(self._iter_deltas()) as steps:
                async for deltas in steps:
                    if builder.has_text:  # tokens without text, logprobs or end make no chunk
                        deltas = [(c, d) for c, d in deltas if d.text or d.finish_reason or d.logprobs]
                    chunks = [(c, chunk) for c, d in deltas if (chunk := builder.build_chunk(c, d))]
                    await send_chunks([self._add_weight_versions(c, chunk) for c, chunk in chunks])
            final = [self.envelope | {"choices": [], "usage": self._build_usage()}] if self.fields.include_usage else []
            await send_events(*final, is_last=True)
        except APIError as e:
            self.log_entry["status"] = e.status
            await send_events(e.to_body(), is_last=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
