"""Base classes of the objects that an EngineCore calls: text, ranks, adapters, grammars and a profiler.

Each base class is also its null implementation: with them alone a core runs token ids through one model on one device.
`fastgen.engine` passes subclasses.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from threading import Event
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from fastgen.core.scheduler import Plan, SchedulerOutput
from fastgen.sampling_params import SamplingParams

F = TypeVar("F", bound=Callable[..., Any])
NULL_CONTEXT: AbstractContextManager[None] = nullcontext()

# --- ranks ------------------------------------------------------------------------------------------------------------


class Ranks:
    """The ranks that compute one model together: each has an engine, and all engines make the same calls. Here: one."""

    has_workers = False  # whether this rank started the others, whose engines make the calls that it broadcasts
    failure_cause = ""  # why the other ranks have ended; empty while they run

    def broadcast_call(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Makes every worker's engine call a method that `on_all_ranks` registered, by its qualified name."""

    def collective_call(self) -> AbstractContextManager[Any]:
        """Returns the context of a call that all ranks make together: an error in it ends all ranks."""
        return NULL_CONTEXT

    def close(self) -> None:
        """Ends the workers."""

    def all_reduce_min(self, n: int) -> int:
        """Returns the smallest n of all ranks."""
        return n

    def check_step(self, step: int, scheduled: SchedulerOutput, last_token_ids: Sequence[int]) -> None:
        """Raises RuntimeError, at the latest in the next step, if ranks planned or sampled different things."""


# The methods that workers may be asked to call, and their `checks_input`, by qualified name: "EngineCore._abort".
RANK_METHODS: dict[str, tuple[Callable[..., Any], bool]] = {}


def on_all_ranks(*, checks_input: bool = False) -> Callable[[F], F]:
    """Registers a method that every rank calls: rank 0 broadcasts each call to its workers, and then makes it itself.

    The object has its ranks in `ranks`; without workers the call is made here alone. Arguments must be picklable, and
    are checked before the call unless `checks_input`, which says that the method raises ValueError on every rank alike.
    """

    def decorate(method: Any) -> Any:
        name = method.__qualname__
        RANK_METHODS[name] = method, checks_input

        @wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.ranks.has_workers:
                return method(self, *args, **kwargs)
            self.ranks.broadcast_call(name, *args, **kwargs)
            return call_collectively(self.ranks, lambda: method(self, *args, **kwargs), checks_input=checks_input)

        return call

    return decorate


def call_collectively(ranks: Ranks, call: Callable[[], Any], *, checks_input: bool = False) -> Any:
    """Makes this rank's part of a call that all ranks make. Errors end all ranks, but for ValueError of wrong input."""
    with ranks.collective_call():
        try:
            return call()
        except ValueError as e:
            if not checks_input:
                raise
            error = e
    raise error


# --- text, adapters, grammars, profiler -------------------------------------------------------------------------------


@runtime_checkable
class Detokenizer(Protocol):
    """Converts the tokens of one completion to text, which ends before the first stop string."""

    text: str
    stop_string: str | None  # that has cut the text

    def push(self, token_id: int, *, allow_stop: bool = True) -> tuple[str, bool]:
        """Adds a token; returns the text that became certain, and whether a stop string has cut the text."""
        ...

    def flush(self) -> str:
        """Returns the text that was held back, when no token follows."""
        ...

    def copy(self) -> "Detokenizer":
        """Returns an independent copy, for a fork of the sequence."""
        ...


class TextProcessor:
    """Encodes prompts, and makes the detokenizers of outputs. Here: token ids alone."""

    tokenizer: Any = None

    def end_token_ids(self, model_eos_token_ids: Iterable[int]) -> frozenset[int]:
        """Returns the tokens that end a completion: the model's, and the tokenizer's."""
        return frozenset(model_eos_token_ids)

    def encode(self, prompt: Any, sampling: SamplingParams) -> tuple[list[int], str | None]:
        """Returns the token ids and text, if any, of a prompt. Raises ValueError for anything that is not a prompt."""
        return list(prompt), None

    def new_detokenizer(
        self, prompt_token_ids: Sequence[int], sampling: SamplingParams, *, stream_text: bool
    ) -> Detokenizer | None:
        """Returns the detokenizer of a completion; None: its output has no text.

        Without `stream_text` the text is decoded at the end only: decoding every token of hundreds of requests takes
        the host longer than a step takes the GPU.
        """
        return None


class Adapters:
    """LoRA adapters that requests may choose by name. Here: none."""

    versions: Any = (0,)  # how often each adapter was updated, by its index; index 0 is no adapter
    adapters: Any = None  # StackedAdapters
    loaded: dict[str, Any] = {}
    num_bytes = 0

    def index(self, name: str, *args: Any) -> Any:
        """Returns an adapter's index in the runner's stacked adapters. Raises ValueError for an unknown name."""
        raise ValueError("there is no room for adapters: start with max_adapters=N or adapters={…}")

    __getitem__ = check_new = check_update = add = update = remove = index


class Matcher(ABC):
    """Restricts the next token of one completion: a grammar, or other constraints. Tracks the tokens so far."""

    edit_logits: Any = None  # (prompt token ids, token ids so far, fp32 logits [V]) -> edited logits; None: no edits

    @property
    @abstractmethod
    def failed(self) -> bool:
        """Whether the grammar cannot be followed any further."""

    @property
    @abstractmethod
    def failure_reason(self) -> str:
        """The reason of the failure, as a message for the request."""

    @abstractmethod
    def accept_token(self, token: int) -> None:
        """Advances by a sampled token."""

    @abstractmethod
    def copy(self) -> "Matcher":
        """Returns a matcher at the same place."""


class Grammars:
    """Compiles the grammars that outputs follow, and computes which tokens they allow next. Here: none."""

    def compile(self, sampling: SamplingParams, cancel_event: Event | None = None) -> Sequence[Matcher | None]:
        """Returns a matcher for each completion of a request, None without a grammar. Any thread may call this.

        Raises ValueError for a grammar that cannot be used.
        """
        if sampling.has_token_constraints:
            raise ValueError("this engine follows no grammars, bad_words, allowed_token_ids or logits_processors")
        return [None] * sampling.n

    def token_masks(self, rows: list[tuple[int, Any]], num_rows: int) -> np.ndarray:
        """Returns the allowed tokens as bits, int32 [num_rows, ceil(vocabulary / 32)]; `rows`: (row, matcher)."""
        raise NotImplementedError

    def close(self) -> None:
        """Frees what was compiled."""


class Profiler:
    """Labels the stages of a step for a trace. Here: records nothing."""

    def range(self, name: str) -> AbstractContextManager[Any]:
        """Returns the context of one stage."""
        return NULL_CONTEXT

    def step(self, plan: Plan) -> AbstractContextManager[Any]:
        """Returns the context of one step."""
        return NULL_CONTEXT
