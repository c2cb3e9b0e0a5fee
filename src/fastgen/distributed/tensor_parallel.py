"""Tensor parallelism: each rank holds some heads and a slice of every wide matrix (Megatron-LM, arXiv 1909.08053).

    embed      a shard of the vocabulary    partial sum: zero for tokens of other shards
    qkv        the rank's heads             column-parallel, no communication
    out        input dimensions of them     row-parallel, partial sum
    gate_up    a slice of the width         column-parallel, no communication
    down       input dimensions of it       row-parallel, partial sum
    lm_head    a shard of the vocabulary    the shard's logits; ranks exchange a few statistics, or all logits

Every rank has the same hidden states, samples the same tokens and plans the same steps: each rank runs an engine, and
all engines get the same calls. A partial sum is all-reduced by the op that reads it: by NCCL, or in peer memory
(`peer_memory`) fused with the norm.
"""

import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor

from fastgen.core import sampling
from fastgen.core.extensions import Ranks
from fastgen.core.model_config import ModelConfig, TPShard, vocab_shard
from fastgen.core.scheduler import SchedulerOutput
from fastgen.core.transformer import AddLora, ModelOps
from fastgen.core.types import PartialSum, SamplerOutput, SamplingTensors
from fastgen.distributed.peer_memory import PeerBuffers, WriteRows
from fastgen.kernels.batch_invariant import compose_ops

# The newer name of this function, and the older one.
all_gather_into_tensor: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class TPGroup(Ranks):
    """The tensor-parallel ranks of a model. Each method is a collective: all ranks must call it."""

    shard: TPShard

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sums `x` over the ranks, in place."""
        raise NotImplementedError

    def all_gather(self, x: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "ranks n ..."]:
        """Returns all ranks' `x`, stacked."""
        raise NotImplementedError


class TPProcessGroup(TPGroup):
    """Ranks over torch.distributed: the default process group, or `group`. All ranks must construct it in order."""

    def __init__(self, group: Any = None) -> None:
        if not dist.is_initialized():
            raise ValueError("there is no process group: call torch.distributed.init_process_group first")
        self.group = group
        self.shard = TPShard(dist.get_rank(group), dist.get_world_size(group))
        # Host-side integers are exchanged over gloo, without waiting for the device.
        ranks = None if group is None else dist.get_process_group_ranks(group)
        self._cpu_group: Any = dist.new_group(ranks, backend="gloo")
        self._pending_check: tuple[Any, int, Tensor] | None = None
        self._peer_buffers: weakref.WeakSet[PeerBuffers] = weakref.WeakSet()

    def create_peer_buffers(
        self, hidden_size: int, max_num_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> PeerBuffers | None:
        """Constructs `PeerBuffers` on all ranks; returns None where ranks cannot use each other's memory."""
        if device.type != "cuda" or self.shard.size == 1:
            return None
        try:
            peer_buffers = PeerBuffers(self, hidden_size, max_num_tokens, dtype, device)
        except RuntimeError as e:
            if self.shard.rank == 0:
                warnings.warn(f"all-reduces of all sizes go through NCCL: {e}", stacklevel=2)
            return None
        self._peer_buffers.add(peer_buffers)
        return peer_buffers

    def abort_peer_waits(self) -> None:
        """Ends this device's waiting for a rank that has exited; results of the running step are then wrong."""
        for peer_buffers in [*self._peer_buffers]:
            peer_buffers.abort_waits()

    def all_reduce(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "ranks n ..."]:
        out = x.new_empty(self.shard.size * len(x), *x.shape[1:])
        all_gather_into_tensor(out, x.contiguous(), group=self.group)
        return out.unflatten(0, (self.shard.size, -1))

    def all_reduce_min(self, n: int) -> int:
        minimum = torch.tensor(n, dtype=torch.int64, device="cpu")
        dist.all_reduce(minimum, dist.ReduceOp.MIN, group=self._cpu_group)
        return int(minimum)

    def check_step(self, step: int, scheduled: SchedulerOutput, last_token_ids: Sequence[int]) -> None:
        if self._pending_check is not None:
            work, checked_step, digests = self._pending_check
            work.wait()
            raise_if_inconsistent(self.shard.rank, checked_step, digests.tolist())
        digests = torch.empty(self.shard.size, dtype=torch.int64, device="cpu")
        local = torch.tensor([step_digest(scheduled, last_token_ids)], dtype=torch.int64, device="cpu")
        work = all_gather_into_tensor(digests, local, group=self._cpu_group, async_op=True)
        self._pending_check = work, step, digests


def step_digest(scheduled: SchedulerOutput, last_token_ids: Sequence[int]) -> int:
    """Returns a hash of what a rank plans in a step and sampled in the step before, equal on all ranks."""
    return hash((scheduled.plan, scheduled.page_copies, scheduled.preempted, tuple(last_token_ids)))


def raise_if_inconsistent(rank: int, step: int, digests: list[int]) -> None:
    """Raises RuntimeError that names the ranks whose digest differs from this rank's."""
    if different := [i for i, x in enumerate(digests) if x != digests[rank]]:
        difference = f"{', '.join(map(str, different))} planned or sampled something else than rank {rank}"
        advice = "All must get the same requests, settings and seeds in the same order"
        raise RuntimeError(f"ranks diverged at step {step}: {difference}. {advice}")


def shard_ops(
    ops: ModelOps, tp_group: TPGroup, model_config: ModelConfig, peer_buffers: PeerBuffers | None = None
) -> ModelOps:
    """Wraps `ops` for a forward on one rank's parameters.

    `model_config` is the full model's; the forward itself gets the rank's, `shard_config(model_config, size)`. Between
    ops, `y` is a `PartialSum`: row-parallel ops and the embedding return one, and the op that reads it all-reduces it.
    """
    first, count = vocab_shard(model_config.vocab_size, tp_group.shard)
    rows = vocab_shard(model_config.vocab_size, TPShard(0, tp_group.shard.size))[1]  # of every rank, padding included
    peer_ops = ops if peer_buffers is None else compose_ops(ops._replace(add_norm=peer_buffers.all_reduce_add_norm))

    def embed(weight: Tensor, token: Tensor, position: Tensor, local_config: ModelConfig) -> tuple[Any, ...]:
        index = token - first
        x, zero, *rope = ops.embed(weight, index.clamp(0, rows - 1), position, local_config)
        y = torch.where(((index >= 0) & (index < count))[:, None], x, 0)
        return zero, partial_sum(PeerBuffers.EMBEDDING, len(y), lambda _, out: out.copy_(y), lambda: y), *rope

    def partial_sum(buffer_idx: int, num_rows: int, write: WriteRows, compute: Callable[[], Tensor]) -> PartialSum:
        y = None if peer_buffers is None else peer_buffers.write_partial(buffer_idx, num_rows, write)
        return PartialSum(compute()) if y is None else y

    def row_parallel(
        local: Callable[..., Tensor], buffer_idx: int, linear: Callable[..., Tensor], x: Tensor, w: Tensor,
        bias: Tensor | None = None, add_lora: AddLora | None = None,
    ) -> PartialSum:  # fmt: skip
        bias = None if tp_group.shard.rank else bias

        def write(rows: slice, out: Tensor) -> None:
            ops.lm_head(x[rows], w, out)  # the linear op that has an `out`
            if bias is not None:
                out += bias
            if add_lora is not None and (y := add_lora(out, x[rows], rows)) is not out:
                out.copy_(y)

        return partial_sum(buffer_idx, len(x), write, lambda: local(linear, x, w, bias, add_lora))

    def all_reduced(name: str) -> Callable[..., Any]:
        """Returns the op of that name for a partial sum `y`, all-reduced in peer memory if `y` lies there."""
        local_op, peer_op = getattr(ops, name), getattr(peer_ops, name)

        def op(x: Tensor, y: PartialSum, *args: Any) -> Any:
            return local_op(x, tp_group.all_reduce(y.local), *args) if y.rank_ptrs is None else peer_op(x, y, *args)

        return op

    def lm_head(h: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
        logits = gather_logits(ops.lm_head(h, w), tp_group, model_config.vocab_size)
        return logits if out is None else out[: len(h)].copy_(logits)

    reading_ops = {name: all_reduced(name) for name in ("add_norm", "add_norm_qkv", "add_norm_gate_up", "final_norm")}
    return ops._replace(
        embed=embed, out_proj=partial(row_parallel, ops.out_proj, PeerBuffers.ATTENTION), lm_head=lm_head,
        down_proj=partial(row_parallel, ops.down_proj, PeerBuffers.MLP), **reading_ops,
    )  # fmt: skip


def sample_from_shards(
    logits: Float[Tensor, "N W"], s: SamplingTensors, num_top_logprobs: int | None, tp_group: TPGroup, vocab_size: int
) -> SamplerOutput:
    """Samples as `sampling.sample`, from each rank's logits of its vocabulary shard.

    Ranks exchange a few statistics per row, or all logits where filters, edits or a grammar need them.
    """
    if s.top_k_top_p is None and s.logit_edits is None and s.token_mask is None:
        shard = vocab_shard(vocab_size, tp_group.shard)
        stats = tp_group.all_gather(sample_shard(logits.float(), s, num_top_logprobs, *shard))
        return merge_shards(stats, vocab_size, num_top_logprobs)
    return sampling.sample(gather_logits(logits, tp_group, vocab_size).float(), s, num_top_logprobs)


def gather_logits(logits: Float[Tensor, "N W"], tp_group: TPGroup, vocab_size: int) -> Float[Tensor, "N V"]:
    """Returns all ranks' logits, side by side."""
    return rearrange(tp_group.all_gather(logits), "ranks n v -> n (ranks v)")[:, :vocab_size]


def sample_shard(
    logits: Float[Tensor, "N W"], s: SamplingTensors, num_top_logprobs: int | None, vocab_start: int, num_tokens: int
) -> Float[Tensor, "N stats"]:
    """Returns, for each row, the statistics that one vocabulary shard contributes to `merge_shards`.

    The statistics are the best score, its token and its logit, the maximum, the sum of exponentials, and the tokens and
    logits of the `num_top_logprobs` most likely tokens. The shard has `num_tokens` tokens from `vocab_start`; further
    columns are padding. Filters and edits are not applied: they need the logits of all shards.
    """
    logits = logits.masked_fill(torch.arange(logits.shape[1], device=logits.device) >= num_tokens, float("-inf"))
    z, scores = sampling.gumbel_scores(logits, s, vocab_start)
    z = torch.where(s.processed_logprobs[:, None], z, logits)
    best, index = scores.max(-1, keepdim=True)
    peak = z.amax(-1, keepdim=True).clamp_min(torch.finfo(z.dtype).min)  # the shard may have no token
    top_logits, top_index = z.topk(min(num_top_logprobs or 0, z.shape[1]), -1)
    total = (z - peak).exp().sum(-1, keepdim=True)
    # Token ids below 2^24 are exact in fp32.
    token, top_token_ids = index + vocab_start, top_index + vocab_start
    return torch.cat([best, token, z.gather(-1, index), peak, total, top_token_ids, top_logits], -1)


def merge_shards(
    shards: Float[Tensor, "ranks N stats"], vocab_size: int, num_top_logprobs: int | None
) -> SamplerOutput:
    """Returns what `sampling.sample` would of all logits, from the `sample_shard` of every shard, in order."""
    best, index, logit, peak, total = shards[..., :5].unbind(-1)
    token = torch.where(best == best.amax(0), index, float(vocab_size)).amin(0)  # the first of equal scores
    max_logit = peak.amax(0)
    log_total = (total * (peak - max_logit).exp()).sum(0).log()
    top_index, top_logits = (rearrange(x, "ranks n k -> n (ranks k)") for x in shards[..., 5:].chunk(2, -1))
    top_logits, order = top_logits.topk(min(num_top_logprobs or 0, vocab_size), -1)
    logprob = torch.where(index == token, logit, float("-inf")).amax(0) - max_logit
    logprob = sampling.zero_or_nan(max_logit) if num_top_logprobs is None else logprob - log_total
    token, top_token_ids = token.clamp_max(vocab_size - 1).long(), top_index.gather(-1, order).long()
    return SamplerOutput(token, logprob, top_token_ids, top_logits - (max_logit + log_total)[:, None])
