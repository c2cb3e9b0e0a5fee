"""A model over the GPUs of a host in several layouts: throughput, a single request, and the cost of all-reduces.

    python benchmarks/layouts_gpu.py --layouts 1x8 2x4 4x2 --out layouts.json

A layout is REPLICASxTENSOR_PARALLEL. Throughput is fgbench's, each in its own process. A profile of one engine of
several ranks shows the fraction of kernel time in all-reduces, waiting for other ranks included. All-reduces of each
size are timed alone: by NCCL, and one-shot and two-shot by torch's symmetric memory (never by NVLink multicast); and
with the residual addition and norm that follow: by NCCL and a kernel, and by the engine's fused kernel, of partial sums
that are read from the other ranks or pushed by them (here without a concurrent matmul).
"""

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import fastgen
from fastgen.cli.bench import benchmark
from fastgen.cli.hydra_config import compose, model_override
from fastgen.distributed import tensor_parallel
from fastgen.distributed.peer_memory import PeerBuffers

HERE = Path(__file__).parent
WIDTH = 8192
SIZES = [2**i for i in range(14, 29)]  # bytes: a row in bf16, to 16k rows
CALLS = 20  # in a captured graph
SETTINGS = ("schedule.max_num_seqs=512", "schedule.token_budget=16384")


def collective_fraction(trace: Path) -> float | None:
    """Returns the fraction of kernel time that collectives take."""
    with gzip.open(trace, "rt") as f:
        kernels = [e for e in json.load(f)["traceEvents"] if e.get("cat") == "kernel"]
    names = ("nccl", "_all_reduce_add_norm")  # the latter with residual addition and norm
    elapsed = sum(e["dur"] for e in kernels if any(name in e["name"] for name in names))
    return elapsed / sum(e["dur"] for e in kernels) if kernels else None


def profile_fractions(engine: Any) -> dict[str, float | None]:
    """Returns the fractions for prefill steps, decode steps of 512 sequences, and a single request's steps."""
    results: dict[str, float | None] = {}
    sampling = fastgen.SamplingParams(temperature=0.7, max_tokens=40, ignore_eos=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, requests, length, skip in (
            ("prefill", 64, 1024, 0),
            ("decode", 512, 8, 6),
            ("one stream", 1, 128, 6),
        ):
            for prompt in torch.randint(engine.model_config.vocab_size, (requests, length)).tolist():
                engine.add(prompt, sampling)
            for _ in range(skip):
                engine.step()
            trace = Path(folder) / f"{name}.json.gz"
            with engine.profile(num_steps=3, path=trace, skip_first=1) as profile:
                while engine.has_unfinished_requests:
                    engine.step()
            print(name, profile.summary, sep="\n", flush=True)
            results[name] = collective_fraction(trace)
    return results


def measure_layout(args: argparse.Namespace) -> dict[str, Any]:
    """Returns fgbench's rows of one layout, and a profile of an engine of its ranks."""
    replicas, size = map(int, args.layouts[0].split("x"))
    parallel = [f"parallel.replicas={replicas}", f"parallel.tensor_parallel={size}"]
    config = compose(model_override(str(args.config)), "sampling.temperature=0.7", *args.settings, *parallel)
    workloads, sampling = (
        [benchmark.Workload.parse(x) for x in args.workloads],
        replace(config.sampling, ignore_eos=True),
    )
    started, generator = benchmark.start_engine(config, False, workloads), torch.Generator().manual_seed(0)
    results: dict[str, Any] = {"rows": [], "profile": None}
    with started.engine as engine:
        for workload in workloads:
            row = benchmark.measure_throughput(
                started, workload, replace(sampling, max_tokens=workload.output_len), args.repeats, generator
            )
            extra = {"one_stream_ms": 1e3 * row["seconds"] / row["output_len"]} if row["requests"] == 1 else {}
            results["rows"].append(row | extra)
            print(f"{replicas} x TP{size}, {workload}: {row['output_tok_s']:,.0f} output tokens/s", flush=True)
        if size > 1 and replicas == 1 and not args.no_profile:
            results["profile"] = profile_fractions(engine)
    return results


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Returns the time of a call, captured as a step's are on a GPU."""
    call()
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        return (time.perf_counter() - start) / CALLS
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    graph.replay()
    events[0].record()
    for _ in range(5):
        graph.replay()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 5e3 / CALLS


def symmetric_all_reduces(x: Tensor) -> dict[str, Callable[[], Any]]:
    """Returns all-reduces by torch's symmetric memory; raises where this machine has none."""
    import torch.distributed._symmetric_memory as symmetric

    group = dist.group.WORLD.group_name  # type: ignore[union-attr]
    buffer = symmetric.empty(x.numel(), dtype=x.dtype, device=x.device)
    symmetric.rendezvous(buffer, group)
    ops = torch.ops.symm_mem
    return {
        "one-shot": lambda: ops.one_shot_all_reduce(buffer, "sum", group),
        "two-shot": lambda: ops.two_shot_all_reduce_(buffer, "sum", group),
    }


def all_reduces_with_norm(
    group: tensor_parallel.TPProcessGroup, read: PeerBuffers, pushed: PeerBuffers, x: Tensor
) -> dict[str, Any]:
    """Returns ways to all-reduce rows x, add them to others, and normalize."""
    from fastgen.kernels import small_batch

    other, norm = torch.zeros_like(x), torch.ones(WIDTH, dtype=x.dtype, device=x.device)

    def all_reduce_add_norm(peers: PeerBuffers) -> Any:
        partial = peers.write_partial(peers.ATTENTION, len(x), lambda rows, out: None)
        assert partial is not None
        return peers.all_reduce_add_norm(other, partial, norm, 1e-5)

    variants: dict[str, Callable[[], Any]] = {
        "nccl, norm": lambda: small_batch.add_norm(other, group.all_reduce(x), norm, 1e-5),
        "read": lambda: all_reduce_add_norm(read),
        "pushed": lambda: all_reduce_add_norm(pushed),
    }
    return variants if group.shard.size == 2 else {k: v for k, v in variants.items() if k != "pushed"}


def time_rank(index: int, size: int, file: str, device_type: str, out: str) -> None:
    """Times all-reduces alone, as one rank's process."""
    device = torch.device(device_type, index if device_type == "cuda" else None)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{file}", rank=index, world_size=size)
    group = tensor_parallel.TPProcessGroup()
    peers = list[PeerBuffers]()
    if device_type == "cuda":
        max_rows = SIZES[-1] // 2 // WIDTH
        peers = [PeerBuffers(group, WIDTH, max_rows, torch.bfloat16, device, read) for read in (2**62, 0)]
    rows = list[dict[str, Any]]()
    for n in SIZES:
        x = torch.zeros(n // 2 // WIDTH, WIDTH, dtype=torch.bfloat16, device=device)
        variants: dict[str, Callable[[], Any]] = {backend: lambda x=x: dist.all_reduce(x)}
        row: dict[str, Any] = {"bytes": n, "ranks": size}
        if peers:
            variants |= all_reduces_with_norm(group, *peers, x)
            try:
                variants |= symmetric_all_reduces(x)
            except Exception as e:
                row["symmetric memory"] = str(e).splitlines()[0]
        for name, call in variants.items():
            if name != "one-shot" or n <= 2**25:  # it reads all ranks' data
                elapsed = seconds(call, device)
                row[name] = {"us": 1e6 * elapsed, "bus_gb_s": 2 * (size - 1) / size * n / elapsed / 1e9}
        rows.append(row)
        if index == 0:
            Path(out).write_text(json.dumps(rows))
    dist.destroy_process_group()


def measure_all_reduces(size: int, device_type: str) -> list[dict[str, Any]]:
    """Returns microseconds and bus bandwidth by message size."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/rows.json"
        mp.spawn(time_rank, (size, f"{folder}/group", device_type, out), nprocs=size)  # type: ignore[attr-defined]
        return json.loads(Path(out).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "configs" / "deepseek-r1-distill-llama-70b.json")
    parser.add_argument("--layouts", nargs="+", default=["1x8", "2x4", "4x2"], metavar="RxN")
    parser.add_argument("--workloads", nargs="*", default=["512x1024x128", "512x1024x512", "1x128x256"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--settings", nargs="+", default=[*SETTINGS], metavar="KEY=VALUE", help="of fgbench")
    parser.add_argument("--no-profile", action="store_true", help="rates and all-reduces alone")
    parser.add_argument("--no-all-reduces", action="store_true", help="rates and profiles alone")
    parser.add_argument("--one", action="store_true", help="the first layout alone, in this process")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "layouts_gpu.json")
    args = parser.parse_args()
    if args.one:
        args.out.write_text(json.dumps(measure_layout(args)))
        return
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {"torch": torch.__version__, "layouts": [], "profile": {}, "all_reduce": []}
    sizes = sorted({int(x.partition("x")[2]) for x in args.layouts} - {1})
    for size in [] if args.no_all_reduces else sizes:
        results["all_reduce"] += measure_all_reduces(size, device_type)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    for name in args.layouts if args.workloads else ():
        with tempfile.TemporaryDirectory() as folder:  # in its own process, whose end frees the memory
            out = Path(folder) / "one.json"
            arguments = ["--config", args.config, "--layouts", name, "--repeats", args.repeats, "--one", "--out", out]
            arguments += ["--workloads", *args.workloads, "--settings", *args.settings]
            arguments += ["--no-profile"] if args.no_profile else []
            subprocess.run([sys.executable, __file__, *map(str, arguments)], check=True)
            result = json.loads(out.read_text())
        results["layouts"] += result["rows"]
        results["profile"][name] = result["profile"]
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
