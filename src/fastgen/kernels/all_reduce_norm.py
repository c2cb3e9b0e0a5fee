"""One-shot all-reduce over the ranks of a host, fused with the residual addition and the RMS norm that follow it.

This rank can read every rank's partial sum: in that rank's memory, or in its own if that rank has pushed it there.
A program signals the same program of all other ranks that this rank's partial sum is written, waits for their signals,
and adds the rows of all ranks in rank order, so that all ranks get the same bits.

A signal increments a counter. Every program has a counter per rank, its own included, and waits until the others are
as high as its own: nothing is reset, and a captured kernel can be replayed. A partial sum may be overwritten after the
next all-reduce, because a rank signals there only after it has read this one.
"""

# pyright: reportCallIssue=false
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from fastgen.kernels import pdl
from fastgen.kernels.pdl import grid_dependency_sync

MAX_PROGRAMS = 4 * 132  # all must run at once, since they wait for each other; each has several rows if need be


@triton.jit(do_not_specialize=["num_rows"])
@no_type_check  # pointers, numbers and constants, in Triton's own language
def _all_reduce_add_norm_kernel(
    own_partial, partial_ptrs, flag_ptrs, x, norm, residual_out, out, num_rows, eps,
    RANK: tl.constexpr, WORLD_SIZE: tl.constexpr, MAX_PROGRAMS: tl.constexpr, D: tl.constexpr, B: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Writes residual_out = x + the sum of all ranks' partial sums, and out = its RMS norm, both [num_rows, D]."""
    d = tl.arange(0, B)
    inside = d < D
    weight = tl.load(norm + d, mask=inside, other=0)
    local_flags = tl.load(flag_ptrs + RANK).to(tl.pointer_type(tl.int32))
    abort_flag = local_flags + MAX_PROGRAMS * WORLD_SIZE  # set when a rank has exited
    program_flags = tl.program_id(0) * WORLD_SIZE
    count = tl.atomic_add(local_flags + program_flags + RANK, 1, sem="relaxed") + 1
    grid_dependency_sync(PDL)
    for r in tl.static_range(WORLD_SIZE):
        if r != RANK:
            remote_flags = tl.load(flag_ptrs + r).to(tl.pointer_type(tl.int32))
            tl.atomic_add(remote_flags + program_flags + RANK, 1, sem="release", scope="sys")
    for r in tl.static_range(WORLD_SIZE):
        if r != RANK:
            waiting = 1
            while waiting != 0:
                arrived = tl.atomic_add(local_flags + program_flags + r, 0, sem="acquire", scope="sys")
                waiting = (arrived - count < 0).to(tl.int32)
                if waiting != 0:
                    waiting = 1 - tl.load(abort_flag, volatile=True)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        offset = row * D + d
        h = tl.load(x + offset, mask=inside, other=0)
        y = tl.zeros([B], tl.float32)
        for r in tl.static_range(WORLD_SIZE):
            partial = own_partial
            if r != RANK:
                partial = tl.load(partial_ptrs + r).to(tl.pointer_type(x.dtype.element_ty))
                partial = tl.multiple_of(partial, 16)  # without this, numbers are loaded one by one
            # Loads bypass the L1 cache, which may hold old values.
            y += tl.load(partial + offset, mask=inside, other=0, cache_modifier=".cg").to(tl.float32)
        h += y.to(h.dtype)
        tl.store(residual_out + offset, h, mask=inside)
        h32 = h.to(tl.float32)
        unit = (h32 * tl.rsqrt(tl.sum(h32 * h32, 0) / D + eps)).to(h.dtype)
        tl.store(out + offset, unit * weight, mask=inside)


def all_reduce_add_norm(
    x: Float[Tensor, "T D"], own_partial: Float[Tensor, "T D"], partial_ptrs: Int[Tensor, " ranks"],
    flag_ptrs: Int[Tensor, " ranks"], rank: int, norm: Float[Tensor, " D"], eps: float,
) -> tuple[Float[Tensor, "T D"], Float[Tensor, "T D"]]:  # fmt: skip
    """Returns x plus the sum of all ranks' partial sums, and its RMS norm. All ranks must pass equal numbers of rows.

    `partial_ptrs` are the addresses of the ranks' partial sums [T, D], of x's dtype, aligned to 16 bytes; this rank's
    own is `own_partial`. `flag_ptrs` are those of the ranks' `MAX_PROGRAMS` * ranks + 1 counters, int32, 0 before the
    first call. Once a rank's last counter is 1, that rank never waits again.
    """
    rows, width = x.shape
    residual, out = torch.empty_like(x), torch.empty_like(x)
    _all_reduce_add_norm_kernel[(min(rows, MAX_PROGRAMS),)](
        own_partial, partial_ptrs, flag_ptrs, x, norm, residual, out, rows, eps, RANK=rank,
        WORLD_SIZE=len(partial_ptrs), MAX_PROGRAMS=MAX_PROGRAMS, D=width, B=triton.next_power_of_2(width), num_warps=8,
        **pdl.launch_options(x),
    )  # fmt: skip
    return residual, out
