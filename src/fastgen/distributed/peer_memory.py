"""Peer memory: all-reduces between the GPUs of one host by kernels that read or write each other's memory.

Small all-reduces read peers' memory directly (one-shot). Large ones between exactly two ranks are pushed to the other
rank, in chunks, while the matmul computes the next chunk. Either way one kernel then adds partial sums and residual
stream, and applies the norm. All other all-reduces are NCCL's.
"""

import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from fastgen.core.types import PartialSum

if TYPE_CHECKING:
    from fastgen.distributed.tensor_parallel import TPProcessGroup

Rows = Float[Tensor, "T D"]
WriteRows = Callable[[slice, Tensor], Any]  # writes rows of a partial sum to a tensor
# Bytes that a rank reads from all others for one all-reduce. Above it, partial sums are pushed, or NCCL's all-reduce is
# faster (`benchmarks/layouts_gpu.py`).
ONE_SHOT_MAX_BYTES = 2**24
PUSH_CHUNK_ROWS = 2048  # rows that are pushed together
NUM_READ_BUFFERS = 3


class PeerBuffers:
    """Symmetric memory of a host's ranks for partial sums [rows, hidden_size]; all ranks must construct it together.

    `max_num_tokens` are the rows of the largest all-reduce. Raises RuntimeError on all ranks if they cannot use each
    other's memory.
    """

    # The buffers that other ranks read. Consecutive sums use different ones: a buffer is written again only after the
    # all-reduce of another one, which shows that all ranks have read it.
    ATTENTION, MLP, EMBEDDING = range(3)

    def __init__(
        self, group: "TPProcessGroup", hidden_size: int, max_num_tokens: int, dtype: torch.dtype, device: torch.device,
        one_shot_max_bytes: int | None = None,
    ) -> None:  # fmt: skip
        # Multicast is never used; where it is not allowed, even asking for it fails.
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        import torch.distributed._symmetric_memory as symmetric

        from fastgen.kernels.all_reduce_norm import MAX_PROGRAMS

        size, self.rank = group.shard.size, group.shard.rank
        host = int.from_bytes(socket.gethostname().encode()[-7:])
        if group.all_reduce_min(host) != host or -group.all_reduce_min(-host) != host:
            raise RuntimeError("ranks on several hosts")
        row_bytes = hidden_size * dtype.itemsize
        max_bytes = ONE_SHOT_MAX_BYTES if one_shot_max_bytes is None else one_shot_max_bytes
        read_rows = min(max_num_tokens, max_bytes // (size - 1) // row_bytes)
        push_rows = max_num_tokens if size == 2 and max_num_tokens > read_rows else 0
        num_rows = [read_rows] * NUM_READ_BUFFERS + [push_rows] * 2  # read by other ranks; written by the other rank
        num_bytes = [-(-n * row_bytes // 128) * 128 for n in num_rows]
        offsets = [sum(num_bytes[:i]) for i in range(len(num_bytes) + 1)]
        num_flags = MAX_PROGRAMS * size + 1  # the last one ends all waiting

        def allocate_on_all_ranks(allocate: Callable[[], Any]) -> Any:
            try:
                result, error = allocate(), None
            except RuntimeError as e:
                result, error = None, e
            if not group.all_reduce_min(error is None):
                raise RuntimeError(f"a rank has no memory that others can use: {error or 'another rank'}")
            return result

        total = offsets[-1] + 4 * num_flags
        self.buffer = allocate_on_all_ranks(lambda: symmetric.empty(total, dtype=torch.uint8, device=device))
        ranks: Any = group.group or dist.group.WORLD
        handle = allocate_on_all_ranks(lambda: symmetric.rendezvous(self.buffer, ranks))
        self.buffer.zero_()
        torch.cuda.synchronize(device)
        group.all_reduce_min(0)  # no rank signals another before all flags are 0
        buffer_offset = self.buffer.data_ptr() - handle.buffer_ptrs[self.rank]
        buffer_ptrs = torch.tensor([p + buffer_offset for p in handle.buffer_ptrs], dtype=torch.int64, device="cpu")
        rank_ptrs = [(buffer_ptrs + offset).to(device) for offset in offsets]

        def partial_view(buffer: Tensor, i: int) -> Tensor:
            return buffer[offsets[i] :][: num_rows[i] * row_bytes].view(dtype).view(-1, hidden_size)

        self._push_max_rows = push_rows
        self._partials = [partial_view(self.buffer, i) for i in range(NUM_READ_BUFFERS)]
        self._rank_ptrs, self._flag_ptrs = rank_ptrs[:NUM_READ_BUFFERS], rank_ptrs[-1]
        if push_rows:
            remote = handle.get_buffer(1 - self.rank, (self.buffer.numel(),), torch.uint8, buffer_offset)
            pushed = range(NUM_READ_BUFFERS, NUM_READ_BUFFERS + 2)
            self._push_buffers = [(partial_view(self.buffer, i), partial_view(remote, i)) for i in pushed]
            for i, (local, _) in zip(pushed, self._push_buffers, strict=True):
                self._rank_ptrs.append(rank_ptrs[i].fill_(local.data_ptr()))
        self._abort_flag = self.buffer[offsets[-1] :].view(torch.int32)[-1:]
        self._abort_value = torch.ones(1, dtype=torch.int32, device="cpu").pin_memory()
        self._push_stream, self._abort_stream = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def write_partial(self, i: int, num_rows: int, write: WriteRows) -> PartialSum | None:
        """Returns the partial sum that `write(rows, out)` writes, in peer memory; None if the rows do not fit. `i` is
        ATTENTION, MLP or EMBEDDING. `write` is called for consecutive slices of rows."""
        if num_rows <= len(self._partials[i]):
            y, rank_ptrs = self._partials[i][:num_rows], self._rank_ptrs[i]
            write(slice(num_rows), y)
        elif i != self.EMBEDDING and num_rows <= self._push_max_rows:
            y = self._partials[i].new_empty(num_rows, self._partials[i].shape[1])
            rank_ptrs, remote = self._rank_ptrs[NUM_READ_BUFFERS + i], self._push_buffers[i][1]
            for start in range(0, num_rows, PUSH_CHUNK_ROWS):
                rows = slice(start, min(start + PUSH_CHUNK_ROWS, num_rows))
                write(rows, y[rows])
                self._push(y[rows], remote[rows])
            self._wait_for_push()
        else:
            return None
        return PartialSum(y, rank_ptrs)

    def _push(self, local: Tensor, remote: Tensor) -> None:
        """Copies rows to the other rank on a stream of its own, concurrently with the next launches."""
        self._push_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._push_stream):
            remote.copy_(local, non_blocking=True)

    def _wait_for_push(self) -> None:
        torch.cuda.current_stream().wait_stream(self._push_stream)

    def all_reduce_add_norm(self, x: Rows, y: PartialSum, norm: Float[Tensor, " D"], eps: float) -> tuple[Rows, Rows]:
        """Returns x plus the sum of all ranks' partial sums, and the RMS norm of that. `y` must be in peer memory."""
        from fastgen.kernels.all_reduce_norm import all_reduce_add_norm

        assert y.rank_ptrs is not None
        return all_reduce_add_norm(x, y.local, y.rank_ptrs, self._flag_ptrs, self.rank, norm, eps)

    def abort_waits(self) -> None:
        """Makes all kernels, running and later ones, stop waiting for a lost rank. Thread-safe."""
        with torch.cuda.stream(self._abort_stream):
            self._abort_flag.copy_(self._abort_value, non_blocking=True)
