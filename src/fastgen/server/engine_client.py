"""A worker's end of the engine's socket, for asyncio."""

import asyncio
import itertools
import pickle
from contextlib import suppress
from typing import Any

import zmq
import zmq.asyncio

from fastgen.config import SamplingParams
from fastgen.server.engine_process import TokenDelta, health_address, pack_message
from fastgen.server.metrics import MetricKey
from fastgen.server.requests import APIError, bad_request

HEALTH_TIMEOUT_SECONDS = 5.0  # in which the engine's process says how it is


class EngineClient:
    """Requests to the engine, and their events as they come."""

    def __init__(self, address: str, name: str) -> None:
        self.socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self.socket.identity = name.encode()
        self.socket.set_hwm(0)
        self.socket.linger = 0
        self.socket.connect(address)
        self.engine_info: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.is_engine_dead = False
        self.address = address
        self._failure: APIError | None = None  # why nothing is asked of the engine any more
        self._health_check: asyncio.Task[str] | None = (
            None  # of the engine's health, which all who ask meanwhile wait for
        )
        self._message_ids = map(str, itertools.count())
        self._pending_replies: dict[str, asyncio.Future[Any]] = {}
        self._delta_queues: dict[str, asyncio.Queue[list[TokenDelta] | APIError]] = {}

    async def receive_forever(self) -> None:
        """Receive, for as long as the worker lives."""
        self._send("hello")
        while True:
            kind, *rest = pickle.loads(await self.socket.recv())
            if kind == "events":
                for call, pieces in rest[0].items():
                    if queue := self._delta_queues.get(call):
                        queue.put_nowait(pieces)
            elif kind == "reply":
                key, value = rest
                if (future := self._pending_replies.pop(key, None)) and not future.done():
                    future.set_result(value)
            elif kind == "failed":
                key, why = rest
                if (future := self._pending_replies.pop(key, None)) and not future.done():
                    future.set_exception(APIError(500, why, code="engine_error"))
            elif not self.engine_info.done():
                self.engine_info.set_result(rest[0])

    def _send(self, *message: Any, message_id: str = "") -> None:
        self.socket.send_multipart([message_id.encode(), pack_message(message)])  # at once: nothing bounds the queue

    async def call_engine(self, method: str, *rest: Any) -> Any:
        """The engine's reply."""
        if self.is_engine_dead:
            raise APIError(503, "the engine has stopped")
        if self._failure:
            raise self._failure
        key = next(self._message_ids)
        self._pending_replies[key] = future = asyncio.get_running_loop().create_future()
        self._send(method, key, *rest, message_id=key)
        try:
            return await future
        finally:
            self._pending_replies.pop(key, None)

    def send_counts(self, counts: dict[MetricKey, float]) -> None:
        """Add to what all workers have counted."""
        self._send("count", counts)

    async def check_health(self) -> str:
        """What is wrong with the engine; nothing if it is well."""
        if self._health_check is None or self._health_check.done():
            self._health_check = asyncio.create_task(self._query_health())
        return await asyncio.shield(self._health_check)

    async def _query_health(self) -> str:
        with zmq.asyncio.Context.instance().socket(zmq.REQ) as socket:
            socket.linger = 0
            socket.connect(health_address(self.address))
            await socket.send(b"")
            if not await socket.poll(int(HEALTH_TIMEOUT_SECONDS * 1000)):
                return f"the engine has not answered for {HEALTH_TIMEOUT_SECONDS:.0f} s"
            return (await socket.recv()).decode()

    async def add(
        self, request_id: str, prompts: list[list[int]], sampling: SamplingParams, field_names: dict[str, str]
    ) -> None:
        """Queue a call; Refused if the engine does not take it. `close` it in the end."""
        if request_id in self._delta_queues:
            raise APIError(409, f"the request id {request_id} is in use")
        self._delta_queues[request_id] = asyncio.Queue()
        try:
            refused = await self.call_engine("add", request_id, prompts, sampling)
        except BaseException:
            self.close_request(request_id)
            raise
        if refused:
            del self._delta_queues[request_id]
            status, message = refused
            if status == 400:
                raise bad_request(message, field_names)
            raise APIError(status, message, retry_after=1 if status == 429 else None)

    async def next_deltas(self, request_id: str) -> list[TokenDelta]:
        """What the next step gave a call. Refused if nothing more comes."""
        found = await self._delta_queues[request_id].get()
        if isinstance(found, APIError):
            raise found
        return found

    def abort_choice(self, request_id: str, choice_index: int) -> None:
        """One completion is complete, whatever the engine thinks."""
        self._send("abort", request_id, choice_index)

    def close_request(self, request_id: str) -> None:
        """Nobody waits for a call any more."""
        if self._delta_queues.pop(request_id, None):
            self._send("abort", request_id, None)

    def fail_all(self, error: APIError) -> None:
        """End everything that waits for the engine, and whatever would."""
        self._failure = error
        for queue in self._delta_queues.values():
            queue.put_nowait(error)
        for future in self._pending_replies.values():
            with suppress(asyncio.InvalidStateError):
                future.set_exception(error)
