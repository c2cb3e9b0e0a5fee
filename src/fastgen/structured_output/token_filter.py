"""Constraints of the next token besides grammars: bad_words, allowed_token_ids and logits_processors."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32
from torch import Tensor

from fastgen.core.extensions import Matcher
from fastgen.sampling_params import SamplingParams
from fastgen.text import Tokenizer

LogitsProcessor = Callable[[list[int], list[int], Tensor], Tensor]  # (prompt ids, generated ids, logits [V]) -> logits


class TokenFilter(Matcher):
    """Applies a request's constraints to one completion, on top of its grammar's matcher, if any."""

    def __init__(
        self, grammar_matcher: Matcher | None, allowed_mask: Int32[np.ndarray, " words"] | None = None,
        bad_words: Sequence[Sequence[int]] = (), logits_processors: Sequence[LogitsProcessor] = (),
    ) -> None:  # fmt: skip
        """`allowed_mask` has bit t % 32 of word t // 32 set if token t is allowed. `bad_words` are token ids."""
        self.grammar_matcher, self.allowed_mask, self.bad_words = grammar_matcher, allowed_mask, bad_words
        self.logits_processors, self.edit_logits = logits_processors, self._edit_logits if logits_processors else None
        self.num_compared_tokens = max(map(len, bad_words), default=1) - 1
        self.last_token_ids: tuple[int, ...] = ()  # of the output, as many as bad words compare
        self.error = ""

    @property
    def failed(self) -> bool:
        return bool(self.error) or (self.grammar_matcher is not None and self.grammar_matcher.failed)

    @property
    def failure_reason(self) -> str:
        return self.error or (self.grammar_matcher.failure_reason if self.grammar_matcher is not None else "")

    def accept_token(self, token: int) -> None:
        if self.grammar_matcher is not None:
            self.grammar_matcher.accept_token(token)
        if self.num_compared_tokens:
            self.last_token_ids = (*self.last_token_ids, token)[-self.num_compared_tokens :]

    def copy(self) -> "TokenFilter":
        """Returns an independent filter in the same state."""
        inner = None if self.grammar_matcher is None else self.grammar_matcher.copy()
        other = TokenFilter(inner, self.allowed_mask, self.bad_words, self.logits_processors)
        other.last_token_ids, other.error = self.last_token_ids, self.error
        return other

    def apply_to_mask(self, mask: Int32[np.ndarray, " words"]) -> None:
        """Clears the bits of tokens that may not follow. Fails if none is left, and sets all bits."""
        if self.allowed_mask is not None:
            mask &= self.allowed_mask
        bits = mask.view(np.uint32)
        for *prefix, last in self.bad_words:
            if not prefix or self.last_token_ids[-len(prefix) :] == tuple(prefix):
                bits[last // 32] &= ~np.uint32(1 << last % 32)
        if not self.failed and not mask.any():
            self.error = "no token may follow: grammar, allowed_token_ids and bad_words together forbid every token"
        if self.failed:
            mask[:] = -1

    def _edit_logits(self, prompt_token_ids: list[int], token_ids: list[int], logits: Tensor) -> Tensor:
        """Returns what the logits processors make of the logits. Fails if one raises, or returns another shape."""
        if self.failed:
            return logits
        edited = logits
        for process in self.logits_processors:
            try:
                edited = process(prompt_token_ids, token_ids, edited)
                if not isinstance(edited, Tensor) or edited.shape != logits.shape:
                    shape = tuple(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
                    raise ValueError(f"it must return logits of shape {tuple(logits.shape)}, got {shape}")
            except Exception as e:  # the function is the caller's; other requests are not concerned
                self.error = f"a logits processor failed: {type(e).__name__}: {e}"
                return logits
        return edited


def encode_bad_words(tokenizer: Tokenizer, words: Sequence[str]) -> list[tuple[int, ...]]:
    """Returns the token ids of words: at the start of a text, and after a space if that changes the first token only.

    The rule is that of vLLM's `bad_words`.
    """
    token_ids = list[tuple[int, ...]]()
    for word in words:
        first, after_space = (
            tuple[int, ...](tokenizer(prefix + word.lstrip(" "), add_special_tokens=False).input_ids)
            for prefix in ("", " ")
        )
        token_ids.append(first)
        if len(after_space) == len(first) and after_space[0] != first[0]:
            token_ids.append(after_space)
    return [ids for ids in token_ids if ids]


def build_allowed_mask(allowed_token_ids: Sequence[int], vocab_size: int) -> Int32[np.ndarray, " words"]:
    """Returns the allowed tokens as bits, int32 [ceil(vocab_size / 32)]."""
    is_allowed = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    is_allowed[list(allowed_token_ids)] = 1
    return np.packbits(is_allowed, bitorder="little").view(np.int32)


def to_logits_processor(function: Callable[..., Any]) -> LogitsProcessor:
    """Returns a processor that calls a function of (generated ids, logits), or of (prompt ids, generated ids, logits).

    Functions get copies of the token ids, and the result is fp32 on the logits' device.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        num_required = sum(p.default is p.empty for p in positional)
    except (TypeError, ValueError):  # a builtin without a signature
        num_required = 2

    def process(prompt_token_ids: list[int], token_ids: list[int], logits: Tensor) -> Tensor:
        ids = ([*prompt_token_ids], [*token_ids]) if num_required == 3 else ([*token_ids],)
        with torch.no_grad():
            result = function(*ids, logits.clone())
        return result.to(logits) if isinstance(result, Tensor) else result

    return process


def build_filters(
    sampling: SamplingParams, grammar_matchers: Sequence[Matcher | None], tokenizer: Tokenizer | None, vocab_size: int,
    *, is_single_rank: bool,
) -> list[Matcher | None]:  # fmt: skip
    """Returns the matchers of a request's completions, with its further constraints. Raises ValueError for wrong ones.

    `is_single_rank` says that one process computes the request, where functions of that process can be called.
    """
    p = sampling
    if not (p.bad_words or p.allowed_token_ids is not None or p.logits_processors):
        return [*grammar_matchers]
    if p.logits_processors and not is_single_rank:
        raise ValueError(
            "logits_processors are functions of the caller's process and need whole rows of logits: they work with one "
            "engine of one device, tensor_parallel=1 and no replicas"
        )
    if p.bad_words and tokenizer is None:
        raise ValueError("bad_words need a tokenizer, and this model came without one; use logit_bias")
    bad_words = encode_bad_words(tokenizer, p.bad_words) if tokenizer is not None else []
    if wrong := [t for t in p.allowed_token_ids or () if not 0 <= t < vocab_size]:
        raise ValueError(f"allowed_token_ids: token {wrong[0]} is outside the vocabulary of {vocab_size}")
    allowed = None if p.allowed_token_ids is None else build_allowed_mask(p.allowed_token_ids, vocab_size)
    processors = [to_logits_processor(f) for f in p.logits_processors]
    return [TokenFilter(matcher, allowed, bad_words, processors) for matcher in grammar_matchers]
