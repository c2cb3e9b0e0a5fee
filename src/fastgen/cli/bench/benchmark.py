"""`fgbench`: measures throughput and latency, and compares them with the machine's limit and with other engines."""

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

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from tqdm.auto import tqdm

from fastgen import Engine, EngineConfig, Replicas, SamplingParams, lora
from fastgen.checkpoint import files, hub, weights
from fastgen.cli.bench import hardware
from fastgen.cli.bench.results import Row, format_table, merge_rows, parse_peer_log, plot_rows, read_rows
from fastgen.cli.bench.workload import Workload
from fastgen.cli.console import ends_quietly
from fastgen.cli.hydra_config import RunConfig, compose, model_override, parse_arguments, reject_fgrun_keys
from fastgen.cli.parsers import bench_parser
from fastgen.cli.prompt_files import check_output
from fastgen.cli.run import build_engines
from fastgen.config import ParallelConfig
from fastgen.extras import install_command
from fastgen.profiling import roofline
from fastgen.quantization.kv_cache import row_format

progress_bar = partial(tqdm, delay=2, leave=False, disable=None)  # None: shown on terminals only, to keep logs short


class StartedEngine(NamedTuple):
    """An engine that has generated its first token, the model's name in result rows, and the start-up times."""

    engine: Engine | Replicas
    model_name: str
    start_up_seconds: dict[str, float]


def _process_age_seconds() -> float | None:
    """Returns the time since this process started, or None where /proc does not exist."""
    with suppress(OSError):
        start = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return float(Path("/proc/uptime").read_text().split()[0]) - start
    return None


def start_engine(config: RunConfig, load_weights: bool, workloads: list[Workload]) -> StartedEngine:
    """Starts the configured engine without a tokenizer, with random weights unless `load_weights`.

    Raises ValueError, before any weights are loaded, if a workload exceeds the model's context length.
    """
    start, m = time.perf_counter(), config.model
    path = hub.default_model_path() if m.path is None else Path(m.path).expanduser()
    model_name = path.parent.name if path.name == "config.json" else path.name
    if not path.exists():  # a hub id; random weights need the repository's config.json only
        needs_files = load_weights or str(m.path).count("/") != 1
        path = hub.resolve(str(m.path)) if needs_files else Path(hf_hub_download(str(m.path), "config.json"))
    model_config = files.read_model_config(path)
    for w in workloads:
        if w.prompt_len + w.output_len > (context := model_config.context_length):
            raise ValueError(f"workload {w}: prompt and output are longer than the context of {context}")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if m.device == "auto" else m.device
    dtype_name = m.dtype if m.dtype != "auto" else "float32" if device == "cpu" else model_config.dtype
    dtype, progress = getattr(torch, dtype_name), sys.stderr.isatty()
    config = replace(config, lora=lora.expand_lora_config(config.lora, m.adapters))
    if config.parallel != ParallelConfig():  # every process loads or creates its own weights
        model = replace(m, path=str(path), dtype=dtype_name, device=device, random_weights=not load_weights)
        engine = build_engines(replace(config, model=model), progress=progress)
        start_up_seconds = {"load_and_engine": time.perf_counter() - start}
    else:
        if load_weights:
            model_config, params = weights.load(path, device=device, dtype=dtype, progress=progress)
        else:
            params = weights.init(model_config, m.random_seed, device=device, dtype=dtype)
        if device != "cpu":
            torch.cuda.synchronize(device)
        loaded = time.perf_counter()
        engine = Engine(params, model_config, **{f.name: getattr(config, f.name) for f in fields(EngineConfig)})
        engine.load_adapters(m.adapters)
        start_up_seconds = {"load": loaded - start, "engine": time.perf_counter() - loaded}
    start, prompts = time.perf_counter(), [[1] * 8] * config.parallel.replicas
    engine.generate(prompts, SamplingParams(max_tokens=1, ignore_eos=True), progress=False)
    start_up_seconds["first_token"] = time.perf_counter() - start
    return StartedEngine(engine, re.sub(r"\.(json|gguf|safetensors)$", "", model_name.lower()), start_up_seconds)


def warm_up(engine: Engine | Replicas, workload: Workload, sampling: SamplingParams, seconds: float | None) -> None:
    """Runs the workload untimed for `seconds`, or, if None, once and for at most 30 s."""
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
    """Returns percentiles in ms of the time to first token and the inter-token latency, all requests sent at once."""
    last: dict[tuple[int, int], float] = {}
    first_token_ms, inter_token_ms = list[float](), list[float]()
    start = time.perf_counter()
    for event in progress_bar(engine.stream(prompts, sampling), desc="latency", unit="token"):
        if event.token_ids:
            now, key = time.perf_counter(), (event.request_id, event.index)
            (inter_token_ms if key in last else first_token_ms).append(1e3 * (now - last.get(key, start)))
            last[key] = now
    latencies = {"first_token_ms": first_token_ms, "inter_token_ms": inter_token_ms}
    percentiles = {name: np.percentile(values, (50, 90, 99)).tolist() for name, values in latencies.items() if values}
    return {name: dict(zip(("p50", "p90", "p99"), values, strict=True)) for name, values in percentiles.items()}


def measure_throughput(
    started: StartedEngine, workload: Workload, sampling: SamplingParams, num_repeats: int, generator: torch.Generator
) -> Row:
    """Returns a row with the median time of `num_repeats` runs, each with new prompts, and the roofline limits."""
    engine, w, all_seconds = started.engine, workload, list[float]()
    num_output_tokens = w.num_requests * w.num_samples * w.output_len
    with hardware.measure_clocks(engine.device) as clocks:
        for _ in progress_bar(range(num_repeats), desc=str(w), unit="run"):
            prompts = w.make_prompts(engine.model_config.vocab_size, generator)
            start = time.perf_counter()
            outputs = engine.generate(prompts, sampling, progress=False)
            all_seconds.append(time.perf_counter() - start)
            num_generated = sum(len(c.token_ids) for o in outputs for c in o.completions)
            if num_generated != num_output_tokens:
                raise ValueError(f"workload {w}: generated {num_generated} tokens instead of {num_output_tokens}")
    seconds, itemsize = statistics.median(all_seconds), engine.dtype.itemsize
    row = _common_fields(started, str(w)) | w.to_row() | {
        "shared_prefix": w.shared_prefix_len, "temperature": sampling.temperature,
        "seconds": seconds, "seconds_all": all_seconds, "output_tok_s": num_output_tokens / seconds,
        "total_tok_s": (num_output_tokens + w.num_requests * w.prompt_len) / seconds, "clocks": clocks,
    }  # fmt: skip
    row |= hardware.measure_peak_rates(engine.device, engine.dtype)
    name, measured = row["hardware"].split()[-1], None
    known = roofline.KNOWN_MACHINES.get(name) if itemsize == 2 else None  # the constants are those of 16-bit GEMMs
    if row["gemm_tflops"]:
        memory_bytes = hardware.total_memory_bytes(engine.device)
        machine = known or roofline.Machine(name, 0, row["copy_tb_s"] * 1e12, memory_bytes)
        measured = machine._replace(flops_per_second=row["gemm_tflops"] * 1e12)
    if engine.config.quantization.weights == "fp8":  # these matmuls have other rates, and the weights other sizes
        known = measured = None
    rows = row_format(engine.model_config, engine.config.kv_cache.dtype, engine.dtype)
    for name, machine in (("limit", known), ("limit_measured", measured)):
        options = itemsize, engine.config.parallel, rows.bytes_per_element
        limit = machine and w.max_tokens_per_second(engine.model_config, machine, *options)
        row |= {f"{name}_tok_s": limit, f"{name}_fraction": row["output_tok_s"] / limit if limit else None}
    return row


def _common_fields(started: StartedEngine, workload: str) -> Row:
    """Returns the fields that all rows of a process share."""
    engine, parallel, device = started.engine, started.engine.config.parallel, started.engine.device
    return {
        "engine": "fastgen", "model": started.model_name, "workload": workload,
        "hardware": hardware.hardware_name(device), "tp": parallel.tensor_parallel, "replicas": parallel.replicas,
        "dtype": str(engine.dtype).removeprefix("torch."), **hardware.collect_versions(device),
        "settings": asdict(engine.config), "cache_tokens": engine.cache_capacity,
        "start_up": started.start_up_seconds, "threads": torch.get_num_threads(),
        "peak_memory_gb": hardware.peak_memory_bytes(device) / 1e9,
    }  # fmt: skip


def _parse_workloads(args: argparse.Namespace) -> list[Workload]:
    workloads = [Workload.parse(text)._replace(shared_prefix_len=args.shared_prefix) for text in args.workload]
    if args.outputs:
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", args.outputs):
            raise ValueError(f"--outputs {args.outputs!r} is not a list of positive numbers: 16,64")
        lengths = [int(n) for n in args.outputs.split(",")]
        workloads = [w._replace(output_len=n) for w in workloads for n in lengths]
    for w in workloads:
        if not 0 <= (shared := w.shared_prefix_len) < w.prompt_len:
            raise ValueError(f"--shared-prefix {shared} must be less than the prompt of {w.prompt_len} tokens")
    return workloads


def run_benchmarks(
    args: argparse.Namespace, workloads: list[Workload], config: RunConfig | None, rows: list[Row]
) -> None:
    """Measures the workloads and parses --peer-log. Merges each new row into `rows` and saves them at once."""

    def add_rows(*new: Row) -> None:
        rows[:] = merge_rows(rows, list(new))
        for row in new:
            rate = f", {row['output_tok_s']:,.1f} output tokens/s" if "output_tok_s" in row else ""
            print(f"{row['engine']} {row['model']} {row['workload']}: {row['seconds']:.2f} s{rate}", file=sys.stderr)
        if args.out:
            args.out.write_text(json.dumps(rows, indent=1) + "\n")

    if config is not None:
        age = _process_age_seconds()
        started = start_engine(config, args.weights, workloads)
        started.start_up_seconds.update({} if age is None else {"process": age})
        with started.engine as engine:
            if args.start_up:
                add_rows(_common_fields(started, "start-up") | {"seconds": sum(started.start_up_seconds.values())})
            generator = torch.Generator().manual_seed(config.seed or 0)
            fixed_length = replace(config.sampling, min_tokens=0, ignore_eos=True)
            for w in workloads:
                sampling = replace(fixed_length, max_tokens=w.output_len, n=w.num_samples)
                if w is workloads[0]:
                    warm_up(engine, w, sampling, args.warm_up)
                row = measure_throughput(started, w, sampling, args.repeats, generator)
                if args.latency:
                    row |= measure_latency(engine, w.make_prompts(engine.model_config.vocab_size, generator), sampling)
                add_rows(row)
    if args.peer_log:
        names = {args.hardware} if args.hardware else {r["hardware"] for r in rows}
        if len(names) != 1:
            known = ", ".join(sorted(names))
            raise ValueError(f"which hardware is {args.peer_log} of? --hardware NAME; known: {known}")
        add_rows(*parse_peer_log(args.peer_log, args.peer_version, *names))


@ends_quietly("fgbench")
def main(argv: list[str] | None = None) -> int:
    """Runs the console script. Returns the exit status: 2 for a wrong command, 1 for a run that failed."""
    args = parse_arguments(bench_parser(), argv)
    rows, peer_rows, status, interrupt = list[Row](), list[Row](), 2, None
    try:
        workloads = _parse_workloads(args)
        if args.repeats < 1:
            raise ValueError(f"--repeats must be at least 1, got {args.repeats}")
        if bool(workloads or args.start_up) != bool(args.model) or not (args.model or args.out or args.peer):
            usage = "fgbench MODEL --workload 512x1024x128; see fgbench --help"
            raise ValueError(f"expected a model and a workload: {usage}")
        for name, path in (("--out", args.out), ("--plot", args.plot)):
            if path:
                check_output(name, path, [args.peer_log])
        if args.plot and not find_spec("matplotlib"):
            raise ValueError(f"--plot needs matplotlib: {install_command('notebook')}")
        config = None
        if args.model:
            reject_fgrun_keys(args.overrides, "fgbench makes its own prompts and keeps no text")
            config = compose(model_override(args.model), f"sampling.temperature={args.temperature}", *args.overrides)
        rows = read_rows(args.out) if args.out and args.out.is_file() else []
        peer_rows = [row for path in args.peer for row in read_rows(path)]
        status = 1
        run_benchmarks(args, workloads, config, rows)
        status = 0
    except KeyboardInterrupt as e:
        interrupt = e
    except (ValueError, OSError, torch.OutOfMemoryError) as e:
        print(f"fgbench: {e}", file=sys.stderr)
    shown = merge_rows(peer_rows, rows)
    if shown and status != 2:
        print(format_table(shown), flush=True)
    if shown and args.plot and not status:
        plot_rows(shown, args.plot)
    if interrupt is not None:
        raise interrupt
    return status
