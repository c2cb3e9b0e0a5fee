"""From a plan, in ints, to the tensors of a step."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from fastgen.core.request import SequenceState
from fastgen.core.scheduler import Plan, num_pages_for
from fastgen.core.scheduling_policy import SharedPrefixGroup
from fastgen.core.types import Batch, LogitEdits, SamplingTensors, SharedPrefix, TopKTopP

TOKEN_FIELDS = ("token_ids", "positions", "slot_mapping")  # one value for each token of a step
# One value for each sequence, from its request.
SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "processed")
SEQUENCE_FIELDS = ("seq_lens", "req_idx", "logits_indices", *SAMPLING_FIELDS)  # one value for each sequence
FLOAT_FIELDS = ("temperature", "top_p", "min_p")


def build_arrays(
    plan: Plan, tokens_by_id: Mapping[int, Sequence[int]], req_idx: Int[np.ndarray, " spans"],
    page_table: Int[np.ndarray, "E P"], page_size: int, num_tokens: int, num_rows: int,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Returns the int64 arrays of a Batch of `num_tokens` tokens and `num_rows` sequences, by field.

    Row r is span r of the plan, with row `req_idx[r]` of the page table. Tokens beyond the plan's are padding, spread
    over the remaining rows, with request row 0 and slots of the scratch page. A token that a step in flight samples is
    encoded as -req_idx. A key that is cached already is written to the scratch page.
    """
    first, stop = (np.fromiter((span[i] for span in plan), np.int64, len(plan)) for i in (1, 2))
    count = np.zeros(num_rows, np.int64)
    count[: len(plan)] = stop - first
    num_padding, num_padding_rows = num_tokens - int(count.sum()), num_rows - len(plan)
    if num_padding_rows:
        count[len(plan) :] = num_padding // num_padding_rows
        count[len(plan) : len(plan) + num_padding % num_padding_rows] += 1
    start = np.concatenate(([0], np.cumsum(count)))
    begin, length, req_rows = np.zeros(num_rows, np.int64), count.copy(), np.zeros(num_rows, np.int64)
    begin[: len(plan)], length[: len(plan)], req_rows[: len(plan)] = first, stop, req_idx
    row = np.repeat(np.arange(num_rows), count)
    position = begin[row] + np.arange(num_tokens) - start[row]
    page = page_table[req_rows[row], np.where(row < len(plan), position // page_size, 0)].astype(np.int64)
    slot = page * page_size + position % page_size
    for r, span in enumerate(plan):
        if not span.writes_kv:
            slot[start[r]] %= page_size
    token = np.zeros(num_tokens, np.int64)
    token[start[: len(plan)]] = -req_rows[: len(plan)]
    for span, i, j in zip(plan, start.tolist(), start[1:].tolist(), strict=False):
        known = tokens_by_id[span.id]
        if span.stop <= len(known):
            token[i:j] = known[span.start : span.stop]
    return {
        "token_ids": token, "positions": position, "slot_mapping": slot, "query_start_loc": start,
        "seq_lens": length, "req_idx": req_rows, "logits_indices": np.maximum(start[1:] - 1, 0),
    }  # fmt: skip


def build_batch(
    plan: Plan, tokens_by_id: Mapping[int, Sequence[int]], page_size: int, device: torch.device | str | None = None, *,
    pad_to: int = 0,
) -> Batch:  # fmt: skip
    """Returns the Batch of a single plan, with a page table of its own, on `device` (None: torch's default device).

    `tokens_by_id` maps a sequence's id to all its tokens. If the plan has fewer than `pad_to` tokens, rows of one token
    in the scratch page are added.
    """
    num_tokens = sum(span.stop - span.start for span in plan)
    num_rows = len(plan) + max(0, pad_to - num_tokens)
    width = max((num_pages_for(page_size, span.stop) for span in plan), default=1)
    page_table = np.zeros((num_rows + 1, width), np.int64)  # unused entries are the scratch page
    for r, span in enumerate(plan, 1):
        pages = span.pages[: num_pages_for(page_size, span.stop)]
        page_table[r, : len(pages)] = pages
    req_idx = np.arange(1, len(plan) + 1)
    arrays = build_arrays(plan, tokens_by_id, req_idx, page_table, page_size, max(pad_to, num_tokens), num_rows)
    arrays["logits_indices"] = arrays["logits_indices"][[r for r, span in enumerate(plan) if span.needs_sampling]]
    arrays["page_table"], device = page_table, device or torch.get_default_device()
    tensors: dict[str, Any] = {name: torch.from_numpy(x).to(device) for name, x in arrays.items()}
    return Batch(**tensors, page_size=page_size)


def to_device(x: Shaped[Tensor, "*shape"], device: torch.device) -> Shaped[Tensor, "*shape"]:
    """Copies a host tensor to a device. A GPU copies from pinned memory, so that the host does not wait."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def shared_prefix_arrays(groups: Sequence[SharedPrefixGroup], num_rows: int, group_size: int) -> dict[str, np.ndarray]:
    """Returns the arrays of a SharedPrefix of `max_groups(num_rows)` groups with `group_size` places each, by field."""
    n = max_groups(num_rows)
    group_rows = np.full((n, group_size), -1, np.int64)
    num_shared, num_skipped = np.zeros(n, np.int64), np.zeros(num_rows, np.int64)
    for i, (members, num_tokens) in enumerate(groups):
        group_rows[i, : len(members)], num_shared[i] = members, num_tokens
        num_skipped[list(members)] = num_tokens
    return {"group_rows": group_rows.flatten(), "num_shared_tokens": num_shared, "num_skipped_tokens": num_skipped}


def max_groups(num_rows: int) -> int:
    """Returns the largest number of shared-prefix groups in a batch of `num_rows` sequences."""
    return max(1, num_rows // 4)


class InputBuffers:
    """Builds the inputs of steps, from tables of each running sequence's settings and pages by req_idx.

    A sequence has at most `max_pages_per_seq` pages, a shared-prefix group at most `max_group_size` sequences. With
    `use_adapters`, batches name the LoRA adapter of each token.
    """

    def __init__(
        self, max_num_seqs: int, max_pages_per_seq: int, page_size: int, vocab_size: int, device: torch.device,
        max_group_size: int = 16, *, use_adapters: bool = False,
    ) -> None:  # fmt: skip
        self.page_size, self.vocab_size, self.device = page_size, vocab_size, device
        self.max_group_size, num_req_rows = max_group_size, max_num_seqs + 1
        # Tables by req_idx. Row 0 is for padding.
        self.adapter_idx = np.zeros(num_req_rows, np.int32) if use_adapters else None
        self.page_table_cpu = np.zeros((num_req_rows, max_pages_per_seq), np.int32)
        self.seq_at_req_idx: dict[int, tuple[int, tuple[int, ...]]] = {}  # sequence id, and its pages in the table
        types = {name: np.float32 if name in FLOAT_FIELDS else np.int32 for name in SAMPLING_FIELDS}
        self.sampling_tables = {name: np.zeros(num_req_rows, dtype) for name, dtype in types.items()}
        self.seeds = np.zeros(num_req_rows, np.int64)
        self.page_table = torch.zeros(num_req_rows, max_pages_per_seq, dtype=torch.int32, device=device)
        self.last_token_ids = torch.zeros(num_req_rows, dtype=torch.int32, device=device)  # last sampled tokens

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return self.page_table.nbytes + self.last_token_ids.nbytes

    def field_sizes(self, num_tokens: int, num_rows: int, *, shared_prefix: bool) -> dict[str, int]:
        """Returns the size of each field of a step's inputs, in 32-bit words. The 64-bit seeds come first, aligned."""
        sizes = {"seed": 2 * num_rows} | dict.fromkeys(TOKEN_FIELDS, num_tokens)
        sizes |= {"query_start_loc": num_rows + 1} | dict.fromkeys(SEQUENCE_FIELDS, num_rows)
        if self.adapter_idx is not None:
            sizes["adapter_idx"] = num_tokens
        if shared_prefix:
            n = max_groups(num_rows)
            sizes |= {"group_rows": n * self.max_group_size, "num_shared_tokens": n, "num_skipped_tokens": num_rows}
        return sizes

    def fill(
        self, plan: Plan, sequences: Mapping[int, SequenceState], num_tokens: int, num_rows: int, step_idx: int,
        groups: Sequence[SharedPrefixGroup] | None = None,
    ) -> tuple[Batch, SamplingTensors]:  # fmt: skip
        """Returns a plan's batch and sampling settings, padded to `num_tokens` tokens and `num_rows` sequences.

        `step_idx` counts steps. If `groups` is None, the batch has no SharedPrefix.
        """
        self._update_tables(plan, sequences)
        req_idx = np.fromiter((span.req_idx for span in plan), np.int64, len(plan))
        tokens = {span.id: sequences[span.id].token_ids for span in plan}
        arrays = build_arrays(plan, tokens, req_idx, self.page_table_cpu, self.page_size, num_tokens, num_rows)
        req_idx = arrays["req_idx"]
        arrays["seed"] = self.seeds[req_idx]
        arrays |= {name: table[req_idx] for name, table in self.sampling_tables.items()}
        if self.adapter_idx is not None:
            arrays["adapter_idx"] = np.repeat(self.adapter_idx[req_idx], np.diff(arrays["query_start_loc"]))
        if groups is not None:
            arrays |= shared_prefix_arrays(groups, num_rows, self.max_group_size)
        sizes = self.field_sizes(num_tokens, num_rows, shared_prefix=groups is not None)
        words = self.host_words(sum(sizes.values()), step_idx)
        for name, field in _split_words(words, sizes).items():
            field.numpy()[:] = arrays[name]
        return self._build_batch(_split_words(self.copy_to_device(words, step_idx), sizes))

    def host_words(self, num_words: int, step_idx: int) -> Int[Tensor, " words"]:
        """Returns int32 host memory for the inputs of a step."""
        return torch.empty(num_words, dtype=torch.int32, device="cpu")

    def copy_to_device(self, words: Int[Tensor, " words"], step_idx: int) -> Int[Tensor, " words"]:
        """Returns the inputs of a step on the device."""
        return words.to(self.device)

    def copy_updates(self, updates: Int[Tensor, "2 n"]) -> Int[Tensor, "2 n"]:
        """Returns updates of the page table on the device."""
        return updates.to(self.device)

    def _update_tables(self, plan: Plan, sequences: Mapping[int, SequenceState]) -> None:
        """Updates the tables for newly admitted sequences and newly allocated pages."""
        indices, values = list[int](), list[int]()
        for span in plan:
            req_idx = span.req_idx
            id, pages = self.seq_at_req_idx.get(req_idx, (-1, ()))
            if id != span.id:
                state, pages = sequences[span.id], ()
                p = state.params
                self.seeds[req_idx] = state.seed
                if self.adapter_idx is not None:
                    self.adapter_idx[req_idx] = state.adapter_idx
                top_k = min(p.top_k or self.vocab_size, self.vocab_size)  # requests may ask for more than fits 32 bits
                settings = (p.temperature, top_k, p.top_p, p.min_p, p.logprob_mode == "processed")
                for table, value in zip(self.sampling_tables.values(), settings, strict=True):
                    table[req_idx] = value
            elif span.pages is pages:
                continue
            num_same = len(pages) if span.pages[: len(pages)] == pages else 0
            self.page_table_cpu[req_idx, num_same : len(span.pages)] = span.pages[num_same:]
            offset = req_idx * self.page_table_cpu.shape[1]
            indices += range(offset + num_same, offset + len(span.pages))
            values += span.pages[num_same:]
            self.seq_at_req_idx[req_idx] = span.id, span.pages
        if indices:
            updates = self.copy_updates(torch.tensor([indices, values], device="cpu"))
            self.page_table.view(-1).index_copy_(0, updates[0], updates[1].int())

    def _build_batch(self, f: dict[str, Tensor]) -> tuple[Batch, SamplingTensors]:
        shared_prefix = None
        if "group_rows" in f:
            group_rows = f["group_rows"].view(-1, self.max_group_size)
            shared_prefix = SharedPrefix(group_rows, f["num_shared_tokens"], f["num_skipped_tokens"])
        fields = {name: f[name] for name in (*TOKEN_FIELDS, "query_start_loc", *SEQUENCE_FIELDS[:3])}
        options: Any = {"shared_prefix": shared_prefix, "adapter_idx": f.get("adapter_idx")}
        batch = Batch(**fields, page_table=self.page_table, page_size=self.page_size, **options)
        top_k_top_p = TopKTopP(f["top_k"], f["top_p"], f["min_p"])
        return batch, SamplingTensors(f["temperature"], f["seed"], f["seq_lens"], f["processed"], top_k_top_p, None)


def _split_words(words: Int[Tensor, " words"], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Returns the fields of a step's inputs as views, by name."""
    fields = dict(zip(sizes, words.split(list(sizes.values())), strict=True))
    fields["seed"] = fields["seed"].view(torch.int64)
    return fields | {name: fields[name].view(torch.float32) for name in FLOAT_FIELDS}


def build_logit_edits(plan: Plan, sequences: Mapping[int, SequenceState], device: torch.device) -> LogitEdits | None:
    """Returns the penalties and biases of a plan's sampled sequences; rows are the plan's. None: there are none."""
    sampled = ((r, sequences.get(span.id)) for r, span in enumerate(plan) if span.needs_sampling)
    edited = [(r, s.params, edits) for r, s in sampled if s is not None and (edits := s.logit_edits()) is not None]
    if not edited:
        return None
    rows, params, edits = zip(*edited, strict=True)
    token_ids, bias, output_counts, seen = (np.concatenate(arrays) for arrays in zip(*edits, strict=True))
    num_entries = [len(tokens) for tokens, *_ in edits]

    def tensor(values: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(values), device)

    def repeat(values: Iterable[float], dtype: type) -> Tensor:
        """Returns a row's value for each of its entries."""
        return tensor(np.repeat(np.array([*values], dtype), num_entries))

    return LogitEdits(
        repeat(rows, np.int64),
        *map(tensor, (token_ids, bias, output_counts, seen)),
        presence_penalty=repeat((p.presence_penalty for p in params), np.float32),
        frequency_penalty=repeat((p.frequency_penalty for p in params), np.float32),
        repetition_penalty=repeat((p.repetition_penalty for p in params), np.float32),
    )
