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

from fastgen.checkpoint.weights import shard_params
from fastgen.core.model_config import UNSHARDED, ModelConfig, TPShard
from fastgen.core.types import Params, Tokenizer
from fastgen.distributed.tensor_parallel import TPProcessGroup
from fastgen.thread_safety import detach_in_forks
from fastgen.training.sleep import ReleasableMemory

# A rank's parameters, on its device; with `allocate=`, in the memory that this makes, if they are loaded there.
LoadShard = Callable[..., tuple[ModelConfig, Params, Tokenizer | None]]
START_TIMEOUT = 120.0  # seconds in which all ranks meet
CONNECT_TIMEOUT = 7.0  # seconds in which somebody listens where torchrun says that they meet
FAILURE_REPORT_TIMEOUT = 0.5  # seconds in which others may say why it happened, once one is gone
HUNG_CALL_TIMEOUT = 6.0  # seconds that a call gets to notice; then this process ends as well
SELF_VALIDATING_CALLS = (
    "fork",
    "restore",
    "score",
    "_write_received_params",
)  # calls that refuse wrong input on every rank alike
SHM_DIR = "/dev/shm"
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def rank_device(device_type: str, rank: int) -> str:
    """Of a rank: a GPU of its own. `kind` is "cpu" or "cuda"."""
    return (
        f"cuda:{os.environ.get('LOCAL_RANK', rank % torch.cuda.device_count())}"
        if device_type == "cuda"
        else device_type
    )


def create_tp_group(
    tp_size: int, device_type: str, load_shard: LoadShard, engine_options: dict[str, Any], engine_class: Any
) -> TPProcessGroup:
    """The ranks of an engine of `size`: those of the process group that is there, or new processes.

    A process group is there if this program has initialised one, or if torchrun has started this process. Then every
    process of it makes this call. New ones call `make`, the engine's class, as this one does.
    ValueError says what is wrong with the environment or the machine.
    """
    if dist.is_initialized():
        if WorkerGroup.active is not None:
            raise ValueError("this process already runs an engine with tensor parallelism; close it first")
        found = dist.get_world_size()
        if found != tp_size:
            raise ValueError(f"parallel.tensor_parallel={tp_size}, but the process group here has {found} ranks")
        return TPProcessGroup()
    if any(name in os.environ for name in TORCHRUN_VARIABLES[:2]):
        return _join_torchrun_group(tp_size, device_type)
    count = torch.cuda.device_count()
    if device_type == "cuda" and count < tp_size:
        raise ValueError(f"parallel.tensor_parallel={tp_size} needs as many GPUs, and this machine shows {count}")
    return WorkerGroup(tp_size, device_type, load_shard, engine_options, engine_class)


def _join_torchrun_group(tp_size: int, device_type: str) -> TPProcessGroup:
    """torchrun's. What it says is checked before anybody waits for anybody."""
    where = "the environment says that torchrun started this process"
    if missing := [name for name in TORCHRUN_VARIABLES if name not in os.environ]:
        raise ValueError(
            f"{where}, but {', '.join(missing)} is not set; unset {TORCHRUN_VARIABLES[0]} and {TORCHRUN_VARIABLES[1]} else"
        )
    rank, world = (os.environ[name] for name in TORCHRUN_VARIABLES[:2])
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise ValueError(f"{where}, but RANK={rank!r} is no rank of WORLD_SIZE={world!r}")
    if int(world) != tp_size:
        raise ValueError(f"parallel.tensor_parallel={tp_size}, but {where} with WORLD_SIZE={world}")
    local, count = os.environ.get("LOCAL_RANK", rank), torch.cuda.device_count()
    if device_type == "cuda" and int(local) >= count:
        raise ValueError(f"{where} as LOCAL_RANK={local}, and this machine shows {count} GPUs")
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"
    try:
        store = _torchrun_rendezvous(int(rank), tp_size)
        with _loopback_only() if _is_loopback(os.environ["MASTER_ADDR"]) else nullcontext():
            _init_process_group(device_type, int(rank), tp_size, store, timedelta(seconds=START_TIMEOUT))
            ranks = TPProcessGroup()
    except (dist.DistError, RuntimeError, OSError, TimeoutError, ValueError) as e:
        raise ValueError(f"rank {rank} of {tp_size} found no group at {place}: {str(e).splitlines()[0]}") from e
    return ranks


def _torchrun_rendezvous(rank: int, world_size: int) -> Any:
    """Where torchrun's ranks find each other, once all have come. An error within seconds where nobody listens."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    first = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun itself listens
    end = time.monotonic() + CONNECT_TIMEOUT
    while not first:  # torch's own client would try for as long as late ranks may take
        try:
            socket.create_connection((address, port), max(0.1, min(2.0, end - time.monotonic()))).close()
            break
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
    left = timedelta(seconds=CONNECT_TIMEOUT / 3)  # it tries twice
    listener = socket.create_server((address, port)).detach() if first and _is_loopback(address) else None
    options: dict[str, Any] = {"is_master": first, "timeout": left, "wait_for_workers": False}
    store = TCPStore(address, port, world_size, master_listen_fd=listener, **options)  # by itself it listens everywhere
    store = PrefixStore(f"fastgen/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    store.set(str(rank), "here")
    end = time.monotonic() + START_TIMEOUT
    while late := [str(r) for r in range(world_size) if not store.check([str(r)])]:
        if time.monotonic() > end:
            raise TimeoutError(f"rank {', '.join(late)} did not come within {START_TIMEOUT:.0f} s")
        time.sleep(0.05)
    return store


def _is_loopback(address: str) -> bool:
    return address in ("localhost", "127.0.0.1")


@contextmanager
def _loopback_only() -> Iterator[None]:
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


def _init_process_group(device_type: str, rank: int, world_size: int, store: Any, timeout: timedelta) -> None:
    if device_type == "cuda":
        torch.cuda.set_device(rank_device(device_type, rank))
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


@contextmanager
def close_workers_on_error(tp_group: Any) -> Iterator[None]:
    """Around the making of an engine: what goes wrong ends the ranks that were started for it."""
    if not isinstance(tp_group, WorkerGroup):
        yield
        return
    try:
        with tp_group.collective_call(defer_interrupts=False):
            yield
    except BaseException:
        tp_group.close()
        raise


def load_shared(
    shards: list[Params], model_config: ModelConfig, tokenizer: Tokenizer | None, shard: TPShard, device: str, **_: Any
) -> Any:
    """A `Load` for parameters that are there already, in memory that processes share."""
    return model_config, tree_map(lambda x: x if x is None else x.to(device), shards[shard.rank]), tokenizer


def shard_loader(params: Params, model_config: ModelConfig, tokenizer: Tokenizer | None, tp_size: int) -> LoadShard:
    """Each rank's share of parameters."""
    shares = [shard_params(params, model_config, TPShard(rank, tp_size)) for rank in range(tp_size)]
    shares = [tree_map(lambda x: x if x is None else x.cpu().share_memory_(), s) for s in shares]
    return partial(load_shared, shares, model_config, tokenizer)


class WorkerGroup(TPProcessGroup):
    """A group whose other ranks are processes that this one started."""

    active: "WorkerGroup | None" = None

    def __init__(
        self, tp_size: int, device_type: str, load_shard: LoadShard, engine_options: dict[str, Any], engine_class: Any
    ) -> None:
        self.failure_cause = ""  # of the end of them all
        self.shard = UNSHARDED  # until all have met
        self._closing = threading.Event()
        self._owner_pid = os.getpid()
        self._ready_ranks, self._failures = set[int](), dict[int, tuple[float, str]]()
        self._call_started_at: float | None = None  # of the call that is being made
        self._pipe_lock = threading.Lock()  # of the pipes
        # Through a file the ranks meet without a socket. Only this user can open it; where there is one it lies in a
        # file system of memory, which is never full of others' files. If this process is killed, a rank removes it.
        self._rendezvous_file = tempfile.NamedTemporaryFile(
            prefix="fastgen-ranks-", dir=SHM_DIR if os.path.isdir(SHM_DIR) else None
        )
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = list[Connection](), list[BaseProcess]()
        WorkerGroup.active = self
        try:
            for rank in range(1, tp_size):
                ours, theirs = context.Pipe()
                arguments = (
                    theirs,
                    rank,
                    tp_size,
                    self._rendezvous_file.name,
                    device_type,
                    load_shard,
                    engine_options,
                    engine_class,
                )
                process = context.Process(target=_worker_main, args=arguments, name=f"rank {rank}", daemon=True)
                process.start()
                detach_in_forks([process])
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)
            threading.Thread(target=self._monitor_workers, name="ranks", daemon=True).start()
            end = time.monotonic() + START_TIMEOUT
            while len(self._ready_ranks) < tp_size - 1:
                self.raise_if_failed()
                if time.monotonic() > end:
                    late = [r for r in range(1, tp_size) if r not in self._ready_ranks]
                    raise RuntimeError(f"rank {', '.join(map(str, late))} did not start within {START_TIMEOUT:.0f} s")
                time.sleep(0.01)
            with self.collective_call(), _loopback_only():
                _init_process_group(
                    device_type, 0, tp_size, FileStore(self._rendezvous_file.name, -1), timedelta(minutes=30)
                )
                super().__init__()
        except BaseException:
            self.close()
            raise

    def broadcast_call(self, method: str, *args: Any, **kwargs: Any) -> None:
        """The other ranks' engines make this call. RuntimeError with the cause if one of them is gone."""
        self.raise_if_failed()
        data = pickle.dumps((method, args, kwargs))  # tensors by value: there may be more than files can be open
        with self._pipe_lock:
            for pipe in self._pipes:
                try:
                    pipe.send_bytes(data)
                except OSError:
                    self._raise_failure_cause()

    def raise_if_failed(self) -> None:
        """RuntimeError with the cause if a rank is gone."""
        if self.failure_cause:
            raise RuntimeError(self.failure_cause)

    @contextmanager
    def collective_call(self, *, defer_interrupts: bool = True) -> Iterator[None]:
        """Around what all ranks do together: an error is the end of them all.

        `whole`: an interrupt waits until it is done. RuntimeError with the cause, if a rank ends meanwhile.
        """
        main = defer_interrupts and threading.current_thread() is threading.main_thread()
        main = main and signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None)  # as a server's engine has it
        interrupted: list[Any] = []
        before = signal.signal(signal.SIGINT, lambda *given: interrupted.append(given)) if main else None
        self._call_started_at = time.monotonic()
        try:
            yield
        except BaseException as e:
            self._raise_failure_cause(e)
            raise
        finally:
            self._call_started_at = None
            if main:
                signal.signal(signal.SIGINT, before)
        self.raise_if_failed()
        if interrupted:
            if not callable(before):
                raise KeyboardInterrupt
            before(*interrupted[0])

    def _raise_failure_cause(self, error: BaseException | None = None) -> None:
        """After an error here: RuntimeError with the cause, if that is another rank's. All of them end."""
        end = time.monotonic() + (0 if isinstance(error, KeyboardInterrupt) else FAILURE_REPORT_TIMEOUT + 1.5)
        while not self.failure_cause and time.monotonic() < end:
            time.sleep(0.02)
        if self.failure_cause:
            raise RuntimeError(self.failure_cause) from error
        self.failure_cause = f"rank 0 failed: {error or 'the pipes to the other ranks are closed'}"
        self._kill_workers()
        if error is None:
            raise RuntimeError(self.failure_cause)

    def _monitor_workers(self) -> None:
        """A thread: hears of the ranks that end, says why, and ends the others."""
        pipes = {pipe: rank for rank, pipe in enumerate(self._pipes, 1)}
        ends: dict[Any, int] = {p.sentinel: rank for rank, p in enumerate(self._processes, 1)}
        since: float | None = None
        while since is None or time.monotonic() < since + FAILURE_REPORT_TIMEOUT:
            ready = wait([*pipes, *ends], None if since is None else FAILURE_REPORT_TIMEOUT)
            if self._closing.is_set():
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
                    self._failures[pipes[one]] = at, problem  # type: ignore[index]
                    since = since or time.monotonic()
                else:
                    self._ready_ranks.add(pipes[one])  # type: ignore[index]
        self.failure_cause = self._describe_failure()
        self._kill_workers()
        if torch.cuda.is_available():  # kernels that wait for the others' would wait for ever
            with suppress(Exception):
                self.abort_peer_waits()
            with suppress(Exception):
                dist.distributed_c10d._abort_process_group()
        begun = self._call_started_at
        end = time.monotonic() + HUNG_CALL_TIMEOUT
        while begun is not None and self._call_started_at == begun and not self._closing.is_set():
            if time.monotonic() > end:
                print(
                    f"fastgen: {self.failure_cause}\nThis process waits for it and ends as well.",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)
            time.sleep(0.05)

    def _describe_failure(self) -> str:
        """Who was first: one that was killed, or else one that says what went wrong; the rest is what follows."""
        for rank, process in enumerate(self._processes, 1):
            code = process.exitcode
            if code is not None and code < 0:
                return f"rank {rank} (process {process.pid}) was killed by {signal.Signals(-code).name}"
        if self._failures:
            rank, (_, problem) = min(self._failures.items(), key=lambda x: x[1][0])
            return f"rank {rank} (process {self._processes[rank - 1].pid}) failed: {problem}"
        ended = [(r, p) for r, p in enumerate(self._processes, 1) if p.exitcode is not None]
        return "; ".join(f"rank {r} (process {p.pid}) ended with exit code {p.exitcode}" for r, p in ended)

    def _kill_workers(self) -> None:
        for process in self._processes:
            process.kill()

    def close(self) -> None:
        """The others end; those that do not within seconds are killed. In a fork of this process: nothing."""
        if self._closing.is_set() or self._owner_pid != os.getpid():
            return
        self._closing.set()
        with self._pipe_lock:
            for pipe in self._pipes:
                with suppress(OSError):
                    pipe.send(("close", (), {}))
        end = time.monotonic() + (0 if self.failure_cause else 5)
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
        self._kill_workers()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            pipe.close()
        if dist.is_initialized():
            with suppress(RuntimeError):  # a group that was aborted
                dist.destroy_process_group()
        self._rendezvous_file.close()
        WorkerGroup.active = None


def _worker_main(
    pipe: Connection,
    rank: int,
    tp_size: int,
    rendezvous_path: str,
    device_type: str,
    load_shard: LoadShard,
    engine_options: dict[str, Any],
    engine_class: Any,
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
                os.unlink(rendezvous_path)
            os._exit(1)  # rank 0 is gone, and a collective may wait for it

    try:
        threading.Thread(target=read, daemon=True).start()
        pipe.send((0.0, ""))
        with _loopback_only():
            _init_process_group(device_type, rank, tp_size, FileStore(rendezvous_path, -1), timedelta(minutes=30))
            ranks = TPProcessGroup()
        where, own = rank_device(device_type, rank), list[ReleasableMemory]()

        def region(size: int) -> ReleasableMemory:
            own.append(ReleasableMemory(size, torch.device(where)))
            return own[-1]

        spec, params, tokenizer = load_shard(ranks.shard, where, allocate=region)
        with engine_class(params, spec, tokenizer, progress=False, tp_group=ranks, **engine_options) as engine:
            engine._grammar_backend.skip_trials = True  # rank 0 has tried the grammars that come
            if own:
                engine._releasable_memory["params"] = own[0]
            del params
            while (call := calls.get())[0] != "close":
                with suppress(*(ValueError,) if call[0] in SELF_VALIDATING_CALLS else ()):
                    getattr(engine, call[0])(*call[1], **call[2])
        dist.destroy_process_group()
    except BaseException as e:
        said = f"{type(e).__name__}: {e}" if isinstance(e, ValueError) else traceback.format_exc().strip()
        with suppress(OSError):
            pipe.send((time.monotonic(), said))
        os._exit(1)
    os._exit(0)  # whatever thread is left
