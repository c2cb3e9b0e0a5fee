"""Matmuls, norms and activations for up to `SMALL_BATCH` rows, where only reading the weights should take time.

A program of `linear` computes N columns of the result. It streams the weights' rows once, K columns at a time, through
a few stages of shared memory; activations come from L2. The order of every sum depends on shapes alone, so a row's
result does not depend on the other rows.
"""

# pyright: reportCallIssue=false
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from fastgen.kernels import pdl
from fastgen.kernels.pdl import SMALL_BATCH, grid_dependency_sync


@triton.jit(do_not_specialize=["num_rows"])  # Triton would compile a kernel for each value
@no_type_check  # pointers, numbers and constants, in Triton's own language
def _linear_kernel(
    x, w, bias, out, num_rows, out_features, in_features,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Computes N columns of out [num_rows, out_features] = x [num_rows, in_features] @ w [out_features, in_features].T.

    T: rows, padded. EVEN: K divides in_features.
    """
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    t, n = tl.arange(0, T), tl.program_id(0) * N + tl.arange(0, N)
    w_row = tl.minimum(n, out_features - 1).to(tl.int64)  # the last row repeats, so that loads need no mask
    w_ptr = w + w_row * in_features
    is_row = (t < num_rows)[:, None]
    x_offset = t[:, None] * in_features
    acc = tl.zeros([N, T], tl.float32)
    grid_dependency_sync(PDL)
    for k_start in tl.range(0, in_features, K):
        k = k_start + tl.arange(0, K)
        if EVEN:
            b = tl.load(w_ptr[:, None] + k[None, :])
            a = tl.load(x + x_offset + k[None, :], mask=is_row, other=0)
        else:
            b = tl.load(w_ptr[:, None] + k[None, :], mask=(k < in_features)[None, :], other=0)
            a = tl.load(x + x_offset + k[None, :], mask=is_row & (k < in_features)[None, :], other=0)
        acc = tl.dot(b, tl.trans(a), acc, input_precision=precision)
    if BIAS:
        acc += tl.load(bias + w_row)[:, None].to(tl.float32)
    target = out + t[None, :] * out_features + n[:, None]
    tl.store(target, acc.to(out.dtype.element_ty), mask=(t < num_rows)[None, :] & (n < out_features)[:, None])


# Largest out_features: N, K, warps, stages. What matters is the number of programs per multiprocessor, and how many of
# the next matmul's it can start while they end; in_features hardly matters.
LINEAR_TILES = (
    (4224, (16, 256, 2, 5)),
    (6144, (16, 128, 1, 6)),
    (9216, (16, 128, 1, 5)),
    (20480, (64, 128, 2, 4)),
    (30720, (16, 128, 1, 6)),
    (2**63, (32, 256, 2, 4)),
)


def select_linear_tile(n: int, k: int, num_rows: int, dtype: torch.dtype) -> dict[str, int]:
    """Returns the tile for weights [n, k]: the fastest of those measured on an H200 (`benchmarks/tiles_gpu.py`)."""
    if dtype == torch.float32:  # without tensor cores, every step is unrolled
        tile = 16, 64, 4, 3
    elif num_rows <= 8:
        tile = next(tile for max_n, tile in LINEAR_TILES if n <= max_n)
    elif n >= 16384:
        tile = 64, 128, 2, 4
    else:
        tile = (16, 512, 2, 4) if k > 8000 else (64, 256, 4, 4)
    return dict(zip(("N", "K", "num_warps", "num_stages"), tile, strict=True))


def linear(
    x: Float[Tensor, "T D"], w: Float[Tensor, "N D"], bias: Float[Tensor, " N"] | None = None,
    out: Float[Tensor, "T N"] | None = None,
) -> Float[Tensor, "T N"]:  # fmt: skip
    """Returns x @ w.T + bias for 1 to `SMALL_BATCH` rows, summed in fp32 and rounded once, in `out` if that is set.

    All tensors have one dtype. Raises ValueError for other numbers of rows, and for weights that are not contiguous.
    """
    (rows, in_features), out_features = x.shape, len(w)
    if not 0 < rows <= SMALL_BATCH or not w.is_contiguous():
        raise ValueError(f"takes 1 to {SMALL_BATCH} rows and contiguous weights, not {rows} and strides {w.stride()}")
    out = x.new_empty(rows, out_features) if out is None else out
    tile = select_linear_tile(out_features, in_features, rows, x.dtype)
    _linear_kernel[(triton.cdiv(out_features, tile["N"]),)](
        x.contiguous(), w, x if bias is None else bias, out, rows, out_features, in_features,
        T=8 if rows <= 8 else SMALL_BATCH, BIAS=bias is not None, EVEN=in_features % tile["K"] == 0,
        EXACT=x.dtype == torch.float32, **pdl.launch_options(x), **tile,
    )  # fmt: skip
    return out


@triton.jit
@no_type_check
def _add_norm_kernel(
    x, y, norm, residual_out, out, eps, D: tl.constexpr, B: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr
):
    """Normalizes one row of D numbers of x, or of x + y if ADD. B: D, rounded up to a power of two."""
    d = tl.arange(0, B)
    i = tl.program_id(0).to(tl.int64) * D + d
    weight = tl.load(norm + d, mask=d < D, other=0)
    grid_dependency_sync(PDL)
    h = tl.load(x + i, mask=d < D, other=0)
    if ADD:
        h += tl.load(y + i, mask=d < D, other=0)
        tl.store(residual_out + i, h, mask=d < D)
    h32 = h.to(tl.float32)
    unit = (h32 * tl.rsqrt(tl.sum(h32 * h32, 0) / D + eps)).to(h.dtype)
    tl.store(out + i, unit * weight, mask=d < D)


def add_norm(
    x: Float[Tensor, "T D"], y: Float[Tensor, "T D"], norm: Float[Tensor, " D"], eps: float
) -> tuple[Float[Tensor, "T D"], Float[Tensor, "T D"]]:
    """Returns x + y and its RMS norm."""
    (rows, width), residual, out = x.shape, torch.empty_like(x), torch.empty_like(x)
    shape = {"D": width, "B": triton.next_power_of_2(width)}
    _add_norm_kernel[(rows,)](x, y, norm, residual, out, eps, **shape, ADD=True, num_warps=8, **pdl.launch_options(x))
    return residual, out


def rms_norm(x: Float[Tensor, "T D"], weight: Float[Tensor, " D"], eps: float) -> Float[Tensor, "T D"]:
    """Returns the RMS norm of each row; for heads, where D is a few hundred."""
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    shape = {"D": x.shape[1], "B": triton.next_power_of_2(x.shape[1])}
    _add_norm_kernel[(len(x),)](x, x, weight, x, out, eps, **shape, ADD=False, num_warps=1, PDL=False)
    return out


@triton.jit
@no_type_check
def _swiglu_kernel(x, out, width, B: tl.constexpr, PDL: tl.constexpr):
    t, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * B + tl.arange(0, B)
    grid_dependency_sync(PDL)
    gate_ptr = x + t * 2 * width + f
    gate, up = tl.load(gate_ptr, mask=f < width, other=0), tl.load(gate_ptr + width, mask=f < width, other=0)
    gate32 = gate.to(tl.float32)
    gated = (gate32 / (1.0 + tl.exp(-gate32))).to(gate.dtype) * up
    tl.store(out + t * width + f, gated, mask=f < width)


def swiglu(x: Float[Tensor, "T F2"]) -> Float[Tensor, "T F"]:
    """Returns silu(gate) * up, where gate and up are the halves of x."""
    rows, width = len(x), x.shape[1] // 2
    out = x.new_empty(rows, width)
    _swiglu_kernel[(rows, triton.cdiv(width, 1024))](x, out, width, B=1024, num_warps=4, **pdl.launch_options(x))
    return out
