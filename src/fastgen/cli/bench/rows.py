"""A benchmark's workloads and rows: files of them, other engines' logs, the table and the plot."""

import json
import re
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastgen.config import ParallelConfig
from fastgen.core.model_config import ModelConfig
from fastgen.profiling import roofline

Row = dict[str, Any]
SINGLE_DEVICE = ParallelConfig()
ROW_KEY = (
    "engine",
    "model",
    "workload",
    "hardware",
    "tp",
    "replicas",
)  # a later row of the same replaces an earlier one


class Workload(NamedTuple):
    """`requests` prompts of `prompt` tokens, whose first `shared` are the same, and what is asked for."""

    num_requests: int
    prompt_len: int
    output_len: int
    num_samples: int = 1
    shared_prefix_len: int = 0

    @classmethod
    def parse(cls, text: str) -> "Workload":
        """From NxPROMPTxOUTPUT[xSAMPLES]."""
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2,3}", text):
            raise ValueError(f"workload {text!r} is not NxPROMPTxOUTPUT[xSAMPLES] in positive numbers: 512x1024x128")
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        numbers = self[:4] if self.num_samples > 1 else self[:3]
        return "x".join(map(str, numbers)) + (f" shared {self.shared_prefix_len}" if self.shared_prefix_len else "")

    def make_prompts(self, vocab: int, generator: torch.Generator) -> list[list[int]]:
        """Random tokens."""
        common = torch.randint(vocab, (self.shared_prefix_len,), generator=generator).tolist()
        own = torch.randint(
            vocab, (self.num_requests, self.prompt_len - self.shared_prefix_len), generator=generator
        ).tolist()
        return [common + row for row in own]

    def max_tokens_per_second(
        self, spec: ModelConfig, machine: roofline.Machine, itemsize: int, parallel: ParallelConfig = SINGLE_DEVICE
    ) -> float:
        """Most output tokens/s, with everything shared that can be. `machine` is one device of the layout's."""
        requests = -(-self.num_requests // parallel.replicas)  # of the replica that has most
        machine, shared = machine.scaled(parallel.tensor_parallel), self[3:] != (1, 0)
        seconds = roofline.min_seconds(
            spec,
            requests,
            *self[1:4],
            machine=machine,
            bytes_per_element=itemsize,
            prefix_shared=shared,
            num_shared_tokens=self.shared_prefix_len,
        )
        return self.num_requests * self.num_samples * self.output_len / seconds


def read_rows(path: Path) -> list[Row]:
    """The rows of a file. ValueError if it holds something else."""
    try:
        rows = json.loads(path.read_text())
        if all(isinstance(row[k], str) for row in rows for k in ROW_KEY[:4]):
            return rows
    except (json.JSONDecodeError, TypeError, KeyError):
        pass
    raise ValueError(f"{path} does not hold fgbench's rows: a JSON list of objects with {', '.join(ROW_KEY[:4])}")


def get_value(row: Row, key: str) -> Any:
    """A value of a row; one that does not speak of replicas is of one engine."""
    return row.get(key, 1 if key == "replicas" else None)


def merge_rows(rows: list[Row], new: list[Row]) -> list[Row]:
    """`rows` with `new`, which replace those of the same engine, model, workload, hardware and number of devices."""

    def key(row: Row) -> tuple:
        return tuple(get_value(row, k) for k in ROW_KEY)

    return list(({key(r): r for r in rows} | {key(r): r for r in new}).values())


def parse_peer_log(text: str, engine_version: str, hardware: str) -> list[Row]:
    """Rows from the lines `ENGINE MODEL tpN NxPxD repK: S.SSs TOKENS out tok/s` of another engine's benchmark."""
    line = re.compile(r"^(\w+) (\S+) tp(\d+) (\d+x\d+x\d+(?:x\d+)?) rep\d+: ([\d.]+)s ([\d.]+) out tok/s", re.MULTILINE)
    found: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for *who, seconds, rate in line.findall(text):
        found.setdefault(tuple(who), []).append((seconds, rate))
    if not found:
        raise ValueError("no line like 'vllm mistral-7b tp1 512x1024x128 rep0: 16.3s 4026 out tok/s' is in it")
    rows = []
    for (engine, model, tp, workload), repeats in found.items():
        w, taken = Workload.parse(workload), [float(s) for s, _ in repeats]
        rate = statistics.median(float(r) for _, r in repeats)
        total = rate * (1 + w.prompt_len / (w.output_len * w.num_samples))
        rows.append({
            "engine": engine, "model": model.lower(), "workload": str(w), "hardware": hardware, "tp": int(tp),
            "dtype": None, "engine_version": engine_version, "requests": w.num_requests, "prompt_len": w.prompt_len,
            "output_len": w.output_len, "samples": w.num_samples, "seconds": statistics.median(taken), "seconds_all": taken,
            "output_tok_s": rate, "total_tok_s": total,
        })  # fmt: skip
    return rows


def find_limit(row: Row, rows: list[Row]) -> float | None:
    """The row's limit, tokens/s; for another engine's row, that of our row of the same."""
    same = [row] + [r for r in rows if all(get_value(r, k) == get_value(row, k) for k in ROW_KEY[1:])]
    values = (r.get("limit_tok_s") or r.get("limit_measured_tok_s") for r in same)
    return next((v for v in values if v), None)


def format_table(rows: list[Row]) -> str:
    """Aligned text; a column for the ratio to each other engine."""
    others = sorted({r["engine"] for r in rows} - {"fastgen"})
    head = ["hardware", "model", "tp", "workload", "engine", "seconds", "out tok/s", "tok/s", "limit", "of limit"]
    lines = [head + [f"/ {other}" for other in others]]
    order = ("requests", "prompt_len", "output_len", "samples", "shared_prefix")
    for row in sorted(
        rows,
        key=lambda r: [[str(get_value(r, k)) for k in ROW_KEY[1:] if k != "workload"], [r.get(k) or 0 for k in order]],
    ):
        rate, limit = row.get("output_tok_s"), find_limit(row, rows)
        peers = {r["engine"]: r for r in rows if all(get_value(r, k) == get_value(row, k) for k in ROW_KEY[1:])}
        values = [row.get("seconds"), rate, row.get("total_tok_s"), limit]
        line = [str(row.get(k, "")) for k in ("hardware", "model", "tp", "workload", "engine")]
        line[2] = f"{count} x {line[2]}" if (count := get_value(row, "replicas")) > 1 else line[2]
        line += ["" if v is None else f"{v:,.2f}" if v < 100 else f"{v:,.0f}" for v in values]
        line.append(f"{rate / limit:.1%}" if rate and limit else "")
        for other in others:
            theirs = peers.get(other, {}).get("output_tok_s")
            line.append(f"{rate / theirs:.2f}" if rate and theirs and other != row["engine"] else "")
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = (
        [cell.ljust(w) if i < 5 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    )
    return "\n".join("  ".join(line).rstrip() for line in text)


def plot_rows(rows: list[Row], path: Path) -> None:
    """Output tokens/s over the output's length: a line for each engine, dashed for the limit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    loads: dict[tuple, dict[str, list[Row]]] = {}
    for row in sorted((r for r in rows if r.get("output_len")), key=lambda r: r["output_len"]):
        same = tuple(
            get_value(row, k) or 0 for k in ("hardware", "model", "tp", "replicas", "requests", "prompt_len", "samples")
        )
        loads.setdefault((*same, row.get("shared_prefix") or 0), {}).setdefault(row["engine"], []).append(row)
    for i, ((_, model, tp, replicas, requests, prompt, samples, shared), engines) in enumerate(loads.items()):
        where = f"{replicas} x {tp}" if replicas > 1 else tp
        label = f"{model}{f' on {where}' if where != 1 else ''}, {Workload(requests, prompt, 0, samples, shared)}"
        label = label.replace("x0", "x…", 1)
        for j, (engine, points) in enumerate(sorted(engines.items())):
            x, y = [p["output_len"] for p in points], [p["output_tok_s"] for p in points]
            axes.plot(x, y, f"C{i}" + "osD^v"[j % 5] + "-", alpha=1 if engine == "fastgen" else 0.5,
                      label=f"{engine}, {label}")  # fmt: skip
        bound = {p["output_len"]: v for points in engines.values() for p in points if (v := find_limit(p, rows))}
        if bound:
            axes.plot(*zip(*sorted(bound.items()), strict=True), f"C{i}--", marker="_", label=f"limit, {label}")
    axes.set(xscale="log", yscale="log", xlabel="output tokens of a request", ylabel="output tokens/s")
    lengths = sorted({row["output_len"] for row in rows if row.get("output_len")})
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=150)
