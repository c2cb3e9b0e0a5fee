"""Several engines behind one queue, each a process with devices of its own.

    this process: the queue ── a pipe each ── replica 0 .. R-1: an engine, of one device or (tensor_parallel) several

A request waits here until a replica has room for it, and goes to the one with the least left to do; or to one that
has seen its beginning, whose pages it then finds. Seeds are drawn here, so no token depends on who draws it.
"""

import itertools
import multiprocessing
import os
import queue
import random as random_
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, cast

import torch
from tqdm.auto import tqdm

from fastgen import lora
from fastgen.checkpoint import weights
from fastgen.config import EngineConfig, SamplingParams
from fastgen.core import tokenizer as tokens
from fastgen.core.model_config import ModelConfig, shard_config
from fastgen.core.request import Completion, Event, Output, map_prompts, max_length, rejection_events
from fastgen.core.tokenizer import Prompt
from fastgen.core.types import Adapter, Tokenizer
from fastgen.engine import Engine, EventStream, collect_outputs, outputs_as_completed, resolve_model
from fastgen.structured_output.backend import GrammarBackend, GrammarMatcher
from fastgen.thread_safety import AccessGuard, detach_in_forks, exclusive

PREFIX_AFFINITY = 4  # requests of its own kind that one lets pass in order to find its beginning cached
MAX_PREFIXES = 2**14  # beginnings that are remembered
SHUTDOWN_SECONDS = 8.0  # seconds in which replicas close
Stats = dict[str, int]
AddRequest = tuple[int, list[int], SamplingParams, bool, bool, bool]  # id, prompt, settings; see `Request`; with text


class ReplicaInfo(NamedTuple):
    """What a replica says of itself."""

    model_config: ModelConfig
    capacity: int
    device: torch.device
    dtype: torch.dtype
    settings: EngineConfig
    stats: Stats


@dataclass(slots=True)
class RoutedRequest:
    """One that has not ended. `quiet`: nothing is said of it before its end. `wanted`: somebody waits for it."""

    prompt: list[int]
    params: SamplingParams
    stream_text: bool
    final_only: bool
    replica_index: int | None = None  # None: it waits
    has_consumer: bool = True

    @property
    def max_total_tokens(self) -> int:
        """Tokens it may take."""
        return len(self.prompt) + self.params.n * (self.params.max_tokens or 0)


class Inbox:
    """Messages of all replicas. One is there until it is done with, so that an interrupt loses none."""

    def __init__(self) -> None:
        self.messages = deque[tuple[int, Any]]()
        self._wakeups: queue.SimpleQueue[None] = queue.SimpleQueue()

    def put(self, index: int, message: Any) -> None:
        self.messages.append((index, message))
        self._wakeups.put(None)

    def peek(self) -> tuple[int, Any]:
        """The oldest one; waits for it."""
        while not self.messages:
            self._wakeups.get()
        return self.messages[0]

    def pop(self) -> None:
        """With the oldest one."""
        self.messages.popleft()


def choose_replica(
    assigned_tokens: Sequence[int], accepts_requests: Sequence[bool], prefix_replicas: Collection[int], num_tokens: int
) -> int | None:
    """The replica for a request of `cost` tokens, or None where no one has room.

    It is the one with the least load, or of those that have `seen` the request's beginning, unless these have so much
    more to do that computing it again is quicker.
    """
    free = [i for i, has in enumerate(accepts_requests) if has]
    if not free:
        return None
    least = min(free, key=assigned_tokens.__getitem__)
    known = min((i for i in free if i in prefix_replicas), key=assigned_tokens.__getitem__, default=least)
    return known if assigned_tokens[known] - assigned_tokens[least] <= PREFIX_AFFINITY * num_tokens else least


def visible_devices(replica_index: int, devices_per_replica: int, num_devices: int) -> str:
    """CUDA_VISIBLE_DEVICES of a replica of `size` of the `count` GPUs that this process sees."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = [n.strip() for n in names if n.strip()] or [str(i) for i in range(num_devices)]
    return ",".join(names[replica_index * devices_per_replica : (replica_index + 1) * devices_per_replica])


def collect_stats(engine: "Engine | Replicas") -> Stats:
    """Of the moment, and totals since the start; of replicas: the sums."""
    if isinstance(engine, Replicas):
        return {name: sum(f[name] for f in engine.stats) for name in engine.stats[0]}
    state, tree = engine.state, engine.state.prefix_cache
    pages = tree.num_device_pages - 1
    return {
        "running": len(state.running), "waiting": len(state.waiting), "pages": pages,
        "held_pages": pages - tree.num_available_pages(), "prefix_queries": tree.stats.num_queried_tokens,
        "prefix_hits": tree.stats.num_hit_tokens, "preemptions": tree.stats.num_preemptions, "steps": engine.num_steps,
    }  # fmt: skip


class Replicas:
    """Engines behind one queue: requests as of `Engine`, each run by one of them. For one thread at a time.

    When a replica ends, whatever it was, all end and the call says which and why; so does every later one.
    """

    def __init__(
        self,
        model_path: Path,
        num_replicas: int,
        load_kwargs: dict[str, Any],
        settings: EngineConfig,
        *,
        progress: bool,
    ) -> None:
        kind, size = load_kwargs["device"], settings.parallel.tensor_parallel
        self._access_guard = AccessGuard("these replicas", "hand requests to the thread that calls them by a queue")
        self._pending_aborts = deque[
            frozenset[int]
        ]()  # requests that nobody waits for any more, to end with the next call
        self.worker_failure = ""  # of the end of them all
        self.tokenizer: Tokenizer | None = tokens.load(model_path)
        threads = max(1, torch.get_num_threads() // (num_replicas * size))
        alone = replace(settings, parallel=replace(settings.parallel, replicas=1), seed=None)
        each = {f.name: getattr(alone, f.name) for f in fields(EngineConfig)}
        context = multiprocessing.get_context("spawn")
        self._processes, pipes = list[BaseProcess](), list[Connection]()
        self._inbox = Inbox()
        self._outbox: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        # Before what multiprocessing does at exit: it would wait for processes that wait for this one.
        self._finalizer = Finalize(self, _close_replicas, (self._processes, pipes, self._outbox), exitpriority=10)
        try:
            for i in range(num_replicas):
                ours, theirs = context.Pipe()
                where = visible_devices(i, size, torch.cuda.device_count()) if kind == "cuda" else None
                given = theirs, threads, where, model_path, load_kwargs, each, progress and i == 0
                process = context.Process(target=_run_replica, args=given, name=f"replica {i}")
                process.start()
                detach_in_forks([process])
                theirs.close()
                pipes.append(ours)
                self._processes.append(process)
                threading.Thread(target=_read_pipe, args=(i, ours, self._inbox), daemon=True).start()
            threading.Thread(target=_write_pipes, args=(pipes, self._outbox), daemon=True).start()
            started: dict[int, ReplicaInfo] = {}
            while len(started) < num_replicas:
                index, message = self._inbox.peek()
                if not isinstance(message, ReplicaInfo):
                    self._fail_all(index, message)
                started[index] = message
                self._inbox.pop()
        except BaseException:
            self.close()
            raise
        first = started[0]
        self.model_config, self.device, self.dtype = first.model_config, first.device, first.dtype
        self.cache_capacity = min(s.capacity for s in started.values())  # of one of them, tokens
        self.config = replace(first.settings, parallel=settings.parallel, seed=settings.seed)
        self.stats: list[Stats] = [started[i].stats for i in range(num_replicas)]  # of each, as it last said
        seed = random_.SystemRandom().getrandbits(62) if settings.seed is None else settings.seed
        self._seed_rng, self._next_ids = random_.Random(seed), itertools.count()
        self._grammar_backend = GrammarBackend(
            self.tokenizer, self.model_config.vocab_size, frozenset(self.model_config.eos_token_ids)
        )
        # Every replica has these. Here nothing is computed with them, so that they need no memory.
        room = self.config.lora
        self._adapter_manager = (
            lora.AdapterManager(self.model_config, room, torch.device("meta"), self.dtype)
            if room.max_adapters
            else None
        )
        for name, folder in load_kwargs["adapters"].items():
            self._require_adapter_manager().add(name, lora.load(folder, self.model_config, device="cpu"))
        self._requests: dict[int, RoutedRequest] = {}
        self._waiting: deque[int] = deque()
        self._assigned_tokens, self._num_running = (
            [0] * num_replicas,
            [0] * num_replicas,
        )  # tokens and sequences handed out
        self._prefix_replicas: dict[int, set[int]] = {}  # the beginnings of prompts -> who has it
        self._pending_events: list[Event] = []

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        replicas: int = 2,
        dtype: str = "auto",
        device: str = "auto",
        random_weights: bool = False,
        random_seed: int = 0,
        adapters: Mapping[str, str | Path] | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> "Replicas":
        """As `Engine.from_pretrained`, `replicas` times: replica r has GPUs r N to r N + N - 1 of `tensor_parallel=N`.

        On a CPU they share its threads.
        """
        chosen = EngineConfig.from_flat(**settings)
        limits = lora.expand_lora_config(chosen.lora, adapters or {})
        chosen = replace(chosen, parallel=replace(chosen.parallel, replicas=replicas), lora=limits)
        path, device = resolve_model(model, dtype, device)
        if device not in ("cpu", "cuda"):
            raise ValueError(f"replicas have devices of their own: device must be cpu, cuda or auto, got {device!r}")
        if started := [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]:
            names = " and ".join(started)
            raise ValueError(f"replicas are started by one process, but {names} says that torchrun started this one")
        size = chosen.parallel.tensor_parallel
        shard_config(weights.read_model_config(path), size)
        if device == "cuda" and (count := torch.cuda.device_count()) < replicas * size:
            asked = f"parallel.replicas={replicas} of parallel.tensor_parallel={size}"
            raise ValueError(f"{asked} need {replicas * size} GPUs, and this machine shows {count}")
        loading = {"dtype": dtype, "device": device, "random_weights": random_weights, "random_seed": random_seed}
        loading["adapters"] = dict(adapters or {})
        return cls(path, replicas, loading, chosen, progress=progress)

    # --- requests -------------------------------------------------------------------------------------------------

    @exclusive()
    def add(self, prompt: Prompt, sampling: SamplingParams | None = None, *, stream_text: bool = True) -> int:
        """Queue a request; its id. As `Engine.add`."""
        return self._add(prompt, sampling or SamplingParams(), stream_text=stream_text)

    @exclusive()
    def _add(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        stream_text: bool,
        matchers: Sequence[GrammarMatcher | None] | None = None,
    ) -> int:
        """As `add`; `guides` are what `_compile` returned for this request."""
        return self._enqueue(
            [
                self._prepare(
                    prompt, params, stream_text=stream_text, final_only=False, grammar_checked=matchers is not None
                )
            ]
        )[0]

    def _compile_grammar(
        self, params: SamplingParams, cancel_event: threading.Event | None = None
    ) -> list[GrammarMatcher | None]:
        """As `Engine._compile`, but a grammar is only tried here: the replica that gets the request compiles it."""
        if params.grammar is not None:
            self._grammar_backend.check_grammar(params.grammar, cancel_event)
        return [None] * params.n

    def _prepare(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        *,
        stream_text: bool,
        final_only: bool,
        grammar_checked: bool = False,
    ) -> RoutedRequest:
        content = self.config.special_tokens_in_content
        ids = tokens.encode(self.tokenizer, prompt, special_tokens_in_content=content)
        limit = max_length(ids, sampling, self.model_config, self.cache_capacity, self.tokenizer is not None)
        if sampling.adapter is not None:
            self._require_adapter_manager()[sampling.adapter]  # a ValueError for one that is not there
        if not grammar_checked:
            self._compile_grammar(sampling)  # a ValueError here, and not in the replica
        seed = self._seed_rng.getrandbits(63) if sampling.seed is None else sampling.seed
        return RoutedRequest(ids, replace(sampling, seed=seed, max_tokens=limit - len(ids)), stream_text, final_only)

    def _enqueue(self, requests: Sequence[RoutedRequest | Output]) -> list[int]:
        self._require_alive()
        ids = [next(self._next_ids) for _ in requests]
        for id, request in zip(ids, requests, strict=True):
            if isinstance(request, Output):
                request.request_id = id
                self._pending_events += rejection_events(request)
            else:
                self._requests[id] = request
                self._waiting.append(id)
        self._dispatch()
        return ids

    def _dispatch(self) -> None:
        """What waits, in its order, to replicas that have room: what they run at once, and a quarter to follow."""
        most, given = self.config.schedule.max_num_seqs, [list[AddRequest]() for _ in self._assigned_tokens]
        most += most // 4
        page = self.config.kv_cache.page_size if self.config.kv_cache.prefix_cache else 0
        while self._waiting:
            id = self._waiting[0]
            if not (r := self._requests[id]).has_consumer:
                del self._requests[self._waiting.popleft()]
                continue
            key = (
                hash((r.params.adapter, r.params.cache_salt, *r.prompt[:page]))
                if page and len(r.prompt) > page
                else None
            )
            seen = set[int]() if key is None else self._prefix_replicas.get(key, set())
            room = [n == 0 or n + r.params.n <= most for n in self._num_running]
            if (to := choose_replica(self._assigned_tokens, room, seen, r.max_total_tokens)) is None:
                break
            self._waiting.popleft()
            r.replica_index = to
            self._assigned_tokens[to] += r.max_total_tokens
            self._num_running[to] += r.params.n
            given[to].append((id, r.prompt, r.params, r.stream_text, r.final_only, self.tokenizer is not None))
            if key is not None:
                self._prefix_replicas[key] = seen | {to}
                if len(self._prefix_replicas) > MAX_PREFIXES:
                    del self._prefix_replicas[next(iter(self._prefix_replicas))]
        for i, some in enumerate(given):
            if some:
                self._outbox.put((i, ("add", some)))

    @exclusive()
    def abort(self, request_id: int) -> None:
        """End a request. Its last events, with what it has, come with later steps."""
        r = self._requests.get(request_id)
        if r is None:
            return
        if r.replica_index is not None:
            self._outbox.put((r.replica_index, ("abort", [request_id])))
            return
        self._waiting.remove(request_id)
        del self._requests[request_id]
        output = Output(request_id, r.prompt, [Completion(finish_reason="abort") for _ in range(r.params.n)])
        events = [Event(request_id, i, [], "", finish_reason="abort") for i in range(r.params.n)]
        events[-1].output = output
        self._pending_events += events

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether anything is left to do or to report."""
        return bool(self._requests or self._pending_events)

    @exclusive()
    def step(self) -> list[Event]:
        """What the replicas have added to requests; waits until there is something.

        RuntimeError, with the cause, when a replica has ended; so have all of them then.
        """
        self._require_alive()
        self._dispatch()
        while self._inbox.messages or (any(self._num_running) and not self._pending_events):
            self._handle_message(*self._inbox.peek())
            self._inbox.pop()
            if not (self._pending_events or self._inbox.messages):
                break  # nothing for anybody, but the caller may have other things to look at
        self._dispatch()
        events, self._pending_events = self._pending_events, []
        return events

    def _handle_message(self, index: int, message: Any) -> None:
        """A replica's word."""
        if not isinstance(message, tuple):
            self._fail_all(index, message)
        events, self.stats[index] = cast(tuple[deque[Event], Stats], message)
        while events:  # after an interrupt, what is left of them
            event = events[0]
            r = self._requests.get(event.request_id)
            if r is not None and r.has_consumer:
                self._pending_events.append(event)
            if r is not None and event.output is not None:
                del self._requests[event.request_id]
                self._assigned_tokens[index] -= r.max_total_tokens
                self._num_running[index] -= r.params.n
            events.popleft()

    def _require_alive(self) -> None:
        if self.worker_failure:
            raise RuntimeError(self.worker_failure)

    def _fail_all(self, index: int, error: Exception | None) -> None:
        """A replica has ended, and says why or not: so do all."""
        process = self._processes[index]
        process.join(1)
        code = process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self.worker_failure = f"replica {index} (process {process.pid}) {f'failed: {error}' if error else how}"
        self.close()
        raise (ValueError if isinstance(error, ValueError) else RuntimeError)(self.worker_failure)

    def prepare_grammars(self) -> None:
        """Do now what the first grammar would wait for, a second or two, if grammars can be used at all."""
        self._grammar_backend.prepare()

    # --- adapters -------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> frozenset[str]:
        """Those that requests may choose."""
        return frozenset() if self._adapter_manager is None else frozenset(self._adapter_manager.loaded)

    @exclusive()
    def add_adapter(self, name: str, adapter: Adapter, scale: float | None = None) -> None:
        """Copy a low-rank adapter into every replica, as `Engine.add_adapter`."""
        adapter = lora.with_scale(adapter, scale)
        self._require_alive()
        self._require_adapter_manager().add(name, adapter)
        self._broadcast_call("add_adapter", name, lora.to_cpu(adapter))

    @exclusive()
    def update_adapter(self, name: str, adapter: Adapter) -> None:
        """Give every replica what the adapter has become, a tree of the same shapes, as `Engine.update_adapter`."""
        self._require_alive()
        self._require_adapter_manager().update(name, adapter)
        self._broadcast_call("update_adapter", name, lora.to_cpu(adapter))

    @exclusive()
    def remove_adapter(self, name: str) -> None:
        """Make room for another. ValueError while requests use it."""
        self._require_alive()
        self._require_adapter_manager()[name]
        if using := [id for id, r in self._requests.items() if r.params.adapter == name]:
            raise ValueError(f"adapter {name!r} is used by requests {using[:8]}: abort them or let them end first")
        self._require_adapter_manager().remove(name)
        self._broadcast_call("remove_adapter", name)

    def _require_adapter_manager(self) -> lora.AdapterManager:
        if self._adapter_manager is None:
            raise ValueError("these replicas have no room for adapters: start them with max_adapters=N or adapters={…}")
        return self._adapter_manager

    def _broadcast_call(self, method: str, *args: Any) -> None:
        """Of every replica's engine, in the order of what it is asked for."""
        for i in range(len(self._assigned_tokens)):
            self._outbox.put((i, ("call", (method, args))))

    # --- many at once ---------------------------------------------------------------------------------------------

    @exclusive()
    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_error: str = "raise",
    ) -> Iterator[Event]:
        """Events of one or many prompts as they come, as `Engine.stream`."""
        return EventStream(self, self._add_requests(prompts, sampling, final_only=False, on_error=on_error))

    @exclusive()
    def as_completed(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_error: str = "raise",
    ) -> Iterator[tuple[int, Output]]:
        """Returns an iterator over (index of the prompt, output), as they finish, as `Engine.as_completed`."""
        ids = self._add_requests(prompts, sampling, final_only=True, on_error=on_error)
        return outputs_as_completed(ids, EventStream(self, ids))

    @exclusive()
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        on_error: str = "raise",
    ) -> list[Output]:
        """Outputs of one or many prompts, in their order, as `Engine.generate`."""
        ids = self._add_requests(prompts, sampling, final_only=True, on_error=on_error)
        with closing(EventStream(self, ids)) as events:
            return collect_outputs(ids, events, progress)

    def _add_requests(self, prompts: Any, sampling: Any, *, final_only: bool, on_error: str) -> list[int]:
        make = partial(self._prepare, stream_text=not final_only, final_only=final_only)
        new: list[RoutedRequest | Output] = map_prompts(make, prompts, sampling, on_error)
        return self._enqueue(new)

    @exclusive()
    def _step_until_event(self, stream: EventStream) -> None:
        """Step until there is something for a stream; what others receive meanwhile waits for their next step."""
        stream.step_until_event()

    @exclusive()
    def _flush_pending_aborts(self) -> None:
        """End now what was dropped."""
        self._drain_pending_aborts()

    def _has_events_for(self, requests: Iterable[int]) -> bool:
        """Whether there will be events of any of these requests."""
        return any(id in self._requests for id in requests) or bool(self._pending_events)

    def _drain_pending_aborts(self) -> None:
        """End what was dropped: nobody waits for its events."""
        while self._pending_aborts:
            for id in self._pending_aborts.popleft():
                if (r := self._requests.get(id)) is not None and r.has_consumer:
                    r.has_consumer = False
                    if r.replica_index is not None:
                        self._outbox.put((r.replica_index, ("abort", [id])))

    # --- the end --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the replicas, and whatever they run; from any thread. In a fork of the process: nothing."""
        if self._access_guard.pid != os.getpid():
            return
        self.worker_failure = self.worker_failure or "the replicas are closed"
        self._finalizer()
        if "_grammar_backend" in self.__dict__:
            self._grammar_backend.close()
        for name in ("_requests", "_waiting", "_pending_events"):
            if name in self.__dict__:
                self.__dict__[name].clear()

    def __enter__(self) -> "Replicas":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read_pipe(index: int, pipe: Connection, inbox: Inbox) -> None:
    """A thread: an interrupt of the caller's would leave half of a message in the pipe."""
    with suppress(EOFError, OSError):
        while True:
            inbox.put(index, pipe.recv())
    inbox.put(index, None)


def _write_pipes(pipes: list[Connection], outbox: queue.SimpleQueue[tuple[int, Any] | None]) -> None:
    """A thread, for the same reason. A replica always reads, so none keeps the others waiting."""
    while (message := outbox.get()) is not None:
        with suppress(OSError):  # the reader says it
            pipes[message[0]].send(message[1])


def _close_replicas(processes: list[BaseProcess], pipes: list[Connection], outbox: Any) -> None:
    """Replicas end; those that do not within seconds are killed."""
    for i in range(len(pipes)):
        outbox.put((i, ("close", ())))
    outbox.put(None)
    end = time.monotonic() + SHUTDOWN_SECONDS
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        process.kill()
        process.join()


def _run_replica(
    pipe: Connection,
    num_threads: int,
    visible_gpus: str | None,
    model_path: Path,
    load_kwargs: Any,
    settings: Any,
    progress: bool,
) -> None:
    """The process of a replica."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process gets it too, and decides
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a process that is killed leaves behind
    calls: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def read() -> None:
        try:
            while True:
                calls.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(1)  # whoever asked is gone; ranks of this replica see that this process is

    try:
        threading.Thread(target=read, daemon=True).start()
        os.environ["OMP_NUM_THREADS"] = str(num_threads)  # of its ranks
        torch.set_num_threads(num_threads)
        if visible_gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus
        with Engine.from_pretrained(model_path, progress=progress, **load_kwargs, **settings) as engine:
            engine._grammar_backend.skip_trials = True  # the first process has tried the grammars that come
            e = engine
            pipe.send(ReplicaInfo(e.model_config, e.cache_capacity, e.device, e.dtype, e.config, collect_stats(e)))
            _run_engine_loop(engine, calls, pipe)
    except BaseException as e:
        with suppress(OSError):
            pipe.send(e if type(e) is ValueError else RuntimeError(_error_message(e)))
        os._exit(1)
    os._exit(0)  # whatever thread is left


def _error_message(e: BaseException) -> str:
    """The message of an error that explains itself, and the whole of another."""
    return str(e) if isinstance(e, RuntimeError | OSError) else traceback.format_exc().strip()


def _run_engine_loop(engine: Engine, calls: queue.SimpleQueue[tuple[str, Any]], pipe: Connection) -> None:
    """Do what is asked until the end of it."""
    words, theirs, ours, quiet = engine.tokenizer, dict[int, int](), dict[int, int](), set[int]()
    left = set[int]()  # requests that were aborted while their grammar was compiled
    compiling = dict[int, Future]()
    pool = ThreadPoolExecutor(2, "grammar")
    told, found = 0.0, deque[Event]()

    def begin(asked: list[tuple[AddRequest, Sequence[GrammarMatcher | None] | None]]) -> None:
        """Requests join the others; one that cannot ends alone."""
        new, ids = [], []
        for (id, prompt, params, live, hush, text), guides in asked:
            engine.tokenizer = words if text else None
            try:
                new.append(engine._prepare(prompt, params, live, guides))
            except Exception as e:
                found.extend(_error_events(id, prompt, params, e))
            else:
                ids.append((id, hush))
        for (id, hush), mine in zip(ids, engine._submit(new), strict=True):
            ours[id], theirs[mine] = mine, id
            quiet.update({id} if hush else ())
            if id in left:
                engine.abort(mine)

    def compile(one: AddRequest) -> None:
        """Compiles a request's grammar beside the steps; the call "compiled" follows."""
        compiling[one[0]] = future = pool.submit(engine._compile_grammar, one[2])
        future.add_done_callback(lambda _: calls.put(("compiled", one)))

    while True:
        asked = [] if engine.has_unfinished_requests else [calls.get()]
        while not calls.empty():
            asked.append(calls.get())
        for kind, value in asked:
            if kind == "close":
                return
            if kind == "abort":
                for id in value:
                    if id in ours:
                        engine.abort(ours[id])
                    elif id in compiling:
                        left.add(id)
                continue
            if kind == "call":
                getattr(engine, value[0])(*value[1])
                continue
            if kind == "compiled":
                try:
                    begin([(value, compiling.pop(value[0]).result())])
                except Exception as e:
                    found.extend(_error_events(value[0], value[1], value[2], e))
                left.discard(value[0])
                continue
            begin([(one, None) for one in value if one[2].grammar is None])
            for one in value:
                if one[2].grammar is not None:
                    compile(one)
        for event in engine.step() if engine.has_unfinished_requests else ():
            event.request_id = theirs[event.request_id]
            if event.output is not None:
                event.output.request_id = event.request_id
                del theirs[ours.pop(event.request_id)]
            if event.output is not None or event.request_id not in quiet:
                found.append(event)
            if event.output is not None:
                quiet.discard(event.request_id)
        if found or not engine.has_unfinished_requests or time.monotonic() > told + 0.2:
            told = time.monotonic()
            pipe.send((found, collect_stats(engine)))
            found = deque[Event]()


def _error_events(request_id: int, prompt: list[int], params: SamplingParams, error: Exception) -> list[Event]:
    """The events of a request that the engine does not take, and that the first process took to be right."""
    why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    output = Output(request_id, prompt, [Completion(finish_reason="error", error=why) for _ in range(params.n)])
    events = [Event(request_id, i, [], "", finish_reason="error", error=why) for i in range(params.n)]
    events[-1].output = output
    return events
