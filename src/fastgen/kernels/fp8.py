"""Functions on e4m3 values for Triton kernels: widening pairs of them, and rounding to them."""

# pyright: reportCallIssue=false
from typing import no_type_check

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)
E4M3_MAX, MIN_SCALE = tl.constexpr(448.0), tl.constexpr(2.0**-126)
WIDENED = tl.constexpr(2.0**8)  # a widened value times this is the e4m3 value


@triton.jit
@no_type_check
def widen_low(pair):
    """Returns the e4m3 value in the low byte of each uint16 as fp16, divided by `WIDENED`: exact, and always finite.

    Both formats have a sign, an exponent and a mantissa in that order: the bits need shifting, and the difference of
    the exponents' biases is the factor. Pairs stay in their registers, which conversions of single bytes would leave.
    """
    if INTERPRETED:
        bits = ((pair << 8) & 0x8000) | ((pair << 7) & 0x3F80)
        return bits.to(tl.uint16).to(tl.float16, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 sign, value;
            shl.b32 sign, $1, 8;
            and.b32 sign, sign, 0x80008000;
            shl.b32 value, $1, 7;
            lop3.b32 $0, value, 0x3f803f80, sign, 0xea;
            }""",
            "=r,r", [pair], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
@no_type_check
def widen_high(pair):
    """Returns the e4m3 value in the high byte of each uint16, as `widen_low` does."""
    if INTERPRETED:
        bits = (pair & 0x8000) | ((pair >> 1) & 0x3F80)
        return bits.to(tl.uint16).to(tl.float16, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 sign, value;
            and.b32 sign, $1, 0x80008000;
            shr.b32 value, $1, 1;
            lop3.b32 $0, value, 0x3f803f80, sign, 0xea;
            }""",
            "=r,r", [pair], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
@no_type_check
def widen_e4m3(x):
    """Returns uint8 e4m3 values as fp16, divided by `WIDENED`."""
    bits = x.to(tl.uint16)
    return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
@no_type_check
def max_abs(x, axis: tl.constexpr):
    """Returns the largest magnitude of fp32 values along an axis; NaN if one is NaN, unlike a maximum of floats."""
    return tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def quantization_scale(amax):
    """Returns the scale of values whose largest magnitude is `amax`: amax / 448, or 1 for zeros."""
    scale = amax * (1 / E4M3_MAX)
    return tl.where(scale < MIN_SCALE, 1.0, scale)


@triton.jit
@no_type_check
def to_e4m3(x, scale):
    """Returns the bits, uint8, of x times 1 / scale, rounded to the nearest e4m3 value; ties to even."""
    scaled = x * tl.div_rn(scale * 0 + 1.0, scale)
    if INTERPRETED:  # its conversion rounds otherwise
        bits = tl.abs(scaled).to(tl.uint32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (127 - 7) * 8
        # Below the smallest normal value all steps are 2**-9, as those of fp32 are above 2**14.
        subnormal = (tl.abs(scaled) + 2.0**14).to(tl.uint32, bitcast=True) & 0xFF
        code = tl.minimum(tl.where(tl.abs(scaled) < 2.0**-6, subnormal, normal), 0x7E)
        return (code | ((scaled.to(tl.uint32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)
    else:
        return scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
