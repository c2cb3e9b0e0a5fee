"""Models that are trained."""

from pathlib import Path

import pytest
import torch
from trainer import CONFIG, new_params
from transformers import AutoModelForCausalLM, PreTrainedModel

import fastgen


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    """A transformers model with the weights of `new_params()`, on the tests' device."""
    fastgen.save(tmp_path, CONFIG, new_params())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    return model.to(torch.get_default_device())
