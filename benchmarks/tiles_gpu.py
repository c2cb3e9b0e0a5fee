"""Finds the fastest tile for matmuls of one row by each matrix of the supported models.

    python benchmarks/tiles_gpu.py --out tiles.json

Microseconds of each, in a chain of dependent launches over distinct weights, as in a captured step. The table in
`small_batch.select_linear_tile` comes from these results.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import fastgen
from fastgen.core.model_config import shard_config
from fastgen.kernels import small_batch

HERE = Path(__file__).parent
MODELS = {  # and over how many GPUs
    "llama-3.2-1b-instruct": 1, "qwen2.5-7b-instruct": 1, "llama-3.1-8b-instruct": 1, "ministral-8b-instruct-2410": 1,
    "mistral-7b-instruct-v0.3": 2, "qwen2.5-14b-instruct": 1, "deepseek-r1-distill-llama-70b": 2,
}  # fmt: skip
WARPS = {  # to try for each N and K
    (16, 128): (1,), (16, 256): (1, 2), (16, 512): (1, 2, 4), (32, 128): (1, 2), (32, 256): (1, 2, 4),
    (32, 512): (2, 4, 8), (64, 128): (2, 4), (64, 256): (4, 8), (128, 128): (4, 8),
}  # fmt: skip
SHARED = 200 * 1024  # bytes of shared memory that a program may use


def shapes() -> dict[tuple[int, int], list[str]]:
    """Returns the matrices' shapes [out_features, in_features], and which matrices have them."""
    owners_by_shape = dict[tuple[int, int], list[str]]()
    for name, max_ranks in MODELS.items():
        model_config = fastgen.from_hf_config(json.loads((HERE / "configs" / f"{name}.json").read_text()))
        for size in {1, max_ranks}:
            shard = shard_config(model_config, size)
            q_width, kv_width = shard.num_q_heads * shard.head_dim, shard.num_kv_heads * shard.head_dim
            d, f, vocab = shard.hidden_size, shard.intermediate_size, -(-model_config.vocab_size // size)
            matrices = {"qkv": (q_width + 2 * kv_width, d), "out": (d, q_width), "gate_up": (2 * f, d), "down": (d, f),
                        "head": (vocab, d)}  # fmt: skip
            for part, shape in matrices.items():
                owners_by_shape.setdefault(shape, []).append(f"{name} / {size}: {part}")
    return owners_by_shape


def microseconds(weights: list[Tensor]) -> float:
    """Returns the time of a matmul by each of the weights."""
    x = torch.randn(1, weights[0].shape[1], device="cuda", dtype=torch.bfloat16)
    small_batch.linear(x, weights[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for w in weights:
            small_batch.linear(x, w)
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    num_replays = max(3, 2 * 10**9 // sum(w.nbytes for w in weights))
    events[0].record()
    for _ in range(num_replays):
        graph.replay()
    events[1].record()
    torch.cuda.synchronize()
    return 1e3 * events[0].elapsed_time(events[1]) / num_replays / len(weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "tiles_gpu.json")
    args = parser.parse_args()
    memory = torch.randn(2**30, device="cuda", dtype=torch.bfloat16).mul_(0.02)
    variants = [(n, k, w, stages) for (n, k), warps in WARPS.items() for w in warps for stages in (3, 4, 5, 6)
                if 2 * n * k * stages <= SHARED]  # fmt: skip
    select_tile, rows = small_batch.select_linear_tile, dict[str, dict[str, Any]]()
    for shape, owners in shapes().items():
        rows[f"{shape[0]} x {shape[1]}"] = {"of": owners, "chosen": None, "us": {}}
    for variant in tqdm([None, *variants], unit="tile"):
        if variant is not None:
            config = dict(zip(("N", "K", "num_warps", "num_stages"), variant, strict=True))
            small_batch.select_linear_tile = lambda *_, config=config: config
        for shape in shapes():
            n, k = shape
            if variant is not None and k % variant[1]:
                continue
            count = max(1, min(24, len(memory) // (n * k)))
            weights = [memory[i * n * k : (i + 1) * n * k].view(n, k) for i in range(count)]
            row = rows[f"{n} x {k}"]
            elapsed = round(microseconds(weights), 2)
            if variant is None:
                row["chosen"] = [*select_tile(n, k, 1, torch.bfloat16).values(), elapsed]
            else:
                row["us"][" ".join(map(str, variant))] = elapsed
    small_batch.select_linear_tile = select_tile
    args.out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "shapes": rows}, indent=1) + "\n")
    for name, row in rows.items():
        best = min(row["us"], key=row["us"].get)
        print(f"{name:>15}: chosen {row['chosen'][-1]:6.1f}, best {row['us'][best]:6.1f} us with {best}")


if __name__ == "__main__":
    main()
