"""Sampling in one pass over the logits, without filters or edits, and logprobs of given tokens.

Each row's vocabulary is split over several programs, and a second kernel merges their statistics. Gumbel noise is keyed
by (seed, position, token), so that a sampled token depends on no split, batch or rank.
"""

# pyright: reportCallIssue=false
from collections.abc import Callable
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastgen.config import MIN_TEMPERATURE

VOCAB_CHUNK = 1024  # tokens that a program reads at once
TARGET_PROGRAMS = 4 * 132  # with fewer rows than this, each row is split over several programs
BATCH_INVARIANT_SPLITS = 16  # programs per row where the sum must not depend on the number of rows
# Tensors of a step start at any address in one buffer: they are aligned by chance.
UNALIGNED_ARGS = ["temperature", "seed", "position", "processed", "last_token_ids", "req_idx"]
MIN_SAMPLING_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)  # lower ones are greedy
EMPTY_MAX = tl.constexpr(-1.0e30)  # maximum of no logits: finite, so that its difference from -inf is no NaN


@triton.jit
@no_type_check
def _mix(x):
    """Mixes 32 bits: `sampling._lowbias32`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
@no_type_check
def _log_exponential_noise(token, key0, key1):
    """Returns log(E) of the noise E = -log1p(-u) of `sampling`, where -log(E) is Gumbel noise.

    Kahan's log1p: log(w) * u / (1 - w) with w = 1 - u.
    """
    x = _mix(_mix(token.to(tl.uint32) ^ key0) ^ key1)
    u = tl.minimum((x.to(tl.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    w = 1.0 - u
    rounded_u = 1.0 - w  # exact: u as the rounding of w has left it
    e = tl.where(rounded_u > 0.0, -tl.log(w) * (u / tl.where(rounded_u > 0.0, rounded_u, 1.0)), u)
    return tl.log(e)


@triton.jit
@no_type_check
def _gumbel_max(
    logits, start, end, temperature, processed, key0, key1, vocab_size, vocab_start,
    B: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """Reads the logits [start, end), B at a time. The first logit is token `vocab_start`.

    Returns, per lane, the best score and its index, the maximum logit and the sum of exponentials relative to it.
    NOISE: scores are logits / temperature plus Gumbel noise.
    """
    lane = tl.arange(0, B)
    best = tl.full([B], float("-inf"), tl.float32)
    best_index = start + lane
    m = tl.full([B], EMPTY_MAX, tl.float32)
    l = tl.zeros([B], tl.float32)
    for chunk in tl.range(start, end, B):
        index = chunk + lane
        x = tl.load(logits + index, mask=index < vocab_size, other=float("-inf")).to(tl.float32)
        score = x
        if NOISE:
            score = tl.div_rn(x, temperature)
        v = tl.where(processed, score, x)
        if NOISE:
            score = score - _log_exponential_noise(vocab_start + index, key0, key1)
        better = score > best  # the first of equal ones
        best = tl.where(better, score, best)
        best_index = tl.where(better, index, best_index)
        # One of the running sum's two exponentials is exp(0). Maxima drop NaN, differences keep it.
        e = tl.exp(-tl.abs(m - v))
        l = tl.where(v > m, l * e + 1.0, l + e)
        m = tl.maximum(m, v)
    return best, best_index, m, l


@triton.jit(
    do_not_specialize=["chunks_per_split", "num_splits", "vocab_start"], do_not_specialize_on_alignment=UNALIGNED_ARGS
)
@no_type_check
def _sample_splits_kernel(
    logits, temperature, seed, position, processed, split_stats, row_stride, vocab_size, vocab_start, chunks_per_split,
    num_splits, B: tl.constexpr,
):  # fmt: skip
    """Writes the statistics of one row's split to `split_stats` [5, rows, splits]: best score, its token and logit,
    maximum, sum of exponentials."""
    row, split = tl.program_id(0), tl.program_id(1)
    start = split * chunks_per_split * B
    end = tl.minimum(start + chunks_per_split * B, vocab_size)
    x = logits + row.to(tl.int64) * row_stride
    temp = tl.load(temperature + row)
    temp = tl.where(temp < MIN_SAMPLING_TEMPERATURE, 0.0, temp)
    scaled = tl.load(processed + row) != 0
    s, p = tl.load(seed + row).to(tl.int64), tl.load(position + row).to(tl.uint32)
    low, high = _mix(s.to(tl.uint32)), _mix((s >> 32).to(tl.uint32))
    key0 = _mix(low ^ _mix(high + p))
    key1 = _mix((low + p * 0x9E3779B9) ^ high)
    if temp == 0:
        best, index, m, l = _gumbel_max(x, start, end, temp, scaled, key0, key1, vocab_size, vocab_start, B, False)
    else:
        best, index, m, l = _gumbel_max(x, start, end, temp, scaled, key0, key1, vocab_size, vocab_start, B, True)
    best_score, peak = tl.max(best, 0), tl.max(m, 0)
    choice = tl.min(tl.where(best == best_score, index, vocab_size), 0)
    # Clamped into the row: a row of NaN has no best score, and a rank may have no tokens.
    logit = tl.load(x + tl.maximum(tl.minimum(choice, vocab_size - 1), 0)).to(tl.float32)
    logit = tl.where(scaled & (temp != 0), tl.div_rn(logit, tl.where(temp == 0, 1.0, temp)), logit)
    field = tl.num_programs(0) * num_splits
    stats = split_stats + row * num_splits + split
    tl.store(stats, best_score)
    tl.store(stats + field, (vocab_start + choice).to(tl.float32))  # exact below 2^24
    tl.store(stats + 2 * field, logit)
    tl.store(stats + 3 * field, peak)
    tl.store(stats + 4 * field, tl.sum(l * tl.exp(m - peak), 0))


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=UNALIGNED_ARGS)
@no_type_check
def _merge_sample_splits_kernel(
    split_stats, sampled_token, logprob, last_token_ids, req_idx, vocab_size, num_splits,
    NUM_RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merges the statistics of all ranks' splits of one row into its token and logprob."""
    row, s = tl.program_id(0), tl.arange(0, BLOCK)
    field, live = tl.num_programs(0) * num_splits, s < NUM_RANKS * num_splits
    stats = split_stats + (s // num_splits) * 5 * field + row * num_splits + s % num_splits
    best = tl.load(stats, mask=live, other=float("-inf"))
    index = tl.load(stats + field, mask=live, other=vocab_size)
    x = tl.load(stats + 2 * field, mask=live, other=float("-inf"))
    m = tl.load(stats + 3 * field, mask=live, other=EMPTY_MAX)
    l = tl.load(stats + 4 * field, mask=live, other=0.0)
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
    vocab_size: int | None = None, vocab_shard: tuple[int, int] | None = None,
    all_gather: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:  # fmt: skip
    """Samples a token for each row (int32) and returns it with its natural-log probability (fp32).

    As `sampling.sample` without filters or edits. The tokens are also written to `last_token_ids` (int32) at `req_idx`.
    The logprob is the model's, or that of logits / temperature where `processed`; it is NaN where a logit is NaN or
    inf. Its rounding depends on the number of rows, unless `batch_invariant`; the token never does.

    Over ranks, the logits are those of a `vocab_shard` (first token, number of tokens; at most W on each rank) of the
    `vocab_size` tokens. `all_gather` [...] -> [ranks, ...] exchanges a few numbers per row.
    """
    rows, width = logits.shape
    settings = temperature, seed, position, processed
    stats, block = _sample_splits(logits.contiguous(), settings, vocab_shard or (0, width), batch_invariant)
    token, logprob = (torch.empty(rows, dtype=dtype, device=logits.device) for dtype in (torch.int32, torch.float32))
    all_stats = stats[None] if all_gather is None else all_gather(stats)
    ranks = len(all_stats)
    _merge_sample_splits_kernel[(rows,)](
        all_stats, token, logprob, last_token_ids, req_idx, vocab_size or width, stats.shape[2],
        NUM_RANKS=ranks, BLOCK=triton.next_power_of_2(ranks * block), num_warps=1,
    )  # fmt: skip
    return token, logprob


def _sample_splits(
    logits: Tensor, settings: tuple[Tensor, ...], vocab_shard: tuple[int, int], batch_invariant: bool
) -> tuple[Float[Tensor, "5 N splits"], int]:
    """Returns the statistics of `_sample_splits_kernel`, and the most splits that a row may have.

    `settings`: temperature, seed, position and whether logprobs are processed, of each row.
    """
    (rows, width), (first, count) = logits.shape, vocab_shard
    num_chunks = triton.cdiv(width, VOCAB_CHUNK)
    target = BATCH_INVARIANT_SPLITS if batch_invariant else TARGET_PROGRAMS // max(1, rows)
    splits = triton.next_power_of_2(max(1, min(target, num_chunks)))
    stats, chunks_per_split = logits.new_empty(5, rows, splits, dtype=torch.float32), triton.cdiv(num_chunks, splits)
    _sample_splits_kernel[(rows, splits)](
        logits, *settings, stats, width, count, first, chunks_per_split, splits, B=VOCAB_CHUNK, num_warps=4
    )
    return stats, min(TARGET_PROGRAMS, num_chunks)


@triton.jit(do_not_specialize=["num_splits"])
@no_type_check
def _token_logprobs_kernel(
    logits, token, split_max, split_sum_exp, logprob, vocab_size, num_splits, num_candidates, BLOCK: tl.constexpr
):
    """Writes the logprob of one of a row's candidate tokens, from the statistics of the row's splits."""
    row, s = tl.program_id(0), tl.arange(0, BLOCK)
    stats, live = row * num_splits + s, s < num_splits
    m = tl.load(split_max + stats, mask=live, other=EMPTY_MAX)
    l = tl.load(split_sum_exp + stats, mask=live, other=0.0)
    candidate = row * num_candidates + tl.program_id(1)
    x = tl.load(logits + row.to(tl.int64) * vocab_size + tl.load(token + candidate)).to(tl.float32)
    peak = tl.max(m, 0)
    tl.store(logprob + candidate, (x - peak) - tl.log(tl.sum(l * tl.exp(m - peak), 0)))


def logprobs(
    logits: Float[Tensor, "N V"], token: Int[Tensor, " N"], num_top_logprobs: int
) -> tuple[Float[Tensor, " N"], Int[Tensor, "N k"], Float[Tensor, "N k"]]:
    """Returns the logprob of each row's token, and the k most likely tokens with theirs: `sampling.gather_logprobs`.

    Batch-invariant: bit for bit the logprob that `sample_tokens` with `batch_invariant` returns.
    """
    (rows, vocab), logits = logits.shape, logits.contiguous()
    top = logits.topk(min(num_top_logprobs, vocab), -1).indices
    candidates = torch.cat((token[:, None].long(), top), 1).contiguous()
    logprob = torch.empty(candidates.shape, dtype=torch.float32, device=logits.device)
    zeros = torch.zeros(rows, dtype=torch.int64, device=logits.device)
    if rows:
        greedy = zeros.float(), zeros, zeros.int(), zeros.int()
        stats, block = _sample_splits(logits, greedy, (0, vocab), batch_invariant=True)
        _token_logprobs_kernel[candidates.shape](
            logits, candidates, stats[3], stats[4], logprob, vocab, stats.shape[2], candidates.shape[1],
            BLOCK=triton.next_power_of_2(block), num_warps=1,
        )  # fmt: skip
    return logprob[:, 0], top, logprob[:, 1:]
