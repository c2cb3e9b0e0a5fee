"""The server's parent process: starts the engine and the HTTP workers, replaces workers that end, and ends the server.

    supervisor ── one engine process     fastgen.server.engine_process: token ids in, token ids out
               └─ HTTP workers           fastgen.server.http_worker: text, requests, limits; one listening socket

A worker that dies is replaced, and its requests are aborted. If the engine dies, the server ends.
"""

import fcntl
import itertools
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from fastgen.distributed.processes import ChildProcess, end_children
from fastgen.server.log import print_message

FOLDER_PREFIX = "fgserve-"  # of the names of servers' temporary folders
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # that end the server
MAX_WORKER_DEATHS = 5  # within a minute; then workers cannot run at all, and the server ends
ENGINE_DEATH_SECONDS = 10.0  # for workers to send errors to their clients once the engine has died
ENGINE_EXIT_SECONDS = 10.0  # for the engine to end once the workers have


class Supervisor:
    """Starts the server's other processes and watches them."""

    def __init__(
        self, engine_loader: Any, options: Any, listener: socket.socket, num_workers: int, max_completions: int | None
    ) -> None:
        """`engine_loader` is an `engine_process.EngineLoader`, and `options` are `app_state.ServerOptions`."""
        self.engine_args = engine_loader, options.engine_address, max_completions
        self.options, self.listener, self.num_workers = options, listener, num_workers
        # Workers are forks of a process that has imported everything and done nothing else: a new one starts at once,
        # and they share memory. The engine is spawned: GPU drivers do not work in forks.
        self.fork_context = multiprocessing.get_context("forkserver")
        tokenizers = "transformers.models.auto.tokenization_auto"
        self.fork_context.set_forkserver_preload(["fastgen.server.http_worker", "fastgen.cli.run", tokenizers])
        self.wake_receiver, self.wake_sender = socket.socketpair()
        self.wake_sender.setblocking(False)
        self.num_signals = 0
        self.worker_names = (f"worker-{i}" for i in itertools.count())
        self.worker_death_times = deque[float](maxlen=MAX_WORKER_DEATHS)
        self.workers: list[ChildProcess] = []
        self.engine: ChildProcess | None = None

    def _on_signal(self, number: int, frame: Any) -> None:
        self.num_signals += 1

    def run(self) -> int:
        """Runs the server until it ends; returns the exit status."""
        ignores_hangup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # nohup has started this process
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # children inherit it: a signal to the process group is for this one
        try:
            spawn_context = multiprocessing.get_context("spawn")
            self.engine = ChildProcess(spawn_context, "engine", _run_engine, *self.engine_args)
            print_message(f"engine has process id {self.engine.pid}")
            forkserver.ensure_running()
            signal.set_wakeup_fd(self.wake_sender.fileno())
            for number in STOP_SIGNALS[:2] if ignores_hangup else STOP_SIGNALS:
                signal.signal(number, self._on_signal)
            return self._watch(self.engine)
        finally:
            end_children([*self.workers, *([self.engine] if self.engine else [])], 0)

    def _watch(self, engine: ChildProcess) -> int:
        """Starts workers and replaces those that end, until a signal or the end of the engine; returns the status."""
        is_announced = False
        while True:
            try:
                while len(self.workers) < self.num_workers:
                    name = next(self.worker_names)
                    args = name, _run_http_worker, self.options, name, self.listener
                    self.workers.append(ChildProcess(self.fork_context, *args))
                    print_message(f"{name} has process id {self.workers[-1].pid}")
            except (OSError, EOFError) as e:  # the fork server may have died; it is started again with the next worker
                print_message(f"no worker could be started, trying again: {e}")
            is_incomplete = len(self.workers) < self.num_workers
            children = (engine, *self.workers)
            starting = [child for child in children if not child.is_ready]
            sources = [self.wake_receiver, *(c.sentinel for c in children), *(c.pipe for c in starting)]
            wait(sources, 1.0 if is_incomplete else None)
            if self.num_signals:
                return self._shut_down(engine)
            for child in starting:
                with suppress(EOFError, OSError):  # the child has ended instead
                    child.is_ready = child.pipe.poll() and child.pipe.recv() == "ready"
            # A connection may reach any worker: all must be ready.
            if not (is_announced or is_incomplete) and all(child.is_ready for child in children):
                is_announced = True
                print_message(f"{', '.join(self.options.model_names)} is ready")
            if not engine.is_alive:
                return self._on_engine_death(engine)
            for worker in [w for w in self.workers if not w.is_alive]:
                self.workers.remove(worker)
                worker.wait_or_kill(0)
                print_message(f"{worker.describe_end()}; its requests are lost")
                times = self.worker_death_times
                times.append(time.monotonic())
                if len(times) == MAX_WORKER_DEATHS and times[-1] < times[0] + 60:
                    print_message(f"{MAX_WORKER_DEATHS} workers ended within a minute: giving up")
                    return 1
                with suppress(OSError):  # the engine may be ending too
                    engine.pipe.send(worker.name.encode())

    def _on_engine_death(self, engine: ChildProcess) -> int:
        """Lets the workers send errors to their clients, then ends them; returns the exit status."""
        if engine.is_ready:
            print_message("the engine died")
        self.listener.close()
        for worker in self.workers:
            worker.pipe.close()
        end_children(self.workers, ENGINE_DEATH_SECONDS)
        return 1

    def _shut_down(self, engine: ChildProcess) -> int:
        """Lets the workers finish, then ends the engine; returns the status. A second signal ends all at once."""
        self.listener.close()
        if not engine.is_ready:
            return 0
        print_message("shutting down")
        for worker in self.workers:
            worker.send_signal(signal.SIGTERM)
        num_signals, end = self.num_signals, time.monotonic() + self.options.grace_seconds + 10
        self.wake_receiver.setblocking(False)
        while sentinels := [w.sentinel for w in self.workers if w.is_alive]:
            with suppress(BlockingIOError):
                self.wake_receiver.recv(64)
            wait([self.wake_receiver, engine.sentinel, *sentinels], max(0.0, end - time.monotonic()))
            if not engine.is_alive:
                return self._on_engine_death(engine)
            if self.num_signals > num_signals or time.monotonic() >= end:
                return 1
        engine.pipe.close()
        engine.wait_or_kill(ENGINE_EXIT_SECONDS)
        return 0


def _run_engine(*args: Any) -> None:
    """Runs the engine's process, which alone imports its code."""
    from fastgen.server.engine_process import run_engine_process

    run_engine_process(*args)


def _run_http_worker(*args: Any) -> None:
    """Runs the process of an HTTP worker, whose code the fork server has imported."""
    from fastgen.server.http_worker import run_http_worker

    run_http_worker(*args)


@contextmanager
def temporary_folder() -> Iterator[str]:
    """Creates a folder for the server's sockets that only its user can enter (0700), and removes it in the end.

    Also removes the folders of killed servers, whose locks are free.
    """
    for old in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        with suppress(OSError), open(old / "lock") as lock:  # the folder is another user's, or locked
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old)
    with tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX) as folder, open(f"{folder}/lock.new", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(lock.name, f"{folder}/lock")  # visible to other servers only once it is locked
        # multiprocessing puts its sockets here, in child processes too; its own folder would outlive a kill.
        multiprocessing.current_process()._config["tempdir"] = folder  # type: ignore[attr-defined]
        yield folder


def listen(host: str, port: int) -> socket.socket:
    """Returns a non-blocking socket that listens at an address."""
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, proto)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    listener.listen(2048)
    listener.setblocking(False)
    return listener
