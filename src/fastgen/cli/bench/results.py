"""Result rows of benchmarks: reading and merging them, parsing logs of other engines, the table and the plot."""

import json
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from fastgen.cli.bench.workload import Workload

Row = dict[str, Any]
# A row replaces an earlier row that has the same values of these keys.
ROW_KEY = ("engine", "model", "workload", "hardware", "tp", "replicas")


def read_rows(path: Path) -> list[Row]:
    """Reads the rows of a JSON file. Raises ValueError if the file contains anything else."""
    try:
        rows = json.loads(path.read_text())
        if all(isinstance(row[k], str) for row in rows for k in ROW_KEY[:4]):
            return rows
    except (json.JSONDecodeError, TypeError, KeyError):
        pass
    raise ValueError(f"{path} does not hold fgbench's rows: a JSON list of objects with {', '.join(ROW_KEY[:4])}")


def get_value(row: Row, key: str) -> Any:
    """Returns a value of a row, None if it is missing. Rows without `replicas` have one replica."""
    return row.get(key, 1 if key == "replicas" else None)


def merge_rows(rows: list[Row], new: list[Row]) -> list[Row]:
    """Adds the new rows, which replace rows with equal values of ROW_KEY."""
    return list({tuple(get_value(row, k) for k in ROW_KEY): row for row in rows + new}.values())


def parse_peer_log(path: Path, engine_version: str, hardware: str) -> list[Row]:
    """Parses the lines `ENGINE MODEL tpN NxPxD repK: S.SSs TOKENS out tok/s` that another engine's benchmark printed.

    Returns a row with the medians of each workload's repeats. Raises ValueError if no line matches.
    """
    line = re.compile(r"^(\w+) (\S+) tp(\d+) (\d+x\d+x\d+(?:x\d+)?) rep\d+: ([\d.]+)s ([\d.]+) out tok/s", re.MULTILINE)
    repeats: dict[tuple[str, ...], list[tuple[float, float]]] = defaultdict(list)
    for *key, seconds, rate in line.findall(path.read_text()):
        repeats[tuple(key)].append((float(seconds), float(rate)))
    if not repeats:
        raise ValueError(f"{path}: no line like 'vllm mistral-7b tp1 512x1024x128 rep0: 16.3s 4026 out tok/s' is in it")
    rows = []
    for (engine, model, tp, workload), measured in repeats.items():
        w, (seconds, rates) = Workload.parse(workload), zip(*measured, strict=True)
        rate = statistics.median(rates)
        rows.append(w.to_row() | {
            "engine": engine, "model": model.lower(), "hardware": hardware, "tp": int(tp), "dtype": None,
            "engine_version": engine_version, "seconds": statistics.median(seconds), "seconds_all": [*seconds],
            "output_tok_s": rate, "total_tok_s": rate * (1 + w.prompt_len / (w.output_len * w.num_samples)),
        })  # fmt: skip
    return rows


def _is_comparable(row: Row, other: Row) -> bool:
    """Returns whether two rows agree in everything but the engine."""
    return all(get_value(row, k) == get_value(other, k) for k in ROW_KEY[1:])


def find_limit(row: Row, rows: list[Row]) -> float | None:
    """Returns the roofline limit in output tokens/s of a row, or of a comparable row: other engines' rows have none."""
    comparable = [row] + [r for r in rows if _is_comparable(r, row)]
    limits = (r.get("limit_tok_s") or r.get("limit_measured_tok_s") for r in comparable)
    return next((v for v in limits if v), None)


def format_table(rows: list[Row]) -> str:
    """Formats the rows as aligned text. A column for each other engine has the ratio to its throughput."""
    peers = sorted({r["engine"] for r in rows} - {"fastgen"})
    head = ["hardware", "model", "tp", "workload", "engine", "seconds", "out tok/s", "tok/s", "limit", "of limit"]
    lines = [head + [f"/ {peer}" for peer in peers]]
    sizes = ("requests", "prompt_len", "output_len", "samples", "shared_prefix")

    def sort_key(row: Row) -> list[list[Any]]:
        return [[str(get_value(row, k)) for k in ROW_KEY[1:] if k != "workload"], [row.get(k) or 0 for k in sizes]]

    for row in sorted(rows, key=sort_key):
        rate, limit = row.get("output_tok_s"), find_limit(row, rows)
        comparable = {r["engine"]: r for r in rows if _is_comparable(r, row)}
        line = [str(row.get(k, "")) for k in ("hardware", "model", "tp", "workload", "engine")]
        if (num_replicas := get_value(row, "replicas")) > 1:
            line[2] = f"{num_replicas} x {line[2]}"
        numbers = [row.get("seconds"), rate, row.get("total_tok_s"), limit]
        line += ["" if v is None else f"{v:,.2f}" if v < 100 else f"{v:,.0f}" for v in numbers]
        line.append(f"{rate / limit:.1%}" if rate and limit else "")
        for peer in peers:
            peer_rate = comparable.get(peer, {}).get("output_tok_s")
            line.append(f"{rate / peer_rate:.2f}" if rate and peer_rate and peer != row["engine"] else "")
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    template = "  ".join(f"{{:{'<' if i < 5 else '>'}{width}}}" for i, width in enumerate(widths))
    return "\n".join(template.format(*line).rstrip() for line in lines)


def plot_rows(rows: list[Row], path: Path) -> None:
    """Plots output tokens/s over the output length: a line for each engine, and a dashed one for the limit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    rows = sorted((r for r in rows if r.get("output_len")), key=lambda r: r["output_len"])
    series: dict[tuple, dict[str, list[Row]]] = {}  # rows that differ in engine and output length alone
    for row in rows:
        keys = ("hardware", "model", "tp", "replicas", "requests", "prompt_len", "samples", "shared_prefix")
        engines = series.setdefault(tuple(get_value(row, k) or 0 for k in keys), {})
        engines.setdefault(row["engine"], []).append(row)
    for i, ((_, model, tp, replicas, requests, prompt_len, samples, shared), engines) in enumerate(series.items()):
        devices = f" on {replicas} x {tp}" if replicas > 1 else f" on {tp}" if tp != 1 else ""
        workload = str(Workload(requests, prompt_len, 0, samples, shared)).replace("x0", "x…", 1)
        label = f"{model}{devices}, {workload}"
        for j, (engine, points) in enumerate(sorted(engines.items())):
            x, y = [p["output_len"] for p in points], [p["output_tok_s"] for p in points]
            alpha = 1 if engine == "fastgen" else 0.5
            axes.plot(x, y, f"C{i}" + "osD^v"[j % 5] + "-", alpha=alpha, label=f"{engine}, {label}")
        limits = {p["output_len"]: v for points in engines.values() for p in points if (v := find_limit(p, rows))}
        if limits:
            axes.plot(*zip(*sorted(limits.items()), strict=True), f"C{i}--", marker="_", label=f"limit, {label}")
    axes.set(xscale="log", yscale="log", xlabel="output tokens per request", ylabel="output tokens/s")
    lengths = sorted({row["output_len"] for row in rows})
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=150)
