"""Shields what is computed from the caller's torch modes: autocast and inference mode."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")
DEVICE_TYPES = "cpu", "cuda"


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
        _disable_autocast(stack)
        yield


def _disable_autocast(stack: ExitStack) -> None:
    for device_type in DEVICE_TYPES:
        if torch.is_autocast_enabled(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))


def no_torch_modes(fn: Callable[P, T]) -> Callable[P, T]:
    """Switches autocast and inference mode off inside a function."""

    @wraps(fn)
    def shielded(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch_modes_off():
            return fn(*args, **kwargs)
        with disable_torch_modes():
            return fn(*args, **kwargs)

    return shielded


def no_autocast(fn: Callable[P, T]) -> Callable[P, T]:
    """Switches autocast off inside a function, which then computes in the dtype of its parameters."""

    @wraps(fn)
    def shielded(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch._C._is_any_autocast_enabled():
            return fn(*args, **kwargs)
        with ExitStack() as stack:
            _disable_autocast(stack)
            return fn(*args, **kwargs)

    return shielded
