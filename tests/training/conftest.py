"""Models that are trained.

Imports follow in the fixture: pytest may load this file before it is configured, when Triton does not know yet that its
kernels are interpreted, and fastgen would not be type-checked.
"""

from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """A transformers model with the weights of `new_params()`, on the tests' device."""
    from trainer import CONFIG, new_params
    from transformers import AutoModelForCausalLM

    import fastgen

    fastgen.save(tmp_path, CONFIG, new_params())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    return model.to(torch.get_default_device())
