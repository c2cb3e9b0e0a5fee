"""The tensors of the paged KV cache, whose size is `compiled.cache_size`'s. Free pages are in `page_pool`."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastgen.core.model_config import ModelConfig
from fastgen.core.types import KVCache


def new_kv_cache(
    model_config: ModelConfig, num_slots: int, *, device: torch.device | str | None = None,
    dtype: torch.dtype | None = None, allocate: Callable[[tuple[int, int, int]], Tensor] | None = None,
    row_shape: tuple[int, int] | None = None,
) -> KVCache:  # fmt: skip
    """Returns a cache of `num_slots` tokens.

    `allocate` makes each tensor from its shape; by default it is zeros of `dtype` on `device`. `row_shape` is the shape
    of a token in one tensor; by default [kv heads, head_dim].
    """
    shape = (num_slots, *(row_shape or (model_config.num_kv_heads, model_config.head_dim)))
    allocate = allocate or (lambda shape: torch.zeros(shape, device=device, dtype=dtype))
    return KVCache(*(tuple(allocate(shape) for _ in range(model_config.num_layers)) for _ in "kv"))
