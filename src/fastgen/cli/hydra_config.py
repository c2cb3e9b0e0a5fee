"""Hydra configuration of the command line: the schema, composing overrides, quoting arguments, error messages.

The schema is built from the dataclasses of fastgen.config, so keys, types and ranges are defined once.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from fastgen.argument_hints import ENGINE_HINTS, SAMPLING_HINTS
from fastgen.cli.prompt_files import FORMATS
from fastgen.cli.settings_help import format_settings
from fastgen.config import (
    DatasetConfig,
    EngineConfig,
    GrpoConfig,
    LoadConfig,
    check_choice,
    check_settings,
    described,
    setting,
    unknown_name_message,
)
from fastgen.sampling_params import SamplingParams

# Keys without a meaning for the other tools, except for those that they allow.
FGRUN_KEYS = (
    "prompt", "chat", "task", "out", "chat_template", "chat_template_kwargs", "tools", "add_generation_prompt",
    "continue_final_message",
)  # fmt: skip
TASKS = ("generate", "stream", "profile", "grpo", "dataset", "join")
TEXT_KEYS = (
    "prompt",
    "model.path",
    "sampling.grammar",
    "dataset.template",
    "dataset.system",
)  # always one text: a comma does not make a sweep
FLAGS_WITH_VALUE = {
    "--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd",
    "--info", "-i", "--experimental-rerun",
}  # fmt: skip
HYDRA_ERRORS = (HydraException, OmegaConfBaseException)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The task of fgrun, and the prompts that it takes."""

    name: str = setting(
        "generate",
        "What to do: print texts when done, stream them, profile some steps, train (grpo), generate for each row of a "
        "file (dataset), or check the files of several such jobs (join).",
        options=TASKS,
    )
    prompts: str | None = setting(
        None, "File of prompts (.txt .jsonl .json .csv .tsv .parquet, also .gz) in place of prompt; - is stdin."
    )
    format: str | None = setting(None, "Format of the file of prompts; None: by its suffix.", options=FORMATS)
    steps: int = setting(8, "Number of steps that task=profile records, after two that it skips.", 1)
    trace: str | None = setting(
        None, "Trace file (.json or .json.gz) that task=profile writes; None: a new file in the working directory."
    )

    def __post_init__(self) -> None:
        check_choice("task.name", self.name, TASKS)  # suggests the nearest name
        check_settings(self, "task")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig(EngineConfig):
    """Everything fgrun can configure: engine, model, sampling and task."""

    model: LoadConfig = field(default_factory=LoadConfig)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    task: Task = field(default_factory=Task)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    prompt: Any = described(
        "Prompt: a text, token ids [1,2,3], chat messages [{role: user, content: hi}], or a list of those.", None
    )
    chat: bool = described(
        "Whether a text is a user message, rendered by the chat template, if the model has one.", True
    )
    chat_template: str | None = described(
        "File of a Jinja template that renders chats, in place of the model's own.", None
    )
    chat_template_kwargs: dict[str, Any] = described(
        "Variables of the chat template, such as {enable_thinking: false} for Qwen3.", {}
    )
    tools: str | None = described(
        "JSON file of functions, in OpenAI's form, that the chat template describes to the model.", None
    )
    add_generation_prompt: bool = described("Ends a chat's prompt with the beginning of the assistant's turn.", True)
    continue_final_message: bool = described(
        "Leaves a chat's last message open for the model to continue; needs add_generation_prompt=false.", False
    )
    out: str | None = described(
        "File that receives a line of JSON for each prompt; - prints these lines in place of the texts. The folder of "
        "task=dataset.",
        None,
    )


def _build_key_aliases() -> dict[str, str]:
    """Returns keys without a group, as the library's keywords are, mapped to the full keys: top_p to sampling.top_p."""
    config = RunConfig()
    groups = [f.name for f in fields(EngineConfig) if is_dataclass(getattr(config, f.name))] + ["model", "sampling"]
    aliases = {f.name: f"{group}.{f.name}" for group in groups for f in fields(getattr(config, group))}
    top_level = {f.name for f in fields(RunConfig)}
    aliases |= {"shard": "dataset.shard"}
    return {"parallel.size": "parallel.tensor_parallel"} | {k: v for k, v in aliases.items() if k not in top_level}


def conf_dir() -> Path:
    """Returns the folder of the configuration files: in the installed package, or at the root of a checkout."""
    package = Path(__file__).resolve().parents[1]
    return next(d for d in (package / "conf", package.parents[1] / "conf") if (d / "config.yaml").is_file())


def _format_composed_settings(*, _root_: DictConfig) -> str:
    """Returns the settings for the template of `fgrun --help`, in which a dollar sign must be doubled."""
    return format_settings(RunConfig, OmegaConf.to_container(_root_)).replace("$", "$$")  # type: ignore[arg-type]


def _register_schema() -> None:
    schema = OmegaConf.structured(RunConfig)
    for node in (schema, *(v for v in schema.values() if isinstance(v, DictConfig))):
        OmegaConf.set_readonly(node, None)  # nodes of frozen dataclasses are read-only, but must accept overrides
    for mapping in (schema.sampling.logit_bias, schema.model.adapters, schema.chat_template_kwargs):  # keys are free
        OmegaConf.set_struct(mapping, False)
    ConfigStore.instance().store("schema", schema)
    OmegaConf.register_new_resolver("fastgen.settings", _format_composed_settings, replace=True)
    OmegaConf.register_new_resolver("fastgen.conf", lambda path: str(conf_dir() / path), replace=True)


_register_schema()
KEY_ALIASES = _build_key_aliases()


def to_dataclass(cfg: DictConfig) -> RunConfig:
    """Converts a composed configuration to dataclasses. Raises ValueError for unknown keys and invalid values."""
    for prefix, node in [("", cfg), *((f"{k}.", v) for k, v in cfg.items() if isinstance(v, DictConfig))]:
        if is_dataclass(schema := OmegaConf.get_type(node)):  # Hydra does not check the keys of +key=value
            for name in set(node) - {f.name for f in fields(schema)}:
                raise ValueError(_unknown_key_message(f"{prefix}{name}"))
    return OmegaConf.to_object(cfg)  # type: ignore[return-value]


def compose(*overrides: str) -> RunConfig:
    """Composes the configuration that `fgrun OVERRIDES` would run. Raises ValueError for invalid overrides."""
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return to_dataclass(hydra.compose("config", [quote_override(o) for o in overrides]))
    except HYDRA_ERRORS as e:
        raise ValueError(explain_error(e)) from e


def model_override(model: str) -> str:
    """Returns the override for a MODEL argument: `model=` a name in conf/model, else `model.path=` a path or hub id."""
    is_name = (conf_dir() / "model" / f"{model}.yaml").is_file()
    is_path = Path(model).expanduser().exists() or "/" in model or model.endswith((".gguf", ".safetensors"))
    return f"model.path={model}" if is_path and not is_name else f"model={model}"


def parse_arguments(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, text_options: Sequence[str] = ()
) -> argparse.Namespace:
    """Parses a command line (None: sys.argv) of `console.make_parser`; settings may stand anywhere, even after options.

    The namespace's `overrides` are the KEY=VALUE words, except for the values of `text_options`; its `model` is the
    model of MODEL, `--model MODEL` or `model=MODEL`. More than one model is an error.
    """
    words = sys.argv[1:] if arguments is None else arguments
    is_override = [
        option not in text_options and _is_override(word) for option, word in zip(["", *words], words, strict=False)
    ]
    args = parser.parse_intermixed_args([w for w, override in zip(words, is_override, strict=True) if not override])
    overrides = list(compress(words, is_override))
    models = [*([] if args.model is None else [args.model]), *args.overrides, *args.models]
    models += [o.removeprefix("model=") for o in overrides if o.startswith("model=")]
    if len(models) > 1:
        parser.error(f"expected one model, got {' and '.join(models)}; settings are KEY=VALUE")
    args.model = models[0] if models else None
    args.overrides = [o for o in overrides if not o.startswith("model=")]
    return args


def _is_override(word: str) -> bool:
    """Returns whether a word of a command line is a setting, as in key=value or ~key, and not an existing file."""
    return bool(re.match(r"[+~]{0,2}[\w./@]+=|~\w[\w/@.]*$", word)) and not Path(word).exists()


def reject_fgrun_keys(overrides: Iterable[str], reason: str, *more_keys: str, allowed: Sequence[str] = ()) -> None:
    """Raises ValueError for overrides of fgrun's prompts, task and output, and of `more_keys`, unless `allowed`."""
    rejected = {*FGRUN_KEYS, *more_keys}.difference(allowed)
    for override in overrides:
        if re.split(r"\W", expand_key(override).lstrip("+~"), maxsplit=1)[0] in rejected:
            raise ValueError(f"{override}: {reason}")


def expand_key(argument: str) -> str:
    """Adds the group to the key of an override: `page_size=32` becomes `kv_cache.page_size=32`."""
    key, equals, text = argument.partition("=")
    return f"{KEY_ALIASES.get(key, key)}{equals}{text}"


def _parses(argument: str) -> bool:
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True


def _quote_text(text: str) -> str:
    """Quotes a text for Hydra's grammar and disables interpolation in it."""
    return QuotedString(text.replace("${", r"\${"), Quote.double).with_quotes()


def quote_override(argument: str) -> str:
    """Converts an override as typed to Hydra's grammar: adds the key's group, and quotes string values.

    Values of TEXT_KEYS are texts unless they are null, quoted already or, for a prompt, a list or an object. A value
    that Hydra cannot parse is a text, too. A single value of a list, as in `stop=END`, becomes a list. `model` may be a
    name, a path or a hub id.
    """
    argument = expand_key(argument)
    if argument.startswith("model="):
        argument = model_override(argument.removeprefix("model="))
    key, equals, text = argument.partition("=")
    if not equals or text == "null":
        return argument
    if key == "sampling.stop_token_ids" and not text.startswith("["):
        return f"{key}=[{text}]"
    if key == "sampling.stop":
        return f"{key}={_to_hydra_list(text)}"
    is_literal = text.startswith(("[", "{", "'", '"') if key == "prompt" else ("'", '"')) or key not in TEXT_KEYS
    return argument if is_literal and _parses(argument) else f"{key}={_quote_text(text)}"


def _to_hydra_list(text: str) -> str:
    """Converts a text or a list of texts, with or without quotes, to a list in Hydra's grammar."""
    if text.startswith("[") and _parses(f"x={text}"):
        return text
    if text.startswith("[") and text.endswith("]") and not set(text) & {"'", '"'}:  # has special characters
        return f"[{','.join(_quote_text(part.strip()) for part in text[1:-1].split(','))}]"
    is_quoted = text.startswith(("'", '"')) and _parses(f"x=[{text}]")
    return f"[{text if is_quoted else _quote_text(text)}]"


def to_hydra_arguments(arguments: Sequence[str]) -> list[str]:
    """Converts a command line to Hydra's: flags are kept, overrides are quoted, and a bare text becomes the prompt.

    Arguments after `--` are bare texts; so are arguments that begin with a dash but are no flags. `--model MODEL` is
    `model=MODEL`. Raises ValueError for more than one bare text, which usually means that quotes are missing.
    """
    result = list[str]()
    end = arguments.index("--") if "--" in arguments else len(arguments)
    bare = [*arguments[end + 1 :]]
    for previous, argument in zip(["", *arguments], arguments[:end], strict=False):
        if previous == "--model" or argument.startswith("--model="):
            result.append(quote_override(f"model={argument.removeprefix('--model=')}"))
            continue
        if argument == "--model":
            continue
        is_flag = re.fullmatch(r"--?[A-Za-z][\w-]*(=.*)?", argument, re.DOTALL)
        if is_flag or previous in FLAGS_WITH_VALUE or re.fullmatch(r"~\w[\w/@.]*", argument):
            result.append(argument)
        elif re.match(r"[+~]{0,2}[\w/@.:-]+=", argument):
            result.append(quote_override(argument))
        else:
            bare.append(argument)
    if arguments[end - 1 : end] == ["--model"]:
        raise ValueError("--model: which model? --model MODEL")
    if len(bare) > 1:
        if models := [text for text in bare if _looks_like_model(text)]:
            raise ValueError(f"expected one prompt, got {len(bare)}; to choose the model, write model={models[0]}")
        raise ValueError(f'expected one prompt, got {len(bare)}: put the text in quotes, "{" ".join(bare)}"')
    return result + [quote_override(f"prompt={text}") for text in bare]


def _looks_like_model(text: str) -> bool:
    """Returns whether a bare text is a path, a hub id or a name in conf/model rather than a prompt."""
    is_name = bool(re.fullmatch(r"[\w.-]+", text)) and (conf_dir() / "model" / f"{text}.yaml").is_file()
    return is_name or bool(re.fullmatch(r"[\w.-]+/[\w.-]+", text)) or (len(text) < 256 and Path(text).exists())


def _unknown_key_message(key: str) -> str:
    """Returns the error message for an unknown key. It suggests the nearest key, of this group or of another."""
    schema = OmegaConf.structured(RunConfig)
    keys = [*schema, "+experiment", "+debug"]
    keys += [f"{group}.{name}" for group, node in schema.items() if isinstance(node, DictConfig) for name in node]
    group, _, name = key.rpartition(".")
    if name in (hints := ENGINE_HINTS | SAMPLING_HINTS):
        return unknown_name_message("key", key, [], hints | {key: hints[name]})
    same_name = [k for k in keys if k.endswith(f".{name}")]
    same_group = [k for k in keys if k.rpartition(".")[0] == group]
    for options in (same_name, same_group, keys):
        names = {k.rpartition(".")[2]: k for k in options}
        if options is same_group and not group:
            names |= KEY_ALIASES
        if close := difflib.get_close_matches(name, names, n=1):
            return unknown_name_message("key", key, [names[close[0]]])
    return unknown_name_message("key", key, same_group or keys)


def explain_error(error: Exception) -> str:
    """Returns a one-line message for an error of Hydra or OmegaConf, with the nearest existing name."""
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return unknown_name_message(group, name, list(error.options))
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
        return _unknown_key_message(cause.full_key)
    if isinstance(cause, OmegaConfBaseException):
        message = str(cause).splitlines()[0]
        return f"{cause.full_key}: {f'must be a list, [a,b], got {message}' if 'ListConfig' in message else message}"
    return " ".join(line.strip() for line in str(error).splitlines() if "https://" not in line)
