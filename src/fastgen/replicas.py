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
from fastgen import tokenizer as tokens
from fastgen.config import SamplingParams, Settings
from fastgen.engine import Engine, Stream, collect, completed, locate
from fastgen.grammar import Guide, Guides
from fastgen.models import weights
from fastgen.models.spec import Spec, split
from fastgen.ownership import Owner, disown_in_forks, exclusive
from fastgen.request import Completion, Event, Output, each_prompt, longest, refusal
from fastgen.tokenizer import Prompt
from fastgen.types import Adapter, Tokenizer

AHEAD = 4  # requests of its own kind that one lets pass in order to find its beginning cached
SEEN = 2**14  # beginnings that are remembered
LAST = 8.0  # seconds in which replicas close
Figures = dict[str, int]
Asked = tuple[int, list[int], SamplingParams, bool, bool, bool]  # id, prompt, settings; see `Request`; with text


class Started(NamedTuple):
    """What a replica says of itself."""

    spec: Spec
    capacity: int
    device: torch.device
    dtype: torch.dtype
    settings: Settings
    figures: Figures


@dataclass(slots=True)
class Request:
    """One that has not ended. `quiet`: nothing is said of it before its end. `wanted`: somebody waits for it."""

    prompt: list[int]
    params: SamplingParams
    live: bool
    quiet: bool
    replica: int | None = None  # None: it waits
    wanted: bool = True

    @property
    def cost(self) -> int:
        """Tokens it may take."""
        return len(self.prompt) + self.params.n * (self.params.max_tokens or 0)


class Inbox:
    """Messages of all replicas. One is there until it is done with, so that an interrupt loses none."""

    def __init__(self) -> None:
        self.messages = deque[tuple[int, Any]]()
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()

    def put(self, index: int, message: Any) -> None:
        self.messages.append((index, message))
        self._bell.put(None)

    def first(self) -> tuple[int, Any]:
        """The oldest one; waits for it."""
        while not self.messages:
            self._bell.get()
        return self.messages[0]

    def done(self) -> None:
        """With the oldest one."""
        self.messages.popleft()


def choose(load: Sequence[int], room: Sequence[bool], seen: Collection[int], cost: int) -> int | None:
    """The replica for a request of `cost` tokens, or None where no one has room.

    It is the one with the least load, or of those that have `seen` the request's beginning, unless these have so much
    more to do that computing it again is quicker.
    """
    free = [i for i, has in enumerate(room) if has]
    if not free:
        return None
    least = min(free, key=load.__getitem__)
    known = min((i for i in free if i in seen), key=load.__getitem__, default=least)
    return known if load[known] - load[least] <= AHEAD * cost else least


def visible(index: int, size: int, count: int) -> str:
    """CUDA_VISIBLE_DEVICES of a replica of `size` of the `count` GPUs that this process sees."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = [n.strip() for n in names if n.strip()] or [str(i) for i in range(count)]
    return ",".join(names[index * size : (index + 1) * size])


def figures(engine: "Engine | Replicas") -> Figures:
    """Of the moment, and totals since the start; of replicas: the sums."""
    if isinstance(engine, Replicas):
        return {name: sum(f[name] for f in engine.figures) for name in engine.figures[0]}
    state, tree = engine.state, engine.state.tree
    pages = tree.pages - 1
    return {
        "running": len(state.running), "waiting": len(state.waiting), "pages": pages,
        "held_pages": pages - tree.available(), "prefix_queries": tree.counts.asked,
        "prefix_hits": tree.counts.reused, "preemptions": tree.counts.parked, "steps": engine.steps,
    }  # fmt: skip


class Replicas:
    """Engines behind one queue: requests as of `Engine`, each run by one of them. For one thread at a time.

    When a replica ends, whatever it was, all end and the call says which and why; so does every later one.
    """

    def __init__(self, model: Path, count: int, loading: dict[str, Any], settings: Settings, *, progress: bool) -> None:
        kind, size = loading["device"], settings.parallel.tensor_parallel
        self._owner = Owner("these replicas", "hand requests to the thread that calls them by a queue")
        self._dropped = deque[frozenset[int]]()  # requests that nobody waits for any more, to end with the next call
        self.cause = ""  # of the end of them all
        self.tokenizer: Tokenizer | None = tokens.load(model)
        threads = max(1, torch.get_num_threads() // (count * size))
        alone = replace(settings, parallel=replace(settings.parallel, replicas=1), seed=None)
        each = {f.name: getattr(alone, f.name) for f in fields(Settings)}
        context = multiprocessing.get_context("spawn")
        self._processes, pipes = list[BaseProcess](), list[Connection]()
        self._inbox = Inbox()
        self._outbox: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        # Before what multiprocessing does at exit: it would wait for processes that wait for this one.
        self._end = Finalize(self, _close, (self._processes, pipes, self._outbox), exitpriority=10)
        try:
            for i in range(count):
                ours, theirs = context.Pipe()
                where = visible(i, size, torch.cuda.device_count()) if kind == "cuda" else None
                given = theirs, threads, where, model, loading, each, progress and i == 0
                process = context.Process(target=_replica, args=given, name=f"replica {i}")
                process.start()
                disown_in_forks([process])
                theirs.close()
                pipes.append(ours)
                self._processes.append(process)
                threading.Thread(target=_read, args=(i, ours, self._inbox), daemon=True).start()
            threading.Thread(target=_write, args=(pipes, self._outbox), daemon=True).start()
            started: dict[int, Started] = {}
            while len(started) < count:
                index, message = self._inbox.first()
                if not isinstance(message, Started):
                    self._fail(index, message)
                started[index] = message
                self._inbox.done()
        except BaseException:
            self.close()
            raise
        first = started[0]
        self.spec, self.device, self.dtype = first.spec, first.device, first.dtype
        self.capacity = min(s.capacity for s in started.values())  # of one of them, tokens
        self.settings = replace(first.settings, parallel=settings.parallel, seed=settings.seed)
        self.figures: list[Figures] = [started[i].figures for i in range(count)]  # of each, as it last said
        seed = random_.SystemRandom().getrandbits(62) if settings.seed is None else settings.seed
        self._random, self._ids = random_.Random(seed), itertools.count()
        self._guides = Guides(self.tokenizer, self.spec.vocab, frozenset(self.spec.eos))
        # Every replica has these. Here nothing is computed with them, so that they need no memory.
        room = self.settings.lora
        self._shelf = lora.Shelf(self.spec, room, torch.device("meta"), self.dtype) if room.max_adapters else None
        for name, folder in loading["adapters"].items():
            self._shelf_of().add(name, lora.load(folder, self.spec, device="cpu"))
        self._requests: dict[int, Request] = {}
        self._waiting: deque[int] = deque()
        self._load, self._running = [0] * count, [0] * count  # tokens and sequences handed out
        self._seen: dict[int, set[int]] = {}  # the beginnings of prompts -> who has it
        self._undelivered: list[Event] = []

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        replicas: int = 2,
        dtype: str = "auto",
        device: str = "auto",
        random: bool = False,
        random_seed: int = 0,
        adapters: Mapping[str, str | Path] | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> "Replicas":
        """As `Engine.from_pretrained`, `replicas` times: replica r has GPUs r N to r N + N - 1 of `tensor_parallel=N`.

        On a CPU they share its threads.
        """
        chosen = Settings.of(**settings)
        limits = lora.room(chosen.lora, adapters or {})
        chosen = replace(chosen, parallel=replace(chosen.parallel, replicas=replicas), lora=limits)
        path, device = locate(model, dtype, device)
        if device not in ("cpu", "cuda"):
            raise ValueError(f"replicas have devices of their own: device must be cpu, cuda or auto, got {device!r}")
        if started := [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]:
            names = " and ".join(started)
            raise ValueError(f"replicas are started by one process, but {names} says that torchrun started this one")
        size = chosen.parallel.tensor_parallel
        split(weights.read_spec(path), size)
        if device == "cuda" and (count := torch.cuda.device_count()) < replicas * size:
            asked = f"parallel.replicas={replicas} of parallel.tensor_parallel={size}"
            raise ValueError(f"{asked} need {replicas * size} GPUs, and this machine shows {count}")
        loading = {"dtype": dtype, "device": device, "random": random, "random_seed": random_seed}
        loading["adapters"] = dict(adapters or {})
        return cls(path, replicas, loading, chosen, progress=progress)

    # --- requests -------------------------------------------------------------------------------------------------

    @exclusive()
    def add(self, prompt: Prompt, sampling: SamplingParams | None = None, *, live: bool = True) -> int:
        """Queue a request; its id. As `Engine.add`."""
        return self._add(prompt, sampling or SamplingParams(), live=live)

    @exclusive()
    def _add(
        self, prompt: Prompt, params: SamplingParams, *, live: bool, guides: Sequence[Guide | None] | None = None
    ) -> int:
        """As `add`; `guides` are what `_compile` returned for this request."""
        return self._queue([self._new(prompt, params, live=live, quiet=False, tried=guides is not None)])[0]

    def _compile(self, params: SamplingParams, stop: threading.Event | None = None) -> list[Guide | None]:
        """As `Engine._compile`, but a grammar is only tried here: the replica that gets the request compiles it."""
        if params.grammar is not None:
            self._guides.check(params.grammar, stop)
        return [None] * params.n

    def _new(self, prompt: Prompt, params: SamplingParams, *, live: bool, quiet: bool, tried: bool = False) -> Request:
        content = self.settings.special_tokens_in_content
        ids = tokens.encode(self.tokenizer, prompt, special_tokens_in_content=content)
        limit = longest(ids, params, self.spec, self.capacity, self.tokenizer is not None)
        if params.adapter is not None:
            self._shelf_of()[params.adapter]  # a ValueError for one that is not there
        if not tried:
            self._compile(params)  # a ValueError here, and not in the replica
        seed = self._random.getrandbits(63) if params.seed is None else params.seed
        return Request(ids, replace(params, seed=seed, max_tokens=limit - len(ids)), live, quiet)

    def _queue(self, requests: Sequence[Request | Output]) -> list[int]:
        self._check()
        ids = [next(self._ids) for _ in requests]
        for id, request in zip(ids, requests, strict=True):
            if isinstance(request, Output):
                request.request_id = id
                self._undelivered += refusal(request)
            else:
                self._requests[id] = request
                self._waiting.append(id)
        self._hand()
        return ids

    def _hand(self) -> None:
        """What waits, in its order, to replicas that have room: what they run at once, and a quarter to follow."""
        most, given = self.settings.schedule.max_requests, [list[Asked]() for _ in self._load]
        most += most // 4
        page = self.settings.pages.page_size if self.settings.pages.prefix_cache else 0
        while self._waiting:
            id = self._waiting[0]
            if not (r := self._requests[id]).wanted:
                del self._requests[self._waiting.popleft()]
                continue
            key = (
                hash((r.params.adapter, r.params.cache_salt, *r.prompt[:page]))
                if page and len(r.prompt) > page
                else None
            )
            seen = set[int]() if key is None else self._seen.get(key, set())
            room = [n == 0 or n + r.params.n <= most for n in self._running]
            if (to := choose(self._load, room, seen, r.cost)) is None:
                break
            self._waiting.popleft()
            r.replica = to
            self._load[to] += r.cost
            self._running[to] += r.params.n
            given[to].append((id, r.prompt, r.params, r.live, r.quiet, self.tokenizer is not None))
            if key is not None:
                self._seen[key] = seen | {to}
                if len(self._seen) > SEEN:
                    del self._seen[next(iter(self._seen))]
        for i, some in enumerate(given):
            if some:
                self._outbox.put((i, ("add", some)))

    @exclusive()
    def abort(self, request_id: int) -> None:
        """End a request. Its last events, with what it has, come with later steps."""
        r = self._requests.get(request_id)
        if r is None:
            return
        if r.replica is not None:
            self._outbox.put((r.replica, ("abort", [request_id])))
            return
        self._waiting.remove(request_id)
        del self._requests[request_id]
        output = Output(request_id, r.prompt, [Completion(finish_reason="abort") for _ in range(r.params.n)])
        events = [Event(request_id, i, [], "", finish_reason="abort") for i in range(r.params.n)]
        events[-1].output = output
        self._undelivered += events

    @property
    def unfinished(self) -> bool:
        """Whether anything is left to do or to report."""
        return bool(self._requests or self._undelivered)

    @exclusive()
    def step(self) -> list[Event]:
        """What the replicas have added to requests; waits until there is something.

        RuntimeError, with the cause, when a replica has ended; so have all of them then.
        """
        self._check()
        self._hand()
        while self._inbox.messages or (any(self._running) and not self._undelivered):
            self._take(*self._inbox.first())
            self._inbox.done()
            if not (self._undelivered or self._inbox.messages):
                break  # nothing for anybody, but the caller may have other things to look at
        self._hand()
        events, self._undelivered = self._undelivered, []
        return events

    def _take(self, index: int, message: Any) -> None:
        """A replica's word."""
        if not isinstance(message, tuple):
            self._fail(index, message)
        events, self.figures[index] = cast(tuple[deque[Event], Figures], message)
        while events:  # after an interrupt, what is left of them
            event = events[0]
            r = self._requests.get(event.request_id)
            if r is not None and r.wanted:
                self._undelivered.append(event)
            if r is not None and event.output is not None:
                del self._requests[event.request_id]
                self._load[index] -= r.cost
                self._running[index] -= r.params.n
            events.popleft()

    def _check(self) -> None:
        if self.cause:
            raise RuntimeError(self.cause)

    def _fail(self, index: int, problem: Exception | None) -> None:
        """A replica has ended, and says why or not: so do all."""
        process = self._processes[index]
        process.join(1)
        code = process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self.cause = f"replica {index} (process {process.pid}) {f'failed: {problem}' if problem else how}"
        self.close()
        raise (ValueError if isinstance(problem, ValueError) else RuntimeError)(self.cause)

    def prepare_grammars(self) -> None:
        """Do now what the first grammar would wait for, a second or two, if grammars can be used at all."""
        self._guides.prepare()

    # --- adapters -------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> frozenset[str]:
        """Those that requests may choose."""
        return frozenset() if self._shelf is None else frozenset(self._shelf.held)

    @exclusive()
    def add_adapter(self, name: str, adapter: Adapter, scale: float | None = None) -> None:
        """Copy a low-rank adapter into every replica, as `Engine.add_adapter`."""
        adapter = lora.scaled(adapter, scale)
        self._check()
        self._shelf_of().add(name, adapter)
        self._call("add_adapter", name, lora.on_host(adapter))

    @exclusive()
    def update_adapter(self, name: str, adapter: Adapter) -> None:
        """Give every replica what the adapter has become, a tree of the same shapes, as `Engine.update_adapter`."""
        self._check()
        self._shelf_of().update(name, adapter)
        self._call("update_adapter", name, lora.on_host(adapter))

    @exclusive()
    def remove_adapter(self, name: str) -> None:
        """Make room for another. ValueError while requests use it."""
        self._check()
        self._shelf_of()[name]
        if using := [id for id, r in self._requests.items() if r.params.adapter == name]:
            raise ValueError(f"adapter {name!r} is used by requests {using[:8]}: abort them or let them end first")
        self._shelf_of().remove(name)
        self._call("remove_adapter", name)

    def _shelf_of(self) -> lora.Shelf:
        if self._shelf is None:
            raise ValueError("these replicas have no room for adapters: start them with max_adapters=N or adapters={…}")
        return self._shelf

    def _call(self, name: str, *arguments: Any) -> None:
        """Of every replica's engine, in the order of what it is asked for."""
        for i in range(len(self._load)):
            self._outbox.put((i, ("call", (name, arguments))))

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
        return Stream(self, self._add_all(prompts, sampling, quiet=False, on_error=on_error))

    @exclusive()
    def as_completed(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_error: str = "raise",
    ) -> Iterator[tuple[int, Output]]:
        """Returns an iterator over (index of the prompt, output), as they finish, as `Engine.as_completed`."""
        ids = self._add_all(prompts, sampling, quiet=True, on_error=on_error)
        return completed(ids, Stream(self, ids))

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
        ids = self._add_all(prompts, sampling, quiet=True, on_error=on_error)
        with closing(Stream(self, ids)) as events:
            return collect(ids, events, progress)

    def _add_all(self, prompts: Any, sampling: Any, *, quiet: bool, on_error: str) -> list[int]:
        make = partial(self._new, live=not quiet, quiet=quiet)
        new: list[Request | Output] = each_prompt(make, prompts, sampling, on_error)
        return self._queue(new)

    @exclusive()
    def _advance(self, stream: Stream) -> None:
        """Step until there is something for a stream; what others receive meanwhile waits for their next step."""
        stream.advance()

    @exclusive()
    def _settle(self) -> None:
        """End now what was dropped."""
        self._drop()

    def _runs(self, requests: Iterable[int]) -> bool:
        """Whether there will be events of any of these requests."""
        return any(id in self._requests for id in requests) or bool(self._undelivered)

    def _drop(self) -> None:
        """End what was dropped: nobody waits for its events."""
        while self._dropped:
            for id in self._dropped.popleft():
                if (r := self._requests.get(id)) is not None and r.wanted:
                    r.wanted = False
                    if r.replica is not None:
                        self._outbox.put((r.replica, ("abort", [id])))

    # --- the end --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the replicas, and whatever they run; from any thread. In a fork of the process: nothing."""
        if self._owner.process != os.getpid():
            return
        self.cause = self.cause or "the replicas are closed"
        self._end()
        if "_guides" in self.__dict__:
            self._guides.close()
        for name in ("_requests", "_waiting", "_undelivered"):
            if name in self.__dict__:
                self.__dict__[name].clear()

    def __enter__(self) -> "Replicas":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read(index: int, pipe: Connection, inbox: Inbox) -> None:
    """A thread: an interrupt of the caller's would leave half of a message in the pipe."""
    with suppress(EOFError, OSError):
        while True:
            inbox.put(index, pipe.recv())
    inbox.put(index, None)


def _write(pipes: list[Connection], outbox: queue.SimpleQueue[tuple[int, Any] | None]) -> None:
    """A thread, for the same reason. A replica always reads, so none keeps the others waiting."""
    while (message := outbox.get()) is not None:
        with suppress(OSError):  # the reader says it
            pipes[message[0]].send(message[1])


def _close(processes: list[BaseProcess], pipes: list[Connection], outbox: Any) -> None:
    """Replicas end; those that do not within seconds are killed."""
    for i in range(len(pipes)):
        outbox.put((i, ("close", ())))
    outbox.put(None)
    end = time.monotonic() + LAST
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        process.kill()
        process.join()


def _replica(
    pipe: Connection, threads: int, gpus: str | None, model: Path, loading: Any, settings: Any, progress: bool
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
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of its ranks
        torch.set_num_threads(threads)
        if gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus
        with Engine.from_pretrained(model, progress=progress, **loading, **settings) as engine:
            engine._guides.trusted = True  # the first process has tried the grammars that come
            e = engine
            pipe.send(Started(e.spec, e.capacity, e.device, e.dtype, e.settings, figures(e)))
            _serve(engine, calls, pipe)
    except BaseException as e:
        with suppress(OSError):
            pipe.send(e if type(e) is ValueError else RuntimeError(_said(e)))
        os._exit(1)
    os._exit(0)  # whatever thread is left


def _said(e: BaseException) -> str:
    """The message of an error that explains itself, and the whole of another."""
    return str(e) if isinstance(e, RuntimeError | OSError) else traceback.format_exc().strip()


def _serve(engine: Engine, calls: queue.SimpleQueue[tuple[str, Any]], pipe: Connection) -> None:
    """Do what is asked until the end of it."""
    words, theirs, ours, quiet = engine.tokenizer, dict[int, int](), dict[int, int](), set[int]()
    left = set[int]()  # requests that were aborted while their grammar was compiled
    compiling = dict[int, Future]()
    pool = ThreadPoolExecutor(2, "grammar")
    told, found = 0.0, deque[Event]()

    def begin(asked: list[tuple[Asked, Sequence[Guide | None] | None]]) -> None:
        """Requests join the others; one that cannot ends alone."""
        new, ids = [], []
        for (id, prompt, params, live, hush, text), guides in asked:
            engine.tokenizer = words if text else None
            try:
                new.append(engine._new(prompt, params, live, guides))
            except Exception as e:
                found.extend(_refused(id, prompt, params, e))
            else:
                ids.append((id, hush))
        for (id, hush), mine in zip(ids, engine._submit(new), strict=True):
            ours[id], theirs[mine] = mine, id
            quiet.update({id} if hush else ())
            if id in left:
                engine.abort(mine)

    def compile(one: Asked) -> None:
        """Compiles a request's grammar beside the steps; the call "compiled" follows."""
        compiling[one[0]] = future = pool.submit(engine._compile, one[2])
        future.add_done_callback(lambda _: calls.put(("compiled", one)))

    while True:
        asked = [] if engine.unfinished else [calls.get()]
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
                    found.extend(_refused(value[0], value[1], value[2], e))
                left.discard(value[0])
                continue
            begin([(one, None) for one in value if one[2].grammar is None])
            for one in value:
                if one[2].grammar is not None:
                    compile(one)
        for event in engine.step() if engine.unfinished else ():
            event.request_id = theirs[event.request_id]
            if event.output is not None:
                event.output.request_id = event.request_id
                del theirs[ours.pop(event.request_id)]
            if event.output is not None or event.request_id not in quiet:
                found.append(event)
            if event.output is not None:
                quiet.discard(event.request_id)
        if found or not engine.unfinished or time.monotonic() > told + 0.2:
            told = time.monotonic()
            pipe.send((found, figures(engine)))
            found = deque[Event]()


def _refused(id: int, prompt: list[int], params: SamplingParams, error: Exception) -> list[Event]:
    """The events of a request that the engine does not take, and that the first process took to be right."""
    why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    output = Output(id, prompt, [Completion(finish_reason="error", error=why) for _ in range(params.n)])
    events = [Event(id, i, [], "", finish_reason="error", error=why) for i in range(params.n)]
    events[-1].output = output
    return events
