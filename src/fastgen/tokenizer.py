"""Text to tokens and back: any tokenizer of `transformers`, chat templates, and decoding as tokens arrive."""

from collections.abc import Mapping, Sequence
from copy import copy
from itertools import chain
from numbers import Integral
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from jinja2 import TemplateError

from fastgen.types import Tokenizer

Message = dict[str, Any]
CONTEXT = 6  # tokens decoded again with each new one, or a few more
LONGEST = 8  # tokens that text is held back for: more than any character has
# Text, token ids (also an array), chat messages, or a mapping that holds one of the first two (`_from_mapping`).
Prompt = str | Sequence[int] | Sequence[Message] | Mapping[str, Any]
Tools = list[dict[str, Any]] | None  # functions that the chat template tells the model of


def load(path: Path) -> Tokenizer | None:
    """The tokenizer beside a checkpoint (or inside a `.gguf`); None if there is none."""
    if path.suffix == ".gguf":
        from fastgen.models import gguf  # whose reader takes a while to import

        return gguf.tokenizer(path)
    folder = path if path.is_dir() else path.parent
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
    if not any((folder / name).is_file() for name in files):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def is_one(prompts: object) -> bool:
    """Tells a single prompt (a text, token ids, chat messages, a mapping) from a collection of prompts."""
    if isinstance(prompts, str | Mapping):
        return True
    if isinstance(prompts, list | tuple):
        first = prompts[0] if prompts else None
        return isinstance(first, Integral) or (isinstance(first, Mapping) and "role" in first)
    if getattr(prompts, "ndim", 0) != 1:
        return False
    array = cast(Any, prompts)  # of token ids, or of texts
    return not len(array) or isinstance(array[:1].tolist()[0], Integral)


def prompt_list(prompts: Any) -> list[Prompt]:
    """Lists the prompts of one or many, in order.

    A mapping with `input_ids`, as tokenizers return (`BatchEncoding`), holds a prompt a row; padding is left out.
    """
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        return _unpadded_rows(prompts)
    return [prompts] if is_one(prompts) else list(prompts)


def _unpadded_rows(encoding: Mapping[str, Any]) -> list[Prompt]:
    """Returns the token ids of each row of a `BatchEncoding`, without the tokens that its attention mask leaves out."""

    def rows(name: str) -> list[Any]:
        values = encoding[name]
        values = (
            values.tolist()
            if hasattr(values, "tolist")
            else [v.tolist() if hasattr(v, "tolist") else v for v in values]
        )
        return [values] if not values or isinstance(values[0], Integral) else values

    ids = rows("input_ids")
    if encoding.get("attention_mask") is None:
        return ids
    masks = rows("attention_mask")
    return [[t for t, kept in zip(row, mask, strict=True) if kept] for row, mask in zip(ids, masks, strict=True)]


def _from_mapping(prompt: Mapping[str, Any]) -> Any:
    """Returns the prompt in vLLM's `{"prompt": text}` or `{"prompt_token_ids": ids}`, or in one row of `input_ids`."""
    if "input_ids" in prompt:
        rows = _unpadded_rows(prompt)
        if len(rows) != 1:
            raise ValueError(f"one prompt was expected, and these input_ids have {len(rows)} rows")
        return rows[0]
    keys = {key for key, value in prompt.items() if value is not None}
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if keys == {"prompt"} and isinstance(text, str):
        return text
    if "prompt_token_ids" in keys and keys <= {"prompt", "prompt_token_ids"} and not isinstance(ids, str | Mapping):
        return ids  # of which `prompt` is the text
    raise ValueError(
        'a mapping as a prompt is {"prompt": "a text"}, {"prompt_token_ids": [1, 2]} or what a tokenizer returns '
        "(input_ids), and a chat is a list of messages with 'role' and 'content'; "
        f"got the keys {sorted(map(str, prompt))}"
    )


def encode(tokenizer: Tokenizer | None, prompt: Prompt, tools: Tools = None) -> list[int]:
    """Token ids of a prompt; chat messages go through the tokenizer's chat template, up to the model's turn."""
    if isinstance(prompt, Mapping):
        prompt = _from_mapping(prompt)
    if getattr(prompt, "ndim", 0) == 1:  # an array or tensor of token ids
        prompt = cast(Any, prompt).tolist()
    if not isinstance(prompt, str | list | tuple):
        kind = type(prompt).__name__
        raise ValueError(f"a prompt is a text, a list of token ids or a list of chat messages, not {kind}")
    if not len(prompt):
        raise ValueError("the prompt is empty: it needs at least one token")
    if not isinstance(prompt, str):
        kinds = set(map(type, prompt))  # not token by token: hundreds of prompts are added before a first step
        if all(issubclass(kind, Integral) and kind is not bool for kind in kinds):
            return list(prompt) if kinds == {int} else [int(t) for t in prompt]  # type: ignore[arg-type, call-overload]
    if tokenizer is None:
        raise ValueError("this model came without a tokenizer: give prompts as token ids")
    if isinstance(prompt, str):
        if not (tokens := tokenizer(prompt).input_ids):
            raise ValueError(f"the prompt {prompt!r} is no token for this tokenizer: it needs at least one")
        return tokens
    return _templated(tokenizer, prompt, tools=tools, tokenize=True, return_dict=True)["input_ids"]


def render(tokenizer: Tokenizer | None, messages: Sequence[Message], tools: Tools = None) -> str:
    """The text that the chat template makes of messages, up to the model's turn; `encode` gives its tokens."""
    if tokenizer is None:
        raise ValueError("this model came without a tokenizer: give prompts as token ids")
    return _templated(tokenizer, messages, tools=tools, tokenize=False)


def _templated(tokenizer: Tokenizer, prompt: Sequence[Any], **options: Any) -> Any:
    for message in prompt:
        if not isinstance(message, dict) or "role" not in message:
            raise ValueError(f"a chat message is a dict with 'role' and 'content', got {message!r}")
    if not tokenizer.chat_template:
        raise ValueError("this model's tokenizer has no chat template: give prompts as text or token ids")
    messages: list[Any] = list(prompt)
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)  # type: ignore[arg-type]
    except (TemplateError, TypeError, RecursionError) as e:  # of a text and what is none, of objects far too deep
        raise ValueError(f"the model's chat template refuses these messages: {e}") from e


class Detokenizer:
    """Text of a growing list of tokens, and where a stop string cuts it.

    Only the last few tokens are decoded at each call. Text is held back while it may still change: an unfinished
    UTF-8 character, or the beginning of a stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        shown: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        """`shown`: special tokens that the text has all the same, and how."""
        self.tokenizer, self.stop, self.shown = tokenizer, stop, shown
        self.text = ""  # everything decoded, held-back part included
        self.sent = 0  # characters already returned
        # Tokens whose text is taken, a list for each piece of it: the first of them must begin a character, since
        # some tokenizers decode none of a row of bytes that begins within one. The prompt's last tokens come first:
        # some decode a token differently at the start of a text.
        ends = [list(prompt[-n:]) for n in range(CONTEXT, CONTEXT + 4)]
        self.taken = [next((end for end in ends if not self._decode(end).startswith("\ufffd")), ends[0])]
        self.pending: list[int] = []  # tokens after those
        self.decoded = len(self._window())  # characters taken of the text of both

    def copy(self) -> "Detokenizer":
        """One that goes on from here by itself."""
        other = copy(self)
        other.taken, other.pending = [*self.taken], [*self.pending]
        return other

    def _window(self) -> str:
        return self._decode([*chain(*self.taken), *self.pending])

    def _decode(self, tokens: list[int]) -> str:
        options: Any = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        text, begin = "", 0
        for i, token in enumerate(tokens) if self.shown else ():
            if token in self.shown:
                text += cast(str, self.tokenizer.decode(tokens[begin:i], **options)) + self.shown[token]
                begin = i + 1
        return text + cast(str, self.tokenizer.decode(tokens[begin:], **options))

    def push(self, token: int, *, may_stop: bool = True) -> tuple[str, bool]:
        """The text that became certain with `token`, and whether a stop string ends it."""
        self.pending.append(token)
        text = self._window()
        unsure = text.endswith("\ufffd")
        if unsure and len(self.pending) < LONGEST:
            return "", False
        before = len(self.text)
        # After so many bytes that are no text, only the last of them can still begin a character.
        self.text += text[self.decoded : len(text) - unsure]
        self.taken.append(self.pending)
        self.pending = []
        while sum(map(len, self.taken[1:])) >= CONTEXT:
            del self.taken[0]
        self.decoded = len(self._window()) - unsure
        found = (self.text.find(s, max(0, before - len(s) + 1)) for s in self.stop) if may_stop else ()
        if cuts := [i for i in found if i >= 0]:
            self.text = self.text[: min(cuts)]
            return self._send(len(self.text)), True
        return self._send(len(self.text) - self._held()), False

    def whole(self, tokens: Sequence[int]) -> str:
        """The text of all tokens at once, where nobody reads along and no stop string may cut it."""
        self.text = self._decode([*self.taken[0], *tokens])[self.decoded :]
        return self._send(len(self.text))

    def finish(self) -> str:
        """What was held back, when nothing more comes."""
        self.text += self._window()[self.decoded :]
        return self._send(len(self.text))

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        return max((n for s in self.stop for n in range(1, len(s)) if self.text.endswith(s[:n])), default=0)

    def _send(self, upto: int) -> str:
        new, self.sent = self.text[self.sent : upto], max(self.sent, upto)
        return new
