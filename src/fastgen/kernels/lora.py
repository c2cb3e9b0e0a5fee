"""Low-rank adapters in Triton: y += scale b (a x), where every row may have another adapter.

    shrink   a program has M rows, one of the packed matrices and a share of the depth; its sums, in fp32
    expand   a program has M rows and N columns, adds up the shares, and writes y

A program goes over the adapters that its rows have, and each time computes the rows of that one: rows of a prompt all
have the same. Nothing is sorted and everything is read on the device, so that launches can be captured; rows
without an adapter cost a look at their number. The order of every sum depends on shapes alone.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

SPLIT_K_SIZE = 2048  # of the depth, that a program of `shrink` sums up
NO_MORE_ADAPTERS = tl.constexpr(2**30)  # after all adapters


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["adapter_idx"])
@no_type_check  # pointers, numbers and constants, in Triton's own language
def _lora_shrink_kernel(
    x, a, adapter_idx, inner, num_tokens, in_features,
    NUM_SLICES: tl.constexpr, R: tl.constexpr, M: tl.constexpr, B: tl.constexpr, K: tl.constexpr, SPLIT_K_SIZE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """inner [shares, rows, PARTS R] of x [rows, depth] and a [A, PARTS R, depth]."""
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    part, share = tl.program_id(1), tl.program_id(2)
    t, r, k = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, B), tl.arange(0, K)
    mine = tl.load(adapter_idx + t, mask=t < num_tokens, other=0).to(tl.int32)
    i = tl.min(tl.where(mine > 0, mine, NO_MORE_ADAPTERS), 0)
    while i < NO_MORE_ADAPTERS:
        live = mine == i
        weight = a + ((i.to(tl.int64) * NUM_SLICES + part) * R + r) * in_features
        acc = tl.zeros([M, B], tl.float32)
        for first in tl.range(share * SPLIT_K_SIZE, tl.minimum((share + 1) * SPLIT_K_SIZE, in_features), K):
            at = first + k
            inside = at < in_features
            left = tl.load(
                x + t.to(tl.int64)[:, None] * in_features + at[None, :], mask=live[:, None] & inside[None, :], other=0
            )
            right = tl.load(weight[:, None] + at[None, :], mask=(r < R)[:, None] & inside[None, :], other=0)
            acc = tl.dot(left, tl.trans(right), acc, input_precision=precision)
        to = ((share * num_tokens + t.to(tl.int64)) * NUM_SLICES + part) * R
        tl.store(inner + to[:, None] + r[None, :], acc, mask=live[:, None] & (r < R)[None, :])
        i = tl.min(tl.where(mine > i, mine, NO_MORE_ADAPTERS), 0)


@triton.jit(do_not_specialize=["num_tokens", "num_splits"], do_not_specialize_on_alignment=["adapter_idx"])
@no_type_check
def _lora_expand_kernel(
    y, inner, b, scale, adapter_idx, num_tokens, out_features, num_splits, slice_end0, slice_end1,
    NUM_SLICES: tl.constexpr, R: tl.constexpr, M: tl.constexpr, B: tl.constexpr, N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """y [rows, width] += scale [A] * inner [shares, rows, PARTS R] b [A, width, R]; a part's columns end at `end*`."""
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    part = tl.program_id(2)
    begin = tl.where(part == 0, 0, tl.where(part == 1, slice_end0, slice_end1))
    end = out_features
    if NUM_SLICES > 1:
        end = tl.where(part == 0, slice_end0, tl.where(part == 1, slice_end1, out_features))
    t, r, n = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, B), begin + tl.program_id(1) * N + tl.arange(0, N)
    inside = n < end
    mine = tl.load(adapter_idx + t, mask=t < num_tokens, other=0).to(tl.int32)
    # The widest part decides how many programs there are: others have nothing to do.
    mine = tl.where(begin + tl.program_id(1) * N < end, mine, 0)
    i = tl.min(tl.where(mine > 0, mine, NO_MORE_ADAPTERS), 0)
    while i < NO_MORE_ADAPTERS:
        live = mine == i
        h = tl.zeros([M, B], tl.float32)
        for share in tl.range(0, num_splits):
            at = ((share * num_tokens + t.to(tl.int64)) * NUM_SLICES + part) * R
            h += tl.load(inner + at[:, None] + r[None, :], mask=live[:, None] & (r < R)[None, :], other=0)
        weight = b + (i.to(tl.int64) * out_features + n) * R
        w = tl.load(weight[:, None] + r[None, :], mask=inside[:, None] & (r < R)[None, :], other=0).to(tl.float32)
        change = tl.load(scale + i) * tl.dot(h, tl.trans(w), input_precision=precision)
        to = y + t.to(tl.int64)[:, None] * out_features + n[None, :]
        mask = live[:, None] & inside[None, :]
        old = tl.load(to, mask=mask, other=0).to(tl.float32)
        tl.store(to, (old + change).to(y.dtype.element_ty), mask=mask)
        i = tl.min(tl.where(mine > i, mine, NO_MORE_ADAPTERS), 0)


def apply_lora(
    y: Float[Tensor, "T N"], x: Float[Tensor, "T D"], a: Float[Tensor, "A pr D"], b: Float[Tensor, "A N r"],
    scale: Float[Tensor, " A"], adapter_idx: Int[Tensor, " T"], slice_widths: tuple[int, ...],
) -> Float[Tensor, "T N"]:  # fmt: skip
    """Writes y, which is also returned: as `layers.adapt`, but for rounding."""
    (tokens, depth), (_, width, r), parts = x.shape, b.shape, len(slice_widths)
    if parts > 3 or sum(slice_widths) != width or a.shape[1] != parts * r:
        raise ValueError(
            f"{parts} packed matrices of {slice_widths} rows, at most 3, where b has {width} and a {a.shape[1]}"
        )
    if not (y.is_contiguous() and a.is_contiguous() and b.is_contiguous()):
        raise ValueError("y and the stacked adapters must be contiguous")
    x, shares = x.contiguous(), triton.cdiv(depth, SPLIT_K_SIZE)
    inner = torch.empty(shares, tokens, parts * r, dtype=torch.float32, device=x.device)
    wide, exact = max(16, triton.next_power_of_2(r)), x.dtype == torch.float32
    few = tokens <= 512 or wide > 64
    k, n = (32, 32) if wide > 64 else (64 if exact else 128, 128)
    how = {"NUM_SLICES": parts, "R": r, "B": wide, "M": 16 if few else 64, "EXACT": exact, "num_warps": 4}
    tiles = triton.cdiv(tokens, how["M"])
    _lora_shrink_kernel[(tiles, parts, shares)](
        x, a, adapter_idx, inner, tokens, depth, K=k, SPLIT_K_SIZE=SPLIT_K_SIZE, **how
    )
    _lora_expand_kernel[(tiles, triton.cdiv(max(slice_widths), n), parts)](
        y, inner, b, scale, adapter_idx, tokens, width, shares, slice_widths[0], sum(slice_widths[:2]), N=n, **how
    )
    return y
