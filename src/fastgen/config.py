"""Every setting and its default, as frozen dataclasses that check themselves. The groups in conf/ mirror them."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from numbers import Integral, Real
from types import NoneType
from typing import Any

SCALAR_FIELDS = (  # fields of SamplingParams
    "temperature", "top_p", "top_k", "min_p", "seed", "n", "max_tokens", "min_tokens", "ignore_eos",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logprobs", "prompt_logprobs",
)  # fmt: skip
TOP_LEVEL_SETTINGS = ("seed", "special_tokens_in_content")  # of EngineConfig, in no group
MAIN_FIELDS = {"compile": "mode", "offload": "target"}  # group -> the field that a flat keyword of its name sets
SCHEDULING_POLICIES = ("mixed", "prefill_first")  # the names in core.scheduling_policy.POLICIES
MIN_TEMPERATURE = 1e-5  # anything lower is greedy: logits divided by it could leave the range of fp32


def _check_number(
    owner: str, name: str, value: Any, low: float | None, high: float | None = None, *, integer: bool
) -> None:
    kinds = int if integer else int | float
    above = f"at least {low}" if high is None else f"between {low} and {high}"
    if isinstance(value, bool) or not isinstance(value, kinds) or value != value:
        raise ValueError(f"{owner}.{name} must be {'a whole' if integer else 'a'} number, got {value!r}")
    if (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"{owner}.{name} must be {above}, got {value!r}")


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


def _check_choice(owner: str, name: str, value: object, options: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{owner}.{name} must be one of {', '.join(options)}, got {value!r}")


def _check_bool(owner: str, name: str, value: object, options: str = "true or false") -> None:
    """Raises ValueError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{owner}.{name} must be {options}, got {value!r}")


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

    temperature: float = 1.0  # 0 is greedy; so is anything below 1e-5, which becomes 0
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    seed: int | None = None  # None: random
    n: int = 1
    max_tokens: int | None = 256  # None: as many as context and cache allow
    min_tokens: int = 0  # before that, end tokens and stop_token_ids are banned
    stop: tuple[str, ...] = ()  # removed from the text, not from the tokens
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_mode: str = "raw"
    grammar: str | None = None  # regex:…, json:… or lark:…, which the output follows
    adapter: str | None = None  # name of a LoRA adapter of the engine; None: the model alone
    cache_salt: str | None = None  # prefix cache hits come from requests of the same salt only

    def __post_init__(self) -> None:
        me = "SamplingParams"
        for name in SCALAR_FIELDS:
            object.__setattr__(self, name, _to_python_scalar(getattr(self, name)))
        _check_bool(me, "ignore_eos", self.ignore_eos)
        if self.grammar is not None and not isinstance(self.grammar, str):
            raise ValueError(f"{me}.grammar must be a text, got {self.grammar!r}")
        if self.adapter is not None and (not isinstance(self.adapter, str) or not self.adapter):
            raise ValueError(f"{me}.adapter must be an adapter's name or None, got {self.adapter!r}")
        if self.cache_salt is not None and not (isinstance(self.cache_salt, str) and 0 < len(self.cache_salt) <= 256):
            raise ValueError(
                f"{me}.cache_salt must be a text of 1 to 256 characters or None, got {self.cache_salt!r:.80}"
            )
        stop = (self.stop,) if isinstance(self.stop, str) else _to_tuple(me, "stop", self.stop, "strings")
        object.__setattr__(self, "stop", stop)
        ends = _to_tuple(me, "stop_token_ids", self.stop_token_ids, "token ids, [5] for a single one")
        object.__setattr__(self, "stop_token_ids", ends)
        if not isinstance(self.logit_bias, Mapping | None):
            raise ValueError(f"{me}.logit_bias must map token ids to biases, {{5: -1.0}}, got {self.logit_bias!r:.80}")
        biases = {_to_python_scalar(token): _to_python_scalar(bias) for token, bias in (self.logit_bias or {}).items()}
        object.__setattr__(self, "logit_bias", biases)
        _check_number(me, "temperature", self.temperature, 0, 100, integer=False)
        if self.temperature < MIN_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)
        _check_number(me, "top_p", self.top_p, 0, 1, integer=False)
        if self.top_p == 0:
            raise ValueError(f"{me}.top_p must be above 0 and at most 1, got {self.top_p!r}")
        _check_number(me, "top_k", self.top_k, 0, integer=True)
        _check_number(me, "min_p", self.min_p, 0, 1, integer=False)
        if self.seed is not None:
            _check_number(me, "seed", self.seed, -(2**63), 2**63 - 1, integer=True)
        _check_number(me, "n", self.n, 1, 4096, integer=True)
        if self.max_tokens is not None:
            _check_number(me, "max_tokens", self.max_tokens, 1, integer=True)
        _check_number(me, "min_tokens", self.min_tokens, 0, self.max_tokens, integer=True)
        if self.grammar is not None and (self.min_tokens or self.ignore_eos):
            raise ValueError(f"{me}.grammar decides where the output ends: min_tokens must be 0 and ignore_eos false")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"{me}.stop must hold non-empty strings, got {text!r}")
        for token in self.stop_token_ids:
            _check_number(me, "stop_token_ids", token, 0, integer=True)
        for name in ("presence_penalty", "frequency_penalty"):
            _check_number(me, name, getattr(self, name), -2, 2, integer=False)
        _check_number(me, "repetition_penalty", self.repetition_penalty, 1e-3, 100, integer=False)
        for token, bias in self.logit_bias.items():
            _check_number(me, "logit_bias token", token, 0, integer=True)
            _check_number(me, f"logit_bias[{token}]", bias, -100, 100, integer=False)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_number(me, name, getattr(self, name), 0, integer=True)
        _check_choice(me, "logprob_mode", self.logprob_mode, ("raw", "processed"))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """The model to load: a path or hub id (None: the default model), or random weights for a config.json."""

    path: str | None = None
    dtype: str = "auto"  # auto: the checkpoint's dtype on a GPU, float32 on a CPU
    device: str = "auto"  # auto: cuda if available
    random_weights: bool = False
    random_seed: int = 0
    adapters: dict[str, str] = field(default_factory=dict)  # folders of PEFT adapters, by the name that requests choose

    def __post_init__(self) -> None:
        _check_choice("model", "dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        for name, folder in self.adapters.items():
            if not (isinstance(name, str) and name and isinstance(folder, str) and folder):
                raise ValueError(f"model.adapters must give a folder for each name, got {name!r}: {folder!r}")
        if self.random_weights and self.path is None:
            raise ValueError("model.random_weights needs model.path: the config.json, or the folder that holds it")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """The scheduler's policy and limits. `mixed`: a step decodes every running sequence and fills its budget with
    prompts. `prefill_first`: no decoding while prompt tokens are left to compute."""

    policy: str = "mixed"
    max_num_seqs: int = 512  # running sequences
    token_budget: int = 8192  # tokens of a step
    prefill_chunk: int | None = None  # tokens of one prompt in a step; None: token_budget
    # Whether a step is launched while the step before still runs; None: on GPUs.
    overlap: bool | None = None

    def __post_init__(self) -> None:
        _check_choice("schedule", "policy", self.policy, SCHEDULING_POLICIES)
        for name in ("max_num_seqs", "token_budget", "prefill_chunk"):
            if getattr(self, name) is not None:
                _check_number("schedule", name, getattr(self, name), 1, integer=True)
        if self.overlap is not None:
            _check_bool("schedule", "overlap", self.overlap, "true, false or null")
        if self.token_budget < self.max_num_seqs:
            raise ValueError(
                f"schedule.token_budget ({self.token_budget}) must be at least schedule.max_num_seqs "
                f"({self.max_num_seqs}): every running sequence decodes one token a step"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheConfig:
    """The paged KV cache: its size, and the reuse of cached prefixes."""

    page_size: int = 64  # tokens; 128 is faster for prompts of 8k and more
    prefix_cache: bool = True  # whether requests reuse the longest cached prefix of their prompt
    shared_prefix_attention: bool = True  # attention reads pages shared by decoding sequences once
    cache_tokens: int | None = None  # capacity; None: as free memory allows
    # Share of the GPU's memory for everything together if cache_tokens is None (on a CPU the cache is then 1 GB).
    gpu_memory_utilization: float = 0.92

    def __post_init__(self) -> None:
        _check_number("kv_cache", "page_size", self.page_size, 1, integer=True)
        for name in ("prefix_cache", "shared_prefix_attention"):
            _check_bool("kv_cache", name, getattr(self, name))
        if self.cache_tokens is not None:
            _check_number("kv_cache", "cache_tokens", self.cache_tokens, self.page_size, integer=True)
        _check_number("kv_cache", "gpu_memory_utilization", self.gpu_memory_utilization, 0.01, 0.98, integer=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadConfig:
    """Where evicted pages go. `host`: to pinned host memory, which is allocated when the engine starts."""

    target: str = "none"
    host_gb: float = 8.0  # in units of 1e9 bytes
    offload_policy: str = "all"  # all pages, or those of preempted requests only (`preempted`)

    def __post_init__(self) -> None:
        _check_choice("offload", "target", self.target, ("none", "host"))
        _check_choice("offload", "offload_policy", self.offload_policy, ("all", "preempted"))
        _check_number("offload", "host_gb", self.host_gb, 1e-6, integer=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """Number of devices of a model, and number of copies of the model."""

    tensor_parallel: int = 1  # GPUs of one engine
    replicas: int = 1  # engines behind one queue (`fastgen.Replicas`)
    peer_memory: bool = True  # small all-reduces read the memory of peer GPUs; false: NCCL alone

    def __post_init__(self) -> None:
        _check_bool("parallel", "peer_memory", self.peer_memory)
        for name in ("tensor_parallel", "replicas"):
            _check_number("parallel", name, getattr(self, name), 1, 64, integer=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Memory for LoRA adapters, allocated when the engine starts."""

    max_adapters: int = 0  # at the same time; at least as many as are loaded with the model
    max_rank: int | None = None  # None: the largest rank of those, or else 16

    def __post_init__(self) -> None:
        _check_number("lora", "max_adapters", self.max_adapters, 0, 1024, integer=True)
        if self.max_rank is not None:
            _check_number("lora", "max_rank", self.max_rank, 1, 256, integer=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileConfig:
    """How steps run, and by which attention backend."""

    mode: str = "auto"  # graphs on a GPU, eager elsewhere
    attention: str = "auto"  # triton on a GPU, sdpa elsewhere
    # Logits and logprobs are bitwise the same in any batch, chunk or bucket, and in `fastgen.score`.
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        _check_bool("compile", "batch_invariant", self.batch_invariant)
        if self.batch_invariant and self.attention == "reference":
            raise ValueError("compile.batch_invariant=true has its own attention: leave compile.attention=auto")
        _check_choice("compile", "mode", self.mode, ("auto", "eager", "inductor", "graphs"))
        if self.mode == "graphs" and self.attention not in ("auto", "triton"):
            raise ValueError(
                f"compile.mode=graphs captures compile.attention=triton only, got {self.attention}: "
                "the others read the batch on the host; use compile.mode=inductor or eager"
            )
        _check_choice("compile", "attention", self.attention, ("auto", "triton", "sdpa", "reference"))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """All settings of an engine except its model."""

    schedule: SchedulerConfig = SchedulerConfig()
    kv_cache: KVCacheConfig = KVCacheConfig()
    offload: OffloadConfig = OffloadConfig()
    parallel: ParallelConfig = ParallelConfig()
    lora: LoraConfig = LoraConfig()
    compile: CompileConfig = CompileConfig()
    seed: int | None = None  # for requests without a seed; None: from the operating system
    # Special tokens spelled out in a chat's messages or tools are encoded as `text`, or as the token (`control`).
    special_tokens_in_content: str = "text"

    def __post_init__(self) -> None:
        if self.seed is not None:
            check_int("seed", self.seed, -(2**63), 2**63 - 1)
        _check_choice("settings", "special_tokens_in_content", self.special_tokens_in_content, ("text", "control"))
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

        `compile="eager"` and `offload="host"` set the group's main field, `compile.mode` and `offload.target`.
        Raises ValueError for an unknown name, with the nearest known ones.
        """
        groups = {f.name: getattr(cls(), f.name) for f in fields(cls) if is_dataclass(f.default)}
        path = {f.name: (group, f.name) for group, value in groups.items() for f in fields(value)}
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
                raise ValueError(unknown_name_message("setting", name, [*path, *TOP_LEVEL_SETTINGS]))
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

    problem: str = "addition"  # a name in fastgen.training.problems.PROBLEMS, or module:attribute
    steps: int = 40
    prompts_per_step: int = 8
    num_minibatches: int = 2  # optimizer updates in a step
    loss_type: str = "grpo"  # or dr_grpo: not divided by the group's standard deviation and the answer's length
    clip: float = 0.2
    kl_coef: float = 0.0  # weight of the KL divergence from the initial weights; 0 keeps no copy of them
    trainable_layers: int | None = None  # number of decoder layers that learn, the last ones; None: all weights
    lr: float = 1e-5
    warmup_steps: int = 4  # steps of linear learning-rate warm-up
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # the gradient is clipped to this norm
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    save_every: int = 20  # steps
    output_dir: str = "grpo"  # for log, checkpoint, plot and model
    resume: bool = False  # continue from the checkpoint in output_dir
    export: bool = True  # write the model at the end

    def __post_init__(self) -> None:
        for name in ("steps", "prompts_per_step", "num_minibatches", "save_every"):
            _check_number("grpo", name, getattr(self, name), 1, integer=True)
        if self.trainable_layers is not None:
            _check_number("grpo", "trainable_layers", self.trainable_layers, 1, integer=True)
        _check_number("grpo", "warmup_steps", self.warmup_steps, 0, integer=True)
        for name, high in (("clip", 1), ("kl_coef", 100), ("lr", 1), ("weight_decay", 1)):
            _check_number("grpo", name, getattr(self, name), 0, high, integer=False)
        _check_number("grpo", "max_grad_norm", self.max_grad_norm, 1e-6, integer=False)
        _check_choice("grpo", "loss_type", self.loss_type, ("grpo", "dr_grpo"))
        for name in ("gradient_checkpointing", "resume", "export"):
            _check_bool("grpo", name, getattr(self, name))
        for name in ("problem", "output_dir"):
            if not isinstance(value := getattr(self, name), str) or not value:
                raise ValueError(f"grpo.{name} must be a name, got {value!r}")


def unknown_name_message(what: str, name: str, options: Mapping[str, Any] | list[str]) -> str:
    """Returns the error message for an unknown name, with the nearest known names."""
    close = difflib.get_close_matches(name, list(options), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(sorted(options))}"
    return f"unknown {what} {name!r}; {hint}"
