"""Reading config.json: the models people run, both spellings of transformers, and what is refused."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import transformers

from fastgen.checkpoint.model_families import FAMILIES, from_hf_config, to_hf_config
from fastgen.core.model_config import ModelConfig, RopeConfig

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}


def config(architecture: str, sizes: tuple[int, ...], **rest: object) -> dict[str, Any]:
    """A config.json; `sizes` are width, feed-forward width, layers, query heads, kv heads and vocabulary."""
    common = {"architectures": [architecture], "hidden_act": "silu", "torch_dtype": "bfloat16"}
    return common | {"rms_norm_eps": 1e-5} | dict(zip(SIZES, sizes, strict=True)) | rest


MODELS: dict[str, tuple[dict[str, Any], ModelConfig]] = {
    "llama-3.1-8b": (
        config(
            "LlamaForCausalLM", (4096, 14336, 32, 32, 8, 128256), head_dim=128, rope_theta=500000.0,
            rope_scaling=LLAMA3, max_position_embeddings=131072, attention_bias=False, mlp_bias=False,
            tie_word_embeddings=False, bos_token_id=128000, eos_token_id=[128001, 128008, 128009],
        ),
        ModelConfig(
            architecture="LlamaForCausalLM", hidden_size=4096, intermediate_size=14336, num_layers=32, num_q_heads=32,
            num_kv_heads=8, head_dim=128,
            vocab_size=128256, context_length=131072, rms_norm_eps=1e-5, sliding_windows=(None,) * 32,
            bos_token_id=128000,
            eos_token_ids=(128001, 128008, 128009),
            rope=RopeConfig(rope_type="llama3", theta=500000.0, factor=8.0, original_max_position_embeddings=8192,
            low_freq_factor=1.0, high_freq_factor=4.0),
        ),
    ),
    "r1-llama-70b": (
        config(
            "LlamaForCausalLM", (8192, 28672, 80, 64, 8, 128256), head_dim=128, rope_theta=500000.0,
            rope_scaling=LLAMA3, max_position_embeddings=131072, attention_bias=False, mlp_bias=False,
            bos_token_id=128000, eos_token_id=128001,
        ),
        ModelConfig(
            architecture="LlamaForCausalLM", hidden_size=8192, intermediate_size=28672, num_layers=80, num_q_heads=64,
            num_kv_heads=8, head_dim=128,
            vocab_size=128256, context_length=131072, rms_norm_eps=1e-5, sliding_windows=(None,) * 80,
            bos_token_id=128000, eos_token_ids=(128001,),
            rope=RopeConfig(rope_type="llama3", theta=500000.0, factor=8.0, original_max_position_embeddings=8192,
            low_freq_factor=1.0, high_freq_factor=4.0),
        ),
    ),
    "smollm2-135m": (
        config(
            "LlamaForCausalLM", (576, 1536, 30, 9, 3, 49152), rope_theta=100000, rope_scaling=None,
            max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        ),
        ModelConfig(
            architecture="LlamaForCausalLM", hidden_size=576, intermediate_size=1536, num_layers=30, num_q_heads=9,
            num_kv_heads=3, head_dim=64,
            vocab_size=49152, context_length=8192, rms_norm_eps=1e-5, sliding_windows=(None,) * 30, bos_token_id=1,
            eos_token_ids=(2,), tie_word_embeddings=True,
            rope=RopeConfig(theta=100000.0),
        ),
    ),
    "mistral-7b-v0.3": (
        config(
            "MistralForCausalLM", (4096, 14336, 32, 32, 8, 32768), rope_theta=1000000.0, sliding_window=None,
            max_position_embeddings=32768, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        ),
        ModelConfig(
            architecture="MistralForCausalLM", hidden_size=4096, intermediate_size=14336, num_layers=32,
            num_q_heads=32, num_kv_heads=8,
            head_dim=128, vocab_size=32768, context_length=32768, rms_norm_eps=1e-5, sliding_windows=(None,) * 32,
            bos_token_id=1, eos_token_ids=(2,),
            rope=RopeConfig(theta=1e6),
        ),
    ),
    "ministral-8b": (
        config(
            "MistralForCausalLM", (4096, 12288, 36, 32, 8, 131072), rope_theta=100000000.0,
            sliding_window=32768, head_dim=128, max_position_embeddings=32768, tie_word_embeddings=False,
            bos_token_id=1, eos_token_id=2,
        ),
        ModelConfig(
            architecture="MistralForCausalLM", hidden_size=4096, intermediate_size=12288, num_layers=36,
            num_q_heads=32, num_kv_heads=8,
            head_dim=128, vocab_size=131072, context_length=32768, rms_norm_eps=1e-5, sliding_windows=(32768,) * 36,
            bos_token_id=1, eos_token_ids=(2,),
            rope=RopeConfig(theta=1e8),
        ),
    ),
    "qwen2.5-7b": (
        config(
            "Qwen2ForCausalLM", (3584, 18944, 28, 28, 4, 152064), rope_theta=1000000.0, sliding_window=131072,
            use_sliding_window=False, max_window_layers=28, max_position_embeddings=32768, rms_norm_eps=1e-6,
            tie_word_embeddings=False, bos_token_id=151643, eos_token_id=151645,
        ),
        ModelConfig(
            architecture="Qwen2ForCausalLM", hidden_size=3584, intermediate_size=18944, num_layers=28, num_q_heads=28,
            num_kv_heads=4, head_dim=128,
            vocab_size=152064, context_length=32768, sliding_windows=(None,) * 28, bos_token_id=151643,
            eos_token_ids=(151645,),
            rope=RopeConfig(theta=1e6), qkv_bias=True,
        ),
    ),
    "qwen2.5-14b": (
        config(
            "Qwen2ForCausalLM", (5120, 13824, 48, 40, 8, 152064), rope_theta=1000000.0, sliding_window=131072,
            use_sliding_window=False, max_window_layers=70, max_position_embeddings=32768, rms_norm_eps=1e-6,
            tie_word_embeddings=False, bos_token_id=151643, eos_token_id=151645,
        ),
        ModelConfig(
            architecture="Qwen2ForCausalLM", hidden_size=5120, intermediate_size=13824, num_layers=48, num_q_heads=40,
            num_kv_heads=8, head_dim=128,
            vocab_size=152064, context_length=32768, sliding_windows=(None,) * 48, bos_token_id=151643,
            eos_token_ids=(151645,),
            rope=RopeConfig(theta=1e6), qkv_bias=True,
        ),
    ),
    "qwen3-8b": (
        config(
            "Qwen3ForCausalLM", (4096, 12288, 36, 32, 8, 151936), head_dim=128, rope_theta=1000000,
            sliding_window=None, use_sliding_window=False, max_window_layers=36,
            max_position_embeddings=40960, attention_bias=False, tie_word_embeddings=False,
            bos_token_id=151643, eos_token_id=151645, rms_norm_eps=1e-6,
        ),
        ModelConfig(
            architecture="Qwen3ForCausalLM", hidden_size=4096, intermediate_size=12288, num_layers=36, num_q_heads=32,
            num_kv_heads=8, head_dim=128,
            vocab_size=151936, context_length=40960, sliding_windows=(None,) * 36, bos_token_id=151643,
            eos_token_ids=(151645,),
            rope=RopeConfig(theta=1e6), qk_norm=True,
        ),
    ),
}  # fmt: skip
S, F = "sliding_attention", "full_attention"
SLIDES = {"sliding_window": 8, "use_sliding_window": True}
TINY = (64, 96, 4, 4, 2, 128)


def tiny(family: str = "Llama", **rest: object) -> dict[str, Any]:
    return config(f"{family}ForCausalLM", TINY, **rest)


@pytest.mark.parametrize("name", MODELS)
def test_real_models(name: str) -> None:
    """Every field of the spec of the models people run, written out."""
    assert from_hf_config(MODELS[name][0]) == MODELS[name][1]


@pytest.mark.parametrize("name", MODELS)
def test_spelling_of_transformers_5(name: str) -> None:
    """`rope_parameters` and `dtype` mean what `rope_theta`, `rope_scaling` and `torch_dtype` did."""
    old, spec = MODELS[name]
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    rope = {"rope_type": "default"} | (old.get("rope_scaling") or {}) | {"rope_theta": old["rope_theta"]}
    assert from_hf_config(new | {"rope_parameters": rope, "dtype": "bfloat16"}) == spec


def saved_by_transformers(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of a config."""
    rest = {k: v for k, v in config.items() if k != "model_type"}
    theirs = transformers.AutoConfig.for_model(FAMILIES[config["architectures"][0]].model_type, **rest)
    return json.loads(theirs.to_json_string())


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_writes(name: str) -> None:
    """The config that transformers saves after reading the old one gives the same spec."""
    old, spec = MODELS[name]
    assert from_hf_config(saved_by_transformers(old)) == spec


VARIED = {
    "llama-bias": tiny(attention_bias=True, torch_dtype="float32"),
    "linear": tiny(rope_scaling={"type": "linear", "factor": 2.5}, torch_dtype="float16"),
    "yarn": tiny("Qwen2", rope_theta=1e6, rope_scaling=YARN, max_position_embeddings=32768),
    "yarn-betas": tiny(rope_scaling=YARN | {"beta_fast": 20, "beta_slow": 3, "truncate": False}),
    "yarn-mscale": tiny(rope_scaling=YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}),
    "yarn-factor": tiny(rope_scaling=YARN | {"attention_factor": 0.123456789}),
    "mistral-window": tiny("Mistral", sliding_window=10),
    "ministral": tiny("Ministral", sliding_window=7, layer_types=[S, F, S, F]),
    "qwen2-window": tiny("Qwen2", **SLIDES, max_window_layers=3),
    "qwen3-bias": tiny("Qwen3", head_dim=40, attention_bias=True, tie_word_embeddings=True, eos_token_id=[3]),
    "qwen3-window": tiny("Qwen3", **SLIDES, head_dim=40, max_window_layers=1),
}


@pytest.mark.parametrize("name", [*MODELS, *VARIED])
def test_round_trip(name: str) -> None:
    """What is saved reads the same, through JSON."""
    spec = from_hf_config(MODELS[name][0] if name in MODELS else VARIED[name])
    assert from_hf_config(json.loads(json.dumps(to_hf_config(spec)))) == spec


@pytest.mark.parametrize("name", [*MODELS, *VARIED])
def test_transformers_reads_what_we_write(name: str) -> None:
    """The saved config means the same to transformers: its own reading of it, saved again, gives the spec."""
    spec = from_hf_config(MODELS[name][0] if name in MODELS else VARIED[name])
    assert from_hf_config(saved_by_transformers(to_hf_config(spec))) == spec


@pytest.mark.parametrize(
    ("family", "rest", "windows"),
    [
        ("Llama", {"sliding_window": 8}, (None,) * 4),  # llama has none, whatever the file says
        ("Mistral", {"sliding_window": 8}, (8,) * 4),
        ("Mistral", {"sliding_window": None}, (None,) * 4),
        ("Mistral", {}, (4096,) * 4),  # the family's default
        ("Ministral", {"sliding_window": 8}, (8,) * 4),
        ("Ministral", {"sliding_window": 8, "layer_types": [F, S, S, F]}, (None, 8, 8, None)),
        ("Qwen2", {"sliding_window": 8}, (None,) * 4),
        ("Qwen2", {"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 0}, (None,) * 4),
        ("Qwen2", SLIDES | {"max_window_layers": 1}, (None, 8, 8, 8)),
        ("Qwen2", SLIDES | {"max_window_layers": 0}, (8,) * 4),
        ("Qwen2", SLIDES | {"max_window_layers": 70}, (None,) * 4),
        ("Qwen2", SLIDES, (None,) * 4),  # the first 28 layers see all
        ("Qwen3", SLIDES | {"max_window_layers": 3}, (None, None, None, 8)),
        ("Qwen3", SLIDES | {"layer_types": [S, F, F, S]}, (8, None, None, 8)),
        ("Qwen3", {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, (None,) * 4),
    ],
)
def test_windows(family: str, rest: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    """Which layers slide, by each family's convention."""
    assert from_hf_config(tiny(family, **rest)).sliding_windows == windows


@pytest.mark.parametrize(
    ("family", "rest", "flags"),
    [
        ("Llama", {}, (False, False, False)),
        ("Llama", {"attention_bias": True}, (True, True, False)),
        ("Mistral", {"attention_bias": True}, (False, False, False)),  # neither has such an option
        ("Ministral", {}, (False, False, False)),
        ("Qwen2", {}, (True, False, False)),
        ("Qwen2", {"attention_bias": True}, (True, False, False)),
        ("Qwen3", {}, (False, False, True)),
        ("Qwen3", {"attention_bias": True}, (True, True, True)),
    ],
)
def test_flags(family: str, rest: dict[str, Any], flags: tuple[bool, bool, bool]) -> None:
    """Bias of the projections, bias of the output, and norms of queries and keys."""
    spec = from_hf_config(tiny(family, **rest))
    assert (spec.qkv_bias, spec.out_bias, spec.qk_norm) == flags


def test_defaults_of_what_a_config_leaves_out() -> None:
    """As many kv heads as query heads, heads that divide the width, rope's theta, no end token."""
    given = ("architectures", *SIZES[:4], "vocab_size")
    spec = from_hf_config({k: v for k, v in tiny().items() if k in given})
    assert (spec.num_kv_heads, spec.head_dim, spec.context_length, spec.rms_norm_eps) == (4, 16, 2048, 1e-6)
    assert (
        spec.rope == RopeConfig(theta=10000.0)
        and spec.eos_token_ids == ()
        and spec.bos_token_id is None
        and not spec.tie_word_embeddings
    )
    assert spec.dtype == "bfloat16"


@pytest.mark.parametrize(("given", "want"), [(None, ()), (0, (0,)), (7, (7,)), ([7, 9], (7, 9)), ([], ())])
def test_end_tokens(given: object, want: tuple[int, ...]) -> None:
    """One, several or none; token 0 is a token."""
    assert from_hf_config(tiny(eos_token_id=given)).eos_token_ids == want


def test_yarn() -> None:
    """The context grows by the factor; the temperature is the paper's unless the file says otherwise."""
    spec = from_hf_config(tiny(rope_scaling=YARN, max_position_embeddings=32768))
    assert spec.context_length == 131072 and spec.rope.original_max_position_embeddings == 32768
    assert (spec.rope.low_freq_factor, spec.rope.high_freq_factor, spec.rope.truncate) == (1, 32, True)
    assert spec.rope.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    assert from_hf_config(tiny(rope_scaling=YARN, max_position_embeddings=200000)).context_length == 200000
    both = from_hf_config(tiny(rope_scaling=YARN | {"mscale": 0.5, "mscale_all_dim": 1.5})).rope.attention_factor
    assert both == pytest.approx((0.05 * math.log(4) + 1) / (0.15 * math.log(4) + 1))
    alone = from_hf_config(tiny(rope_scaling=YARN | {"mscale": 0.5})).rope.attention_factor
    assert alone == spec.rope.attention_factor  # it takes both
    assert from_hf_config(tiny(rope_scaling=YARN | {"factor": 1.0})).rope.attention_factor == 1
    bare = from_hf_config(tiny(rope_scaling={"type": "yarn", "factor": 2.0}, max_position_embeddings=512))
    assert bare.rope.original_max_position_embeddings == 512 and bare.context_length == 1024


def test_a_spec_is_a_value() -> None:
    """Equal specs hash alike: compiled graphs are looked up by them."""
    spec = from_hf_config(tiny())
    assert hash(spec) == hash(from_hf_config(tiny())) and spec != replace(spec, num_layers=5)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["architecture", "GPT2LMHeadModel", *FAMILIES]),
        ({"architectures": None}, ["architecture", "None", *FAMILIES]),
        ({"architectures": []}, ["architecture", "None", *FAMILIES]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization", "awq", "compressed-tensors", "fbgemm_fp8"]),
        ({"quantization_config": {"bits": 4}}, ["quantization", "unknown", "compressed-tensors"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"torch_dtype": "float8_e4m3fn"}, ["dtype", "float8_e4m3fn", "float32, bfloat16, float16"]),
        ({"rope_scaling": {"rope_type": "longrope"}}, ["longrope", "default, linear, llama3, yarn"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, ["rope type", "dynamic", "yarn"]),
        ({"rope_parameters": {"rope_type": "mrope"}}, ["rope type", "mrope", "yarn"]),
        ({"rope_scaling": {"type": "linear"}}, ["linear needs factor"]),
        ({"rope_scaling": {"type": "yarn"}}, ["yarn needs factor"]),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            ["llama3 needs low_freq_factor, high_freq_factor, original_max_position_embeddings"],
        ),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, ["partial_rotary_factor"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"vocab_size": None, "num_hidden_layers": None}, ["num_hidden_layers, vocab_size missing"]),
        ({"num_key_value_heads": 3}, ["4 query heads", "3 kv heads"]),
        ({"num_key_value_heads": 8}, ["4 query heads", "8 kv heads"]),
        ({"head_dim": 15}, ["width 15"]),
    ],
)
def test_refusals(wrong: dict[str, Any], named: list[str]) -> None:
    """A model that would come out wrong is refused, with what is supported."""
    from_hf_config(tiny())  # the rest of it is fine
    with pytest.raises(ValueError, match=r"^config\.json: ") as e:
        from_hf_config(tiny() | wrong)
    assert all(name in str(e.value) for name in named), str(e.value)


@pytest.mark.parametrize(
    ("kinds", "named"),
    [([S, F, S], ["3 entries for 4 layers"]), ([S, F, S, "chunked_attention"], ["chunked_attention", F, S])],
)
def test_layer_types_that_do_not_fit(kinds: list[str], named: list[str]) -> None:
    """Too few layer types, and a type that is not known."""
    with pytest.raises(ValueError, match=r"^config\.json: ") as e:
        from_hf_config(tiny("Ministral", sliding_window=8, layer_types=kinds))
    assert all(name in str(e.value) for name in named), str(e.value)


@pytest.mark.parametrize("key", [*SIZES[:4], "vocab_size"])
def test_missing_keys(key: str) -> None:
    """A key without a sensible default is named when it is missing."""
    with pytest.raises(ValueError, match=rf"^config\.json: {key} missing$"):
        from_hf_config({k: v for k, v in tiny().items() if k != key})
