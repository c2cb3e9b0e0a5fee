"""`fgbench`: how fast the engine is here, next to what the machine allows and to other engines. `fgbench --help`."""

import argparse
import json
import os
import re
import statistics
import sys
import time
from contextlib import suppress
from dataclasses import asdict, fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import hf_hub_download
from tqdm.auto import tqdm

import fastgen
from fastgen import Engine, EngineConfig, Replicas, SamplingParams, lora
from fastgen.checkpoint import hub, weights
from fastgen.cli.bench.machine import (
    collect_versions,
    hardware_name,
    measure_clocks,
    measure_peak_rates,
    peak_memory_bytes,
    total_memory_bytes,
)
from fastgen.cli.bench.rows import Row, Workload, format_table, merge_rows, parse_peer_log, plot_rows, read_rows
from fastgen.cli.hydra_config import RunConfig, compose, model_override
from fastgen.cli.prompt_files import check_output
from fastgen.config import ParallelConfig
from fastgen.profiling import roofline

progress_bar = partial(tqdm, delay=2, leave=False, disable=None)  # None: on a terminal alone, so that logs stay short
EPILOG = """
workloads: NxPROMPTxOUTPUT[xSAMPLES] is N prompts of PROMPT random tokens, new ones for each repeat, and exactly OUTPUT
  tokens for each of SAMPLES (default 1) completions
settings: KEY=VALUE as for fgrun (fgrun --help lists them); the group may be left out: token_budget=4096
limit: the least time the machine could need; fastgen/profiling/roofline.py has the formula. Known machines have a limit from
  measured constants; every row has a second one, from the matrix product's rate right after the run. The table and the
  plot show the first where there is one.

examples:
  fgbench debug --workload 8x64x16 2x64x16x4
  fgbench benchmarks/configs/mistral-7b-instruct-v0.3.json --workload 512x1024x128 1x128x256 --out rows.json
  fgbench path/to/config.json --workload 512x1024x128 --outputs 16,64,128,512 --plot plot.png max_num_seqs=512
  fgbench mistral_7b --weights --workload 32x1024x256 --shared-prefix 768 --latency schedule=latency
  fgbench --out rows.json --peer-log vllm.txt --peer-version 0.23.0 --plot plot.png     # measures nothing
"""


# --- runs -------------------------------------------------------------------------------------------------------------


class StartedEngine(NamedTuple):
    """An engine, how its rows are called, and what it took to get there, seconds."""

    engine: Engine | Replicas
    model_name: str
    start_up_seconds: dict[str, float]


def _process_age_seconds() -> float | None:
    """Seconds since this process began (Linux)."""
    with suppress(OSError):
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return float(Path("/proc/uptime").read_text().split()[0]) - began
    return None


def start_engine(config: RunConfig, load_weights: bool, workloads: list[Workload]) -> StartedEngine:
    """The configured engine, without a tokenizer. Weights are random unless `real`.

    ValueError, before anything big is read or made, for a workload that is longer than the model's context.
    """
    began, m = time.perf_counter(), config.model
    path = hub.default_model_path() if m.path is None else Path(m.path).expanduser()
    model = path.parent.name if path.name == "config.json" else path.name
    if not path.exists():  # a hub id; random weights need no more of it than the config
        whole = load_weights or str(m.path).count("/") != 1
        path = weights.resolve(str(m.path)) if whole else Path(hf_hub_download(str(m.path), "config.json"))
    spec = weights.read_model_config(path)
    for w in workloads:
        if w.prompt_len + w.output_len > spec.context_length:
            raise ValueError(f"workload {w}: prompt and output are longer than the context of {spec.context_length}")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if m.device == "auto" else m.device
    dtype = m.dtype if m.dtype != "auto" else "float32" if device == "cpu" else spec.dtype
    config = replace(config, lora=lora.expand_lora_config(config.lora, m.adapters))
    kind, settings = getattr(torch, dtype), {f.name: getattr(config, f.name) for f in fields(EngineConfig)}
    if config.parallel != ParallelConfig():  # each process makes its share for itself
        loading = {"dtype": dtype, "device": device, "random_weights": not load_weights, "random_seed": m.random_seed}
        loading |= {"adapters": m.adapters, "progress": sys.stderr.isatty()} | settings
        if (count := config.parallel.replicas) > 1:
            engine = Replicas.from_pretrained(path, replicas=count, **loading)
        else:
            engine = Engine.from_pretrained(path, **loading)
        return _time_first_token(engine, model, {"load_and_engine": time.perf_counter() - began})
    if load_weights:
        spec, params = weights.load(path, device=device, dtype=kind, progress=sys.stderr.isatty())
    else:
        params = weights.init(spec, m.random_seed, device=device, dtype=kind)
    if device != "cpu":
        torch.cuda.synchronize(device)
    loaded = time.perf_counter()
    engine = Engine(params, spec, **settings)
    engine.load_adapters(m.adapters)
    return _time_first_token(engine, model, {"load": loaded - began, "engine": time.perf_counter() - loaded})


def _time_first_token(engine: Engine | Replicas, model_name: str, start_up_seconds: dict[str, float]) -> StartedEngine:
    """With the time to a first token."""
    began = time.perf_counter()
    first = [[1] * 8] * engine.config.parallel.replicas
    engine.generate(first, SamplingParams(max_tokens=1, ignore_eos=True), progress=False)
    start_up_seconds["first_token"] = time.perf_counter() - began
    return StartedEngine(engine, re.sub(r"\.(json|gguf|safetensors)$", "", model_name.lower()), start_up_seconds)


def warm_up(engine: Engine | Replicas, workload: Workload, sampling: SamplingParams, seconds: float | None) -> None:
    """Untimed load: for `seconds`, or None for one pass of at most 30."""
    end, generator = time.perf_counter() + (30 if seconds is None else seconds), torch.Generator().manual_seed(1)
    with progress_bar(desc=f"warming up with {workload}", unit="token") as progress:
        while time.perf_counter() < end:
            for _ in engine.stream(workload.make_prompts(engine.model_config.vocab_size, generator), sampling):
                progress.update()
                if time.perf_counter() > end:
                    break
            if seconds is None:
                break


def measure_latency(engine: Engine | Replicas, prompts: list[list[int]], sampling: SamplingParams) -> Row:
    """Percentiles, ms, when all requests come at once: to the first token, and between tokens of one completion."""
    last: dict[tuple[int, int], float] = {}
    first, gaps = list[float](), list[float]()
    start = time.perf_counter()
    for event in progress_bar(engine.stream(prompts, sampling), desc="latency", unit="token"):
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


def measure_throughput(
    started: StartedEngine, workload: Workload, sampling: SamplingParams, num_repeats: int, generator: torch.Generator
) -> Row:
    """One row: the median of `repeats` runs with prompts of their own."""
    engine, taken = started.engine, list[float]()
    drawn = workload.num_requests * workload.num_samples * workload.output_len
    with measure_clocks(engine.device) as clocks:
        for _ in progress_bar(range(num_repeats), desc=str(workload), unit="run"):
            prompts = workload.make_prompts(engine.model_config.vocab_size, generator)
            began = time.perf_counter()
            outputs = engine.generate(prompts, sampling, progress=False)
            taken.append(time.perf_counter() - began)
            if (got := sum(len(c.token_ids) for o in outputs for c in o.completions)) != drawn:
                raise ValueError(f"workload {workload}: {got} tokens came instead of {drawn}")
    seconds, layout = statistics.median(taken), engine.config.parallel
    row = _common_fields(started, str(workload)) | {
        "requests": workload.num_requests, "prompt_len": workload.prompt_len, "output_len": workload.output_len, "samples": workload.num_samples,
        "shared_prefix": workload.shared_prefix_len, "temperature": sampling.temperature, "seconds": seconds, "seconds_all": taken,
        "output_tok_s": drawn / seconds, "total_tok_s": (drawn + workload.num_requests * workload.prompt_len) / seconds,
        "clocks": clocks,
    }  # fmt: skip
    row |= measure_peak_rates(engine.device, engine.dtype)
    name = row["hardware"].split()[-1]
    known = roofline.KNOWN_MACHINES.get(name) if engine.dtype.itemsize == 2 else None  # its FLOP/s are those of 16 bits
    machines = {"limit": known, "limit_measured": None}
    if row["gemm_tflops"]:
        here = known or roofline.Machine(name, 0, row["copy_tb_s"] * 1e12, total_memory_bytes(engine.device))
        machines["limit_measured"] = here._replace(flops_per_second=row["gemm_tflops"] * 1e12)
    for name, machine in machines.items():
        tok_s = (
            workload.max_tokens_per_second(engine.model_config, machine, engine.dtype.itemsize, layout)
            if machine
            else None
        )
        row |= {f"{name}_tok_s": tok_s, f"{name}_fraction": row["output_tok_s"] / tok_s if tok_s else None}
    return row


def _common_fields(started: StartedEngine, workload: str) -> Row:
    """What every row of this process says."""
    engine = started.engine
    return {
        "engine": "fastgen", "model": started.model_name, "workload": workload, "hardware": hardware_name(engine.device),
        "tp": engine.config.parallel.tensor_parallel, "replicas": engine.config.parallel.replicas,
        "dtype": str(engine.dtype).removeprefix("torch."), **collect_versions(engine.device),
        "settings": asdict(engine.config), "cache_tokens": engine.cache_capacity,
        "start_up": started.start_up_seconds, "threads": torch.get_num_threads(), "peak_memory_gb": peak_memory_bytes(engine.device) / 1e9,
    }  # fmt: skip


# --- the command ------------------------------------------------------------------------------------------------------


def _make_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "fgbench", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--version", action="version", version=f"%(prog)s {fastgen.__version__}")
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


def _compose_config(args: argparse.Namespace) -> RunConfig:
    """The model and settings. ValueError for what fgrun would refuse too."""
    for override in args.overrides:
        if re.match(r"(prompt|chat|task|out)\b", override):
            raise ValueError(f"{override}: fgbench makes its own prompts and keeps no text")
    return compose(model_override(args.model), f"sampling.temperature={args.temperature}", *args.overrides)


def _parse_workloads(args: argparse.Namespace) -> list[Workload]:
    works = [Workload.parse(text)._replace(shared_prefix_len=args.shared_prefix) for text in args.workload]
    if args.outputs:
        works = [Workload.parse(f"{w.num_requests}x{w.prompt_len}x{n}")._replace(num_samples=w.num_samples, shared_prefix_len=w.shared_prefix_len)
                 for w in works for n in args.outputs.split(",")]  # fmt: skip
    for w in works:
        if not 0 <= w.shared_prefix_len < w.prompt_len:
            raise ValueError(
                f"--shared-prefix {w.shared_prefix_len} must be less than the prompt of {w.prompt_len} tokens"
            )
    return works


def _read_peer_log(args: argparse.Namespace, rows: list[Row]) -> list[Row]:
    """The rows of --peer-log, on the hardware of the others."""
    names = {args.hardware} if args.hardware else {r["hardware"] for r in rows}
    if len(names) != 1:
        raise ValueError(f"which hardware is {args.peer_log} of? --hardware NAME; known: {', '.join(sorted(names))}")
    try:
        return parse_peer_log(args.peer_log.read_text(), args.peer_version, *names)
    except ValueError as e:
        raise ValueError(f"{args.peer_log}: {e}") from e


def run_benchmarks(
    args: argparse.Namespace, workloads: list[Workload], config: RunConfig | None, rows: list[Row]
) -> None:
    """Measure, save after each workload, add the peers. `rows` receives everything."""
    age = _process_age_seconds()

    def add(*new: Row) -> None:
        rows[:] = merge_rows(rows, list(new))
        for row in new:
            rate = f", {row['output_tok_s']:,.1f} output tokens/s" if "output_tok_s" in row else ""
            print(f"{row['engine']} {row['model']} {row['workload']}: {row['seconds']:.2f} s{rate}", file=sys.stderr)
        if args.out:
            args.out.write_text(json.dumps(rows, indent=1) + "\n")

    if config is not None:
        started = start_engine(config, args.weights, workloads)
        started.start_up_seconds.update({} if age is None else {"process": age})
        with started.engine as engine:
            if args.start_up:
                add(_common_fields(started, "start-up") | {"seconds": sum(started.start_up_seconds.values())})
            generator = torch.Generator().manual_seed(config.seed or 0)
            for i, w in enumerate(workloads):
                sampling = replace(
                    config.sampling, max_tokens=w.output_len, min_tokens=0, ignore_eos=True, n=w.num_samples
                )
                if i == 0:
                    warm_up(engine, w, sampling, args.warm_up)
                row = measure_throughput(started, w, sampling, args.repeats, generator)
                if args.latency:
                    row |= measure_latency(engine, w.make_prompts(engine.model_config.vocab_size, generator), sampling)
                add(row)
    if args.peer_log:
        add(*_read_peer_log(args, rows))


def main(argv: list[str] | None = None) -> int:
    """The console script; the exit status: 2 for a command that is wrong, 1 for one that failed."""
    words = sys.argv[1:] if argv is None else argv
    overrides = [w for w in words if re.match(r"[+~]{0,2}[\w.]+=", w)]  # anywhere, even after --workload
    args = _make_parser().parse_intermixed_args([w for w in words if w not in overrides])
    args.overrides += overrides
    rows, others = list[Row](), list[Row]()
    status = 2
    try:
        works = _parse_workloads(args)
        if args.repeats < 1:
            raise ValueError(f"--repeats must be at least 1, got {args.repeats}")
        if bool(works or args.start_up) != bool(args.model) or not (args.model or args.out or args.peer):
            raise ValueError("give a model and what to run: fgbench MODEL --workload 512x1024x128; see fgbench --help")
        for name, path in (("--out", args.out), ("--plot", args.plot)):
            if path:
                check_output(name, path, [args.peer_log])
        if args.plot and not find_spec("matplotlib"):
            raise ValueError("--plot needs matplotlib: pip install fastgen[notebook]")
        config = _compose_config(args) if args.model else None
        rows = read_rows(args.out) if args.out and args.out.is_file() else []
        others = [row for path in args.peer for row in read_rows(path)]
        status = 1
        run_benchmarks(args, works, config, rows)
        status = 0
    except KeyboardInterrupt:
        status = 130
    except (ValueError, OSError, torch.OutOfMemoryError) as e:
        print(f"fgbench: {e}", file=sys.stderr)
    shown = merge_rows(others, rows)
    if shown and status != 2:
        print(format_table(shown), flush=True)
    if shown and args.plot and not status:
        plot_rows(shown, args.plot)
    return status


if __name__ == "__main__":
    sys.exit(main())
