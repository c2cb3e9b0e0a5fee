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
from fastgen.core.types import Batch, KVCache, Layer, Params, StackedAdapters, StackedLora
from fastgen.thread_safety import no_autocast

HiddenStates = Float[Tensor, "T D"]
RopeCosSin = Float[Tensor, "T 1 half"]


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
    add_lora: Callable[[Tensor, Tensor, slice], Tensor] | None = None,
) -> Float[Tensor, "T D"]:
    """A linear layer whose depth ranks may share, each of which then has a part of the sum; here, all of it.

    `change(y, x, rows)` makes of some rows of it what adapters add to them.
    """
    y = linear(x, w, bias)
    return y if add_lora is None else add_lora(y, x, slice(None))


class ModelOps(NamedTuple):
    """What a forward is made of. Each may be replaced by a faster function of the same signature."""

    attention: AttentionBackend = sdpa
    embed: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = embed
    add_norm_qkv: Callable[..., tuple[Tensor, Tensor]] = add_norm_qkv
    add_norm_gate_up: Callable[..., tuple[Tensor, Tensor]] = add_norm_gate_up
    apply_qk_norm: Callable[..., Tensor] = apply_qk_norm
    rope_and_cache_kv: Callable[..., Any] = layers.rope_and_cache_kv  # or `attention.Fresh`, where attention does it
    linear: Callable[..., Tensor] = F.linear
    row_parallel: Callable[..., Tensor] = row_parallel
    # In the place of the two projections, where the matrices are changed by adapters:
    add_norm: Callable[..., tuple[Tensor, Tensor]] = add_norm
    swiglu: Callable[..., Tensor] = swiglu
    apply_lora: Callable[..., Tensor] = layers.apply_lora
    final_norm: Callable[..., Tensor] = final_norm
    lm_head: Callable[..., Tensor] = lm_head
    logprobs: Callable[..., tuple[Tensor, Tensor, Tensor]] = gather_logprobs


TORCH_OPS = ModelOps()


class Products(NamedTuple):
    """The products of one block: `Ops`', or those whose matrices are changed by adapters."""

    project: Callable[..., tuple[Tensor, Tensor]]
    project_swiglu: Callable[..., tuple[Tensor, Tensor]]
    out: Callable[..., Tensor]
    down: Callable[..., Tensor]


def unchanged(ops: ModelOps) -> Products:
    """Of a model without adapters."""
    summed = partial(ops.row_parallel, ops.linear)
    return Products(ops.add_norm_qkv, ops.add_norm_gate_up, summed, summed)


def products(
    ops: ModelOps, model_config: ModelConfig, adapters: StackedAdapters | None, i: int, batch: Batch, after: Batch
) -> Products:
    """Of layer i. `batch` has the rows before attention, `after` those after it."""
    if adapters is None:
        return unchanged(ops)
    before, behind = batch.adapter_idx, after.adapter_idx
    if before is None or behind is None:
        raise ValueError("adapters without batch.adapter, which says whose each token is")
    stacks, heads = (
        adapters.layers[i],
        tuple(
            n * model_config.head_dim
            for n in (model_config.num_q_heads, model_config.num_kv_heads, model_config.num_kv_heads)
        ),
    )

    def change(
        stack: StackedLora, widths: tuple[int, ...], adapter: Tensor
    ) -> Callable[[Tensor, Tensor, slice], Tensor]:
        return lambda y, x, rows: ops.apply_lora(y, x, *stack, adapters.scale, adapter[rows], widths)

    def linear(x: Tensor, w: Tensor, bias: Tensor | None, *changed: Any) -> Tensor:
        return change(*changed)(ops.linear(x, w, bias), x, slice(None))

    def project(
        x: Tensor, y: Tensor, norm: Tensor, eps: float, w: Tensor, bias: Tensor | None
    ) -> tuple[HiddenStates, Tensor]:
        x, h = ops.add_norm(x, y, norm, eps)
        return x, linear(h, w, bias, stacks.qkv, heads, before)

    def project_swiglu(x: Tensor, y: Tensor, norm: Tensor, eps: float, gate_up: Tensor) -> tuple[HiddenStates, Tensor]:
        x, h = ops.add_norm(x, y, norm, eps)
        return x, ops.swiglu(
            linear(
                h,
                gate_up,
                None,
                stacks.gate_up,
                (model_config.intermediate_size, model_config.intermediate_size),
                behind,
            )
        )

    out, down = (
        partial(ops.row_parallel, ops.linear, add_lora=change(stack, (model_config.hidden_size,), behind))
        for stack in (stacks.out, stacks.down)
    )
    return Products(project, project_swiglu, out, down)


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
    y: HiddenStates,
    layer: Layer,
    k_cache: Float[Tensor, "S K H"],
    v_cache: Float[Tensor, "S K H"],
    window: int | None,
    cos_sin: tuple[RopeCosSin, RopeCosSin],
    slot: Int[Tensor, " T"],
    attend: AttentionFn,
    model_config: ModelConfig,
    ops: ModelOps = TORCH_OPS,
    products: Products | None = None,
    logits_indices: Int[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, "out D"], Float[Tensor, "out D"]]:
    """x and y after a block. Writes k and v at `slot`; pure otherwise.

    `products`: those of `ops`, unless given. `output`: of these tokens only, which `attend` is then made for. Of the
    others no more than keys and values is computed.
    """
    of = products or unchanged(ops)
    x, qkv = of.project(x, y, layer.attn_norm, model_config.rms_norm_eps, layer.qkv, layer.qkv_bias)
    qkv = qkv.unflatten(-1, (-1, model_config.head_dim))
    if layer.q_norm is not None:
        qkv = ops.apply_qk_norm(qkv, layer.q_norm, layer.k_norm, model_config)
    q = ops.rope_and_cache_kv(qkv, *cos_sin, slot, k_cache, v_cache)
    if logits_indices is not None:
        x, q = x[logits_indices], q[logits_indices]
    y = of.out(attend(q, k_cache, v_cache, window).flatten(1), layer.out, layer.out_bias)
    x, gated = of.project_swiglu(x, y, layer.ffn_norm, model_config.rms_norm_eps, layer.gate_up)
    return x, of.down(gated, layer.down)


def run_layers(
    params: Params,
    cache: KVCache,
    batch: Batch,
    model_config: ModelConfig,
    ops: ModelOps = TORCH_OPS,
    adapters: StackedAdapters | None = None,
    *,
    last_token_only: bool = False,
    layer_fn: Callable[..., tuple[Tensor, Tensor]] = decoder_layer,
) -> tuple[Float[Tensor, "out D"], Float[Tensor, "out D"]]:
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
        made = products(ops, model_config, adapters, i, batch, after)
        x, y = layer_fn(
            x, y, layer, k, v, window, (turn[0], turn[1]), batch.slot_mapping, attend, model_config, ops, made, output
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
