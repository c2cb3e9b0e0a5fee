"""Workloads of a benchmark: their notation, their random prompts, and the highest throughput the machine allows."""

import re
from typing import Any, NamedTuple

import torch

from fastgen.config import ParallelConfig
from fastgen.core.model_config import ModelConfig
from fastgen.profiling import roofline

SINGLE_DEVICE = ParallelConfig()


class Workload(NamedTuple):
    """Requests of equal shape. The first `shared_prefix_len` tokens of all prompts are the same."""

    num_requests: int
    prompt_len: int
    output_len: int
    num_samples: int = 1
    shared_prefix_len: int = 0

    @classmethod
    def parse(cls, text: str) -> "Workload":
        """Parses NxPROMPTxOUTPUT[xSAMPLES]. Raises ValueError for any other text."""
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2,3}", text):
            raise ValueError(f"workload {text!r} is not NxPROMPTxOUTPUT[xSAMPLES] in positive numbers: 512x1024x128")
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        sizes = "x".join(map(str, self[:4] if self.num_samples > 1 else self[:3]))
        return f"{sizes} shared {self.shared_prefix_len}" if self.shared_prefix_len else sizes

    def to_row(self) -> dict[str, Any]:
        """Returns the fields of a result row."""
        sizes = dict(zip(("requests", "prompt_len", "output_len", "samples"), self[:4], strict=True))
        return {"workload": str(self)} | sizes

    def make_prompts(self, vocab_size: int, generator: torch.Generator) -> list[list[int]]:
        """Returns prompts of random token ids."""
        prefix = torch.randint(vocab_size, (self.shared_prefix_len,), generator=generator).tolist()
        suffix_shape = (self.num_requests, self.prompt_len - self.shared_prefix_len)
        return [prefix + suffix for suffix in torch.randint(vocab_size, suffix_shape, generator=generator).tolist()]

    def max_tokens_per_second(
        self, config: ModelConfig, machine: roofline.Machine, itemsize: int, parallel: ParallelConfig = SINGLE_DEVICE,
        cache_itemsize: float | None = None,
    ) -> float:  # fmt: skip
        """Returns the roofline limit in output tokens/s, with perfect prefix sharing.

        `machine` is one device; `itemsize` is the number of bytes of a weight or activation, and of an element of the
        cache, unless `cache_itemsize` is given.
        """
        num_requests = -(-self.num_requests // parallel.replicas)  # of the busiest replica
        seconds = roofline.min_seconds(
            config, num_requests, *self[1:4], machine=machine.scaled(parallel.tensor_parallel),
            bytes_per_element=itemsize, cache_bytes_per_element=cache_itemsize, prefix_shared=self[3:] != (1, 0),
            num_shared_tokens=self.shared_prefix_len,
        )  # fmt: skip
        return self.num_requests * self.num_samples * self.output_len / seconds
