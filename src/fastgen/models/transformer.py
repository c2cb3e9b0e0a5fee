"""The one forward of all families: a function of parameters, cache, batch and spec.

A block is five functions on rows of activations, and attention between them. `x` is the residual stream and `y` what
the last sublayer adds to it: the sum is left to whoever reads it, so that it costs no pass of its own.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastgen.models import layers
from fastgen.models.layers import rms_norm, rotations, swiglu
from fastgen.models.spec import Spec
from fastgen.ops.attention import Attend, Backend, sdpa
from fastgen.sampling import logprobs
from fastgen.types import Batch, Cache, Layer, Params

Rows = Float[Tensor, "T D"]
Turn = Float[Tensor, "T 1 half"]


def enter(
    embed: Float[Tensor, "V D"], token: Int[Tensor, " T"], position: Int[Tensor, " T"], spec: Spec
) -> tuple[Rows, Rows, Turn, Turn]:
    """x and y of the first block; cosines and sines of the positions."""
    x = F.embedding(token, embed)
    return x, torch.zeros_like(x), *rotations(position, spec)


def project(
    x: Rows, y: Rows, norm: Float[Tensor, " D"], eps: float, w: Float[Tensor, "N D"], bias: Float[Tensor, " N"] | None
) -> tuple[Rows, Float[Tensor, "T N"]]:
    """x + y, and a linear layer of its norm."""
    x = x + y
    return x, F.linear(rms_norm(x, norm, eps), w, bias)


def project_swiglu(
    x: Rows, y: Rows, norm: Float[Tensor, " D"], eps: float, gate_up: Float[Tensor, "F2 D"]
) -> tuple[Rows, Float[Tensor, "T F"]]:
    """x + y, and the gated activation of its norm."""
    x = x + y
    return x, swiglu(F.linear(rms_norm(x, norm, eps), gate_up))


def norm_heads(
    qkv: Float[Tensor, "T Q2K H"], q_norm: Float[Tensor, " H"], k_norm: Float[Tensor, " H"], spec: Spec
) -> Float[Tensor, "T Q2K H"]:
    """Norms of every query and key head; values as they are."""
    q, k, v = qkv.split((spec.q_heads, spec.kv_heads, spec.kv_heads), 1)
    return torch.cat((rms_norm(q, q_norm, spec.eps), rms_norm(k, k_norm, spec.eps), v), 1)


def leave(x: Rows, y: Rows, norm: Float[Tensor, " D"], eps: float) -> Rows:
    """The normed last hidden state."""
    return rms_norm(x + y, norm, eps)


def head(h: Float[Tensor, "N D"], w: Float[Tensor, "V D"], out: Tensor | None = None) -> Float[Tensor, "N V"]:
    """Logits, in the first rows of `out` where it is given."""
    return F.linear(h, w) if out is None else torch.mm(h, w.T, out=out[: len(h)])


class Ops(NamedTuple):
    """What a forward is made of. Each may be replaced by a faster function of the same signature."""

    attention: Backend = sdpa
    enter: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = enter
    project: Callable[..., tuple[Tensor, Tensor]] = project
    project_swiglu: Callable[..., tuple[Tensor, Tensor]] = project_swiglu
    norm_heads: Callable[..., Tensor] = norm_heads
    store: Callable[..., Tensor] = layers.store
    linear: Callable[..., Tensor] = F.linear
    leave: Callable[..., Tensor] = leave
    head: Callable[..., Tensor] = head
    logprobs: Callable[..., tuple[Tensor, Tensor, Tensor]] = logprobs


PLAIN = Ops()


def last_tokens(batch: Batch) -> Batch:
    """The batch of the tokens `output` alone, one of each sequence."""
    rows = batch.output
    start = torch.arange(len(rows) + 1, dtype=batch.start.dtype, device=rows.device)
    length = batch.length.clamp_min(1)  # padding may have none, but attention to nothing is no number
    return batch._replace(
        token=batch.token[rows], position=batch.position[rows], slot=batch.slot[rows], start=start, length=length
    )


def block(
    x: Rows,
    y: Rows,
    layer: Layer,
    k: Float[Tensor, "S K H"],
    v: Float[Tensor, "S K H"],
    window: int | None,
    turn: tuple[Turn, Turn],
    slot: Int[Tensor, " T"],
    attend: Attend,
    spec: Spec,
    ops: Ops = PLAIN,
    output: Int[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, "out D"], Float[Tensor, "out D"]]:
    """x and y after a block. Writes k and v at `slot`; pure otherwise.

    `output`: of these tokens only, which `attend` is then made for. Of the others no more than keys and values is
    computed.
    """
    x, qkv = ops.project(x, y, layer.attn_norm, spec.eps, layer.qkv, layer.qkv_bias)
    qkv = qkv.unflatten(-1, (-1, spec.head))
    if layer.q_norm is not None:
        qkv = ops.norm_heads(qkv, layer.q_norm, layer.k_norm, spec)
    q = ops.store(qkv, *turn, slot, k, v)
    if output is not None:
        x, q = x[output], q[output]
    y = ops.linear(attend(q, k, v, window).flatten(1), layer.out, layer.out_bias)
    x, gated = ops.project_swiglu(x, y, layer.ffn_norm, spec.eps, layer.gate_up)
    return x, ops.linear(gated, layer.down)


def blocks(
    params: Params, cache: Cache, batch: Batch, spec: Spec, ops: Ops = PLAIN, *, last: bool = False
) -> tuple[Float[Tensor, "out D"], Float[Tensor, "out D"]]:
    """x and y after the last block. Writes `cache` at `batch.slot`; pure otherwise.

    `last`: of the tokens `batch.output` only, which are the sequences' last ones.
    """
    x, y, *turn = ops.enter(params.embed, batch.token, batch.position, spec)
    attend, output = ops.attention(batch, spec), None
    for i, (layer, k, v, window) in enumerate(zip(params.layers, cache.k, cache.v, spec.windows, strict=True)):
        if last and i == spec.layers - 1:
            attend, output = ops.attention(last_tokens(batch), spec), batch.output
        x, y = block(x, y, layer, k, v, window, (turn[0], turn[1]), batch.slot, attend, spec, ops, output)
    return x, y


def hidden(
    params: Params, cache: Cache, batch: Batch, spec: Spec, backend: Backend = sdpa, ops: Ops = PLAIN
) -> Float[Tensor, "T D"]:
    """Normed last hidden state of every token. Writes `cache` at `batch.slot`; pure otherwise."""
    x, y = blocks(params, cache, batch, spec, ops._replace(attention=backend))
    return ops.leave(x, y, params.norm, spec.eps)


def table(params: Params) -> Float[Tensor, "V D"]:
    """The weights that turn hidden states into logits."""
    return params.embed if params.head is None else params.head


def unembed(params: Params, x: Float[Tensor, "N D"], ops: Ops = PLAIN) -> Float[Tensor, "N V"]:
    """fp32 logits of hidden states."""
    return ops.head(x, table(params)).float()


def forward(
    params: Params, cache: Cache, batch: Batch, spec: Spec, backend: Backend = sdpa, ops: Ops = PLAIN
) -> Float[Tensor, "N V"]:
    """fp32 next-token logits at `batch.output`. Writes `cache` at `batch.slot`; pure otherwise.

    The written leaves are the donated buffers: returning a new cache would copy all of it at every step. On one of
    several ranks, `ops` are `parallel.sharded` ones, `params` and `cache` are the rank's, and so is `spec` (`split`).
    """
    return unembed(params, hidden(params, cache, batch, spec, backend, ops)[batch.output], ops)
