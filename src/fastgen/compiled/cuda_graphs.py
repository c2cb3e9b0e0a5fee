"""CUDA graphs: the shapes that steps are padded to, and the captured steps.

Replaying a captured step costs the host one call, while launching its kernels one by one takes longer than a small step
runs. So steps of few tokens are captured, one graph per shape.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from fastgen.config import EngineConfig, SchedulerConfig
from fastgen.core.runner import StepShape
from fastgen.core.step import StepOutput

PREFILL_GRAPH_SIZES = (64, 128, 192, 256, 320, 384, 512, 640, 768, 1024)  # tokens of captured steps that prefill
PREFILL_GRAPH_NUM_SEQS = 32  # sequences of those steps, padding included
# A step padded to the full budget by more than this factor costs more than launching its kernels one by one.
MAX_PADDING = 1.03


def decode_graph_sizes(max_size: int) -> tuple[int, ...]:
    """Returns the numbers of decoding sequences that are captured, close together: each padded row costs time."""
    sizes = [*range(2, 8, 2), *range(8, 64, 8), *range(64, 256, 16), *range(256, max_size, 32)]
    return (*(n for n in sizes if n < max_size), max(2, max_size))


def shared_prefix_graph_sizes(max_size: int) -> tuple[int, ...]:
    """Returns the captured sizes with shared prefixes, fewer than others: a padded row costs such steps little."""
    return tuple(n for n in decode_graph_sizes(max_size) if n >= 16 and (n % 64 == 0 or n in (16, 32, max_size)))


def largest_shape(schedule: SchedulerConfig) -> StepShape:
    """Returns the most tokens and sequences that a step may have, padding included."""
    rows = max(schedule.max_num_seqs + 1, PREFILL_GRAPH_NUM_SEQS)
    return StepShape(max(-(-schedule.token_budget // 64) * 64 + 8, 2 * rows + 16), rows, False)


def full_budget_shape(schedule: SchedulerConfig) -> StepShape:
    """Returns the shape of a step that spends its whole token budget, as most do while prompts wait."""
    largest = largest_shape(schedule)
    return StepShape(largest.num_tokens - largest.num_tokens % 64, largest.num_seqs, False)


def graph_shapes(config: EngineConfig) -> tuple[StepShape, ...]:
    """Returns the shapes to capture, largest first: later graphs then fit into the memory of the first."""
    schedule, kv = config.schedule, config.kv_cache
    decode = [StepShape(n, n, True) for n in decode_graph_sizes(schedule.max_num_seqs)]
    prefill = [StepShape(n, PREFILL_GRAPH_NUM_SEQS, False) for n in PREFILL_GRAPH_SIZES if n <= schedule.token_budget]
    shared: list[StepShape] = []
    if kv.prefix_cache and kv.shared_prefix_attention and not config.compile.batch_invariant:
        shared = [StepShape(n, n, True, True) for n in shared_prefix_graph_sizes(schedule.max_num_seqs)]
    return tuple(sorted({*decode, *shared, *prefill, full_budget_shape(schedule)}, reverse=True))


def padded_shape(
    captured: Iterable[StepShape], schedule: SchedulerConfig, num_tokens: int, num_seqs: int,
    needs_prompt_logprobs: bool, shared_prefix: bool,
) -> StepShape:  # fmt: skip
    """Returns the smallest captured shape that a step fits, or else the shape in which it runs without a graph."""
    if num_tokens == num_seqs:
        n = max(2, num_seqs)
        fits = (s for s in captured if s.decode and s.shared_prefix == shared_prefix and s.num_seqs >= num_seqs)
        return min(fits, default=StepShape(n, n, True, shared_prefix))
    full = full_budget_shape(schedule)
    fits = (
        s for s in captured
        if not (s.decode or needs_prompt_logprobs) and s.num_tokens >= num_tokens and s.num_seqs > num_seqs
        and (s != full or s.num_tokens <= num_tokens * MAX_PADDING)
    )  # fmt: skip
    # Few different sizes: CUDA libraries load kernels of their own for each.
    multiple = 64 if num_tokens > 512 else 8
    rows = 1 + min(n for n in decode_graph_sizes(schedule.max_num_seqs) if n >= num_seqs)
    tokens = -(-num_tokens // multiple) * multiple
    tokens += 8 * (tokens == rows)  # attention takes as many sequences as tokens for a decode step
    return min(fits, default=StepShape(tokens, rows, False))


class CudaGraphs:
    """Captured steps by shape, in one memory pool. A replay overwrites the output of the replay before."""

    def __init__(self) -> None:
        self.captured: dict[StepShape, tuple[torch.cuda.CUDAGraph, StepOutput]] = {}
        self.num_captures = 0  # in the runner's lifetime
        self.num_bytes = 0  # of the memory pool
        self._pool: Any = None

    def capture(self, shape: StepShape, run: Callable[[], StepOutput]) -> None:
        """Captures a step of this shape, after a first run that does everything that happens only once."""
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = run()
        self._pool = self._pool or graph.pool()
        self.captured[shape] = graph, output
        self.num_captures += 1

    def measure(self) -> None:
        """Updates `num_bytes`."""
        segments = torch.cuda.memory_snapshot()
        self.num_bytes = sum(x["total_size"] for x in segments if x.get("segment_pool_id") == self._pool)

    def free(self) -> None:
        """Releases the graphs and their memory."""
        self.captured.clear()
        self._pool, self.num_bytes = None, 0
        torch.cuda.empty_cache()
