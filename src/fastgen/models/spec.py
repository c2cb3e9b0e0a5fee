"""What a model is, as data: families differ by the flags of a `Spec`, never by a file."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
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


def _choose(what: str, value: object, supported: tuple[str, ...]) -> str:
    if value not in supported:
        raise ValueError(f"config.json: {what} {value!r} is not supported; supported: {', '.join(supported)}")
    return str(value)


def _rope(config: Mapping[str, Any], context: int) -> Rope:
    """Both spellings: `rope_theta` + `rope_scaling`, and `rope_parameters` (transformers 5)."""
    p = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = float(p.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = _choose("rope type", p.get("rope_type", p.get("type", "default")), ("default", "linear", "llama3", "yarn"))
    if (p.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
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
    factor = float(p["factor"])
    original = int(p.get("original_max_position_embeddings") or context)
    if kind == "linear":
        return Rope(kind=kind, theta=theta, factor=factor)
    if kind == "llama3":
        low, high = float(p["low_freq_factor"]), float(p["high_freq_factor"])
        return Rope(kind=kind, theta=theta, factor=factor, original=original, low=low, high=high)
    return Rope(
        kind=kind,
        theta=theta,
        factor=factor,
        original=original,
        low=float(p.get("beta_slow") or 1),
        high=float(p.get("beta_fast") or 32),
        scale=_yarn_scale(p, factor),
        truncate=bool(p.get("truncate", True)),
    )


def _yarn_scale(p: Mapping[str, Any], factor: float) -> float:
    """Attention temperature of YaRN (arXiv 2309.00071, eq. 22), with the mscale pair some checkpoints carry."""

    def mscale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])
    if p.get("mscale") and p.get("mscale_all_dim"):
        return mscale(p["mscale"]) / mscale(p["mscale_all_dim"])
    return mscale(1.0)


def _windows(config: Mapping[str, Any], family: str, layers: int) -> tuple[int | None, ...]:
    """Sliding window of each layer, by each family's own convention."""
    window = config.get("sliding_window", 4096 if family in ("mistral", "ministral") else None)
    kinds = config.get("layer_types")
    if family == "llama" or not window or (family.startswith("qwen") and not config.get("use_sliding_window")):
        return (None,) * layers
    if kinds is None:
        full = config.get("max_window_layers", 28) if family.startswith("qwen") else 0
        kinds = ["full_attention"] * min(full, layers) + ["sliding_attention"] * (layers - full)
    if len(kinds) != layers:
        raise ValueError(f"config.json: layer_types has {len(kinds)} entries for {layers} layers")
    for kind in kinds:
        _choose("layer type", kind, ("full_attention", "sliding_attention"))
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def from_hf(config: Mapping[str, Any]) -> Spec:
    """The Spec of a Hugging Face `config.json`, given as a mapping.

    Raises ValueError for an architecture, rope type, activation, quantization or shape that is not supported.
    """
    architecture = _choose("architecture", (config.get("architectures") or [None])[0], tuple(FAMILIES))
    family = FAMILIES[architecture]
    _choose("hidden_act", config.get("hidden_act", "silu"), ("silu",))
    if quant := config.get("quantization_config"):
        _choose("quantization", quant.get("quant_method", "unknown"), ("none (full-precision checkpoints)",))
    if config.get("mlp_bias"):
        raise ValueError("config.json: mlp_bias is not supported")
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if missing := [name for name in needed if not config.get(name)]:
        raise ValueError(f"config.json: {', '.join(missing)} missing")
    dim, layers, q_heads = (int(config[k]) for k in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    kv_heads = int(config.get("num_key_value_heads") or q_heads)
    head = int(config.get("head_dim") or dim // q_heads)
    if q_heads % kv_heads or head % 2:
        raise ValueError(f"config.json: {q_heads} query heads over {kv_heads} kv heads of width {head} do not fit")
    context = int(config.get("max_position_embeddings") or 2048)
    rope = _rope(config, context)
    if rope.kind == "yarn":  # some checkpoints keep the unscaled length in max_position_embeddings
        context = max(context, int(rope.original * rope.factor))
    eos = config.get("eos_token_id")
    bias = bool(config.get("attention_bias"))
    return Spec(
        architecture=architecture,
        dim=dim,
        ffn=int(config["intermediate_size"]),
        layers=layers,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head=head,
        vocab=int(config["vocab_size"]),
        context=context,
        eps=float(config.get("rms_norm_eps") or 1e-6),
        rope=rope,
        windows=_windows(config, family, layers),
        qkv_bias=family == "qwen2" or (bias and family in ("llama", "qwen3")),
        out_bias=bias and family in ("llama", "qwen3"),
        qk_norm=family == "qwen3",
        tied=bool(config.get("tie_word_embeddings", False)),
        eos=() if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (int(eos),),
        bos=config.get("bos_token_id"),
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
