"""A block's matrices and what lies between them for few rows (T <= 16), where reading the weights is all that should
take time.

A program of `linear` owns N columns of the result and streams its rows of the weights once, K wide at a time, through
a few stages of shared memory; the activations come from L2. The order of every sum depends on shapes alone, so a
row's result is the same in any company.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from fastgen.kernels import pdl
from fastgen.kernels.pdl import SMALL_BATCH, grid_dependency_sync


@triton.jit(do_not_specialize=["num_rows"])  # each value of it would be compiled anew
@no_type_check  # pointers, numbers and constants, in Triton's own language
def _linear_kernel(
    x, w, bias, out, num_rows, out_features, in_features,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out [rows, width] of x [rows, depth] and w [width, depth]."""
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    t, n = tl.arange(0, T), tl.program_id(0) * N + tl.arange(0, N)
    row = tl.minimum(n, out_features - 1).to(tl.int64)  # beyond the last: the last again, so that loads need no mask
    w_at = w + row * in_features
    live = (t < num_rows)[:, None]
    here = t[:, None] * in_features
    acc = tl.zeros([N, T], tl.float32)
    grid_dependency_sync(PDL)
    for first in tl.range(0, in_features, K):
        k = first + tl.arange(0, K)
        if EVEN:
            b = tl.load(w_at[:, None] + k[None, :])
            a = tl.load(x + here + k[None, :], mask=live, other=0)
        else:
            b = tl.load(w_at[:, None] + k[None, :], mask=(k < in_features)[None, :], other=0)
            a = tl.load(x + here + k[None, :], mask=live & (k < in_features)[None, :], other=0)
        acc = tl.dot(b, tl.trans(a), acc, input_precision=precision)
    if BIAS:
        acc += tl.load(bias + row)[:, None].to(tl.float32)
    to = out + t[None, :] * out_features + n[:, None]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(t < num_rows)[None, :] & (n < out_features)[:, None])


# Up to so many rows of weights: N, K, warps, stages. What decides is how many programs a processor gets, and how many
# of the next product's it takes while they end; depth hardly matters.
LINEAR_TILES = (
    (4224, (16, 256, 2, 5)),
    (6144, (16, 128, 1, 6)),
    (9216, (16, 128, 1, 5)),
    (20480, (64, 128, 2, 4)),
    (30720, (16, 128, 1, 6)),
    (2**63, (32, 256, 2, 4)),
)


def select_linear_tile(n: int, k: int, num_rows: int, dtype: torch.dtype) -> dict[str, int]:
    """How weights [n, k] are cut: the fastest of those tried on an H200 (`benchmarks/tiles_gpu.py`)."""
    if dtype == torch.float32:  # no tensor cores: every step is unrolled
        width, depth, warps, stages = 16, 64, 4, 3
    elif num_rows <= 8:
        width, depth, warps, stages = next(config for most, config in LINEAR_TILES if n <= most)
    elif n >= 16384:
        width, depth, warps, stages = 64, 128, 2, 4
    elif k > 8000:
        width, depth, warps, stages = 16, 512, 2, 4
    else:
        width, depth, warps, stages = 64, 256, 4, 4
    return {"N": width, "K": depth, "num_warps": warps, "num_stages": stages}


def linear(
    x: Float[Tensor, "T D"], w: Float[Tensor, "N D"], bias: Float[Tensor, " N"] | None = None,
    out: Float[Tensor, "T N"] | None = None,
) -> Float[Tensor, "T N"]:  # fmt: skip
    """x @ w.T + bias for T <= 16, summed in fp32 and rounded once. All of one dtype; w contiguous."""
    (rows, depth), width = x.shape, len(w)
    if not 0 < rows <= SMALL_BATCH or not w.is_contiguous():
        raise ValueError(f"for 1 to {SMALL_BATCH} rows and contiguous weights, got {rows} and strides {w.stride()}")
    out, config = x.new_empty(rows, width) if out is None else out, select_linear_tile(width, depth, rows, x.dtype)
    _linear_kernel[(triton.cdiv(width, config["N"]),)](
        x.contiguous(), w, x if bias is None else bias, out, rows, width, depth, T=8 if rows <= 8 else SMALL_BATCH,
        BIAS=bias is not None, EVEN=depth % config["K"] == 0, EXACT=x.dtype == torch.float32,
        **pdl.pdl_launch_options(x), **config,
    )  # fmt: skip
    return out


@triton.jit
@no_type_check
def _add_norm_kernel(
    x, y, norm, residual_out, out, eps, D: tl.constexpr, B: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr
):
    d = tl.arange(0, B)
    at = tl.program_id(0).to(tl.int64) * D + d
    weight = tl.load(norm + d, mask=d < D, other=0)
    grid_dependency_sync(PDL)
    h = tl.load(x + at, mask=d < D, other=0)
    if ADD:
        h += tl.load(y + at, mask=d < D, other=0)
        tl.store(residual_out + at, h, mask=d < D)
    h32 = h.to(tl.float32)
    unit = (h32 * tl.rsqrt(tl.sum(h32 * h32, 0) / D + eps)).to(h.dtype)
    tl.store(out + at, unit * weight, mask=d < D)


def add_norm(
    x: Float[Tensor, "T D"], y: Float[Tensor, "T D"], norm: Float[Tensor, " D"], eps: float
) -> tuple[Float[Tensor, "T D"], Float[Tensor, "T D"]]:
    """x + y, and its RMS norm."""
    rows, width = x.shape
    total, out = torch.empty_like(x), torch.empty_like(x)
    size = triton.next_power_of_2(width)
    _add_norm_kernel[(rows,)](
        x, y, norm, total, out, eps, D=width, B=size, ADD=True, num_warps=8, **pdl.pdl_launch_options(x)
    )
    return total, out


def rms_norm(x: Float[Tensor, "T D"], weight: Float[Tensor, " D"], eps: float) -> Float[Tensor, "T D"]:
    """RMS norm of each row, D being a few hundred."""
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    size = triton.next_power_of_2(x.shape[1])
    _add_norm_kernel[(len(x),)](x, x, weight, x, out, eps, D=x.shape[1], B=size, ADD=False, num_warps=1, PDL=False)
    return out


@triton.jit
@no_type_check
def _swiglu_kernel(x, out, width, B: tl.constexpr, PDL: tl.constexpr):
    t, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * B + tl.arange(0, B)
    grid_dependency_sync(PDL)
    at = x + t * 2 * width + f
    gate, up = tl.load(at, mask=f < width, other=0), tl.load(at + width, mask=f < width, other=0)
    gate32 = gate.to(tl.float32)
    gated = (gate32 / (1.0 + tl.exp(-gate32))).to(gate.dtype) * up
    tl.store(out + t * width + f, gated, mask=f < width)


def swiglu(x: Float[Tensor, "T F2"]) -> Float[Tensor, "T F"]:
    """silu(gate) * up of the halves of x."""
    rows, width = len(x), x.shape[1] // 2
    out = x.new_empty(rows, width)
    _swiglu_kernel[(rows, triton.cdiv(width, 1024))](x, out, width, B=1024, num_warps=4, **pdl.pdl_launch_options(x))
    return out


def add_norm_qkv(
    x: Float[Tensor, "T D"], y: Float[Tensor, "T D"], norm: Float[Tensor, " D"], eps: float,
    w: Float[Tensor, "N D"], bias: Float[Tensor, " N"] | None,
) -> tuple[Float[Tensor, "T D"], Float[Tensor, "T N"]]:  # fmt: skip
    """As `transformer.project`."""
    x, h = add_norm(x, y, norm, eps)
    return x, linear(h, w, bias)


def add_norm_gate_up(
    x: Float[Tensor, "T D"], y: Float[Tensor, "T D"], norm: Float[Tensor, " D"], eps: float,
    gate_up: Float[Tensor, "F2 D"],
) -> tuple[Float[Tensor, "T D"], Float[Tensor, "T F"]]:  # fmt: skip
    """As `transformer.project_swiglu`."""
    x, h = add_norm(x, y, norm, eps)
    return x, swiglu(linear(h, gate_up))
