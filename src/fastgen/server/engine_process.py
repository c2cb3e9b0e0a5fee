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
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import zmq

from fastgen import Engine, Replicas, SamplingParams
from fastgen.core.request import Event, sample_seed
from fastgen.core.types import Adapter
from fastgen.distributed.processes import exit_with_parent, find_stopped_descendants
from fastgen.structured_output.backend import GrammarMatcher

MAX_CONSECUTIVE_FAILURES = 3  # steps in a row that may fail; then something is broken for good
STUCK_STEP_SECONDS = 120.0  # seconds after which a step counts as one that will not end
ORPHAN_EXIT_SECONDS = 15.0  # seconds for an engine to end by itself once its supervisor has


class TokenDelta(NamedTuple):
    """What a step added to a slot. The counts and the prompt's logprobs come with the last one."""

    choice_index: int
    token_ids: list[int]
    logprobs: list[float] | None
    top_logprobs: list[dict[int, float]] | None
    finish_reason: (
        str | None
    )  # stop, length, abort, error (logits that are no numbers, a grammar), or failed (the engine)
    error: str = ""  # what went wrong with this slot alone
    num_cached_tokens: int = 0
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[dict[int, float] | None] | None = None
    weight_version: int | None = None  # of the weights that drew the tokens


def pack_message(message: tuple) -> bytes:
    """A message on its way."""
    return pickle.dumps(message, protocol=5)


class GrammarCompilation(NamedTuple):
    """A call whose grammar is compiled, in a thread."""

    worker: bytes
    message_id: str  # of its "add", which is answered when it joins the others
    num_choices: int  # completions
    cancel_event: threading.Event


class EngineServer:
    """The engine, or replicas of it, and whose requests it runs."""

    def __init__(
        self, engine: Engine | Replicas, socket: zmq.Socket, max_completions: int, info: dict[str, Any]
    ) -> None:
        self.engine, self.socket, self.max_completions, self.info = engine, socket, max_completions, info
        self.active_requests: dict[str, tuple[bytes, dict[int, int]]] = {}  # call -> its worker, and slot -> request
        self.owner_by_engine_id: dict[int, tuple[bytes, str, int]] = {}  # request -> worker, call, slot
        self.start_time, self.num_requests, self.num_prompt_tokens, self.num_generated_tokens = time.time(), 0, 0, 0
        self.metric_counts: Counter[Any] = Counter()  # what workers have counted, by `metrics.Key`
        self.step_start_time: float | None = None  # since when a step runs
        self.grammar_compilations: dict[str, GrammarCompilation] = {}  # by call
        self.between_steps: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # to be done between two steps
        self.wake_fd, self._wake_write_fd = os.pipe()  # can be read when there is such a thing
        self._grammar_pool = ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2), "grammar")

    def send(self, worker: bytes, *message: Any) -> None:
        """To a worker; one that is gone is not missed."""
        self.socket.send_multipart([worker, pack_message(message)])

    def drain_messages(self) -> None:
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
                self._reply_failure(worker, key.decode(), e)
        while not self.between_steps.empty():
            os.read(self.wake_fd, 1)
            self.between_steps.get()()

    def _reply_failure(self, worker: bytes, message_id: str, error: Exception) -> None:
        """Answers a message, if it has a key, whose handling has failed."""
        traceback.print_exception(error)
        if message_id:
            self.send(worker, "failed", message_id, f"the engine failed at this: {type(error).__name__}: {error}")

    def on_hello(self, worker: bytes) -> None:
        self.send(worker, "info", self.info)

    def on_stats(self, worker: bytes, message_id: str) -> None:
        self.send(worker, "reply", message_id, self.stats())

    def on_count(self, worker: bytes, counts: dict[Any, Any]) -> None:
        """Add up what a worker has counted since it last said so."""
        for key, change in counts.items():
            self.metric_counts[key] += change

    def on_metrics(self, worker: bytes, message_id: str) -> None:
        self.send(worker, "reply", message_id, (dict(self.metric_counts), self.stats()))

    def on_add(
        self, worker: bytes, message_id: str, request_id: str, prompts: list[list[int]], sampling: SamplingParams
    ) -> None:
        """All of a call's completions, or none; the reply is None, or (status, message).

        A grammar is compiled beside the steps first.
        """
        count = len(prompts) * sampling.n
        used = len(self.owner_by_engine_id) + sum(c.num_choices for c in self.grammar_compilations.values())
        if request_id in self.active_requests or request_id in self.grammar_compilations:
            self.send(worker, "reply", message_id, (409, f"the request id {request_id} is in use"))
        elif used + count > self.max_completions:
            busy = f"{used} completions are running or waiting, of {self.max_completions} at most: try again later"
            self.send(worker, "reply", message_id, (429, busy))
        elif sampling.grammar is None:
            self._try_add(worker, message_id, request_id, prompts, sampling, None)
        else:
            self.grammar_compilations[request_id] = found = GrammarCompilation(
                worker, message_id, count, threading.Event()
            )
            self._grammar_pool.submit(self._compile_grammars, found, request_id, prompts, sampling)

    def _compile_grammars(
        self, compilation: GrammarCompilation, request_id: str, prompts: list[list[int]], sampling: SamplingParams
    ) -> None:
        """In a thread of its own: makes the guides of a call, which then joins the others."""
        guides, error = [], None
        try:
            if not compilation.cancel_event.is_set():
                guides = self.engine._compile_grammar(
                    replace(sampling, n=compilation.num_choices), compilation.cancel_event
                )
        except Exception as e:
            error = e

        def join() -> None:
            if self.grammar_compilations.get(request_id) is not compilation:
                return  # nobody waits for it any more
            del self.grammar_compilations[request_id]
            self._try_add(compilation.worker, compilation.message_id, request_id, prompts, sampling, guides, error)

        self.between_steps.put(join)
        os.write(self._wake_write_fd, b".")

    def _try_add(
        self,
        worker: bytes,
        message_id: str,
        request_id: str,
        prompts: list[list[int]],
        sampling: SamplingParams,
        guides: list[GrammarMatcher | None] | None,
        error: Exception | None = None,  # of its grammar
    ) -> None:
        try:
            if error is not None:
                raise error
            self._add_to_engine(worker, request_id, prompts, sampling, guides)
            self.send(worker, "reply", message_id, None)
        except ValueError as e:
            self._abort_choices(request_id)
            self.send(worker, "reply", message_id, (400, str(e)))
        except Exception as e:
            self._abort_choices(request_id)
            self._reply_failure(worker, message_id, e)

    def _add_to_engine(
        self,
        worker: bytes,
        request_id: str,
        prompts: list[list[int]],
        sampling: SamplingParams,
        guides: list[GrammarMatcher | None] | None,
    ) -> None:
        slots: dict[int, int] = {}
        self.active_requests[request_id] = worker, slots
        for prompt in prompts:
            for i in range(sampling.n):
                seed = None if sampling.seed is None else sample_seed(sampling.seed, i)
                scored = sampling.prompt_logprobs if i == 0 else None
                one = replace(sampling, n=1, seed=seed, prompt_logprobs=scored)
                guide = guides and [guides[len(slots)]]
                id = self.engine._add(prompt, one, stream_text=False, matchers=guide)
                self.owner_by_engine_id[id] = worker, request_id, len(slots)
                slots[len(slots)] = id
        self.num_requests += 1
        self.num_prompt_tokens += sum(map(len, prompts))

    def on_abort(self, worker: bytes, request_id: str, choice_index: int | None) -> None:
        """End a worker's call, or one slot of it; nobody waits for its events."""
        if request_id in self.active_requests and self.active_requests[request_id][0] == worker:
            self._abort_choices(request_id, choice_index)
        elif request_id in self.grammar_compilations and self.grammar_compilations[request_id].worker == worker:
            self._cancel_compilation(request_id)

    def on_abort_by_id(self, worker: bytes, message_id: str, request_id: str) -> None:
        """End a call, of whichever worker: that one hears of it. The reply says whether there was one."""
        found = self.active_requests.get(request_id)
        if found is not None:
            for id in list(found[1].values()):
                self.engine.abort(id)  # its events come with the next step
        elif request_id in self.grammar_compilations:
            ended = self._cancel_compilation(request_id)
            self.send(ended.worker, "reply", ended.message_id, (409, "the request was ended before it began"))
        self.send(worker, "reply", message_id, found is not None)

    def on_profile(self, worker: bytes, message_id: str, folder: str, steps: int, skip: int) -> None:
        """Trace the next steps; the reply is the path of the trace to come, or (status, message)."""
        try:
            if isinstance(self.engine, Replicas):
                raise ValueError("a trace is of one engine, and this server runs several (parallel.replicas)")
            self.send(worker, "reply", message_id, str(self.engine.profiler.profile_in_background(steps, folder, skip)))
        except ValueError as e:
            self.send(worker, "reply", message_id, (409, str(e)))

    def on_list_adapters(self, worker: bytes, message_id: str) -> None:
        self.send(worker, "reply", message_id, sorted(self.engine.adapters))

    def on_set_adapter(
        self, worker: bytes, message_id: str, name: str, adapter: Adapter | None, load_inplace: bool
    ) -> None:
        """Add an adapter, or replace it by another of the same shapes (`again`), or remove it (no tree).

        The reply is None, or (status, message).
        """
        try:
            if adapter is None:
                self.engine.remove_adapter(name)
            elif load_inplace and name in self.engine.adapters:
                self.engine.update_adapter(name, adapter)
            else:
                self.engine.add_adapter(name, adapter)
            self.send(worker, "reply", message_id, None)
        except ValueError as e:
            self.send(worker, "reply", message_id, (409 if name in self.engine.adapters else 400, str(e)))

    def _abort_choices(self, request_id: str, choice_index: int | None = None) -> None:
        _, slots = self.active_requests.get(request_id, (b"", {}))
        for i in [*slots] if choice_index is None else [choice_index] * (choice_index in slots):
            id = slots.pop(i)
            self.owner_by_engine_id.pop(id, None)
            self.engine.abort(id)
        if not slots:
            self.active_requests.pop(request_id, None)

    def _cancel_compilation(self, request_id: str) -> GrammarCompilation:
        """Ends a call whose grammar is compiled, which then ends soon."""
        found = self.grammar_compilations.pop(request_id)
        found.cancel_event.set()
        return found

    def abort_worker_requests(self, worker: bytes) -> None:
        """A worker died: end what it asked for."""
        for call in [call for call, c in self.grammar_compilations.items() if c.worker == worker]:
            self._cancel_compilation(call)
        for call in [call for call, (who, _) in self.active_requests.items() if who == worker]:
            self._abort_choices(call)

    def step(self) -> None:
        """One step, and its events on their way, a message for each worker."""
        found: dict[bytes, dict[str, list[TokenDelta]]] = defaultdict(lambda: defaultdict(list))
        self.step_start_time = time.monotonic()
        try:
            events = self.engine.step()
        finally:
            self.step_start_time = None
        for event in events:
            if event.request_id in self.owner_by_engine_id:  # else nobody waits for it any more
                worker, call, slot = self.owner_by_engine_id[event.request_id]
                found[worker][call].append(self._make_token_delta(event, slot))
                self.num_generated_tokens += len(event.token_ids)
                if event.finish_reason:
                    self._remove_finished(event.request_id)
        for worker, calls in found.items():
            self.send(worker, "events", dict(calls))

    def _make_token_delta(self, event: Event, choice_index: int) -> TokenDelta:
        piece = TokenDelta(
            choice_index,
            event.token_ids,
            event.logprobs,
            event.top_logprobs,
            event.finish_reason,
            event.error,
            weight_version=event.weight_version,
        )
        if (o := event.output) is None:
            return piece
        return piece._replace(
            num_cached_tokens=o.num_cached_tokens,
            prompt_logprobs=o.prompt_logprobs,
            prompt_top_logprobs=o.prompt_top_logprobs,
        )

    def _remove_finished(self, engine_id: int) -> None:
        _, call, slot = self.owner_by_engine_id.pop(engine_id)
        del self.active_requests[call][1][slot]
        if not self.active_requests[call][1]:
            del self.active_requests[call]

    def report_step_failure(self) -> None:
        """A step raised, which ended everything: say so to whoever waits."""
        for worker, call, slot in self.owner_by_engine_id.values():
            self.send(worker, "events", {call: [TokenDelta(slot, [], None, None, "failed")]})
        self.owner_by_engine_id.clear()
        self.active_requests.clear()

    def stats(self) -> dict[str, Any]:
        """Figures of the moment, and totals since the start."""
        found = self.engine.stats()
        return found | {
            "cache_usage": found["held_pages"] / found["pages"],
            "requests": self.num_requests,
            "prompt_tokens": self.num_prompt_tokens,
            "generation_tokens": self.num_generated_tokens,
            "uptime": time.time() - self.start_time,
        }


def health_address(address: str) -> str:
    """Where `answer_health` listens, beside the engine's own socket."""
    return f"{address}-health"


def serve_health(server: EngineServer, address: str) -> None:
    """A thread: answers each message with what is wrong with the engine, or with nothing.

    A process that is stopped does not answer, which its deadline tells whoever asks.
    """
    socket = zmq.Context.instance().socket(zmq.REP)
    socket.linger = 0
    socket.bind(health_address(address))
    while True:
        socket.recv()
        since = server.step_start_time
        stuck = since is not None and time.monotonic() - since > STUCK_STEP_SECONDS
        problem = f"a step has been running for more than {STUCK_STEP_SECONDS:.0f} s" if stuck else ""
        if stopped := find_stopped_descendants():
            problem = f"process {stopped[0]} of the engine is stopped"
        socket.send(problem.encode())


def run_engine_process(
    engine_loader: Callable[[], tuple[Engine | Replicas, str]],
    address: str,
    control: Connection,
    max_completions: int | None,
) -> None:
    """The process: `build` gives the engine and the path of its model; `control` is the supervisor's.

    Over `control` come the names of workers that died; its end is this process's.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the supervisor says when, after the last request
        signal.signal(number, signal.SIG_IGN)
    ready = threading.Event()
    exit_with_parent(lambda: ORPHAN_EXIT_SECONDS if ready.is_set() else 0.0)
    try:
        engine, path = engine_loader()
    except (ValueError, OSError) as e:
        print(f"fgserve: {e}", file=sys.stderr, flush=True)
        sys.exit(1)
    socket = zmq.Context.instance().socket(zmq.ROUTER)
    socket.set_hwm(0)  # what a worker has not read yet is bounded by what it asked for
    socket.linger = 0
    socket.bind(address)
    limits, spec = engine.config.schedule, engine.model_config
    max_completions = max_completions or 4 * limits.max_num_seqs * engine.config.parallel.replicas
    # Grammars want a second before the first one; whoever comes until then waits for it.
    threading.Thread(target=engine.prepare_grammars, daemon=True).start()
    info = {
        "path": path,
        "context": min(spec.context_length, engine.cache_capacity + 1),
        "spec": spec,
        "most": max_completions,
    }
    info["special_tokens_in_content"] = engine.config.special_tokens_in_content
    info["supports_adapters"] = engine.config.lora.max_adapters > 0
    core = EngineServer(engine, socket, max_completions, info)
    threading.Thread(target=serve_health, args=(core, address), daemon=True).start()
    ready.set()
    control.send("ready")
    poller, failures = zmq.Poller(), 0
    poller.register(socket, zmq.POLLIN)
    poller.register(control.fileno(), zmq.POLLIN)
    poller.register(core.wake_fd, zmq.POLLIN)
    with engine, contextlib.suppress(EOFError, ConnectionError):  # the supervisor closed its end, or is gone
        while True:
            if not engine.has_unfinished_requests:
                poller.poll()
            while control.poll():
                core.abort_worker_requests(control.recv())
            core.drain_messages()
            if engine.has_unfinished_requests:
                try:
                    core.step()
                    failures = 0
                except Exception:
                    traceback.print_exc()
                    core.report_step_failure()
                    failures += 1
                    if failures == MAX_CONSECUTIVE_FAILURES or engine.worker_failure:
                        sys.exit(1)
