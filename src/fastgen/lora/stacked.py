"""Several LoRA adapters stacked, so that each row of a batch may use another one, and the ops that apply them."""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastgen.core.model_config import ModelConfig
from fastgen.core.transformer import AddLora, ModelOps


def apply_lora(
    y: Float[Tensor, "T N"], x: Float[Tensor, "T D"], a: Float[Tensor, "A pr D"], b: Float[Tensor, "A N r"],
    scale: Float[Tensor, " A"], adapter_idx: Int[Tensor, " T"], output_sizes: tuple[int, ...],
) -> Float[Tensor, "T N"]:  # fmt: skip
    """Returns y + scale * b (a x), with a, b and scale of each row's adapter; rows of adapter 0 stay as they are.

    `output_sizes` splits the N outputs into those of the p matrices that were packed into one; each has r rows of a.
    """
    for i in adapter_idx.unique().tolist():
        if i:
            rows = (adapter_idx == i).nonzero().squeeze(1)
            inner = F.linear(x[rows], a[i]).chunk(len(output_sizes), -1)
            deltas = [F.linear(h, w) for h, w in zip(inner, b[i].split(output_sizes), strict=True)]
            y = y.index_add(0, rows, (scale[i] * torch.cat(deltas, -1)).to(y.dtype))
    return y


class StackedLora(NamedTuple):
    """Updates of one packed matrix by several adapters, padded with zeros to one rank.

    A matrix that packs p matrices has p updates: rows [i r, (i + 1) r) of `a` belong to the i-th of them.
    """

    a: Float[Tensor, "A pr D"]
    b: Float[Tensor, "A N r"]


class LayerStackedLora(NamedTuple):
    """Stacked LoRA updates of one decoder layer."""

    qkv: StackedLora
    out: StackedLora
    gate_up: StackedLora
    down: StackedLora


class StackedAdapters(NamedTuple):
    """Several LoRA adapters. The first adapter is zero."""

    layers: tuple[LayerStackedLora, ...]
    scale: Float[Tensor, " A"]

    def layer_ops(
        self, ops: ModelOps, layer_idx: int, model_config: ModelConfig, adapter_idx: Int[Tensor, " T"] | None,
        output_adapter_idx: Int[Tensor, " out"] | None,
    ) -> ModelOps:  # fmt: skip
        """Returns `ops` whose projections in one layer add the low-rank terms of each token's adapter.

        `adapter_idx` holds the adapter of every row before attention, `output_adapter_idx` of every row after it.
        Raises ValueError if the batch has no adapter indices.
        """
        if adapter_idx is None or output_adapter_idx is None:
            raise ValueError("adapters need batch.adapter_idx, the index of each token's adapter")
        apply = ops.apply_lora or apply_lora
        layer, head_dim, hidden_size = self.layers[layer_idx], model_config.head_dim, model_config.hidden_size
        q_size, kv_size = model_config.num_q_heads * head_dim, model_config.num_kv_heads * head_dim

        def low_rank_term(lora: StackedLora, output_sizes: tuple[int, ...], idx: Tensor) -> AddLora:
            return lambda y, x, rows: apply(y, x, *lora, self.scale, idx[rows], output_sizes)

        add_qkv = low_rank_term(layer.qkv, (q_size, kv_size, kv_size), adapter_idx)
        add_out = low_rank_term(layer.out, (hidden_size,), output_adapter_idx)
        add_gate_up = low_rank_term(layer.gate_up, (model_config.intermediate_size,) * 2, output_adapter_idx)
        add_down = low_rank_term(layer.down, (hidden_size,), output_adapter_idx)

        def add_norm_qkv(x: Tensor, y: Tensor, norm: Tensor, eps: float, w: Tensor, bias: Any) -> tuple[Tensor, Tensor]:
            x, h = ops.add_norm(x, y, norm, eps)
            return x, add_qkv(ops.linear(h, w, bias), h, slice(None))

        def add_norm_gate_up(x: Tensor, y: Tensor, norm: Tensor, eps: float, gate_up: Tensor) -> tuple[Tensor, Tensor]:
            x, h = ops.add_norm(x, y, norm, eps)
            return x, ops.swiglu(add_gate_up(ops.linear(h, gate_up, None), h, slice(None)))

        out_proj, down_proj = partial(ops.out_proj, add_lora=add_out), partial(ops.down_proj, add_lora=add_down)
        return ops._replace(
            add_norm_qkv=add_norm_qkv, add_norm_gate_up=add_norm_gate_up, out_proj=out_proj, down_proj=down_proj
        )
