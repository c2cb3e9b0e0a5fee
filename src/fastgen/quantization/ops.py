"""The ops of a forward over parameters of which some weights are quantized."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from fastgen.core.transformer import ModelOps
from fastgen.core.types import Params
from fastgen.quantization.fp8 import QuantizedWeight, quantized_linear


def quantized_ops(
    ops: ModelOps, params: Params, linear: Callable[..., Tensor] | None = None,
    add_norm: Callable[..., tuple[Tensor, Any]] | None = None, swiglu: Callable[..., Any] | None = None,
) -> ModelOps:  # fmt: skip
    """Returns `ops` that take a `QuantizedWeight` wherever they take a weight of a layer.

    By default these are the plain ones. A kernel's `add_norm` and `swiglu` may return the `QuantizedRows` that its
    `linear` takes; what adapters and all-reduces add to lies between ops, and stays as it is.
    """
    linear, add_norm = linear or partial(quantized_linear, ops.linear), add_norm or ops.add_norm
    # A checkpoint may leave some layers as they are.
    both = all(isinstance(layer.down, QuantizedWeight) for layer in params.layers)
    swiglu = swiglu if swiglu and both else ops.swiglu

    def any_linear(x: Any, w: Any, *args: Any) -> Tensor:
        return (linear if isinstance(w, QuantizedWeight) else ops.linear)(x, w, *args)

    def lm_head(h: Any, w: Any, out: Tensor | None = None) -> Tensor:
        if isinstance(w, QuantizedWeight):
            return linear(h, w, None, None if out is None else out[: len(h)])
        return ops.lm_head(h, w, out)

    def add_norm_qkv(x: Tensor, y: Tensor, norm: Tensor, eps: float, w: Any, bias: Tensor | None) -> tuple[Any, ...]:
        if not isinstance(w, QuantizedWeight):
            return ops.add_norm_qkv(x, y, norm, eps, w, bias)
        x, h = add_norm(x, y, norm, eps)
        return x, linear(h, w, bias)

    def add_norm_gate_up(x: Tensor, y: Tensor, norm: Tensor, eps: float, gate_up: Any) -> tuple[Any, ...]:
        if isinstance(gate_up, QuantizedWeight):
            x, h = add_norm(x, y, norm, eps)
            return x, swiglu(linear(h, gate_up, None))
        if swiglu is ops.swiglu:
            return ops.add_norm_gate_up(x, y, norm, eps, gate_up)
        x, h = ops.add_norm(x, y, norm, eps)
        return x, swiglu(ops.linear(h, gate_up, None))

    return ops._replace(
        linear=any_linear, lm_head=lm_head, add_norm_qkv=add_norm_qkv, add_norm_gate_up=add_norm_gate_up
    )
