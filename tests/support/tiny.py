"""Small models for tests, with weights large enough that every token of the context affects the next one."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import fastgen

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 61, "max_position_embeddings": 64, "torch_dtype": "float32",
}  # fmt: skip
WINDOWED = {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}


def config(family: str = "Llama", **changes: Any) -> dict[str, Any]:
    """Returns a Hugging Face config. `vocab` and `context` stand for the longer names."""
    long_names = {"vocab": "vocab_size", "context": "max_position_embeddings"}
    renamed = {long_names.get(name, name): value for name, value in changes.items()}
    return {"architectures": [f"{family}ForCausalLM"]} | SIZES | renamed


def weights(
    model_config: fastgen.ModelConfig, seed: int = 0, times: float = 10, device: str | None = None
) -> fastgen.Params:
    """Returns random parameters, made on the CPU to be the same everywhere; matrices are scaled by `times`."""
    params = fastgen.init(model_config, seed, device="cpu")
    target = torch.get_default_device() if device is None else device
    return tree_map_only(Tensor, lambda w: (w * times if w.ndim == 2 else w).to(target), params)
