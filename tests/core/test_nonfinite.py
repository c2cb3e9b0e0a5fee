"""NaN and infinities: whom they concern is told, and nobody else ever meets them, whatever they leave in memory."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import fastgen
from fastgen import Output, SamplingParams, lora

SPEC = fastgen.from_hf_config(tiny.config("Mistral", **tiny.WINDOWED))
PROMPTS = [[(7 * i + j) % 61 for j in range(n)] for i, n in enumerate((5, 1, 19, 9, 2, 11))]
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "greedy with logprobs": {"temperature": 0, "logprobs": 2},
    "drawn": {"temperature": 0.8},
    "filtered": {"temperature": 1.1, "top_k": 9, "top_p": 0.9, "min_p": 0.01},
    "penalised": {"temperature": 0.9, "repetition_penalty": 1.2, "logit_bias": {3: 2.0}, "logprob_mode": "processed"},
    "scored": {"temperature": 0, "prompt_logprobs": 1, "logprobs": 0},
}
SAMPLING = [SamplingParams(**how, seed=i, max_tokens=6, ignore_eos=True) for i, how in enumerate(KINDS.values())]
NAN = tree_map_only(Tensor, lambda w: w * math.nan, tiny.weights(SPEC))
WAYS: dict[str, dict[str, Any]] = {
    "sdpa": {},
    "reference": {"attention": "reference"},
    "deterministic": {"batch_invariant": True},
    "no prefix cache": {"prefix_cache": False, "token_budget": 16, "max_num_seqs": 4},
    "host": {"offload": "host", "host_gb": 0.001, "cache_tokens": 96},
}


def engine(**settings: Any) -> fastgen.Engine:
    settings = {"page_size": 8, "cache_tokens": 256, "compile": "eager", "seed": 0, "progress": False} | settings
    return fastgen.Engine(tiny.weights(SPEC), SPEC, **settings)


def told(outputs: Iterable[Output]) -> list[Any]:
    """Everything that requests were given."""
    return [(o.completions[0].token_ids, o.completions[0].logprobs, o.prompt_logprobs, o.completions[0].finish_reason)
            for o in outputs]  # fmt: skip


def broken(outputs: Iterable[Output]) -> bool:
    """Whether all of them ended before the first token, with an error."""
    return all(
        (c.finish_reason, c.token_ids, c.weight_versions) == ("error", [], []) for o in outputs for c in o.completions
    )


@pytest.mark.parametrize("way", WAYS)
def test_what_memory_held_before_does_not_matter(way: str) -> None:
    """All pages, scratch among them, and all of the host's begin as NaN: the same bits as from zeros."""
    with engine(**WAYS[way]) as clean, engine(**WAYS[way]) as poisoned:
        for x in (*tree_leaves(poisoned.cache), *poisoned.page_copier.host_buffers):
            x.fill_(math.nan)
        for _ in range(2):  # the second time with what is cached
            wanted = told(clean.generate(PROMPTS, SAMPLING))
            assert told(poisoned.generate(PROMPTS, SAMPLING)) == wanted
        assert all(x[3] == "length" for x in wanted)


@pytest.mark.parametrize("way", WAYS)
def test_parameters_of_nan_and_then_good_ones(way: str) -> None:
    """Requests of every kind end with an error under parameters of NaN, those in flight too; after good ones
    everybody gets what an engine gives that never saw any."""
    with engine(**WAYS[way]) as clean, engine(**WAYS[way]) as one:
        wanted = told(clean.generate(PROMPTS, SAMPLING))
        ids = [one.add(p, s) for p, s in zip(PROMPTS, SAMPLING, strict=True)]
        done: dict[int, Output] = {}
        for _ in range(3):
            done |= {e.request_id: e.output for e in one.step() if e.output is not None}
        one.update_params(NAN, check_finite=False)
        while one.has_unfinished_requests:
            done |= {e.request_id: e.output for e in one.step() if e.output is not None}
        for id, (tokens, *_) in zip(ids, wanted, strict=True):
            c = done[id].completions[0]
            assert c.finish_reason == "error" and len(c.token_ids) == len(c.weight_versions) < 6
            assert c.token_ids == tokens[: len(c.token_ids)] and {*c.weight_versions} <= {0}
            assert c.logprobs is None or len(c.logprobs) == len(c.token_ids) and all(map(math.isfinite, c.logprobs))
        assert broken(one.generate(PROMPTS, SAMPLING))
        one.update_params(tiny.weights(SPEC))
        assert told(one.generate(PROMPTS, SAMPLING)) == wanted


def _nan_in_a_norm(params: fastgen.Params) -> None:
    params.final_norm[3] = math.nan


def _infinite_head(params: fastgen.Params) -> None:
    params.lm_head[5] = math.inf  # type: ignore[index]


def _overflow(params: fastgen.Params) -> None:
    params.layers[1].gate_up.mul_(1e25)  # whose product is beyond fp32


@pytest.mark.parametrize("spoil", [_nan_in_a_norm, _infinite_head, _overflow])
def test_a_trainers_own_writes(spoil: Callable[[fastgen.Params], None]) -> None:
    """What passes through no call of the engine ends requests with an error, until it is mended in place."""
    good = tiny.weights(SPEC)
    with engine() as one, torch.no_grad():
        wanted = told(one.generate(PROMPTS, SAMPLING))
        spoil(one.params)
        assert broken(one.generate(PROMPTS, SAMPLING))
        for x, y in zip(tree_leaves(one.params), tree_leaves(good), strict=True):
            if x is not None:
                x.copy_(y)
        assert told(one.generate(PROMPTS, SAMPLING)) == wanted


def test_an_adapter_that_overflows() -> None:
    """Its own requests end with an error; those beside it, and those after it is gone, never notice."""
    plain = lora.init(SPEC, rank=2, device="cpu")
    huge = tree_map_only(Tensor, lambda x: torch.full_like(x, 1e30), plain)
    some = tree_map_only(Tensor, lambda x: torch.ones_like(x) / 8, plain)
    with engine(max_adapters=1, max_rank=4) as one, engine(max_adapters=1, max_rank=4) as clean:
        wanted = told(clean.generate(PROMPTS, SAMPLING))
        one.add_adapter("huge", huge)
        mixed = [p for p in PROMPTS for _ in range(2)]
        sampling = [
            x for i, s in enumerate(SAMPLING) for x in (s, SamplingParams(adapter="huge", seed=i, max_tokens=9))
        ]
        found = one.generate(mixed, sampling)
        assert broken(found[1::2])
        assert [(t, r) for t, _, _, r in told(found[::2])] == [(t, r) for t, _, _, r in wanted]
        one.remove_adapter("huge")
        assert [x[0] for x in told(one.generate(PROMPTS, SAMPLING))] == [x[0] for x in wanted]
        for e in (one, clean):
            e.add_adapter("some", some)
        work = PROMPTS, [SamplingParams(adapter="some", seed=i, max_tokens=6) for i in range(6)]
        assert told(one.generate(*work)) == told(clean.generate(*work))


def test_a_prompt_that_cannot_be_scored() -> None:
    """A prompt's logprob of NaN ends the request where the output's would not show it: no key of that token is seen."""
    windowed = fastgen.from_hf_config(tiny.config("Mistral", sliding_window=4))
    params = tiny.weights(windowed)
    params.embed[7] = math.nan  # of an input; the head is another matrix
    prompt = [7, *range(20, 40)]
    with fastgen.Engine(
        params, windowed, compile="eager", attention="reference", cache_tokens=256, progress=False
    ) as one:
        plain, scored = (SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=x) for x in (None, 0))
        assert one.generate(prompt, plain)[0].completions[0].finish_reason == "length"
        assert broken(one.generate(prompt, scored))


@pytest.mark.parametrize("temperature", [1e-44, 1.2e-38, 1e-300, 9e-6])
def test_a_temperature_near_0_is_greedy(temperature: float) -> None:
    """In every output of a request, and in the request's own settings."""
    ways: list[dict[str, Any]] = [{}, {"logprobs": 3}, {"logprobs": 2, "logprob_mode": "processed", "top_k": 5}]
    with engine() as one:
        greedy, cold = (
            [SamplingParams(temperature=t, seed=1, max_tokens=9, ignore_eos=True, **how) for how in ways]
            for t in (0, temperature)
        )
        assert cold == greedy
        wanted, found = ([one.generate(PROMPTS[2], s)[0].completions[0] for s in all_of] for all_of in (greedy, cold))
        assert wanted == found and all(math.isfinite(x) for c in found for x in c.logprobs or ())
