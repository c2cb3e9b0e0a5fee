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
from typing import Any, NoReturn

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from fastgen.server.app_state import AppState, ServerOptions
from fastgen.server.endpoints import create_app
from fastgen.server.errors import APIError
from fastgen.server.log import log_line

MAX_READ_BYTES = 2**13  # per read of a connection: chunks of one byte take 40 ms to parse then
HEADERS_TIMEOUT_SECONDS = 30.0  # for a client to send a request's head, and to be idle between two requests
FLUSH_TIMEOUT_SECONDS = 5.0  # for clients to read their error event once the grace period is over
ENGINE_DEATH_GRACE_SECONDS = 2.0  # the grace period once the engine has died
MAX_ACCEPTS = 100  # connections that are accepted in a row
ACCEPT_PAUSE_SECONDS = 0.25  # without accepting once files or memory have run out
WARNING_INTERVAL_SECONDS = 60.0  # between two warnings of it
OUT_OF_RESOURCES_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


async def accept_connections(listener: socket.socket, make_protocol: Callable[[], asyncio.Protocol]) -> NoReturn:
    """Accepts connections until cancelled; pauses when the process has no more files.

    asyncio's own server (Python 3.11) would then try the entire backlog, with a traceback for each connection.
    """
    loop, last_warning_time = asyncio.get_running_loop(), -WARNING_INTERVAL_SECONDS
    tasks = set[asyncio.Task[None]]()  # of connections whose protocol has not started

    async def connect(connection: socket.socket) -> None:
        try:
            await loop.connect_accepted_socket(make_protocol, connection)
        except OSError:  # the client is gone already
            connection.close()

    while True:
        try:
            connection, _ = await loop.sock_accept(listener)
            tasks.add(task := loop.create_task(connect(connection)))
            task.add_done_callback(tasks.discard)
        except ConnectionAbortedError:
            pass
        except OSError as e:
            if loop.time() - last_warning_time >= WARNING_INTERVAL_SECONDS:
                cause = "ulimit -n is reached" if e.errno in OUT_OF_RESOURCES_ERRNOS else str(e)
                log_line(f"fgserve: no more connections can be accepted for now: {cause}")
                last_warning_time = loop.time()
            await asyncio.sleep(ACCEPT_PAUSE_SECONDS)
        if len(tasks) >= MAX_ACCEPTS:
            await asyncio.sleep(0)


class _Server(uvicorn.Server):
    """A uvicorn server that leaves signals to the worker and accepting to `accept_connections`."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket) -> None:
        super().__init__(config)
        self.listener, self.accepting = listener, set[asyncio.Task[NoReturn]]()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to accept connections once the app has started."""
        await super().startup(sockets=[])
        if not self.should_exit:
            args = {"config": self.config, "server_state": self.server_state, "app_state": self.lifespan.state}
            accepting = accept_connections(self.listener, lambda: _Connection(**args))
            self.accepting.add(asyncio.create_task(accepting))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops accepting connections, and ends."""
        for task in self.accepting:
            task.cancel()
        await asyncio.gather(*self.accepting, return_exceptions=True)
        self.listener.close()
        await super().shutdown()

    def capture_signals(self) -> Any:
        """Does nothing: uvicorn would stop listening at the first signal."""
        return nullcontext()


class _Connection(AutoHTTPProtocol):  # type: ignore[valid-type, misc]
    """A connection that is closed if no request comes in time: uvicorn would wait forever for a request's head."""

    cycle: Any  # the request that is being answered, or the last one
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    flow: Any
    idle_timer: asyncio.TimerHandle | None = None
    ignore_backpressure = False  # whether a response is sent without waiting for a client that does not read

    def pause_writing(self) -> None:
        """Pauses the response until the client reads, unless backpressure is ignored."""
        if not self.ignore_backpressure:
            super().pause_writing()

    def finish_response(self) -> None:
        """Disables backpressure and resumes writing: the response completes even if its client does not read."""
        self.ignore_backpressure = True
        self.flow.resume_writing()

    @property
    def is_busy(self) -> bool:
        """Whether a response is incomplete or has not been sent yet."""
        is_answering = self.cycle is not None and not self.cycle.response_complete
        return is_answering or self.transport.get_write_buffer_size() > 0

    def connection_made(self, transport: Any) -> None:
        """Starts the timer for the first request's head."""
        with suppress(AttributeError):  # the loop is not asyncio's own
            transport.max_size = MAX_READ_BYTES
        super().connection_made(transport)
        self._update_idle_timer()

    def data_received(self, data: bytes) -> None:
        """Stops the timer once a request's head is complete."""
        super().data_received(data)
        self._update_idle_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancels the timer."""
        self._update_idle_timer(False)
        super().connection_lost(exc)

    def _update_idle_timer(self, is_open: bool = True) -> None:
        if is_open and (self.cycle is None or self.cycle.response_complete):
            self.idle_timer = self.idle_timer or self.loop.call_later(HEADERS_TIMEOUT_SECONDS, self.transport.close)
        elif self.idle_timer:
            self.idle_timer.cancel()
            self.idle_timer = None


async def _serve(control: Connection, options: ServerOptions, name: str, listener: socket.socket) -> None:
    state = AppState(options, name)

    def on_loaded() -> None:
        gc.collect()
        gc.freeze()  # otherwise each large body would make the collector traverse all loaded objects
        with suppress(OSError):  # the supervisor is gone, which `on_control` notices
            control.send("ready")

    config = uvicorn.Config(
        create_app(state, on_loaded),
        log_level="warning",
        access_log=False,
        server_header=False,
        http=_Connection,
        timeout_keep_alive=round(HEADERS_TIMEOUT_SECONDS),
        timeout_graceful_shutdown=1,  # `drain` has ended all requests before
    )
    server, loop = _Server(config, listener), asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    async def drain(grace_seconds: float) -> None:
        """Refuses new requests, lets running ones finish for a while, and ends the server."""
        state.is_draining = True
        end = loop.time() + grace_seconds
        while state.num_active_requests and loop.time() < end:
            await asyncio.sleep(0.02)
        state.engine_client.fail_all(APIError(503, "the server is shutting down", code="shutting_down"))
        end = loop.time() + FLUSH_TIMEOUT_SECONDS
        connections: Any = server.server_state.connections
        while (busy := [c for c in connections if c.is_busy]) and loop.time() < end:
            for connection in busy:
                connection.finish_response()
            await asyncio.sleep(0.02)
        for connection in busy:
            connection.transport.abort()
        server.should_exit = True

    def start_draining(grace_seconds: float) -> None:
        if not tasks:
            tasks.add(loop.create_task(drain(grace_seconds)))

    def on_control() -> None:
        """Handles the end of the pipe to the supervisor: the engine has died, or the supervisor itself."""
        loop.remove_reader(control.fileno())
        state.engine_client.is_engine_dead = True
        state.engine_client.fail_all(APIError(500, "the engine has stopped", code="engine_error"))
        start_draining(ENGINE_DEATH_GRACE_SECONDS)

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, start_draining, options.grace_seconds)
    loop.add_reader(control.fileno(), on_control)
    await server.serve()


def run_http_worker(control: Connection, options: ServerOptions, name: str, listener: socket.socket) -> None:
    """Runs the worker until it has drained. `control` is the pipe to the supervisor, whose end drains the worker."""
    with suppress(ValueError, OSError):  # each connection is a file, and the usual limit is 1024
        hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    asyncio.run(_serve(control, options, name, listener))
