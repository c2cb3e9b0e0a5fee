"""Compares logprobs of the sampler and the scorer, by default and batch-invariant; measures the cost of both.

python benchmarks/deterministic_gpu.py llama-3.2-1b-instruct --out deterministic.json
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import fastgen
from fastgen import SamplingParams

HERE = Path(__file__).parent


def make_requests(num_requests: int, vocab: int, rng: random.Random) -> tuple[list[list[int]], list[SamplingParams]]:
    common = [rng.randrange(vocab) for _ in range(300)]
    prompts = [common[: rng.choice((0, 0, 130, 300))] + [rng.randrange(vocab) for _ in range(rng.randint(1, 700))]
               for _ in range(num_requests)]  # fmt: skip
    nucleus, greedy, top_k = {"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0}, {"top_k": 20}
    choices: list[dict[str, Any]] = [{}, greedy, nucleus, top_k, {}, {}]
    return prompts, [
        SamplingParams(seed=i, logprobs=0, max_tokens=rng.randint(1, 120), ignore_eos=True, **choices[i % len(choices)])
        for i in range(num_requests)
    ]


def measure_rate(engine: fastgen.Engine, logprobs: int | None, shape: tuple[int, int, int]) -> float:
    """Returns output tokens/s."""
    num_requests, prompt_len, output_len = shape
    prompts = torch.randint(100, engine.model_config.vocab_size, (num_requests, prompt_len)).tolist()
    sampling = SamplingParams(max_tokens=output_len, ignore_eos=True, logprobs=logprobs)
    start = time.perf_counter()
    engine.generate(prompts, sampling, progress=False)
    return num_requests * output_len / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--modes", nargs="+", default=["default", "deterministic"])
    parser.add_argument("--no-rates", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "deterministic_gpu.json")
    args = parser.parse_args()
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    config = HERE / "configs" / f"{args.model}.json"
    row = results.setdefault(args.model, {})  # keeps the other mode's results
    row["device"] = torch.cuda.get_device_name()
    for mode in args.modes:
        settings = {"batch_invariant": mode == "deterministic", "gpu_memory_utilization": 0.6}
        engine = fastgen.Engine.from_pretrained(config, random_weights=True, dtype="bfloat16", **settings)
        result = row[mode] = {}
        prompts, sampling = make_requests(args.requests, engine.model_config.vocab_size, random.Random(0))
        outputs = engine.generate(prompts, sampling, progress=False)
        # In other batches, and with prefix cache hits.
        reordered = engine.generate(prompts[::-1], sampling[::-1], progress=False)[::-1]
        pairs = zip(outputs, reordered, strict=True)
        result["other tokens or logprobs in other company"] = sum(
            (a.completions[0].token_ids, a.completions[0].logprobs)
            != (b.completions[0].token_ids, b.completions[0].logprobs) for a, b in pairs
        )  # fmt: skip
        result["sampler and scorer"] = fastgen.compare_logprobs(
            outputs, engine.params, engine.model_config, batch_invariant=mode == "deterministic"
        )._asdict()
        print(mode, result, flush=True)
        if not args.no_rates:
            for name, shape in (("512x1024x128", (512, 1024, 128)), ("1x128x256", (1, 128, 256))):
                measure_rate(engine, None, shape)
                measured = [
                    (k, measure_rate(engine, k, shape)) for _ in range(args.repeats) for k in (None, 0)
                ]  # alternately
                runs = {f"logprobs={k}": [x for k_measured, x in measured if k_measured == k] for k in (None, 0)}
                result[name] = {k: {"median": statistics.median(v), "runs": v} for k, v in runs.items()}
                print(mode, name, {k: round(statistics.median(v), 1) for k, v in runs.items()}, flush=True)
        args.out.write_text(json.dumps(results, indent=1))
        engine.close()
        del engine
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
