"""Keeps control tokens that are spelled in a message's content from becoming control tokens.

A chat template writes control tokens, such as <|im_start|>, as text, and so may a user. Which of them is content cannot
be told from the rendered text. So content is marked before it is rendered: a secret number goes into each control token
that it spells, or may spell together with what follows. Those without the number are the template's own. They get other
names for the tokenizer, to which all the rest is text.
"""

import re
import secrets
from collections.abc import Mapping
from typing import Any, cast
from weakref import WeakKeyDictionary

from fastgen.core.types import Tokenizer

# Digits stay as they are in JSON and in small or large letters. Nobody can guess these.
ESCAPE, ALIAS_PREFIX = ("".join(secrets.choice("0123456789") for _ in range(24)) for _ in range(2))
CONTROL_TOKEN_PATTERN = re.compile(
    r"<[|｜][^\s<>|｜]+[|｜]>"
)  # of tokens that DeepSeek's tokenizers have for roles, and do not call special


class ControlTokens:
    """The control tokens of a tokenizer: its special ones, and added ones of the form <|…|>."""

    _by_tokenizer: "WeakKeyDictionary[Tokenizer, ControlTokens]" = WeakKeyDictionary()

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
        """Returns those of a tokenizer, which are read once."""
        if (found := cls._by_tokenizer.get(tokenizer)) is None:
            found = cls._by_tokenizer[tokenizer] = cls(tokenizer)
        return found

    def escape(self, value: Any) -> Any:
        """Marks control tokens in all texts of a value, such as messages or tools. Other values are as before."""
        if isinstance(value, str):
            return self._escape_text(value)
        if isinstance(value, Mapping):
            return {self.escape(key): self.escape(item) for key, item in value.items()}
        return [self.escape(item) for item in value] if isinstance(value, list | tuple) else value

    def _escape_text(self, text: str) -> str:
        while self.pattern.search(text):  # again: one may lie across another
            text = self.pattern.sub(lambda match: match[0][0] + ESCAPE + match[0][1:], text)
        if any(text[-n:] in self.prefixes for n in range(1, min(self.max_prefix_length, len(text)) + 1)):
            text += ESCAPE
        return text

    def encode(self, rendered: str) -> list[int]:
        """Returns the tokens of a text in which content is marked: only what is not marked becomes control tokens."""
        if self.backend is None:
            raise ValueError(
                "this tokenizer cannot tell content from control tokens: special_tokens_in_content=control"
            )
        backend, names, ids = self._encoder = self._encoder or self._build_encoder()
        text = self.pattern.sub(lambda match: names[match[0]], rendered).replace(ESCAPE, "")
        return [ids[token] if token in ids else token for token in backend.encode(text, add_special_tokens=False).ids]

    def _build_encoder(self) -> tuple[Any, dict[str, str], dict[int, int]]:
        """Returns a copy of the tokenizer that knows control tokens by other names alone, the names, and their ids."""
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Backend

        backend = cast(Any, Backend.from_str(self.backend.to_str()))
        backend.no_truncation()
        backend.no_padding()
        # Special tokens are text to it; those with other names are not special, and found.
        backend.add_special_tokens(
            [AddedToken(text, special=True) for text, (_, t) in self.tokens.items() if not t.special]
        )
        backend.encode_special_tokens = True
        names = {text: f"\ue000{ALIAS_PREFIX}{i}\ue001" for i, text in enumerate(self.tokens)}
        how = {text: {"lstrip": t.lstrip, "rstrip": t.rstrip} for text, (_, t) in self.tokens.items()}
        backend.add_tokens([AddedToken(name, normalized=False, **how[text]) for text, name in names.items()])
        return backend, names, {backend.token_to_id(name): self.tokens[text][0] for text, name in names.items()}
