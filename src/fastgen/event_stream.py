"""`generate`, `stream` and `as_completed`: calls that step an engine, or several replicas, until their requests end."""

import weakref
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing, suppress

from tqdm.auto import tqdm

from fastgen.config import SamplingParams
from fastgen.core.request import Event, Output
from fastgen.core.tokenizer import Prompt
from fastgen.thread_safety import AccessGuard, exclusive


class GenerateMethods:
    """The calls for many prompts, which `Engine` and `Replicas` share."""

    _access_guard: AccessGuard
    _pending_aborts: deque[frozenset[int]]  # requests whose streams were dropped
    _pending_events: list[Event]

    def step(self) -> list[Event]:
        """Returns the events of one step, or of all messages of replicas."""
        raise NotImplementedError

    def _add_requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        *,
        stream_text: bool,
        on_error: str,
    ) -> list[int]:
        """Adds a request per prompt; returns their ids."""
        raise NotImplementedError

    def _has_events_for(self, request_ids: Collection[int]) -> bool:
        """Returns whether any of these requests will have events."""
        raise NotImplementedError

    def _drain_pending_aborts(self) -> None:
        """Aborts requests whose streams were dropped."""
        raise NotImplementedError

    @exclusive("params", "cache")
    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_error: str = "raise",
    ) -> Iterator[Event]:
        """Returns an iterator over the events of one or many prompts; `request_id` counts from the first prompt's id.

        `on_error`: what to do about prompts that cannot run, as for `generate`.
        Leaving the loop early, or an interrupt, aborts what is not finished.
        """
        return EventStream(self, self._add_requests(prompts, sampling, stream_text=True, on_error=on_error))

    @exclusive("params", "cache")
    def as_completed(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_error: str = "raise",
    ) -> Iterator[tuple[int, Output]]:
        """Returns an iterator over (index of the prompt, output) of one or many prompts, as they finish.

        `on_error`: what to do about prompts that cannot run, as for `generate`.
        Leaving the loop early, or an interrupt, aborts what is not finished.
        """
        ids = self._add_requests(prompts, sampling, stream_text=False, on_error=on_error)
        return _outputs_as_completed(ids, EventStream(self, ids))

    @exclusive("params", "cache")
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        on_error: str = "raise",
    ) -> list[Output]:
        """Returns the outputs of one or many prompts in their order. `sampling` is one for all, or one for each.

        `progress` None shows a bar, on a terminal or in a notebook, when it takes longer than two seconds.

        `on_error` "raise": a prompt that cannot run raises ValueError, which names the prompt and the cause, and none
        of the prompts run. "skip": the others run, and the prompt's Output has the cause in `error` and finish reasons
        "error".
        """
        ids = self._add_requests(prompts, sampling, stream_text=False, on_error=on_error)
        with closing(EventStream(self, ids)) as events:
            return _collect_outputs(ids, events, progress)

    @exclusive("params", "cache")
    def _step_until_event(self, stream: "EventStream") -> None:
        """Steps until a stream has an event; other requests' events wait for their own next step."""
        stream.step_until_event()

    @exclusive()
    def _flush_pending_aborts(self) -> None:
        """Aborts requests whose streams were dropped, at once."""
        self._drain_pending_aborts()


class EventStream(Iterator[Event]):
    """The events of some requests, for which their engine is stepped.

    Requests that have not ended are aborted when the stream is closed or dropped.
    """

    def __init__(self, engine: GenerateMethods, request_ids: Sequence[int]) -> None:
        self._engine, self._unfinished_ids, self._events = engine, set(request_ids), deque[Event]()
        # The garbage collector may find the stream in any thread, within any call; the next call aborts the requests.
        self._finalizer = weakref.finalize(self, engine._pending_aborts.append, frozenset(request_ids))
        self._finalizer.atexit = False

    def __next__(self) -> Event:
        if self._engine._access_guard.closed:
            self._claim_events(self._engine._pending_events)  # `close` has aborted the requests
        elif not self._events:
            self._engine._step_until_event(self)
        if not self._events:
            raise StopIteration
        return self._events.popleft()

    def step_until_event(self) -> None:
        """Steps the engine, within one of its calls, until there is an event or all requests have ended."""
        try:
            while self._unfinished_ids and not self._events:
                events = self._engine.step()  # replaces the list of pending events
                self._engine._pending_events += self._claim_events(events)
                if not self._events and not self._engine._has_events_for(self._unfinished_ids):
                    self._unfinished_ids.clear()  # a caller of `step` has received their last events
        except BaseException:
            self._unfinished_ids.clear()
            self._finalizer()
            self._engine._drain_pending_aborts()
            raise
        if not self._unfinished_ids:
            self._finalizer.detach()

    def _claim_events(self, events: Sequence[Event]) -> list[Event]:
        """Keeps the events of this stream's requests; returns the others."""
        unfinished_ids = frozenset(self._unfinished_ids)
        self._events += [e for e in events if e.request_id in unfinished_ids]
        self._unfinished_ids -= {e.request_id for e in self._events if e.output is not None}
        return [e for e in events if e.request_id not in unfinished_ids]

    def close(self) -> None:
        """Aborts requests that have not ended: at once, unless another thread is inside a call of the engine."""
        self._unfinished_ids.clear()
        self._events.clear()
        if self._finalizer.alive:
            self._finalizer()
            with suppress(RuntimeError):
                self._engine._flush_pending_aborts()


def _outputs_as_completed(request_ids: Sequence[int], events: Iterable[Event]) -> Iterator[tuple[int, Output]]:
    """Yields the position in `request_ids` and the output of each request at its last event."""
    index = {id: i for i, id in enumerate(request_ids)}
    for event in events:
        if event.output is not None:
            yield index[event.request_id], event.output


def _collect_outputs(request_ids: Sequence[int], events: Iterable[Event], progress: bool | None) -> list[Output]:
    """Returns the outputs of requests, in the order of their ids, once all have ended."""
    outputs: dict[int, Output] = {}
    disable = None if progress is None else not progress
    with tqdm(total=len(request_ids), unit="request", delay=2, leave=False, disable=disable) as bar:
        for i, output in _outputs_as_completed(request_ids, events):
            outputs[i] = output
            bar.update()
    return [outputs[i] for i in range(len(request_ids))]
