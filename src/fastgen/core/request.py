"""A request while it runs, and what the user gets from it."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Literal, TypeVar

import numpy as np

from fastgen.config import SamplingParams, check_choice
from fastgen.core.detokenizer import Detokenizer
from fastgen.core.model_config import ModelConfig
from fastgen.core.tokenizer import Prompt, to_prompt_list
from fastgen.core.types import Tokenizer
from fastgen.structured_output.backend import GrammarMatcher

FinishReason = Literal["stop", "length", "abort", "error"]  # error: see `Completion.error` and `Output.error`
R = TypeVar("R")
EMPTY_TOKEN_IDS = np.zeros(0, np.int64)
NON_FINITE_LOGITS = "the logits are NaN or infinite"
TopLogprobs = dict[int, float]  # token -> logprob, most likely first


@dataclass(slots=True)
class Completion:
    """One sample of a request. The tokens include the one that stopped it; the text leaves out stop strings."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] | None = None  # of each token
    top_logprobs: list[TopLogprobs] | None = None
    finish_reason: FinishReason | None = None  # None: still running
    weight_versions: list[int] = field(
        default_factory=list
    )  # of the weights that drew each token; see `Engine.version`
    error: str = ""  # what went wrong, where the finish reason is "error"


@dataclass(slots=True)
class Output:
    """A request's prompt and its completions. Prompt logprobs are raw; the first token has none."""

    request_id: int
    prompt_token_ids: list[int]
    completions: list[Completion]
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[TopLogprobs | None] | None = None
    num_cached_tokens: int = 0  # of the prompt, found in the cache; of all completions together
    error: str | None = None  # why it could not run (`on_error="skip"`): its completions are empty then

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        return all(c.finish_reason for c in self.completions)


@dataclass(slots=True)
class Event:
    """What a step added to a completion. The request's last event carries its output."""

    request_id: int
    index: int  # of the completion
    token_ids: list[int]
    text: str  # new text; all of them joined are the completion's
    logprobs: list[float] | None = None
    top_logprobs: list[TopLogprobs] | None = None
    finish_reason: FinishReason | None = None
    output: Output | None = None
    error: str = ""  # as the completion's
    weight_version: int | None = None  # of the weights that drew the token, as in `Completion.versions`


def raise_on_non_finite_logits(outputs: Sequence[Output]) -> None:
    """Raises RuntimeError if a completion has ended with an error: training cannot go on from there."""
    if count := sum(c.error == NON_FINITE_LOGITS for o in outputs for c in o.completions):
        raise RuntimeError(f"the logits of {count} completions are NaN or infinite: the parameters have diverged")


def sample_seed(seed: int, index: int) -> int:
    """The seed of a request's index-th sample: the request's own for the first, a hash of both for the others."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed},{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def pair_prompts(
    prompts: Prompt | Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None
) -> list[tuple[Prompt, SamplingParams]]:
    """Pairs one or many prompts with their settings, which are one for all, or one for each. ValueError for others."""
    many = to_prompt_list(prompts)
    each: list[SamplingParams | None]
    if sampling is None or isinstance(sampling, SamplingParams):
        each = [sampling] * len(many)
    elif (
        isinstance(sampling, str | bytes | Mapping)
        or getattr(sampling, "ndim", 1) == 0
        or not isinstance(sampling, Iterable)
    ):
        raise ValueError(f"sampling is one SamplingParams or a list of them, got {type(sampling).__name__}")
    else:
        each = list(sampling)
    if (wrong := next((s for s in each if not isinstance(s, SamplingParams | None)), None)) is not None:
        raise ValueError(f"sampling is one SamplingParams or a list of them, got a list with {type(wrong).__name__}")
    if len(each) != len(many):
        raise ValueError(f"{len(each)} sampling settings for {len(many)} prompts")
    return [(prompt, params or SamplingParams()) for prompt, params in zip(many, each, strict=True)]


def map_prompts(
    build: Callable[[Prompt, SamplingParams], R],
    prompts: Prompt | Sequence[Prompt],
    sampling: SamplingParams | Sequence[SamplingParams] | None,
    on_error: str,
) -> list[R | Output]:
    """Returns what `make` makes of each prompt; where that is a ValueError and `on_error` is "skip", an Output with it.

    With "raise", the ValueError says which of several prompts it is.
    """
    check_choice("on_error", on_error, ["raise", "skip"])
    found, many = list[R | Output](), pair_prompts(prompts, sampling)
    for prompt, params in many:
        try:
            found.append(build(prompt, params))
        except ValueError as e:
            if on_error == "skip":
                found.append(rejected_output(str(e), params.n))
            elif len(many) > 1:
                raise ValueError(f"prompt {len(found)}: {e}") from e
            else:
                raise
    return found


def rejected_output(error: str, num_completions: int) -> Output:
    """Returns the output of a request that cannot run, in the place of its n completions."""
    return Output(-1, [], [Completion(finish_reason="error", error=error) for _ in range(num_completions)], error=error)


def rejection_events(output: Output) -> list[Event]:
    """Returns the events of a request that cannot run."""
    events = [Event(output.request_id, i, [], "", finish_reason="error") for i in range(len(output.completions))]
    events[-1].output = output
    return events


def max_length(
    prompt: Sequence[int], params: SamplingParams, spec: ModelConfig, cache_capacity: int, has_tokenizer: bool
) -> int:
    """The most tokens a sequence may reach, prompt included. ValueError, with the numbers, for what cannot run.

    `capacity` is the cache's, in tokens; `has_text` says whether there is a tokenizer.
    """
    n = len(prompt)
    used = {"prompt": prompt, "stop_token_ids": params.stop_token_ids, "logit_bias": params.logit_bias}
    for name, tokens in used.items():
        if tokens and not 0 <= min(tokens) <= max(tokens) < spec.vocab_size:
            wrong = next(t for t in tokens if not 0 <= t < spec.vocab_size)
            raise ValueError(f"{name}: token {wrong} is outside the vocabulary of {spec.vocab_size}")
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(params, name) or 0) > spec.vocab_size:
            raise ValueError(f"{name}={getattr(params, name)} is more than the vocabulary of {spec.vocab_size}")
    if params.stop and not has_tokenizer:
        raise ValueError("stop strings need a tokenizer, and this model came without one; use stop_token_ids")
    most = min(spec.context_length, cache_capacity + 1)  # the last token drawn is never written to the cache
    wanted = n + (params.max_tokens or 1)
    if wanted > most:
        place = (
            f"model's context of {spec.context_length}" if most == spec.context_length else f"cache of {cache_capacity}"
        )
        advice = f"max_tokens can be at most {most - n}" if n < most else "the prompt alone is too long"
        asked = f"{n} prompt tokens and max_tokens={params.max_tokens}"
        raise ValueError(f"{asked} do not fit the {place} tokens: {advice}")
    return most if params.max_tokens is None else wanted


class SequenceState:
    """One completion in flight: its tokens, its text, and when it ends. `limit` counts prompt and output.

    Where nobody reads along (`live` false) its text is made at its end: a decode for each token of hundreds of
    requests would take the host longer than the step takes the GPU.
    """

    def __init__(
        self,
        output: Output,
        index: int,
        params: SamplingParams,
        seed: int,
        max_length: int,
        eos_token_ids: frozenset[int],
        tokenizer: Tokenizer | None,
        *,
        stream_text: bool = True,
        matcher: GrammarMatcher | None = None,
    ) -> None:
        self.matcher = matcher  # the grammar's, where there is one
        self.adapter_idx = 0  # among the engine's; 0: none
        self.output, self.index, self.params, self.max_length = output, index, params, max_length
        self.num_prompt_tokens = len(output.prompt_token_ids)
        self.token_ids = list(output.prompt_token_ids)
        self.seed = sample_seed(seed, index)
        self.end_token_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_token_ids)
        p = params
        self.uses_top_k_top_p = p.temperature > 0 and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0)
        penalised = p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
        # Drawn by the general sampler, not by the one inside the step.
        self.needs_general_sampler = (
            self.uses_top_k_top_p or penalised or bool(p.logit_bias) or p.min_tokens > 0 or (p.logprobs or 0) > 0
        )
        self.needs_general_sampler |= matcher is not None
        self.depends_on_last_token = (
            penalised or p.min_tokens > 0 or matcher is not None
        )  # what is drawn depends on what was
        self.needs_prompt_logprobs = p.prompt_logprobs is not None and index == 0
        self.has_nan_prompt_logprobs = False  # whether a logprob of its prompt is NaN
        self.detokenizer: Detokenizer | None = None
        if tokenizer is not None:
            self.detokenizer = Detokenizer(
                tokenizer, self.token_ids, params.stop, min_tokens=params.min_tokens, stream_text=stream_text
            )
        self.output_token_counts: Counter[int] = Counter()  # of generated tokens
        self.has_penalties = penalised
        bias = p.logit_bias
        self._logit_bias = np.fromiter(bias, np.int64, len(bias)), np.fromiter(bias.values(), np.float32, len(bias))
        self._banned_token_ids = (
            np.fromiter(self.end_token_ids, np.int64, len(self.end_token_ids)) if p.min_tokens else EMPTY_TOKEN_IDS
        )
        self.has_started = False  # whether it ever ran
        c = self.completion = output.completions[index]
        if params.logprobs is not None:
            c.logprobs = []
            c.top_logprobs = [] if params.logprobs else None

    def record_admission(self, num_cached_tokens: int) -> None:
        """It begins to run, with so many of its tokens found in the cache; after a preemption it does so again."""
        if not self.has_started:
            self.output.num_cached_tokens += min(num_cached_tokens, self.num_prompt_tokens)
        self.has_started = True

    def fork(self, request_id: int, seed: int) -> "SequenceState":
        """Another one with the same past and a seed of its own, as the one completion of a new request."""
        c, o = self.completion, self.output
        other = copy(self)
        other.index, other.seed, other.token_ids, other.output_token_counts = (
            0,
            seed,
            [*self.token_ids],
            Counter(self.output_token_counts),
        )
        other.matcher = None if self.matcher is None else self.matcher.copy()
        other.detokenizer, other.has_started = None if self.detokenizer is None else self.detokenizer.copy(), False
        other.completion = replace(
            c,
            token_ids=[*c.token_ids],
            weight_versions=[*c.weight_versions],
            logprobs=None if c.logprobs is None else [*c.logprobs],
            top_logprobs=None if c.top_logprobs is None else [*c.top_logprobs],
        )
        other.output = Output(request_id, o.prompt_token_ids, [other.completion])
        if o.prompt_logprobs is not None:
            other.output.prompt_logprobs = [*o.prompt_logprobs]
            other.output.prompt_top_logprobs = o.prompt_top_logprobs and [*o.prompt_top_logprobs]
            other.needs_prompt_logprobs = len(o.prompt_logprobs) < self.num_prompt_tokens
        return other

    def resume(self, previous: Completion) -> None:
        """Take up where an earlier completion of the same request was left."""
        c = self.completion
        c.token_ids, c.logprobs, c.top_logprobs = previous.token_ids, previous.logprobs, previous.top_logprobs
        c.weight_versions = previous.weight_versions
        self.token_ids += c.token_ids
        self.output_token_counts.update(c.token_ids)
        if self.matcher is not None:
            for token in c.token_ids:
                self.matcher.accept_token(token)
        if self.detokenizer is not None:
            for token in c.token_ids:
                self.detokenizer.push(token, allow_stop=False)

    def logit_edits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
        """Returns the tokens whose logits this sample changes, each once; of each its bias, how many times it was
        generated, and whether prompt or output has it. None where there are none.
        """
        biased, biases = self._logit_bias
        banned = self._banned_token_ids if len(self.completion.token_ids) < self.params.min_tokens else EMPTY_TOKEN_IDS
        if not (self.has_penalties or len(biased) or len(banned)):
            return None
        seen = counted = EMPTY_TOKEN_IDS
        if self.has_penalties:
            counted = np.fromiter(self.output_token_counts, np.int64, len(self.output_token_counts))
            seen = np.array(self.token_ids, np.int64) if self.params.repetition_penalty != 1 else counted
        token = np.unique(np.concatenate((seen, biased, banned)))
        bias, count, is_seen = (np.zeros(len(token), kind) for kind in (np.float32, np.float32, np.bool_))
        is_seen[np.searchsorted(token, seen)] = True
        count[np.searchsorted(token, counted)] = np.fromiter(
            self.output_token_counts.values(), np.float32, len(counted)
        )
        bias[np.searchsorted(token, biased)] = biases
        bias[np.searchsorted(token, banned)] = float("-inf")
        return token, bias, count, is_seen

    def append_token(
        self, token_id: int, logprob: float, top_logprobs: Sequence[tuple[int, float]], weight_version: int = 0
    ) -> Event:
        """Takes a token that parameters of this version drew; returns what it adds.

        A logprob that is not finite ends the completion without the token, which means nothing: there were logits that
        are NaN or inf.
        """
        c, p = self.completion, self.params
        if self.matcher is not None and self.matcher.failed:
            return self.finish("error", error=self.matcher.failure_reason)
        if self.has_nan_prompt_logprobs or not isfinite(logprob):
            return self.finish("error", error=NON_FINITE_LOGITS)
        self.token_ids.append(token_id)
        c.token_ids.append(token_id)
        c.weight_versions.append(weight_version)
        self.output_token_counts[token_id] += 1
        event = Event(self.output.request_id, self.index, [token_id], "", weight_version=weight_version)
        if c.logprobs is not None:
            c.logprobs.append(logprob)
            event.logprobs = [logprob]
        if c.top_logprobs is not None:
            event.top_logprobs = [dict(top_logprobs[: p.logprobs])]
            c.top_logprobs += event.top_logprobs
        if self.matcher is not None:
            self.matcher.accept_token(token_id)
            if self.matcher.failed:
                return self.finish("error", event, error=self.matcher.failure_reason)
        cut, early = False, len(c.token_ids) < p.min_tokens
        if self.detokenizer is not None:
            event.text, cut = self.detokenizer.push(token_id)
        if cut or (token_id in self.end_token_ids and not early):
            return self.finish("stop", event)
        if len(self.token_ids) >= self.max_length:
            return self.finish("length", event)
        return event

    def finish(self, reason: FinishReason, event: Event | None = None, *, error: str = "") -> Event:
        """Close the completion; the event that says so."""
        event = event or Event(self.output.request_id, self.index, [], "")
        if self.detokenizer is not None:
            try:
                event.text += self.detokenizer.flush()
                self.completion.text = self.detokenizer.text
            except Exception as e:  # a tokenizer's, which concerns this completion alone
                reason, error = "error", f"{type(e).__name__}: {e}"
        return self._set_finished(reason, event, error)

    def fail(self, error: str) -> Event:
        """Closes the completion after an error of its own, without the rest of its text; the event that says so."""
        return self._set_finished("error", Event(self.output.request_id, self.index, [], ""), error)

    def _set_finished(self, reason: FinishReason, event: Event, error: str) -> Event:
        event.finish_reason = self.completion.finish_reason = reason
        self.completion.error = event.error = error
        event.output = self.output if self.output.finished else None
        return event
