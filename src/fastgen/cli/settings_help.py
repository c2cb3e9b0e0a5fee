"""The settings as text for `fgrun --help`: each with its value, its sentence in fastgen.config, and its range."""

import json
import re
import textwrap
from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from types import NoneType
from typing import Any, get_args, get_origin

TYPE_NAMES = {
    int: "a whole number", float: "a number", str: "a text", bool: "true or false", tuple: "a list", dict: "a mapping",
}  # fmt: skip


def describe_values(field: Field[Any]) -> str:
    """Returns which values a setting takes, such as "a whole number from 1 to 64, or null"; "" if it takes any."""
    is_container = get_origin(field.type) in (tuple, dict)
    types = [field.type] if is_container else [*get_args(field.type)] or [field.type]
    kind = next((get_origin(t) or t for t in types if t is not NoneType), None)
    if kind not in TYPE_NAMES:
        return ""
    values, low, high = TYPE_NAMES[kind], field.metadata.get("low"), field.metadata.get("high")
    if options := field.metadata.get("options"):
        values = "one of " + ", ".join(options)
    elif low is not None:
        values += f", at least {low}" if high is None else f" from {low} to {high}"
    return values + (", or null" if NoneType in types else "")


def _spell_null(text: str) -> str:
    """Replaces Python's None by null, which is its name on the command line."""
    return re.sub(r"\bNone\b", "null", text)


def _format_setting(field: Field[Any], value: Any, width: int) -> str:
    """Returns a line with the key and its value, and the indented description, wrapped to `width` characters."""
    text, values = _spell_null(field.metadata.get("help", "")), describe_values(field)
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    indent = " " * 8
    description = textwrap.fill(
        f"{text} ({values})" if values else text, width, initial_indent=indent, subsequent_indent=indent
    )
    return f"    {field.name}: {shown}\n{description}"


def format_settings(config_class: Any, values: Mapping[str, Any], width: int = 100) -> str:
    """Returns the settings of a configuration that belong to no group, then those of each group, as text.

    `values` are the composed values, by group and key: files in conf/ may override a dataclass's own default.
    """
    groups: list[Field[Any]] = [f for f in fields(config_class) if is_dataclass(f.type)]
    lines = ["  settings without a group"]
    lines += [_format_setting(f, values[f.name], width) for f in fields(config_class) if f not in groups]
    for group in groups:
        summary = _spell_null(" ".join((group.type.__doc__ or "").partition("\n\n")[0].split()))
        heading = textwrap.fill(f"{group.name}: {summary}", width, initial_indent="  ", subsequent_indent="  ")
        lines += ["", heading]
        lines += [_format_setting(f, values[group.name][f.name], width) for f in fields(group.type)]  # type: ignore[arg-type]
    return "\n".join(lines)
