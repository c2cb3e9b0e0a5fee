"""What a step computes: functions of parameters, cache and staged tensors."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastgen.memory import Region
from fastgen.models.spec import Spec
from fastgen.models.transformer import PLAIN, Ops, blocks, table, unembed
from fastgen.types import Adapters, Batch, Cache, Params, Sampling

# draw(logits, temperature, seed, position, processed, last, seat) -> token, logprob: as `sampling.sample` without
# filters or edits; the tokens are also written to `last` at `seat`
Draw = Callable[..., tuple[Tensor, Tensor]]
CHUNK = 2**24  # logits held at once when prompts are scored: 64 MB in fp32


def new_cache(
    spec: Spec,
    slots: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    region: Region | None = None,
) -> Cache:
    """Makes an empty cache of `slots` tokens, in a region's memory where one is given."""
    shape = (slots, spec.kv_heads, spec.head)

    def leaf() -> Tensor:
        if region is not None:
            return region.take(shape, dtype or torch.get_default_dtype())
        return torch.zeros(shape, device=device, dtype=dtype)

    k, v = (tuple(leaf() for _ in range(spec.layers)) for _ in "kv")
    return Cache(k, v)


class Computed(NamedTuple):
    """What a step leaves behind, valid until the next one."""

    hidden: Float[Tensor, "T D"] | None  # normed; None where they were not asked for
    logits: Float[Tensor, "N V"]  # in the parameters' dtype; of a rank: of its part of the vocabulary
    token: Int[Tensor, " N"] | None  # drawn without filters or edits; None where `draw` is
    logprob: Float[Tensor, " N"] | None


def feed(token: Int[Tensor, " T"], last: Int[Tensor, " E"]) -> Int[Tensor, " T"]:
    """The tokens of a step: those below 0 are taken from `last`, where the seat is their negative."""
    return torch.where(token < 0, last[(-token).clamp_min(0)], token)


def compute(
    params: Params,
    cache: Cache,
    last: Int[Tensor, " E"],
    batch: Batch,
    sampling: Sampling,
    spec: Spec,
    ops: Ops = PLAIN,
    draw: Draw | None = None,
    out: Float[Tensor, "M V"] | None = None,
    adapters: Adapters | None = None,
    *,
    decode: bool = False,
    scored: bool = False,
) -> Computed:
    """A step on the device. Writes `cache` at `batch.slot`, and the drawn tokens to `last` at `batch.seat`.

    `decode`: token r is all of sequence r. `scored`: the hidden states of all tokens are wanted. Logits are of the
    sequences' last tokens; `out` takes them, where given.
    """
    x, y = blocks(params, cache, batch, spec, ops, adapters, last=not (decode or scored))
    h = ops.leave(x, y, params.norm, spec.eps)
    logits = ops.head(h[batch.output] if scored else h, table(params), out)
    hidden = h if scored else None
    if draw is None:
        return Computed(hidden, logits, None, None)
    s = sampling
    token, logprob = draw(logits, s.temperature, s.seed, s.position, s.processed, last, batch.seat)
    return Computed(hidden, logits, token, logprob)


def score(
    params: Params, x: Float[Tensor, "T D"], target: list[int], top: int, ops: Ops = PLAIN
) -> tuple[list[float], list[dict[int, float]]]:
    """Logprob of each row's target token, and the `top` most likely ones; few rows of the vocabulary at a time."""
    rows = max(1, CHUNK // len(params.embed))
    value: list[float] = []
    best: list[dict[int, float]] = []
    for i in range(0, len(target), rows):
        token = torch.tensor(target[i : i + rows], device=x.device)
        got, top_token, top_value = (
            t.tolist() for t in ops.logprobs(unembed(params, x[i : i + rows], ops), token, top)
        )
        value += got
        best += [dict(zip(*pair, strict=True)) for pair in zip(top_token, top_value, strict=True)]
    return value, best
