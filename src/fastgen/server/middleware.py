"""ASGI middleware of every request: API keys, hosts, limits, errors in OpenAI's form, and a line in the log."""

import asyncio
import hmac
import json
import re
import time
import traceback
import uuid
from collections.abc import Collection
from contextlib import suppress
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
from fastgen.server.completion_response import error_response
from fastgen.server.errors import APIError
from fastgen.server.log import log_line

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
HANDLED_EXCEPTIONS = (APIError, HTTPException, RequestValidationError, Exception)  # by `handle_error`


class Middleware:
    """ASGI middleware: checks a request's head and body before the app receives it, and logs the request afterwards."""

    def __init__(self, app: ASGIApp, state: AppState) -> None:
        self.app, self.state = app, state
        self.large_body_lock = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request, as an ASGI app must."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        client_id = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = client_id if re.fullmatch(r"[\w.-]{1,64}", client_id, re.ASCII) else uuid.uuid4().hex
        entry: dict[str, Any] = {"id": request_id, "endpoint": scope["path"], "start_time": time.monotonic()}
        scope["entry"] = entry
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                entry.setdefault("status", message["status"])
                message["headers"] = [*message["headers"], (b"x-request-id", entry["id"].encode())]
            await send(message)

        self.state.num_active_requests += 1
        try:
            try:
                self._check_head(scope, headers)
                body = await self._read_body(headers, receive)
                if body is not None:
                    await self.app(scope, _replay_body(body, receive), send_with_id)
            except APIError as e:
                await error_response(e)(scope, receive, send_with_id)
        except Exception:
            entry["status"] = 500
            log_line(traceback.format_exc())
            if not has_started:
                await error_response(APIError(500, "internal error"))(scope, receive, send_with_id)
        finally:
            self.state.num_active_requests -= 1
            _log_request(scope, entry)

    def _check_head(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Raises APIError for a request whose head is refused."""
        options = self.state.options
        if options.allowed_hosts:
            _check_host_and_origin(headers, options.allowed_hosts)
        if options.api_keys and scope["path"] not in PUBLIC_PATHS:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            # Compares every key, whichever matches, so that the time reveals nothing.
            matches = [hmac.compare_digest(api_key.encode(), key.strip()) for api_key in options.api_keys]
            if scheme.lower() != b"bearer" or not key.strip() or not any(matches):
                raise APIError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        if self.state.is_draining and scope["method"] == "POST" and not scope["path"].endswith("/abort"):
            raise APIError(503, "the server is shutting down", retry_after=5)
        if scope["method"] == "POST" and not JSON_CONTENT_TYPE.match(headers.get(b"content-type", b"")):
            # Pages of any site may post a body of another type, or of none, without asking the server first.
            raise APIError(400, "the body must be JSON, declared by Content-Type: application/json")

    async def _read_body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """Returns the body, or None if the client left before it was complete. Raises APIError beyond a limit."""
        max_bytes, length = self.state.options.max_body_bytes, headers.get(b"content-length", b"0")
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
        body = _check_num_values(b"".join(parts))
        if size > LARGE_BODY_SIZE:  # spread over time, so that the event loop serves other requests between them
            async with self.large_body_lock:
                await asyncio.sleep(max(LARGE_BODY_INTERVAL_SECONDS, size / LARGE_BODY_BYTES_PER_SECOND))
        return body


def _check_num_values(body: bytes) -> bytes:
    """Returns the body. Raises APIError if it has so many values that parsing it would delay other clients."""
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

    def parse(url: str) -> tuple[str, bool, bool]:
        """Returns the name of a host, whether it is allowed, and whether it is an IP address."""
        name, address = "", None
        with suppress(ValueError):
            name = urlsplit(url).hostname or ""
            address = ip_address(name)
        is_local = name.endswith(".localhost") or (address is not None and address.is_loopback)
        return name, name in allowed_hosts or is_local, address is not None

    host, origin = (headers.get(name, b"").decode("latin-1").strip().lower() for name in (b"host", b"origin"))
    name, is_allowed, is_address = parse(f"//{host}")
    if host and not (is_allowed or is_address):
        raise APIError(403, f"this server is not called {name!r}: start it with --allowed-host NAME")
    is_same_host = bool(host) and origin.partition("://")[2] == host
    if origin and not (is_same_host or parse(origin)[1]):
        raise APIError(403, f"pages of {origin} may not use this server: start it with --allowed-host NAME")


def _replay_body(body: bytes, receive: Receive) -> Receive:
    """Returns a `receive` that returns a body that was read already, then what follows it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _log_request(scope: Scope, entry: dict[str, Any]) -> None:
    """Logs a request as a line of JSON. Successful GET requests and all health checks are not logged."""
    status = entry.setdefault("status", 499)
    if scope["method"] == "GET" and (status < 400 or scope["path"].endswith("/health")):
        return
    entry["duration"] = round(time.monotonic() - entry.pop("start_time"), 6)
    if "ttft" in entry:
        entry["ttft"] = round(entry["ttft"], 6)
    log_line(json.dumps({"time": round(time.time(), 3)} | entry | {"endpoint": scope["path"][:200]}))


async def handle_error(request: Request, e: Exception) -> Response:
    """Responds to an error of `HANDLED_EXCEPTIONS`; others than these three types are errors of the server."""
    headers = {}
    if isinstance(e, RequestValidationError):
        e = _describe_validation_error(e)
    elif isinstance(e, HTTPException):  # an unknown path or method, or a body that is not JSON
        path, headers = f"{request.method} {request.url.path}", e.headers or {}
        messages = {404: f"there is no {path}", 405: f"{path} is not allowed", 400: "the body is not valid JSON"}
        e = APIError(e.status_code, messages.get(e.status_code, str(e.detail)))
    response = error_response(e if isinstance(e, APIError) else APIError(500, "internal error"))
    response.headers.update(headers)
    return response


def _describe_validation_error(e: RequestValidationError) -> APIError:
    """Makes the 400 for a pydantic error that names the field; of a union, for the branch that fits best."""
    error = max(e.errors(), key=lambda error: len(error["loc"]))
    (_, *path), message = error["loc"], error["msg"].removeprefix("Value error, ")
    fields = [x for i, x in enumerate(path) if isinstance(x, int) or not i or x in REQUEST_FIELDS]
    match error["type"]:
        case "json_invalid" if isinstance(path[0], int):
            return APIError(400, f"the body is not valid JSON: {error['ctx']['error']}")
        case _ if not fields:
            problem = "" if error["type"] == "value_error" else "the body must be a JSON object: "
            return APIError(400, problem + message)
        case "extra_forbidden":
            fields, message = path, "there is no such parameter"
        case "missing":
            message = "is required"
        case _:
            message += f", got {_abbreviate(error.get('input'))}"
    name = ".".join(map(str, fields))
    return APIError(400, f"{name}: {message}", param=name)


def _abbreviate(value: Any, max_chars: int = 60) -> str:
    """Returns a value as JSON, of which no more is built than fits in a message."""
    text = ""
    for chunk in json.JSONEncoder(ensure_ascii=False, default=str).iterencode(value):
        text += chunk[: max_chars + 1]
        if len(text) > max_chars:
            return f"{text[:max_chars]}…"
    return text
