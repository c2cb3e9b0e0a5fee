"""The tensors of the paged KV cache. Free pages are in `page_pool`, pages of known prefixes in `prefix_cache`."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastgen.core.model_config import ModelConfig
from fastgen.core.types import KVCache


def new_kv_cache(
    model_config: ModelConfig, num_slots: int, *, device: torch.device | str | None = None,
    dtype: torch.dtype | None = None, allocate: Callable[[tuple[int, int, int]], Tensor] | None = None,
) -> KVCache:  # fmt: skip
    """Returns a cache of `num_slots` tokens. Page p is slots [p * page_size, (p + 1) * page_size).

    `allocate` makes each tensor from its shape; by default it is zeros of `dtype` on `device`.
    """
    shape = (num_slots, model_config.num_kv_heads, model_config.head_dim)
    allocate = allocate or (lambda shape: torch.zeros(shape, device=device, dtype=dtype))
    k, v = (tuple(allocate(shape) for _ in range(model_config.num_layers)) for _ in "kv")
    return KVCache(k, v)
