"""An HTTP worker's end of the engine's socket, for asyncio."""

import asyncio
import itertools
import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Concatenate, ParamSpec, TypeVar

import zmq
import zmq.asyncio

from fastgen.sampling_params import SamplingParams
from fastgen.server.engine_process import HEALTH_SUFFIX, EngineInfo, EngineServer, Reply, Sender, TokenDelta
from fastgen.server.errors import APIError, bad_request

P = ParamSpec("P")
R = TypeVar("R")
HEALTH_TIMEOUT_SECONDS = 5.0  # for the engine's process to answer the health check


class EngineClient:
    """Calls methods of the `EngineServer` and receives the token deltas of requests."""

    def __init__(self, address: str, name: str) -> None:
        self.socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self.socket.identity = name.encode()
        self.socket.set_hwm(0)
        self.socket.linger = 0
        self.socket.connect(address)
        self.engine_info: asyncio.Future[EngineInfo] = asyncio.get_running_loop().create_future()
        self.is_engine_dead = False
        self.address = address
        self._failure: APIError | None = None  # answers every call once set
        self._health_check: asyncio.Task[str] | None = None  # shared by concurrent health requests
        self._message_ids = map(str, itertools.count())
        self._pending_replies: dict[str, asyncio.Future] = {}
        self._delta_queues: dict[str, asyncio.Queue[list[TokenDelta] | APIError]] = {}

    async def receive_forever(self) -> None:
        """Receives the engine's messages until cancelled."""
        self.notify_engine(EngineServer.hello)
        while True:
            message = pickle.loads(await self.socket.recv())
            if isinstance(message, dict):
                for request_id, deltas in message.items():
                    if queue := self._delta_queues.get(request_id):
                        queue.put_nowait(deltas)
            elif isinstance(message, Reply):
                future = self._pending_replies.pop(message.message_id, None)
                if future and not future.done():
                    future.set_exception(message.error) if message.error else future.set_result(message.value)
            elif not self.engine_info.done():
                self.engine_info.set_result(message)

    def notify_engine(self, method: Callable[..., object], *args: object, message_id: str = "") -> None:
        """Calls a method of the `EngineServer` without waiting. The socket's queue is unbounded: this sends at once."""
        self.socket.send_multipart([message_id.encode(), pickle.dumps((method.__name__, args))])

    async def call_engine(
        self, method: Callable[Concatenate[EngineServer, Sender, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Calls a method of the `EngineServer` with positional arguments; returns its result or raises APIError."""
        if self._failure:
            raise self._failure
        message_id = next(self._message_ids)
        self._pending_replies[message_id] = future = asyncio.get_running_loop().create_future()
        self.notify_engine(method, *args, message_id=message_id)
        try:
            return await future
        finally:
            self._pending_replies.pop(message_id, None)

    async def check_health(self) -> str:
        """Returns what is wrong with the engine, "" if nothing is."""
        if self._health_check is None or self._health_check.done():
            self._health_check = asyncio.create_task(self._query_health())
        return await asyncio.shield(self._health_check)

    async def _query_health(self) -> str:
        with zmq.asyncio.Context.instance().socket(zmq.REQ) as socket:
            socket.linger = 0
            socket.connect(self.address + HEALTH_SUFFIX)
            await socket.send(b"")
            if not await socket.poll(int(HEALTH_TIMEOUT_SECONDS * 1000)):
                return f"the engine has not answered for {HEALTH_TIMEOUT_SECONDS:.0f} s"
            return (await socket.recv()).decode()

    async def add(
        self, request_id: str, prompts: list[list[int]], sampling: SamplingParams, field_names: dict[str, str]
    ) -> None:
        """Adds a request to the engine; `close_request` must follow. Raises APIError if the engine rejects it."""
        if request_id in self._delta_queues:
            raise APIError(409, f"the request id {request_id} is in use")
        self._delta_queues[request_id] = asyncio.Queue()
        try:
            await self.call_engine(EngineServer.add, request_id, prompts, sampling)
        except BaseException as e:  # also CancelledError, when the HTTP client disconnects
            self.close_request(request_id)
            if isinstance(e, APIError) and e.status == 400:
                raise bad_request(e.message, field_names) from None
            raise

    async def next_deltas(self, request_id: str) -> list[TokenDelta]:
        """Returns the deltas of the next step with tokens for a request. Raises APIError once the engine is gone."""
        deltas = await self._delta_queues[request_id].get()
        if isinstance(deltas, APIError):
            raise deltas
        return deltas

    def close_request(self, request_id: str) -> None:
        """Ends a request and drops its deltas."""
        if self._delta_queues.pop(request_id, None):
            self.notify_engine(EngineServer.abort, request_id, None)

    def fail_all(self, error: APIError) -> None:
        """Ends all requests and calls with an error, also future ones."""
        self._failure = error
        for queue in self._delta_queues.values():
            queue.put_nowait(error)
        for future in self._pending_replies.values():
            with suppress(asyncio.InvalidStateError):
                future.set_exception(error)
