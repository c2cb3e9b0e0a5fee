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
from fastgen.grammar import Guide
from fastgen.models.spec import Spec
from fastgen.tokenizer import Detokenizer, Prompt, prompt_list
from fastgen.types import Tokenizer

FinishReason = Literal["stop", "length", "abort", "error"]  # error: see `Completion.error` and `Output.error`
R = TypeVar("R")
NO_TOKENS = np.zeros(0, np.int64)
NOT_FINITE = "the logits are NaN or infinite"
TopLogprobs = dict[int, float]  # token -> logprob, most likely first


@dataclass(slots=True)
class Completion:
    """One sample of a request. The tokens include the one that stopped it; the text leaves out stop strings."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] | None = None  # of each token
    top_logprobs: list[TopLogprobs] | None = None
    finish_reason: FinishReason | None = None  # None: still running
    versions: list[int] = field(default_factory=list)  # of the weights that drew each token; see `Engine.version`
    error: str = ""  # what went wrong, where the finish reason is "error"


@dataclass(slots=True)
class Output:
    """A request's prompt and its completions. Prompt logprobs are raw; the first token has none."""

    request_id: int
    prompt_token_ids: list[int]
    completions: list[Completion]
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[TopLogprobs | None] | None = None
    cached_tokens: int = 0  # of the prompt, found in the cache; of all completions together
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
    version: int | None = None  # of the weights that drew the token, as in `Completion.versions`


def refuse_errors(outputs: Sequence[Output]) -> None:
    """Raises RuntimeError if a completion has ended with an error: training cannot go on from there."""
    if count := sum(c.error == NOT_FINITE for o in outputs for c in o.completions):
        raise RuntimeError(f"the logits of {count} completions are NaN or infinite: the parameters have diverged")


def sample_seed(seed: int, index: int) -> int:
    """The seed of a request's index-th sample: the request's own for the first, a hash of both for the others."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed},{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def pairs(
    prompts: Prompt | Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None
) -> list[tuple[Prompt, SamplingParams]]:
    """Pairs one or many prompts with their settings, which are one for all, or one for each. ValueError for others."""
    many = prompt_list(prompts)
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


def each_prompt(
    make: Callable[[Prompt, SamplingParams], R],
    prompts: Prompt | Sequence[Prompt],
    sampling: SamplingParams | Sequence[SamplingParams] | None,
    on_error: str,
) -> list[R | Output]:
    """Returns what `make` makes of each prompt; where that is a ValueError and `on_error` is "skip", an Output with it.

    With "raise", the ValueError says which of several prompts it is.
    """
    check_choice("on_error", on_error, ["raise", "skip"])
    found, many = list[R | Output](), pairs(prompts, sampling)
    for prompt, params in many:
        try:
            found.append(make(prompt, params))
        except ValueError as e:
            if on_error == "skip":
                found.append(refused(str(e), params.n))
            elif len(many) > 1:
                raise ValueError(f"prompt {len(found)}: {e}") from e
            else:
                raise
    return found


def refused(error: str, n: int) -> Output:
    """Returns the output of a request that cannot run, in the place of its n completions."""
    return Output(-1, [], [Completion(finish_reason="error", error=error) for _ in range(n)], error=error)


def refusal(output: Output) -> list[Event]:
    """Returns the events of a request that cannot run."""
    events = [Event(output.request_id, i, [], "", finish_reason="error") for i in range(len(output.completions))]
    events[-1].output = output
    return events


def longest(prompt: Sequence[int], params: SamplingParams, spec: Spec, capacity: int, has_text: bool) -> int:
    """The most tokens a sequence may reach, prompt included. ValueError, with the numbers, for what cannot run.

    `capacity` is the cache's, in tokens; `has_text` says whether there is a tokenizer.
    """
    n = len(prompt)
    used = {"prompt": prompt, "stop_token_ids": params.stop_token_ids, "logit_bias": params.logit_bias}
    for name, tokens in used.items():
        if tokens and not 0 <= min(tokens) <= max(tokens) < spec.vocab:
            wrong = next(t for t in tokens if not 0 <= t < spec.vocab)
            raise ValueError(f"{name}: token {wrong} is outside the vocabulary of {spec.vocab}")
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(params, name) or 0) > spec.vocab:
            raise ValueError(f"{name}={getattr(params, name)} is more than the vocabulary of {spec.vocab}")
    if params.stop and not has_text:
        raise ValueError("stop strings need a tokenizer, and this model came without one; use stop_token_ids")
    most = min(spec.context, capacity + 1)  # the last token drawn is never written to the cache
    wanted = n + (params.max_tokens or 1)
    if wanted > most:
        place = f"model's context of {spec.context}" if most == spec.context else f"cache of {capacity}"
        advice = f"max_tokens can be at most {most - n}" if n < most else "the prompt alone is too long"
        asked = f"{n} prompt tokens and max_tokens={params.max_tokens}"
        raise ValueError(f"{asked} do not fit the {place} tokens: {advice}")
    return most if params.max_tokens is None else wanted


class Sample:
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
        limit: int,
        eos: frozenset[int],
        tokenizer: Tokenizer | None,
        *,
        live: bool = True,
        guide: Guide | None = None,
    ) -> None:
        self.guide = guide  # the grammar's, where there is one
        self.adapter = 0  # among the engine's; 0: none
        self.output, self.index, self.params, self.limit = output, index, params, limit
        self.prompt = len(output.prompt_token_ids)
        self.tokens = list(output.prompt_token_ids)
        self.seed = sample_seed(seed, index)
        self.ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos)
        p = params
        self.filters = p.temperature > 0 and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0)
        penalised = p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
        # Drawn by the general sampler, not by the one inside the step.
        self.special = self.filters or penalised or bool(p.logit_bias) or p.min_tokens > 0 or (p.logprobs or 0) > 0
        self.special |= guide is not None
        self.looks_back = penalised or p.min_tokens > 0 or guide is not None  # what is drawn depends on what was
        self.scores_prompt = p.prompt_logprobs is not None and index == 0
        self.invalid = False  # whether a logprob of its prompt is NaN
        self.text: Detokenizer | None = None
        if tokenizer is not None:
            self.text = Detokenizer(tokenizer, self.tokens, params.stop, min_tokens=params.min_tokens, live=live)
        self.counts: Counter[int] = Counter()  # of generated tokens
        self.penalised = penalised
        bias = p.logit_bias
        self._biased = np.fromiter(bias, np.int64, len(bias)), np.fromiter(bias.values(), np.float32, len(bias))
        self._banned = np.fromiter(self.ends, np.int64, len(self.ends)) if p.min_tokens else NO_TOKENS
        self.started = False  # whether it ever ran
        c = self.completion = output.completions[index]
        if params.logprobs is not None:
            c.logprobs = []
            c.top_logprobs = [] if params.logprobs else None

    def admitted(self, reused: int) -> None:
        """It begins to run, with so many of its tokens found in the cache; after a preemption it does so again."""
        if not self.started:
            self.output.cached_tokens += min(reused, self.prompt)
        self.started = True

    def fork(self, request_id: int, seed: int) -> "Sample":
        """Another one with the same past and a seed of its own, as the one completion of a new request."""
        c, o = self.completion, self.output
        other = copy(self)
        other.index, other.seed, other.tokens, other.counts = 0, seed, [*self.tokens], Counter(self.counts)
        other.guide = None if self.guide is None else self.guide.copy()
        other.text, other.started = None if self.text is None else self.text.copy(), False
        other.completion = replace(
            c,
            token_ids=[*c.token_ids],
            versions=[*c.versions],
            logprobs=None if c.logprobs is None else [*c.logprobs],
            top_logprobs=None if c.top_logprobs is None else [*c.top_logprobs],
        )
        other.output = Output(request_id, o.prompt_token_ids, [other.completion])
        if o.prompt_logprobs is not None:
            other.output.prompt_logprobs = [*o.prompt_logprobs]
            other.output.prompt_top_logprobs = o.prompt_top_logprobs and [*o.prompt_top_logprobs]
            other.scores_prompt = len(o.prompt_logprobs) < self.prompt
        return other

    def resume(self, past: Completion) -> None:
        """Take up where an earlier completion of the same request was left."""
        c = self.completion
        c.token_ids, c.logprobs, c.top_logprobs = past.token_ids, past.logprobs, past.top_logprobs
        c.versions = past.versions
        self.tokens += c.token_ids
        self.counts.update(c.token_ids)
        if self.guide is not None:
            for token in c.token_ids:
                self.guide.push(token)
        if self.text is not None:
            for token in c.token_ids:
                self.text.push(token, may_stop=False)

    def edits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
        """Returns the tokens whose logits this sample changes, each once; of each its bias, how many times it was
        generated, and whether prompt or output has it. None where there are none.
        """
        biased, biases = self._biased
        banned = self._banned if len(self.completion.token_ids) < self.params.min_tokens else NO_TOKENS
        if not (self.penalised or len(biased) or len(banned)):
            return None
        seen = counted = NO_TOKENS
        if self.penalised:
            counted = np.fromiter(self.counts, np.int64, len(self.counts))
            seen = np.array(self.tokens, np.int64) if self.params.repetition_penalty != 1 else counted
        token = np.unique(np.concatenate((seen, biased, banned)))
        bias, count, is_seen = (np.zeros(len(token), kind) for kind in (np.float32, np.float32, np.bool_))
        is_seen[np.searchsorted(token, seen)] = True
        count[np.searchsorted(token, counted)] = np.fromiter(self.counts.values(), np.float32, len(counted))
        bias[np.searchsorted(token, biased)] = biases
        bias[np.searchsorted(token, banned)] = float("-inf")
        return token, bias, count, is_seen

    def push(self, token: int, logprob: float, top: Sequence[tuple[int, float]], version: int = 0) -> Event:
        """Takes a token that parameters of this version drew; returns what it adds.

        A logprob that is not finite ends the completion without the token, which means nothing: there were logits that
        are NaN or inf.
        """
        c, p = self.completion, self.params
        if self.guide is not None and self.guide.failed:
            return self.end("error", error=self.guide.reason)
        if self.invalid or not isfinite(logprob):
            return self.end("error", error=NOT_FINITE)
        self.tokens.append(token)
        c.token_ids.append(token)
        c.versions.append(version)
        self.counts[token] += 1
        event = Event(self.output.request_id, self.index, [token], "", version=version)
        if c.logprobs is not None:
            c.logprobs.append(logprob)
            event.logprobs = [logprob]
        if c.top_logprobs is not None:
            event.top_logprobs = [dict(top[: p.logprobs])]
            c.top_logprobs += event.top_logprobs
        if self.guide is not None:
            self.guide.push(token)
            if self.guide.failed:
                return self.end("error", event, error=self.guide.reason)
        cut, early = False, len(c.token_ids) < p.min_tokens
        if self.text is not None:
            event.text, cut = self.text.push(token)
        if cut or (token in self.ends and not early):
            return self.end("stop", event, cut=cut)
        if len(self.tokens) >= self.limit:
            return self.end("length", event)
        return event

    def end(self, reason: FinishReason, event: Event | None = None, *, cut: bool = False, error: str = "") -> Event:
        """Close the completion; the event that says so."""
        event = event or Event(self.output.request_id, self.index, [], "")
        if self.text is not None:
            try:
                if not cut:
                    event.text += self.text.end(self.completion.token_ids)
                self.completion.text = self.text.text
            except Exception as e:  # a tokenizer's, which concerns this completion alone
                reason, error = "error", f"{type(e).__name__}: {e}"
        return self._close(reason, event, error)

    def fail(self, error: str) -> Event:
        """Closes the completion after an error of its own, without the rest of its text; the event that says so."""
        return self._close("error", Event(self.output.request_id, self.index, [], ""), error)

    def _close(self, reason: FinishReason, event: Event, error: str) -> Event:
        event.finish_reason = self.completion.finish_reason = reason
        self.completion.error = event.error = error
        event.output = self.output if self.output.finished else None
        return event
