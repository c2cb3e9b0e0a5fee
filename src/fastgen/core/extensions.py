"""Protocols around an EngineCore, each with a null implementation: ranks, adapters, grammars and a profiler.

`fastgen.engine` injects the real ones. With the null ones a core runs one model on one device, in plain torch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import wraps
from threading import Event
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

from fastgen.config import SamplingParams
from fastgen.core.scheduler import Plan, SchedulerOutput

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
NULL_CONTEXT: AbstractContextManager[None] = nullcontext()

# --- ranks ------------------------------------------------------------------------------------------------------------


@runtime_checkable
class Ranks(Protocol):
    """The ranks that compute one model together; each has an engine, and all engines make the same calls."""

    has_workers: bool  # whether this rank started the others, whose engines make the calls that it broadcasts
    failure_cause: str  # why the other ranks have ended; empty while they run

    def broadcast_call(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Has every worker's engine call a method that `on_all_ranks` registered, by its qualified name."""
        ...

    def collective_call(self) -> AbstractContextManager[Any]:
        """Returns the context of a call that all ranks make together: an error in it ends all ranks."""
        ...

    def close(self) -> None:
        """Ends the workers."""
        ...

    def all_reduce_min(self, n: int) -> int:
        """Returns the smallest n of all ranks."""
        ...

    def check_step(self, step: int, scheduled: SchedulerOutput, last_token_ids: Sequence[int]) -> None:
        """Raises RuntimeError, at the latest in the next step, if ranks planned or sampled different things."""
        ...


class SingleRank:
    """One rank, which has nobody to agree with: the null implementation, and the defaults of groups without workers."""

    has_workers, failure_cause = False, ""

    def broadcast_call(self, method: str, *args: Any, **kwargs: Any) -> None: ...

    def collective_call(self) -> AbstractContextManager[Any]:
        return NULL_CONTEXT

    def close(self) -> None: ...

    def all_reduce_min(self, n: int) -> int:
        return n

    def check_step(self, step: int, scheduled: SchedulerOutput, last_token_ids: Sequence[int]) -> None: ...


def step_digest(scheduled: SchedulerOutput, last_token_ids: Sequence[int]) -> int:
    """Returns a hash of what a rank plans in a step and sampled in the step before, equal on all ranks."""
    return hash((scheduled.plan, scheduled.page_copies, scheduled.preempted, tuple(last_token_ids)))


class RankMethod(NamedTuple):
    """A method that workers may be asked to call."""

    function: Callable[..., Any]
    checks_input: bool  # whether it raises ValueError on every rank alike, before it changes anything


RANK_METHODS: dict[str, RankMethod] = {}  # by qualified name, such as "EngineCore._abort"


def on_all_ranks(*, checks_input: bool = False) -> Callable[[F], F]:
    """Registers a method that every rank calls: rank 0 broadcasts each call to its workers, and then makes it itself.

    The object has its ranks in `ranks`; without workers the call is made here alone. Arguments must be picklable, and
    are checked before the call unless `checks_input`, which says that the method raises ValueError on every rank alike.
    """

    def decorate(method: Any) -> Any:
        name = method.__qualname__
        RANK_METHODS[name] = RankMethod(method, checks_input)

        @wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.ranks.has_workers:
                return method(self, *args, **kwargs)
            self.ranks.broadcast_call(name, *args, **kwargs)
            return call_collectively(self.ranks, lambda: method(self, *args, **kwargs), checks_input=checks_input)

        return call

    return decorate


def call_collectively(ranks: Ranks, call: Callable[[], T], *, checks_input: bool = False) -> T:
    """Makes this rank's part of a call that all ranks make. Errors end all ranks, but for ValueError of wrong input."""
    with ranks.collective_call():
        try:
            return call()
        except ValueError as e:
            if not checks_input:
                raise
            error = e
    raise error


def call_rank_method(owners: Iterable[Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Makes a call that rank 0 broadcast, on the owner whose class defines the method."""
    function, checks_input = RANK_METHODS[name]
    owner = next(x for x in owners if any(c.__name__ == name.partition(".")[0] for c in type(x).__mro__))
    with suppress(*(ValueError,) if checks_input else ()):
        function(owner, *args, **kwargs)


# --- adapters, grammars, profiler -------------------------------------------------------------------------------------


@runtime_checkable
class Adapters(Protocol):
    """LoRA adapters that requests may choose by name."""

    @property
    def versions(self) -> Sequence[int]:
        """How often each adapter was updated, by its index; index 0 is no adapter."""
        ...

    def index(self, name: str) -> int:
        """Returns an adapter's index in the runner's stacked adapters. Raises ValueError for an unknown name."""
        ...


class NoAdapters:
    """No adapters: refuses every request that names one, and every change to them."""

    versions, adapters, loaded, num_bytes = (0,), None, dict[str, Any](), 0

    def index(self, name: str, *args: Any) -> Any:
        raise ValueError("there is no room for adapters: start with max_adapters=N or adapters={…}")

    __getitem__ = check_new = check_update = add = update = remove = index


class Matcher(ABC):
    """Where one completion is in its grammar. A class, no protocol, whose checks would evaluate the properties."""

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


@runtime_checkable
class Grammars(Protocol):
    """Compiles the grammars that outputs follow, and computes which tokens they allow next."""

    def compile(self, sampling: SamplingParams, cancel_event: Event | None = None) -> Sequence[Matcher | None]:
        """Returns a matcher for each completion of a request, None without a grammar.

        Raises ValueError for a grammar that cannot be used. Any thread may call this beside the steps.
        """
        ...

    def token_masks(self, rows: list[tuple[int, Any]], num_rows: int) -> np.ndarray:
        """Returns the allowed tokens as bits, int32 [num_rows, ceil(vocabulary / 32)]; `rows`: (row, matcher)."""
        ...

    def close(self) -> None:
        """Frees what was compiled."""
        ...


class NoGrammars:
    """No grammars: every request that brings one is refused."""

    def compile(self, sampling: SamplingParams, cancel_event: Event | None = None) -> Sequence[Matcher | None]:
        if sampling.grammar is not None:
            raise ValueError("this engine follows no grammars")
        return [None] * sampling.n

    def token_masks(self, rows: list[tuple[int, Any]], num_rows: int) -> np.ndarray:
        raise NotImplementedError

    def close(self) -> None: ...


@runtime_checkable
class Profiler(Protocol):
    """Labels the stages of a step for a trace."""

    def range(self, name: str) -> AbstractContextManager[Any]:
        """Returns the context of one stage."""
        ...

    def step(self, plan: Plan) -> AbstractContextManager[Any]:
        """Returns the context of one step."""
        ...


class NullProfiler:
    """Records nothing."""

    def range(self, name: str) -> AbstractContextManager[Any]:
        return NULL_CONTEXT

    def step(self, plan: Plan) -> AbstractContextManager[Any]:
        return NULL_CONTEXT
