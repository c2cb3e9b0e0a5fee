"""Warms a runner up before its first step: compiles, loads kernels, captures graphs, and measures memory."""

import torch
from tqdm.auto import tqdm

from fastgen.compiled.cuda_graphs import decode_graph_sizes, largest_shape
from fastgen.compiled.runner import ModelRunner
from fastgen.config import SchedulerConfig
from fastgen.core.runner import StepShape
from fastgen.core.types import KVCache


def warm_up_shapes(schedule: SchedulerConfig, *, cuda: bool) -> list[StepShape]:
    """Returns shapes that together run every kernel: CUDA libraries load a kernel when it first runs, and loading
    synchronizes the device."""
    rows = [n + 1 for n in decode_graph_sizes(schedule.max_num_seqs)] if cuda else []
    tokens = [2**i for i in range(11, 17) if 2**i <= schedule.token_budget] if cuda else []
    # Compiled for the first shape: no two of its sizes are equal, so that dynamo does not tie one to another.
    mixed = [StepShape(40, 3, False), *(StepShape(2 * r // 8 * 8 + 16, r, False) for r in rows)]
    num_seqs = min(65, largest_shape(schedule).num_seqs)
    return [*mixed, *(StepShape(n, num_seqs, False) for n in tokens), StepShape(24, 24, True)]


def _run_warm_up_steps(runner: ModelRunner, cache: KVCache) -> None:
    """Runs a padding-only step of each warm-up shape."""
    for shape in warm_up_shapes(runner.config.schedule, cuda=runner.fused_sampler is not None):
        runner.run_padding(cache, shape)


@torch.no_grad()
def profile_peak_memory(runner: ModelRunner, cache: KVCache) -> int:
    """Returns the bytes of device memory in use after the largest step and the largest graphs of each kind.

    `cache` needs no more than the scratch page. The graphs are freed again; what was compiled and loaded stays.
    """
    _run_warm_up_steps(runner, cache)
    runner.run_padding(cache, largest_shape(runner.config.schedule))
    largest_graphs = {(shape.decode, shape.shared_prefix): shape for shape in reversed(runner.graph_shapes())}
    for shape in largest_graphs.values():
        runner.capture(cache, shape)
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info(runner.device)
    runner.graphs.free()
    runner.kernels_loaded = True
    return total - free


@torch.no_grad()
def warm_up(runner: ModelRunner, *, progress: bool = True) -> None:
    """Compiles and captures everything that steps will need."""
    if runner.mode == "eager":
        return
    shapes, cache = runner.graph_shapes(), runner.cache
    disable = None if progress else True
    with tqdm(total=len(shapes) + 1, desc="warm-up", unit="graph", delay=1, leave=False, disable=disable) as bar:
        if not runner.kernels_loaded:
            _run_warm_up_steps(runner, cache)
        bar.update()
        for shape in shapes:
            runner.capture(cache, shape)
            bar.update()
    if shapes:
        runner.graphs.measure()
