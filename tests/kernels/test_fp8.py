"""The fp8 kernels against the plain ops that specify them."""

import os
import subprocess
import sys

import compile_kernels
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastgen.core.layers import rms_norm, swiglu
from fastgen.kernels import fp8_matmul
from fastgen.kernels.fp8 import quantization_scale, to_e4m3, widen_high, widen_low
from fastgen.kernels.fp8_matmul import (
    QuantizedLinear,
    add_norm_quantize,
    quantize,
    quantize_into,
    select_tile,
    swiglu_quantize,
)
from fastgen.quantization.fp8 import E4M3, QuantizedRows, QuantizedWeight, quantize_rows, quantized_linear

HALF = torch.float16 if torch.get_default_device().type == "cpu" else torch.bfloat16  # Triton interprets no bf16


@triton.jit
def _quantize_kernel(x, out, scale, D: tl.constexpr):
    r, d = tl.program_id(0), tl.arange(0, D)
    v = tl.load(x + r * D + d).to(tl.float32)
    s = quantization_scale(tl.max(tl.abs(v), 0))
    tl.store(scale + r, s)
    tl.store(out + r * D + d, to_e4m3(v, s))


@triton.jit
def _widen_kernel(pair, low, high, D: tl.constexpr):
    d = tl.arange(0, D)
    tl.store(low + d, widen_low(tl.load(pair + d)))
    tl.store(high + d, widen_high(tl.load(pair + d)))


def test_quantization_has_the_bits_of_torch() -> None:
    x = torch.randn(64, 256) * torch.logspace(-6, 3, 64)[:, None]
    x[3] = 0
    data, scale = torch.empty(64, 256, dtype=torch.uint8), torch.empty(64)
    _quantize_kernel[(64,)](x, data, scale, D=256)
    expected_data, expected_scale = quantize_rows(x)
    assert torch.equal(scale, expected_scale) and torch.equal(data.view(E4M3).float(), expected_data.float())


def test_every_value_is_widened() -> None:
    low = torch.arange(256).to(torch.uint8)
    pair = torch.stack((low, low.flip(0)), 1).view(torch.uint16).flatten()
    out = torch.empty(2, 256, dtype=torch.float16)
    _widen_kernel[(1,)](pair, *out, D=256)
    value = low.view(E4M3).float()
    known = ~value.isnan()
    assert out.isfinite().all()
    assert torch.equal(out[0].float()[known] * 256, value[known])
    assert torch.equal(out[1].float().flip(0)[known] * 256, value[known])


def unwidened(rows: QuantizedRows) -> Tensor:
    """The e4m3 values that widened rows hold, in the order of the columns."""
    even, odd = (rows.data.float() * 256).chunk(2, -1)
    return torch.stack((even, odd), -1).flatten(1)


@pytest.mark.parametrize(
    ("rows", "n", "k", "bias"),
    [(1, 96, 64, True), (8, 150, 520, False), (9, 130, 256, True), (16, 72, 1040, False), (2, 65, 640, True)],
)
def test_few_rows(rows: int, n: int, k: int, bias: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of exact products in fp32: only their order differs."""
    if n == 65:  # the tile of tall weights
        monkeypatch.setattr(fp8_matmul, "select_tile", lambda _, rows: select_tile(2**15, rows))
    x, b = torch.randn(rows, k).to(HALF), torch.randn(n).to(HALF) if bias else None
    w = QuantizedWeight(*quantize_rows(torch.randn(n, k)))
    linear = QuantizedLinear(torch.device(device), HALF)
    y, out = linear(x, w, b), torch.empty(rows, n, dtype=HALF)
    torch.testing.assert_close(y, quantized_linear(F.linear, x, w, b), rtol=2**-7, atol=1e-3)
    # The counters of splits are 0 again.
    assert linear(x, w, b, out) is out and torch.equal(out, y)
    torch.testing.assert_close(linear(x[-1:], w, b), y[-1:], rtol=0, atol=0)


@pytest.mark.parametrize(("rows", "width", "dtype"), [(5, 64, HALF), (33, 250, torch.float32)])
def test_weights_in_place(rows: int, width: int, dtype: torch.dtype) -> None:
    """A weight is overwritten with the bits of `QuantizedWeight.copy_`."""
    x = torch.randn(rows, width).to(dtype)
    x[3] = 0
    expected, got = (QuantizedWeight(torch.zeros(rows, width).to(E4M3), torch.zeros(rows)) for _ in range(2))
    expected.copy_(x)
    quantize_into(got, x)
    assert torch.equal(got.data.view(torch.uint8), expected.data.view(torch.uint8))
    assert torch.equal(got.scale, expected.scale) and got.scale[3] == 1


@pytest.mark.parametrize("op", ["quantize", "add_norm", "swiglu"])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (16, 250), (17, 96), (40, 576)])
def test_activations(rows: int, width: int, op: str) -> None:
    """The bits are those of the plain op followed by `quantize_rows`, but for the last bit of a norm."""
    x, y, norm = torch.randn(rows, width).to(HALF), torch.randn(rows, width).to(HALF), torch.rand(width).to(HALF)
    if op == "quantize":
        got, expected = quantize(x), x
    elif op == "add_norm":
        (residual, got), expected = add_norm_quantize(x, y, norm, 1e-5), rms_norm(x + y, norm, 1e-5)
        assert torch.equal(residual, x + y)
    else:
        got, expected = swiglu_quantize(torch.cat((x, y), -1)), swiglu(torch.cat((x, y), -1))
    data, scale = quantize_rows(expected)
    assert got.data.dtype == (torch.float16 if rows <= 16 else E4M3)
    values = unwidened(got) if rows <= 16 else got.data.float()
    torch.testing.assert_close(got.scale, scale, rtol=2**-8, atol=0)
    # A value next to the middle between two e4m3 values may be rounded to the other one, 1/8 away.
    torch.testing.assert_close(values * got.scale[:, None], data.float() * scale[:, None], rtol=1 / 7, atol=1e-4)
    assert (values != data.float()).float().mean() < 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the library's fp8 GEMM needs a GPU")
@pytest.mark.parametrize(("rows", "n", "k"), [(17, 96, 64), (64, 304, 528), (300, 4096, 1024)])
def test_many_rows(rows: int, n: int, k: int, device: str) -> None:
    x, b = torch.randn(rows, k).to(HALF), torch.randn(n).to(HALF)
    w = QuantizedWeight(*quantize_rows(torch.randn(n, k)))
    linear = QuantizedLinear(torch.device(device), HALF)
    expected = quantized_linear(F.linear, x, w, b)
    # Tensor cores keep about 14 bits of a sum of fp8 products (arXiv 2412.19437, section 3.3.2).
    torch.testing.assert_close(linear(x, w, b), expected, rtol=2**-7, atol=2**-10 * float(expected.abs().max()))


def test_few_rows_raises(device: str) -> None:
    linear = QuantizedLinear(torch.device(device), HALF)
    x, w = torch.randn(17, 32).to(HALF), QuantizedWeight(*quantize_rows(torch.randn(8, 32)))
    with pytest.raises(ValueError, match="1 to 16 rows"):
        linear.few_rows(quantize(x, max_widened=17), w, None, None)


def test_kernels_compile() -> None:
    """What the interpreter runs is also accepted by the compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", compile_kernels.__file__]
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert {"_rope_and_cache_kv_kernel", "_decode_kernel", "_prefill_kernel"} <= set(result.stdout.split())
