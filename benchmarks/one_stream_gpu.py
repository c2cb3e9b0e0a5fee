"""A single request's step with and without small-batch kernels, programmatic dependent launch, and attention that
applies RoPE and writes the cache.

    python benchmarks/one_stream_gpu.py mistral-7b-instruct-v0.3 --out one_stream.json

Random weights; captured steps of a short context are replayed back to back, so that only the GPU's time is measured.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

import fastgen
from fastgen.core.runner import StepShape
from fastgen.kernels import pdl

HERE = Path(__file__).parent


def step_us(engine: fastgen.Engine, rows: int) -> float:
    """Returns the microseconds of a captured step of `rows` sequences at one token of context."""
    shape = StepShape(rows, rows, True)
    runner = engine.runner
    runner.graphs.captured.pop(shape, None)
    runner.capture(engine.cache, shape)
    graph = runner.graphs.captured[shape][0]
    times = []
    for _ in range(8):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(20):
            graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / 20)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="+")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "one_stream_gpu.json")
    args = parser.parse_args()
    variants: list[tuple[str, dict[str, Any]]] = [
        ("cuBLAS", {"rows": 0, "dependent": False}),
        ("own", {"dependent": False}),
        ("own, dependent", {"dependent": True}),
        ("own, dependent, attention stores", {"dependent": True, "fresh": True}),
    ]
    results = []
    for model in args.model:
        with torch.no_grad():
            engine = fastgen.Engine.from_pretrained(
                HERE / "configs" / f"{model}.json", random_weights=True, dtype="bfloat16", progress=False,
                max_num_seqs=8, token_budget=512, cache_tokens=65536,
            )  # fmt: skip
            for rows in (2, 8):
                for name, options in variants:
                    pdl.USE_PDL, pdl.SMALL_BATCH = options["dependent"], options.get("rows", 16)
                    engine.runner.fused_rope_max_tokens = 16 if "fresh" in options else 0
                    us = step_us(engine, rows)
                    results.append({"model": model, "rows": rows, "variant": name, "us": us})
                    print(f"{model} {rows} rows, {name}: {us:.0f} us, {1e6 / us:.0f} steps/s", flush=True)
            engine.close()
    args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
