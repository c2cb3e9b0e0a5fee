"""How large an engine's KV cache is: what the GPU's memory has left after weights, buffers and the largest step."""

import torch
from torch.utils._pytree import tree_leaves

from fastgen.compiled.runner import ModelRunner
from fastgen.compiled.warm_up import profile_peak_memory
from fastgen.config import EngineConfig
from fastgen.core.extensions import Ranks
from fastgen.core.kv_cache import new_kv_cache
from fastgen.offload.host_offload import page_bytes
from fastgen.quantization.kv_cache import RowFormat

MAX_CPU_CACHE_BYTES = 2**30  # of a cache on a CPU whose size is not set


def cache_capacity(runner: ModelRunner, config: EngineConfig, rows: RowFormat, ranks: Ranks) -> int:
    """Returns the cache's size in tokens, full pages. Raises ValueError, with advice, where memory is short."""
    pages, schedule, shard = config.kv_cache, config.schedule, runner.model_config
    bytes_per_token = page_bytes(shard.num_layers, 1, rows)
    num_tokens = pages.cache_tokens
    if num_tokens is None:
        num_bytes = MAX_CPU_CACHE_BYTES
        if runner.device.type == "cuda":
            scratch = new_kv_cache(shard, pages.page_size, device=runner.device, dtype=rows.dtype, row_shape=rows.shape)
            try:
                used = profile_peak_memory(runner, scratch)
            except torch.OutOfMemoryError as e:
                raise _out_of_memory(runner, "the activations of the largest step do not fit") from e
            num_bytes = pages.gpu_memory_utilization * torch.cuda.mem_get_info(runner.device)[1] - used
        longest = -(-(shard.context_length - 1) // pages.page_size) * pages.page_size
        num_tokens = min(int(num_bytes) // bytes_per_token, schedule.max_num_seqs * longest)  # what could ever be used
    if num_tokens < pages.page_size:
        raise _out_of_memory(runner, f"nothing is left for the cache, of {bytes_per_token} bytes for each token")
    return ranks.all_reduce_min(num_tokens) // pages.page_size * pages.page_size


def _out_of_memory(runner: ModelRunner, problem: str) -> ValueError:
    pages, schedule, total = runner.config.kv_cache, runner.config.schedule, 0
    if runner.device.type == "cuda":
        total = torch.cuda.mem_get_info(runner.device)[1]
    weight_bytes = sum(w.nbytes for w in tree_leaves(runner.params) if w is not None)
    return ValueError(
        f"{problem}: {pages.gpu_memory_utilization:.0%} of {total / 1e9:.1f} GB, {weight_bytes / 1e9:.1f} GB of which "
        f"are weights. Lower schedule.token_budget ({schedule.token_budget}) or schedule.max_num_seqs "
        f"({schedule.max_num_seqs}), or raise kv_cache.gpu_memory_utilization"
    )
