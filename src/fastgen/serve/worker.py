"""The process of an HTTP worker: its connections, its signals, and its end."""

import asyncio
import resource
import signal
import socket
from contextlib import nullcontext, suppress
from multiprocessing.connection import Connection
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from fastgen.serve.app import create
from fastgen.serve.protocol import Refused
from fastgen.serve.service import Options, Service

HEAD_SECONDS = 30.0  # to send what comes before a body, and to be idle between two requests


class _Server(uvicorn.Server):
    """Signals are the worker's: uvicorn's own handling would stop listening at the first one."""

    def capture_signals(self) -> Any:
        """Leave them alone."""
        return nullcontext()


class _Connection(AutoHTTPProtocol):  # type: ignore[valid-type, misc]
    """One that is closed where no request comes: uvicorn waits for a first one, and for the rest of one, for ever."""

    cycle: Any  # the request that is answered, or was last
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Of asyncio.Protocol, as the others."""
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        """Perhaps the last byte of a request's head."""
        super().data_received(data)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """No timer outlives it."""
        self._expect(False)
        super().connection_lost(exc)

    def _expect(self, more: bool = True) -> None:
        if more and (self.cycle is None or self.cycle.response_complete):
            self.late = self.late or self.loop.call_later(HEAD_SECONDS, self.transport.close)
        elif self.late:
            self.late.cancel()
            self.late = None


async def _serve(options: Options, name: str, listener: socket.socket, control: Connection) -> None:
    service = Service(options, name)

    def loaded() -> None:
        with suppress(OSError):  # the supervisor is gone, which `told` hears
            control.send("ready")

    config = uvicorn.Config(
        create(service, loaded),
        log_level="warning",
        access_log=False,
        server_header=False,
        http=_Connection,
        timeout_keep_alive=round(HEAD_SECONDS),
        timeout_graceful_shutdown=1,  # what runs has ended before
    )
    server, loop = _Server(config), asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    async def drain(grace: float) -> None:
        """Take nothing new, finish what runs, and end."""
        service.draining = True
        end = loop.time() + grace
        while service.active and loop.time() < end:
            await asyncio.sleep(0.02)
        service.client.fail(Refused(503, "the server is shutting down", code="shutting_down"))
        end = loop.time() + 2
        while service.active and loop.time() < end:
            await asyncio.sleep(0.02)
        server.should_exit = True

    def begin(grace: float) -> None:
        if not tasks:
            tasks.add(loop.create_task(drain(grace)))

    def told() -> None:
        """The supervisor says that the engine is dead, or is gone itself."""
        loop.remove_reader(control.fileno())
        service.client.dead = True
        service.client.fail(Refused(500, "the engine has stopped", code="engine_error"))
        begin(2)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, begin, options.grace)
    loop.add_reader(control.fileno(), told)
    await server.serve([listener])


def run(options: Options, name: str, listener: socket.socket, control: Connection) -> None:
    """The process."""
    with suppress(ValueError, OSError):  # a connection is a file, and 1024 are soon taken
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asyncio.run(_serve(options, name, listener, control))
