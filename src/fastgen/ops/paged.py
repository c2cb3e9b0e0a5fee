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

from fastgen.models.spec import Spec
from fastgen.ops import hopper
from fastgen.ops.attention import Attend, Fresh
from fastgen.ops.hopper import begin
from fastgen.types import Batch

LOG2E = 1.4426950408889634
# No key has a score this low. LEAST is what the running maximum starts from: finite, so that a row which has seen no
# key stays finite, and so far above NOTHING, the score of a key that is not seen, that such a key weighs nothing.
LEAST, NOTHING = tl.constexpr(-1.0e20), tl.constexpr(-1.0e30)
# Tiles of M query rows and N keys: the fastest of those tried on an H200, at 1k to 32k tokens. Two programs of the
# first fit a multiprocessor, so that one computes while the other starts, ends or takes exponentials.
PREFILL = {"M": 64, "N": 64, "num_warps": 4, "num_stages": 3}
LONG = {"M": 128, "N": 128, "num_warps": 8, "num_stages": 3}  # with many keys for a program, or small pages
SMALL = {"M": 64, "N": 64, "num_warps": 4, "num_stages": 2}  # where shared memory is less than Hopper's, and in fp32
TMA = True  # whether tiles are read by Hopper's copy engine, where each lies in one page
DECODE = {"N": 64, "num_warps": 4, "num_stages": 3}
NARROW = {"N": 128, "num_warps": 4, "num_stages": 2}  # of heads of 64
OWN = {"N": 64, "num_warps": 2, "num_stages": 2}  # of members of groups, whose own keys are few
SHARED = {"N": DECODE["N"], "TILES": 16, "num_warps": 4}  # TILES: the fewest of a program
# Each value of these, and whether they are multiples of 16, would be compiled anew.
FREE: dict[str, Any] = {
    "do_not_specialize": ["wide", "window", "splits", "shares"],
    "do_not_specialize_on_alignment": ["todo", "skip", "member", "keys", "slot", "start", "length", "seat", "pages"],
}


@triton.jit
@no_type_check  # pointers, numbers and constants, in Triton's own language
def _tile(
    k_cache, v_cache, pages, at, last, kv_head,
    KV: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Keys and values [at, at + N) before `last`; WHOLE: all of them are."""
    n, d = at + tl.arange(0, N), tl.arange(0, D)
    if WHOLE and D == H:
        page = tl.load(pages + n // PAGE)
        slots = ((page.to(tl.int64) * PAGE + n % PAGE) * KV + kv_head) * H
        k = tl.load(k_cache + slots[:, None] + d[None, :])
        v = tl.load(v_cache + slots[:, None] + d[None, :])
    else:
        page = tl.load(pages + n // PAGE, mask=n < last, other=0)
        slots = ((page.to(tl.int64) * PAGE + n % PAGE) * KV + kv_head) * H
        inside = (n < last)[:, None] & (d < H)[None, :]
        k = tl.load(k_cache + slots[:, None] + d[None, :], mask=inside, other=0.0)
        v = tl.load(v_cache + slots[:, None] + d[None, :], mask=inside, other=0.0)
    return k, v


@triton.jit
@no_type_check
def _weigh(
    q, k, v, at, last, row, window, m, l, acc, scale,
    N: tl.constexpr, WINDOW: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The running maximum m, sum l and output acc after a tile of keys, of which the first is at `at`."""
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    s = tl.dot(q, tl.trans(k), input_precision=precision)
    if MASKED:  # by what is constant, the place in the tile, against one number for a row
        i = tl.arange(0, N)
        seen = i[None, :] <= (row - at)[:, None]
        if not WHOLE:
            seen = seen & (i < last - at)[None, :]
        if WINDOW:
            seen = seen & (i[None, :] > (row - at - window)[:, None])
        s = tl.where(seen, s, NOTHING)
    top = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - top[:, None])
    shrink = tl.exp2(m - top)
    l = l * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=precision)
    return top, l, acc


@triton.jit
@no_type_check
def _tiles(
    q, k_cache, v_cache, k_tiles, v_tiles, pages, first, last, row, window, kv_head, m, l, acc, scale,
    KV: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, N: tl.constexpr,
    WINDOW: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Keys [first, last), N at a time, for the query rows at positions `row`: the running maximum m, sum l and output
    acc after them. MASKED: not every row sees all of them. WHOLE: there are N keys in each tile. TMA: a tile is a
    block of the descriptors k_tiles and v_tiles.
    """
    for at in tl.range(first, last, N):
        if TMA:
            slot = tl.load(pages + at // PAGE).to(tl.int32) * PAGE + at % PAGE
            k = k_tiles.load([slot, kv_head * H])
            v = v_tiles.load([slot, kv_head * H])
        else:
            k, v = _tile(k_cache, v_cache, pages, at, last, kv_head, KV, H, D, PAGE, N, WHOLE)
        m, l, acc = _weigh(q, k, v, at, last, row, window, m, l, acc, scale, N, WINDOW, EXACT, MASKED, WHOLE)
    return m, l, acc


@triton.jit(**FREE)
@no_type_check
def _prefill(
    q, k_cache, v_cache, k_tiles, v_tiles, out, todo, pages, wide, window, scale,
    Q: tl.constexpr, KV: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, EXACT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = Q // KV
    # The last blocks first: a prompt's last blocks are its longest, so that none is left over at the end.
    at, kv_head = todo + (tl.num_programs(0) - 1 - tl.program_id(0)) * 5, tl.program_id(1)
    token, count, context = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    seat, total = tl.load(at + 3), tl.load(at + 4)
    if count > 0:
        table = pages + seat.to(tl.int64) * wide
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
        m = tl.full([M], LEAST, tl.float32)
        l = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, D], tl.float32)
        full = tl.minimum(tl.cdiv(last, N), total // N) * N
        if not WINDOW:  # the keys that even the first row sees
            seen_by_all = (context + 1) // N * N
            m, l, acc = _tiles(
                x, k_cache, v_cache, k_tiles, v_tiles, table, first, seen_by_all, row, window,
                kv_head, m, l, acc, scale, KV, H, D, PAGE, N, WINDOW, EXACT, MASKED=False, WHOLE=True, TMA=TMA,
            )  # fmt: skip
            first = seen_by_all
        m, l, acc = _tiles(
            x, k_cache, v_cache, k_tiles, v_tiles, table, first, full, row, window,
            kv_head, m, l, acc, scale, KV, H, D, PAGE, N, WINDOW, EXACT, MASKED=True, WHOLE=True, TMA=TMA,
        )  # fmt: skip
        if full < last:  # what follows the sequence's last key in its tile may be anything, so it is not even read
            m, l, acc = _tiles(
                x, k_cache, v_cache, k_tiles, v_tiles, table, full, last, row, window,
                kv_head, m, l, acc, scale, KV, H, D, PAGE, N, WINDOW, EXACT, MASKED=True, WHOLE=False, TMA=False,
            )  # fmt: skip
        mean = acc * (1 / tl.where(l > 0, l, 1.0))[:, None]  # a row beyond the last may have seen none
        tl.store(out + offset[:, None] + d[None, :], mean.to(out.dtype.element_ty), mask=whole)


@triton.jit
@no_type_check
def _share(keys, N: tl.constexpr, splits, TILES):
    """Keys of each of the programs that share some: TILES tiles at least, so few keys keep few programs busy."""
    return tl.maximum(tl.cdiv(tl.cdiv(keys, N), splits), TILES) * N


@triton.jit(**FREE)
@no_type_check
def _decode_shared(
    q, k_cache, v_cache, part, stat, member, keys, start, length, seat, pages, wide, window, splits, scale,
    Q: tl.constexpr, KV: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    W: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TILES: tl.constexpr,
    WINDOW: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = Q // KV
    group, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    total = tl.load(keys + group)
    share = _share(total, N, splits, TILES)
    first = split * share
    if first < total:
        i, d = tl.arange(0, M), tl.arange(0, D)
        r = tl.load(member + group * W + i // G, mask=i < W * G, other=-1).to(tl.int32)
        taken = r >= 0
        table = pages + tl.load(seat + tl.max(r, 0)).to(tl.int64) * wide  # any member's pages begin alike
        head = kv_head * G + i % G
        token = tl.load(start + r, mask=taken, other=0).to(tl.int64)
        whole = taken[:, None] & (d < H)[None, :]
        x = tl.load(q + ((token * Q + head) * H)[:, None] + d[None, :], mask=whole, other=0.0)
        row = tl.load(length + r, mask=taken, other=0).to(tl.int32) - 1
        m = tl.full([M], LEAST, tl.float32)
        l = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, D], tl.float32)
        last = tl.minimum(first + share, total)
        begun = first
        if WINDOW:  # the first key that any member sees, rounded down to a tile
            begun = tl.maximum(first, (tl.min(tl.where(taken, row, 2**30), 0) - window + 1) // N * N)
        m, l, acc = _tiles(
            x, k_cache, v_cache, None, None, table, begun, last, row, window,
            kv_head, m, l, acc, scale, KV, H, D, PAGE, N, WINDOW, EXACT, MASKED=True, WHOLE=False, TMA=False,
        )  # fmt: skip
        at = (r.to(tl.int64) * Q + head) * splits + split
        tl.store(part + at[:, None] * H + d[None, :], acc, mask=whole)
        tl.store(stat + at * 2, m, mask=taken)
        tl.store(stat + at * 2 + 1, l, mask=taken)


@triton.jit
@no_type_check
def _keys(length, skip, r, window, N: tl.constexpr, WINDOW: tl.constexpr, SHARED: tl.constexpr):
    """The keys that a group has read for sequence r, the first that r itself reads, and the number of all."""
    total = tl.load(length + r)
    covered = total * 0
    if SHARED:
        covered = tl.load(skip + r).to(tl.int32)
    first = covered
    if WINDOW:  # the first that its last token may see, rounded down to a tile
        first = tl.maximum(covered, (total - window) // N * N)
    return covered, first, total


@triton.jit
@no_type_check
def _join(m, l, acc, part, stat, at, count, seen, H: tl.constexpr, D: tl.constexpr):
    """The running maximum, sum and output of rows, and of `count` other shares of their keys, from `at` on."""
    d = tl.arange(0, D)
    for i in tl.range(0, count, loop_unroll_factor=4):  # all are asked for before the first is needed
        # Past the first cache: other processors have written this.
        top = tl.load(stat + (at + i) * 2, mask=seen, other=LEAST, cache_modifier=".cg")
        both = tl.maximum(m, top)
        shrink, weight = tl.exp2(m - both), tl.exp2(top - both)
        l = l * shrink + tl.load(stat + (at + i) * 2 + 1, mask=seen, other=0.0, cache_modifier=".cg") * weight
        inside = seen[:, None] & (d < H)[None, :]
        more = tl.load(part + (at + i)[:, None] * H + d[None, :], mask=inside, other=0.0, cache_modifier=".cg")
        acc = acc * shrink[:, None] + more * weight[:, None]
        m = both
    return m, l, acc


@triton.jit
@no_type_check
def _turned(x, inside, d, c, s, H: tl.constexpr):
    """Heads at x [..., H], rotated by cosines c and sines s of every dimension d, in their own dtype."""
    half: tl.constexpr = H // 2
    a = tl.load(x + d, mask=inside, other=0.0)
    b = tl.load(x + tl.where(d < half, d + half, d - half), mask=inside, other=0.0)
    return (a.to(tl.float32) * c + b.to(tl.float32) * tl.where(d < half, -s, s)).to(a.dtype)


@triton.jit(**FREE)
@no_type_check
def _decode(
    q, k_cache, v_cache, out, part, stat, done, skip, shared_part, shared_stat, cos, sin, slot, start, length, seat,
    pages, wide, window, splits, shares, scale, Q: tl.constexpr, KV: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    PAGE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr, FRESH: tl.constexpr,
    SHARED: tl.constexpr, TILES: tl.constexpr, WINDOW: tl.constexpr, EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`done`: 0 for each sequence and kv head, before and after. FRESH: q is [T, Q + 2 KV, H], see `Fresh`."""
    G: tl.constexpr = Q // KV
    r, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = tl.load(start + r)
    if tl.load(start + r + 1) - token == 1:
        covered, begun, total = _keys(length, skip, r, window, N, WINDOW, SHARED)
        share = _share(total - begun, N, splits, 1 if FRESH else 2)  # of one tile, all is on its way at once
        first = begun + split * share
        last = tl.minimum(first + share, total)
        if first < last:
            g, d = tl.arange(0, M), tl.arange(0, D)
            head = kv_head * G + g
            offset = (token.to(tl.int64) * Q + head) * H
            taken = g < G
            whole = taken[:, None] & (d < H)[None, :]
            row = total - 1 + g * 0
            m = tl.full([M], LEAST, tl.float32)
            l = tl.zeros([M], tl.float32)
            acc = tl.zeros([M, D], tl.float32)
            table = pages + tl.load(seat + r).to(tl.int64) * wide
            if FRESH:
                newest = last == total  # this share's last key is the new one
                last -= newest.to(tl.int32)
                # What the cache holds was there long before: it is on its way while the kernel before still runs.
                k, v = _tile(k_cache, v_cache, table, first, last, kv_head, KV, H, D, PAGE, N, WHOLE=False)
                begin(PDL)
                half: tl.constexpr = H // 2
                turn, inside = token.to(tl.int64) * half + d % half, d < H
                c, s = tl.load(cos + turn, mask=inside, other=0.0), tl.load(sin + turn, mask=inside, other=0.0)
                row_at = q + token.to(tl.int64) * ((Q + 2 * KV) * H)
                x = _turned(row_at + (head * H)[:, None], whole, d[None, :], c[None, :], s[None, :], H)
                new = _turned(row_at + (Q + kv_head) * H, inside, d, c, s, H)
                value = tl.load(row_at + (Q + KV + kv_head) * H + d, mask=inside, other=0.0)
                if newest:
                    to = (tl.load(slot + token).to(tl.int64) * KV + kv_head) * H + d
                    tl.store(k_cache + to, new, mask=inside)
                    tl.store(v_cache + to, value, mask=inside)
                    m = tl.sum(x.to(tl.float32) * new.to(tl.float32)[None, :], 1) * scale
                    l += 1.0
                    acc += value.to(tl.float32)[None, :]
                m, l, acc = _weigh(
                    x, k, v, first, last, row, window, m, l, acc, scale, N, WINDOW, EXACT, MASKED=True, WHOLE=False,
                )  # fmt: skip
                first += N
            else:
                begin(PDL)
                x = tl.load(q + offset[:, None] + d[None, :], mask=whole, other=0.0)
            if SHARED:  # the first split goes on from what the group has found
                found = tl.where(split == 0, tl.cdiv(covered, _share(covered, N, shares, TILES)), 0)
                at = (r.to(tl.int64) * Q + head) * shares
                m, l, acc = _join(m, l, acc, shared_part, shared_stat, at, found, taken, H, D)
            m, l, acc = _tiles(
                x, k_cache, v_cache, None, None, table, first, last, row, window,
                kv_head, m, l, acc, scale, KV, H, D, PAGE, N, WINDOW, EXACT, MASKED=True, WHOLE=False, TMA=False,
            )  # fmt: skip
            if WHOLE:
                tl.store(out + offset[:, None] + d[None, :], (acc / l[:, None]).to(out.dtype.element_ty), mask=whole)
            else:
                used, ended = tl.cdiv(total - begun, share), done + r * KV + kv_head
                ends = used == 1
                at = (r.to(tl.int64) * Q + head) * splits
                if used > 1:
                    tl.store(part + (at + split)[:, None] * H + d[None, :], acc, mask=whole)
                    tl.store(stat + (at + split) * 2, m, mask=taken)
                    tl.store(stat + (at + split) * 2 + 1, l, mask=taken)
                    tl.debug_barrier()  # all of it is there before this program is said to be done
                    ends = tl.atomic_add(ended, 1, sem="acq_rel") == used - 1
                    if ends:
                        tl.store(ended, 0)
                        m = tl.full([M], LEAST, tl.float32)
                        l = tl.zeros([M], tl.float32)
                        acc = tl.zeros([M, D], tl.float32)
                        m, l, acc = _join(m, l, acc, part, stat, at, used, taken, H, D)
                if ends:
                    mean = (acc / tl.where(taken, l, 1.0)[:, None]).to(out.dtype.element_ty)
                    tl.store(out + offset[:, None] + d[None, :], mean, mask=whole)


def _blocks(batch: Batch, size: int, blocks: int, longer: int) -> Tensor:
    """[blocks, 5]: of each `size` tokens of the sequences longer than `longer`: the first token, how many, the first
    one's position, the sequence's seat and its keys. No tokens beyond.
    """
    count = batch.start.diff()
    ends = torch.where(count > longer, (count + size - 1) // size, 0).cumsum(0)
    block = torch.arange(blocks, device=count.device)
    row = torch.searchsorted(ends, block, right=True).clamp_max(len(count) - 1)
    first = (block - torch.where(row > 0, ends[row - 1], 0)) * size
    tokens = torch.where(block < ends[-1], (count[row] - first).clamp_max(size), 0)
    total = batch.length[row]
    of = (batch.start[row] + first, tokens, total - count[row] + first, batch.seat[row], total)
    return torch.stack(of, 1).to(torch.int32)


def _descriptor(cache: Tensor, n: int) -> TensorDescriptor:
    """Blocks of n slots and a head, as Hopper's copy engine reads them."""
    slots, kv_heads, head = cache.shape
    return TensorDescriptor(cache, [slots, kv_heads * head], [kv_heads * head, 1], [n, head])


def _partial(q: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Outputs, and maxima with sums, of n rows' heads over a share of their keys."""
    heads = n * q.shape[1]
    return q.new_empty((heads, q.shape[2]), dtype=torch.float32), q.new_empty((heads, 2), dtype=torch.float32)


def paged(batch: Batch, spec: Spec, *, fixed: bool = False) -> Attend:
    """The Triton backend: shapes alone decide what is launched, so nothing is read on the host.

    As many sequences as tokens are taken to have one each. A group of `batch.share` leaves every member keys of its
    own, the last token's at least.

    `fixed`: a token's sums have the same order in every batch. All tokens are then prefill's, of one tile, and
    `batch.share` is not looked at.
    """
    tokens, rows, wide, page = len(batch.token), len(batch.length), batch.pages.shape[1], batch.page_size
    decode = tokens == rows
    group = spec.q_heads // spec.kv_heads
    device = batch.token.device
    processors, roomy = 4, False
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        processors, roomy = properties.multi_processor_count, properties.shared_memory_per_block_optin > 200_000

    def programs(each: int, keys: int, most: int, *, waves: int) -> int:
        """Shares of some keys: as many as keep every processor busy, but none of fewer than `keys` keys."""
        wanted = triton.cdiv(waves * processors, max(1, each * spec.kv_heads))
        return triton.next_power_of_2(max(1, min(wanted, triton.cdiv(wide * page, keys), most)))

    splits = programs(rows, 256, 64, waves=4)
    share = batch.share
    shares = programs(len(share.keys), SHARED["TILES"] * SHARED["N"], 16, waves=2) if share is not None else 0
    launch = hopper.dependent(batch.token)
    todo, done = list[Tensor](), list[Tensor]()  # the same for all layers

    def attend(q: Tensor | Fresh, k_cache: Tensor, v_cache: Tensor, window: int | None) -> Tensor:
        fresh, q = (q, q.qkv) if isinstance(q, Fresh) else (None, q)
        assert fresh is None or (decode and not fixed and share is None), "made for steps that only decode"
        q = q.contiguous()
        out = q.new_empty(tokens, spec.q_heads, spec.head)
        exact = q.dtype == torch.float32
        sizes = {
            "Q": spec.q_heads, "KV": spec.kv_heads, "H": spec.head, "D": max(16, triton.next_power_of_2(spec.head)),
            "PAGE": page, "WINDOW": window is not None, "EXACT": exact,
        }  # fmt: skip
        scale = spec.head**-0.5 * LOG2E
        end = (batch.pages, wide, window or 0)
        common = (batch.start, batch.length, batch.seat, *end)
        if fixed or not decode:
            whole = TMA and sizes["D"] == spec.head and page % PREFILL["N"] == 0
            many = tokens >= 2048 * rows and page % LONG["N"] == 0
            tile = SMALL if exact or not roomy else LONG if (many or not whole) and not fixed else PREFILL
            size = tile["M"] // group
            if not todo:
                todo.append(_blocks(batch, size, tokens // size + rows, 0 if fixed else 1))
            tma = whole and (tile is not SMALL or device.type == "cpu")  # older GPUs have none
            tiles = (_descriptor(x, tile["N"]) for x in (k_cache, v_cache)) if tma else (None, None)
            _prefill[(len(todo[0]), spec.kv_heads)](
                q, k_cache, v_cache, *tiles, out, todo[0], *end, scale, **sizes, TMA=tma, **tile
            )
        if fixed:
            return out

        found, skip = (q, q), batch.length  # not read
        if share is not None:
            found, skip = _partial(q, rows * shares), share.skip
            width = share.member.shape[1]
            packed = max(16, triton.next_power_of_2(width * group))
            _decode_shared[(len(share.keys), spec.kv_heads, shares)](
                q, k_cache, v_cache, *found, share.member, share.keys, *common, shares, scale, **sizes, W=width,
                M=packed, num_stages=3 if roomy and not exact else 2, **SHARED,
            )  # fmt: skip
        packed = max(16, triton.next_power_of_2(group))
        part = (q, q)
        if splits > 1:
            part = _partial(out, rows * splits)
            if not done:
                done.append(torch.zeros(rows * spec.kv_heads, dtype=torch.int32, device=device))
        tile = OWN if share is not None else NARROW if spec.head <= 64 and fresh is None else DECODE
        new = (q, q, q) if fresh is None else (fresh.cos.contiguous(), fresh.sin.contiguous(), fresh.slot)
        _decode[(rows, spec.kv_heads, splits)](
            q, k_cache, v_cache, out, *part, *(done or [q]), skip, *found, *new, *common, splits, shares, scale,
            **sizes, M=packed, WHOLE=splits == 1, FRESH=fresh is not None, SHARED=share is not None,
            TILES=SHARED["TILES"], **launch, **tile,
        )  # fmt: skip
        return out

    return attend
