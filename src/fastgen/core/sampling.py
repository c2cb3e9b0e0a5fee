"""From logits to tokens. Every row depends on its own request only: the noise is keyed by (seed, position, token),
so a sample does not change with the batch, the padding, the order or the device count.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastgen.config import MIN_TEMPERATURE
from fastgen.core.types import LogitEdits, SamplerOutput, SamplingTensors, TopKTopP

UINT32_MASK = 0xFFFFFFFF


def _lowbias32(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """A bijection of 32-bit integers held in int64: the `lowbias32` finalizer (C. Wellons, hash-prospector)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & UINT32_MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & UINT32_MASK
    return x ^ (x >> 16)


def exponential_noise(
    seed: Int[Tensor, " N"], position: Int[Tensor, " N"], num_tokens: int, vocab_start: int = 0
) -> Float[Tensor, "N V"]:
    """fp32 exponential noise of rate 1, a function of (seed, position, token) alone, of `vocab` tokens from `first`.

    -log1p(-u) with u = (x + 1/2) / 2^32 keeps full relative precision for the small values, which decide the draw.
    """
    position = position.long()
    low, high = _lowbias32(seed & UINT32_MASK), _lowbias32((seed >> 32) & UINT32_MASK)
    key = _lowbias32(low ^ _lowbias32((high + position) & UINT32_MASK))
    other = _lowbias32((low + 0x9E3779B9 * (position & UINT32_MASK)) & UINT32_MASK ^ high)
    token = torch.arange(vocab_start, vocab_start + num_tokens, device=seed.device)
    x = _lowbias32(_lowbias32(token ^ key[:, None]) ^ other[:, None])
    return -torch.log1p(-((x.float() + 0.5) * 2.0**-32).clamp_(max=1 - 2**-24))


def apply_penalties(logits: Float[Tensor, "N V"], edits: LogitEdits) -> Float[Tensor, "N V"]:
    """Penalties and biases of the entries named; a copy.

    Repetition (arXiv 1909.05858, section 4.1) divides positive logits and multiplies negative ones; frequency and
    presence subtract count * f + (count > 0) * p, as in OpenAI's API.
    """
    z = logits[edits.rows, edits.token_ids]
    z = torch.where(edits.seen, torch.where(z > 0, z / edits.repetition_penalty, z * edits.repetition_penalty), z)
    z = z - edits.frequency_penalty * edits.output_counts - edits.presence_penalty * (edits.output_counts > 0)
    return logits.index_put((edits.rows, edits.token_ids), z + edits.bias)


def apply_token_mask(logits: Float[Tensor, "N V"], token_mask: Int[Tensor, "N words"]) -> Float[Tensor, "N V"]:
    """Logits with -inf where a token's bit is not set; a copy."""
    token = torch.arange(logits.shape[1], device=logits.device)
    return logits.masked_fill((token_mask[:, token >> 5] >> (token & 31)) & 1 == 0, float("-inf"))


def _bisect_threshold(probs: Float[Tensor, "N V"], predicate: Callable[[Tensor], Tensor]) -> Float[Tensor, "N 1"]:
    """The largest threshold t for which `reaches(p >= t)` holds, exactly, without a sort.

    Non-negative floats order like their bit patterns, so 31 halvings of the pattern find the threshold.
    """
    low = torch.zeros(len(probs), 1, dtype=torch.int32, device=probs.device)
    for bit in range(30, -1, -1):
        trial = low | (1 << bit)
        low = torch.where(predicate(probs >= trial.view(torch.float32)), trial, low)
    return low.view(torch.float32)


def filter_top_k_top_p(logits: Float[Tensor, "N V"], f: TopKTopP) -> Float[Tensor, "N V"]:
    """Logits with -inf where top_k, then top_p, then min_p exclude a token. Tokens tied at a threshold all stay."""
    p = logits.softmax(-1)
    most = p.amax(-1, keepdim=True)
    k = f.top_k[:, None]
    p = p.where(p >= _bisect_threshold(p, lambda m: m.sum(-1, keepdim=True) >= k), 0.0)
    least = torch.finfo(p.dtype).tiny  # so that a top_p near 0 keeps the most likely token
    mass = (f.top_p[:, None] * p.sum(-1, keepdim=True)).clamp_min(least)
    enough = _bisect_threshold(p, lambda m: p.where(m, 0.0).sum(-1, keepdim=True) >= mass)
    enough = torch.where(f.top_p[:, None] < 1, enough, 0.0)
    kept = (p >= enough) & (p >= f.min_p[:, None] * most) & (p > 0)
    off = (k >= logits.shape[1]) & (f.top_p[:, None] >= 1) & (f.min_p[:, None] <= 0)  # as if no row had a filter
    return logits.masked_fill(~(kept | off | most.isnan()), float("-inf"))  # NaN stays, to be seen


LogprobsFn = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]  # as `logprobs`


def sample(
    logits: Float[Tensor, "N V"],
    s: SamplingTensors,
    num_top_logprobs: int | None = None,
    logprobs_fn: LogprobsFn | None = None,
    *,
    rows_per_call: int | None = None,
) -> SamplerOutput:
    """Draws one token a row. `logits` fp32; `top` None skips logprobs (returned as 0), k adds the k most likely.

    Of a row with logits that are NaN or inf the logprob is NaN or -inf in any case; the token is one of the vocabulary.

    `measure` computes the logprobs; `rows`: so many rows are drawn at once, always.
    """
    z = logits if s.token_mask is None else apply_token_mask(logits, s.token_mask)
    z = z if s.logit_edits is None else apply_penalties(z, s.logit_edits)
    if rows_per_call is None:
        return _sample_rows(z, logits, s, num_top_logprobs, logprobs_fn or gather_logprobs)
    found = []
    for i in range(0, len(z), rows_per_call):
        at = torch.arange(i, i + rows_per_call, device=z.device).clamp_max(len(z) - 1)
        some = tree_map_only(Tensor, lambda x, at=at: x[at], s._replace(logit_edits=None, token_mask=None))
        found.append(_sample_rows(z[at], logits[at], some, num_top_logprobs, logprobs_fn or gather_logprobs))
    return SamplerOutput(*(torch.cat(x)[: len(z)] for x in zip(*found, strict=True)))


def _sample_rows(
    z: Float[Tensor, "N V"],
    logits: Float[Tensor, "N V"],
    s: SamplingTensors,
    num_top_logprobs: int | None,
    logprobs_fn: LogprobsFn,
) -> SamplerOutput:
    """From edited logits z. By the exponential race: argmax of p / E equals a draw from p (Gumbel's trick in linear
    form)."""
    edited = z is not logits
    z, score = _gumbel_scores(z, s)
    best, token = score.max(-1)
    if num_top_logprobs is None:
        none = logits.new_zeros(len(logits), 0)
        best = best + logits.amax(-1) if edited else best  # what was banned may be NaN as well
        return SamplerOutput(token, _zero_or_nan(best), none.long(), none)
    return SamplerOutput(
        token, *logprobs_fn(torch.where(s.processed_logprobs[:, None], z, logits), token, num_top_logprobs)
    )


def _zero_or_nan(x: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """0 where x is finite or -inf, NaN where it is NaN or inf."""
    return x.clamp_min(torch.finfo(x.dtype).min) * 0


def _gumbel_scores(
    z: Float[Tensor, "N V"], s: SamplingTensors, vocab_start: int = 0
) -> tuple[Float[Tensor, "N V"], Float[Tensor, "N V"]]:
    """The logits that are drawn from, and every token's score: the highest is drawn. `first` is the first's token."""
    if s.seed is None:
        return z, z
    cold = (s.temperature < MIN_TEMPERATURE)[:, None]
    z = z / torch.where(cold, 1.0, s.temperature[:, None])
    if s.top_k_top_p is not None:
        z = torch.where(cold, z, filter_top_k_top_p(z, s.top_k_top_p))
    noise = exponential_noise(s.seed, s.positions, z.shape[1], vocab_start).log_()
    return z, torch.where(cold, z, z - noise)


def sample_shard(
    logits: Float[Tensor, "N W"], s: SamplingTensors, num_top_logprobs: int | None, vocab_start: int, num_tokens: int
) -> Float[Tensor, "N numbers"]:
    """What a part of the vocabulary has to say: of each row the best score, whose token and logit, the maximum, the
    sum of exponentials, and the `top` most likely tokens and their logits. For `decide`; without filters and edits.

    The part has `count` tokens from `first`; the rest of the W columns is padding.
    """
    logits = logits.masked_fill(torch.arange(logits.shape[1], device=logits.device) >= num_tokens, float("-inf"))
    z, score = _gumbel_scores(logits, s, vocab_start)
    z = torch.where(s.processed_logprobs[:, None], z, logits)
    best, index = score.max(-1, keepdim=True)
    peak = z.amax(-1, keepdim=True).clamp_min(torch.finfo(z.dtype).min)  # there may be no token
    value, which = z.topk(min(num_top_logprobs or 0, z.shape[1]), -1)
    numbers = best, index + vocab_start, z.gather(-1, index), peak, (z - peak).exp().sum(-1, keepdim=True)
    return torch.cat([*numbers, which + vocab_start, value], -1)  # tokens below 2^24 are exact in fp32


def merge_shards(
    shards: Float[Tensor, "ranks N numbers"], vocab_size: int, num_top_logprobs: int | None
) -> SamplerOutput:
    """What `sample` draws, of what `partial` has found in all parts of the vocabulary, in their order."""
    best, index, value, peak, total = shards[..., :5].unbind(-1)
    token = torch.where(best == best.amax(0), index, float(vocab_size)).amin(0)  # of equals the first
    most = peak.amax(0)
    logprob = torch.where(index == token, value, float("-inf")).amax(0) - most
    log = (total * (peak - most).exp()).sum(0).log()
    which, values = (x.movedim(0, 1).flatten(1) for x in shards[..., 5:].chunk(2, -1))
    values, order = values.topk(min(num_top_logprobs or 0, vocab_size), -1)
    tokens, tops = which.gather(-1, order).long(), values - (most + log)[:, None]
    logprob = _zero_or_nan(most) if num_top_logprobs is None else logprob - log
    return SamplerOutput(token.clamp_max(vocab_size - 1).long(), logprob, tokens, tops)


def gather_logprobs(
    logits: Float[Tensor, "N V"], token: Int[Tensor, " N"], num_top_logprobs: int
) -> tuple[Float[Tensor, " N"], Int[Tensor, "N k"], Float[Tensor, "N k"]]:
    """Natural-log probability of each row's token, and of its `top` most likely tokens."""
    total = logits.logsumexp(-1, keepdim=True)
    value, index = logits.topk(min(num_top_logprobs, logits.shape[1]), -1)
    return (logits.gather(-1, token[:, None]) - total)[:, 0], index, value - total
