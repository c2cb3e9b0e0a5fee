"""Linear layers for a few rows (T <= 16) in Triton: reading the weights is all that takes time, so nothing else may.

One kernel. A program owns N columns of the result and streams its rows of the weights once, K wide at a time, through
a few stages of shared memory; the activations come from L2. What precedes the product (residual sum, RMS norm) and
follows it (bias, SwiGLU) happens in the same program. No program needs another's result, and the order of every sum
depends on the weights' shape alone: a row is bitwise the same in any batch.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

ROWS = 16  # the most rows; they are padded to 8 or to this
# Programmatic dependent launch (Hopper): a kernel starts while the one before it ends, and meanwhile brings the first
# weights into L2. Only where nothing rewrites the weights in the same stream.
PDL = False
PREFETCH = tl.constexpr(4)  # tiles of weights brought into L2 ahead


@triton.jit
@no_type_check  # pointers, numbers and constants, in Triton's own language
def _ahead(at, depth, N: tl.constexpr, K: tl.constexpr):
    """Ask L2 for the first tiles of the rows at `at` [N]: a request for each line of 128 bytes."""
    step: tl.constexpr = 128 * 8 // at.dtype.element_ty.primitive_bitwidth
    k = tl.arange(0, PREFETCH * K // step) * step
    line = at[:, None] + tl.minimum(k, depth - 1)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [line.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["rows"])  # each value of it would be compiled anew
@no_type_check
def _skinny(
    x, y, norm, w, bias, total, out, rows, width, depth, eps,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
    SWIGLU: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [rows, width] of x, y [rows, depth] and w [width, depth], twice as high with SWIGLU."""
    dtype = x.dtype.element_ty
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    # The product of a value and its norm weight is taken before the row's scale is known: in fp16 it could overflow.
    shrink: tl.constexpr = 0.0625 if x.dtype.element_ty == tl.float16 else 1.0
    t, n = tl.arange(0, T), tl.program_id(0) * N + tl.arange(0, N)
    row = tl.minimum(n, width - 1).to(tl.int64)  # beyond the last: the last again, so that loads need no mask
    w_at = w + row * depth
    up_at = w_at + width.to(tl.int64) * depth  # only read with SWIGLU
    if PDL:
        _ahead(w_at, depth, N, K)
        if SWIGLU:
            _ahead(up_at, depth, N, K)
        tl.extra.cuda.gdc_wait()  # all that the kernels before have written is there from here on
        tl.extra.cuda.gdc_launch_dependents()
    live = (t < rows)[:, None]
    here = t[:, None] * depth
    acc = tl.zeros([N, T], tl.float32)
    above = tl.zeros([N, T], tl.float32)
    square = tl.zeros([T, K // 8], tl.float32)  # sums of 8 neighbours, which are one thread's
    for first in tl.range(0, depth, K):
        k = first + tl.arange(0, K)
        if EVEN:
            seen = live
            b = tl.load(w_at[:, None] + k[None, :], eviction_policy="evict_first")
        else:
            seen = live & (k < depth)[None, :]
            b = tl.load(w_at[:, None] + k[None, :], mask=(k < depth)[None, :], other=0, eviction_policy="evict_first")
        a = tl.load(x + here + k[None, :], mask=seen, other=0)
        if NORM:
            if ADD:
                a += tl.load(y + here + k[None, :], mask=seen, other=0)
            if EVEN:
                g = tl.load(norm + k)
            else:
                g = tl.load(norm + k, mask=k < depth, other=0)
            a32 = a.to(tl.float32)
            square += tl.sum(tl.reshape(a32 * a32, [T, K // 8, 8]), 2)
            # In the dtype itself: one rounding each, as of the sum and product in fp32, and packed two to a register.
            a = a * (g * shrink).to(dtype)[None, :]
        acc = tl.dot(b, tl.trans(a), acc, input_precision=precision)
        if SWIGLU:
            if EVEN:
                b = tl.load(up_at[:, None] + k[None, :], eviction_policy="evict_first")
            else:
                b = tl.load(
                    up_at[:, None] + k[None, :], mask=(k < depth)[None, :], other=0, eviction_policy="evict_first"
                )
            above = tl.dot(b, tl.trans(a), above, input_precision=precision)
    if NORM:
        scale = (tl.rsqrt(tl.sum(square, 1) / depth + eps) / shrink)[None, :]
        acc, above = acc * scale, above * scale
    if BIAS:
        acc += tl.load(bias + row)[:, None].to(tl.float32)
    if SWIGLU:
        acc = acc / (1.0 + tl.exp(-acc)) * above
    tl.store(out + t[None, :] * width + n[:, None], acc.to(dtype), mask=(t < rows)[None, :] & (n < width)[:, None])
    if ADD:  # each program writes its part of the sum
        for first in tl.range(tl.program_id(0) * K, depth, tl.num_programs(0) * K, num_stages=1):
            k = first + tl.arange(0, K)
            seen = live & (k < depth)[None, :]
            a = tl.load(x + here + k[None, :], mask=seen, other=0)
            a += tl.load(y + here + k[None, :], mask=seen, other=0)
            tl.store(total + here + k[None, :], a, mask=seen)


def tile(n: int, k: int, dtype: torch.dtype, *, norm: bool = False, swiglu: bool = False) -> dict[str, int]:
    """How weights [n, k] are cut; of [2n, k] with swiglu. Never by the number of rows: results must not depend on it.

    A program for every processor, and enough bytes on the way: 4 MB at a time hide the memory's latency. Every warp
    has 16 columns of its own and repeats the norm's arithmetic for them, so that more a warp cost less of it.
    """
    if dtype == torch.float32:  # no tensor cores: every step is unrolled
        return {"N": 16, "K": 64, "num_warps": 4, "num_stages": 3}
    if swiglu:
        return {"N": 32 if n >= 32 * 132 else 16, "K": 128, "num_warps": 2 if n >= 32 * 132 else 1, "num_stages": 4}
    if n >= 32 * 132:
        return {"N": 32, "K": 256, "num_warps": 2, "num_stages": 4}
    return {"N": 16, "K": 512 if k % 512 == 0 and not norm else 256, "num_warps": 1, "num_stages": 4}


def _launch(
    x: Tensor, y: Tensor | None, norm: Tensor | None, w: Tensor, bias: Tensor | None, eps: float, *,
    swiglu: bool = False, config: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x + y, result); `config` overrides `tile`'s."""
    rows, depth = x.shape
    width = len(w) // 2 if swiglu else len(w)
    if not 0 < rows <= ROWS:
        raise ValueError(f"{rows} rows: these kernels are for 1 to {ROWS}")
    if not w.is_contiguous():
        raise ValueError("the weights must be contiguous")
    x = x.contiguous()
    total, out = x if y is None else torch.empty_like(x), x.new_empty(rows, width)
    if config is None:
        config = tile(width, depth, x.dtype, norm=norm is not None, swiglu=swiglu)
    # Warpgroups and warps may sum in different ways: a shape's rows are all multiplied by the same kind.
    group = config["N"] >= 64 and config["num_warps"] >= 4
    _skinny[(triton.cdiv(width, config["N"]),)](
        x, x if y is None else y.contiguous(), x if norm is None else norm, w, x if bias is None else bias, total, out,
        rows, width, depth, eps, T=8 if rows <= 8 and not group else ROWS, ADD=y is not None, NORM=norm is not None,
        BIAS=bias is not None, SWIGLU=swiglu, EVEN=depth % config["K"] == 0, EXACT=x.dtype == torch.float32,
        PDL=PDL, launch_pdl=PDL, **config,
    )  # fmt: skip
    return total, out


def linear(
    x: Float[Tensor, "T D"], w: Float[Tensor, "N D"], bias: Float[Tensor, " N"] | None = None
) -> Float[Tensor, "T N"]:
    """x @ w.T + bias for T <= 16, summed in fp32 and rounded once. All of one dtype."""
    return _launch(x, None, None, w, bias, 0.0)[1]


def project(
    x: Float[Tensor, "T D"], y: Float[Tensor, "T D"] | None, norm: Float[Tensor, " D"], eps: float,
    w: Float[Tensor, "N D"], bias: Float[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, "T D"], Float[Tensor, "T N"]]:  # fmt: skip
    """(h, linear(rms_norm(h, norm, eps), w, bias)) of h = x + y, rounded; without y it is x itself."""
    return _launch(x, y, norm, w, bias, eps)


def project_swiglu(
    x: Float[Tensor, "T D"], y: Float[Tensor, "T D"] | None, norm: Float[Tensor, " D"], eps: float,
    gate_up: Float[Tensor, "F2 D"],
) -> tuple[Float[Tensor, "T D"], Float[Tensor, "T F"]]:  # fmt: skip
    """(h, silu(gate) * up) of h = x + y, rounded; gate and up are the halves of rms_norm(h, norm, eps) @ gate_up.T."""
    return _launch(x, y, norm, gate_up, None, eps, swiglu=True)
