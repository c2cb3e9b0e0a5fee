"""The adapters of an engine: `AdapterManager` copies them into stacked buffers of fixed capacity, by name."""

from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from fastgen.checkpoint.weights import raise_if_not_finite, weight_specs
from fastgen.config import LoraConfig, unknown_name_message
from fastgen.core.extensions import Adapters
from fastgen.core.model_config import UNSHARDED, ModelConfig
from fastgen.distributed.tensor_parallel import TPGroup
from fastgen.lora import adapter as lora
from fastgen.lora.adapter import Adapter, LayerLora, LoraAB
from fastgen.lora.stacked import LayerStackedLora, StackedAdapters, StackedLora

DEFAULT_MAX_RANK = 16  # where the config names none


def check_finite(name: str, adapter: Adapter, dtype: torch.dtype, tp_group: TPGroup | None = None) -> None:
    """Raises ValueError, naming the tensors, for values that are NaN or infinite, or would be in `dtype`.

    With a `tp_group`, `adapter` is a rank's shard, and all ranks raise if one does.
    """
    error, advice = None, "do not run it before they are repaired"
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
        self.model_config, self.dtype, self.tp_group = model_config, dtype, tp_group
        self.tp_shard = UNSHARDED if tp_group is None else tp_group.shard
        self.max_rank, num_slots = lora_config.max_rank or DEFAULT_MAX_RANK, lora_config.max_adapters + 1

        def zeros(packed: str, layer: Any) -> StackedLora:
            num_parts, (rows, columns) = len(lora.PACKED_MODULES[packed]), getattr(layer, packed).shape
            shapes = (num_slots, num_parts * self.max_rank, columns), (num_slots, rows, self.max_rank)
            return StackedLora(*(torch.zeros(shape, device=device, dtype=dtype) for shape in shapes))

        specs = weight_specs(model_config, self.tp_shard).layers
        layers = tuple(LayerStackedLora(*(zeros(packed, layer) for packed in lora.PACKED_MODULES)) for layer in specs)
        self.adapters = StackedAdapters(layers, torch.zeros(num_slots, device=device))
        self.loaded: dict[str, LoadedAdapter] = {}
        self.versions = [0] * num_slots  # by adapter_idx; 0 is no adapter
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
        lora.check_structure(name, adapter)
        if not name or name in self.loaded:
            raise ValueError(f"adapter {name!r}: " + ("it is there already" if name else "it needs a name"))
        if (rank := lora.adapter_rank(adapter)) > self.max_rank:
            raise ValueError(f"adapter {name!r} has rank {rank}: raise lora.max_rank ({self.max_rank})")
        free = {*range(1, len(self.versions))} - {x.adapter_idx for x in self.loaded.values()}
        if not free:
            problem = f"adapter {name!r}: {len(self.loaded)} are there already"
            raise ValueError(f"{problem}; remove one or raise lora.max_adapters")
        shard = lora.shard_adapter(adapter, self.model_config, self.tp_shard)
        check_finite(name, adapter, self.dtype)
        return min(free), shard

    def check_update(self, name: str, adapter: Adapter) -> Adapter:
        """Returns the rank's shard of an unsharded adapter that `update` may copy.

        Raises ValueError if the adapter has other pairs or shapes than the loaded one, or is not finite.
        """
        loaded = self[name]
        lora.check_structure(name, adapter)
        check_finite(name, adapter, self.dtype)
        shard = lora.shard_adapter(adapter, self.model_config, self.tp_shard)
        lora.check_same_shapes(loaded.adapter, shard)
        return shard

    @torch.no_grad()
    def add(self, name: str, adapter: Adapter) -> LoadedAdapter:
        """Copies an unsharded adapter into free buffers. Raises ValueError if it does not fit, or is not finite."""
        idx, shard = self.check_new(name, adapter)
        # Views of an adapter that was removed from this index may have been written since.
        for x in tree_leaves(self.adapters.layers):
            x[idx].zero_()
        views = self._views(idx, adapter)
        lora.copy_adapter(views, shard)
        self.adapters.scale[idx] = adapter.scale
        return self._register(name, LoadedAdapter(idx, views, self._last_versions.get(name, -1) + 1))

    def _views(self, adapter_idx: int, like: Adapter) -> Adapter:
        """Returns one of the stacked adapters as a tree of views, with the pairs and ranks of the unsharded `like`."""
        packs, pairs = lora.PACKED_MODULES.items(), {}
        slots = {field: (packed, fields[:j]) for packed, fields in packs for j, field in enumerate(fields)}
        num_rows = {target.key: target.rows.size for target in lora.iter_targets(self.model_config, self.tp_shard)}
        for target, pair in lora.target_pairs(like, self.model_config, self.tp_shard):
            i, (packed, fields_before), rank = target.layer_idx, slots[target.field], len(pair.a)
            stacked: StackedLora = getattr(self.adapters.layers[i], packed)
            a = stacked.a[adapter_idx, len(fields_before) * self.max_rank :][:rank]
            b = stacked.b[adapter_idx, sum(num_rows[i, field] for field in fields_before) :][: target.rows.size, :rank]
            pairs[target.key] = LoraAB(a, b)
        return lora.build_adapter(self.model_config, pairs, like.scale)

    def _register(self, name: str, loaded_adapter: LoadedAdapter) -> LoadedAdapter:
        self.loaded[name] = loaded_adapter
        self.versions[loaded_adapter.adapter_idx] = self._last_versions[name] = loaded_adapter.version
        return loaded_adapter

    @torch.no_grad()
    def remove(self, name: str) -> LoadedAdapter:
        """Removes an adapter and zeros its buffers, views of which may remain."""
        loaded = self[name]
        for x in lora.parameters(loaded.adapter):
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
            lora.copy_adapter(loaded.adapter, self.check_update(name, adapter))
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
