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
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from fastgen import sampling
from fastgen.models.spec import Place, Spec, share_of
from fastgen.models.transformer import Ops
from fastgen.types import Sampled, Sampling

# Bytes that a rank reads from all others for one sum. Beyond it parts are pushed, or NCCL sums (`layouts_gpu.py`).
READ = 2**24
PUSHED = 2048  # rows that are pushed together, while the product of the next ones is made
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

    def peers(self, width: int, rows: int, dtype: torch.dtype, device: torch.device) -> "Peers | None":
        """None where ranks cannot use each other's memory; made by all together. As `Peers`."""
        if device.type != "cuda" or self.place.size == 1:
            return None
        try:
            made = Peers(self, width, rows, dtype, device)
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
    """Memory of each rank of a host that the others read and write: parts of sums, of `width` numbers a row.

    Made by all ranks together; RuntimeError on all of them if they cannot use each other's memory. `rows`: of the
    largest sum that is wanted. `read`: as `READ`.
    """

    PARTS = 3
    _made: tuple[Tensor | None, Tensor | None] = None, None  # a part, until it is read, and where all ranks' are

    def __init__(
        self, group: "Ranks", width: int, rows: int, dtype: torch.dtype, device: torch.device, read: int | None = None
    ) -> None:
        # Multicast is never used; where it is not allowed, even asking for it fails.
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        import torch.distributed._symmetric_memory as symmetric

        from fastgen.ops.peers import PROGRAMS

        size, self.rank = group.place.size, group.place.rank
        host = int.from_bytes(socket.gethostname().encode()[-7:])
        if group.least(host) != host or -group.least(-host) != host:
            raise RuntimeError("ranks on several hosts")
        few = min(rows, (READ if read is None else read) // (size - 1) // (width * dtype.itemsize))
        many = rows if size == 2 and rows > few else 0
        shapes = [few] * self.PARTS + [many] * 2  # read by others; written by the other
        bytes = [-(-n * width * dtype.itemsize // 128) * 128 for n in shapes]
        offsets = [sum(bytes[:i]) for i in range(len(bytes) + 1)]
        count = PROGRAMS * size + 1  # of flags; the last ends all waiting

        def attempt(make: Any) -> Any:
            try:
                made, problem = make(), None
            except RuntimeError as e:
                made, problem = None, e
            if not group.least(problem is None):
                raise RuntimeError(f"a rank has no memory that others can use: {problem or 'another one'}")
            return made

        self.buffer = attempt(lambda: symmetric.empty(offsets[-1] + 4 * count, dtype=torch.uint8, device=device))
        ranks: Any = group.group or dist.group.WORLD
        handle = attempt(lambda: symmetric.rendezvous(self.buffer, ranks))
        self.buffer.zero_()
        torch.cuda.synchronize(device)
        group.least(0)  # nobody tells anybody anything before all flags are 0
        first = self.buffer.data_ptr() - handle.buffer_ptrs[self.rank]
        begins = torch.tensor([p + first for p in handle.buffer_ptrs], dtype=torch.int64, device="cpu")
        places = [(begins + offset).to(device) for offset in offsets]

        def leaf(buffer: Tensor, i: int) -> Tensor:
            return buffer[offsets[i] :][: shapes[i] * width * dtype.itemsize].view(dtype).view(-1, width)

        self.parts = [leaf(self.buffer, i) for i in range(self.PARTS)]
        self._at, self._flags, self._many = places[: self.PARTS], places[-1], many
        if many:
            theirs = handle.get_buffer(1 - self.rank, (self.buffer.numel(),), torch.uint8, first)
            self._inbox = [(leaf(self.buffer, self.PARTS + i), leaf(theirs, self.PARTS + i)) for i in range(2)]
            self._at += [places[self.PARTS + i].fill_(here.data_ptr()) for i, (here, _) in enumerate(self._inbox)]
        self._end = self.buffer[offsets[-1] :].view(torch.int32)[-1:]
        self._one = torch.ones(1, dtype=torch.int32, device="cpu").pin_memory()
        self._stream, self._last = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def part(self, i: int, rows: int, make: Callable[[slice, Tensor], Any]) -> Tensor | None:
        """This rank's part of a sum of so many rows, where others have it too. `make` puts some of them into a place.

        `i`: 0 and 1 in turn, since a part lasts until the next sum but one; 2 at the beginning of a step, for few rows.
        """
        if rows <= len(self.parts[i]):
            y, at = self.parts[i][:rows], self._at[i]
            make(slice(rows), y)
        elif i < 2 and rows <= self._many:
            y, at = self.parts[i].new_empty(rows, self.parts[i].shape[1]), self._at[self.PARTS + i]
            for first in range(0, rows, PUSHED):
                some = slice(first, min(first + PUSHED, rows))
                make(some, y[some])
                self._push(y[some], self._inbox[i][1][some])
            self._pushed()
        else:
            return None
        self._made = y, at
        return y

    def _push(self, mine: Tensor, theirs: Tensor) -> None:
        """By an engine of its own, beside what is launched next."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            theirs.copy_(mine, non_blocking=True)

    def _pushed(self) -> None:
        torch.cuda.current_stream().wait_stream(self._stream)

    def add_norm(self, x: Tensor, y: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
        """`transformer.add_norm` of x and the sum over the ranks of which y is a part; None if others don't have it."""
        (made, at), self._made = self._made, (None, None)
        return None if made is not y or at is None else self._sum_norm(x, y, at, norm, eps)

    def _sum_norm(self, x: Tensor, y: Tensor, at: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        from fastgen.ops.peers import sum_norm

        return sum_norm(x, y, at, self._flags, self.rank, norm, eps)

    def end(self) -> None:
        """Kernels that wait for a rank that is gone go on, now and from now on. Called by any thread."""
        with torch.cuda.stream(self._last):
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
        part = None if peers is None else peers.part(2, len(y), lambda _, to: to.copy_(y))
        return zero, y if part is None else part, *rest

    def row_parallel(
        linear: Callable[..., Tensor], x: Tensor, w: Tensor, bias: Tensor | None = None, change: Any = None
    ) -> Tensor:
        nonlocal turn
        turn, bias = 1 - turn, None if group.place.rank else bias

        def make(rows: slice, to: Tensor) -> None:
            ops.head(x[rows], w, to)  # the same product, to a place
            if bias is not None:
                to += bias
            if change is not None and (changed := change(to, x[rows], rows)) is not to:
                to.copy_(changed)

        part = None if peers is None else peers.part(turn, len(x), make)
        return ops.row_parallel(linear, x, w, bias, change) if part is None else part

    def summed(*args: Any) -> tuple[Tensor, Tensor] | None:
        return None if peers is None else peers.add_norm(*args)

    def add_norm(x: Tensor, y: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        both = summed(x, y, norm, eps)
        return ops.add_norm(x, group.all_reduce(y), norm, eps) if both is None else both

    def project(x: Tensor, y: Tensor, norm: Tensor, eps: float, *w: Tensor | None) -> tuple[Tensor, Tensor]:
        if (both := summed(x, y, norm, eps)) is None:
            return ops.project(x, group.all_reduce(y), norm, eps, *w)
        return both[0], ops.linear(both[1], *w)

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

    parts: dict[str, Any] = {"enter": enter, "project": project, "project_swiglu": project_swiglu, "add_norm": add_norm}
    return ops._replace(**parts, row_parallel=row_parallel, leave=leave, head=head)


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
