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

from fastgen.core.extensions import Matcher
from fastgen.core.model_config import ModelConfig
from fastgen.core.request import Event
from fastgen.distributed.processes import run_child
from fastgen.distributed.router import ReplicaRequest
from fastgen.engine import Engine

REPORT_INTERVAL_SECONDS = 0.2  # after which the parent hears of the stats even where there is no event


class ReplicaInfo(NamedTuple):
    """A replica's first message: the properties of its engine."""

    model_config: ModelConfig
    cache_capacity: int
    device: torch.device
    dtype: torch.dtype
    stats: dict[str, int]


def run_replica(pipe: Connection, *args: Any) -> None:
    """Runs the process; `args` are those of `_serve_replica`."""
    run_child(pipe, partial(_serve_replica, *args), (ValueError, RuntimeError, OSError))


def _serve_replica(
    num_threads: int, visible_gpus: str | None, model_path: Path, options: dict[str, Any], pipe: Connection,
    messages: queue.SimpleQueue[tuple[str, Any]],
) -> None:  # fmt: skip
    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # for tensor-parallel ranks
    torch.set_num_threads(num_threads)
    if visible_gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus
    with Engine.from_pretrained(model_path, **options) as engine:
        engine.grammars.skip_trials = True  # the parent has tried the grammars that it sends
        info = engine.model_config, engine.cache_capacity, engine.device, engine.dtype, engine.stats()
        pipe.send(ReplicaInfo(*info))
        ReplicaLoop(engine, pipe, messages).run()


class ReplicaLoop:
    """Makes the calls that the parent sends, steps the engine, and reports events under the parent's ids."""

    def __init__(self, engine: Engine, pipe: Connection, messages: queue.SimpleQueue[tuple[str, Any]]) -> None:
        self.engine, self.pipe, self.messages = engine, pipe, messages
        self.requests, self.engine_ids = dict[int, ReplicaRequest](), dict[int, int]()  # by engine's id; parent's -> it
        self.compiling = dict[int, bool]()  # requests whose grammars are compiled: whether the parent has aborted them
        self.grammar_pool = ThreadPoolExecutor(2, "grammar")
        self.events = deque[Event]()  # to report

    def run(self) -> None:
        """Runs until the parent's message "close"."""
        reported_at = 0.0
        while True:
            messages = [] if self.engine.has_unfinished_requests else [self.messages.get()]
            while not self.messages.empty():
                messages.append(self.messages.get())
            for name, value in messages:
                if name == "close":
                    return
                getattr(self, f"on_{name}")(value)
            if self.engine.has_unfinished_requests:
                self._step()
            is_idle = not self.engine.has_unfinished_requests
            if self.events or is_idle or time.monotonic() > reported_at + REPORT_INTERVAL_SECONDS:
                reported_at = time.monotonic()
                self.pipe.send((self.events, self.engine.stats()))
                self.events = deque()

    def on_add(self, requests: list[ReplicaRequest]) -> None:
        """Adds requests to the engine; those with a grammar follow once a thread has compiled the grammar."""
        self._submit([(request, None) for request in requests if request.params.grammar is None])
        for request in requests:
            if request.params.grammar is not None:
                self.compiling[request.id] = False
                future = self.grammar_pool.submit(self.engine.compile_grammar, request.params)
                future.add_done_callback(lambda f, request=request: self.messages.put(("compiled", (request, f))))

    def on_compiled(self, compiled: tuple[ReplicaRequest, Future]) -> None:
        """Adds a request whose grammar a thread has compiled."""
        request, future = compiled
        is_aborted = self.compiling.pop(request.id)
        try:
            self._submit([(request, future.result())])
        except Exception as e:
            self._reject(request, e)
        if is_aborted:
            self.on_abort(request.id)

    def on_abort(self, id: int) -> None:
        """Aborts a request; if its grammar is still being compiled, once it is."""
        if id in self.engine_ids:
            self.engine.abort(self.engine_ids[id])
        elif id in self.compiling:
            self.compiling[id] = True

    def on_call(self, call: tuple[str, Sequence[Any]]) -> None:
        """Calls a method of the engine."""
        method, args = call
        getattr(self.engine, method)(*args)

    def _submit(self, requests: list[tuple[ReplicaRequest, Sequence[Matcher | None] | None]]) -> None:
        """Adds requests to the engine; a request that the engine refuses ends alone."""
        core, prepared, accepted = self.engine.core, [], list[ReplicaRequest]()
        for request, matchers in requests:
            options: Any = {"stream_text": request.stream_text, "matchers": matchers}
            try:
                prepared.append(core.prepare(request.prompt_token_ids, request.params, **options))
                accepted.append(request)
            except Exception as e:
                self._reject(request, e)
        for request, engine_id in zip(accepted, core.submit(prepared), strict=True):
            self.engine_ids[request.id], self.requests[engine_id] = engine_id, request

    def _reject(self, request: ReplicaRequest, error: Exception) -> None:
        """Reports that the engine refuses a request that the parent has accepted."""
        message = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        self.events += request.end_without_tokens("error", message)

    def _step(self) -> None:
        for event in self.engine.step():
            request = self.requests[event.request_id]
            if event.output is not None:
                event.output.request_id = request.id
                del self.requests[self.engine_ids.pop(request.id)]
            if event.output is not None or not request.final_only:
                event.request_id = request.id
                self.events.append(event)
