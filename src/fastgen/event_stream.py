"""`generate`, `stream` and `as_completed`: calls that step an engine, or several replicas, until their requests end."""

import inspect
import re
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import fields
from functools import wraps
from typing import Any, Protocol, TypeVar, runtime_checkable

from tqdm.auto import tqdm

from fastgen.config import check_choice, unknown_name_message
from fastgen.core.request import Event, Output, rejected_output
from fastgen.sampling_params import SamplingParams
from fastgen.text.chat_template import Message, Tools
from fastgen.text.tokenizer import Prompt, to_chat_prompts, to_prompt_list
from fastgen.thread_safety import AccessGuard, exclusive
from fastgen.training.sleep import EngineMemory

T = TypeVar("T")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])
OneOrManyPrompts = Prompt | Sequence[Prompt]
OneOrManySampling = SamplingParams | Sequence[SamplingParams] | None


@runtime_checkable
class RequestQueue(Protocol):
    """The requests of an engine, or of replicas: an EngineCore, or Replicas themselves."""

    events: list[Event]  # that no call has returned yet
    abandoned: deque[frozenset[int]]  # ids of requests whose streams were dropped; the next step or submit aborts them

    def has_events_for(self, request_ids: Collection[int]) -> bool:
        """Returns whether there are, or will be, events of any of these requests."""
        ...

    def drain_aborts(self) -> None:
        """Aborts abandoned requests and drops their events."""
        ...


def explain_unknown_arguments(method: F) -> F:
    """Makes a method raise ValueError, with a hint, for keywords that are not its parameters."""
    parameters = inspect.signature(method).parameters

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in parameters:
                from fastgen.argument_hints import CALL_HINTS, SAMPLING_HINTS

                hints = {key: re.sub("^use ", "in SamplingParams, use ", hint) for key, hint in SAMPLING_HINTS.items()}
                hints |= {f.name: f"pass SamplingParams({f.name}=…) as sampling" for f in fields(SamplingParams)}
                names = [key for key in parameters if key != "self"]
                what = f"argument of {method.__name__}"
                raise ValueError(unknown_name_message(what, name, names, hints | CALL_HINTS))
        return method(*args, **kwargs)

    return call  # type: ignore[return-value]


class GenerateMethods:
    """The calls for many prompts, which Engine and Replicas share. As a context, `close` ends it."""

    access_guard: AccessGuard
    memory: EngineMemory

    def close(self) -> None:
        """Aborts all requests and frees everything."""
        raise NotImplementedError

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def requests(self) -> RequestQueue:
        """Where the requests wait and run, and their events are."""
        raise NotImplementedError

    def add_many(
        self, prompts: OneOrManyPrompts, sampling: OneOrManySampling = None, *, stream_text: bool = True,
        on_error: str = "raise",
    ) -> list[int]:  # fmt: skip
        """Queues one or many prompts at once and returns their ids; the options are as for `add` and `generate`."""
        raise NotImplementedError

    def step(self) -> list[Event]:
        """Returns the events of one step, or of all messages of replicas."""
        raise NotImplementedError

    @explain_unknown_arguments
    @exclusive("params", "cache")
    def stream(
        self, prompts: OneOrManyPrompts, sampling: OneOrManySampling = None, *, on_error: str = "raise"
    ) -> Iterator[Event]:
        """Returns an iterator over the events of one or many prompts; `request_id` counts from the first prompt's id.

        `on_error`: what to do about prompts that cannot run, as for `generate`.
        Leaving the loop early, or an interrupt, aborts what is not finished.
        """
        return EventStream(self, self.add_many(prompts, sampling, stream_text=True, on_error=on_error))

    @explain_unknown_arguments
    @exclusive("params", "cache")
    def as_completed(
        self,
        prompts: OneOrManyPrompts,
        sampling: OneOrManySampling = None,
        *,
        progress: bool | None = False,
        on_error: str = "raise",
    ) -> Iterator[tuple[int, Output]]:
        """Returns an iterator over (index of the prompt, output) of one or many prompts, as they finish.

        `progress`: whether to show a bar. `on_error`: what to do about prompts that cannot run. Both as for `generate`.
        Leaving the loop early, or an interrupt, aborts what is not finished.
        """
        ids = self.add_many(prompts, sampling, stream_text=False, on_error=on_error)
        return _outputs_as_completed(ids, EventStream(self, ids), progress)

    @explain_unknown_arguments
    @exclusive("params", "cache")
    def generate(
        self,
        prompts: OneOrManyPrompts,
        sampling: OneOrManySampling = None,
        *,
        progress: bool | None = None,
        on_error: str = "raise",
    ) -> list[Output]:
        """Returns the outputs of one or many prompts in their order. `sampling` is one for all, or one for each.

        `progress` None shows a bar, on a terminal or in a notebook, when it takes longer than two seconds: the finished
        requests, the generated tokens, and the tokens per second.

        `on_error` "raise": a prompt that cannot run raises ValueError, which names the prompt and the cause, and none
        of the prompts run. "skip": the others run, and the prompt's Output has the cause in `error` and finish reasons
        "error".
        """
        ids = self.add_many(prompts, sampling, stream_text=False, on_error=on_error)
        with closing(EventStream(self, ids)) as events:
            outputs = dict(_outputs_as_completed(ids, events, progress))
        return [outputs[i] for i in range(len(ids))]

    @explain_unknown_arguments
    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling: OneOrManySampling = None,
        *,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Tools = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        progress: bool | None = None,
        on_error: str = "raise",
    ) -> list[Output]:
        """Returns the answers to one conversation (a list of messages), or to several.

        The options of the chat template are those of `ChatPrompt`, which `stream`, `as_completed` and `add` take as a
        prompt; `progress` and `on_error` are as for `generate`.
        """
        options: Any = {
            "chat_template": chat_template, "chat_template_kwargs": chat_template_kwargs or {}, "tools": tools,
            "add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message,
        }  # fmt: skip
        prompts = to_chat_prompts(messages, **options)
        return self.generate(prompts, sampling, progress=progress, on_error=on_error)


class EventStream(Iterator[Event]):
    """Iterates over the events of some requests and steps their engine meanwhile.

    Requests that have not ended are aborted when the stream is closed or dropped.
    """

    def __init__(self, engine: GenerateMethods, request_ids: Sequence[int]) -> None:
        self.access_guard, self.memory, self._requests = engine.access_guard, engine.memory, engine.requests
        self._engine, self._unfinished_ids, self._events = engine, set(request_ids), deque[Event]()
        # The garbage collector may find the stream in any thread, within any call; a later one aborts the requests.
        self._finalizer = weakref.finalize(self, self._requests.abandoned.append, frozenset(request_ids))
        self._finalizer.atexit = False

    def __next__(self) -> Event:
        if self.access_guard.closed:
            self._claim_events(self._requests.events)  # `close` has aborted the requests
        elif not self._events:
            self._step_until_event()
        if not self._events:
            raise StopIteration
        return self._events.popleft()

    @exclusive("params", "cache")
    def _step_until_event(self) -> None:
        requests = self._requests
        try:
            while self._unfinished_ids and not self._events:
                others = self._claim_events(self._engine.step())
                requests.events += others  # for a later `step`
                if not self._events and not requests.has_events_for(self._unfinished_ids):
                    self._unfinished_ids.clear()  # a caller of `step` has received their last events
        except BaseException:
            self._unfinished_ids.clear()
            self._finalizer()
            requests.drain_aborts()
            raise
        if not self._unfinished_ids:
            self._finalizer.detach()

    def _claim_events(self, events: Sequence[Event]) -> list[Event]:
        """Keeps the events of this stream's requests. Returns the others."""
        unfinished_ids = frozenset(self._unfinished_ids)
        self._events += [e for e in events if e.request_id in unfinished_ids]
        self._unfinished_ids -= {e.request_id for e in self._events if e.output is not None}
        return [e for e in events if e.request_id not in unfinished_ids]

    @exclusive()
    def _drain_aborts(self) -> None:
        self._requests.drain_aborts()

    def close(self) -> None:
        """Aborts requests that have not ended: at once, or with the next step if another thread is inside a call."""
        self._unfinished_ids.clear()
        self._events.clear()
        if self._finalizer.alive:
            self._finalizer()
            with suppress(RuntimeError):
                self._drain_aborts()


def pair_prompts(prompts: OneOrManyPrompts, sampling: OneOrManySampling) -> list[tuple[Prompt, SamplingParams]]:
    """Pairs prompts with their settings: one for all prompts, or one for each. Raises ValueError otherwise."""
    prompt_list, expected = to_prompt_list(prompts), "sampling is one SamplingParams or a list of them"
    settings: list[SamplingParams | None]
    if sampling is None or isinstance(sampling, SamplingParams):
        settings = [sampling] * len(prompt_list)
    else:
        is_scalar = isinstance(sampling, str | bytes | Mapping) or getattr(sampling, "ndim", 1) == 0
        if is_scalar or not isinstance(sampling, Iterable):
            raise ValueError(f"{expected}, got {type(sampling).__name__}")
        settings = list(sampling)
    if (wrong := next((s for s in settings if not isinstance(s, SamplingParams | None)), None)) is not None:
        raise ValueError(f"{expected}, got a list with {type(wrong).__name__}")
    if len(settings) != len(prompt_list):
        raise ValueError(f"{len(settings)} sampling settings for {len(prompt_list)} prompts")
    return [(prompt, params or SamplingParams()) for prompt, params in zip(prompt_list, settings, strict=True)]


def map_prompts(
    build: Callable[[Prompt, SamplingParams], R], prompts: OneOrManyPrompts, sampling: OneOrManySampling, on_error: str
) -> list[R | Output]:
    """Returns `build(prompt, params)` for each prompt.

    A ValueError becomes an Output with the error (`on_error` "skip") or is raised with the prompt's index ("raise").
    """
    check_choice("on_error", on_error, ["raise", "skip"])
    results, pairs = list[R | Output](), pair_prompts(prompts, sampling)
    for i, (prompt, params) in enumerate(pairs):
        try:
            results.append(build(prompt, params))
        except ValueError as e:
            if on_error == "skip":
                results.append(rejected_output(str(e), params.n))
            elif len(pairs) > 1:
                raise ValueError(f"prompt {i}: {e}") from e
            else:
                raise
    return results


class _ProgressBar(tqdm):
    """Shows the finished requests, and the tokens and tokens/s so far, which move within a long answer too."""

    num_tokens = 0

    @property
    def format_dict(self) -> dict[str, Any]:
        values = super().format_dict
        rate = self.num_tokens / values["elapsed"] if values["elapsed"] else 0.0
        return dict(values) | {"num_tokens": f"{self.num_tokens:,}", "token_rate": f"{rate:,.1f}"}


def _outputs_as_completed(
    request_ids: Sequence[int], events: Iterable[Event], progress: bool | None
) -> Iterator[tuple[int, Output]]:
    """Yields the position in `request_ids` and the output of each request at its last event, behind a progress bar."""
    index = {id: i for i, id in enumerate(request_ids)}
    bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} requests [{elapsed}, {num_tokens} tokens, {token_rate} tokens/s]"
    disable = None if progress is None else not progress
    # With miniters=0, every token may redraw the bar, which happens ten times a second at most.
    with _ProgressBar(
        total=len(request_ids), delay=2, miniters=0, leave=False, disable=disable, bar_format=bar_format
    ) as bar:
        for event in events:
            bar.num_tokens += len(event.token_ids)
            bar.update(event.output is not None)
            if event.output is not None:
                yield index[event.request_id], event.output
