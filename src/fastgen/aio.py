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

from fastgen import exchange
from fastgen.config import SamplingParams, unknown
from fastgen.engine import Engine
from fastgen.models import weights
from fastgen.request import Event, Output, pairs
from fastgen.tokenizer import Prompt
from fastgen.types import Params

T = TypeVar("T")
Many = Prompt | Sequence[Prompt]
Each = SamplingParams | Sequence[SamplingParams] | None


class Request:
    """What some of an engine's requests add as they run: `async for` gives events, `output` waits for the end of one.

    For the event loop that it was made in. Cancelling who waits for it aborts it; `close` does so too.
    """

    def __init__(self, owner: "AsyncEngine", loop: asyncio.AbstractEventLoop, whole: bool) -> None:
        self.ids: list[int] = []  # of the engine's requests
        self._owner, self._loop, self._whole = owner, loop, whole  # `whole`: only last events are wanted
        self._running = 0  # how many of them; the engine's thread counts
        self._events, self._outputs = deque[Event](), dict[int, Output]()
        self._news, self._ended, self._error = asyncio.Event(), False, None

    @property
    def id(self) -> int:
        """Of the first; `add` makes one."""
        return self.ids[0]

    def __aiter__(self) -> "Request":
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self._ended:
                self._raise()
                raise StopAsyncIteration
            await self._wait()
        return self._events.popleft()

    async def output(self, index: int = 0) -> Output:
        """Of the index-th request, once it has ended."""
        id = self.ids[index]
        while id not in self._outputs:
            if self._ended:
                self._raise()
                raise RuntimeError(f"request {id} was left before its end, and aborted")
            await self._wait()
        output = self._outputs[id]
        if not _complete(output):
            self._raise()
        return output

    def close(self) -> None:
        """Abort what still runs; nobody hears of it any more."""
        if self._ended:
            return
        self._ended = True
        self._events.clear()
        self._news.set()
        self._owner._post(self._leave, late=True)

    async def _wait(self) -> None:
        self._news.clear()
        try:
            await self._news.wait()
        except asyncio.CancelledError:
            self.close()
            raise

    def _raise(self) -> None:
        if self._error is not None:
            raise RuntimeError(f"a step failed, and this request ended with it: {self._error!r}") from self._error

    def _take(self, events: list[Event], ended: bool, error: BaseException | None) -> None:
        """From the engine's thread, in the loop's."""
        if not self._ended:
            self._events += events
            self._outputs |= {e.request_id: e.output for e in events if e.output is not None}
            self._ended, self._error = ended, error
            self._news.set()

    def _leave(self) -> None:
        """In the engine's thread."""
        left = [id for id in self.ids if self._owner._requests.get(id) is self]
        for id in left:
            del self._owner._requests[id]
        self._owner.engine._abort(left)


class AsyncEngine:
    """An engine that a thread steps while there is something to do, for any number of coroutines, loops and threads.

    While this lives the engine is its thread's: `call` reaches it, and every other caller is refused (RuntimeError).
    `close()` (or `with`, or `async with`) aborts what runs and ends the thread; the engine is its owner's again.
    Nothing slows a step down for consumers that do not keep up: what they have not read waits in memory.
    """

    def __init__(self, engine: Engine | Any) -> None:
        if not isinstance(engine, Engine):
            raise ValueError(f"AsyncEngine takes an Engine (Engine.from_pretrained(…) makes one), not {engine!r:.200}")
        if engine.group is not None and engine._crew is None:
            raise ValueError(
                "AsyncEngine: in a group that was there every rank makes the same calls in the same order, which "
                "coroutines do not; take Engine(…, tensor_parallel=N), which starts the other ranks itself"
            )
        self.engine = engine
        self._process = os.getpid()
        engine._owner.hold()
        self._changed = threading.Condition()  # of the next two
        self._jobs, self._closed = list[Callable[[], None]](), False
        self._paused = self._draining = False  # these, and all that follows, are the thread's own
        self._requests: dict[int, Request] = {}  # those that run, by id
        self._outbox: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}
        self._drained: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._run, name="fastgen", daemon=True)
        try:
            self._thread.start()
        except BaseException:
            engine._owner.let_go()
            raise
        atexit.register(self.close)  # a thread that is in torch when Python ends takes the process down

    # --- requests ---------------------------------------------------------------------------------------------------

    async def generate(
        self, prompts: Many, sampling: Each = None, *, on_error: str = "raise"
    ) -> AsyncIterator[tuple[int, Output]]:
        """(index, output) of one or many prompts, as they finish. Leaving the loop early aborts the others.

        `on_error` "skip": prompts that cannot run get an output with `error`, as from `Engine.generate`.
        """
        await self._compile_ahead(prompts, sampling)
        request = await self._follow(lambda e: e._add_all(prompts, sampling, live=False, on_error=on_error), whole=True)
        place = {id: i for i, id in enumerate(request.ids)}
        try:
            async for event in request:
                if event.output is not None:
                    yield place[event.request_id], event.output
        finally:
            request.close()

    async def stream(self, prompts: Many, sampling: Each = None, *, on_error: str = "raise") -> AsyncIterator[Event]:
        """Events of one or many prompts as they come. Leaving the loop early aborts what is not finished.

        `on_error` as for `generate`.
        """
        await self._compile_ahead(prompts, sampling)
        request = await self._follow(lambda e: e._add_all(prompts, sampling, live=True, on_error=on_error))
        try:
            async for event in request:
                yield event
        finally:
            request.close()

    async def add(self, prompt: Prompt, sampling: SamplingParams | None = None, *, live: bool = True) -> Request:
        """Queue a request. `live` false: only its last event is told. ValueError for what can never run."""
        await self._compile_ahead([prompt], sampling)
        return await self._follow(lambda e: [e.add(prompt, sampling, live=live)], whole=not live)

    async def _compile_ahead(self, prompts: Many, sampling: Each) -> None:
        """Compiles grammars beside the steps, for the requests that follow. Whoever leaves ends that."""
        if sampling is None or (isinstance(sampling, SamplingParams) and sampling.grammar is None):
            return
        stop = threading.Event()
        try:
            with suppress(ValueError):  # which the request itself gets at once
                for _, params in pairs(prompts, sampling):
                    if params.grammar is not None:
                        await asyncio.to_thread(self.engine._compile_ahead, params, stop)
        except asyncio.CancelledError:
            stop.set()
            raise

    async def follow(self, f: Callable[..., int | Sequence[int]], *args: Any, **named: Any) -> Request:
        """The requests whose ids f(engine, …) returns, from their first event on: `follow(Engine.fork, id, 4)`."""

        def ids(engine: Engine) -> list[int]:
            found = f(engine, *args, **named)
            found = [found] if isinstance(found, int) else list(found)
            running = {s.output.request_id for s in engine._samples.values()} - self._requests.keys()
            if wrong := set(found) - running:
                raise ValueError(f"follow: requests {sorted(wrong)} do not run here, or are followed already")
            return found

        return await self._follow(ids)

    async def _follow(self, f: Callable[[Engine], Iterable[int]], *, whole: bool = False) -> Request:
        request = Request(self, asyncio.get_running_loop(), whole)

        def begin() -> None:
            if self._draining:
                raise RuntimeError("the engine drains, and takes new requests only after resume()")
            request.ids = [*f(self.engine)]
            self._requests |= dict.fromkeys(request.ids, request)
            request._running = len(request.ids)
            request._ended = not request.ids

        try:
            await self._ask(begin)
        except asyncio.CancelledError:
            request.close()  # behind `begin`
            raise
        return request

    async def abort(self, id: int) -> Output | None:
        """End a request now; what it has so far. Who waits for it gets the same. None if it is not running."""
        return await self.call(Engine.abort, id)

    async def abort_all(self) -> dict[int, Output]:
        """End all requests now; what each has so far."""
        return await self.call(lambda e: e._end({s.output.request_id for s in e._samples.values()}))

    # --- control ----------------------------------------------------------------------------------------------------

    async def call(self, f: Callable[..., T], *args: Any, **named: Any) -> T:
        """f(engine, …), between two steps: `call(Engine.touch)`, `call(Engine.update_params, tensors)`, …"""
        return await self._ask(lambda: f(self.engine, *args, **named))

    async def update_params(
        self,
        source: Any,
        *,
        device: torch.device | str | None = None,
        partial: bool = False,
        recompute: bool = False,
        finite: bool = True,
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
                pairs = weights.named(source, engine.spec) if isinstance(source, Params) else source
                tensors, error = exchange.staged(pairs, device), None
                weights.check(tensors, engine.spec, engine.dtype, source="update_params", partial=partial)
                if finite:
                    weights.check_update(engine.params, engine.spec, tensors, engine._place, "update_params")
            except BaseException as e:
                tensors, error = [], e
            with suppress(RuntimeError):  # the loop was closed, and nobody waits any more
                loop.call_soon_threadsafe(_settle, staged, tensors, error)

        threading.Thread(target=receive, name="fastgen-update", daemon=True).start()
        how = {"partial": partial, "recompute": recompute, "finite": False}  # they have been looked at
        return await self.call(Engine.update_params, await staged, **how)

    async def pause(self, mode: str = "keep") -> None:
        """No step begins until `resume`, and none is running any more.

        "keep" freezes the requests, to go on as if nothing had been; "abort" ends them with what they have. Others may
        be added meanwhile, and `call` works.
        """
        if mode not in ("keep", "abort"):
            raise ValueError(unknown("mode", mode, ["keep", "abort"]))

        def stop() -> None:
            self._paused = True
            try:
                if self.engine._crew is not None:
                    self.engine._crew.tell("_receive")
                self.engine._receive()
            except BaseException as e:
                self.engine._fail()
                self._hand_out(self._taken(), e)
                raise
            if mode == "abort":
                self.engine._abort_all()

        await self._ask(stop)

    async def resume(self) -> None:
        """Go on after `pause`, and take new requests after `drain`."""

        def go() -> None:
            self._paused = self._draining = False

        await self._ask(go)

    async def drain(self) -> None:
        """Take no new requests until `resume`, and wait for the end of those there are."""
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def begin() -> None:
            self._draining = True
            self._drained.append(lambda: self._send(loop, partial(_settle, done, None, None)))

        self._post(begin)
        await done

    def close(self) -> None:
        """Abort what runs, end the thread, and leave the engine to its owner. In a fork of the process: nothing."""
        if self._process != os.getpid():
            return
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> "AsyncEngine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> "AsyncEngine":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    # --- between threads --------------------------------------------------------------------------------------------

    def _post(self, job: Callable[[], None], *, late: bool = False) -> None:
        """Have the thread do something before its next step. RuntimeError if it has ended, unless `late`."""
        if self._process != os.getpid():
            if late:
                return
            self.engine._owner.check()
        with self._changed:
            if not self._closed:
                self._jobs.append(job)
                self._changed.notify()
            elif not late:
                raise RuntimeError("this AsyncEngine was closed")

    async def _ask(self, f: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def job() -> None:
            try:
                done = partial(_settle, answer, f(), None)
            except BaseException as e:
                done = partial(_settle, answer, None, e)
            self._send(loop, done)

        self._post(job)
        return await answer

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self.engine._owner.thread = threading.get_ident()
        try:
            self._loop()
        finally:
            self.engine._owner.let_go()

    def _loop(self) -> None:
        if self.engine.device.type == "cuda":
            torch.cuda.set_device(self.engine.device)  # is a thread's own
        closed = False
        while not closed:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed or self._ready())
                jobs, self._jobs, closed = self._jobs, [], self._closed
            try:
                for job in jobs:
                    with suppress(Exception):  # of those without an answer: it concerns who has posted it alone
                        job()
                if closed:
                    self.engine._abort_all()
                if jobs or closed:
                    self._hand_out(self._taken())
                if not closed and self._ready():
                    self._hand_out(self.engine.step())
            except BaseException as e:  # everything ends, and the engine can go on
                with suppress(RuntimeError):  # of ranks that are gone
                    self.engine._abort_all()
                self._hand_out(self._taken(), e)

    def _ready(self) -> bool:
        """Whether a step may be done and has something to do; it waits while memory is given back."""
        e = self.engine
        return not self._paused and e.unfinished and all(r.held for r in e._regions.values())

    def _taken(self) -> list[Event]:
        """Events that need no step."""
        events, self.engine._undelivered = self.engine._undelivered, []
        return events

    def _hand_out(self, events: list[Event], error: BaseException | None = None) -> None:
        """Events to those who wait for them, and an error to those whom it has ended."""
        told: dict[Request, list[Event]] = {}
        failed = set[Request]() if error is None else set(self._requests.values())
        for event in events:
            if (request := self._requests.get(event.request_id)) is None:
                continue
            if event.output is not None:
                del self._requests[event.request_id]
                request._running -= 1
            elif request._whole:
                continue
            told.setdefault(request, []).append(event)
        if error is not None:
            self._requests.clear()
            # Who has all of its outputs, none of them cut short, lost nothing.
            failed -= {r for r, some in told.items() if not r._running and all(_complete(e.output) for e in some)}
        for request in {**told, **dict.fromkeys(failed)}:
            cause = error if request in failed else None
            ended = not request._running or cause is not None
            self._send(request._loop, partial(request._take, told.get(request, []), ended, cause))
        if self._drained and not self.engine.unfinished:
            for tell in self._drained:
                tell()
            self._drained = []
        self._flush()

    def _send(self, loop: asyncio.AbstractEventLoop, f: Callable[[], None]) -> None:
        """Have a loop do something; all that one step has for it goes together."""
        self._outbox.setdefault(loop, []).append(f)

    def _flush(self) -> None:
        outbox, self._outbox = self._outbox, {}
        for loop, some in outbox.items():
            try:
                loop.call_soon_threadsafe(_do, some)
            except RuntimeError:  # it was closed, and nobody waits any more
                gone = [id for id, r in self._requests.items() if r._loop is loop]
                for id in gone:
                    del self._requests[id]
                with suppress(RuntimeError):  # of ranks that are gone, which the next step says
                    self.engine._abort(gone)


def _complete(output: Output | None) -> bool:
    return output is None or all(c.finish_reason != "abort" for c in output.completions)


def _do(some: list[Callable[[], None]]) -> None:
    for f in some:
        f()


def _settle(future: asyncio.Future, value: Any, error: BaseException | None) -> None:
    if future.done():  # cancelled
        return
    if error is None:
        future.set_result(value)
    else:  # a future takes no StopIteration
        future.set_exception(RuntimeError(repr(error)) if isinstance(error, StopIteration) else error)
