"""Weights and activations in 8 bits: e4m3 values with one scale for each output channel or token.

These plain ops are the specification of every fp8 kernel: activations are quantized token by token, products are
summed in fp32, multiplied by both scales, and rounded once to the model's dtype.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0  # the largest finite value (arXiv 2209.05433)


class QuantizedRows(NamedTuple):
    """Rows of e4m3 values, and the fp32 number that each row is multiplied by: activations, a row for each token."""

    data: Float[Tensor, "T D"]
    scale: Float[Tensor, " T"]


class QuantizedWeight(NamedTuple):
    """A weight in the place of a tensor of `Params`: e4m3 values, and an fp32 scale for each output channel (row)."""

    data: Float[Tensor, "N D"]
    scale: Float[Tensor, " N"]

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight."""
        return self.data.shape

    def rows(self, start: int, stop: int) -> "QuantizedWeight":
        """Returns a view of some output channels."""
        return QuantizedWeight(self.data[start:stop], self.scale[start:stop])

    def dequantize(self, dtype: torch.dtype) -> Float[Tensor, "N D"]:
        """Returns the weight in another dtype."""
        return dequantize(self.data, self.scale, dtype)

    def copy_(self, weight: "Tensor | QuantizedWeight", non_blocking: bool = False) -> None:
        """Overwrites the weight: quantizes a tensor on this weight's device, copies a quantized weight as it is."""
        if isinstance(weight, Tensor):
            weight = QuantizedWeight(*quantize_rows(weight.to(self.data.device, non_blocking=non_blocking)))
        self.data.copy_(weight.data, non_blocking=non_blocking)
        self.scale.copy_(weight.scale, non_blocking=non_blocking)


def quantize_rows(x: Float[Tensor, "*rows D"]) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, "*rows"]]:
    """Returns e4m3 values, rounded to nearest even, and fp32 scales: amax / 448 of each row, or 1 for zeros."""
    x = x.float()
    scale = x.abs().amax(-1) / E4M3_MAX
    scale = torch.where(scale > 0, scale, 1.0)
    return (x / scale[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


def dequantize(
    data: Float[Tensor, "*rows D"], scale: Float[Tensor, "*rows"], dtype: torch.dtype
) -> Float[Tensor, "*rows D"]:
    """Returns data * scale, rounded once to `dtype`."""
    return (data.float() * scale[..., None]).to(dtype)
