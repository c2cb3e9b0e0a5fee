"""Memory that several tensors lie in, one after the other; `training.sleep` has the memory that can be released."""

from collections.abc import Sequence
from math import prod
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

ALIGNMENT_BYTES = 512  # of each tensor


@runtime_checkable
class TensorMemory(Protocol):
    """Memory of a fixed size on one device."""

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Returns a tensor of zeros in the memory that is left."""
        ...


def align(nbytes: int) -> int:
    """Returns the bytes that a tensor of `nbytes` takes of a TensorMemory."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def bytes_needed(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> int:
    """Returns the bytes that tensors of these shapes take of a TensorMemory."""
    return sum(align(prod(shape) * dtype.itemsize) for shape in shapes)
