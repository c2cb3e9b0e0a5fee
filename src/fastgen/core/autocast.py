"""Switches autocast off: what is computed has the dtype of the parameters, whatever mode the caller is in."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def disable_autocast() -> Iterator[None]:
    """Switches autocast off for CPU and CUDA."""
    with ExitStack() as stack:
        for device_type in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def no_autocast(fn: Callable[P, T]) -> Callable[P, T]:
    """Switches autocast off inside a function, which then computes in the dtype of its parameters."""

    @wraps(fn)
    def shielded(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch._C._is_any_autocast_enabled():
            return fn(*args, **kwargs)
        with disable_autocast():
            return fn(*args, **kwargs)

    return shielded
