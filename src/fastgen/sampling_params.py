"""SamplingParams: how one request is sampled."""

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from types import NoneType
from typing import Any, TypeVar

from fastgen.config import (
    MAX_SEED,
    MIN_SEED,
    MIN_TEMPERATURE,
    check_number,
    check_settings,
    described,
    setting,
    setting_rules,
    unknown_name_message,
)

T = TypeVar("T")


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
        for name, types, _ in setting_rules(SamplingParams):
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
        check_number(me, "min_tokens", self.min_tokens, 0, self.max_tokens)
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
                check_number(me, name, token, 0)
        for function in self.logits_processors:
            if not callable(function):
                expected = "functions (token ids so far, logits) -> logits"
                raise ValueError(f"{me}.logits_processors must hold {expected}, got {function!r:.80}")
        for token, bias in self.logit_bias.items():
            check_number(me, "logit_bias token", token, 0)
            check_number(me, f"logit_bias[{token}]", bias, -100, 100, integer=False)

    @property
    def has_token_constraints(self) -> bool:
        """Whether a grammar or other constraints restrict the next token."""
        has_filter = self.bad_words or self.allowed_token_ids is not None or self.logits_processors
        return self.grammar is not None or bool(has_filter)
