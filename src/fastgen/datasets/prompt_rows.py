"""Rows of a table to requests, and outputs to records: prompt columns and templates, overrides, kept columns, seeds."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol, runtime_checkable

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastgen.config import DatasetConfig, unknown_name_message
from fastgen.core.request import Output
from fastgen.datasets.input_rows import InputFile, InputRow, Record, RowError, import_parquet
from fastgen.engine import Engine
from fastgen.sampling_params import SamplingParams
from fastgen.text.chat_template import TEMPLATE_ERRORS, ChatPrompt
from fastgen.text.template_limits import limit_template
from fastgen.text.tokenizer import Prompt

PROMPT_COLUMNS = ("messages", "prompt_token_ids", "prompt")
RESERVED_COLUMNS = (
    "row", "sample", "text", "token_ids", "logprobs", "top_logprobs", "finish_reason", "seed", "num_prompt_tokens",
    "model", "params", "fastgen",
)  # fmt: skip
NUM_SCHEMA_ROWS = 1000  # rows of a JSONL file that decide the types of kept columns in Parquet


def row_seed(seed: int, row: int) -> int:
    """Returns the seed of a row's request: a hash of the run's seed and the row's index."""
    digest = hashlib.blake2b(f"{seed},{row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@dataclass(slots=True)
class RowRequest:
    """The requests of a row, usually one, and what the records of its outputs need besides them."""

    row: InputRow
    prompts: Sequence[tuple[Prompt, SamplingParams]]
    context: Any = None

    @property
    def num_completions(self) -> int:
        """The number of completions of all requests."""
        return sum(sampling.n for _, sampling in self.prompts)


@runtime_checkable
class RowProcessor(Protocol):
    """Converts rows of the input to requests, and their outputs to records."""

    def settings(self) -> Record:
        """Returns what decides the output besides the input and the model, for the manifest."""
        ...

    def prepare(self, row: InputRow) -> RowRequest:
        """Returns the requests of a row. Raises RowError if it has none."""
        ...

    def to_records(self, request: RowRequest, outputs: Sequence[Output]) -> list[Record]:
        """Returns the output's records of a row. Raises RowError if its requests were rejected or have failed."""
        ...

    def error_entry(self, row: InputRow, error: RowError) -> Record:
        """Returns what is written for a row that cannot run, beside its index: an error, or records."""
        ...


class PromptRows:
    """Makes a prompt of each row, and a record of each completion."""

    def __init__(
        self,
        engine: Engine,
        source: InputFile,
        sampling: SamplingParams,
        config: DatasetConfig,
        *,
        seed: int,
        chat: bool,
        template_options: Mapping[str, Any],
        constants: Record,
    ) -> None:
        """`template_options` are those of `ChatPrompt`. `constants` are columns with the same value in each record.

        Raises ValueError for settings that fit no row.
        """
        self.engine, self.source, self.sampling, self.config, self.seed = engine, source, sampling, config, seed
        self.constants = constants
        self.template_options: Any = ChatPrompt([]).template_options | {"tools": None} | dict(template_options)
        tokenizer = engine.tokenizer
        has_template = tokenizer is not None and (tokenizer.chat_template or template_options.get("chat_template"))
        self.is_chat = chat and bool(has_template)
        known = {*SamplingParams.__dataclass_fields__} - {"logits_processors"}
        if wrong := [name for name in config.overrides if name not in known]:
            raise ValueError(unknown_name_message("sampling setting in dataset.overrides", wrong[0], sorted(known)))
        if sampling.prompt_logprobs is not None or "prompt_logprobs" in config.overrides:
            raise ValueError("prompt_logprobs are not written by a dataset run: use engine.generate or fastgen.score")
        if sampling.seed is not None:
            raise ValueError(
                "sampling.seed would be the same for all rows: give seed=, from which each row has its own"
            )
        if sampling.logits_processors:
            raise ValueError("logits_processors cannot be written to the manifest, which makes a run resumable")
        if taken := [name for name in config.keep if name in RESERVED_COLUMNS]:
            raise ValueError(f"dataset.keep: the output has a column {taken[0]!r} of its own; rename it in the input")
        names = (*config.keep, *config.overrides, *([config.prompt] if config.prompt else []))
        if source.columns is not None:
            if missing := [name for name in names if name not in source.columns]:
                raise ValueError(f"{source.path}: has no column {missing[0]!r}, only {', '.join(source.columns)}")
            if not (config.prompt or config.template or set(PROMPT_COLUMNS) & {*source.columns}):
                columns = ", ".join(source.columns)
                raise ValueError(f"{source.path}: has no column 'prompt': set dataset.prompt to one of {columns}")
        self.render = None
        if config.template is not None:
            environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
            environment.globals["raise_exception"] = _raise_template_error
            try:
                self.render = environment.from_string(limit_template(config.template)).render
            except TEMPLATE_ERRORS as e:
                raise ValueError(f"dataset.template: {e or type(e).__name__}") from e
        self.has_logprobs = sampling.logprobs is not None or "logprobs" in config.overrides
        self.has_top_logprobs = bool(sampling.logprobs) or "logprobs" in config.overrides
        self.schema, self._column_types = None, dict[str, Any]()
        if config.output_format == "parquet":
            self.schema = self._make_schema()

    def settings(self) -> Record:
        """Returns what decides the output besides the input and the model, for the manifest."""
        config, sampling = self.config, self.sampling
        names = ("prompt", "template", "system", "keep", "overrides", "output_format", "rows_per_file", "truncate")
        fields = {
            name: getattr(sampling, name) for name in sampling.__dataclass_fields__ if name != "logits_processors"
        }
        fields["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
        options = {name: value for name, value in self.template_options.items() if value}
        return {"seed": self.seed, "chat": self.is_chat, "template_options": options, "sampling": fields} | {
            name: getattr(config, name) for name in names
        }

    # --- requests -----------------------------------------------------------------------------------------------------

    def prepare(self, row: InputRow) -> RowRequest:
        """Returns the request of a row. Raises RowError for a prompt or a setting that cannot be used."""
        record = row.load()
        column, prompt = self._prompt(record)
        sampling = self._sampling(row, record)
        kept = {name: self._kept_value(name, record.get(name)) for name in self.config.keep}
        return RowRequest(row, [(prompt, sampling)], (column, kept))

    def _sampling(self, row: InputRow, record: Record) -> SamplingParams:
        changes: Record = {"seed": row_seed(self.seed, row.index)}
        for name in self.config.overrides:
            if (value := record.get(name)) is not None and not (value == "" and self.source.columns is not None):
                if isinstance(value, str) and self.source.format in ("csv", "tsv"):
                    value = _parse_cell(value)
                changes[name] = value
                try:  # one after the other, so that the error names the column
                    replace(self.sampling, **{name: value})
                except (ValueError, TypeError) as e:
                    raise RowError(str(e), name) from e
        try:
            sampling = replace(self.sampling, **changes)
        except (ValueError, TypeError) as e:
            raise RowError(str(e), _setting_of(str(e))) from e
        if self.config.truncate == "left":
            longest = min(self.engine.model_config.context_length, self.engine.cache_capacity + 1)
            if (limit := longest - (sampling.max_tokens or 1)) > 0:
                limit = min(limit, sampling.truncate_prompt_tokens or limit)
                sampling = replace(sampling, truncate_prompt_tokens=limit)
        return sampling

    def _prompt(self, record: Record) -> tuple[str, Prompt]:
        """Returns the column of the prompt, or \"template\", and the prompt. Raises RowError."""
        config = self.config
        if self.render is not None:
            try:
                value: Any = self.render(record)
            except TEMPLATE_ERRORS as e:
                raise RowError(f"the template fails: {e or type(e).__name__}", "template") from e
            column = "template"
        else:
            column = config.prompt or next((c for c in PROMPT_COLUMNS if record.get(c) is not None), "prompt")
            if (value := record.get(column)) is None:
                raise RowError("the prompt is missing", column)
            if isinstance(value, str) and column in PROMPT_COLUMNS[:2]:
                value = _parse_cell(value)  # messages as JSON, in CSV
        if isinstance(value, str):
            if not value.strip():
                raise RowError("the prompt is empty", column)
            try:
                value.encode()
            except UnicodeEncodeError as e:
                raise RowError("half of a surrogate pair is in the text", column) from e
            if self.is_chat:
                value = [{"role": "user", "content": value}]
            elif config.system is not None:
                raise RowError("dataset.system needs a chat, and the prompt is a text: set chat=true", column)
        is_list = isinstance(value, list) and bool(value)
        if is_list and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value):
            system = [] if config.system is None else [{"role": "system", "content": config.system}]
            messages: Any = [*system, *value]
            return column, ChatPrompt(messages, **self.template_options)
        is_ids = is_list and all(isinstance(t, int) and not isinstance(t, bool) for t in value)
        if not (is_ids or isinstance(value, str)):
            raise RowError(f"the prompt must be a text, token ids or chat messages, got {value!r:.60}", column)
        return column, value

    def error_entry(self, row: InputRow, error: RowError) -> Record:
        """Returns the line, column and reason of a row that cannot run."""
        return {"error": {"row": row.index, "line": row.line, "column": error.column, "reason": str(error)}}

    # --- records ------------------------------------------------------------------------------------------------------

    def to_records(self, request: RowRequest, outputs: Sequence[Output]) -> list[Record]:
        """Returns a record for each completion. Raises RowError for a request that was rejected or has failed."""
        [output], [(_, sampling)], (column, kept) = outputs, request.prompts, request.context
        if output.error is not None:
            raise RowError(output.error, _setting_of(output.error) or column)
        if failed := [c for c in output.completions if c.finish_reason == "error"]:
            raise RowError(failed[0].error, column if sampling.grammar is None else "grammar")
        records = list[Record]()
        for sample, completion in enumerate(output.completions):
            record: Record = {"row": request.row.index, "sample": sample} | kept
            record |= {"text": completion.text, "token_ids": completion.token_ids}
            if self.has_logprobs:
                record["logprobs"] = completion.logprobs
            if self.has_top_logprobs:
                top = completion.top_logprobs
                record["top_logprobs"] = top and [
                    [{"token_id": token, "logprob": logprob} for token, logprob in x.items()] for x in top
                ]
            record |= {"finish_reason": completion.finish_reason, "seed": sampling.seed}
            records.append(record | {"num_prompt_tokens": len(output.prompt_token_ids)} | self.constants)
        return records

    def _kept_value(self, name: str, value: Any) -> Any:
        """Returns a column's value as JSON can hold it. Raises RowError if it cannot, or for another type."""
        if isinstance(value, float) and value != value:
            return None
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_to_text)
            text.encode()
        except (TypeError, ValueError) as e:
            raise RowError(f"the value cannot be copied to the output: {e}", name) from e
        value = json.loads(text)
        if self.schema is not None and (kind := self._column_types.get(name)) and value is not None:
            if kind == "json":
                return value if isinstance(value, str) else text
            if not _is_of_kind(value, kind):
                expected = f"the first {NUM_SCHEMA_ROWS} rows have {kind} here"
                raise RowError(f"{expected}, which Parquet needs for all rows, got {value!r:.60}", name)
        return value

    def _make_schema(self) -> Any:
        """Returns the pyarrow schema of the records; a kept column has its type in the input."""
        parquet = import_parquet()
        import pyarrow as pa

        kept = dict[str, Any]()
        arrow = {
            "bool": pa.bool_(),
            "int": pa.int64(),
            "number": pa.float64(),
            "text": pa.string(),
            "json": pa.string(),
        }
        if self.source.format == "parquet":
            with parquet.ParquetFile(self.source.path) as file:
                types = {field.name: field.type for field in file.schema_arrow}
            for name in self.config.keep:
                kept[name] = types[name] if _is_plain(types[name]) else pa.string()
                if not _is_plain(types[name]):
                    self._column_types[name] = "json"
        else:
            for name, kind in self._infer_kinds().items():
                kept[name], self._column_types[name] = arrow[kind], kind
        pair = pa.struct({"token_id": pa.int32(), "logprob": pa.float64()})
        columns = {"row": pa.int64(), "sample": pa.int32(), **kept, "text": pa.string()}
        columns["token_ids"] = pa.list_(pa.int32())
        columns |= {"logprobs": pa.list_(pa.float64())} if self.has_logprobs else {}
        columns |= {"top_logprobs": pa.list_(pa.list_(pair))} if self.has_top_logprobs else {}
        columns |= {"finish_reason": pa.string(), "seed": pa.int64(), "num_prompt_tokens": pa.int32()}
        return pa.schema(columns | dict.fromkeys(self.constants, pa.string()))

    def _infer_kinds(self) -> dict[str, str]:
        """Returns the kind of each kept column in the first rows: bool, int, number or text, or else json."""
        kinds = {name: set[str]() for name in self.config.keep}
        for row in islice(self.source.rows(), NUM_SCHEMA_ROWS):
            try:
                record = row.load()
            except RowError:
                continue
            for name, seen in kinds.items():
                if (value := record.get(name)) is not None:
                    seen.add(next(k for k in ("bool", "int", "number", "text", "json") if _is_of_kind(value, k)))
        numbers = ({"int", "number"}, {"number"})
        return {
            name: "number" if seen in numbers else next(iter(seen)) if len(seen) == 1 else "json"
            for name, seen in kinds.items()
        }


def _setting_of(message: str) -> str | None:
    """Returns the sampling setting that an error message is about, by its first word; None for other messages."""
    name = message.removeprefix("SamplingParams.").split(" ")[0].split("[")[0].split("=")[0].rstrip(":")
    name = "grammar" if name in ("json", "regex", "lark") else name
    return name if name in SamplingParams.__dataclass_fields__ else None


def _raise_template_error(message: str) -> None:
    raise ValueError(message)


def _parse_cell(text: str) -> Any:
    """Returns the JSON value in a cell of a CSV file; the text itself if it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _to_text(value: Any) -> str:
    """Converts a value that JSON does not have, such as a date, to text. Raises TypeError for binary data."""
    if isinstance(value, bytes | bytearray):
        raise TypeError("it is binary data")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _is_of_kind(value: Any, kind: str) -> bool:
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return kind == "json" or isinstance(value, str)


def _is_plain(arrow_type: Any) -> bool:
    """Returns whether the values of an Arrow type survive a conversion to JSON and back."""
    import pyarrow as pa

    t = pa.types
    if t.is_list(arrow_type) or t.is_large_list(arrow_type):
        return _is_plain(arrow_type.value_type)
    if t.is_struct(arrow_type):
        return all(_is_plain(field.type) for field in arrow_type)
    tests = (t.is_boolean, t.is_integer, t.is_float32, t.is_float64, t.is_string, t.is_large_string)
    return any(test(arrow_type) for test in tests)
