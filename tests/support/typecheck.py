"""Type checks of the tests (see pyproject.toml): beartype, with PEP 484's int for a float."""

import inspect
from collections.abc import Callable
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype

SELF_CHECKING = ("fastgen.config", "fastgen.cli.hydra_config")  # tests check the errors that these raise themselves
STRICT = beartype(conf=BeartypeConf(is_pep484_tower=True))
WITH_AXES = jaxtyping.jaxtyped


def checked(function: Callable) -> Callable:
    """Wraps a function so that it raises when an argument or the result does not match its annotation."""
    return function if function.__module__ in SELF_CHECKING else STRICT(function)


def _axes(hint: Any) -> bool:
    return (inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)) or any(map(_axes, get_args(hint)))


def jaxtyped(*, typechecker: Callable) -> Callable:
    """Returns jaxtyping's decorator where annotations have axes, else the plain type checker, which takes less time."""

    def decorate(x: Any) -> Any:
        if not inspect.isfunction(x):
            return WITH_AXES(x, typechecker=typechecker)
        if "<locals>" in x.__qualname__:  # would be decorated again at each call of the outer function
            return x
        axes = any(map(_axes, x.__annotations__.values()))
        return WITH_AXES(x, typechecker=typechecker) if axes else typechecker(x)

    return decorate


jaxtyping.jaxtyped = jaxtyped  # by this name, the import hook finds it
