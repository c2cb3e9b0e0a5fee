"""Low-rank adapters (LoRA, arXiv 2106.09685) as trees of tensors: made, read, saved, merged, and put side by side.

The files are PEFT's: adapter_config.json and adapter_model.safetensors.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from reprlib import repr
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastgen.checkpoint import weights
from fastgen.checkpoint.files import open_safetensors, read_json, read_shapes
from fastgen.checkpoint.weights import DimShard
from fastgen.config import LoraConfig, check_int, unknown_name_message
from fastgen.core.model_config import UNSHARDED, ModelConfig, TPShard
from fastgen.core.types import Adapter, LayerLora, LayerStackedLora, LoraAB, Params, StackedAdapters, StackedLora
from fastgen.distributed.tensor_parallel import TPGroup

PACKED_MODULES = {"qkv": ("q", "k", "v"), "out": ("out",), "gate_up": ("gate", "up"), "down": ("down",)}
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # as PEFT names them
MAX_RANK = 2**16  # of adapters that are not damaged
DEFAULT_RANK = 16  # for which there is room, where nobody says
PEFT_TENSOR_NAME = re.compile(
    r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.[^.]+)?\.weight"
)  # a model in memory has one more part
# Of adapter_config.json: what may be said of these, since it is what is computed here.
SUPPORTED_OPTIONS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others change the model, too
}  # fmt: skip
# And these must be absent, false or empty.
UNSUPPORTED_OPTIONS = (
    "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias", "use_qalora",
    "layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "use_bdlora",
    "arrow_config", "megatron_config", "monteclora_config", "kasa_config", "velora_config",
)  # fmt: skip


class LoraTarget(NamedTuple):
    """A matrix that may be changed, [rows, columns], by the model's name for it; and what a rank has of it."""

    layer_idx: int
    field: str  # of Changes
    name: str
    rows: DimShard
    columns: DimShard

    @property
    def target_module(self) -> str:
        return self.name.rpartition(".")[2]


def lora_targets(model_config: ModelConfig, tp_shard: TPShard = UNSHARDED) -> Iterator[LoraTarget]:
    """All of a model's, as `weights.declare` has them."""
    for i, layer in enumerate(weights.weight_specs(model_config, tp_shard).layers):
        for packed, names in PACKED_MODULES.items():
            leaf: Any = getattr(layer, packed)
            for field, part in zip(names, leaf.checkpoint_tensors, strict=True):
                yield LoraTarget(i, field, part.name.removesuffix(".weight"), *part.dim_shards)


def _build_adapter(model_config: ModelConfig, pairs: Mapping[tuple[int, str], LoraAB], scale: float) -> Adapter:
    layers = ({f: pairs[i, f] for f in LayerLora._fields if (i, f) in pairs} for i in range(model_config.num_layers))
    return Adapter(tuple(LayerLora(**x) for x in layers), scale)


def _target_pairs(
    adapter: Adapter, model_config: ModelConfig, tp_shard: TPShard = UNSHARDED
) -> Iterator[tuple[LoraTarget, LoraAB]]:
    """Where an adapter changes something, and how. ValueError if it is another model's, or its scale is not finite."""
    _check_scale(adapter.scale, "scale")
    if len(adapter.layers) != model_config.num_layers:
        raise ValueError(f"an adapter of {len(adapter.layers)} layers for a model of {model_config.num_layers}")
    for site in lora_targets(model_config, tp_shard):
        pair: LoraAB | None = getattr(adapter.layers[site.layer_idx], site.field)
        if pair is None:
            continue
        a, b = tuple(pair.a.shape), tuple(pair.b.shape)
        if len(a) != 2 or len(b) != 2 or (a[1], b[0], b[1]) != (site.columns.full_size, site.rows.full_size, a[0]):
            wanted = f"a [r, {site.columns.full_size}] and b [{site.rows.full_size}, r]"
            raise ValueError(f"adapter: {site.name} has a {[*a]} and b {[*b]}, where {wanted} are wanted")
        yield site, pair


def shard_adapter(adapter: Adapter, model_config: ModelConfig, tp_shard: TPShard) -> Adapter:
    """What a rank has of an adapter, as views: of a, the columns of its part of the depth; of b, its rows."""
    pairs = {
        (site.layer_idx, site.field): LoraAB(pair.a[:, site.columns.slice], pair.b[site.rows.slice])
        for site, pair in _target_pairs(adapter, model_config, tp_shard)
    }
    return _build_adapter(model_config, pairs, adapter.scale)


def parameters(adapter: Adapter) -> list[Tensor]:
    """The tensors of an adapter, for an optimizer."""
    return [x for x in tree_leaves(adapter) if isinstance(x, Tensor)]


def to_cpu(adapter: Adapter) -> Adapter:
    """For another process, which has a device of its own."""
    return tree_map(lambda x: x.detach().cpu() if isinstance(x, Tensor) else x, adapter)


def with_scale(adapter: Adapter, scale: float | None) -> Adapter:
    """Returns the adapter with another scale, unless that is None. ValueError for what is no adapter."""
    _check_structure("", adapter)
    return adapter if scale is None else adapter._replace(scale=scale)


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise ValueError(f"an adapter's name is a text, got {name!r:.100}")


def _check_structure(name: str, adapter: Any) -> None:
    """Raises ValueError for what is no tree of an adapter, before anything reads it."""
    if not isinstance(adapter, Adapter) or not isinstance(adapter.layers, tuple):
        raise ValueError(
            f"adapter {name!r}: a {type(adapter).__name__} is no fastgen.Adapter (load_adapters reads files)"
        )
    if isinstance(adapter.scale, bool) or not isinstance(adapter.scale, int | float):
        raise ValueError(f"adapter {name!r}: its scale must be a number, got {adapter.scale!r:.100}")
    for i, layer in enumerate(adapter.layers):
        for field, pair in layer._asdict().items() if isinstance(layer, LayerLora) else [("", layer)]:
            if pair is not None and not (isinstance(pair, LoraAB) and all(isinstance(x, Tensor) for x in pair)):
                raise ValueError(f"adapter {name!r}: layers.{i}.{field} is no LowRank of tensors")


def adapter_rank(adapter: Adapter) -> int:
    """The largest rank of its changes."""
    return max((len(pair.a) for layer in adapter.layers for pair in layer if pair is not None), default=0)


def scaling(rank: int, alpha: float, *, use_rslora: bool = False) -> float:
    """What changes are multiplied by: alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732).

    ValueError if that is not a finite number of fp32.
    """
    try:
        scale = alpha / (math.sqrt(rank) if use_rslora else rank)
    except (OverflowError, ZeroDivisionError):  # whole numbers may be beyond all others
        scale = math.inf
    return _check_scale(scale, "lora_alpha / r")


def _check_scale(scale: float, name: str) -> float:
    """`scale`. ValueError if it is not a finite number in fp32, in which changes are multiplied by it."""
    try:
        valid = not isinstance(scale, bool) and abs(scale) <= torch.finfo(torch.float32).max
    except TypeError:
        valid = False
    if not valid:
        said = f"{scale!r:.40}" if isinstance(scale, float) else f"a {type(scale).__name__}"
        raise ValueError(f"adapter: {name} must be a finite number within the range of float32, and is {said}")
    return scale


def init(
    model_config: ModelConfig,
    rank: int = 16,
    alpha: float = 32.0,
    target_modules: Sequence[str] = TARGET_MODULES,
    seed: int = 0,
    *,
    use_rslora: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """An adapter that changes nothing yet: a is drawn as PEFT draws it, b is zero.

    The same for the same seed and kind of device; `dtype` None is the model's.
    """
    for name in target_modules:
        if name not in TARGET_MODULES:
            raise ValueError(unknown_name_message("target", name, list(TARGET_MODULES)))
    check_int("rank", rank, -MAX_RANK, MAX_RANK)
    if rank < 1 or not target_modules:
        raise ValueError(f"an adapter of rank {rank} with {len(target_modules)} targets: both must be at least 1")
    generator = torch.Generator(device or torch.get_default_device()).manual_seed(seed)
    kind, pairs = dtype or getattr(torch, model_config.dtype), {}
    for site in (x for x in lora_targets(model_config) if x.target_module in target_modules):
        rows, columns = site.rows.full_size, site.columns.full_size
        a = torch.empty(rank, columns, device=device, dtype=kind)
        a.uniform_(-(columns**-0.5), columns**-0.5, generator=generator)
        pairs[site.layer_idx, site.field] = LoraAB(a, torch.zeros(rows, rank, device=device, dtype=kind))
    return _build_adapter(model_config, pairs, scaling(rank, alpha, use_rslora=use_rslora))


def named_tensors(adapter: Adapter, model_config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(PEFT's name, tensor) of every tensor."""
    for site, pair in _target_pairs(adapter, model_config):
        for letter, tensor in zip("AB", pair, strict=True):
            yield f"base_model.model.{site.name}.lora_{letter}.weight", tensor


def _pairs_from_peft(
    tensors: Iterable[tuple[str, Tensor]], model_config: ModelConfig, source: str
) -> dict[tuple[int, str], LoraAB]:
    """Pairs from tensors with PEFT's names. ValueError for other names, and for halves of pairs."""
    places = {site.name: site for site in lora_targets(model_config)}
    found: dict[LoraTarget, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        match = PEFT_TENSOR_NAME.fullmatch(name)
        site = places.get(match[1]) if match else None
        if match is None or site is None:
            raise ValueError(
                f"{source}: {name} changes nothing that can be: {', '.join(TARGET_MODULES)} of {model_config.num_layers} layers"
            )
        found.setdefault(site, {})[match[2]] = tensor
    if half := [site.name for site, pair in found.items() if len(pair) < 2]:
        raise ValueError(f"{source}: one of lora_A and lora_B is missing for {', '.join(half[:8])}")
    if not found:
        raise ValueError(f"{source}: no tensors of an adapter")
    return {(site.layer_idx, site.field): LoraAB(pair["A"], pair["B"]) for site, pair in found.items()}


def check_finite(name: str, adapter: Adapter, dtype: torch.dtype, tp_group: TPGroup | None = None) -> None:
    """Raises ValueError, naming the tensors, for values that are NaN or infinite, or would be in `dtype`; of one rank's
    part if there is a `group`, on all of its ranks."""
    wrong = None
    advice = "run nothing with it before they are mended"
    tensors = [(f"layers.{i}.{field}.{letter}", x, dtype) for i, layer in enumerate(adapter.layers)
               for field, pair in zip(LayerLora._fields, layer, strict=True) if pair is not None
               for letter, x in zip(LoraAB._fields, pair, strict=True)]  # fmt: skip
    try:
        for place, x, _ in tensors:
            if not x.is_floating_point() or x.is_meta:
                kind = "on the meta device" if x.is_meta else x.dtype
                raise ValueError(f"adapter {name!r}: {place} is {kind}: its tensors must be of floating point")
        weights.raise_if_not_finite(tensors, f"adapter {name!r}", advice)
    except ValueError as e:
        wrong = e
    if tp_group is not None and not tp_group.all_reduce_min(int(wrong is None)):
        wrong = wrong or ValueError(f"adapter {name!r}: another rank's part has NaN or infinite values; {advice}")
    if wrong is not None:
        raise wrong


@torch.no_grad()
def copy_adapter(target: Adapter, source: Adapter) -> None:
    """Writes `target` in place, casting. ValueError if `source` has other changes or shapes."""
    for i, (mine, other) in enumerate(zip(target.layers, source.layers, strict=True)):
        for field, x, y in zip(LayerLora._fields, mine, other, strict=True):
            shapes = [None if pair is None else [tuple(t.shape) for t in pair] for pair in (x, y)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"adapter: layer {i} {field} is {shapes[0]} here and {shapes[1]} in the update")
    for x, y in zip(parameters(target), parameters(source), strict=True):
        x.copy_(y)


def update(
    adapter: Adapter, model_config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], *, source: str = "update"
) -> None:
    """Writes `adapter` in place from tensors with PEFT's names, all of them."""
    copy_adapter(adapter, _build_adapter(model_config, _pairs_from_peft(tensors, model_config, source), adapter.scale))


def read_peft_config(folder: str | Path) -> dict[str, Any]:
    """PEFT's adapter_config.json, of a folder or hub id. ValueError for a kind of adapter that is not computed here."""
    path = weights.resolve(folder)
    if not (path / "adapter_config.json").is_file() or not (path / "adapter_model.safetensors").is_file():
        raise ValueError(f"{path}: not an adapter: there must be adapter_config.json and adapter_model.safetensors")
    config = read_json(path / "adapter_config.json")
    r, alpha = config.get("r"), config.get("lora_alpha")
    if type(r) is not int or not 1 <= r <= MAX_RANK or type(alpha) not in (int, float):
        wanted = f"where numbers are wanted, of r a whole one from 1 to {MAX_RANK}"
        raise ValueError(f"{path}: adapter_config.json has r={repr(r)} and lora_alpha={repr(alpha)}, {wanted}")
    if config.get("use_rslora") not in (None, False, True):
        raise ValueError(f"{path}: adapter_config.json has use_rslora={repr(config['use_rslora'])}: true or false")
    try:
        scaling(r, cast(float, alpha), use_rslora=bool(config.get("use_rslora")))
    except ValueError as e:
        raise ValueError(f"{path}: adapter_config.json: {e}") from e
    for name, allowed in SUPPORTED_OPTIONS.items():
        if config.get(name, allowed[0]) not in allowed:
            raise ValueError(
                f"{path}: adapters with {name}={config[name]!r} are not supported; merge it into the model"
            )
    for name in UNSUPPORTED_OPTIONS:
        if config.get(name):
            raise ValueError(f"{path}: adapters with {name} are not supported; merge it into the model")
    for name, shape in read_shapes(path / "adapter_model.safetensors").items():  # before there is room for such a rank
        if (match := PEFT_TENSOR_NAME.fullmatch(name)) and match[2] == "A" and shape[:1] != (r,):
            raise ValueError(f"{path}: {match[1]} has rank {'×'.join(map(str, shape[:1]))}, the config says {r}")
    return config


def expand_lora_config(lora_config: LoraConfig, folders: Mapping[str, str | Path]) -> LoraConfig:
    """`limits`, with room for the adapters of these folders at least. ValueError as `read_config`."""
    if not folders:
        return lora_config
    ranks = [read_peft_config(folder)["r"] for folder in folders.values()]
    return LoraConfig(
        max_adapters=max(lora_config.max_adapters, len(folders)), max_rank=lora_config.max_rank or max(ranks)
    )


def load(
    folder: str | Path,
    model_config: ModelConfig,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """From PEFT's files, in a folder or of a hub id; `dtype` None is the file's.

    ValueError for a kind of adapter that is not computed here, by the name of the option.
    """
    path, config = weights.resolve(folder), read_peft_config(folder)
    with open_safetensors(path / "adapter_model.safetensors") as f:
        tensors = ((name, f.get_tensor(name).to(device or torch.get_default_device(), dtype)) for name in f.keys())
        pairs = _pairs_from_peft(tensors, model_config, str(path))
    adapter = _build_adapter(
        model_config, pairs, scaling(config["r"], config["lora_alpha"], use_rslora=bool(config.get("use_rslora")))
    )
    try:
        list(_target_pairs(adapter, model_config))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    return adapter


def save(folder: str | Path, model_config: ModelConfig, adapter: Adapter, *, base_model: str | None = None) -> None:
    """PEFT's files; `base` says which model it is for. An older adapter in `folder` is replaced."""
    pairs = [*_target_pairs(adapter, model_config)]
    ranks, targets = sorted({len(pair.a) for _, pair in pairs}), {site.target_module for site, _ in pairs}
    if len(ranks) != 1:
        raise ValueError(f"save: changes of ranks {ranks or 'none'}, where PEFT's files have one for all")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": True,
        "r": ranks[0], "lora_alpha": adapter.scale * ranks[0], "lora_dropout": 0.0, "use_rslora": False,
        "bias": "none", "fan_in_fan_out": False, "target_modules": [x for x in TARGET_MODULES if x in targets],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    tensors = {name: x.detach().cpu().contiguous().clone() for name, x in named_tensors(adapter, model_config)}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def merge(params: Params, model_config: ModelConfig, adapter: Adapter) -> Params:
    """Parameters with the adapter's changes added, in fp32 and rounded once; what it does not change is shared.

    Differentiable in both.
    """
    changed = {(site.layer_idx, site.field): pair for site, pair in _target_pairs(adapter, model_config)}
    rows = {(site.layer_idx, site.field): site.rows.full_size for site in lora_targets(model_config)}

    def matrix(i: int, weight: Tensor, names: tuple[str, ...]) -> Tensor:
        if not any((i, name) in changed for name in names):
            return weight
        parts = []
        for name, part in zip(names, weight.split([rows[i, name] for name in names]), strict=True):
            pair = changed.get((i, name))
            change = 0 if pair is None else adapter.scale * (pair.b.float() @ pair.a.float())
            parts.append((part.float() + change).to(part.dtype))
        return torch.cat(parts)

    layers = (
        layer._replace(**{packed: matrix(i, getattr(layer, packed), names) for packed, names in PACKED_MODULES.items()})
        for i, layer in enumerate(params.layers)
    )
    return params._replace(layers=tuple(layers))


def stack(adapters: Sequence[Adapter], model_config: ModelConfig, tp_shard: TPShard = UNSHARDED) -> StackedAdapters:
    """Adapters side by side for a forward, numbered from 1 as given; a copy. Differentiable.

    `place`: what a rank has of them.
    """
    adapters = [shard_adapter(adapter, model_config, tp_shard) for adapter in adapters]
    like = next((x for adapter in adapters for x in parameters(adapter)), None)
    if like is None:
        raise ValueError("stack: none of the adapters changes anything")
    r = max(map(adapter_rank, adapters))
    size = {
        (site.layer_idx, site.field): (site.rows.size, site.columns.size)
        for site in lora_targets(model_config, tp_shard)
    }

    def side_by_side(i: int, names: tuple[str, ...]) -> StackedLora:
        a, b = list[Tensor](), list[Tensor]()
        for adapter in (None, *adapters):
            both = []
            for name in names:
                rows, columns = size[i, name]
                pair = None if adapter is None else getattr(adapter.layers[i], name)
                x, y = pair or (like.new_zeros(0, columns), like.new_zeros(rows, 0))
                both.append((F.pad(x, (0, 0, 0, r - x.shape[0])), F.pad(y, (0, r - y.shape[1]))))
            a.append(torch.cat([x for x, _ in both]))
            b.append(torch.cat([y for _, y in both]))
        return StackedLora(torch.stack(a), torch.stack(b))

    layers = (
        LayerStackedLora(**{packed: side_by_side(i, names) for packed, names in PACKED_MODULES.items()})
        for i in range(model_config.num_layers)
    )
    return StackedAdapters(tuple(layers), torch.tensor([0.0, *(x.scale for x in adapters)], device=like.device))


def allocate_adapters(
    model_config: ModelConfig,
    max_adapters: int,
    max_rank: int,
    device: torch.device,
    dtype: torch.dtype,
    tp_shard: TPShard = UNSHARDED,
) -> StackedAdapters:
    """Room for so many adapters, and the first, which is none; on a rank, for its share of them."""

    def zeros(packed: str, layer: Any) -> StackedLora:
        parts, (rows, columns) = len(PACKED_MODULES[packed]), getattr(layer, packed).shape
        shapes = (max_adapters + 1, parts * max_rank, columns), (max_adapters + 1, rows, max_rank)
        return StackedLora(*(torch.zeros(shape, device=device, dtype=dtype) for shape in shapes))

    declared = weights.weight_specs(model_config, tp_shard).layers
    layers = tuple(LayerStackedLora(*(zeros(packed, layer) for packed in PACKED_MODULES)) for layer in declared)
    return StackedAdapters(layers, torch.zeros(max_adapters + 1, device=device))


def adapter_views(
    adapters: StackedAdapters, model_config: ModelConfig, adapter_idx: int, like: Adapter, tp_shard: TPShard = UNSHARDED
) -> Adapter:
    """The i-th of several, as a tree of views with the changes and ranks of `like`, a whole one."""
    pairs = {}
    where = {field: (packed, j) for packed, names in PACKED_MODULES.items() for j, field in enumerate(names)}
    size = {(site.layer_idx, site.field): site.rows.size for site in lora_targets(model_config, tp_shard)}
    for site, pair in _target_pairs(like, model_config, tp_shard):
        packed, j = where[site.field]
        stack: StackedLora = getattr(adapters.layers[site.layer_idx], packed)
        r, room = len(pair.a), stack.b.shape[-1]
        first = sum(size[site.layer_idx, name] for name in PACKED_MODULES[packed][:j])
        a, b = stack.a[adapter_idx, j * room : j * room + r], stack.b[adapter_idx, first : first + site.rows.size, :r]
        pairs[site.layer_idx, site.field] = LoraAB(a, b)
    return _build_adapter(model_config, pairs, like.scale)


class LoadedAdapter(NamedTuple):
    """An adapter of an engine: its number, its tensors (or a rank's share of them) as views of the engine's, and how
    often it was changed: also under an earlier adapter of that name."""

    adapter_idx: int
    adapter: Adapter
    version: int


class AdapterManager:
    """The adapters of one engine by name, in buffers that stay where they are: captured steps read them."""

    def __init__(
        self,
        model_config: ModelConfig,
        lora_config: LoraConfig,
        device: torch.device,
        dtype: torch.dtype,
        tp_group: TPGroup | None = None,
    ) -> None:
        self.model_config, self.lora_config, self.dtype, self.tp_group = model_config, lora_config, dtype, tp_group
        self.tp_shard = UNSHARDED if tp_group is None else tp_group.shard
        self.max_rank = lora_config.max_rank or DEFAULT_RANK
        self.adapters = allocate_adapters(
            model_config, lora_config.max_adapters, self.max_rank, device, dtype, self.tp_shard
        )
        self.loaded: dict[str, LoadedAdapter] = {}
        self.versions = [0] * (lora_config.max_adapters + 1)  # of each, by its number; 0 is no adapter
        self._last_versions: dict[str, int] = {}  # the version that each name had last

    def __getitem__(self, name: str) -> LoadedAdapter:
        """ValueError, with those that there are."""
        _check_name(name)
        if name not in self.loaded:
            raise ValueError(
                unknown_name_message("adapter", name, [*self.loaded])
                if self.loaded
                else f"no adapter {name!r}: add it first"
            )
        return self.loaded[name]

    @torch.no_grad()
    def add(self, name: str, adapter: Adapter) -> LoadedAdapter:
        """A copy of an adapter, a whole one, joins the others."""
        _check_name(name)
        _check_structure(name, adapter)
        if not name or name in self.loaded:
            raise ValueError(f"adapter {name!r}: " + ("it is there already" if name else "it needs a name"))
        if adapter_rank(adapter) > self.max_rank:
            raise ValueError(
                f"adapter {name!r} has rank {adapter_rank(adapter)}: raise lora.max_rank ({self.max_rank})"
            )
        free = {*range(1, self.lora_config.max_adapters + 1)} - {x.adapter_idx for x in self.loaded.values()}
        if not free:
            most = self.lora_config.max_adapters
            raise ValueError(f"adapter {name!r}: {most} are there already; remove one or raise lora.max_adapters")
        mine = shard_adapter(adapter, self.model_config, self.tp_shard)
        check_finite(name, adapter, self.dtype)
        i = min(free)
        for x in tree_leaves(self.adapters.layers):  # whoever still has views of the last one may have written there
            x[i].zero_()
        params = adapter_views(self.adapters, self.model_config, i, adapter, self.tp_shard)
        copy_adapter(params, mine)
        self.adapters.scale[i] = adapter.scale
        return self._register(name, LoadedAdapter(i, params, self._last_versions.get(name, -1) + 1))

    def _register(self, name: str, loaded_adapter: LoadedAdapter) -> LoadedAdapter:
        self.loaded[name] = loaded_adapter
        self.versions[loaded_adapter.adapter_idx] = self._last_versions[name] = loaded_adapter.version
        return loaded_adapter

    @torch.no_grad()
    def remove(self, name: str) -> LoadedAdapter:
        """Make room; what had its views has zeros."""
        held = self[name]
        for x in parameters(held.adapter):
            x.zero_()
        self.adapters.scale[held.adapter_idx] = 0
        return self.loaded.pop(name)

    @torch.no_grad()
    def update(self, name: str, adapter: Adapter | None = None) -> LoadedAdapter:
        """It has changed: in place, or now to a copy of `adapter`, of the same shapes."""
        held = self[name]
        if adapter is None:
            check_finite(name, held.adapter, self.dtype, self.tp_group)
        else:
            _check_structure(name, adapter)
            check_finite(name, adapter, self.dtype)
            copy_adapter(held.adapter, shard_adapter(adapter, self.model_config, self.tp_shard))
            self.adapters.scale[held.adapter_idx] = adapter.scale
            held = held._replace(adapter=held.adapter._replace(scale=adapter.scale))
        return self._register(name, held._replace(version=held.version + 1))

    @property
    def num_bytes(self) -> int:
        """Of memory on the device."""
        return sum(x.nbytes for x in tree_leaves(self.adapters))
