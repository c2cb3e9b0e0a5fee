"""Matmuls by fp8 weights, and the ops that quantize their activations where they are made.

Up to `SMALL_BATCH` rows, where only reading the weights should take time, activations are e4m3 values widened to fp16,
those of even columns before those of odd ones. `_linear_kernel` reads weights as pairs of columns, and widens them in
registers: matrix instructions for fp8 want 64 rows, and conversions of single values would take longer than the memory.
More rows have the library's GEMM for fp8.

The order of every sum depends on the shapes alone, which include the number of rows, never on values or timing.
"""

# pyright: reportCallIssue=false
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from fastgen.kernels import pdl
from fastgen.kernels.fp8 import WIDENED, max_abs, quantization_scale, to_e4m3, widen_high, widen_low
from fastgen.kernels.pdl import SMALL_BATCH, grid_dependency_sync
from fastgen.quantization.fp8 import E4M3, QuantizedRows, QuantizedWeight

MAX_OUT_TILES = 2**16  # tiles of output columns of a split matmul


@triton.jit(do_not_specialize=["num_rows"])  # Triton would compile a kernel for each value
@no_type_check  # pointers, numbers and constants, in Triton's own language
def _linear_kernel(
    x, x_scale, w, w_scale, bias, out, partial, num_splits_done, num_rows, out_features, num_pairs,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Computes N columns of out [num_rows, out_features], or one split of their sums, by K pairs of columns at a time.

    x: fp16 [num_rows, 2, num_pairs]; w: uint16 [out_features, num_pairs]. T: rows, padded. EVEN: K divides num_pairs.
    The last split to finish adds up `partial` [SPLITS, T, out_features] in order; `num_splits_done` is 0 before and
    after.
    """
    t, n = tl.arange(0, T), tl.program_id(0) * N + tl.arange(0, N)
    split = tl.program_id(1)
    w_row = tl.minimum(n, out_features - 1).to(tl.int64)  # the last row repeats, so that loads need no mask
    w_ptr = w + w_row * num_pairs
    is_row = (t < num_rows)[:, None]
    x_ptr = x + t[:, None] * (2 * num_pairs)
    acc = tl.zeros([N, T], tl.float32)
    grid_dependency_sync(PDL)
    split_size = tl.cdiv(tl.cdiv(num_pairs, K), SPLITS) * K
    for k_start in tl.range(split * split_size, tl.minimum((split + 1) * split_size, num_pairs), K):
        k = k_start + tl.arange(0, K)
        if EVEN:
            pairs = tl.load(w_ptr[:, None] + k[None, :])
            even = tl.load(x_ptr + k[None, :], mask=is_row, other=0)
            odd = tl.load(x_ptr + num_pairs + k[None, :], mask=is_row, other=0)
        else:
            inside = (k < num_pairs)[None, :]
            pairs = tl.load(w_ptr[:, None] + k[None, :], mask=inside, other=0)
            even = tl.load(x_ptr + k[None, :], mask=is_row & inside, other=0)
            odd = tl.load(x_ptr + num_pairs + k[None, :], mask=is_row & inside, other=0)
        acc = tl.dot(widen_low(pairs), tl.trans(even), acc)
        acc = tl.dot(widen_high(pairs), tl.trans(odd), acc)
    mask = (t < num_rows)[None, :] & (n < out_features)[:, None]
    column = t[None, :] * out_features + n[:, None]
    is_last = True
    if SPLITS > 1:
        tl.store(partial + split * T * out_features + column, acc, mask=mask)
        tl.debug_barrier()  # all threads have stored before the split counts as done
        counter = num_splits_done + tl.program_id(0)
        is_last = tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1
        if is_last:
            tl.store(counter, 0)
            acc = tl.zeros([N, T], tl.float32)
            for i in tl.static_range(SPLITS):  # loads bypass the L1 cache: other multiprocessors have written these
                acc += tl.load(partial + i * T * out_features + column, mask=mask, other=0, cache_modifier=".cg")
    if is_last:
        row_scale = tl.load(x_scale + t, mask=t < num_rows, other=0) * (WIDENED * WIDENED)
        y = acc * row_scale[None, :] * tl.load(w_scale + w_row)[:, None]
        if BIAS:
            y += tl.load(bias + w_row)[:, None].to(tl.float32)
        tl.store(out + column, y.to(out.dtype.element_ty), mask=mask)


def select_tile(out_features: int, num_rows: int) -> dict[str, int]:
    """Returns the tile and splits for weights of this height: the fastest of those measured on an H200.

    Splits fill the multiprocessors where there are few rows of weights.
    """
    if num_rows <= 8:
        tile = (32, 256, 2, 3, 1) if out_features >= 16384 else (32, 128, 2, 4, 2)
    elif out_features >= 16384:
        tile = 128, 128, 4, 3, 1
    else:
        tile = 64, 128, 4, 4, 4 if out_features <= 4096 else 2
    return dict(zip(("N", "K", "num_warps", "num_stages", "SPLITS"), tile, strict=True))


class QuantizedLinear:
    """Multiplies by fp8 weights: x @ w.T + bias, summed in fp32 and rounded to `dtype`. For calls on one stream.

    Up to `max_widened` rows are quantized as widened values, for the kernel; 0: the library multiplies any number.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, max_widened: int = SMALL_BATCH) -> None:
        self.dtype, self.max_widened = dtype, max_widened
        self._num_splits_done = torch.zeros(MAX_OUT_TILES, dtype=torch.int32, device=device)

    def __call__(
        self, x: Tensor | QuantizedRows, w: QuantizedWeight, bias: Float[Tensor, " N"] | None = None,
        out: Float[Tensor, "T N"] | None = None,
    ) -> Float[Tensor, "T N"]:  # fmt: skip
        """Returns the product, in `out` if that is set; quantizes x unless it is quantized."""
        rows = quantize(x, self.max_widened) if isinstance(x, Tensor) else x
        if rows.data.dtype == torch.float16:
            return self.few_rows(rows, w, bias, out)
        return self.many_rows(rows, w, bias, out)

    def few_rows(self, x: QuantizedRows, w: QuantizedWeight, bias: Tensor | None, out: Tensor | None) -> Tensor:
        """Returns the product for up to `SMALL_BATCH` rows of widened values. Raises ValueError for others."""
        (rows, in_features), out_features = x.data.shape, len(w.data)
        if not 0 < rows <= SMALL_BATCH or not w.data.is_contiguous():
            problem = f"{rows} rows and strides {w.data.stride()}"
            raise ValueError(f"takes 1 to {SMALL_BATCH} rows and contiguous weights, not {problem}")
        out = torch.empty(rows, out_features, dtype=self.dtype, device=x.data.device) if out is None else out
        tile, padded_rows = select_tile(out_features, rows), 8 if rows <= 8 else SMALL_BATCH
        partial = x.scale
        if tile["SPLITS"] > 1:
            partial = x.scale.new_empty(tile["SPLITS"] * padded_rows * out_features)
        _linear_kernel[(triton.cdiv(out_features, tile["N"]), tile["SPLITS"])](
            x.data, x.scale, w.data.view(torch.uint16), w.scale, w.scale if bias is None else bias, out, partial,
            self._num_splits_done, rows, out_features, in_features // 2, T=padded_rows, BIAS=bias is not None,
            EVEN=in_features // 2 % tile["K"] == 0, **pdl.launch_options(x.data), **tile,
        )  # fmt: skip
        return out

    def many_rows(self, x: QuantizedRows, w: QuantizedWeight, bias: Tensor | None, out: Tensor | None) -> Tensor:
        """Returns the product by the library's GEMM, which with scales for rows and columns rounds to bf16 first."""
        scales = x.scale[:, None], w.scale[None, :]
        bias = None if bias is None else bias.bfloat16()
        y = torch.ops.aten._scaled_mm(x.data, w.data.T, *scales, bias, out_dtype=torch.bfloat16, use_fast_accum=True)
        return y.to(self.dtype) if out is None else out.copy_(y)


# --- activations ------------------------------------------------------------------------------------------------------


@triton.jit
@no_type_check
def _store_quantized(h, out, scale, row, d, D: tl.constexpr, WIDEN: tl.constexpr):
    """Stores a row of D numbers, fp32, as e4m3 values and their scale; WIDEN: widened, even columns first."""
    row_scale = quantization_scale(max_abs(h, 0))
    tl.store(scale + row, row_scale)
    bits = to_e4m3(h, row_scale)
    if WIDEN:
        tl.store(out + row * D + d % 2 * (D // 2) + d // 2, widen_low(bits.to(tl.uint16)), mask=d < D)
    else:
        tl.store(out + row * D + d, bits, mask=d < D)


@triton.jit
@no_type_check
def _quantize_kernel(x, out, scale, D: tl.constexpr, B: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr):
    """Quantizes one row. B: D, rounded up to a power of two."""
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, B)
    grid_dependency_sync(PDL)
    h = tl.load(x + row * D + d, mask=d < D, other=0).to(tl.float32)
    _store_quantized(h, out, scale, row, d, D, WIDEN)


@triton.jit
@no_type_check
def _add_norm_quantize_kernel(
    x, y, norm, residual_out, out, scale, eps, D: tl.constexpr, B: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr
):
    """Adds one row of y to x, and quantizes its norm."""
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, B)
    weight = tl.load(norm + d, mask=d < D, other=0)
    grid_dependency_sync(PDL)
    h = tl.load(x + row * D + d, mask=d < D, other=0) + tl.load(y + row * D + d, mask=d < D, other=0)
    tl.store(residual_out + row * D + d, h, mask=d < D)
    h32 = h.to(tl.float32)
    unit = (h32 * tl.rsqrt(tl.sum(h32 * h32, 0) / D + eps)).to(h.dtype)
    _store_quantized((unit * weight).to(tl.float32), out, scale, row, d, D, WIDEN)


@triton.jit
@no_type_check
def _swiglu_quantize_kernel(x, out, scale, D: tl.constexpr, B: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr):
    """Quantizes silu(gate) * up of one row of x [T, 2, D]."""
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, B)
    grid_dependency_sync(PDL)
    gate_ptr = x + row * 2 * D + d
    gate, up = tl.load(gate_ptr, mask=d < D, other=0), tl.load(gate_ptr + D, mask=d < D, other=0)
    gate32 = gate.to(tl.float32)
    gated = (gate32 / (1.0 + tl.exp(-gate32))).to(gate.dtype) * up
    _store_quantized(gated.to(tl.float32), out, scale, row, d, D, WIDEN)


def _new_rows(x: Tensor, width: int, max_widened: int) -> tuple[QuantizedRows, dict[str, int | bool]]:
    """Allocates quantized rows for the rows of x; returns them with the launch options of their kernel."""
    rows, widen = len(x), len(x) <= max_widened
    data = torch.empty(rows, width, dtype=torch.float16 if widen else E4M3, device=x.device)
    padded = triton.next_power_of_2(width)
    options = {
        "D": width,
        "B": padded,
        "WIDEN": widen,
        "num_warps": min(32, max(4, padded // (512 if widen else 1024))),
    }
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    return QuantizedRows(data, scale), options | pdl.launch_options(x)


def _bits(rows: QuantizedRows) -> Tensor:
    """Returns the tensor that a kernel writes: widened values, or the bits of e4m3 values."""
    return rows.data if rows.data.dtype == torch.float16 else rows.data.view(torch.uint8)


def quantize(x: Float[Tensor, "T D"], max_widened: int = SMALL_BATCH) -> QuantizedRows:
    """Returns rows as e4m3 values, widened if there are up to `max_widened`."""
    rows, options = _new_rows(x, x.shape[1], max_widened)
    _quantize_kernel[(len(x),)](x.contiguous(), _bits(rows), rows.scale, **options)
    return rows


def quantize_into(weight: QuantizedWeight, x: Float[Tensor, "N D"]) -> None:
    """Overwrites a weight by a tensor on its device, quantized row by row in one pass."""
    padded = triton.next_power_of_2(x.shape[1])
    options = {"D": x.shape[1], "B": padded, "WIDEN": False, "num_warps": min(32, max(4, padded // 512))}
    options |= pdl.launch_options(x)
    _quantize_kernel[(len(x),)](x.contiguous(), weight.data.view(torch.uint8), weight.scale, **options)


def add_norm_quantize(
    x: Float[Tensor, "T D"], y: Float[Tensor, "T D"], norm: Float[Tensor, " D"], eps: float,
    max_widened: int = SMALL_BATCH,
) -> tuple[Float[Tensor, "T D"], QuantizedRows]:  # fmt: skip
    """Returns x + y and its RMS norm, quantized."""
    residual, (rows, options) = torch.empty_like(x), _new_rows(x, x.shape[1], max_widened)
    _add_norm_quantize_kernel[(len(x),)](x, y, norm, residual, _bits(rows), rows.scale, eps, **options)
    return residual, rows


def swiglu_quantize(x: Float[Tensor, "T F2"], max_widened: int = SMALL_BATCH) -> QuantizedRows:
    """Returns silu(gate) * up, quantized, where gate and up are the halves of x."""
    rows, options = _new_rows(x, x.shape[1] // 2, max_widened)
    _swiglu_quantize_kernel[(len(x),)](x, _bits(rows), rows.scale, **options)
    return rows
