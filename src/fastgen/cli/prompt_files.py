"""Reads prompts from files (text, JSON, CSV, Parquet, chosen by the suffix), and checks files that will be written."""

import codecs
import csv
import errno
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from fastgen.core.tokenizer import Prompt

FORMATS = ("text", "jsonl", "json", "csv", "tsv", "parquet")
SUFFIXES = {".txt": "text", ".ndjson": "jsonl", "": "text"} | {f".{name}": name for name in FORMATS[1:]}
ACCEPTED_ROWS = (
    "a text, a list of token ids, a list of messages, or an object with 'prompt', 'prompt_token_ids' or 'messages'"
)
STANDARD_INPUT, STANDARD_OUTPUT = ("-", "/dev/stdin"), ("-", "/dev/stdout")
GZIP_MAGIC = b"\x1f\x8b"  # the first bytes, which no text in UTF-8 has


def read_prompts(file: str, format: str | None = None) -> list[Prompt]:
    """Reads all prompts of a file, or of standard input (`-`).

    `format` is one of FORMATS. None takes it from the suffix; standard input and files without a suffix are text, a
    prompt a line. What is packed by gzip is unpacked. Text is UTF-8, with or without a byte order mark. CSV and Parquet
    have a column `prompt` or `messages` (in CSV, messages are JSON). ValueError names the file and the line or row.
    """
    if file not in STANDARD_INPUT:
        file = os.path.expanduser(file)
    suffix = "" if file in STANDARD_INPUT else Path(file.lower().removesuffix(".gz")).suffix
    if format is None and (format := SUFFIXES.get(suffix)) is None:
        known = ", ".join(s for s in SUFFIXES if s)
        raise ValueError(f"{file}: cannot tell its format from {suffix!r} (known: {known}); give task.format")
    if file not in STANDARD_INPUT:
        if os.path.isdir(file):
            raise ValueError(f"task.prompts: {file} is a folder")
        if not os.path.exists(file):
            raise ValueError(f"task.prompts: there is no file {file}")
    try:
        with _open_binary(file) as raw:
            content = raw.read()
        if file.lower().endswith(".gz") or content.startswith(GZIP_MAGIC):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as e:
        raise ValueError(f"{file}: cannot be read: {e}") from e
    prompts = [_check_prompt(value, f"{file}, {where}") for where, value in READERS[format](content, file)]
    if not prompts:
        raise ValueError(f"task.prompts: {file} is empty")
    return prompts


def check_output(key: str, path: Path, inputs: Iterable[str | Path | None]) -> None:
    """Raises ValueError where a file cannot be written, or is one of the inputs: better now than after the work."""
    if not os.path.isdir(path.parent):
        raise ValueError(f"{key}: there is no folder {path.parent}")
    if os.path.isdir(path):
        raise ValueError(f"{key}: {path} is a folder")
    is_there = os.path.exists(path)
    for file in inputs:
        if file is not None and is_there and os.path.exists(file) and path.samefile(file):
            raise ValueError(f"{key}: {path} is the input itself, and would be overwritten; give another file")
    try:
        if is_there and not path.is_file():  # to open a pipe would wait for its reader
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        with open(path, "ab"):  # tells what no permission does: links that lead nowhere, names that are too long, ...
            pass
        if not is_there:
            os.remove(os.path.realpath(path))
    except (OSError, ValueError) as e:
        raise ValueError(f"{key}: {path} cannot be written: {getattr(e, 'strerror', None) or e}") from e


def _open_binary(file: str) -> BinaryIO:
    """Opens a file, or standard input, which stays open for others."""
    return open(sys.stdin.fileno(), "rb", closefd=False) if file in STANDARD_INPUT else open(file, "rb")


def _check_prompt(value: Any, where: str) -> Prompt:
    """Checks that a value is a prompt: text, token ids or messages, bare or in an object; anything else is refused."""
    if isinstance(value, dict):
        if (name := _find_prompt_key(value, lambda name: value.get(name) is not None)) is None:
            raise ValueError(
                f"{where}: must be {ACCEPTED_ROWS}, got an object with {', '.join(map(repr, value)) or 'nothing'}"
            )
        value = value[name]
    is_list = isinstance(value, list) and bool(value)
    ids = is_list and all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in value)
    chat = is_list and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)
    if not (ids or chat or (isinstance(value, str) and value.strip())):
        raise ValueError(f"{where}: must be {ACCEPTED_ROWS}, got {repr(value)[:60]}")
    rows: Any = value
    texts = [x for message in rows for x in message.values()] if chat else [value]
    for text in texts:
        if isinstance(text, str) and not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"{where}: half of a surrogate pair is in it, so this is no text")
    return value


def _decode_utf8(content: bytes, file: str) -> str:
    """Decodes UTF-8, with or without a byte order mark. ValueError names the line of a byte that is no UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        source = "utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin1"
        raise ValueError(
            f"{file}, line {line}: byte {content[e.start]:#04x} is not UTF-8; convert the file first, for example "
            f"iconv -f {source} -t utf-8"
        ) from e


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:  # no JSON, numbers of thousands of digits; nested too deep
        raise ValueError(f"{where}: must be {ACCEPTED_ROWS}, got {text[:60]!r} ({e})") from e


def _read_lines(content: bytes, file: str) -> Iterator[tuple[str, str]]:
    """Yields the place and text of each line that is not blank; only newlines end a line, as in other tools."""
    for number, line in enumerate(_decode_utf8(content, file).split("\n"), 1):
        if "\0" in line:
            raise ValueError(f"{file}, line {number}: has a NUL character, so this is no text file; give task.format")
        if line := line.strip():
            yield f"line {number}", line


def _read_jsonl(content: bytes, file: str) -> Iterator[tuple[str, Any]]:
    for where, line in _read_lines(content, file):
        yield where, _parse_json(line, f"{file}, {where}")


def _read_json(content: bytes, file: str) -> Iterator[tuple[str, Any]]:
    """Yields the elements of one JSON array."""
    values = _parse_json(_decode_utf8(content, file), file)
    if not isinstance(values, list):
        raise ValueError(
            f"{file}: must be an array whose elements are each {ACCEPTED_ROWS}; for an object a line, name it .jsonl"
        )
    for i, value in enumerate(values):
        yield f"element {i}", value


def _read_csv(content: bytes, file: str, delimiter: str = ",") -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(_decode_utf8(content, file), newline=""), delimiter=delimiter, strict=True)
    csv.field_size_limit(2**31 - 1)  # of the process; by default 128 KiB, which long prompts exceed
    try:
        names = reader.fieldnames or ()
        column = _find_prompt_column(names, file)
        if names.count(column) > 1:
            raise ValueError(f"{file}: has {names.count(column)} columns {column!r}")
        for row in reader:
            where = f"line {reader.line_num}"
            if None in row:
                raise ValueError(
                    f"{file}, {where}: has {len(names) + len(row[None])} fields for {len(names)} columns: put a text "
                    "with the delimiter in it in double quotes"
                )
            value = row[column]
            yield where, _parse_json(value or "", f"{file}, {where}") if column != "prompt" else value
    except csv.Error as e:
        raise ValueError(f"{file}, line {reader.line_num}: {e}") from e


def _read_tsv(content: bytes, file: str) -> Iterator[tuple[str, Any]]:
    return _read_csv(content, file, "\t")


def _read_parquet(content: bytes, file: str) -> Iterator[tuple[str, Any]]:
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


def _find_prompt_key(names: Iterable[str], has_value: Callable[[str], bool] = lambda _: True) -> str | None:
    """Returns which of an object's keys or a table's columns is the prompt, or None; messages come before text."""
    return next((n for n in ("messages", "prompt_token_ids", "prompt") if n in names and has_value(n)), None)


def _find_prompt_column(names: Sequence[str], file: str) -> str:
    """Returns which of a table's columns holds the prompts."""
    if (name := _find_prompt_key(names)) is None:
        raise ValueError(f"{file}: needs a column 'prompt' or 'messages', has {', '.join(map(repr, names)) or 'none'}")
    return name


READERS: dict[str, Callable[[bytes, str], Iterator[tuple[str, Any]]]] = {
    "text": _read_lines,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "parquet": _read_parquet,
}
