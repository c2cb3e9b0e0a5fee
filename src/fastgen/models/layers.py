"""The arithmetic of a block: arrays in, arrays out. Legend in `fastgen.types`."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastgen.models.spec import Rope, Spec


def rms_norm(x: Float[Tensor, "... D"], weight: Float[Tensor, " D"], eps: float) -> Float[Tensor, "... D"]:
    """Root-mean-square norm (arXiv 1910.07467), reduced in fp32; rounded to x's dtype before the weight."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def swiglu(x: Float[Tensor, "... F2"]) -> Float[Tensor, "... F"]:
    """silu(gate) * up (arXiv 2002.05202); gate is the first half of the last axis."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def adapt(
    y: Float[Tensor, "T N"],
    x: Float[Tensor, "T D"],
    a: Float[Tensor, "A pr D"],
    b: Float[Tensor, "A N r"],
    scale: Float[Tensor, " A"],
    adapter: Int[Tensor, " T"],
    rows: tuple[int, ...],
) -> Float[Tensor, "T N"]:
    """y + scale * b (a x), with the matrices of each row's adapter; 0 has none.

    `rows`: how many of the N belong to each matrix that was packed into one; each has r of the rows of `a`.
    """
    for i in adapter.unique().tolist():
        if i:
            mine = (adapter == i).nonzero().squeeze(1)
            inner = F.linear(x[mine], a[i]).chunk(len(rows), -1)
            parts = zip(inner, b[i].split(rows), strict=True)
            y = y.index_add(0, mine, (scale[i] * torch.cat([F.linear(h, w) for h, w in parts], -1)).to(y.dtype))
    return y


def frequencies(rope: Rope, head: int, device: torch.device) -> Float[Tensor, " half"]:
    """Angle per position of each pair of dimensions, fp32, radians.

    Default: theta^(-2i/H) (arXiv 2104.09864). Linear divides by `factor`. Llama3 divides only the long wavelengths
    and blends between (Llama 3.1's rule). YaRN (arXiv 2309.00071, section 3.2) ramps by whole rotations.
    """
    freq = 1.0 / rope.theta ** (torch.arange(0, head, 2, device=device).float() / head)
    if rope.kind == "linear":
        return freq / rope.factor
    if rope.kind == "llama3":
        turns = rope.original * freq / (2 * math.pi)  # rotations over the original context
        keep = ((turns - rope.low) / (rope.high - rope.low)).clamp(0, 1)
        return freq * (keep + (1 - keep) / rope.factor)
    if rope.kind == "yarn":

        def dimension(rotations: float) -> float:
            return head * math.log(rope.original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

        low, high = dimension(rope.high), dimension(rope.low)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head - 1)
        ramp = (torch.arange(head // 2, device=device).float() - low) / ((high - low) or 1e-3)
        keep = 1 - ramp.clamp(0, 1)
        return freq * (keep + (1 - keep) / rope.factor)
    return freq


def rotations(position: Int[Tensor, " T"], spec: Spec) -> tuple[Float[Tensor, "T 1 half"], Float[Tensor, "T 1 half"]]:
    """Cosines and sines of every position, fp32, shared by all layers."""
    angle = position[:, None, None].float() * frequencies(spec.rope, spec.head, position.device)
    return angle.cos() * spec.rope.scale, angle.sin() * spec.rope.scale


def rotate(
    x: Float[Tensor, "T heads H"], cos: Float[Tensor, "T 1 half"], sin: Float[Tensor, "T 1 half"]
) -> Float[Tensor, "T heads H"]:
    """Rotate dimension i with dimension i + H/2 (the checkpoint layout of the Hugging Face families)."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def store(
    qkv: Float[Tensor, "T Q2K H"],
    cos: Float[Tensor, "T 1 half"],
    sin: Float[Tensor, "T 1 half"],
    slot: Int[Tensor, " T"],
    k_cache: Float[Tensor, "S K H"],
    v_cache: Float[Tensor, "S K H"],
) -> Float[Tensor, "T Q H"]:
    """Writes k_cache and v_cache at `slot`: rotated keys, and values. The rotated queries."""
    kv_heads = k_cache.shape[1]
    q, k, v = qkv.split((qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads), 1)
    # Full-index writes into the flat leaf: a write through a view would copy the whole cache on torch 2.11.
    k_cache.index_put_((slot,), rotate(k, cos, sin))
    v_cache.index_put_((slot,), v)
    return rotate(q, cos, sin)
