"""What checks types in the tests (see pyproject.toml): beartype, with PEP 484's int for a float."""

from collections.abc import Callable

from beartype import BeartypeConf, beartype

SELF_CHECKING = ("fastgen.config", "fastgen.cli.config")  # their own errors are what is to be tested
STRICT = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Callable) -> Callable:
    """`function`, raising when an argument or the result is not what its annotation says."""
    return function if function.__module__ in SELF_CHECKING else STRICT(function)
