"""The models that most tests run: small, with weights by which every token of the context matters for the next one."""

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
    """A Hugging Face config, with `vocab` and `context` for the longer names."""
    names = {"vocab": "vocab_size", "context": "max_position_embeddings"}
    named = {names.get(name, name): value for name, value in changes.items()}
    return {"architectures": [f"{family}ForCausalLM"]} | SIZES | named


def weights(spec: fastgen.ModelConfig, seed: int = 0, times: float = 10, device: str | None = None) -> fastgen.Params:
    """Drawn on the CPU, so that they are the same wherever tests run; matrices are `times` as large as usual."""
    drawn = fastgen.init(spec, seed, device="cpu")
    where = torch.get_default_device() if device is None else device
    return tree_map_only(Tensor, lambda w: (w * times if w.ndim == 2 else w).to(where), drawn)
