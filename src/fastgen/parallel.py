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
"""

from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from fastgen import sampling
from fastgen.models.spec import Place, Spec, share_of
from fastgen.models.transformer import Ops
from fastgen.types import Sampled, Sampling

gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its newer name, and its older


@runtime_checkable
class Group(Protocol):
    """The ranks of a model. Each method is a meeting of all of them."""

    @property
    def place(self) -> Place: ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in the place of `x`."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, n, ...]: everybody's `x` [n, ...]."""
        ...

    def least(self, n: int) -> int:
        """The smallest of everybody's n."""
        ...

    def agree(self, step: int, digest: int) -> None:
        """RuntimeError, one call late, if the ranks do not all say the same."""
        ...


class Ranks:
    """A group of torch.distributed: the default one, or `group`. Everybody has to make it, in the same order."""

    def __init__(self, group: Any = None) -> None:
        if not dist.is_initialized():
            raise ValueError("there is no process group: call torch.distributed.init_process_group first")
        self.group = group
        self.place = Place(dist.get_rank(group), dist.get_world_size(group))
        # What the host says must not wait for the device.
        self._host: Any = dist.new_group(None if group is None else dist.get_process_group_ranks(group), backend="gloo")
        self._asked: tuple[Any, int, Tensor] | None = None

    def all_reduce(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        found = x.new_empty(self.place.size * len(x), *x.shape[1:])
        gather(found, x.contiguous(), group=self.group)
        return found.unflatten(0, (self.place.size, -1))

    def least(self, n: int) -> int:
        found = torch.tensor(n, dtype=torch.int64, device="cpu")
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self._host)
        return int(found)

    def agree(self, step: int, digest: int) -> None:
        if self._asked is not None:
            work, before, found = self._asked
            work.wait()
            check(self.place.rank, before, found.tolist())
        found = torch.empty(self.place.size, dtype=torch.int64, device="cpu")
        mine = torch.tensor([digest], dtype=torch.int64, device="cpu")
        self._asked = gather(found, mine, group=self._host, async_op=True), step, found


def check(rank: int, step: int, digests: list[int]) -> None:
    """RuntimeError that names the ranks which planned another step than this one."""
    if others := [i for i, x in enumerate(digests) if x != digests[rank]]:
        raise RuntimeError(
            f"ranks have parted at step {step}: {', '.join(map(str, others))} planned or drew something else than "
            f"rank {rank}. All must get the same requests, settings and seeds in the same order"
        )


def sharded(ops: Ops, group: Group, spec: Spec) -> Ops:
    """The functions of a forward on one rank's parameters: `ops`, and what the ranks exchange.

    `spec` is the whole model's; the forward itself is given the rank's, `split(spec, size)`.
    """
    first, count = share_of(spec.vocab, group.place)
    rows = share_of(spec.vocab, Place(0, group.place.size))[1]  # of every rank, padding included

    def enter(embed: Tensor, token: Tensor, position: Tensor, local: Spec) -> tuple[Tensor, ...]:
        at = token - first
        x, *rest = ops.enter(embed, at.clamp(0, rows - 1), position, local)
        x = torch.where(((at >= 0) & (at < count))[:, None], x, 0)
        return group.all_reduce(x), *rest

    def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        y = group.all_reduce(ops.linear(x, w, None))
        return y if bias is None else y + bias

    def head(h: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
        found = whole(ops.head(h, w), group, spec.vocab)
        return found if out is None else out[: len(h)].copy_(found)

    return ops._replace(enter=enter, linear=linear, head=head)


def sample(logits: Tensor, s: Sampling, top: int | None, group: Group, vocab: int) -> Sampled:
    """`sampling.sample` of the logits [N, W] that each rank has of its part of the vocabulary.

    A few numbers of each row are exchanged; where filters, edits or a grammar want all logits, these are.
    """
    if s.filter is None and s.edits is None and s.allowed is None:
        part = share_of(vocab, group.place)
        return sampling.decide(group.all_gather(sampling.partial(logits.float(), s, top, *part)), vocab, top)
    return sampling.sample(whole(logits, group, vocab).float(), s, top)


def whole(logits: Tensor, group: Group, vocab: int) -> Tensor:
    """The logits of all ranks, [N, V]."""
    return group.all_gather(logits).movedim(0, 1).flatten(1)[:, :vocab]
