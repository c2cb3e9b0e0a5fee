"""What a model is, as data: families differ by the flags of a `Spec`, never by a file."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from reprlib import repr
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding. `kind` is default, linear, llama3 or yarn; the rest are that kind's own numbers."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original: int = 0  # context the model was trained on before scaling (llama3, yarn)
    low: float = 1.0  # llama3: low_freq_factor;  yarn: beta_slow
    high: float = 1.0  # llama3: high_freq_factor; yarn: beta_fast
    scale: float = 1.0  # yarn: cos and sin are multiplied by it
    truncate: bool = True  # yarn: round the correction range to whole dimensions


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """Shape and flags of a dense decoder. Hashable: it is what a compiled graph is specialised on."""

    architecture: str
    dim: int
    ffn: int
    layers: int
    q_heads: int
    kv_heads: int
    head: int
    vocab: int
    context: int  # longest prompt + output, tokens
    eps: float = 1e-6
    rope: Rope = Rope()
    windows: tuple[int | None, ...]  # per layer: keys a query sees, itself included; None sees all
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    eos: tuple[int, ...] = ()
    bos: int | None = None
    dtype: str = "bfloat16"  # of the checkpoint


class Place(NamedTuple):
    """Which of how many equal parts of a model."""

    rank: int = 0
    size: int = 1


WHOLE = Place()


def share_of(n: int, place: Place) -> tuple[int, int]:
    """First and number of the rows that are a rank's; the last ones may have fewer, and are padded to the first's."""
    each = -(-n // place.size)
    first = min(place.rank * each, n)
    return first, min(each, n - first)


def split(spec: Spec, size: int) -> Spec:
    """The shape of one of `size` parts: its heads and its share of the feed-forward width; the vocabulary is whole.

    Where there are fewer key heads than parts, several have the same one. ValueError says which sizes would do.
    """

    def fits(n: int) -> bool:
        return not (spec.q_heads % n or spec.ffn % n or (spec.kv_heads % n and n % spec.kv_heads))

    if size < 1 or not fits(size):
        possible = [n for n in range(1, spec.q_heads + 1) if fits(n)]
        raise ValueError(
            f"tensor parallelism of {size} does not divide {spec.q_heads} query heads, {spec.kv_heads} key heads and a "
            f"feed-forward width of {spec.ffn}; possible: {', '.join(map(str, possible))}"
        )
    kv_heads = max(1, spec.kv_heads // size)
    return replace(spec, q_heads=spec.q_heads // size, kv_heads=kv_heads, ffn=spec.ffn // size)


FAMILIES = {  # architecture -> model_type
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MinistralForCausalLM": "ministral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
DTYPES = ("float32", "bfloat16", "float16")


# What numbers of a config may be: more is damage, and is refused before memory is asked for.
MOST = {
    "hidden_size": 2**20, "intermediate_size": 2**24, "num_hidden_layers": 2**12, "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16, "head_dim": 2**16, "vocab_size": 2**26, "sliding_window": 2**31,
    "max_window_layers": 2**31,
    "max_position_embeddings": 2**24, "original_max_position_embeddings": 2**24,  # positions are exact in float32
}  # fmt: skip


def _choose(what: str, value: object, supported: tuple[str, ...]) -> str:
    if value not in supported:
        raise ValueError(f"config.json: {what} {repr(value)} is not supported; supported: {', '.join(supported)}")
    return str(value)


def _integer(config: Mapping[str, Any], name: str, default: int, least: int = 1) -> int:
    """A whole number within what is plausible; `default` where it is absent or null."""
    value = config.get(name)
    if value is None:
        return default
    if type(value) is not int or not least <= value <= MOST[name]:
        raise ValueError(f"config.json: {name} must be a whole number from {least} to {MOST[name]}, not {repr(value)}")
    return value


def _real(config: Mapping[str, Any], name: str, default: float, least: float = 1e-30, most: float = 1e30) -> float:
    """A finite number within what is plausible; `default` where it is absent or null."""
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(f"config.json: {name} must be a number from {least:g} to {most:g}, not {repr(value)}")
    return float(value)


def _flag(config: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """True or false; `default` where it is absent or null."""
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"config.json: {name} must be true or false, not {repr(value)}")
    return default if value is None else value


def _mapping(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object; empty where it is absent or null."""
    value = config.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"config.json: {name} must be an object, not {repr(value)}")
    return value or {}


def end_tokens(value: Any, source: str = "config.json") -> list[int]:
    """Token ids of an `eos_token_id`: a number, a list of numbers or null. ValueError, with the source, if not."""
    tokens = [] if value is None else [*value] if isinstance(value, list | tuple) else [value]
    if not all(type(t) is int for t in tokens):
        raise ValueError(f"{source}: eos_token_id must be a token id or a list of them, not {repr(value)}")
    return tokens


def _rope(config: Mapping[str, Any], context: int) -> Rope:
    """Both spellings: `rope_theta` + `rope_scaling`, and `rope_parameters` (transformers 5)."""
    p = {**_mapping(config, "rope_scaling"), **_mapping(config, "rope_parameters")}
    theta = _real(p, "rope_theta", _real(config, "rope_theta", 10000.0, 1.0), 1.0)
    kind = _choose("rope type", p.get("rope_type", p.get("type", "default")), ("default", "linear", "llama3", "yarn"))
    if any(_real(x, "partial_rotary_factor", 1.0) != 1.0 for x in (p, config)):
        raise ValueError("config.json: partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return Rope(theta=theta)
    needed = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "yarn": ("factor",),
    }[kind]
    if missing := [name for name in needed if p.get(name) is None]:
        raise ValueError(f"config.json: rope type {kind} needs {', '.join(missing)}")
    factor = _real(p, "factor", 1.0, 1e-3, 1e6)
    original = _integer(p, "original_max_position_embeddings", context)
    if kind == "linear":
        return Rope(kind=kind, theta=theta, factor=factor)
    if kind == "llama3":
        low, high = _real(p, "low_freq_factor", 1.0), _real(p, "high_freq_factor", 4.0)
        if low >= high:
            raise ValueError(f"config.json: low_freq_factor {low:g} must be less than high_freq_factor {high:g}")
        return Rope(kind=kind, theta=theta, factor=factor, original=original, low=low, high=high)
    if theta <= 1:
        raise ValueError("config.json: rope type yarn needs a rope_theta of more than 1")
    return Rope(
        kind=kind,
        theta=theta,
        factor=factor,
        original=original,
        low=_real(p, "beta_slow", 1.0),
        high=_real(p, "beta_fast", 32.0),
        scale=_yarn_scale(p, factor),
        truncate=_flag(p, "truncate", True),
    )


def _yarn_scale(p: Mapping[str, Any], factor: float) -> float:
    """Attention temperature of YaRN (arXiv 2309.00071, eq. 22), with the mscale pair some checkpoints carry."""

    def mscale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    if p.get("attention_factor") is not None:
        return _real(p, "attention_factor", 1.0, 1e-6, 1e6)
    if p.get("mscale") and p.get("mscale_all_dim"):
        return mscale(_real(p, "mscale", 1.0)) / mscale(_real(p, "mscale_all_dim", 1.0))
    return mscale(1.0)


def _windows(config: Mapping[str, Any], family: str, layers: int) -> tuple[int | None, ...]:
    """Sliding window of each layer, by each family's own convention."""
    window = _integer(config, "sliding_window", 0 if "sliding_window" in config else 4096, 0)
    full = _integer(config, "max_window_layers", 28, 0) if family.startswith("qwen") else 0
    kinds = config.get("layer_types")
    if family == "llama" or not window or (family.startswith("qwen") and not _flag(config, "use_sliding_window")):
        return (None,) * layers
    if kinds is None:
        kinds = ["full_attention"] * min(full, layers) + ["sliding_attention"] * (layers - full)
    if not isinstance(kinds, list | tuple):
        raise ValueError(f"config.json: layer_types must be a list, not {repr(kinds)}")
    if len(kinds) != layers:
        raise ValueError(f"config.json: layer_types has {len(kinds)} entries for {layers} layers")
    for kind in kinds:
        _choose("layer type", kind, ("full_attention", "sliding_attention"))
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def from_hf(config: Mapping[str, Any]) -> Spec:
    """The Spec of a Hugging Face `config.json`, given as a mapping.

    Raises ValueError for an architecture, rope type, activation, quantization or shape that is not supported, and for
    values of the wrong type or beyond any model's.
    """
    names = config.get("architectures") or [None]
    architecture = _choose("architecture", names[0] if isinstance(names, list | tuple) else names, tuple(FAMILIES))
    family = FAMILIES[architecture]
    _choose("hidden_act", config.get("hidden_act", "silu"), ("silu",))
    if quant := _mapping(config, "quantization_config"):
        _choose("quantization", quant.get("quant_method", "unknown"), ("none (full-precision checkpoints)",))
    if _flag(config, "mlp_bias"):
        raise ValueError("config.json: mlp_bias is not supported")
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if missing := [name for name in needed if config.get(name) is None]:
        raise ValueError(f"config.json: {', '.join(missing)} missing")
    dim, ffn, layers, q_heads, vocab = (_integer(config, name, 0) for name in needed)
    kv_heads = _integer(config, "num_key_value_heads", q_heads)
    head = _integer(config, "head_dim", dim // q_heads)
    if q_heads % kv_heads or head % 2 or not head:
        raise ValueError(f"config.json: {q_heads} query heads over {kv_heads} kv heads of width {head} do not fit")
    context = _integer(config, "max_position_embeddings", 2048)
    rope = _rope(config, context)
    if rope.kind == "yarn":  # some checkpoints keep the unscaled length in max_position_embeddings
        context = max(context, int(rope.original * rope.factor))
        if context > MOST["max_position_embeddings"]:
            raise ValueError(f"config.json: a context of {rope.original} tokens times {rope.factor:g} is too long")
    eos, bos = end_tokens(config.get("eos_token_id")), config.get("bos_token_id")
    if bos is not None and type(bos) is not int:
        raise ValueError(f"config.json: bos_token_id must be a token id, not {repr(bos)}")
    if strange := [t for t in (*eos, bos or 0) if not -1 <= t < vocab]:  # -1: none, in the first Llama's configs
        raise ValueError(f"config.json: eos_token_id or bos_token_id {strange[0]} is none of the {vocab} tokens")
    bias = _flag(config, "attention_bias")
    return Spec(
        architecture=architecture,
        dim=dim,
        ffn=ffn,
        layers=layers,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head=head,
        vocab=vocab,
        context=context,
        eps=_real(config, "rms_norm_eps", 1e-6, 0.0, 1.0),
        rope=rope,
        windows=_windows(config, family, layers),
        qkv_bias=family == "qwen2" or (bias and family in ("llama", "qwen3")),
        out_bias=bias and family in ("llama", "qwen3"),
        qk_norm=family == "qwen3",
        tied=_flag(config, "tie_word_embeddings"),
        eos=tuple(t for t in eos if t >= 0),
        bos=None if bos == -1 else bos,
        dtype=_choose("dtype", config.get("dtype") or config.get("torch_dtype") or "bfloat16", DTYPES),
    )


def to_hf(spec: Spec) -> dict[str, Any]:
    """A `config.json` for `spec` that transformers and `from_hf` both read: from_hf(to_hf(spec)) == spec."""
    r = spec.rope
    rope: dict[str, Any] = {"rope_type": r.kind, "rope_theta": r.theta}
    if r.kind != "default":
        rope["factor"] = r.factor
    if r.kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = r.original
    if r.kind == "llama3":
        rope |= {"low_freq_factor": r.low, "high_freq_factor": r.high}
    if r.kind == "yarn":
        rope |= {"beta_slow": r.low, "beta_fast": r.high, "attention_factor": r.scale, "truncate": r.truncate}
    config: dict[str, Any] = {
        "architectures": [spec.architecture],
        "model_type": FAMILIES[spec.architecture],
        "hidden_act": "silu",
        "hidden_size": spec.dim,
        "intermediate_size": spec.ffn,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.q_heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head,
        "vocab_size": spec.vocab,
        "max_position_embeddings": spec.context,
        "rms_norm_eps": spec.eps,
        "rope_theta": r.theta,
        "rope_scaling": rope if r.kind != "default" else None,
        "tie_word_embeddings": spec.tied,
        "attention_bias": spec.out_bias,
        "eos_token_id": list(spec.eos),
        "bos_token_id": spec.bos,
        "torch_dtype": spec.dtype,
    }
    window = next((w for w in spec.windows if w), None)
    config["sliding_window"] = window
    if window:
        config["use_sliding_window"] = True
        if None in spec.windows or config["model_type"] != "mistral":  # transformers takes mistral's to be ministral
            config["layer_types"] = ["sliding_attention" if w else "full_attention" for w in spec.windows]
    return config
