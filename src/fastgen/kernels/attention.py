"""Paged attention in Triton: the attention backend for GPUs. Shapes alone decide the launches: steps can be captured.

Flash attention's online softmax (arXiv 2205.14135); the query heads of a KV head are packed into one tile, so that keys
are read once for all of them.

    prefill               a program per block of a sequence's tokens and KV head; skips keys after the last visible one
    decode                a program per sequence, KV head and split of its keys; the last to finish merges the splits
                          (flash decoding). It can also apply RoPE and write the cache: `UnrotatedQKV`
    decode_shared_prefix  a program per group, KV head and split of the keys that the group's sequences share (cascade
                          attention); `decode` merges its results

Sequences of one token are decoded, longer ones prefilled; each kernel skips the other's sequences.

ROW is the bytes of an fp8 cache's row, 0 for other caches: `fp8_cache` has what reads and writes those. Scores are then
multiplied by the keys' scales, and weights by the values'.
"""

# pyright: reportCallIssue=false
from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgen.core.attention import AttentionFn
from fastgen.core.model_config import ModelConfig
from fastgen.core.types import Batch
from fastgen.kernels import pdl
from fastgen.kernels.fp8_cache import (
    add_weighted_pairs,
    dot_pairs,
    join_pairs,
    load_fp8_tile,
    split_pairs,
    store_fp8_head,
)
from fastgen.kernels.pdl import grid_dependency_sync

LOG2E = 1.4426950408889634
# A masked key's score is below every real one. The running maximum starts finite, so that a row without visible keys
# stays finite, and so far above MASKED_SCORE that a masked key's weight is 0.
INITIAL_MAX, MASKED_SCORE = tl.constexpr(-1.0e20), tl.constexpr(-1.0e30)
# Tiles of M query rows and N keys: the fastest of those measured on an H200, at 1k to 32k tokens. Two programs of
# PREFILL_TILE fit a multiprocessor, so that one computes while the other starts, ends or takes exponentials.
PREFILL_TILE = {"M": 64, "N": 64, "num_warps": 4, "num_stages": 3}
# For many keys per program, or small pages.
LONG_PREFILL_TILE = {"M": 128, "N": 128, "num_warps": 8, "num_stages": 3}
# Over an fp8 cache keys and values are widened once for M rows.
FP8_PREFILL_TILE = {"M": 128, "N": 64, "num_warps": 8, "num_stages": 3}
# For fp32, and for GPUs with less shared memory than Hopper's.
SMALL_PREFILL_TILE = {"M": 64, "N": 64, "num_warps": 4, "num_stages": 2}
USE_TMA = True  # read K and V tiles with Hopper's copy engine if a tile lies in one page
DECODE_TILE = {"N": 64, "num_warps": 4, "num_stages": 3}
NARROW_HEAD_DECODE_TILE = {"N": 128, "num_warps": 4, "num_stages": 2}  # head_dim <= 64
FP8_DECODE_TILE = {"N": 64, "num_warps": 1, "num_stages": 2}  # faster than 4 warps for many programs
SUFFIX_DECODE_TILE = {"N": 64, "num_warps": 2, "num_stages": 2}  # few keys of a sequence after a shared prefix
SHARED_PREFIX_TILE = {"N": DECODE_TILE["N"], "MIN_TILES": 16, "num_warps": 4}  # MIN_TILES: per program
# Triton would compile a kernel for each of these values, and again for multiples of 16.
NO_SPECIALIZATION: dict[str, Any] = {
    "do_not_specialize": ["page_table_stride", "window", "num_splits", "num_prefix_splits"],
    "do_not_specialize_on_alignment":
        ["query_blocks", "prefix_len", "member", "slot", "start", "length", "req_idx", "page_table"],
}  # fmt: skip


@triton.jit
@no_type_check  # pointers, numbers and constants, in Triton's own language
def _as_dot_operand(q, ROW: tl.constexpr, EXACT: tl.constexpr):
    """Returns queries in the dtype in which they are multiplied: fp16 with keys of an fp8 cache, unless EXACT."""
    return q.to(tl.float16) if ROW and not EXACT else q


@triton.jit
@no_type_check
def _load_kv_tile(
    k_cache, v_cache, page_table, tile_start, key_end, kv_head,
    KV: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, N: tl.constexpr, FULL_TILE: tl.constexpr,
):  # fmt: skip
    """Loads keys and values [tile_start, tile_start + N) as [N, D], 0 from `key_end` on. FULL_TILE: none is beyond."""
    n, d = tile_start + tl.arange(0, N), tl.arange(0, D)
    if FULL_TILE and D == H:
        page = tl.load(page_table + n // PAGE)
        slots = ((page.to(tl.int64) * PAGE + n % PAGE) * KV + kv_head) * H
        k = tl.load(k_cache + slots[:, None] + d[None, :])
        v = tl.load(v_cache + slots[:, None] + d[None, :])
    else:
        page = tl.load(page_table + n // PAGE, mask=n < key_end, other=0)
        slots = ((page.to(tl.int64) * PAGE + n % PAGE) * KV + kv_head) * H
        inside = (n < key_end)[:, None] & (d < H)[None, :]
        k = tl.load(k_cache + slots[:, None] + d[None, :], mask=inside, other=0.0)
        v = tl.load(v_cache + slots[:, None] + d[None, :], mask=inside, other=0.0)
    return k, v


@triton.jit
@no_type_check
def _softmax_weights(
    s, tile_start, key_end, query_pos, window, m, l, scale,
    N: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr, FULL_TILE: tl.constexpr,
):  # fmt: skip
    """Returns the weights of one tile's scores s, what the output so far decays by, and the maximum m and sum l.

    MASKED: causality, the window (if WINDOW) and, unless FULL_TILE, `key_end` hide keys from some rows.
    """
    if MASKED:  # compares a constant, the position in the tile, with one number per row
        i = tl.arange(0, N)
        visible = i[None, :] <= (query_pos - tile_start)[:, None]
        if not FULL_TILE:
            visible = visible & (i < key_end - tile_start)[None, :]
        if WINDOW:
            visible = visible & (i[None, :] > (query_pos - tile_start - window)[:, None])
        s = tl.where(visible, s, MASKED_SCORE)
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - m_new[:, None])
    decay = tl.exp2(m - m_new)
    return p, decay, m_new, l * decay + tl.sum(p, 1)


@triton.jit
@no_type_check
def _online_softmax_step(
    q, k, v, tile_start, key_end, query_pos, window, m, l, acc, scale,
    N: tl.constexpr, WINDOW: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr, FULL_TILE: tl.constexpr,
):  # fmt: skip
    """Returns the running maximum m, sum l and output acc, updated by one tile of keys."""
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    s = tl.dot(q, tl.trans(k), input_precision=precision)
    p, decay, m, l = _softmax_weights(
        s, tile_start, key_end, query_pos, window, m, l, scale, N, WINDOW, MASKED, FULL_TILE
    )
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=precision)
    return m, l, acc


@triton.jit
@no_type_check
def _fp8_softmax_step(
    q_even, q_odd, k, v, k_scale, v_scale, tile_start, key_end, query_pos, window, m, l, acc_even, acc_odd, scale,
    N: tl.constexpr, WINDOW: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr, FULL_TILE: tl.constexpr,
):  # fmt: skip
    """Returns m, l and the output's even and odd columns, updated by one tile of an fp8 cache."""
    s = dot_pairs(q_even, q_odd, k, EXACT) * k_scale[None, :]
    p, decay, m, l = _softmax_weights(
        s, tile_start, key_end, query_pos, window, m, l, scale, N, WINDOW, MASKED, FULL_TILE
    )
    acc_even, acc_odd = add_weighted_pairs(acc_even, acc_odd, p * v_scale[None, :], v, decay, EXACT)
    return m, l, acc_even, acc_odd


@triton.jit
@no_type_check
def _attend_key_range(
    q, k_cache, v_cache, k_tiles, v_tiles, table, key_start, key_end, query_pos, window, kv_head, m, l, acc, scale,
    KV: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, N: tl.constexpr, ROW: tl.constexpr,
    WINDOW: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr, FULL_TILE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Attends the query rows at positions `query_pos` to keys [key_start, key_end), N at a time; returns m, l and acc.

    MASKED: some rows see only some of the keys. FULL_TILE: every tile has N keys. TMA: a tile is a block of the
    descriptors k_tiles and v_tiles.
    """
    if ROW:
        M: tl.constexpr = q.shape[0]
        q_even, q_odd = split_pairs(q, M, D)
        acc_even, acc_odd = split_pairs(acc, M, D)
        for tile_start in tl.range(key_start, key_end, N):
            k, v, k_scale, v_scale = load_fp8_tile(
                k_cache, v_cache, table, tile_start, key_end, kv_head, KV, H, D, PAGE, N, ROW
            )
            m, l, acc_even, acc_odd = _fp8_softmax_step(
                q_even, q_odd, k, v, k_scale, v_scale, tile_start, key_end, query_pos, window, m, l, acc_even, acc_odd,
                scale, N, WINDOW, EXACT, MASKED, FULL_TILE,
            )  # fmt: skip
        acc = join_pairs(acc_even, acc_odd, M, D)
    else:
        for tile_start in tl.range(key_start, key_end, N):
            if TMA:
                slot = tl.load(table + tile_start // PAGE).to(tl.int32) * PAGE + tile_start % PAGE
                k = k_tiles.load([slot, kv_head * H])
                v = v_tiles.load([slot, kv_head * H])
            else:
                k, v = _load_kv_tile(
                    k_cache, v_cache, table, tile_start, key_end, kv_head, KV, H, D, PAGE, N, FULL_TILE
                )
            m, l, acc = _online_softmax_step(
                q, k, v, tile_start, key_end, query_pos, window, m, l, acc, scale, N, WINDOW, EXACT, MASKED, FULL_TILE
            )
    return m, l, acc


@triton.jit(**NO_SPECIALIZATION)
@no_type_check
def _prefill_kernel(
    q, k_cache, v_cache, k_tiles, v_tiles, out, query_blocks, page_table, page_table_stride, window, scale,
    Q: tl.constexpr, KV: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, ROW: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, EXACT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Handles one query block (a row of `_build_query_blocks`) and KV head: M rows, token i / G and head i % G."""
    G: tl.constexpr = Q // KV
    # In reverse: a prompt's last blocks take longest, so that they do not start last.
    block, kv_head = query_blocks + (tl.num_programs(0) - 1 - tl.program_id(0)) * 5, tl.program_id(1)
    first_token, num_tokens, first_pos = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    req_idx, seq_len = tl.load(block + 3), tl.load(block + 4)
    if num_tokens > 0:
        table = page_table + req_idx.to(tl.int64) * page_table_stride
        i, d = tl.arange(0, M), tl.arange(0, D)
        t = i // G
        offset = ((first_token + t).to(tl.int64) * Q + kv_head * G + i % G) * H
        mask = (t < num_tokens)[:, None] & (d < H)[None, :]
        x = _as_dot_operand(tl.load(q + offset[:, None] + d[None, :], mask=mask, other=0.0), ROW, EXACT)
        query_pos = first_pos + t
        key_end = first_pos + num_tokens
        key_start = first_pos * 0
        if WINDOW:
            key_start = tl.maximum(first_pos - window + 1, 0) // N * N
        m, l, acc = tl.full([M], INITIAL_MAX, tl.float32), tl.zeros([M], tl.float32), tl.zeros([M, D], tl.float32)
        full_end = tl.minimum(tl.cdiv(key_end, N), seq_len // N) * N
        if not WINDOW:  # the tiles that the first row sees fully, as all rows do
            unmasked_end = (first_pos + 1) // N * N
            m, l, acc = _attend_key_range(
                x, k_cache, v_cache, k_tiles, v_tiles, table, key_start, unmasked_end, query_pos, window,
                kv_head, m, l, acc, scale, KV, H, D, PAGE, N, ROW, WINDOW, EXACT, MASKED=False, FULL_TILE=True, TMA=TMA,
            )  # fmt: skip
            key_start = unmasked_end
        m, l, acc = _attend_key_range(
            x, k_cache, v_cache, k_tiles, v_tiles, table, key_start, full_end, query_pos, window,
            kv_head, m, l, acc, scale, KV, H, D, PAGE, N, ROW, WINDOW, EXACT, MASKED=True, FULL_TILE=True, TMA=TMA,
        )  # fmt: skip
        if full_end < key_end:  # slots after the last key of the last tile may hold anything, and are not read
            m, l, acc = _attend_key_range(
                x, k_cache, v_cache, k_tiles, v_tiles, table, full_end, key_end, query_pos, window,
                kv_head, m, l, acc, scale, KV, H, D, PAGE, N, ROW,
                WINDOW, EXACT, MASKED=True, FULL_TILE=False, TMA=False,
            )  # fmt: skip
        mean = acc * (1 / tl.where(l > 0, l, 1.0))[:, None]  # rows beyond the last token may have seen no key
        tl.store(out + offset[:, None] + d[None, :], mean.to(out.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def _keys_per_split(num_keys, N: tl.constexpr, num_splits, min_tiles):
    """Returns the number of keys per split, at least `min_tiles` tiles: few keys then have few splits."""
    return tl.maximum(tl.cdiv(tl.cdiv(num_keys, N), num_splits), min_tiles) * N


@triton.jit(**NO_SPECIALIZATION)
@no_type_check
def _decode_shared_prefix_kernel(
    q, k_cache, v_cache, split_out, split_stats, member, prefix_len, start, length, req_idx, page_table,
    page_table_stride, window, num_splits, scale,
    Q: tl.constexpr, KV: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, ROW: tl.constexpr,
    GROUP_SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, MIN_TILES: tl.constexpr,
    WINDOW: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Attends a group's sequences to one split of their shared prefix, for one KV head.

    M rows: member i / G of the group's GROUP_SIZE (-1: none), query head i % G. Writes unnormalized outputs to
    `split_out` [row, query head, split, H], maxima and sums to `split_stats` [row, query head, split, 2].
    """
    G: tl.constexpr = Q // KV
    group, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_keys = tl.load(prefix_len + group)
    split_size = _keys_per_split(num_keys, N, num_splits, MIN_TILES)
    split_start = split * split_size
    if split_start < num_keys:
        i, d = tl.arange(0, M), tl.arange(0, D)
        r = tl.load(member + group * GROUP_SIZE + i // G, mask=i < GROUP_SIZE * G, other=-1).to(tl.int32)
        valid = r >= 0
        # The page tables of all members begin with the same pages.
        table = page_table + tl.load(req_idx + tl.max(r, 0)).to(tl.int64) * page_table_stride
        head = kv_head * G + i % G
        token = tl.load(start + r, mask=valid, other=0).to(tl.int64)
        mask = valid[:, None] & (d < H)[None, :]
        x = _as_dot_operand(
            tl.load(q + ((token * Q + head) * H)[:, None] + d[None, :], mask=mask, other=0.0), ROW, EXACT
        )
        query_pos = tl.load(length + r, mask=valid, other=0).to(tl.int32) - 1
        m, l, acc = tl.full([M], INITIAL_MAX, tl.float32), tl.zeros([M], tl.float32), tl.zeros([M, D], tl.float32)
        key_end = tl.minimum(split_start + split_size, num_keys)
        key_start = split_start
        if WINDOW:  # the first key that any member sees, rounded down to a tile
            key_start = tl.maximum(split_start, (tl.min(tl.where(valid, query_pos, 2**30), 0) - window + 1) // N * N)
        m, l, acc = _attend_key_range(
            x, k_cache, v_cache, None, None, table, key_start, key_end, query_pos, window,
            kv_head, m, l, acc, scale, KV, H, D, PAGE, N, ROW,
            WINDOW, EXACT, MASKED=True, FULL_TILE=False, TMA=False,
        )  # fmt: skip
        offset = (r.to(tl.int64) * Q + head) * num_splits + split
        tl.store(split_out + offset[:, None] * H + d[None, :], acc, mask=mask)
        tl.store(split_stats + offset * 2, m, mask=valid)
        tl.store(split_stats + offset * 2 + 1, l, mask=valid)


@triton.jit
@no_type_check
def _key_range(length, prefix_len, r, window, N: tl.constexpr, WINDOW: tl.constexpr, SHARED_PREFIX: tl.constexpr):
    """Returns the length of sequence r's shared prefix, the first key that decode reads, and the sequence's length."""
    seq_len = tl.load(length + r)
    prefix = seq_len * 0
    if SHARED_PREFIX:
        prefix = tl.load(prefix_len + r).to(tl.int32)
    key_start = prefix
    if WINDOW:  # the first key that the last token sees, rounded down to a tile
        key_start = tl.maximum(prefix, (seq_len - window) // N * N)
    return prefix, key_start, seq_len


@triton.jit
@no_type_check
def _merge_splits(m, l, acc, split_out, split_stats, offset, num_splits, mask, H: tl.constexpr, D: tl.constexpr):
    """Returns m, l and acc of rows, merged with those of `num_splits` splits stored from `offset` on."""
    d = tl.arange(0, D)
    for i in tl.range(0, num_splits, loop_unroll_factor=4):  # all loads are issued before the first is needed
        # Loads bypass the L1 cache: other multiprocessors have written these values.
        m_split = tl.load(split_stats + (offset + i) * 2, mask=mask, other=INITIAL_MAX, cache_modifier=".cg")
        m_new = tl.maximum(m, m_split)
        decay, weight = tl.exp2(m - m_new), tl.exp2(m_split - m_new)
        l = l * decay + tl.load(split_stats + (offset + i) * 2 + 1, mask=mask, other=0.0, cache_modifier=".cg") * weight
        inside = mask[:, None] & (d < H)[None, :]
        o = tl.load(split_out + (offset + i)[:, None] * H + d[None, :], mask=inside, other=0.0, cache_modifier=".cg")
        acc = acc * decay[:, None] + o * weight[:, None]
        m = m_new
    return m, l, acc


@triton.jit
@no_type_check
def _load_rotated(x, mask, d, c, s, H: tl.constexpr):
    """Loads heads at x [..., H], and applies RoPE with cosines c and sines s of every dimension d, in their dtype."""
    half: tl.constexpr = H // 2
    a = tl.load(x + d, mask=mask, other=0.0)
    b = tl.load(x + tl.where(d < half, d + half, d - half), mask=mask, other=0.0)
    return (a.to(tl.float32) * c + b.to(tl.float32) * tl.where(d < half, -s, s)).to(a.dtype)


@triton.jit(**NO_SPECIALIZATION)
@no_type_check
def _decode_kernel(
    q, k_cache, v_cache, out, split_out, split_stats, num_splits_done, prefix_len, prefix_out, prefix_stats, cos, sin,
    slot, start, length, req_idx, page_table, page_table_stride, window, num_splits, num_prefix_splits, scale,
    Q: tl.constexpr, KV: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, ROW: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, SINGLE_SPLIT: tl.constexpr, FUSED_ROPE: tl.constexpr, SHARED_PREFIX: tl.constexpr,
    MIN_TILES: tl.constexpr, WINDOW: tl.constexpr, EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attends a sequence's only token to one split of its keys, for one KV head; the last split to finish merges all.

    M rows: query head i of the G. `num_splits_done` [sequence, KV head] is 0 before and after. FUSED_ROPE: q is
    `UnrotatedQKV.qkv` [T, Q + 2 KV, H]. SHARED_PREFIX: split 0 starts from `prefix_out` and `prefix_stats`.
    """
    G: tl.constexpr = Q // KV
    r, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = tl.load(start + r)
    if tl.load(start + r + 1) - token == 1:
        prefix, seq_start, seq_len = _key_range(length, prefix_len, r, window, N, WINDOW, SHARED_PREFIX)
        # With one tile per split, all loads are issued at once.
        split_size = _keys_per_split(seq_len - seq_start, N, num_splits, 1 if FUSED_ROPE else 2)
        key_start = seq_start + split * split_size
        key_end = tl.minimum(key_start + split_size, seq_len)
        if key_start < key_end:
            g, d = tl.arange(0, M), tl.arange(0, D)
            head = kv_head * G + g
            offset = (token.to(tl.int64) * Q + head) * H
            valid = g < G
            mask = valid[:, None] & (d < H)[None, :]
            query_pos = seq_len - 1 + g * 0
            m, l, acc = tl.full([M], INITIAL_MAX, tl.float32), tl.zeros([M], tl.float32), tl.zeros([M, D], tl.float32)
            table = page_table + tl.load(req_idx + r).to(tl.int64) * page_table_stride
            if FUSED_ROPE:
                has_new_key = key_end == seq_len
                key_end -= has_new_key.to(tl.int32)
                # Older keys were written in steps before: they are loaded while the previous kernel still runs.
                if ROW:
                    k, v, k_scale, v_scale = load_fp8_tile(
                        k_cache, v_cache, table, key_start, key_end, kv_head, KV, H, D, PAGE, N, ROW
                    )
                else:
                    k, v = _load_kv_tile(
                        k_cache, v_cache, table, key_start, key_end, kv_head, KV, H, D, PAGE, N, FULL_TILE=False
                    )
                grid_dependency_sync(PDL)
                half: tl.constexpr = H // 2
                angle, inside = token.to(tl.int64) * half + d % half, d < H
                c, s = tl.load(cos + angle, mask=inside, other=0.0), tl.load(sin + angle, mask=inside, other=0.0)
                heads = q + token.to(tl.int64) * ((Q + 2 * KV) * H)
                x = _load_rotated(heads + (head * H)[:, None], mask, d[None, :], c[None, :], s[None, :], H)
                x = _as_dot_operand(x, ROW, EXACT)
                new_k = _load_rotated(heads + (Q + kv_head) * H, inside, d, c, s, H)
                new_v = tl.load(heads + (Q + KV + kv_head) * H + d, mask=inside, other=0.0)
                if has_new_key:
                    new_slot = tl.load(slot + token).to(tl.int64)
                    if ROW:  # attention reads what the cache holds
                        held_k = store_fp8_head(k_cache, new_slot, new_k, inside, d, kv_head, KV, H, PAGE, ROW)
                        held_v = store_fp8_head(v_cache, new_slot, new_v, inside, d, kv_head, KV, H, PAGE, ROW)
                    else:
                        held_k, held_v = new_k, new_v
                        target = (new_slot * KV + kv_head) * H + d
                        tl.store(k_cache + target, new_k, mask=inside)
                        tl.store(v_cache + target, new_v, mask=inside)
                    m = tl.sum(x.to(tl.float32) * held_k.to(tl.float32)[None, :], 1) * scale
                    l += 1.0
                    acc += held_v.to(tl.float32)[None, :]
                if ROW:
                    x_even, x_odd = split_pairs(x, M, D)
                    even, odd = split_pairs(acc, M, D)
                    m, l, even, odd = _fp8_softmax_step(
                        x_even, x_odd, k, v, k_scale, v_scale, key_start, key_end, query_pos, window, m, l, even, odd,
                        scale, N, WINDOW, EXACT, MASKED=True, FULL_TILE=False,
                    )  # fmt: skip
                    acc = join_pairs(even, odd, M, D)
                else:
                    m, l, acc = _online_softmax_step(
                        x, k, v, key_start, key_end, query_pos, window, m, l, acc, scale, N, WINDOW, EXACT,
                        MASKED=True, FULL_TILE=False,
                    )  # fmt: skip
                key_start += N
            else:
                grid_dependency_sync(PDL)
                x = _as_dot_operand(tl.load(q + offset[:, None] + d[None, :], mask=mask, other=0.0), ROW, EXACT)
            if SHARED_PREFIX:
                is_first = split == 0
                prefix_split_size = _keys_per_split(prefix, N, num_prefix_splits, MIN_TILES)
                prefix_splits = tl.where(is_first, tl.cdiv(prefix, prefix_split_size), 0)
                first = (r.to(tl.int64) * Q + head) * num_prefix_splits
                m, l, acc = _merge_splits(m, l, acc, prefix_out, prefix_stats, first, prefix_splits, valid, H, D)
            m, l, acc = _attend_key_range(
                x, k_cache, v_cache, None, None, table, key_start, key_end, query_pos, window,
                kv_head, m, l, acc, scale, KV, H, D, PAGE, N, ROW,
                WINDOW, EXACT, MASKED=True, FULL_TILE=False, TMA=False,
            )  # fmt: skip
            if SINGLE_SPLIT:
                tl.store(out + offset[:, None] + d[None, :], (acc / l[:, None]).to(out.dtype.element_ty), mask=mask)
            else:
                used_splits, counter = tl.cdiv(seq_len - seq_start, split_size), num_splits_done + r * KV + kv_head
                is_last = used_splits == 1
                first = (r.to(tl.int64) * Q + head) * num_splits
                if used_splits > 1:
                    tl.store(split_out + (first + split)[:, None] * H + d[None, :], acc, mask=mask)
                    tl.store(split_stats + (first + split) * 2, m, mask=valid)
                    tl.store(split_stats + (first + split) * 2 + 1, l, mask=valid)
                    tl.debug_barrier()  # all threads have stored before the split counts as done
                    is_last = tl.atomic_add(counter, 1, sem="acq_rel") == used_splits - 1
                    if is_last:
                        tl.store(counter, 0)
                        m = tl.full([M], INITIAL_MAX, tl.float32)
                        l = tl.zeros([M], tl.float32)
                        acc = tl.zeros([M, D], tl.float32)
                        m, l, acc = _merge_splits(m, l, acc, split_out, split_stats, first, used_splits, valid, H, D)
                if is_last:
                    mean = (acc / tl.where(valid, l, 1.0)[:, None]).to(out.dtype.element_ty)
                    tl.store(out + offset[:, None] + d[None, :], mean, mask=mask)


class UnrotatedQKV(NamedTuple):
    """Inputs of the decode kernel in place of rotated queries: it then applies RoPE and writes the cache."""

    qkv: Float[Tensor, "T Q2K H"]  # query heads, key heads, value heads
    cos: Float[Tensor, "T 1 half"]
    sin: Float[Tensor, "T 1 half"]
    slot: Int[Tensor, " T"]


def defer_rope_and_cache_kv(
    qkv: Tensor, cos: Tensor, sin: Tensor, slot: Tensor, k_cache: Tensor, v_cache: Tensor
) -> UnrotatedQKV:
    """Leaves RoPE and the cache write to the decode kernel: the op `rope_and_cache_kv` of small decode steps."""
    return UnrotatedQKV(qkv, cos, sin, slot)


def _build_query_blocks(batch: Batch, tokens_per_block: int, longer_than: int) -> Int[Tensor, "blocks 5"]:
    """Splits sequences of more than `longer_than` new tokens into blocks for the prefill kernel.

    A block is its first token, number of tokens, first token's position, the sequence's req_idx and number of keys.
    Unused blocks at the end have 0 tokens.
    """
    count = batch.query_start_loc.diff()
    block_ends = torch.where(count > longer_than, (count + tokens_per_block - 1) // tokens_per_block, 0).cumsum(0)
    block = torch.arange(len(batch.token_ids) // tokens_per_block + len(count), device=count.device)
    row = torch.searchsorted(block_ends, block, right=True).clamp_max(len(count) - 1)
    start = (block - torch.where(row > 0, block_ends[row - 1], 0)) * tokens_per_block
    num_tokens = torch.where(block < block_ends[-1], (count[row] - start).clamp_max(tokens_per_block), 0)
    seq_len = batch.seq_lens[row]
    columns = batch.query_start_loc[row] + start, num_tokens, seq_len - count[row] + start, batch.req_idx[row], seq_len
    return torch.stack(columns, 1).to(torch.int32)


def _tma_descriptor(cache: Float[Tensor, "S K H"], num_slots: int) -> TensorDescriptor:
    """Describes the cache to Hopper's copy engine as [S, K * H], in blocks of some slots and one head."""
    slots, kv_heads, head_dim = cache.shape
    return TensorDescriptor(cache, [slots, kv_heads * head_dim], [kv_heads * head_dim, 1], [num_slots, head_dim])


def _alloc_split_outputs(q: Tensor, num_rows: int) -> tuple[Float[Tensor, "rows H"], Float[Tensor, "rows 2"]]:
    """Allocates the outputs, and the maxima and sums, of all query heads of `num_rows` pairs of sequence and split."""
    num_heads = num_rows * q.shape[1]
    return q.new_empty((num_heads, q.shape[2]), dtype=torch.float32), q.new_empty((num_heads, 2), dtype=torch.float32)


def paged_attention(batch: Batch, model_config: ModelConfig, *, batch_invariant: bool = False) -> AttentionFn:
    """Returns the attention of a step; the Triton backend. Nothing is read on the host.

    A batch of as many sequences as tokens is taken to have one token per sequence. Every member of a group of
    `batch.shared_prefix` has keys of its own after the prefix, its last token's at least.

    `batch_invariant`: a token's sums have the same order in every batch. All tokens are then prefilled with one tile
    shape, and `batch.shared_prefix` is ignored.
    """
    tokens, rows, page = len(batch.token_ids), len(batch.seq_lens), batch.page_size
    table_width, shared, device = batch.page_table.shape[1], batch.shared_prefix, batch.token_ids.device
    num_q_heads, num_kv_heads, head_dim = model_config.num_q_heads, model_config.num_kv_heads, model_config.head_dim
    decode, group = tokens == rows, num_q_heads // num_kv_heads
    num_processors, large_shared_memory = 4, False
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        num_processors = properties.multi_processor_count
        large_shared_memory = properties.shared_memory_per_block_optin > 200_000

    def num_splits(num_rows: int, min_keys: int, max_splits: int, *, waves: int) -> int:
        """Returns the splits that keep every processor busy for some waves, with at least `min_keys` keys per split."""
        target = triton.cdiv(waves * num_processors, max(1, num_rows * num_kv_heads))
        return triton.next_power_of_2(max(1, min(target, triton.cdiv(table_width * page, min_keys), max_splits)))

    splits, prefix_splits = num_splits(rows, 256, 64, waves=4), 0
    if shared is not None:
        min_keys = SHARED_PREFIX_TILE["MIN_TILES"] * SHARED_PREFIX_TILE["N"]
        prefix_splits = num_splits(len(shared.num_shared_tokens), min_keys, 16, waves=2)
    launch_options = pdl.launch_options(batch.token_ids)
    query_blocks, num_splits_done = list[Tensor](), list[Tensor]()  # computed by the first layer, for all layers

    def attend(q: Tensor | UnrotatedQKV, k_cache: Tensor, v_cache: Tensor, window: int | None) -> Tensor:
        unrotated, q = (q, q.qkv) if isinstance(q, UnrotatedQKV) else (None, q)
        assert unrotated is None or (decode and not batch_invariant and shared is None), "for steps that only decode"
        q, exact = q.contiguous(), q.dtype == torch.float32
        row_bytes = k_cache.shape[2] if k_cache.dtype == torch.uint8 else 0
        if row_bytes:
            k_cache, v_cache = k_cache.view(torch.uint16), v_cache.view(torch.uint16)
        out = q.new_empty(tokens, num_q_heads, head_dim)
        sizes = {
            "Q": num_q_heads, "KV": num_kv_heads, "H": head_dim, "D": max(16, triton.next_power_of_2(head_dim)),
            "PAGE": page, "ROW": row_bytes, "WINDOW": window is not None, "EXACT": exact,
        }  # fmt: skip
        scale, pages = head_dim**-0.5 * LOG2E, (batch.page_table, table_width, window or 0)
        if batch_invariant or not decode:
            tile_in_page = USE_TMA and not row_bytes and sizes["D"] == head_dim and page % PREFILL_TILE["N"] == 0
            many_keys = tokens >= 2048 * rows and page % LONG_PREFILL_TILE["N"] == 0
            tile = PREFILL_TILE
            if exact or not large_shared_memory:
                tile = SMALL_PREFILL_TILE
            elif row_bytes:
                tile = FP8_PREFILL_TILE
            elif (many_keys or not tile_in_page) and not batch_invariant:
                tile = LONG_PREFILL_TILE
            size = tile["M"] // group
            if not query_blocks:
                query_blocks.append(_build_query_blocks(batch, size, longer_than=int(not batch_invariant)))
            tma = tile_in_page and (tile is not SMALL_PREFILL_TILE or device.type == "cpu")  # Hopper or later
            kv_tiles = (_tma_descriptor(x, tile["N"]) for x in (k_cache, v_cache)) if tma else (None, None)
            _prefill_kernel[(len(query_blocks[0]), num_kv_heads)](
                q, k_cache, v_cache, *kv_tiles, out, query_blocks[0], *pages, scale, **sizes, TMA=tma, **tile
            )
        if batch_invariant:
            return out

        unused = (q, q)  # where a kernel takes pointers that it does not read
        sequences = (batch.query_start_loc, batch.seq_lens, batch.req_idx, *pages)
        prefix_results, prefix_lens = unused, batch.seq_lens
        tile = NARROW_HEAD_DECODE_TILE if head_dim <= 64 and unrotated is None else DECODE_TILE
        if row_bytes and unrotated is None and rows * num_kv_heads * splits >= 16 * num_processors:
            tile = FP8_DECODE_TILE
        if shared is not None:
            tile = SUFFIX_DECODE_TILE
            prefix_results, prefix_lens = _alloc_split_outputs(q, rows * prefix_splits), shared.num_skipped_tokens
            num_groups, group_size = shared.group_rows.shape
            _decode_shared_prefix_kernel[(num_groups, num_kv_heads, prefix_splits)](
                q, k_cache, v_cache, *prefix_results, shared.group_rows, shared.num_shared_tokens, *sequences,
                prefix_splits, scale, **sizes, GROUP_SIZE=group_size,
                M=max(16, triton.next_power_of_2(group_size * group)),
                num_stages=3 if large_shared_memory and not exact else 2, **SHARED_PREFIX_TILE,
            )  # fmt: skip
        results = unused
        if splits > 1:
            results = _alloc_split_outputs(out, rows * splits)
            if not num_splits_done:
                num_splits_done.append(torch.zeros(rows * num_kv_heads, dtype=torch.int32, device=device))
        rope = (q, *unused)
        if unrotated is not None:
            rope = unrotated.cos.contiguous(), unrotated.sin.contiguous(), unrotated.slot
        _decode_kernel[(rows, num_kv_heads, splits)](
            q, k_cache, v_cache, out, *results, *(num_splits_done or [q]), prefix_lens, *prefix_results, *rope,
            *sequences, splits, prefix_splits, scale, **sizes, M=max(16, triton.next_power_of_2(group)),
            SINGLE_SPLIT=splits == 1, FUSED_ROPE=unrotated is not None, SHARED_PREFIX=shared is not None,
            MIN_TILES=SHARED_PREFIX_TILE["MIN_TILES"], **launch_options, **tile,
        )  # fmt: skip
        return out

    return attend
