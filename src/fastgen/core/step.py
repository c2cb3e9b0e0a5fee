"""What a step computes: functions of parameters, cache and staged tensors."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastgen.core.model_config import ModelConfig
from fastgen.core.transformer import TORCH_OPS, ModelOps, compute_logits, lm_head_weight, run_layers
from fastgen.core.types import Batch, KVCache, Params, SamplingTensors, StackedAdapters

# draw(logits, temperature, seed, position, processed, last, seat) -> token, logprob: as `sampling.sample` without
# filters or edits; the tokens are also written to `last` at `seat`
FusedSampler = Callable[..., tuple[Tensor, Tensor]]
LOGITS_PER_CHUNK = 2**24  # logits held at once when prompts are scored: 64 MB in fp32


class StepOutput(NamedTuple):
    """What a step leaves behind, valid until the next one."""

    hidden_states: Float[Tensor, "T D"] | None  # normed; None where they were not asked for
    logits: Float[Tensor, "N V"]  # in the parameters' dtype; of a rank: of its part of the vocabulary
    token_ids: Int[Tensor, " N"] | None  # drawn without filters or edits; None where `draw` is
    logprobs: Float[Tensor, " N"] | None


def fill_pending_tokens(token_ids: Int[Tensor, " T"], last_token_ids: Int[Tensor, " E"]) -> Int[Tensor, " T"]:
    """The tokens of a step: those below 0 are taken from `last`, where the seat is their negative."""
    return torch.where(token_ids < 0, last_token_ids[(-token_ids).clamp_min(0)], token_ids)


def forward_and_sample(
    params: Params,
    cache: KVCache,
    last_token_ids: Int[Tensor, " E"],
    batch: Batch,
    sampling: SamplingTensors,
    spec: ModelConfig,
    ops: ModelOps = TORCH_OPS,
    fused_sampler: FusedSampler | None = None,
    logits_out: Float[Tensor, "M V"] | None = None,
    adapters: StackedAdapters | None = None,
    *,
    decode: bool = False,
    return_hidden_states: bool = False,
) -> StepOutput:
    """A step on the device. Writes `cache` at `batch.slot`, and the drawn tokens to `last` at `batch.seat`.

    `decode`: token r is all of sequence r. `scored`: the hidden states of all tokens are wanted. Logits are of the
    sequences' last tokens; `out` takes them, where given.
    """
    x, y = run_layers(params, cache, batch, spec, ops, adapters, last_token_only=not (decode or return_hidden_states))
    h = ops.final_norm(x, y, params.final_norm, spec.rms_norm_eps)
    logits = ops.lm_head(h[batch.logits_indices] if return_hidden_states else h, lm_head_weight(params), logits_out)
    hidden = h if return_hidden_states else None
    if fused_sampler is None:
        return StepOutput(hidden, logits, None, None)
    s = sampling
    token, logprob = fused_sampler(
        logits, s.temperature, s.seed, s.positions, s.processed_logprobs, last_token_ids, batch.req_idx
    )
    return StepOutput(hidden, logits, token, logprob)


def compute_target_logprobs(
    params: Params,
    hidden_states: Float[Tensor, "T D"],
    target_ids: list[int],
    num_top_logprobs: int,
    ops: ModelOps = TORCH_OPS,
) -> tuple[list[float], list[dict[int, float]]]:
    """Logprob of each row's target token, and the `top` most likely ones; few rows of the vocabulary at a time."""
    rows = max(1, LOGITS_PER_CHUNK // len(params.embed))
    value: list[float] = []
    best: list[dict[int, float]] = []
    for i in range(0, len(target_ids), rows):
        token = torch.tensor(target_ids[i : i + rows], device=hidden_states.device)
        got, top_token, top_value = (
            t.tolist()
            for t in ops.logprobs(compute_logits(params, hidden_states[i : i + rows], ops), token, num_top_logprobs)
        )
        value += got
        best += [dict(zip(*pair, strict=True)) for pair in zip(top_token, top_value, strict=True)]
    return value, best
