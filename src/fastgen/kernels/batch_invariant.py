"""Batch-invariant ops: a token's result is the same, bit for bit, in any batch or chunk.

Libraries choose the order of a sum by the number of rows, and split the sums of few rows. Here each sum has one order.
Half-precision GEMMs are the library's without split-K (`prefer_cublaslt`), which leaves all its tiles the same order;
fp32 GEMMs are a kernel's, a few rows at a time, which is slow. Attention has one tile shape and no splits; norms,
activations and logprobs are kernels with a program per row.

On a CPU, GEMMs have `ROW_BLOCK_SIZE` rows, padded, and attention and functions with a transcendental one row:
vectorized code and the scalar code for the remainder of a vector differ in the last bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastgen.core import layers, sampling
from fastgen.core.attention import AttentionFn, ReadPages
from fastgen.core.model_config import ModelConfig
from fastgen.core.sampling import LogprobsFn, edit_logits, sample_rows
from fastgen.core.transformer import TORCH_OPS, ModelOps, lm_head_weight
from fastgen.core.types import Batch, Params, SamplerOutput, SamplingTensors

ROW_BLOCK_SIZE = 16  # rows of a GEMM on a CPU, and of a call of the general sampler on a GPU
VERIFIED_BATCH_SIZES = (1, 2, 8, 15, 16, 17, 24, 40, 64, 72, 128, 200, 256, 384, 512, 768, 1023)


@contextmanager
def prefer_cublaslt(*, split_k: bool = True) -> Iterator[None]:
    """Lets cuBLASLt compute the matmuls (see docs/performance-log.md), and without `split_k`, none with split-K."""
    if not torch.cuda.is_available():
        yield
        return
    cuda: Any = torch.backends.cuda
    library, matmul = cuda.preferred_blas_library(), cuda.matmul
    names = [] if split_k else [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]
    before = [(getattr(matmul, name), getattr(matmul, f"{name}_split_k")) for name in names]
    cuda.preferred_blas_library("cublaslt")
    for name in names:
        setattr(matmul, name, (False, False))
    try:
        yield
    finally:
        cuda.preferred_blas_library(library)
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)


def batch_invariant_ops(device: torch.device | str) -> ModelOps:
    """Returns the batch-invariant ops for a kind of device.

    On a GPU they must be called without split-K; `verify_batch_invariance` checks whether that suffices.
    """
    return _cuda_ops() if torch.device(device).type == "cuda" else CPU_OPS


def compose_ops(ops: ModelOps) -> ModelOps:
    """Replaces the fused ops, final_norm and lm_head by compositions of the linear, add_norm and swiglu of `ops`."""

    def add_norm_qkv(
        x: Tensor, y: Tensor, norm: Tensor, eps: float, w: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, h = ops.add_norm(x, y, norm, eps)
        return x, ops.linear(h, w, bias)

    def add_norm_gate_up(x: Tensor, y: Tensor, norm: Tensor, eps: float, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        x, h = ops.add_norm(x, y, norm, eps)
        return x, ops.swiglu(ops.linear(h, gate_up))

    def final_norm(x: Tensor, y: Tensor, norm: Tensor, eps: float) -> Tensor:
        return ops.add_norm(x, y, norm, eps)[1]

    def lm_head(h: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
        return ops.linear(h, w, None, None if out is None else out[: len(h)])

    return ops._replace(
        add_norm_qkv=add_norm_qkv, add_norm_gate_up=add_norm_gate_up, final_norm=final_norm, lm_head=lm_head
    )


def _cuda_ops() -> ModelOps:
    from fastgen.kernels import rope_cache, sample, small_batch
    from fastgen.kernels.attention import paged_attention
    from fastgen.kernels.pdl import SMALL_BATCH

    def linear(x: Tensor, w: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Returns x @ w.T + bias, rounded before the bias is added: a library would do so for some sizes only."""
        if x.dtype == torch.float32 and w.is_contiguous():  # libraries choose the order by the size
            y = x.new_empty(len(x), len(w)) if out is None else out
            for rows, out_rows in zip(x.split(SMALL_BATCH), y.split(SMALL_BATCH), strict=True):
                small_batch.linear(rows, w, None, out_rows)
        elif 0 < len(x) <= SMALL_BATCH and w.is_contiguous():
            y = small_batch.linear(x, w, None, out)
        else:
            y = torch.mm(x, w.T, out=out)
        return y if bias is None else y + bias

    def apply_qk_norm(qkv: Tensor, q_norm: Tensor, k_norm: Tensor, model_config: ModelConfig) -> Tensor:
        num_kv_heads, eps = model_config.num_kv_heads, model_config.rms_norm_eps
        q, k, v = qkv.split((model_config.num_q_heads, num_kv_heads, num_kv_heads), 1)
        pairs = ((q, q_norm), (k, k_norm))
        normed = (small_batch.rms_norm(rearrange(x, "t h d -> (t h) d"), w, eps).view(x.shape) for x, w in pairs)
        return torch.cat((*normed, v), 1)

    ops = TORCH_OPS._replace(linear=linear, add_norm=small_batch.add_norm, swiglu=small_batch.swiglu)
    return compose_ops(ops)._replace(
        attention=partial(paged_attention, batch_invariant=True), apply_qk_norm=apply_qk_norm,
        rope_and_cache_kv=rope_cache.rope_and_cache_kv, logprobs=sample.logprobs,
    )  # fmt: skip


@torch.no_grad()
def verify_batch_invariance(params: Params, ops: ModelOps) -> None:
    """Raises RuntimeError if matmuls by these weights have other bits in other batch sizes on this device."""
    device, dtype = params.embed.device, params.embed.dtype
    names = "qkv", "out", "gate_up", "down"
    # A checkpoint may have some layers in fp8 and others not.
    weights = {(n, type(w)): w for layer in reversed(params.layers) for n in names for w in (getattr(layer, n),)}
    for (name, _), w in (weights | {("lm_head", Tensor): lm_head_weight(params)}).items():
        x = torch.rand(1024, w.shape[1], device=device, dtype=torch.float32).sub_(0.5).to(dtype)
        with prefer_cublaslt(split_k=False):
            expected = ops.linear(x, w)
            unequal = [n for n in VERIFIED_BATCH_SIZES if not torch.equal(ops.linear(x[-n:], w), expected[-n:])]
        if unequal:
            where = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
            number = dtype if isinstance(w, Tensor) else "fp8"
            problem = f"the matmul by {name} {tuple(w.shape)} in {number} has other bits for {unequal[0]} rows"
            raise RuntimeError(f"compile.batch_invariant=true cannot hold on {where}: {problem} than for {len(x)}")


# --- on a CPU -------------------------------------------------------------------------------------------------------


def _linear(
    x: Float[Tensor, "T D"], w: Float[Tensor, "N D"], bias: Float[Tensor, " N"] | None = None,
    out: Float[Tensor, "T N"] | None = None,
) -> Float[Tensor, "T N"]:  # fmt: skip
    """Returns x @ w.T + bias, computed `ROW_BLOCK_SIZE` rows at a time."""
    blocks = F.pad(x, (0, 0, 0, -len(x) % ROW_BLOCK_SIZE)).split(ROW_BLOCK_SIZE)
    y = torch.cat([F.linear(block, w, bias) for block in blocks])[: len(x)]
    return y if out is None else out.copy_(y)


def _swiglu(x: Float[Tensor, "T F2"]) -> Float[Tensor, "T F"]:
    return torch.cat([layers.swiglu(row) for row in x.split(1)])


def _embed(weight: Tensor, token: Tensor, position: Tensor, model_config: ModelConfig) -> tuple[Tensor, ...]:
    x = F.embedding(token, weight)
    cos, sin = zip(*(layers.rope_cos_sin(p, model_config) for p in position.split(1)), strict=True)
    return x, torch.zeros_like(x), torch.cat(cos), torch.cat(sin)


def _logprobs(
    logits: Float[Tensor, "N V"], token: Int[Tensor, " N"], num_top_logprobs: int
) -> tuple[Tensor, Tensor, Tensor]:
    rows = zip(logits.split(1), token.split(1), strict=True)
    logprob, top_token, top = zip(*(sampling.gather_logprobs(*row, num_top_logprobs) for row in rows), strict=True)
    return torch.cat(logprob), torch.cat(top_token), torch.cat(top)


def attention(batch: Batch, model_config: ModelConfig, read: ReadPages = Tensor.to) -> AttentionFn:
    """Returns paged attention on a CPU, one token at a time: the shapes depend on its position and window alone."""
    page, tokens = batch.page_size, torch.arange(len(batch.token_ids))
    req_idx = batch.req_idx[torch.searchsorted(batch.query_start_loc[1:], tokens, right=True)]
    lengths = [position + 1 for position in batch.positions.tolist()]
    tables = zip(batch.page_table[req_idx].long(), lengths, strict=True)
    pages = [table[: -(-n // page)] for table, n in tables]

    def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None) -> Tensor:
        out = []
        for query, token_pages, n in zip(q.split(1), pages, lengths, strict=True):
            first = 0 if window is None else max(0, n - window)
            slots = (token_pages[first // page :, None] * page + torch.arange(page)).flatten()
            visible = slice(first % page, first % page + n - first)
            kv = (read(cache[slots], torch.float32)[visible] for cache in (k_cache, v_cache))
            k, v = (rearrange(x, "n k h -> k n h") for x in kv)
            x = rearrange(query, "1 (k g) h -> k g h", k=model_config.num_kv_heads).float().clone()  # aligned
            weight = (x @ k.mT * model_config.head_dim**-0.5).softmax(-1)
            out.append(rearrange(weight @ v, "k g h -> 1 (k g) h"))
        return torch.cat(out).to(q.dtype)

    return attend


CPU_OPS = compose_ops(
    TORCH_OPS._replace(attention=attention, embed=_embed, linear=_linear, swiglu=_swiglu, logprobs=_logprobs)
)


def sample_row_blocks(
    logprobs_fn: LogprobsFn, rows_per_call: int, logits: Float[Tensor, "N V"], s: SamplingTensors,
    num_top_logprobs: int | None = None,
) -> SamplerOutput:  # fmt: skip
    """Samples as `sampling.sample` does, in calls of exactly `rows_per_call` rows, padded if need be."""
    z, outputs, s = edit_logits(logits, s), [], s._replace(logit_edits=None, token_mask=None)
    for i in range(0, len(z), rows_per_call):
        rows = torch.arange(i, i + rows_per_call, device=z.device).clamp_max(len(z) - 1)
        row_settings = tree_map_only(Tensor, lambda x, rows=rows: x[rows], s)
        outputs.append(sample_rows(z[rows], logits[rows], row_settings, num_top_logprobs, logprobs_fn))
    return SamplerOutput(*(torch.cat(x)[: len(z)] for x in zip(*outputs, strict=True)))
