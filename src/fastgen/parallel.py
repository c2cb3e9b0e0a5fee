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

Partial sums are summed by whoever reads them: up to a size by a kernel that reads them from the other ranks' memory and
goes on with the norm (`Peers`), beyond it by an all-reduce of the group.
"""

import os
import socket
import warnings
import weakref
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from fastgen import sampling
from fastgen.models.spec import Place, Spec, share_of
from fastgen.models.transformer import Ops
from fastgen.types import Sampled, Sampling

# Bytes that a rank reads from all others for one sum: beyond it, all-reduces of NCCL are faster (`layouts_gpu.py`).
MOST = 2**24
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
        self._peers: weakref.WeakSet[Peers] = weakref.WeakSet()

    def peers(self, width: int, dtype: torch.dtype, device: torch.device) -> "Peers | None":
        """None where ranks cannot read each other's memory; made by all together."""
        if device.type != "cuda" or self.place.size == 1:
            return None
        try:
            made = Peers(self, width, dtype, device)
        except RuntimeError as e:
            if self.place.rank == 0:
                warnings.warn(f"sums of all sizes go through NCCL: {e}", stacklevel=2)
            return None
        self._peers.add(made)
        return made

    def release(self) -> None:
        """After the end of a rank: whatever waits for it on this device goes on, to no good result."""
        for made in [*self._peers]:
            made.end()

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


class Peers:
    """Memory of each rank of a host that the others read: parts of sums, of `width` numbers a row.

    Made by all ranks together; RuntimeError on all of them if they cannot read each other's memory. `most`: as `MOST`.
    """

    PARTS = 3

    def __init__(
        self, group: "Ranks", width: int, dtype: torch.dtype, device: torch.device, most: int | None = None
    ) -> None:
        # Multicast is never used; where it is not allowed, even asking for it fails.
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        import torch.distributed._symmetric_memory as symmetric

        from fastgen.ops.peers import PROGRAMS

        size, self.rank = group.place.size, group.place.rank
        host = int.from_bytes(socket.gethostname().encode()[-7:])
        if group.least(host) != host or -group.least(-host) != host:
            raise RuntimeError("ranks on several hosts")
        row = width * dtype.itemsize
        rows = (MOST if most is None else most) // (size - 1) // row
        room = -(-rows * row // 128) * 128
        count = PROGRAMS * size + 1  # of flags; the last ends all waiting

        def attempt(make: Any) -> Any:
            try:
                made, problem = make(), None
            except RuntimeError as e:
                made, problem = None, e
            if not group.least(problem is None):
                raise RuntimeError(f"a rank has no memory that others can read: {problem or 'another one'}")
            return made

        self.buffer = attempt(lambda: symmetric.empty(self.PARTS * room + 4 * count, dtype=torch.uint8, device=device))
        ranks: Any = group.group or dist.group.WORLD
        handle = attempt(lambda: symmetric.rendezvous(self.buffer, ranks))
        self.buffer.zero_()
        torch.cuda.synchronize(device)
        group.least(0)  # nobody tells anybody anything before all flags are 0
        offset = self.buffer.data_ptr() - handle.buffer_ptrs[self.rank]
        begins = torch.tensor([p + offset for p in handle.buffer_ptrs], dtype=torch.int64, device="cpu")
        self.parts = [self.buffer[i * room :][: rows * row].view(dtype).view(rows, width) for i in range(self.PARTS)]
        self._at = [(begins + i * room).to(device) for i in range(self.PARTS)]
        self._flags = (begins + self.PARTS * room).to(device)
        self._end = self.buffer[self.PARTS * room :].view(torch.int32)[-1:]
        self._one = torch.ones(1, dtype=torch.int32, device="cpu").pin_memory()
        self._stream = torch.cuda.Stream(device)

    def room(self, i: int, rows: int) -> Tensor | None:
        """For part i of a sum of so many rows, if there is."""
        return self.parts[i][:rows] if rows <= len(self.parts[i]) else None

    def index(self, y: Tensor) -> int | None:
        """Which part y is, if it is one."""
        return next((i for i, p in enumerate(self.parts) if p.data_ptr() == y.data_ptr()), None)

    def add_norm(self, x: Tensor, i: int, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """`transformer.add_norm` of x and the sum over the ranks of part i."""
        from fastgen.ops.peers import sum_norm

        return sum_norm(x, self._at[i], self._flags, self.rank, norm, eps)

    def end(self) -> None:
        """Kernels that wait for a rank that is gone go on, now and from now on. Called by any thread."""
        with torch.cuda.stream(self._stream):
            self._end.copy_(self._one, non_blocking=True)


def sharded(ops: Ops, group: Group, spec: Spec, peers: Peers | None = None) -> Ops:
    """The functions of a forward on one rank's parameters: `ops`, and what the ranks exchange.

    `spec` is the whole model's; the forward itself is given the rank's, `split(spec, size)`. Between its functions, y
    is this rank's part of the sum.
    """
    first, count = share_of(spec.vocab, group.place)
    rows = share_of(spec.vocab, Place(0, group.place.size))[1]  # of every rank, padding included
    turn = 0

    def enter(embed: Tensor, token: Tensor, position: Tensor, local: Spec) -> tuple[Tensor, ...]:
        nonlocal turn
        turn = 0
        at = token - first
        x, zero, *rest = ops.enter(embed, at.clamp(0, rows - 1), position, local)
        y = torch.where(((at >= 0) & (at < count))[:, None], x, 0)
        # A part of its own, since the step before has ended with one of the others.
        if peers is not None and (room := peers.room(2, len(y))) is not None:
            y = room.copy_(y)
        return zero, y, *rest

    def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        nonlocal turn
        turn = 1 - turn
        room = None if peers is None else peers.room(turn, len(x))
        y = ops.linear(x, w, None) if room is None else ops.head(x, w, room)  # the same product, to a place
        return y if bias is None or group.place.rank else y.add_(bias)

    def summed(x: Tensor, y: Tensor, *norm: Any) -> tuple[Tensor, Tensor] | None:
        """`add_norm`, where the parts are in memory that all can read."""
        i = None if peers is None else peers.index(y)
        return None if peers is None or i is None else peers.add_norm(x, i, *norm)

    def project(
        x: Tensor, y: Tensor, norm: Tensor, eps: float, w: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if (both := summed(x, y, norm, eps)) is None:
            return ops.project(x, group.all_reduce(y), norm, eps, w, bias)
        return both[0], ops.linear(both[1], w, bias)

    def project_swiglu(x: Tensor, y: Tensor, norm: Tensor, eps: float, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        if (both := summed(x, y, norm, eps)) is None:
            return ops.project_swiglu(x, group.all_reduce(y), norm, eps, gate_up)
        return both[0], ops.swiglu(ops.linear(both[1], gate_up, None))

    def leave(x: Tensor, y: Tensor, norm: Tensor, eps: float) -> Tensor:
        both = summed(x, y, norm, eps)
        return ops.leave(x, group.all_reduce(y), norm, eps) if both is None else both[1]

    def head(h: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
        found = whole(ops.head(h, w), group, spec.vocab)
        return found if out is None else out[: len(h)].copy_(found)

    parts: dict[str, Any] = {"enter": enter, "linear": linear, "project": project, "project_swiglu": project_swiglu}
    return ops._replace(**parts, leave=leave, head=head)


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
