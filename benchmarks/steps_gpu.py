"""Times of single steps on one GPU, and of their kernels.

    python benchmarks/steps_gpu.py mistral-7b-instruct-v0.3 --out steps.json

Random weights on a real config, distinct random prompts. Decoding: N sequences at a context of C tokens; prefilling:
steps of the whole budget. `host` is how long the host is busy with a step, `step` the time from one to the next.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import fastgen

HERE = Path(__file__).parent


def make_prompts(num_seqs: int, length: int, vocab: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(100, vocab, (num_seqs, length), generator=generator).tolist()


def slowest_kernels(engine: fastgen.Engine, steps: int) -> list[tuple[str, int, float]]:
    """Returns (name, calls per step, microseconds per step) of the kernels that take longest."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as p:
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
    rows = [(e.key[:90], e.count // steps, e.self_device_time_total / steps) for e in p.key_averages()]
    return sorted((r for r in rows if r[2] > 0), key=lambda r: -r[2])[:16]


def measure_decode(
    engine: fastgen.Engine, num_seqs: int, context: int, steps: int = 24, *, table: bool = False
) -> dict:
    """Times steps in which `count` sequences decode at `context` tokens."""
    sampling = fastgen.SamplingParams(temperature=0.7, max_tokens=steps + 80, ignore_eos=True)
    request_ids = [engine.add(p, sampling) for p in make_prompts(num_seqs, context, engine.model_config.vocab_size)]
    while any(s.num_tokens - s.num_computed_tokens > 1 for s in engine.state.running) or engine.state.waiting:
        engine.step()
    for _ in range(5):
        engine.step()
    torch.cuda.synchronize()
    start, busy = time.perf_counter(), []
    wait = engine.core.finish_step
    waited = [0.0]

    def timed() -> None:
        call_start = time.perf_counter()
        if engine.core._in_flight is not None and engine.core._in_flight.done_event is not None:
            engine.core._in_flight.done_event.synchronize()
        waited[0] += time.perf_counter() - call_start
        wait()

    engine.core.finish_step = timed
    for _ in range(steps):
        call_start, before = time.perf_counter(), waited[0]
        engine.step()
        busy.append(time.perf_counter() - call_start - (waited[0] - before))
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / steps
    del engine.core.finish_step
    kernels = slowest_kernels(engine, 10) if table else []
    for id in request_ids:
        engine.abort(id)
    while engine.has_unfinished_requests:
        engine.step()
    return {
        "sequences": num_seqs, "context": context, "step_ms": 1e3 * seconds, "host_ms": 1e3 * statistics.median(busy),
        "kernels": kernels,
    }  # fmt: skip


def measure_prefill(engine: fastgen.Engine, num_seqs: int, length: int, *, table: bool = False) -> dict:
    """Times `count` prompts with one sampled token each."""
    sampling = fastgen.SamplingParams(temperature=0.7, max_tokens=1)
    seconds, kernels = [], []
    for repeat in range(3):
        for p in make_prompts(num_seqs, length, engine.model_config.vocab_size, repeat):
            engine.add(p, sampling)
        torch.cuda.synchronize()
        start = time.perf_counter()
        if table and repeat == 2:
            kernels = slowest_kernels(engine, 1)
        while engine.has_unfinished_requests:
            engine.step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    best = statistics.median(seconds[:2] if table else seconds)
    return {"prompts": num_seqs, "length": length, "tok_s": num_seqs * length / best, "kernels": kernels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="+")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "steps_gpu.json")
    parser.add_argument("--compile", default="graphs", help="eager, inductor or graphs")
    parser.add_argument("--decode", nargs="*", default=["1x256", "8x1088", "64x1088", "256x1088", "512x1088"])
    parser.add_argument("--prefill", nargs="*", default=["64x1024", "4x8192"])
    parser.add_argument("--budget", type=int, default=8192)
    parser.add_argument("--tables", action="store_true")
    args = parser.parse_args()
    rows = []
    for model in args.model:
        start = time.perf_counter()
        engine = fastgen.Engine.from_pretrained(
            HERE / "configs" / f"{model}.json", random_weights=True, dtype="bfloat16", progress=False,
            compile=args.compile, max_num_seqs=512, token_budget=args.budget,
        )  # fmt: skip
        row = {"model": model, "compile": args.compile, "start_s": time.perf_counter() - start}
        row |= {"capacity": engine.cache_capacity, "memory_gb": torch.cuda.memory_reserved() / 1e9, "steps": []}
        print(json.dumps(row), flush=True)
        for measure, loads in ((measure_decode, args.decode), (measure_prefill, args.prefill)):
            for load in loads:
                num_seqs, length = map(int, load.split("x"))
                result = measure(engine, num_seqs, length, table=args.tables)
                row["steps"].append(result)
                print(measure.__name__, *(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}"
                                       for k, v in result.items() if k != "kernels"), flush=True)  # fmt: skip
                for name, calls, us in result["kernels"]:
                    print(f"    {us:10.1f} us {calls:5d} x  {name}")
        rows.append(row)
        engine.close()
        del engine
        torch.cuda.empty_cache()
    args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
