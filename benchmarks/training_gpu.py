"""What a trainer waits for: parameters copied in place, from a tree and from another process, and memory given back.

python benchmarks/training_gpu.py mistral-7b-instruct-v0.3 --out training.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.utils._pytree import tree_leaves

import fastgen
from fastgen import SamplingParams
from fastgen.checkpoint import files, weights

HERE = Path(__file__).parent


def seconds(f: Callable[[], Any], repeats: int = 5) -> float:
    """Median; the first call is not counted."""
    found = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        f()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def trainer(config: Path, seed: int, device: str, pipe: Any) -> None:
    """Another process with parameters of its own, until it is told to end."""
    spec = fastgen.from_hf_config(files.read_hf_config(config))
    params = fastgen.init(spec, seed, device=device, dtype=torch.bfloat16)
    torch.cuda.synchronize(device)
    pipe.send(fastgen.cuda_ipc_handles(weights.named_weights(params, spec)))
    pipe.recv()


def copied() -> float:
    """GB/s of a large copy, read and written."""
    x = torch.empty(2**31, dtype=torch.bfloat16, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / seconds(lambda: y.copy_(x)) / 1e9


def updates(engine: fastgen.Engine, config: Path, told: Callable[[], Any], first: Any, found: dict[str, Any]) -> None:
    """Seconds of an update from a tree, from names, and from another process; tokens say that each arrived."""
    size = found["bytes"] = sum(w.nbytes for w in tree_leaves(engine.params) if w is not None)

    def timed(name: str, source: Any) -> None:
        took = seconds(lambda: engine.update_params(source))
        rate = 2 * size / took / 1e9
        found[name] = {"seconds": took, "GB/s": rate, "of a copy": rate / found["copy GB/s"]}

    other = fastgen.init(engine.model_config, 1, device="cuda", dtype=torch.bfloat16)
    timed("tree", other)
    second = told()
    assert first != second
    timed("names", list(weights.named_weights(other, engine.model_config)))
    assert told() == second
    torch.cuda.empty_cache()
    context = mp.get_context("spawn")
    there = torch.cuda.device_count() - 1
    here, end = context.Pipe()
    process = context.Process(target=trainer, args=(config, 0, f"cuda:{there}", end))
    process.start()
    given = here.recv()
    timed(f"another process, {'its own GPU' if there else 'the same GPU'}", given)
    here.send(None)
    process.join()
    assert told() == first, "the other process' parameters are those that the engine began with"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "training_gpu.json")
    args = parser.parse_args()
    config = HERE / "configs" / f"{args.model}.json"
    found: dict[str, Any] = {"model": args.model, "device": torch.cuda.get_device_name()}
    found["copy GB/s"] = copied()
    engine = fastgen.Engine.from_pretrained(config, random_weights=True, dtype="bfloat16", gpu_memory_utilization=0.6)
    sampling = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=0)
    prompts = torch.randint(100, engine.model_config.vocab_size, (16, 200)).tolist()

    def told() -> list[list[int]]:
        return [o.completions[0].token_ids for o in engine.generate(prompts, sampling, progress=False)]

    first = told()
    updates(engine, config, told, first, found)
    print(json.dumps(found), flush=True)

    captures, used = engine.runner.graphs.num_captures, []
    times: dict[str, list[float]] = {"release": [], "restore": []}
    for i in range(args.cycles):
        what = "cache" if i % 20 else "all"
        start = time.perf_counter()
        engine.sleep(what)
        torch.cuda.synchronize()
        middle = time.perf_counter()
        free = torch.cuda.mem_get_info()[0]
        engine.wake_up()
        torch.cuda.synchronize()
        times["release"].append(middle - start)
        times["restore"].append(time.perf_counter() - middle)
        used.append((what, free / 1e9, torch.cuda.mem_get_info()[0] / 1e9))
        if i % 10 == 0:
            assert told() == first
    assert told() == first
    assert engine.runner.graphs.num_captures == captures
    found["cycles"] = {
        "number": args.cycles, "cache bytes": sum(w.nbytes for w in tree_leaves(engine.cache)),
        "seconds of cache": {k: statistics.median(v[1:20]) for k, v in times.items()},
        "seconds of all": {k: statistics.median(v[20::20]) for k, v in times.items()},
        "free GB while released, and after": [used[0], used[1], used[-20], used[-1]],
    }  # fmt: skip
    print(json.dumps(found["cycles"]), flush=True)
    args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
