"""Shapes that steps are padded to, and compiled steps on a CPU. Captured steps need a GPU: test_graphs."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastgen
from fastgen import EngineConfig
from fastgen.compiled.cuda_graphs import decode_graph_sizes, largest_shape
from fastgen.compiled.runner import ModelRunner
from fastgen.config import SchedulerConfig
from fastgen.core.runner import StepShape
from fastgen.core.step import fill_pending_tokens

CONFIG = tiny.config("Qwen3", hidden_size=64, intermediate_size=96, head_dim=16, vocab=103, context=256)
SPEC = fastgen.from_hf_config(CONFIG)


@given(max_size=st.integers(1, 3000))
def test_decode_graph_sizes(max_size: int) -> None:
    """Sizes increase up to the maximum, and pad by at most a quarter, except for small steps."""
    sizes = decode_graph_sizes(max_size)
    assert list(sizes) == sorted(set(sizes)) and sizes[-1] == max(2, max_size) and sizes[0] >= 2
    for n in range(1, max_size + 1):
        assert min(s for s in sizes if s >= n) <= max(2, n + 7, n * 1.25)


def new_runner(limits: SchedulerConfig) -> ModelRunner:
    """Returns a compiled runner on a CPU."""
    settings = EngineConfig.from_flat(compile="inductor", schedule=limits).resolve("cpu")
    params = fastgen.init(SPEC, device="cpu")
    return ModelRunner(params, SPEC, settings)


@given(data=st.data(), max_num_seqs=st.integers(1, 600), extra=st.integers(0, 3000))
def test_a_plan_fits_its_shape(data: st.DataObject, max_num_seqs: int, extra: int) -> None:
    """Every plan fits its shape, with a row for the padding, and every shape fits the buffers."""
    limits = SchedulerConfig(max_num_seqs=max_num_seqs, token_budget=max_num_seqs + extra)
    run = RUNNERS.setdefault(limits, new_runner(limits))
    rows = data.draw(st.integers(1, max_num_seqs))
    tokens = data.draw(st.one_of(st.just(rows), st.integers(rows, limits.token_budget)))
    shape = run.padded_shape(tokens, rows, needs_prompt_logprobs=False)
    assert shape.num_tokens >= tokens and shape.decode == (tokens == rows)
    assert shape.num_seqs >= rows if shape.decode else shape.num_seqs > rows
    assert (shape.num_tokens == shape.num_seqs) == shape.decode, "attention would take a prefill for a decode step"
    assert shape.num_tokens <= largest_shape(limits).num_tokens and shape.num_seqs <= largest_shape(limits).num_seqs


RUNNERS: dict[SchedulerConfig, ModelRunner] = {}


def test_graph_shapes() -> None:
    """Every number of decoding sequences has a graph, largest first: later graphs fit into its memory."""
    run = new_runner(SchedulerConfig(max_num_seqs=100, token_budget=600))
    run.mode = "graphs"
    shapes = run.graph_shapes()
    assert list(shapes) == sorted(shapes, reverse=True)
    assert {s.num_seqs for s in shapes if s.decode} == {*decode_graph_sizes(100)}
    assert [s.num_tokens for s in shapes if not s.decode] == [640, 512, 384, 320, 256, 192, 128, 64]
    run.graphs.captured = dict.fromkeys(shapes)  # type: ignore[arg-type]
    assert run.padded_shape(33, 33, needs_prompt_logprobs=False) == StepShape(40, 40, True)
    assert run.padded_shape(70, 5, needs_prompt_logprobs=False) == StepShape(128, 32, False)
    assert run.padded_shape(70, 40, needs_prompt_logprobs=False) not in shapes  # more sequences than the graph has
    assert run.padded_shape(70, 5, needs_prompt_logprobs=True) not in shapes  # graphs keep no hidden states
    assert run.padded_shape(625, 90, needs_prompt_logprobs=False) == StepShape(
        640, 101, False
    )  # the whole budget, nearly
    assert run.padded_shape(600, 40, needs_prompt_logprobs=False) not in shapes
    assert run.padded_shape(33, 33, needs_prompt_logprobs=False, shared_prefix=True) == StepShape(64, 64, True, True)
    run.config = EngineConfig.from_flat(schedule=run.config.schedule, shared_prefix_attention=False)
    assert not any(s.shared_prefix for s in run.graph_shapes())


def test_fill_pending_tokens() -> None:
    """A token id -i stands for the last token sampled at req_idx i."""
    last = torch.tensor([0, 11, 22, 33], dtype=torch.int32)
    token = torch.tensor([5, -3, 0, -1], dtype=torch.int32)
    assert fill_pending_tokens(token, last).tolist() == [5, 33, 0, 11]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"compile": "graphs"}, "needs a GPU"), ({"compile": "graphs", "attention": "sdpa"}, "triton only")],
)
def test_graphs_need_a_gpu_and_triton(settings: dict[str, str], message: str) -> None:
    """Configurations that cannot be captured are refused, with what to use instead."""
    with pytest.raises(ValueError, match=message):
        EngineConfig.from_flat(**settings).resolve("cpu")


COMPARE = f"""
import fastgen, torch
torch.set_num_threads(1)
spec = fastgen.from_hf_config({CONFIG})
params = fastgen.init(spec, 1, device="cpu")
prompts = [[i] * (5 * i + 1) for i in range(1, 8)]
sampling = [fastgen.SamplingParams(temperature=i % 2, seed=i, max_tokens=5 + i) for i in range(7)]
from torch._dynamo.utils import counters
def run(**settings):
    with fastgen.Engine(params, spec, cache_tokens=1024, progress=False, token_budget=64, max_num_seqs=4,
                        **settings) as e:
        before = counters["stats"]["unique_graphs"]
        outputs = e.generate(prompts, sampling)
        assert counters["stats"]["unique_graphs"] == before, "compiled after the start"
        return [c.token_ids for o in outputs for c in o.completions]
assert run() == run(compile="inductor", overlap=True)
print("equal")
"""


@pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="test_graphs compares on GPUs")
def test_compiled_as_eager() -> None:
    """Compiled steps generate the tokens of eager ones. In its own process: checked types cannot be traced."""
    root = Path(fastgen.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", COMPARE], capture_output=True, text=True, cwd=root)
    assert done.stdout == "equal\n", done.stderr[-3000:]
