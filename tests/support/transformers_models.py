"""Small transformers models to train, and modules that wrap them."""

from typing import Any

import tiny
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

CONFIGS: dict[str, Any] = {"Llama": LlamaConfig, "Qwen2": Qwen2Config, "Qwen3": Qwen3Config}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True},
    "Qwen2": {"tie_word_embeddings": False},  # with biases
    "Qwen3": {"tie_word_embeddings": True, "head_dim": 8},  # with norms of queries and keys
}


def new_model(family: str, **changes: Any) -> PreTrainedModel:
    """Returns a transformers model in training mode, with random weights large enough for noticeable gradients."""
    torch.manual_seed(0)
    config = tiny.config(family, vocab=97, context=128, **FAMILIES[family] | changes)
    model = AutoModelForCausalLM.from_config(CONFIGS[family].from_dict(config), dtype=torch.float32)
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.1)
    return model.to(torch.get_default_device()).train()


class Wrapper(torch.nn.Module):
    """A module that contains another under a given name, as torch's compiler and activation checkpointing do."""

    def __init__(self, name: str, inner: torch.nn.Module) -> None:
        super().__init__()
        self.add_module(name, inner)
