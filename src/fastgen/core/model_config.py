"""What a model is, as data: families differ by the flags of a `Spec`, never by a file."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from reprlib import repr
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding. `kind` is default, linear, llama3 or yarn; the rest are that kind's own numbers."""

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0  # context the model was trained on before scaling (llama3, yarn)
    low_freq_factor: float = 1.0  # llama3: low_freq_factor;  yarn: beta_slow
    high_freq_factor: float = 1.0  # llama3: high_freq_factor; yarn: beta_fast
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by it
    truncate: bool = True  # yarn: round the correction range to whole dimensions


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and flags of a dense decoder. Hashable: it is what a compiled graph is specialised on."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int  # longest prompt + output, tokens
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    sliding_windows: tuple[int | None, ...]  # per layer: keys a query sees, itself included; None sees all
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    dtype: str = "bfloat16"  # of the checkpoint


class TPShard(NamedTuple):
    """Which of how many equal parts of a model."""

    rank: int = 0
    size: int = 1


UNSHARDED = TPShard()


def vocab_shard(vocab_size: int, tp_shard: TPShard) -> tuple[int, int]:
    """First and number of the rows that are a rank's; the last ones may have fewer, and are padded to the first's."""
    each = -(-vocab_size // tp_shard.size)
    first = min(tp_shard.rank * each, vocab_size)
    return first, min(each, vocab_size - first)


def shard_config(model_config: ModelConfig, tp_size: int) -> ModelConfig:
    """The shape of one of `size` parts: its heads and its share of the feed-forward width; the vocabulary is whole.

    Where there are fewer key heads than parts, several have the same one. ValueError says which sizes would do.
    """

    def fits(n: int) -> bool:
        return not (
            model_config.num_q_heads % n
            or model_config.intermediate_size % n
            or (model_config.num_kv_heads % n and n % model_config.num_kv_heads)
        )

    if tp_size < 1 or not fits(tp_size):
        possible = [n for n in range(1, model_config.num_q_heads + 1) if fits(n)]
        raise ValueError(
            f"tensor parallelism of {tp_size} does not divide {model_config.num_q_heads} query heads, {model_config.num_kv_heads} key heads and a "
            f"feed-forward width of {model_config.intermediate_size}; possible: {', '.join(map(str, possible))}"
        )
    kv_heads = max(1, model_config.num_kv_heads // tp_size)
    return replace(
        model_config,
        num_q_heads=model_config.num_q_heads // tp_size,
        num_kv_heads=kv_heads,
        intermediate_size=model_config.intermediate_size // tp_size,
    )


MODEL_TYPES = {  # architecture -> model_type
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MinistralForCausalLM": "ministral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
DTYPES = ("float32", "bfloat16", "float16")


# What numbers of a config may be: more is damage, and is refused before memory is asked for.
MAX_VALUES = {
    "hidden_size": 2**20, "intermediate_size": 2**24, "num_hidden_layers": 2**12, "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16, "head_dim": 2**16, "vocab_size": 2**26, "sliding_window": 2**31,
    "max_window_layers": 2**31,
    "max_position_embeddings": 2**24, "original_max_position_embeddings": 2**24,  # positions are exact in float32
}  # fmt: skip


def _check_supported(label: str, value: object, supported: tuple[str, ...]) -> str:
    if value not in supported:
        raise ValueError(f"config.json: {label} {repr(value)} is not supported; supported: {', '.join(supported)}")
    return str(value)


def _read_int(config: Mapping[str, Any], name: str, default: int, min_value: int = 1) -> int:
    """A whole number within what is plausible; `default` where it is absent or null."""
    value = config.get(name)
    if value is None:
        return default
    if type(value) is not int or not min_value <= value <= MAX_VALUES[name]:
        raise ValueError(
            f"config.json: {name} must be a whole number from {min_value} to {MAX_VALUES[name]}, not {repr(value)}"
        )
    return value


def _read_float(
    config: Mapping[str, Any], name: str, default: float, min_value: float = 1e-30, max_value: float = 1e30
) -> float:
    """A finite number within what is plausible; `default` where it is absent or null."""
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not min_value <= value <= max_value:
        raise ValueError(f"config.json: {name} must be a number from {min_value:g} to {max_value:g}, not {repr(value)}")
    return float(value)


def _read_bool(config: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """True or false; `default` where it is absent or null."""
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"config.json: {name} must be true or false, not {repr(value)}")
    return default if value is None else value


def _read_mapping(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object; empty where it is absent or null."""
    value = config.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"config.json: {name} must be an object, not {repr(value)}")
    return value or {}


def parse_eos_token_ids(value: Any, source: str = "config.json") -> list[int]:
    """Token ids of an `eos_token_id`: a number, a list of numbers or null. ValueError, with the source, if not."""
    tokens = [] if value is None else [*value] if isinstance(value, list | tuple) else [value]
    if not all(type(t) is int for t in tokens):
        raise ValueError(f"{source}: eos_token_id must be a token id or a list of them, not {repr(value)}")
    return tokens


def _parse_rope(config: Mapping[str, Any], context_length: int) -> RopeConfig:
    """Both spellings: `rope_theta` + `rope_scaling`, and `rope_parameters` (transformers 5)."""
    p = {**_read_mapping(config, "rope_scaling"), **_read_mapping(config, "rope_parameters")}
    theta = _read_float(p, "rope_theta", _read_float(config, "rope_theta", 10000.0, 1.0), 1.0)
    kind = _check_supported(
        "rope type", p.get("rope_type", p.get("type", "default")), ("default", "linear", "llama3", "yarn")
    )
    if any(_read_float(x, "partial_rotary_factor", 1.0) != 1.0 for x in (p, config)):
        raise ValueError("config.json: partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return RopeConfig(theta=theta)
    needed = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "yarn": ("factor",),
    }[kind]
    if missing := [name for name in needed if p.get(name) is None]:
        raise ValueError(f"config.json: rope type {kind} needs {', '.join(missing)}")
    factor = _read_float(p, "factor", 1.0, 1e-3, 1e6)
    original = _read_int(p, "original_max_position_embeddings", context_length)
    if kind == "linear":
        return RopeConfig(rope_type=kind, theta=theta, factor=factor)
    if kind == "llama3":
        low, high = _read_float(p, "low_freq_factor", 1.0), _read_float(p, "high_freq_factor", 4.0)
        if low >= high:
            raise ValueError(f"config.json: low_freq_factor {low:g} must be less than high_freq_factor {high:g}")
        return RopeConfig(
            rope_type=kind,
            theta=theta,
            factor=factor,
            original_max_position_embeddings=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    if theta <= 1:
        raise ValueError("config.json: rope type yarn needs a rope_theta of more than 1")
    return RopeConfig(
        rope_type=kind,
        theta=theta,
        factor=factor,
        original_max_position_embeddings=original,
        low_freq_factor=_read_float(p, "beta_slow", 1.0),
        high_freq_factor=_read_float(p, "beta_fast", 32.0),
        attention_factor=_yarn_attention_factor(p, factor),
        truncate=_read_bool(p, "truncate", True),
    )


def _yarn_attention_factor(p: Mapping[str, Any], factor: float) -> float:
    """Attention temperature of YaRN (arXiv 2309.00071, eq. 22), with the mscale pair some checkpoints carry."""

    def mscale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    if p.get("attention_factor") is not None:
        return _read_float(p, "attention_factor", 1.0, 1e-6, 1e6)
    if p.get("mscale") and p.get("mscale_all_dim"):
        return mscale(_read_float(p, "mscale", 1.0)) / mscale(_read_float(p, "mscale_all_dim", 1.0))
    return mscale(1.0)


def _parse_sliding_windows(config: Mapping[str, Any], family: str, num_layers: int) -> tuple[int | None, ...]:
    """Sliding window of each layer, by each family's own convention."""
    window = _read_int(config, "sliding_window", 0 if "sliding_window" in config else 4096, 0)
    full = _read_int(config, "max_window_layers", 28, 0) if family.startswith("qwen") else 0
    kinds = config.get("layer_types")
    if family == "llama" or not window or (family.startswith("qwen") and not _read_bool(config, "use_sliding_window")):
        return (None,) * num_layers
    if kinds is None:
        kinds = ["full_attention"] * min(full, num_layers) + ["sliding_attention"] * (num_layers - full)
    if not isinstance(kinds, list | tuple):
        raise ValueError(f"config.json: layer_types must be a list, not {repr(kinds)}")
    if len(kinds) != num_layers:
        raise ValueError(f"config.json: layer_types has {len(kinds)} entries for {num_layers} layers")
    for kind in kinds:
        _check_supported("layer type", kind, ("full_attention", "sliding_attention"))
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def from_hf_config(config: Mapping[str, Any]) -> ModelConfig:
    """The Spec of a Hugging Face `config.json`, given as a mapping.

    Raises ValueError for an architecture, rope type, activation, quantization or shape that is not supported, and for
    values of the wrong type or beyond any model's.
    """
    names = config.get("architectures") or [None]
    architecture = _check_supported(
        "architecture", names[0] if isinstance(names, list | tuple) else names, tuple(MODEL_TYPES)
    )
    family = MODEL_TYPES[architecture]
    _check_supported("hidden_act", config.get("hidden_act", "silu"), ("silu",))
    if quant := _read_mapping(config, "quantization_config"):
        _check_supported("quantization", quant.get("quant_method", "unknown"), ("none (full-precision checkpoints)",))
    if _read_bool(config, "mlp_bias"):
        raise ValueError("config.json: mlp_bias is not supported")
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if missing := [name for name in needed if config.get(name) is None]:
        raise ValueError(f"config.json: {', '.join(missing)} missing")
    dim, ffn, layers, q_heads, vocab = (_read_int(config, name, 0) for name in needed)
    kv_heads = _read_int(config, "num_key_value_heads", q_heads)
    head = _read_int(config, "head_dim", dim // q_heads)
    if q_heads % kv_heads or head % 2 or not head:
        raise ValueError(f"config.json: {q_heads} query heads over {kv_heads} kv heads of width {head} do not fit")
    context = _read_int(config, "max_position_embeddings", 2048)
    rope = _parse_rope(config, context)
    if rope.rope_type == "yarn":  # some checkpoints keep the unscaled length in max_position_embeddings
        context = max(context, int(rope.original_max_position_embeddings * rope.factor))
        if context > MAX_VALUES["max_position_embeddings"]:
            raise ValueError(
                f"config.json: a context of {rope.original_max_position_embeddings} tokens times {rope.factor:g} is too long"
            )
    eos, bos = parse_eos_token_ids(config.get("eos_token_id")), config.get("bos_token_id")
    if bos is not None and type(bos) is not int:
        raise ValueError(f"config.json: bos_token_id must be a token id, not {repr(bos)}")
    if strange := [t for t in (*eos, bos or 0) if not -1 <= t < vocab]:  # -1: none, in the first Llama's configs
        raise ValueError(f"config.json: eos_token_id or bos_token_id {strange[0]} is none of the {vocab} tokens")
    bias = _read_bool(config, "attention_bias")
    return ModelConfig(
        architecture=architecture,
        hidden_size=dim,
        intermediate_size=ffn,
        num_layers=layers,
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=head,
        vocab_size=vocab,
        context_length=context,
        rms_norm_eps=_read_float(config, "rms_norm_eps", 1e-6, 0.0, 1.0),
        rope=rope,
        sliding_windows=_parse_sliding_windows(config, family, layers),
        qkv_bias=family == "qwen2" or (bias and family in ("llama", "qwen3")),
        out_bias=bias and family in ("llama", "qwen3"),
        qk_norm=family == "qwen3",
        tie_word_embeddings=_read_bool(config, "tie_word_embeddings"),
        eos_token_ids=tuple(t for t in eos if t >= 0),
        bos_token_id=None if bos == -1 else bos,
        dtype=_check_supported("dtype", config.get("dtype") or config.get("torch_dtype") or "bfloat16", DTYPES),
    )


def to_hf_config(model_config: ModelConfig) -> dict[str, Any]:
    """A `config.json` for `spec` that transformers and `from_hf` both read: from_hf(to_hf(spec)) == spec."""
    r = model_config.rope
    rope: dict[str, Any] = {"rope_type": r.rope_type, "rope_theta": r.theta}
    if r.rope_type != "default":
        rope["factor"] = r.factor
    if r.rope_type in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = r.original_max_position_embeddings
    if r.rope_type == "llama3":
        rope |= {"low_freq_factor": r.low_freq_factor, "high_freq_factor": r.high_freq_factor}
    if r.rope_type == "yarn":
        rope |= {
            "beta_slow": r.low_freq_factor,
            "beta_fast": r.high_freq_factor,
            "attention_factor": r.attention_factor,
            "truncate": r.truncate,
        }
    config: dict[str, Any] = {
        "architectures": [model_config.architecture],
        "model_type": MODEL_TYPES[model_config.architecture],
        "hidden_act": "silu",
        "hidden_size": model_config.hidden_size,
        "intermediate_size": model_config.intermediate_size,
        "num_hidden_layers": model_config.num_layers,
        "num_attention_heads": model_config.num_q_heads,
        "num_key_value_heads": model_config.num_kv_heads,
        "head_dim": model_config.head_dim,
        "vocab_size": model_config.vocab_size,
        "max_position_embeddings": model_config.context_length,
        "rms_norm_eps": model_config.rms_norm_eps,
        "rope_theta": r.theta,
        "rope_scaling": rope if r.rope_type != "default" else None,
        "tie_word_embeddings": model_config.tie_word_embeddings,
        "attention_bias": model_config.out_bias,
        "eos_token_id": list(model_config.eos_token_ids),
        "bos_token_id": model_config.bos_token_id,
        "torch_dtype": model_config.dtype,
    }
    window = next((w for w in model_config.sliding_windows if w), None)
    config["sliding_window"] = window
    if window:
        config["use_sliding_window"] = True
        if (
            None in model_config.sliding_windows or config["model_type"] != "mistral"
        ):  # transformers takes mistral's to be ministral
            config["layer_types"] = [
                "sliding_attention" if w else "full_attention" for w in model_config.sliding_windows
            ]
    return config
