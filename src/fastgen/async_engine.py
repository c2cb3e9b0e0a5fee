"""AsyncEngine, an engine for asyncio: one thread steps it, and coroutines of any event loop reach it between steps.

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
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import torch

from fastgen.checkpoint import weights
from fastgen.config import unknown_name_message
from fastgen.core.request import Event, Output
from fastgen.core.types import Params
from fastgen.engine import Engine
from fastgen.event_stream import OneOrManyPrompts, OneOrManySampling, explain_unknown_arguments, pair_prompts
from fastgen.sampling_params import SamplingParams
from fastgen.text.chat_template import Message
from fastgen.text.tokenizer import Prompt, to_chat_prompts
from fastgen.training import weight_sync

T = TypeVar("T")


class AsyncRequest:
    """Some requests of an AsyncEngine: `async for` yields their events, `output` waits for one to end.

    For the event loop that made it. Cancelling a coroutine that waits for it aborts the requests; `close` does so too.
    """

    def __init__(self, async_engine: "AsyncEngine", loop: asyncio.AbstractEventLoop, final_only: bool) -> None:
        self.request_ids: list[int] = []
        self._async_engine, self._loop = async_engine, loop
        self._final_only = final_only  # whether only last events are delivered
        self._num_unfinished = 0  # requests; the engine's thread counts
        self._events, self._outputs = deque[Event](), dict[int, Output]()
        self._wake_up_event, self._finished, self._error = asyncio.Event(), False, None

    @property
    def request_id(self) -> int:
        """The id of the first request; `add` makes one."""
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
        """Waits for the index-th request to end and returns its output."""
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
        """Aborts unfinished requests and drops their events."""
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
        """Takes what the engine's thread posted, in the event loop's thread."""
        if not self._finished:
            self._events += events
            self._outputs |= {e.request_id: e.output for e in events if e.output is not None}
            self._finished, self._error = finished, error
            self._wake_up_event.set()

    def _abort_unfinished(self) -> None:
        """Abandons the requests, in the engine's thread."""
        self._async_engine._abandon(id for id in self.request_ids if self._async_engine._requests.get(id) is self)


class AsyncEngine:
    """Runs an engine in a thread, for any number of coroutines, event loops and threads.

    Until `close()` (or the end of `with` or `async with`) the engine belongs to this thread: `call` reaches it, and
    every other caller gets a RuntimeError. `close` aborts unfinished requests and ends the thread. Slow consumers slow
    no step down: events that they have not read stay in memory.
    """

    def __init__(self, engine: Engine | Any) -> None:
        if not isinstance(engine, Engine):
            raise ValueError(f"AsyncEngine takes an Engine (Engine.from_pretrained(…) makes one), not {engine!r:.200}")
        if engine.tp_group is not None and not engine.ranks.has_workers:
            raise ValueError(
                "AsyncEngine: every rank of a process group makes the same calls in the same order, which coroutines "
                "do not; take Engine(…, tensor_parallel=N), which starts the other ranks itself"
            )
        self.engine = engine
        self._owner_pid = os.getpid()
        engine.access_guard.acquire()
        self._condition = threading.Condition()  # of the next two
        self._jobs, self._closed = list[Callable[[], None]](), False
        # All of these belong to the thread.
        self._paused = self._draining = False
        self._requests: dict[int, AsyncRequest] = {}  # unfinished ones, by id
        self._callbacks_by_loop: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}
        self._drain_futures: list[Future[None]] = []
        self._thread = threading.Thread(target=self._thread_main, name="fastgen", daemon=True)
        try:
            self._thread.start()
        except BaseException:
            engine.access_guard.release()
            raise
        atexit.register(self.close)  # a thread that is inside torch when Python ends takes the process down

    # --- requests ---------------------------------------------------------------------------------------------------

    @explain_unknown_arguments
    async def generate(
        self, prompts: OneOrManyPrompts, sampling: OneOrManySampling = None, *, on_error: str = "raise"
    ) -> AsyncIterator[tuple[int, Output]]:
        """Yields (index of the prompt, output) as requests finish. Leaving the loop early aborts the others.

        `on_error` "skip": prompts that cannot run get an output with `error`, as from `Engine.generate`.
        """
        await self._precompile_grammars(prompts, sampling)
        request = await self._submit_and_track(
            lambda e: e.add_many(prompts, sampling, stream_text=False, on_error=on_error), final_only=True
        )
        index = {id: i for i, id in enumerate(request.request_ids)}
        try:
            async for event in request:
                if event.output is not None:
                    yield index[event.request_id], event.output
        finally:
            request.close()

    def chat(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], sampling: OneOrManySampling = None, *,
        on_error: str = "raise", **template_options: Any,
    ) -> AsyncIterator[tuple[int, Output]]:  # fmt: skip
        """Returns an iterator over (index of the conversation, output) of one or many conversations.

        `template_options` are those of `Engine.chat`: `chat_template`, `chat_template_kwargs`, `tools`,
        `add_generation_prompt` and `continue_final_message`. `stream` takes a `ChatPrompt` with them.
        """
        return self.generate(to_chat_prompts(messages, **template_options), sampling, on_error=on_error)

    @explain_unknown_arguments
    async def stream(
        self, prompts: OneOrManyPrompts, sampling: OneOrManySampling = None, *, on_error: str = "raise"
    ) -> AsyncIterator[Event]:
        """Yields the events of one or many prompts. Leaving the loop early aborts what is not finished.

        `on_error` as for `generate`.
        """
        await self._precompile_grammars(prompts, sampling)
        request = await self._submit_and_track(
            lambda e: e.add_many(prompts, sampling, stream_text=True, on_error=on_error)
        )
        try:
            async for event in request:
                yield event
        finally:
            request.close()

    async def add(
        self, prompt: Prompt, sampling: SamplingParams | None = None, *, stream_text: bool = True
    ) -> AsyncRequest:
        """Queues a request. `stream_text` false delivers its last event only. Raises ValueError if it can never run."""
        await self._precompile_grammars([prompt], sampling)
        return await self._submit_and_track(
            lambda e: [e.add(prompt, sampling, stream_text=stream_text)], final_only=not stream_text
        )

    async def _precompile_grammars(self, prompts: OneOrManyPrompts, sampling: OneOrManySampling) -> None:
        """Compiles grammars concurrently with the steps. Cancelling the coroutine cancels the compilation."""
        if sampling is None or (isinstance(sampling, SamplingParams) and sampling.grammar is None):
            return
        cancel_event, precompile = threading.Event(), self.engine.grammars.precompile
        try:
            with suppress(ValueError):  # which the request itself raises again
                for _, params in pair_prompts(prompts, sampling):
                    if params.grammar is not None:
                        await asyncio.to_thread(precompile, params, cancel_event)
        except asyncio.CancelledError:
            cancel_event.set()
            raise

    async def follow(self, fn: Callable[..., int | Sequence[int]], *args: Any, **kwargs: Any) -> AsyncRequest:
        """Returns the requests whose ids fn(engine, …) returns, with all events: `follow(Engine.fork, id, 4)`."""

        def submit(engine: Engine) -> list[int]:
            result = fn(engine, *args, **kwargs)
            request_ids = [result] if isinstance(result, int) else list(result)
            if wrong := set(request_ids) - (engine.core.running_request_ids - self._requests.keys()):
                raise ValueError(f"follow: requests {sorted(wrong)} do not run here, or are followed already")
            return request_ids

        return await self._submit_and_track(submit)

    async def _submit_and_track(
        self, submit: Callable[[Engine], Iterable[int]], *, final_only: bool = False
    ) -> AsyncRequest:
        request = AsyncRequest(self, asyncio.get_running_loop(), final_only)

        def begin() -> None:
            if self._draining:
                raise RuntimeError("the engine drains, and takes new requests only after resume()")
            request.request_ids = [*submit(self.engine)]
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
        """Ends a request now and returns its output so far, as its AsyncRequest does. None if it is not running."""
        return await self.call(Engine.abort, request_id)

    async def abort_all(self) -> dict[int, Output]:
        """Ends all requests now and returns their outputs so far."""
        return await self.call(lambda e: e.core.abort(e.core.running_request_ids))

    # --- control ----------------------------------------------------------------------------------------------------

    async def call(self, fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Returns fn(engine, …), called between two steps: `call(Engine.params_changed)`, `call(Engine.sleep)`, …"""
        return await self._call_on_thread(lambda: fn(self.engine, *args, **kwargs))

    async def update_params(
        self, source: Any, *, device: torch.device | str | None = None, partial: bool = False, recompute: bool = False,
        check_finite: bool = True,
    ) -> int:  # fmt: skip
        """Calls `Engine.update_params` with the tensors of `source`, which are received concurrently with the steps.

        For late or slow sources, such as `receive(group)`: a thread copies all tensors to `device`, by default the
        device that each is on, before any is written between two steps. Errors of the source or its tensors are raised
        here; the parameters then stay as they are, and requests go on.
        """
        if self._closed:
            raise RuntimeError("this AsyncEngine was closed")
        engine, config, staged = self.engine, self.engine.model_config, Future[list[tuple[str, torch.Tensor]]]()

        def receive() -> list[tuple[str, torch.Tensor]]:
            if engine.device.type == "cuda":
                torch.cuda.set_device(engine.device)  # each thread has its own
            pairs = weights.named_weights(source, config) if isinstance(source, Params) else source
            tensors = weight_sync.stage_named_tensors(pairs, device)
            checks: Any = {"partial": partial, "check_finite": check_finite, "tp_shard": engine.tp_shard}
            weights.check_update(engine.params, config, tensors, source="update_params", **checks)
            return tensors

        threading.Thread(target=_run, args=(staged, receive), name="fastgen-update", daemon=True).start()
        options = {"partial": partial, "recompute": recompute, "check_finite": False}  # `receive` has checked
        return await self.call(Engine.update_params, await asyncio.wrap_future(staged), **options)

    async def pause(self, mode: str = "keep") -> None:
        """Finishes the step in flight and starts none until `resume`.

        `mode` "keep" freezes the requests, which then go on as if nothing had happened; "abort" ends them with what
        they have. Requests may be added meanwhile, and `call` works.
        """
        if mode not in ("keep", "abort"):
            raise ValueError(unknown_name_message("mode", mode, ["keep", "abort"]))

        def stop() -> None:
            self._paused = True
            core = self.engine.core
            try:
                core.finish_step_on_all_ranks()
            except BaseException as e:
                self._deliver_events(core.drain_events(), e)
                raise
            if mode == "abort":
                core.abort(core.running_request_ids)

        await self._call_on_thread(stop)

    async def resume(self) -> None:
        """Ends `pause`, and accepts new requests after `drain`."""

        def go() -> None:
            self._paused = self._draining = False

        await self._call_on_thread(go)

    async def drain(self) -> None:
        """Refuses new requests until `resume`, and waits for the running ones to end."""
        done = Future[None]()

        def begin() -> None:
            self._draining = True
            self._drain_futures.append(done)

        self._enqueue_job(begin)
        await asyncio.wrap_future(done)

    def close(self) -> None:
        """Aborts unfinished requests, ends the thread and releases the engine. Does nothing in a forked process."""
        if self._owner_pid != os.getpid():
            return
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> "AsyncEngine":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    async def __aenter__(self) -> "AsyncEngine":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await asyncio.to_thread(self.close)

    # --- between threads --------------------------------------------------------------------------------------------

    def _enqueue_job(self, job: Callable[[], None], *, ignore_closed: bool = False) -> None:
        """Has the thread run a job before its next step. Raises RuntimeError after `close`, unless `ignore_closed`."""
        if self._owner_pid != os.getpid():
            if ignore_closed:
                return
            self.engine.access_guard.check()
        with self._condition:
            if not self._closed:
                self._jobs.append(job)
                self._condition.notify()
            elif not ignore_closed:
                raise RuntimeError("this AsyncEngine was closed")

    async def _call_on_thread(self, fn: Callable[[], T]) -> T:
        future = Future[T]()
        self._enqueue_job(partial(_run, future, fn))
        return await asyncio.wrap_future(future)

    # --- the thread -------------------------------------------------------------------------------------------------

    def _thread_main(self) -> None:
        self.engine.access_guard.thread_id = threading.get_ident()
        try:
            self._run_loop()
        finally:
            self.engine.access_guard.release()

    def _run_loop(self) -> None:
        if self.engine.device.type == "cuda":
            torch.cuda.set_device(self.engine.device)  # each thread has its own
        core, closed = self.engine.core, False
        while not closed:
            with self._condition:
                self._condition.wait_for(lambda: self._jobs or self._closed or self._can_step())
                jobs, self._jobs, closed = self._jobs, [], self._closed
            try:
                for job in jobs:
                    with suppress(Exception):  # of jobs without a future
                        job()
                if closed:
                    core.abort(core.running_request_ids)
                if jobs or closed:
                    self._deliver_events(core.drain_events())
                if not closed and self._can_step():
                    self._deliver_events(self.engine.step())
            except BaseException as e:  # every request ends, and the engine can go on
                with suppress(RuntimeError):  # of ranks that have ended
                    core.abort(core.running_request_ids)
                self._deliver_events(core.drain_events(), e)

    def _can_step(self) -> bool:
        """Returns whether a step may run and has something to do; none runs while memory is released."""
        return not self._paused and self.engine.has_unfinished_requests and self.engine.memory.resident

    def _abandon(self, request_ids: Iterable[int]) -> None:
        """Drops requests that have no reader any more; the engine aborts them with its next call."""
        ids = frozenset(request_ids)
        for id in ids:
            del self._requests[id]
        if ids:
            self.engine.core.abandoned.append(ids)

    def _deliver_events(self, events: list[Event], error: BaseException | None = None) -> None:
        """Posts events to the requests' loops, and an error to the requests that it ended."""
        events_of: dict[AsyncRequest, list[Event]] = {}
        failed = set[AsyncRequest]() if error is None else set(self._requests.values())
        for event in events:
            if (request := self._requests.get(event.request_id)) is None:
                continue
            if event.output is not None:
                del self._requests[event.request_id]
                request._num_unfinished -= 1
            elif request._final_only:
                continue
            events_of.setdefault(request, []).append(event)
        if error is not None:
            self._requests.clear()
            # A request that has all of its outputs, none of them cut short, lost nothing.
            failed -= {
                r for r, new in events_of.items() if not r._num_unfinished and all(_is_complete(e.output) for e in new)
            }
        for request in {**events_of, **dict.fromkeys(failed)}:
            cause = error if request in failed else None
            finished = not request._num_unfinished or cause is not None
            self._add_callback(request._loop, partial(request._deliver, events_of.get(request, []), finished, cause))
        self._flush_callbacks()
        if not self.engine.has_unfinished_requests:
            for future in self._drain_futures:
                _run(future, lambda: None)
            self._drain_futures.clear()

    def _add_callback(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        """Adds a callback for a loop; all callbacks of one step are posted together."""
        self._callbacks_by_loop.setdefault(loop, []).append(callback)

    def _flush_callbacks(self) -> None:
        callbacks_by_loop, self._callbacks_by_loop = self._callbacks_by_loop, {}
        for loop, callbacks in callbacks_by_loop.items():
            try:
                loop.call_soon_threadsafe(_run_callbacks, callbacks)
            except RuntimeError:  # the loop was closed
                self._abandon([id for id, r in self._requests.items() if r._loop is loop])


def _is_complete(output: Output | None) -> bool:
    return output is None or all(c.finish_reason != "abort" for c in output.completions)


def _run_callbacks(callbacks: list[Callable[[], None]]) -> None:
    for f in callbacks:
        f()


def _run(future: "Future[T]", fn: Callable[[], T]) -> None:
    """Sets a future to what fn returns or raises. Calls nothing if the future was cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(fn())
    except BaseException as e:  # an asyncio future takes no StopIteration
        future.set_exception(RuntimeError(repr(e)) if isinstance(e, StopIteration) else e)
