"""Chooses kernels: the only module that decides which attention, matmuls, norms and samplers a device runs.

Triton comes with the GPU builds of torch, and not with others: modules with kernels are imported where they are chosen.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fastgen.config import CompileConfig
from fastgen.core import layers
from fastgen.core.attention import BACKENDS, AttentionBackend
from fastgen.core.model_config import ModelConfig
from fastgen.core.sampling import sample
from fastgen.core.step import FusedSampler
from fastgen.core.transformer import TORCH_OPS, ModelOps
from fastgen.core.types import Params
from fastgen.kernels import batch_invariant
from fastgen.kernels.batch_invariant import ROW_BLOCK_SIZE, batch_invariant_ops, compose_ops, sample_row_blocks
from fastgen.quantization import kv_cache
from fastgen.quantization.fp8 import QuantizedWeight, is_quantized
from fastgen.quantization.ops import quantized_ops

ATTENTION_BACKENDS = ("reference", "sdpa", "triton")


def select_attention_backend(name: str, device: torch.device | str) -> AttentionBackend:
    """Returns the attention backend of this name; `auto` is triton on a GPU and sdpa elsewhere.

    On a CPU the Triton kernels run in Triton's interpreter only (TRITON_INTERPRET=1), for tests.
    """
    if name == "auto":
        name = "triton" if torch.device(device).type == "cuda" else "sdpa"
    if name == "triton":
        from fastgen.kernels.attention import paged_attention

        return paged_attention
    return BACKENDS[name]


def select_ops(config: CompileConfig, device: torch.device, torch_ops: ModelOps) -> ModelOps:
    """Returns the ops of an engine's forward.

    `torch_ops` are the plain or the compiled ones, which stay where no kernel replaces them. On a GPU, steps of up to
    `SMALL_BATCH` tokens have kernels of their own, which stream the weights; larger ones use the library's GEMMs.
    """
    if config.batch_invariant:
        return batch_invariant_ops(device)
    ops = torch_ops._replace(attention=select_attention_backend(config.attention, device))
    if config.mode == "eager" or device.type != "cuda":
        return ops
    from fastgen.kernels import lora, pdl, rope_cache

    def for_small_batch(small: Callable[..., Any], large: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, *args: (small if len(x) <= pdl.SMALL_BATCH else large)(x, *args)

    small = small_batch_ops()
    names = "add_norm_qkv", "add_norm_gate_up", "linear", "add_norm", "swiglu", "final_norm", "lm_head"
    fields: dict[str, Any] = {name: for_small_batch(getattr(small, name), getattr(ops, name)) for name in names}
    return ops._replace(rope_and_cache_kv=rope_cache.rope_and_cache_kv, apply_lora=lora.apply_lora, **fields)


def select_cache_ops(ops: ModelOps, cache_dtype: str, page_size: int, model_config: ModelConfig) -> ModelOps:
    """Returns `ops` that write and read the KV cache of a rank, whose `kv_cache.dtype` is auto or fp8.

    The Triton kernels for attention tell an fp8 cache by its dtype.
    """
    if cache_dtype == "auto":
        return ops
    backend: Any = ops.attention
    if backend in (*BACKENDS.values(), batch_invariant.attention):
        ops = ops._replace(attention=partial(backend, read=partial(kv_cache.read_pages, model_config, page_size)))
    write = ops.rope_and_cache_kv
    write = kv_cache.rope_and_cache_kv if write is layers.rope_and_cache_kv else write
    sizes = {"num_kv_heads": model_config.num_kv_heads, "page_size": page_size}
    return ops._replace(rope_and_cache_kv=partial(write, **sizes))


def small_batch_ops() -> ModelOps:
    """Returns ops of which matmuls, norms and activations are the kernels for up to `SMALL_BATCH` rows."""
    from fastgen.kernels.small_batch import add_norm, linear, swiglu

    return compose_ops(TORCH_OPS._replace(linear=linear, add_norm=add_norm, swiglu=swiglu))


def select_quantized_ops(ops: ModelOps, params: Params, *, batch_invariant: bool) -> ModelOps:
    """Returns `ops` for these parameters: as they are, or taking the weights that are quantized as well.

    On a GPU the kernels compute bf16 and fp16 models. Up to `SMALL_BATCH` rows have a kernel whose bits differ from the
    library's: with `batch_invariant` the library multiplies any number of rows.
    """
    device, dtype = params.embed.device, params.embed.dtype
    if not is_quantized(params):
        return ops
    if device.type != "cuda" or dtype == torch.float32:
        return quantized_ops(ops, params)
    check_fp8_gpu(torch.cuda.get_device_capability(device), "fp8 weights", "quantization=none")
    check_fp8_sizes(params)
    from fastgen.kernels import fp8_matmul

    max_widened = 0 if batch_invariant else fp8_matmul.SMALL_BATCH
    linear = fp8_matmul.QuantizedLinear(device, dtype, max_widened)
    add_norm = partial(fp8_matmul.add_norm_quantize, max_widened=max_widened)
    swiglu = partial(fp8_matmul.swiglu_quantize, max_widened=max_widened)
    return quantized_ops(ops, params, linear, add_norm, swiglu)


def check_fp8_gpu(capability: tuple[int, int], what: str, alternative: str) -> None:
    """Raises ValueError if a GPU of this compute capability has no instructions for e4m3."""
    if capability < (8, 9):
        has = "and this one has {}.{}".format(*capability)
        raise ValueError(f"{what} need a GPU of compute capability 8.9 or later, {has}: set {alternative}")


def check_fp8_sizes(params: Params) -> None:
    """Raises ValueError if fp8 weights, a rank's shards, have sizes that a GPU's library does not multiply."""
    for layer in params.layers:
        for name, w in layer._asdict().items():
            if isinstance(w, QuantizedWeight) and any(size % 16 for size in w.shape):
                problem = f"fp8 matmuls on a GPU need sizes that are multiples of 16, and {name} is {tuple(w.shape)}"
                raise ValueError(f"{problem}: set quantization=none, or another number of tensor-parallel ranks")


def select_quantize_into(device: torch.device) -> Callable[[QuantizedWeight, torch.Tensor], None]:
    """Returns the function that quantizes a tensor into a weight of its shape, in place; on a GPU in one pass."""
    if device.type != "cuda":
        return QuantizedWeight.copy_
    from fastgen.kernels.fp8_matmul import quantize_into

    return quantize_into


def select_scoring_ops(device: torch.device, *, batch_invariant: bool) -> ModelOps:
    """Returns the ops of a forward outside an engine, which compiles nothing."""
    if batch_invariant or device.type != "cuda":
        return batch_invariant_ops(device) if batch_invariant else TORCH_OPS
    from fastgen.kernels.attention import paged_attention
    from fastgen.kernels.rope_cache import rope_and_cache_kv

    return TORCH_OPS._replace(attention=paged_attention, rope_and_cache_kv=rope_and_cache_kv)


def select_fused_rope(config: CompileConfig, ops: ModelOps) -> tuple[int, ModelOps]:
    """Returns the ops with which the decode kernel applies RoPE and writes the cache itself, and the largest number of
    tokens of a decode step that uses them; 0: none does."""
    if config.attention != "triton" or config.mode == "eager" or config.batch_invariant:
        return 0, ops
    from fastgen.kernels.attention import defer_rope_and_cache_kv
    from fastgen.kernels.pdl import SMALL_BATCH

    return SMALL_BATCH, ops._replace(rope_and_cache_kv=defer_rope_and_cache_kv)


def select_fused_sampler(config: CompileConfig, device: torch.device) -> FusedSampler | None:
    """Returns the kernel that samples without filters or edits; None where tokens are sampled by `select_sample_fn`."""
    if config.mode == "eager" or device.type != "cuda":
        return None
    from fastgen.kernels.sample import sample_tokens

    return partial(sample_tokens, batch_invariant=True) if config.batch_invariant else sample_tokens


def select_sample_fn(config: CompileConfig, device: torch.device, ops: ModelOps) -> Callable[..., Any]:
    """Returns `sampling.sample`, or its batch-invariant form: equally many rows in every call, logprobs by `ops`."""
    if not config.batch_invariant:
        return sample
    return partial(sample_row_blocks, ops.logprobs, ROW_BLOCK_SIZE if device.type == "cuda" else 1)
