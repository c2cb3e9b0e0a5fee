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

from fastgen.config import Lora, check_int, unknown
from fastgen.models import weights
from fastgen.models.files import open_safetensors, read_json, read_shapes
from fastgen.models.spec import WHOLE, Place, Spec
from fastgen.models.weights import Cut
from fastgen.parallel import Group
from fastgen.types import Adapter, Adapters, Changes, LowRank, Params, Stack, Stacks

PACKED = {"qkv": ("q", "k", "v"), "out": ("out",), "gate_up": ("gate", "up"), "down": ("down",)}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # as PEFT names them
MOST_RANK = 2**16  # of adapters that are not damaged
RANK = 16  # for which there is room, where nobody says
NAME = re.compile(
    r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.[^.]+)?\.weight"
)  # a model in memory has one more part
# Of adapter_config.json: what may be said of these, since it is what is computed here.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others change the model, too
}  # fmt: skip
# And these must be absent, false or empty.
REFUSED = (
    "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias", "use_qalora",
    "layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "use_bdlora",
    "arrow_config", "megatron_config", "monteclora_config", "kasa_config", "velora_config",
)  # fmt: skip


class Site(NamedTuple):
    """A matrix that may be changed, [rows, columns], by the model's name for it; and what a rank has of it."""

    layer: int
    field: str  # of Changes
    name: str
    rows: Cut
    columns: Cut

    @property
    def target(self) -> str:
        return self.name.rpartition(".")[2]


def sites(spec: Spec, place: Place = WHOLE) -> Iterator[Site]:
    """All of a model's, as `weights.declare` has them."""
    for i, layer in enumerate(weights.declare(spec, place).layers):
        for packed, names in PACKED.items():
            leaf: Any = getattr(layer, packed)
            for field, part in zip(names, leaf.parts, strict=True):
                yield Site(i, field, part.name.removesuffix(".weight"), *part.cuts)


def _tree(spec: Spec, pairs: Mapping[tuple[int, str], LowRank], scale: float) -> Adapter:
    layers = ({f: pairs[i, f] for f in Changes._fields if (i, f) in pairs} for i in range(spec.layers))
    return Adapter(tuple(Changes(**x) for x in layers), scale)


def _pairs(adapter: Adapter, spec: Spec, place: Place = WHOLE) -> Iterator[tuple[Site, LowRank]]:
    """Where an adapter changes something, and how. ValueError if it is another model's, or its scale is not finite."""
    _checked(adapter.scale, "scale")
    if len(adapter.layers) != spec.layers:
        raise ValueError(f"an adapter of {len(adapter.layers)} layers for a model of {spec.layers}")
    for site in sites(spec, place):
        pair: LowRank | None = getattr(adapter.layers[site.layer], site.field)
        if pair is None:
            continue
        a, b = tuple(pair.a.shape), tuple(pair.b.shape)
        if len(a) != 2 or len(b) != 2 or (a[1], b[0], b[1]) != (site.columns.whole, site.rows.whole, a[0]):
            wanted = f"a [r, {site.columns.whole}] and b [{site.rows.whole}, r]"
            raise ValueError(f"adapter: {site.name} has a {[*a]} and b {[*b]}, where {wanted} are wanted")
        yield site, pair


def share(adapter: Adapter, spec: Spec, place: Place) -> Adapter:
    """What a rank has of an adapter, as views: of a, the columns of its part of the depth; of b, its rows."""
    pairs = {
        (site.layer, site.field): LowRank(pair.a[:, site.columns.slice], pair.b[site.rows.slice])
        for site, pair in _pairs(adapter, spec, place)
    }
    return _tree(spec, pairs, adapter.scale)


def leaves(adapter: Adapter) -> list[Tensor]:
    """The tensors of an adapter, for an optimizer."""
    return [x for x in tree_leaves(adapter) if isinstance(x, Tensor)]


def on_host(adapter: Adapter) -> Adapter:
    """For another process, which has a device of its own."""
    return tree_map(lambda x: x.detach().cpu() if isinstance(x, Tensor) else x, adapter)


def scaled(adapter: Adapter, scale: float | None) -> Adapter:
    """Returns the adapter with another scale, unless that is None. ValueError for what is no adapter."""
    _check_tree("", adapter)
    return adapter if scale is None else adapter._replace(scale=scale)


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise ValueError(f"an adapter's name is a text, got {name!r:.100}")


def _check_tree(name: str, adapter: Any) -> None:
    """Raises ValueError for what is no tree of an adapter, before anything reads it."""
    if not isinstance(adapter, Adapter) or not isinstance(adapter.layers, tuple):
        raise ValueError(
            f"adapter {name!r}: a {type(adapter).__name__} is no fastgen.Adapter (load_adapters reads files)"
        )
    if isinstance(adapter.scale, bool) or not isinstance(adapter.scale, int | float):
        raise ValueError(f"adapter {name!r}: its scale must be a number, got {adapter.scale!r:.100}")
    for i, layer in enumerate(adapter.layers):
        for field, pair in layer._asdict().items() if isinstance(layer, Changes) else [("", layer)]:
            if pair is not None and not (isinstance(pair, LowRank) and all(isinstance(x, Tensor) for x in pair)):
                raise ValueError(f"adapter {name!r}: layers.{i}.{field} is no LowRank of tensors")


def rank(adapter: Adapter) -> int:
    """The largest rank of its changes."""
    return max((len(pair.a) for layer in adapter.layers for pair in layer if pair is not None), default=0)


def scaling(rank: int, alpha: float, *, rslora: bool = False) -> float:
    """What changes are multiplied by: alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732).

    ValueError if that is not a finite number of fp32.
    """
    try:
        scale = alpha / (math.sqrt(rank) if rslora else rank)
    except (OverflowError, ZeroDivisionError):  # whole numbers may be beyond all others
        scale = math.inf
    return _checked(scale, "lora_alpha / r")


def _checked(scale: float, name: str) -> float:
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
    spec: Spec,
    rank: int = 16,
    alpha: float = 32.0,
    targets: Sequence[str] = TARGETS,
    seed: int = 0,
    *,
    rslora: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """An adapter that changes nothing yet: a is drawn as PEFT draws it, b is zero.

    The same for the same seed and kind of device; `dtype` None is the model's.
    """
    for name in targets:
        if name not in TARGETS:
            raise ValueError(unknown("target", name, list(TARGETS)))
    check_int("rank", rank, -MOST_RANK, MOST_RANK)
    if rank < 1 or not targets:
        raise ValueError(f"an adapter of rank {rank} with {len(targets)} targets: both must be at least 1")
    generator = torch.Generator(device or torch.get_default_device()).manual_seed(seed)
    kind, pairs = dtype or getattr(torch, spec.dtype), {}
    for site in (x for x in sites(spec) if x.target in targets):
        rows, columns = site.rows.whole, site.columns.whole
        a = torch.empty(rank, columns, device=device, dtype=kind)
        a.uniform_(-(columns**-0.5), columns**-0.5, generator=generator)
        pairs[site.layer, site.field] = LowRank(a, torch.zeros(rows, rank, device=device, dtype=kind))
    return _tree(spec, pairs, scaling(rank, alpha, rslora=rslora))


def named(adapter: Adapter, spec: Spec) -> Iterator[tuple[str, Tensor]]:
    """(PEFT's name, tensor) of every tensor."""
    for site, pair in _pairs(adapter, spec):
        for letter, tensor in zip("AB", pair, strict=True):
            yield f"base_model.model.{site.name}.lora_{letter}.weight", tensor


def _by_name(tensors: Iterable[tuple[str, Tensor]], spec: Spec, source: str) -> dict[tuple[int, str], LowRank]:
    """Pairs from tensors with PEFT's names. ValueError for other names, and for halves of pairs."""
    places = {site.name: site for site in sites(spec)}
    found: dict[Site, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        match = NAME.fullmatch(name)
        site = places.get(match[1]) if match else None
        if match is None or site is None:
            raise ValueError(
                f"{source}: {name} changes nothing that can be: {', '.join(TARGETS)} of {spec.layers} layers"
            )
        found.setdefault(site, {})[match[2]] = tensor
    if half := [site.name for site, pair in found.items() if len(pair) < 2]:
        raise ValueError(f"{source}: one of lora_A and lora_B is missing for {', '.join(half[:8])}")
    if not found:
        raise ValueError(f"{source}: no tensors of an adapter")
    return {(site.layer, site.field): LowRank(pair["A"], pair["B"]) for site, pair in found.items()}


def check(name: str, adapter: Adapter, dtype: torch.dtype, group: Group | None = None) -> None:
    """Raises ValueError, naming the tensors, for values that are NaN or infinite, or would be in `dtype`; of one rank's
    part if there is a `group`, on all of its ranks."""
    wrong = None
    advice = "run nothing with it before they are mended"
    tensors = [(f"layers.{i}.{field}.{letter}", x, dtype) for i, layer in enumerate(adapter.layers)
               for field, pair in zip(Changes._fields, layer, strict=True) if pair is not None
               for letter, x in zip(LowRank._fields, pair, strict=True)]  # fmt: skip
    try:
        for place, x, _ in tensors:
            if not x.is_floating_point() or x.is_meta:
                kind = "on the meta device" if x.is_meta else x.dtype
                raise ValueError(f"adapter {name!r}: {place} is {kind}: its tensors must be of floating point")
        weights.check_finite(tensors, f"adapter {name!r}", advice)
    except ValueError as e:
        wrong = e
    if group is not None and not group.least(int(wrong is None)):
        wrong = wrong or ValueError(f"adapter {name!r}: another rank's part has NaN or infinite values; {advice}")
    if wrong is not None:
        raise wrong


@torch.no_grad()
def copy(target: Adapter, source: Adapter) -> None:
    """Writes `target` in place, casting. ValueError if `source` has other changes or shapes."""
    for i, (mine, other) in enumerate(zip(target.layers, source.layers, strict=True)):
        for field, x, y in zip(Changes._fields, mine, other, strict=True):
            shapes = [None if pair is None else [tuple(t.shape) for t in pair] for pair in (x, y)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"adapter: layer {i} {field} is {shapes[0]} here and {shapes[1]} in the update")
    for x, y in zip(leaves(target), leaves(source), strict=True):
        x.copy_(y)


def update(adapter: Adapter, spec: Spec, tensors: Iterable[tuple[str, Tensor]], *, source: str = "update") -> None:
    """Writes `adapter` in place from tensors with PEFT's names, all of them."""
    copy(adapter, _tree(spec, _by_name(tensors, spec, source), adapter.scale))


def read_config(folder: str | Path) -> dict[str, Any]:
    """PEFT's adapter_config.json, of a folder or hub id. ValueError for a kind of adapter that is not computed here."""
    path = weights.resolve(folder)
    if not (path / "adapter_config.json").is_file() or not (path / "adapter_model.safetensors").is_file():
        raise ValueError(f"{path}: not an adapter: there must be adapter_config.json and adapter_model.safetensors")
    config = read_json(path / "adapter_config.json")
    r, alpha = config.get("r"), config.get("lora_alpha")
    if type(r) is not int or not 1 <= r <= MOST_RANK or type(alpha) not in (int, float):
        wanted = f"where numbers are wanted, of r a whole one from 1 to {MOST_RANK}"
        raise ValueError(f"{path}: adapter_config.json has r={repr(r)} and lora_alpha={repr(alpha)}, {wanted}")
    if config.get("use_rslora") not in (None, False, True):
        raise ValueError(f"{path}: adapter_config.json has use_rslora={repr(config['use_rslora'])}: true or false")
    try:
        scaling(r, cast(float, alpha), rslora=bool(config.get("use_rslora")))
    except ValueError as e:
        raise ValueError(f"{path}: adapter_config.json: {e}") from e
    for name, allowed in PLAIN.items():
        if config.get(name, allowed[0]) not in allowed:
            raise ValueError(
                f"{path}: adapters with {name}={config[name]!r} are not supported; merge it into the model"
            )
    for name in REFUSED:
        if config.get(name):
            raise ValueError(f"{path}: adapters with {name} are not supported; merge it into the model")
    for name, shape in read_shapes(path / "adapter_model.safetensors").items():  # before there is room for such a rank
        if (match := NAME.fullmatch(name)) and match[2] == "A" and shape[:1] != (r,):
            raise ValueError(f"{path}: {match[1]} has rank {'×'.join(map(str, shape[:1]))}, the config says {r}")
    return config


def room(limits: Lora, folders: Mapping[str, str | Path]) -> Lora:
    """`limits`, with room for the adapters of these folders at least. ValueError as `read_config`."""
    if not folders:
        return limits
    ranks = [read_config(folder)["r"] for folder in folders.values()]
    return Lora(max_adapters=max(limits.max_adapters, len(folders)), max_rank=limits.max_rank or max(ranks))


def load(
    folder: str | Path, spec: Spec, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Adapter:
    """From PEFT's files, in a folder or of a hub id; `dtype` None is the file's.

    ValueError for a kind of adapter that is not computed here, by the name of the option.
    """
    path, config = weights.resolve(folder), read_config(folder)
    with open_safetensors(path / "adapter_model.safetensors") as f:
        tensors = ((name, f.get_tensor(name).to(device or torch.get_default_device(), dtype)) for name in f.keys())
        pairs = _by_name(tensors, spec, str(path))
    adapter = _tree(spec, pairs, scaling(config["r"], config["lora_alpha"], rslora=bool(config.get("use_rslora"))))
    try:
        list(_pairs(adapter, spec))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    return adapter


def save(folder: str | Path, spec: Spec, adapter: Adapter, *, base: str | None = None) -> None:
    """PEFT's files; `base` says which model it is for. An older adapter in `folder` is replaced."""
    pairs = [*_pairs(adapter, spec)]
    ranks, targets = sorted({len(pair.a) for _, pair in pairs}), {site.target for site, _ in pairs}
    if len(ranks) != 1:
        raise ValueError(f"save: changes of ranks {ranks or 'none'}, where PEFT's files have one for all")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": ranks[0], "lora_alpha": adapter.scale * ranks[0], "lora_dropout": 0.0, "use_rslora": False,
        "bias": "none", "fan_in_fan_out": False, "target_modules": [x for x in TARGETS if x in targets],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    tensors = {name: x.detach().cpu().contiguous().clone() for name, x in named(adapter, spec)}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def merge(params: Params, spec: Spec, adapter: Adapter) -> Params:
    """Parameters with the adapter's changes added, in fp32 and rounded once; what it does not change is shared.

    Differentiable in both.
    """
    changed = {(site.layer, site.field): pair for site, pair in _pairs(adapter, spec)}
    rows = {(site.layer, site.field): site.rows.whole for site in sites(spec)}

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
        layer._replace(**{packed: matrix(i, getattr(layer, packed), names) for packed, names in PACKED.items()})
        for i, layer in enumerate(params.layers)
    )
    return params._replace(layers=tuple(layers))


def stack(adapters: Sequence[Adapter], spec: Spec, place: Place = WHOLE) -> Adapters:
    """Adapters side by side for a forward, numbered from 1 as given; a copy. Differentiable.

    `place`: what a rank has of them.
    """
    adapters = [share(adapter, spec, place) for adapter in adapters]
    like = next((x for adapter in adapters for x in leaves(adapter)), None)
    if like is None:
        raise ValueError("stack: none of the adapters changes anything")
    r = max(map(rank, adapters))
    size = {(site.layer, site.field): (site.rows.count, site.columns.count) for site in sites(spec, place)}

    def side_by_side(i: int, names: tuple[str, ...]) -> Stack:
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
        return Stack(torch.stack(a), torch.stack(b))

    layers = (
        Stacks(**{packed: side_by_side(i, names) for packed, names in PACKED.items()}) for i in range(spec.layers)
    )
    return Adapters(tuple(layers), torch.tensor([0.0, *(x.scale for x in adapters)], device=like.device))


def empty(
    spec: Spec, count: int, rank: int, device: torch.device, dtype: torch.dtype, place: Place = WHOLE
) -> Adapters:
    """Room for so many adapters, and the first, which is none; on a rank, for its share of them."""

    def zeros(packed: str, layer: Any) -> Stack:
        parts, (rows, columns) = len(PACKED[packed]), getattr(layer, packed).shape
        shapes = (count + 1, parts * rank, columns), (count + 1, rows, rank)
        return Stack(*(torch.zeros(shape, device=device, dtype=dtype) for shape in shapes))

    declared = weights.declare(spec, place).layers
    layers = tuple(Stacks(*(zeros(packed, layer) for packed in PACKED)) for layer in declared)
    return Adapters(layers, torch.zeros(count + 1, device=device))


def views(adapters: Adapters, spec: Spec, i: int, like: Adapter, place: Place = WHOLE) -> Adapter:
    """The i-th of several, as a tree of views with the changes and ranks of `like`, a whole one."""
    pairs = {}
    where = {field: (packed, j) for packed, names in PACKED.items() for j, field in enumerate(names)}
    size = {(site.layer, site.field): site.rows.count for site in sites(spec, place)}
    for site, pair in _pairs(like, spec, place):
        packed, j = where[site.field]
        stack: Stack = getattr(adapters.layers[site.layer], packed)
        r, room = len(pair.a), stack.b.shape[-1]
        first = sum(size[site.layer, name] for name in PACKED[packed][:j])
        a, b = stack.a[i, j * room : j * room + r], stack.b[i, first : first + site.rows.count, :r]
        pairs[site.layer, site.field] = LowRank(a, b)
    return _tree(spec, pairs, like.scale)


class Held(NamedTuple):
    """An adapter of an engine: its number, its tensors (or a rank's share of them) as views of the engine's, and how
    often it was changed: also under an earlier adapter of that name."""

    index: int
    params: Adapter
    version: int


class Shelf:
    """The adapters of one engine by name, in buffers that stay where they are: captured steps read them."""

    def __init__(
        self, spec: Spec, limits: Lora, device: torch.device, dtype: torch.dtype, group: Group | None = None
    ) -> None:
        self.spec, self.limits, self.dtype, self.group = spec, limits, dtype, group
        self.place = WHOLE if group is None else group.place
        self.rank = limits.max_rank or RANK
        self.adapters = empty(spec, limits.max_adapters, self.rank, device, dtype, self.place)
        self.held: dict[str, Held] = {}
        self.versions = [0] * (limits.max_adapters + 1)  # of each, by its number; 0 is no adapter
        self._last: dict[str, int] = {}  # the version that each name had last

    def __getitem__(self, name: str) -> Held:
        """ValueError, with those that there are."""
        _check_name(name)
        if name not in self.held:
            raise ValueError(
                unknown("adapter", name, [*self.held]) if self.held else f"no adapter {name!r}: add it first"
            )
        return self.held[name]

    @torch.no_grad()
    def add(self, name: str, adapter: Adapter) -> Held:
        """A copy of an adapter, a whole one, joins the others."""
        _check_name(name)
        _check_tree(name, adapter)
        if not name or name in self.held:
            raise ValueError(f"adapter {name!r}: " + ("it is there already" if name else "it needs a name"))
        if rank(adapter) > self.rank:
            raise ValueError(f"adapter {name!r} has rank {rank(adapter)}: raise lora.max_rank ({self.rank})")
        free = {*range(1, self.limits.max_adapters + 1)} - {x.index for x in self.held.values()}
        if not free:
            most = self.limits.max_adapters
            raise ValueError(f"adapter {name!r}: {most} are there already; remove one or raise lora.max_adapters")
        mine = share(adapter, self.spec, self.place)
        check(name, adapter, self.dtype)
        i = min(free)
        for x in tree_leaves(self.adapters.layers):  # whoever still has views of the last one may have written there
            x[i].zero_()
        params = views(self.adapters, self.spec, i, adapter, self.place)
        copy(params, mine)
        self.adapters.scale[i] = adapter.scale
        return self._hold(name, Held(i, params, self._last.get(name, -1) + 1))

    def _hold(self, name: str, held: Held) -> Held:
        self.held[name] = held
        self.versions[held.index] = self._last[name] = held.version
        return held

    @torch.no_grad()
    def remove(self, name: str) -> Held:
        """Make room; what had its views has zeros."""
        held = self[name]
        for x in leaves(held.params):
            x.zero_()
        self.adapters.scale[held.index] = 0
        return self.held.pop(name)

    @torch.no_grad()
    def update(self, name: str, adapter: Adapter | None = None) -> Held:
        """It has changed: in place, or now to a copy of `adapter`, of the same shapes."""
        held = self[name]
        if adapter is None:
            check(name, held.params, self.dtype, self.group)
        else:
            _check_tree(name, adapter)
            check(name, adapter, self.dtype)
            copy(held.params, share(adapter, self.spec, self.place))
            self.adapters.scale[held.index] = adapter.scale
            held = held._replace(params=held.params._replace(scale=adapter.scale))
        return self._hold(name, held._replace(version=held.version + 1))

    @property
    def bytes(self) -> int:
        """Of memory on the device."""
        return sum(x.nbytes for x in tree_leaves(self.adapters))
