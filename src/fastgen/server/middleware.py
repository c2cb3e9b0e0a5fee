"""Around every request: keys, limits, errors in OpenAI's form, and a line in the log."""

import asyncio
import hmac
import json
import re
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, Collection
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastgen.server import requests
from fastgen.server.app_state import AppState
from fastgen.server.log import log_line
from fastgen.server.requests import APIError
from fastgen.server.responses import error_response

# Names of fields: pydantic's paths to what is wrong hold those of types as well.
REQUEST_MODELS = [x for x in vars(requests).values() if isinstance(x, type) and issubclass(x, BaseModel)]
REQUEST_FIELDS = {name for model in REQUEST_MODELS for name in model.model_fields}
PUBLIC_PATHS = ("/", "/health", "/v1/health")  # without a key: they tell nothing but that there is a server
JSON_CONTENT_TYPE = re.compile(rb"\s*application/([\w.+-]+\+)?json\s*(;|$)", re.IGNORECASE)
MAX_JSON_VALUES = 2**21  # of a body, as its commas count them; lists, objects and their keys cost about as much as four
BODY_TIMEOUT_SECONDS = 60.0  # to send a request's body
LARGE_BODY_SIZE = 2**16  # bytes; reading such a body as JSON takes milliseconds
LARGE_BODY_INTERVAL_SECONDS = 0.005  # seconds between the starts of requests with such bodies, at least
LARGE_BODY_BYTES_PER_SECOND = 10**8  # of such bodies that are read in a second, at most: a few megabytes can take 0.3 s


class Middleware:
    """Keys, who may send, the limit of a body, the time to send it, shutting down, and the log, around the app."""

    def __init__(self, app: ASGIApp, get_app_state: Callable[[], AppState]) -> None:
        self.app, self.get_app_state = app, get_app_state
        self.large_body_lock = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        service = self.get_app_state()
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

        service.num_active_requests += 1
        try:
            try:
                self._check_request(service, scope, headers)
                body = await self._read_body(headers, receive, service.options.max_body_bytes)
                if body is not None:
                    await self._throttle_large_body(len(body))
                    await self.app(scope, _replay_body(body, receive), named)
            except APIError as e:
                await error_response(e)(scope, receive, named)
        except Exception:
            entry["status"] = 500
            log_line(traceback.format_exc())
            if not started:
                await error_response(APIError(500, "internal error"))(scope, receive, named)
        finally:
            service.num_active_requests -= 1
            _log_request(scope, entry)

    async def _throttle_large_body(self, num_bytes: int) -> None:
        """Spreads requests with large bodies over iterations of the event loop, so that others' are between them."""
        if num_bytes > LARGE_BODY_SIZE:
            async with self.large_body_lock:
                await asyncio.sleep(max(LARGE_BODY_INTERVAL_SECONDS, num_bytes / LARGE_BODY_BYTES_PER_SECOND))

    def _check_request(self, app_state: AppState, scope: Scope, headers: dict[bytes, bytes]) -> None:
        options = app_state.options
        if options.allowed_hosts:
            _check_host_and_origin(headers, options.allowed_hosts)
        if options.api_keys and scope["path"] not in PUBLIC_PATHS:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            # Every key is compared, whichever fits: the time tells nothing.
            fits = [hmac.compare_digest(key.encode(), given.strip()) for key in options.api_keys]
            if kind.lower() != b"bearer" or not given.strip() or not any(fits):
                raise APIError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        if app_state.is_draining and scope["method"] == "POST" and not scope["path"].endswith("/abort"):
            raise APIError(503, "the server is shutting down", retry_after=5)
        if scope["method"] == "POST" and not JSON_CONTENT_TYPE.match(headers.get(b"content-type", b"")):
            # A page of any site may post a body of another type, or of none, without asking the server first.
            raise APIError(400, "the body must be JSON, and said to be: Content-Type: application/json")

    async def _read_body(self, headers: dict[bytes, bytes], receive: Receive, max_bytes: int) -> bytes | None:
        """The whole body; None if the client left before it was complete."""
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > max_bytes:
            raise APIError(413, f"a body of {length[:20].decode()} bytes is more than the {max_bytes} that are taken")
        parts, size = list[bytes](), 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > max_bytes:
                        raise APIError(413, f"the body is more than the {max_bytes} bytes that are taken")
                    if not message.get("more_body"):
                        break
        except TimeoutError as e:
            raise APIError(408, f"the body did not come within {BODY_TIMEOUT_SECONDS:.0f} s") from e
        return _check_num_values(b"".join(parts))


def _check_num_values(body: bytes) -> bytes:
    """Refuses a body of more values than can be read without keeping other clients waiting."""
    if (
        4 * len(body) > MAX_JSON_VALUES
        and body.count(b",") + 4 * sum(map(body.count, (b"[", b"{", b":"))) > MAX_JSON_VALUES
    ):
        raise APIError(
            413, f"the body has more than {MAX_JSON_VALUES} commas, of values or in texts; [, {{ and : count as 4"
        )
    return body


def _check_host_and_origin(headers: dict[bytes, bytes], allowed_hosts: Collection[str]) -> None:
    """Refuses what a page of another site makes a browser send to a server on its user's machine.

    `Host` must be one of `hosts`, a name under localhost or an IP address: a site can have its own name point here (DNS
    rebinding), but no address that is not its own. `Origin`, which browsers add to what pages post, must be one of
    `hosts` or the same as `Host`. Programs that are no browsers send no origin.
    """
    host, origin = (headers.get(name, b"").decode("latin-1").strip().lower() for name in (b"host", b"origin"))
    name = _parse_host_name(f"//{host}")
    if host and not (_is_allowed_host(name, allowed_hosts) or _is_ip_address(name)):
        raise APIError(403, f"this server is not called {name!r}: start it with --allowed-host NAME")
    if origin and not (
        _is_allowed_host(_parse_host_name(origin), allowed_hosts) or host and origin.partition("://")[2] == host
    ):
        raise APIError(403, f"pages of {origin} may not use this server: start it with --allowed-host NAME")


def _parse_host_name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_allowed_host(name: str, allowed_hosts: Collection[str]) -> bool:
    return (
        name in allowed_hosts or name.endswith(".localhost") or (_is_ip_address(name) and ip_address(name).is_loopback)
    )


def _is_ip_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _replay_body(body: bytes, receive: Receive) -> Receive:
    told = False

    async def replay() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _log_request(scope: Scope, log_entry: dict[str, Any]) -> None:
    """A line of JSON; looking at the server's state is not worth one."""
    status = log_entry.setdefault("status", 499)
    if scope["method"] == "GET" and (status < 400 or scope["path"].endswith("/health")):
        return
    log_entry["duration"] = round(time.monotonic() - log_entry.pop("began"), 6)
    if "ttft" in log_entry:
        log_entry["ttft"] = round(log_entry["ttft"], 6)
    log_line(json.dumps({"time": round(time.time(), 3)} | log_entry | {"endpoint": scope["path"][:200]}))


async def _on_api_error(request: Request, e: Exception) -> Response:
    assert isinstance(e, APIError)
    return error_response(e)


async def _on_http_exception(request: Request, e: Exception) -> Response:
    """No such path or method, or a body that is no JSON."""
    assert isinstance(e, HTTPException)
    what = f"{request.method} {request.url.path}"
    messages = {404: f"there is no {what}", 405: f"{what}: another method is meant", 400: "the body is not valid JSON"}
    found = error_response(APIError(e.status_code, messages.get(e.status_code, str(e.detail))))
    found.headers.update(e.headers or {})
    return found


async def _on_validation_error(request: Request, e: Exception) -> Response:
    """What pydantic found first, with the field's name."""
    assert isinstance(e, RequestValidationError)
    first = max(e.errors(), key=lambda error: len(error["loc"]))  # of a union's, that of the branch that came furthest
    where = [str(x) for i, x in enumerate(first["loc"][1:]) if isinstance(x, int) or not i or x in REQUEST_FIELDS]
    if first["type"] == "json_invalid":
        return error_response(APIError(400, f"the body is not valid JSON: {first['ctx']['error']}"))
    said = first["msg"].removeprefix("Value error, ")
    if not where:
        problem = "" if first["type"] == "value_error" else "the body must be a JSON object: "
        return error_response(APIError(400, problem + said))
    if first["type"] == "extra_forbidden":
        where = [str(x) for x in first["loc"][1:]]
    name = ".".join(where)
    got = "" if first["type"] == "missing" else f", got {_abbreviate(first.get('input'))}"
    problems = {"extra_forbidden": "there is no such parameter", "missing": "is required"}
    return error_response(APIError(400, f"{name}: {problems.get(first['type'], said + got)}", param=name))


def _abbreviate(value: Any, max_chars: int = 60) -> str:
    """A value as it stood in the body, or as much of it as fits in a message; the rest is not looked at."""
    text = ""
    for piece in json.JSONEncoder(ensure_ascii=False, default=str).iterencode(value):
        text += piece[: max_chars + 1]
        if len(text) > max_chars:
            return f"{text[:max_chars]}…"
    return text


async def _on_unexpected_error(request: Request, e: Exception) -> Response:
    """A mistake of ours. What it was is in the log."""
    return error_response(APIError(500, "internal error"))


EXCEPTION_HANDLERS: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
    APIError: _on_api_error, HTTPException: _on_http_exception, RequestValidationError: _on_validation_error, Exception: _on_unexpected_error,
}  # fmt: skip
