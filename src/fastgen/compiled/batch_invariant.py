"""The forward in which a row's result depends on that row alone, bit for bit: on no batch, chunk or bucket around it.

Libraries choose how they add up by the number of rows: matrix products and reductions of few rows are cut in other
ways than those of many. Here each sum has one order. Products are the library's where it does not share a sum out
(`exact`), which leaves every size of tile the same order, and in fp32 a kernel's, a few rows at a time, which is slow;
attention has one tile and one share of the keys; norms, activations and logprobs are kernels with a program for each
row.

On a CPU, products have ROWS rows, padded, and a function with a transcendental has one: vector units compute another
last bit than what is left over at an end.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fastgen.core import layers, sampling, transformer
from fastgen.core.attention import AttentionFn, causal_mask
from fastgen.core.layers import rms_norm
from fastgen.core.model_config import ModelConfig
from fastgen.core.transformer import ModelOps, lm_head_weight
from fastgen.core.types import Batch, Params

ROW_BLOCK_SIZE = 16  # of a product on a CPU, and of a general draw on a GPU
VERIFIED_BATCH_SIZES = (1, 2, 8, 15, 16, 17, 24, 40, 64, 72, 128, 200, 256, 384, 512, 768, 1023)  # that are verified
TILE_TOKENS, TILE_KEYS = 8, 64  # of a tile of attention on a CPU


@contextmanager
def no_split_k() -> Iterator[None]:
    """Products of half precision by cuBLASLt, without sums that are shared out and added up afterwards."""
    if not torch.cuda.is_available():
        yield
        return
    cuda: Any = torch.backends.cuda
    library, m = cuda.preferred_blas_library(), cuda.matmul
    names = [f"allow_{kind}_reduced_precision_reduction" for kind in ("bf16", "fp16")]
    before = [(getattr(m, name), getattr(m, f"{name}_split_k")) for name in names]
    cuda.preferred_blas_library("cublaslt")
    for name in names:
        setattr(m, name, (False, False))
    try:
        yield
    finally:
        cuda.preferred_blas_library(library)
        for name, value in zip(names, before, strict=True):
            setattr(m, name, value)


def batch_invariant_ops(device: torch.device | str) -> ModelOps:
    """The functions of such a forward on a kind of device.

    On a GPU they are to be called within `exact()`, and `verify` says whether they do what they say.
    """
    if torch.device(device).type != "cuda":
        return CPU_OPS
    from fastgen.kernels import (  # Triton comes with the GPU builds of torch, and not with others
        pdl,
        rope_cache,
        small_batch,
    )
    from fastgen.kernels.attention import paged_attention

    def product(x: Tensor, w: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """x @ w.T + bias, the sum rounded before the bias: whether it is, must not depend on the size."""
        if x.dtype == torch.float32 and w.is_contiguous():  # libraries always choose by the size
            y = x.new_empty(len(x), len(w)) if out is None else out
            for a, b in zip(x.split(pdl.SMALL_BATCH), y.split(pdl.SMALL_BATCH), strict=True):
                small_batch.linear(a, w, None, b)
        elif 0 < len(x) <= pdl.SMALL_BATCH and w.is_contiguous():
            y = small_batch.linear(x, w, None, out)
        else:
            y = torch.mm(x, w.T, out=out)
        return y if bias is None else y + bias

    def project(
        x: Tensor, y: Tensor, norm: Tensor, eps: float, w: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, h = small_batch.add_norm(x, y, norm, eps)
        return x, product(h, w, bias)

    def project_swiglu(x: Tensor, y: Tensor, norm: Tensor, eps: float, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        x, h = small_batch.add_norm(x, y, norm, eps)
        return x, small_batch.swiglu(product(h, gate_up))

    def norm_heads(qkv: Tensor, q_norm: Tensor, k_norm: Tensor, spec: ModelConfig) -> Tensor:
        q, k, v = qkv.split((spec.num_q_heads, spec.num_kv_heads, spec.num_kv_heads), 1)
        both = (
            small_batch.rms_norm(x.flatten(0, 1), w, spec.rms_norm_eps).view(x.shape)
            for x, w in ((q, q_norm), (k, k_norm))
        )
        return torch.cat((*both, v), 1)

    return transformer.TORCH_OPS._replace(
        attention=partial(paged_attention, batch_invariant=True),
        add_norm_qkv=project,
        add_norm_gate_up=project_swiglu,
        apply_qk_norm=norm_heads,
        rope_and_cache_kv=rope_cache.rope_and_cache_kv,
        linear=product,
        final_norm=lambda *args: small_batch.add_norm(*args)[1],
        lm_head=lambda h, w, out=None: product(h, w, None, None if out is None else out[: len(h)]),
        logprobs=rope_cache.logprobs,
    )


@torch.no_grad()
def verify_batch_invariance(params: Params) -> None:
    """RuntimeError if products of these weights have other bits in another number of rows, on this device."""
    layer, f = params.layers[0], batch_invariant_ops(params.embed.device)
    kinds = {
        "qkv": layer.qkv,
        "out": layer.out,
        "gate_up": layer.gate_up,
        "down": layer.down,
        "lm_head": lm_head_weight(params),
    }
    for name, w in kinds.items():
        x = torch.rand(1024, w.shape[1], device=w.device, dtype=torch.float32).sub_(0.5).to(w.dtype)
        with no_split_k():
            whole = f.linear(x, w)
            for n in VERIFIED_BATCH_SIZES:
                if not torch.equal(f.linear(x[-n:], w), whole[-n:]):
                    raise RuntimeError(
                        f"compile.batch_invariant=true cannot be kept here: products of {name} {tuple(w.shape)} in "
                        f"{w.dtype} have other bits for {n} rows than for {len(x)}, on {device_name(w.device)}"
                    )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"


def sample(
    logits: Tensor,
    s: Any,
    num_top_logprobs: int | None = None,
    compute_logprobs: Callable[..., Any] = sampling.gather_logprobs,
) -> Any:
    """As `sampling.sample`: a row alone on a CPU, and so many at once on a GPU."""
    return sampling.sample(
        logits, s, num_top_logprobs, compute_logprobs, rows_per_call=ROW_BLOCK_SIZE if logits.is_cuda else 1
    )


# --- on a CPU -------------------------------------------------------------------------------------------------------


def _map_rows(f: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
    return torch.cat([f(row, *rest) for row in x.split(1)])


def linear(x: Float[Tensor, "T D"], w: Float[Tensor, "N D"], bias: Float[Tensor, " N"] | None = None) -> Tensor:
    """x @ w.T + bias, ROWS rows at a time."""
    parts = F.pad(x, (0, 0, 0, -len(x) % ROW_BLOCK_SIZE)).split(ROW_BLOCK_SIZE)
    return torch.cat([F.linear(part, w, bias) for part in parts])[: len(x)]


def _embed(weight: Tensor, token: Tensor, position: Tensor, model_config: ModelConfig) -> tuple[Tensor, ...]:
    x = F.embedding(token, weight)
    turns = [layers.rope_cos_sin(p, model_config) for p in position.split(1)]
    cos, sin = (torch.cat(part) for part in zip(*turns, strict=True))
    return x, torch.zeros_like(x), cos, sin


def _add_norm_qkv(
    x: Tensor, y: Tensor, norm: Tensor, eps: float, w: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    x = x + y
    return x, linear(rms_norm(x, norm, eps), w, bias)


def _add_norm_gate_up(x: Tensor, y: Tensor, norm: Tensor, eps: float, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    x = x + y
    return x, _map_rows(layers.swiglu, linear(rms_norm(x, norm, eps), gate_up))


def _lm_head(h: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    found = linear(h, w)
    return found if out is None else out[: len(h)].copy_(found)


def _logprobs(logits: Tensor, token: Tensor, num_top_logprobs: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = zip(logits.split(1), token.split(1), strict=True)
    value, index, best = zip(*(sampling.gather_logprobs(row, t, num_top_logprobs) for row, t in rows), strict=True)
    return torch.cat(value), torch.cat(index), torch.cat(best)


def attention(batch: Batch, model_config: ModelConfig) -> AttentionFn:
    """Attention over pages in tiles that are the same for every token: KEYS keys, from the first one on."""
    page, row = (
        batch.page_size,
        torch.searchsorted(batch.query_start_loc[1:], torch.arange(len(batch.token_ids)), right=True),
    )
    seat, offset = batch.req_idx[row], torch.arange(TILE_KEYS)

    def tile(
        q: Float[Tensor, "t K G H"], at: int, seat: Tensor, position: Tensor, caches: tuple[Tensor, Tensor],
        window: int | None, m: Tensor, total: Tensor, acc: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Maxima, sums and outputs after the keys from `at` on."""
        key = at + offset
        pages = batch.page_table[seat[:, None], (key // page).clamp_max(batch.page_table.shape[1] - 1)].long()
        seen = causal_mask(position[:, None], key, window)
        slot = torch.where(seen, pages * page + key % page, 0)
        k, v = (c[slot].transpose(1, 2).float() for c in caches)  # [t, K, KEYS, H]
        v = v.masked_fill(~seen[:, None, :, None], 0)  # scratch may hold NaN, which a weight of 0 does not silence
        score = (q @ k.transpose(-1, -2)) * model_config.head_dim**-0.5
        score = score.masked_fill(~seen[:, None, None], float("-inf"))
        top = torch.maximum(m, score.amax(-1, keepdim=True).clamp_min(-1e30))  # a tile may hold no key that is seen
        shrink, p = (m - top).exp(), (score - top).exp()
        return top, total * shrink + p.sum(-1, keepdim=True), acc * shrink + p @ v

    def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None) -> Tensor:
        out = []
        for i in range(0, len(q), TILE_TOKENS):
            index = torch.arange(i, i + TILE_TOKENS).clamp_max(len(q) - 1)
            position = batch.positions[index]
            x = q[index].unflatten(1, (model_config.num_kv_heads, -1)).float()
            m, total, acc = torch.full_like(x[..., :1], -1e30), torch.zeros_like(x[..., :1]), torch.zeros_like(x)
            first = 0 if window is None else max(0, int(position.min()) - window + 1) // TILE_KEYS * TILE_KEYS
            for at in range(first, int(position.max()) + 1, TILE_KEYS):
                m, total, acc = tile(x, at, seat[index], position, (k_cache, v_cache), window, m, total, acc)
            out.append((acc / total).flatten(1, 2).to(q.dtype))
        return torch.cat(out)[: len(q)]

    return attend


CPU_OPS = transformer.TORCH_OPS._replace(
    attention=attention,
    embed=_embed,
    add_norm_qkv=_add_norm_qkv,
    add_norm_gate_up=_add_norm_gate_up,
    linear=linear,
    lm_head=_lm_head,
    logprobs=_logprobs,
)
