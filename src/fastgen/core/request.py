"""The state of a request while it runs, and its results: SequenceState, Completion, Output and Event."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Literal

import numpy as np

from fastgen.core.extensions import Detokenizer, Matcher
from fastgen.core.model_config import ModelConfig
from fastgen.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]  # error: the cause is in `Completion.error`
EMPTY_TOKEN_IDS = np.zeros(0, np.int64)
NON_FINITE_LOGITS = "the logits are NaN or infinite"
TopLogprobs = dict[int, float]  # token -> logprob, most likely first


@dataclass(slots=True)
class Completion:
    """One sampled answer of a request. The tokens include the end token; the text ends before a stop string."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] | None = None  # of each token
    top_logprobs: list[TopLogprobs] | None = None
    finish_reason: FinishReason | None = None  # None: still running
    weight_versions: list[int] = field(default_factory=list)  # of each token, see `Engine.weight_version`
    error: str = ""  # the cause if the finish reason is "error"
    stop_reason: str | int | None = None  # the stop string, or the id of `stop_token_ids`, that ended it

    @property
    def cumulative_logprob(self) -> float | None:
        """The sum of the tokens' logprobs; None without `logprobs`."""
        return None if self.logprobs is None else sum(self.logprobs)


@dataclass(slots=True)
class Output:
    """The prompt and the completions of a request. Prompt logprobs are the model's own; the first token has none."""

    request_id: int
    prompt_token_ids: list[int]
    completions: list[Completion]
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[TopLogprobs | None] | None = None
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache, summed over the completions
    error: str | None = None  # why the request could not run (`on_error="skip"`); its completions are then empty
    prompt: str | None = None  # the text, as given or as the chat template rendered it; None for token ids

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        return all(c.finish_reason for c in self.completions)


@dataclass(slots=True)
class Event:
    """The tokens and text that a step adds to a completion. The last event of a request carries its output."""

    request_id: int
    index: int  # of the completion
    token_ids: list[int]
    text: str  # new text; the texts of all events together are the completion's
    logprobs: list[float] | None = None
    top_logprobs: list[TopLogprobs] | None = None
    finish_reason: FinishReason | None = None
    output: Output | None = None
    error: str = ""  # as in the completion
    weight_version: int | None = None  # of the weights that computed the token


def sample_seed(seed: int, index: int) -> int:
    """Returns the seed of a request's completion: the request's own seed for index 0, else a hash of seed and index."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed},{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def rejected_output(error: str, num_completions: int) -> Output:
    """Returns the output of a request that cannot run; each completion has the error."""
    return Output(-1, [], [Completion(finish_reason="error", error=error) for _ in range(num_completions)], error=error)


def rejection_events(output: Output) -> list[Event]:
    """Returns the events of a request that cannot run."""
    events = [Event(output.request_id, i, [], "", finish_reason="error") for i in range(len(output.completions))]
    events[-1].output = output
    return events


def max_length(
    prompt: Sequence[int], params: SamplingParams, model_config: ModelConfig, cache_capacity: int, has_tokenizer: bool
) -> int:
    """Returns the length in tokens at which a request's completions end, prompt included.

    `cache_capacity` is the KV cache's size in tokens. Raises ValueError, with the numbers, if the request cannot run.
    """
    n, vocab_size, context = len(prompt), model_config.vocab_size, model_config.context_length
    for name, tokens in (
        ("prompt", prompt), ("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias),
        ("allowed_token_ids", params.allowed_token_ids or ()),
    ):  # fmt: skip
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
            wrong = next(t for t in tokens if not 0 <= t < vocab_size)
            raise ValueError(f"{name}: token {wrong} is outside the vocabulary of {vocab_size}")
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(params, name) or 0) > vocab_size:
            raise ValueError(f"{name}={getattr(params, name)} is more than the vocabulary of {vocab_size}")
    if params.stop and not has_tokenizer:
        raise ValueError("stop strings need a tokenizer, and this model came without one; use stop_token_ids")
    longest = min(context, cache_capacity + 1)  # the last token of a sequence is never written to the cache
    length = n + (params.max_tokens or 1)
    if length > longest:
        limit = f"model's context of {context}" if longest == context else f"cache of {cache_capacity}"
        advice = f"max_tokens can be at most {longest - n}" if n < longest else "the prompt alone is too long"
        raise ValueError(
            f"{n} prompt tokens and max_tokens={params.max_tokens} do not fit the {limit} tokens: {advice}"
        )
    return longest if params.max_tokens is None else length


class SequenceState:
    """One completion in flight: tokens, text, and stop rules. `max_length` counts prompt and output tokens."""

    def __init__(
        self, output: Output, index: int, params: SamplingParams, seed: int, max_length: int,
        eos_token_ids: frozenset[int], detokenizer: Detokenizer | None = None, matcher: Matcher | None = None,
    ) -> None:  # fmt: skip
        p = params
        self.output, self.index, self.params, self.max_length = output, index, params, max_length
        self.detokenizer, self.matcher = detokenizer, matcher  # None: no text, no grammar
        self.adapter_idx = 0  # index of its LoRA adapter in the engine; 0: none
        self.num_prompt_tokens = len(output.prompt_token_ids)
        self.token_ids = list(output.prompt_token_ids)
        self.seed = sample_seed(seed, index)
        self.end_token_ids = frozenset(p.stop_token_ids) | (frozenset() if p.ignore_eos else eos_token_ids)
        self.uses_top_k_top_p = p.temperature > 0 and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0)
        self.has_penalties = p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
        # Whether the distribution depends on the last sampled token: the next step cannot sample before it is known.
        self.depends_on_last_token = self.has_penalties or p.min_tokens > 0 or matcher is not None
        # Whether the sampler that is fused into the step does not suffice.
        self.needs_general_sampler = (
            self.depends_on_last_token or self.uses_top_k_top_p or bool(p.logit_bias) or (p.logprobs or 0) > 0
        )
        self.needs_prompt_logprobs = p.prompt_logprobs is not None and index == 0
        self.has_nan_prompt_logprobs = False
        self.output_token_counts: Counter[int] = Counter()
        bias, banned = p.logit_bias, self.end_token_ids if p.min_tokens else ()
        self._logit_bias = np.fromiter(bias, np.int64, len(bias)), np.fromiter(bias.values(), np.float32, len(bias))
        self._banned_token_ids = np.fromiter(banned, np.int64, len(banned))  # until there are `min_tokens`
        self.was_admitted = False
        c = self.completion = output.completions[index]
        if p.logprobs is not None:
            c.logprobs = []
            c.top_logprobs = [] if p.logprobs else None

    def record_admission(self, num_cached_tokens: int) -> None:
        """Counts the prefix cache hits of the first admission. Later admissions follow a preemption."""
        if not self.was_admitted:
            self.output.num_cached_tokens += min(num_cached_tokens, self.num_prompt_tokens)
        self.was_admitted = True

    def fork(self, request_id: int, seed: int) -> "SequenceState":
        """Returns a copy with a seed of its own, as the only completion of a new request."""
        c, o, other = self.completion, self.output, copy(self)
        other.index, other.seed, other.was_admitted = 0, seed, False
        other.token_ids, other.output_token_counts = [*self.token_ids], Counter(self.output_token_counts)
        other.matcher = None if self.matcher is None else self.matcher.copy()
        other.detokenizer = None if self.detokenizer is None else self.detokenizer.copy()
        other.completion = replace(
            c,
            token_ids=[*c.token_ids],
            weight_versions=[*c.weight_versions],
            logprobs=None if c.logprobs is None else [*c.logprobs],
            top_logprobs=None if c.top_logprobs is None else [*c.top_logprobs],
        )
        other.output = Output(request_id, o.prompt_token_ids, [other.completion], prompt=o.prompt)
        if o.prompt_logprobs is not None:
            other.output.prompt_logprobs = [*o.prompt_logprobs]
            other.output.prompt_top_logprobs = o.prompt_top_logprobs and [*o.prompt_top_logprobs]
            other.needs_prompt_logprobs = len(o.prompt_logprobs) < self.num_prompt_tokens
        return other

    def resume(self, previous: Completion) -> None:
        """Continues from an earlier, unfinished completion of the same request."""
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
        """Returns the edits of this sequence's logits, or None if there are none.

        These are arrays with an entry for each edited token: its id, its bias, how many times it was generated, and
        whether prompt or output has it.
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
        """Appends a token sampled with weights of `weight_version`; returns the event.

        A logprob that is not finite means NaN or infinite logits: it ends the completion without the token.
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
            c.stop_reason = self.detokenizer.stop_string
        if token_id in p.stop_token_ids and not (cut or early):
            c.stop_reason = token_id
        if cut or (token_id in self.end_token_ids and not early):
            return self.finish("stop", event)
        if len(self.token_ids) >= self.max_length:
            return self.finish("length", event)
        return event

    def finish(self, reason: FinishReason, event: Event | None = None, *, error: str = "") -> Event:
        """Ends the completion with the rest of its text; returns its last event."""
        event = event or Event(self.output.request_id, self.index, [], "")
        if self.detokenizer is not None:
            try:
                event.text += self.detokenizer.flush()
                self.completion.text = self.detokenizer.text
            except Exception as e:  # of the tokenizer: other completions are not concerned
                reason, error = "error", f"{type(e).__name__}: {e}"
        return self._set_finished(reason, event, error)

    def fail(self, error: str) -> Event:
        """Ends the completion after an error of its own, without the rest of its text; returns its last event."""
        return self._set_finished("error", Event(self.output.request_id, self.index, [], ""), error)

    def _set_finished(self, reason: FinishReason, event: Event, error: str) -> Event:
        event.finish_reason = self.completion.finish_reason = reason
        self.completion.error = event.error = error
        event.output = self.output if self.output.finished else None
        return event
