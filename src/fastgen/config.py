"""Every setting, its default and its range, as frozen dataclasses that check themselves. conf/ mirrors the groups."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
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
def setting_rules(config_class: Any) -> list[tuple[str, set[Any], Mapping[str, Any]]]:
    """Returns name, possible types and metadata of each field that `setting` declares."""
    return [
        (f.name, {*(get_args(f.type) or (f.type,))}, f.metadata)
        for f in fields(config_class)
        if "options" in f.metadata
    ]


def check_settings(config: Any, owner: str) -> None:
    """Raises ValueError for a field of a wrong type, out of its range, or not in its options; `owner` names it."""
    for name, types, rule in setting_rules(type(config)):
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
            check_number(owner, name, value, rule["low"], rule["high"], integer=int in types)


def check_number(
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
            check_number("kv_cache", "cache_tokens", self.cache_tokens, self.page_size)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetConfig:
    """A run of `fastgen.generate_dataset`: rows of a file in, completions in files of a folder out."""

    input_format: str = setting(
        "auto", "Format of the input; auto: by its suffix.", options=("auto", "jsonl", "csv", "tsv", "parquet")
    )
    prompt: str | None = setting(
        None, "Column of the prompt: a text, token ids or chat messages. None: messages, prompt_token_ids or prompt."
    )
    template: str | None = setting(
        None, "Jinja template that makes the prompt from a row's columns, such as 'Translate: {{ text }}'."
    )
    system: str | None = setting(None, "System message in front of each chat.")
    keep: tuple[str, ...] = setting((), "Columns of the input that are copied to the output.")
    overrides: tuple[str, ...] = setting(
        (), "Columns that override the sampling setting of the same name in their row, where they are not null."
    )
    output_format: str = setting("jsonl", "Format of the output files.", options=("jsonl", "parquet"))
    rows_per_file: int = setting(10_000, "Number of input rows whose completions are in one output file.", 1, 10**9)
    on_error: str = setting(
        "skip",
        "What to do about a row that cannot run: skip writes it to an errors file, stop ends the run.",
        options=("skip", "stop"),
    )
    truncate: str = setting(
        "none",
        "What to do about a prompt that is too long: none makes it an error, left drops its first tokens.",
        options=("none", "left"),
    )
    shard: str | None = setting(
        None, "Part of the run, K/N for job K of N jobs, counted from 0. They write to the same folder. None: all."
    )
    max_in_flight: int | None = setting(
        None, "Largest number of completions queued at the same time; None: twice schedule.max_num_seqs.", 1
    )

    def __post_init__(self) -> None:
        check_settings(self, "dataset")
        for name in ("prompt", "template", "system", "shard"):
            if (value := getattr(self, name)) is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"dataset.{name} must be a text or None, got {value!r:.80}")
        for name in ("keep", "overrides"):
            value = getattr(self, name)
            names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else (None,)
            if not all(isinstance(column, str) and column for column in names):
                raise ValueError(f"dataset.{name} must be a list of columns, got {value!r:.80}")
            object.__setattr__(self, name, names)
        if self.prompt is not None and self.template is not None:
            raise ValueError("dataset.prompt and dataset.template both make the prompt: give one")
        _ = self.shard_index_and_count  # raises ValueError

    @property
    def shard_index_and_count(self) -> tuple[int, int]:
        """K and N of `shard`; 0 and 1 without it. Raises ValueError for a `shard` of another form."""
        if self.shard is None:
            return 0, 1
        index, slash, count = self.shard.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise ValueError(f"dataset.shard must be K/N with K from 0 to N - 1, such as 3/16, got {self.shard!r}")
        return int(index), int(count)


def unknown_name_message(
    what: str, name: str, options: Mapping[str, Any] | list[str], hints: Mapping[str, str] | None = None
) -> str:
    """Returns the error message for an unknown name, with its entry in `hints`, or else the nearest known names."""
    if hints and name in hints:
        return f"unknown {what} {name!r}; {hints[name]}"
    close = difflib.get_close_matches(name, list(options), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(sorted(options))}"
    return f"unknown {what} {name!r}; {hint}"
