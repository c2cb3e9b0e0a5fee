"""The arithmetic of a block: arrays in, arrays out. Legend in `fastgen.core.types`."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastgen.core.model_config import ModelConfig, RopeConfig


def rms_norm(x: Float[Tensor, "... D"], weight: Float[Tensor, " D"], eps: float) -> Float[Tensor, "... D"]:
    """Root-mean-square norm (arXiv 1910.07467), reduced in fp32; rounded to x's dtype before the weight."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def swiglu(x: Float[Tensor, "... F2"]) -> Float[Tensor, "... F"]:
    """silu(gate) * up (arXiv 2002.05202); gate is the first half of the last axis."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def apply_lora(
    y: Float[Tensor, "T N"],
    x: Float[Tensor, "T D"],
    a: Float[Tensor, "A pr D"],
    b: Float[Tensor, "A N r"],
    scale: Float[Tensor, " A"],
    adapter_idx: Int[Tensor, " T"],
    output_sizes: tuple[int, ...],
) -> Float[Tensor, "T N"]:
    """y + scale * b (a x), with the matrices of each row's adapter; 0 has none.

    `rows`: how many of the N belong to each matrix that was packed into one; each has r of the rows of `a`.
    """
    for i in adapter_idx.unique().tolist():
        if i:
            mine = (adapter_idx == i).nonzero().squeeze(1)
            inner = F.linear(x[mine], a[i]).chunk(len(output_sizes), -1)
            parts = zip(inner, b[i].split(output_sizes), strict=True)
            y = y.index_add(0, mine, (scale[i] * torch.cat([F.linear(h, w) for h, w in parts], -1)).to(y.dtype))
    return y


def rope_inv_freq(rope: RopeConfig, head_dim: int, device: torch.device) -> Float[Tensor, " half"]:
    """Angle per position of each pair of dimensions, fp32, radians.

    Default: theta^(-2i/H) (arXiv 2104.09864). Linear divides by `factor`. Llama3 divides only the long wavelengths
    and blends between (Llama 3.1's rule). YaRN (arXiv 2309.00071, section 3.2) ramps by whole rotations.
    """
    freq = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    if rope.rope_type == "linear":
        return freq / rope.factor
    if rope.rope_type == "llama3":
        turns = rope.original_max_position_embeddings * freq / (2 * math.pi)  # rotations over the original context
        keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
        return freq * (keep + (1 - keep) / rope.factor)
    if rope.rope_type == "yarn":

        def dimension(rotations: float) -> float:
            return (
                head_dim
                * math.log(rope.original_max_position_embeddings / (rotations * 2 * math.pi))
                / (2 * math.log(rope.theta))
            )

        low, high = dimension(rope.high_freq_factor), dimension(rope.low_freq_factor)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = (torch.arange(head_dim // 2, device=device).float() - low) / ((high - low) or 1e-3)
        keep = 1 - ramp.clamp(0, 1)
        return freq * (keep + (1 - keep) / rope.factor)
    return freq


def rope_cos_sin(
    position: Int[Tensor, " T"], model_config: ModelConfig
) -> tuple[Float[Tensor, "T 1 half"], Float[Tensor, "T 1 half"]]:
    """Cosines and sines of every position, fp32, shared by all layers."""
    angle = position[:, None, None].float() * rope_inv_freq(model_config.rope, model_config.head_dim, position.device)
    return angle.cos() * model_config.rope.attention_factor, angle.sin() * model_config.rope.attention_factor


def apply_rope(
    x: Float[Tensor, "T heads H"], cos: Float[Tensor, "T 1 half"], sin: Float[Tensor, "T 1 half"]
) -> Float[Tensor, "T heads H"]:
    """Rotate dimension i with dimension i + H/2 (the checkpoint layout of the Hugging Face families)."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def rope_and_cache_kv(
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
    k_cache.index_put_((slot,), apply_rope(k, cos, sin))
    v_cache.index_put_((slot,), v)
    return apply_rope(q, cos, sin)
