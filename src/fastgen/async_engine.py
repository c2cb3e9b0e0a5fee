"""The engine for asyncio: one thread steps it, and coroutines of any event loop reach it between steps.

async with fastgen.AsyncEngine(engine) as e:
    async for index, output in e.generate(prompts, sampling):  # as they finish
        ...
    await e.update_params(tensors)                             # requests in flight go on
"""

import asyncio
import atexit
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import torch

from fastgen.checkpoint import weights
from fastgen.config import SamplingParams, unknown_name_message
from fastgen.core.request import Event, Output, pair_prompts
from fastgen.core.tokenizer import Prompt
from fastgen.core.types import Params
from fastgen.engine import Engine
from fastgen.training import weight_sync

T = TypeVar("T")
OneOrManyPrompts = Prompt | Sequence[Prompt]
OneOrManySampling = SamplingParams | Sequence[SamplingParams] | None


class AsyncRequest:
    """What some of an engine's requests add as they run: `async for` gives events, `output` waits for the end of one.

    For the event loop that it was made in. Cancelling who waits for it aborts it; `close` does so too.
    """

    def __init__(self, async_engine: "AsyncEngine", loop: asyncio.AbstractEventLoop, final_only: bool) -> None:
        self.request_ids: list[int] = []  # of the engine's requests
        self._async_engine, self._loop, self._final_only = (
            async_engine,
            loop,
            final_only,
        )  # `whole`: only last events are wanted
        self._num_unfinished = 0  # how many of them; the engine's thread counts
        self._events, self._outputs = deque[Event](), dict[int, Output]()
        self._wake_up_event, self._finished, self._error = asyncio.Event(), False, None

    @property
    def request_id(self) -> int:
        """Of the first; `add` makes one."""
        return self.request_ids[0]

    def __aiter__(self) -> "AsyncRequest":
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self._finished:
                self._raise_on_error()
                raise StopAsyncIteration
            await self._wait()
        return self._events.popleft()

    async def output(self, index: int = 0) -> Output:
        """Of the index-th request, once it has ended."""
        id = self.request_ids[index]
        while id not in self._outputs:
            if self._finished:
                self._raise_on_error()
                raise RuntimeError(f"request {id} was left before its end, and aborted")
            await self._wait()
        output = self._outputs[id]
        if not _is_complete(output):
            self._raise_on_error()
        return output

    def close(self) -> None:
        """Abort what still runs; nobody hears of it any more."""
        if self._finished:
            return
        self._finished = True
        self._events.clear()
        self._wake_up_event.set()
        self._async_engine._enqueue_job(self._abort_unfinished, ignore_closed=True)

    async def _wait(self) -> None:
        self._wake_up_event.clear()
        try:
            await self._wake_up_event.wait()
        except asyncio.CancelledError:
            self.close()
            raise

    def _raise_on_error(self) -> None:
        if self._error is not None:
            raise RuntimeError(f"a step failed, and this request ended with it: {self._error!r}") from self._error

    def _deliver(self, events: list[Event], finished: bool, error: BaseException | None) -> None:
        """From the engine's thread, in the loop's."""
        if not self._finished:
            self._events += events
            self._outputs |= {e.request_id: e.output for e in events if e.output is not None}
            self._finished, self._error = finished, error
            self._wake_up_event.set()

    def _abort_unfinished(self) -> None:
        """In the engine's thread."""
        left = [id for id in self.request_ids if self._async_engine._requests.get(id) is self]
        for id in left:
            del self._async_engine._requests[id]
        self._async_engine.engine._abort_silently(left)


class AsyncEngine:
    """An engine that a thread steps while there is something to do, for any number of coroutines, loops and threads.

    While this lives the engine is its thread's: `call` reaches it, and every other caller is refused (RuntimeError).
    `close()` (or `with`, or `async with`) aborts what runs and ends the thread; the engine is its owner's again.
    Nothing slows a step down for consumers that do not keep up: what they have not read waits in memory.
    """

    def __init__(self, engine: Engine | Any) -> None:
        if not isinstance(engine, Engine):
            raise ValueError(f"AsyncEngine takes an Engine (Engine.from_pretrained(…) makes one), not {engine!r:.200}")
        if engine.tp_group is not None and engine._worker_group is None:
            raise ValueError(
                "AsyncEngine: in a group that was there every rank makes the same calls in the same order, which "
                "coroutines do not; take Engine(…, tensor_parallel=N), which starts the other ranks itself"
            )
        self.engine = engine
        self._owner_pid = os.getpid()
        engine._access_guard.acquire()
        self._condition = threading.Condition()  # of the next two
        self._jobs, self._closed = list[Callable[[], None]](), False
        self._paused = self._draining = False  # these, and all that follows, are the thread's own
        self._requests: dict[int, AsyncRequest] = {}  # those that run, by id
        self._callbacks_by_loop: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}
        self._drain_callbacks: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._thread_main, name="fastgen", daemon=True)
        try:
            self._thread.start()
        except BaseException:
            engine._access_guard.release()
            raise
        atexit.register(self.close)  # a thread that is in torch when Python ends takes the process down

    # --- requests ---------------------------------------------------------------------------------------------------

    async def generate(
        self, prompts: OneOrManyPrompts, sampling: OneOrManySampling = None, *, on_error: str = "raise"
    ) -> AsyncIterator[tuple[int, Output]]:
        """(index, output) of one or many prompts, as they finish. Leaving the loop early aborts the others.

        `on_error` "skip": prompts that cannot run get an output with `error`, as from `Engine.generate`.
        """
        await self._precompile_grammars(prompts, sampling)
        request = await self._submit_and_track(
            lambda e: e._add_requests(prompts, sampling, stream_text=False, on_error=on_error), final_only=True
        )
        place = {id: i for i, id in enumerate(request.request_ids)}
        try:
            async for event in request:
                if event.output is not None:
                    yield place[event.request_id], event.output
        finally:
            request.close()

    async def stream(
        self, prompts: OneOrManyPrompts, sampling: OneOrManySampling = None, *, on_error: str = "raise"
    ) -> AsyncIterator[Event]:
        """Events of one or many prompts as they come. Leaving the loop early aborts what is not finished.

        `on_error` as for `generate`.
        """
        await self._precompile_grammars(prompts, sampling)
        request = await self._submit_and_track(
            lambda e: e._add_requests(prompts, sampling, stream_text=True, on_error=on_error)
        )
        try:
            async for event in request:
                yield event
        finally:
            request.close()

    async def add(
        self, prompt: Prompt, sampling: SamplingParams | None = None, *, stream_text: bool = True
    ) -> AsyncRequest:
        """Queue a request. `live` false: only its last event is told. ValueError for what can never run."""
        await self._precompile_grammars([prompt], sampling)
        return await self._submit_and_track(
            lambda e: [e.add(prompt, sampling, stream_text=stream_text)], final_only=not stream_text
        )

    async def _precompile_grammars(self, prompts: OneOrManyPrompts, sampling: OneOrManySampling) -> None:
        """Compiles grammars beside the steps, for the requests that follow. Whoever leaves ends that."""
        if sampling is None or (isinstance(sampling, SamplingParams) and sampling.grammar is None):
            return
        stop = threading.Event()
        try:
            with suppress(ValueError):  # which the request itself gets at once
                for _, params in pair_prompts(prompts, sampling):
                    if params.grammar is not None:
                        await asyncio.to_thread(self.engine._precompile_grammar, params, stop)
        except asyncio.CancelledError:
            stop.set()
            raise

    async def follow(self, fn: Callable[..., int | Sequence[int]], *args: Any, **kwargs: Any) -> AsyncRequest:
        """The requests whose ids f(engine, …) returns, from their first event on: `follow(Engine.fork, id, 4)`."""

        def ids(engine: Engine) -> list[int]:
            found = fn(engine, *args, **kwargs)
            found = [found] if isinstance(found, int) else list(found)
            running = {s.output.request_id for s in engine._sequence_states.values()} - self._requests.keys()
            if wrong := set(found) - running:
                raise ValueError(f"follow: requests {sorted(wrong)} do not run here, or are followed already")
            return found

        return await self._submit_and_track(ids)

    async def _submit_and_track(
        self, fn: Callable[[Engine], Iterable[int]], *, final_only: bool = False
    ) -> AsyncRequest:
        request = AsyncRequest(self, asyncio.get_running_loop(), final_only)

        def begin() -> None:
            if self._draining:
                raise RuntimeError("the engine drains, and takes new requests only after resume()")
            request.request_ids = [*fn(self.engine)]
            self._requests |= dict.fromkeys(request.request_ids, request)
            request._num_unfinished = len(request.request_ids)
            request._finished = not request.request_ids

        try:
            await self._call_on_thread(begin)
        except asyncio.CancelledError:
            request.close()  # behind `begin`
            raise
        return request

    async def abort(self, request_id: int) -> Output | None:
        """End a request now; what it has so far. Who waits for it gets the same. None if it is not running."""
        return await self.call(Engine.abort, request_id)

    async def abort_all(self) -> dict[int, Output]:
        """End all requests now; what each has so far."""
        return await self.call(lambda e: e._abort_requests({s.output.request_id for s in e._sequence_states.values()}))

    # --- control ----------------------------------------------------------------------------------------------------

    async def call(self, fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """f(engine, …), between two steps: `call(Engine.touch)`, `call(Engine.update_params, tensors)`, …"""
        return await self._call_on_thread(lambda: fn(self.engine, *args, **kwargs))

    async def update_params(
        self,
        source: Any,
        *,
        device: torch.device | str | None = None,
        partial: bool = False,
        recompute: bool = False,
        check_finite: bool = True,
    ) -> int:
        """`Engine.update_params` that takes the tensors from `source` beside the steps, and writes them between two.

        For sources that come late or slowly, such as `receive(group)`: a thread copies all of their tensors to
        `device`, by default the one where each is, before any is written. What is wrong with the source or
        its tensors is raised here, the parameters stay as they are, and requests go on.
        """
        if self._closed:
            raise RuntimeError("this AsyncEngine was closed")
        engine, loop = self.engine, asyncio.get_running_loop()
        staged: asyncio.Future[list[tuple[str, torch.Tensor]]] = loop.create_future()

        def receive() -> None:
            try:
                if engine.device.type == "cuda":
                    torch.cuda.set_device(engine.device)  # is a thread's own
                pairs = weights.named_weights(source, engine.model_config) if isinstance(source, Params) else source
                tensors, error = weight_sync.stage_named_tensors(pairs, device), None
                weights.check_tensors(
                    tensors, engine.model_config, engine.dtype, source="update_params", partial=partial
                )
                if check_finite:
                    weights.check_finite_update(
                        engine.params, engine.model_config, tensors, engine._tp_shard, "update_params"
                    )
            except BaseException as e:
                tensors, error = [], e
            with suppress(RuntimeError):  # the loop was closed, and nobody waits any more
                loop.call_soon_threadsafe(_resolve_future, staged, tensors, error)

        threading.Thread(target=receive, name="fastgen-update", daemon=True).start()
        how = {"partial": partial, "recompute": recompute, "check_finite": False}  # they have been looked at
        return await self.call(Engine.update_params, await staged, **how)

    async def pause(self, mode: str = "keep") -> None:
        """No step begins until `resume`, and none is running any more.

        "keep" freezes the requests, to go on as if nothing had been; "abort" ends them with what they have. Others may
        be added meanwhile, and `call` works.
        """
        if mode not in ("keep", "abort"):
            raise ValueError(unknown_name_message("mode", mode, ["keep", "abort"]))

        def stop() -> None:
            self._paused = True
            try:
                if self.engine._worker_group is not None:
                    self.engine._worker_group.broadcast_call("_finish_step")
                self.engine._finish_step()
            except BaseException as e:
                self.engine._reset_after_error()
                self._deliver_events(self._drain_events(), e)
                raise
            if mode == "abort":
                self.engine._abort_all()

        await self._call_on_thread(stop)

    async def resume(self) -> None:
        """Go on after `pause`, and take new requests after `drain`."""

        def go() -> None:
            self._paused = self._draining = False

        await self._call_on_thread(go)

    async def drain(self) -> None:
        """Take no new requests until `resume`, and wait for the end of those there are."""
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def begin() -> None:
            self._draining = True
            self._drain_callbacks.append(lambda: self._add_callback(loop, partial(_resolve_future, done, None, None)))

        self._enqueue_job(begin)
        await done

    def close(self) -> None:
        """Abort what runs, end the thread, and leave the engine to its owner. In a fork of the process: nothing."""
        if self._owner_pid != os.getpid():
            return
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> "AsyncEngine":
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> "AsyncEngine":
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    # --- between threads --------------------------------------------------------------------------------------------

    def _enqueue_job(self, job: Callable[[], None], *, ignore_closed: bool = False) -> None:
        """Have the thread do something before its next step. RuntimeError if it has ended, unless `late`."""
        if self._owner_pid != os.getpid():
            if ignore_closed:
                return
            self.engine._access_guard.check()
        with self._condition:
            if not self._closed:
                self._jobs.append(job)
                self._condition.notify()
            elif not ignore_closed:
                raise RuntimeError("this AsyncEngine was closed")

    async def _call_on_thread(self, fn: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def job() -> None:
            try:
                done = partial(_resolve_future, answer, fn(), None)
            except BaseException as e:
                done = partial(_resolve_future, answer, None, e)
            self._add_callback(loop, done)

        self._enqueue_job(job)
        return await answer

    # --- the thread -------------------------------------------------------------------------------------------------

    def _thread_main(self) -> None:
        self.engine._access_guard.thread_id = threading.get_ident()
        try:
            self._run_loop()
        finally:
            self.engine._access_guard.release()

    def _run_loop(self) -> None:
        if self.engine.device.type == "cuda":
            torch.cuda.set_device(self.engine.device)  # is a thread's own
        closed = False
        while not closed:
            with self._condition:
                self._condition.wait_for(lambda: self._jobs or self._closed or self._can_step())
                jobs, self._jobs, closed = self._jobs, [], self._closed
            try:
                for job in jobs:
                    with suppress(Exception):  # of those without an answer: it concerns who has posted it alone
                        job()
                if closed:
                    self.engine._abort_all()
                if jobs or closed:
                    self._deliver_events(self._drain_events())
                if not closed and self._can_step():
                    self._deliver_events(self.engine.step())
            except BaseException as e:  # everything ends, and the engine can go on
                with suppress(RuntimeError):  # of ranks that are gone
                    self.engine._abort_all()
                self._deliver_events(self._drain_events(), e)

    def _can_step(self) -> bool:
        """Whether a step may be done and has something to do; it waits while memory is given back."""
        e = self.engine
        return not self._paused and e.has_unfinished_requests and all(r.resident for r in e._releasable_memory.values())

    def _drain_events(self) -> list[Event]:
        """Events that need no step."""
        events, self.engine._pending_events = self.engine._pending_events, []
        return events

    def _deliver_events(self, events: list[Event], error: BaseException | None = None) -> None:
        """Events to those who wait for them, and an error to those whom it has ended."""
        told: dict[AsyncRequest, list[Event]] = {}
        failed = set[AsyncRequest]() if error is None else set(self._requests.values())
        for event in events:
            if (request := self._requests.get(event.request_id)) is None:
                continue
            if event.output is not None:
                del self._requests[event.request_id]
                request._num_unfinished -= 1
            elif request._final_only:
                continue
            told.setdefault(request, []).append(event)
        if error is not None:
            self._requests.clear()
            # Who has all of its outputs, none of them cut short, lost nothing.
            failed -= {
                r for r, some in told.items() if not r._num_unfinished and all(_is_complete(e.output) for e in some)
            }
        for request in {**told, **dict.fromkeys(failed)}:
            cause = error if request in failed else None
            ended = not request._num_unfinished or cause is not None
            self._add_callback(request._loop, partial(request._deliver, told.get(request, []), ended, cause))
        if self._drain_callbacks and not self.engine.has_unfinished_requests:
            for tell in self._drain_callbacks:
                tell()
            self._drain_callbacks = []
        self._flush_callbacks()

    def _add_callback(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        """Have a loop do something; all that one step has for it goes together."""
        self._callbacks_by_loop.setdefault(loop, []).append(callback)

    def _flush_callbacks(self) -> None:
        outbox, self._callbacks_by_loop = self._callbacks_by_loop, {}
        for loop, some in outbox.items():
            try:
                loop.call_soon_threadsafe(_run_callbacks, some)
            except RuntimeError:  # it was closed, and nobody waits any more
                gone = [id for id, r in self._requests.items() if r._loop is loop]
                for id in gone:
                    del self._requests[id]
                with suppress(RuntimeError):  # of ranks that are gone, which the next step says
                    self.engine._abort_silently(gone)


def _is_complete(output: Output | None) -> bool:
    return output is None or all(c.finish_reason != "abort" for c in output.completions)


def _run_callbacks(callbacks: list[Callable[[], None]]) -> None:
    for f in callbacks:
        f()


def _resolve_future(future: asyncio.Future, value: Any, error: BaseException | None) -> None:
    if future.done():  # cancelled
        return
    if error is None:
        future.set_result(value)
    else:  # a future takes no StopIteration
        future.set_exception(RuntimeError(repr(error)) if isinstance(error, StopIteration) else error)
