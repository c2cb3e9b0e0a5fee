"""LoRA adapters: `init`, `load`, `save`, `merge` and the tree they work on; engines serve many at once."""

from fastgen.lora.adapter import (
    TARGET_MODULES,
    Adapter,
    adapter_rank,
    init,
    merge,
    parameters,
    shard_adapter,
    stack,
    to_cpu,
    with_scale,
)  # fmt: skip
from fastgen.lora.manager import AdapterManager, LoadedAdapter
from fastgen.lora.peft_files import expand_lora_config, load, named_tensors, read_peft_config, save, update

__all__ = [
    "TARGET_MODULES", "Adapter", "AdapterManager", "LoadedAdapter", "adapter_rank", "expand_lora_config", "init",
    "load", "merge", "named_tensors", "parameters", "read_peft_config", "save", "shard_adapter", "stack", "to_cpu",
    "update", "with_scale",
]  # fmt: skip
