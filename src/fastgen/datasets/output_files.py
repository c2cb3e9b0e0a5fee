"""Writes the rows of a run so that a killed run can go on: a manifest, a journal of each open file, and whole files.

    OUT/manifest.json                  what decides the output; another run is refused
    OUT/part-00000.jsonl               the completions of rows_per_file input rows, in input order
    OUT/errors-00000.jsonl             the rows of that file that could not run, if there are any
    OUT/progress/part-00000.journal    the finished rows of a file that is not complete yet, in the order they finished
    OUT/progress/part-00000.json       counts of a complete file, for the summary

A row is written to the journal when it finishes, with one call to the operating system, so killing the process loses at
most the rows in flight. Every other file is written under a temporary name, synced to disk and renamed.
"""

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from fastgen.datasets.input_rows import Record, import_parquet

PARQUET_GROUP_ROWS = 1000  # records of a row group: those that are in memory at a time
OUTPUT_SUFFIXES = {"jsonl": ".jsonl", "parquet": ".parquet"}


def dump_json(value: Any) -> bytes:
    """Returns a line of JSON as UTF-8, with its line end."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, chunks: Iterable[bytes]) -> None:
    """Writes a file under a temporary name, syncs it to disk and renames it: readers see all of it or nothing."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(scratch, "wb") as f:
            f.writelines(chunks)
            f.flush()
            os.fsync(f.fileno())
        os.replace(scratch, path)
        _sync_folder(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def _write_parquet(path: Path, records: Iterable[Record], schema: Any) -> None:
    import pyarrow

    parquet = import_parquet()
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with parquet.ParquetWriter(scratch, schema) as writer:
            group = list[Record]()
            for record in records:
                group.append(record)
                if len(group) == PARQUET_GROUP_ROWS:
                    writer.write_table(pyarrow.Table.from_pylist(group, schema))
                    group = []
            writer.write_table(pyarrow.Table.from_pylist(group, schema))
        with open(scratch, "rb") as f:
            os.fsync(f.fileno())
        os.replace(scratch, path)
        _sync_folder(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, member in value.items():
            yield from _flatten(member, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def check_manifest(path: Path, manifest: Record) -> None:
    """Checks the manifest of a run, which is written if there is none.

    Raises ValueError, with each difference, if the folder has the manifest of another run. `created` may differ.
    """
    manifest = json.loads(json.dumps(manifest))
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        write_atomically(path, [json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n"])
        return
    except ValueError as e:
        raise ValueError(f"{path} is not a manifest of fastgen: {e}") from e
    then, now = dict(_flatten(saved)), dict(_flatten(manifest))
    names = [name for name in dict.fromkeys([*then, *now]) if name != "created" and then.get(name) != now.get(name)]
    if names:
        changes = "; ".join(f"{name} was {then.get(name)!r:.80} and is {now.get(name)!r:.80}" for name in names)
        advice = "run with the same settings to go on, or choose another folder"
        raise ValueError(f"{path.parent} has the output of another run: {changes}. To resume, {advice}")


class Journal:
    """The finished rows of an output file that is not complete yet. One process at a time has it open."""

    def __init__(self, path: Path) -> None:
        """Reads the rows that have finished. Raises ValueError if another process has the journal open."""
        self.path, self.offsets = path, dict[int, int]()  # row -> position of its entry
        self._file: BinaryIO = open(path, "a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            self._file.close()
            raise ValueError(f"{path} is open in another process: one run at a time writes an output file") from e
        self._size = 0
        with open(path, "rb") as f:
            for line in f:
                try:
                    entry = json.loads(line) if line.endswith(b"\n") else None
                    row = entry["row"]  # type: ignore[index]
                except (ValueError, TypeError, LookupError):
                    break  # written in part, when the machine stopped: this row and those after it run again
                self.offsets[row] = self._size
                self._size += len(line)
        self._file.truncate(self._size)

    def append(self, entry: Record) -> None:
        """Adds the entry of a row, `{"row": …, "records": […]}` or with `"error"`."""
        data = dump_json(entry)
        self.offsets[entry["row"]] = self._size
        self._size += len(data)
        while data:
            data = data[self._file.write(data) :]

    def entries(self) -> Iterator[Record]:
        """Yields the entries in the order of the rows."""
        with open(self.path, "rb") as f:
            for row in sorted(self.offsets):
                f.seek(self.offsets[row])
                yield json.loads(f.readline())

    def close(self, *, delete: bool = False) -> None:
        """Closes the file, and deletes it if its rows are elsewhere."""
        if delete:
            self.path.unlink(missing_ok=True)
        self._file.close()


class OutputFolder:
    """The output files of a run, of `rows_per_file` input rows each."""

    def __init__(self, folder: Path, rows_per_file: int, output_format: str, schema: Any = None) -> None:
        """`schema` is the pyarrow schema of Parquet files."""
        self.folder, self.rows_per_file, self.schema = folder, rows_per_file, schema
        self.suffix = OUTPUT_SUFFIXES[output_format]
        self.journals = dict[int, Journal]()
        (folder / "progress").mkdir(parents=True, exist_ok=True)

    def part_path(self, part: int) -> Path:
        """Returns the path of an output file."""
        return self.folder / f"part-{part:05}{self.suffix}"

    def counts_path(self, part: int) -> Path:
        """Returns the path of an output file's counts."""
        return self.folder / "progress" / f"part-{part:05}.json"

    def journal(self, part: int) -> Journal | None:
        """Returns the open journal of an output file; None if the file is complete."""
        if part not in self.journals:
            path = self.folder / "progress" / f"part-{part:05}.journal"
            if self.part_path(part).exists():
                path.unlink(missing_ok=True)  # left by a process that was killed between the two
                return None
            journal = Journal(path)
            if self.part_path(part).exists():  # completed by another process meanwhile
                journal.close(delete=True)
                return None
            self.journals[part] = journal
        return self.journals[part]

    def finish(self, part: int) -> None:
        """Writes an output file, its errors and its counts from its journal, which is then deleted."""
        journal, counts, errors = self.journals[part], Counter[str](), list[bytes]()
        for entry in journal.entries():
            counts.update({"rows": 1} | entry.get("counts", {}))
            if "error" in entry:
                counts["errors"] += 1
                errors.append(dump_json(entry["error"]))
        path, records = self.part_path(part), (r for entry in journal.entries() for r in entry.get("records", ()))
        # The errors are written first: where there is an output file, everything of its rows is there.
        if errors:
            write_atomically(self.folder / f"errors-{part:05}.jsonl", errors)
        write_atomically(self.counts_path(part), [dump_json(dict(sorted(counts.items())))])
        if self.schema is not None:
            _write_parquet(path, records, self.schema)
        else:
            write_atomically(path, map(dump_json, records))
        self.journals.pop(part).close(delete=True)

    def close(self) -> None:
        """Closes the journals of files that are not complete."""
        for journal in self.journals.values():
            journal.close()
        self.journals.clear()

    def total_counts(self, parts: Iterable[int]) -> Counter[str]:
        """Returns the sums of the counts of complete output files."""
        total = Counter[str]()
        for part in parts:
            with suppress(FileNotFoundError):
                total.update(json.loads(self.counts_path(part).read_text()))
        return total
