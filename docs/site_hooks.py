"""Hooks of the documentation site: the settings' tables, and the repository's files that pages link to.

A line `[[settings NAME GROUP]]` becomes a table of the dataclass NAME, with the sentence that each field declares, and
`[[hints NAME]]` one of a mapping of other libraries' names, both of fastgen.config. A line `[[fields MODULE NAME]]`
becomes a table of the fields of a class, with the comments beside them. Links to `../path` lead to files
outside of docs/, such as a result or a source file; the site gets a copy of each.
"""

import ast
import posixpath
import re
import sys
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from fastgen import argument_hints, config, sampling_params  # noqa: E402

OUTSIDE_LINK = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")
SETTINGS_LINE = re.compile(r"^\[\[settings (\w+)(?: (\w+))?\]\]$", re.MULTILINE)
HINTS_LINE = re.compile(r"^\[\[hints (\w+)\]\]$", re.MULTILINE)
FIELDS_LINE = re.compile(r"^\[\[fields ([\w.]+) (\w+)\]\]$", re.MULTILINE)
COPIES = "repository"  # the folder of the site that has copies of the repository's files


def _copy_uri(path: str) -> str:
    """Returns where the site has a copy of a file, or the list of a folder. Browsers show source text as .txt."""
    is_shown = not path.endswith((".py", ".md", ".ipynb")) and not (ROOT / path).is_dir()
    return f"{COPIES}/{path.rstrip('/')}" + ("" if is_shown else ".txt")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a copy of each file of the repository that a page links to. Raises PluginError for a missing file."""
    for page in files.documentation_pages():
        for path in {match[1] for match in OUTSIDE_LINK.finditer(page.content_string)}:
            if not (ROOT / path).exists():
                raise PluginError(f"docs/{page.src_uri} links to ../{path}, which the repository does not have")
            if files.get_file_from_path(uri := _copy_uri(path)) is not None:
                continue
            if (ROOT / path).is_dir():
                names = sorted(x.name for x in (ROOT / path).iterdir() if not x.name.startswith("_"))
                files.append(File.generated(config, uri, content="\n".join(names)))
            else:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replaces links to files of the repository, and lines that ask for a table of settings."""
    folder = posixpath.dirname(page.file.src_uri)
    markdown = OUTSIDE_LINK.sub(lambda match: f"]({posixpath.relpath(_copy_uri(match[1]), folder or '.')})", markdown)
    markdown = FIELDS_LINE.sub(lambda match: fields_table(match[1], match[2]), markdown)
    markdown = HINTS_LINE.sub(lambda match: hints_table(match[1]), markdown)
    return SETTINGS_LINE.sub(lambda match: settings_table(match[1], match[2] or ""), markdown)


def settings_table(class_name: str, group: str) -> str:
    """Returns a Markdown table of a dataclass's settings: key, type, default, range or options, and sentence.

    Keys begin with `group`, if there is one. Raises PluginError for a field without a sentence.
    """
    config_class = getattr(config, class_name, None) or getattr(sampling_params, class_name)
    rows = ["| key | type | default | values | |", "|---|---|---|---|---|"]
    for f in fields(config_class):
        if is_dataclass(f.default):
            continue  # a group, which has a table of its own
        if not f.metadata.get("help"):
            raise PluginError(f"{class_name}.{f.name} has no sentence: declare it with setting(…, help)")
        key = f"{group}.{f.name}" if group else f.name
        default: Any = f.default if f.default_factory is MISSING else f.default_factory()
        cells = [
            f'<span id="{key}"></span>`{key}`',
            f"`{_type_name(f.type)}`",
            f"`{_literal(default)}`",
            _values(f.metadata),
            f.metadata["help"],
        ]
        rows.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(rows)


def hints_table(name: str) -> str:
    """Returns a Markdown table of a mapping from other libraries' names to what fastgen answers."""
    hints: dict[str, str] = getattr(argument_hints, name)
    return "\n".join(["| name | hint |", "|---|---|", *(f"| `{key}` | {hint} |" for key, hint in hints.items())])


def fields_table(module: str, class_name: str) -> str:
    """Returns a Markdown table of a class's fields: name, type, default, and the comment at the end of its line.

    The source is read and not imported. Raises PluginError if there is no such class.
    """
    source = (ROOT / "src" / f"{module.replace('.', '/')}.py").read_text()
    lines = source.splitlines()
    classes = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == class_name]
    if not classes:
        raise PluginError(f"{module} has no class {class_name}")
    rows = ["| field | type | default | |", "|---|---|---|---|"]
    for node in classes[0].body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        value = "" if node.value is None else ast.unparse(node.value)
        value = re.sub(r"^field\(default_factory=(\w+)\)$", r"\1()", value)
        default = value and f"`{value}`"
        comment = lines[(node.end_lineno or 1) - 1][node.end_col_offset or 0 :].strip().removeprefix("#").strip()
        cells = f"`{node.target.id}`", f"`{ast.unparse(node.annotation).replace(' | ', ' or ')}`", default, comment
        rows.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(rows)


def _type_name(annotation: Any) -> str:
    """Returns a type as it is written in the source, without the alternative None: `None` is among the defaults."""
    name = annotation.__name__ if isinstance(annotation, type) and "[" not in str(annotation) else str(annotation)
    return name.replace(" | None", " or None")


def _literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _values(rule: Any) -> str:
    """Returns the options, or the range, that a field declares."""
    if rule.get("options"):
        return ", ".join(f"`{option}`" for option in rule["options"])
    low, high = rule.get("low"), rule.get("high")
    if low is None and high is None:
        return ""
    low, high = ("" if x is None else f"{x:g}" if abs(x) < 2**53 else _power(x) for x in (low, high))
    return f"{low} to {high}" if low and high else f"at least {low}" if low else f"at most {high}"


def _power(x: float) -> str:
    """Writes the ends of the range of a 64-bit integer."""
    return "-2⁶³" if x == -(2**63) else "2⁶³ - 1" if x == 2**63 - 1 else str(x)
