"""The attention backends by name."""

import torch

from fastgen.core.attention import AttentionBackend, reference, sdpa

ATTENTION_BACKENDS = ("reference", "sdpa", "triton")


def select_attention_backend(name: str, device: torch.device | str) -> AttentionBackend:
    """A backend, a function of (batch, spec); `auto` is triton on a GPU and sdpa elsewhere.

    On a CPU the Triton kernels run in Triton's interpreter only (TRITON_INTERPRET=1), to be tested.
    """
    if name == "auto":
        name = "triton" if torch.device(device).type == "cuda" else "sdpa"
    if name == "triton":
        from fastgen.kernels.attention import (
            paged_attention,  # Triton comes with the GPU builds of torch, and not with others
        )

        return paged_attention
    return {"reference": reference, "sdpa": sdpa}[name]
