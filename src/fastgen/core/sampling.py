"""From logits to sampled tokens. `SequenceState.logit_edits` lists the tokens that penalties and biases change.

Each row depends on its own request only: the noise is a function of (seed, position, token), so a sampled token does
not change with the batch, the padding, the order of the rows, or the number of devices.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastgen.config import MIN_TEMPERATURE
from fastgen.core.types import LogitEdits, SamplerOutput, SamplingTensors, TopKTopP

UINT32_MASK = 0xFFFFFFFF
# Computes logprobs as `gather_logprobs` does.
LogprobsFn = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]


def _lowbias32(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Hashes 32-bit integers, held in int64, with the bijective `lowbias32` finalizer (C. Wellons, hash-prospector)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & UINT32_MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & UINT32_MASK
    return x ^ (x >> 16)


def exponential_noise(
    seed: Int[Tensor, " N"], position: Int[Tensor, " N"], num_tokens: int, vocab_start: int = 0
) -> Float[Tensor, "N V"]:
    """Returns fp32 exponential noise of rate 1 for `num_tokens` tokens from `vocab_start`, by (seed, position, token).

    -log1p(-u) with u = (x + 1/2) / 2^32 keeps the full relative precision of small values, which decide.
    """
    position = position.long()
    low, high = _lowbias32(seed & UINT32_MASK), _lowbias32((seed >> 32) & UINT32_MASK)
    key = _lowbias32(low ^ _lowbias32((high + position) & UINT32_MASK))
    key2 = _lowbias32((low + 0x9E3779B9 * (position & UINT32_MASK)) & UINT32_MASK ^ high)
    token = torch.arange(vocab_start, vocab_start + num_tokens, device=seed.device)
    x = _lowbias32(_lowbias32(token ^ key[:, None]) ^ key2[:, None])
    return -torch.log1p(-((x.float() + 0.5) * 2.0**-32).clamp_(max=1 - 2**-24))


def apply_penalties(logits: Float[Tensor, "N V"], edits: LogitEdits) -> Float[Tensor, "N V"]:
    """Returns a copy of the logits with penalties and biases applied to the entries that `edits` names.

    The repetition penalty (arXiv 1909.05858, section 4.1) divides positive logits and multiplies negative ones; the
    frequency and presence penalties subtract count * f + (count > 0) * p, as in OpenAI's API.
    """
    z = logits[edits.rows, edits.token_ids]
    z = torch.where(edits.seen, torch.where(z > 0, z / edits.repetition_penalty, z * edits.repetition_penalty), z)
    z = z - edits.frequency_penalty * edits.output_counts - edits.presence_penalty * (edits.output_counts > 0)
    return logits.index_put((edits.rows, edits.token_ids), z + edits.bias)


def apply_token_mask(logits: Float[Tensor, "N V"], token_mask: Int[Tensor, "N words"]) -> Float[Tensor, "N V"]:
    """Returns a copy of the logits, with -inf for tokens whose bit of the mask is not set."""
    token = torch.arange(logits.shape[1], device=logits.device)
    return logits.masked_fill((token_mask[:, token >> 5] >> (token & 31)) & 1 == 0, float("-inf"))


def _bisect_threshold(
    probs: Float[Tensor, "N V"], predicate: Callable[[Bool[Tensor, "N V"]], Bool[Tensor, "N 1"]]
) -> Float[Tensor, "N 1"]:
    """Returns the exact largest threshold t of each row for which `predicate(probs >= t)` holds, without a sort.

    Non-negative floats are ordered as their bit patterns, so 31 bisections of the pattern find the threshold.
    """
    low = torch.zeros(len(probs), 1, dtype=torch.int32, device=probs.device)
    for bit in range(30, -1, -1):
        trial = low | (1 << bit)
        low = torch.where(predicate(probs >= trial.view(torch.float32)), trial, low)
    return low.view(torch.float32)


def filter_top_k_top_p(logits: Float[Tensor, "N V"], filters: TopKTopP) -> Float[Tensor, "N V"]:
    """Returns the logits with -inf for tokens that top_k, then top_p, then min_p exclude.

    Tokens tied at a threshold stay. Rows with NaN stay as they are, so that the error shows.
    """
    k, top_p, min_p = (x[:, None] for x in filters)
    p = logits.softmax(-1)
    max_prob = p.amax(-1, keepdim=True)
    p = p.where(p >= _bisect_threshold(p, lambda mask: mask.sum(-1, keepdim=True) >= k), 0.0)
    # A top_p near 0 keeps the most likely token.
    mass = (top_p * p.sum(-1, keepdim=True)).clamp_min(torch.finfo(p.dtype).tiny)
    threshold = _bisect_threshold(p, lambda mask: p.where(mask, 0.0).sum(-1, keepdim=True) >= mass)
    threshold = torch.where(top_p < 1, threshold, 0.0)
    allowed = (p >= threshold) & (p >= min_p * max_prob) & (p > 0)
    off = (k >= logits.shape[1]) & (top_p >= 1) & (min_p <= 0)  # a row without filters is as in a batch without them
    return logits.masked_fill(~(allowed | off | max_prob.isnan()), float("-inf"))


def sample(logits: Float[Tensor, "N V"], s: SamplingTensors, num_top_logprobs: int | None = None) -> SamplerOutput:
    """Samples one token for each row of fp32 logits.

    `num_top_logprobs` None skips logprobs, which are returned as 0; k adds the k most likely tokens. A row with NaN or
    infinite logits has a NaN or infinite logprob in any case, and any token of the vocabulary.
    """
    return sample_rows(edit_logits(logits, s), logits, s, num_top_logprobs)


def edit_logits(logits: Float[Tensor, "N V"], s: SamplingTensors) -> Float[Tensor, "N V"]:
    """Returns the logits with token mask, penalties and biases applied; the same tensor if there are none."""
    z = logits if s.token_mask is None else apply_token_mask(logits, s.token_mask)
    return z if s.logit_edits is None else apply_penalties(z, s.logit_edits)


def sample_rows(
    z: Float[Tensor, "N V"], logits: Float[Tensor, "N V"], s: SamplingTensors, num_top_logprobs: int | None,
    logprobs_fn: LogprobsFn | None = None,
) -> SamplerOutput:  # fmt: skip
    """Samples one token for each row of edited logits z; `logits` are the model's own.

    argmax(p / E) with exponential noise E is a sample of p: the Gumbel-max trick, in linear form. `logprobs_fn`
    computes the logprobs instead of `gather_logprobs`.
    """
    edited = z is not logits
    z, scores = gumbel_scores(z, s)
    best, token = scores.max(-1)
    if num_top_logprobs is None:
        empty = logits.new_zeros(len(logits), 0)
        best = best + logits.amax(-1) if edited else best  # a banned logit may be NaN as well
        return SamplerOutput(token, zero_or_nan(best), empty.long(), empty)
    z = torch.where(s.processed_logprobs[:, None], z, logits)
    return SamplerOutput(token, *(logprobs_fn or gather_logprobs)(z, token, num_top_logprobs))


def zero_or_nan(x: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Returns 0 where x is finite or -inf, and NaN where x is NaN or inf."""
    return x.clamp_min(torch.finfo(x.dtype).min) * 0


def gumbel_scores(
    z: Float[Tensor, "N V"], s: SamplingTensors, vocab_start: int = 0
) -> tuple[Float[Tensor, "N V"], Float[Tensor, "N V"]]:
    """Returns the logits of the sampled distribution and the score of each token; column 0 is token `vocab_start`.

    The token with the highest score is sampled.
    """
    if s.seed is None:
        return z, z
    greedy = (s.temperature < MIN_TEMPERATURE)[:, None]
    z = z / torch.where(greedy, 1.0, s.temperature[:, None])
    if s.top_k_top_p is not None:
        z = torch.where(greedy, z, filter_top_k_top_p(z, s.top_k_top_p))
    noise = exponential_noise(s.seed, s.positions, z.shape[1], vocab_start).log_()
    return z, torch.where(greedy, z, z - noise)


def gather_logprobs(
    logits: Float[Tensor, "N V"], token: Int[Tensor, " N"], num_top_logprobs: int
) -> tuple[Float[Tensor, " N"], Int[Tensor, "N k"], Float[Tensor, "N k"]]:
    """Returns the natural-log probability of each row's token, and the most likely tokens with theirs."""
    log_total = logits.logsumexp(-1, keepdim=True)
    top_logits, top_tokens = logits.topk(min(num_top_logprobs, logits.shape[1]), -1)
    return (logits.gather(-1, token[:, None]) - log_total)[:, 0], top_tokens, top_logits - log_total
