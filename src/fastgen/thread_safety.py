"""Restricts calls of an engine to one thread at a time, in the process that made it, until it is closed.

`exclusive` wraps every public call. It rejects misuse before anything changes or is broadcast to other ranks, and
switches off the caller's torch modes (autocast, inference mode) during the call.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch

from fastgen.core.autocast import disable_autocast

F = TypeVar("F", bound=Callable[..., Any])
SPAWN_ADVICE = "start processes with spawn: multiprocessing.get_context('spawn')"
NULL_CONTEXT = nullcontext()
_current_pid = os.getpid()  # asking the system takes longer than everything else that a call checks
computing_pid: int | None = None  # process that made an engine or scored sequences


class AccessGuard:
    """Tracks the process that made an engine, whether it is closed, and the thread that is inside one of its calls."""

    def __init__(self, name: str, advice: str) -> None:
        self.name, self.advice = name, advice  # for messages
        self.pid, self.closed = _current_pid, False
        self.thread_id: int | None = None  # of the thread inside a call, or of the AsyncEngine that holds the engine
        self.held_by_async_engine = False
        self.in_call = False  # whether thread `thread_id` is inside a call
        self._free_token = [None]  # empty while a thread has the engine

    @property
    def owned(self) -> bool:
        """Whether this process made the engine."""
        return self.pid == os.getpid()

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
        """Takes the engine for an AsyncEngine, whose thread sets `thread_id`. Raises RuntimeError if it is taken."""
        self.check()
        try:
            del self._free_token[0]
        except IndexError:
            raise self.access_error() from None
        self.held_by_async_engine = True

    def release(self) -> None:
        """Frees the engine after `acquire`, once that thread has ended."""
        self.thread_id, self.held_by_async_engine = None, False
        self._free_token = [None]


def torch_modes_off() -> bool:
    """Returns whether torch is in none of the modes that would change what is computed."""
    return not (torch._C._is_any_autocast_enabled() or torch.is_inference_mode_enabled())


@contextmanager
def disable_torch_modes() -> Iterator[None]:
    """Switches autocast and inference mode off: the cache would become a tensor that no later step may write."""
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(mode=False))
            stack.enter_context(torch.no_grad())
        stack.enter_context(disable_autocast())
        yield


def exclusive(*memory: str) -> Callable[[F], F]:
    """Returns a decorator for methods that one thread at a time may run; see the module's docstring.

    The object has an `access_guard`. `memory` names the parts of the engine's memory that the method reads or writes:
    while they are released, calls raise the ValueError of the object's `memory.require`.
    """

    def decorate(method: Any) -> Any:
        @wraps(method)
        def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
            guard, thread_id = self.access_guard, threading.get_ident()
            is_owner = guard.thread_id == thread_id
            if is_owner and guard.in_call and guard.pid == _current_pid:  # within another call
                if memory:
                    self.memory.require(*memory)
                return method(self, *args, **kwargs)
            guard.check()
            if not is_owner:
                # Succeeds in one thread only; no interrupt can come between it and the next `try`.
                try:
                    del guard._free_token[0]
                except IndexError:
                    raise guard.access_error() from None
            try:
                guard.thread_id, guard.in_call = thread_id, True
                guard.check()  # another thread may have closed it
                if memory:
                    self.memory.require(*memory)
                with NULL_CONTEXT if torch_modes_off() else disable_torch_modes():
                    return method(self, *args, **kwargs)
            finally:
                guard.in_call = False
                if not is_owner:
                    guard.thread_id, guard._free_token = None, [None]

        return guarded

    return decorate


# --- forked children --------------------------------------------------------------------------------------------------


def check_fork(caller: str) -> None:
    """Raises RuntimeError in a fork, where torch would wait for threads of its parent; else records this process."""
    global computing_pid
    if computing_pid not in (None, _current_pid) and torch.get_num_threads() > 1:
        raise RuntimeError(f"{caller}: this process is a fork of one that has computed: {SPAWN_ADVICE}")
    computing_pid = _current_pid


def _reset_after_fork() -> None:
    global _current_pid
    _current_pid = os.getpid()


os.register_at_fork(after_in_child=_reset_after_fork)
