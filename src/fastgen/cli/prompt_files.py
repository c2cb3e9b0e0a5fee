"""Reads prompts, chat templates and tools from files, and checks that output files can be written."""

import codecs
import csv
import errno
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastgen.text.chat_template import Tools
from fastgen.text.tokenizer import Prompt

ACCEPTED_ROWS = (
    "a text, a list of token ids, a list of messages, or an object with 'prompt', 'prompt_token_ids' or 'messages'"
)
STANDARD_INPUT, STANDARD_OUTPUT = ("-", "/dev/stdin"), ("-", "/dev/stdout")
GZIP_MAGIC = b"\x1f\x8b"  # the first bytes of gzip files, which are no valid UTF-8
Rows = Iterator[tuple[str, Any]]  # the location of each row for error messages, and its value


def read_prompts(file: str, format: str | None = None) -> list[Prompt]:
    """Reads all prompts of a file, or of standard input (`-`).

    `format` is one of FORMATS; None chooses it by the suffix. Standard input and files without a suffix are text, one
    prompt per line. Gzip files are decompressed. Text must be UTF-8, with or without a byte order mark. CSV and Parquet
    files need a column `prompt` or `messages` (JSON, in CSV). Errors are ValueErrors that name the file and line.
    """
    is_stdin = file in STANDARD_INPUT
    file = file if is_stdin else os.path.expanduser(file)
    suffix = "" if is_stdin else Path(file.lower().removesuffix(".gz")).suffix
    if format is None and (format := SUFFIXES.get(suffix)) is None:
        known = ", ".join(s for s in SUFFIXES if s)
        raise ValueError(f"{file}: unknown suffix {suffix!r} (known: {known}); set task.format")
    if not is_stdin and os.path.isdir(file):
        raise ValueError(f"task.prompts: {file} is a folder")
    if not is_stdin and not os.path.exists(file):
        raise ValueError(f"task.prompts: file {file} does not exist")
    try:
        content = sys.stdin.buffer.read() if is_stdin else Path(file).read_bytes()
        if file.lower().endswith(".gz") or content.startswith(GZIP_MAGIC):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as e:
        raise ValueError(f"{file}: cannot be read: {e}") from e
    prompts = [_check_prompt(value, f"{file}, {location}") for location, value in READERS[format](content, file)]
    if not prompts:
        raise ValueError(f"task.prompts: {file} is empty")
    return prompts


def read_chat_template(file: str | None) -> str | None:
    """Returns the text of a file with a Jinja template. Raises ValueError if it is empty or cannot be read."""
    if file is None:
        return None
    if not (template := _read_text("chat_template", file)).strip():
        raise ValueError(f"chat_template: {file} is empty")
    return template


def read_tools(file: str | None) -> Tools:
    """Returns the functions in a JSON file, in OpenAI's form. Raises ValueError if the file has anything else."""
    if file is None:
        return None
    expected = '[{"type": "function", "function": {"name": …, "parameters": …}}]'
    try:
        tools = json.loads(_read_text("tools", file))
    except (ValueError, RecursionError) as e:
        if isinstance(e, RecursionError | json.JSONDecodeError):
            raise ValueError(f"tools: {file} is not JSON ({e}); expected {expected}") from e
        raise
    is_list = isinstance(tools, list) and bool(tools)
    functions = [tool.get("function") if isinstance(tool, dict) else None for tool in tools] if is_list else [None]
    if not all(isinstance(f, dict) and isinstance(f.get("name"), str) for f in functions):
        raise ValueError(f"tools: {file} must have a list of functions, {expected}")
    return tools


def _read_text(key: str, file: str) -> str:
    try:
        return _decode_utf8(Path(file).expanduser().read_bytes(), file)
    except OSError as e:
        raise ValueError(f"{key}: {file} cannot be read: {e.strerror or e}") from e


def check_output(key: str, path: Path, inputs: Iterable[str | Path | None]) -> None:
    """Raises ValueError, before any work is done, if an output file cannot be written or is one of the inputs."""
    if not os.path.isdir(path.parent):
        raise ValueError(f"{key}: folder {path.parent} does not exist")
    if os.path.isdir(path):
        raise ValueError(f"{key}: {path} is a folder")
    exists = os.path.exists(path)
    if exists and any(file is not None and os.path.exists(file) and path.samefile(file) for file in inputs):
        raise ValueError(f"{key}: {path} is the input file, which would be overwritten; choose another file")
    try:
        if exists and not path.is_file():  # opening a pipe would wait for its reader
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        with open(path, "ab"):  # fails for broken links, long names and other errors that permissions do not show
            pass
        if not exists:
            os.remove(os.path.realpath(path))
    except (OSError, ValueError) as e:
        raise ValueError(f"{key}: {path} cannot be written: {getattr(e, 'strerror', None) or e}") from e


def _check_prompt(value: Any, location: str) -> Prompt:
    """Returns the prompt of a row: text, token ids or messages, bare or in an object. Raises ValueError otherwise."""
    if isinstance(value, dict):
        if (name := _find_prompt_key([key for key, x in value.items() if x is not None])) is None:
            keys = ", ".join(map(repr, value)) or "nothing"
            raise ValueError(f"{location}: must be {ACCEPTED_ROWS}, got an object with {keys}")
        value = value[name]
    is_list = isinstance(value, list) and bool(value)
    is_ids = is_list and all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in value)
    is_chat = is_list and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)
    if not (is_ids or is_chat or (isinstance(value, str) and value.strip())):
        raise ValueError(f"{location}: must be {ACCEPTED_ROWS}, got {repr(value)[:60]}")
    messages: Any = value
    for text in [x for message in messages for x in message.values()] if is_chat else [value]:
        if isinstance(text, str) and re.search("[\ud800-\udfff]", text):
            raise ValueError(f"{location}: contains half of a surrogate pair, which is not valid text")
    return value


def _decode_utf8(content: bytes, file: str) -> str:
    """Decodes UTF-8, with or without a byte order mark. The ValueError for an invalid byte names its line."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        encoding = "utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin1"
        message = f"{file}, line {line}: byte {content[e.start]:#04x} is not UTF-8; convert the file first"
        raise ValueError(f"{message}, for example iconv -f {encoding} -t utf-8") from e


def _parse_json(text: str, location: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:  # also for numbers with thousands of digits, and deep nesting
        raise ValueError(f"{location}: must be {ACCEPTED_ROWS}, got {text[:60]!r} ({e})") from e


def _read_lines(content: bytes, file: str) -> Rows:
    """Yields the location and text of each line that is not blank. Only "\\n" ends a line, as in other tools."""
    for number, line in enumerate(_decode_utf8(content, file).split("\n"), 1):
        if "\0" in line:
            raise ValueError(f"{file}, line {number}: has a NUL character, so it is not a text file; set task.format")
        if line := line.strip():
            yield f"line {number}", line


def _read_jsonl(content: bytes, file: str) -> Rows:
    for location, line in _read_lines(content, file):
        yield location, _parse_json(line, f"{file}, {location}")


def _read_json(content: bytes, file: str) -> Rows:
    """Yields the location and value of each element of one JSON array."""
    values = _parse_json(_decode_utf8(content, file), file)
    if not isinstance(values, list):
        elements = f"whose elements are each {ACCEPTED_ROWS}"
        raise ValueError(f"{file}: must be an array {elements}; name it .jsonl if each line is an object")
    for i, value in enumerate(values):
        yield f"element {i}", value


def _read_csv(content: bytes, file: str, delimiter: str = ",") -> Rows:
    reader = csv.DictReader(io.StringIO(_decode_utf8(content, file), newline=""), delimiter=delimiter, strict=True)
    csv.field_size_limit(2**31 - 1)  # for the process; long prompts exceed the default of 128 KiB
    try:
        names = reader.fieldnames or ()
        column = _find_prompt_column(names, file)
        if names.count(column) > 1:
            raise ValueError(f"{file}: has {names.count(column)} columns {column!r}")
        for row in reader:
            location = f"line {reader.line_num}"
            if None in row:
                sizes = f"{len(names) + len(row[None])} fields for {len(names)} columns"
                raise ValueError(f"{file}, {location}: has {sizes}: put texts that contain the delimiter in quotes")
            value = row[column]
            yield location, _parse_json(value or "", f"{file}, {location}") if column != "prompt" else value
    except csv.Error as e:
        raise ValueError(f"{file}, line {reader.line_num}: {e}") from e


def _read_parquet(content: bytes, file: str) -> Rows:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as e:
        raise ValueError(f"{file}: reading Parquet needs pyarrow: pip install pyarrow") from e
    try:
        table = parquet.read_table(pyarrow.BufferReader(content))
    except (pyarrow.ArrowException, OSError) as e:
        raise ValueError(f"{file}: cannot be read as Parquet: {e}") from e
    for i, value in enumerate(table.column(_find_prompt_column(table.column_names, file)).to_pylist()):
        yield f"row {i}", value


def _find_prompt_key(names: Collection[str]) -> str | None:
    """Returns which key of an object or column of a table is the prompt: messages, else token ids, else text."""
    return next((name for name in ("messages", "prompt_token_ids", "prompt") if name in names), None)


def _find_prompt_column(names: Sequence[str], file: str) -> str:
    """Returns the column of a table that has the prompts. Raises ValueError if no column has them."""
    if (name := _find_prompt_key(names)) is None:
        raise ValueError(f"{file}: needs a column 'prompt' or 'messages', has {', '.join(map(repr, names)) or 'none'}")
    return name


READERS: dict[str, Callable[[bytes, str], Rows]] = {
    "text": _read_lines, "jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv,
    "tsv": partial(_read_csv, delimiter="\t"), "parquet": _read_parquet,
}  # fmt: skip
FORMATS = tuple(READERS)
SUFFIXES = {".txt": "text", ".ndjson": "jsonl", "": "text"} | {f".{name}": name for name in FORMATS if name != "text"}
