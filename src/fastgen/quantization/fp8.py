"""Weights and activations in 8 bits: e4m3 values with one scale for each output channel or token.

These plain ops are the specification of every fp8 kernel: activations are quantized token by token, products are
summed in fp32, multiplied by both scales, and rounded once to the model's dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0  # the largest finite value (arXiv 2209.05433)
MIN_SCALE = 2.0**-126  # the smallest normal number of fp32
CHUNK_VALUES = 2**22  # quantized or dequantized at once, so that their fp32 copies stay small


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Activations: a row of e4m3 values for each token, and the fp32 number that it is multiplied by."""

    data: Float[Tensor, "T D"]  # a kernel may store the values in another dtype and order
    scale: Float[Tensor, " T"]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, rows: slice) -> "QuantizedRows":
        return QuantizedRows(self.data[rows], self.scale[rows])


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

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.data.nbytes + self.scale.nbytes

    def map(self, fn: Callable[[Tensor], Tensor]) -> "QuantizedWeight":
        """Returns the weight with a function applied to both tensors, such as a copy to another device."""
        return QuantizedWeight(fn(self.data), fn(self.scale))

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """Returns the weight on a device."""
        return self.map(lambda x: x.to(device))

    def dequantize(self, dtype: torch.dtype) -> Float[Tensor, "N D"]:
        """Returns the weight in another dtype."""
        return dequantize(self.data, self.scale, dtype)

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        """Computes torch's own `linear` with the weight, so that the plain ops of a forward take it as well.

        Raises TypeError for other functions of torch.
        """
        if func is F.linear:
            return quantized_linear(F.linear, *args, **kwargs or {})
        name = getattr(func, "__name__", func)
        raise TypeError(f"{name} does not take a QuantizedWeight: pass it weight.dequantize(dtype), a tensor")

    def copy_(self, weight: "Tensor | QuantizedWeight", non_blocking: bool = False) -> None:
        """Overwrites the weight: quantizes a tensor on this weight's device, copies a quantized weight as it is."""
        if isinstance(weight, QuantizedWeight):
            self.data.copy_(weight.data, non_blocking=non_blocking)
            self.scale.copy_(weight.scale, non_blocking=non_blocking)
            return
        for start, stop in row_chunks(self.shape):
            chunk = weight[start:stop].to(self.data.device, non_blocking=non_blocking)
            data, scale = quantize_rows(chunk)
            self.data[start:stop].copy_(data)
            self.scale[start:stop].copy_(scale)


def is_quantized_weight(x: object) -> bool:
    """Returns whether a node of a tree is a quantized weight, at which walks over `Params` stop (`is_leaf`)."""
    return isinstance(x, QuantizedWeight)


def weight_leaves(params: Any) -> list[Any]:
    """Returns the leaves of a tree in order: tensors, quantized weights and None."""
    return tree_leaves(params, is_leaf=is_quantized_weight)


def map_weights(fn: Callable[..., Any], params: Any, *more: Any) -> Any:
    """Returns a tree with a function applied to each tensor and quantized weight. `more` are trees of the same form."""
    return tree_map(lambda w, *x: None if w is None else fn(w, *x), params, *more, is_leaf=is_quantized_weight)


def is_quantized(params: Any) -> bool:
    """Returns whether any weight of a tree is quantized."""
    return any(map(is_quantized_weight, weight_leaves(params)))


def copy_weight(target: Any, source: Any, non_blocking: bool = False) -> None:
    """Overwrites a weight with another of its shape, on any device and in any format: quantizes it, dequantizes it, or
    copies it as it is. `source` is a tensor, or has `rows`, `to` and `dequantize` as a `QuantizedWeight` has."""
    is_tensor = isinstance(target, Tensor)
    if isinstance(source, Tensor) or not is_tensor and isinstance(source, QuantizedWeight):
        target.copy_(source, non_blocking=non_blocking)
        return
    device, dtype = (target.device, target.dtype) if is_tensor else (target.data.device, torch.float32)
    for start, stop in row_chunks(target.shape):
        rows: Any = target[start:stop] if is_tensor else target.rows(start, stop)
        rows.copy_(source.rows(start, stop).to(device).dequantize(dtype))


def row_chunks(shape: torch.Size) -> list[tuple[int, int]]:
    """Returns the ranges of rows of a matrix of which each has about `CHUNK_VALUES` values."""
    num_rows, num_columns = shape
    size = max(1, CHUNK_VALUES // max(1, num_columns))
    return [(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def quantize_rows(x: Float[Tensor, "*rows D"]) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, "*rows"]]:
    """Returns e4m3 values, rounded to nearest even, and fp32 scales: amax / 448 of each row, or 1 for zeros.

    Values are multiplied by the scale's inverse: a kernel divides once for each row.
    """
    x = x.float()
    scale = x.abs().amax(-1) * (1 / E4M3_MAX)  # GPUs divide by a constant so
    # Of smaller scales the inverse would be infinite. NaN stays, so that it is not hidden.
    scale = torch.where(scale < MIN_SCALE, 1.0, scale)
    return (x * (1 / scale)[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


def dequantize(
    data: Float[Tensor, "*rows D"], scale: Float[Tensor, "*rows"], dtype: torch.dtype
) -> Float[Tensor, "*rows D"]:
    """Returns data * scale, rounded once to `dtype`."""
    return (data.float() * scale[..., None]).to(dtype)


def quantized_linear(
    linear: Callable[..., Tensor], x: Float[Tensor, "T D"], w: QuantizedWeight, bias: Float[Tensor, " N"] | None = None,
    out: Float[Tensor, "T N"] | None = None,
) -> Float[Tensor, "T N"]:  # fmt: skip
    """Returns x @ w.T + bias, of which both operands are quantized: the specification of the kernels.

    `linear` multiplies the e4m3 values, which fp32 holds exactly. The result has the dtype of x.
    """
    data, scale = quantize_rows(x)
    y = linear(data.float(), w.data.float(), None) * scale[:, None] * w.scale
    y = (y if bias is None else y + bias.float()).to(x.dtype)
    return y if out is None else out.copy_(y)
