"""Attention over pages in Triton: the backend for GPUs. Reads the metadata on the device, so it can be captured.

Two kernels over flash attention's online softmax (arXiv 2205.14135), both with the query heads of a kv head packed
into one tile, so that keys are read once for all of them:

    prefill   a program for BLOCK_Q tokens of a sequence and a kv head; keys beyond the last visible one are skipped
    decode    a program for a sequence, a kv head and a share of its keys; `merge` joins the shares (flash decoding)

Sequences of one token are decode's, longer ones prefill's; each kernel passes over the other's.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.models.spec import Spec
from fastgen.ops import hopper
from fastgen.ops.attention import PAGE, Attend
from fastgen.ops.hopper import begin
from fastgen.types import Batch

LOG2E = 1.4426950408889634
NOTHING = tl.constexpr(-1.0e30)  # a score that no key has: finite, so that a row which has seen none stays finite
# Tiles of M query rows and N keys: the fastest of those tried on an H200, at 1k to 32k tokens.
PREFILL = {"M": 128, "N": 128, "num_warps": 8, "num_stages": 3}
SMALL = {"M": 64, "N": 64, "num_warps": 4, "num_stages": 2}  # where shared memory is less than Hopper's, and in fp32
DECODE = {"N": 64, "num_warps": 4, "num_stages": 3}


@triton.jit
@no_type_check  # pointers, numbers and constants, in Triton's own language
def _tiles(
    q, k_cache, v_cache, pages, first, last, row, window, kv_head, m, l, acc, scale,
    KV: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, N: tl.constexpr,
    WINDOW: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys [first, last), N at a time, for the query rows at positions `row`: the running maximum m, sum l and output
    acc after them. Unmasked, every row sees all of them and their number is a multiple of N.
    """
    d = tl.arange(0, D)
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    for at in tl.range(first, last, N):
        n = at + tl.arange(0, N)
        if MASKED:
            page = tl.load(pages + n // PAGE, mask=n < last, other=0)
        else:
            page = tl.load(pages + n // PAGE)
        slot = ((page.to(tl.int64) * PAGE + n % PAGE) * KV + kv_head) * H
        if MASKED or D != H:
            inside = (n < last)[:, None] & (d < H)[None, :]
            k = tl.load(k_cache + slot[:, None] + d[None, :], mask=inside, other=0.0)
            v = tl.load(v_cache + slot[:, None] + d[None, :], mask=inside, other=0.0)
        else:
            k = tl.load(k_cache + slot[:, None] + d[None, :])
            v = tl.load(v_cache + slot[:, None] + d[None, :])
        s = tl.dot(q, tl.trans(k), input_precision=precision) * scale
        if MASKED:
            seen = (n < last)[None, :] & (n[None, :] <= row[:, None])
            if WINDOW:
                seen = seen & (n[None, :] > row[:, None] - window)
            s = tl.where(seen, s, NOTHING)
        top = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - top[:, None])
        if MASKED:
            p = tl.where(seen, p, 0.0)
        shrink = tl.exp2(m - top)
        l = l * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=precision)
        m = top
    return m, l, acc


@triton.jit(do_not_specialize=["wide", "window"])  # each value of theirs would be compiled anew
@no_type_check
def _prefill(
    q, k_cache, v_cache, out, start, length, seat, pages, wide, window, scale, todo,
    Q: tl.constexpr, KV: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = Q // KV
    BLOCK_Q: tl.constexpr = M // G
    # The last blocks first: a prompt's last blocks are its longest, so that none is left over at the end.
    block, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    low, t0 = tl.load(todo + 2 * block), tl.load(todo + 2 * block + 1)
    if low >= 0:
        begin = tl.load(start + low)
        count = tl.load(start + low + 1) - begin
        table = pages + tl.load(seat + low).to(tl.int64) * wide
        r, d = tl.arange(0, M), tl.arange(0, D)
        t = t0 + r // G
        inside = (r < BLOCK_Q * G) & (t < count)
        offset = ((begin + t).to(tl.int64) * Q + kv_head * G + r % G) * H
        whole = inside[:, None] & (d < H)[None, :]
        x = tl.load(q + offset[:, None] + d[None, :], mask=whole, other=0.0)
        context = tl.load(length + low) - count
        row = context + t
        last = context + tl.minimum(t0 + BLOCK_Q, count)
        first = context * 0
        if WINDOW:
            first = tl.maximum(context + t0 - window + 1, 0) // N * N
        m = tl.full([M], NOTHING, tl.float32)
        l = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, D], tl.float32)
        if not WINDOW:  # the keys that even the first row sees
            whole_tiles = (context + t0 + 1) // N * N
            m, l, acc = _tiles(
                x, k_cache, v_cache, table, first, whole_tiles, row, window, kv_head, m, l, acc, scale,
                KV, H, D, PAGE, N, WINDOW, EXACT, MASKED=False,
            )  # fmt: skip
            first = whole_tiles
        m, l, acc = _tiles(
            x, k_cache, v_cache, table, first, last, row, window, kv_head, m, l, acc, scale,
            KV, H, D, PAGE, N, WINDOW, EXACT, MASKED=True,
        )  # fmt: skip
        mean = acc / tl.where(l > 0, l, 1.0)[:, None]  # a row beyond the last may have seen none
        tl.store(out + offset[:, None] + d[None, :], mean.to(out.dtype.element_ty), mask=whole)


@triton.jit
@no_type_check
def _keys(length, r, window, N: tl.constexpr, WINDOW: tl.constexpr):
    """The first key that the last token of sequence r may see, rounded down to a tile, and the number of keys."""
    total = tl.load(length + r)
    first = total * 0
    if WINDOW:
        first = tl.maximum(total - window, 0) // N * N
    return first, total


@triton.jit
@no_type_check
def _share(keys, N: tl.constexpr, SPLITS: tl.constexpr):
    """Keys of each of the programs that share a sequence: two tiles at least, so few keys keep few programs busy."""
    return tl.maximum(tl.cdiv(tl.cdiv(keys, N), SPLITS), 2) * N


@triton.jit(do_not_specialize=["wide", "window"])  # each value of theirs would be compiled anew
@no_type_check
def _decode(
    q, k_cache, v_cache, out, part, stat, start, length, seat, pages, wide, window, scale,
    Q: tl.constexpr, KV: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr, EXACT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = Q // KV
    r, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = tl.load(start + r)
    if tl.load(start + r + 1) - token == 1:
        begun, total = _keys(length, r, window, N, WINDOW)
        share = _share(total - begun, N, SPLITS)
        first = begun + split * share
        last = tl.minimum(first + share, total)
        if first < last:
            g, d = tl.arange(0, M), tl.arange(0, D)
            head = kv_head * G + g
            offset = (token.to(tl.int64) * Q + head) * H
            whole = (g < G)[:, None] & (d < H)[None, :]
            row = total - 1 + g * 0
            m = tl.full([M], NOTHING, tl.float32)
            l = tl.zeros([M], tl.float32)
            acc = tl.zeros([M, D], tl.float32)
            table = pages + tl.load(seat + r).to(tl.int64) * wide
            begin(PDL)
            x = tl.load(q + offset[:, None] + d[None, :], mask=whole, other=0.0)
            m, l, acc = _tiles(
                x, k_cache, v_cache, table, first, last, row, window, kv_head, m, l, acc, scale,
                KV, H, D, PAGE, N, WINDOW, EXACT, MASKED=True,
            )  # fmt: skip
            if SPLITS == 1:
                tl.store(out + offset[:, None] + d[None, :], (acc / l[:, None]).to(out.dtype.element_ty), mask=whole)
            else:
                at = (r * Q + head) * SPLITS + split
                tl.store(part + at[:, None].to(tl.int64) * H + d[None, :], acc, mask=whole)
                tl.store(stat + at * 2, m, mask=g < G)
                tl.store(stat + at * 2 + 1, l, mask=g < G)


@triton.jit(do_not_specialize=["window"])
@no_type_check
def _merge(
    out, part, stat, start, length, window, Q: tl.constexpr, H: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    SPLITS: tl.constexpr, WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    r, head = tl.program_id(0), tl.program_id(1)
    token = tl.load(start + r)
    if tl.load(start + r + 1) - token == 1:
        begun, total = _keys(length, r, window, N, WINDOW)
        s, d = tl.arange(0, SPLITS), tl.arange(0, D)
        live = s * _share(total - begun, N, SPLITS) < total - begun
        at = (r * Q + head) * SPLITS + s
        begin(PDL)
        m = tl.load(stat + at * 2, mask=live, other=NOTHING)
        l = tl.load(stat + at * 2 + 1, mask=live, other=0.0)
        weight = tl.exp2(m - tl.max(m, 0))
        whole = live[:, None] & (d < H)[None, :]
        acc = tl.load(part + at[:, None].to(tl.int64) * H + d[None, :], mask=whole, other=0.0)
        x = tl.sum(acc * weight[:, None], 0) / tl.sum(l * weight, 0)
        tl.store(out + (token.to(tl.int64) * Q + head) * H + d, x.to(out.dtype.element_ty), mask=d < H)


def _blocks(start: Tensor, size: int, blocks: int) -> Tensor:
    """[blocks, 2]: sequence and first token of each `size` tokens of the sequences longer than one; -1 beyond."""
    count = start.diff()
    ends = torch.where(count > 1, (count + size - 1) // size, 0).cumsum(0)
    block = torch.arange(blocks, device=start.device)
    row = torch.searchsorted(ends, block, right=True).clamp_max(len(count) - 1)
    first = torch.where(row > 0, ends[row - 1], 0)
    return torch.stack((torch.where(block < ends[-1], row, -1), (block - first) * size), 1).to(torch.int32)


def paged(batch: Batch, spec: Spec, page: int = PAGE) -> Attend:
    """The Triton backend: shapes alone decide what is launched, so nothing is read on the host.

    As many sequences as tokens are taken to have one each.
    """
    tokens, rows, wide = len(batch.token), len(batch.length), batch.pages.shape[1]
    decode = tokens == rows
    group = spec.q_heads // spec.kv_heads
    device = batch.token.device
    processors, roomy = 4, False
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        processors, roomy = properties.multi_processor_count, properties.shared_memory_per_block_optin > 200_000
    # As many shares as keep every processor busy, but none of fewer than 256 keys.
    wanted = triton.cdiv(4 * processors, max(1, rows * spec.kv_heads))
    # A power of two: each number is a kernel of its own.
    splits = triton.next_power_of_2(max(1, min(wanted, triton.cdiv(wide * page, 256), 64)))
    launch = hopper.dependent(batch.token)
    todo = list[Tensor]()

    def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None) -> Tensor:
        q = q.contiguous()
        out = torch.empty_like(q)
        exact = q.dtype == torch.float32
        sizes = {
            "Q": spec.q_heads, "KV": spec.kv_heads, "H": spec.head, "D": max(16, triton.next_power_of_2(spec.head)),
            "PAGE": page, "WINDOW": window is not None, "EXACT": exact,
        }  # fmt: skip
        scale = spec.head**-0.5 * LOG2E
        common = (batch.start, batch.length, batch.seat, batch.pages, wide, window or 0, scale)
        if not decode:
            tile = SMALL if exact or not roomy else PREFILL
            size = tile["M"] // group
            if not todo:  # the same for all layers
                todo.append(_blocks(batch.start, size, tokens // size + rows))
            _prefill[(len(todo[0]), spec.kv_heads)](q, k_cache, v_cache, out, *common, todo[0], **sizes, **tile)
        m = max(16, triton.next_power_of_2(group))
        part = stat = q
        if splits > 1:
            part = q.new_empty((rows * spec.q_heads * splits, spec.head), dtype=torch.float32)
            stat = q.new_empty((rows * spec.q_heads * splits, 2), dtype=torch.float32)
        _decode[(rows, spec.kv_heads, splits)](
            q, k_cache, v_cache, out, part, stat, *common, **sizes, M=m, SPLITS=splits, **DECODE,
            **launch,
        )  # fmt: skip
        if splits > 1:
            shape = {name: sizes[name] for name in ("Q", "H", "D", "WINDOW")} | {"N": DECODE["N"]}
            _merge[(rows, spec.q_heads)](
                out, part, stat, batch.start, batch.length, window or 0, **shape, SPLITS=splits, num_warps=2, **launch
            )
        return out

    return attend
