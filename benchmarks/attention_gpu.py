"""Paged attention on one GPU, Llama 8B's heads in bf16: Triton against torch's kernels and the memory bandwidth.

    python benchmarks/attention_gpu.py             # writes benchmarks/results/attention_gpu.json
    python benchmarks/attention_gpu.py --variants  # and every tile of VARIANTS

Decode: bytes of keys and values read per second, compared with a plain copy's; for sequences with a shared prefix, the
time with and without groups. Prefill: FLOP/s of the causal half, compared with cuDNN's on contiguous keys. Pages are in
random order. Variants are checked against the reference on a ragged batch, then timed as a graph, after warm-up.
"""

import argparse
import json
import multiprocessing
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgen
from fastgen.core.attention import reference
from fastgen.core.scheduler import Span
from fastgen.core.types import SharedPrefix
from fastgen.kernels import attention

HERE = Path(__file__).parent
CONFIG = fastgen.from_hf_config(json.loads((HERE / "configs" / "llama-3.1-8b-instruct.json").read_text()))
DECODE = {"512 x 1088": [1088] * 512, "64 x 4096": [4096] * 64, "8 x 32768": [32768] * 8, "1 x 8192": [8192]}
PREFILL = {  # (all tokens, new tokens)
    "16 x 1024": [(1024, 1024)] * 16,
    "8 x 1024": [(1024, 1024)] * 8,
    "1 x 8192": [(8192, 8192)],
    "1 x 32768": [(32768, 32768)],
    "4096 after 28672": [(32768, 4096)],
}
RAGGED = [(300, 300), (129, 129), (500, 100), (640, 128), (700, 60), (513, 2), (200, 1), (1, 1)]
DEFAULT_TILES = (attention.PREFILL_TILE, attention.LONG_PREFILL_TILE)  # the backend's tiles
Variant = tuple[int, dict[str, int] | None, bool]  # page size, tile (None: the backend's choice), TMA
VARIANTS: list[Variant] = [
    (16, {"M": 128, "N": 128, "num_warps": 8, "num_stages": 2}, False),
    (16, {"M": 64, "N": 64, "num_warps": 4, "num_stages": 3}, False),
    (128, {"M": 128, "N": 128, "num_warps": 8, "num_stages": 3}, True),
    (128, {"M": 128, "N": 128, "num_warps": 8, "num_stages": 4}, True),
    (128, {"M": 64, "N": 128, "num_warps": 4, "num_stages": 1}, True),
    (64, {"M": 64, "N": 64, "num_warps": 4, "num_stages": 2}, True),
    (64, {"M": 64, "N": 64, "num_warps": 4, "num_stages": 1, "maxnreg": 168}, True),
    (64, {"M": 64, "N": 32, "num_warps": 4, "num_stages": 3, "maxnreg": 168}, True),
    (64, {"M": 128, "N": 32, "num_warps": 8, "num_stages": 3, "maxnreg": 128}, True),
    (64, {"M": 128, "N": 64, "num_warps": 8, "num_stages": 3}, True),
]
Case = tuple[fastgen.Batch, Tensor, Tensor, Tensor]


def make_case(shapes: list[tuple[int, int]], page_size: int, *, groups: int = 0, shared: int = 0) -> Case:
    """Returns a batch of sequences of (all, new) tokens in `groups` with a prefix of `shared` tokens; q, k, v."""
    num_pages = [-(-(n - shared) // page_size) for n, _ in shapes]
    ids = list(range(1, sum(num_pages) + groups * (shared // page_size) + 1))
    random.Random(0).shuffle(ids)
    shared_pages = [tuple(ids.pop() for _ in range(shared // page_size)) for _ in range(groups)]
    plan = []
    for i, ((n, new), count) in enumerate(zip(shapes, num_pages, strict=True)):
        first = shared_pages[i * groups // len(shapes)] if groups else ()
        plan.append(Span(i, n - new, n, True, first + tuple(ids.pop() for _ in range(count))))
    batch = fastgen.build_batch(tuple(plan), {i: [0] * n for i, (n, _) in enumerate(shapes)}, page_size, "cuda")
    options = {"device": "cuda", "dtype": torch.bfloat16}
    slots = (sum(num_pages) + groups * (shared // page_size) + 1) * page_size
    k, v = (torch.randn(slots, CONFIG.num_kv_heads, CONFIG.head_dim, **options) for _ in "kv")
    if groups:
        group_rows = torch.arange(len(shapes), device="cuda", dtype=torch.int32).view(groups, -1)
        keys, skip = (torch.full((n,), shared, device="cuda", dtype=torch.int32) for n in (groups, len(shapes)))
        batch = batch._replace(shared_prefix=SharedPrefix(group_rows, keys, skip))
    return batch, torch.randn(len(batch.token_ids), CONFIG.num_q_heads, CONFIG.head_dim, **options), k, v


def set_tile(tile: dict[str, int] | None, tma: bool) -> None:
    """Sets the tile that the backend prefills with."""
    attention.PREFILL_TILE, attention.LONG_PREFILL_TILE = (tile, tile) if tile else DEFAULT_TILES
    attention.USE_TMA = tma


def check(page_size: int, tile: dict[str, int] | None, tma: bool) -> str:
    """Returns what is wrong with a variant's attention of a ragged batch, or "". Compiles, in its own process."""
    set_tile(tile, tma)
    torch.manual_seed(0)
    batch, q, k, v = make_case(RAGGED, page_size)
    worst = 0.0
    for window in (None, 100):
        try:
            output = attention.paged_attention(batch, CONFIG)(q, k, v, window).float()
        except Exception as error:  # a tile that does not compile is a result
            return f"{type(error).__name__}: {str(error)[:200]}"
        expected = reference(batch, CONFIG)(q, k, v, window).float()
        worst = max(
            worst, float((output - expected).norm() / expected.norm()), float((output - expected).abs().max()) / 4
        )
    return "" if worst < 1e-2 else f"differs from the reference by {worst}"


def seconds(f: Callable[[], object]) -> float:
    """Returns the time of one call, replayed as a graph."""
    f()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    return triton.testing.do_bench(graph.replay, warmup=40, rep=150, return_mode="median") / 1e3


def host_seconds(f: Callable[[], object]) -> float:
    """Returns the host's time to launch a call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(50):
        f()
    spent = (time.perf_counter() - start) / 50
    torch.cuda.synchronize()
    return spent


def flops(shapes: list[tuple[int, int]]) -> float:
    return sum(4 * (new * (n - new) + new * new / 2) * CONFIG.num_q_heads * CONFIG.head_dim for n, new in shapes)


def measure_peers(shapes: list[tuple[int, int]]) -> dict[str, float]:
    """Returns the FLOP/s of torch's kernels, if all tokens are new."""
    n, count = shapes[0][0], len(shapes)
    x, y = (torch.randn(count, h, n, CONFIG.head_dim, device="cuda", dtype=torch.bfloat16)
            for h in (CONFIG.num_q_heads, CONFIG.num_kv_heads))  # fmt: skip
    rates = {}
    for key, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash2", SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(backend):
            elapsed = seconds(
                lambda: torch.nn.functional.scaled_dot_product_attention(x, y, y, is_causal=True, enable_gqa=True)
            )
        rates[f"{key}_tflop_s"] = flops(shapes) / elapsed / 1e12
    return rates


def prefill(variants: list[Variant]) -> list[dict[str, Any]]:
    """Returns a row for each variant, with its FLOP/s at each shape if it is correct."""
    with ProcessPoolExecutor(len(variants), multiprocessing.get_context("spawn")) as pool:
        errors = list(pool.map(check, *zip(*variants, strict=True)))
    rows: list[dict[str, Any]] = [
        {"kind": "prefill", "page": page_size, "tma": tma, **(tile or {"tile": "own"})}
        | ({"wrong": error} if error else {})
        for (page_size, tile, tma), error in zip(variants, errors, strict=True)
    ]
    for page_size in sorted({page_size for page_size, *_ in variants}):
        for name, shapes in PREFILL.items():
            batch, q, k, v = make_case(shapes, page_size)
            for (tile_page, tile, tma), row in zip(variants, rows, strict=True):
                if tile_page != page_size or "wrong" in row:
                    continue
                set_tile(tile, tma)
                attend = attention.paged_attention(batch, CONFIG)
                row[name] = flops(shapes) / seconds(lambda: attend(q, k, v, None)) / 1e12  # noqa: B023
                if name == "8 x 1024":
                    row["host_us"] = host_seconds(lambda: attend(q, k, v, None)) * 1e6  # noqa: B023
    set_tile(None, True)
    return rows


def decode(page_size: int, copy: float) -> list[dict[str, Any]]:
    rows = []
    for name, lengths in DECODE.items():
        batch, q, k, v = make_case([(n, 1) for n in lengths], page_size)
        attend = attention.paged_attention(batch, CONFIG)
        num_bytes = sum(lengths) * 2 * CONFIG.num_kv_heads * CONFIG.head_dim * 2
        rate = num_bytes / seconds(lambda: attend(q, k, v, None)) / 1e12  # noqa: B023
        rows.append({"kind": "decode", "shape": name, "page": page_size, "triton_tb_s": rate, "of_copy": rate / copy})
    return rows


def shared(page_size: int) -> list[dict[str, Any]]:
    """Times decoding sequences with 1024 shared keys and 128 of their own, with and without groups."""
    rows = []
    for groups, group_size in ((32, 16), (8, 16), (4, 8)):
        batch, q, k, v = make_case([(1152, 1)] * (groups * group_size), page_size, groups=groups, shared=1024)
        grouped, ungrouped = (
            attention.paged_attention(batch._replace(shared_prefix=shared), CONFIG)
            for shared in (batch.shared_prefix, None)
        )
        x, y = (attend(q, k, v, None).float() for attend in (grouped, ungrouped))
        error = float((x - y).norm() / y.norm())
        times = {name: seconds(lambda: attend(q, k, v, None)) * 1e6  # noqa: B023
                 for name, attend in (("together_us", grouped), ("alone_us", ungrouped))}  # fmt: skip
        rows.append({"kind": "shared", "shape": f"{groups} x {group_size}", "page": page_size, "error": error, **times})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "attention_gpu.json")
    parser.add_argument("--variants", action="store_true", help="time every tile of VARIANTS")
    args = parser.parse_args()
    big = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    copy = 2 * big.nbytes / triton.testing.do_bench(big.clone, return_mode="median") / 1e9
    del big
    rows: list[dict[str, Any]] = [
        {"kind": "peers", "shape": name, **measure_peers(shapes)}
        for name, shapes in PREFILL.items()
        if shapes[0][0] == shapes[0][1]
    ]
    rows += prefill([(page_size, None, True) for page_size in (16, 64, 128)] + (VARIANTS if args.variants else []))
    for page_size in (16, 64, 128):
        rows += decode(page_size, copy)
    rows += shared(64)
    result = {"gpu": torch.cuda.get_device_name(), "copy_tb_s": copy, "rows": rows,
              "torch": torch.__version__, "triton": triton.__version__, "fastgen": fastgen.__version__}  # fmt: skip
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    for row in rows:
        print({key: round(x, 3) if isinstance(x, float) else x for key, x in row.items()})


if __name__ == "__main__":
    main()
