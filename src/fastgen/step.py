"""What a step computes: functions of parameters, cache and staged tensors."""

import torch
from jaxtyping import Float
from torch import Tensor

from fastgen.models.spec import Spec
from fastgen.models.transformer import hidden, unembed
from fastgen.ops.attention import Backend
from fastgen.sampling import logprobs, sample
from fastgen.types import Batch, Cache, Params, Sampled, Sampling

CHUNK = 2**24  # logits held at once when prompts are scored: 64 MB in fp32


def new_cache(
    spec: Spec, slots: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Cache:
    """An empty cache of `slots` tokens. Zeros, since masked attention still multiplies what it reads."""
    shape = (slots, spec.kv_heads, spec.head)
    k, v = (tuple(torch.zeros(shape, device=device, dtype=dtype) for _ in range(spec.layers)) for _ in "kv")
    return Cache(k, v)


def compute(
    params: Params, cache: Cache, batch: Batch, sampling: Sampling, spec: Spec, backend: Backend, top: int | None
) -> tuple[Float[Tensor, "T D"], Sampled]:
    """Hidden states of all tokens, and the tokens drawn at `batch.output`. Writes `cache` at `batch.slot`."""
    x = hidden(params, cache, batch, spec, backend)
    return x, sample(unembed(params, x[batch.output]), sampling, top)


def score(
    params: Params, x: Float[Tensor, "T D"], target: list[int], top: int
) -> tuple[list[float], list[dict[int, float]]]:
    """Logprob of each row's target token, and the `top` most likely ones; few rows of the vocabulary at a time."""
    rows = max(1, CHUNK // len(params.embed))
    value: list[float] = []
    best: list[dict[int, float]] = []
    for i in range(0, len(target), rows):
        token = torch.tensor(target[i : i + rows], device=x.device)
        got, top_token, top_value = (t.tolist() for t in logprobs(unembed(params, x[i : i + rows]), token, top))
        value += got
        best += [dict(zip(*pair, strict=True)) for pair in zip(top_token, top_value, strict=True)]
    return value, best
