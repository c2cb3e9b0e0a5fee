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
from fastgen.models import weights

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


def trainer(config: Path, seed: int, pipe: Any) -> None:
    """Another process with parameters of its own, until it is told to end."""
    spec = fastgen.from_hf(weights.read_config(config))
    params = fastgen.init(spec, seed, device="cuda", dtype=torch.bfloat16)
    pipe.send(fastgen.handles(weights.named(params, spec)))
    pipe.recv()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "training_gpu.json")
    args = parser.parse_args()
    config = HERE / "configs" / f"{args.model}.json"
    found: dict[str, Any] = {"model": args.model, "device": torch.cuda.get_device_name()}
    x = torch.empty(2**31, dtype=torch.bfloat16, device="cuda")
    y = torch.empty_like(x)
    copy = 2 * x.nbytes / seconds(lambda: y.copy_(x)) / 1e9  # read and written
    del x, y
    torch.cuda.empty_cache()
    engine = fastgen.Engine.from_pretrained(config, random=True, dtype="bfloat16", cache_fraction=0.6)
    size = sum(w.nbytes for w in tree_leaves(engine.params) if w is not None)
    found |= {"bytes": size, "copy GB/s": copy}
    sampling = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=0)
    prompts = torch.randint(100, engine.spec.vocab, (16, 200)).tolist()

    def told() -> list[list[int]]:
        return [o.completions[0].token_ids for o in engine.generate(prompts, sampling, progress=False)]

    first = told()
    other = fastgen.init(engine.spec, 1, device="cuda", dtype=torch.bfloat16)
    took = seconds(lambda: engine.update_params(other))
    found["tree"] = {"seconds": took, "GB/s": 2 * size / took / 1e9, "of a copy": 2 * size / took / 1e9 / copy}
    second = told()
    assert first != second
    pairs = list(weights.named(other, engine.spec))
    took = seconds(lambda: engine.update_params(pairs))
    found["names"] = {"seconds": took, "GB/s": 2 * size / took / 1e9, "of a copy": 2 * size / took / 1e9 / copy}
    assert told() == second
    del other, pairs
    torch.cuda.empty_cache()
    context = mp.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=trainer, args=(config, 0, there))
    process.start()
    given = here.recv()
    took = seconds(lambda: engine.update_params(given))
    found["ipc, one GPU"] = {"seconds": took, "GB/s": 2 * size / took / 1e9, "of a copy": 2 * size / took / 1e9 / copy}
    here.send(None)
    process.join()
    assert told() == first, "the other process' parameters are those that the engine began with"
    print(json.dumps(found), flush=True)

    captures, used = engine._stepper.captures, []
    times: dict[str, list[float]] = {"release": [], "restore": []}
    for i in range(args.cycles):
        what = "cache" if i % 20 else "all"
        start = time.perf_counter()
        engine.release(what)
        torch.cuda.synchronize()
        middle = time.perf_counter()
        free = torch.cuda.mem_get_info()[0]
        engine.restore()
        torch.cuda.synchronize()
        times["release"].append(middle - start)
        times["restore"].append(time.perf_counter() - middle)
        used.append((what, free / 1e9, torch.cuda.mem_get_info()[0] / 1e9))
        if i % 10 == 0:
            assert told() == first
    assert told() == first
    assert engine._stepper.captures == captures
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
