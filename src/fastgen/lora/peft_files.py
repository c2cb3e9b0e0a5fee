"""Reads and writes adapters in PEFT's format: adapter_config.json and adapter_model.safetensors."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from reprlib import repr
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastgen.checkpoint.files import open_safetensors, read_json, read_shapes
from fastgen.checkpoint.hub import resolve
from fastgen.config import LoraConfig
from fastgen.core.model_config import ModelConfig
from fastgen.lora import adapter as lora
from fastgen.lora.adapter import Adapter, LoraAB

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# A PEFT model in memory adds the name of the adapter before ".weight".
PEFT_TENSOR_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.[^.]+)?\.weight")
# Options of adapter_config.json and the values that describe what is computed here; the first is the default.
SUPPORTED_OPTIONS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others change the model, too
}  # fmt: skip
# Options that must be absent, false or empty.
UNSUPPORTED_OPTIONS = (
    "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias", "use_qalora",
    "layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "use_bdlora",
    "arrow_config", "megatron_config", "monteclora_config", "kasa_config", "velora_config",
)  # fmt: skip


def named_tensors(adapter: Adapter, model_config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yields (PEFT's name, tensor) of every tensor of an adapter."""
    for target, pair in lora.target_pairs(adapter, model_config):
        for letter, tensor in zip("AB", pair, strict=True):
            yield f"base_model.model.{target.name}.lora_{letter}.weight", tensor


def update(
    adapter: Adapter, model_config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], *, source: str = "update"
) -> None:
    """Writes an adapter in place from (PEFT's name, tensor) pairs, which must be complete.

    Raises ValueError, starting with `source`, for other names, for shapes that differ and for halves of pairs.
    """
    pairs = _pairs_from_peft(tensors, model_config, source)
    lora.copy_adapter(adapter, lora.build_adapter(model_config, pairs, adapter.scale))


def _pairs_from_peft(tensors: Iterable[tuple[str, Tensor]], model_config: ModelConfig, source: str) -> lora.Pairs:
    targets = {target.name: target for target in lora.iter_targets(model_config)}
    pairs: dict[lora.LoraTarget, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        match = PEFT_TENSOR_NAME.fullmatch(name)
        if match is None or match[1] not in targets:
            supported = f"{', '.join(lora.TARGET_MODULES)} of {model_config.num_layers} layers"
            raise ValueError(f"{source}: {name} targets an unsupported module; supported: {supported}")
        pairs.setdefault(targets[match[1]], {})[match[2]] = tensor
    if incomplete := [target.name for target, pair in pairs.items() if len(pair) < 2]:
        raise ValueError(f"{source}: one of lora_A and lora_B is missing for {', '.join(incomplete[:8])}")
    if not pairs:
        raise ValueError(f"{source}: no tensors of an adapter")
    return {target.key: LoraAB(pair["A"], pair["B"]) for target, pair in pairs.items()}


def read_peft_config(folder: str | Path) -> dict[str, Any]:
    """Returns PEFT's adapter_config.json of a folder or hub id.

    Raises ValueError for a kind of adapter that is not supported, by the name of the option, and for a damaged file.
    """
    path = resolve(folder)
    if not (path / CONFIG_FILE).is_file() or not (path / WEIGHTS_FILE).is_file():
        raise ValueError(f"{path}: not an adapter: there must be {CONFIG_FILE} and {WEIGHTS_FILE}")
    config, file = read_json(path / CONFIG_FILE), f"{path}: {CONFIG_FILE}"
    r, alpha, use_rslora = (config.get(name) for name in ("r", "lora_alpha", "use_rslora"))
    if type(r) is not int or not 1 <= r <= lora.MAX_RANK or type(alpha) not in (int, float):
        expected = f"where numbers are expected, r an integer from 1 to {lora.MAX_RANK}"
        raise ValueError(f"{file} has r={repr(r)} and lora_alpha={repr(alpha)}, {expected}")
    if use_rslora not in (None, False, True):
        raise ValueError(f"{file} has use_rslora={repr(use_rslora)}: true or false")
    try:
        lora.scaling(r, cast(float, alpha), use_rslora=bool(use_rslora))
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from e
    for name, allowed in SUPPORTED_OPTIONS.items():
        if (value := config.get(name, allowed[0])) not in allowed:
            raise ValueError(f"{path}: adapters with {name}={value!r} are not supported; merge it into the model")
    for name in UNSUPPORTED_OPTIONS:
        if config.get(name):
            raise ValueError(f"{path}: adapters with {name} are not supported; merge it into the model")
    # Checked before an engine allocates memory for adapters of rank r.
    for name, shape in read_shapes(path / WEIGHTS_FILE).items():
        if (match := PEFT_TENSOR_NAME.fullmatch(name)) and match[2] == "A" and shape[:1] != (r,):
            raise ValueError(f"{path}: {match[1]} has rank {'×'.join(map(str, shape[:1]))}, the config says {r}")
    return config


def expand_lora_config(lora_config: LoraConfig, folders: Mapping[str, str | Path]) -> LoraConfig:
    """Returns `lora_config` with capacity for the adapters of these folders. Raises as `read_peft_config`."""
    if not folders:
        return lora_config
    rank = max(read_peft_config(folder)["r"] for folder in folders.values())
    num_adapters = max(lora_config.max_adapters, len(folders))
    return LoraConfig(max_adapters=num_adapters, max_rank=lora_config.max_rank or rank)


def load(
    folder: str | Path, model_config: ModelConfig, *, device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Adapter:  # fmt: skip
    """Returns the adapter in a folder or hub id of PEFT's files; `dtype` None is the file's.

    Raises ValueError as `read_peft_config`, and for an adapter of another model.
    """
    path, config = resolve(folder), read_peft_config(folder)
    with open_safetensors(path / WEIGHTS_FILE) as f:
        tensors = ((name, f.get_tensor(name).to(device or torch.get_default_device(), dtype)) for name in f.keys())
        pairs = _pairs_from_peft(tensors, model_config, str(path))
    scale = lora.scaling(config["r"], config["lora_alpha"], use_rslora=bool(config.get("use_rslora")))
    adapter = lora.build_adapter(model_config, pairs, scale)
    try:
        list(lora.target_pairs(adapter, model_config))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    return adapter


def save(folder: str | Path, model_config: ModelConfig, adapter: Adapter, *, base_model: str | None = None) -> None:
    """Writes PEFT's files of an adapter, replacing older ones; `base_model` names the model that it belongs to.

    Raises ValueError if the pairs differ in rank.
    """
    pairs = [*lora.target_pairs(adapter, model_config)]
    ranks, targets = sorted({len(pair.a) for _, pair in pairs}), {target.target_module for target, _ in pairs}
    if len(ranks) != 1:
        raise ValueError(f"save: changes of ranks {ranks or 'none'}, where PEFT's files have one for all")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": True,
        "r": ranks[0], "lora_alpha": adapter.scale * ranks[0], "lora_dropout": 0.0, "use_rslora": False,
        "bias": "none", "fan_in_fan_out": False, "target_modules": [x for x in lora.TARGET_MODULES if x in targets],
    }  # fmt: skip
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2))
    tensors = {name: x.detach().cpu().contiguous().clone() for name, x in named_tensors(adapter, model_config)}
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
