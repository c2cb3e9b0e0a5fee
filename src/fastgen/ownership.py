"""Who may call an engine: one thread at a time, in the process that made it, until it is closed.

`exclusive` stands around every public call. It refuses misuse before anything is changed or told to other ranks, and
shields what is computed from the caller's modes of torch (autocast, inference mode).
"""

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from multiprocessing import process
from multiprocessing.process import BaseProcess
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
SPAWN = "start processes with spawn: multiprocessing.get_context('spawn')"
NOTHING = nullcontext()
_process = os.getpid()  # this one: asking the system takes longer than all else that a call checks
computed_in: int | None = None  # the process in which an engine was made, or sequences scored


class Owner:
    """Tracks the process that made an engine, whether it is closed, and the thread that is inside one of its calls."""

    def __init__(self, what: str, advice: str) -> None:
        self.what, self.advice = what, advice  # for messages
        self.process, self.closed = _process, False
        self.thread: int | None = None  # that is inside a call, or for which an AsyncEngine holds the engine
        self.held = False  # by an AsyncEngine
        self.busy = False  # whether `thread` is inside a call
        self.idle = [None]  # empty while a thread has the engine

    def check(self) -> None:
        """Raises RuntimeError in a forked child, and once the engine is closed."""
        if self.process != _process:
            raise RuntimeError(f"{self.what} was made by another process, of which this one is a fork: {SPAWN}")
        if self.closed:
            raise RuntimeError(f"{self.what} is closed: make another one")

    def refuse(self) -> RuntimeError:
        """Returns the error for a thread that may not call now."""
        if self.held:
            return RuntimeError(
                f"{self.what} is held by an AsyncEngine, whose thread steps it: use the AsyncEngine's methods "
                "(`await async_engine.call(f, …)` makes any call), or close it first"
            )
        return RuntimeError(f"{self.what} is inside a call of another thread: {self.advice}")

    def hold(self) -> None:
        """Take the engine for an AsyncEngine, whose thread then sets `thread`. RuntimeError where another has it."""
        self.check()
        try:
            del self.idle[0]
        except IndexError:
            raise self.refuse() from None
        self.held = True

    def let_go(self) -> None:
        """Give it back, once that thread has ended."""
        self.thread, self.held = None, False
        self.idle = [None]


def exclusive(*memory: str) -> Callable[[F], F]:
    """Make a method one that a single thread may be inside of: see the module's text.

    The object has an `_owner`, and in `_dropped` requests that finalizers left to `_drop`. `memory`: what the method
    reads or writes of the engine's memory; the ValueError of `_require` while that is given back.
    """

    def decorate(call: Any) -> Any:
        @wraps(call)
        def guarded(self: Any, *args: Any, **named: Any) -> Any:
            owner, me = self._owner, threading.get_ident()
            mine = owner.thread == me
            if mine and owner.busy and owner.process == _process:  # within another call
                if memory:
                    self._require(*memory)
                return call(self, *args, **named)
            owner.check()
            if not mine:
                # Succeeds in one thread only; no interrupt can come between it and the next `try`.
                try:
                    del owner.idle[0]
                except IndexError:
                    raise owner.refuse() from None
            try:
                owner.thread, owner.busy = me, True
                owner.check()  # another thread may have closed it
                if self._dropped:
                    self._drop()
                if memory:
                    self._require(*memory)
                with NOTHING if _plain() else _plain_modes():
                    found = call(self, *args, **named)
                if self._dropped:
                    self._drop()
                return found
            finally:
                owner.busy = False
                if not mine:
                    owner.thread, owner.idle = None, [None]

        return guarded

    return decorate


def _plain() -> bool:
    """Whether torch is in none of the modes that would change what is computed."""
    return not (torch._C._is_any_autocast_enabled() or torch.is_inference_mode_enabled())


@contextmanager
def _plain_modes() -> Iterator[None]:
    """Switches autocast and inference mode off: the cache would become a tensor that no later step may write."""
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(mode=False))
            stack.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def plain_modes(call: Callable[P, T]) -> Callable[P, T]:
    """Make a method one inside which torch's autocast and inference mode are off."""

    @wraps(call)
    def shielded(*args: P.args, **named: P.kwargs) -> T:
        if _plain():
            return call(*args, **named)
        with _plain_modes():
            return call(*args, **named)

    return shielded


def no_autocast(call: Callable[P, T]) -> Callable[P, T]:
    """Make a function one inside which torch's autocast is off: it computes in the dtype of its parameters."""

    @wraps(call)
    def shielded(*args: P.args, **named: P.kwargs) -> T:
        kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        if not kinds:
            return call(*args, **named)
        with ExitStack() as stack:
            for kind in kinds:
                stack.enter_context(torch.autocast(kind, enabled=False))
            return call(*args, **named)

    return shielded


# --- forked children --------------------------------------------------------------------------------------------------


def check_fork(what: str) -> None:
    """RuntimeError where torch would wait for threads that a fork has not copied. Notes that this process computes."""
    global computed_in
    if computed_in not in (None, _process) and torch.get_num_threads() > 1:
        raise RuntimeError(f"{what}: this process is a fork of one that has computed: {SPAWN}")
    computed_in = _process


_started: "weakref.WeakSet[BaseProcess]" = weakref.WeakSet()


def disown_in_forks(processes: Iterable[BaseProcess]) -> None:
    """Leave processes alone when a fork of this process ends, which multiprocessing would terminate with it."""
    _started.update(processes)


def _after_fork() -> None:
    global _process
    _process = os.getpid()
    children: set[Any] = process._children  # type: ignore[attr-defined]
    children.difference_update(_started)


os.register_at_fork(after_in_child=_after_fork)
