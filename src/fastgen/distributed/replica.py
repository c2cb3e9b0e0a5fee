"""The process of one replica: an engine that runs the requests of the parent (`data_parallel`), whose ids it keeps."""

import os
import queue
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastgen.config import EngineConfig, SamplingParams
from fastgen.core.model_config import ModelConfig
from fastgen.core.request import Completion, Event, Output
from fastgen.distributed.processes import run_child
from fastgen.engine import Engine
from fastgen.structured_output.backend import GrammarMatcher

REPORT_INTERVAL_SECONDS = 0.2  # after which the parent hears of the stats even where there is no event


class AddRequest(NamedTuple):
    """A request as the parent sends it."""

    id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    stream_text: bool
    final_only: bool  # whether the parent wants the last event only
    has_text: bool  # whether completions have text besides tokens


class ReplicaInfo(NamedTuple):
    """A replica's first message: the properties of its engine."""

    model_config: ModelConfig
    cache_capacity: int
    device: torch.device
    dtype: torch.dtype
    config: EngineConfig
    stats: dict[str, int]


def run_replica(pipe: Connection, *args: Any) -> None:
    """Runs the process; `args` are those of `_serve_replica`."""
    run_child(pipe, partial(_serve_replica, *args), (ValueError, RuntimeError, OSError))


def _serve_replica(
    num_threads: int,
    visible_gpus: str | None,
    model_path: Path,
    options: dict[str, Any],
    pipe: Connection,
    messages: queue.SimpleQueue[tuple[str, Any]],
) -> None:
    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # for tensor-parallel ranks
    torch.set_num_threads(num_threads)
    if visible_gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus
    with Engine.from_pretrained(model_path, **options) as engine:
        engine.grammars.skip_trials = True  # the parent has tried the grammars that it sends
        e = engine
        pipe.send(ReplicaInfo(e.model_config, e.cache_capacity, e.device, e.dtype, e.config, e.stats()))
        ReplicaLoop(engine, pipe, messages).run()


class ReplicaLoop:
    """Makes the calls that the parent sends, steps the engine, and reports events under the parent's ids."""

    def __init__(self, engine: Engine, pipe: Connection, messages: queue.SimpleQueue[tuple[str, Any]]) -> None:
        self.engine, self.pipe, self.messages = engine, pipe, messages
        self.tokenizer = engine.tokenizer
        self.engine_ids, self.parent_ids = dict[int, int](), dict[int, int]()  # parent's id -> engine's, and back
        self.final_only_ids = set[int]()
        self.compilations, self.aborted_ids = dict[int, Future](), set[int]()  # requests whose grammars are compiled
        self.grammar_pool = ThreadPoolExecutor(2, "grammar")
        self.events = deque[Event]()  # to report

    def run(self) -> None:
        """Runs until the parent's message "close"."""
        reported_at = 0.0
        while True:
            messages = [] if self.engine.has_unfinished_requests else [self.messages.get()]
            while not self.messages.empty():
                messages.append(self.messages.get())
            for kind, value in messages:
                if kind == "close":
                    return
                getattr(self, f"on_{kind}")(value)
            if self.engine.has_unfinished_requests:
                self._step()
            is_idle = not self.engine.has_unfinished_requests
            if self.events or is_idle or time.monotonic() > reported_at + REPORT_INTERVAL_SECONDS:
                reported_at = time.monotonic()
                self.pipe.send((self.events, self.engine.stats()))
                self.events = deque()

    def on_add(self, requests: list[AddRequest]) -> None:
        """Adds requests to the engine; those with a grammar follow once a thread has compiled the grammar."""
        self._submit([(request, None) for request in requests if request.params.grammar is None])
        for request in requests:
            if request.params.grammar is not None:
                future = self.grammar_pool.submit(self.engine.compile_grammar, request.params)
                self.compilations[request.id] = future
                future.add_done_callback(lambda _, request=request: self.messages.put(("compiled", request)))

    def on_compiled(self, request: AddRequest) -> None:
        """Adds a request whose grammar a thread has compiled."""
        try:
            self._submit([(request, self.compilations.pop(request.id).result())])
        except Exception as e:
            self._fail(request, e)
        self.aborted_ids.discard(request.id)

    def on_abort(self, ids: list[int]) -> None:
        """Aborts requests; those whose grammars are still compiled, once they are."""
        for id in ids:
            if id in self.engine_ids:
                self.engine.abort(self.engine_ids[id])
            elif id in self.compilations:
                self.aborted_ids.add(id)

    def on_call(self, call: tuple[str, Sequence[Any]]) -> None:
        """Calls a method of the engine."""
        method, args = call
        getattr(self.engine, method)(*args)

    def _submit(self, requests: list[tuple[AddRequest, Sequence[GrammarMatcher | None] | None]]) -> None:
        """Adds requests to the engine; a request that the engine refuses ends alone."""
        prepared, accepted = [], list[AddRequest]()
        for request, matchers in requests:
            self.engine.core.tokenizer = self.tokenizer if request.has_text else None
            try:
                prompt = request.prompt_token_ids
                options: Any = {"stream_text": request.stream_text, "matchers": matchers}
                prepared.append(self.engine.core.prepare(prompt, request.params, **options))
                accepted.append(request)
            except Exception as e:
                self._fail(request, e)
        for request, engine_id in zip(accepted, self.engine.core.submit(prepared), strict=True):
            self.engine_ids[request.id], self.parent_ids[engine_id] = engine_id, request.id
            if request.final_only:
                self.final_only_ids.add(request.id)
            if request.id in self.aborted_ids:
                self.engine.abort(engine_id)

    def _fail(self, request: AddRequest, error: Exception) -> None:
        """Reports that the engine refuses a request that the parent has accepted."""
        message = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        completions = [Completion(finish_reason="error", error=message) for _ in range(request.params.n)]
        events = [Event(request.id, i, [], "", finish_reason="error", error=message) for i in range(request.params.n)]
        events[-1].output = Output(request.id, request.prompt_token_ids, completions)
        self.events += events

    def _step(self) -> None:
        for event in self.engine.step():
            event.request_id = id = self.parent_ids[event.request_id]
            if event.output is not None:
                event.output.request_id = id
                del self.parent_ids[self.engine_ids.pop(id)]
            if event.output is not None or id not in self.final_only_ids:
                self.events.append(event)
            if event.output is not None:
                self.final_only_ids.discard(id)
