"""Tests dataset runs: what is written, resuming after kill -9, rows that cannot run, shards, and flat memory."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import serving
import tiny
from test_tokenizer import BYTE_LEVEL

import fastgen
from fastgen import SamplingParams, generate_dataset, join_dataset
from fastgen.datasets.prompt_rows import row_seed

SAMPLING = SamplingParams(max_tokens=6)
# Runs each line of its input in a forked process: prints the process's id, then the exit status.
RUNNER = """
import json, os, resource, sys
import serving, tiny
from test_tokenizer import BYTE_LEVEL
import fastgen
for line in sys.stdin:
    job = json.loads(line)
    if (pid := os.fork()) == 0:
        params = tiny.weights(serving.SPEC, device="cpu")
        engine = fastgen.Engine(params, serving.SPEC, BYTE_LEVEL, cache_tokens=1024, max_num_seqs=8, token_budget=64)
        sampling = fastgen.SamplingParams(**job.pop("sampling"))
        source, out = job.pop("source"), job.pop("out")
        fastgen.generate_dataset(engine, source, out, sampling, progress=False, **job)
        with open(out + ".maxrss", "w") as f:
            f.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def engine() -> Iterator[fastgen.Engine]:
    params, settings = tiny.weights(serving.SPEC), dict[str, Any](cache_tokens=1024, max_num_seqs=8, token_budget=64)
    with fastgen.Engine(params, serving.SPEC, BYTE_LEVEL, **settings) as engine:
        yield engine


@pytest.fixture(scope="module")
def runner() -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUNNER]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        yield process
        assert process.stdin
        process.stdin.close()


def start(runner: subprocess.Popen[str], **job: Any) -> int:
    """Starts a run in a process of its own; returns the process's id."""
    assert runner.stdin and runner.stdout
    runner.stdin.write(json.dumps(job) + "\n")
    runner.stdin.flush()
    return int(runner.stdout.readline())


def status(runner: subprocess.Popen[str]) -> int:
    """Waits for the run that was started last; returns its exit status."""
    assert runner.stdout
    return int(runner.stdout.readline())


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(folder: Path, name: str = "part") -> list[dict[str, Any]]:
    return [json.loads(line) for f in sorted(folder.glob(f"{name}-*.jsonl")) for line in f.read_text().splitlines()]


def data_files(folder: Path) -> dict[str, bytes]:
    """Returns the contents of the files of a finished run."""
    assert not [*folder.glob("progress/*.journal"), *folder.glob(".*")]
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.name.startswith(("part-", "errors-"))}


def test_records(engine: fastgen.Engine, tmp_path: Path) -> None:
    """A record has the row's kept columns and what `generate` returns with the row's seed; it can be made again."""
    rows = [{"id": f"x{i}", "question": f"Is {i} odd?", "temperature": 0.5 if i % 2 else None} for i in range(20)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    sampling = SamplingParams(max_tokens=6, n=2, logprobs=1)
    options: dict[str, Any] = dict(prompt="question", system="Hi", keep=["id"], overrides=["temperature"])
    summary = generate_dataset(engine, source, tmp_path / "out", sampling, seed=3, rows_per_file=8, **options)
    records = read_rows(tmp_path / "out")
    assert [(r["row"], r["sample"], r["id"]) for r in records] == [(i, j, f"x{i}") for i in range(20) for j in (0, 1)]
    assert len(data_files(tmp_path / "out")) == 3
    for i in (0, 7, 19):
        prompt = [{"role": "system", "content": "Hi"}, {"role": "user", "content": rows[i]["question"]}]
        seed = row_seed(3, i)
        params = SamplingParams(max_tokens=6, n=2, logprobs=1, seed=seed, temperature=rows[i]["temperature"] or 1.0)
        [output] = engine.generate(prompt, params, progress=False)
        for j, c in enumerate(output.completions):
            record = records[2 * i + j]
            assert (record["text"], record["token_ids"]) == (c.text, c.token_ids)
            assert (record["finish_reason"], record["seed"]) == (c.finish_reason, seed)
            assert record["logprobs"] == pytest.approx(c.logprobs, abs=1e-4)
            top = [[(x["token_id"]) for x in token] for token in record["top_logprobs"]]
            assert top == [[*x] for x in c.top_logprobs or ()]
            assert record["num_prompt_tokens"] == len(output.prompt_token_ids)
            assert record["fastgen"] == fastgen.__version__ and len(record["params"]) == 32
    assert summary["rows"] == 20 and summary["completions"] == 40 and summary["errors"] == 0
    assert summary["output_tokens"] == sum(len(r["token_ids"]) for r in records) == summary["this_run"]["output_tokens"]
    assert json.loads((tmp_path / "out/summary.json").read_text()) == summary
    again = generate_dataset(engine, source, tmp_path / "out", sampling, seed=3, rows_per_file=8, **options)
    assert again["this_run"]["rows"] == 0 and again["output_tokens"] == summary["output_tokens"]


def test_formats(engine: fastgen.Engine, tmp_path: Path) -> None:
    """JSONL, gzip, CSV, TSV and Parquet give the same completions, and so do JSONL and Parquet as output."""
    rows = [{"id": i, "text": f'a, "{i}"\nb', "max_tokens": 3 + i % 3} for i in range(12)]
    jsonl = write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(jsonl.read_bytes()))
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    for name, delimiter in (("rows.csv", ","), ("rows.tsv", "\t")):
        quoted = [[str(r["id"]), '"' + r["text"].replace('"', '""') + '"', str(r["max_tokens"])] for r in rows]
        lines = [["id", "text", "max_tokens"], *quoted]
        (tmp_path / name).write_text("\n".join(delimiter.join(line) for line in lines) + "\n")
    options: dict[str, Any] = dict(template="Q: {{ text }}", overrides="max_tokens", keep="id", rows_per_file=5)
    expected = None
    for name in ("rows.jsonl", "rows.jsonl.gz", "rows.parquet", "rows.csv", "rows.tsv"):
        generate_dataset(engine, tmp_path / name, tmp_path / f"{name}.out", SAMPLING, **options)
        records = [r | {"id": int(r["id"])} for r in read_rows(tmp_path / f"{name}.out")]
        expected = expected or records
        assert records == expected and [r["id"] for r in records] == [*range(12)], name
    for name in ("rows.jsonl", "rows.parquet"):
        out = tmp_path / f"{name}.parquet"
        generate_dataset(engine, tmp_path / name, out, SAMPLING, **options, output_format="parquet")
        tables = [pyarrow.parquet.read_table(f) for f in sorted(out.glob("part-*.parquet"))]
        assert pyarrow.concat_tables(tables).to_pylist() == expected and len(tables) == 3
        assert tables[0].schema.field("id").type == pyarrow.int64()


def test_kill_and_resume(runner: subprocess.Popen[str], tmp_path: Path) -> None:
    """After kill -9 at random moments, the finished output is that of an uninterrupted run, byte for byte."""
    rows = [{"id": i, "prompt": f"{i} " * (1 + i % 9) if i % 17 else ""} for i in range(80)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    job: dict[str, Any] = dict(source=str(source), keep=["id"], rows_per_file=20, sampling={"max_tokens": 6, "n": 2})
    start(runner, out=str(tmp_path / "whole"), **job)
    began = time.monotonic()  # the runner has imported fastgen
    assert status(runner) == 0
    seconds, whole = time.monotonic() - began, data_files(tmp_path / "whole")
    assert [*whole] == [f"{kind}-{i:05}.jsonl" for kind in ("errors", "part") for i in range(4)]
    rng, num_killed = random.Random(time.time_ns()), 0
    for _ in range(3):
        pid = start(runner, out=str(tmp_path / "killed"), **job)
        time.sleep(rng.uniform(0.2, 0.7) * seconds)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        num_killed += status(runner) == signal.SIGKILL
    assert num_killed
    journals = [*(tmp_path / "killed/progress").glob("*.journal")]
    for journal in journals:  # as if a write had been cut off
        with open(journal, "ab") as f:
            f.write(b'{"row":19,"rec')
    start(runner, out=str(tmp_path / "killed"), **job)
    assert status(runner) == 0
    assert data_files(tmp_path / "killed") == whole
    records = read_rows(tmp_path / "killed")
    assert [r["row"] for r in records] == [i for i in range(80) if i % 17 for _ in range(2)]


def test_an_interrupted_run_goes_on(engine: fastgen.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that have finished before an interrupt do not run again; nothing is left running on the engine."""
    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{i}"} for i in range(40)])
    step, steps = fastgen.Engine.step, []

    def interrupted(self: fastgen.Engine) -> Any:
        steps.append(1)
        if len(steps) == 15:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(fastgen.Engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_dataset(engine, source, tmp_path / "out", SAMPLING, rows_per_file=100)
    monkeypatch.undo()
    assert not engine.has_unfinished_requests
    [journal] = (tmp_path / "out/progress").glob("*.journal")
    finished = len(journal.read_text().splitlines())
    assert 0 < finished < 40
    summary = generate_dataset(engine, source, tmp_path / "out", SAMPLING, rows_per_file=100)
    assert summary["rows"] == 40 and summary["this_run"]["rows"] == 40 - finished
    generate_dataset(engine, source, tmp_path / "whole", SAMPLING, rows_per_file=100)
    assert data_files(tmp_path / "out") == data_files(tmp_path / "whole")


def test_another_run_is_refused(engine: fastgen.Engine, tmp_path: Path) -> None:
    """The error names what differs, and the output of the first run stays."""
    source, out = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}]), tmp_path / "out"
    generate_dataset(engine, source, out, SAMPLING)
    files = data_files(out)
    for changes, message in (
        ({"seed": 1}, "settings.seed was 0 and is 1"),
        ({"sampling": SamplingParams(max_tokens=7)}, "settings.sampling.max_tokens was 6 and is 7"),
        ({"keep": "prompt"}, "settings.keep was"),
        ({"model": "other"}, "engine.model was '' and is 'other'"),
        ({"source": write_rows(tmp_path / "more.jsonl", [{"prompt": "b"}])}, "input.digest was"),
    ):
        arguments: dict[str, Any] = {"source": source, "sampling": SAMPLING} | changes
        with pytest.raises(ValueError, match=message):
            generate_dataset(engine, out=out, **arguments)
    assert data_files(out) == files


def test_bad_rows(engine: fastgen.Engine, tmp_path: Path) -> None:
    """Rows that cannot run are in the errors file with line, column and reason; the others run."""
    good = json.dumps({"prompt": "fine"})
    cases: list[tuple[str | bytes, str | None, str]] = [
        ('{"prompt": ', None, "not JSON"),
        (b'{"prompt": "\xff"}', None, "not UTF-8"),
        ("3", None, "must be a JSON object"),
        ('{"other": "a"}', "prompt", "missing"),
        ('{"prompt": " "}', "prompt", "is empty"),
        ('{"prompt": {"a": 1}}', "prompt", "must be a text"),
        ('{"prompt": "\\ud800"}', "prompt", "surrogate"),
        ('{"prompt_token_ids": [1, 100000]}', "prompt_token_ids", "outside the vocabulary"),
        ('{"messages": [{"role": 3}]}', "messages", "must be a text"),
        (json.dumps({"prompt": "long " * 600}), "prompt", "do not fit"),
        ('{"prompt": "a", "temperature": 1000}', "temperature", "between 0 and 100"),
        ('{"prompt": "a", "max_tokens": "many"}', "max_tokens", "whole number"),
        ('{"prompt": "a", "max_tokens": 4000}', "prompt", "do not fit"),
        ('{"prompt": "a", "grammar": 5}', "grammar", "must be"),
        ('{"prompt": "a", "id": "\\udc00"}', "id", "cannot be copied"),
    ]
    lines = [x for case, _, _ in cases for x in (good, "", case)]
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n" for x in lines))
    options: dict[str, Any] = dict(keep=["id"], overrides=["temperature", "max_tokens", "grammar"])
    summary = generate_dataset(engine, source, tmp_path / "out", SAMPLING, **options)
    errors = read_rows(tmp_path / "out", "errors")
    assert [(e["row"], e["line"]) for e in errors] == [(2 * i + 1, 3 * i + 3) for i in range(len(cases))]
    for error, (case, column, reason) in zip(errors, cases, strict=True):
        assert (error["column"], reason in error["reason"]) == (column, True), (case, error)
    assert [r["row"] for r in read_rows(tmp_path / "out")] == [2 * i for i in range(len(cases))]
    assert summary["errors"] == len(cases) and summary["rows"] == 2 * len(cases)
    with pytest.raises(ValueError, match=r"rows.jsonl, line 3: the line is not JSON"):
        generate_dataset(engine, source, tmp_path / "stop", SAMPLING, on_error="stop", **options)
    assert not engine.has_unfinished_requests


def test_bad_rows_of_tables_and_templates(engine: fastgen.Engine, tmp_path: Path) -> None:
    source = tmp_path / "rows.csv"
    source.write_bytes(b'prompt,id\nfine,1\na,b,c\n"a"b,2\n\xff,3\nfine,4\n')
    generate_dataset(engine, source, tmp_path / "csv", SAMPLING, keep=["id"])
    errors = [(e["line"], e["column"], e["reason"]) for e in read_rows(tmp_path / "csv", "errors")]
    assert [r["id"] for r in read_rows(tmp_path / "csv")] == ["1", "4"]
    assert [e[:2] for e in errors] == [(3, None), (4, None), (5, "prompt")]
    assert "3 fields for 2 columns" in errors[0][2] and "not CSV" in errors[1][2] and "not UTF-8" in errors[2][2]
    rows = [{"a": 1}, {"b": 1}, {"a": 0}]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    generate_dataset(engine, source, tmp_path / "template", SAMPLING, template="{{ 1 / a }}")
    errors = [(e["line"], e["column"], e["reason"]) for e in read_rows(tmp_path / "template", "errors")]
    assert [e[:2] for e in errors] == [(2, "template"), (3, "template")]
    assert "'a' is undefined" in errors[0][2] and "division by zero" in errors[1][2]


def test_truncation(engine: fastgen.Engine, tmp_path: Path) -> None:
    """With truncate=left, a prompt that is too long loses its first tokens, and max_tokens still fit."""
    ids = [5 + i % 300 for i in range(600)]
    source = write_rows(tmp_path / "rows.jsonl", [{"prompt_token_ids": ids}, {"prompt_token_ids": [1, 2]}])
    generate_dataset(engine, source, tmp_path / "out", SAMPLING, truncate="left")
    long, short = read_rows(tmp_path / "out")
    longest = engine.model_config.context_length - 6
    assert (long["num_prompt_tokens"], short["num_prompt_tokens"]) == (longest, 2)
    [output] = engine.generate([ids[-longest:]], SamplingParams(max_tokens=6, seed=long["seed"]), progress=False)
    assert output.completions[0].token_ids == long["token_ids"]


def test_wrong_settings(engine: fastgen.Engine, tmp_path: Path) -> None:
    """What fits no row is an error before anything is written."""
    source, out = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}]), tmp_path / "out"
    (tmp_path / "rows.csv").write_text("id,text\n1,a\n")
    for arguments, message in (
        ({"rows_per_fil": 3}, "did you mean rows_per_file"),
        ({"shard": "4/4"}, "K from 0 to N - 1"),
        ({"overrides": "temprature"}, "did you mean temperature"),
        ({"keep": "text"}, "column 'text' of its own"),
        ({"sampling": SamplingParams(seed=1)}, "same for all rows"),
        ({"prompt": "a", "template": "b"}, "give one"),
        ({"template": "{% if %}"}, "dataset.template"),
        ({"source": tmp_path / "rows.csv"}, "set dataset.prompt to one of id, text"),
        ({"source": tmp_path / "rows.csv", "prompt": "txt"}, "has no column 'txt'"),
        ({"source": tmp_path / "rows"}, "unknown suffix"),
        ({"source": tmp_path / "no.jsonl"}, "does not exist"),
    ):
        given: dict[str, Any] = {"source": source} | arguments
        with pytest.raises(ValueError, match=message):
            generate_dataset(engine, out=out, **given)
    assert not out.exists()


def test_shards(engine: fastgen.Engine, tmp_path: Path) -> None:
    """Jobs of a run write the files of an unsharded run, and the joiner names those that are missing."""
    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{i}"} for i in range(23)])
    generate_dataset(engine, source, tmp_path / "whole", SAMPLING, rows_per_file=4)
    with pytest.raises(ValueError, match="is not the output of a dataset run"):
        join_dataset(tmp_path)
    for k in (0, 2):
        generate_dataset(engine, source, tmp_path / "out", SAMPLING, rows_per_file=4, shard=f"{k}/3")
    with pytest.raises(ValueError, match=r"2 of 6 files are missing, the first is part-00001.jsonl: run shard=1/3"):
        join_dataset(tmp_path / "out")
    generate_dataset(engine, source, tmp_path / "out", SAMPLING, rows_per_file=4, shard="1/3")
    summary = join_dataset(tmp_path / "out")
    assert data_files(tmp_path / "out") == data_files(tmp_path / "whole")
    assert summary["rows"] == 23 and json.loads((tmp_path / "out/summary.json").read_text()) == summary


def test_one_process_writes_a_file(engine: fastgen.Engine, tmp_path: Path) -> None:
    import fcntl

    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    (tmp_path / "out/progress").mkdir(parents=True)
    with open(tmp_path / "out/progress/part-00000.journal", "a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is open in another process"):
            generate_dataset(engine, source, tmp_path / "out", SAMPLING)


def test_memory_is_flat(runner: subprocess.Popen[str], tmp_path: Path) -> None:
    """The peak memory does not depend on the number of rows, which hold 40 MB here."""
    peaks = []
    for count in (200, 2000):
        rows = [{"prompt_token_ids": [1, 2, i % 300], "blob": "x" * 20_000} for i in range(count)]
        source = write_rows(tmp_path / f"{count}.jsonl", rows)
        start(runner, source=str(source), out=str(tmp_path / f"{count}"), keep=["blob"], sampling={"max_tokens": 1})
        assert status(runner) == 0
        peaks.append(int((tmp_path / f"{count}.maxrss").read_text()))
    assert peaks[1] < 1.05 * peaks[0], peaks
