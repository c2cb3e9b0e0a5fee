"""Times weight updates in place, from a tree and from another process, and releasing the engine's memory.

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
    """Returns the median seconds of a call; the first call is not counted."""
    results = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        f()
        torch.cuda.synchronize()
        results.append(time.perf_counter() - start)
    return statistics.median(results[1:])


def trainer(config: Path, seed: int, device: str, pipe: Any) -> None:
    """Runs a process that exports its own parameters, until the pipe receives a message."""
    model_config = fastgen.from_hf_config(files.read_hf_config(config))
    params = fastgen.init(model_config, seed, device=device, dtype=torch.bfloat16)
    torch.cuda.synchronize(device)
    pipe.send(fastgen.cuda_ipc_handles(weights.named_weights(params, model_config)))
    pipe.recv()


def copy_rate() -> float:
    """Returns the GB/s of a large copy, bytes read plus written."""
    x = torch.empty(2**31, dtype=torch.bfloat16, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / seconds(lambda: y.copy_(x)) / 1e9


def measure_updates(
    engine: fastgen.Engine, config: Path, sample: Callable[[], Any], first_tokens: Any, results: dict[str, Any]
) -> None:
    """Times updates from a tree, from names, and from another process, and checks each by the tokens generated."""
    size = results["bytes"] = sum(w.nbytes for w in tree_leaves(engine.params) if w is not None)

    def timed(name: str, source: Any) -> None:
        elapsed = seconds(lambda: engine.update_params(source))
        rate = 2 * size / elapsed / 1e9
        results[name] = {"seconds": elapsed, "GB/s": rate, "of a copy": rate / results["copy GB/s"]}

    new_params = fastgen.init(engine.model_config, 1, device="cuda", dtype=torch.bfloat16)
    timed("tree", new_params)
    second_tokens = sample()
    assert first_tokens != second_tokens
    timed("names", list(weights.named_weights(new_params, engine.model_config)))
    assert sample() == second_tokens
    torch.cuda.empty_cache()
    context = mp.get_context("spawn")
    device_index = torch.cuda.device_count() - 1
    parent_pipe, child_pipe = context.Pipe()
    process = context.Process(target=trainer, args=(config, 0, f"cuda:{device_index}", child_pipe))
    process.start()
    handles = parent_pipe.recv()
    timed(f"another process, {'its own GPU' if device_index else 'the same GPU'}", handles)
    parent_pipe.send(None)
    process.join()
    assert sample() == first_tokens, "the other process' parameters are those that the engine began with"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "training_gpu.json")
    args = parser.parse_args()
    config = HERE / "configs" / f"{args.model}.json"
    results: dict[str, Any] = {"model": args.model, "device": torch.cuda.get_device_name()}
    results["copy GB/s"] = copy_rate()
    engine = fastgen.Engine.from_pretrained(config, random_weights=True, dtype="bfloat16", gpu_memory_utilization=0.6)
    sampling = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=0)
    prompts = torch.randint(100, engine.model_config.vocab_size, (16, 200)).tolist()

    def sample() -> list[list[int]]:
        return [o.completions[0].token_ids for o in engine.generate(prompts, sampling, progress=False)]

    first_tokens = sample()
    measure_updates(engine, config, sample, first_tokens, results)
    print(json.dumps(results), flush=True)

    captures, free_memory = engine.runner.graphs.num_captures, []
    times: dict[str, list[float]] = {"release": [], "restore": []}
    for i in range(args.cycles):
        target = "cache" if i % 20 else "all"
        start = time.perf_counter()
        engine.sleep(target)
        torch.cuda.synchronize()
        middle = time.perf_counter()
        free = torch.cuda.mem_get_info()[0]
        engine.wake_up()
        torch.cuda.synchronize()
        times["release"].append(middle - start)
        times["restore"].append(time.perf_counter() - middle)
        free_memory.append((target, free / 1e9, torch.cuda.mem_get_info()[0] / 1e9))
        if i % 10 == 0:
            assert sample() == first_tokens
    assert sample() == first_tokens
    assert engine.runner.graphs.num_captures == captures
    results["cycles"] = {
        "number": args.cycles, "cache bytes": sum(w.nbytes for w in tree_leaves(engine.cache)),
        "seconds of cache": {k: statistics.median(v[1:20]) for k, v in times.items()},
        "seconds of all": {k: statistics.median(v[20::20]) for k, v in times.items()},
        "free GB while released, and after": [free_memory[0], free_memory[1], free_memory[-20], free_memory[-1]],
    }  # fmt: skip
    print(json.dumps(results["cycles"]), flush=True)
    args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
