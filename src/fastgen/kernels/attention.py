"""Attention over pages in Triton: the backend for GPUs. Reads the metadata on the device, so it can be captured.

Kernels over flash attention's online softmax (arXiv 2205.14135), all with the query heads of a kv head packed into one
tile, so that keys are read once for all of them:

    prefill        a program for some tokens of a sequence and a kv head; keys beyond the last visible one are skipped
    decode         a program for a sequence, a kv head and a share of its keys; the last of them to end joins what all
                   have found (flash decoding). It may rotate and store what is new itself: `attention.Fresh`
    decode_shared  a program for a group of sequences, a kv head and a share of the keys that the group has in common;
                   `decode` goes on from what it finds

Sequences of one token are decode's, longer ones prefill's; each kernel passes over the other's.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgen.core.attention import AttentionFn, UnrotatedQKV
from fastgen.core.model_config import ModelConfig
from fastgen.core.types import Batch
from fastgen.kernels import pdl
from fastgen.kernels.pdl import grid_dependency_sync

LOG2E = 1.4426950408889634
# No key has a score this low. LEAST is what the running maximum starts from: finite, so that a row which has seen no
# key stays finite, and so far above NOTHING, the score of a key that is not seen, that such a key weighs nothing.
INITIAL_MAX, MASKED_SCORE = tl.constexpr(-1.0e20), tl.constexpr(-1.0e30)
# Tiles of M query rows and N keys: the fastest of those tried on an H200, at 1k to 32k tokens. Two programs of the
# first fit a multiprocessor, so that one computes while the other starts, ends or takes exponentials.
PREFILL_TILE = {"M": 64, "N": 64, "num_warps": 4, "num_stages": 3}
LONG_PREFILL_TILE = {
    "M": 128,
    "N": 128,
    "num_warps": 8,
    "num_stages": 3,
}  # with many keys for a program, or small pages
SMALL_PREFILL_TILE = {
    "M": 64,
    "N": 64,
    "num_warps": 4,
    "num_stages": 2,
}  # where shared memory is less than Hopper's, and in fp32
USE_TMA = True  # whether tiles are read by Hopper's copy engine, where each lies in one page
DECODE_TILE = {"N": 64, "num_warps": 4, "num_stages": 3}
NARROW_HEAD_DECODE_TILE = {"N": 128, "num_warps": 4, "num_stages": 2}  # of heads of 64
SUFFIX_DECODE_TILE = {"N": 64, "num_warps": 2, "num_stages": 2}  # of members of groups, whose own keys are few
SHARED_PREFIX_TILE = {"N": DECODE_TILE["N"], "MIN_TILES": 16, "num_warps": 4}  # MIN_TILES: the fewest of a program
# Each value of these, and whether they are multiples of 16, would be compiled anew.
NO_SPECIALIZATION: dict[str, Any] = {
    "do_not_specialize": ["page_table_stride", "window", "num_splits", "num_prefix_splits"],
    "do_not_specialize_on_alignment": [
        "query_blocks",
        "prefix_len",
        "member",
        "slot",
        "start",
        "length",
        "req_idx",
        "page_table",
    ],
}


@triton.jit
@no_type_check  # pointers, numbers and constants, in Triton's own language
def _load_kv_tile(
    k_cache, v_cache, page_table, tile_start, key_end, kv_head,
    KV: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, N: tl.constexpr, FULL_TILE: tl.constexpr,
):  # fmt: skip
    """Keys and values [at, at + N) before `last`; WHOLE: all of them are."""
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
def _online_softmax_step(
    q, k, v, tile_start, key_end, query_pos, window, m, l, acc, scale,
    N: tl.constexpr, WINDOW: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr, FULL_TILE: tl.constexpr,
):  # fmt: skip
    """The running maximum m, sum l and output acc after a tile of keys, of which the first is at `at`."""
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    s = tl.dot(q, tl.trans(k), input_precision=precision)
    if MASKED:  # by what is constant, the place in the tile, against one number for a row
        i = tl.arange(0, N)
        seen = i[None, :] <= (query_pos - tile_start)[:, None]
        if not FULL_TILE:
            seen = seen & (i < key_end - tile_start)[None, :]
        if WINDOW:
            seen = seen & (i[None, :] > (query_pos - tile_start - window)[:, None])
        s = tl.where(seen, s, MASKED_SCORE)
    top = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - top[:, None])
    shrink = tl.exp2(m - top)
    l = l * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=precision)
    return top, l, acc


@triton.jit
@no_type_check
def _attend_key_range(
    q, k_cache, v_cache, k_tiles, v_tiles, page_table, key_start, key_end, query_pos, window, kv_head, m, l, acc, scale,
    KV: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, N: tl.constexpr,
    WINDOW: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr, FULL_TILE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Keys [first, last), N at a time, for the query rows at positions `row`: the running maximum m, sum l and output
    acc after them. MASKED: not every row sees all of them. WHOLE: there are N keys in each tile. TMA: a tile is a
    block of the descriptors k_tiles and v_tiles.
    """
    for at in tl.range(key_start, key_end, N):
        if TMA:
            slot = tl.load(page_table + at // PAGE).to(tl.int32) * PAGE + at % PAGE
            k = k_tiles.load([slot, kv_head * H])
            v = v_tiles.load([slot, kv_head * H])
        else:
            k, v = _load_kv_tile(k_cache, v_cache, page_table, at, key_end, kv_head, KV, H, D, PAGE, N, FULL_TILE)
        m, l, acc = _online_softmax_step(
            q, k, v, at, key_end, query_pos, window, m, l, acc, scale, N, WINDOW, EXACT, MASKED, FULL_TILE
        )
    return m, l, acc


@triton.jit(**NO_SPECIALIZATION)
@no_type_check
def _prefill_kernel(
    q, k_cache, v_cache, k_tiles, v_tiles, out, query_blocks, page_table, page_table_stride, window, scale,
    Q: tl.constexpr, KV: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, EXACT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = Q // KV
    # The last blocks first: a prompt's last blocks are its longest, so that none is left over at the end.
    at, kv_head = query_blocks + (tl.num_programs(0) - 1 - tl.program_id(0)) * 5, tl.program_id(1)
    token, count, context = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    seat, total = tl.load(at + 3), tl.load(at + 4)
    if count > 0:
        table = page_table + seat.to(tl.int64) * page_table_stride
        r, d = tl.arange(0, M), tl.arange(0, D)
        t = r // G
        offset = ((token + t).to(tl.int64) * Q + kv_head * G + r % G) * H
        whole = (t < count)[:, None] & (d < H)[None, :]
        x = tl.load(q + offset[:, None] + d[None, :], mask=whole, other=0.0)
        row = context + t
        last = context + count
        first = context * 0
        if WINDOW:
            first = tl.maximum(context - window + 1, 0) // N * N
        m = tl.full([M], INITIAL_MAX, tl.float32)
        l = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, D], tl.float32)
        full = tl.minimum(tl.cdiv(last, N), total // N) * N
        if not WINDOW:  # the keys that even the first row sees
            seen_by_all = (context + 1) // N * N
            m, l, acc = _attend_key_range(
                x, k_cache, v_cache, k_tiles, v_tiles, table, first, seen_by_all, row, window,
                kv_head, m, l, acc, scale, KV, H, D, PAGE, N, WINDOW, EXACT, MASKED=False, FULL_TILE=True, TMA=TMA,
            )  # fmt: skip
            first = seen_by_all
        m, l, acc = _attend_key_range(
            x, k_cache, v_cache, k_tiles, v_tiles, table, first, full, row, window,
            kv_head, m, l, acc, scale, KV, H, D, PAGE, N, WINDOW, EXACT, MASKED=True, FULL_TILE=True, TMA=TMA,
        )  # fmt: skip
        if full < last:  # what follows the sequence's last key in its tile may be anything, so it is not even read
            m, l, acc = _attend_key_range(
                x, k_cache, v_cache, k_tiles, v_tiles, table, full, last, row, window,
                kv_head, m, l, acc, scale, KV, H, D, PAGE, N, WINDOW, EXACT, MASKED=True, FULL_TILE=False, TMA=False,
            )  # fmt: skip
        mean = acc * (1 / tl.where(l > 0, l, 1.0))[:, None]  # a row beyond the last may have seen none
        tl.store(out + offset[:, None] + d[None, :], mean.to(out.dtype.element_ty), mask=whole)


@triton.jit
@no_type_check
def _keys_per_split(num_keys, N: tl.constexpr, num_splits, min_tiles):
    """Keys of each of the programs that share some: TILES tiles at least, so few keys keep few programs busy."""
    return tl.maximum(tl.cdiv(tl.cdiv(num_keys, N), num_splits), min_tiles) * N


@triton.jit(**NO_SPECIALIZATION)
@no_type_check
def _decode_shared_prefix_kernel(
    q, k_cache, v_cache, split_out, split_stats, member, prefix_len, start, length, req_idx, page_table, page_table_stride, window, num_splits, scale,
    Q: tl.constexpr, KV: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    GROUP_SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, MIN_TILES: tl.constexpr,
    WINDOW: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = Q // KV
    group, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    total = tl.load(prefix_len + group)
    share = _keys_per_split(total, N, num_splits, MIN_TILES)
    first = split * share
    if first < total:
        i, d = tl.arange(0, M), tl.arange(0, D)
        r = tl.load(member + group * GROUP_SIZE + i // G, mask=i < GROUP_SIZE * G, other=-1).to(tl.int32)
        taken = r >= 0
        table = (
            page_table + tl.load(req_idx + tl.max(r, 0)).to(tl.int64) * page_table_stride
        )  # any member's pages begin alike
        head = kv_head * G + i % G
        token = tl.load(start + r, mask=taken, other=0).to(tl.int64)
        whole = taken[:, None] & (d < H)[None, :]
        x = tl.load(q + ((token * Q + head) * H)[:, None] + d[None, :], mask=whole, other=0.0)
        row = tl.load(length + r, mask=taken, other=0).to(tl.int32) - 1
        m = tl.full([M], INITIAL_MAX, tl.float32)
        l = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, D], tl.float32)
        last = tl.minimum(first + share, total)
        begun = first
        if WINDOW:  # the first key that any member sees, rounded down to a tile
            begun = tl.maximum(first, (tl.min(tl.where(taken, row, 2**30), 0) - window + 1) // N * N)
        m, l, acc = _attend_key_range(
            x, k_cache, v_cache, None, None, table, begun, last, row, window,
            kv_head, m, l, acc, scale, KV, H, D, PAGE, N, WINDOW, EXACT, MASKED=True, FULL_TILE=False, TMA=False,
        )  # fmt: skip
        at = (r.to(tl.int64) * Q + head) * num_splits + split
        tl.store(split_out + at[:, None] * H + d[None, :], acc, mask=whole)
        tl.store(split_stats + at * 2, m, mask=taken)
        tl.store(split_stats + at * 2 + 1, l, mask=taken)


@triton.jit
@no_type_check
def _key_range(length, prefix_len, r, window, N: tl.constexpr, WINDOW: tl.constexpr, SHARED_PREFIX: tl.constexpr):
    """The keys that a group has read for sequence r, the first that r itself reads, and the number of all."""
    total = tl.load(length + r)
    covered = total * 0
    if SHARED_PREFIX:
        covered = tl.load(prefix_len + r).to(tl.int32)
    first = covered
    if WINDOW:  # the first that its last token may see, rounded down to a tile
        first = tl.maximum(covered, (total - window) // N * N)
    return covered, first, total


@triton.jit
@no_type_check
def _merge_splits(m, l, acc, split_out, split_stats, offset, num_splits, mask, H: tl.constexpr, D: tl.constexpr):
    """The running maximum, sum and output of rows, and of `count` other shares of their keys, from `at` on."""
    d = tl.arange(0, D)
    for i in tl.range(0, num_splits, loop_unroll_factor=4):  # all are asked for before the first is needed
        # Past the first cache: other processors have written this.
        top = tl.load(split_stats + (offset + i) * 2, mask=mask, other=INITIAL_MAX, cache_modifier=".cg")
        both = tl.maximum(m, top)
        shrink, weight = tl.exp2(m - both), tl.exp2(top - both)
        l = (
            l * shrink
            + tl.load(split_stats + (offset + i) * 2 + 1, mask=mask, other=0.0, cache_modifier=".cg") * weight
        )
        inside = mask[:, None] & (d < H)[None, :]
        more = tl.load(split_out + (offset + i)[:, None] * H + d[None, :], mask=inside, other=0.0, cache_modifier=".cg")
        acc = acc * shrink[:, None] + more * weight[:, None]
        m = both
    return m, l, acc


@triton.jit
@no_type_check
def _load_rotated(x, inside, d, c, s, H: tl.constexpr):
    """Heads at x [..., H], rotated by cosines c and sines s of every dimension d, in their own dtype."""
    half: tl.constexpr = H // 2
    a = tl.load(x + d, mask=inside, other=0.0)
    b = tl.load(x + tl.where(d < half, d + half, d - half), mask=inside, other=0.0)
    return (a.to(tl.float32) * c + b.to(tl.float32) * tl.where(d < half, -s, s)).to(a.dtype)


@triton.jit(**NO_SPECIALIZATION)
@no_type_check
def _decode_kernel(
    q, k_cache, v_cache, out, split_out, split_stats, num_splits_done, prefix_len, prefix_out, prefix_stats, cos, sin, slot, start, length, req_idx,
    page_table, page_table_stride, window, num_splits, num_prefix_splits, scale, Q: tl.constexpr, KV: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    PAGE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SINGLE_SPLIT: tl.constexpr, FUSED_ROPE: tl.constexpr,
    SHARED_PREFIX: tl.constexpr, MIN_TILES: tl.constexpr, WINDOW: tl.constexpr, EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`done`: 0 for each sequence and kv head, before and after. FRESH: q is [T, Q + 2 KV, H], see `Fresh`."""
    G: tl.constexpr = Q // KV
    r, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = tl.load(start + r)
    if tl.load(start + r + 1) - token == 1:
        covered, begun, total = _key_range(length, prefix_len, r, window, N, WINDOW, SHARED_PREFIX)
        share = _keys_per_split(
            total - begun, N, num_splits, 1 if FUSED_ROPE else 2
        )  # of one tile, all is on its way at once
        first = begun + split * share
        last = tl.minimum(first + share, total)
        if first < last:
            g, d = tl.arange(0, M), tl.arange(0, D)
            head = kv_head * G + g
            offset = (token.to(tl.int64) * Q + head) * H
            taken = g < G
            whole = taken[:, None] & (d < H)[None, :]
            row = total - 1 + g * 0
            m = tl.full([M], INITIAL_MAX, tl.float32)
            l = tl.zeros([M], tl.float32)
            acc = tl.zeros([M, D], tl.float32)
            table = page_table + tl.load(req_idx + r).to(tl.int64) * page_table_stride
            if FUSED_ROPE:
                newest = last == total  # this share's last key is the new one
                last -= newest.to(tl.int32)
                # What the cache holds was there long before: it is on its way while the kernel before still runs.
                k, v = _load_kv_tile(k_cache, v_cache, table, first, last, kv_head, KV, H, D, PAGE, N, FULL_TILE=False)
                grid_dependency_sync(PDL)
                half: tl.constexpr = H // 2
                turn, inside = token.to(tl.int64) * half + d % half, d < H
                c, s = tl.load(cos + turn, mask=inside, other=0.0), tl.load(sin + turn, mask=inside, other=0.0)
                row_at = q + token.to(tl.int64) * ((Q + 2 * KV) * H)
                x = _load_rotated(row_at + (head * H)[:, None], whole, d[None, :], c[None, :], s[None, :], H)
                new = _load_rotated(row_at + (Q + kv_head) * H, inside, d, c, s, H)
                value = tl.load(row_at + (Q + KV + kv_head) * H + d, mask=inside, other=0.0)
                if newest:
                    to = (tl.load(slot + token).to(tl.int64) * KV + kv_head) * H + d
                    tl.store(k_cache + to, new, mask=inside)
                    tl.store(v_cache + to, value, mask=inside)
                    m = tl.sum(x.to(tl.float32) * new.to(tl.float32)[None, :], 1) * scale
                    l += 1.0
                    acc += value.to(tl.float32)[None, :]
                m, l, acc = _online_softmax_step(
                    x, k, v, first, last, row, window, m, l, acc, scale, N, WINDOW, EXACT, MASKED=True, FULL_TILE=False,
                )  # fmt: skip
                first += N
            else:
                grid_dependency_sync(PDL)
                x = tl.load(q + offset[:, None] + d[None, :], mask=whole, other=0.0)
            if SHARED_PREFIX:  # the first split goes on from what the group has found
                found = tl.where(
                    split == 0, tl.cdiv(covered, _keys_per_split(covered, N, num_prefix_splits, MIN_TILES)), 0
                )
                at = (r.to(tl.int64) * Q + head) * num_prefix_splits
                m, l, acc = _merge_splits(m, l, acc, prefix_out, prefix_stats, at, found, taken, H, D)
            m, l, acc = _attend_key_range(
                x, k_cache, v_cache, None, None, table, first, last, row, window,
                kv_head, m, l, acc, scale, KV, H, D, PAGE, N, WINDOW, EXACT, MASKED=True, FULL_TILE=False, TMA=False,
            )  # fmt: skip
            if SINGLE_SPLIT:
                tl.store(out + offset[:, None] + d[None, :], (acc / l[:, None]).to(out.dtype.element_ty), mask=whole)
            else:
                used, ended = tl.cdiv(total - begun, share), num_splits_done + r * KV + kv_head
                ends = used == 1
                at = (r.to(tl.int64) * Q + head) * num_splits
                if used > 1:
                    tl.store(split_out + (at + split)[:, None] * H + d[None, :], acc, mask=whole)
                    tl.store(split_stats + (at + split) * 2, m, mask=taken)
                    tl.store(split_stats + (at + split) * 2 + 1, l, mask=taken)
                    tl.debug_barrier()  # all of it is there before this program is said to be done
                    ends = tl.atomic_add(ended, 1, sem="acq_rel") == used - 1
                    if ends:
                        tl.store(ended, 0)
                        m = tl.full([M], INITIAL_MAX, tl.float32)
                        l = tl.zeros([M], tl.float32)
                        acc = tl.zeros([M, D], tl.float32)
                        m, l, acc = _merge_splits(m, l, acc, split_out, split_stats, at, used, taken, H, D)
                if ends:
                    mean = (acc / tl.where(taken, l, 1.0)[:, None]).to(out.dtype.element_ty)
                    tl.store(out + offset[:, None] + d[None, :], mean, mask=whole)


def _build_query_blocks(batch: Batch, tokens_per_block: int, num_blocks: int, longer_than: int) -> Tensor:
    """[blocks, 5]: of each `size` tokens of the sequences longer than `longer`: the first token, how many, the first
    one's position, the sequence's seat and its keys. No tokens beyond.
    """
    count = batch.query_start_loc.diff()
    ends = torch.where(count > longer_than, (count + tokens_per_block - 1) // tokens_per_block, 0).cumsum(0)
    block = torch.arange(num_blocks, device=count.device)
    row = torch.searchsorted(ends, block, right=True).clamp_max(len(count) - 1)
    first = (block - torch.where(row > 0, ends[row - 1], 0)) * tokens_per_block
    tokens = torch.where(block < ends[-1], (count[row] - first).clamp_max(tokens_per_block), 0)
    total = batch.seq_lens[row]
    of = (batch.query_start_loc[row] + first, tokens, total - count[row] + first, batch.req_idx[row], total)
    return torch.stack(of, 1).to(torch.int32)


def _tma_descriptor(cache: Tensor, n: int) -> TensorDescriptor:
    """Blocks of n slots and a head, as Hopper's copy engine reads them."""
    slots, kv_heads, head = cache.shape
    return TensorDescriptor(cache, [slots, kv_heads * head], [kv_heads * head, 1], [n, head])


def _alloc_split_outputs(q: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Outputs, and maxima with sums, of n rows' heads over a share of their keys."""
    heads = num_rows * q.shape[1]
    return q.new_empty((heads, q.shape[2]), dtype=torch.float32), q.new_empty((heads, 2), dtype=torch.float32)


def paged_attention(batch: Batch, model_config: ModelConfig, *, batch_invariant: bool = False) -> AttentionFn:
    """The Triton backend: shapes alone decide what is launched, so nothing is read on the host.

    As many sequences as tokens are taken to have one each. A group of `batch.share` leaves every member keys of its
    own, the last token's at least.

    `fixed`: a token's sums have the same order in every batch. All tokens are then prefill's, of one tile, and
    `batch.share` is not looked at.
    """
    tokens, rows, wide, page = len(batch.token_ids), len(batch.seq_lens), batch.page_table.shape[1], batch.page_size
    decode = tokens == rows
    group = model_config.num_q_heads // model_config.num_kv_heads
    device = batch.token_ids.device
    processors, roomy = 4, False
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        processors, roomy = properties.multi_processor_count, properties.shared_memory_per_block_optin > 200_000

    def programs(each: int, keys: int, most: int, *, waves: int) -> int:
        """Shares of some keys: as many as keep every processor busy, but none of fewer than `keys` keys."""
        wanted = triton.cdiv(waves * processors, max(1, each * model_config.num_kv_heads))
        return triton.next_power_of_2(max(1, min(wanted, triton.cdiv(wide * page, keys), most)))

    splits = programs(rows, 256, 64, waves=4)
    share = batch.shared_prefix
    shares = (
        programs(len(share.num_shared_tokens), SHARED_PREFIX_TILE["MIN_TILES"] * SHARED_PREFIX_TILE["N"], 16, waves=2)
        if share is not None
        else 0
    )
    launch = pdl.pdl_launch_options(batch.token_ids)
    todo, done = list[Tensor](), list[Tensor]()  # the same for all layers

    def attend(q: Tensor | UnrotatedQKV, k_cache: Tensor, v_cache: Tensor, window: int | None) -> Tensor:
        fresh, q = (q, q.qkv) if isinstance(q, UnrotatedQKV) else (None, q)
        assert fresh is None or (decode and not batch_invariant and share is None), "made for steps that only decode"
        q = q.contiguous()
        out = q.new_empty(tokens, model_config.num_q_heads, model_config.head_dim)
        exact = q.dtype == torch.float32
        sizes = {
            "Q": model_config.num_q_heads, "KV": model_config.num_kv_heads, "H": model_config.head_dim, "D": max(16, triton.next_power_of_2(model_config.head_dim)),
            "PAGE": page, "WINDOW": window is not None, "EXACT": exact,
        }  # fmt: skip
        scale = model_config.head_dim**-0.5 * LOG2E
        end = (batch.page_table, wide, window or 0)
        common = (batch.query_start_loc, batch.seq_lens, batch.req_idx, *end)
        if batch_invariant or not decode:
            whole = USE_TMA and sizes["D"] == model_config.head_dim and page % PREFILL_TILE["N"] == 0
            many = tokens >= 2048 * rows and page % LONG_PREFILL_TILE["N"] == 0
            tile = (
                SMALL_PREFILL_TILE
                if exact or not roomy
                else LONG_PREFILL_TILE
                if (many or not whole) and not batch_invariant
                else PREFILL_TILE
            )
            size = tile["M"] // group
            if not todo:
                todo.append(_build_query_blocks(batch, size, tokens // size + rows, 0 if batch_invariant else 1))
            tma = whole and (tile is not SMALL_PREFILL_TILE or device.type == "cpu")  # older GPUs have none
            tiles = (_tma_descriptor(x, tile["N"]) for x in (k_cache, v_cache)) if tma else (None, None)
            _prefill_kernel[(len(todo[0]), model_config.num_kv_heads)](
                q, k_cache, v_cache, *tiles, out, todo[0], *end, scale, **sizes, TMA=tma, **tile
            )
        if batch_invariant:
            return out

        found, skip = (q, q), batch.seq_lens  # not read
        if share is not None:
            found, skip = _alloc_split_outputs(q, rows * shares), share.num_skipped_tokens
            width = share.group_rows.shape[1]
            packed = max(16, triton.next_power_of_2(width * group))
            _decode_shared_prefix_kernel[(len(share.num_shared_tokens), model_config.num_kv_heads, shares)](
                q, k_cache, v_cache, *found, share.group_rows, share.num_shared_tokens, *common, shares, scale, **sizes, GROUP_SIZE=width,
                M=packed, num_stages=3 if roomy and not exact else 2, **SHARED_PREFIX_TILE,
            )  # fmt: skip
        packed = max(16, triton.next_power_of_2(group))
        part = (q, q)
        if splits > 1:
            part = _alloc_split_outputs(out, rows * splits)
            if not done:
                done.append(torch.zeros(rows * model_config.num_kv_heads, dtype=torch.int32, device=device))
        tile = (
            SUFFIX_DECODE_TILE
            if share is not None
            else NARROW_HEAD_DECODE_TILE
            if model_config.head_dim <= 64 and fresh is None
            else DECODE_TILE
        )
        new = (q, q, q) if fresh is None else (fresh.cos.contiguous(), fresh.sin.contiguous(), fresh.slot)
        _decode_kernel[(rows, model_config.num_kv_heads, splits)](
            q, k_cache, v_cache, out, *part, *(done or [q]), skip, *found, *new, *common, splits, shares, scale,
            **sizes, M=packed, SINGLE_SPLIT=splits == 1, FUSED_ROPE=fresh is not None, SHARED_PREFIX=share is not None,
            MIN_TILES=SHARED_PREFIX_TILE["MIN_TILES"], **launch, **tile,
        )  # fmt: skip
        return out

    return attend
