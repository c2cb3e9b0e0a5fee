"""The fp8 kernels against the plain ops that specify them."""

import torch
import triton
import triton.language as tl

from fastgen.kernels.fp8 import quantization_scale, to_e4m3, widen_high, widen_low
from fastgen.quantization.fp8 import E4M3, quantize_rows


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
