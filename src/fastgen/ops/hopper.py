"""Two habits of kernels on Hopper GPUs that hide what lies between kernels where each is short.

Dependent launch: a kernel starts while the one before it ends, and waits for its results only where it reads them.
Fetching ahead: a kernel that leaves the memory idle brings weights that are read next into L2.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
import functools
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

DEPENDENT = True  # whether kernels are launched so
AHEAD = 16 * 2**20  # bytes at most
PIECE = tl.constexpr(4096)  # bytes of one request; a program of 4 warps makes 128


@functools.cache
def hopper(device: torch.device) -> bool:
    """Whether the device knows both."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def dependent(x: Tensor) -> dict[str, bool]:
    """Launch options of a kernel with a constant PDL, for input x."""
    on = DEPENDENT and hopper(x.device)
    return {"PDL": on, "launch_pdl": on} if on else {"PDL": False}


def ahead(w: Tensor | None) -> tuple[Tensor | None, int]:
    """The weights to fetch, and the number of programs that do."""
    if w is None or not hopper(w.device) or w.nbytes < 128 * PIECE.value:
        return None, 0
    return w, min(w.nbytes, AHEAD) // (128 * PIECE.value)


@triton.jit
@no_type_check  # pointers, in Triton's own language
def fetch(w, program):
    """Ask L2 for this program's 512 KB of w."""
    at = w.to(tl.pointer_type(tl.uint8)) + (program * 128 + tl.arange(0, 128)).to(tl.int64) * PIECE
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], 4096; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
@no_type_check
def begin(PDL: tl.constexpr):
    """What the kernels before have written is there from here on."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
