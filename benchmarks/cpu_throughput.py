"""fastgen against transformers on this machine's CPU: the embedded default model, fp32, greedy.

    python benchmarks/cpu_throughput.py            # writes benchmarks/results/cpu_throughput.json

16 distinct random prompts, 128 new tokens each: fastgen with its default settings; transformers' `generate` on the
padded batch; transformers' `generate` on one prompt after the other, for the first four. Rounds alternate; the
medians are compared.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

import fastgen
from fastgen.checkpoint.hub import default_model_path

RESULT = Path(__file__).parent / "results" / "cpu_throughput.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()

    path = default_model_path()
    engine = fastgen.Engine.from_pretrained(path, dtype="float32", device="cpu")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 65, (args.requests,), generator=generator).tolist()
    prompts = [torch.randint(100, engine.model_config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    sampling = fastgen.SamplingParams(temperature=0, max_tokens=args.output_len, ignore_eos=True)
    generate_kwargs = {"max_new_tokens": args.output_len, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def run_fastgen() -> list[list[int]]:
        return [o.completions[0].token_ids for o in engine.generate(prompts, sampling, progress=False)]

    def run_batched() -> list[list[int]]:
        max_length = max(lengths)
        ids = torch.tensor([[0] * (max_length - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (max_length - len(p)) + [1] * len(p) for p in prompts])
        return model.generate(input_ids=ids, attention_mask=mask, **generate_kwargs)[:, max_length:].tolist()

    def run_single() -> list[list[int]]:
        rows = [
            model.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)).long(), **generate_kwargs)
            for p in prompts[:4]
        ]
        return [row[0, len(p) :].tolist() for row, p in zip(rows, prompts[:4], strict=True)]

    runs: dict[str, Callable[[], list[list[int]]]] = {
        "fastgen": run_fastgen,
        "batched": run_batched,
        "single": run_single,
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    tokens: dict[str, list[list[int]]] = {}
    run_fastgen()
    run_batched()
    for _ in range(args.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            tokens[name] = run()
            seconds[name].append(time.perf_counter() - start)
            print(f"{name:8} {seconds[name][-1]:.2f} s")
    rates = {name: len(tokens[name]) * args.output_len / statistics.median(values) for name, values in seconds.items()}
    result = {
        "model": "SmolLM2-135M-Instruct", "dtype": "float32", "requests": args.requests, "prompt_lengths": lengths,
        "output_len": args.output_len, "seconds": seconds, "output_tok_s": rates,
        "ratio_to_batched": rates["fastgen"] / rates["batched"], "ratio_to_single": rates["fastgen"] / rates["single"],
        "prompts_equal_to_batched": sum(a == b for a, b in zip(tokens["fastgen"], tokens["batched"], strict=True)),
        "threads": torch.get_num_threads(), "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__, "transformers": transformers.__version__, "fastgen": fastgen.__version__,
    }  # fmt: skip
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k not in ("seconds", "prompt_lengths")}, indent=2))


if __name__ == "__main__":
    main()
