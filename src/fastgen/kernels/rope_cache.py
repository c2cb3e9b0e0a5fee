"""RoPE and the KV cache write in one kernel, for the steps in which the attention kernel does neither."""

# pyright: reportCallIssue=false
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from fastgen.kernels import pdl
from fastgen.kernels.fp8 import max_abs, quantization_scale, to_e4m3
from fastgen.kernels.fp8_cache import scale_ptrs
from fastgen.kernels.pdl import grid_dependency_sync
from fastgen.quantization.kv_cache import fp8_row_bytes

HEADS_PER_PROGRAM = 16


@triton.jit
@no_type_check  # pointers, numbers and constants, in Triton's own language
def _store_fp8_heads(
    cache, slot, low, high, head, in_half, d,
    KV: tl.constexpr, H: tl.constexpr, PAGE: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Writes the KV heads among `head` [HEADS], whose halves are low and high [HEADS, D], and their scales."""
    half: tl.constexpr = H // 2
    is_kv_head = (head >= 0) & (head < KV)
    mask = is_kv_head[:, None] & in_half[None, :]
    low, high = tl.where(mask, low, 0.0).to(tl.float32), tl.where(mask, high, 0.0).to(tl.float32)
    scale = quantization_scale(max_abs(tl.maximum(tl.abs(low), tl.abs(high), propagate_nan=tl.PropagateNan.ALL), 1))
    page_start = (slot // PAGE) * (PAGE * ROW)
    target = cache + page_start + (slot % PAGE * KV + head)[:, None] * H + d[None, :]
    tl.store(target, to_e4m3(low, scale[:, None]), mask=mask)
    tl.store(target + half, to_e4m3(high, scale[:, None]), mask=mask)
    tl.store(scale_ptrs(cache, page_start, head, KV, H, PAGE) + slot % PAGE, scale, mask=is_kv_head)


# Tensors of a step start at any address in one buffer: specialized, kernels would be compiled for aligned and others.
@triton.jit(do_not_specialize_on_alignment=["slot"])
@no_type_check  # pointers, numbers and constants, in Triton's own language
def _rope_and_cache_kv_kernel(
    qkv, cos, sin, slot, k_cache, v_cache, out,
    Q: tl.constexpr, KV: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, ROW: tl.constexpr,
    HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Handles HEADS heads of one token: queries go to `out`, keys and values into the caches at the token's slot.

    D: H / 2, rounded up to a power of two. ROW: bytes of a slot of an fp8 cache; 0 for other caches.
    """
    half: tl.constexpr = H // 2
    t, head, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, D)
    in_half = d < half
    mask = (head < Q + 2 * KV)[:, None] & in_half[None, :]
    grid_dependency_sync(PDL)
    offset = (t * (Q + 2 * KV) + head)[:, None] * H + d[None, :]
    low, high = tl.load(qkv + offset, mask=mask), tl.load(qkv + offset + half, mask=mask)
    c = tl.load(cos + t * half + d, mask=in_half)[None, :]
    s = tl.load(sin + t * half + d, mask=in_half)[None, :]
    a, b = low.to(tl.float32), high.to(tl.float32)
    x, y = (a * c - b * s).to(low.dtype), (b * c + a * s).to(low.dtype)
    target = out + (t * Q + head)[:, None] * H + d[None, :]
    is_query = mask & (head < Q)[:, None]
    tl.store(target, x, mask=is_query)
    tl.store(target + half, y, mask=is_query)
    if ROW:
        if tl.program_id(1) * HEADS + HEADS > Q:  # most programs have queries alone
            row = tl.load(slot + t).to(tl.int64)
            _store_fp8_heads(k_cache, row, x, y, head - Q, in_half, d, KV, H, PAGE, ROW)
            _store_fp8_heads(v_cache, row, low, high, head - Q - KV, in_half, d, KV, H, PAGE, ROW)
    else:
        cache_row = tl.load(slot + t).to(tl.int64) * KV
        target = k_cache + (cache_row + head - Q)[:, None] * H + d[None, :]
        is_key = mask & ((head >= Q) & (head < Q + KV))[:, None]
        tl.store(target, x, mask=is_key)
        tl.store(target + half, y, mask=is_key)
        target = v_cache + (cache_row + head - Q - KV)[:, None] * H + d[None, :]
        is_value = mask & (head >= Q + KV)[:, None]
        tl.store(target, low, mask=is_value)
        tl.store(target + half, high, mask=is_value)


def rope_and_cache_kv(
    qkv: Float[Tensor, "T Q2K H"], cos: Float[Tensor, "T 1 half"], sin: Float[Tensor, "T 1 half"],
    slot: Int[Tensor, " T"], k_cache: Shaped[Tensor, "S kv row"], v_cache: Shaped[Tensor, "S kv row"], *,
    num_kv_heads: int | None = None, page_size: int = 1,
) -> Float[Tensor, "T Q H"]:  # fmt: skip
    """Returns rotated queries; writes rotated keys, and values, into the caches at `slot`. Bits equal the torch ops'.

    qkv: query heads, key heads, value heads; cos and sin in fp32. `num_kv_heads` and `page_size` are given for
    an fp8 cache, of slots [1, bytes]. Raises ValueError if a cache is not contiguous.
    """
    tokens, heads, head = qkv.shape
    kv, row_bytes = k_cache.shape[1], 0
    if k_cache.dtype == torch.uint8:
        if num_kv_heads is None or fp8_row_bytes(num_kv_heads, head) != k_cache.shape[2]:
            raise ValueError(
                f"an fp8 cache of rows of {k_cache.shape[2]} bytes is not of {num_kv_heads} heads of {head}"
            )
        kv, row_bytes = num_kv_heads, k_cache.shape[2]
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("the caches must be contiguous: they are written in place")
    out = qkv.new_empty(tokens, heads - 2 * kv, head)
    _rope_and_cache_kv_kernel[(tokens, triton.cdiv(heads, HEADS_PER_PROGRAM))](
        qkv.contiguous(), cos.contiguous(), sin.contiguous(), slot, k_cache, v_cache, out,
        Q=heads - 2 * kv, KV=kv, H=head, D=triton.next_power_of_2(head // 2), PAGE=page_size, ROW=row_bytes,
        HEADS=HEADS_PER_PROGRAM, num_warps=4, **pdl.launch_options(qkv),
        enable_fp_fusion=False,  # each multiplication and addition is rounded, as in torch
    )  # fmt: skip
    return out
