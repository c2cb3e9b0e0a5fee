"""Checkpoints whose weights are stored in 8 bits, in the formats of `quantization_config`.

Scales of channels and of tensors are taken as they are, with the values, bit for bit. Blocks that share a scale within
a row are dequantized and quantized again, with a scale for each row.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastgen.checkpoint.files import FLOAT_DTYPES, Checkpoint, TensorInfo, open_safetensors
from fastgen.checkpoint.quantization_config import Fp8Format
from fastgen.quantization.fp8 import QuantizedWeight

E4M3_DTYPE = "F8_E4M3"  # as safetensors spells it
SCALE_SUFFIXES = ("_scale", "_scale_inv")  # after the name of a weight; both are what values are multiplied by
SCALE_DTYPES = ("F32", "F16", "BF16", "F8_E8M0")
# Scales of activations, keys and values, which are computed as a step runs.
IGNORED_TENSORS = re.compile(
    r"\.(input_scale|input_scale_ub|output_scale|activation_scale|[qkv]_scale|kv_scale|prob_scale"
    r"|input_zero_point|output_zero_point|weight_zero_point|weight_shape)$"
)


class BlockScaledWeight(NamedTuple):
    """A weight whose scales are shared by blocks of rows and columns, or some of its rows and columns."""

    data: Float[Tensor, "N D"]  # e4m3
    scale: Float[Tensor, "N groups"]
    group: Int[Tensor, " D"]  # the scale of each column

    def rows(self, start: int, stop: int) -> "BlockScaledWeight":
        """Returns a view of some rows."""
        return BlockScaledWeight(self.data[start:stop], self.scale[start:stop], self.group)

    def to(self, device: torch.device | str) -> "BlockScaledWeight":
        """Returns the weight on a device."""
        return BlockScaledWeight(*(x.to(device) for x in self))

    def dequantize(self, dtype: torch.dtype) -> Float[Tensor, "N D"]:
        """Returns data * scale, rounded once to `dtype`."""
        return (self.data.float() * self.scale[:, self.group]).to(dtype)


@dataclass(frozen=True)
class StoredWeight:
    """A quantized weight in a file. Indexing it reads the values of that part alone."""

    data: Any  # a safetensors slice of e4m3 values
    scale: Tensor
    block: tuple[int, int] | None

    def get_shape(self) -> list[int]:
        """Returns the shape of the weight, as safetensors' slices do."""
        return self.data.get_shape()

    def __getitem__(self, slices: tuple[slice, slice]) -> QuantizedWeight | BlockScaledWeight:
        data, scale = self.data[slices], self.scale.float()
        num_rows, num_columns = self.get_shape()
        if scale.numel() == 1:
            return QuantizedWeight(data, scale.flatten().expand(len(data)).clone())
        if scale.shape in ((num_rows,), (num_rows, 1)):
            return QuantizedWeight(data, scale.flatten()[slices[0]].clone())
        assert self.block is not None, "read() has checked the shape"
        rows, columns = torch.arange(num_rows)[slices[0]], torch.arange(num_columns)[slices[1]]
        return BlockScaledWeight(data, scale[rows // self.block[0]], columns // self.block[1])


@dataclass(frozen=True)
class QuantizedCheckpoint(Checkpoint):
    """Safetensors files with e4m3 weights. Names and shapes are those of the weights, without their scales."""

    scales: Mapping[str, tuple[str, Path]]  # of each quantized weight: name and file of its scales
    block: tuple[int, int] | None

    @property
    def quantized_names(self) -> frozenset[str]:
        return frozenset(self.scales)

    def iter_tensors(self, *, as_slices: bool = False) -> Iterator[tuple[str, Any]]:
        for file in sorted(set(self.files.values())):
            with open_safetensors(file) as f:
                for name in f.keys():
                    if self.files.get(name) != file:
                        continue
                    if name not in self.scales:
                        yield name, f.get_slice(name) if as_slices else f.get_tensor(name)
                        continue
                    scale_name, scale_file = self.scales[name]
                    with nullcontext(f) if scale_file == file else open_safetensors(scale_file) as g:
                        scale = g.get_tensor(scale_name)
                    yield name, StoredWeight(f.get_slice(name), _squeeze_grid(scale), self.block)


def _squeeze_grid(scale: Tensor) -> Tensor:
    """Returns a grid of scales [blocks, blocks]; modelopt also stores it as [blocks, 1, blocks, 1]."""
    return scale[:, 0, :, 0] if scale.ndim == 4 else scale


def read(infos: Mapping[str, TensorInfo], files: Mapping[str, Path], fp8_format: Fp8Format) -> QuantizedCheckpoint:
    """Returns the checkpoint of files with these tensors. Raises ValueError for dtypes and scales that do not fit."""
    shapes, scales = dict[str, tuple[int, ...]](), dict[str, tuple[str, Path]]()
    scale_names = {
        name + suffix for name, info in infos.items() if info.dtype == E4M3_DTYPE for suffix in SCALE_SUFFIXES
    }
    for name, (dtype, shape) in infos.items():
        if name in scale_names or IGNORED_TENSORS.search(name):
            continue
        where = f"{files[name]}: {name}"
        if dtype not in (E4M3_DTYPE, *FLOAT_DTYPES):
            read_are = (
                f"of {fp8_format.method} checkpoints, read are weights of {', '.join((E4M3_DTYPE, *FLOAT_DTYPES))}"
            )
            raise ValueError(f"{where} has dtype {dtype}: {read_are}")
        shapes[name] = shape
        if dtype != E4M3_DTYPE:
            continue
        scale_name = next((name + suffix for suffix in SCALE_SUFFIXES if name + suffix in infos), None)
        if scale_name is None:
            raise ValueError(f"{where} has dtype {dtype}, and there are no scales {name}{' or '.join(SCALE_SUFFIXES)}")
        scale_dtype, scale_shape = infos[scale_name]
        if scale_dtype not in SCALE_DTYPES:
            raise ValueError(
                f"{files[scale_name]}: {scale_name} has dtype {scale_dtype}, not {', '.join(SCALE_DTYPES)}"
            )
        if not _is_scale_shape(scale_shape, shape, fp8_format.block):
            grid = "" if fp8_format.block is None else " or blocks of {} x {}".format(*fp8_format.block)
            problem = f"{scale_name} has shape {scale_shape}, which are no scales of the tensor, its rows{grid}"
            raise ValueError(f"{where} has shape {shape}, and {problem}")
        scales[name] = scale_name, files[scale_name]
    kept = {name: files[name] for name in shapes}
    return QuantizedCheckpoint(shapes, kept, scales, fp8_format.block)


def _is_scale_shape(scale: tuple[int, ...], weight: tuple[int, ...], block: tuple[int, int] | None) -> bool:
    if len(weight) != 2:
        return False
    rows, columns = weight
    if scale in ((), (1,), (1, 1), (rows,), (rows, 1)):
        return True
    if block is None:
        return False
    grid = -(-rows // block[0]), -(-columns // block[1])
    return scale in (grid, (grid[0], 1, grid[1], 1))
