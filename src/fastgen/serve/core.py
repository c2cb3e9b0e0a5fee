"""The engine's process: one loop that takes requests from a socket, steps the engine, and sends what each step gave.

It knows token ids only. Messages are pickled tuples: both ends are processes of the same program, on a socket that
lies in a folder only its user can enter, so that nobody else can send one.

    worker -> engine   ("hello",)  ("add", key, call, prompts, params)  ("abort", call, slot or None)
                       ("stats", key)  ("kill", key, call)  ("profile", key, folder, steps, skip)
                       ("adapters", key)  ("adapter", key, name, tree or None, again)
                       ("count", changes)  ("metrics", key)
    engine -> worker   ("info", {...})  ("reply", key, value)  ("events", {call: [Piece, ...]})
    engine -> worker   ("info", {...})  ("reply", key, value)  ("failed", key, why)  ("events", {call: [Piece, ...]})

A key stands in a frame of its own as well, so that a message that cannot be read is answered.

On a second socket a thread answers whether the engine is well, which a long step does not delay.

A call is what one HTTP request asks for. Each of its completions is a request of its own to the engine, its *slot*,
so that one can end at a stop string while the others go on; the prefix cache computes their prompt once.
"""

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import zmq

from fastgen import Engine, Replicas, SamplingParams
from fastgen.grammar import Guide
from fastgen.replicas import figures
from fastgen.request import Event, sample_seed
from fastgen.types import Adapter

FAILURES = 3  # steps in a row that may fail; then something is broken for good
STUCK = 120.0  # seconds after which a step counts as one that will not end
ORPHAN = 15.0  # seconds for an engine to end by itself once its supervisor has


class Piece(NamedTuple):
    """What a step added to a slot. The counts and the prompt's logprobs come with the last one."""

    slot: int
    tokens: list[int]
    logprobs: list[float] | None
    top: list[dict[int, float]] | None
    reason: str | None  # stop, length, abort, error (logits that are no numbers, a grammar), or failed (the engine)
    error: str = ""  # what went wrong with this slot alone
    cached: int = 0
    prompt_logprobs: list[float | None] | None = None
    prompt_top: list[dict[int, float] | None] | None = None
    version: int | None = None  # of the weights that drew the tokens


def pack(message: tuple) -> bytes:
    """A message on its way."""
    return pickle.dumps(message, protocol=5)


class Compiling(NamedTuple):
    """A call whose grammar is compiled, in a thread."""

    worker: bytes
    key: str  # of its "add", which is answered when it joins the others
    count: int  # completions
    stop: threading.Event


class Core:
    """The engine, or replicas of it, and whose requests it runs."""

    def __init__(self, engine: Engine | Replicas, socket: zmq.Socket, most: int, info: dict[str, Any]) -> None:
        self.engine, self.socket, self.most, self.info = engine, socket, most, info
        self.calls: dict[str, tuple[bytes, dict[int, int]]] = {}  # call -> its worker, and slot -> request
        self.owner: dict[int, tuple[bytes, str, int]] = {}  # request -> worker, call, slot
        self.began, self.requests, self.prompt_tokens, self.tokens = time.time(), 0, 0, 0
        self.counts: Counter[Any] = Counter()  # what workers have counted, by `metrics.Key`
        self.stepping: float | None = None  # since when a step runs
        self.compiling: dict[str, Compiling] = {}  # by call
        self.compiled: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # to be done between two steps
        self.bell, self._ring = os.pipe()  # can be read when there is such a thing
        self._pool = ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2), "grammar")

    def send(self, worker: bytes, *message: Any) -> None:
        """To a worker; one that is gone is not missed."""
        self.socket.send_multipart([worker, pack(message)])

    def drain(self) -> None:
        """Take every message that has come. An error costs the request that it came with."""
        while True:
            try:
                worker, key, raw = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                kind, *rest = pickle.loads(raw)
                getattr(self, f"on_{kind}")(worker, *rest)
            except Exception as e:
                self._fail(worker, key.decode(), e)
        while not self.compiled.empty():
            os.read(self.bell, 1)
            self.compiled.get()()

    def _fail(self, worker: bytes, key: str, error: Exception) -> None:
        """Answers a message, if it has a key, whose handling has failed."""
        traceback.print_exception(error)
        if key:
            self.send(worker, "failed", key, f"the engine failed at this: {type(error).__name__}: {error}")

    def on_hello(self, worker: bytes) -> None:
        self.send(worker, "info", self.info)

    def on_stats(self, worker: bytes, key: str) -> None:
        self.send(worker, "reply", key, self.stats())

    def on_count(self, worker: bytes, changes: dict[Any, Any]) -> None:
        """Add up what a worker has counted since it last said so."""
        for key, change in changes.items():
            self.counts[key] += change

    def on_metrics(self, worker: bytes, key: str) -> None:
        self.send(worker, "reply", key, (dict(self.counts), self.stats()))

    def on_add(self, worker: bytes, key: str, call: str, prompts: list[list[int]], params: SamplingParams) -> None:
        """All of a call's completions, or none; the reply is None, or (status, message).

        A grammar is compiled beside the steps first.
        """
        count = len(prompts) * params.n
        used = len(self.owner) + sum(c.count for c in self.compiling.values())
        if call in self.calls or call in self.compiling:
            self.send(worker, "reply", key, (409, f"the request id {call} is in use"))
        elif used + count > self.most:
            busy = f"{used} completions are running or waiting, of {self.most} at most: try again later"
            self.send(worker, "reply", key, (429, busy))
        elif params.grammar is None:
            self._try_add(worker, key, call, prompts, params, None)
        else:
            self.compiling[call] = found = Compiling(worker, key, count, threading.Event())
            self._pool.submit(self._compile, found, call, prompts, params)

    def _compile(self, found: Compiling, call: str, prompts: list[list[int]], params: SamplingParams) -> None:
        """In a thread of its own: makes the guides of a call, which then joins the others."""
        guides, error = [], None
        try:
            if not found.stop.is_set():
                guides = self.engine._compile(replace(params, n=found.count), found.stop)
        except Exception as e:
            error = e

        def join() -> None:
            if self.compiling.get(call) is not found:
                return  # nobody waits for it any more
            del self.compiling[call]
            self._try_add(found.worker, found.key, call, prompts, params, guides, error)

        self.compiled.put(join)
        os.write(self._ring, b".")

    def _try_add(
        self,
        worker: bytes,
        key: str,
        call: str,
        prompts: list[list[int]],
        params: SamplingParams,
        guides: list[Guide | None] | None,
        error: Exception | None = None,  # of its grammar
    ) -> None:
        try:
            if error is not None:
                raise error
            self._add(worker, call, prompts, params, guides)
            self.send(worker, "reply", key, None)
        except ValueError as e:
            self._end(call)
            self.send(worker, "reply", key, (400, str(e)))
        except Exception as e:
            self._end(call)
            self._fail(worker, key, e)

    def _add(
        self,
        worker: bytes,
        call: str,
        prompts: list[list[int]],
        params: SamplingParams,
        guides: list[Guide | None] | None,
    ) -> None:
        slots: dict[int, int] = {}
        self.calls[call] = worker, slots
        for prompt in prompts:
            for i in range(params.n):
                seed = None if params.seed is None else sample_seed(params.seed, i)
                scored = params.prompt_logprobs if i == 0 else None
                one = replace(params, n=1, seed=seed, prompt_logprobs=scored)
                guide = guides and [guides[len(slots)]]
                id = self.engine._add(prompt, one, live=False, guides=guide)
                self.owner[id] = worker, call, len(slots)
                slots[len(slots)] = id
        self.requests += 1
        self.prompt_tokens += sum(map(len, prompts))

    def on_abort(self, worker: bytes, call: str, slot: int | None) -> None:
        """End a worker's call, or one slot of it; nobody waits for its events."""
        if call in self.calls and self.calls[call][0] == worker:
            self._end(call, slot)
        elif call in self.compiling and self.compiling[call].worker == worker:
            self._stop(call)

    def on_kill(self, worker: bytes, key: str, call: str) -> None:
        """End a call, of whichever worker: that one hears of it. The reply says whether there was one."""
        found = self.calls.get(call)
        if found is not None:
            for id in list(found[1].values()):
                self.engine.abort(id)  # its events come with the next step
        elif call in self.compiling:
            ended = self._stop(call)
            self.send(ended.worker, "reply", ended.key, (409, "the request was ended before it began"))
        self.send(worker, "reply", key, found is not None)

    def on_profile(self, worker: bytes, key: str, folder: str, steps: int, skip: int) -> None:
        """Trace the next steps; the reply is the path of the trace to come, or (status, message)."""
        try:
            if isinstance(self.engine, Replicas):
                raise ValueError("a trace is of one engine, and this server runs several (parallel.replicas)")
            self.send(worker, "reply", key, str(self.engine.profiler.request(steps, folder, skip)))
        except ValueError as e:
            self.send(worker, "reply", key, (409, str(e)))

    def on_adapters(self, worker: bytes, key: str) -> None:
        self.send(worker, "reply", key, sorted(self.engine.adapters))

    def on_adapter(self, worker: bytes, key: str, name: str, tree: Adapter | None, again: bool) -> None:
        """Add an adapter, or replace it by another of the same shapes (`again`), or remove it (no tree).

        The reply is None, or (status, message).
        """
        try:
            if tree is None:
                self.engine.remove_adapter(name)
            elif again and name in self.engine.adapters:
                self.engine.update_adapter(name, tree)
            else:
                self.engine.add_adapter(name, tree)
            self.send(worker, "reply", key, None)
        except ValueError as e:
            self.send(worker, "reply", key, (409 if name in self.engine.adapters else 400, str(e)))

    def _end(self, call: str, slot: int | None = None) -> None:
        _, slots = self.calls.get(call, (b"", {}))
        for i in [*slots] if slot is None else [slot] * (slot in slots):
            id = slots.pop(i)
            self.owner.pop(id, None)
            self.engine.abort(id)
        if not slots:
            self.calls.pop(call, None)

    def _stop(self, call: str) -> Compiling:
        """Ends a call whose grammar is compiled, which then ends soon."""
        found = self.compiling.pop(call)
        found.stop.set()
        return found

    def gone(self, worker: bytes) -> None:
        """A worker died: end what it asked for."""
        for call in [call for call, c in self.compiling.items() if c.worker == worker]:
            self._stop(call)
        for call in [call for call, (who, _) in self.calls.items() if who == worker]:
            self._end(call)

    def step(self) -> None:
        """One step, and its events on their way, a message for each worker."""
        found: dict[bytes, dict[str, list[Piece]]] = defaultdict(lambda: defaultdict(list))
        self.stepping = time.monotonic()
        try:
            events = self.engine.step()
        finally:
            self.stepping = None
        for event in events:
            if event.request_id in self.owner:  # else nobody waits for it any more
                worker, call, slot = self.owner[event.request_id]
                found[worker][call].append(self._piece(event, slot))
                self.tokens += len(event.token_ids)
                if event.finish_reason:
                    self._forget(event.request_id)
        for worker, calls in found.items():
            self.send(worker, "events", dict(calls))

    def _piece(self, event: Event, slot: int) -> Piece:
        piece = Piece(
            slot,
            event.token_ids,
            event.logprobs,
            event.top_logprobs,
            event.finish_reason,
            event.error,
            version=event.version,
        )
        if (o := event.output) is None:
            return piece
        return piece._replace(
            cached=o.cached_tokens, prompt_logprobs=o.prompt_logprobs, prompt_top=o.prompt_top_logprobs
        )

    def _forget(self, id: int) -> None:
        _, call, slot = self.owner.pop(id)
        del self.calls[call][1][slot]
        if not self.calls[call][1]:
            del self.calls[call]

    def failed(self) -> None:
        """A step raised, which ended everything: say so to whoever waits."""
        for worker, call, slot in self.owner.values():
            self.send(worker, "events", {call: [Piece(slot, [], None, None, "failed")]})
        self.owner.clear()
        self.calls.clear()

    def stats(self) -> dict[str, Any]:
        """Figures of the moment, and totals since the start."""
        found = figures(self.engine)
        return found | {
            "cache_usage": found["held_pages"] / found["pages"],
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "generation_tokens": self.tokens,
            "uptime": time.time() - self.began,
        }


def health_address(address: str) -> str:
    """Where `answer_health` listens, beside the engine's own socket."""
    return f"{address}-health"


def answer_health(core: Core, address: str) -> None:
    """A thread: answers each message with what is wrong with the engine, or with nothing.

    A process that is stopped does not answer, which its deadline tells whoever asks.
    """
    socket = zmq.Context.instance().socket(zmq.REP)
    socket.linger = 0
    socket.bind(health_address(address))
    while True:
        socket.recv()
        since = core.stepping
        stuck = since is not None and time.monotonic() - since > STUCK
        problem = f"a step has been running for more than {STUCK:.0f} s" if stuck else ""
        if stopped := stopped_children():
            problem = f"process {stopped[0]} of the engine is stopped"
        socket.send(problem.encode())


def stopped_children() -> list[int]:
    """This process's descendants that a signal or a debugger has stopped; none where there is no /proc."""
    states, children = dict[int, str](), defaultdict[int, list[int]](list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            state, parent = path.read_text().rpartition(")")[2].split()[:2]  # behind its name, which may hold anything
            states[int(path.parent.name)] = state
            children[int(parent)].append(int(path.parent.name))
    left, found = [os.getpid()], list[int]()
    while left:
        left += (own := children[left.pop()])
        found += [pid for pid in own if states[pid] in ("T", "t")]
    return sorted(found)


def _end_with_parent(ready: threading.Event) -> None:
    """A thread: an engine that is still loading, or hangs, ends when its supervisor has."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        if ready.is_set():
            time.sleep(ORPHAN)  # its loop hears of it too, and ends in order
        os._exit(1)


def run(
    build: Callable[[], tuple[Engine | Replicas, str]], address: str, control: Connection, most: int | None
) -> None:
    """The process: `build` gives the engine and the path of its model; `control` is the supervisor's.

    Over `control` come the names of workers that died; its end is this process's.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the supervisor says when, after the last request
        signal.signal(number, signal.SIG_IGN)
    ready = threading.Event()
    threading.Thread(target=_end_with_parent, args=(ready,), daemon=True).start()
    try:
        engine, path = build()
    except (ValueError, OSError) as e:
        print(f"fgserve: {e}", file=sys.stderr, flush=True)
        sys.exit(1)
    socket = zmq.Context.instance().socket(zmq.ROUTER)
    socket.set_hwm(0)  # what a worker has not read yet is bounded by what it asked for
    socket.linger = 0
    socket.bind(address)
    limits, spec = engine.settings.schedule, engine.spec
    most = most or 4 * limits.max_requests * engine.settings.parallel.replicas
    # Grammars want a second before the first one; whoever comes until then waits for it.
    threading.Thread(target=engine.prepare_grammars, daemon=True).start()
    info = {"path": path, "context": min(spec.context, engine.capacity + 1), "spec": spec, "most": most}
    info["special_tokens_in_content"] = engine.settings.special_tokens_in_content
    info["has_adapters"] = engine.settings.lora.max_adapters > 0
    core = Core(engine, socket, most, info)
    threading.Thread(target=answer_health, args=(core, address), daemon=True).start()
    ready.set()
    control.send("ready")
    poller, failures = zmq.Poller(), 0
    poller.register(socket, zmq.POLLIN)
    poller.register(control.fileno(), zmq.POLLIN)
    poller.register(core.bell, zmq.POLLIN)
    with engine, contextlib.suppress(EOFError, ConnectionError):  # the supervisor closed its end, or is gone
        while True:
            if not engine.unfinished:
                poller.poll()
            while control.poll():
                core.gone(control.recv())
            core.drain()
            if engine.unfinished:
                try:
                    core.step()
                    failures = 0
                except Exception:
                    traceback.print_exc()
                    core.failed()
                    failures += 1
                    if failures == FAILURES or engine.cause:
                        sys.exit(1)
