"""Who may call an engine: one thread at a time, in the process that made it, until it is closed.

`exclusive` stands around every public call. It refuses misuse before anything is changed or told to other ranks, and
shields what is computed from the caller's modes of torch (autocast, inference mode).
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
SPAWN_ADVICE = "start processes with spawn: multiprocessing.get_context('spawn')"
NULL_CONTEXT = nullcontext()
_current_pid = os.getpid()  # this one: asking the system takes longer than all else that a call checks
computing_pid: int | None = None  # the process in which an engine was made, or sequences scored


class AccessGuard:
    """Tracks the process that made an engine, whether it is closed, and the thread that is inside one of its calls."""

    def __init__(self, name: str, advice: str) -> None:
        self.name, self.advice = name, advice  # for messages
        self.pid, self.closed = _current_pid, False
        self.thread_id: int | None = None  # that is inside a call, or for which an AsyncEngine holds the engine
        self.held_by_async_engine = False  # by an AsyncEngine
        self.in_call = False  # whether `thread` is inside a call
        self._free_token = [None]  # empty while a thread has the engine

    def check(self) -> None:
        """Raises RuntimeError in a forked child, and once the engine is closed."""
        if self.pid != _current_pid:
            raise RuntimeError(f"{self.name} was made by another process, of which this one is a fork: {SPAWN_ADVICE}")
        if self.closed:
            raise RuntimeError(f"{self.name} is closed: make another one")

    def access_error(self) -> RuntimeError:
        """Returns the error for a thread that may not call now."""
        if self.held_by_async_engine:
            return RuntimeError(
                f"{self.name} is held by an AsyncEngine, whose thread steps it: use the AsyncEngine's methods "
                "(`await async_engine.call(f, …)` makes any call), or close it first"
            )
        return RuntimeError(f"{self.name} is inside a call of another thread: {self.advice}")

    def acquire(self) -> None:
        """Take the engine for an AsyncEngine, whose thread then sets `thread`. RuntimeError where another has it."""
        self.check()
        try:
            del self._free_token[0]
        except IndexError:
            raise self.access_error() from None
        self.held_by_async_engine = True

    def release(self) -> None:
        """Give it back, once that thread has ended."""
        self.thread_id, self.held_by_async_engine = None, False
        self._free_token = [None]


def exclusive(*memory: str) -> Callable[[F], F]:
    """Make a method one that a single thread may be inside of: see the module's text.

    The object has an `_access_guard`, and in `_pending_aborts` requests that finalizers left to `_drain_pending_aborts`. `memory`: what the method
    reads or writes of the engine's memory; the ValueError of `_require` while that is given back.
    """

    def decorate(call: Any) -> Any:
        @wraps(call)
        def guarded(self: Any, *args: Any, **named: Any) -> Any:
            owner, me = self._access_guard, threading.get_ident()
            mine = owner.thread_id == me
            if mine and owner.in_call and owner.pid == _current_pid:  # within another call
                if memory:
                    self._require_memory(*memory)
                return call(self, *args, **named)
            owner.check()
            if not mine:
                # Succeeds in one thread only; no interrupt can come between it and the next `try`.
                try:
                    del owner._free_token[0]
                except IndexError:
                    raise owner.access_error() from None
            try:
                owner.thread_id, owner.in_call = me, True
                owner.check()  # another thread may have closed it
                if self._pending_aborts:
                    self._drain_pending_aborts()
                if memory:
                    self._require_memory(*memory)
                with NULL_CONTEXT if _torch_modes_off() else _disable_torch_modes():
                    found = call(self, *args, **named)
                if self._pending_aborts:
                    self._drain_pending_aborts()
                return found
            finally:
                owner.in_call = False
                if not mine:
                    owner.thread_id, owner._free_token = None, [None]

        return guarded

    return decorate


def _torch_modes_off() -> bool:
    """Whether torch is in none of the modes that would change what is computed."""
    return not (torch._C._is_any_autocast_enabled() or torch.is_inference_mode_enabled())


@contextmanager
def _disable_torch_modes() -> Iterator[None]:
    """Switches autocast and inference mode off: the cache would become a tensor that no later step may write."""
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(mode=False))
            stack.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def no_torch_modes(fn: Callable[P, T]) -> Callable[P, T]:
    """Make a method one inside which torch's autocast and inference mode are off."""

    @wraps(fn)
    def shielded(*args: P.args, **named: P.kwargs) -> T:
        if _torch_modes_off():
            return fn(*args, **named)
        with _disable_torch_modes():
            return fn(*args, **named)

    return shielded


def no_autocast(fn: Callable[P, T]) -> Callable[P, T]:
    """Make a function one inside which torch's autocast is off: it computes in the dtype of its parameters."""

    @wraps(fn)
    def shielded(*args: P.args, **named: P.kwargs) -> T:
        kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        if not kinds:
            return fn(*args, **named)
        with ExitStack() as stack:
            for kind in kinds:
                stack.enter_context(torch.autocast(kind, enabled=False))
            return fn(*args, **named)

    return shielded


# --- forked children --------------------------------------------------------------------------------------------------


def check_fork(caller: str) -> None:
    """RuntimeError where torch would wait for threads that a fork has not copied. Notes that this process computes."""
    global computing_pid
    if computing_pid not in (None, _current_pid) and torch.get_num_threads() > 1:
        raise RuntimeError(f"{caller}: this process is a fork of one that has computed: {SPAWN_ADVICE}")
    computing_pid = _current_pid


def _reset_after_fork() -> None:
    global _current_pid
    _current_pid = os.getpid()


os.register_at_fork(after_in_child=_reset_after_fork)
