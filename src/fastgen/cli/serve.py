"""`fgserve`: an OpenAI-compatible server. `fgserve --help`.

    supervisor ── one engine process       fastgen.server.engine_process: token ids in, token ids out
               └─ some HTTP workers        fastgen.server.http_worker: text, forms, limits; they share the listening socket

This process only watches the others: a worker that dies is replaced, and what it asked for is ended; the engine's
death ends everything.
"""

import argparse
import fcntl
import functools
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from ipaddress import ip_address
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import fastgen
from fastgen import Engine, Replicas, lora
from fastgen.checkpoint import hub, weights
from fastgen.cli import run
from fastgen.cli.hydra_config import RunConfig, compose, expand_key, model_override

EngineLoader = Callable[[], tuple[Engine | Replicas, str]]  # an engine or several, and where their model is
REQUIRED_PACKAGES = ("fastapi", "uvicorn", "zmq", "prometheus_client")
FREE_TEXT_OPTIONS = ("--lora", "--api-key", "--served-model-name")  # options whose value may look like a setting
FOLDER_PREFIX = "fgserve-"  # how the name of a server's temporary folder begins
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # that end the server
MAX_WORKER_DEATHS = 5  # of workers within a minute; then something is broken for good
EPILOG = """
MODEL is a folder, a hub id, a .safetensors or .gguf file, or a name of conf/model; without one, the embedded default.
Settings are KEY=VALUE as for fgrun (fgrun --help lists them). docs/serving.md has the endpoints and their parameters.

examples:
  fgserve
  fgserve mistral_7b --port 8000 --api-key "$KEY" schedule=latency
  fgserve path/to/checkpoint --served-model-name mine --workers 4 kv_cache.gpu_memory_utilization=0.9
  fgserve path/to/checkpoint --lora poet=path/to/adapter
  curl localhost:5678/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20}'
"""


def _parse_positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _parse_seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return value


def _parse_port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a port between 0 and 65535, got {text!r}")
    return int(text)


def _parse_host(text: str) -> str:
    if not re.fullmatch(r"[\w.-]+", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"must be a name without port or path, as example.org, got {text!r}")
    return text


def _make_parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(
        prog="fgserve", description="An OpenAI-compatible server.", epilog=EPILOG, formatter_class=form
    )
    p.add_argument("--version", action="version", version=f"%(prog)s {fastgen.__version__}")
    p.add_argument("model", nargs="?", metavar="MODEL")
    p.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings")
    p.add_argument("--host", default="127.0.0.1", help="the address to listen at; 0.0.0.0 is every one (%(default)s)")
    p.add_argument("--port", type=_parse_port, default=5678, help="0 takes one that is free (%(default)s)")
    p.add_argument("--workers", type=_parse_positive_int, default=1, metavar="N", help="HTTP processes (%(default)s)")
    p.add_argument(
        "--tensor-parallel", type=_parse_positive_int, metavar="N", help="GPUs; the same as parallel.tensor_parallel=N"
    )
    p.add_argument("--replicas", type=_parse_positive_int, metavar="N", help="engines; the same as parallel.replicas=N")
    p.add_argument("--api-key", action="append", default=[], metavar="KEY", help="may be repeated; or FGSERVE_API_KEY")
    p.add_argument(
        "--served-model-name", action="append", default=[], metavar="NAME", help="may be repeated (the model's own)"
    )
    p.add_argument("--strict-model", action="store_true", help="refuse requests that name another model")
    p.add_argument(
        "--allowed-host",
        type=_parse_host,
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which the server may be addressed, and whose pages may use it, besides this machine's own; "
        "may be repeated",
    )
    p.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="an adapter, chosen as a model; may be repeated",
    )
    p.add_argument(
        "--grace", type=_parse_seconds, default=30, metavar="S", help="seconds to finish at SIGTERM (%(default)s)"
    )
    p.add_argument(
        "--max-queue", type=_parse_positive_int, metavar="N", help="completions at a time (four times max_num_seqs)"
    )
    p.add_argument(
        "--tool-parser",
        choices=("llama", "mistral", "hermes"),
        help="the form of the model's calls of functions (by its chat template)",
    )
    p.add_argument(
        "--max-body", type=_parse_positive_int, default=16 * 2**20, metavar="BYTES", help="of a request (%(default)s)"
    )
    p.add_argument(
        "--lora-dir", type=Path, metavar="FOLDER", help="from where POST /load_lora_adapter may load (nowhere)"
    )
    p.add_argument("--profile-dir", type=Path, metavar="FOLDER", help="where POST /profile may write traces (nowhere)")
    return p


def collect_api_keys(from_arguments: Sequence[str], from_environment: str | None) -> tuple[str, ...]:
    """The keys of `--api-key` and FGSERVE_API_KEY. ValueError for one that no client could send, or that is empty."""
    keys = [("--api-key", key) for key in from_arguments]
    keys += [] if from_environment is None else [("FGSERVE_API_KEY", from_environment)]
    for source, key in keys:
        if not key.strip():
            raise ValueError(f"{source} is empty: give a key, or leave it out to serve without one")
        if key != key.strip() or not (key.isascii() and key.isprintable()):
            raise ValueError(f"{source}: a key must be printable ASCII without blanks around it, to fit in a header")
    return tuple(key for _, key in keys)


def list_allowed_hosts(host: str, address: str, names: Sequence[str]) -> tuple[str, ...]:
    """The names by which a server that listens at `address` may be addressed; none where any is right.

    Names are checked where only this machine reaches the server, which then must not listen to pages of other sites,
    or where some are given.
    """
    if not (names or ip_address(address.partition("%")[0]).is_loopback):
        return ()
    return tuple(dict.fromkeys(name.lower() for name in ("localhost", host, *names)))


def configure(args: argparse.Namespace) -> tuple[RunConfig, str]:
    """The engine's configuration, and the model's own name. ValueError for what fgrun would refuse too."""
    for override in args.overrides:
        if re.match(r"(prompt|chat|task|out|sampling)\b", expand_key(override)):
            raise ValueError(f"{override}: requests bring this themselves")
    given = [*args.overrides]
    for name in ("tensor_parallel", "replicas"):
        if (value := getattr(args, name)) is not None:
            given.append(f"parallel.{name}={value}")
    choice = [] if args.model is None else [model_override(args.model)]
    config = compose(*choice, *given)
    folders = {**config.model.adapters, **parse_adapters(args.lora)}
    model, limits = replace(config.model, adapters=folders), lora.expand_lora_config(config.lora, folders)
    config = replace(config, model=model, lora=limits)
    if args.model is None:
        return config, hub.FOLDER
    if choice == [f"model={args.model}"]:
        return config, args.model
    is_path = Path(args.model).expanduser().exists()
    if not is_path and args.model.count("/") != 1:  # no hub id: that is known before anything starts
        weights.resolve(args.model)
    return config, Path(args.model).expanduser().resolve().name if is_path else args.model


def parse_adapters(arguments: Sequence[str]) -> dict[str, str]:
    """Paths by name."""
    found: dict[str, str] = {}
    for text in arguments:
        name, _, path = text.partition("=")
        if not (name and path) or name in found:
            raise ValueError(f"--lora {text}: must be NAME=PATH, each name once")
        found[name] = path
    return found


def load_engine(config: RunConfig) -> tuple[Engine | Replicas, str]:
    """The engine or replicas of a configuration, which work on tokens alone, and where its model is."""
    m = config.model
    path = hub.default_model_path() if m.path is None else weights.resolve(m.path)
    engine = run.build_engines(replace(config, model=replace(m, path=str(path))))
    engine.tokenizer = None  # it has told what ends a text; the workers have their own
    return engine, str(path)


@dataclass(slots=True)
class ChildProcess:
    """A process of ours, and our end of its pipe."""

    process: BaseProcess
    control: Connection
    name: str
    is_ready: bool = False  # the engine when its model is loaded, a worker when it takes requests
    pidfd: int | None = None  # a pidfd, where there are such: workers are grandchildren, and outlive their parent

    def __post_init__(self) -> None:
        with suppress(OSError, AttributeError):
            self.pidfd = os.pidfd_open(self.process.pid or 0)

    @property
    def sentinel(self) -> int:
        """What `wait` takes, and is ready when the process has ended."""
        return self.process.sentinel if self.pidfd is None else self.pidfd

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return not wait([self.sentinel], 0)

    def send_signal(self, number: int) -> None:
        """Nothing happens if it has ended."""
        with suppress(OSError):
            if self.pidfd is None:
                os.kill(self.process.pid or 0, number)
            else:
                signal.pidfd_send_signal(self.pidfd, number)

    def receive_ready(self) -> None:
        """Take its word that it is ready."""
        with suppress(EOFError, OSError):  # it ended instead
            self.is_ready = self.control.recv() == "ready"

    def wait_or_kill(self, timeout: float) -> None:
        """Wait for it, and not for longer."""
        if not wait([self.sentinel], max(0.0, timeout)):
            self.send_signal(signal.SIGKILL)
        self.process.join(5)


class Supervisor:
    """Starts the others and watches them."""

    def __init__(
        self,
        engine_loader: EngineLoader,
        options: Any,
        listener: socket.socket,
        num_workers: int,
        max_completions: int | None,
    ) -> None:
        self.engine_loader, self.options, self.listener, self.max_completions = (
            engine_loader,
            options,
            listener,
            max_completions,
        )
        # Workers are forks of a process that has imported everything and done nothing: one that is replaced is there
        # at once, and memory is shared. The engine is no fork, which GPU drivers do not forgive.
        self.fork_context = multiprocessing.get_context("forkserver")
        tokenizers = "transformers.models.auto.tokenization_auto"
        self.fork_context.set_forkserver_preload(["fastgen.server.http_worker", "fastgen.cli.run", tokenizers])
        self.spawn_context = multiprocessing.get_context("spawn")
        self.wake_receiver, self.wake_sender = socket.socketpair()
        self.wake_sender.setblocking(False)
        self.num_signals = 0
        self.worker_death_times: list[float] = []
        self.num_workers_started = 0  # workers started
        self.workers: list[ChildProcess] = []
        self.num_workers = num_workers
        self.engine: ChildProcess | None = None

    def _start_child(self, context: Any, target: Any, *arguments: Any, name: str) -> ChildProcess:
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(*arguments, theirs), name=name)
        process.start()
        theirs.close()  # so that its death is the pipe's end
        _log(f"{name} has process id {process.pid}")
        return ChildProcess(process, ours, name)

    def _start_worker(self) -> None:
        name = f"worker-{self.num_workers_started}"
        self.num_workers_started += 1
        self.workers.append(
            self._start_child(self.fork_context, _run_worker, self.options, name, self.listener, name=name)
        )

    def _on_signal(self, number: int, frame: Any) -> None:
        self.num_signals += 1

    def run(self) -> int:
        """Serve; the exit status."""
        hung_up = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN  # else nohup has started this
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # inherited: who stops a whole group of processes means this one
        try:
            told = self.engine_loader, self.options.engine_address, self.max_completions
            self.engine = self._start_child(self.spawn_context, _run_engine, *told, name="engine")
            forkserver.ensure_running()
            signal.set_wakeup_fd(self.wake_sender.fileno())
            for number in STOP_SIGNALS if hung_up else STOP_SIGNALS[:2]:
                signal.signal(number, self._on_signal)
            return self._watch(self.engine)
        finally:
            for child in (*self.workers, *([self.engine] if self.engine else [])):
                child.wait_or_kill(0)

    def _watch(self, engine: ChildProcess) -> int:
        said = False
        while True:
            try:
                while len(self.workers) < self.num_workers:
                    self._start_worker()
            except (OSError, EOFError) as e:  # what starts them may have died just now; it is started again
                _log(f"no worker could be started, which is tried again: {e}")
            missing = len(self.workers) < self.num_workers
            children = (engine, *self.workers)
            awaited = [child for child in children if not child.is_ready]
            events = [self.wake_receiver, *(c.sentinel for c in children), *(c.control for c in awaited)]
            wait(events, 1.0 if missing else None)
            if self.num_signals:
                return self._shut_down(engine)
            for child in awaited:
                if child.control.poll():
                    child.receive_ready()
            if (
                not said and not missing and all(child.is_ready for child in children)
            ):  # a connection may be any worker's
                said = True
                _log(f"{', '.join(self.options.model_names)} is ready")
            if not engine.is_alive:
                return self._on_engine_death(engine)
            for worker in [w for w in self.workers if not w.is_alive]:
                self.workers.remove(worker)
                now = time.monotonic()
                self.worker_death_times = [t for t in self.worker_death_times if t > now - 60] + [now]
                worker.wait_or_kill(0)
                _log(f"{worker.name} ended with {worker.process.exitcode}; its requests are lost")
                if len(self.worker_death_times) >= MAX_WORKER_DEATHS:
                    _log(f"{MAX_WORKER_DEATHS} workers ended within a minute: giving up")
                    return 1
                with suppress(OSError):  # it may be dying as well
                    engine.control.send(worker.name.encode())

    def _on_engine_death(self, engine: ChildProcess) -> int:
        """Whoever waits is told before this is over."""
        if engine.is_ready:
            _log("the engine died")
        self.listener.close()
        for worker in self.workers:
            worker.control.close()
        end = time.monotonic() + 10
        for worker in self.workers:
            worker.wait_or_kill(end - time.monotonic())
        return 1

    def _shut_down(self, engine: ChildProcess) -> int:
        """Let the workers finish, then end the engine. A second signal ends everything at once."""
        self.listener.close()
        if not engine.is_ready:
            return 0
        _log("shutting down")
        for worker in self.workers:
            worker.send_signal(signal.SIGTERM)
        before, end = self.num_signals, time.monotonic() + self.options.grace_seconds + 10
        self.wake_receiver.setblocking(False)
        while alive := [w.sentinel for w in self.workers if w.is_alive]:
            with suppress(BlockingIOError):
                self.wake_receiver.recv(64)
            wait([self.wake_receiver, engine.sentinel, *alive], max(0.0, end - time.monotonic()))
            if not engine.is_alive:
                return self._on_engine_death(engine)
            if self.num_signals > before or time.monotonic() >= end:
                return 1
        engine.control.close()
        engine.wait_or_kill(10)
        return 0


def _run_engine(engine_loader: EngineLoader, address: str, max_completions: int | None, control: Connection) -> None:
    from fastgen.server import engine_process

    engine_process.run_engine_process(engine_loader, address, control, max_completions)


def _run_worker(options: Any, name: str, listener: socket.socket, control: Connection) -> None:
    from fastgen.server import http_worker

    http_worker.run_http_worker(options, name, listener, control)


def _log(text: str) -> None:
    with suppress(OSError, AttributeError):  # nobody reads it, or there is none
        sys.stderr.write(f"fgserve: {text}\n")  # at once, unlike print: other processes write there too
        sys.stderr.flush()


@contextmanager
def temporary_folder() -> Iterator[str]:
    """Make a folder for the server's sockets, which only its user can enter (0700), and remove it in the end.

    Those of servers that were killed are removed as well: nobody holds their locks.
    """
    for old in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        with suppress(OSError), open(old / "lock") as lock:  # another user's, or locked
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old)
    with tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX) as folder, open(f"{folder}/lock.new", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(lock.name, f"{folder}/lock")  # now it can be seen, and is locked
        # Here multiprocessing puts its sockets, and so do its processes; its own folder would outlive a kill.
        multiprocessing.current_process()._config["tempdir"] = folder  # type: ignore[attr-defined]
        yield folder


def _listen(host: str, port: int) -> socket.socket:
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, proto)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    listener.listen(2048)
    listener.setblocking(False)
    return listener


def main(argv: list[str] | None = None) -> int:
    """The console script; the exit status: 2 for a command that is wrong, 1 for a server that failed."""
    words = sys.argv[1:] if argv is None else argv
    pairs = [*zip(["", *words], words, strict=False)]  # overrides may be anywhere, even after an option
    is_one = [before not in FREE_TEXT_OPTIONS and bool(re.match(r"[+~]{0,2}[\w.]+=", w)) for before, w in pairs]
    overrides = [w for w, one in zip(words, is_one, strict=True) if one]
    args = _make_parser().parse_intermixed_args([w for w, one in zip(words, is_one, strict=True) if not one])
    args.overrides += overrides
    if missing := [name for name in REQUIRED_PACKAGES if not find_spec(name)]:
        print(f"fgserve needs {', '.join(missing)}: pip install fastgen[serve]", file=sys.stderr)
        return 1
    try:
        keys = collect_api_keys(args.api_key, os.environ.pop("FGSERVE_API_KEY", None))
        if args.profile_dir and not args.profile_dir.is_dir():
            raise ValueError(f"--profile-dir: there is no folder {args.profile_dir}")
        config, name = configure(args)
        if args.lora_dir and not args.lora_dir.is_dir():
            raise ValueError(f"--lora-dir: there is no folder {args.lora_dir}")
        if args.lora_dir and not config.lora.max_adapters:
            raise ValueError("--lora-dir: there is no room for adapters; add max_adapters=N, and max_rank=R if not 16")
        names = tuple(args.served_model_name) or (name,)
        if both := sorted({*names} & {*config.model.adapters}):
            raise ValueError(f"--lora {both[0]}: this is the model's own name")
        listener = _listen(args.host, args.port)
        hosts = list_allowed_hosts(args.host, listener.getsockname()[0], args.allowed_host)
    except (ValueError, OSError) as e:
        _log(str(e))
        return 2
    from fastgen.server.app_state import ServerOptions
    from fastgen.server.log import nonblocking_stderr

    with temporary_folder() as folder, nonblocking_stderr():
        options = ServerOptions(
            engine_address=f"ipc://{folder}/engine",
            model_names=names,
            api_keys=keys,
            grace_seconds=args.grace,
            max_body_bytes=args.max_body,
            tool_parser=args.tool_parser,
            profile_dir=None if args.profile_dir is None else str(args.profile_dir.resolve()),
            lora_dir=None if args.lora_dir is None else str(args.lora_dir.resolve()),
            strict_model=args.strict_model,
            allowed_hosts=hosts,
        )
        host, port = listener.getsockname()[:2]
        _log(f"loading; http://{f'[{host}]' if ':' in host else host}:{port}/v1")
        return Supervisor(functools.partial(load_engine, config), options, listener, args.workers, args.max_queue).run()


if __name__ == "__main__":
    sys.exit(main())
