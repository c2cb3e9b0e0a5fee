"""Profiles the headline workload: summaries of steps that prefill and of steps that only decode.

python benchmarks/profile_gpu.py mistral-7b-instruct-v0.3 --out profile.json
"""

import argparse
import json
from pathlib import Path

import torch

import fastgen

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--budget", type=int, default=16384)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "profile_gpu.json")
    args = parser.parse_args()
    engine = fastgen.Engine.from_pretrained(
        HERE / "configs" / f"{args.model}.json", random_weights=True, dtype="bfloat16", progress=True,
        max_num_seqs=512, token_budget=args.budget,
    )  # fmt: skip
    sampling = fastgen.SamplingParams(temperature=0.7, max_tokens=80, ignore_eos=True)
    for prompt in torch.randint(100, engine.model_config.vocab_size, (args.prompts, args.length)).tolist():
        engine.add(prompt, sampling)
    results = {}
    for name, num_skipped in (("mixed", 20), ("decode", 2)):
        for _ in range(num_skipped):
            engine.step()
        while name == "decode" and any(
            s.num_tokens - s.num_computed_tokens > 1 for s in (*engine.state.running, *engine.state.waiting)
        ):
            engine.step()
        with engine.profile(num_steps=4, path=args.out.with_name(f"{name}.json.gz"), skip_first=2) as p:
            for _ in range(8):
                engine.step()
        results[name] = p.summary.to_dict()
        print(f"## {name}\n{p.summary}", flush=True)
    args.out.write_text(json.dumps({"model": args.model, "gpu": torch.cuda.get_device_name()} | results, indent=1))


if __name__ == "__main__":
    main()
