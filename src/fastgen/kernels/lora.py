"""LoRA in Triton: y += scale b (a x), where every row may have another adapter (index 0: none).

    shrink   inner = a x: a program per M rows, slice (q, k, v; gate, up) and split of in_features, in fp32
    expand   y += scale b inner: a program per M rows and N columns, which adds up the splits

A program iterates over the adapters of its rows, and computes the rows of one adapter each time: the rows of a prompt
all have the same. Nothing is sorted and all indices are read on the device, so launches can be captured. Rows without
an adapter cost reading their index. The order of every sum depends on shapes alone.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

SPLIT_K_SIZE = 2048  # in_features that a program of `shrink` sums up
NO_MORE_ADAPTERS = tl.constexpr(2**30)  # above all adapter indices


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["adapter_idx"])
@no_type_check  # pointers, numbers and constants, in Triton's own language
def _lora_shrink_kernel(
    x, a, adapter_idx, inner, num_tokens, in_features,
    NUM_SLICES: tl.constexpr, R: tl.constexpr, M: tl.constexpr, B: tl.constexpr, K: tl.constexpr,
    SPLIT_K_SIZE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Writes inner [splits, num_tokens, NUM_SLICES R] of x [num_tokens, in_features], a [A, NUM_SLICES R, in_features]
    for M rows, one slice and one split.

    B: R, rounded up to a power of two.
    """
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    slice_idx, split = tl.program_id(1), tl.program_id(2)
    t, r, k = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, B), tl.arange(0, K)
    row_adapter = tl.load(adapter_idx + t, mask=t < num_tokens, other=0).to(tl.int32)
    i = tl.min(tl.where(row_adapter > 0, row_adapter, NO_MORE_ADAPTERS), 0)
    while i < NO_MORE_ADAPTERS:
        selected = row_adapter == i
        a_row = a + ((i.to(tl.int64) * NUM_SLICES + slice_idx) * R + r) * in_features
        acc = tl.zeros([M, B], tl.float32)
        for k_start in tl.range(split * SPLIT_K_SIZE, tl.minimum((split + 1) * SPLIT_K_SIZE, in_features), K):
            column = k_start + k
            inside = column < in_features
            x_ptr = x + t.to(tl.int64)[:, None] * in_features + column[None, :]
            x_tile = tl.load(x_ptr, mask=selected[:, None] & inside[None, :], other=0)
            a_tile = tl.load(a_row[:, None] + column[None, :], mask=(r < R)[:, None] & inside[None, :], other=0)
            acc = tl.dot(x_tile, tl.trans(a_tile), acc, input_precision=precision)
        target = ((split * num_tokens + t.to(tl.int64)) * NUM_SLICES + slice_idx) * R
        tl.store(inner + target[:, None] + r[None, :], acc, mask=selected[:, None] & (r < R)[None, :])
        i = tl.min(tl.where(row_adapter > i, row_adapter, NO_MORE_ADAPTERS), 0)


@triton.jit(do_not_specialize=["num_tokens", "num_splits"], do_not_specialize_on_alignment=["adapter_idx"])
@no_type_check
def _lora_expand_kernel(
    y, inner, b, scale, adapter_idx, num_tokens, out_features, num_splits, slice_end0, slice_end1,
    NUM_SLICES: tl.constexpr, R: tl.constexpr, M: tl.constexpr, B: tl.constexpr, N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Adds scale [A] * inner [splits, num_tokens, NUM_SLICES R] b [A, out_features, R] to y [num_tokens, out_features].

    The columns of slices 0 and 1 end at `slice_end0` and `slice_end1`.
    """
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    slice_idx, end = tl.program_id(2), out_features
    start = tl.where(slice_idx == 0, 0, tl.where(slice_idx == 1, slice_end0, slice_end1))
    if NUM_SLICES > 1:
        end = tl.where(slice_idx == 0, slice_end0, tl.where(slice_idx == 1, slice_end1, out_features))
    t, r, n = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, B), start + tl.program_id(1) * N + tl.arange(0, N)
    inside = n < end
    row_adapter = tl.load(adapter_idx + t, mask=t < num_tokens, other=0).to(tl.int32)
    # The grid fits the widest slice: narrower ones have programs without columns.
    row_adapter = tl.where(start + tl.program_id(1) * N < end, row_adapter, 0)
    i = tl.min(tl.where(row_adapter > 0, row_adapter, NO_MORE_ADAPTERS), 0)
    while i < NO_MORE_ADAPTERS:
        selected = row_adapter == i
        h = tl.zeros([M, B], tl.float32)
        for split in tl.range(0, num_splits):
            offset = ((split * num_tokens + t.to(tl.int64)) * NUM_SLICES + slice_idx) * R
            h += tl.load(inner + offset[:, None] + r[None, :], mask=selected[:, None] & (r < R)[None, :], other=0)
        b_row = b + (i.to(tl.int64) * out_features + n) * R
        w = tl.load(b_row[:, None] + r[None, :], mask=inside[:, None] & (r < R)[None, :], other=0).to(tl.float32)
        update = tl.load(scale + i) * tl.dot(h, tl.trans(w), input_precision=precision)
        target = y + t.to(tl.int64)[:, None] * out_features + n[None, :]
        mask = selected[:, None] & inside[None, :]
        y_tile = tl.load(target, mask=mask, other=0).to(tl.float32)
        tl.store(target, (y_tile + update).to(y.dtype.element_ty), mask=mask)
        i = tl.min(tl.where(row_adapter > i, row_adapter, NO_MORE_ADAPTERS), 0)


def apply_lora(
    y: Float[Tensor, "T N"], x: Float[Tensor, "T D"], a: Float[Tensor, "A pr D"], b: Float[Tensor, "A N r"],
    scale: Float[Tensor, " A"], adapter_idx: Int[Tensor, " T"], slice_widths: tuple[int, ...],
) -> Float[Tensor, "T N"]:  # fmt: skip
    """Adds scale * b (a x) of each row's adapter to y, in place, and returns y, as `lora.stacked.apply_lora` does.

    `slice_widths` are the columns of the 1 to 3 packed matrices. Raises ValueError if shapes disagree, or y, a or b is
    not contiguous.
    """
    (tokens, in_features), (_, out_features, r), num_slices = x.shape, b.shape, len(slice_widths)
    if num_slices > 3 or sum(slice_widths) != out_features or a.shape[1] != num_slices * r:
        problem = f"{num_slices} packed matrices (at most 3) of {slice_widths} rows"
        raise ValueError(f"{problem} do not fit b with {out_features} rows and a with {a.shape[1]}")
    if not (y.is_contiguous() and a.is_contiguous() and b.is_contiguous()):
        raise ValueError("y and the stacked adapters must be contiguous")
    x, splits = x.contiguous(), triton.cdiv(in_features, SPLIT_K_SIZE)
    inner = torch.empty(splits, tokens, num_slices * r, dtype=torch.float32, device=x.device)
    padded_rank, exact = max(16, triton.next_power_of_2(r)), x.dtype == torch.float32
    k, n = (32, 32) if padded_rank > 64 else (64 if exact else 128, 128)
    tile = {"M": 16 if tokens <= 512 or padded_rank > 64 else 64, "B": padded_rank, "num_warps": 4}
    options = {"NUM_SLICES": num_slices, "R": r, "EXACT": exact, **tile}
    row_tiles = triton.cdiv(tokens, tile["M"])
    tile_k = {"K": k, "SPLIT_K_SIZE": SPLIT_K_SIZE}
    _lora_shrink_kernel[(row_tiles, num_slices, splits)](
        x, a, adapter_idx, inner, tokens, in_features, **tile_k, **options
    )
    sizes = tokens, out_features, splits, slice_widths[0], sum(slice_widths[:2])
    grid = row_tiles, triton.cdiv(max(slice_widths), n), num_slices
    _lora_expand_kernel[grid](y, inner, b, scale, adapter_idx, *sizes, N=n, **options)
    return y
