"""Attention over a paged cache. A backend reads the batch's metadata once per step and returns the function that
every layer calls. All backends share the signature of `reference`, which is the specification.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastgen.core.model_config import ModelConfig
from fastgen.core.types import Batch

# attend(q [T Q H], k_cache [S K H], v_cache [S K H], window) -> [T Q H]; window: keys seen, None for all. One backend
# also takes its own UnrotatedQKV for q.
AttentionFn = Callable[[Any, Tensor, Tensor, int | None], Tensor]
AttentionBackend = Callable[[Batch, ModelConfig], AttentionFn]


def causal_mask(
    query_position: Int[Tensor, "..."], key_position: Int[Tensor, "..."], window: int | None
) -> Bool[Tensor, "..."]:
    """Which key positions a query position sees: itself and what precedes it, `window` of them at most."""
    seen = key_position <= query_position
    return seen if window is None else seen & (key_position > query_position - window)


def reference(batch: Batch, model_config: ModelConfig) -> AttentionFn:
    """The specification: every token gathers all pages of its own sequence and masks what it may not see."""
    page = batch.page_size
    row = torch.searchsorted(
        batch.query_start_loc[1:], torch.arange(len(batch.token_ids), device=batch.token_ids.device), right=True
    )
    wide = -(-int(batch.seq_lens.max()) // page)
    pages = batch.page_table[batch.req_idx[row], :wide].long()
    slots = (pages[:, :, None] * page + torch.arange(page, device=row.device)).flatten(1)
    key = torch.arange(slots.shape[1], device=row.device)

    def attend(
        q: Float[Tensor, "T Q H"], k_cache: Float[Tensor, "S K H"], v_cache: Float[Tensor, "S K H"], window: int | None
    ) -> Float[Tensor, "T Q H"]:
        k, v = k_cache[slots].float(), v_cache[slots].float()
        group = q.unflatten(1, (model_config.num_kv_heads, -1)).float()
        score = torch.einsum("tkgh,tskh->tkgs", group, k) * model_config.head_dim**-0.5
        hidden = ~causal_mask(batch.positions[:, None], key, window)
        weight = score.masked_fill(hidden[:, None, None], float("-inf")).softmax(-1)
        v = v.masked_fill(hidden[:, :, None, None], 0)  # a weight of 0 does not silence NaN
        return torch.einsum("tkgs,tskh->tkgh", weight, v).flatten(1, 2).to(q.dtype)

    return attend


def sdpa(batch: Batch, model_config: ModelConfig) -> AttentionFn:
    """Torch's fused attention over gathered pages: one call per prefilling sequence, and one for all decoding
    sequences of similar length. Runs anywhere; reads the metadata on the host, so it cannot be captured in a graph.
    """
    page, start, length = batch.page_size, batch.query_start_loc.tolist(), batch.seq_lens.tolist()
    device, group, table = (
        batch.token_ids.device,
        model_config.num_q_heads // model_config.num_kv_heads,
        batch.page_table[batch.req_idx],
    )
    prefill: list[tuple[slice, Tensor, Tensor, Tensor]] = []  # tokens, page ids, query positions, key positions
    similar: dict[int, list[int]] = defaultdict(list)  # decoding rows by size class: padding at most doubles a read
    for r, n in enumerate(length):
        span = slice(start[r], start[r + 1])
        if span.stop - span.start == 1:
            similar[(n - 1).bit_length()].append(r)
        elif span.stop > span.start:
            query = torch.arange(n - (span.stop - span.start), n, device=device)[:, None]
            prefill.append((span, table[r, : -(-n // page)], query, torch.arange(n, device=device)))
    decode = []
    for rows in similar.values():
        most = max(length[r] for r in rows)
        index = torch.tensor(rows, device=device)
        pages = table[index, : -(-most // page)]
        query = batch.seq_lens[index][:, None, None, None] - 1
        key = torch.arange(pages.shape[1] * page, device=device)
        beyond = (key >= batch.seq_lens[index][:, None]).flatten().nonzero()[:, 0]  # gathered slots of no sequence
        decode.append((batch.query_start_loc[index].long(), pages, query, key, beyond))

    def gather(leaf: Tensor, pages: Tensor) -> Tensor:
        """[..., P] page ids -> [..., P * page, K, H]"""
        paged = leaf.view(-1, page * model_config.num_kv_heads * model_config.head_dim)
        return paged.index_select(0, pages.flatten()).view(
            *pages.shape[:-1], -1, model_config.num_kv_heads, model_config.head_dim
        )

    @cache  # layers of the same window share it
    def causal(i: int, window: int | None) -> Tensor | None:
        """The mask of the i-th prefilling sequence; None where torch's plain causal one will do."""
        _, _, query, key = prefill[i]
        fresh = len(key) == len(query) and (window is None or window >= len(key))
        return None if fresh else causal_mask(query, key, window)

    @cache
    def visible(i: int, window: int | None) -> Tensor:
        """The mask of the i-th group of decoding sequences."""
        _, _, query, key, _ = decode[i]
        return causal_mask(query, key, window).expand(-1, model_config.num_kv_heads, group, -1)

    alone = not prefill and len(decode) == 1  # all tokens are one group, in order

    def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None) -> Tensor:
        out = q if alone else torch.empty_like(q)
        for i, (span, pages, _, key) in enumerate(prefill):
            k, v = (gather(c, pages)[: len(key)].transpose(0, 1)[None] for c in (k_cache, v_cache))
            mask, x = causal(i, window), q[span].transpose(0, 1)[None]
            o = F.scaled_dot_product_attention(x, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
            out[span] = o[0].transpose(0, 1)
        for i, (token, pages, _, _, beyond) in enumerate(decode):
            k, v = (gather(c, pages) for c in (k_cache, v_cache))
            for x in (k, v):  # a mask is added to scores and a weight of 0 multiplied: neither silences NaN
                x.flatten(0, 1).index_fill_(0, beyond, 0)
            # The query heads of a kv head become the query rows, so that keys are read once for all of them.
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            x = (q if alone else q[token]).unflatten(1, (model_config.num_kv_heads, group))
            o = F.scaled_dot_product_attention(x, k, v, attn_mask=visible(i, window)).flatten(1, 2)
            if alone:
                return o
            out[token] = o
        return out

    return attend
