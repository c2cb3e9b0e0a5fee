"""A worker's end of the engine's socket, for asyncio."""

import asyncio
import itertools
import pickle
from contextlib import suppress
from typing import Any

import zmq
import zmq.asyncio

from fastgen.config import SamplingParams
from fastgen.serve.core import Piece, pack
from fastgen.serve.protocol import Refused, refusal


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
            elif not self.info.done():
                self.info.set_result(rest[0])

    def _send(self, *message: Any) -> None:
        self.socket.send(pack(message))  # at once: nothing bounds the queue

    async def ask(self, kind: str, *rest: Any) -> Any:
        """The engine's reply."""
        if self.dead:
            raise Refused(503, "the engine has stopped")
        key = next(self._keys)
        self._asked[key] = future = asyncio.get_running_loop().create_future()
        self._send(kind, key, *rest)
        try:
            return await future
        finally:
            self._asked.pop(key, None)

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
        """End everything that waits for the engine."""
        for queue in self._calls.values():
            queue.put_nowait(why)
        for future in self._asked.values():
            with suppress(asyncio.InvalidStateError):
                future.set_exception(why)
