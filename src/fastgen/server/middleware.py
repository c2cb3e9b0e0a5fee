"""What surrounds every request: API keys, hosts, limits, errors in OpenAI's form, and a line in the log."""

import asyncio
import hmac
import json
import re
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
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
from fastgen.server.errors import APIError
from fastgen.server.log import log_line
from fastgen.server.sse import error_response

# Names of fields: pydantic's paths to an error contain names of types as well.
REQUEST_MODELS = [x for x in vars(requests).values() if isinstance(x, type) and issubclass(x, BaseModel)]
REQUEST_FIELDS = {name for model in REQUEST_MODELS for name in model.model_fields}
PUBLIC_PATHS = ("/", "/health", "/v1/health")  # need no key: they reveal only that there is a server
JSON_CONTENT_TYPE = re.compile(rb"\s*application/([\w.+-]+\+)?json\s*(;|$)", re.IGNORECASE)
MAX_JSON_VALUES = 2**21  # in a body, by its commas; a list, an object and a key each take as long as four values
BODY_TIMEOUT_SECONDS = 60.0  # for a client to send a request's body
LARGE_BODY_SIZE = 2**16  # bytes; parsing such a body takes milliseconds
LARGE_BODY_INTERVAL_SECONDS = 0.005  # at least, between the starts of requests with large bodies
LARGE_BODY_BYTES_PER_SECOND = 10**8  # of large bodies that are parsed, at most: a few megabytes can take 0.3 s


class Middleware:
    """ASGI middleware: checks a request's head and body before the app receives it, and logs the request afterwards."""

    def __init__(self, app: ASGIApp, get_app_state: Callable[[], AppState]) -> None:
        self.app, self.get_app_state = app, get_app_state
        self.large_body_lock = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request, as an ASGI app must."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state, headers = self.get_app_state(), dict(scope["headers"])
        client_id = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = client_id if re.fullmatch(r"[\w.-]{1,64}", client_id, re.ASCII) else uuid.uuid4().hex
        entry: dict[str, Any] = {"id": request_id, "endpoint": scope["path"], "began": time.monotonic()}
        scope["entry"] = entry
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                entry.setdefault("status", message["status"])
                message["headers"] = [*message["headers"], (b"x-request-id", entry["id"].encode())]
            await send(message)

        state.num_active_requests += 1
        try:
            try:
                self._check_request(state, scope, headers)
                body = await self._read_body(headers, receive, state.options.max_body_bytes)
                if body is not None:
                    await self._throttle_large_body(len(body))
                    await self.app(scope, _replay_body(body, receive), send_with_id)
            except APIError as e:
                await error_response(e)(scope, receive, send_with_id)
        except Exception:
            entry["status"] = 500
            log_line(traceback.format_exc())
            if not has_started:
                await error_response(APIError(500, "internal error"))(scope, receive, send_with_id)
        finally:
            state.num_active_requests -= 1
            _log_request(scope, entry)

    async def _throttle_large_body(self, num_bytes: int) -> None:
        """Spreads requests with large bodies over time, so that the event loop serves other requests between them."""
        if num_bytes > LARGE_BODY_SIZE:
            async with self.large_body_lock:
                await asyncio.sleep(max(LARGE_BODY_INTERVAL_SECONDS, num_bytes / LARGE_BODY_BYTES_PER_SECOND))

    def _check_request(self, app_state: AppState, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Raises APIError for a request whose head is refused."""
        options = app_state.options
        if options.allowed_hosts:
            _check_host_and_origin(headers, options.allowed_hosts)
        if options.api_keys and scope["path"] not in PUBLIC_PATHS:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            # Compares every key, whichever matches, so that the time reveals nothing.
            matches = [hmac.compare_digest(api_key.encode(), key.strip()) for api_key in options.api_keys]
            if scheme.lower() != b"bearer" or not key.strip() or not any(matches):
                raise APIError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        if app_state.is_draining and scope["method"] == "POST" and not scope["path"].endswith("/abort"):
            raise APIError(503, "the server is shutting down", retry_after=5)
        if scope["method"] == "POST" and not JSON_CONTENT_TYPE.match(headers.get(b"content-type", b"")):
            # Pages of any site may post a body of another type, or of none, without asking the server first.
            raise APIError(400, "the body must be JSON, declared by Content-Type: application/json")

    async def _read_body(self, headers: dict[bytes, bytes], receive: Receive, max_bytes: int) -> bytes | None:
        """Returns the body, or None if the client left before it was complete. Raises APIError beyond a limit."""
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > max_bytes:
            raise APIError(413, f"a body of {length[:20].decode()} bytes is more than the limit of {max_bytes}")
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
                        raise APIError(413, f"the body is more than the limit of {max_bytes} bytes")
                    if not message.get("more_body"):
                        break
        except TimeoutError as e:
            raise APIError(408, f"the body did not come within {BODY_TIMEOUT_SECONDS:.0f} s") from e
        return _check_num_values(b"".join(parts))


def _check_num_values(body: bytes) -> bytes:
    """Returns the body. Raises APIError if it has so many values that parsing it would delay other clients."""
    if 4 * len(body) > MAX_JSON_VALUES:
        if body.count(b",") + 4 * sum(map(body.count, (b"[", b"{", b":"))) > MAX_JSON_VALUES:
            limit = f"{MAX_JSON_VALUES} commas, between values or in strings; [, {{ and : count as 4"
            raise APIError(413, f"the body has more than {limit}")
    return body


def _check_host_and_origin(headers: dict[bytes, bytes], allowed_hosts: Collection[str]) -> None:
    """Raises APIError for what a page of another site makes a browser send to a server on its user's machine.

    `Host` must be one of `allowed_hosts`, a name under localhost or an IP address: a site can make its own name resolve
    to this machine (DNS rebinding), but not an address. `Origin`, which browsers add to what pages post, must be one of
    `allowed_hosts` or the same as `Host`. Programs other than browsers send no origin.
    """
    host, origin = (headers.get(name, b"").decode("latin-1").strip().lower() for name in (b"host", b"origin"))
    name = _parse_host_name(f"//{host}")
    if host and not (_is_allowed_host(name, allowed_hosts) or _parse_ip_address(name)):
        raise APIError(403, f"this server is not called {name!r}: start it with --allowed-host NAME")
    is_same_host = bool(host) and origin.partition("://")[2] == host
    if origin and not (is_same_host or _is_allowed_host(_parse_host_name(origin), allowed_hosts)):
        raise APIError(403, f"pages of {origin} may not use this server: start it with --allowed-host NAME")


def _parse_host_name(url: str) -> str:
    with suppress(ValueError):
        return urlsplit(url).hostname or ""
    return ""


def _parse_ip_address(name: str) -> IPv4Address | IPv6Address | None:
    with suppress(ValueError):
        return ip_address(name)


def _is_allowed_host(name: str, allowed_hosts: Collection[str]) -> bool:
    address = _parse_ip_address(name)
    return name in allowed_hosts or name.endswith(".localhost") or (address is not None and address.is_loopback)


def _replay_body(body: bytes, receive: Receive) -> Receive:
    """Returns a `receive` that returns a body that was read already, then what follows it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _log_request(scope: Scope, entry: dict[str, Any]) -> None:
    """Logs a request as a line of JSON. Successful GET requests, and all for the health, are not logged."""
    status = entry.setdefault("status", 499)
    if scope["method"] == "GET" and (status < 400 or scope["path"].endswith("/health")):
        return
    entry["duration"] = round(time.monotonic() - entry.pop("began"), 6)
    if "ttft" in entry:
        entry["ttft"] = round(entry["ttft"], 6)
    log_line(json.dumps({"time": round(time.time(), 3)} | entry | {"endpoint": scope["path"][:200]}))


async def _on_api_error(request: Request, e: Exception) -> Response:
    assert isinstance(e, APIError)
    return error_response(e)


async def _on_http_exception(request: Request, e: Exception) -> Response:
    """Responds to an unknown path or method, or to a body that is not JSON."""
    assert isinstance(e, HTTPException)
    path = f"{request.method} {request.url.path}"
    messages = {404: f"there is no {path}", 405: f"{path} is not allowed", 400: "the body is not valid JSON"}
    response = error_response(APIError(e.status_code, messages.get(e.status_code, str(e.detail))))
    response.headers.update(e.headers or {})
    return response


async def _on_validation_error(request: Request, e: Exception) -> Response:
    """Responds with pydantic's first error and the name of the field."""
    assert isinstance(e, RequestValidationError)
    first = max(e.errors(), key=lambda error: len(error["loc"]))  # of a union, the error in the branch that fits best
    loc = [str(x) for i, x in enumerate(first["loc"][1:]) if isinstance(x, int) or not i or x in REQUEST_FIELDS]
    if first["type"] == "json_invalid":
        return error_response(APIError(400, f"the body is not valid JSON: {first['ctx']['error']}"))
    message = first["msg"].removeprefix("Value error, ")
    if not loc:
        problem = "" if first["type"] == "value_error" else "the body must be a JSON object: "
        return error_response(APIError(400, problem + message))
    if first["type"] == "extra_forbidden":
        loc = [str(x) for x in first["loc"][1:]]
    name = ".".join(loc)
    value = "" if first["type"] == "missing" else f", got {_abbreviate(first.get('input'))}"
    messages = {"extra_forbidden": "there is no such parameter", "missing": "is required"}
    return error_response(APIError(400, f"{name}: {messages.get(first['type'], message + value)}", param=name))


def _abbreviate(value: Any, max_chars: int = 60) -> str:
    """Returns a value as JSON, of which no more is built than fits in a message."""
    text = ""
    for chunk in json.JSONEncoder(ensure_ascii=False, default=str).iterencode(value):
        text += chunk[: max_chars + 1]
        if len(text) > max_chars:
            return f"{text[:max_chars]}…"
    return text


async def _on_unexpected_error(request: Request, e: Exception) -> Response:
    """Responds to an error of the server, which is in the log."""
    return error_response(APIError(500, "internal error"))


EXCEPTION_HANDLERS: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
    APIError: _on_api_error, HTTPException: _on_http_exception, RequestValidationError: _on_validation_error,
    Exception: _on_unexpected_error,
}  # fmt: skip
