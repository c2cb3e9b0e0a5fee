"""The attention backends by name."""

import torch

from fastgen.ops.attention import Backend, reference, sdpa

NAMES = ("reference", "sdpa", "triton")


def choose(name: str, device: torch.device | str) -> Backend:
    """A backend, a function of (batch, spec); `auto` is triton on a GPU and sdpa elsewhere.

    On a CPU the Triton kernels run in Triton's interpreter only (TRITON_INTERPRET=1), to be tested.
    """
    if name == "auto":
        name = "triton" if torch.device(device).type == "cuda" else "sdpa"
    if name == "triton":
        from fastgen.ops.paged import paged  # Triton comes with the GPU builds of torch, and not with others

        return paged
    return {"reference": reference, "sdpa": sdpa}[name]
