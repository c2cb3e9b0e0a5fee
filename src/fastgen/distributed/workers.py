"""The other ranks of a tensor-parallel engine, as child processes: started, kept in step, and ended together.

    this process, rank 0 ── a pipe each ── ranks 1 .. N-1

Rank 0's engine sends each call (requests, steps, aborts) to the engines of the other ranks before it makes the call
itself. If any rank ends, all of them end within seconds, and the error names the first one and its cause, even where a
rank waits in a collective that cannot be interrupted.
"""

import multiprocessing
import os
import pickle
import queue
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore
from torch.utils._pytree import tree_map

from fastgen.checkpoint.weights import shard_params
from fastgen.core.extensions import RANK_METHODS
from fastgen.core.model_config import UNSHARDED, ModelConfig, TPShard
from fastgen.core.types import Params
from fastgen.distributed import rendezvous
from fastgen.distributed.processes import ChildFailure, ChildProcess, end_children, run_child
from fastgen.distributed.rendezvous import START_TIMEOUT, TORCHRUN_VARIABLES, loopback_only, rank_device
from fastgen.distributed.tensor_parallel import TPProcessGroup
from fastgen.text import Tokenizer
from fastgen.training.sleep import EngineMemory

# Returns a rank's parameters on its device; with `allocate=`, loaded parameters lie in the memory that it returns.
LoadShard = Callable[..., tuple[ModelConfig, Params, Tokenizer | None]]
FAILURE_REPORT_TIMEOUT = 0.5  # seconds in which other ranks may report the cause once one has ended
HUNG_CALL_TIMEOUT = 6.0  # seconds for a call to notice that a rank has ended; then this process ends too
CLOSE_TIMEOUT = 5.0  # seconds for the other ranks to end by themselves
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
SHM_DIR = "/dev/shm"


def create_tp_group(
    tp_size: int, device_type: str, load_shard: LoadShard, engine_options: dict[str, Any], engine_class: Any
) -> TPProcessGroup:
    """Returns the ranks of an engine: those of an existing process group, or of new processes.

    A process group exists if this program has initialized one, or if torchrun has started this process; then every
    process of the group makes this call. New processes create an `engine_class` with `engine_options`, as this does.
    Raises ValueError if environment or machine do not fit `tp_size`.
    """
    if dist.is_initialized():
        if WorkerGroup.active is not None:
            raise ValueError("this process already runs an engine with tensor parallelism; close it first")
        if (num_ranks := dist.get_world_size()) != tp_size:
            raise ValueError(f"parallel.tensor_parallel={tp_size}, but the process group here has {num_ranks} ranks")
        return TPProcessGroup()
    if any(name in os.environ for name in TORCHRUN_VARIABLES[:2]):
        return rendezvous.join_torchrun_group(tp_size, device_type)
    if device_type == "cuda" and (num_gpus := torch.cuda.device_count()) < tp_size:
        raise ValueError(f"parallel.tensor_parallel={tp_size} needs as many GPUs, and this machine shows {num_gpus}")
    return WorkerGroup(tp_size, device_type, load_shard, engine_options, engine_class)


@contextmanager
def close_workers_on_error(tp_group: Any) -> Iterator[None]:
    """Ends the ranks of a `WorkerGroup` if their engine cannot be created in this context."""
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
    """Copies a rank's parameters from memory that all ranks share to its device; a `LoadShard`."""
    return model_config, tree_map(lambda x: x if x is None else x.to(device), shards[shard.rank]), tokenizer


def shard_loader(
    params: Params, model_config: ModelConfig, tokenizer: Tokenizer | None, tp_size: int, quantization: str = "auto"
) -> LoadShard:
    """Returns a `LoadShard` that loads each rank's shard of `params`, which are copied to shared memory.

    With `quantization` "fp8" the shards are quantized, unless `params` are: then their scales are kept.
    """
    weights = "fp8" if quantization == "fp8" else "none"
    shards = [shard_params(params, model_config, TPShard(rank, tp_size), weights) for rank in range(tp_size)]
    shards = [tree_map(lambda x: x if x is None else x.cpu().share_memory_(), s) for s in shards]
    return partial(load_shared, shards, model_config, tokenizer)


class WorkerGroup(TPProcessGroup):
    """A process group whose other ranks are child processes of this one, rank 0.

    `failure_cause` is not empty once a rank has ended or failed: then all ranks end, and every call raises it.
    """

    active: "WorkerGroup | None" = None
    has_workers = True

    def __init__(self, tp_size: int, device_type: str, *engine_args: Any) -> None:
        """`engine_args` are the LoadShard, the options and the class of every rank's engine."""
        self.failure_cause = ""
        self.shard = UNSHARDED  # until all ranks have met
        self._closing = threading.Event()
        self._owner_pid = os.getpid()
        self._call_started_at: float | None = None  # while a collective call runs
        self._pipe_lock = threading.Lock()
        # Ranks meet through a file, without a socket, that only this user can open. In a file system of memory other
        # files cannot fill the disk it lies on. If this process is killed, another rank removes the file.
        shm_dir = SHM_DIR if os.path.isdir(SHM_DIR) else None
        self._rendezvous_file = tempfile.NamedTemporaryFile(prefix="fastgen-ranks-", dir=shm_dir)
        path, context = self._rendezvous_file.name, multiprocessing.get_context("spawn")
        self._workers = list[ChildProcess]()
        WorkerGroup.active = self
        try:
            for rank in range(1, tp_size):
                options = TPShard(rank, tp_size), path, device_type, *engine_args
                self._workers.append(ChildProcess(context, f"rank {rank}", _run_worker, *options, daemon=True))
            threading.Thread(target=self._monitor_workers, name="ranks", daemon=True).start()
            end = time.monotonic() + START_TIMEOUT
            while late := [worker.name for worker in self._workers if not worker.is_ready]:
                self.raise_if_failed()
                if time.monotonic() > end:
                    raise RuntimeError(f"{', '.join(late)} did not start within {START_TIMEOUT:.0f} s")
                time.sleep(0.01)
            with self.collective_call(), loopback_only():
                _init_process_group(TPShard(0, tp_size), path, device_type)
                super().__init__()
        except BaseException:
            self.close()
            raise

    def broadcast_call(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Has every worker call a method that `on_all_ranks` registered. Raises RuntimeError if a worker has ended."""
        self.raise_if_failed()
        data = pickle.dumps((method, args, kwargs))  # tensors by value: by reference each takes an open file
        with self._pipe_lock:
            for worker in self._workers:
                try:
                    worker.pipe.send_bytes(data)
                except OSError:
                    self._raise_failure_cause()

    def raise_if_failed(self) -> None:
        """Raises RuntimeError with the cause if a rank has ended or failed."""
        if self.failure_cause:
            raise RuntimeError(self.failure_cause)

    @contextmanager
    def collective_call(self, *, defer_interrupts: bool = True) -> Iterator[None]:
        """Surrounds what all ranks do together, so that an error in it ends all of them.

        With `defer_interrupts`, Ctrl-C takes effect at the end, when all ranks have done the same. Raises RuntimeError
        with the cause if another rank ends in the meantime.
        """
        defer = defer_interrupts and threading.current_thread() is threading.main_thread()
        defer = defer and signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None)  # a server's engine ignores it
        interrupts: list[Any] = []
        handler = signal.signal(signal.SIGINT, lambda *args: interrupts.append(args)) if defer else None
        outer_call, self._call_started_at = self._call_started_at, time.monotonic()
        try:
            yield
        except BaseException as e:
            self._raise_failure_cause(e)
            raise
        finally:
            self._call_started_at = outer_call
            if defer:
                signal.signal(signal.SIGINT, handler)
        self.raise_if_failed()
        if interrupts:
            if not callable(handler):
                raise KeyboardInterrupt
            handler(*interrupts[0])

    def _raise_failure_cause(self, error: BaseException | None = None) -> None:
        """After an error here: ends all ranks; raises RuntimeError with the cause if that is another rank."""
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
        """Runs in a thread: once a rank ends or fails, records the cause and ends the others."""
        workers = {worker.pipe: worker for worker in self._workers}
        sentinels = {worker.sentinel for worker in self._workers}
        failed_at: float | None = None
        while failed_at is None or time.monotonic() < failed_at + FAILURE_REPORT_TIMEOUT:
            ready = wait([*workers, *sentinels], None if failed_at is None else FAILURE_REPORT_TIMEOUT)
            if self._closing.is_set():
                return
            for source in ready:
                if not isinstance(source, Connection):
                    sentinels.discard(source)  # type: ignore[arg-type]
                    failed_at = failed_at or time.monotonic()
                    continue
                try:
                    message = source.recv()
                except (EOFError, OSError):
                    del workers[source]
                    continue
                if isinstance(message, ChildFailure):
                    workers[source].failure = message
                    failed_at = failed_at or time.monotonic()
                else:
                    workers[source].is_ready = True
        self.failure_cause = self.failure_cause or self._describe_failure()
        self._kill_workers()
        if torch.cuda.is_available():  # kernels would wait for those of the ended rank forever
            with suppress(Exception):
                self.abort_peer_waits()
            with suppress(Exception):
                dist.distributed_c10d._abort_process_group()
        call_started_at, end = self._call_started_at, time.monotonic() + HUNG_CALL_TIMEOUT
        while call_started_at is not None and self._call_started_at == call_started_at and not self._closing.is_set():
            if time.monotonic() > end:
                text = f"fastgen: {self.failure_cause}\nThis process waits for it and ends as well."
                print(text, file=sys.stderr, flush=True)
                os._exit(1)
            time.sleep(0.05)

    def _describe_failure(self) -> str:
        """Returns the first cause: a rank that was killed, otherwise the earliest error; the other errors follow it."""
        ended = [worker for worker in self._workers if worker.process.exitcode is not None]
        killed = [worker for worker in ended if (worker.process.exitcode or 0) < 0]
        failures = {worker.failure.time: worker for worker in self._workers if worker.failure is not None}
        first = killed[:1] or [worker for _, worker in sorted(failures.items())[:1]]
        return "; ".join(worker.describe_end() for worker in first or ended)

    def _kill_workers(self) -> None:
        for worker in self._workers:
            worker.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Ends the other ranks, and kills those that take longer than CLOSE_TIMEOUT. Does nothing in a fork."""
        if self._closing.is_set() or self._owner_pid != os.getpid():
            return
        self._closing.set()
        with self._pipe_lock:
            for worker in self._workers:
                with suppress(OSError):
                    worker.pipe.send(("close", (), {}))
        end_children(self._workers, 0 if self.failure_cause else CLOSE_TIMEOUT)
        for worker in self._workers:
            worker.pipe.close()
        if dist.is_initialized():
            with suppress(RuntimeError):  # the group was aborted
                dist.destroy_process_group()
        self._rendezvous_file.close()
        WorkerGroup.active = None


def _init_process_group(tp_shard: TPShard, rendezvous_path: str, device_type: str) -> None:
    store = FileStore(rendezvous_path, -1)
    rendezvous.init_process_group(device_type, tp_shard.rank, tp_shard.size, store, COLLECTIVE_TIMEOUT)


def _run_worker(pipe: Connection, tp_shard: TPShard, rendezvous_path: str, *options: Any) -> None:
    """Runs the process of a rank other than 0."""
    serve = partial(_serve_rank, tp_shard, rendezvous_path, *options)
    run_child(pipe, serve, on_parent_exit=lambda: os.unlink(rendezvous_path))


def _serve_rank(
    tp_shard: TPShard, rendezvous_path: str, device_type: str, load_shard: LoadShard, engine_options: dict[str, Any],
    engine_class: Any, pipe: Connection, calls: queue.SimpleQueue[tuple[str, tuple[Any, ...], dict[str, Any]]],
) -> None:  # fmt: skip
    """Creates a rank's engine, which then makes the calls that rank 0's engine makes."""
    pipe.send("ready")
    with loopback_only():
        _init_process_group(tp_shard, rendezvous_path, device_type)
        tp_group = TPProcessGroup()
    device, memory = rank_device(device_type, tp_shard.rank), EngineMemory()
    allocate = partial(memory.allocate, "params", torch.device(device))
    model_config, params, tokenizer = load_shard(tp_group.shard, device, allocate=allocate)
    with engine_class(params, model_config, tokenizer, progress=False, tp_group=tp_group, **engine_options) as engine:
        engine.grammars.skip_trials = True  # rank 0 has tried the grammars that it sends
        engine.memory.regions |= memory.regions
        del params, memory, allocate
        while (call := calls.get())[0] != "close":
            name, args, kwargs = call
            function, checks_input = RANK_METHODS[name]
            owner = engine.core if name.startswith("EngineCore.") else engine
            with suppress(*(ValueError,) if checks_input else ()):
                function(owner, *args, **kwargs)
    dist.destroy_process_group()
