"""The arithmetic of a decoder layer: tensors in, tensors out. `core.types` has the legend of the axes."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastgen.core.model_config import ModelConfig, RopeConfig


def rms_norm(x: Float[Tensor, "... D"], weight: Float[Tensor, " D"], eps: float) -> Float[Tensor, "... D"]:
    """Returns the root-mean-square norm (arXiv 1910.07467), reduced in fp32 and rounded to x's dtype before scaling."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def swiglu(x: Float[Tensor, "... F2"]) -> Float[Tensor, "... F"]:
    """Returns silu(gate) * up (arXiv 2002.05202); gate is the first half of the last axis, up the second."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def rope_inv_freq(rope: RopeConfig, head_dim: int, device: torch.device) -> Float[Tensor, " half"]:
    """Returns the rotation per position of each pair of dimensions, fp32, radians.

    Default: theta^(-2i/H) (arXiv 2104.09864). Linear divides by `factor`. Llama 3.1 divides long wavelengths only, with
    a linear transition. YaRN (arXiv 2309.00071, section 3.2) has a linear transition over dimensions.
    """
    freq = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    if rope.rope_type == "linear":
        return freq / rope.factor
    context = rope.original_max_position_embeddings
    if rope.rope_type == "llama3":
        rotations = context * freq / (2 * math.pi)  # over the original context
        keep = ((rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
        return freq * (keep + (1 - keep) / rope.factor)
    if rope.rope_type == "yarn":

        def dimension(rotations: float) -> float:
            return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

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
    """Returns cosines and sines of all positions, fp32, for every layer."""
    rope = model_config.rope
    angle = position[:, None, None].float() * rope_inv_freq(rope, model_config.head_dim, position.device)
    return angle.cos() * rope.attention_factor, angle.sin() * rope.attention_factor


def apply_rope(
    x: Float[Tensor, "T heads H"], cos: Float[Tensor, "T 1 half"], sin: Float[Tensor, "T 1 half"]
) -> Float[Tensor, "T heads H"]:
    """Rotates dimension i with dimension i + H/2, the layout of Hugging Face checkpoints."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def rope_and_cache_kv(
    qkv: Float[Tensor, "T Q2K H"], cos: Float[Tensor, "T 1 half"], sin: Float[Tensor, "T 1 half"],
    slot: Int[Tensor, " T"], k_cache: Float[Tensor, "S K H"], v_cache: Float[Tensor, "S K H"],
) -> Float[Tensor, "T Q H"]:  # fmt: skip
    """Returns rotated queries. Writes rotated keys, and values, to the caches at `slot`."""
    kv_heads = k_cache.shape[1]
    q, k, v = qkv.split((qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads), 1)
    # Full-index writes into the flat tensor: torch 2.11 would copy the whole cache for a write through a view.
    k_cache.index_put_((slot,), apply_rope(k, cos, sin))
    v_cache.index_put_((slot,), v)
    return apply_rope(q, cos, sin)
