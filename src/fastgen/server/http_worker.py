"""The process of an HTTP worker: its connections, its signals, and its end."""

import asyncio
import errno
import gc
import resource
import signal
import socket
from collections.abc import Callable
from contextlib import nullcontext, suppress
from multiprocessing.connection import Connection
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from fastgen.server.app_state import AppState, ServerOptions
from fastgen.server.endpoints import create_app
from fastgen.server.log import log_line
from fastgen.server.requests import APIError

MAX_READ_BYTES = 2**13  # that are read of a connection at a time: as chunks of one byte they take 40 ms to parse
HEADERS_TIMEOUT_SECONDS = 30.0  # to send what comes before a body, and to be idle between two requests
FLUSH_TIMEOUT_SECONDS = 5.0  # for clients to read their error event once the time to finish is over
MAX_ACCEPTS = 100  # connections that are taken in a row
ACCEPT_PAUSE_SECONDS = 0.25  # seconds without accepting once files or memory have run out
WARNING_INTERVAL_SECONDS = 60.0  # seconds without saying so again
OUT_OF_RESOURCES_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Acceptor:
    """Takes connections, and pauses where files run out.

    asyncio's own loop (Python 3.11) goes on for the whole backlog then, with a traceback for each try.
    """

    def __init__(self, listener: socket.socket, protocol: Callable[[], asyncio.Protocol]) -> None:
        self.listener, self.protocol = listener, protocol
        self._loop = asyncio.get_running_loop()
        self._last_warning_time = -WARNING_INTERVAL_SECONDS
        self._timer: asyncio.TimerHandle | None = None
        self._tasks = set[asyncio.Task[None]]()

    def start(self) -> None:
        """Accept from now on."""
        self._timer = None
        self._loop.add_reader(self.listener.fileno(), self._accept)

    def stop(self) -> None:
        """Accept no more, for now or for good."""
        self._loop.remove_reader(self.listener.fileno())
        if self._timer is not None:
            self._timer.cancel()

    def _accept(self) -> None:
        for _ in range(MAX_ACCEPTS):
            try:
                connection, _ = self.listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as e:
                self.stop()
                self._timer = self._loop.call_later(ACCEPT_PAUSE_SECONDS, self.start)
                now = self._loop.time()
                if now - self._last_warning_time >= WARNING_INTERVAL_SECONDS:
                    said = "ulimit -n is reached" if e.errno in OUT_OF_RESOURCES_ERRNOS else str(e)
                    log_line(f"fgserve: no more connections can be accepted for now: {said}")
                    self._last_warning_time = now
                return
            connection.setblocking(False)
            task = self._loop.create_task(self._connect(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connect(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self.protocol, connection)
        except OSError:  # it is gone already
            connection.close()


class _Server(uvicorn.Server):
    """Signals are the worker's: uvicorn's own handling would stop listening at the first one. So is accepting."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket) -> None:
        super().__init__(config)
        self.listener = listener
        self.acceptor: Acceptor | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept, once the app has started."""
        await super().startup(sockets=[])
        if not self.should_exit:
            made = {"config": self.config, "server_state": self.server_state, "app_state": self.lifespan.state}
            self.acceptor = Acceptor(self.listener, lambda: _Connection(**made))
            self.acceptor.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, and end."""
        if self.acceptor is not None:
            self.acceptor.stop()
        self.listener.close()
        await super().shutdown()

    @property
    def connections(self) -> list["_Connection"]:
        """Those that are open."""
        return [*self.server_state.connections]  # type: ignore[list-item]

    def capture_signals(self) -> Any:
        """Leave them alone."""
        return nullcontext()


class _Connection(AutoHTTPProtocol):  # type: ignore[valid-type, misc]
    """One that is closed where no request comes: uvicorn waits for a first one, and for the rest of one, for ever."""

    cycle: Any  # the request that is answered, or was last
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    flow: Any
    idle_timer: asyncio.TimerHandle | None = None
    ignore_backpressure = False  # whether what is left to say is sent without waiting for a client that does not read

    def pause_writing(self) -> None:
        """As the others."""
        if not self.ignore_backpressure:
            super().pause_writing()

    def finish_response(self) -> None:
        """Let what is answered come to its end, whether its client reads or not."""
        self.ignore_backpressure = True
        self.flow.resume_writing()

    @property
    def is_busy(self) -> bool:
        """Whether something is being answered, or has not been sent yet."""
        answering = self.cycle is not None and not self.cycle.response_complete
        return answering or self.transport.get_write_buffer_size() > 0

    def connection_made(self, transport: Any) -> None:
        """Of asyncio.Protocol, as the others."""
        with suppress(AttributeError):  # of other loops than asyncio's own
            transport.max_size = MAX_READ_BYTES
        super().connection_made(transport)
        self._update_idle_timer()

    def data_received(self, data: bytes) -> None:
        """Perhaps the last byte of a request's head."""
        super().data_received(data)
        self._update_idle_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """No timer outlives it."""
        self._update_idle_timer(False)
        super().connection_lost(exc)

    def _update_idle_timer(self, is_open: bool = True) -> None:
        if is_open and (self.cycle is None or self.cycle.response_complete):
            self.idle_timer = self.idle_timer or self.loop.call_later(HEADERS_TIMEOUT_SECONDS, self.transport.close)
        elif self.idle_timer:
            self.idle_timer.cancel()
            self.idle_timer = None


async def _serve(options: ServerOptions, name: str, listener: socket.socket, control: Connection) -> None:
    service = AppState(options, name)

    def loaded() -> None:
        gc.collect()
        gc.freeze()  # or reading a body of many values would have all that was loaded looked at again and again
        with suppress(OSError):  # the supervisor is gone, which `told` hears
            control.send("ready")

    config = uvicorn.Config(
        create_app(service, loaded),
        log_level="warning",
        access_log=False,
        server_header=False,
        http=_Connection,
        timeout_keep_alive=round(HEADERS_TIMEOUT_SECONDS),
        timeout_graceful_shutdown=1,  # what runs has ended before
    )
    server, loop = _Server(config, listener), asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    async def drain(grace: float) -> None:
        """Take nothing new, finish what runs, and end."""
        service.is_draining = True
        end = loop.time() + grace
        while service.num_active_requests and loop.time() < end:
            await asyncio.sleep(0.02)
        service.engine_client.fail_all(APIError(503, "the server is shutting down", code="shutting_down"))
        end = loop.time() + FLUSH_TIMEOUT_SECONDS
        while (busy := [c for c in server.connections if c.is_busy]) and loop.time() < end:
            for connection in busy:
                connection.finish_response()
            await asyncio.sleep(0.02)
        for connection in busy:
            connection.transport.abort()
        server.should_exit = True

    def begin(grace: float) -> None:
        if not tasks:
            tasks.add(loop.create_task(drain(grace)))

    def told() -> None:
        """The supervisor says that the engine is dead, or is gone itself."""
        loop.remove_reader(control.fileno())
        service.engine_client.is_engine_dead = True
        service.engine_client.fail_all(APIError(500, "the engine has stopped", code="engine_error"))
        begin(2)

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, begin, options.grace_seconds)
    loop.add_reader(control.fileno(), told)
    await server.serve()


def run_http_worker(options: ServerOptions, name: str, listener: socket.socket, control: Connection) -> None:
    """The process."""
    with suppress(ValueError, OSError):  # a connection is a file, and 1024 are soon taken
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asyncio.run(_serve(options, name, listener, control))
