"""RoPE and the KV cache write in one kernel, for the steps in which the attention kernel does neither."""

# pyright: reportCallIssue=false
from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from fastgen.kernels import pdl
from fastgen.kernels.pdl import grid_dependency_sync

HEADS_PER_PROGRAM = 16


# Tensors of a step start at any address in one buffer: specialized, kernels would be compiled for aligned and others.
@triton.jit(do_not_specialize_on_alignment=["slot"])
@no_type_check  # pointers, numbers and constants, in Triton's own language
def _rope_and_cache_kv_kernel(
    qkv, cos, sin, slot, k_cache, v_cache, out,
    Q: tl.constexpr, KV: tl.constexpr, H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Handles HEADS heads of one token: queries go to `out`, keys and values into the caches at the token's slot.

    D: H / 2, rounded up to a power of two.
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
    slot: Int[Tensor, " T"], k_cache: Float[Tensor, "S K H"], v_cache: Float[Tensor, "S K H"],
) -> Float[Tensor, "T Q H"]:  # fmt: skip
    """Returns rotated queries; writes rotated keys, and values, into the caches at `slot`. Bits equal the torch op's.

    qkv: query heads, key heads, value heads; cos and sin in fp32. Raises ValueError if a cache is not contiguous.
    """
    tokens, heads, head = qkv.shape
    kv = k_cache.shape[1]
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("the caches must be contiguous: they are written in place")
    out = qkv.new_empty(tokens, heads - 2 * kv, head)
    _rope_and_cache_kv_kernel[(tokens, triton.cdiv(heads, HEADS_PER_PROGRAM))](
        qkv.contiguous(), cos.contiguous(), sin.contiguous(), slot, k_cache, v_cache, out,
        Q=heads - 2 * kv, KV=kv, H=head, D=triton.next_power_of_2(head // 2), HEADS=HEADS_PER_PROGRAM, num_warps=4,
        **pdl.launch_options(qkv),
        enable_fp_fusion=False,  # each multiplication and addition is rounded, as in torch
    )  # fmt: skip
    return out
