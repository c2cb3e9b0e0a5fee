"""Output that follows a grammar: which tokens may come next, as bits. The grammars are llguidance's, an extra:
`pip install fastgen[guide]`.

    regex:[0-9]{4}-[0-9]{2}         a regular expression that matches the whole output
    json:{"type": "object", ...}    a JSON schema; `json:` alone is any JSON object
    lark:start: "yes" | "no"        a context-free grammar (llguidance's variant of Lark)
"""

import json
import os
import threading
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import numpy as np

from fastgen.types import Tokenizer

KINDS = ("regex", "json", "lark")


def split(grammar: str) -> tuple[str, str]:
    """Kind and text of a grammar. ValueError for another kind."""
    kind, colon, text = grammar.partition(":")
    if not colon or kind not in KINDS:
        raise ValueError(f"grammar must begin with {', '.join(k + ':' for k in KINDS)}, got {grammar[:40]!r}")
    return kind, text


class Guide:
    """Where one completion is in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self.matcher = matcher

    def push(self, token: int) -> None:
        """A token was drawn."""
        if not self.matcher.is_stopped():
            self.matcher.consume_token(token)

    @property
    def failed(self) -> bool:
        """Whether the grammar cannot be followed any further: it has become too large to be parsed."""
        return self.matcher.is_error()

    def copy(self) -> "Guide":
        """Another one at the same place."""
        return Guide(self.matcher.deep_copy())


class Guides:
    """Makes guides for the tokens of a tokenizer, and their masks, all cores at once."""

    def __init__(self, tokenizer: Tokenizer | None, vocab: int, eos: frozenset[int]) -> None:
        """`vocab`: the model's, which may be larger than the tokenizer's."""
        self.tokenizer, self.vocab, self.eos = tokenizer, vocab, eos
        self._tokens: Any = None  # made when first wanted: it takes a second
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Read the tokenizer now; not if that is in vain."""
        with suppress(ValueError):
            if self.tokenizer is not None and find_spec("llguidance"):
                self._ready()

    def _ready(self) -> Any:
        with self._lock:  # whoever comes second waits for the first
            return self._tokens or self._start()

    def guide(self, grammar: str) -> Guide:
        """At the beginning of a grammar. ValueError if it cannot be used, with the reason."""
        kind, text = split(grammar)
        if self.tokenizer is None:
            raise ValueError("a grammar needs a tokenizer, and this model came without one")
        if find_spec("llguidance") is None:
            raise ValueError("a grammar needs llguidance: pip install fastgen[guide]")
        from llguidance import LLMatcher

        tokens = self._ready()
        try:
            if kind == "json":
                schema = json.loads(text) if text.strip() else {"type": "object"}
                compiled = LLMatcher.grammar_from_json_schema(json.dumps(schema))
            else:
                compiled = (LLMatcher.grammar_from_regex if kind == "regex" else LLMatcher.grammar_from_lark)(text)
            matcher = LLMatcher(tokens, compiled)
        except ValueError as e:  # json's own error is one
            raise ValueError(f"{kind} grammar: {e}") from e
        if error := matcher.get_error():
            raise ValueError(f"{kind} grammar: {error.splitlines()[0]}")
        return Guide(matcher)

    def _start(self) -> Any:
        from llguidance import LLExecutor
        from llguidance.hf import from_tokenizer

        try:
            self._tokens = from_tokenizer(self.tokenizer, self.vocab, sorted(self.eos) or None)  # type: ignore[arg-type]
        except ValueError as e:
            raise ValueError(f"this model's tokenizer cannot be used with grammars: {e}") from e
        self._pool = LLExecutor(num_threads=max(1, (os.cpu_count() or 2) - 1))
        return self._tokens

    def masks(self, rows: list[tuple[int, Guide]], count: int) -> np.ndarray:
        """[count, words] int32: bit t % 32 of word t // 32 is whether token t may come next. All may in other rows."""
        from llguidance.numpy import fill_next_token_bitmask_par

        bits = np.full((count, -(-self.vocab // 32)), -1, np.int32)
        going = [(guide.matcher, row) for row, guide in rows if not (guide.failed or guide.matcher.is_stopped())]
        if going:
            fill_next_token_bitmask_par(self._pool, going, bits)
        for row, guide in rows:
            if guide.failed or guide.matcher.is_stopped():  # nothing may come but the end
                bits[row] = 0
                for token in self.eos:
                    bits[row, token // 32] |= np.int32(np.uint32(1 << token % 32).view(np.int32))
        return bits
