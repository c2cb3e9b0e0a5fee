"""Attention over a paged cache. A backend reads the batch's metadata once per step, and returns the function that all
layers call. `reference` specifies what every backend computes; `sdpa` is the fastest in plain torch.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Int
from torch import Tensor

from fastgen.core.model_config import ModelConfig
from fastgen.core.types import Batch

# attend(q [T Q H], k_cache [S K H], v_cache [S K H], window) -> [T Q H]; window: number of keys a query sees, or None
# for all. The Triton backend also accepts its own UnrotatedQKV for q.
AttentionFn = Callable[[Any, Tensor, Tensor, int | None], Tensor]
AttentionBackend = Callable[[Batch, ModelConfig], AttentionFn]
ReadPages = Callable[[Tensor, torch.dtype], Tensor]  # (slots of whole pages, dtype) -> keys or values [..., K, H]


def causal_mask(
    query_position: Int[Tensor, "..."], key_position: Int[Tensor, "..."], window: int | None
) -> Bool[Tensor, "..."]:
    """Returns True where a query sees a key: the last `window` positions up to its own, or all for None."""
    seen = key_position <= query_position
    return seen if window is None else seen & (key_position > query_position - window)


def reference(batch: Batch, model_config: ModelConfig, read: ReadPages = Tensor.to) -> AttentionFn:
    """Returns attention as specified: every token gathers all keys of its sequence, and masks those it must not see."""
    page, kv_heads, device = batch.page_size, model_config.num_kv_heads, batch.token_ids.device
    row = torch.searchsorted(batch.query_start_loc[1:], torch.arange(len(batch.token_ids), device=device), right=True)
    num_pages = -(-int(batch.seq_lens.max()) // page)
    pages = batch.page_table[batch.req_idx[row], :num_pages].long()
    slots = rearrange(pages[:, :, None] * page + torch.arange(page, device=device), "t p s -> t (p s)")
    key = torch.arange(slots.shape[1], device=device)

    def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None) -> Tensor:
        k, v = read(k_cache[slots], torch.float32), read(v_cache[slots], torch.float32)
        grouped = rearrange(q, "t (k g) h -> t k g h", k=kv_heads).float()
        score = torch.einsum("tkgh,tskh->tkgs", grouped, k) * model_config.head_dim**-0.5
        hidden = ~causal_mask(batch.positions[:, None], key, window)
        weight = score.masked_fill(hidden[:, None, None], float("-inf")).softmax(-1)
        v = v.masked_fill(hidden[:, :, None, None], 0)  # a weight of 0 times NaN is NaN
        out = torch.einsum("tkgs,tskh->tkgh", weight, v)
        return rearrange(out, "t k g h -> t (k g) h").to(q.dtype)

    return attend


def sdpa(batch: Batch, model_config: ModelConfig, read: ReadPages = Tensor.to) -> AttentionFn:
    """Returns torch's fused attention over gathered pages, on any device.

    Makes one call for each prefilling sequence, and one for each group of decoding sequences of similar length. Reads
    the metadata on the host, so it cannot be captured in a CUDA graph.
    """
    page, start, length = batch.page_size, batch.query_start_loc.tolist(), batch.seq_lens.tolist()
    kv_heads, device, table = model_config.num_kv_heads, batch.token_ids.device, batch.page_table[batch.req_idx]
    group_size = model_config.num_q_heads // kv_heads
    prefill: list[tuple[slice, Tensor, Tensor, Tensor]] = []  # tokens, page ids, query positions, key positions
    # Decoding rows by the power of two above their length: padding at most doubles what is read.
    rows_by_size: dict[int, list[int]] = defaultdict(list)
    for r, n in enumerate(length):
        span = slice(start[r], start[r + 1])
        if span.stop - span.start == 1:
            rows_by_size[(n - 1).bit_length()].append(r)
        elif span.stop > span.start:
            query = torch.arange(n - (span.stop - span.start), n, device=device)[:, None]
            prefill.append((span, table[r, : -(-n // page)], query, torch.arange(n, device=device)))
    decode = []
    for rows in rows_by_size.values():
        index = torch.tensor(rows, device=device)
        pages = table[index, : -(-max(length[r] for r in rows) // page)]
        query = batch.seq_lens[index][:, None, None, None] - 1
        key = torch.arange(pages.shape[1] * page, device=device)
        padding = (key >= batch.seq_lens[index][:, None]).flatten().nonzero()[:, 0]  # slots after a sequence's end
        decode.append((batch.query_start_loc[index].long(), pages, query, key, padding))

    def gather(cache: Tensor, pages: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns [..., P * page, K, H] for page ids [..., P]."""
        rows = cache.view(-1, page * cache[0].numel()).index_select(0, pages.flatten())
        return read(rows.view(*pages.shape[:-1], -1, *cache.shape[1:]), dtype)

    @cache  # for all layers of the same window
    def prefill_mask(i: int, window: int | None) -> Tensor | None:
        """Returns the mask of the i-th prefilling sequence; None where torch's plain causal mask is the same."""
        _, _, query, key = prefill[i]
        is_causal = len(key) == len(query) and (window is None or window >= len(key))
        return None if is_causal else causal_mask(query, key, window)

    @cache
    def decode_mask(i: int, window: int | None) -> Tensor:
        """Returns the mask of the i-th group of decoding sequences."""
        _, _, query, key, _ = decode[i]
        return causal_mask(query, key, window).expand(-1, kv_heads, group_size, -1)

    single_group = not prefill and len(decode) == 1  # then its tokens are all tokens, in order

    def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None) -> Tensor:
        out = q if single_group else torch.empty_like(q)
        for i, (span, pages, _, key) in enumerate(prefill):
            k, v = (gather(c, pages, q.dtype)[: len(key)].transpose(0, 1)[None] for c in (k_cache, v_cache))
            mask, x = prefill_mask(i, window), q[span].transpose(0, 1)[None]
            o = F.scaled_dot_product_attention(x, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
            out[span] = o[0].transpose(0, 1)
        for i, (token, pages, _, _, padding) in enumerate(decode):
            k, v = (gather(c, pages, q.dtype) for c in (k_cache, v_cache))
            for x in (k, v):  # a mask is added to scores, and NaN plus -inf is NaN; so is a weight of 0 times NaN
                x.flatten(0, 1).index_fill_(0, padding, 0)
            # The query heads of a key head become query rows, so that its keys are read once for all of them.
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            x = (q if single_group else q[token]).unflatten(1, (kv_heads, group_size))
            o = F.scaled_dot_product_attention(x, k, v, attn_mask=decode_mask(i, window)).flatten(1, 2)
            if single_group:
                return o
            out[token] = o
        return out

    return attend


BACKENDS: dict[str, AttentionBackend] = {"reference": reference, "sdpa": sdpa}
