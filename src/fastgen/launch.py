"""The other ranks of an engine, as processes of this one: started, kept in step, and ended together.

    this process, rank 0 ── a pipe each ── ranks 1 .. N-1

Rank 0's engine tells each change (requests, steps, aborts) to the others' engines before it makes it itself. Whatever
ends one of them ends all, with its cause, within seconds: also where a collective waits that cannot be interrupted.
"""

import multiprocessing
import os
import pickle
import queue
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, TCPStore
from torch.utils._pytree import tree_map
from tqdm.auto import tqdm

from fastgen.memory import Region
from fastgen.models.spec import WHOLE, Place, Spec
from fastgen.models.weights import share
from fastgen.ownership import disown_in_forks
from fastgen.parallel import Ranks
from fastgen.types import Params, Tokenizer

# A rank's parameters, on its device; with `region=`, in the memory that this makes, if they are loaded there.
Load = Callable[..., tuple[Spec, Params, Tokenizer | None]]
START = 120.0  # seconds in which all ranks meet
ANSWER = 7.0  # seconds in which somebody listens where torchrun says that they meet
GATHER = 0.5  # seconds in which others may say why it happened, once one is gone
LAST = 6.0  # seconds that a call gets to notice; then this process ends as well
RULES = ("fork", "restore", "score", "_take_received")  # calls that refuse wrong input on every rank alike
SHM = "/dev/shm"
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def device(kind: str, rank: int) -> str:
    """Of a rank: a GPU of its own. `kind` is "cpu" or "cuda"."""
    return f"cuda:{os.environ.get('LOCAL_RANK', rank % torch.cuda.device_count())}" if kind == "cuda" else kind


def group(size: int, kind: str, load: Load, settings: dict[str, Any], make: Any) -> Ranks:
    """The ranks of an engine of `size`: those of the process group that is there, or new processes.

    A process group is there if this program has initialised one, or if torchrun has started this process. Then every
    process of it makes this call. New ones call `make`, the engine's class, as this one does.
    ValueError says what is wrong with the environment or the machine.
    """
    if dist.is_initialized():
        if Crew.active is not None:
            raise ValueError("this process already runs an engine with tensor parallelism; close it first")
        found = dist.get_world_size()
        if found != size:
            raise ValueError(f"parallel.tensor_parallel={size}, but the process group here has {found} ranks")
        return Ranks()
    if any(name in os.environ for name in VARIABLES[:2]):
        return _of_environment(size, kind)
    count = torch.cuda.device_count()
    if kind == "cuda" and count < size:
        raise ValueError(f"parallel.tensor_parallel={size} needs as many GPUs, and this machine shows {count}")
    return Crew(size, kind, load, settings, make)


def _of_environment(size: int, kind: str) -> Ranks:
    """torchrun's. What it says is checked before anybody waits for anybody."""
    where = "the environment says that torchrun started this process"
    if missing := [name for name in VARIABLES if name not in os.environ]:
        raise ValueError(f"{where}, but {', '.join(missing)} is not set; unset {VARIABLES[0]} and {VARIABLES[1]} else")
    rank, world = (os.environ[name] for name in VARIABLES[:2])
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise ValueError(f"{where}, but RANK={rank!r} is no rank of WORLD_SIZE={world!r}")
    if int(world) != size:
        raise ValueError(f"parallel.tensor_parallel={size}, but {where} with WORLD_SIZE={world}")
    local, count = os.environ.get("LOCAL_RANK", rank), torch.cuda.device_count()
    if kind == "cuda" and int(local) >= count:
        raise ValueError(f"{where} as LOCAL_RANK={local}, and this machine shows {count} GPUs")
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"
    try:
        store = _meet(int(rank), size)
        with _on_loopback() if _is_loopback(os.environ["MASTER_ADDR"]) else nullcontext():
            _connect(kind, int(rank), size, store, timedelta(seconds=START))
            ranks = Ranks()
    except (dist.DistError, RuntimeError, OSError, TimeoutError, ValueError) as e:
        raise ValueError(f"rank {rank} of {size} found no group at {place}: {str(e).splitlines()[0]}") from e
    return ranks


def _meet(rank: int, size: int) -> Any:
    """Where torchrun's ranks find each other, once all have come. An error within seconds where nobody listens."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    first = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun itself listens
    end = time.monotonic() + ANSWER
    while not first:  # torch's own client would try for as long as late ranks may take
        try:
            socket.create_connection((address, port), max(0.1, min(2.0, end - time.monotonic()))).close()
            break
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
    left = timedelta(seconds=ANSWER / 3)  # it tries twice
    listener = socket.create_server((address, port)).detach() if first and _is_loopback(address) else None
    options: dict[str, Any] = {"is_master": first, "timeout": left, "wait_for_workers": False}
    store = TCPStore(address, port, size, master_listen_fd=listener, **options)  # by itself it listens everywhere
    store = PrefixStore(f"fastgen/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    store.set(str(rank), "here")
    end = time.monotonic() + START
    while late := [str(r) for r in range(size) if not store.check([str(r)])]:
        if time.monotonic() > end:
            raise TimeoutError(f"rank {', '.join(late)} did not come within {START:.0f} s")
        time.sleep(0.05)
    return store


def _is_loopback(address: str) -> bool:
    return address in ("localhost", "127.0.0.1")


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Have gloo and NCCL listen on the loopback interface alone while they connect, unless the user chose another."""
    name = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    chosen = [v for v in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name and v not in os.environ]
    os.environ.update({variable: name or "" for variable in chosen})
    try:
        yield
        dist.barrier()  # NCCL reads its variable when the first collective connects the ranks
    finally:
        for variable in chosen:
            del os.environ[variable]


def _connect(kind: str, rank: int, size: int, store: Any, limit: timedelta) -> None:
    if kind == "cuda":
        torch.cuda.set_device(device(kind, rank))
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)


@contextmanager
def guard(group: Any) -> Iterator[None]:
    """Around the making of an engine: what goes wrong ends the ranks that were started for it."""
    if not isinstance(group, Crew):
        yield
        return
    try:
        with group.call(whole=False):
            yield
    except BaseException:
        group.close()
        raise


def given(shares: list[Params], spec: Spec, tokenizer: Tokenizer | None, place: Place, where: str, **_: Any) -> Any:
    """A `Load` for parameters that are there already, in memory that processes share."""
    return spec, tree_map(lambda x: x if x is None else x.to(where), shares[place.rank]), tokenizer


def spread(params: Params, spec: Spec, tokenizer: Tokenizer | None, size: int) -> Load:
    """Each rank's share of parameters."""
    shares = [share(params, spec, Place(rank, size)) for rank in range(size)]
    shares = [tree_map(lambda x: x if x is None else x.cpu().share_memory_(), s) for s in shares]
    return partial(given, shares, spec, tokenizer)


class Crew(Ranks):
    """A group whose other ranks are processes that this one started."""

    active: "Crew | None" = None

    def __init__(self, size: int, kind: str, load: Load, settings: dict[str, Any], make: Any) -> None:
        self.cause = ""  # of the end of them all
        self.place = WHOLE  # until all have met
        self._ending = threading.Event()
        self._process = os.getpid()
        self._here, self._failed = set[int](), dict[int, tuple[float, str]]()
        self._since: float | None = None  # of the call that is being made
        self._lock = threading.Lock()  # of the pipes
        # Through a file the ranks meet without a socket. Only this user can open it; where there is one it lies in a
        # file system of memory, which is never full of others' files. If this process is killed, a rank removes it.
        self._file = tempfile.NamedTemporaryFile(prefix="fastgen-ranks-", dir=SHM if os.path.isdir(SHM) else None)
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = list[Connection](), list[BaseProcess]()
        Crew.active = self
        try:
            for rank in range(1, size):
                ours, theirs = context.Pipe()
                arguments = theirs, rank, size, self._file.name, kind, load, settings, make
                process = context.Process(target=_rank, args=arguments, name=f"rank {rank}", daemon=True)
                process.start()
                disown_in_forks([process])
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)
            threading.Thread(target=self._watch, name="ranks", daemon=True).start()
            end = time.monotonic() + START
            while len(self._here) < size - 1:
                self.check()
                if time.monotonic() > end:
                    late = [r for r in range(1, size) if r not in self._here]
                    raise RuntimeError(f"rank {', '.join(map(str, late))} did not start within {START:.0f} s")
                time.sleep(0.01)
            with self.call(), _on_loopback():
                _connect(kind, 0, size, FileStore(self._file.name, -1), timedelta(minutes=30))
                super().__init__()
        except BaseException:
            self.close()
            raise

    def tell(self, name: str, *arguments: Any, **named: Any) -> None:
        """The other ranks' engines make this call. RuntimeError with the cause if one of them is gone."""
        self.check()
        data = pickle.dumps((name, arguments, named))  # tensors by value: there may be more than files can be open
        with self._lock:
            for pipe in self._pipes:
                try:
                    pipe.send_bytes(data)
                except OSError:
                    self._explain()

    def check(self) -> None:
        """RuntimeError with the cause if a rank is gone."""
        if self.cause:
            raise RuntimeError(self.cause)

    @contextmanager
    def call(self, *, whole: bool = True) -> Iterator[None]:
        """Around what all ranks do together: an error is the end of them all.

        `whole`: an interrupt waits until it is done. RuntimeError with the cause, if a rank ends meanwhile.
        """
        main = whole and threading.current_thread() is threading.main_thread()
        main = main and signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None)  # as a server's engine has it
        interrupted: list[Any] = []
        before = signal.signal(signal.SIGINT, lambda *given: interrupted.append(given)) if main else None
        self._since = time.monotonic()
        try:
            yield
        except BaseException as e:
            self._explain(e)
            raise
        finally:
            self._since = None
            if main:
                signal.signal(signal.SIGINT, before)
        self.check()
        if interrupted:
            if not callable(before):
                raise KeyboardInterrupt
            before(*interrupted[0])

    def _explain(self, error: BaseException | None = None) -> None:
        """After an error here: RuntimeError with the cause, if that is another rank's. All of them end."""
        end = time.monotonic() + (0 if isinstance(error, KeyboardInterrupt) else GATHER + 1.5)
        while not self.cause and time.monotonic() < end:
            time.sleep(0.02)
        if self.cause:
            raise RuntimeError(self.cause) from error
        self.cause = f"rank 0 failed: {error or 'the pipes to the other ranks are closed'}"
        self._kill()
        if error is None:
            raise RuntimeError(self.cause)

    def _watch(self) -> None:
        """A thread: hears of the ranks that end, says why, and ends the others."""
        pipes = {pipe: rank for rank, pipe in enumerate(self._pipes, 1)}
        ends: dict[Any, int] = {p.sentinel: rank for rank, p in enumerate(self._processes, 1)}
        since: float | None = None
        while since is None or time.monotonic() < since + GATHER:
            ready = wait([*pipes, *ends], None if since is None else GATHER)
            if self._ending.is_set():
                return
            for one in ready:
                if one in ends:
                    since = since or time.monotonic()
                    del ends[one]
                    continue
                try:
                    at, problem = one.recv()  # type: ignore[union-attr]
                except (EOFError, OSError):
                    del pipes[one]  # type: ignore[arg-type]
                    continue
                if problem:
                    self._failed[pipes[one]] = at, problem  # type: ignore[index]
                    since = since or time.monotonic()
                else:
                    self._here.add(pipes[one])  # type: ignore[index]
        self.cause = self._why()
        self._kill()
        if torch.cuda.is_available():  # kernels that wait for the others' would wait for ever
            with suppress(Exception):
                self.release()
            with suppress(Exception):
                dist.distributed_c10d._abort_process_group()
        begun = self._since
        end = time.monotonic() + LAST
        while begun is not None and self._since == begun and not self._ending.is_set():
            if time.monotonic() > end:
                print(
                    f"fastgen: {self.cause}\nThis process waits for it and ends as well.", file=sys.stderr, flush=True
                )
                os._exit(1)
            time.sleep(0.05)

    def _why(self) -> str:
        """Who was first: one that was killed, or else one that says what went wrong; the rest is what follows."""
        for rank, process in enumerate(self._processes, 1):
            code = process.exitcode
            if code is not None and code < 0:
                return f"rank {rank} (process {process.pid}) was killed by {signal.Signals(-code).name}"
        if self._failed:
            rank, (_, problem) = min(self._failed.items(), key=lambda x: x[1][0])
            return f"rank {rank} (process {self._processes[rank - 1].pid}) failed: {problem}"
        ended = [(r, p) for r, p in enumerate(self._processes, 1) if p.exitcode is not None]
        return "; ".join(f"rank {r} (process {p.pid}) ended with exit code {p.exitcode}" for r, p in ended)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()

    def close(self) -> None:
        """The others end; those that do not within seconds are killed. In a fork of this process: nothing."""
        if self._ending.is_set() or self._process != os.getpid():
            return
        self._ending.set()
        with self._lock:
            for pipe in self._pipes:
                with suppress(OSError):
                    pipe.send(("close", (), {}))
        end = time.monotonic() + (0 if self.cause else 5)
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
        self._kill()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            pipe.close()
        if dist.is_initialized():
            with suppress(RuntimeError):  # a group that was aborted
                dist.destroy_process_group()
        self._file.close()
        Crew.active = None


def _rank(
    pipe: Connection, rank: int, size: int, path: str, kind: str, load: Load, settings: dict[str, Any], make: Any
) -> None:
    """The process of another rank: its engine makes the calls that rank 0's makes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 gets it too, and decides
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the machine, which os._exit would leave behind
    calls: queue.SimpleQueue[tuple[str, tuple[Any, ...], dict[str, Any]]] = queue.SimpleQueue()

    def read() -> None:
        try:
            while True:
                calls.put(pipe.recv())
        except (EOFError, OSError):
            with suppress(OSError):
                os.unlink(path)
            os._exit(1)  # rank 0 is gone, and a collective may wait for it

    try:
        threading.Thread(target=read, daemon=True).start()
        pipe.send((0.0, ""))
        with _on_loopback():
            _connect(kind, rank, size, FileStore(path, -1), timedelta(minutes=30))
            ranks = Ranks()
        where, own = device(kind, rank), list[Region]()

        def region(size: int) -> Region:
            own.append(Region(size, torch.device(where)))
            return own[-1]

        spec, params, tokenizer = load(ranks.place, where, region=region)
        with make(params, spec, tokenizer, progress=False, group=ranks, **settings) as engine:
            engine._guides.trusted = True  # rank 0 has tried the grammars that come
            if own:
                engine._regions["params"] = own[0]
            del params
            while (call := calls.get())[0] != "close":
                with suppress(*(ValueError,) if call[0] in RULES else ()):
                    getattr(engine, call[0])(*call[1], **call[2])
        dist.destroy_process_group()
    except BaseException as e:
        said = f"{type(e).__name__}: {e}" if isinstance(e, ValueError) else traceback.format_exc().strip()
        with suppress(OSError):
            pipe.send((time.monotonic(), said))
        os._exit(1)
    os._exit(0)  # whatever thread is left
