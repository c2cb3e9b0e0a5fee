"""Declares each weight once, in `weight_specs`; init, load, update and save are walks over that tree."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import huggingface_hub  # names are imported where they are used, since most load much more
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm.auto import tqdm

from fastgen.checkpoint.files import Checkpoint, first_names, open_safetensors, read_checkpoint, read_model_config
from fastgen.checkpoint.fp8_tensors import SCALE_SUFFIXES
from fastgen.checkpoint.hub import resolve
from fastgen.checkpoint.model_families import to_hf_config
from fastgen.checkpoint.quantization_config import to_compressed_tensors
from fastgen.config import check_choice
from fastgen.core.model_config import UNSHARDED, ModelConfig, TPShard, shard_config, vocab_shard
from fastgen.core.types import Layer, Params
from fastgen.quantization.fp8 import E4M3, QuantizedWeight, copy_weight, is_quantized, map_weights, weight_leaves

IGNORED_TENSORS = re.compile(r"rotary_emb\.inv_freq$")  # buffers of old checkpoints
EMBED_NAME, LM_HEAD_NAME = "model.embed_tokens.weight", "lm_head.weight"  # one tensor where the head is tied
FINAL_NORM_NAME = "model.norm.weight"
FINITE_HINT = "check_finite=False takes them as they are"
COMPARE_CHUNK_ROWS = 8192  # rows of two tensors that are compared at once
ALIGNMENT_BYTES = 512  # of each tensor in a TensorMemory
Weight = Tensor | QuantizedWeight


class DimShard(NamedTuple):
    """A rank's shard of a dimension: `size` entries from `start` on, of `full_size`."""

    full_size: int
    start: int
    size: int

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.size)


class CheckpointTensor(NamedTuple):
    """Rows of a weight that come from one tensor of the checkpoint, with the rank's shard of each dimension."""

    name: str
    dim_shards: tuple[DimShard, ...]

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape in the checkpoint."""
        return tuple(dim.full_size for dim in self.dim_shards)

    def extract_shard(self, tensor: Any) -> Any:
        """Returns the rank's shard of a weight, or of a safetensors slice, of which only the shard is read.

        A shard of columns of a quantized weight keeps the scales of the full rows.
        """
        slices = tuple(dim.slice for dim in self.dim_shards)
        if isinstance(tensor, QuantizedWeight):
            return QuantizedWeight(tensor.data[slices], tensor.scale[slices[0]])
        return tensor[slices]


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """Declaration of a weight: `checkpoint_tensors` packed along the first dimension; rows after them are padding."""

    checkpoint_tensors: tuple[CheckpointTensor, ...]
    shape: tuple[int, ...]
    fill_value: float | None = None  # initial value; None: normally distributed
    quantizable: bool = False  # one of the matmuls of a layer
    quantized: bool = False  # a QuantizedWeight is in its place

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Returns the bytes that the weight takes of a TensorMemory; `dtype` is the model's."""
        if self.quantized:
            return align(prod(self.shape)) + align(self.shape[0] * torch.float32.itemsize)
        return align(prod(self.shape) * dtype.itemsize)


# Weights that multiply the same activations are packed into one matrix: q, k and v into `qkv`, gate and up into
# `gate_up`. One large matmul reads the activations once and is faster than several small ones, most of all for the few
# rows of a decode step. Checkpoints, weight updates and adapters know the parts by their own names, which
# `checkpoint_tensors` maps to views of the packed tensor: nothing is packed or unpacked after loading.
#
# Tensor parallelism shards the parts, not the packed matrix (Megatron-LM, arXiv 1909.08053): a rank has its heads of
# q, k and v, or its slice of the width of gate and up, packed in the same order. The forward of a rank is that of a
# smaller model (`shard_config`). `out` and `down` are sharded by columns to match, and the embedding and the head by
# rows of the vocabulary, padded so that all ranks have equally many.
#
# Quantized are the matmuls of the layers, which are nearly all of the weights. A packed matrix is quantized as one: if
# a part of it is in `unquantized`, no part is.
def weight_specs(
    model_config: ModelConfig, tp_shard: TPShard = UNSHARDED, quantization: str = "none",
    unquantized: Collection[str] = (),
) -> Params:  # fmt: skip
    """Returns the tree of a model's weights, or of a rank's shards, with a `WeightSpec` in place of every tensor.

    With `quantization` "fp8" the matmuls of the layers are quantized, except for checkpoint tensors in `unquantized`.
    Raises ValueError for another `quantization`, and for a tensor-parallel size that does not divide the model.
    """
    check_choice("quantization", quantization, ("none", "fp8"))
    rank, size = tp_shard
    config, head_dim, local = model_config, model_config.head_dim, shard_config(model_config, size)
    rows_per_rank = vocab_shard(config.vocab_size, TPShard(0, size))[1]
    vocab = DimShard(config.vocab_size, *vocab_shard(config.vocab_size, tp_shard))
    width = DimShard(config.intermediate_size, rank * local.intermediate_size, local.intermediate_size)
    hidden, head = (DimShard(n, 0, n) for n in (config.hidden_size, head_dim))
    # With fewer key heads than ranks, a rank has the key head that its queries belong to.
    q, kv = (DimShard(n * head_dim, rank * n // size * head_dim, n_local * head_dim)
             for n, n_local in ((config.num_q_heads, local.num_q_heads), (config.num_kv_heads, local.num_kv_heads))
    )  # fmt: skip

    def spec(
        rows: dict[str, DimShard], columns: DimShard | None = None, *, num_rows: int = 0, fill: float | None = None,
        quantizable: bool = False,
    ) -> Any:  # fmt: skip
        dims = () if columns is None else (columns,)
        tensors = tuple(CheckpointTensor(name, (dim, *dims)) for name, dim in rows.items())
        shape = num_rows or sum(dim.size for dim in rows.values()), *(dim.size for dim in dims)
        quantized = quantizable and quantization == "fp8" and rows.keys().isdisjoint(unquantized)
        return WeightSpec(tensors, shape, fill, quantizable, quantized)

    def layer(i: int) -> Layer:
        prefix = f"model.layers.{i}"
        attention, heads = f"{prefix}.self_attn", {"q": q, "k": kv, "v": kv}
        weights = {f"{attention}.{n}_proj.weight": rows for n, rows in heads.items()}
        biases = {f"{attention}.{n}_proj.bias": rows for n, rows in heads.items()}
        return Layer(
            attn_norm=spec({f"{prefix}.input_layernorm.weight": hidden}, fill=1.0),
            qkv=spec(weights, hidden, quantizable=True),
            qkv_bias=spec(biases, fill=0.0) if config.qkv_bias else None,
            q_norm=spec({f"{attention}.q_norm.weight": head}, fill=1.0) if config.qk_norm else None,
            k_norm=spec({f"{attention}.k_norm.weight": head}, fill=1.0) if config.qk_norm else None,
            out=spec({f"{attention}.o_proj.weight": hidden}, q, quantizable=True),
            out_bias=spec({f"{attention}.o_proj.bias": hidden}, fill=0.0) if config.out_bias else None,
            ffn_norm=spec({f"{prefix}.post_attention_layernorm.weight": hidden}, fill=1.0),
            gate_up=spec({f"{prefix}.mlp.{n}_proj.weight": width for n in ("gate", "up")}, hidden, quantizable=True),
            down=spec({f"{prefix}.mlp.down_proj.weight": hidden}, width, quantizable=True),
        )

    tied = config.tie_word_embeddings
    return Params(
        embed=spec({EMBED_NAME: vocab}, hidden, num_rows=rows_per_rank),
        layers=tuple(layer(i) for i in range(config.num_layers)),
        final_norm=spec({FINAL_NORM_NAME: hidden}, fill=1.0),
        lm_head=None if tied else spec({LM_HEAD_NAME: vocab}, hidden, num_rows=rows_per_rank),
    )


def _leaf_specs(model_config: ModelConfig, tp_shard: TPShard = UNSHARDED) -> list[WeightSpec | None]:
    return tree_leaves(weight_specs(model_config, tp_shard))


@runtime_checkable
class TensorMemory(Protocol):
    """Memory of a fixed size on one device that several tensors lie in; that of `training.sleep` can be released."""

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Returns a tensor of zeros in the memory that is left."""
        ...


def align(num_bytes: int) -> int:
    """Returns the bytes that a tensor of `num_bytes` takes of a TensorMemory."""
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def bytes_needed(shapes: Iterable[Sequence[int]], dtype: torch.dtype) -> int:
    """Returns the bytes that tensors of these shapes take of a TensorMemory."""
    return sum(align(prod(shape) * dtype.itemsize) for shape in shapes)


def init(
    model_config: ModelConfig, seed: int = 0, *, device: torch.device | str | None = None,
    dtype: torch.dtype | None = None, tp_shard: TPShard = UNSHARDED, memory: TensorMemory | None = None,
    quantization: str = "none",
) -> Params:  # fmt: skip
    """Returns random parameters, normal with standard deviation 0.02, made on `device` (None: torch's default device).

    The values depend on the seed and the type of device; `tp_shard` returns a rank's shards of the same values.
    `quantization` "fp8" quantizes the matmuls of the layers one by one, which needs memory for the quantized model and
    one weight. With `memory`, of `param_bytes` at least, the parameters lie there.
    """
    generator = torch.Generator(device or torch.get_default_device()).manual_seed(seed)
    specs = weight_specs(model_config, tp_shard, quantization)
    params = _allocate(specs, dtype or getattr(torch, model_config.dtype), device, memory)

    def init_weights() -> Iterator[tuple[str, Tensor]]:
        """Fills the parameters, or yields full weights, so that a rank's values are those of one device."""
        for spec, weight in zip(_leaf_specs(model_config), weight_leaves(params), strict=True):
            if spec is not None:
                if tp_shard != UNSHARDED or isinstance(weight, QuantizedWeight):
                    weight = params.embed.new_empty(spec.shape)
                if spec.fill_value is None:
                    weight.normal_(0, 0.02, generator=generator)
                else:
                    weight.fill_(spec.fill_value)
                yield from ((tensor.name, view) for tensor, view in _weight_views(spec, weight))

    update(params, model_config, init_weights(), tp_shard=tp_shard, check_finite=False)
    return params


def _allocate(
    specs: Params, dtype: torch.dtype, device: torch.device | str | None, memory: TensorMemory | None = None
) -> Params:
    """Returns zeros in the place of specs, in `memory` if there is one; `dtype` is the model's."""

    def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, device=device, dtype=dtype) if memory is None else memory.allocate(shape, dtype)

    def allocate(spec: WeightSpec) -> Weight:
        if spec.quantized:
            return QuantizedWeight(zeros(spec.shape, E4M3), zeros(spec.shape[:1], torch.float32))
        return zeros(spec.shape, dtype)

    return tree_map_only(WeightSpec, allocate, specs)


def _num_bytes(specs: Params, dtype: torch.dtype) -> int:
    return sum(spec.num_bytes(dtype) for spec in tree_leaves(specs) if spec is not None)


def param_bytes(
    model_config: ModelConfig, dtype: torch.dtype, tp_shard: TPShard = UNSHARDED, quantization: str = "none"
) -> int:
    """Returns the bytes of memory that hold a model's parameters, or a rank's shards; `dtype` is the model's."""
    return _num_bytes(weight_specs(model_config, tp_shard, quantization), dtype)


def _unquantized_names(params: Params, model_config: ModelConfig) -> set[str]:
    """Returns the checkpoint tensors of the weights of `params` that are not quantized."""
    return {tensor.name for tensor, weight in _param_views(params, model_config) if isinstance(weight, Tensor)}


def shard_params(params: Params, model_config: ModelConfig, tp_shard: TPShard, quantization: str = "none") -> Params:
    """Returns a copy of a rank's shards of parameters.

    Quantized weights stay so, with the scales of their full rows. `quantization` "fp8" quantizes the shards of a model
    that is not quantized, each with scales of its own.
    """
    if is_quantized(params):
        specs = weight_specs(model_config, tp_shard, "fp8", _unquantized_names(params, model_config))
    else:
        specs = weight_specs(model_config, tp_shard, quantization)
    shards = _allocate(specs, params.embed.dtype, params.embed.device)
    update(shards, model_config, named_weights(params, model_config), tp_shard=tp_shard, check_finite=False)
    return shards


def quantize_params(
    params: Params, model_config: ModelConfig, *, tp_shard: TPShard = UNSHARDED,
    allocate: Callable[[int], TensorMemory] | None = None,
) -> Params:  # fmt: skip
    """Returns parameters with fp8 copies of the layers' matmuls, which share all other weights with `params`.

    `params` are the model's, or a rank's shards. `allocate` returns memory of that many bytes for the copies;
    `requantize` makes them anew. Raises ValueError for another model's parameters.
    """
    list(_param_views(params, model_config, tp_shard))  # raises ValueError
    specs = weight_specs(model_config, tp_shard, "fp8")
    copied = tree_map_only(WeightSpec, lambda spec: spec if spec.quantized else None, specs)
    dtype, device = params.embed.dtype, params.embed.device
    copies = _allocate(copied, dtype, device, None if allocate is None else allocate(_num_bytes(copied, dtype)))
    quantized = map_weights(lambda weight, copy: weight if copy is None else copy, params, copies)
    requantize(quantized, params)
    return quantized


@torch.no_grad()
def requantize(
    target: Params, source: Params, quantize_into: Callable[[QuantizedWeight, Tensor], None] = QuantizedWeight.copy_
) -> None:
    """Quantizes the weights of `source` again into the copies that `quantize_params` made of them, in place.

    `quantize_into` writes one of them, such as a kernel with the results of `QuantizedWeight.copy_`.
    """
    for weight, new in zip(weight_leaves(target), weight_leaves(source), strict=True):
        if weight is not new:
            quantize_into(weight, new)


def _weight_views(weight_spec: WeightSpec, weight: Weight) -> Iterator[tuple[CheckpointTensor, Any]]:
    """Yields the checkpoint tensors of a weight, each with its view of the weight."""
    if (shape := tuple(weight.shape)) != weight_spec.shape:
        problem = f"a parameter of shape {shape} where {weight_spec.shape} is declared"
        name = weight_spec.checkpoint_tensors[0].name
        raise ValueError(f"{problem}, for {name}: are these another model's, or one rank's?")
    start = 0
    for tensor in weight_spec.checkpoint_tensors:
        size = tensor.dim_shards[0].size
        stop = start + size
        yield tensor, weight[start:stop] if isinstance(weight, Tensor) else weight.rows(start, stop)
        start += size


def _param_views(
    params: Params, model_config: ModelConfig, tp_shard: TPShard = UNSHARDED
) -> Iterator[tuple[CheckpointTensor, Any]]:
    """Yields all checkpoint tensors of a model, each with its view of `params`. Raises ValueError for another tree."""
    specs, weights = _leaf_specs(model_config, tp_shard), weight_leaves(params)
    if len(specs) != len(weights) or any(a and b is None for a, b in zip(specs, weights, strict=True)):
        problem = f"parameters are missing or too many of {model_config.architecture}"
        raise ValueError(f"{problem}: are these another model's?")
    for spec, weight in zip(specs, weights, strict=True):
        if spec is None:
            continue
        if not isinstance(weight, Weight if spec.quantizable else Tensor):
            name = spec.checkpoint_tensors[0].name
            raise ValueError(f"a parameter is {type(weight).__name__} instead of a tensor, for {name}")
        yield from _weight_views(spec, weight)


def named_weights(params: Params, model_config: ModelConfig) -> Iterator[tuple[str, Any]]:
    """Yields (checkpoint name, tensor or QuantizedWeight) of every weight; those of a packed weight are views of it."""
    return ((tensor.name, view) for tensor, view in _param_views(params, model_config))


@torch.no_grad()
def update(
    params: Params, model_config: ModelConfig, tensors: Iterable[tuple[str, Any]], *, source: str = "update",
    tp_shard: TPShard = UNSHARDED, partial: bool = False, check_finite: bool = True,
) -> None:  # fmt: skip
    """Writes `params` in place from (checkpoint name, tensor) pairs, casting to each weight's dtype.

    Where `params` are quantized, tensors are quantized, a rank's shard with scales of its own. A `QuantizedWeight` in
    the pairs is copied as it is, or dequantized.
    Tensors are unsharded, or safetensors slices; a rank's `params` take their shards of them. Where the head is tied,
    either of its two names will do; if both are in the pairs, they must be equal. Every weight must be in the pairs
    once; with `partial`, missing ones keep their values. With `check_finite`, a tensor with values that are NaN or
    infinite in the weight's dtype raises, and neither that tensor nor later ones are written.

    Raises ValueError, starting with `source`, for tensors that are mis-shaped, unexpected, missing or twice in the
    pairs, and for two heads that differ.
    """
    targets = {tensor.name: (tensor, view) for tensor, view in _param_views(params, model_config, tp_shard)}
    missing, total, unexpected, seen = set(targets), len(targets), list[str](), set[str]()
    if model_config.tie_word_embeddings:
        targets[LM_HEAD_NAME] = targets[EMBED_NAME]
    for name, tensor in tensors:
        if name not in targets:
            if not IGNORED_TENSORS.search(name):
                unexpected.append(name)
            continue
        if name in seen:
            raise ValueError(f"{source}: {name} is given twice")
        seen.add(name)
        target, view = targets[name]
        if (shape := _checked_shape(source, name, tensor)) != target.full_shape:
            raise ValueError(f"{source}: {name} has shape {shape}, the config says {target.full_shape}")
        if target.name not in missing:  # a tied head, written by its other name
            _check_heads_equal(view, target.extract_shard(tensor), view.dtype, source)
            continue
        if check_finite:
            values = tensor if isinstance(tensor, Weight) else target.extract_shard(tensor)
            num_written = total - len(missing)
            state = f"the {num_written} tensors before it are written" if num_written else "nothing is written"
            raise_if_not_finite([(name, values, _range_dtype(view))], source, f"{state}. {FINITE_HINT}")
        copy_weight(view, target.extract_shard(tensor))
        missing.remove(target.name)
        del tensor  # the source may free it before it makes the next
    _raise_on_mismatch(source, model_config, set() if partial else missing, unexpected)


def _range_dtype(weight: Weight) -> torch.dtype:
    """Returns the dtype whose range a weight's values must be in: with scales, that of fp32."""
    return weight.dtype if isinstance(weight, Tensor) else torch.float32


def _raise_on_mismatch(source: str, model_config: ModelConfig, missing: set[str], unexpected: list[str]) -> None:
    """Raises ValueError, with the first eight of each, if there are missing or unexpected names."""
    kinds = ("missing", missing), ("unexpected", unexpected)
    problems = [f"{label}: {first_names(sorted(names))}" for label, names in kinds if names]
    prefixes = [n.removesuffix(FINAL_NORM_NAME) for n in unexpected if n.endswith("." + FINAL_NORM_NAME)]
    if FINAL_NORM_NAME in missing and prefixes:
        problems.append(f"leave {prefixes[0]!r} out of the names")
    elif any(".lora_" in n for n in unexpected):
        problems.append("merge the adapter into the matrices, or pass it to Engine.add_adapter")
    if problems:
        raise ValueError(f"{source}: tensors do not match {model_config.architecture}; {'; '.join(problems)}")


def check_update(
    params: Params, model_config: ModelConfig, tensors: Sequence[tuple[str, Any]], *, source: str = "update",
    tp_shard: TPShard = UNSHARDED, partial: bool = False, check_finite: bool = True,
) -> None:  # fmt: skip
    """Raises the ValueError that `update` with the same arguments would raise, before anything is written."""
    by_name = dict(tensors)
    if len(by_name) < len(tensors):
        raise ValueError(f"{source}: {Counter(name for name, _ in tensors).most_common(1)[0][0]} is given twice")
    _check_shapes({n: _checked_shape(source, n, t) for n, t in tensors}, model_config, source, partial=partial)
    dtypes = {tensor.name: _range_dtype(view) for tensor, view in _param_views(params, model_config, tp_shard)}
    if model_config.tie_word_embeddings:
        dtypes[LM_HEAD_NAME] = dtypes[EMBED_NAME]
        if {EMBED_NAME, LM_HEAD_NAME} <= by_name.keys():
            _check_heads_equal(by_name[EMBED_NAME], by_name[LM_HEAD_NAME], dtypes[EMBED_NAME], source)
    if check_finite:
        known = [(n, t, dtypes[n]) for n, t in tensors if n in dtypes]
        raise_if_not_finite(known, source, f"nothing is written. {FINITE_HINT}")


def _checked_shape(source: str, name: str, tensor: Any) -> tuple[int, ...]:
    """Returns a tensor's shape. Raises ValueError if it is no tensor of floats; integers would lack their scales."""
    if hasattr(tensor, "get_shape"):  # a safetensors slice
        return tuple(tensor.get_shape())
    if isinstance(tensor, QuantizedWeight):
        return tuple(tensor.shape)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{source}: {name} is a {type(tensor).__name__}, not a tensor")
    if not tensor.is_floating_point():
        raise ValueError(f"{source}: {name} has dtype {tensor.dtype}: weights are of floating point, not quantized")
    if tensor.is_meta or tensor.layout != torch.strided:
        raise ValueError(f"{source}: {name} is {'on the meta device' if tensor.is_meta else tensor.layout}: no values")
    return tuple(tensor.shape)


def _check_heads_equal(a: Any, b: Any, dtype: torch.dtype, source: str) -> None:
    """Raises ValueError if the two tensors that an update has for one tied head differ."""
    if not _equal(a, b, dtype):
        problem = f"{EMBED_NAME} and {LM_HEAD_NAME} differ, but this model's head is tied to its embedding"
        advice = "load the model with tie_word_embeddings false, or from a checkpoint in which they differ"
        raise ValueError(f"{source}: {problem}: {advice}")


def _check_shapes(
    shapes: Mapping[str, tuple[int, ...]], model_config: ModelConfig, source: str, *, partial: bool = False
) -> None:
    """Raises ValueError, as `update` would, if these are not the names and shapes of the model's tensors."""
    specs = [spec for spec in _leaf_specs(model_config) if spec is not None]
    expected = {tensor.name: tensor.full_shape for spec in specs for tensor in spec.checkpoint_tensors}
    missing = set[str]() if partial else expected.keys() - shapes.keys()
    if model_config.tie_word_embeddings:
        expected[LM_HEAD_NAME] = expected[EMBED_NAME]
        missing -= {EMBED_NAME} if LM_HEAD_NAME in shapes else set()
    for name, shape in shapes.items():
        if name in expected and shape != expected[name]:
            raise ValueError(f"{source}: {name} has shape {shape}, the config says {expected[name]}")
    unexpected = [name for name in shapes if name not in expected and not IGNORED_TENSORS.search(name)]
    _raise_on_mismatch(source, model_config, missing, unexpected)


def _equal(a: Any, b: Any, dtype: torch.dtype | None = None) -> bool:
    """Returns whether two matrices, or safetensors slices, are equal in `dtype`; None is the wider one of theirs."""
    rows, num_rows = (x.shape[0] if isinstance(x, Tensor) else x.get_shape()[0] for x in (a, b))
    for i in range(0, rows, COMPARE_CHUNK_ROWS):
        x, y = a[i : i + COMPARE_CHUNK_ROWS], b[i : i + COMPARE_CHUNK_ROWS]
        common = dtype or torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(common), y.to(x.device, common)
        if not torch.equal(x, y) and not (x.shape == y.shape and torch.allclose(x, y, 0, 0, equal_nan=True)):
            return False
    return rows == num_rows


@torch.no_grad()
def raise_if_not_finite(tensors: Iterable[tuple[str, Any, torch.dtype]], source: str, advice: str) -> None:
    """Raises ValueError, naming the first eight, if values of (name, tensor, dtype) are NaN or infinite in that dtype.

    Costs one reduction per tensor, and one synchronization for each device and dtype. `advice` ends the message.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[str, torch.dtype, Tensor]]] = defaultdict(list)
    for name, x, dtype in tensors:
        if isinstance(x, QuantizedWeight):
            is_nan = (x.data.view(torch.uint8) & 127).amax() == 127  # e4m3 has two NaNs and no infinity
            scales = torch.where(is_nan, torch.nan, x.scale)
            groups[scales.device, scales.dtype].append((name, dtype, torch.stack(torch.aminmax(scales))))
        elif x.is_floating_point() and x.numel():
            x = x.float() if x.itemsize == 1 else x  # float8 has no minimum
            groups[x.device, x.dtype].append((name, dtype, torch.stack(torch.aminmax(x))))
    bad = list[str]()
    for group in groups.values():
        ranges = torch.stack([min_max for _, _, min_max in group]).tolist()
        for (name, dtype, _), (low, high) in zip(group, ranges, strict=True):
            if not (-torch.finfo(dtype).max <= low and high <= torch.finfo(dtype).max):
                bad.append(f"{name} ({dtype})".replace("torch.", ""))
    if bad:
        problem = f"NaN or infinite values, or ones beyond the dtype, in {first_names(bad)}"
        raise ValueError(f"{source}: {problem}; {advice}")


@torch.no_grad()
def copy_params(params: Params, source: Params) -> None:
    """Writes `params` in place from a tree of the same shapes and any dtype and device, else raises ValueError."""
    shapes = [map_weights(lambda w: w.shape, tree) for tree in (params, source)]
    if shapes[0] != shapes[1]:
        raise ValueError("the parameters to copy are another model's: their tree or their shapes are not the same")
    for target, weight in zip(weight_leaves(params), weight_leaves(source), strict=True):
        if target is not None:
            copy_weight(target, weight, non_blocking=True)


def _untie_if_heads_differ(model_config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """Returns the config, untied as in transformers if the checkpoint's head differs from the embedding."""
    files = checkpoint.files
    if model_config.tie_word_embeddings and {EMBED_NAME, LM_HEAD_NAME} <= files.keys():
        if checkpoint.quantized_names & {EMBED_NAME, LM_HEAD_NAME}:
            return replace(model_config, tie_word_embeddings=False)
        with open_safetensors(files[EMBED_NAME]) as f, open_safetensors(files[LM_HEAD_NAME]) as g:
            if not _equal(f.get_slice(EMBED_NAME), g.get_slice(LM_HEAD_NAME)):
                return replace(model_config, tie_word_embeddings=False)
    return model_config


def _read_with_progress(checkpoint: Checkpoint, tp_shard: TPShard, bar: tqdm) -> Iterator[tuple[str, Any]]:
    """Yields (name, tensor or safetensors slice) of a checkpoint, while a bar shows the bytes that a rank has read."""
    total, num_read = sum(map(prod, checkpoint.shapes.values())) or 1, 0
    bar.reset(total=checkpoint.num_bytes // tp_shard.size)
    for name, tensor in checkpoint.iter_tensors(as_slices=tp_shard != UNSHARDED):
        yield name, tensor
        num_read += prod(checkpoint.shapes[name])
        bar.update(bar.total * num_read // total - bar.n)


def load(
    model: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    progress: bool = True, tp_shard: TPShard = UNSHARDED, allocate: Callable[[int], TensorMemory] | None = None,
    check_finite: bool = True, quantization: str = "auto",
) -> tuple[ModelConfig, Params]:  # fmt: skip
    """Returns config and parameters of a checkpoint: a Hugging Face folder, hub id, `.safetensors` or `.gguf` file.

    `device` None is torch's default device, `dtype` None the checkpoint's own. Needs host memory for about one tensor
    beyond the parameters and the mapped file. Of several weight files in a folder, those that transformers would take
    are read. Where the config ties the head to the embedding but the checkpoint has another head, the returned config
    is untied. The config is the unsharded model's; parameters are the rank's shards, and only those are read.
    `allocate` returns memory of that many bytes for the parameters.

    `quantization` "fp8" quantizes the matmuls of the layers one by one on the device, which needs memory for the
    quantized model and one weight. Weights that the checkpoint has in fp8 (see `checkpoint.quantization_config`) are
    taken as they are, except for embedding and head, and those that it does not have in fp8 stay as they are: "auto"
    is "fp8" for such a checkpoint, and "none" dequantizes it.

    Raises ValueError for damaged, missing, unexpected or mis-shaped tensors, before memory is allocated; with
    `check_finite`, also for values that are NaN or infinite, or too large for the dtype.
    """
    path = resolve(model)
    bar = tqdm(desc=f"loading {path.stem}", unit="B", unit_scale=True, leave=False, disable=None if progress else True)
    with bar:
        hf_config, checkpoint = read_checkpoint(path)
        model_config = _untie_if_heads_differ(read_model_config(path, hf_config), checkpoint)
        _check_shapes(checkpoint.shapes, model_config, str(path))
        param_dtype = dtype or getattr(torch, model_config.dtype)
        is_fp8 = bool(checkpoint.quantized_names)
        if quantization == "auto":
            quantization = "fp8" if is_fp8 else "none"
        unquantized = checkpoint.shapes.keys() - checkpoint.quantized_names if is_fp8 else ()
        specs = weight_specs(model_config, tp_shard, quantization, unquantized)
        memory = None if allocate is None else allocate(_num_bytes(specs, param_dtype))
        params = _allocate(specs, param_dtype, device, memory)
        tensors = _read_with_progress(checkpoint, tp_shard, bar)
        update(params, model_config, tensors, source=str(path), tp_shard=tp_shard, check_finite=False)
        if check_finite:  # on the device, where a reduction is fastest
            views = _param_views(params, model_config, tp_shard)
            views = ((tensor.name, view, _range_dtype(view)) for tensor, view in views)
            raise_if_not_finite(views, str(path), f"is the file damaged, or the dtype too narrow? {FINITE_HINT}")
    return model_config, params


def save(folder: str | Path, model_config: ModelConfig, params: Params, *, shard_bytes: int = 5 * 10**9) -> None:
    """Writes config.json and sharded safetensors in the Hugging Face layout, replacing an older checkpoint in `folder`.

    fp8 weights are written in the format of compressed-tensors (float-quantized, a scale per channel), which
    transformers and vLLM read; `load` reads the same bits. The tokenizer is not written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(params.embed.dtype).removeprefix("torch.")
    config = to_hf_config(model_config) | {"torch_dtype": dtype}
    tensors, unquantized_modules = dict[str, Tensor](), ["lm_head"]
    for name, weight in named_weights(params, model_config):
        if isinstance(weight, QuantizedWeight):
            tensors |= {name: weight.data, name + SCALE_SUFFIXES[0]: weight.scale[:, None]}
        else:
            tensors[name] = weight
            if name.endswith("_proj.weight"):
                unquantized_modules.append(name.removesuffix(".weight"))
    if is_quantized(params):
        config["quantization_config"] = to_compressed_tensors(unquantized_modules)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    index_file = folder / "model.safetensors.index.json"
    for old in (*folder.glob("model-*-of-*.safetensors"), folder / "model.safetensors", index_file):
        old.unlink(missing_ok=True)
    shards = huggingface_hub.split_state_dict_into_shards_factory(
        tensors, get_storage_size=lambda t: t.nbytes, filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )  # fmt: skip
    for file, names in shards.filename_to_tensors.items():
        contents = {name: tensors[name].detach().cpu().contiguous().clone() for name in names}
        save_file(contents, folder / file, {"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        index_file.write_text(json.dumps(index, indent=2))
