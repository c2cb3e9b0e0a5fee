"""Logprobs of given tokens: the sampler's own, bit for bit where that is asked, and their gradients."""

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
    """[n - 1] logprobs by one forward and torch's own log_softmax."""
    pages = tuple(range(1, 2 + len(tokens) // 16))
    batch = fastgen.build_batch((Span(0, 0, len(tokens), True, pages),), {0: tokens}, 16)
    logits = fastgen.compute_logits(
        params, fastgen.hidden_states(params, fastgen.new_kv_cache(spec, 20 * 16), batch, spec)
    )
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


@pytest.fixture(autouse=True)
def seeded() -> None:
    DICE.seed(1)


def requests(n: int, *, most: int = 60) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of mixed lengths, some of which begin alike, and settings of all kinds."""
    common = sequences(37)[0]
    prompts = [common[: DICE.choice((0, 0, 20, 37))] + sequences(DICE.randint(1, most))[0] for _ in range(n)]
    kinds = [
        {}, {"temperature": 0}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 5, "repetition_penalty": 1.2},
        {"logprobs": 2}, {"n": 2},
    ]  # fmt: skip
    chosen = [{"logprobs": 0, "max_tokens": DICE.randint(1, 12)} | kinds[i % len(kinds)] for i in range(n)]
    return prompts, [SamplingParams(seed=i, **settings) for i, settings in enumerate(chosen)]


@pytest.fixture(params=CONFIGS)
def one(request: pytest.FixtureRequest) -> Iterator[tuple[fastgen.ModelConfig, fastgen.Params]]:
    yield model(request.param)


def test_scores_are_log_softmax(one: tuple[fastgen.ModelConfig, fastgen.Params]) -> None:
    """Ragged sequences, several in a batch and batches of one, deterministic or not."""
    spec, params = one
    many = sequences(5, 2, 131, 64, 1, 65)
    for how in ({}, {"token_budget": 70}, {"batch_invariant": True}):
        for tokens, found in zip(many, fastgen.score(params, spec, many, **how), strict=True):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, plain(params, spec, tokens), atol=1e-5, rtol=1e-5)


def test_first_and_temperature() -> None:
    spec, params = model("llama")
    many = sequences(12, 40)
    whole = fastgen.score(params, spec, many)
    part = fastgen.score(params, spec, many, first=[12, 7])
    assert not len(part[0])
    torch.testing.assert_close(part[1], whole[1][6:], atol=1e-6, rtol=1e-6)
    hot = fastgen.score(params, spec, many, temperature=1e6)
    torch.testing.assert_close(hot[1], torch.full((39,), -torch.tensor(101.0).log().item()), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("many", "how", "said"),
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
def test_what_cannot_be_scored(many: list[list[int]], how: dict[str, Any], said: str) -> None:
    spec, params = model("llama")
    with pytest.raises(ValueError, match=said):
        fastgen.score(params, spec, many, **how)


@pytest.mark.parametrize(
    ("sequences", "said"),
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
def test_what_are_no_token_ids(sequences: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        logprobs.to_token_ids(sequences)


class Words:
    """A tokenizer for which a character is a token."""

    eos_token_id = None

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(c) % 101 for c in text])


def test_texts_and_arrays_are_scored() -> None:
    spec, params = model("llama")
    many = [[ord(c) % 101 for c in "to be"], [3, 4, 5]]
    with fastgen.Engine(params, spec, page_size=16, cache_tokens=256) as engine:
        wanted = engine.score(many)
        assert all(map(torch.equal, engine.score([torch.tensor(tokens) for tokens in many]), wanted))
        arrays = [np.array(many[0], dtype=np.int32), tuple(map(np.int64, many[1]))]
        assert logprobs.to_token_ids(arrays) == many
        with pytest.raises(ValueError, match="no tokenizer"):
            engine.score(["to be"])
        engine.tokenizer = Words()  # type: ignore[assignment]
        assert all(map(torch.equal, engine.score(["to be", many[1]]), wanted))
        assert engine.score([]) == []
        with pytest.raises(ValueError, match="sequence 1: it has no tokens"):
            engine.score(["to be", ""])
        with pytest.raises(ValueError, match="sequence 0: token -1 is outside"):
            engine.score([[3, -1]])


def test_sampler_and_scorer(one: tuple[fastgen.ModelConfig, fastgen.Params]) -> None:
    """In fp32 they differ by rounding, and the report says by how much."""
    spec, params = one
    prompts, settings = requests(18)
    with fastgen.Engine(params, spec, page_size=16, cache_tokens=2048, token_budget=64, max_num_seqs=8) as engine:
        found = fastgen.compare_logprobs(engine.generate(prompts, settings), params, spec)
    assert found.num_tokens > 100
    assert found.max_abs_diff <= 1e-5
    assert 0 <= found.kl < 1e-9
    assert f"{found.num_tokens} tokens" in str(found)


def test_the_report_sees_a_difference() -> None:
    spec, params = model("llama")
    with fastgen.Engine(params, spec, page_size=16, cache_tokens=512) as engine:
        outputs = engine.generate(sequences(5, 9), SamplingParams(logprobs=0, max_tokens=6, seed=1))
    params.final_norm.mul_(1.1)
    found = fastgen.compare_logprobs(outputs, params, spec)
    assert found.num_tokens == 12
    assert found.max_abs_diff >= found.mean_abs_diff > 1e-3
    assert found.kl > 0
    with pytest.raises(ValueError, match="logprobs=0"):
        fastgen.compare_logprobs([fastgen.Output(0, [1], [fastgen.Completion([2])])], params, spec)


def test_deterministic_is_the_same_in_any_batch(one: tuple[fastgen.ModelConfig, fastgen.Params]) -> None:
    """Budgets, chunks, company, preemption, reuse, page sizes: not one bit of a logprob changes, nor in the scorer."""
    spec, params = one
    prompts, settings = requests(14)
    ways: list[dict[str, Any]] = [
        {"max_num_seqs": 1, "prefix_cache": False, "cache_tokens": 512},
        {"max_num_seqs": 16, "token_budget": 400},
        {"max_num_seqs": 5, "token_budget": 23, "page_size": 32},
        {
            "cache_tokens": 112,
            "page_size": 4,
            "token_budget": 64,
            "max_num_seqs": 9,
        },  # too small for all: some are preempted
    ]
    wanted = None
    for way in ways:
        how = {"page_size": 16, "cache_tokens": 4096, "batch_invariant": True} | way
        with fastgen.Engine(params, spec, **how) as engine:
            outputs = engine.generate(prompts, settings)
            num_preemptions = engine.cache_stats.num_preemptions
        assert num_preemptions or way.get("cache_tokens") != 112
        found = [(c.token_ids, c.logprobs, c.top_logprobs) for o in outputs for c in o.completions]
        wanted = wanted or found
        assert found == wanted
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


def test_plain_differs_between_batches() -> None:
    """What the mode above is for: a test that would also pass without it tests nothing."""
    spec, params = model("mistral")
    prompts, settings = requests(14)
    with fastgen.Engine(params, spec, page_size=16, cache_tokens=4096) as engine:
        assert fastgen.compare_logprobs(engine.generate(prompts, settings), params, spec).max_abs_diff > 0


def test_invariant_rows() -> None:
    """Each function of a row alone gives the same bits as among others, wherever it lies."""
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
        whole = call(torch.arange(137))
        for i in (slice(0, 1), slice(5, 8), slice(3, 36), slice(100, 137), slice(136, 137)):
            assert torch.equal(call(torch.arange(137)[i]), whole[i]), name


# --- gradients ------------------------------------------------------------------------------------------------------


def gradients(
    params: fastgen.Params, spec: fastgen.ModelConfig, many: list[list[int]], how: dict[str, Any]
) -> list[Tensor]:
    own = tree_map_only(Tensor, lambda w: w.clone().requires_grad_(), params)
    loss = sum(x.square().sum() for x in fastgen.score(own, spec, many, **how))
    assert isinstance(loss, Tensor)
    return list(torch.autograd.grad(loss, [*logprobs.iter_weights(own)]))


@pytest.mark.parametrize(
    "how", [{}, {"activation_checkpointing": True}, {"batch_invariant": True, "activation_checkpointing": True}]
)
def test_gradients(
    one: tuple[fastgen.ModelConfig, fastgen.Params], how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of one plain forward, with logits held a few rows at a time."""
    spec, params = one
    many = sequences(9, 70, 33)
    own = tree_map_only(Tensor, lambda w: w.clone().requires_grad_(), params)
    loss = sum(plain(own, spec, tokens).square().sum() for tokens in many)
    assert isinstance(loss, Tensor)
    wanted = torch.autograd.grad(loss, [*logprobs.iter_weights(own)])
    monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK", 700)
    for got, want in zip(gradients(params, spec, many, how), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4 * float(want.abs().max()), rtol=1e-3)


def test_gradients_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the forward has kernels without gradients, their plain twins' are taken."""
    spec, params = model("qwen3")
    many = sequences(21, 40)
    wanted = gradients(params, spec, many, {})

    def kernel(f: Any) -> Any:
        def call(*args: Any) -> Any:
            found = f(*(a.detach() if isinstance(a, Tensor) else a for a in args))
            assert not torch.is_grad_enabled()
            return found

        return call

    apart = ("attention", "embed", "out_proj", "down_proj")  # the last two call `linear`
    hard = {name: kernel(f) for name, f in TORCH_OPS._asdict().items() if name not in apart}
    ops = TORCH_OPS._replace(attention=lambda b, s: kernel(sdpa(b, s)), **hard)
    ops = make_differentiable(ops, reference_gradients=True)
    for got, want in zip(gradients(params, spec, many, {"ops": ops}), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5 * float(want.abs().max()), rtol=1e-3)


def test_no_gradients_unless_asked() -> None:
    spec, params = model("llama")
    own = tree_map_only(Tensor, lambda w: w.clone().requires_grad_(), params)
    with torch.no_grad():
        assert not fastgen.score(own, spec, sequences(4))[0].requires_grad
    assert not fastgen.score(params, spec, sequences(4))[0].requires_grad
