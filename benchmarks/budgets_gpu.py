"""Throughput of the headline workload over the token budget and the prefill chunk of mixed steps.

python benchmarks/budgets_gpu.py mistral-7b-instruct-v0.3 512x1024x128 --budget 2048 4096 8192
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

import fastgen

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("workload", nargs="*", default=["512x1024x128"])
    parser.add_argument("--budget", type=int, nargs="*", default=[8192, 4096, 2048])
    parser.add_argument("--chunk", type=int, nargs="*", default=[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "budgets_gpu.json")
    args = parser.parse_args()
    engine = fastgen.Engine.from_pretrained(
        HERE / "configs" / f"{args.model}.json", random_weights=True, dtype="bfloat16", progress=False,
        max_num_seqs=512, token_budget=max(args.budget),
    )  # fmt: skip
    schedule, generator, results = engine.config.schedule, torch.Generator().manual_seed(0), []
    for workload in args.workload:
        num_requests, prompt_len, output_len = map(int, workload.split("x"))
        sampling = fastgen.SamplingParams(temperature=0.7, max_tokens=output_len, ignore_eos=True)
        for budget in (max(args.budget), *args.budget):  # the first is the warm-up
            for chunk in args.chunk:
                variant = replace(schedule, token_budget=budget, prefill_chunk=chunk or None)
                engine.core.config = replace(engine.config, schedule=variant)
                prompts = torch.randint(
                    100, engine.model_config.vocab_size, (num_requests, prompt_len), generator=generator
                ).tolist()
                torch.cuda.synchronize()
                start, steps = time.perf_counter(), engine.num_steps
                engine.generate(prompts, sampling, progress=False)
                seconds = time.perf_counter() - start
                row = {
                    "model": args.model, "workload": workload, "budget": budget, "chunk": chunk, "seconds": seconds,
                    "output_tok_s": num_requests * output_len / seconds, "steps": engine.num_steps - steps,
                }  # fmt: skip
                results.append(row)
                print(json.dumps(row), flush=True)
    args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
