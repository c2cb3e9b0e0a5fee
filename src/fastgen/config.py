"""Every setting, its default and its range, as frozen dataclasses that check themselves. conf/ mirrors the groups."""

import difflib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from numbers import Integral, Real
from types import NoneType
from typing import Any, TypeVar, get_args

T = TypeVar("T")

TOP_LEVEL_SETTINGS = ("seed", "special_tokens_in_content")  # of EngineConfig, in no group
# group -> the field that a flat keyword of its name sets
MAIN_FIELDS = {"compile": "mode", "offload": "target", "quantization": "weights"}
FLAT_NAMES = {("kv_cache", "dtype"): "kv_cache_dtype"}  # fields whose flat keyword has another name
SCHEDULING_POLICIES = ("mixed", "prefill_first")  # the names in core.scheduling_policy.POLICIES
MIN_TEMPERATURE = 1e-5  # anything lower is greedy: logits divided by it could leave the range of fp32
MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1

# --- checks -----------------------------------------------------------------------------------------------------------


def setting(
    default: Any, help: str, low: float | None = None, high: float | None = None, options: Sequence[str] = ()
) -> Any:
    """Declares a field with a sentence for its reader, and its range or its options, which `check_settings` checks."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "options": tuple(options)})


def described(help: str, default: Any) -> Any:
    """Declares a field with a sentence for its reader, which its class checks itself. A dict is copied."""
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@cache
def _rules(config_class: Any) -> list[tuple[str, set[Any], Mapping[str, Any]]]:
    """Returns name, possible types and metadata of each field that `setting` declares."""
    return [
        (f.name, {*(get_args(f.type) or (f.type,))}, f.metadata)
        for f in fields(config_class)
        if "options" in f.metadata
    ]


def check_settings(config: Any, owner: str) -> None:
    """Raises ValueError for a field of a wrong type, out of its range, or not in its options; `owner` names it."""
    for name, types, rule in _rules(type(config)):
        value = getattr(config, name)
        if value is None and NoneType in types:
            continue
        if rule["options"]:
            if not isinstance(value, str) or value not in rule["options"]:
                raise ValueError(f"{owner}.{name} must be one of {', '.join(rule['options'])}, got {value!r}")
        elif bool in types:
            if not isinstance(value, bool):
                expected = "true, false or null" if NoneType in types else "true or false"
                raise ValueError(f"{owner}.{name} must be {expected}, got {value!r}")
        elif types & {int, float}:
            _check_number(owner, name, value, rule["low"], rule["high"], integer=int in types)


def _check_number(
    owner: str, name: str, value: Any, low: float | None, high: float | None = None, *, integer: bool = True
) -> None:
    if isinstance(value, bool) or not isinstance(value, int if integer else int | float) or value != value:
        raise ValueError(f"{owner}.{name} must be {'a whole' if integer else 'a'} number, got {value!r}")
    if (low is not None and value < low) or (high is not None and value > high):
        expected = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{owner}.{name} must be {expected}, got {value!r}")


def check_int(name: str, value: object, low: int, high: int) -> None:
    """Raises ValueError unless `value` is a whole number from `low` to `high`."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r:.100}")


def check_choice(name: str, value: object, options: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of the options."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r:.100}")
    if value not in options:
        raise ValueError(unknown_name_message(name, value, list(options)))


def _to_python_scalar(value: Any) -> Any:
    """Converts a NumPy number or a tensor with one element to a Python number; returns other values unchanged."""
    if type(value) in (int, float, bool, str, NoneType):
        return value
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return int(value) if isinstance(value, Integral) else float(value) if isinstance(value, Real) else value


def _to_tuple(owner: str, name: str, value: Any, what: str) -> tuple[Any, ...]:
    """Converts a list, an array or another collection to a tuple; None is empty. Raises ValueError for other values."""
    if value is None:
        return ()
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"{owner}.{name} must be a list of {what}, got {value!r:.80}")
    return tuple(map(_to_python_scalar, value))


def _to_grammar(grammar: Any) -> str | None:
    """Converts a JSON schema or a pydantic model class to "json:…". Raises ValueError for other values than texts."""
    if isinstance(schema := getattr(grammar, "model_json_schema", None), Callable) and isinstance(grammar, type):
        grammar = schema()
    if isinstance(grammar, Mapping):
        try:
            return "json:" + json.dumps(grammar)
        except (TypeError, ValueError, RecursionError) as e:
            raise ValueError(f"SamplingParams.grammar: the schema is not JSON: {e}") from e
    if grammar is not None and not isinstance(grammar, str):
        expected = "a text (regex:…, json:… or lark:…), a JSON schema as a dict, or a pydantic model class"
        raise ValueError(f"SamplingParams.grammar must be {expected}, got {grammar!r:.80}")
    return grammar


def _explain_unknown_names(cls: type[T]) -> type[T]:
    """Makes the constructor of SamplingParams raise ValueError, with a hint, for keywords that are not fields."""
    init, signature = cls.__init__, inspect.signature(cls)
    names = signature.parameters

    def __init__(self: T, *args: Any, **settings: Any) -> None:
        if unknown := [name for name in settings if name not in names]:
            from fastgen.argument_hints import SAMPLING_HINTS

            raise ValueError(unknown_name_message("sampling setting", unknown[0], sorted(names), SAMPLING_HINTS))
        init(self, *args, **settings)

    cls.__init__, cls.__signature__ = __init__, signature  # type: ignore[method-assign, attr-defined]
    return cls


@_explain_unknown_names
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request is sampled, independent of the batch that it runs in.

    The order is: grammar, logit_bias and min_tokens, penalties, temperature, top_k, top_p, min_p, sampling. top_p keeps
    the smallest set of tokens whose probability, renormalised after top_k, reaches it; min_p is relative to the most
    likely token. Presence and frequency penalties count generated tokens, the repetition penalty prompt and output.

    Logprobs are natural logarithms. `logprob_mode="raw"` gives the model's own distribution, before bias, penalties
    and temperature; `"processed"` gives the distribution the token was sampled from (for greedy requests: the one
    before temperature). `logprobs=0` returns the sampled token's, `k` adds the k most likely.
    """

    temperature: float = setting(
        1.0,
        "Divides the logits before sampling; 0, or anything below 1e-5, selects the most likely token (greedy).",
        0,
        100,
    )
    top_p: float = setting(
        1.0,
        "Samples from the smallest set of tokens whose probabilities reach this sum; 1 is off, and 0 is rejected.",
        0,
        1,
    )
    top_k: int = setting(0, "Samples from this many most likely tokens; 0 and -1 are off.", 0)
    min_p: float = setting(
        0.0, "Drops tokens less likely than this fraction of the most likely token's probability; 0 is off.", 0, 1
    )
    seed: int | None = setting(
        None, "Seed of the request, which gives the same tokens in any batch; None: a random one.", MIN_SEED, MAX_SEED
    )
    n: int = setting(1, "Number of completions of the prompt.", 1, 4096)
    max_tokens: int | None = setting(
        256, "Maximum number of generated tokens; None: as many as the context and the KV cache allow.", 1
    )
    min_tokens: int = setting(
        0, "Number of tokens before which end tokens and stop_token_ids are banned; at most max_tokens."
    )
    stop: tuple[str, ...] = setting((), "Strings that end the output; they are cut from the text, not from the tokens.")
    stop_token_ids: tuple[int, ...] = described("Token ids that end the output.", ())
    ignore_eos: bool = setting(False, "Continues after an end-of-text token instead of finishing.")
    presence_penalty: float = setting(0.0, "Subtracted from the logits of tokens that have been generated.", -2, 2)
    frequency_penalty: float = setting(
        0.0, "Subtracted from a token's logit once for each time it has been generated.", -2, 2
    )
    repetition_penalty: float = setting(
        1.0,
        "Divides positive logits, and multiplies negative ones, of tokens in the prompt and the output; 1 is off.",
        1e-3,
        100,
    )
    logit_bias: dict[int, float] = described("Added to the logits of these token ids, from -100 to 100.", {})
    logprobs: int | None = setting(
        None,
        "Number of most likely tokens whose logprobs are returned besides the sampled token's; None: no logprobs.",
        0,
    )
    prompt_logprobs: int | None = setting(
        None,
        "Number of most likely tokens whose logprobs are returned at each prompt position; None: no prompt logprobs.",
        0,
    )
    logprob_mode: str = setting(
        "raw",
        "Whether logprobs are of the model's own distribution (raw) or of the one that was sampled from (processed).",
        options=("raw", "processed"),
    )
    # Also a JSON schema as a dict, or a pydantic model class: both become "json:…".
    grammar: Any = setting(None, "Grammar that the output follows: regex:…, json:… (a JSON schema) or lark:….")
    bad_words: tuple[str, ...] = setting((), "Texts that the output never contains.")
    allowed_token_ids: tuple[int, ...] | None = described(
        "Token ids that may be generated, end tokens included; None: all.", None
    )
    include_stop_str_in_output: bool = setting(False, "Keeps the stop string at the end of the text.")
    skip_special_tokens: bool = setting(True, "Leaves special tokens, such as end tokens, out of the text.")
    detokenize: bool = setting(True, "Decodes the output to text; false: it has token ids alone.")
    truncate_prompt_tokens: int | None = setting(None, "Keeps only this many last tokens of the prompt; None: all.", 1)
    # Functions (token ids so far, logits [V]) -> logits; with three parameters, of (prompt ids, token ids, logits).
    logits_processors: tuple[Any, ...] = described(
        "Python functions that edit the logits before anything else does; not from the command line.", ()
    )
    adapter: str | None = setting(None, "Name of a LoRA adapter of the engine; None: the model alone.")
    cache_salt: str | None = setting(None, "Shares cached prefixes only with requests of the same salt.")

    def __post_init__(self) -> None:
        me, set_field = "SamplingParams", object.__setattr__
        for name, types, _ in _rules(SamplingParams):
            if types & {int, float, bool}:
                set_field(self, name, _to_python_scalar(getattr(self, name)))
        set_field(self, "grammar", _to_grammar(self.grammar))
        if self.adapter is not None and (not isinstance(self.adapter, str) or not self.adapter):
            raise ValueError(f"{me}.adapter must be an adapter's name or None, got {self.adapter!r}")
        if self.cache_salt is not None and not (isinstance(self.cache_salt, str) and 0 < len(self.cache_salt) <= 256):
            expected = "a text of 1 to 256 characters or None"
            raise ValueError(f"{me}.cache_salt must be {expected}, got {self.cache_salt!r:.80}")
        stop = (self.stop,) if isinstance(self.stop, str) else _to_tuple(me, "stop", self.stop, "strings")
        set_field(self, "stop", stop)
        ends = _to_tuple(me, "stop_token_ids", self.stop_token_ids, "token ids, [5] for a single one")
        set_field(self, "stop_token_ids", ends)
        words = (self.bad_words,) if isinstance(self.bad_words, str) else self.bad_words
        set_field(self, "bad_words", _to_tuple(me, "bad_words", words, "strings"))
        if self.allowed_token_ids is not None:
            allowed = _to_tuple(me, "allowed_token_ids", self.allowed_token_ids, "token ids, [5] for a single one")
            set_field(self, "allowed_token_ids", allowed)
            if not allowed:
                raise ValueError(f"{me}.allowed_token_ids must hold a token id, or be None to allow all, got []")
        functions = (self.logits_processors,) if callable(self.logits_processors) else self.logits_processors
        set_field(self, "logits_processors", _to_tuple(me, "logits_processors", functions, "functions"))
        if not isinstance(self.logit_bias, Mapping | None):
            raise ValueError(f"{me}.logit_bias must map token ids to biases, {{5: -1.0}}, got {self.logit_bias!r:.80}")
        biases = {_to_python_scalar(token): _to_python_scalar(bias) for token, bias in (self.logit_bias or {}).items()}
        set_field(self, "logit_bias", biases)
        if self.top_k == -1 and type(self.top_k) is int:
            set_field(self, "top_k", 0)
        check_settings(self, me)
        if self.temperature < MIN_TEMPERATURE:
            set_field(self, "temperature", 0.0)
        if self.top_p == 0:
            raise ValueError(f"{me}.top_p must be above 0 and at most 1, got {self.top_p!r}")
        _check_number(me, "min_tokens", self.min_tokens, 0, self.max_tokens)
        if self.grammar is not None and (self.min_tokens or self.ignore_eos):
            raise ValueError(f"{me}.grammar decides where the output ends: min_tokens must be 0 and ignore_eos false")
        for name in ("stop", "bad_words"):
            for text in getattr(self, name):
                if not isinstance(text, str) or not text.strip(" " if name == "bad_words" else ""):
                    raise ValueError(f"{me}.{name} must hold non-empty strings, got {text!r}")
        if self.stop and not self.detokenize:
            raise ValueError(f"{me}.stop needs the text, and detokenize is false: use stop_token_ids")
        for name in ("stop_token_ids", "allowed_token_ids"):
            for token in getattr(self, name) or ():
                _check_number(me, name, token, 0)
        for function in self.logits_processors:
            if not callable(function):
                expected = "functions (token ids so far, logits) -> logits"
                raise ValueError(f"{me}.logits_processors must hold {expected}, got {function!r:.80}")
        for token, bias in self.logit_bias.items():
            _check_number(me, "logit_bias token", token, 0)
            _check_number(me, f"logit_bias[{token}]", bias, -100, 100, integer=False)

    @property
    def has_token_constraints(self) -> bool:
        """Whether a grammar or other constraints restrict the next token."""
        has_filter = self.bad_words or self.allowed_token_ids is not None or self.logits_processors
        return self.grammar is not None or bool(has_filter)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """The model to load: a path or hub id (None: the default model), or random weights for a config.json."""

    path: str | None = setting(
        None, "Folder, hub id, .safetensors or .gguf file of the model; None: the small default model."
    )
    dtype: str = setting(
        "auto",
        "Data type of weights and activations; auto: the checkpoint's on a GPU, float32 on a CPU.",
        options=("auto", "float32", "bfloat16", "float16"),
    )
    device: str = setting("auto", "Device of the model, such as cuda, cuda:1 or cpu; auto: a GPU if there is one.")
    random_weights: bool = setting(
        False, "Samples random weights instead of reading them; path is then a config.json or its folder."
    )
    random_seed: int = setting(0, "Seed of the random weights.")
    adapters: dict[str, str] = described(
        "PEFT adapters to load: a folder or hub id for each name that requests choose.", {}
    )

    def __post_init__(self) -> None:
        check_settings(self, "model")
        for name, folder in self.adapters.items():
            if not (isinstance(name, str) and name and isinstance(folder, str) and folder):
                raise ValueError(f"model.adapters must give a folder for each name, got {name!r}: {folder!r}")
        if self.random_weights and self.path is None:
            raise ValueError("model.random_weights needs model.path: the config.json, or the folder that holds it")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """The scheduler's policy and limits. `mixed`: a step decodes every running sequence and fills its budget with
    prompts. `prefill_first`: no decoding while prompt tokens are left to compute."""

    policy: str = setting(
        "mixed",
        "How a step mixes prefill and decode: mixed does both, prefill_first decodes only when no prompt is left.",
        options=SCHEDULING_POLICIES,
    )
    max_num_seqs: int = setting(512, "Maximum number of sequences that run at the same time.", 1)
    token_budget: int = setting(8192, "Maximum number of tokens that one step computes; at least max_num_seqs.", 1)
    prefill_chunk: int | None = setting(
        None, "Maximum number of tokens of one prompt in a step; None: token_budget.", 1
    )
    overlap: bool | None = setting(
        None, "Launches a step while the previous one still runs; None: if steps run compiled on a GPU."
    )

    def __post_init__(self) -> None:
        check_settings(self, "schedule")
        if self.token_budget < self.max_num_seqs:
            raise ValueError(
                f"schedule.token_budget ({self.token_budget}) must be at least schedule.max_num_seqs "
                f"({self.max_num_seqs}): every running sequence decodes one token a step"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheConfig:
    """The paged KV cache: its size, and the reuse of cached prefixes."""

    page_size: int = setting(
        64, "Number of tokens in a page of the cache; 128 is faster for prompts of 8k tokens and more.", 1
    )
    prefix_cache: bool = setting(True, "Reuses the longest cached prefix of each request's prompt.")
    dtype: str = setting(
        "auto",
        "Data type of keys and values; auto: that of the weights, fp8: e4m3 with a scale for each token and KV head.",
        options=("auto", "fp8"),
    )
    shared_prefix_attention: bool = setting(
        True,
        "Reads pages that decoding sequences share once for all of them, where that is faster (Triton attention only).",
    )
    cache_tokens: int | None = setting(
        None, "Capacity of the cache in tokens, at least page_size; None: as much as memory allows (1 GiB on a CPU)."
    )
    gpu_memory_utilization: float = setting(
        0.92,
        "Fraction of the GPU's memory that weights, cache and buffers use together if cache_tokens is None.",
        0.01,
        0.98,
    )

    def __post_init__(self) -> None:
        check_settings(self, "kv_cache")
        if self.cache_tokens is not None:
            _check_number("kv_cache", "cache_tokens", self.cache_tokens, self.page_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadConfig:
    """Where evicted pages go. `host`: to pinned host memory, which is allocated when the engine starts."""

    target: str = setting(
        "none",
        "Where pages go that are evicted from the device: none drops them, host moves them to pinned memory.",
        options=("none", "host"),
    )
    host_gb: float = setting(
        8.0, "Size of the cache in host memory, in GB (1e9 bytes); allocated when the engine starts.", 1e-6
    )
    offload_policy: str = setting(
        "all",
        "Which evicted pages go to the host: all, or only those of preempted requests.",
        options=("all", "preempted"),
    )

    def __post_init__(self) -> None:
        check_settings(self, "offload")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """Number of devices of a model, and number of copies of the model."""

    tensor_parallel: int = setting(
        1, "Number of GPUs, or of CPU processes, over which one engine splits the model.", 1, 64
    )
    replicas: int = setting(
        1, "Number of engines behind one queue; the tools start them, in Python use fastgen.Replicas.", 1, 64
    )
    peer_memory: bool = setting(
        True, "Lets small all-reduces read the memory of peer GPUs; false: NCCL does all of them."
    )

    def __post_init__(self) -> None:
        check_settings(self, "parallel")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Memory for LoRA adapters, allocated when the engine starts."""

    max_adapters: int = setting(
        0,
        "Maximum number of adapters loaded at the same time; raised to the number that is loaded with the model.",
        0,
        1024,
    )
    max_rank: int | None = setting(
        None, "Largest rank of an adapter; None: that of the adapters loaded with the model, or else 16.", 1, 256
    )

    def __post_init__(self) -> None:
        check_settings(self, "lora")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationConfig:
    """Number format of the weights and activations that a layer's matmuls multiply. `fp8`: e4m3, with a scale for each
    output channel and each token; embedding, norms, biases and head keep the model's dtype."""

    weights: str = setting(
        "auto",
        "Weights of the layers' matmuls: auto as the checkpoint stores them, none the model's dtype, or fp8.",
        options=("auto", "none", "fp8"),
    )

    def __post_init__(self) -> None:
        check_settings(self, "quantization")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileConfig:
    """How steps run, and by which attention backend. `batch_invariant`: logits and logprobs are bitwise the same in any
    batch, chunk or bucket, and in `fastgen.score`."""

    mode: str = setting(
        "auto",
        "How steps run: eagerly, compiled, or captured in CUDA graphs; auto: graphs on a GPU, eager on a CPU.",
        options=("auto", "eager", "inductor", "graphs"),
    )
    attention: str = setting(
        "auto",
        "Attention backend; auto: triton on a GPU, sdpa on a CPU.",
        options=("auto", "triton", "sdpa", "reference"),
    )
    batch_invariant: bool = setting(
        False, "Makes logits bitwise independent of the batch, chunk or graph size, at a cost in speed."
    )

    def __post_init__(self) -> None:
        check_settings(self, "compile")
        if self.batch_invariant and self.attention == "reference":
            raise ValueError("compile.batch_invariant=true has its own attention: leave compile.attention=auto")
        if self.mode == "graphs" and self.attention not in ("auto", "triton"):
            raise ValueError(
                f"compile.mode=graphs captures compile.attention=triton only, got {self.attention}: "
                "the others read the batch on the host; use compile.mode=inductor or eager"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """All settings of an engine except its model."""

    schedule: SchedulerConfig = SchedulerConfig()
    kv_cache: KVCacheConfig = KVCacheConfig()
    offload: OffloadConfig = OffloadConfig()
    parallel: ParallelConfig = ParallelConfig()
    lora: LoraConfig = LoraConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    compile: CompileConfig = CompileConfig()
    seed: int | None = described("Seed for requests without one; None: from the operating system.", None)
    special_tokens_in_content: str = setting(
        "text",
        "Whether the text of a special token in a chat message stays text, or becomes that token (control).",
        options=("text", "control"),
    )

    def __post_init__(self) -> None:
        check_settings(self, "settings")
        if self.seed is not None:
            check_int("seed", self.seed, MIN_SEED, MAX_SEED)
        if self.compile.batch_invariant and self.lora.max_adapters:
            raise ValueError(
                "compile.batch_invariant=true with lora.max_adapters: adapters' matmuls have no fixed order; merge one"
            )
        if self.compile.batch_invariant and self.parallel.tensor_parallel > 1:
            raise ValueError(
                "compile.batch_invariant=true holds for one device: all-reduces have no fixed order. "
                "Use parallel.tensor_parallel=1"
            )

    @classmethod
    def from_flat(cls, **settings: Any) -> "EngineConfig":
        """Builds a config from flat keywords (`token_budget=512`): fields of any group, or whole groups.

        `compile="eager"`, `offload="host"` and `quantization="fp8"` set the group's main field (`MAIN_FIELDS`);
        `kv_cache_dtype` sets `kv_cache.dtype`.
        Raises ValueError for an unknown name, with the nearest known ones.
        """
        groups = {f.name: getattr(cls(), f.name) for f in fields(cls) if is_dataclass(f.default)}
        keys = [(group, f.name) for group, value in groups.items() for f in fields(value)]
        path = {FLAT_NAMES.get(key, key[1]): key for key in keys}
        for group, main_field in MAIN_FIELDS.items():
            path[group] = path.pop(main_field)
        changes: dict[str, dict[str, Any]] = {}
        top_level = {name: settings.pop(name) for name in TOP_LEVEL_SETTINGS if name in settings}
        for name, value in settings.items():
            if name in groups and isinstance(value, type(groups[name])):
                groups[name] = value
            elif name in path:
                group, field_name = path[name]
                changes.setdefault(group, {})[field_name] = value
            else:
                from fastgen.argument_hints import ENGINE_HINTS

                names = [*path, *TOP_LEVEL_SETTINGS]
                raise ValueError(unknown_name_message("setting", name, names, ENGINE_HINTS))
        return cls(**top_level, **{g: replace(value, **changes.get(g, {})) for g, value in groups.items()})

    def resolve(self, device: str) -> "EngineConfig":
        """Returns the settings with each `auto` replaced by its value for a device type, "cuda" or "cpu"."""
        c, s, cuda = self.compile, self.schedule, device == "cuda"
        if c.mode == "graphs" and not cuda:
            raise ValueError("compile.mode=graphs needs a GPU; on a CPU use eager or inductor")
        attention = ("triton" if cuda else "sdpa") if c.attention == "auto" else c.attention
        mode = ("graphs" if cuda and attention == "triton" else "eager") if c.mode == "auto" else c.mode
        overlap = mode != "eager" and cuda if s.overlap is None else s.overlap
        return replace(self, compile=replace(c, mode=mode, attention=attention), schedule=replace(s, overlap=overlap))


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoConfig:
    """A run of `fastgen.training.grpo`: learning from rewards, in groups of `sampling.n` answers."""

    problem: str = setting(
        "addition", "Problem to learn: a name in fastgen.training.problems.PROBLEMS, or module:attribute."
    )
    steps: int = setting(40, "Number of steps of the run.", 1)
    prompts_per_step: int = setting(8, "Number of prompts sampled in each step.", 1)
    num_minibatches: int = setting(2, "Number of optimizer updates in each step.", 1)
    loss_type: str = setting(
        "grpo",
        "Loss function; dr_grpo divides neither by the group's standard deviation nor by the answer's length.",
        options=("grpo", "dr_grpo"),
    )
    clip: float = setting(0.2, "Largest change of a token's probability ratio before it is clipped.", 0, 1)
    kl_coef: float = setting(
        0.0, "Weight of the KL divergence from the initial weights; 0 keeps no copy of them.", 0, 100
    )
    trainable_layers: int | None = setting(
        None, "Number of decoder layers, counted from the last, that are trained; None: all weights are.", 1
    )
    lr: float = setting(1e-5, "Learning rate of AdamW.", 0, 1)
    warmup_steps: int = setting(4, "Number of steps of linear learning-rate warm-up.", 0)
    weight_decay: float = setting(0.0, "Weight decay of AdamW.", 0, 1)
    max_grad_norm: float = setting(1.0, "Norm to which the gradient is clipped.", 1e-6)
    gradient_checkpointing: bool = setting(
        False, "Recomputes activations in the backward pass instead of storing them."
    )
    save_every: int = setting(20, "Number of steps between checkpoints.", 1)
    output_dir: str = setting("grpo", "Folder of the log, the checkpoint, the plot and the trained model.")
    resume: bool = setting(False, "Continues from the checkpoint in output_dir.")
    export: bool = setting(True, "Writes the trained model at the end.")

    def __post_init__(self) -> None:
        check_settings(self, "grpo")
        for name in ("problem", "output_dir"):
            if not isinstance(value := getattr(self, name), str) or not value:
                raise ValueError(f"grpo.{name} must be a name, got {value!r}")


def unknown_name_message(
    what: str, name: str, options: Mapping[str, Any] | list[str], hints: Mapping[str, str] | None = None
) -> str:
    """Returns the error message for an unknown name, with its entry in `hints`, or else the nearest known names."""
    if hints and name in hints:
        return f"unknown {what} {name!r}; {hints[name]}"
    close = difflib.get_close_matches(name, list(options), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(sorted(options))}"
    return f"unknown {what} {name!r}; {hint}"
