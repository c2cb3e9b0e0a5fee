"""The one forward of all families: a function of parameters, cache, batch and spec.

A block is five functions on rows of activations, and attention between them. `x` is the residual stream and `y` what
the last sublayer adds to it: the sum is left to whoever reads it, so that it costs no pass of its own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastgen.core import layers
from fastgen.core.attention import AttentionBackend, AttentionFn, sdpa
from fastgen.core.layers import rms_norm, rope_cos_sin, swiglu
from fastgen.core.model_config import ModelConfig
from fastgen.core.sampling import gather_logprobs
from fastgen.core.types import Batch, KVCache, Layer, Params, PartialSum, StackedAdapters, StackedLora
from fastgen.thread_safety import no_autocast

HiddenStates = Float[Tensor, "T D"]
SublayerOutput = HiddenStates | PartialSum  # partial on one of several tensor-parallel ranks
RopeCosSin = Float[Tensor, "T 1 half"]
# add_lora(y, x, rows) -> y plus the low-rank terms of x, where both hold these rows of the batch
AddLora = Callable[[Tensor, Tensor, slice], Tensor]


def embed(
    weight: Float[Tensor, "V D"], token: Int[Tensor, " T"], position: Int[Tensor, " T"], model_config: ModelConfig
) -> tuple[HiddenStates, HiddenStates, RopeCosSin, RopeCosSin]:
    """x and y of the first block; cosines and sines of the positions."""
    x = F.embedding(token, weight)
    return x, torch.zeros_like(x), *rope_cos_sin(position, model_config)


def add_norm_qkv(
    x: HiddenStates,
    y: HiddenStates,
    norm: Float[Tensor, " D"],
    eps: float,
    w: Float[Tensor, "N D"],
    bias: Float[Tensor, " N"] | None,
) -> tuple[HiddenStates, Float[Tensor, "T N"]]:
    """x + y, and a linear layer of its norm."""
    x = x + y
    return x, F.linear(rms_norm(x, norm, eps), w, bias)


def add_norm_gate_up(
    x: HiddenStates, y: HiddenStates, norm: Float[Tensor, " D"], eps: float, gate_up: Float[Tensor, "F2 D"]
) -> tuple[HiddenStates, Float[Tensor, "T F"]]:
    """x + y, and the gated activation of its norm."""
    x = x + y
    return x, swiglu(F.linear(rms_norm(x, norm, eps), gate_up))


def add_norm(
    x: HiddenStates, y: HiddenStates, norm: Float[Tensor, " D"], eps: float
) -> tuple[HiddenStates, HiddenStates]:
    """x + y, and its norm."""
    x = x + y
    return x, rms_norm(x, norm, eps)


def apply_qk_norm(
    qkv: Float[Tensor, "T Q2K H"], q_norm: Float[Tensor, " H"], k_norm: Float[Tensor, " H"], model_config: ModelConfig
) -> Float[Tensor, "T Q2K H"]:
    """Norms of every query and key head; values as they are."""
    q, k, v = qkv.split((model_config.num_q_heads, model_config.num_kv_heads, model_config.num_kv_heads), 1)
    return torch.cat(
        (rms_norm(q, q_norm, model_config.rms_norm_eps), rms_norm(k, k_norm, model_config.rms_norm_eps), v), 1
    )


def final_norm(x: HiddenStates, y: HiddenStates, norm: Float[Tensor, " D"], eps: float) -> HiddenStates:
    """The normed last hidden state."""
    return rms_norm(x + y, norm, eps)


def lm_head(h: Float[Tensor, "N D"], w: Float[Tensor, "V D"], out: Tensor | None = None) -> Float[Tensor, "N V"]:
    """Logits, in the first rows of `out` where it is given."""
    return F.linear(h, w) if out is None else torch.mm(h, w.T, out=out[: len(h)])


def row_parallel(
    linear: Callable[..., Tensor],
    x: Float[Tensor, "T N"],
    w: Float[Tensor, "D N"],
    bias: Float[Tensor, " D"] | None = None,
    add_lora: AddLora | None = None,
) -> Float[Tensor, "T D"]:
    """A linear layer whose depth ranks may share, each of which then has a part of the sum; here, all of it.

    `change(y, x, rows)` makes of some rows of it what adapters add to them.
    """
    y = linear(x, w, bias)
    return y if add_lora is None else add_lora(y, x, slice(None))


class ModelOps(NamedTuple):
    """What a forward is made of. Each may be replaced by a faster function of the same signature."""

    attention: AttentionBackend = sdpa
    embed: Callable[..., tuple[Any, ...]] = embed
    add_norm_qkv: Callable[..., tuple[Tensor, Tensor]] = add_norm_qkv
    add_norm_gate_up: Callable[..., tuple[Tensor, Tensor]] = add_norm_gate_up
    apply_qk_norm: Callable[..., Tensor] = apply_qk_norm
    rope_and_cache_kv: Callable[..., Any] = layers.rope_and_cache_kv
    linear: Callable[..., Tensor] = F.linear
    out_proj: Callable[..., Any] = row_parallel  # -> SublayerOutput
    down_proj: Callable[..., Any] = row_parallel
    # The parts of `add_norm_qkv` and `add_norm_gate_up`, where adapters add to what lies between (see `lora_ops`):
    add_norm: Callable[..., tuple[Tensor, Tensor]] = add_norm
    swiglu: Callable[..., Tensor] = swiglu
    apply_lora: Callable[..., Tensor] = layers.apply_lora
    final_norm: Callable[..., Tensor] = final_norm
    lm_head: Callable[..., Tensor] = lm_head
    logprobs: Callable[..., tuple[Tensor, Tensor, Tensor]] = gather_logprobs


TORCH_OPS = ModelOps()


def lora_ops(
    ops: ModelOps,
    adapters: StackedAdapters,
    layer_idx: int,
    model_config: ModelConfig,
    adapter_idx: Int[Tensor, " T"] | None,
    output_adapter_idx: Int[Tensor, " out"] | None,
) -> ModelOps:
    """Returns `ops` whose projections in one layer add the low-rank terms of each token's adapter.

    `adapter_idx` holds the adapter of every row before attention, `output_adapter_idx` of every row after it. Raises
    ValueError if the batch has no adapter indices.
    """
    if adapter_idx is None or output_adapter_idx is None:
        raise ValueError("adapters need batch.adapter_idx, the index of each token's adapter")
    layer, scale, head_dim = adapters.layers[layer_idx], adapters.scale, model_config.head_dim
    q_size, kv_size = model_config.num_q_heads * head_dim, model_config.num_kv_heads * head_dim

    def low_rank_term(lora: StackedLora, output_sizes: tuple[int, ...], idx: Tensor) -> AddLora:
        return lambda y, x, rows: ops.apply_lora(y, x, *lora, scale, idx[rows], output_sizes)

    add_qkv = low_rank_term(layer.qkv, (q_size, kv_size, kv_size), adapter_idx)
    add_out = low_rank_term(layer.out, (model_config.hidden_size,), output_adapter_idx)
    add_gate_up = low_rank_term(layer.gate_up, (model_config.intermediate_size,) * 2, output_adapter_idx)
    add_down = low_rank_term(layer.down, (model_config.hidden_size,), output_adapter_idx)

    def add_norm_qkv(
        x: Tensor, y: Tensor, norm: Tensor, eps: float, w: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, h = ops.add_norm(x, y, norm, eps)
        return x, add_qkv(ops.linear(h, w, bias), h, slice(None))

    def add_norm_gate_up(x: Tensor, y: Tensor, norm: Tensor, eps: float, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        x, h = ops.add_norm(x, y, norm, eps)
        return x, ops.swiglu(add_gate_up(ops.linear(h, gate_up, None), h, slice(None)))

    return ops._replace(
        add_norm_qkv=add_norm_qkv,
        add_norm_gate_up=add_norm_gate_up,
        out_proj=partial(ops.out_proj, add_lora=add_out),
        down_proj=partial(ops.down_proj, add_lora=add_down),
    )


def last_token_batch(batch: Batch) -> Batch:
    """The batch of the tokens `output` alone, one of each sequence."""
    rows = batch.logits_indices
    start = torch.arange(len(rows) + 1, dtype=batch.query_start_loc.dtype, device=rows.device)
    length = batch.seq_lens.clamp_min(1)  # padding may have none, but attention to nothing is no number
    adapter = None if batch.adapter_idx is None else batch.adapter_idx[rows]
    token, position, slot = (x[rows] for x in (batch.token_ids, batch.positions, batch.slot_mapping))
    return batch._replace(
        token_ids=token,
        positions=position,
        slot_mapping=slot,
        query_start_loc=start,
        seq_lens=length,
        adapter_idx=adapter,
    )


def decoder_layer(
    x: HiddenStates,
    y: SublayerOutput,
    layer: Layer,
    k_cache: Float[Tensor, "S K H"],
    v_cache: Float[Tensor, "S K H"],
    window: int | None,
    cos_sin: tuple[RopeCosSin, RopeCosSin],
    slot: Int[Tensor, " T"],
    attend: AttentionFn,
    model_config: ModelConfig,
    ops: ModelOps = TORCH_OPS,
    logits_indices: Int[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, "out D"], Float[Tensor, "out D"] | PartialSum]:
    """x and y after a block. Writes k and v at `slot`; pure otherwise.

    `output`: of these tokens only, which `attend` is then made for. Of the others no more than keys and values is
    computed.
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
    params: Params,
    cache: KVCache,
    batch: Batch,
    model_config: ModelConfig,
    ops: ModelOps = TORCH_OPS,
    adapters: StackedAdapters | None = None,
    *,
    last_token_only: bool = False,
    layer_fn: Callable[..., tuple[Any, Any]] = decoder_layer,
) -> tuple[Float[Tensor, "out D"], Float[Tensor, "out D"] | PartialSum]:
    """Returns x and y after the last layer. Writes `cache` at `batch.slot_mapping`; pure otherwise.

    With `last_token_only` the results are those of the sequences' last tokens, `batch.logits_indices`. `layer_fn` replaces
    `decoder_layer`, for example by one that recomputes activations in the backward pass.
    """
    x, y, *turn = ops.embed(params.embed, batch.token_ids, batch.positions, model_config)
    attend, output = ops.attention(batch, model_config), None
    for i, (layer, k, v, window) in enumerate(
        zip(params.layers, cache.k, cache.v, model_config.sliding_windows, strict=True)
    ):
        after = batch
        if last_token_only and i == model_config.num_layers - 1:
            after, output = last_token_batch(batch), batch.logits_indices
            attend = ops.attention(after, model_config)
        layer_ops = ops
        if adapters is not None:
            layer_ops = lora_ops(ops, adapters, i, model_config, batch.adapter_idx, after.adapter_idx)
        x, y = layer_fn(
            x, y, layer, k, v, window, (turn[0], turn[1]), batch.slot_mapping, attend, model_config, layer_ops, output
        )
    return x, y


@no_autocast
def hidden_states(
    params: Params,
    cache: KVCache,
    batch: Batch,
    model_config: ModelConfig,
    attention: AttentionBackend = sdpa,
    ops: ModelOps = TORCH_OPS,
    adapters: StackedAdapters | None = None,
) -> Float[Tensor, "T D"]:
    """Normed last hidden state of every token. Writes `cache` at `batch.slot`; pure otherwise."""
    x, y = run_layers(params, cache, batch, model_config, ops._replace(attention=attention), adapters)
    return ops.final_norm(x, y, params.final_norm, model_config.rms_norm_eps)


def lm_head_weight(params: Params) -> Float[Tensor, "V D"]:
    """The weights that turn hidden states into logits."""
    return params.embed if params.lm_head is None else params.lm_head


@no_autocast
def compute_logits(params: Params, x: Float[Tensor, "N D"], ops: ModelOps = TORCH_OPS) -> Float[Tensor, "N V"]:
    """fp32 logits of hidden states."""
    return ops.lm_head(x, lm_head_weight(params)).float()


def forward(
    params: Params,
    cache: KVCache,
    batch: Batch,
    model_config: ModelConfig,
    attention: AttentionBackend = sdpa,
    ops: ModelOps = TORCH_OPS,
    adapters: StackedAdapters | None = None,
) -> Float[Tensor, "N V"]:
    """fp32 next-token logits at `batch.output`. Writes `cache` at `batch.slot`; pure otherwise.

    The written leaves are the donated buffers: returning a new cache would copy all of it at every step. On one of
    several ranks, `ops` are `parallel.sharded` ones, `params` and `cache` are the rank's, and so is `spec` (`split`).
    `adapters` change the matrices of each token by its own, `batch.adapter`.
    """
    return compute_logits(
        params, hidden_states(params, cache, batch, model_config, attention, ops, adapters)[batch.logits_indices], ops
    )
