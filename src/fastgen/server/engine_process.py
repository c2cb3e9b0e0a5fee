"""The engine's process: a loop that receives workers' calls from a socket, steps the engine and sends token deltas.

The process sees token ids only; workers tokenize and detokenize. A request is what one HTTP request asks for. Each of
its choices (completions) is a request of its own to the engine, so that one choice can end at a stop string while the
others continue; the prefix cache computes their prompt once.

Messages are pickled objects over ZeroMQ:

    worker -> engine   a call of a method of `EngineServer`: (method name, arguments)
    engine -> worker   EngineInfo | Reply | {request_id: [TokenDelta, ...]}

A call's first frame is its message id, so that a call that cannot be unpickled is answered too; "" asks for no reply.
Pickle is safe here: both ends are processes of one program, on a socket in a folder that only their user can enter.
A thread answers health checks on a second socket, independent of long steps.
"""

import contextlib
import itertools
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
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import zmq

from fastgen import Engine, Replicas, SamplingParams
from fastgen.core.model_config import ModelConfig
from fastgen.core.request import sample_seed
from fastgen.distributed.processes import exit_with_parent, find_stopped_descendants
from fastgen.lora import Adapter
from fastgen.server.errors import APIError
from fastgen.server.metrics import MetricKey

MAX_CONSECUTIVE_FAILURES = 3  # failed steps in a row after which the process exits
STUCK_STEP_SECONDS = 120.0  # duration after which a running step counts as stuck
ORPHAN_EXIT_SECONDS = 15.0  # for the engine to exit in order after its supervisor has ended
HEALTH_SUFFIX = "-health"  # of the address of health checks, after that of the engine's own socket
EngineLoader = Callable[[], tuple[Engine | Replicas, str]]  # returns the engine or replicas, and the path of the model
NO_REPLY = object()  # returned by methods whose reply is sent later


class Sender(NamedTuple):
    """The worker that sent a call, and the id of the message that the reply answers."""

    worker: bytes
    message_id: str


class EngineInfo(NamedTuple):
    """Facts about the engine that workers receive in reply to `EngineServer.hello`."""

    path: str  # of the model
    model_config: ModelConfig
    context_length: int  # in tokens
    max_completions: int  # that may run or wait at a time
    special_tokens_in_content: str  # see `fastgen.core.tokenizer.encode`
    supports_adapters: bool


class Reply(NamedTuple):
    """The result or the error of a call."""

    message_id: str
    value: Any = None
    error: APIError | None = None


class TokenDelta(NamedTuple):
    """Tokens that a step added to a choice. The last delta has the number of cached tokens and the prompt's logprobs.

    `finish_reason` is stop, length, abort, error (non-finite logits, or an error of the choice's grammar or text) or
    failed (the engine failed).
    """

    choice_index: int
    token_ids: list[int]
    logprobs: list[float] | None
    top_logprobs: list[dict[int, float]] | None
    finish_reason: str | None
    error: str = ""  # details of finish reason "error"
    weight_version: int | None = None  # of the weights that the tokens were sampled with
    num_cached_tokens: int = 0
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[dict[int, float] | None] | None = None


@dataclass(eq=False)
class ActiveRequest:
    """A request until its end. It has no engine ids while its grammar is compiled, before the reply to its sender."""

    sender: Sender
    id: str
    prompts: list[list[int]]
    sampling: SamplingParams
    engine_ids: dict[int, int] = field(default_factory=dict)  # of the choices that have not ended, by choice
    cancel_event: threading.Event = field(default_factory=threading.Event)  # stops the compilation

    @property
    def num_choices(self) -> int:
        """The number of choices that have not ended."""
        return len(self.engine_ids) or len(self.prompts) * self.sampling.n


class EngineServer:
    """Runs workers' requests on the engine or its replicas.

    Workers call the public methods that have a `sender`, through `EngineClient.call_engine`.
    """

    def __init__(self, engine: Engine | Replicas, socket: zmq.Socket, info: EngineInfo) -> None:
        self.engine, self.socket, self.info = engine, socket, info
        self.active_requests: dict[str, ActiveRequest] = {}
        self.owner_by_engine_id: dict[int, tuple[ActiveRequest, int]] = {}  # engine id -> request, choice
        self.start_time, self.totals = time.time(), {"requests": 0, "prompt_tokens": 0, "generation_tokens": 0}
        self.metric_counts: Counter[Any] = Counter()  # sums over workers, by MetricKey
        self.step_start_time: float | None = None  # while a step runs
        self.between_steps: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # work of other threads
        self.wake_fd, self._wake_write_fd = os.pipe()  # readable while `between_steps` has work
        self._grammar_pool = ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2), "grammar")

    def send(self, worker: bytes, message: object) -> None:
        """Sends a message to a worker; a worker that has ended is ignored."""
        self.socket.send_multipart([worker, pickle.dumps(message)])

    def drain_messages(self) -> None:
        """Processes all received calls. An error fails only the request of its call."""
        while True:
            try:
                worker, message_id, data = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._call_and_reply(Sender(worker, message_id.decode()), self._call_method, data)
        while not self.between_steps.empty():
            os.read(self.wake_fd, 1)
            self.between_steps.get()()

    def _call_method(self, sender: Sender, data: bytes) -> object:
        method, args = pickle.loads(data)
        return getattr(self, method)(sender, *args)

    def _call_and_reply(self, sender: Sender, function: Callable[..., object], *args: object) -> None:
        """Calls `function` and sends its result or its error to the sender."""
        value, error = None, None
        try:
            value = function(sender, *args)
        except APIError as e:
            error = e
        except Exception as e:
            traceback.print_exception(e)
            error = APIError(500, f"the engine failed at this: {type(e).__name__}: {e}", code="engine_error")
        if sender.message_id and value is not NO_REPLY:
            self.send(sender.worker, Reply(sender.message_id, value, error))

    def hello(self, sender: Sender) -> None:
        """Sends `EngineInfo` to a new worker."""
        self.send(sender.worker, self.info)

    def get_stats(self, sender: Sender) -> dict[str, Any]:
        """Returns current figures, and totals since the start."""
        stats, uptime = self.engine.stats(), time.time() - self.start_time
        return stats | {"cache_usage": stats["held_pages"] / stats["pages"], **self.totals, "uptime": uptime}

    def add_counts(self, sender: Sender, counts: dict[MetricKey, float]) -> None:
        """Adds what a worker has counted since its last call."""
        self.metric_counts.update(counts)  # type: ignore[arg-type]

    def get_metrics(self, sender: Sender) -> tuple[dict[MetricKey, float], dict[str, Any]]:
        """Returns the counts of all workers and the engine's figures."""
        return dict(self.metric_counts), self.get_stats(sender)

    def add(self, sender: Sender, request_id: str, prompts: list[list[int]], sampling: SamplingParams) -> object:
        """Adds all choices of a request, or none. Raises APIError for a request that is rejected.

        A grammar is compiled in a thread first, while the engine steps.
        """
        request = ActiveRequest(sender, request_id, prompts, sampling)
        num_used = sum(active.num_choices for active in self.active_requests.values())
        if request_id in self.active_requests:
            raise APIError(409, f"the request id {request_id} is in use")
        if num_used + request.num_choices > (limit := self.info.max_completions):
            busy = f"{num_used} completions are running or waiting, of {limit} at most: try again later"
            raise APIError(429, busy, retry_after=1)
        self.active_requests[request_id] = request
        if sampling.grammar is None:
            return self._add_to_engine(sender, request)
        self._grammar_pool.submit(self._compile_grammar, request)
        return NO_REPLY

    def _compile_grammar(self, request: ActiveRequest) -> None:
        """Compiles a request's grammar in a thread of the pool, then has the request added between two steps."""
        cancel_event, matchers, error = request.cancel_event, [], None
        try:
            if not cancel_event.is_set():
                matchers = self.engine.compile_grammar(replace(request.sampling, n=request.num_choices), cancel_event)
        except Exception as e:
            error = e

        def add_if_active() -> None:
            if self.active_requests.get(request.id) is request:  # else it was aborted meanwhile
                self._call_and_reply(request.sender, self._add_to_engine, request, matchers, error)

        self.between_steps.put(add_if_active)
        os.write(self._wake_write_fd, b".")

    def _add_to_engine(
        self, sender: Sender, request: ActiveRequest, matchers: Any = None, error: Exception | None = None
    ) -> None:
        """Adds the choices of a request to the engine; aborts all of them on an error, as after the grammar's."""
        sampling = request.sampling
        try:
            if error is not None:
                raise error
            for choice, (prompt, i) in enumerate(itertools.product(request.prompts, range(sampling.n))):
                seed = None if sampling.seed is None else sample_seed(sampling.seed, i)
                prompt_logprobs = sampling.prompt_logprobs if i == 0 else None
                params = replace(sampling, n=1, seed=seed, prompt_logprobs=prompt_logprobs)
                matcher = matchers and [matchers[choice]]
                engine_id = self.engine.add(prompt, params, stream_text=False, matchers=matcher)
                self.owner_by_engine_id[engine_id], request.engine_ids[choice] = (request, choice), engine_id
        except Exception as e:
            self._abort(request)
            if isinstance(e, ValueError):
                raise APIError(400, str(e)) from e
            raise
        self.totals["requests"] += 1
        self.totals["prompt_tokens"] += sum(map(len, request.prompts))

    def abort(self, sender: Sender, request_id: str, choice_index: int | None) -> None:
        """Aborts one choice of a worker's own request, or all (None); no deltas follow."""
        if (request := self.active_requests.get(request_id)) and request.sender.worker == sender.worker:
            self._abort(request, choice_index)

    def abort_by_id(self, sender: Sender, request_id: str) -> bool:
        """Aborts a request of any worker, which gets the last deltas; returns whether the engine had the request."""
        if (request := self.active_requests.get(request_id)) is None:
            return False
        for engine_id in [*request.engine_ids.values()]:
            self.engine.abort(engine_id)  # the events come with the next step
        if not request.engine_ids:
            self._abort(request)
            worker, message_id = request.sender
            error = APIError(409, "the request was ended before it began")
            self.send(worker, Reply(message_id, error=error))
        return bool(request.engine_ids)

    def _abort(self, request: ActiveRequest, choice_index: int | None = None) -> None:
        """Aborts one choice, or all (None), and the compilation of a grammar, whose thread stops soon."""
        request.cancel_event.set()
        for i in [*request.engine_ids] if choice_index is None else {choice_index} & request.engine_ids.keys():
            self.engine.abort(request.engine_ids[i])
            del self.owner_by_engine_id[request.engine_ids.pop(i)]
        if not request.engine_ids:
            self.active_requests.pop(request.id, None)

    def abort_worker_requests(self, worker: bytes) -> None:
        """Aborts all requests of a worker that has died."""
        for request in [*self.active_requests.values()]:
            if request.sender.worker == worker:
                self._abort(request)

    def profile(self, sender: Sender, folder: str, num_steps: int, num_skipped: int) -> str:
        """Traces `num_steps` steps after `num_skipped` others; returns the path of the trace, which comes later."""
        try:
            if isinstance(self.engine, Replicas):
                raise ValueError("a trace is of one engine, and this server runs several (parallel.replicas)")
            return str(self.engine.profiler.profile_in_background(num_steps, folder, num_skipped))
        except ValueError as e:
            raise APIError(409, str(e)) from e

    def list_adapters(self, sender: Sender) -> list[str]:
        """Returns the names of the LoRA adapters."""
        return sorted(self.engine.adapters)

    def set_adapter(self, sender: Sender, name: str, adapter: Adapter | None, load_inplace: bool) -> None:
        """Adds a LoRA adapter, replaces it by one of the same shapes (`load_inplace`), or removes it (None)."""
        try:
            if adapter is None:
                self.engine.remove_adapter(name)
            elif load_inplace and name in self.engine.adapters:
                self.engine.update_adapter(name, adapter)
            else:
                self.engine.add_adapter(name, adapter)
        except ValueError as e:
            raise APIError(409 if name in self.engine.adapters else 400, str(e), param="lora_name") from e

    def step(self) -> None:
        """Runs one step and sends its token deltas, one message per worker."""
        messages: dict[bytes, dict[str, list[TokenDelta]]] = defaultdict(lambda: defaultdict(list))
        self.step_start_time = time.monotonic()
        try:
            events = self.engine.step()
        finally:
            self.step_start_time = None
        for e in events:
            if e.request_id not in self.owner_by_engine_id:  # it was aborted
                continue
            request, choice = self.owner_by_engine_id[e.request_id]
            tokens = choice, e.token_ids, e.logprobs, e.top_logprobs, e.finish_reason, e.error, e.weight_version
            delta = TokenDelta(*tokens)
            if (o := e.output) is not None:
                delta = TokenDelta(*tokens, o.num_cached_tokens, o.prompt_logprobs, o.prompt_top_logprobs)
            messages[request.sender.worker][request.id].append(delta)
            self.totals["generation_tokens"] += len(e.token_ids)
            if e.finish_reason:
                del self.owner_by_engine_id[e.request_id], request.engine_ids[choice]
                if not request.engine_ids:
                    del self.active_requests[request.id]
        for worker, deltas in messages.items():
            self.send(worker, dict(deltas))

    def report_step_failure(self) -> None:
        """Reports a step that raised, which has ended all requests, to every worker."""
        for request, choice in self.owner_by_engine_id.values():
            self.send(request.sender.worker, {request.id: [TokenDelta(choice, [], None, None, "failed")]})
            self.active_requests.pop(request.id, None)
        self.owner_by_engine_id.clear()


def serve_health(server: EngineServer, address: str) -> None:
    """Answers each message with what is wrong with the engine, "" if nothing is. Runs in a thread.

    A stopped process does not answer, which the client's timeout detects.
    """
    socket = zmq.Context.instance().socket(zmq.REP)
    socket.linger = 0
    socket.bind(address + HEALTH_SUFFIX)
    while True:
        socket.recv()
        start = server.step_start_time
        is_stuck = start is not None and time.monotonic() - start > STUCK_STEP_SECONDS
        problem = f"a step has been running for more than {STUCK_STEP_SECONDS:.0f} s" if is_stuck else ""
        if pids := find_stopped_descendants():
            problem = f"process {pids[0]} of the engine is stopped"
        socket.send(problem.encode())


def run_engine_process(
    control: Connection, engine_loader: EngineLoader, address: str, max_completions: int | None
) -> None:
    """Runs the engine's process until the supervisor closes `control`, over which it sends names of dead workers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the supervisor decides when the process ends
        signal.signal(number, signal.SIG_IGN)
    is_ready = threading.Event()
    # Once ready, the main loop notices the end of the supervisor too, and exits in order.
    exit_with_parent(lambda: ORPHAN_EXIT_SECONDS if is_ready.is_set() else 0.0)
    try:
        engine, path = engine_loader()
    except (ValueError, OSError) as e:
        print(f"fgserve: {e}", file=sys.stderr, flush=True)
        sys.exit(1)
    socket = zmq.Context.instance().socket(zmq.ROUTER)
    socket.set_hwm(0)  # unread messages are bounded by the requests that run
    socket.linger = 0
    socket.bind(address)
    # The grammar library takes a second to start; a request with a grammar that comes earlier waits for it.
    threading.Thread(target=engine.prepare_grammars, daemon=True).start()
    config, model_config = engine.config, engine.model_config
    context_length = min(model_config.context_length, engine.cache_capacity + 1)
    max_completions = max_completions or 4 * config.schedule.max_num_seqs * config.parallel.replicas
    limits, supports_adapters = (context_length, max_completions), config.lora.max_adapters > 0
    info = EngineInfo(path, model_config, *limits, config.special_tokens_in_content, supports_adapters)
    server = EngineServer(engine, socket, info)
    threading.Thread(target=serve_health, args=(server, address), daemon=True).start()
    is_ready.set()
    control.send("ready")
    poller, num_failures = zmq.Poller(), 0
    for source in (socket, control.fileno(), server.wake_fd):
        poller.register(source, zmq.POLLIN)
    with engine, contextlib.suppress(EOFError, ConnectionError):  # raised once the supervisor has closed `control`
        while True:
            if not engine.has_unfinished_requests:
                poller.poll()
            while control.poll():
                server.abort_worker_requests(control.recv())
            server.drain_messages()
            if engine.has_unfinished_requests:
                try:
                    server.step()
                    num_failures = 0
                except Exception:
                    traceback.print_exc()
                    server.report_step_failure()
                    num_failures += 1
                    if num_failures == MAX_CONSECUTIVE_FAILURES or engine.worker_failure:
                        sys.exit(1)
