"""A sum over the ranks of a host (a one-shot all-reduce) with the residual sum and norm that follow it: one kernel in
the place of an all-reduce, a sum and a norm.

Each rank's part of the sum lies where this rank can read it: in the other's memory, or here if that one has pushed it.
A program of the kernel owns some rows: it tells the same program of every other rank that this rank has come so far,
waits until they have, and adds the rows of all ranks in the order of ranks, so that all get the same bits.

A flag counts how often a program of a rank has come: each has one of every rank's, its own included, and waits until
the others have come as often. So nothing has to be reset, and a captured kernel can be replayed. A part may be written
over once the next sum has been made: whoever takes part in that has read this one.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from fastgen.kernels import pdl
from fastgen.kernels.pdl import grid_dependency_sync

MAX_PROGRAMS = 4 * 132  # at most: as many as run together; each then has several rows


@triton.jit(do_not_specialize=["num_rows"])
@no_type_check  # pointers, numbers and constants, in Triton's own language
def _all_reduce_add_norm_kernel(
    own_partial, partial_ptrs, flag_ptrs, x, norm, residual_out, out, num_rows, eps,
    RANK: tl.constexpr, WORLD_SIZE: tl.constexpr, MAX_PROGRAMS: tl.constexpr, D: tl.constexpr, B: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """total = x + the sum of the parts, out = its norm; all [rows, D]."""
    d = tl.arange(0, B)
    inside = d < D
    weight = tl.load(norm + d, mask=inside, other=0)
    here = tl.load(flag_ptrs + RANK).to(tl.pointer_type(tl.int32))
    end = here + MAX_PROGRAMS * WORLD_SIZE  # set when a rank is gone
    mine = tl.program_id(0) * WORLD_SIZE
    count = tl.atomic_add(here + mine + RANK, 1, sem="relaxed") + 1
    grid_dependency_sync(PDL)
    for r in tl.static_range(WORLD_SIZE):
        if r != RANK:
            there = tl.load(flag_ptrs + r).to(tl.pointer_type(tl.int32))
            tl.atomic_add(there + mine + RANK, 1, sem="release", scope="sys")
    for r in tl.static_range(WORLD_SIZE):
        if r != RANK:
            waits = 1
            while waits != 0:
                waits = (tl.atomic_add(here + mine + r, 0, sem="acquire", scope="sys") - count < 0).to(tl.int32)
                if waits != 0:
                    waits = 1 - tl.load(end, volatile=True)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        at = row * D + d
        h = tl.load(x + at, mask=inside, other=0)
        y = tl.zeros([B], tl.float32)
        for r in tl.static_range(WORLD_SIZE):
            part = own_partial
            if r != RANK:
                part = tl.load(partial_ptrs + r).to(tl.pointer_type(x.dtype.element_ty))
                part = tl.multiple_of(part, 16)  # else each number is loaded alone
            # Past the first cache, which may hold what was there before.
            y += tl.load(part + at, mask=inside, other=0, cache_modifier=".cg").to(tl.float32)
        h += y.to(h.dtype)
        tl.store(residual_out + at, h, mask=inside)
        h32 = h.to(tl.float32)
        unit = (h32 * tl.rsqrt(tl.sum(h32 * h32, 0) / D + eps)).to(h.dtype)
        tl.store(out + at, unit * weight, mask=inside)


def all_reduce_add_norm(
    x: Float[Tensor, "T D"],
    own_partial: Float[Tensor, "T D"],
    partial_ptrs: Int[Tensor, " R"],
    flag_ptrs: Int[Tensor, " R"],
    rank: int,
    norm: Float[Tensor, " D"],
    eps: float,
) -> tuple[Float[Tensor, "T D"], Float[Tensor, "T D"]]:
    """x plus the sum of all ranks' parts, and its RMS norm.

    `own`: this rank's part. `parts`: where each other rank's part [T, D] begins, in x's dtype, aligned to 16 bytes.
    `flags`: where each rank's `PROGRAMS` x R + 1 flags do, int32, all 0 before the first call; waiting ends for ever
    when the last is set. All ranks make this call with as many rows.
    """
    rows, width = x.shape
    total, out = torch.empty_like(x), torch.empty_like(x)
    _all_reduce_add_norm_kernel[(min(rows, MAX_PROGRAMS),)](
        own_partial, partial_ptrs, flag_ptrs, x, norm, total, out, rows, eps, RANK=rank, WORLD_SIZE=len(partial_ptrs), MAX_PROGRAMS=MAX_PROGRAMS, D=width,
        B=triton.next_power_of_2(width), num_warps=8, **pdl.pdl_launch_options(x),
    )  # fmt: skip
    return total, out
