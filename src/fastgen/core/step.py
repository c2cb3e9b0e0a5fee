"""One step as a function of parameters, cache and input tensors, and the logprobs of prompts."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastgen.core.model_config import ModelConfig
from fastgen.core.transformer import TORCH_OPS, LoraAdapters, ModelOps, compute_logits, lm_head_weight, run_layers
from fastgen.core.types import Batch, KVCache, Params, SamplingTensors

# (logits, temperature, seed, positions, processed_logprobs, last_token_ids, req_idx) -> token ids, logprobs: as
# `sampling.sample` without filters or logit edits; also writes the tokens to `last_token_ids` at `req_idx`
FusedSampler = Callable[..., tuple[Tensor, Tensor]]
LOGITS_PER_CHUNK = 2**24  # logits in memory at once when prompts are scored: 64 MB in fp32


class StepOutput(NamedTuple):
    """The outputs of one step, valid until the next one."""

    hidden_states: Float[Tensor, "T D"] | None  # after the final norm; None unless prompts are scored
    logits: Float[Tensor, "N V"]  # in the parameters' dtype; of a rank's vocabulary shard
    token_ids: Int[Tensor, " N"] | None  # sampled without filters or logit edits; None without a fused sampler
    logprobs: Float[Tensor, " N"] | None


def fill_pending_tokens(token_ids: Int[Tensor, " T"], last_token_ids: Int[Tensor, " E"]) -> Int[Tensor, " T"]:
    """Returns a step's tokens with each negative entry -i replaced by the token last sampled at req_idx i."""
    return torch.where(token_ids < 0, last_token_ids[(-token_ids).clamp_min(0)], token_ids)


def forward_and_sample(
    params: Params, cache: KVCache, last_token_ids: Int[Tensor, " E"], batch: Batch, sampling: SamplingTensors,
    model_config: ModelConfig, ops: ModelOps = TORCH_OPS, fused_sampler: FusedSampler | None = None,
    logits_out: Float[Tensor, "M V"] | None = None, adapters: LoraAdapters | None = None, *, decode: bool = False,
    return_hidden_states: bool = False,
) -> StepOutput:  # fmt: skip
    """Computes a step: writes the cache at `batch.slot_mapping`, and sampled tokens to `last_token_ids` at `req_idx`.

    `decode`: token r is all of sequence r. Logits are of the sequences' last tokens, written to `logits_out` if given.
    """
    last_token_only = not (decode or return_hidden_states)
    x, y = run_layers(params, cache, batch, model_config, ops, adapters, last_token_only=last_token_only)
    h = ops.final_norm(x, y, params.final_norm, model_config.rms_norm_eps)
    logits = ops.lm_head(h[batch.logits_indices] if return_hidden_states else h, lm_head_weight(params), logits_out)
    hidden_states = h if return_hidden_states else None
    if fused_sampler is None:
        return StepOutput(hidden_states, logits, None, None)
    s = sampling
    settings = s.temperature, s.seed, s.positions, s.processed_logprobs
    return StepOutput(hidden_states, logits, *fused_sampler(logits, *settings, last_token_ids, batch.req_idx))


def compute_target_logprobs(
    params: Params, hidden_states: Float[Tensor, "T D"], target_ids: list[int], num_top_logprobs: int,
    ops: ModelOps = TORCH_OPS,
) -> tuple[list[float], list[dict[int, float]]]:  # fmt: skip
    """Returns each row's logprob of its target token, and its most likely tokens with their logprobs.

    Computes the logits of LOGITS_PER_CHUNK // V rows at a time.
    """
    num_rows = max(1, LOGITS_PER_CHUNK // len(params.embed))
    logprobs: list[float] = []
    tops: list[dict[int, float]] = []
    for i in range(0, len(target_ids), num_rows):
        targets = torch.tensor(target_ids[i : i + num_rows], device=hidden_states.device)
        logits = compute_logits(params, hidden_states[i : i + num_rows], ops)
        values, top_ids, top_values = (t.tolist() for t in ops.logprobs(logits, targets, num_top_logprobs))
        logprobs += values
        tops += [dict(zip(*pair, strict=True)) for pair in zip(top_ids, top_values, strict=True)]
    return logprobs, tops
