"""The forward of every family against transformers, and its layers against their formulae, in fp32."""

import math
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import fastgen
from fastgen import ModelConfig, Params, RopeConfig, SamplingParams
from fastgen.checkpoint import weights
from fastgen.core.layers import apply_rope, rms_norm, rope_cos_sin, rope_inv_freq, swiglu
from fastgen.core.scheduler import Span
from fastgen.kernels.select import ATTENTION_BACKENDS, select_attention_backend

PAGE = 4
BACKENDS = {name: select_attention_backend(name, torch.get_default_device()) for name in ATTENTION_BACKENDS}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MSCALE = YARN | {"mscale": 1.5, "mscale_all_dim": 0.7}
FACTOR = YARN | {"attention_factor": 0.8}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
FULL, SLIDING = "full_attention", "sliding_attention"

# (family, query heads, kv heads, head width or None for dim / heads, the config's other keys)
CASES: dict[str, tuple[str, int, int, int | None, dict[str, Any]]] = {
    "llama": ("Llama", 4, 4, None, {"tie_word_embeddings": True}),
    "llama-3.1": ("Llama", 8, 2, 12, {"rope_parameters": LLAMA3, "attention_bias": True}),
    "llama-linear": ("Llama", 7, 1, 10, {"rope_parameters": LINEAR}),
    "llama-yarn": ("Llama", 4, 1, None, {"rope_parameters": YARN | {"beta_fast": 16.0, "beta_slow": 2.0}}),
    "llama-yarn-mscale": ("Llama", 5, 1, 16, {"rope_parameters": MSCALE}),
    "mistral": ("Mistral", 4, 1, 24, {"sliding_window": None}),
    "mistral-window": ("Mistral", 8, 2, None, {"sliding_window": 7, "tie_word_embeddings": True}),
    "mistral-yarn": ("Mistral", 4, 4, 16, {"rope_parameters": FACTOR, "sliding_window": 20}),
    "ministral": ("Ministral", 5, 1, 16, {"layer_types": [SLIDING, FULL, SLIDING], "sliding_window": 6}),
    "qwen2": ("Qwen2", 14, 2, None, {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2", 5, 1, None, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    ),
    "qwen2-yarn": ("Qwen2", 7, 1, None, {"rope_parameters": YARN | {"truncate": False}}),
    "qwen3": ("Qwen3", 8, 2, 24, {}),
    "qwen3-window": (
        "Qwen3", 7, 7, 16,
        {"use_sliding_window": True, "sliding_window": 9, "layer_types": [FULL, SLIDING, SLIDING],
         "attention_bias": True, "tie_word_embeddings": True, "rope_parameters": LINEAR},
    ),
}  # fmt: skip


@cache
def build(name: str) -> tuple[torch.nn.Module, ModelConfig, Params]:
    """A random model of transformers, and the same weights as ours. Wide weights spread the logits."""
    family, q_heads, kv_heads, head, rest = CASES[name]
    dim = {5: 60, 8: 64}.get(q_heads, 56)
    sizes = {"vocab_size": 97, "hidden_size": dim, "intermediate_size": 40, "num_hidden_layers": 3}
    heads = {"num_attention_heads": q_heads, "num_key_value_heads": kv_heads}
    width = {} if head is None else {"head_dim": head}
    config = getattr(transformers, f"{family}Config")(
        **sizes, **heads, **width, max_position_embeddings=256, attn_implementation="eager", **rest
    )
    torch.manual_seed(len(name))
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval().requires_grad_(False)
    for key, weight in model.named_parameters():
        weight.normal_(1.0 if "norm" in key else 0.0, 0.2)
    spec = fastgen.from_hf_config(config.to_dict() | {"architectures": [type(model).__name__]})
    params = fastgen.init(spec, dtype=torch.float32)
    weights.update(params, spec, model.state_dict().items())
    return model, spec, params


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(
        97, (length,), generator=torch.Generator(torch.get_default_device()).manual_seed(seed)
    ).tolist()


def empty(spec: ModelConfig, pages: int) -> fastgen.KVCache:
    return fastgen.new_kv_cache(spec, pages * PAGE, dtype=torch.float32)


@torch.no_grad()
def theirs(model: torch.nn.Module, tokens: list[int]) -> Tensor:
    """Logits [T, V] of transformers."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_logits(name: str, backend: str) -> None:
    """Every logit of two prompts in one step; the longer exceeds all windows and yarn's original context."""
    model, spec, params = build(name)
    tokens = {0: prompt(70, 1), 1: prompt(9, 2)}
    plan = (Span(0, 0, 70, True, tuple(range(20, 2, -1))), Span(1, 0, 9, True, (1, 22, 2)))
    batch = fastgen.build_batch(plan, tokens, PAGE)
    x = fastgen.hidden_states(params, empty(spec, 23), batch, spec, BACKENDS[backend])
    torch.testing.assert_close(
        fastgen.compute_logits(params, x), torch.cat([theirs(model, t) for t in tokens.values()]), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("name", CASES)
def test_greedy(name: str) -> None:
    """64 greedy tokens of prompts computed together and in pieces: each is the most likely one."""
    model, spec, params = build(name)
    prompts = [prompt(n, n) for n in (1, 12, 33)]
    greedy = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    limits = {"token_budget": 8, "max_num_seqs": 3, "prefill_chunk": 5}
    with fastgen.Engine(params, spec, page_size=PAGE, cache_tokens=400, **limits) as engine:
        outputs = engine.generate(prompts, greedy)
    for out in outputs:
        sampled = out.completions[0].token_ids
        likely = theirs(model, out.prompt_token_ids + sampled).argmax(-1)[-65:-1]
        assert sampled == likely.tolist() and len(sampled) == 64


def test_cases_cover_what_they_should() -> None:
    """Each option is on in some case and off in another; else a case here tests less than it says."""
    specs = [build(name)[1] for name in CASES]
    assert {s.rope.rope_type for s in specs} == {"default", "linear", "llama3", "yarn"}
    assert {s.num_q_heads // s.num_kv_heads for s in specs} == {1, 4, 5, 7}
    for on in (
        {s.tie_word_embeddings for s in specs},
        {s.qk_norm for s in specs},
        {s.rope.truncate for s in specs},
        {s.qkv_bias for s in specs},
        {s.out_bias for s in specs},
        {s.head_dim == s.hidden_size // s.num_q_heads for s in specs},
        {None in s.sliding_windows for s in specs},
        {any(s.sliding_windows) for s in specs},
    ):
        assert on == {False, True}
    assert sum(len(set(s.sliding_windows)) > 1 for s in specs) == 3  # windows on some layers only
    assert len({s.rope.attention_factor for s in specs}) == 4


def step(pad: int = 0) -> tuple[fastgen.Batch, fastgen.KVCache, ModelConfig, Params]:
    """A step that decodes one sequence, continues one and begins one, over a cache full of noise."""
    _, spec, params = build("ministral")
    tokens = {i: prompt(30, i) for i in range(3)}
    plan = (
        Span(0, 17, 18, True, (5, 2, 9, 1, 12)),
        Span(1, 8, 21, False, (3, 4, 6, 11, 7, 8)),
        Span(2, 0, 6, True, (13, 10)),
    )
    noise = torch.Generator(torch.get_default_device()).manual_seed(0)
    cache = tree_map(lambda leaf: leaf.normal_(generator=noise), empty(spec, 15))
    return fastgen.build_batch(plan, tokens, PAGE, pad_to=pad), cache, spec, params


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pad", [1, 20, 21, 40])
def test_padding_changes_nothing(pad: int, backend: str) -> None:
    """Rows of padding give the same logits and the same cache, but for the scratch page."""
    results = []
    for k in (0, pad):
        batch, cache, spec, params = step(k)
        assert len(batch.token_ids) == max(k, 20)
        assert (batch.slot_mapping[20:] < PAGE).all() and (batch.req_idx[3:] == 0).all()
        logits = fastgen.forward(params, cache, batch, spec, BACKENDS[backend])
        results.append((logits, tree_map(lambda leaf: leaf[PAGE:], cache)))
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_writes_nothing_but_the_cache_at_its_slots(backend: str) -> None:
    """Parameters and batch stay as they were, and of the cache only the slots of the step's tokens change."""
    batch, cache, spec, params = step()
    before = tree_map_only(Tensor, torch.clone, (params, batch, cache))
    logits = fastgen.forward(params, cache, batch, spec, BACKENDS[backend])
    assert logits.shape == (2, spec.vocab_size) and logits.dtype == torch.float32
    torch.testing.assert_close((params, batch), before[:2], atol=0, rtol=0)
    written = torch.zeros(15 * PAGE, dtype=torch.bool)
    written[batch.slot_mapping] = True
    for old, new in zip((*before[2].k, *before[2].v), (*cache.k, *cache.v), strict=True):
        assert torch.equal((old != new).any((1, 2)), written)


def test_tokens_after_the_last_page_read_the_same_cache() -> None:
    """The cache a prompt leaves when computed in pieces is the one it leaves at once."""
    _, spec, params = build("llama-3.1")
    tokens, held = {0: prompt(22, 5)}, (4, 1, 6, 2, 3, 5)
    attend = BACKENDS["sdpa"]
    caches = []
    for cuts in ((0, 22), (0, 3, 4, 13, 22)):
        cache = empty(spec, 7)
        for a, b in zip(cuts, cuts[1:], strict=False):
            batch = fastgen.build_batch((Span(0, a, b, b == 22, held),), tokens, PAGE)
            logits = fastgen.forward(params, cache, batch, spec, attend)
        caches.append((cache, logits))
    torch.testing.assert_close(*caches, atol=1e-5, rtol=0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(torch.get_default_device()).manual_seed(seed))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rms_norm(scale: float) -> None:
    """x / sqrt(mean(x^2) + eps) * weight, where eps decides and where it does not."""
    x, weight = normal(5, 3, 64) * scale, normal(64, seed=1)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), exact.float(), atol=1e-6, rtol=1e-6)


def test_rms_norm_of_bf16() -> None:
    """Rounded where transformers rounds: bit for bit, else bf16 models drift apart."""
    x, weight = normal(7, 64).bfloat16() * 3, normal(64, seed=1).bfloat16()
    module = LlamaRMSNorm(64, 1e-5).bfloat16()
    module.weight.data = weight
    assert torch.equal(rms_norm(x, weight, 1e-5), module(x))


def test_swiglu() -> None:
    """gate * sigmoid(gate) * up."""
    gate, up = normal(6, 20) * 4, normal(6, 20, seed=1)
    exact = gate.double() / (1 + (-gate.double()).exp()) * up
    torch.testing.assert_close(swiglu(torch.cat((gate, up), -1)), exact.float(), atol=1e-6, rtol=1e-6)


def test_rotate() -> None:
    """Dimensions i and i + H/2 are the parts of a complex number that is turned by the angle."""
    x, angle = normal(5, 3, 16), normal(5, 1, 8, seed=1) * 10
    turned = torch.complex(x[..., :8], x[..., 8:]).to(torch.complex128) * torch.exp(1j * angle.double())
    exact = torch.cat((turned.real, turned.imag), -1).float()
    torch.testing.assert_close(apply_rope(x, angle.cos(), angle.sin()), exact, atol=1e-6, rtol=1e-6)
    assert apply_rope(x.bfloat16(), angle.cos(), angle.sin()).dtype == torch.bfloat16


ROPES = {
    "linear": {"rope_theta": 10000.0, "factor": 8.0},
    "linear-odd": {"rope_theta": 12345.0, "factor": 2.7},
    "llama3": LLAMA3 | {"rope_theta": 500000.0, "original_max_position_embeddings": 8192},
    "llama3-32": LLAMA3 | {"rope_theta": 500000.0, "factor": 32.0, "original_max_position_embeddings": 8192},
    "llama3-tiny": LLAMA3,
    "yarn": YARN,
    "yarn-1m": YARN | {"rope_theta": 1000000.0, "original_max_position_embeddings": 32768},
    "yarn-betas": YARN | {"beta_fast": 20.0, "beta_slow": 3.0, "factor": 3.3},
    "yarn-mscale": YARN | {"mscale": 0.707, "mscale_all_dim": 1.2, "factor": 40.0},
    "yarn-factor": YARN | {"attention_factor": 1.25},
    "yarn-smooth": YARN | {"truncate": False, "original_max_position_embeddings": 4096},
    "yarn-no-ramp": YARN | {"beta_fast": 32.0, "beta_slow": 10.3},  # from 0 to 0
    "yarn-no-original": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0},
}


@pytest.mark.parametrize("head", [16, 64, 96, 128])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies(name: str, head: int) -> None:
    """Scaled frequencies and the temperature of transformers, for real models' numbers and for odd ones."""
    rope = {"rope_type": name.split("-")[0]} | ROPES[name]
    sizes = {"hidden_size": 4 * head, "num_attention_heads": 4, "max_position_embeddings": 4096}
    config = transformers.LlamaConfig(**sizes, rope_parameters=rope)
    spec = fastgen.from_hf_config(config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    want, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.get_default_device())
    torch.testing.assert_close(rope_inv_freq(spec.rope, head, torch.get_default_device()), want, atol=0, rtol=1e-6)
    assert spec.rope.attention_factor == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("theta", [100.0, 10000.0, 1e8])
def test_default_frequencies(theta: float) -> None:
    """theta^(-2i / H)."""
    exact = torch.tensor([theta ** (-2 * i / 64) for i in range(32)])
    ours = rope_inv_freq(RopeConfig(theta=theta), 64, torch.get_default_device())
    torch.testing.assert_close(ours, exact, atol=0, rtol=1e-6)


def test_rotations() -> None:
    """cos and sin of position x frequency, times the temperature, for positions in any order."""
    _, spec, _ = build("llama-yarn-mscale")
    cos, sin = rope_cos_sin(torch.tensor([3, 0, 3, 250]), spec)
    freq = rope_inv_freq(spec.rope, spec.head_dim, torch.get_default_device()).tolist()
    for row, position in enumerate((3, 0, 3, 250)):
        for i, f in enumerate(freq):
            assert cos[row, 0, i].item() == pytest.approx(math.cos(position * f) * spec.rope.attention_factor, abs=2e-5)
            assert sin[row, 0, i].item() == pytest.approx(math.sin(position * f) * spec.rope.attention_factor, abs=2e-5)
