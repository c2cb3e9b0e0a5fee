"""Cost of LoRA adapters: output tokens/s without slots for adapters, with slots, and with requests that use them.

python benchmarks/adapters_gpu.py benchmarks/configs/llama-3.2-1b-instruct.json --out adapters.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import fastgen
from fastgen import SamplingParams, lora

HERE = Path(__file__).parent
VARIANTS: dict[str, tuple[int, int]] = {  # adapter slots, and adapters that requests use in turn
    "no room": (0, 0), "room for 8, none used": (8, 0), "one used": (8, 1), "8 used": (8, 8),
}  # fmt: skip


def random_adapter(model_config: fastgen.ModelConfig, rank: int, seed: int) -> fastgen.Adapter:
    """Returns an adapter of all matrices with random weights."""
    rng = torch.Generator().manual_seed(seed)
    adapter = lora.init(model_config, rank, 2 * rank, seed=seed, device="cpu")
    for x in lora.parameters(adapter):
        x.copy_(torch.randn(x.shape, generator=rng) * 0.01)
    return adapter


def measure_rate(
    engine: fastgen.Engine, num_adapters: int, num_requests: int, prompt_len: int, output_len: int
) -> float:
    """Returns output tokens/s of one run."""
    prompts = torch.randint(engine.model_config.vocab_size, (num_requests, prompt_len)).tolist()
    names = [f"{i % num_adapters}" if num_adapters else None for i in range(num_requests)]
    sampling = [SamplingParams(max_tokens=output_len, ignore_eos=True, adapter=name) for name in names]
    start = time.perf_counter()
    engine.generate(prompts, sampling, progress=False)
    return num_requests * output_len / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a model's config.json; weights are random")
    parser.add_argument("--workloads", nargs="+", default=["512x1024x128", "1x128x256"], metavar="NxPROMPTxOUTPUT")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "adapters_gpu.json")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    results: dict[str, Any] = {"device": torch.cuda.get_device_name() if cuda else "cpu", "model": args.config.stem,
                             "rank": args.rank, "output_tok_s": {}}  # fmt: skip
    for variant, (max_adapters, num_adapters) in VARIANTS.items():
        settings = {"max_adapters": max_adapters, "max_rank": args.rank, "gpu_memory_utilization": 0.6}
        with fastgen.Engine.from_pretrained(args.config, random_weights=True, progress=False, **settings) as engine:
            for i in range(max_adapters):
                engine.add_adapter(f"{i}", random_adapter(engine.model_config, args.rank, i))
            for workload in args.workloads:
                shape = tuple(map(int, workload.split("x")))
                measure_rate(engine, num_adapters, *shape)
                rates = [measure_rate(engine, num_adapters, *shape) for _ in range(args.repeats)]
                results["output_tok_s"].setdefault(workload, {})[variant] = {
                    "median": statistics.median(rates),
                    "runs": rates,
                }
                print(f"{workload}, {variant}: {statistics.median(rates):,.0f} output tokens/s", flush=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
