"""Keeps control tokens spelled in a message's content plain text.

A chat template writes control tokens, such as <|im_start|>, as text, and a user may spell them too. The rendered text
does not show which ones are content. Content is therefore escaped before rendering: a secret number is inserted into
each control token that the content spells, or may spell together with the text that follows. Control tokens without
the number are the template's own: they are replaced by aliases, and a copy of the tokenizer knows only the aliases.
"""

import re
import secrets
from collections.abc import Mapping
from typing import Any, cast
from weakref import WeakKeyDictionary

from fastgen.text import Tokenizer

# Digits survive JSON and changes of case. Random, so that no content can contain them.
ESCAPE, ALIAS_PREFIX = ("".join(secrets.choice("0123456789") for _ in range(24)) for _ in range(2))
# DeepSeek's tokenizers do not mark the tokens of roles as special.
CONTROL_TOKEN_PATTERN = re.compile(r"<[|｜][^\s<>|｜]+[|｜]>")


class ControlTokens:
    """Control tokens of a tokenizer: its special tokens, and added tokens of the form <|…|>."""

    _cache: "WeakKeyDictionary[Tokenizer, ControlTokens]" = WeakKeyDictionary()

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
        self.tokens: dict[str, tuple[int, Any]] = {
            t.content: (id, t) for id, t in added.items() if t.special or CONTROL_TOKEN_PATTERN.fullmatch(t.content)
        }
        longest_first = sorted(filter(None, self.tokens), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.prefixes = {text[:n] for text in self.tokens for n in range(1, len(text))}
        self.max_prefix_length = max(map(len, self.prefixes), default=0)
        self._encoder: tuple[Any, dict[str, str], dict[int, int]] | None = None

    @classmethod
    def for_tokenizer(cls, tokenizer: Tokenizer) -> "ControlTokens":
        """Returns the tokenizer's control tokens, computed once per tokenizer."""
        if (tokens := cls._cache.get(tokenizer)) is None:
            tokens = cls._cache[tokenizer] = cls(tokenizer)
        return tokens

    def escape(self, value: Any) -> Any:
        """Escapes control tokens in all strings of a nested value, such as messages or tools."""
        if isinstance(value, str):
            return self._escape_text(value)
        if isinstance(value, Mapping):
            return {self.escape(key): self.escape(item) for key, item in value.items()}
        return [self.escape(item) for item in value] if isinstance(value, list | tuple) else value

    def _escape_text(self, text: str) -> str:
        while self.pattern.search(text):  # again, since one match may overlap another
            text = self.pattern.sub(lambda match: match[0][0] + ESCAPE + match[0][1:], text)
        if any(text[-n:] in self.prefixes for n in range(1, min(self.max_prefix_length, len(text)) + 1)):
            text += ESCAPE
        return text

    def encode(self, rendered: str) -> list[int]:
        """Returns the token ids of a rendered text: only control tokens that are not escaped become control tokens."""
        if self.backend is None:
            advice = "special_tokens_in_content=control"
            raise ValueError(f"this tokenizer cannot tell content from control tokens: {advice}")
        backend, aliases, ids = self._encoder = self._encoder or self._build_encoder()
        text = self.pattern.sub(lambda match: aliases[match[0]], rendered).replace(ESCAPE, "")
        return [ids[token] if token in ids else token for token in backend.encode(text, add_special_tokens=False).ids]

    def _build_encoder(self) -> tuple[Any, dict[str, str], dict[int, int]]:
        """Returns a copy of the tokenizer that knows only aliases, aliases by token text, and token ids by alias id."""
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Backend

        backend = cast(Any, Backend.from_str(self.backend.to_str()))
        backend.no_truncation()
        backend.no_padding()
        # `encode_special_tokens` makes special tokens plain text; aliases are added tokens that are not special.
        not_special = [AddedToken(text, special=True) for text, (_, t) in self.tokens.items() if not t.special]
        backend.add_special_tokens(not_special)
        backend.encode_special_tokens = True
        aliases = {text: f"\ue000{ALIAS_PREFIX}{i}\ue001" for i, text in enumerate(self.tokens)}
        options = {text: {"lstrip": t.lstrip, "rstrip": t.rstrip} for text, (_, t) in self.tokens.items()}
        backend.add_tokens([AddedToken(alias, normalized=False, **options[text]) for text, alias in aliases.items()])
        return backend, aliases, {backend.token_to_id(alias): self.tokens[text][0] for text, alias in aliases.items()}
