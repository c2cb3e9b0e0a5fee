"""A worker's end of the engine's socket, for asyncio."""

import asyncio
import itertools
import pickle
from contextlib import suppress
from typing import Any

import zmq
import zmq.asyncio

from fastgen.config import SamplingParams
from fastgen.serve.core import Piece, health_address, pack
from fastgen.serve.metrics import Key
from fastgen.serve.protocol import Refused, refusal

HEALTH_SECONDS = 5.0  # in which the engine's process says how it is


class Client:
    """Requests to the engine, and their events as they come."""

    def __init__(self, address: str, name: str) -> None:
        self.socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self.socket.identity = name.encode()
        self.socket.set_hwm(0)
        self.socket.linger = 0
        self.socket.connect(address)
        self.info: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.dead = False
        self.address = address
        self._failure: Refused | None = None  # why nothing is asked of the engine any more
        self._check: asyncio.Task[str] | None = None  # of the engine's health, which all who ask meanwhile wait for
        self._keys = map(str, itertools.count())
        self._asked: dict[str, asyncio.Future[Any]] = {}
        self._calls: dict[str, asyncio.Queue[list[Piece] | Refused]] = {}

    async def run(self) -> None:
        """Receive, for as long as the worker lives."""
        self._send("hello")
        while True:
            kind, *rest = pickle.loads(await self.socket.recv())
            if kind == "events":
                for call, pieces in rest[0].items():
                    if queue := self._calls.get(call):
                        queue.put_nowait(pieces)
            elif kind == "reply":
                key, value = rest
                if (future := self._asked.pop(key, None)) and not future.done():
                    future.set_result(value)
            elif kind == "failed":
                key, why = rest
                if (future := self._asked.pop(key, None)) and not future.done():
                    future.set_exception(Refused(500, why, code="engine_error"))
            elif not self.info.done():
                self.info.set_result(rest[0])

    def _send(self, *message: Any, key: str = "") -> None:
        self.socket.send_multipart([key.encode(), pack(message)])  # at once: nothing bounds the queue

    async def ask(self, kind: str, *rest: Any) -> Any:
        """The engine's reply."""
        if self.dead:
            raise Refused(503, "the engine has stopped")
        if self._failure:
            raise self._failure
        key = next(self._keys)
        self._asked[key] = future = asyncio.get_running_loop().create_future()
        self._send(kind, key, *rest, key=key)
        try:
            return await future
        finally:
            self._asked.pop(key, None)

    def count(self, changes: dict[Key, float]) -> None:
        """Add to what all workers have counted."""
        self._send("count", changes)

    async def problem(self) -> str:
        """What is wrong with the engine; nothing if it is well."""
        if self._check is None or self._check.done():
            self._check = asyncio.create_task(self._ask_health())
        return await asyncio.shield(self._check)

    async def _ask_health(self) -> str:
        with zmq.asyncio.Context.instance().socket(zmq.REQ) as socket:
            socket.linger = 0
            socket.connect(health_address(self.address))
            await socket.send(b"")
            if not await socket.poll(int(HEALTH_SECONDS * 1000)):
                return f"the engine has not answered for {HEALTH_SECONDS:.0f} s"
            return (await socket.recv()).decode()

    async def add(self, call: str, prompts: list[list[int]], params: SamplingParams, names: dict[str, str]) -> None:
        """Queue a call; Refused if the engine does not take it. `close` it in the end."""
        if call in self._calls:
            raise Refused(409, f"the request id {call} is in use")
        self._calls[call] = asyncio.Queue()
        try:
            refused = await self.ask("add", call, prompts, params)
        except BaseException:
            self.close(call)
            raise
        if refused:
            del self._calls[call]
            status, message = refused
            if status == 400:
                raise refusal(message, names)
            raise Refused(status, message, retry=1 if status == 429 else None)

    async def next(self, call: str) -> list[Piece]:
        """What the next step gave a call. Refused if nothing more comes."""
        found = await self._calls[call].get()
        if isinstance(found, Refused):
            raise found
        return found

    def end(self, call: str, slot: int) -> None:
        """One completion is complete, whatever the engine thinks."""
        self._send("abort", call, slot)

    def close(self, call: str) -> None:
        """Nobody waits for a call any more."""
        if self._calls.pop(call, None):
            self._send("abort", call, None)

    def fail(self, why: Refused) -> None:
        """End everything that waits for the engine, and whatever would."""
        self._failure = why
        for queue in self._calls.values():
            queue.put_nowait(why)
        for future in self._asked.values():
            with suppress(asyncio.InvalidStateError):
                future.set_exception(why)
