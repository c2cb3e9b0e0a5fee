"""The one forward of all families: a function of parameters, cache, batch and spec."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fastgen.models.layers import rms_norm, rotate, rotations, swiglu
from fastgen.models.spec import Spec
from fastgen.ops.attention import Attend, Backend, sdpa
from fastgen.types import Batch, Cache, Layer, Params

Turn = tuple[Float[Tensor, "T 1 half"], Float[Tensor, "T 1 half"]]


def block(
    x: Float[Tensor, "T D"],
    layer: Layer,
    k_cache: Float[Tensor, "S K H"],
    v_cache: Float[Tensor, "S K H"],
    batch: Batch,
    turn: Turn,
    attend: Attend,
    window: int | None,
    spec: Spec,
) -> Float[Tensor, "T D"]:
    """One block. Writes k_cache and v_cache at `batch.slot`."""
    h = F.linear(rms_norm(x, layer.attn_norm, spec.eps), layer.qkv, layer.qkv_bias).unflatten(-1, (-1, spec.head))
    q, k, v = h.split((spec.q_heads, spec.kv_heads, spec.kv_heads), 1)
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = rms_norm(q, layer.q_norm, spec.eps), rms_norm(k, layer.k_norm, spec.eps)
    q, k = rotate(q, *turn), rotate(k, *turn)
    # Full-index writes into the flat leaf: a write through a view would copy the whole cache on torch 2.11.
    k_cache.index_put_((batch.slot,), k)
    v_cache.index_put_((batch.slot,), v)
    x = x + F.linear(attend(q, k_cache, v_cache, window).flatten(1), layer.out, layer.out_bias)
    return x + F.linear(swiglu(F.linear(rms_norm(x, layer.ffn_norm, spec.eps), layer.gate_up)), layer.down)


def hidden(params: Params, cache: Cache, batch: Batch, spec: Spec, backend: Backend = sdpa) -> Float[Tensor, "T D"]:
    """Normed last hidden state of every token. Writes `cache` at `batch.slot`; pure otherwise."""
    x = F.embedding(batch.token, params.embed)
    turn, attend = rotations(batch.position, spec), backend(batch, spec)
    for layer, k, v, window in zip(params.layers, cache.k, cache.v, spec.windows, strict=True):
        x = block(x, layer, k, v, batch, turn, attend, window, spec)
    return rms_norm(x, params.norm, spec.eps)


def unembed(params: Params, x: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
    """fp32 logits of hidden states."""
    return F.linear(x, params.embed if params.head is None else params.head).float()


def forward(params: Params, cache: Cache, batch: Batch, spec: Spec, backend: Backend = sdpa) -> Float[Tensor, "N V"]:
    """fp32 next-token logits at `batch.output`. Writes `cache` at `batch.slot`; pure otherwise.

    The written leaves are the donated buffers: returning a new cache would copy all of it at every step.
    """
    return unembed(params, hidden(params, cache, batch, spec, backend)[batch.output])
