"""The one forward of all families: a function of parameters, cache, batch and `ModelConfig`.

A decoder layer is five ops on rows of activations, with attention between them. x is the residual stream, and y the
output of the last sublayer: the op that reads y adds it to x, so that the sum costs no pass of its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from fastgen.core import layers
from fastgen.core.attention import AttentionBackend, AttentionFn, sdpa
from fastgen.core.autocast import no_autocast
from fastgen.core.layers import rms_norm, rope_cos_sin, swiglu
from fastgen.core.model_config import ModelConfig
from fastgen.core.sampling import gather_logprobs
from fastgen.core.types import Batch, KVCache, Layer, Params, PartialSum

HiddenStates = Float[Tensor, "T D"]
SublayerOutput = HiddenStates | PartialSum  # partial on one of several tensor-parallel ranks
RopeCosSin = Float[Tensor, "T 1 half"]
# add_lora(y, x, rows) returns y plus the low-rank terms of x, where both hold these rows of the batch.
AddLora = Callable[[Tensor, Tensor, slice], Tensor]


def embed(
    weight: Float[Tensor, "V D"], token: Int[Tensor, " T"], position: Int[Tensor, " T"], model_config: ModelConfig
) -> tuple[HiddenStates, HiddenStates, RopeCosSin, RopeCosSin]:
    """Returns x and y of the first layer, and cosines and sines of the positions."""
    x = F.embedding(token, weight)
    return x, torch.zeros_like(x), *rope_cos_sin(position, model_config)


def add_norm_qkv(
    x: HiddenStates, y: HiddenStates, norm: Float[Tensor, " D"], eps: float,
    w: Any, bias: Float[Tensor, " N"] | None,  # w [N, D]: a tensor or quantized, as gate_up [F2, D] below
) -> tuple[HiddenStates, Float[Tensor, "T N"]]:  # fmt: skip
    """Returns x + y, and queries, keys and values of its norm."""
    x = x + y
    return x, F.linear(rms_norm(x, norm, eps), w, bias)


def add_norm_gate_up(
    x: HiddenStates, y: HiddenStates, norm: Float[Tensor, " D"], eps: float, gate_up: Any
) -> tuple[HiddenStates, Float[Tensor, "T F"]]:
    """Returns x + y, and SwiGLU of the gate and up projections of its RMS norm."""
    x = x + y
    return x, swiglu(F.linear(rms_norm(x, norm, eps), gate_up))


def add_norm(
    x: HiddenStates, y: HiddenStates, norm: Float[Tensor, " D"], eps: float
) -> tuple[HiddenStates, HiddenStates]:
    """Returns x + y, and its norm."""
    x = x + y
    return x, rms_norm(x, norm, eps)


def apply_qk_norm(
    qkv: Float[Tensor, "T Q2K H"], q_norm: Float[Tensor, " H"], k_norm: Float[Tensor, " H"], model_config: ModelConfig
) -> Float[Tensor, "T Q2K H"]:
    """Normalizes every query and key head; values stay as they are."""
    kv_heads, eps = model_config.num_kv_heads, model_config.rms_norm_eps
    q, k, v = qkv.split((model_config.num_q_heads, kv_heads, kv_heads), 1)
    return torch.cat((rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps), v), 1)


def final_norm(x: HiddenStates, y: HiddenStates, norm: Float[Tensor, " D"], eps: float) -> HiddenStates:
    """Returns the normed hidden states after the last layer."""
    return rms_norm(x + y, norm, eps)


def lm_head(h: Float[Tensor, "N D"], w: Float[Tensor, "V D"], out: Tensor | None = None) -> Float[Tensor, "N V"]:
    """Returns logits, written to the first rows of `out` unless that is None."""
    return F.linear(h, w) if out is None else torch.mm(h, w.T, out=out[: len(h)])


def row_parallel(
    linear: Callable[..., Tensor], x: Any, w: Any,  # [T, N] and [D, N], tensors or quantized
    bias: Float[Tensor, " D"] | None = None, add_lora: AddLora | None = None,
) -> Float[Tensor, "T D"]:  # fmt: skip
    """Returns a row-parallel linear layer.

    Under tensor parallelism each rank has a slice of the input dimension and returns a partial sum, low-rank terms
    included; this default returns the full result.
    """
    y = linear(x, w, bias)
    return y if add_lora is None else add_lora(y, x, slice(None))


class ModelOps(NamedTuple):
    """The ops of a forward. Each may be replaced by a faster function of the same signature."""

    attention: AttentionBackend = sdpa
    embed: Callable[..., tuple[Any, ...]] = embed
    add_norm_qkv: Callable[..., tuple[Tensor, Tensor]] = add_norm_qkv
    add_norm_gate_up: Callable[..., tuple[Tensor, Tensor]] = add_norm_gate_up
    apply_qk_norm: Callable[..., Tensor] = apply_qk_norm
    rope_and_cache_kv: Callable[..., Any] = layers.rope_and_cache_kv
    linear: Callable[..., Tensor] = F.linear
    out_proj: Callable[..., Any] = row_parallel  # -> SublayerOutput
    down_proj: Callable[..., Any] = row_parallel
    # The parts of `add_norm_qkv` and `add_norm_gate_up`: adapters add to the matmuls between them.
    add_norm: Callable[..., tuple[Tensor, Tensor]] = add_norm
    swiglu: Callable[..., Tensor] = swiglu
    apply_lora: Callable[..., Tensor] | None = None  # a kernel in place of `lora.stacked.apply_lora`
    final_norm: Callable[..., Tensor] = final_norm
    lm_head: Callable[..., Tensor] = lm_head
    logprobs: Callable[..., tuple[Tensor, Tensor, Tensor]] = gather_logprobs


TORCH_OPS = ModelOps()


@runtime_checkable
class LoraAdapters(Protocol):
    """LoRA adapters of a batch, which wrap the ops of each layer; see `lora.stacked.StackedAdapters`."""

    def layer_ops(
        self, ops: ModelOps, layer_idx: int, model_config: ModelConfig, adapter_idx: Int[Tensor, " T"] | None,
        output_adapter_idx: Int[Tensor, " out"] | None,
    ) -> ModelOps:  # fmt: skip
        """Returns `ops` whose projections add the low-rank terms of each token's adapter."""
        ...


def last_token_batch(batch: Batch) -> Batch:
    """Returns the batch of the tokens `logits_indices` alone, one of each sequence."""
    rows = batch.logits_indices
    return batch._replace(
        token_ids=batch.token_ids[rows],
        positions=batch.positions[rows],
        slot_mapping=batch.slot_mapping[rows],
        query_start_loc=torch.arange(len(rows) + 1, dtype=batch.query_start_loc.dtype, device=rows.device),
        seq_lens=batch.seq_lens.clamp_min(1),  # a padding sequence may have length 0; softmax over no keys is NaN
        adapter_idx=None if batch.adapter_idx is None else batch.adapter_idx[rows],
    )


def decoder_layer(
    x: HiddenStates, y: SublayerOutput, layer: Layer, k_cache: Shaped[Tensor, "S K H"],
    v_cache: Shaped[Tensor, "S K H"], window: int | None, cos_sin: tuple[RopeCosSin, RopeCosSin],
    slot: Int[Tensor, " T"], attend: AttentionFn, model_config: ModelConfig, ops: ModelOps = TORCH_OPS,
    logits_indices: Int[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, "out D"], Float[Tensor, "out D"] | PartialSum]:  # fmt: skip
    """Returns x and y after a decoder layer. Writes keys and values to the caches at `slot`; pure otherwise.

    With `logits_indices` only these tokens are computed beyond keys and values, and `attend` must be made for their
    batch (`last_token_batch`).
    """
    x, qkv = ops.add_norm_qkv(x, y, layer.attn_norm, model_config.rms_norm_eps, layer.qkv, layer.qkv_bias)
    qkv = qkv.unflatten(-1, (-1, model_config.head_dim))
    if layer.q_norm is not None:
        qkv = ops.apply_qk_norm(qkv, layer.q_norm, layer.k_norm, model_config)
    q = ops.rope_and_cache_kv(qkv, *cos_sin, slot, k_cache, v_cache)
    if logits_indices is not None:
        x, q = x[logits_indices], q[logits_indices]
    y = ops.out_proj(ops.linear, attend(q, k_cache, v_cache, window).flatten(1), layer.out, layer.out_bias)
    x, gated = ops.add_norm_gate_up(x, y, layer.ffn_norm, model_config.rms_norm_eps, layer.gate_up)
    return x, ops.down_proj(ops.linear, gated, layer.down)


def run_layers(
    params: Params, cache: KVCache, batch: Batch, model_config: ModelConfig, ops: ModelOps = TORCH_OPS,
    adapters: LoraAdapters | None = None, *, last_token_only: bool = False,
    layer_fn: Callable[..., tuple[Any, Any]] = decoder_layer,
) -> tuple[Float[Tensor, "out D"], Float[Tensor, "out D"] | PartialSum]:  # fmt: skip
    """Returns x and y after the last layer. Writes `cache` at `batch.slot_mapping`; pure otherwise.

    With `last_token_only` the results are those of the sequences' last tokens, `batch.logits_indices`. `layer_fn`
    replaces `decoder_layer`, for example by one that recomputes activations in the backward pass.
    """
    x, y, cos, sin = ops.embed(params.embed, batch.token_ids, batch.positions, model_config)
    attend, logits_indices, output_batch, layer_ops = ops.attention(batch, model_config), None, batch, ops
    windows, slot = model_config.sliding_windows, batch.slot_mapping
    for i, (layer, k, v, window) in enumerate(zip(params.layers, cache.k, cache.v, windows, strict=True)):
        if last_token_only and i == model_config.num_layers - 1:
            output_batch, logits_indices = last_token_batch(batch), batch.logits_indices
            attend = ops.attention(output_batch, model_config)
        if adapters is not None:
            layer_ops = adapters.layer_ops(ops, i, model_config, batch.adapter_idx, output_batch.adapter_idx)
        x, y = layer_fn(x, y, layer, k, v, window, (cos, sin), slot, attend, model_config, layer_ops, logits_indices)
    return x, y


@no_autocast
def hidden_states(
    params: Params, cache: KVCache, batch: Batch, model_config: ModelConfig, attention: AttentionBackend = sdpa,
    ops: ModelOps = TORCH_OPS, adapters: LoraAdapters | None = None,
) -> Float[Tensor, "T D"]:  # fmt: skip
    """Returns the normed last hidden state of every token. Writes `cache` at `batch.slot_mapping`; pure otherwise."""
    x, y = run_layers(params, cache, batch, model_config, ops._replace(attention=attention), adapters)
    return ops.final_norm(x, y, params.final_norm, model_config.rms_norm_eps)


def lm_head_weight(params: Params) -> Float[Tensor, "V D"]:
    """Returns the weight that maps hidden states to logits."""
    return params.embed if params.lm_head is None else params.lm_head


@no_autocast
def compute_logits(params: Params, x: Float[Tensor, "N D"], ops: ModelOps = TORCH_OPS) -> Float[Tensor, "N V"]:
    """Returns fp32 logits of hidden states."""
    return ops.lm_head(x, lm_head_weight(params)).float()


def forward(
    params: Params, cache: KVCache, batch: Batch, model_config: ModelConfig, attention: AttentionBackend = sdpa,
    ops: ModelOps = TORCH_OPS, adapters: LoraAdapters | None = None,
) -> Float[Tensor, "N V"]:  # fmt: skip
    """Returns fp32 next-token logits at `batch.logits_indices`. Writes `cache` at `batch.slot_mapping`; pure otherwise.

    The cache is written in place, since returning a new one would copy it at every step. `adapters` add to the
    projections of each token by the index `batch.adapter_idx`. On one of several ranks, `ops` are those of
    `tensor_parallel.shard_ops`, and `params`, `cache` and `model_config` (`shard_config`) are the rank's.
    """
    h = hidden_states(params, cache, batch, model_config, attention, ops, adapters)
    return compute_logits(params, h[batch.logits_indices], ops)
