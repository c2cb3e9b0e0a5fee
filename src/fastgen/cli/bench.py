"""`fgbench`: how fast the engine is here, next to what the machine allows and to other engines. `fgbench --help`."""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, is_dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from tqdm.auto import tqdm

import fastgen
from fastgen import Engine, SamplingParams, Settings, from_hf, limits
from fastgen.cli.config import Config, compose
from fastgen.models import default, weights
from fastgen.models.spec import Spec

Row = dict[str, Any]
bar = partial(tqdm, delay=2, leave=False, disable=None)  # None: on a terminal alone, so that logs stay short
KEY = ("engine", "model", "workload", "hardware", "tp")  # a later row of the same replaces an earlier one
EPILOG = """
workloads: NxPROMPTxOUTPUT[xSAMPLES] is N prompts of PROMPT random tokens, new ones for each repeat, and exactly OUTPUT
  tokens for each of SAMPLES (default 1) completions
settings: KEY=VALUE as for fgrun (fgrun --help lists them); the group may be left out: token_budget=4096
limit: the least time the machine could need; fastgen/limits.py has the formula. Known machines have a limit from
  measured constants; every row has a second one, from the matrix product's rate right after the run. The table and the
  plot show the first where there is one.

examples:
  fgbench debug --workload 8x64x16 2x64x16x4
  fgbench benchmarks/configs/mistral-7b-instruct-v0.3.json --workload 512x1024x128 1x128x256 --out rows.json
  fgbench path/to/config.json --workload 512x1024x128 --outputs 16,64,128,512 --plot plot.png max_requests=512
  fgbench mistral_7b --weights --workload 32x1024x256 --shared-prefix 768 --latency schedule=latency
  fgbench --out rows.json --peer-log vllm.txt --peer-version 0.23.0 --plot plot.png     # measures nothing
"""


class Workload(NamedTuple):
    """`requests` prompts of `prompt` tokens, whose first `shared` are the same, and what is asked for."""

    requests: int
    prompt: int
    output: int
    samples: int = 1
    shared: int = 0

    @classmethod
    def of(cls, text: str) -> "Workload":
        """From NxPROMPTxOUTPUT[xSAMPLES]."""
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2,3}", text):
            raise ValueError(f"workload {text!r} is not NxPROMPTxOUTPUT[xSAMPLES] in positive numbers: 512x1024x128")
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        numbers = self[:4] if self.samples > 1 else self[:3]
        return "x".join(map(str, numbers)) + (f" shared {self.shared}" if self.shared else "")

    def prompts(self, vocab: int, generator: torch.Generator) -> list[list[int]]:
        """Random tokens."""
        common = torch.randint(vocab, (self.shared,), generator=generator).tolist()
        own = torch.randint(vocab, (self.requests, self.prompt - self.shared), generator=generator).tolist()
        return [common + row for row in own]

    def limit(self, spec: Spec, machine: limits.Machine, width: int) -> float:
        """Most output tokens/s, with everything shared that can be."""
        seconds = limits.limit(
            spec, *self[:4], machine=machine, width=width, prefix_shared=self[3:] != (1, 0), common=self.shared
        )
        return self.requests * self.samples * self.output / seconds


# --- the machine ------------------------------------------------------------------------------------------------------


def hardware(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"


def _smi(query: str, device: torch.device, *options: str) -> list[str]:
    """nvidia-smi's command line for one GPU."""
    gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", f"--id={gpu}", *options]


@contextmanager
def _clocks(device: torch.device) -> Iterator[dict[str, float]]:
    """Medians of the GPU's clock and power while it is open; empty when it closes where nvidia-smi cannot say."""
    found: dict[str, float] = {}
    if device.type != "cuda" or not shutil.which("nvidia-smi"):
        yield found
        return
    command = _smi("clocks.sm,power.draw", device, "-lms", "500")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield found
        finally:
            process.terminate()
            with suppress(ValueError):
                lines = process.communicate()[0].splitlines()[:-1]  # the last one may be cut
                columns = zip(*([float(x) for x in line.split(",")] for line in lines), strict=True)
                found |= dict(zip(("sm_mhz", "power_w"), map(statistics.median, columns), strict=False))


def probe(device: torch.device, dtype: torch.dtype) -> Row:
    """Sustained rates, right now: a matrix product of random data in `dtype`, and a copy (bytes read + written)."""
    cuda = device.type == "cuda"
    size, count, seconds = (8192, 2**30, 3.0) if cuda else (1024, 2**26, 0.2)
    try:
        a, b, out = (torch.randn(size, size, device=device, dtype=dtype) for _ in "abc")
        source, target = (torch.ones(count, device=device, dtype=torch.uint8) for _ in "ab")
    except torch.OutOfMemoryError:
        return {"gemm_tflops": None, "copy_tb_s": None, "probe": "no memory was left"}

    def rate(work: Callable[[], Any], seconds: float) -> float:
        """Calls a second, once a third of the time has passed."""
        begin = start = time.perf_counter()
        calls, timed = 0, False
        while (now := time.perf_counter()) < begin + seconds:
            if not timed and now > begin + seconds / 3:
                start, calls, timed = now, 0, True
            for _ in range(10 if cuda else 1):
                work()
            calls += 10 if cuda else 1
            if cuda:
                torch.cuda.synchronize(device)
        return calls / (time.perf_counter() - start)

    return {
        "gemm_tflops": 2 * size**3 * rate(lambda: torch.mm(a, b, out=out), seconds) / 1e12,
        "copy_tb_s": 2 * count * rate(lambda: target.copy_(source), seconds / 3) / 1e12,
        "probe": f"{size}^3 {str(dtype).removeprefix('torch.')} product, {count >> 20} MiB copy",
    }


def _memory(device: torch.device) -> float:
    """All there is, bytes."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _peak(device: torch.device) -> float:
    """Most memory held so far by this process, bytes: the GPU's, or else the host's."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_reserved(device))
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _versions(device: torch.device) -> Row:
    """What ran: versions, commit and driver; None for what cannot be told."""

    def said(command: list[str]) -> str | None:
        with suppress(OSError):
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
        return None

    found: Row = {
        "engine_version": fastgen.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    try:
        found["triton"] = version("triton")
    except PackageNotFoundError:
        found["triton"] = None
    root = Path(fastgen.__file__).parents[2]
    checkout = (root / ".git").exists()
    found["commit"] = said(["git", "-C", str(root), "describe", "--always", "--dirty"]) if checkout else None
    found["driver"] = said(_smi("driver_version", device)) if device.type == "cuda" else None
    return found


# --- runs -------------------------------------------------------------------------------------------------------------


class Started(NamedTuple):
    """An engine, how its rows are called, and what it took to get there, seconds."""

    engine: Engine
    model: str
    seconds: dict[str, float]


def _age() -> float | None:
    """Seconds since this process began (Linux)."""
    with suppress(OSError):
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return float(Path("/proc/uptime").read_text().split()[0]) - began
    return None


def start(config: Config, real: bool, works: list[Workload]) -> Started:
    """The configured engine, without a tokenizer. Weights are random unless `real`.

    ValueError, before anything big is read or made, for a workload that is longer than the model's context.
    """
    began, m = time.perf_counter(), config.model
    path = default.default_path() if m.path is None else Path(m.path).expanduser()
    model = path.parent.name if path.name == "config.json" else path.name
    if not path.exists():  # a hub id; random weights need no more of it than the config
        whole = real or str(m.path).count("/") != 1
        path = weights.resolve(str(m.path)) if whole else Path(hf_hub_download(str(m.path), "config.json"))
    spec = from_hf(weights.read_config(path))
    for w in works:
        if w.prompt + w.output > spec.context:
            raise ValueError(f"workload {w}: prompt and output are longer than the context of {spec.context}")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if m.device == "auto" else m.device
    dtype = m.dtype if m.dtype != "auto" else "float32" if device == "cpu" else spec.dtype
    kind = getattr(torch, dtype)
    if real:
        params = weights.load(path, device=device, dtype=kind, progress=sys.stderr.isatty())[1]
    else:
        params = weights.init(spec, m.random_seed, device=device, dtype=kind)
    if device != "cpu":
        torch.cuda.synchronize(device)
    loaded = time.perf_counter()
    engine = Engine(params, spec, **{f.name: getattr(config, f.name) for f in fields(Settings)})
    made = time.perf_counter()
    engine.generate([[1] * 8], SamplingParams(max_tokens=1, ignore_eos=True), progress=False)
    seconds = {"load": loaded - began, "engine": made - loaded, "first_token": time.perf_counter() - made}
    return Started(engine, re.sub(r"\.(json|gguf|safetensors)$", "", model.lower()), seconds)


def warm_up(engine: Engine, work: Workload, sampling: SamplingParams, seconds: float | None) -> None:
    """Untimed load: for `seconds`, or None for one pass of at most 30."""
    end, generator = time.perf_counter() + (30 if seconds is None else seconds), torch.Generator().manual_seed(1)
    with bar(desc=f"warming up with {work}", unit="token") as progress:
        while time.perf_counter() < end:
            for _ in engine.stream(work.prompts(engine.spec.vocab, generator), sampling):
                progress.update()
                if time.perf_counter() > end:
                    break
            if seconds is None:
                break


def latency(engine: Engine, prompts: list[list[int]], sampling: SamplingParams) -> Row:
    """Percentiles, ms, when all requests come at once: to the first token, and between tokens of one completion."""
    last: dict[tuple[int, int], float] = {}
    first, gaps = list[float](), list[float]()
    start = time.perf_counter()
    for event in bar(engine.stream(prompts, sampling), desc="latency", unit="token"):
        if event.token_ids:
            now, who = time.perf_counter(), (event.request_id, event.index)
            (gaps if who in last else first).append(1e3 * (now - last.get(who, start)))
            last[who] = now
    found: Row = {}
    for name, values in (("first_token_ms", first), ("inter_token_ms", gaps)):
        if values:
            cuts = statistics.quantiles(values if len(values) > 1 else values * 2, n=100, method="inclusive")
            found[name] = {f"p{p}": cuts[p - 1] for p in (50, 90, 99)}
    return found


def measure(
    started: Started, work: Workload, sampling: SamplingParams, repeats: int, generator: torch.Generator
) -> Row:
    """One row: the median of `repeats` runs with prompts of their own."""
    engine, taken = started.engine, list[float]()
    drawn = work.requests * work.samples * work.output
    with _clocks(engine.device) as clocks:
        for _ in bar(range(repeats), desc=str(work), unit="run"):
            prompts = work.prompts(engine.spec.vocab, generator)
            began = time.perf_counter()
            outputs = engine.generate(prompts, sampling, progress=False)
            taken.append(time.perf_counter() - began)
            if (got := sum(len(c.token_ids) for o in outputs for c in o.completions)) != drawn:
                raise ValueError(f"workload {work}: {got} tokens came instead of {drawn}")
    seconds, tp = statistics.median(taken), engine.settings.parallel.tensor_parallel
    row = _row(started, str(work)) | {
        "requests": work.requests, "prompt_len": work.prompt, "output_len": work.output, "samples": work.samples,
        "shared_prefix": work.shared, "temperature": sampling.temperature, "seconds": seconds, "seconds_all": taken,
        "output_tok_s": drawn / seconds, "total_tok_s": (drawn + work.requests * work.prompt) / seconds,
        "clocks": clocks,
    }  # fmt: skip
    row |= probe(engine.device, engine.dtype)
    name = row["hardware"].split()[-1]
    known = limits.KNOWN.get(name) if engine.dtype.itemsize == 2 else None  # its FLOP/s are those of 16 bits
    machines = {"limit": known, "limit_measured": None}
    if row["gemm_tflops"]:
        here = known or limits.Machine(name, 0, row["copy_tb_s"] * 1e12, _memory(engine.device))
        machines["limit_measured"] = here._replace(flops=row["gemm_tflops"] * 1e12)
    for name, machine in machines.items():
        tok_s = work.limit(engine.spec, machine.times(tp), engine.dtype.itemsize) if machine else None
        row |= {f"{name}_tok_s": tok_s, f"{name}_fraction": row["output_tok_s"] / tok_s if tok_s else None}
    return row


def _row(started: Started, workload: str) -> Row:
    """What every row of this process says."""
    engine = started.engine
    return {
        "engine": "fastgen", "model": started.model, "workload": workload, "hardware": hardware(engine.device),
        "tp": engine.settings.parallel.tensor_parallel, "dtype": str(engine.dtype).removeprefix("torch."),
        **_versions(engine.device), "settings": asdict(engine.settings), "cache_tokens": engine.capacity,
        "start_up": started.seconds, "threads": torch.get_num_threads(), "peak_memory_gb": _peak(engine.device) / 1e9,
    }  # fmt: skip


# --- rows: files, the table, the plot ---------------------------------------------------------------------------------


def read(path: Path) -> list[Row]:
    """The rows of a file. ValueError if it holds something else."""
    try:
        rows = json.loads(path.read_text())
        if all(isinstance(row[k], str) for row in rows for k in KEY[:4]):
            return rows
    except (json.JSONDecodeError, TypeError, KeyError):
        pass
    raise ValueError(f"{path} does not hold fgbench's rows: a JSON list of objects with {', '.join(KEY[:4])}")


def merge(rows: list[Row], new: list[Row]) -> list[Row]:
    """`rows` with `new`, which replace those of the same engine, model, workload, hardware and number of devices."""

    def key(row: Row) -> tuple:
        return tuple(row.get(k) for k in KEY)

    return list(({key(r): r for r in rows} | {key(r): r for r in new}).values())


def peer_rows(text: str, release: str, machine: str) -> list[Row]:
    """Rows from the lines `ENGINE MODEL tpN NxPxD repK: S.SSs TOKENS out tok/s` of another engine's benchmark."""
    line = re.compile(r"^(\w+) (\S+) tp(\d+) (\d+x\d+x\d+(?:x\d+)?) rep\d+: ([\d.]+)s ([\d.]+) out tok/s", re.MULTILINE)
    found: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for *who, seconds, rate in line.findall(text):
        found.setdefault(tuple(who), []).append((seconds, rate))
    if not found:
        raise ValueError("no line like 'vllm mistral-7b tp1 512x1024x128 rep0: 16.3s 4026 out tok/s' is in it")
    rows = []
    for (engine, model, tp, workload), repeats in found.items():
        w, taken = Workload.of(workload), [float(s) for s, _ in repeats]
        rate = statistics.median(float(r) for _, r in repeats)
        total = rate * (1 + w.prompt / (w.output * w.samples))
        rows.append({
            "engine": engine, "model": model.lower(), "workload": str(w), "hardware": machine, "tp": int(tp),
            "dtype": None, "engine_version": release, "requests": w.requests, "prompt_len": w.prompt,
            "output_len": w.output, "samples": w.samples, "seconds": statistics.median(taken), "seconds_all": taken,
            "output_tok_s": rate, "total_tok_s": total,
        })  # fmt: skip
    return rows


def _limit(row: Row, rows: list[Row]) -> float | None:
    """The row's limit, tokens/s; for another engine's row, that of our row of the same."""
    same = [row] + [r for r in rows if all(r.get(k) == row.get(k) for k in KEY[1:])]
    values = (r.get("limit_tok_s") or r.get("limit_measured_tok_s") for r in same)
    return next((v for v in values if v), None)


def table(rows: list[Row]) -> str:
    """Aligned text; a column for the ratio to each other engine."""
    others = sorted({r["engine"] for r in rows} - {"fastgen"})
    head = ["hardware", "model", "tp", "workload", "engine", "seconds", "out tok/s", "tok/s", "limit", "of limit"]
    lines = [head + [f"/ {other}" for other in others]]
    order = ("requests", "prompt_len", "output_len", "samples", "shared_prefix")
    for row in sorted(
        rows, key=lambda r: [[str(r.get(k)) for k in KEY[1:] if k != "workload"], [r.get(k) or 0 for k in order]]
    ):
        rate, limit = row.get("output_tok_s"), _limit(row, rows)
        peers = {r["engine"]: r for r in rows if all(r.get(k) == row.get(k) for k in KEY[1:])}
        values = [row.get("seconds"), rate, row.get("total_tok_s"), limit]
        line = [str(row.get(k, "")) for k in ("hardware", "model", "tp", "workload", "engine")]
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


def plot(rows: list[Row], path: Path) -> None:
    """Output tokens/s over the output's length: a line for each engine, dashed for the limit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    loads: dict[tuple, dict[str, list[Row]]] = {}
    for row in sorted((r for r in rows if r.get("output_len")), key=lambda r: r["output_len"]):
        same = tuple(row.get(k) or 0 for k in ("hardware", "model", "tp", "requests", "prompt_len", "samples"))
        loads.setdefault((*same, row.get("shared_prefix") or 0), {}).setdefault(row["engine"], []).append(row)
    for i, ((_, model, tp, requests, prompt, samples, shared), engines) in enumerate(loads.items()):
        label = f"{model}{f' on {tp}' if tp > 1 else ''}, {Workload(requests, prompt, 0, samples, shared)}"
        label = label.replace("x0", "x…", 1)
        for j, (engine, points) in enumerate(sorted(engines.items())):
            x, y = [p["output_len"] for p in points], [p["output_tok_s"] for p in points]
            axes.plot(x, y, f"C{i}" + "osD^v"[j % 5] + "-", alpha=1 if engine == "fastgen" else 0.5,
                      label=f"{engine}, {label}")  # fmt: skip
        bound = {p["output_len"]: v for points in engines.values() for p in points if (v := _limit(p, rows))}
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


# --- the command ------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "fgbench", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("model", nargs="?", help="config.json, checkpoint or its folder, hub id, or a name of conf/model")
    p.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as for fgrun")
    p.add_argument(
        "--workload", nargs="+", default=[], metavar="NxPROMPTxOUTPUT", help="what to run, one after another"
    )
    p.add_argument("--outputs", metavar="16,64,…", help="run each workload with each of these output lengths")
    p.add_argument("--shared-prefix", type=int, default=0, metavar="TOKENS", help="that all prompts begin with")
    p.add_argument("--weights", action="store_true", help="load the model's weights; the default draws random ones")
    p.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each workload; the median counts (3)")
    p.add_argument("--warm-up", type=float, metavar="SECONDS", help="of the first workload, untimed, before all: a "
                   "cold machine is faster. The default is one pass, 30 s at most")  # fmt: skip
    p.add_argument("--temperature", type=float, default=0.7, metavar="T", help="of sampling (0.7)")
    p.add_argument("--latency", action="store_true", help="one more run of each workload, for percentiles of latency")
    p.add_argument("--start-up", action="store_true", help="a row of the seconds from the process's start to a token")
    p.add_argument("--out", type=Path, metavar="FILE", help="JSON rows; new ones replace those of the same engine, "
                   "model, workload and hardware")  # fmt: skip
    p.add_argument("--peer", type=Path, nargs="+", default=[], metavar="FILE", help="rows for the table and plot alone")
    p.add_argument("--peer-log", type=Path, metavar="FILE", help="add rows from another engine's lines "
                   "'vllm MODEL tp1 512x1024x128 rep0: 16.3s 4026 out tok/s'")  # fmt: skip
    p.add_argument("--peer-version", default="unknown", metavar="TEXT", help="of that engine")
    p.add_argument("--hardware", metavar="NAME", help="of that log; the default is that of the other rows")
    p.add_argument("--plot", type=Path, metavar="FILE", help="output tokens/s over output length, with the limit")
    return p


def _config(args: argparse.Namespace) -> Config:
    """The model and settings. ValueError for what fgrun would refuse too."""
    groups = {f.name: asdict(getattr(Settings(), f.name)) for f in fields(Settings) if is_dataclass(f.default)}
    owner = {name: f"{group}.{name}" for group, names in groups.items() for name in names if name not in groups}
    for override in args.overrides:
        if re.match(r"(prompt|chat|task|out)\b", override):
            raise ValueError(f"{override}: fgbench makes its own prompts and keeps no text")
    given = [owner.get(key := o.partition("=")[0], key) + o[len(key) :] for o in args.overrides]
    local = Path(args.model).expanduser().exists() or "/" in args.model
    chosen = [] if local else [f"model={args.model}"]
    config = compose(*chosen, f"sampling.temperature={args.temperature}", *given)
    model = replace(config.model, path=args.model) if local else config.model
    return replace(config, model=model)


def _works(args: argparse.Namespace) -> list[Workload]:
    works = [Workload.of(text)._replace(shared=args.shared_prefix) for text in args.workload]
    if args.outputs:
        works = [Workload.of(f"{w.requests}x{w.prompt}x{n}")._replace(samples=w.samples, shared=w.shared)
                 for w in works for n in args.outputs.split(",")]  # fmt: skip
    for w in works:
        if not 0 <= w.shared < w.prompt:
            raise ValueError(f"--shared-prefix {w.shared} must be less than the prompt of {w.prompt} tokens")
    return works


def _peers(args: argparse.Namespace, rows: list[Row]) -> list[Row]:
    """The rows of --peer-log, on the hardware of the others."""
    names = {args.hardware} if args.hardware else {r["hardware"] for r in rows}
    if len(names) != 1:
        raise ValueError(f"which hardware is {args.peer_log} of? --hardware NAME; known: {', '.join(sorted(names))}")
    try:
        return peer_rows(args.peer_log.read_text(), args.peer_version, *names)
    except ValueError as e:
        raise ValueError(f"{args.peer_log}: {e}") from e


def run(args: argparse.Namespace, works: list[Workload], config: Config | None, rows: list[Row]) -> None:
    """Measure, save after each workload, add the peers. `rows` receives everything."""
    age = _age()

    def add(*new: Row) -> None:
        rows[:] = merge(rows, list(new))
        for row in new:
            rate = f", {row['output_tok_s']:,.1f} output tokens/s" if "output_tok_s" in row else ""
            print(f"{row['engine']} {row['model']} {row['workload']}: {row['seconds']:.2f} s{rate}", file=sys.stderr)
        if args.out:
            args.out.write_text(json.dumps(rows, indent=1) + "\n")

    if config is not None:
        started = start(config, args.weights, works)
        started.seconds.update({} if age is None else {"process": age})
        with started.engine as engine:
            if args.start_up:
                add(_row(started, "start-up") | {"seconds": sum(started.seconds.values())})
            generator = torch.Generator().manual_seed(config.seed or 0)
            for i, w in enumerate(works):
                sampling = replace(config.sampling, max_tokens=w.output, min_tokens=0, ignore_eos=True, n=w.samples)
                if i == 0:
                    warm_up(engine, w, sampling, args.warm_up)
                row = measure(started, w, sampling, args.repeats, generator)
                if args.latency:
                    row |= latency(engine, w.prompts(engine.spec.vocab, generator), sampling)
                add(row)
    if args.peer_log:
        add(*_peers(args, rows))


def main(argv: list[str] | None = None) -> int:
    """The console script; the exit status: 2 for a command that is wrong, 1 for one that failed."""
    words = sys.argv[1:] if argv is None else argv
    overrides = [w for w in words if re.match(r"[+~]{0,2}[\w.]+=", w)]  # anywhere, even after --workload
    args = _parser().parse_intermixed_args([w for w in words if w not in overrides])
    args.overrides += overrides
    rows, others = list[Row](), list[Row]()
    status = 2
    try:
        works = _works(args)
        if args.repeats < 1:
            raise ValueError(f"--repeats must be at least 1, got {args.repeats}")
        if bool(works or args.start_up) != bool(args.model) or not (args.model or args.out or args.peer):
            raise ValueError("give a model and what to run: fgbench MODEL --workload 512x1024x128; see fgbench --help")
        for path in (args.out, args.plot):
            if path and not path.parent.is_dir():
                raise ValueError(f"there is no folder {path.parent}")
        if args.plot and not find_spec("matplotlib"):
            raise ValueError("--plot needs matplotlib: pip install fastgen[notebook]")
        config = _config(args) if args.model else None
        rows = read(args.out) if args.out and args.out.is_file() else []
        others = [row for path in args.peer for row in read(path)]
        status = 1
        run(args, works, config, rows)
        status = 0
    except KeyboardInterrupt:
        status = 130
    except (ValueError, OSError, torch.OutOfMemoryError) as e:
        print(f"fgbench: {e}", file=sys.stderr)
    shown = merge(others, rows)
    if shown and status != 2:
        print(table(shown), flush=True)
    if shown and args.plot and not status:
        plot(shown, args.plot)
    return status


if __name__ == "__main__":
    sys.exit(main())
