"""KV caches in 8 bits: e4m3 values with a scale for each token and KV head, made when a token is written.

A layer's keys, and its values, stay one tensor, [slots, 1, row bytes] of uint8, whose pages are copied as they are. A
token's row holds

    K * H bytes   e4m3 values, head by head; zeros up to a multiple of 4 bytes
    4 * K bytes   fp32 scales of the heads, amax / 448; zeros up to a multiple of 16 bytes

Snapshots hold rows. In a cache the same bytes are in the order of a page: the values of all its tokens, from the next
multiple of 4 bytes on the scales of the first head, those of the second, …, and zeros. So an attention kernel finds the
scales of a tile side by side, and does not fetch a memory sector for each.

Keys are quantized after RoPE. Attention reads what the cache holds, the last token's key and value included: a prompt
gives the same whether it is computed or cached. The functions below specify the kernels.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from fastgen.core.layers import apply_rope
from fastgen.core.model_config import ModelConfig
from fastgen.quantization.fp8 import E4M3, dequantize, quantize_rows

SCALE_BYTES, ROW_ALIGNMENT = 4, 16


class RowFormat(NamedTuple):
    """Shape and dtype of one token's keys, or of its values, in one layer of a KV cache."""

    shape: tuple[int, int]  # [kv heads, head_dim], or [1, bytes] of a quantized cache
    dtype: torch.dtype
    heads: tuple[int, int]  # number of kv heads, head_dim

    @property
    def num_bytes(self) -> int:
        """Bytes of a row."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def bytes_per_element(self) -> float:
        """Bytes of a key's or value's element, scales included."""
        return self.num_bytes / (self.heads[0] * self.heads[1])


def row_format(model_config: ModelConfig, cache_dtype: str, dtype: torch.dtype) -> RowFormat:
    """Returns the rows of a cache for `kv_cache.dtype`, on a rank with this `model_config` and weights of `dtype`."""
    heads, head_dim = model_config.num_kv_heads, model_config.head_dim
    if cache_dtype == "auto":
        return RowFormat((heads, head_dim), dtype, (heads, head_dim))
    return RowFormat((1, fp8_row_bytes(heads, head_dim)), torch.uint8, (heads, head_dim))


def scale_offset(num_kv_heads: int, head_dim: int) -> int:
    """Returns the byte of a row at which its scales begin."""
    return -(-num_kv_heads * head_dim // SCALE_BYTES) * SCALE_BYTES


def fp8_row_bytes(num_kv_heads: int, head_dim: int) -> int:
    """Returns the bytes of a row."""
    num_bytes = scale_offset(num_kv_heads, head_dim) + SCALE_BYTES * num_kv_heads
    return -(-num_bytes // ROW_ALIGNMENT) * ROW_ALIGNMENT


def quantize_kv(x: Float[Tensor, "T K H"]) -> UInt8[Tensor, "T 1 W"]:
    """Returns the rows of keys or values."""
    tokens, heads, head_dim = x.shape
    data, scale = quantize_rows(x)
    rows = x.new_zeros(tokens, fp8_row_bytes(heads, head_dim), dtype=torch.uint8)
    first = scale_offset(heads, head_dim)
    rows[:, : heads * head_dim] = data.view(torch.uint8).flatten(1)
    rows[:, first : first + SCALE_BYTES * heads] = scale.view(torch.uint8)
    return rows[:, None]


def dequantize_kv(
    model_config: ModelConfig, rows: UInt8[Tensor, "*rows 1 W"], dtype: torch.dtype
) -> Float[Tensor, "*rows K H"]:
    """Returns the keys or values of rows."""
    heads, head_dim = model_config.num_kv_heads, model_config.head_dim
    first, rows = scale_offset(heads, head_dim), rows[..., 0, :]
    data = rearrange(rows[..., : heads * head_dim].view(E4M3), "... (k h) -> ... k h", k=heads)
    scale = rows[..., first : first + SCALE_BYTES * heads].contiguous().view(torch.float32)
    return dequantize(data, scale, dtype)


def _parts_of_pages(
    heads: tuple[int, int], page_size: int, pages: UInt8[Tensor, "*pages bytes"]
) -> tuple[UInt8[Tensor, "*pages P KH"], UInt8[Tensor, "*pages K P 4"]]:
    """Returns views of the values and of the scales in pages."""
    num_heads, size = heads[0], page_size * heads[0] * heads[1]
    first = -(-size // SCALE_BYTES) * SCALE_BYTES
    scales = pages[..., first : first + SCALE_BYTES * num_heads * page_size]
    values = rearrange(pages[..., :size], "... (p x) -> ... p x", p=page_size)
    return values, rearrange(scales, "... (k p b) -> ... k p b", k=num_heads, b=SCALE_BYTES)


def rows_to_pages(
    heads: tuple[int, int], page_size: int, rows: UInt8[Tensor, "*batch S 1 W"]
) -> UInt8[Tensor, "*batch S 1 W"]:
    """Returns the bytes of whole pages in the order of a cache."""
    paged = rearrange(rows, "... (n p) 1 w -> ... n p w", p=page_size)
    pages = torch.zeros_like(paged).flatten(-2)
    values, scales = _parts_of_pages(heads, page_size, pages)
    first = scale_offset(*heads)
    values.copy_(paged[..., : values.shape[-1]])
    scales.copy_(rearrange(paged[..., first : first + SCALE_BYTES * heads[0]],
                           "... p (k b) -> ... k p b", b=SCALE_BYTES))  # fmt: skip
    return pages.view(rows.shape)


def pages_to_rows(
    heads: tuple[int, int], page_size: int, pages: UInt8[Tensor, "*batch S 1 W"]
) -> UInt8[Tensor, "*batch S 1 W"]:
    """Returns the rows of whole pages of a cache, token by token."""
    paged = rearrange(pages, "... (n p) 1 w -> ... n (p w)", p=page_size)
    values, scales = _parts_of_pages(heads, page_size, paged)
    rows = torch.zeros_like(paged).unflatten(-1, (page_size, -1))
    first = scale_offset(*heads)
    rows[..., : values.shape[-1]] = values
    rows[..., first : first + SCALE_BYTES * heads[0]] = rearrange(scales, "... k p b -> ... p (k b)")
    return rows.view(pages.shape)


def read_pages(
    model_config: ModelConfig, page_size: int, pages: UInt8[Tensor, "*batch S 1 W"], dtype: torch.dtype
) -> Float[Tensor, "*batch S K H"]:
    """Returns the keys or values in whole pages: the `read` of the plain attention backends."""
    rows = pages_to_rows((model_config.num_kv_heads, model_config.head_dim), page_size, pages)
    return dequantize_kv(model_config, rows, dtype)


def rope_and_cache_kv(
    qkv: Float[Tensor, "T Q2K H"], cos: Float[Tensor, "T 1 half"], sin: Float[Tensor, "T 1 half"],
    slot: Int[Tensor, " T"], k_cache: UInt8[Tensor, "S 1 W"], v_cache: UInt8[Tensor, "S 1 W"], *,
    num_kv_heads: int, page_size: int,
) -> Float[Tensor, "T Q H"]:  # fmt: skip
    """Returns rotated queries. Writes rotated keys, and values, to the quantized caches at `slot`."""
    q, k, v = qkv.split((qkv.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads), 1)
    for cache, x in (k_cache, apply_rope(k, cos, sin)), (v_cache, v):
        _write(cache, x, slot.long(), page_size)
    return apply_rope(q, cos, sin)


def _write(
    cache: UInt8[Tensor, "S 1 W"], x: Float[Tensor, "T K H"], slot: Int[Tensor, " T"], page_size: int
) -> None:  # fmt: skip
    """Writes keys or values to the slots of a cache."""
    data, scale = quantize_rows(x)
    (_, heads, head_dim), device = x.shape, x.device
    page, i = slot // page_size, slot % page_size
    size = page_size * heads * head_dim
    start = page * (page_size * cache.shape[2])  # byte of the page
    value = (start + i * heads * head_dim)[:, None] + torch.arange(heads * head_dim, device=device)
    cache.view(-1).index_put_((value,), data.view(torch.uint8).flatten(1))
    first = start + -(-size // SCALE_BYTES) * SCALE_BYTES
    number = (first // SCALE_BYTES + i)[:, None] + torch.arange(heads, device=device) * page_size
    cache.view(-1).view(torch.float32).index_put_((number,), scale)
