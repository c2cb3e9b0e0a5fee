"""Captured steps of tensor parallelism over two GPUs: the tokens of one GPU, with all-reduces in peer memory or by
NCCL, and what happens when a rank exits."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamo import num_compiled_graphs
from test_graphs import CONFIG, SETTINGS, SPEC, load, rounding
from test_workers import check_error, check_kill, no_leftover_ranks  # noqa: F401, the last is a fixture

import fastgen
from fastgen import SamplingParams
from fastgen.core import scheduler

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs"),
    pytest.mark.filterwarnings("default"),
]
CONFIGS = Path(__file__).parents[2] / "benchmarks" / "configs"


def engine(size: int = 2, **settings: Any) -> fastgen.Engine:
    params = fastgen.init(SPEC, 1, device="cuda")
    return fastgen.Engine(params, SPEC, progress=False, tensor_parallel=size, **SETTINGS | settings)


@pytest.fixture(scope="module")
def expected() -> list[fastgen.Output]:
    """Returns the outputs of one GPU."""
    with engine(1) as e:
        return e.generate(*load(0, 150), progress=False)


@pytest.mark.parametrize("peer_memory", [True, False])
def test_same_as_one(peer_memory: bool, expected: list[fastgen.Output]) -> None:
    """In fp32, tokens are equal and logprobs nearly; nothing is compiled or captured after start-up."""
    with engine(peer_memory=peer_memory) as e:
        assert (e.runner.peer_buffers is not None) is peer_memory
        compiled, captured = num_compiled_graphs(), e.runner.graphs.num_captures
        for _ in range(2):
            outputs = e.generate(*load(0, 150), progress=False)
        assert (num_compiled_graphs(), e.runner.graphs.num_captures) == (compiled, captured)
        assert captured > 20
    for a, b in zip(outputs, expected, strict=True):
        assert [c.token_ids for c in a.completions] == [c.token_ids for c in b.completions]
        for x, y in zip(a.completions, b.completions, strict=True):
            assert x.logprobs == (None if y.logprobs is None else pytest.approx(y.logprobs, abs=1e-4))


@pytest.mark.parametrize("name", ["mid-size", "smollm2", "llama-1b"])
def test_bf16_differs_by_rounding_only(name: str) -> None:
    """In bf16, two GPUs differ from one by the rounding of partial sums only."""
    configs: dict[str, Any] = {
        "mid-size": CONFIG,
        # The model's 9 query heads and 3 KV heads do not divide by 2.
        "smollm2": json.loads((CONFIGS / "smollm2-135m-instruct.json").read_text())
        | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64},
        "llama-1b": json.loads((CONFIGS / "llama-3.2-1b-instruct.json").read_text()),
    }
    two = {"tensor_parallel": 2}
    rounding(fastgen.from_hf_config(configs[name]), {"one": {}, "two": two, "NCCL": two | {"peer_memory": False}})


def test_many_mixed_steps() -> None:
    """With random arrivals, lengths and aborts, ranks stay consistent, and every token equals one GPU's."""
    r = random.Random(1)
    with engine(cache_tokens=16384) as e:
        started, done = dict[int, tuple[list[int], SamplingParams]](), list[fastgen.Output]()
        for step in range(1500):
            if len(started) - len(done) < 60 and r.random() < 0.5:
                (prompt,), (params,) = load(step, 1)
                started[e.add(prompt, params)] = prompt, params
            if r.random() < 0.02 and started:
                e.abort(r.choice([*started]))
            done += [event.output for event in e.step() if event.output is not None]
            if step % 100 == 0:
                scheduler.check(e.state, e.config.schedule)
        while e.has_unfinished_requests:
            done += [event.output for event in e.step() if event.output is not None]
    assert len(done) > 200
    with engine(1) as e:
        replay = e.generate(*zip(*(started[o.request_id] for o in done), strict=True), progress=False)
    for a, b in zip(done, replay, strict=True):
        for x, y in zip(a.completions, b.completions, strict=True):
            n = len(x.token_ids)
            assert x.token_ids == y.token_ids[:n] and (n == len(y.token_ids) or x.finish_reason == "abort")


@pytest.mark.parametrize("peer_memory", [True, False])
def test_a_rank_is_killed(peer_memory: bool) -> None:
    """The device works after a rank was killed while kernels wait for that rank."""
    check_kill(engine(peer_memory=peer_memory), rank=1, after=2.0)
    assert float((torch.ones(1000, device="cuda") * 2).sum()) == 2000


def test_a_rank_raises() -> None:
    check_error(engine())
