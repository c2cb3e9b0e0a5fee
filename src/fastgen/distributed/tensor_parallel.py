"""Tensor parallelism: one model over several ranks, each with its heads and its share of every wide matrix.

    embed     rows of the vocabulary    a rank looks up the tokens it has; summed
    qkv       its heads                 no exchange
    out       columns of its heads      partial sums; summed
    gate_up   its share of the width    no exchange
    down      columns of that share     partial sums; summed
    head      rows of the vocabulary    its logits; of these, the best and what their sum needs; or all of them

That is Megatron-LM's division (arXiv 1909.08053, section 3). Every rank has the same hidden states, and decides the
same of what all have found, so all draw the same tokens and plan the same steps: there is one engine for each rank,
called in the same way.

Partial sums are summed by whoever reads them. On the GPUs of a host (`Peers`) a kernel does so that goes on with the
norm: for few rows it reads the other ranks' memory, for many, of two ranks, what the other has pushed while its product
went on. Everything else is an all-reduce of the group.
"""

import os
import socket
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from fastgen.core import sampling
from fastgen.core.model_config import ModelConfig, TPShard, vocab_shard
from fastgen.core.transformer import AddLora, ModelOps
from fastgen.core.types import SamplerOutput, SamplingTensors

# Bytes that a rank reads from all others for one sum. Beyond it parts are pushed, or NCCL sums (`layouts_gpu.py`).
ONE_SHOT_MAX_BYTES = 2**24
PUSH_CHUNK_ROWS = 2048  # rows that are pushed together, while the product of the next ones is made
all_gather_into_tensor: Any = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)  # its newer name, and its older


@runtime_checkable
class TPGroup(Protocol):
    """The ranks of a model. Each method is a meeting of all of them."""

    @property
    def shard(self) -> TPShard: ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in the place of `x`."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, n, ...]: everybody's `x` [n, ...]."""
        ...

    def all_reduce_min(self, n: int) -> int:
        """The smallest of everybody's n."""
        ...

    def check_consistent(self, step: int, digest: int) -> None:
        """RuntimeError, one call late, if the ranks do not all say the same."""
        ...


class TPProcessGroup:
    """A group of torch.distributed: the default one, or `group`. Everybody has to make it, in the same order."""

    def __init__(self, group: Any = None) -> None:
        if not dist.is_initialized():
            raise ValueError("there is no process group: call torch.distributed.init_process_group first")
        self.group = group
        self.shard = TPShard(dist.get_rank(group), dist.get_world_size(group))
        # What the host says must not wait for the device.
        self._cpu_group: Any = dist.new_group(
            None if group is None else dist.get_process_group_ranks(group), backend="gloo"
        )
        self._pending_check: tuple[Any, int, Tensor] | None = None
        self._peer_buffers: weakref.WeakSet[PeerBuffers] = weakref.WeakSet()

    def create_peer_buffers(
        self, hidden_size: int, max_num_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> "PeerBuffers | None":
        """None where ranks cannot use each other's memory; made by all together. As `Peers`."""
        if device.type != "cuda" or self.shard.size == 1:
            return None
        try:
            made = PeerBuffers(self, hidden_size, max_num_tokens, dtype, device)
        except RuntimeError as e:
            if self.shard.rank == 0:
                warnings.warn(f"sums of all sizes go through NCCL: {e}", stacklevel=2)
            return None
        self._peer_buffers.add(made)
        return made

    def abort_peer_waits(self) -> None:
        """After the end of a rank: whatever waits for it on this device goes on, to no good result."""
        for made in [*self._peer_buffers]:
            made.abort_waits()

    def all_reduce(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        found = x.new_empty(self.shard.size * len(x), *x.shape[1:])
        all_gather_into_tensor(found, x.contiguous(), group=self.group)
        return found.unflatten(0, (self.shard.size, -1))

    def all_reduce_min(self, n: int) -> int:
        found = torch.tensor(n, dtype=torch.int64, device="cpu")
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self._cpu_group)
        return int(found)

    def check_consistent(self, step: int, digest: int) -> None:
        if self._pending_check is not None:
            work, before, found = self._pending_check
            work.wait()
            raise_if_inconsistent(self.shard.rank, before, found.tolist())
        found = torch.empty(self.shard.size, dtype=torch.int64, device="cpu")
        mine = torch.tensor([digest], dtype=torch.int64, device="cpu")
        self._pending_check = all_gather_into_tensor(found, mine, group=self._cpu_group, async_op=True), step, found


def raise_if_inconsistent(rank: int, step: int, digests: list[int]) -> None:
    """RuntimeError that names the ranks which planned another step than this one."""
    if others := [i for i, x in enumerate(digests) if x != digests[rank]]:
        raise RuntimeError(
            f"ranks have parted at step {step}: {', '.join(map(str, others))} planned or drew something else than "
            f"rank {rank}. All must get the same requests, settings and seeds in the same order"
        )


class PeerBuffers:
    """Memory of each rank of a host that the others read and write: parts of sums, of `width` numbers a row.

    Made by all ranks together; RuntimeError on all of them if they cannot use each other's memory. `rows`: of the
    largest sum that is wanted. `read`: as `READ`.
    """

    NUM_PARTIALS = 3
    _pending_partial: tuple[Tensor | None, Tensor | None] = (
        None,
        None,
    )  # a part, until it is read, and where all ranks' are

    def __init__(
        self,
        group: "TPProcessGroup",
        hidden_size: int,
        max_num_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        one_shot_max_bytes: int | None = None,
    ) -> None:
        # Multicast is never used; where it is not allowed, even asking for it fails.
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        import torch.distributed._symmetric_memory as symmetric

        from fastgen.kernels.all_reduce_norm import MAX_PROGRAMS

        size, self.rank = group.shard.size, group.shard.rank
        host = int.from_bytes(socket.gethostname().encode()[-7:])
        if group.all_reduce_min(host) != host or -group.all_reduce_min(-host) != host:
            raise RuntimeError("ranks on several hosts")
        few = min(
            max_num_tokens,
            (ONE_SHOT_MAX_BYTES if one_shot_max_bytes is None else one_shot_max_bytes)
            // (size - 1)
            // (hidden_size * dtype.itemsize),
        )
        many = max_num_tokens if size == 2 and max_num_tokens > few else 0
        shapes = [few] * self.NUM_PARTIALS + [many] * 2  # read by others; written by the other
        bytes = [-(-n * hidden_size * dtype.itemsize // 128) * 128 for n in shapes]
        offsets = [sum(bytes[:i]) for i in range(len(bytes) + 1)]
        count = MAX_PROGRAMS * size + 1  # of flags; the last ends all waiting

        def attempt(make: Any) -> Any:
            try:
                made, problem = make(), None
            except RuntimeError as e:
                made, problem = None, e
            if not group.all_reduce_min(problem is None):
                raise RuntimeError(f"a rank has no memory that others can use: {problem or 'another one'}")
            return made

        self.buffer = attempt(lambda: symmetric.empty(offsets[-1] + 4 * count, dtype=torch.uint8, device=device))
        ranks: Any = group.group or dist.group.WORLD
        handle = attempt(lambda: symmetric.rendezvous(self.buffer, ranks))
        self.buffer.zero_()
        torch.cuda.synchronize(device)
        group.all_reduce_min(0)  # nobody tells anybody anything before all flags are 0
        first = self.buffer.data_ptr() - handle.buffer_ptrs[self.rank]
        begins = torch.tensor([p + first for p in handle.buffer_ptrs], dtype=torch.int64, device="cpu")
        places = [(begins + offset).to(device) for offset in offsets]

        def leaf(buffer: Tensor, i: int) -> Tensor:
            return buffer[offsets[i] :][: shapes[i] * hidden_size * dtype.itemsize].view(dtype).view(-1, hidden_size)

        self.partials = [leaf(self.buffer, i) for i in range(self.NUM_PARTIALS)]
        self._partial_ptrs, self._flag_ptrs, self._push_max_rows = places[: self.NUM_PARTIALS], places[-1], many
        if many:
            theirs = handle.get_buffer(1 - self.rank, (self.buffer.numel(),), torch.uint8, first)
            self._push_buffers = [
                (leaf(self.buffer, self.NUM_PARTIALS + i), leaf(theirs, self.NUM_PARTIALS + i)) for i in range(2)
            ]
            self._partial_ptrs += [
                places[self.NUM_PARTIALS + i].fill_(here.data_ptr()) for i, (here, _) in enumerate(self._push_buffers)
            ]
        self._abort_flag = self.buffer[offsets[-1] :].view(torch.int32)[-1:]
        self._abort_value = torch.ones(1, dtype=torch.int32, device="cpu").pin_memory()
        self._push_stream, self._abort_stream = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def write_partial(self, buffer_idx: int, num_rows: int, write: Callable[[slice, Tensor], Any]) -> Tensor | None:
        """This rank's part of a sum of so many rows, where others have it too. `make` puts some of them into a place.

        `i`: 0 and 1 in turn, since a part lasts until the next sum but one; 2 at the beginning of a step, for few rows.
        """
        if num_rows <= len(self.partials[buffer_idx]):
            y, at = self.partials[buffer_idx][:num_rows], self._partial_ptrs[buffer_idx]
            write(slice(num_rows), y)
        elif buffer_idx < 2 and num_rows <= self._push_max_rows:
            y, at = (
                self.partials[buffer_idx].new_empty(num_rows, self.partials[buffer_idx].shape[1]),
                self._partial_ptrs[self.NUM_PARTIALS + buffer_idx],
            )
            for first in range(0, num_rows, PUSH_CHUNK_ROWS):
                some = slice(first, min(first + PUSH_CHUNK_ROWS, num_rows))
                write(some, y[some])
                self._push(y[some], self._push_buffers[buffer_idx][1][some])
            self._wait_for_push()
        else:
            return None
        self._pending_partial = y, at
        return y

    def _push(self, local: Tensor, remote: Tensor) -> None:
        """By an engine of its own, beside what is launched next."""
        self._push_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._push_stream):
            remote.copy_(local, non_blocking=True)

    def _wait_for_push(self) -> None:
        torch.cuda.current_stream().wait_stream(self._push_stream)

    def try_all_reduce_add_norm(self, x: Tensor, y: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
        """`transformer.add_norm` of x and the sum over the ranks of which y is a part; None if others don't have it."""
        (made, at), self._pending_partial = self._pending_partial, (None, None)
        return None if made is not y or at is None else self._all_reduce_add_norm(x, y, at, norm, eps)

    def _all_reduce_add_norm(
        self, x: Tensor, y: Tensor, partial_ptrs: Tensor, norm: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        from fastgen.kernels.all_reduce_norm import all_reduce_add_norm

        return all_reduce_add_norm(x, y, partial_ptrs, self._flag_ptrs, self.rank, norm, eps)

    def abort_waits(self) -> None:
        """Kernels that wait for a rank that is gone go on, now and from now on. Called by any thread."""
        with torch.cuda.stream(self._abort_stream):
            self._abort_flag.copy_(self._abort_value, non_blocking=True)


def shard_ops(
    ops: ModelOps, tp_group: TPGroup, model_config: ModelConfig, peer_buffers: PeerBuffers | None = None
) -> ModelOps:
    """The functions of a forward on one rank's parameters: `ops`, and what the ranks exchange.

    `spec` is the whole model's; the forward itself is given the rank's, `split(spec, size)`. Between its functions, y
    is this rank's part of the sum.
    """
    first, count = vocab_shard(model_config.vocab_size, tp_group.shard)
    rows = vocab_shard(model_config.vocab_size, TPShard(0, tp_group.shard.size))[1]  # of every rank, padding included

    def enter(embed: Tensor, token: Tensor, position: Tensor, local: ModelConfig) -> tuple[Tensor, ...]:
        at = token - first
        x, zero, *rest = ops.embed(embed, at.clamp(0, rows - 1), position, local)
        y = torch.where(((at >= 0) & (at < count))[:, None], x, 0)
        part = None if peer_buffers is None else peer_buffers.write_partial(2, len(y), lambda _, to: to.copy_(y))
        return zero, y if part is None else part, *rest

    def row_parallel(
        local: Callable[..., Tensor],
        buffer_idx: int,
        linear: Callable[..., Tensor],
        x: Tensor,
        w: Tensor,
        bias: Tensor | None = None,
        add_lora: AddLora | None = None,
    ) -> Tensor:
        bias = None if tp_group.shard.rank else bias

        def make(rows: slice, to: Tensor) -> None:
            ops.lm_head(x[rows], w, to)  # the same product, to a place
            if bias is not None:
                to += bias
            if add_lora is not None and (changed := add_lora(to, x[rows], rows)) is not to:
                to.copy_(changed)

        part = None if peer_buffers is None else peer_buffers.write_partial(buffer_idx, len(x), make)
        return local(linear, x, w, bias, add_lora) if part is None else part

    def summed(*args: Any) -> tuple[Tensor, Tensor] | None:
        return None if peer_buffers is None else peer_buffers.try_all_reduce_add_norm(*args)

    def add_norm(x: Tensor, y: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        both = summed(x, y, norm, eps)
        return ops.add_norm(x, tp_group.all_reduce(y), norm, eps) if both is None else both

    def project(x: Tensor, y: Tensor, norm: Tensor, eps: float, *w: Tensor | None) -> tuple[Tensor, Tensor]:
        if (both := summed(x, y, norm, eps)) is None:
            return ops.add_norm_qkv(x, tp_group.all_reduce(y), norm, eps, *w)
        return both[0], ops.linear(both[1], *w)

    def project_swiglu(x: Tensor, y: Tensor, norm: Tensor, eps: float, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        if (both := summed(x, y, norm, eps)) is None:
            return ops.add_norm_gate_up(x, tp_group.all_reduce(y), norm, eps, gate_up)
        return both[0], ops.swiglu(ops.linear(both[1], gate_up, None))

    def leave(x: Tensor, y: Tensor, norm: Tensor, eps: float) -> Tensor:
        both = summed(x, y, norm, eps)
        return ops.final_norm(x, tp_group.all_reduce(y), norm, eps) if both is None else both[1]

    def head(h: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
        found = gather_logits(ops.lm_head(h, w), tp_group, model_config.vocab_size)
        return found if out is None else out[: len(h)].copy_(found)

    parts: dict[str, Any] = {
        "embed": enter,
        "add_norm_qkv": project,
        "add_norm_gate_up": project_swiglu,
        "add_norm": add_norm,
    }
    # Consecutive sums use different buffers: the embedding's is 2, attention's 0, the feed-forward's 1.
    parts |= {"out_proj": partial(row_parallel, ops.out_proj, 0), "down_proj": partial(row_parallel, ops.down_proj, 1)}
    return ops._replace(**parts, final_norm=leave, lm_head=head)


def sample_from_shards(
    logits: Tensor, s: SamplingTensors, num_top_logprobs: int | None, tp_group: TPGroup, vocab_size: int
) -> SamplerOutput:
    """`sampling.sample` of the logits [N, W] that each rank has of its part of the vocabulary.

    A few numbers of each row are exchanged; where filters, edits or a grammar want all logits, these are.
    """
    if s.top_k_top_p is None and s.logit_edits is None and s.token_mask is None:
        part = vocab_shard(vocab_size, tp_group.shard)
        return sampling.merge_shards(
            tp_group.all_gather(sampling.sample_shard(logits.float(), s, num_top_logprobs, *part)),
            vocab_size,
            num_top_logprobs,
        )
    return sampling.sample(gather_logits(logits, tp_group, vocab_size).float(), s, num_top_logprobs)


def gather_logits(logits: Tensor, tp_group: TPGroup, vocab_size: int) -> Tensor:
    """The logits of all ranks, [N, V]."""
    return tp_group.all_gather(logits).movedim(0, 1).flatten(1)[:, :vocab_size]
