"""Inputs of steps on a GPU, copied while the step before still runs."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from fastgen.core.batch import InputBuffers, to_device


def torch_copy(
    target: Shaped[Tensor, " N"], first: Shaped[Tensor, " n"], second: Shaped[Tensor, " m"] | None = None
) -> None:
    """Writes `first`, and `second` after it, to the beginning of `target`."""
    for x, offset in ((first, 0), (second, len(first))):
        if x is not None:
            target[offset : offset + len(x)].copy_(x, non_blocking=True)


class GPUInputBuffers(InputBuffers):
    """Pinned host memory and device memory for the inputs of steps, and pinned memory for sampled tokens.

    The tensors of a Batch are views of one buffer, the same views for the same shape, so that captured CUDA graphs can
    read them; the next step overwrites them. Each step copies its inputs once, on a stream of its own.

    A step has at most `max_tokens` tokens and `max_rows` sequences, padding included. `copy_buffer(target, first,
    second)` replaces torch's copies on the stream of the steps: a kernel starts earlier than a copy engine.
    """

    def __init__(
        self, *args: Any, max_tokens: int, max_rows: int, copy_buffer: Callable[..., Any] = torch_copy, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._copy = copy_buffer
        # Two of each buffer of the host: one is filled while the step that reads the other one may still run.
        num_words = sum(self.field_sizes(max_tokens, max_rows, shared_prefix=True).values())
        words = torch.zeros(num_words, dtype=torch.int32, device="cpu")
        sampled = torch.zeros(2 * max_rows, dtype=torch.int32, device="cpu")
        self._pinned_buffers = [words.pin_memory() for _ in range(2)]
        self._staging_buffers = [torch.zeros_like(words, device=self.device) for _ in range(2)]
        self._staging_read_events = [torch.cuda.Event() for _ in range(2)]
        self._copy_stream = torch.cuda.Stream(self.device)
        self._buffer = torch.zeros_like(words, device=self.device)
        self._sampled_host_buffers = [sampled.clone().pin_memory() for _ in range(2)]

    @property
    def nbytes(self) -> int:
        return super().nbytes + 3 * self._buffer.nbytes

    def host_words(self, num_words: int, step_idx: int) -> Int[Tensor, " words"]:
        self._staging_read_events[step_idx % 2].synchronize()  # the step before last has read its inputs
        return self._pinned_buffers[step_idx % 2][:num_words]

    def copy_to_device(self, words: Int[Tensor, " words"], step_idx: int) -> Int[Tensor, " words"]:
        staged = self._staging_buffers[step_idx % 2][: len(words)]
        with torch.cuda.stream(self._copy_stream):
            staged.copy_(words, non_blocking=True)
        torch.cuda.current_stream(self.device).wait_stream(self._copy_stream)
        self._copy(self._buffer, staged)
        self._staging_read_events[step_idx % 2].record()
        return self._buffer[: len(words)]

    def copy_updates(self, updates: Int[Tensor, "2 n"]) -> Int[Tensor, "2 n"]:
        compute_stream = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copy_stream):
            updates = to_device(updates, self.device)
        compute_stream.wait_stream(self._copy_stream)
        updates.record_stream(compute_stream)
        return updates

    def copy_sampled_to_host(
        self, token_ids: Int[Tensor, " N"], logprobs: Float[Tensor, " N"], step_idx: int
    ) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
        """Starts copying a step's tokens (int32) and logprobs (fp32) to pinned memory; returns the copies, which last
        until the step after next."""
        n, host_buffer = len(token_ids), self._sampled_host_buffers[step_idx % 2]
        self._copy(host_buffer, token_ids, logprobs.view(torch.int32))
        return host_buffer[:n], host_buffer[n : 2 * n].view(torch.float32)
