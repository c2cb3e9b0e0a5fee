"""Reads a Hugging Face `config.json` as a `ModelConfig`, with one function per family, and writes such a file.

To add a family of dense decoders (RMSNorm, rotary embedding, gated SiLU feed-forward):

1. Here: a function that returns the `ModelConfig` fields in which the family differs, and one line of `FAMILIES`.
2. If no flag of `ModelConfig` describes the difference: a new flag, its use in `transformer.decoder_layer`, and its
   key in `to_hf_config`. A new op needs no kernel; its plain function runs everywhere.
3. If the family has weights under other names or of other shapes: a leaf of `types.Layer`, declared in
   `checkpoint.weights.weight_specs`. Loading, saving, updating and tensor parallelism follow from that declaration.
4. To read it from GGUF files: `ARCHITECTURES` and the names of tensors in `checkpoint.gguf`.
5. Tests: a published config in `tests/checkpoint/test_model_families.py`, and the family in
   `tests/core/test_transformer.py`, where its logits are compared with those of transformers.
"""

import math
from collections.abc import Callable, Mapping
from reprlib import repr
from typing import Any, NamedTuple

from fastgen.checkpoint.quantization_config import parse_quantization_config
from fastgen.core.model_config import ModelConfig, RopeConfig

Json = Mapping[str, Any]
DTYPES = ("float32", "bfloat16", "float16")
# Larger values mean a damaged file, and are rejected before memory is allocated.
MAX_VALUES = {
    "hidden_size": 2**20, "intermediate_size": 2**24, "num_hidden_layers": 2**12, "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16, "head_dim": 2**16, "vocab_size": 2**26, "sliding_window": 2**31,
    "max_window_layers": 2**31,
    "max_position_embeddings": 2**24, "original_max_position_embeddings": 2**24,  # positions are exact in float32
}  # fmt: skip
# Keys of config.json and the fields of `ModelConfig` that they set; the first five have no default.
FIELDS = {
    "hidden_size": "hidden_size", "intermediate_size": "intermediate_size", "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_q_heads", "vocab_size": "vocab_size", "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim", "max_position_embeddings": "context_length",
}  # fmt: skip
# The same for `RopeConfig`, by type of rotary embedding.
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_YARN = ("factor", "original_max_position_embeddings", "attention_factor", "truncate")
ROPE_FIELDS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {name: name for name in _LLAMA3},
    "yarn": {name: name for name in _YARN} | {"beta_slow": "low_freq_factor", "beta_fast": "high_freq_factor"},
}


def _llama(config: Json, num_layers: int) -> dict[str, Any]:
    """Returns Llama's fields: biases are optional, and no layer uses a sliding window, whatever config.json says."""
    bias = _read_bool(config, "attention_bias")
    return {"qkv_bias": bias, "out_bias": bias, "sliding_windows": (None,) * num_layers}


def _mistral(config: Json, num_layers: int) -> dict[str, Any]:
    """Returns Mistral's and Ministral's fields: layers slide over 4096 keys, or as many as the file names."""
    return {"sliding_windows": _parse_sliding_windows(config, num_layers)}


def _qwen2(config: Json, num_layers: int) -> dict[str, Any]:
    """Returns Qwen2's fields: biases of q, k and v. `max_window_layers` and later layers slide, if any does."""
    if not _read_bool(config, "use_sliding_window"):
        return {"qkv_bias": True, "sliding_windows": (None,) * num_layers}
    num_full_layers = min(_read_int(config, "max_window_layers", 28, 0), num_layers)
    return {"qkv_bias": True, "sliding_windows": _parse_sliding_windows(config, num_layers, num_full_layers)}


def _qwen3(config: Json, num_layers: int) -> dict[str, Any]:
    """Returns Qwen3's fields: Qwen2's windows, norms of query and key heads, and optional biases."""
    bias = _read_bool(config, "attention_bias")
    return _qwen2(config, num_layers) | {"qk_norm": True, "qkv_bias": bias, "out_bias": bias}


class Family(NamedTuple):
    """A row of `FAMILIES`: the `model_type` of the config, and the function that reads the family's own fields."""

    model_type: str
    read_fields: Callable[[Json, int], dict[str, Any]]


FAMILIES = {  # by architecture
    "LlamaForCausalLM": Family("llama", _llama),
    "MistralForCausalLM": Family("mistral", _mistral),
    "MinistralForCausalLM": Family("ministral", _mistral),
    "Qwen2ForCausalLM": Family("qwen2", _qwen2),
    "Qwen3ForCausalLM": Family("qwen3", _qwen3),
}


def _parse_sliding_windows(config: Json, num_layers: int, num_full_layers: int = 0) -> tuple[int | None, ...]:
    """Returns each layer's window; without `layer_types`, all layers after the first `num_full_layers` slide."""
    window = _read_int(config, "sliding_window", 0 if "sliding_window" in config else 4096, 0)
    layer_types = config.get("layer_types")
    if not window:
        return (None,) * num_layers
    if layer_types is None:
        return (None,) * num_full_layers + (window,) * (num_layers - num_full_layers)
    if not isinstance(layer_types, list | tuple):
        raise ValueError(f"config.json: layer_types must be a list, not {repr(layer_types)}")
    if len(layer_types) != num_layers:
        raise ValueError(f"config.json: layer_types has {len(layer_types)} entries for {num_layers} layers")
    for layer_type in layer_types:
        _check_supported("layer type", layer_type, ("full_attention", "sliding_attention"))
    return tuple(window if layer_type == "sliding_attention" else None for layer_type in layer_types)


def from_hf_config(config: Json) -> ModelConfig:
    """Returns the `ModelConfig` of a Hugging Face `config.json`, given as a mapping.

    Raises ValueError for an architecture, rope type, activation, quantization or shape that is not supported, and for
    values of the wrong type or larger than any model's.
    """
    architectures = config.get("architectures") or [None]
    name = architectures[0] if isinstance(architectures, list | tuple) else architectures
    architecture = _check_supported("architecture", name, tuple(FAMILIES))
    _check_supported("hidden_act", config.get("hidden_act", "silu"), ("silu",))
    parse_quantization_config(config)  # raises ValueError
    if _read_bool(config, "mlp_bias"):
        raise ValueError("config.json: mlp_bias is not supported")
    required = [*FIELDS][:5]
    if missing := [name for name in required if config.get(name) is None]:
        raise ValueError(f"config.json: {', '.join(missing)} missing")
    sizes = {name: _read_int(config, name, 0) for name in required}
    num_layers, q_heads, vocab_size = (sizes[name] for name in required[2:])
    kv_heads = _read_int(config, "num_key_value_heads", q_heads)
    head_dim = _read_int(config, "head_dim", sizes["hidden_size"] // q_heads)
    if q_heads % kv_heads or head_dim % 2 or not head_dim:
        raise ValueError(f"config.json: {q_heads} query heads over {kv_heads} kv heads of width {head_dim} do not fit")
    context = _read_int(config, "max_position_embeddings", 2048)
    rope = _parse_rope(config, context)
    if rope.rope_type == "yarn":  # some checkpoints keep the unscaled length in max_position_embeddings
        context = max(context, int(rope.original_max_position_embeddings * rope.factor))
        if context > MAX_VALUES["max_position_embeddings"]:
            length = f"{rope.original_max_position_embeddings} tokens times {rope.factor:g}"
            raise ValueError(f"config.json: a context of {length} is too long")
    eos, bos = parse_eos_token_ids(config.get("eos_token_id")), config.get("bos_token_id")
    if bos is not None and type(bos) is not int:
        raise ValueError(f"config.json: bos_token_id must be a token id, not {repr(bos)}")
    # -1 means none in the configs of the first Llama.
    if unknown := [t for t in (*eos, bos or 0) if not -1 <= t < vocab_size]:
        raise ValueError(f"config.json: eos_token_id or bos_token_id {unknown[0]} is none of the {vocab_size} tokens")
    sizes |= {"num_key_value_heads": kv_heads, "head_dim": head_dim, "max_position_embeddings": context}
    return ModelConfig(
        architecture=architecture,
        **{FIELDS[name]: size for name, size in sizes.items()},
        rms_norm_eps=_read_float(config, "rms_norm_eps", 1e-6, 0.0, 1.0),
        rope=rope,
        tie_word_embeddings=_read_bool(config, "tie_word_embeddings"),
        eos_token_ids=tuple(t for t in eos if t >= 0),
        bos_token_id=None if bos == -1 else bos,
        dtype=_check_supported("dtype", config.get("dtype") or config.get("torch_dtype") or "bfloat16", DTYPES),
        **FAMILIES[architecture].read_fields(config, num_layers),
    )


def parse_eos_token_ids(value: Any, source: str = "config.json") -> list[int]:
    """Returns the token ids of an `eos_token_id`, which is a number, a list of numbers or null.

    Raises ValueError, naming `source`, for anything else.
    """
    token_ids = [] if value is None else [*value] if isinstance(value, list | tuple) else [value]
    if not all(type(t) is int for t in token_ids):
        raise ValueError(f"{source}: eos_token_id must be a token id or a list of them, not {repr(value)}")
    return token_ids


def _parse_rope(config: Json, context_length: int) -> RopeConfig:
    """Reads both spellings: `rope_theta` with `rope_scaling`, and `rope_parameters` (transformers 5)."""
    p = {**_read_mapping(config, "rope_scaling"), **_read_mapping(config, "rope_parameters")}
    theta = _read_float(p, "rope_theta", _read_float(config, "rope_theta", 10000.0, 1.0), 1.0)
    rope_type = _check_supported("rope type", p.get("rope_type", p.get("type", "default")), tuple(ROPE_FIELDS))
    if any(_read_float(x, "partial_rotary_factor", 1.0) != 1.0 for x in (p, config)):
        raise ValueError("config.json: partial_rotary_factor other than 1 is not supported")
    if rope_type == "default":
        return RopeConfig(theta=theta)
    required = ["factor"] if rope_type == "yarn" else ROPE_FIELDS[rope_type]
    if missing := [name for name in required if p.get(name) is None]:
        raise ValueError(f"config.json: rope type {rope_type} needs {', '.join(missing)}")
    fields: dict[str, Any] = {
        "rope_type": rope_type,
        "theta": theta,
        "factor": _read_float(p, "factor", 1.0, 1e-3, 1e6),
    }
    original = _read_int(p, "original_max_position_embeddings", context_length)
    if rope_type == "linear":
        return RopeConfig(**fields)
    fields["original_max_position_embeddings"] = original
    if rope_type == "llama3":
        low, high = _read_float(p, "low_freq_factor", 1.0), _read_float(p, "high_freq_factor", 4.0)
        if low >= high:
            raise ValueError(f"config.json: low_freq_factor {low:g} must be less than high_freq_factor {high:g}")
        return RopeConfig(**fields, low_freq_factor=low, high_freq_factor=high)
    if theta <= 1:
        raise ValueError("config.json: rope type yarn needs a rope_theta of more than 1")
    return RopeConfig(
        **fields,
        low_freq_factor=_read_float(p, "beta_slow", 1.0),
        high_freq_factor=_read_float(p, "beta_fast", 32.0),
        attention_factor=_yarn_attention_factor(p, fields["factor"]),
        truncate=_read_bool(p, "truncate", True),
    )


def _yarn_attention_factor(p: Json, factor: float) -> float:
    """Returns YaRN's attention temperature (arXiv 2309.00071, eq. 22), from the file's mscale pair where it has one."""

    def mscale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    if p.get("attention_factor") is not None:
        return _read_float(p, "attention_factor", 1.0, 1e-6, 1e6)
    if p.get("mscale") and p.get("mscale_all_dim"):
        return mscale(_read_float(p, "mscale", 1.0)) / mscale(_read_float(p, "mscale_all_dim", 1.0))
    return mscale(1.0)


# Readers of one key return `default` where the key is absent or null, and raise ValueError for another type.


def _check_supported(label: str, value: object, supported: tuple[str, ...]) -> str:
    if value not in supported:
        raise ValueError(f"config.json: {label} {repr(value)} is not supported; supported: {', '.join(supported)}")
    return str(value)


def _read(config: Json, name: str, default: Any, is_valid: Callable[[Any], bool], expected: str) -> Any:
    value = config.get(name)
    if value is not None and not is_valid(value):
        raise ValueError(f"config.json: {name} must be {expected}, not {repr(value)}")
    return default if value is None else value


def _read_int(config: Json, name: str, default: int, low: int = 1) -> int:
    high = MAX_VALUES[name]
    expected = f"an integer from {low} to {high}"
    return _read(config, name, default, lambda x: type(x) is int and low <= x <= high, expected)


def _read_float(config: Json, name: str, default: float, low: float = 1e-30, high: float = 1e30) -> float:
    def is_number(x: Any) -> bool:
        return isinstance(x, int | float) and not isinstance(x, bool) and low <= x <= high

    expected = f"a number from {low:g} to {high:g}"
    return float(_read(config, name, default, is_number, expected))


def _read_bool(config: Json, name: str, default: bool = False) -> bool:
    return _read(config, name, default, lambda x: isinstance(x, bool), "true or false")


def _read_mapping(config: Json, name: str) -> Json:
    return _read(config, name, {}, lambda x: isinstance(x, Mapping), "an object")


def to_hf_config(model_config: ModelConfig) -> dict[str, Any]:
    """Returns a `config.json` that transformers reads, and that `from_hf_config` reads as the same `ModelConfig`."""
    c, r = model_config, model_config.rope
    scaling = {"rope_type": r.rope_type, "rope_theta": r.theta}
    scaling |= {name: getattr(r, field) for name, field in ROPE_FIELDS[r.rope_type].items()}
    window = next((w for w in c.sliding_windows if w), None)
    config: dict[str, Any] = {
        "architectures": [c.architecture],
        "model_type": FAMILIES[c.architecture].model_type,
        "hidden_act": "silu",
        **{name: getattr(c, field) for name, field in FIELDS.items()},
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": r.theta,
        "rope_scaling": scaling if r.rope_type != "default" else None,
        "tie_word_embeddings": c.tie_word_embeddings,
        "attention_bias": c.out_bias,
        "eos_token_id": list(c.eos_token_ids),
        "bos_token_id": c.bos_token_id,
        "torch_dtype": c.dtype,
        "sliding_window": window,
    }
    if window:
        config["use_sliding_window"] = True
        # transformers reads a Mistral config with layer_types as a Ministral.
        if None in c.sliding_windows or config["model_type"] != "mistral":
            config["layer_types"] = ["sliding_attention" if w else "full_attention" for w in c.sliding_windows]
    return config
