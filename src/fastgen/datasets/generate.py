"""`generate_dataset`: reads rows, keeps the scheduler full, writes each row as it finishes, and resumes."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from fastgen.config import DatasetConfig, check_int, unknown_name_message
from fastgen.core.request import Output
from fastgen.datasets.input_rows import InputFile, InputRow, Record, RowError, open_input
from fastgen.datasets.output_files import OutputFolder, check_manifest, write_atomically
from fastgen.datasets.prompt_rows import PromptRows, RowProcessor, RowRequest
from fastgen.engine import Engine
from fastgen.sampling_params import SamplingParams
from fastgen.snapshot import model_fingerprint

MANIFEST_FORMAT = 1  # of manifest.json, the journal and the order of the output


def generate_dataset(
    engine: Engine,
    source: str | Path,
    out: str | Path,
    sampling: SamplingParams | None = None,
    *,
    seed: int = 0,
    chat: bool = True,
    template_options: Mapping[str, Any] | None = None,
    model: str = "",
    progress: bool | None = None,
    **settings: Any,
) -> Record:
    """Generates for each row of a file and writes the completions to files in the folder `out`; returns the summary.

    `source` is a JSONL (also .gz), CSV, TSV or Parquet file. The settings are the fields of `DatasetConfig`
    (`prompt="question", keep=("id",), output_format="parquet"`). Rows are read and written as they finish, so memory
    does not grow with the number of rows. The same call goes on after the process was killed: no row that has finished
    runs again, and each row has a seed of its own, a hash of `seed` and the row's index.

    `chat`: a text is a user message if the model has a chat template. `template_options` are options of `ChatPrompt`.
    `model` is the name that the output records. `progress` None shows a bar on a terminal.

    Raises ValueError if `out` has the output of another run, with the differences, and, with `on_error="stop"`, at the
    first row that cannot run. Nothing else may run on the engine meanwhile.
    """
    config = make_config(settings)
    check_int("seed", seed, -(2**63), 2**63 - 1)
    sampling = SamplingParams() if sampling is None else sampling
    input_file = open_input(Path(source).expanduser(), config.input_format)
    identity = model_identity(engine, model)
    constants = {name: identity[name] for name in ("model", "params", "fastgen")}
    options = {
        "seed": seed, "chat": chat, "template_options": template_options or {}, "constants": constants,
    }  # fmt: skip
    rows = PromptRows(engine, input_file, sampling, config, **options)
    return run_rows(engine, input_file, Path(out), rows, config, identity, schema=rows.schema, progress=progress)


def make_config(settings: Mapping[str, Any]) -> DatasetConfig:
    """Returns the settings of a run. Raises ValueError for an unknown name, with the nearest known ones."""
    names = [f.name for f in fields(DatasetConfig)]
    if unknown := [name for name in settings if name not in names]:
        raise ValueError(unknown_name_message("argument of generate_dataset", unknown[0], names))
    return DatasetConfig(**settings)


def model_identity(engine: Engine, model: str) -> Record:
    """Returns what decides an engine's tokens: the model's name and a digest of its parameters, and the versions."""
    if not isinstance(engine, Engine):
        advice = "start a process for each GPU with shard=0/8 to 7/8 instead of replicas"
        raise ValueError(f"a dataset run needs an Engine, got {type(engine).__name__}: {advice}")
    return {
        "model": model,
        "params": model_fingerprint(engine.core),
        "fastgen": import_module("fastgen").__version__,
        "torch": str(torch.__version__),
        "device": engine.device.type,
        "batch_invariant": engine.config.compile.batch_invariant,
    }


@dataclass(slots=True)
class _Pending:
    """A row in flight."""

    request: RowRequest
    part: int
    outputs: dict[int, Output | None] = field(default_factory=dict)  # by request id, in the order of the prompts


class _Bar(tqdm):
    """Shows rows, rows/s, tokens/s and the remaining time."""

    num_tokens = 0
    initial = 0  # rows that were there already; a bar that is not shown does not set it

    @property
    def format_dict(self) -> dict[str, Any]:
        values = super().format_dict
        rate = self.num_tokens / values["elapsed"] if values["elapsed"] else 0.0
        return dict(values) | {"token_rate": f"{rate:,.1f}"}


BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} rows [{elapsed}<{remaining}, {rate_fmt}, {token_rate} tokens/s]"


class DatasetRun:
    """A run of rows on an engine: which rows are in flight, and which output files are complete."""

    def __init__(
        self, engine: Engine, source: InputFile, folder: OutputFolder, rows: RowProcessor, config: DatasetConfig
    ) -> None:
        self.engine, self.source, self.folder, self.rows, self.config = engine, source, folder, rows, config
        self.shard, self.num_shards = config.shard_index_and_count
        self.window = config.max_in_flight or 2 * engine.config.schedule.max_num_seqs
        self.bar = _Bar(disable=True)
        self.pending = dict[int, _Pending]()  # by request id
        self.num_in_flight = 0  # completions
        self.part_sizes = dict[int, int]()  # rows of the files that have been read to their end and are not complete
        self.num_input_rows = 0
        self.num_new_rows = self.num_new_tokens = 0

    def run(self, bar: _Bar) -> None:
        """Runs all rows that have not finished. An error or interrupt aborts those in flight, and is raised."""
        if self.engine.has_unfinished_requests:
            raise ValueError("a dataset run needs the engine for itself, and requests are running: let them end first")
        self.bar, unfinished = bar, self._unfinished_rows()
        try:
            while self._submit(unfinished) or self.pending:
                for event in self.engine.step():
                    self.num_new_tokens += len(event.token_ids)
                    bar.num_tokens += len(event.token_ids)
                    if event.output is not None:
                        self._collect(event.request_id, event.output)
        finally:
            if self.pending and not self.engine.access_guard.closed:
                self.engine.requests.abandoned.append(frozenset(self.pending))
                self.engine.requests.drain_aborts()
            self.folder.close()

    def _unfinished_rows(self) -> Iterator[InputRow]:
        """Yields the rows of this shard that have no entry yet, and notes how many rows each output file has."""
        size, part = self.config.rows_per_file, 0
        for row in self.source.rows():
            self.num_input_rows = row.index + 1
            if row.index // size != part:
                self._set_part_size(part, size)
                part = row.index // size
            if part % self.num_shards != self.shard:
                continue
            journal = self.folder.journal(part)
            if journal is None or row.index in journal.offsets:
                self.bar.initial += 1  # not part of the rate
                self.bar.update(1)
            else:
                yield row
        if last := self.num_input_rows - part * size:
            self._set_part_size(part, last)

    def _set_part_size(self, part: int, num_rows: int) -> None:
        if part % self.num_shards == self.shard and self.folder.journal(part) is not None:
            self.part_sizes[part] = num_rows
            self._finish_if_complete(part)

    def _finish_if_complete(self, part: int) -> None:
        if len(self.folder.journals[part].offsets) == self.part_sizes.get(part):
            self.folder.finish(part)
            del self.part_sizes[part]

    def _submit(self, rows: Iterator[InputRow]) -> bool:
        """Queues rows until enough completions are in flight. Returns whether any were queued."""
        new = list[_Pending]()
        while self.num_in_flight < self.window and (row := next(rows, None)) is not None:
            part = row.index // self.config.rows_per_file
            try:
                request = self.rows.prepare(row)
            except RowError as e:
                self._write_error(row, part, e)
                continue
            new.append(_Pending(request, part))
            self.num_in_flight += request.num_completions
        prompts = [(pending, *pair) for pending in new for pair in pending.request.prompts]
        if prompts:
            arguments = [prompt for _, prompt, _ in prompts], [sampling for _, _, sampling in prompts]
            ids = self.engine.add_many(*arguments, stream_text=False, on_error="skip")
            for request_id, (pending, _, _) in zip(ids, prompts, strict=True):
                self.pending[request_id] = pending
                pending.outputs[request_id] = None
        return bool(prompts)

    def _collect(self, request_id: int, output: Output) -> None:
        """Takes an output, and writes the row if it is the row's last one."""
        pending = self.pending.pop(request_id)
        pending.outputs[request_id] = output
        done = [output for output in pending.outputs.values() if output is not None]
        if len(done) < len(pending.outputs):
            return
        request = pending.request
        self.num_in_flight -= request.num_completions
        try:
            records = self.rows.to_records(request, done)
        except RowError as e:
            self._write_error(request.row, pending.part, e)
            return
        counts = {
            "completions": sum(len(o.completions) for o in done),
            "prompt_tokens": sum(len(o.prompt_token_ids) for o in done),
            "output_tokens": sum(len(c.token_ids) for o in done for c in o.completions),
        }
        for completion in (c for o in done for c in o.completions):
            reason = f"finish_reason_{completion.finish_reason}"
            counts[reason] = counts.get(reason, 0) + 1
        self._write(pending.part, {"row": request.row.index, "records": records, "counts": counts})

    def _write_error(self, row: InputRow, part: int, error: RowError) -> None:
        if self.config.on_error == "stop":
            column = f", column {error.column}" if error.column else ""
            raise ValueError(f"{self.source.path}, line {row.line}{column}: {error}") from error
        self._write(part, {"row": row.index} | self.rows.error_entry(row, error))

    def _write(self, part: int, entry: Record) -> None:
        journal = self.folder.journal(part)
        assert journal is not None, part
        journal.append(entry)
        self.num_new_rows += 1
        self.bar.update(1)
        self._finish_if_complete(part)


def run_rows(
    engine: Engine,
    source: InputFile,
    out: Path,
    rows: RowProcessor,
    config: DatasetConfig,
    identity: Record,
    *,
    schema: Any = None,
    progress: bool | None = None,
) -> Record:
    """Runs the rows of a file and writes the output files of this shard; returns the summary.

    `identity` says which model on which versions makes the tokens. `schema` is that of Parquet files.
    """
    manifest = {
        "format": MANIFEST_FORMAT, "input": {"format": source.format, "digest": source.digest}, "settings":
        rows.settings(), "engine": identity, "created": int(time.time()),
    }  # fmt: skip
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file; a dataset run writes a folder")
    out.mkdir(parents=True, exist_ok=True)
    check_manifest(out / "manifest.json", manifest)
    folder = OutputFolder(out, config.rows_per_file, config.output_format, schema)
    run = DatasetRun(engine, source, folder, rows, config)
    stats, start = engine.cache_stats, time.perf_counter()
    before = stats.num_queried_tokens, stats.num_hit_tokens
    disable = None if progress is None else not progress
    with _Bar(
        total=source.num_rows if run.num_shards == 1 else None, disable=disable, leave=False, bar_format=BAR_FORMAT
    ) as bar:
        run.run(bar)
    seconds, stats = time.perf_counter() - start, engine.cache_stats
    summary = _summarize(folder, range(run.shard, _num_parts(run), run.num_shards), run.num_input_rows)
    summary["this_run"] = {
        "seconds": round(seconds, 3), "rows": run.num_new_rows, "output_tokens": run.num_new_tokens,
        "rows_per_second": round(run.num_new_rows / seconds, 3),
        "output_tokens_per_second": round(run.num_new_tokens / seconds, 3),
        "prefix_cache_queried_tokens": stats.num_queried_tokens - before[0],
        "prefix_cache_hit_tokens": stats.num_hit_tokens - before[1],
    }  # fmt: skip
    name = "summary.json" if run.num_shards == 1 else f"progress/summary-{run.shard}-of-{run.num_shards}.json"
    write_atomically(out / name, [json.dumps(summary, indent=1).encode() + b"\n"])
    return summary


def _num_parts(run: DatasetRun) -> int:
    return -(-run.num_input_rows // run.config.rows_per_file)


def _summarize(folder: OutputFolder, parts: range, num_input_rows: int) -> Record:
    """Returns the counts of output files as a summary."""
    counts = folder.total_counts(parts)
    reasons = {key.removeprefix("finish_reason_"): n for key, n in sorted(counts.items()) if "finish_reason_" in key}
    names = ("rows", "errors", "completions", "prompt_tokens", "output_tokens")
    return {"input_rows": num_input_rows, "files": len(parts)} | {name: counts[name] for name in names} | {
        "finish_reasons": reasons
    }  # fmt: skip


def join_dataset(out: str | Path) -> Record:
    """Checks that all jobs of a sharded run have ended and all output files are there; returns and writes the summary.

    Raises ValueError with the files that are missing and the jobs that write them.
    """
    out = Path(out).expanduser()
    try:
        settings = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["settings"]
        output_format, rows_per_file = settings["output_format"], settings["rows_per_file"]
    except (OSError, ValueError, LookupError) as e:
        raise ValueError(f"{out} is not the output of a dataset run: manifest.json cannot be read: {e}") from e
    paths = sorted((out / "progress").glob("summary-*-of-*.json"))
    if not paths:
        raise ValueError(f"{out}: no job of a run with shard=K/N has ended")
    num_rows = json.loads(paths[0].read_text())["input_rows"]
    folder = OutputFolder(out, rows_per_file, output_format)
    parts = range(-(-num_rows // rows_per_file))
    num_jobs = int(paths[0].stem.rpartition("-")[2])
    missing = [part for part in parts if not (folder.part_path(part).exists() and folder.counts_path(part).exists())]
    if missing:
        jobs = sorted({part % num_jobs for part in missing})
        raise ValueError(
            f"{out}: {len(missing)} of {len(parts)} files are missing, the first is "
            f"{folder.part_path(missing[0]).name}: run {', '.join(f'shard={k}/{num_jobs}' for k in jobs[:8])} again"
        )
    summary = _summarize(folder, parts, num_rows)
    if summary["rows"] != num_rows:
        raise ValueError(f"{out}: the files have {summary['rows']} rows and the input {num_rows}: it has changed")
    write_atomically(out / "summary.json", [json.dumps(summary, indent=1).encode() + b"\n"])
    return summary
