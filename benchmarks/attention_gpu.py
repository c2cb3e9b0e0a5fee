"""Attention over pages on one GPU, Llama 8B's heads in bf16: Triton against torch's kernels and the memory's rate.

    python benchmarks/attention_gpu.py             # writes benchmarks/results/attention_gpu.json

Decode: bytes of keys and values read a second, beside a plain copy's. Prefill: FLOP/s of the causal half, beside
cuDNN's on contiguous keys. Pages are in random order. Medians, after a warm-up.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgen
from fastgen.ops.backends import choose
from fastgen.schedule import Span

HERE = Path(__file__).parent
SPEC = fastgen.from_hf(json.loads((HERE / "configs" / "llama-3.1-8b-instruct.json").read_text()))
DECODE = {"512 x 1088": [1088] * 512, "64 x 4096": [4096] * 64, "8 x 32768": [32768] * 8, "1 x 8192": [8192]}
PREFILL = {"8 x 1024": [1024] * 8, "1 x 8192": [8192], "1 x 32768": [32768]}


def case(lengths: list[int], new: Callable[[int], int], page: int) -> tuple[fastgen.Batch, Tensor, Tensor, Tensor]:
    """A batch of sequences of those lengths, the last `new(length)` tokens to be computed; queries, keys, values."""
    needed = [-(-n // page) for n in lengths]
    ids = list(range(1, sum(needed) + 1))
    random.Random(0).shuffle(ids)
    plan = []
    for i, (n, count) in enumerate(zip(lengths, needed, strict=True)):
        plan.append(Span(i, n - new(n), n, True, tuple(ids[:count])))
        ids = ids[count:]
    batch = fastgen.stage(tuple(plan), {i: [0] * n for i, n in enumerate(lengths)}, page, "cuda")
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    k, v = (torch.randn((sum(needed) + 1) * page, SPEC.kv_heads, SPEC.head, **kind) for _ in "kv")
    return batch, torch.randn(len(batch.token), SPEC.q_heads, SPEC.head, **kind), k, v


def seconds(f: Callable[[], object]) -> float:
    return triton.testing.do_bench(f, warmup=50, rep=200, return_mode="median") / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "attention_gpu.json")
    args = parser.parse_args()
    rows = []
    big = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    copy = 2 * big.nbytes / seconds(big.clone) / 1e12
    del big
    for page in (16, 128):
        for name, lengths in DECODE.items():
            batch, q, k, v = case(lengths, lambda _: 1, page)
            attend = choose("triton", "cuda")(batch, SPEC, page)
            rate = sum(lengths) * 2 * SPEC.kv_heads * SPEC.head * 2 / seconds(lambda: attend(q, k, v, None)) / 1e12  # noqa: B023
            rows.append({"kind": "decode", "shape": name, "page": page, "triton_tb_s": rate, "of_copy": rate / copy})
        for name, lengths in PREFILL.items():
            batch, q, k, v = case(lengths, lambda n: n, page)
            attend = choose("triton", "cuda")(batch, SPEC, page)
            flops = sum(2 * n * n * SPEC.q_heads * SPEC.head for n in lengths)
            ours = flops / seconds(lambda: attend(q, k, v, None)) / 1e12  # noqa: B023
            x, y = (torch.randn(len(lengths), h, lengths[0], SPEC.head, device="cuda", dtype=torch.bfloat16)
                    for h in (SPEC.q_heads, SPEC.kv_heads))  # fmt: skip
            row = {"kind": "prefill", "shape": name, "page": page, "triton_tflop_s": ours}
            for key, peer in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash2", SDPBackend.FLASH_ATTENTION)):
                with sdpa_kernel(peer):
                    theirs = seconds(lambda: torch.nn.functional.scaled_dot_product_attention(
                        x, y, y, is_causal=True, enable_gqa=True))  # noqa: B023  # fmt: skip
                row |= {f"{key}_tflop_s": flops / theirs / 1e12}
            rows.append(row | {"of_cudnn": ours / row["cudnn_tflop_s"]})
    result = {"gpu": torch.cuda.get_device_name(), "copy_tb_s": copy, "rows": rows,
              "torch": torch.__version__, "triton": triton.__version__, "fastgen": fastgen.__version__}  # fmt: skip
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    for row in rows:
        print({key: round(x, 3) if isinstance(x, float) else x for key, x in row.items()})


if __name__ == "__main__":
    main()
