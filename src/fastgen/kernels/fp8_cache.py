"""Pages of an fp8 KV cache (`quantization.kv_cache`) in Triton: reading tiles of keys and values, and writing heads.

A cache is a pointer to pairs of e4m3 values, ROW bytes for each slot. A page of PAGE slots is PAGE x KV x H bytes of
values, and from the next multiple of 4 bytes on KV x PAGE fp32 scales: those of a tile lie side by side.

Even and odd dimensions of a head are multiplied apart, so that pairs are widened where they lie: queries and outputs
are split once, not keys and values once a tile.
"""

from typing import no_type_check

import triton
import triton.language as tl

from fastgen.kernels.fp8 import WIDENED, max_abs, quantization_scale, to_e4m3, widen_e4m3, widen_high, widen_low


@triton.jit
@no_type_check  # pointers, numbers and constants, in Triton's own language
def scale_ptrs(cache, page_start, kv_head, KV: tl.constexpr, H: tl.constexpr, PAGE: tl.constexpr):
    """Returns pointers to a KV head's scales in the page at byte `page_start`."""
    first: tl.constexpr = (PAGE * KV * H + 3) // 4 * 4
    return cache.to(tl.pointer_type(tl.float32), bitcast=True) + (page_start + first) // 4 + kv_head * PAGE


@triton.jit
@no_type_check
def store_fp8_head(
    cache, slot, x, mask, d, kv_head, KV: tl.constexpr, H: tl.constexpr, PAGE: tl.constexpr, ROW: tl.constexpr
):  # fmt: skip
    """Writes a head x of a token to its slot; returns what the cache then holds, in fp32."""
    x = x.to(tl.float32)
    scale = quantization_scale(max_abs(x, 0))
    values = to_e4m3(x, scale)
    page_start = (slot // PAGE) * (PAGE * ROW)
    data = cache.to(tl.pointer_type(tl.uint8), bitcast=True) + page_start
    tl.store(data + (slot % PAGE * KV + kv_head) * H + d, values, mask=mask)
    tl.store(scale_ptrs(cache, page_start, kv_head, KV, H, PAGE) + slot % PAGE, scale)
    return widen_e4m3(values).to(tl.float32) * (scale * WIDENED)


@triton.jit
@no_type_check
def load_fp8_tile(
    k_cache, v_cache, page_table, tile_start, key_end, kv_head,
    KV: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, N: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Returns keys and values [tile_start, tile_start + N) as pairs [N, D / 2], and their scales [N], 0 from `key_end`.

    Values after `key_end` may be anything: widened they are finite, whatever the memory holds.
    """
    n, pair = tl.arange(0, N), tl.arange(0, D // 2)
    inside = n < key_end - tile_start
    if PAGE % N == 0:  # the tile lies in one page
        page_start = tl.load(page_table + tile_start // PAGE).to(tl.int64) * (PAGE * ROW)
        first = tile_start % PAGE
        row = (page_start + first * (KV * H) + kv_head * H) // 2 + n * (KV * H // 2)
        scales = first + n
    else:
        key = tile_start + n
        page_start = tl.load(page_table + key // PAGE, mask=inside, other=0).to(tl.int64) * (PAGE * ROW)
        row = (page_start + (key % PAGE * KV + kv_head) * H) // 2
        scales = key % PAGE
    if PAGE % N == 0 and D == H:
        k, v = tl.load(k_cache + row[:, None] + pair[None, :]), tl.load(v_cache + row[:, None] + pair[None, :])
    else:
        mask = inside[:, None] & (pair < H // 2)[None, :]
        k = tl.load(k_cache + row[:, None] + pair[None, :], mask=mask, other=0)
        v = tl.load(v_cache + row[:, None] + pair[None, :], mask=mask, other=0)
    k_scale = tl.load(scale_ptrs(k_cache, page_start, kv_head, KV, H, PAGE) + scales, mask=inside, other=0.0)
    v_scale = tl.load(scale_ptrs(v_cache, page_start, kv_head, KV, H, PAGE) + scales, mask=inside, other=0.0)
    return k, v, k_scale * WIDENED, v_scale * WIDENED


@triton.jit
@no_type_check
def dot_pairs(even, odd, pairs, EXACT: tl.constexpr):
    """Returns even @ low.T + odd @ high.T, where low and high are the widened values of pairs [N, D / 2]."""
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    low, high = widen_low(pairs).to(even.dtype), widen_high(pairs).to(even.dtype)
    return tl.dot(odd, tl.trans(high), tl.dot(even, tl.trans(low), input_precision=precision),
                  input_precision=precision)  # fmt: skip


@triton.jit
@no_type_check
def add_weighted_pairs(even, odd, weights, pairs, decay, EXACT: tl.constexpr):
    """Returns sums of even and of odd dimensions, times decay [M], plus weights [M, N] @ pairs [N, D / 2]."""
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    p = weights if EXACT else weights.to(tl.float16)
    even = tl.dot(p, widen_low(pairs).to(p.dtype), even * decay[:, None], input_precision=precision)
    odd = tl.dot(p, widen_high(pairs).to(p.dtype), odd * decay[:, None], input_precision=precision)
    return even, odd


@triton.jit
@no_type_check
def split_pairs(x, M: tl.constexpr, D: tl.constexpr):
    """Returns the even and the odd columns of x [M, D]."""
    return tl.split(tl.reshape(x, [M, D // 2, 2]))


@triton.jit
@no_type_check
def join_pairs(even, odd, M: tl.constexpr, D: tl.constexpr):
    """Returns [M, D] of its even and odd columns."""
    return tl.reshape(tl.join(even, odd), [M, D])
