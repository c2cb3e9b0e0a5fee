"""Programmatic dependent launch (PDL, Hopper): a kernel starts while the previous one ends, and waits for its results
only where it reads them. Gaps between kernels of a few microseconds would otherwise take a tenth of the time.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

SMALL_BATCH = 16  # steps of up to this many tokens run the kernels of `small_batch`, with PDL
USE_PDL = True


def launch_options(x: Tensor) -> dict[str, bool]:
    """Returns the launch options of a kernel with a constexpr PDL, for an input x with one row per token."""
    cuda = x.device.type == "cuda"
    if USE_PDL and cuda and len(x) <= SMALL_BATCH and torch.cuda.get_device_capability(x.device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@triton.jit
@no_type_check
def grid_dependency_sync(PDL: tl.constexpr):
    """Waits until all previous kernels' writes are visible. Weights and earlier steps' results may be loaded before."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
