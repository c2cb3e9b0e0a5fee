"""What checks types in the tests (see pyproject.toml): beartype, with PEP 484's int for a float.

The first calls of each function are checked, and one of several after them: all would be most of the tests' time.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from itertools import count
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype

SELF_CHECKING = ("fastgen.config", "fastgen.cli.hydra_config")  # their own errors are what is to be tested
STRICT = beartype(conf=BeartypeConf(is_pep484_tower=True))
WITH_AXES = jaxtyping.jaxtyped
ALL, THEN = 64, 1  # calls of a function that are checked, and of which one is checked then


def checked(function: Callable) -> Callable:
    """`function`, raising when an argument or the result is not what its annotation says."""
    return function if function.__module__ in SELF_CHECKING else STRICT(function)


def _axes(hint: Any) -> bool:
    return (inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)) or any(map(_axes, get_args(hint)))


def _sampled(strict: Callable, plain: Callable) -> Callable:
    calls = count()

    @wraps(plain)
    def call(*args: Any, **named: Any) -> Any:
        i = next(calls)
        return (strict if i < ALL or i % THEN == 0 else plain)(*args, **named)

    return call


def jaxtyped(*, typechecker: Callable) -> Callable:
    """jaxtyping's own where annotations have axes. What it does to compare them is most of a call's time elsewhere."""

    def decorate(x: Any) -> Any:
        if not inspect.isfunction(x):
            return WITH_AXES(x, typechecker=typechecker)
        if "<locals>" in x.__qualname__:  # its checks would be made anew whenever the function around it runs
            return x
        axes = any(map(_axes, x.__annotations__.values()))
        return _sampled(WITH_AXES(x, typechecker=typechecker) if axes else typechecker(x), x)

    return decorate


jaxtyping.jaxtyped = jaxtyped  # by this name, the import hook finds it
