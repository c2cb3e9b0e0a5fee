"""From a plan, in ints, to the tensors of a step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.request import Sample
from fastgen.schedule import Group, Plan
from fastgen.types import Batch, Edits, Filter, Sampling, Share

INTS = ("token", "position", "slot")  # a number for each token of a step
ROWS = ("length", "seat", "output", "temperature", "top_k", "top_p", "min_p", "processed")  # and for each sequence
FLOATS = ("temperature", "top_p", "min_p")


def layout(
    plan: Plan,
    tokens: Mapping[int, Sequence[int]],
    seat: np.ndarray,
    table: np.ndarray,
    page: int,
    size: int,
    rows: int,
) -> dict[str, np.ndarray]:
    """The arrays of a Batch of `size` tokens and `rows` sequences, int64.

    What the plan leaves free is padding, spread over the rows left, in the scratch page and seat 0. A token that is
    not known yet, drawn by a step still running, is told by its seat. What is cached already is written to scratch.
    """
    first, stop = (np.fromiter((span[i] for span in plan), np.int64, len(plan)) for i in (1, 2))
    count = np.zeros(rows, np.int64)
    count[: len(plan)] = stop - first
    filler, left = size - int(count.sum()), rows - len(plan)
    if left:
        count[len(plan) :] = filler // left + (np.arange(left) < filler % left)
    start = np.concatenate(([0], np.cumsum(count)))
    begin, length, seats = np.zeros(rows, np.int64), count.copy(), np.zeros(rows, np.int64)
    begin[: len(plan)], length[: len(plan)], seats[: len(plan)] = first, stop, seat
    row = np.repeat(np.arange(rows), count)
    position = begin[row] + np.arange(size) - start[row]
    page_of = position // page
    slot = table[seats[row], np.where(row < len(plan), page_of, 0)].astype(np.int64) * page + position % page
    for r, span in enumerate(plan):
        if not span.write:
            slot[start[r]] %= page
    token = np.zeros(size, np.int64)
    token[start[: len(plan)]] = -seats[: len(plan)]
    for span, at, end in zip(plan, start.tolist(), start[1:].tolist(), strict=False):
        known = tokens[span.id]
        if span.stop <= len(known):
            token[at:end] = known[span.start : span.stop]
    return {
        "token": token,
        "position": position,
        "slot": slot,
        "start": start,
        "length": length,
        "seat": seats,
        "output": np.maximum(start[1:] - 1, 0),
    }


def stage(
    plan: Plan,
    tokens: Mapping[int, Sequence[int]],
    page: int,
    device: torch.device | str | None = None,
    *,
    pad: int = 0,
) -> Batch:
    """The Batch of a plan alone, on `device` (None: torch's default device), with a page table made for it.

    `tokens` maps a sequence's id to all its tokens, `page` is the page size.

    Where the plan has fewer than `pad` tokens, rows of one token in the scratch page fill it up.
    """
    used = sum(span.stop - span.start for span in plan)
    rows = len(plan) + max(0, pad - used)
    table = np.zeros((rows + 1, max((-(-span.stop // page) for span in plan), default=1)), np.int64)
    for r, span in enumerate(plan, 1):
        held = span.pages[: -(-span.stop // page)]  # what a sequence does not use points at scratch
        table[r, : len(held)] = held
    arrays = layout(plan, tokens, np.arange(1, len(plan) + 1), table, page, max(pad, used), rows)
    arrays["output"] = arrays["output"][[r for r, span in enumerate(plan) if span.sample]]
    place = device or torch.get_default_device()
    tensors: dict[str, Any] = {k: torch.from_numpy(x).to(place) for k, x in (arrays | {"pages": table}).items()}
    return Batch(**tensors, page_size=page)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device; from pinned memory, since other copies wait for the step that is running."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def sharing(groups: Sequence[Group], rows: int, width: int) -> dict[str, np.ndarray]:
    """The arrays of a Share for a batch of `rows` sequences, with room for `places(rows)` groups of `width`."""
    n = places(rows)
    member, keys, skip = np.full((n, width), -1, np.int64), np.zeros(n, np.int64), np.zeros(rows, np.int64)
    for i, (members, count) in enumerate(groups):
        member[i, : len(members)], keys[i] = members, count
        skip[list(members)] = count
    return {"member": member.flatten(), "keys": keys, "skip": skip}


def places(rows: int) -> int:
    """Groups that share pages, at most, in a batch of so many sequences."""
    return max(1, rows // 4)


class Stager:
    """Puts the batches of an engine's steps on its device, and keeps what each running sequence brings in tables.

    On a GPU the tensors of a Batch are views of one buffer, the same for the same shape, so that captured graphs can
    read them: they change with the next step. A step costs one copy from pinned memory, made while the step before
    runs: on its stream it would begin only after that has ended, and a small model's step would wait for it.

    A step has at most `tokens` tokens and `rows` sequences, padding included; a sequence at most `width` pages, a
    group that shares pages at most `members` sequences. `adapters`: batches say whose adapter each token has.
    `kernels`: what is copied between steps is copied by them.
    """

    def __init__(
        self,
        seats: int,
        tokens: int,
        rows: int,
        width: int,
        page: int,
        vocab: int,
        device: torch.device,
        members: int = 16,
        *,
        adapters: bool = False,
        kernels: bool = False,
    ) -> None:
        self.page, self.vocab, self.device, self.members = page, vocab, device, members
        self.adapter = np.zeros(seats + 1, np.int32) if adapters else None
        self.table = np.zeros((seats + 1, width), np.int32)
        self.sitting: dict[int, tuple[int, tuple[int, ...]]] = {}  # seat -> sequence, and its pages in the table
        self.rows = {name: np.zeros(seats + 1, np.float32 if name in FLOATS else np.int32) for name in ROWS[3:]}
        self.seed = np.zeros(seats + 1, np.int64)
        self.pages = torch.zeros(seats + 1, width, dtype=torch.int32, device=device)
        self.last = torch.zeros(seats + 1, dtype=torch.int32, device=device)  # token last drawn in each seat
        self.cuda = device.type == "cuda"
        if self.cuda:
            most = self._sizes(tokens, rows, share=True)
            words = torch.zeros(sum(most.values()), dtype=torch.int32, device="cpu")
            self._pinned = [words.pin_memory() for _ in range(2)]
            self._arrived = [torch.zeros_like(words, device=device) for _ in range(2)]
            self._taken = [torch.cuda.Event() for _ in range(2)]
            self._side = torch.cuda.Stream(device)
            self._buffer = torch.zeros_like(words, device=device)
            self._drawn = [torch.zeros(2 * rows, dtype=torch.int32, device="cpu").pin_memory() for _ in range(2)]
        self._copy: Callable[..., Any] = lambda target, first: target[: len(first)].copy_(first)
        if kernels:
            from fastgen.ops.moves import copy  # Triton comes with the GPU builds of torch, and not with others

            self._copy = copy

    @property
    def bytes(self) -> int:
        """Of memory on the device."""
        return self.pages.nbytes + self.last.nbytes + (3 * self._buffer.nbytes if self.cuda else 0)

    def _sizes(self, tokens: int, rows: int, *, share: bool) -> dict[str, int]:
        """32-bit words of each field in the buffer; the seeds, of 64 bits, come first."""
        sizes = {"seed": 2 * rows} | dict.fromkeys(INTS, tokens) | {"start": rows + 1} | dict.fromkeys(ROWS, rows)
        if self.adapter is not None:
            sizes["adapter"] = tokens
        if share:
            sizes |= {"member": places(rows) * self.members, "keys": places(rows), "skip": rows}
        return sizes

    def _seat(self, plan: Plan, samples: Mapping[int, Sample]) -> None:
        """Take in sequences that begin to run, and pages that they got."""
        index, value = list[int](), list[int]()
        for span in plan:
            id, held = self.sitting.get(span.seat, (-1, ()))
            if id != span.id:
                p, held = samples[span.id].params, ()
                self.seed[span.seat] = samples[span.id].seed
                if self.adapter is not None:
                    self.adapter[span.seat] = samples[span.id].adapter
                top_k = min(p.top_k or self.vocab, self.vocab)  # any number is allowed; more would not fit 32 bits
                values = (p.temperature, top_k, p.top_p, p.min_p, p.logprob_mode == "processed")
                for name, setting in zip(self.rows, values, strict=True):
                    self.rows[name][span.seat] = setting
            elif span.pages is held:
                continue
            same = len(held) if span.pages[: len(held)] == held else 0
            self.table[span.seat, same : len(span.pages)] = span.pages[same:]
            at = span.seat * self.table.shape[1]
            index += range(at + same, at + len(span.pages))
            value += span.pages[same:]
            self.sitting[span.seat] = span.id, span.pages
        if not index:
            return
        words = torch.tensor([index, value], device="cpu")
        if self.cuda:
            main = torch.cuda.current_stream(self.device)
            with torch.cuda.stream(self._side):
                words = to_device(words, self.device)
            main.wait_stream(self._side)
            words.record_stream(main)
        self.pages.view(-1).index_copy_(0, words[0], words[1].int())

    def _split(self, buffer: Tensor, tokens: int, rows: int, *, share: bool) -> dict[str, Tensor]:
        sizes = self._sizes(tokens, rows, share=share)
        parts = dict(zip(sizes, buffer[: sum(sizes.values())].split(list(sizes.values())), strict=True))
        parts["seed"] = parts["seed"].view(torch.int64)
        return parts | {name: parts[name].view(torch.float32) for name in FLOATS}

    def _fields(self, x: dict[str, Tensor]) -> tuple[Batch, Sampling]:
        share = Share(x["member"].view(-1, self.members), x["keys"], x["skip"]) if "member" in x else None
        names = (*INTS, "start", "length", "seat", "output")
        fields = {name: x[name] for name in names}
        batch = Batch(**fields, pages=self.pages, page_size=self.page, share=share, adapter=x.get("adapter"))
        filter = Filter(x["top_k"], x["top_p"], x["min_p"])
        return batch, Sampling(x["temperature"], x["seed"], x["length"], x["processed"], filter, None)

    def stage(
        self,
        plan: Plan,
        samples: Mapping[int, Sample],
        size: int,
        rows: int,
        step: int,
        groups: Sequence[Group] | None = None,
    ) -> tuple[Batch, Sampling]:
        """Batch and sampling settings of a plan, padded to `size` tokens and `rows` sequences. `step` counts steps.

        `groups` None: the batch has no Share.
        """
        self._seat(plan, samples)
        seat = np.fromiter((span.seat for span in plan), np.int64, len(plan))
        tokens = {span.id: samples[span.id].tokens for span in plan}
        arrays = layout(plan, tokens, seat, self.table, self.page, size, rows)
        arrays["seed"] = self.seed[arrays["seat"]]
        arrays |= {name: values[arrays["seat"]] for name, values in self.rows.items()}
        if self.adapter is not None:
            arrays["adapter"] = np.repeat(self.adapter[arrays["seat"]], np.diff(arrays["start"]))
        share = groups is not None
        if groups is not None:
            arrays |= sharing(groups, rows, self.members)
        used = sum(self._sizes(size, rows, share=share).values())
        # The buffers take turns: these were last used by the step before last, which has long begun.
        if self.cuda:
            self._taken[step % 2].synchronize()
        host = self._pinned[step % 2] if self.cuda else torch.empty(used, dtype=torch.int32, device="cpu")
        parts = self._split(host, size, rows, share=share)
        for name, part in parts.items():
            part.numpy()[:] = arrays[name]
        if not self.cuda:
            return self._fields(parts)
        arrived = self._arrived[step % 2][:used]
        with torch.cuda.stream(self._side):
            arrived.copy_(host[:used], non_blocking=True)
        torch.cuda.current_stream(self.device).wait_stream(self._side)
        self._copy(self._buffer, arrived)
        self._taken[step % 2].record()
        return self._fields(self._split(self._buffer, size, rows, share=share))

    def drawn(self, token: Tensor, logprob: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """A step's tokens (int32) and logprobs (fp32), on their way to the host by a kernel; they last until those of
        the step after next.
        """
        n, host = len(token), self._drawn[step % 2]
        self._copy(host, token, logprob.view(torch.int32))
        return host[:n], host[n : 2 * n].view(torch.float32)


def edits(plan: Plan, samples: Mapping[int, Sample], device: torch.device) -> Edits | None:
    """The changes to logits that the plan's sequences ask for; rows are the plan's. None where there are none."""
    drawing = [(r, s) for r, span in enumerate(plan) if span.sample and (s := samples.get(span.id)) is not None]
    found = [(r, s.params, changes) for r, s in drawing if (changes := s.edits()) is not None]
    if not found:
        return None
    rows, params, changes = zip(*found, strict=True)
    token, bias, count, seen = (np.concatenate(arrays) for arrays in zip(*changes, strict=True))
    sizes = [len(tokens) for tokens, *_ in changes]

    def each(values: Iterable[float], dtype: type) -> Tensor:
        """A row's value for each of its entries."""
        return tensor(np.repeat(np.array([*values], dtype), sizes))

    def tensor(values: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(values), device)

    return Edits(
        row=each(rows, np.int64),
        token=tensor(token),
        bias=tensor(bias),
        count=tensor(count),
        seen=tensor(seen),
        presence=each((p.presence_penalty for p in params), np.float32),
        frequency=each((p.frequency_penalty for p in params), np.float32),
        repetition=each((p.repetition_penalty for p in params), np.float32),
    )
