"""The adapters of an engine: `AdapterManager` copies them into stacked buffers of fixed capacity, by name."""

from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from fastgen.checkpoint.weights import raise_if_not_finite, weight_specs
from fastgen.config import LoraConfig, unknown_name_message
from fastgen.core.extensions import Adapters
from fastgen.core.model_config import UNSHARDED, ModelConfig, TPShard
from fastgen.core.types import LayerStackedLora, StackedAdapters, StackedLora
from fastgen.distributed.tensor_parallel import TPGroup
from fastgen.lora.adapter import (
    PACKED_MODULES,
    Adapter,
    LayerLora,
    LoraAB,
    adapter_rank,
    build_adapter,
    check_same_shapes,
    check_structure,
    copy_adapter,
    lora_targets,
    parameters,
    shard_adapter,
    target_pairs,
)

DEFAULT_MAX_RANK = 16  # where the config names none


def allocate_adapters(
    model_config: ModelConfig, max_adapters: int, max_rank: int, device: torch.device, dtype: torch.dtype,
    tp_shard: TPShard = UNSHARDED,
) -> StackedAdapters:  # fmt: skip
    """Returns zeros for `max_adapters` adapters besides index 0, which is no adapter; a rank's shards of them."""

    def zeros(packed: str, layer: Any) -> StackedLora:
        num_parts, (rows, columns) = len(PACKED_MODULES[packed]), getattr(layer, packed).shape
        shapes = (max_adapters + 1, num_parts * max_rank, columns), (max_adapters + 1, rows, max_rank)
        return StackedLora(*(torch.zeros(shape, device=device, dtype=dtype) for shape in shapes))

    specs = weight_specs(model_config, tp_shard).layers
    layers = tuple(LayerStackedLora(*(zeros(packed, layer) for packed in PACKED_MODULES)) for layer in specs)
    return StackedAdapters(layers, torch.zeros(max_adapters + 1, device=device))


def adapter_views(
    adapters: StackedAdapters, model_config: ModelConfig, adapter_idx: int, like: Adapter, tp_shard: TPShard = UNSHARDED
) -> Adapter:
    """Returns one of the stacked adapters as a tree of views, with the pairs and ranks of the unsharded `like`."""
    pairs = {}
    slots = {field: (packed, j) for packed, fields in PACKED_MODULES.items() for j, field in enumerate(fields)}
    num_rows = {(t.layer_idx, t.field): t.rows.size for t in lora_targets(model_config, tp_shard)}
    for target, pair in target_pairs(like, model_config, tp_shard):
        i, (packed, j), r = target.layer_idx, slots[target.field], len(pair.a)
        stacked: StackedLora = getattr(adapters.layers[i], packed)
        a_start = j * stacked.b.shape[-1]
        b_start = sum(num_rows[i, field] for field in PACKED_MODULES[packed][:j])
        a = stacked.a[adapter_idx, a_start : a_start + r]
        pairs[i, target.field] = LoraAB(a, stacked.b[adapter_idx, b_start : b_start + target.rows.size, :r])
    return build_adapter(model_config, pairs, like.scale)


def check_finite(name: str, adapter: Adapter, dtype: torch.dtype, tp_group: TPGroup | None = None) -> None:
    """Raises ValueError, naming the tensors, for values that are NaN or infinite, or would be in `dtype`.

    With a `tp_group`, `adapter` is a rank's shard, and all ranks raise if one does.
    """
    error = None
    advice = "do not run it before they are repaired"
    tensors = [(f"layers.{i}.{field}.{letter}", x, dtype) for i, layer in enumerate(adapter.layers)
               for field, pair in zip(LayerLora._fields, layer, strict=True) if pair is not None
               for letter, x in zip(LoraAB._fields, pair, strict=True)]  # fmt: skip
    try:
        for path, x, _ in tensors:
            if not x.is_floating_point() or x.is_meta:
                problem = "on the meta device" if x.is_meta else x.dtype
                raise ValueError(f"adapter {name!r}: {path} is {problem}: its tensors must be of floating point")
        raise_if_not_finite(tensors, f"adapter {name!r}", advice)
    except ValueError as e:
        error = e
    if tp_group is not None and not tp_group.all_reduce_min(int(error is None)):
        error = error or ValueError(f"adapter {name!r}: another rank's shard has NaN or infinite values; {advice}")
    if error is not None:
        raise error


class LoadedAdapter(NamedTuple):
    """An adapter of an engine: its index in the stacked buffers, and its tensors as views of them.

    `version` counts the updates of all adapters that had this name.
    """

    adapter_idx: int
    adapter: Adapter
    version: int


class AdapterManager(Adapters):
    """The adapters of one engine by name, in stacked buffers that never move: captured CUDA graphs read them."""

    def __init__(
        self, model_config: ModelConfig, lora_config: LoraConfig, device: torch.device, dtype: torch.dtype,
        tp_group: TPGroup | None = None,
    ) -> None:  # fmt: skip
        self.model_config, self.lora_config, self.dtype, self.tp_group = model_config, lora_config, dtype, tp_group
        self.tp_shard = UNSHARDED if tp_group is None else tp_group.shard
        self.max_rank, num_adapters = lora_config.max_rank or DEFAULT_MAX_RANK, lora_config.max_adapters
        self.adapters = allocate_adapters(model_config, num_adapters, self.max_rank, device, dtype, self.tp_shard)
        self.loaded: dict[str, LoadedAdapter] = {}
        self.versions = [0] * (num_adapters + 1)  # by adapter_idx; 0 is no adapter
        self._last_versions: dict[str, int] = {}  # by name, of removed adapters too

    def __getitem__(self, name: str) -> LoadedAdapter:
        """Returns the adapter of that name. Raises ValueError, with the names that exist, if there is none."""
        _check_name(name)
        if not self.loaded:
            raise ValueError(f"no adapter {name!r}: add it first")
        if name not in self.loaded:
            raise ValueError(unknown_name_message("adapter", name, [*self.loaded]))
        return self.loaded[name]

    def index(self, name: str) -> int:
        """Returns the index of an adapter among the stacked ones. Raises ValueError for an unknown name."""
        return self[name].adapter_idx

    def check_new(self, name: str, adapter: Adapter) -> tuple[int, Adapter]:
        """Returns a free index, and the rank's shard of an unsharded adapter that `add` may copy there.

        Raises ValueError if the adapter does not fit, or is not finite.
        """
        _check_name(name)
        check_structure(name, adapter)
        if not name or name in self.loaded:
            raise ValueError(f"adapter {name!r}: " + ("it is there already" if name else "it needs a name"))
        if (rank := adapter_rank(adapter)) > self.max_rank:
            raise ValueError(f"adapter {name!r} has rank {rank}: raise lora.max_rank ({self.max_rank})")
        num_adapters = self.lora_config.max_adapters
        free = {*range(1, num_adapters + 1)} - {x.adapter_idx for x in self.loaded.values()}
        if not free:
            problem = f"adapter {name!r}: {num_adapters} are there already"
            raise ValueError(f"{problem}; remove one or raise lora.max_adapters")
        shard = shard_adapter(adapter, self.model_config, self.tp_shard)
        check_finite(name, adapter, self.dtype)
        return min(free), shard

    def check_update(self, name: str, adapter: Adapter) -> Adapter:
        """Returns the rank's shard of an unsharded adapter that `update` may copy.

        Raises ValueError if the adapter has other pairs or shapes than the loaded one, or is not finite.
        """
        loaded = self[name]
        check_structure(name, adapter)
        check_finite(name, adapter, self.dtype)
        shard = shard_adapter(adapter, self.model_config, self.tp_shard)
        check_same_shapes(loaded.adapter, shard)
        return shard

    @torch.no_grad()
    def add(self, name: str, adapter: Adapter) -> LoadedAdapter:
        """Copies an unsharded adapter into free buffers. Raises ValueError if it does not fit, or is not finite."""
        idx, shard = self.check_new(name, adapter)
        # Views of the adapter that was removed from this index may still be written.
        for x in tree_leaves(self.adapters.layers):
            x[idx].zero_()
        views = adapter_views(self.adapters, self.model_config, idx, adapter, self.tp_shard)
        copy_adapter(views, shard)
        self.adapters.scale[idx] = adapter.scale
        return self._register(name, LoadedAdapter(idx, views, self._last_versions.get(name, -1) + 1))

    def _register(self, name: str, loaded_adapter: LoadedAdapter) -> LoadedAdapter:
        self.loaded[name] = loaded_adapter
        self.versions[loaded_adapter.adapter_idx] = self._last_versions[name] = loaded_adapter.version
        return loaded_adapter

    @torch.no_grad()
    def remove(self, name: str) -> LoadedAdapter:
        """Removes an adapter and zeros its buffers, views of which may remain."""
        loaded = self[name]
        for x in parameters(loaded.adapter):
            x.zero_()
        self.adapters.scale[loaded.adapter_idx] = 0
        return self.loaded.pop(name)

    @torch.no_grad()
    def update(self, name: str, adapter: Adapter | None = None) -> LoadedAdapter:
        """Counts a new version of an adapter that was changed in place, or copies `adapter`, of the same shapes."""
        loaded = self[name]
        if adapter is None:
            check_finite(name, loaded.adapter, self.dtype, self.tp_group)
        else:
            copy_adapter(loaded.adapter, self.check_update(name, adapter))
            self.adapters.scale[loaded.adapter_idx] = adapter.scale
            loaded = loaded._replace(adapter=loaded.adapter._replace(scale=adapter.scale))
        return self._register(name, loaded._replace(version=loaded.version + 1))

    @property
    def num_bytes(self) -> int:
        """Bytes of the stacked buffers on the device."""
        return sum(x.nbytes for x in tree_leaves(self.adapters))


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise ValueError(f"an adapter's name is a text, got {name!r:.100}")
