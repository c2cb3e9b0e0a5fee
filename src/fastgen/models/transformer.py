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

from fastgen.models import layers
from fastgen.models.layers import rms_norm, rotations, swiglu
from fastgen.models.spec import Spec
from fastgen.ops.attention import Attend, Backend, sdpa
from fastgen.ownership import no_autocast
from fastgen.sampling import logprobs
from fastgen.types import Adapters, Batch, Cache, Layer, Params, Stack

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


def add_norm(x: Rows, y: Rows, norm: Float[Tensor, " D"], eps: float) -> tuple[Rows, Rows]:
    """x + y, and its norm."""
    x = x + y
    return x, rms_norm(x, norm, eps)


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


def row_parallel(
    linear: Callable[..., Tensor],
    x: Float[Tensor, "T N"],
    w: Float[Tensor, "D N"],
    bias: Float[Tensor, " D"] | None = None,
    change: Callable[[Tensor, Tensor, slice], Tensor] | None = None,
) -> Float[Tensor, "T D"]:
    """A linear layer whose depth ranks may share, each of which then has a part of the sum; here, all of it.

    `change(y, x, rows)` makes of some rows of it what adapters add to them.
    """
    y = linear(x, w, bias)
    return y if change is None else change(y, x, slice(None))


class Ops(NamedTuple):
    """What a forward is made of. Each may be replaced by a faster function of the same signature."""

    attention: Backend = sdpa
    enter: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = enter
    project: Callable[..., tuple[Tensor, Tensor]] = project
    project_swiglu: Callable[..., tuple[Tensor, Tensor]] = project_swiglu
    norm_heads: Callable[..., Tensor] = norm_heads
    store: Callable[..., Any] = layers.store  # or `attention.Fresh`, where attention does it
    linear: Callable[..., Tensor] = F.linear
    row_parallel: Callable[..., Tensor] = row_parallel
    # In the place of the two projections, where the matrices are changed by adapters:
    add_norm: Callable[..., tuple[Tensor, Tensor]] = add_norm
    swiglu: Callable[..., Tensor] = swiglu
    adapt: Callable[..., Tensor] = layers.adapt
    leave: Callable[..., Tensor] = leave
    head: Callable[..., Tensor] = head
    logprobs: Callable[..., tuple[Tensor, Tensor, Tensor]] = logprobs


PLAIN = Ops()


class Products(NamedTuple):
    """The products of one block: `Ops`', or those whose matrices are changed by adapters."""

    project: Callable[..., tuple[Tensor, Tensor]]
    project_swiglu: Callable[..., tuple[Tensor, Tensor]]
    out: Callable[..., Tensor]
    down: Callable[..., Tensor]


def unchanged(ops: Ops) -> Products:
    """Of a model without adapters."""
    summed = partial(ops.row_parallel, ops.linear)
    return Products(ops.project, ops.project_swiglu, summed, summed)


def products(ops: Ops, spec: Spec, adapters: Adapters | None, i: int, batch: Batch, after: Batch) -> Products:
    """Of layer i. `batch` has the rows before attention, `after` those after it."""
    if adapters is None:
        return unchanged(ops)
    before, behind = batch.adapter, after.adapter
    if before is None or behind is None:
        raise ValueError("adapters without batch.adapter, which says whose each token is")
    stacks, heads = adapters.layers[i], tuple(n * spec.head for n in (spec.q_heads, spec.kv_heads, spec.kv_heads))

    def change(stack: Stack, widths: tuple[int, ...], adapter: Tensor) -> Callable[[Tensor, Tensor, slice], Tensor]:
        return lambda y, x, rows: ops.adapt(y, x, *stack, adapters.scale, adapter[rows], widths)

    def linear(x: Tensor, w: Tensor, bias: Tensor | None, *changed: Any) -> Tensor:
        return change(*changed)(ops.linear(x, w, bias), x, slice(None))

    def project(x: Tensor, y: Tensor, norm: Tensor, eps: float, w: Tensor, bias: Tensor | None) -> tuple[Rows, Tensor]:
        x, h = ops.add_norm(x, y, norm, eps)
        return x, linear(h, w, bias, stacks.qkv, heads, before)

    def project_swiglu(x: Tensor, y: Tensor, norm: Tensor, eps: float, gate_up: Tensor) -> tuple[Rows, Tensor]:
        x, h = ops.add_norm(x, y, norm, eps)
        return x, ops.swiglu(linear(h, gate_up, None, stacks.gate_up, (spec.ffn, spec.ffn), behind))

    out, down = (
        partial(ops.row_parallel, ops.linear, change=change(stack, (spec.dim,), behind))
        for stack in (stacks.out, stacks.down)
    )
    return Products(project, project_swiglu, out, down)


def last_tokens(batch: Batch) -> Batch:
    """The batch of the tokens `output` alone, one of each sequence."""
    rows = batch.output
    start = torch.arange(len(rows) + 1, dtype=batch.start.dtype, device=rows.device)
    length = batch.length.clamp_min(1)  # padding may have none, but attention to nothing is no number
    adapter = None if batch.adapter is None else batch.adapter[rows]
    token, position, slot = (x[rows] for x in (batch.token, batch.position, batch.slot))
    return batch._replace(token=token, position=position, slot=slot, start=start, length=length, adapter=adapter)


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
    products: Products | None = None,
    output: Int[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, "out D"], Float[Tensor, "out D"]]:
    """x and y after a block. Writes k and v at `slot`; pure otherwise.

    `products`: those of `ops`, unless given. `output`: of these tokens only, which `attend` is then made for. Of the
    others no more than keys and values is computed.
    """
    of = products or unchanged(ops)
    x, qkv = of.project(x, y, layer.attn_norm, spec.eps, layer.qkv, layer.qkv_bias)
    qkv = qkv.unflatten(-1, (-1, spec.head))
    if layer.q_norm is not None:
        qkv = ops.norm_heads(qkv, layer.q_norm, layer.k_norm, spec)
    q = ops.store(qkv, *turn, slot, k, v)
    if output is not None:
        x, q = x[output], q[output]
    y = of.out(attend(q, k, v, window).flatten(1), layer.out, layer.out_bias)
    x, gated = of.project_swiglu(x, y, layer.ffn_norm, spec.eps, layer.gate_up)
    return x, of.down(gated, layer.down)


def blocks(
    params: Params,
    cache: Cache,
    batch: Batch,
    spec: Spec,
    ops: Ops = PLAIN,
    adapters: Adapters | None = None,
    *,
    last: bool = False,
) -> tuple[Float[Tensor, "out D"], Float[Tensor, "out D"]]:
    """x and y after the last block. Writes `cache` at `batch.slot`; pure otherwise.

    `last`: of the tokens `batch.output` only, which are the sequences' last ones.
    """
    x, y, *turn = ops.enter(params.embed, batch.token, batch.position, spec)
    attend, output = ops.attention(batch, spec), None
    for i, (layer, k, v, window) in enumerate(zip(params.layers, cache.k, cache.v, spec.windows, strict=True)):
        after = batch
        if last and i == spec.layers - 1:
            after, output = last_tokens(batch), batch.output
            attend = ops.attention(after, spec)
        made = products(ops, spec, adapters, i, batch, after)
        x, y = block(x, y, layer, k, v, window, (turn[0], turn[1]), batch.slot, attend, spec, ops, made, output)
    return x, y


@no_autocast
def hidden(
    params: Params,
    cache: Cache,
    batch: Batch,
    spec: Spec,
    backend: Backend = sdpa,
    ops: Ops = PLAIN,
    adapters: Adapters | None = None,
) -> Float[Tensor, "T D"]:
    """Normed last hidden state of every token. Writes `cache` at `batch.slot`; pure otherwise."""
    x, y = blocks(params, cache, batch, spec, ops._replace(attention=backend), adapters)
    return ops.leave(x, y, params.norm, spec.eps)


def table(params: Params) -> Float[Tensor, "V D"]:
    """The weights that turn hidden states into logits."""
    return params.embed if params.head is None else params.head


@no_autocast
def unembed(params: Params, x: Float[Tensor, "N D"], ops: Ops = PLAIN) -> Float[Tensor, "N V"]:
    """fp32 logits of hidden states."""
    return ops.head(x, table(params)).float()


def forward(
    params: Params,
    cache: Cache,
    batch: Batch,
    spec: Spec,
    backend: Backend = sdpa,
    ops: Ops = PLAIN,
    adapters: Adapters | None = None,
) -> Float[Tensor, "N V"]:
    """fp32 next-token logits at `batch.output`. Writes `cache` at `batch.slot`; pure otherwise.

    The written leaves are the donated buffers: returning a new cache would copy all of it at every step. On one of
    several ranks, `ops` are `parallel.sharded` ones, `params` and `cache` are the rank's, and so is `spec` (`split`).
    `adapters` change the matrices of each token by its own, `batch.adapter`.
    """
    return unembed(params, hidden(params, cache, batch, spec, backend, ops, adapters)[batch.output], ops)
