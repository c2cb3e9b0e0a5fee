"""Kernels on one GPU in bf16: small-batch linear layers in several tiles against cuBLAS, RoPE + cache write, sampling.

    python benchmarks/kernels_gpu.py               # writes $OUT or benchmarks/results, kernels_gpu.json

Times are medians of replays of a CUDA graph of many calls, whose weights rotate over more copies than fit into L2.
GB/s count the weights (linear layers), bytes read and written (store) or the logits (draw).
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

import fastgen
from fastgen.core import layers, sampling
from fastgen.core.types import SamplingTensors
from fastgen.kernels import rope_cache, sample, small_batch

HERE = Path(__file__).parent
MODELS = {  # (N, K)
    "mistral-7b": {"qkv": (6144, 4096), "out": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336),
                   "head": (32768, 4096)},
    "qwen2.5-7b": {"qkv": (4608, 3584), "out": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)},
    "llama-3.2-1b": {"qkv": (3072, 2048), "out": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192),
                     "head": (128256, 2048)},
}  # fmt: skip
TILES = [  # (N, K, warps, stages)
    (16, 256, 1, 4), (16, 512, 1, 4), (16, 512, 1, 3), (16, 512, 2, 4), (32, 256, 2, 3), (32, 256, 2, 4),
    (32, 512, 2, 3), (32, 128, 2, 6), (64, 128, 2, 4), (64, 128, 4, 5), (64, 256, 4, 4),
]  # fmt: skip
BF16 = {"device": "cuda", "dtype": torch.bfloat16}
NAMES: tuple[str, ...] = ("N", "K", "num_warps", "num_stages")


def seconds(f: Callable[[int], object], calls: int = 20, replays: int = 7) -> float:
    """Returns the time of one f(i) in a graph of f(0), f(1), ..."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        f(0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            f(i)
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Returns the largest error, relative to the largest entry."""
    return float((actual.float() - expected).abs().max() / expected.abs().max())


def matrices(n: int, k: int) -> Tensor:
    """Returns more copies of a weight, in one tensor, than fit into L2."""
    copies = max(2, -(-(256 << 20) // (2 * n * k)))
    return torch.empty(copies, n, k, **BF16).normal_(std=k**-0.5)


def measure_tiles(w: Tensor, rows: int) -> dict:
    """Times one shape of weights with every tile, the default one, and torch."""
    copies, n, k = w.shape
    x = torch.randn(rows, k, **BF16)
    select_tile = small_batch.select_linear_tile

    def use_tile(config: dict[str, int] | None) -> Callable[[int], Tensor]:
        small_batch.select_linear_tile = select_tile if config is None else lambda *_: config
        return lambda i: small_batch.linear(x, w[i % copies])

    def plain(i: int) -> Tensor:
        return F.linear(x, w[i % copies])

    expected = F.linear(x.float(), w[0].float())
    gb = 2 * n * k / 1e9
    row = {"kind": "linear", "n": n, "k": k, "rows": rows, "cublas_gb_s": gb / seconds(plain)}
    default = select_tile(n, k, rows, x.dtype)
    reference = use_tile(None)(0)
    row |= {
        "default": default,
        "error": relative_error(reference, expected),
        "default_gb_s": gb / seconds(use_tile(None)),
    }
    assert row["error"] < 2**-7, row
    row["tiles"] = {}
    for values in TILES:
        config: dict[str, int] = dict(zip(NAMES, values, strict=True))
        try:
            error = relative_error(use_tile(config)(0), expected)
            row["tiles"][str(values)] = gb / seconds(use_tile(config)) if error < 2**-7 else f"wrong: {error}"
        except Exception as error:  # more shared memory or registers than there are
            row["tiles"][str(values)] = repr(error)[:120]
    small_batch.select_linear_tile = select_tile
    speeds = {name: speed for name, speed in row["tiles"].items() if isinstance(speed, float)}
    row["best"] = max(speeds, key=lambda name: speeds[name], default="none")
    row["best_gb_s"] = speeds.get(row["best"], 0.0)
    return row


def measure_cache_writes() -> list[dict]:
    rows = []
    q, kv, head = 32, 8, 128
    k, v = (torch.zeros(16384, kv, head, **BF16) for _ in "kv")
    for tokens in (2, 512, 8192):
        qkv = torch.randn(tokens, q + 2 * kv, head, **BF16)
        angle = torch.rand(tokens, 1, head // 2, device="cuda")
        args = (qkv, angle.cos(), angle.sin(), torch.randperm(16384, device="cuda")[:tokens], k, v)
        same = torch.equal(rope_cache.rope_and_cache_kv(*args), layers.apply_rope(qkv[:, :q], *args[1:3]))
        fused, plain = (
            seconds(lambda _, args=args: rope_cache.rope_and_cache_kv(*args)),
            seconds(lambda _, args=args: layers.rope_and_cache_kv(*args)),
        )
        rows.append({"kind": "store", "tokens": tokens, "same": same, "us": fused * 1e6, "plain_us": plain * 1e6,
                     "gb_s": 2 * qkv.nbytes / fused / 1e9})  # fmt: skip
    return rows


def measure_sampling() -> list[dict]:
    rows = []
    for n, vocab in ((2, 32768), (512, 32768), (2, 152064), (512, 128256)):
        logits = 4 * torch.randn(n, vocab, **BF16)
        seed, flags = torch.arange(n, device="cuda"), torch.zeros(n, dtype=torch.bool, device="cuda")
        for temp in (0.0, 1.0):
            temperature = torch.full((n,), temp, device="cuda")
            settings = SamplingTensors(temperature, seed, seed, flags, None, None)
            last = torch.zeros(n + 1, dtype=torch.int32, device="cuda")
            token, logprob = sample.sample_tokens(logits, temperature, seed, seed, flags, last, seed)
            plain = sampling.sample(logits.float(), settings, num_top_logprobs=0)
            fused = seconds(lambda _: sample.sample_tokens(logits, temperature, seed, seed, flags, last, seed))  # noqa: B023
            slow = seconds(lambda _: sampling.sample(logits.float(), settings, num_top_logprobs=0), calls=2)  # noqa: B023
            rows.append({"kind": "draw", "rows": n, "vocab": vocab, "temperature": temp, "us": fused * 1e6,
                         "plain_us": slow * 1e6, "gb_s": logits.nbytes / fused / 1e9,
                         "other_tokens": int((token != plain.token_ids).sum()),
                         "logprob_error": float((logprob - plain.logprobs).abs().max())})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = Path(os.environ.get("OUT", HERE / "results"))
    parser.add_argument("--out", type=Path, default=folder / "kernels_gpu.json")
    args = parser.parse_args()
    start, rows = time.time(), []
    result = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
              "fastgen": fastgen.__version__, "rows": rows}  # fmt: skip

    def add(row: dict) -> None:
        rows.append(row)
        args.out.write_text(json.dumps(result, indent=2) + "\n")  # what is there if the time runs out
        hidden = ("tiles", "default")
        print({a: round(b, 6) if isinstance(b, float) else b for a, b in row.items() if a not in hidden}, flush=True)

    for row in (*measure_cache_writes(), *measure_sampling()):
        add(row)
    for model, shapes in MODELS.items():
        for name, (n, k) in shapes.items():
            w = matrices(n, k)
            for count in (2, 16):
                add({"model": model, "name": name} | measure_tiles(w, count))
            del w
    result["seconds"] = time.time() - start
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{result['seconds']:.0f} s")


if __name__ == "__main__":
    main()
