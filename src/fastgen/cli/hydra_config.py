"""The command line's configuration: its schema, where its files are, and what is said when it is wrong.

The schema is the dataclasses of fastgen.config themselves, so a key, a type or a range is written down once.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from fastgen.cli.prompt_files import FORMATS
from fastgen.config import EngineConfig, GrpoConfig, LoadConfig, SamplingParams, unknown_name_message

TASKS = ("generate", "stream", "profile", "grpo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is done with the prompts, and a file of them. `steps` and `trace` are profile's; grpo draws its own."""

    name: str = "generate"
    prompts: str | None = None
    format: str | None = None  # of the file (see `fastgen.cli.prompt_files`); None: by its suffix
    steps: int = 8  # recorded, after two that are not
    trace: str | None = None  # .json or .json.gz; None: a file in the working directory

    def __post_init__(self) -> None:
        if self.name not in TASKS:
            raise ValueError(unknown_name_message("task.name", self.name, list(TASKS)))
        if self.format is not None and self.format not in FORMATS:
            raise ValueError(unknown_name_message("task.format", self.format, list(FORMATS)))
        if self.steps < 1:
            raise ValueError(f"task.steps must be at least 1, got {self.steps}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig(EngineConfig):
    """One run: an engine's settings, its model, and what to do with it."""

    model: LoadConfig = field(default_factory=LoadConfig)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    task: Task = field(default_factory=Task)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    prompt: Any = None
    chat: bool = True
    out: str | None = None


def _build_key_aliases() -> dict[str, str]:
    """Keys by other names: those of the library's keywords, which have no group, and the size of a parallel group."""
    config = RunConfig()
    groups = [f.name for f in fields(EngineConfig) if is_dataclass(getattr(config, f.name))] + ["model", "sampling"]
    short = {f.name: f"{group}.{f.name}" for group in groups for f in fields(getattr(config, group))}
    own = {f.name for f in fields(RunConfig)}
    return {"parallel.size": "parallel.tensor_parallel"} | {k: v for k, v in short.items() if k not in own}


def conf_dir() -> Path:
    """Where the configuration files are: in the installed package, or at the root of a source checkout."""
    package = Path(__file__).resolve().parents[1]
    return next(d for d in (package / "conf", package.parents[1] / "conf") if (d / "config.yaml").is_file())


def _register_schema() -> None:
    schema = OmegaConf.structured(RunConfig)
    for node in (schema, *(v for v in schema.values() if isinstance(v, DictConfig))):
        OmegaConf.set_readonly(node, None)  # frozen dataclasses make read-only nodes, and these are to be overridden
    for free in (schema.sampling.logit_bias, schema.model.adapters):  # whose keys are tokens, and names of one's own
        OmegaConf.set_struct(free, False)
    ConfigStore.instance().store("schema", schema)
    OmegaConf.register_new_resolver("fastgen.conf", lambda path: str(conf_dir() / path), replace=True)


_register_schema()
KEY_ALIASES = _build_key_aliases()


def to_dataclass(cfg: DictConfig) -> RunConfig:
    """The dataclasses of a composed configuration, checked: ValueError for an unknown key or a bad value."""
    for prefix, node in [("", cfg), *((f"{k}.", v) for k, v in cfg.items() if isinstance(v, DictConfig))]:
        if is_dataclass(kind := OmegaConf.get_type(node)):  # +key=value puts a key past Hydra's own check
            for name in set(node) - {f.name for f in fields(kind)}:
                raise ValueError(_unknown_key_message(f"{prefix}{name}"))
    return OmegaConf.to_object(cfg)  # type: ignore[return-value]


def compose(*overrides: str) -> RunConfig:
    """What `fgrun OVERRIDES` runs, for notebooks and scripts. ValueError says what is wrong with it."""
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return to_dataclass(hydra.compose("config", [quote_override(o) for o in overrides]))
    except (HydraException, OmegaConfBaseException) as e:
        raise ValueError(explain_error(e)) from e


def model_override(model: str) -> str:
    """The override for a command's MODEL: a name of conf/model, or a folder, file or hub id."""
    named = (conf_dir() / "model" / f"{model}.yaml").is_file()
    path = Path(model).expanduser().exists() or "/" in model or model.endswith((".gguf", ".safetensors"))
    return f"model.path={model}" if path and not named else f"model={model}"


def expand_key(argument: str) -> str:
    """`kv_cache.page_size=32` for `page_size=32`, a keyword of the library's, and so on."""
    key, equals, text = argument.partition("=")
    return f"{KEY_ALIASES.get(key, key)}{equals}{text}"


TEXT_KEYS = ("prompt", "model.path", "sampling.grammar")  # texts whatever they contain: a comma makes no sweep of them


def _parses(argument: str) -> bool:
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True


def _quote_text(text: str) -> str:
    """Returns a text in Hydra's quotes, without interpolation."""
    return QuotedString(text.replace("${", r"\${"), Quote.double).with_quotes()


def quote_override(argument: str) -> str:
    """Returns an override as Hydra's grammar wants it: the key with its group, and a text as a value in quotes.

    `prompt`, `model.path` and `sampling.grammar` are texts unless they are null, quoted already or, for a prompt, a
    list; so is every value that Hydra could not parse. One value for a list (`stop=END`) becomes a list. `model` may be
    a folder, a file or a hub id.
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
    is_form = text.startswith(("[", "{", "'", '"') if key == "prompt" else ("'", '"')) or key not in TEXT_KEYS
    return argument if is_form and _parses(argument) else f"{key}={_quote_text(text)}"


def _to_hydra_list(text: str) -> str:
    """Returns one text, quoted or not, or a list of them, as Hydra's list; what stands in it need not be quoted."""
    if text.startswith("["):
        if _parses(f"x={text}"):
            return text
        if text.endswith("]") and not set(text) & {"'", '"'}:  # characters that Hydra has other uses for
            return f"[{','.join(_quote_text(part.strip()) for part in text[1:-1].split(','))}]"
    is_quoted = text.startswith(("'", '"')) and _parses(f"x=[{text}]")
    return f"[{text if is_quoted else _quote_text(text)}]"


FLAGS_WITH_VALUE = {
    "--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd",
    "--info", "-i", "--experimental-rerun",
}  # fmt: skip


def to_hydra_arguments(arguments: Sequence[str]) -> list[str]:
    """Returns a command line as Hydra reads it: flags, overrides with quoted values, and a bare text as the prompt.

    What follows `--` is bare, and so is what begins with a dash but is no flag. ValueError for two bare texts, which
    are mostly one that lacks its quotes.
    """
    result, bare = list[str](), list[str]()
    end = arguments.index("--") if "--" in arguments else len(arguments)
    bare += arguments[end + 1 :]
    for before, argument in zip(["", *arguments], arguments[:end], strict=False):
        is_flag = re.fullmatch(r"--?[A-Za-z][\w-]*(=.*)?", argument, re.DOTALL)
        if is_flag or before in FLAGS_WITH_VALUE or re.fullmatch(r"~\w[\w/@.]*", argument):
            result.append(argument)
        elif re.match(r"[+~]{0,2}[\w/@.:-]+=", argument):
            result.append(quote_override(argument))
        else:
            bare.append(argument)
    if len(bare) > 1:
        raise ValueError(f'one prompt, not {len(bare)}: put the text in quotes, "{" ".join(bare)}"')
    return result + [quote_override(f"prompt={text}") for text in bare]


def _unknown_key_message(key: str) -> str:
    """The message for a key that is not there; one that another group has is found too."""
    schema = OmegaConf.structured(RunConfig)
    groups = {group: list(node) for group, node in schema.items() if isinstance(node, DictConfig)}
    keys = [*schema, "+experiment", "+debug", *(f"{group}.{name}" for group in groups for name in groups[group])]
    group, _, name = key.rpartition(".")
    same, here = [k for k in keys if k.endswith(f".{name}")], [k for k in keys if k.rpartition(".")[0] == group]
    for known in (same, here, keys):
        names = {k.rpartition(".")[2]: k for k in known} | (KEY_ALIASES if known is here and not group else {})
        if close := difflib.get_close_matches(name, names, n=1):
            return unknown_name_message("key", key, [names[close[0]]])
    return unknown_name_message("key", key, here or keys)


def explain_error(error: Exception) -> str:
    """What Hydra or OmegaConf found wrong, in a line, with the nearest thing that exists."""
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return unknown_name_message(group, name, list(error.options))
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
        return _unknown_key_message(cause.full_key)
    if isinstance(cause, OmegaConfBaseException):
        said = str(cause).splitlines()[0]
        return f"{cause.full_key}: {f'must be a list, [a,b], got {said}' if 'ListConfig' in said else said}"
    return " ".join(line.strip() for line in str(error).splitlines() if "https://" not in line)
