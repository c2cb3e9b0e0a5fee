"""Scores: logprobs of given tokens equal the sampler's, bit for bit if batch-invariant; and their gradients."""

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import fastgen
from fastgen import SamplingParams
from fastgen.core.attention import sdpa
from fastgen.core.model_config import TPShard
from fastgen.core.scheduler import Span
from fastgen.core.transformer import TORCH_OPS
from fastgen.distributed.tensor_parallel import TPProcessGroup
from fastgen.kernels import batch_invariant
from fastgen.training import logprobs
from fastgen.training.differentiable_ops import make_differentiable

BASE = tiny.SIZES | {"vocab_size": 101, "max_position_embeddings": 256}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    "mistral": {
        "architectures": ["MistralForCausalLM"], "sliding_window": 40,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "num_attention_heads": 6, "head_dim": 12},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 1, "head_dim": 8},
}  # fmt: skip
DICE = random.Random(0)


def model(name: str) -> tuple[fastgen.ModelConfig, fastgen.Params]:
    spec = fastgen.from_hf_config(BASE | CONFIGS[name])
    return spec, tiny.weights(spec, times=8)


def sequences(*lengths: int) -> list[list[int]]:
    return [[DICE.randrange(101) for _ in range(n)] for n in lengths]


def plain(params: fastgen.Params, spec: fastgen.ModelConfig, tokens: list[int]) -> Tensor:
    """Returns logprobs [n - 1] by one forward and torch's own log_softmax."""
    pages = tuple(range(1, 2 + len(tokens) // 16))
    batch = fastgen.build_batch((Span(0, 0, len(tokens), True, pages),), {0: tokens}, 16)
    logits = fastgen.compute_logits(
        params, fastgen.hidden_states(params, fastgen.new_kv_cache(spec, 20 * 16), batch, spec)
    )
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


@pytest.fixture(autouse=True)
def seeded() -> None:
    DICE.seed(1)


def requests(n: int, *, max_length: int = 60) -> tuple[list[list[int]], list[SamplingParams]]:
    """Returns prompts of mixed lengths, some of which share a prefix, and settings of all kinds."""
    common = sequences(37)[0]
    prompts = [common[: DICE.choice((0, 0, 20, 37))] + sequences(DICE.randint(1, max_length))[0] for _ in range(n)]
    choices = [
        {}, {"temperature": 0}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 5, "repetition_penalty": 1.2},
        {"logprobs": 2}, {"n": 2},
    ]  # fmt: skip
    settings = [{"logprobs": 0, "max_tokens": DICE.randint(1, 12)} | choices[i % len(choices)] for i in range(n)]
    return prompts, [SamplingParams(seed=i, **kwargs) for i, kwargs in enumerate(settings)]


@pytest.fixture(params=CONFIGS)
def spec_and_params(request: pytest.FixtureRequest) -> Iterator[tuple[fastgen.ModelConfig, fastgen.Params]]:
    yield model(request.param)


def test_scores_are_log_softmax(spec_and_params: tuple[fastgen.ModelConfig, fastgen.Params]) -> None:
    """Sequences of several lengths score alike in one batch, in several batches, and batch-invariantly."""
    spec, params = spec_and_params
    batch = sequences(5, 2, 131, 64, 1, 65)
    for options in ({}, {"token_budget": 70}, {"batch_invariant": True}):
        for tokens, actual in zip(batch, fastgen.score(params, spec, batch, **options), strict=True):
            assert actual.dtype == torch.float32
            torch.testing.assert_close(actual, plain(params, spec, tokens), atol=1e-5, rtol=1e-5)


def test_first_and_temperature() -> None:
    spec, params = model("llama")
    batch = sequences(12, 40)
    full = fastgen.score(params, spec, batch)
    part = fastgen.score(params, spec, batch, first=[12, 7])
    assert not len(part[0])
    torch.testing.assert_close(part[1], full[1][6:], atol=1e-6, rtol=1e-6)
    hot = fastgen.score(params, spec, batch, temperature=1e6)
    torch.testing.assert_close(hot[1], torch.full((39,), -torch.tensor(101.0).log().item()), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        ([[]], {}, "has no tokens"),
        ([[1, 2]], {"first": 3}, "not within 1 to 2"),
        ([[1, 2]], {"first": 0}, "not within 1 to 2"),
        ([[1, 101]], {}, "token 101 is outside"),
        ([[1] * 257], {}, "context of 256"),
        ([[1, 2]], {"first": [1, 1]}, "2 values of `first` for 1"),
        ([[1, 2], [1, -3]], {}, "sequence 1: token -3 is outside"),
        ([[1, 2]], {"temperature": 0}, "temperature must be finite"),
        ([[1, 2]], {"temperature": 1e-44}, "at least 1e-05"),
    ],
)
def test_sequences_that_cannot_be_scored(batch: list[list[int]], options: dict[str, Any], message: str) -> None:
    spec, params = model("llama")
    with pytest.raises(ValueError, match=message):
        fastgen.score(params, spec, batch, **options)


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ("text", "takes a list of sequences, .* not str"),
        (5, "not int"),
        ({"prompt_token_ids": [1]}, "not dict"),
        (["text"], "sequence 0 is a text, and there is no tokenizer"),
        ([[1], "text"], "sequence 1 is a text"),
        ([1, 2], r"sequence 0 is a number: .*\[\[1, 2, 3\]\]"),
        (torch.tensor([1, 2]), "sequence 0 is a number"),
        ([[1], None], "sequence 1 is a NoneType"),
        ([{"role": "user"}], "sequence 0 is a dict"),
        ([[[1, 2]]], "has a list in it"),
        ([[1, "2"]], "has a str in it"),
        ([[1, True]], "has a bool in it"),
        ([[1, None]], "has a NoneType in it"),
        (torch.ones(1, 2), "has a float in it"),
    ],
)
def test_values_that_are_no_token_ids(sequences: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        logprobs.to_token_ids(sequences)


class Words:
    """Tokenizes a text to one token per character."""

    eos_token_id = None

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(c) % 101 for c in text])


def test_texts_and_arrays_are_scored() -> None:
    spec, params = model("llama")
    batch = [[ord(c) % 101 for c in "to be"], [3, 4, 5]]
    with fastgen.Engine(params, spec, page_size=16, cache_tokens=256) as engine:
        expected = engine.score(batch)
        assert all(map(torch.equal, engine.score([torch.tensor(tokens) for tokens in batch]), expected))
        arrays = [np.array(batch[0], dtype=np.int32), tuple(map(np.int64, batch[1]))]
        assert logprobs.to_token_ids(arrays) == batch
        with pytest.raises(ValueError, match="no tokenizer"):
            engine.score(["to be"])
        engine.tokenizer = Words()  # type: ignore[assignment]
        assert all(map(torch.equal, engine.score(["to be", batch[1]]), expected))
        assert engine.score([]) == []
        with pytest.raises(ValueError, match="sequence 1: it has no tokens"):
            engine.score(["to be", ""])
        with pytest.raises(ValueError, match="sequence 0: token -1 is outside"):
            engine.score([[3, -1]])


def test_sampler_and_scorer(spec_and_params: tuple[fastgen.ModelConfig, fastgen.Params]) -> None:
    """Logprobs of sampler and scorer differ by rounding in fp32, and the report says by how much."""
    spec, params = spec_and_params
    prompts, settings = requests(18)
    with fastgen.Engine(params, spec, page_size=16, cache_tokens=2048, token_budget=64, max_num_seqs=8) as engine:
        mismatch = fastgen.compare_logprobs(engine.generate(prompts, settings), params, spec)
    assert mismatch.num_tokens > 100
    assert mismatch.max_abs_diff <= 1e-5
    assert 0 <= mismatch.kl < 1e-9
    assert f"{mismatch.num_tokens} tokens" in str(mismatch)


def test_the_report_sees_a_difference() -> None:
    spec, params = model("llama")
    with fastgen.Engine(params, spec, page_size=16, cache_tokens=512) as engine:
        outputs = engine.generate(sequences(5, 9), SamplingParams(logprobs=0, max_tokens=6, seed=1))
    params.final_norm.mul_(1.1)
    mismatch = fastgen.compare_logprobs(outputs, params, spec)
    assert mismatch.num_tokens == 12
    assert mismatch.max_abs_diff >= mismatch.mean_abs_diff > 1e-3
    assert mismatch.kl > 0
    with pytest.raises(ValueError, match="logprobs=0"):
        fastgen.compare_logprobs([fastgen.Output(0, [1], [fastgen.Completion([2])])], params, spec)


def test_batch_invariant_logprobs_are_the_same_in_any_batch(
    spec_and_params: tuple[fastgen.ModelConfig, fastgen.Params],
) -> None:
    """Batches, chunks, preemption, prefix cache and page size change no bit of a logprob, and the scorer agrees."""
    spec, params = spec_and_params
    prompts, settings = requests(14)
    engine_settings: list[dict[str, Any]] = [
        {"max_num_seqs": 1, "prefix_cache": False, "cache_tokens": 512},
        {"max_num_seqs": 16, "token_budget": 400},
        {"max_num_seqs": 5, "token_budget": 23, "page_size": 32},
        {"cache_tokens": 112, "page_size": 4, "token_budget": 64, "max_num_seqs": 9},  # small: some are preempted
    ]
    expected = None
    for changes in engine_settings:
        options = {"page_size": 16, "cache_tokens": 4096, "batch_invariant": True} | changes
        with fastgen.Engine(params, spec, **options) as engine:
            outputs = engine.generate(prompts, settings)
            num_preemptions = engine.cache_stats.num_preemptions
        assert num_preemptions or changes.get("cache_tokens") != 112
        actual = [(c.token_ids, c.logprobs, c.top_logprobs) for o in outputs for c in o.completions]
        expected = expected or actual
        assert actual == expected
        difference = fastgen.compare_logprobs(outputs, params, spec, batch_invariant=True)
        assert difference.num_tokens > 80
        assert difference.max_abs_diff == 0.0


def test_several_ranks_are_refused() -> None:
    spec, params = model("llama")
    group = MagicMock(spec=TPProcessGroup, shard=TPShard(0, 2))
    with pytest.raises(ValueError, match="all-reduces have no fixed order"):
        fastgen.Engine(params, spec, tp_group=group, batch_invariant=True, cache_tokens=256)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds for one device"):
        fastgen.EngineConfig.from_flat(batch_invariant=True, tensor_parallel=2)
    with pytest.raises(ValueError, match="merge one"):
        fastgen.EngineConfig.from_flat(batch_invariant=True, max_adapters=1)


def test_other_logprobs_differ_between_batches() -> None:
    """Without batch invariance, logprobs of sampler and scorer do differ: the test above is not vacuous."""
    spec, params = model("mistral")
    prompts, settings = requests(14)
    with fastgen.Engine(params, spec, page_size=16, cache_tokens=4096) as engine:
        assert fastgen.compare_logprobs(engine.generate(prompts, settings), params, spec).max_abs_diff > 0


def test_batch_invariant_ops() -> None:
    """Each op returns the same bits for a row alone as for that row within a batch, at any position."""
    spec, params = model("qwen3")
    layer = params.layers[0]
    x, y = torch.randn(2, 137, spec.hidden_size)
    position, ops = torch.randint(250, (137,)), batch_invariant.batch_invariant_ops("cpu")
    calls = {
        "add_norm_qkv": lambda i: ops.add_norm_qkv(
            x[i], y[i], layer.attn_norm, spec.rms_norm_eps, layer.qkv, layer.qkv_bias
        )[1],
        "add_norm_gate_up": lambda i: ops.add_norm_gate_up(
            x[i], y[i], layer.ffn_norm, spec.rms_norm_eps, layer.gate_up
        )[1],
        "embed": lambda i: torch.cat(ops.embed(params.embed, position[i] % 101, position[i], spec)[2:], -1),
        "final_norm": lambda i: ops.final_norm(x[i], y[i], params.final_norm, spec.rms_norm_eps),
        "lm_head": lambda i: ops.lm_head(x[i], params.embed),
        "logprobs": lambda i: ops.logprobs(x[i], position[i] % spec.hidden_size, 0)[0],
        "apply_qk_norm": lambda i: ops.apply_qk_norm(
            x[i, None].expand(-1, 6, -1)[..., :8].contiguous(), layer.q_norm, layer.k_norm, spec
        ),
    }
    for name, call in calls.items():
        full = call(torch.arange(137))
        for i in (slice(0, 1), slice(5, 8), slice(3, 36), slice(100, 137), slice(136, 137)):
            assert torch.equal(call(torch.arange(137)[i]), full[i]), name


# --- gradients ------------------------------------------------------------------------------------------------------


def gradients(
    params: fastgen.Params, spec: fastgen.ModelConfig, batch: list[list[int]], options: dict[str, Any]
) -> list[Tensor]:
    own = tree_map_only(Tensor, lambda w: w.clone().requires_grad_(), params)
    loss = sum(x.square().sum() for x in fastgen.score(own, spec, batch, **options))
    assert isinstance(loss, Tensor)
    return list(torch.autograd.grad(loss, [*logprobs.iter_weights(own)]))


@pytest.mark.parametrize(
    "options", [{}, {"activation_checkpointing": True}, {"batch_invariant": True, "activation_checkpointing": True}]
)
def test_gradients(
    spec_and_params: tuple[fastgen.ModelConfig, fastgen.Params],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gradients of scores equal those of one plain forward, with logits of a few rows at a time."""
    spec, params = spec_and_params
    batch = sequences(9, 70, 33)
    own = tree_map_only(Tensor, lambda w: w.clone().requires_grad_(), params)
    loss = sum(plain(own, spec, tokens).square().sum() for tokens in batch)
    assert isinstance(loss, Tensor)
    expected = torch.autograd.grad(loss, [*logprobs.iter_weights(own)])
    monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK", 700)
    for actual, grad in zip(gradients(params, spec, batch, options), expected, strict=True):
        torch.testing.assert_close(actual, grad, atol=1e-4 * float(grad.abs().max()), rtol=1e-3)


def test_gradients_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels without gradients get those of their torch equivalents."""
    spec, params = model("qwen3")
    batch = sequences(21, 40)
    expected = gradients(params, spec, batch, {})

    def kernel(f: Any) -> Any:
        def call(*args: Any) -> Any:
            result = f(*(a.detach() if isinstance(a, Tensor) else a for a in args))
            assert not torch.is_grad_enabled()
            return result

        return call

    without_kernels = ("attention", "embed", "out_proj", "down_proj")  # the last two call `linear`
    kernels = {name: kernel(f) for name, f in TORCH_OPS._asdict().items() if name not in without_kernels}
    ops = TORCH_OPS._replace(attention=lambda b, s: kernel(sdpa(b, s)), **kernels)
    ops = make_differentiable(ops, reference_gradients=True)
    for actual, grad in zip(gradients(params, spec, batch, {"ops": ops}), expected, strict=True):
        torch.testing.assert_close(actual, grad, atol=1e-5 * float(grad.abs().max()), rtol=1e-3)


def test_no_gradients_unless_asked() -> None:
    spec, params = model("llama")
    own = tree_map_only(Tensor, lambda w: w.clone().requires_grad_(), params)
    with torch.no_grad():
        assert not fastgen.score(own, spec, sequences(4))[0].requires_grad
    assert not fastgen.score(params, spec, sequences(4))[0].requires_grad
