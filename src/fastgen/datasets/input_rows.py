"""Reads the rows of a JSONL, CSV, TSV or Parquet file one after the other, without holding the file in memory."""

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from fastgen.extras import install_command

Record = dict[str, Any]
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
PARQUET_BATCH_ROWS = 256
HASH_CHUNK_BYTES = 2**20


class RowError(ValueError):
    """A row of the input that cannot run. `column` names the column with the error, if there is one."""

    def __init__(self, reason: str, column: str | None = None) -> None:
        super().__init__(reason)
        self.column = column


@dataclass(frozen=True, slots=True)
class InputRow:
    """A row of the input: its index among the rows, its line in the file, and a function that parses it."""

    index: int
    line: int  # counted from 1; of a Parquet file, the row counted from 1
    load: Callable[[], Record]  # raises RowError


@dataclass(frozen=True, slots=True)
class InputFile:
    """An input file. `digest` is that of its decompressed contents. `num_rows` counts lines, without reading them."""

    path: Path
    format: str
    columns: tuple[str, ...] | None  # None: each row has its own
    digest: str
    num_rows: int

    def rows(self) -> Iterator[InputRow]:
        """Yields the rows in order. Raises ValueError if the file as a whole cannot be read."""
        try:
            yield from READERS[self.format](self.path)
        except (OSError, EOFError, zlib.error) as e:
            raise ValueError(f"{self.path}: cannot be read: {e}") from e


def open_input(path: Path, format: str = "auto") -> InputFile:
    """Reads a file's digest and columns. `format` auto is that of the suffix. Raises ValueError, with the remedy."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if format == "auto" and (format := SUFFIXES.get(suffix, "")) == "":
        known = ", ".join(SUFFIXES)
        raise ValueError(f"{path}: unknown suffix {suffix!r} (known: {known}); set dataset.input_format")
    if not path.is_file():
        raise ValueError(f"the input {path} {'is a folder' if path.is_dir() else 'does not exist'}")
    if format == "parquet" and path.name.lower().endswith(".gz"):
        raise ValueError(f"{path}: Parquet compresses its own pages; decompress the file with gunzip")
    digest, num_lines = hashlib.blake2b(digest_size=16), 0
    try:
        with _open(path) as f:
            while chunk := f.read(HASH_CHUNK_BYTES):
                digest.update(chunk)
                num_lines += chunk.count(b"\n")
    except (OSError, EOFError, zlib.error) as e:
        raise ValueError(f"{path}: cannot be read: {e}") from e
    columns: tuple[str, ...] | None = None
    if format == "parquet":
        file = _parquet_file(path)
        columns, num_lines = tuple(file.schema_arrow.names), file.metadata.num_rows
    elif format in ("csv", "tsv"):
        columns = tuple(_read_header(path, "\t" if format == "tsv" else ","))
        num_lines -= 1
    return InputFile(path, format, columns, digest.hexdigest(), max(num_lines, 0))


def _open(path: Path) -> io.BufferedIOBase:
    """Opens a file for reading, decompressed if it is compressed with gzip, whatever its name."""
    with open(path, "rb") as f:
        is_gzip = f.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if is_gzip else open(path, "rb")


def _parse_json(line: bytes) -> Any:
    """Returns the value of a line of JSON. Raises RowError if it is none."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise RowError(f"byte {line[e.start]:#04x} is not UTF-8") from e
    except (ValueError, RecursionError) as e:
        raise RowError(f"the line is not JSON: {e}") from e


def _parse_record(line: bytes) -> Record:
    value = _parse_json(line)
    if isinstance(value, str | list):
        return {"messages" if isinstance(value, list) and value and isinstance(value[0], dict) else "prompt": value}
    if not isinstance(value, dict):
        raise RowError(f"the line must be a JSON object, a text or a list, got {line[:60].decode(errors='replace')}")
    return value


def _read_jsonl(path: Path) -> Iterator[InputRow]:
    """Yields each line that is not blank."""
    index = 0
    with _open(path) as f:
        for number, line in enumerate(f, 1):
            if not line.isspace():
                yield InputRow(index, number, partial(_parse_record, line))
                index += 1


def _text(path: Path) -> io.TextIOWrapper:
    """Opens a table as text. Bytes that are not UTF-8 become lone surrogates, which `_parse_fields` rejects."""
    csv.field_size_limit(2**31 - 1)  # for the process; long prompts exceed the default of 128 KiB
    return io.TextIOWrapper(cast(Any, _open(path)), encoding="utf-8-sig", errors="surrogateescape", newline="")


def _read_header(path: Path, delimiter: str) -> list[str]:
    with _text(path) as f:
        try:
            names = next(csv.reader(f, delimiter=delimiter, strict=True), [])
        except csv.Error as e:
            raise ValueError(f"{path}, line 1: {e}") from e
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{path}: has {names.count(repeated[0])} columns {repeated[0]!r}")
    return names


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[InputRow]:
    names = _read_header(path, delimiter)
    with _text(path) as f:
        reader = csv.reader(f, delimiter=delimiter, strict=True)
        next(reader, None)
        index = 0
        while True:
            line = reader.line_num + 1
            try:
                if not (values := next(reader)):
                    continue
            except StopIteration:
                return
            except csv.Error as e:
                yield InputRow(index, line, partial(_raise, RowError(f"the line is not CSV: {e}")))
            else:
                yield InputRow(index, line, partial(_parse_fields, names, values))
            index += 1


def _raise(error: RowError) -> Record:
    raise error


def _parse_fields(names: list[str], values: list[str]) -> Record:
    if len(names) != len(values):
        advice = "put texts that contain the delimiter in quotes"
        raise RowError(f"has {len(values)} fields for {len(names)} columns: {advice}")
    for name, value in zip(names, values, strict=True):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as e:
                raise RowError("the text is not UTF-8", name) from e
    return dict(zip(names, values, strict=True))


def import_parquet() -> Any:
    """Returns `pyarrow.parquet`. Raises ValueError with the command that installs it."""
    try:
        from pyarrow import parquet
    except ImportError as e:
        raise ValueError(f"Parquet needs pyarrow: {install_command('data')}") from e
    return parquet


def _parquet_file(path: Path) -> Any:
    parquet = import_parquet()
    try:
        return parquet.ParquetFile(path)
    except (ValueError, OSError) as e:  # pyarrow's exceptions are both
        raise ValueError(f"{path}: cannot be read as Parquet: {e}") from e


def _read_parquet(path: Path) -> Iterator[InputRow]:
    index = 0
    try:
        with _parquet_file(path) as file:
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, use_threads=False):
                for i in range(batch.num_rows):
                    yield InputRow(index, index + 1, partial(_load_parquet_row, batch, i))
                    index += 1
    except (ValueError, OSError) as e:
        raise ValueError(f"{path}: cannot be read as Parquet after row {index}: {e}") from e


def _load_parquet_row(batch: Any, i: int) -> Record:
    return batch.slice(i, 1).to_pylist()[0]


READERS: dict[str, Callable[[Path], Iterator[InputRow]]] = {
    "jsonl": _read_jsonl, "csv": _read_csv, "tsv": partial(_read_csv, delimiter="\t"),
    "parquet": _read_parquet,
}  # fmt: skip
