"""What checks types in the tests (see pyproject.toml): beartype, with PEP 484's int for a float."""

import inspect
from collections.abc import Callable
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype

SELF_CHECKING = ("fastgen.config", "fastgen.cli.config")  # their own errors are what is to be tested
STRICT = beartype(conf=BeartypeConf(is_pep484_tower=True))
WITH_AXES = jaxtyping.jaxtyped


def checked(function: Callable) -> Callable:
    """`function`, raising when an argument or the result is not what its annotation says."""
    return function if function.__module__ in SELF_CHECKING else STRICT(function)


def _axes(hint: Any) -> bool:
    return (inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)) or any(map(_axes, get_args(hint)))


def jaxtyped(*, typechecker: Callable) -> Callable:
    """jaxtyping's own where annotations have axes. What it does to compare them is most of a call's time elsewhere."""

    def decorate(x: Any) -> Any:
        if inspect.isfunction(x) and not any(map(_axes, x.__annotations__.values())):
            return typechecker(x)
        return WITH_AXES(x, typechecker=typechecker)

    return decorate


jaxtyping.jaxtyped = jaxtyped  # by this name, the import hook finds it
