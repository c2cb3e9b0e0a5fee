"""LoRA adapters (arXiv 2106.09685) as trees of tensors: `init`, `merge` into a model, `stack` for a forward of several.

An adapter adds scale * b @ a to weight matrices of a model. Those matrices are packed in the model's parameters (see
`checkpoint.weights`), but not in the adapter's: q, k and v each have a pair of their own.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastgen.checkpoint.weights import DimShard, weight_specs
from fastgen.config import check_int, unknown_name_message
from fastgen.core.model_config import UNSHARDED, ModelConfig, TPShard
from fastgen.core.types import Params
from fastgen.lora.stacked import LayerStackedLora, StackedAdapters, StackedLora
from fastgen.quantization.fp8 import is_quantized

PACKED_MODULES = {"qkv": ("q", "k", "v"), "out": ("out",), "gate_up": ("gate", "up"), "down": ("down",)}
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # PEFT's names
MAX_RANK = 2**16  # a higher rank means a damaged file


class LoraAB(NamedTuple):
    """The low-rank update b @ a of a weight matrix."""

    a: Float[Tensor, "r D"]
    b: Float[Tensor, "N r"]


class LayerLora(NamedTuple):
    """LoRA updates of one decoder layer. Matrices that the adapter leaves unchanged are None."""

    q: LoraAB | None = None
    k: LoraAB | None = None
    v: LoraAB | None = None
    out: LoraAB | None = None
    gate: LoraAB | None = None
    up: LoraAB | None = None
    down: LoraAB | None = None


class Adapter(NamedTuple):
    """A LoRA adapter (arXiv 2106.09685): `scale * b @ a` is added to each matrix of a model that has an update."""

    layers: tuple[LayerLora, ...]
    scale: float


Pairs = Mapping[tuple[int, str], LoraAB]  # by layer index and field of `LayerLora`


class LoraTarget(NamedTuple):
    """A matrix [rows, columns] that an adapter may change, and the rank's shard of both dimensions."""

    layer_idx: int
    field: str  # of `LayerLora`
    name: str  # the checkpoint's, without ".weight"
    rows: DimShard
    columns: DimShard

    @property
    def key(self) -> tuple[int, str]:
        return self.layer_idx, self.field

    @property
    def target_module(self) -> str:
        return self.name.rpartition(".")[2]


def iter_targets(model_config: ModelConfig, tp_shard: TPShard = UNSHARDED) -> Iterator[LoraTarget]:
    """Yields the matrices of a model that adapters may change, from the declaration of its weights."""
    for i, layer in enumerate(weight_specs(model_config, tp_shard).layers):
        for packed, fields in PACKED_MODULES.items():
            weight_spec: Any = getattr(layer, packed)
            for field, tensor in zip(fields, weight_spec.checkpoint_tensors, strict=True):
                yield LoraTarget(i, field, tensor.name.removesuffix(".weight"), *tensor.dim_shards)


def build_adapter(model_config: ModelConfig, pairs: Pairs, scale: float) -> Adapter:
    """Returns the tree of (a, b) pairs."""
    layers = ({f: pairs[i, f] for f in LayerLora._fields if (i, f) in pairs} for i in range(model_config.num_layers))
    return Adapter(tuple(LayerLora(**fields) for fields in layers), scale)


def target_pairs(
    adapter: Adapter, model_config: ModelConfig, tp_shard: TPShard = UNSHARDED
) -> Iterator[tuple[LoraTarget, LoraAB]]:
    """Yields the matrices that an unsharded adapter changes, each with its pair.

    Raises ValueError for an adapter of another model, or whose scale is not finite.
    """
    check_scale(adapter.scale, "scale")
    if len(adapter.layers) != model_config.num_layers:
        raise ValueError(f"an adapter of {len(adapter.layers)} layers for a model of {model_config.num_layers}")
    for target in iter_targets(model_config, tp_shard):
        pair: LoraAB | None = getattr(adapter.layers[target.layer_idx], target.field)
        if pair is None:
            continue
        a, b, rows, columns = [*pair.a.shape], [*pair.b.shape], target.rows.full_size, target.columns.full_size
        if len(a) != 2 or len(b) != 2 or (a[1], b[0], b[1]) != (columns, rows, a[0]):
            wanted = f"a [r, {columns}] and b [{rows}, r]"
            raise ValueError(f"adapter: {target.name} has a {a} and b {b}, where {wanted} are wanted")
        yield target, pair


def shard_adapter(adapter: Adapter, model_config: ModelConfig, tp_shard: TPShard) -> Adapter:
    """Returns a rank's shard of an adapter, as views: the rank's columns of each a and rows of each b."""
    pairs = {
        target.key: LoraAB(pair.a[:, target.columns.slice], pair.b[target.rows.slice])
        for target, pair in target_pairs(adapter, model_config, tp_shard)
    }
    return build_adapter(model_config, pairs, adapter.scale)


def parameters(adapter: Adapter) -> list[Tensor]:
    """Returns the tensors of an adapter, for an optimizer."""
    return [x for x in tree_leaves(adapter) if isinstance(x, Tensor)]


def to_cpu(adapter: Adapter) -> Adapter:
    """Returns a detached copy of an adapter on the CPU, to send to another process."""
    return tree_map(lambda x: x.detach().cpu() if isinstance(x, Tensor) else x, adapter)


def with_scale(adapter: Adapter, scale: float | None) -> Adapter:
    """Returns the adapter with another scale, or as it is for None. Raises ValueError if it is not an adapter."""
    check_structure("", adapter)
    return adapter if scale is None else adapter._replace(scale=scale)


def check_structure(name: str, adapter: Any) -> None:
    """Raises ValueError for anything but a tree of an adapter, before its fields are read."""
    if not isinstance(adapter, Adapter) or not isinstance(adapter.layers, tuple):
        type_name = type(adapter).__name__
        raise ValueError(f"adapter {name!r}: a {type_name} is no fastgen.Adapter (load_adapters reads files)")
    if isinstance(adapter.scale, bool) or not isinstance(adapter.scale, int | float):
        raise ValueError(f"adapter {name!r}: its scale must be a number, got {adapter.scale!r:.100}")
    for i, layer in enumerate(adapter.layers):
        for field, pair in layer._asdict().items() if isinstance(layer, LayerLora) else [("", layer)]:
            if pair is not None and not (isinstance(pair, LoraAB) and all(isinstance(x, Tensor) for x in pair)):
                raise ValueError(f"adapter {name!r}: layers.{i}.{field} is no LoraAB of tensors")


def adapter_rank(adapter: Adapter) -> int:
    """Returns the largest rank of an adapter's pairs."""
    return max((len(pair.a) for layer in adapter.layers for pair in layer if pair is not None), default=0)


def scaling(rank: int, alpha: float, *, use_rslora: bool = False) -> float:
    """Returns the factor of b @ a: alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732).

    Raises ValueError if it is not a finite number of fp32.
    """
    try:
        scale = alpha / (math.sqrt(rank) if use_rslora else rank)
    except OverflowError:  # integers may exceed every float
        scale = math.inf
    return check_scale(scale, "lora_alpha / r")


def check_scale(scale: float, name: str) -> float:
    """Returns `scale`. Raises ValueError if it is not a finite number of fp32, the dtype of the multiplication."""
    try:
        valid = not isinstance(scale, bool) and abs(scale) <= torch.finfo(torch.float32).max
    except TypeError:
        valid = False
    if not valid:
        value = f"{scale!r:.40}" if isinstance(scale, float) else f"a {type(scale).__name__}"
        raise ValueError(f"adapter: {name} must be a finite number within the range of float32, and is {value}")
    return scale


def init(
    model_config: ModelConfig, rank: int = 16, alpha: float = 32.0, target_modules: Sequence[str] = TARGET_MODULES,
    seed: int = 0, *, use_rslora: bool = False, device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Adapter:  # fmt: skip
    """Returns an adapter that changes nothing yet: a is uniform, as PEFT initializes it, and b is zero.

    The values depend on the seed and the type of device. `dtype` None is the model's.
    """
    for name in target_modules:
        if name not in TARGET_MODULES:
            raise ValueError(unknown_name_message("target", name, list(TARGET_MODULES)))
    check_int("rank", rank, -MAX_RANK, MAX_RANK)
    if rank < 1 or not target_modules:
        raise ValueError(f"an adapter of rank {rank} with {len(target_modules)} targets: both must be at least 1")
    generator = torch.Generator(device or torch.get_default_device()).manual_seed(seed)
    dtype, pairs = dtype or getattr(torch, model_config.dtype), {}
    for target in (x for x in iter_targets(model_config) if x.target_module in target_modules):
        rows, columns = target.rows.full_size, target.columns.full_size
        a = torch.empty(rank, columns, device=device, dtype=dtype)
        a.uniform_(-(columns**-0.5), columns**-0.5, generator=generator)
        pairs[target.key] = LoraAB(a, torch.zeros(rows, rank, device=device, dtype=dtype))
    return build_adapter(model_config, pairs, scaling(rank, alpha, use_rslora=use_rslora))


def check_same_shapes(target: Adapter, source: Adapter) -> None:
    """Raises ValueError if `source` has other pairs or shapes than `target`."""
    for i, layers in enumerate(zip(target.layers, source.layers, strict=True)):
        for field, pairs in zip(LayerLora._fields, zip(*layers, strict=True), strict=True):
            old, new = ([tuple(x.shape) for x in pair] if pair is not None else None for pair in pairs)
            if old != new:
                raise ValueError(f"adapter: layer {i} {field} is {old} here and {new} in the update")


@torch.no_grad()
def copy_adapter(target: Adapter, source: Adapter) -> None:
    """Writes `target` in place, casting. Raises ValueError if `source` has other pairs or shapes."""
    check_same_shapes(target, source)
    for x, y in zip(parameters(target), parameters(source), strict=True):
        x.copy_(y)


def merge(params: Params, model_config: ModelConfig, adapter: Adapter) -> Params:
    """Returns parameters with an adapter added in fp32 and rounded once; unchanged leaves are those of `params`.

    Differentiable in both. Raises ValueError for quantized parameters.
    """
    if is_quantized(params):
        raise ValueError(
            "merge: these parameters are quantized, and rounding would lose the adapter: merge it into parameters in "
            "full precision, then quantize; or serve it with Engine.add_adapter"
        )
    pairs = {target.key: pair for target, pair in target_pairs(adapter, model_config)}
    num_rows = {target.key: target.rows.full_size for target in iter_targets(model_config)}

    def add_update(weight: Tensor, pair: LoraAB | None) -> Tensor:
        if pair is None:
            return weight
        return (weight.float() + adapter.scale * (pair.b.float() @ pair.a.float())).to(weight.dtype)

    def merged(i: int, weight: Tensor, fields: tuple[str, ...]) -> Tensor:
        if not any((i, field) in pairs for field in fields):
            return weight
        slices = zip(weight.split([num_rows[i, field] for field in fields]), fields, strict=True)
        return torch.cat([add_update(x, pairs.get((i, field))) for x, field in slices])

    layers = [
        layer._replace(**{name: merged(i, getattr(layer, name), fields) for name, fields in PACKED_MODULES.items()})
        for i, layer in enumerate(params.layers)
    ]
    return params._replace(layers=tuple(layers))


def stack(adapters: Sequence[Adapter], model_config: ModelConfig, tp_shard: TPShard = UNSHARDED) -> StackedAdapters:
    """Returns a copy of adapters, stacked and padded to one rank, for a forward of several; index 0 is no adapter.

    Differentiable. With `tp_shard`, the tensors are the rank's shards of the adapters.
    """
    num_layers = model_config.num_layers
    adapters = [build_adapter(model_config, {}, 0.0), *(shard_adapter(x, model_config, tp_shard) for x in adapters)]
    like = next((x for adapter in adapters for x in parameters(adapter)), None)
    if like is None:
        raise ValueError("stack: none of the adapters changes anything")
    max_rank = max(map(adapter_rank, adapters))
    sizes = {target.key: (target.rows.size, target.columns.size) for target in iter_targets(model_config, tp_shard)}

    def padded(adapter: Adapter, i: int, field: str) -> LoraAB:
        rows, columns = sizes[i, field]
        a, b = getattr(adapter.layers[i], field) or (like.new_zeros(0, columns), like.new_zeros(rows, 0))
        return LoraAB(F.pad(a, (0, 0, 0, max_rank - len(a))), F.pad(b, (0, max_rank - b.shape[1])))

    def stacked(i: int, fields: tuple[str, ...]) -> StackedLora:
        packs = [[padded(adapter, i, field) for field in fields] for adapter in adapters]
        a = [rearrange([pair.a for pair in pack], "part r d -> (part r) d") for pack in packs]
        b = [torch.cat([pair.b for pair in pack]) for pack in packs]
        return StackedLora(torch.stack(a), torch.stack(b))

    layers = (LayerStackedLora(*(stacked(i, fields) for fields in PACKED_MODULES.values())) for i in range(num_layers))
    return StackedAdapters(tuple(layers), torch.tensor([float(x.scale) for x in adapters], device=like.device))
