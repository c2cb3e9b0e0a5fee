"""Kernels in Triton for what surrounds the matrices: keys into their slots, and a token drawn in one pass."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
from collections.abc import Callable
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastgen.config import MIN_TEMPERATURE
from fastgen.kernels import pdl
from fastgen.kernels.pdl import grid_dependency_sync

HEADS_PER_PROGRAM = 16  # of a program of `store`
VOCAB_CHUNK = 1024  # tokens of the vocabulary that a program of `draw` looks at together
TARGET_PROGRAMS = 4 * 132  # of `draw` where rows are few: their vocabulary is shared out
BATCH_INVARIANT_SPLITS = 16  # of those for each row, where the sum must not depend on how many rows there are
UNALIGNED_ARGS = [
    "temperature",
    "seed",
    "position",
    "processed",
    "last_token_ids",
    "req_idx",
]  # parts of one buffer: aligned by chance
MIN_SAMPLING_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)  # of a row that is not greedy
EMPTY_MAX = tl.constexpr(-1.0e30)  # a maximum of none: finite, so that its difference from -inf is


@triton.jit(do_not_specialize_on_alignment=["slot"])  # or each would be compiled for those that are and are not
@no_type_check  # pointers, numbers and constants, in Triton's own language
def _rope_and_cache_kv_kernel(
    qkv, cos, sin, slot, k_cache, v_cache, out,
    Q: tl.constexpr, KV: tl.constexpr, H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = H // 2
    t, g, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, D)
    narrow = d < half
    inside = (g < Q + 2 * KV)[:, None] & narrow[None, :]
    grid_dependency_sync(PDL)
    at = (t * (Q + 2 * KV) + g)[:, None] * H + d[None, :]
    low, high = tl.load(qkv + at, mask=inside), tl.load(qkv + at + half, mask=inside)
    c = tl.load(cos + t * half + d, mask=narrow)[None, :]
    s = tl.load(sin + t * half + d, mask=narrow)[None, :]
    a, b = low.to(tl.float32), high.to(tl.float32)
    x, y = (a * c - b * s).to(low.dtype), (b * c + a * s).to(low.dtype)
    to = out + (t * Q + g)[:, None] * H + d[None, :]
    mine = inside & (g < Q)[:, None]
    tl.store(to, x, mask=mine)
    tl.store(to + half, y, mask=mine)
    place = tl.load(slot + t).to(tl.int64) * KV
    to = k_cache + (place + g - Q)[:, None] * H + d[None, :]
    mine = inside & ((g >= Q) & (g < Q + KV))[:, None]
    tl.store(to, x, mask=mine)
    tl.store(to + half, y, mask=mine)
    to = v_cache + (place + g - Q - KV)[:, None] * H + d[None, :]
    mine = inside & (g >= Q + KV)[:, None]
    tl.store(to, low, mask=mine)
    tl.store(to + half, high, mask=mine)


def rope_and_cache_kv(
    qkv: Float[Tensor, "T Q2K H"], cos: Float[Tensor, "T 1 half"], sin: Float[Tensor, "T 1 half"],
    slot: Int[Tensor, " T"], k_cache: Float[Tensor, "S K H"], v_cache: Float[Tensor, "S K H"],
) -> Float[Tensor, "T Q H"]:  # fmt: skip
    """Rotated queries; rotated keys, and values, are written into the caches at `slot`. As `layers.rotate`, bitwise.

    qkv [T, Q + 2 K, H]: query heads, key heads, value heads; cos and sin fp32.
    """
    tokens, heads, head = qkv.shape
    kv = k_cache.shape[1]
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("the caches must be contiguous: they are written in place")
    out = qkv.new_empty(tokens, heads - 2 * kv, head)
    _rope_and_cache_kv_kernel[(tokens, triton.cdiv(heads, HEADS_PER_PROGRAM))](
        qkv.contiguous(), cos.contiguous(), sin.contiguous(), slot, k_cache, v_cache, out,
        Q=heads - 2 * kv, KV=kv, H=head, D=triton.next_power_of_2(head // 2), HEADS=HEADS_PER_PROGRAM, num_warps=4,
        **pdl.pdl_launch_options(qkv),
        enable_fp_fusion=False,  # a product and a sum each rounded, as torch does
    )  # fmt: skip
    return out


@triton.jit
@no_type_check
def _mix(x):
    """`sampling._mix` in 32 bits."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
@no_type_check
def _log_exponential_noise(token, key0, key1):
    """log(E) of `sampling.exponential`'s noise E = -log1p(-u). Kahan's log1p: log(w) * u / (1 - w) of w = 1 - u."""
    x = _mix(_mix(token.to(tl.uint32) ^ key0) ^ key1)
    u = tl.minimum((x.to(tl.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    w = 1.0 - u
    lost = 1.0 - w  # exactly: what of u the rounding of w has left
    e = tl.where(lost > 0.0, -tl.log(w) * (u / tl.where(lost > 0.0, lost, 1.0)), u)
    return tl.log(e)


@triton.jit
@no_type_check
def _gumbel_max_of_range(
    logits, start, end, temperature, processed, key0, key1, vocab_size, vocab_start, B: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """Of the tokens [first, last): each lane's best score and its token; the maximum, and the sum of exponentials.

    `base` is the token of the first logit."""
    lane = tl.arange(0, B)
    best = tl.full([B], float("-inf"), tl.float32)
    index = start + lane
    m = tl.full([B], EMPTY_MAX, tl.float32)
    l = tl.zeros([B], tl.float32)
    for at in tl.range(start, end, B):
        token = at + lane
        x = tl.load(logits + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
        score = x
        if NOISE:
            score = tl.div_rn(x, temperature)
        v = tl.where(processed, score, x)
        if NOISE:
            score = score - _log_exponential_noise(vocab_start + token, key0, key1)
        better = score > best  # of equals the first
        best = tl.where(better, score, best)
        index = tl.where(better, token, index)
        # One of the two exponentials of the running sum is of 0. A maximum leaves NaN out, a difference does not.
        e = tl.exp(-tl.abs(m - v))
        l = tl.where(v > m, l * e + 1.0, l + e)
        m = tl.maximum(m, v)
    return best, index, m, l


@triton.jit(
    do_not_specialize=["chunks_per_split", "num_splits", "vocab_start"], do_not_specialize_on_alignment=UNALIGNED_ARGS
)
@no_type_check
def _sample_splits_kernel(
    logits, temperature, seed, position, processed, split_stats, row_stride, vocab_size, vocab_start, chunks_per_split, num_splits, B: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0), tl.program_id(1)
    first = split * chunks_per_split * B
    last = tl.minimum(first + chunks_per_split * B, vocab_size)
    at = logits + row.to(tl.int64) * row_stride
    heat = tl.load(temperature + row)
    heat = tl.where(heat < MIN_SAMPLING_TEMPERATURE, 0.0, heat)
    scale = tl.load(processed + row) != 0
    s, p = tl.load(seed + row).to(tl.int64), tl.load(position + row).to(tl.uint32)
    low, high = _mix(s.to(tl.uint32)), _mix((s >> 32).to(tl.uint32))
    key = _mix(low ^ _mix(high + p))
    other = _mix((low + p * 0x9E3779B9) ^ high)
    if heat == 0:
        best, index, m, l = _gumbel_max_of_range(
            at, first, last, heat, scale, key, other, vocab_size, vocab_start, B, NOISE=False
        )
    else:
        best, index, m, l = _gumbel_max_of_range(
            at, first, last, heat, scale, key, other, vocab_size, vocab_start, B, NOISE=True
        )
    most = tl.max(best, 0)
    peak = tl.max(m, 0)
    choice = tl.min(tl.where(best == most, index, vocab_size), 0)
    # A row of no numbers has no best, and a rank may have no tokens: nothing beyond the row is read.
    x = tl.load(at + tl.maximum(tl.minimum(choice, vocab_size - 1), 0)).to(tl.float32)
    x = tl.where(scale & (heat != 0), tl.div_rn(x, tl.where(heat == 0, 1.0, heat)), x)
    field = tl.num_programs(0) * num_splits
    to = split_stats + row * num_splits + split
    tl.store(to, most)
    tl.store(to + field, (vocab_start + choice).to(tl.float32))  # exact below 2^24
    tl.store(to + 2 * field, x)
    tl.store(to + 3 * field, peak)
    tl.store(to + 4 * field, tl.sum(l * tl.exp(m - peak), 0))


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=UNALIGNED_ARGS)
@no_type_check
def _merge_sample_splits_kernel(
    split_stats, sampled_token, logprob, last_token_ids, req_idx, vocab_size, num_splits, NUM_RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, s = tl.program_id(0), tl.arange(0, BLOCK)
    field, live = tl.num_programs(0) * num_splits, s < NUM_RANKS * num_splits
    at = split_stats + (s // num_splits) * 5 * field + row * num_splits + s % num_splits
    best = tl.load(at, mask=live, other=float("-inf"))
    index = tl.load(at + field, mask=live, other=vocab_size)
    x = tl.load(at + 2 * field, mask=live, other=float("-inf"))
    m = tl.load(at + 3 * field, mask=live, other=EMPTY_MAX)
    l = tl.load(at + 4 * field, mask=live, other=0.0)
    choice = tl.min(tl.where(best == tl.max(best, 0), index, vocab_size), 0)
    value = tl.max(tl.where(live & (index == choice), x, float("-inf")), 0)
    token = tl.minimum(choice.to(tl.int32), vocab_size - 1)
    peak = tl.max(m, 0)
    tl.store(sampled_token + row, token)
    tl.store(last_token_ids + tl.load(req_idx + row), token)
    tl.store(logprob + row, (value - peak) - tl.log(tl.sum(l * tl.exp(m - peak), 0)))


def sample_tokens(
    logits: Float[Tensor, "N W"], temperature: Float[Tensor, " N"], seed: Int[Tensor, " N"],
    position: Int[Tensor, " N"], processed: Bool[Tensor, " N"] | Int[Tensor, " N"],
    last_token_ids: Int[Tensor, " E"], req_idx: Int[Tensor, " N"], *, batch_invariant: bool = False,
    vocab_size: int | None = None, vocab_shard: tuple[int, int] | None = None, all_gather: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:  # fmt: skip
    """A token for each row (int32) and its natural-log probability (fp32): `sampling.sample` without filters or edits.
    The tokens are also written to `last` (int32) at `seat`.

    The probability is the model's, or of logits / temperature where `processed`, and NaN where a logit is NaN or inf.
    The token does not depend on how the vocabulary is shared out; the probability does, by rounding, unless that is
    `fixed`.

    Over ranks, these are the logits of a `part` of the `vocab`: its first token and how many there are, at most W on
    each rank. What each has found, a few numbers a row, is put together by `gather`, [...] -> [ranks, ...].
    """
    rows, width = logits.shape
    first, count = vocab_shard or (0, width)
    logits = logits.contiguous()
    chunks = triton.cdiv(width, VOCAB_CHUNK)
    splits, share = _vocab_splits(rows, chunks, batch_invariant)
    token, logprob = (torch.empty(rows, dtype=kind, device=logits.device) for kind in (torch.int32, torch.float32))
    # Of each row and split: the best score, whose token and logit, the maximum, the sum of exponentials.
    parts = torch.empty(5, rows, splits, dtype=torch.float32, device=logits.device)
    _sample_splits_kernel[(rows, splits)](
        logits, temperature, seed, position, processed, parts, width, count, first, share, splits, B=VOCAB_CHUNK, num_warps=4,
    )  # fmt: skip
    found = parts[None] if all_gather is None else all_gather(parts)
    ranks = len(found)
    _merge_sample_splits_kernel[(rows,)](
        found, token, logprob, last_token_ids, req_idx, vocab_size or width, splits,
        NUM_RANKS=ranks, BLOCK=triton.next_power_of_2(ranks * min(TARGET_PROGRAMS, chunks)), num_warps=1,
    )  # fmt: skip
    return token, logprob


def _vocab_splits(num_rows: int, num_chunks: int, batch_invariant: bool) -> tuple[int, int]:
    """Programs that share a row, and chunks of each."""
    splits = triton.next_power_of_2(
        max(1, min(BATCH_INVARIANT_SPLITS if batch_invariant else TARGET_PROGRAMS // max(1, num_rows), num_chunks))
    )
    return splits, triton.cdiv(num_chunks, splits)


@triton.jit(do_not_specialize=["num_splits"])
@no_type_check
def _token_logprobs_kernel(
    logits, token, split_max, split_sum_exp, logprob, vocab_size, num_splits, num_candidates, BLOCK: tl.constexpr
):
    row, s = tl.program_id(0), tl.arange(0, BLOCK)
    at, live = row * num_splits + s, s < num_splits
    m = tl.load(split_max + at, mask=live, other=EMPTY_MAX)
    l = tl.load(split_sum_exp + at, mask=live, other=0.0)
    to = row * num_candidates + tl.program_id(1)
    x = tl.load(logits + row.to(tl.int64) * vocab_size + tl.load(token + to)).to(tl.float32)
    peak = tl.max(m, 0)
    tl.store(logprob + to, (x - peak) - tl.log(tl.sum(l * tl.exp(m - peak), 0)))


def logprobs(
    logits: Float[Tensor, "N V"], token: Int[Tensor, " N"], num_top_logprobs: int
) -> tuple[Float[Tensor, " N"], Int[Tensor, "N k"], Float[Tensor, "N k"]]:
    """As `sampling.logprobs`; for a token that `draw` with `fixed` drew, its logprob bit for bit."""
    (rows, vocab), device = logits.shape, logits.device
    logits, chunks = logits.contiguous(), triton.cdiv(vocab, VOCAB_CHUNK)
    splits, share = _vocab_splits(rows, chunks, batch_invariant=True)
    best = logits.topk(min(num_top_logprobs, vocab), -1).indices
    tokens = torch.cat((token[:, None].long(), best), 1).contiguous()
    value = torch.empty(tokens.shape, dtype=torch.float32, device=device)
    parts = torch.empty(5, rows, splits, dtype=torch.float32, device=device)
    none = torch.zeros(rows, dtype=torch.int64, device=device)
    if rows:
        _sample_splits_kernel[(rows, splits)](
            logits, none.float(), none, none.int(), none.int(), parts, vocab, vocab, 0, share, splits,
            B=VOCAB_CHUNK, num_warps=4,
        )  # fmt: skip
        _token_logprobs_kernel[tokens.shape](
            logits, tokens, parts[3], parts[4], value, vocab, splits, tokens.shape[1],
            BLOCK=triton.next_power_of_2(min(TARGET_PROGRAMS, chunks)), num_warps=1,
        )  # fmt: skip
    return value[:, 0], best, value[:, 1:]
