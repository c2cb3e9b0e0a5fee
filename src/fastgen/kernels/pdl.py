"""Dependent launches (Hopper): a kernel starts while the one before it ends, and waits for its results only where it
reads them. Between kernels of a few microseconds, what lies in between is a tenth of the time.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

SMALL_BATCH = 16  # tokens of a step up to which its kernels are that short
USE_PDL = True  # whether they are launched so where the device can


def pdl_launch_options(x: Tensor) -> dict[str, bool]:
    """Launch options of a kernel with a constant PDL whose input x has a row for each token."""
    cuda = x.device.type == "cuda"
    if USE_PDL and cuda and len(x) <= SMALL_BATCH and torch.cuda.get_device_capability(x.device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@triton.jit
@no_type_check
def grid_dependency_sync(PDL: tl.constexpr):
    """What the kernels before have written is there from here on. What nobody writes may be read before."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
