"""From a plan, in ints, to the tensors of a step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.core.request import SequenceState
from fastgen.core.scheduler import Plan
from fastgen.core.scheduling_policy import SharedPrefixGroup
from fastgen.core.types import Batch, LogitEdits, SamplingTensors, SharedPrefix, TopKTopP

TOKEN_FIELDS = ("token_ids", "positions", "slot_mapping")  # a number for each token of a step
SEQUENCE_FIELDS = (
    "seq_lens",
    "req_idx",
    "logits_indices",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "processed",
)  # and for each sequence
FLOAT_FIELDS = ("temperature", "top_p", "min_p")


def build_arrays(
    plan: Plan,
    tokens_by_id: Mapping[int, Sequence[int]],
    req_idx: np.ndarray,
    page_table: np.ndarray,
    page_size: int,
    num_tokens: int,
    num_rows: int,
) -> dict[str, np.ndarray]:
    """The arrays of a Batch of `size` tokens and `rows` sequences, int64.

    What the plan leaves free is padding, spread over the rows left, in the scratch page and seat 0. A token that is
    not known yet, drawn by a step still running, is told by its seat. What is cached already is written to scratch.
    """
    first, stop = (np.fromiter((span[i] for span in plan), np.int64, len(plan)) for i in (1, 2))
    count = np.zeros(num_rows, np.int64)
    count[: len(plan)] = stop - first
    filler, left = num_tokens - int(count.sum()), num_rows - len(plan)
    if left:
        count[len(plan) :] = filler // left + (np.arange(left) < filler % left)
    start = np.concatenate(([0], np.cumsum(count)))
    begin, length, seats = np.zeros(num_rows, np.int64), count.copy(), np.zeros(num_rows, np.int64)
    begin[: len(plan)], length[: len(plan)], seats[: len(plan)] = first, stop, req_idx
    row = np.repeat(np.arange(num_rows), count)
    position = begin[row] + np.arange(num_tokens) - start[row]
    page_of = position // page_size
    slot = (
        page_table[seats[row], np.where(row < len(plan), page_of, 0)].astype(np.int64) * page_size
        + position % page_size
    )
    for r, span in enumerate(plan):
        if not span.writes_kv:
            slot[start[r]] %= page_size
    token = np.zeros(num_tokens, np.int64)
    token[start[: len(plan)]] = -seats[: len(plan)]
    for span, at, end in zip(plan, start.tolist(), start[1:].tolist(), strict=False):
        known = tokens_by_id[span.id]
        if span.stop <= len(known):
            token[at:end] = known[span.start : span.stop]
    return {
        "token_ids": token,
        "positions": position,
        "slot_mapping": slot,
        "query_start_loc": start,
        "seq_lens": length,
        "req_idx": seats,
        "logits_indices": np.maximum(start[1:] - 1, 0),
    }


def build_batch(
    plan: Plan,
    tokens_by_id: Mapping[int, Sequence[int]],
    page_size: int,
    device: torch.device | str | None = None,
    *,
    pad_to: int = 0,
) -> Batch:
    """The Batch of a plan alone, on `device` (None: torch's default device), with a page table made for it.

    `tokens` maps a sequence's id to all its tokens, `page` is the page size.

    Where the plan has fewer than `pad` tokens, rows of one token in the scratch page fill it up.
    """
    used = sum(span.stop - span.start for span in plan)
    rows = len(plan) + max(0, pad_to - used)
    table = np.zeros((rows + 1, max((-(-span.stop // page_size) for span in plan), default=1)), np.int64)
    for r, span in enumerate(plan, 1):
        held = span.pages[: -(-span.stop // page_size)]  # what a sequence does not use points at scratch
        table[r, : len(held)] = held
    arrays = build_arrays(plan, tokens_by_id, np.arange(1, len(plan) + 1), table, page_size, max(pad_to, used), rows)
    arrays["logits_indices"] = arrays["logits_indices"][[r for r, span in enumerate(plan) if span.needs_sampling]]
    place = device or torch.get_default_device()
    tensors: dict[str, Any] = {k: torch.from_numpy(x).to(place) for k, x in (arrays | {"page_table": table}).items()}
    return Batch(**tensors, page_size=page_size)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device; from pinned memory, since other copies wait for the step that is running."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def shared_prefix_arrays(groups: Sequence[SharedPrefixGroup], num_rows: int, group_size: int) -> dict[str, np.ndarray]:
    """The arrays of a Share for a batch of `rows` sequences, with room for `places(rows)` groups of `width`."""
    n = max_groups(num_rows)
    member, keys, skip = np.full((n, group_size), -1, np.int64), np.zeros(n, np.int64), np.zeros(num_rows, np.int64)
    for i, (members, count) in enumerate(groups):
        member[i, : len(members)], keys[i] = members, count
        skip[list(members)] = count
    return {"group_rows": member.flatten(), "num_shared_tokens": keys, "num_skipped_tokens": skip}


def max_groups(num_rows: int) -> int:
    """Groups that share pages, at most, in a batch of so many sequences."""
    return max(1, num_rows // 4)


class InputBuffers:
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
        max_num_seqs: int,
        max_tokens: int,
        max_rows: int,
        max_pages_per_seq: int,
        page_size: int,
        vocab_size: int,
        device: torch.device,
        max_group_size: int = 16,
        *,
        use_adapters: bool = False,
        use_kernels: bool = False,
    ) -> None:
        self.page_size, self.vocab_size, self.device, self.max_group_size = (
            page_size,
            vocab_size,
            device,
            max_group_size,
        )
        self.adapter_idx = np.zeros(max_num_seqs + 1, np.int32) if use_adapters else None
        self.page_table_cpu = np.zeros((max_num_seqs + 1, max_pages_per_seq), np.int32)
        self.seq_at_req_idx: dict[int, tuple[int, tuple[int, ...]]] = {}  # seat -> sequence, and its pages in the table
        self.sampling_tables = {
            name: np.zeros(max_num_seqs + 1, np.float32 if name in FLOAT_FIELDS else np.int32)
            for name in SEQUENCE_FIELDS[3:]
        }
        self.seeds = np.zeros(max_num_seqs + 1, np.int64)
        self.page_table = torch.zeros(max_num_seqs + 1, max_pages_per_seq, dtype=torch.int32, device=device)
        self.last_token_ids = torch.zeros(
            max_num_seqs + 1, dtype=torch.int32, device=device
        )  # token last drawn in each seat
        self.is_cuda = device.type == "cuda"
        if self.is_cuda:
            most = self._field_sizes(max_tokens, max_rows, shared_prefix=True)
            words = torch.zeros(sum(most.values()), dtype=torch.int32, device="cpu")
            self._pinned_buffers = [words.pin_memory() for _ in range(2)]
            self._staging_buffers = [torch.zeros_like(words, device=device) for _ in range(2)]
            self._staging_read_events = [torch.cuda.Event() for _ in range(2)]
            self._copy_stream = torch.cuda.Stream(device)
            self._buffer = torch.zeros_like(words, device=device)
            self._sampled_host_buffers = [
                torch.zeros(2 * max_rows, dtype=torch.int32, device="cpu").pin_memory() for _ in range(2)
            ]
        self._copy: Callable[..., Any] = lambda target, first: target[: len(first)].copy_(first)
        if use_kernels:
            from fastgen.kernels.page_copy import (
                copy_concatenated,  # Triton comes with the GPU builds of torch, and not with others
            )

            self._copy = copy_concatenated

    @property
    def nbytes(self) -> int:
        """Of memory on the device."""
        return self.page_table.nbytes + self.last_token_ids.nbytes + (3 * self._buffer.nbytes if self.is_cuda else 0)

    def _field_sizes(self, num_tokens: int, num_rows: int, *, shared_prefix: bool) -> dict[str, int]:
        """32-bit words of each field in the buffer; the seeds, of 64 bits, come first."""
        sizes = (
            {"seed": 2 * num_rows}
            | dict.fromkeys(TOKEN_FIELDS, num_tokens)
            | {"query_start_loc": num_rows + 1}
            | dict.fromkeys(SEQUENCE_FIELDS, num_rows)
        )
        if self.adapter_idx is not None:
            sizes["adapter_idx"] = num_tokens
        if shared_prefix:
            sizes |= {
                "group_rows": max_groups(num_rows) * self.max_group_size,
                "num_shared_tokens": max_groups(num_rows),
                "num_skipped_tokens": num_rows,
            }
        return sizes

    def _update_tables(self, plan: Plan, sequences: Mapping[int, SequenceState]) -> None:
        """Take in sequences that begin to run, and pages that they got."""
        index, value = list[int](), list[int]()
        for span in plan:
            id, held = self.seq_at_req_idx.get(span.req_idx, (-1, ()))
            if id != span.id:
                p, held = sequences[span.id].params, ()
                self.seeds[span.req_idx] = sequences[span.id].seed
                if self.adapter_idx is not None:
                    self.adapter_idx[span.req_idx] = sequences[span.id].adapter_idx
                top_k = min(
                    p.top_k or self.vocab_size, self.vocab_size
                )  # any number is allowed; more would not fit 32 bits
                values = (p.temperature, top_k, p.top_p, p.min_p, p.logprob_mode == "processed")
                for name, setting in zip(self.sampling_tables, values, strict=True):
                    self.sampling_tables[name][span.req_idx] = setting
            elif span.pages is held:
                continue
            same = len(held) if span.pages[: len(held)] == held else 0
            self.page_table_cpu[span.req_idx, same : len(span.pages)] = span.pages[same:]
            at = span.req_idx * self.page_table_cpu.shape[1]
            index += range(at + same, at + len(span.pages))
            value += span.pages[same:]
            self.seq_at_req_idx[span.req_idx] = span.id, span.pages
        if not index:
            return
        words = torch.tensor([index, value], device="cpu")
        if self.is_cuda:
            main = torch.cuda.current_stream(self.device)
            with torch.cuda.stream(self._copy_stream):
                words = to_device(words, self.device)
            main.wait_stream(self._copy_stream)
            words.record_stream(main)
        self.page_table.view(-1).index_copy_(0, words[0], words[1].int())

    def _split_buffer(
        self, buffer: Tensor, num_tokens: int, num_rows: int, *, shared_prefix: bool
    ) -> dict[str, Tensor]:
        sizes = self._field_sizes(num_tokens, num_rows, shared_prefix=shared_prefix)
        parts = dict(zip(sizes, buffer[: sum(sizes.values())].split(list(sizes.values())), strict=True))
        parts["seed"] = parts["seed"].view(torch.int64)
        return parts | {name: parts[name].view(torch.float32) for name in FLOAT_FIELDS}

    def _build_batch(self, tensors: dict[str, Tensor]) -> tuple[Batch, SamplingTensors]:
        share = (
            SharedPrefix(
                tensors["group_rows"].view(-1, self.max_group_size),
                tensors["num_shared_tokens"],
                tensors["num_skipped_tokens"],
            )
            if "group_rows" in tensors
            else None
        )
        names = (*TOKEN_FIELDS, "query_start_loc", "seq_lens", "req_idx", "logits_indices")
        fields = {name: tensors[name] for name in names}
        batch = Batch(
            **fields,
            page_table=self.page_table,
            page_size=self.page_size,
            shared_prefix=share,
            adapter_idx=tensors.get("adapter_idx"),
        )
        filter = TopKTopP(tensors["top_k"], tensors["top_p"], tensors["min_p"])
        return batch, SamplingTensors(
            tensors["temperature"], tensors["seed"], tensors["seq_lens"], tensors["processed"], filter, None
        )

    def fill(
        self,
        plan: Plan,
        sequences: Mapping[int, SequenceState],
        num_tokens: int,
        num_rows: int,
        step_idx: int,
        groups: Sequence[SharedPrefixGroup] | None = None,
    ) -> tuple[Batch, SamplingTensors]:
        """Batch and sampling settings of a plan, padded to `size` tokens and `rows` sequences. `step` counts steps.

        `groups` None: the batch has no Share.
        """
        self._update_tables(plan, sequences)
        seat = np.fromiter((span.req_idx for span in plan), np.int64, len(plan))
        tokens = {span.id: sequences[span.id].token_ids for span in plan}
        arrays = build_arrays(plan, tokens, seat, self.page_table_cpu, self.page_size, num_tokens, num_rows)
        arrays["seed"] = self.seeds[arrays["req_idx"]]
        arrays |= {name: values[arrays["req_idx"]] for name, values in self.sampling_tables.items()}
        if self.adapter_idx is not None:
            arrays["adapter_idx"] = np.repeat(self.adapter_idx[arrays["req_idx"]], np.diff(arrays["query_start_loc"]))
        share = groups is not None
        if groups is not None:
            arrays |= shared_prefix_arrays(groups, num_rows, self.max_group_size)
        used = sum(self._field_sizes(num_tokens, num_rows, shared_prefix=share).values())
        # The buffers take turns: these were last used by the step before last, which has long begun.
        if self.is_cuda:
            self._staging_read_events[step_idx % 2].synchronize()
        host = (
            self._pinned_buffers[step_idx % 2] if self.is_cuda else torch.empty(used, dtype=torch.int32, device="cpu")
        )
        parts = self._split_buffer(host, num_tokens, num_rows, shared_prefix=share)
        for name, part in parts.items():
            part.numpy()[:] = arrays[name]
        if not self.is_cuda:
            return self._build_batch(parts)
        arrived = self._staging_buffers[step_idx % 2][:used]
        with torch.cuda.stream(self._copy_stream):
            arrived.copy_(host[:used], non_blocking=True)
        torch.cuda.current_stream(self.device).wait_stream(self._copy_stream)
        self._copy(self._buffer, arrived)
        self._staging_read_events[step_idx % 2].record()
        return self._build_batch(self._split_buffer(self._buffer, num_tokens, num_rows, shared_prefix=share))

    def copy_sampled_to_host(self, token_ids: Tensor, logprobs: Tensor, step_idx: int) -> tuple[Tensor, Tensor]:
        """A step's tokens (int32) and logprobs (fp32), on their way to the host by a kernel; they last until those of
        the step after next.
        """
        n, host = len(token_ids), self._sampled_host_buffers[step_idx % 2]
        self._copy(host, token_ids, logprobs.view(torch.int32))
        return host[:n], host[n : 2 * n].view(torch.float32)


def build_logit_edits(plan: Plan, sequences: Mapping[int, SequenceState], device: torch.device) -> LogitEdits | None:
    """The changes to logits that the plan's sequences ask for; rows are the plan's. None where there are none."""
    drawing = [
        (r, s) for r, span in enumerate(plan) if span.needs_sampling and (s := sequences.get(span.id)) is not None
    ]
    found = [(r, s.params, changes) for r, s in drawing if (changes := s.logit_edits()) is not None]
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

    return LogitEdits(
        rows=each(rows, np.int64),
        token_ids=tensor(token),
        bias=tensor(bias),
        output_counts=tensor(count),
        seen=tensor(seen),
        presence_penalty=each((p.presence_penalty for p in params), np.float32),
        frequency_penalty=each((p.frequency_penalty for p in params), np.float32),
        repetition_penalty=each((p.repetition_penalty for p in params), np.float32),
    )
