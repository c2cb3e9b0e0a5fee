"""Tests of benchmarks/quality.py: its figures against the logprobs that engines report, and its text."""

import importlib.util
import math
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import fastgen
from fastgen.checkpoint import tokenizer as tokenizers
from fastgen.checkpoint.hub import default_model_path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "quality.py"
CONFIG = fastgen.from_hf_config(tiny.config())


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Returns the script as a module, with sizes that split sequences of a few dozen tokens."""
    spec = importlib.util.spec_from_file_location("quality", SCRIPT)
    assert spec is not None and spec.loader is not None
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")  # the script sets it
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.CHUNK, module.LOGITS_PER_CHUNK = 16, 5 * CONFIG.vocab_size
    return module


def load_engine(dtype: str, **settings: Any) -> fastgen.Engine:
    params = tiny.weights(CONFIG, times=4, device="cpu")
    params = tree_map_only(Tensor, lambda w: w.to(getattr(torch, dtype)), params)
    return fastgen.Engine(params, CONFIG, page_size=8, cache_tokens=128, **settings)


def prompt_logprobs(engine: fastgen.Engine, token_ids: list[int]) -> Tensor:
    """Returns the logprobs of the whole vocabulary before each token but the first, as the engine reports them."""
    sampling = fastgen.SamplingParams(prompt_logprobs=CONFIG.vocab_size, max_tokens=1)
    rows = engine.generate([token_ids], sampling, progress=False)[0].prompt_top_logprobs
    assert rows is not None
    return torch.tensor([[row[i] for i in range(CONFIG.vocab_size)] for row in rows[1:] if row], dtype=torch.float64)


def test_figures_are_those_of_the_engines_logprobs(quality: ModuleType) -> None:
    """Perplexity, KL and agreement of two sequences equal those of the distributions that engines report."""
    first = torch.randint(CONFIG.vocab_size, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    sequences = [quality.TextSequence(first + first[:9], 9), quality.TextSequence(first[7:30])]
    variants = quality.VARIANTS
    expected = {}
    for name, settings in variants.items():
        with load_engine(**settings) as engine:
            expected[name] = [prompt_logprobs(engine, s.token_ids) for s in sequences]
    copied = torch.tensor([False] * 39 + [True] * 9 + [False] * 22)
    targets = torch.tensor(sequences[0].token_ids[1:] + sequences[1].token_ids[1:])[:, None]
    logp = torch.cat(expected["fp32"])
    engines = set()
    for name, engine, _, stats in quality.measure(load_engine, sequences, variants, progress=False):
        engines.add(engine)
        assert stats.position.tolist() == [*range(1, 49), *range(1, 23)] and torch.equal(stats.is_copy, copied)
        logq = torch.cat(expected[name])
        nll, kl = -logq.gather(1, targets)[:, 0], (logp.exp() * (logp - logq)).sum(-1)
        # Engines compute a bf16 model's matmuls by torch's bf16 kernels here, which round sums in another order.
        tolerance = 0.05 if name == "bf16" else 2e-5
        text = quality.variant_result(stats, (0, 20, 64))["text"]
        assert text["num_tokens"] == 61
        assert text["perplexity"] == pytest.approx(float(nll[~copied].mean().exp()), rel=tolerance)
        assert text["kl_mean"] == pytest.approx(float(kl[~copied].mean()), rel=10 * tolerance, abs=1e-7)
        assert text["kl_p99_9"] == pytest.approx(float(kl[~copied].quantile(0.999)), rel=10 * tolerance, abs=1e-6)
        agreement = float((logp.argmax(-1) == logq.argmax(-1))[~copied].double().mean())
        assert text["top1_agreement"] == pytest.approx(agreement, abs=0.04 if name == "bf16" else 1e-9)
        assert (text["kl_mean"] > 1e-6) == (name != "fp32")
    assert len(engines) == len(variants) and all(engine.access_guard.closed for engine in engines)


def test_summaries(quality: ModuleType) -> None:
    """Every token is in one range of positions or in the copy, and the figures are those of its tokens."""
    num = 2000
    nll, reference = torch.arange(num) / num, torch.zeros(num)
    copy = torch.arange(num) >= 1500
    kl = torch.where(torch.arange(num) < 2, 1.0, 0.0)
    stats = quality.TokenStats(torch.arange(num) + 1, copy, nll, reference, kl, ~copy)
    result = quality.variant_result(stats, (0, 1001, 4096))
    ranges = [(r["start"], r["stop"], r["num_tokens"]) for r in result["positions"]]
    assert ranges == [(0, 1001, 1000), (1001, 4096, 500)]
    assert result["copy"]["num_tokens"] == 500 and result["copy"]["top1_agreement"] == 0
    text = result["text"]
    assert text["num_tokens"] == 1500 and text["top1_agreement"] == 1
    assert text["perplexity"] == pytest.approx(math.exp(1499 / 2 / num)) and text["kl_mean"] == pytest.approx(2 / 1500)
    assert text["kl_max"] == 1 and text["kl_p99_9"] == pytest.approx(0.501)
    assert text["nll_increase_stderr"] == pytest.approx(float(nll[:1500].double().std()) / 1500**0.5)


def test_text(quality: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is the same in every call; the first sequence ends with its start, and the next one goes on."""
    monkeypatch.setattr(quality.sys, "stdlib_module_names", {"argparse", "decimal", "typing"})  # all take seconds
    tokenizer = tokenizers.load(default_model_path())
    make = partial(quality.text_sequences, tokenizer, (256, 128), 32)
    first, second = sequences = make()
    assert (len(first.token_ids), len(second.token_ids)) == (256, 128) and sequences == make()
    assert first.token_ids[-32:] == first.token_ids[:32] and (first.num_copied, second.num_copied) == (32, 0)
    document = next(quality.documents())
    assert document in {topic[:6000] for topic in quality.topics.values()}
    assert document.startswith(tokenizer.decode(first.token_ids[:200]))
