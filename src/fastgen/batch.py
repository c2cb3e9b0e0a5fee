"""From a plan, in ints, to the tensors of a step."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fastgen.request import Sample
from fastgen.schedule import Plan
from fastgen.types import Batch, Edits, Filter, Sampling


def stage(
    plan: Plan,
    tokens: Mapping[int, Sequence[int]],
    page: int,
    device: torch.device | str | None = None,
    *,
    pad: int = 0,
) -> Batch:
    """The Batch of a plan, on `device` (None: torch's default device).

    `tokens` maps a sequence's id to all its tokens, `page` is the page size.

    Where the plan has fewer than `pad` tokens, rows of one token in the scratch page fill it up.
    """
    count = [span.stop - span.start for span in plan]
    filler = max(0, pad - sum(count))
    widest = max((-(-span.stop // page) for span in plan), default=1)
    pages = np.zeros((len(plan) + filler, widest), np.int64)  # what a sequence does not use points at scratch
    token, position, slot = (np.zeros(sum(count) + filler, np.int64) for _ in range(3))
    at = 0
    for r, span in enumerate(plan):
        used = -(-span.stop // page)
        pages[r, :used] = span.pages[:used]
        here = slice(at, at + count[r])
        token[here] = tokens[span.id][span.start : span.stop]
        position[here] = index = np.arange(span.start, span.stop)
        slot[here] = pages[r, index // page] * page + index % page
        at += count[r]
    start = np.cumsum([0, *count, *[1] * filler])
    length = np.array([*(span.stop for span in plan), *[1] * filler])
    output = [start[r + 1] - 1 for r, span in enumerate(plan) if span.sample]

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(device or torch.get_default_device())

    return Batch(
        token=tensor(token),
        position=tensor(position),
        slot=tensor(slot),
        start=tensor(start),
        length=tensor(length),
        pages=tensor(pages),
        output=tensor(np.array(output, np.int64)),
    )


def stage_sampling(samples: Sequence[Sample], vocab: int, device: torch.device | str | None = None) -> Sampling:
    """The Sampling arrays of the sequences that draw a token in this step, in the order of `Batch.output`."""
    p = [s.params for s in samples]

    def tensor(values: Iterable[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device=device)

    filter = edits = None
    if any(x.temperature and (x.top_k or x.top_p < 1 or x.min_p) for x in p):
        filter = Filter(
            top_k=tensor((x.top_k or vocab for x in p), torch.long),
            top_p=tensor((x.top_p for x in p), torch.float32),
            min_p=tensor((x.min_p for x in p), torch.float32),
        )
    if found := [(r, t, *e) for r, s in enumerate(samples) for t, e in s.edits().items()]:
        row, token, bias, count, seen = zip(*found, strict=True)
        edits = Edits(
            row=tensor(row, torch.long),
            token=tensor(token, torch.long),
            bias=tensor(bias, torch.float32),
            count=tensor(count, torch.float32),
            seen=tensor(seen, torch.bool),
            presence=tensor((p[r].presence_penalty for r in row), torch.float32),
            frequency=tensor((p[r].frequency_penalty for r in row), torch.float32),
            repetition=tensor((p[r].repetition_penalty for r in row), torch.float32),
        )
    return Sampling(
        temperature=tensor((x.temperature for x in p), torch.float32),
        seed=tensor((s.seed for s in samples), torch.long) if any(x.temperature for x in p) else None,
        position=tensor((len(s.tokens) for s in samples), torch.long),
        processed=tensor((x.logprob_mode == "processed" for x in p), torch.bool),
        filter=filter,
        edits=edits,
    )
