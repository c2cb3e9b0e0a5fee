"""Text to tokens and back: any tokenizer of `transformers`, chat templates, and decoding as tokens arrive."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from importlib.util import find_spec
from itertools import chain, islice
from numbers import Integral
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast
from weakref import WeakKeyDictionary

from jinja2 import TemplateError

from fastgen.core import chat_template
from fastgen.core.control_tokens import ESCAPE, ControlTokens
from fastgen.core.types import Tokenizer

Message = dict[str, Any]
NUM_REDECODED_TOKENS = 6  # tokens decoded again with each new one, or a few more
REPLACEMENT_CHARACTER = "\ufffd"  # stands for bytes that are no text
MAX_PENDING_TOKENS = 8  # tokens that text is held back for: more than any character has
# Text, token ids (also an array), chat messages, or a mapping that holds one of the first two (`_from_mapping`).
Prompt = str | Sequence[int] | Sequence[Message] | Mapping[str, Any]
# What templates raise, and what the operators in them do: of a text and what is none, of objects far too deep, ...
TEMPLATE_ERRORS = (TemplateError, TypeError, AttributeError, LookupError, ArithmeticError, ValueError)
TEMPLATE_ERRORS += (RuntimeError, MemoryError)
ACCEPTED_PROMPTS = "prompts are a text, a list of token ids, a list of chat messages, or a list of these"
Tools = list[dict[str, Any]] | None  # functions that the chat template tells the model of


def load(path: Path) -> Tokenizer | None:
    """The tokenizer beside a checkpoint (or inside a `.gguf`); None if there is none."""
    if path.suffix == ".gguf":
        from fastgen.checkpoint import gguf  # whose reader takes a while to import

        return gguf.read_tokenizer(path)
    folder = path if path.is_dir() else path.parent
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
    if not any((folder / name).is_file() for name in files):
        return None
    try:
        tokenizer = _load_from_folder(folder)
    except ImportError as e:
        raise ValueError(f"{folder}: {e}") from e
    except Exception as e:  # the tokenizers library raises no other, and its callers whatever damaged values lead to
        raise ValueError(f"{folder}: the tokenizer's files cannot be read: {type(e).__name__}: {e}") from e
    length, template = tokenizer.model_max_length, tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template or ""]
    for name, value, fits in (
        ("model_max_length", length, isinstance(length, int | float) and not isinstance(length, bool)),
        ("chat_template", template, all(isinstance(text, str) for text in texts)),
    ):
        if not fits:
            raise ValueError(f"{folder}: tokenizer_config.json: {name} is of type {type(value).__name__}")
    return tokenizer


def _load_from_folder(folder: Path) -> Tokenizer:
    """Reads a folder's tokenizer with the tokenizers library. ImportError says what to install where it needs more."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    def need(file: str, *packages: tuple[str, str]) -> None:
        if missing := [name for module, name in packages if module not in sys.modules and not find_spec(module)]:
            names = " and ".join(missing)
            advice = f"pip install {' '.join(missing)}, or put the model's tokenizer.json into this folder"
            raise ImportError(f"{file} cannot be read without {names}: {advice}")

    def has(name: str) -> bool:
        return (folder / name).is_file()

    if has("tekken.json"):  # which transformers reads with mistral-common's own tokenizer, where that is installed
        if has("tokenizer.json"):
            return PreTrainedTokenizerFast.from_pretrained(folder)
        need("tekken.json", ("mistral_common", "mistral-common"))
        from transformers.integrations.mistral import convert_tekken_tokenizer  # type: ignore[reportPrivateImportUsage]

        tokenizer: Any = convert_tekken_tokenizer(str(folder / "tekken.json"))
        tokenizer.add_bos_token = True
        return tokenizer
    bare = has("tokenizer.model") and not (has("tokenizer.json") or has("vocab.json"))
    # A protobuf begins with the tag of its first field; tiktoken's files are lines of base64.
    sentencepiece = bare and (folder / "tokenizer.model").read_bytes()[:1] == b"\n"
    if bare and sentencepiece:
        need("tokenizer.model", ("sentencepiece", "sentencepiece"), ("google", "protobuf"))
    elif bare:
        need("tokenizer.model", ("tiktoken", "tiktoken"))
    # Code beside a tokenizer is not run, nor is the user asked for it.
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if sentencepiece and not has("tokenizer_config.json"):  # which would say so
        tokenizer.add_bos_token = True
    return tokenizer


def max_prompt_chars(tokenizer: Tokenizer | None, context_length: int) -> int:
    """The most characters that `context` tokens can be, so that a longer text need not be tokenized to be refused.

    Tokens of the vocabulary are written with a character a byte or more. A normalizer may compose characters (NFC), of
    up to four.
    """
    if tokenizer is None:
        return 0
    backend = getattr(tokenizer, "backend_tokenizer", None)
    composed = 1 if backend is not None and backend.normalizer is None else 4
    return context_length * composed * max(map(len, tokenizer.get_vocab()), default=1)


def is_single_prompt(prompts: object) -> bool:
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


def to_prompt_list(prompts: Any) -> list[Prompt]:
    """Lists the prompts of one or many, in order.

    A mapping with `input_ids`, as tokenizers return (`BatchEncoding`), holds a prompt a row; padding is left out.
    """
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        return _unpad_rows(prompts)
    if is_single_prompt(prompts):
        return [prompts]
    if isinstance(prompts, bytes | bytearray) or not isinstance(prompts, Iterable) or getattr(prompts, "ndim", 1) == 0:
        raise ValueError(f"{ACCEPTED_PROMPTS}, not {type(prompts).__name__}")
    if hasattr(prompts, "columns"):  # of pandas, polars or Arrow: it would be iterated by column
        raise ValueError(f"{ACCEPTED_PROMPTS}, not {type(prompts).__name__}: give one of its columns")
    return list(prompts)


def _unpad_rows(encoding: Mapping[str, Any]) -> list[Prompt]:
    """Returns the token ids of each row of a `BatchEncoding`, without the tokens that its attention mask leaves out."""

    def rows(name: str) -> list[Any]:
        values: Any = encoding[name]
        if hasattr(values, "tolist"):
            values = values.tolist()
        elif isinstance(values, Iterable) and not isinstance(values, str):
            values = [v.tolist() if hasattr(v, "tolist") else v for v in values]
        if isinstance(values, list):
            values = [values] if not values or isinstance(values[0], Integral) else values
            if all(isinstance(row, list | tuple) for row in values):
                return values
        raise ValueError(f"{name} of a prompt are token ids, or rows of them, not {type(encoding[name]).__name__}")

    ids = rows("input_ids")
    if encoding.get("attention_mask") is None:
        return ids
    masks = rows("attention_mask")
    if list(map(len, ids)) != list(map(len, masks)):
        raise ValueError("the input_ids and the attention_mask of a prompt must have the same shape")
    return [[t for t, kept in zip(row, mask, strict=True) if kept] for row, mask in zip(ids, masks, strict=True)]


def _prompt_from_mapping(prompt: Mapping[str, Any]) -> Any:
    """Returns the prompt in vLLM's `{"prompt": text}` or `{"prompt_token_ids": ids}`, or in one row of `input_ids`."""
    if "input_ids" in prompt:
        rows = _unpad_rows(prompt)
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


def encode(
    tokenizer: Tokenizer | None, prompt: Prompt, tools: Tools = None, *, special_tokens_in_content: str = "text"
) -> list[int]:
    """Token ids of a prompt; chat messages go through the tokenizer's chat template, up to the model's turn.

    `special_tokens_in_content`: whether a special token that is spelled in messages or tools is text or that token
    (`control`). In a prompt that is a text, it is that token.
    """
    if isinstance(prompt, Mapping):
        prompt = _prompt_from_mapping(prompt)
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
        try:
            tokens = tokenizer(prompt).input_ids
        except (TypeError, UnicodeEncodeError) as e:
            raise ValueError("the prompt is no text: half of a surrogate pair is in it") from e
        if not tokens:
            raise ValueError(f"the prompt {prompt!r} is no token for this tokenizer: it needs at least one")
        return tokens
    marked = special_tokens_in_content == "text"
    return encode_rendered(tokenizer, _apply_chat_template(tokenizer, prompt, tools, mark_special_tokens=marked))


def render(
    tokenizer: Tokenizer | None,
    messages: Sequence[Message],
    tools: Tools = None,
    *,
    special_tokens_in_content: str = "text",
) -> str:
    """The text that the chat template makes of messages, up to the model's turn; `encode_rendered` gives its tokens.

    Special tokens that are spelled in the content and stay text are marked in it (`fastgen.core.control_tokens`).
    """
    if tokenizer is None:
        raise ValueError("this model came without a tokenizer: give prompts as token ids")
    return _apply_chat_template(tokenizer, messages, tools, mark_special_tokens=special_tokens_in_content == "text")


def encode_rendered(tokenizer: Tokenizer, rendered: str) -> list[int]:
    """Token ids of a text that `render` made, or of an end of it."""
    if ESCAPE in rendered:
        return ControlTokens.for_tokenizer(tokenizer).encode(rendered)
    return tokenizer(rendered, add_special_tokens=False).input_ids


def _apply_chat_template(tokenizer: Tokenizer, chat: Sequence[Any], tools: Tools, *, mark_special_tokens: bool) -> str:
    for message in chat:
        if not isinstance(message, dict) or "role" not in message:
            raise ValueError(f"a chat message is a dict with 'role' and 'content', got {message!r}")
    if not tokenizer.chat_template:
        raise ValueError("this model's tokenizer has no chat template: give prompts as text or token ids")
    messages: Any = list(chat)
    try:
        if mark_special_tokens:
            mark = ControlTokens.for_tokenizer(tokenizer).escape
            messages, tools = mark(messages), mark(tools)
        options: Any = {
            "chat_template": chat_template.limit_template(tokenizer.get_chat_template(tools=tools)),
            "tools": tools,
        }
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
        return cast(str, text)
    except TEMPLATE_ERRORS as e:
        raise ValueError(f"the model's chat template refuses these messages: {e or type(e).__name__}") from e


class _TokenizerInfo:
    """What decoding needs to know of a tokenizer: its special tokens, and its tokens for single bytes."""

    _cache: "WeakKeyDictionary[Tokenizer, _TokenizerInfo]" = WeakKeyDictionary()

    def __init__(self, tokenizer: Tokenizer) -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode  # is there: it made the tokenizer

        added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
        self.special_tokens = {id: token.content for id, token in added.items() if token.special}
        ids: Any = tokenizer.convert_tokens_to_ids([f"<0x{b:02X}>" for b in range(256)])
        replacement = [ids[b] for b in REPLACEMENT_CHARACTER.encode()]
        # SentencePiece's, where all of them are there and mean bytes.
        fallback = len({*ids}) == 256 and None not in ids and tokenizer.decode(replacement) == REPLACEMENT_CHARACTER
        self.byte_values: dict[int, int] = {id: b for b, id in enumerate(ids)} if fallback else {}
        self.replacement_token_ids: list[int] = replacement
        self.char_to_byte = {letter: byte for byte, letter in bytes_to_unicode().items()}  # of byte-level BPE

    @classmethod
    def for_tokenizer(cls, tokenizer: Tokenizer) -> "_TokenizerInfo":
        """Returns those of a tokenizer, which are read once."""
        if (found := cls._cache.get(tokenizer)) is None:
            found = cls._cache[tokenizer] = cls(tokenizer)
        return found

    def replace_invalid_bytes(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """Replaces each byte that is part of no character by U+FFFD, itself spelled in bytes.

        The decoder of the tokenizers library gives up all characters of a row of bytes for one wrong byte. The second
        value counts the bytes at the end that may still become a character.
        """
        found, run, unsure = list[int](), list[int](), 0
        for token in (*tokens, None):
            if token in self.byte_values:
                run.append(token)
                continue
            data, begin = bytes(self.byte_values[t] for t in run), 0
            while begin < len(run):
                try:
                    data[begin:].decode()
                    found += run[begin:]
                    break
                except UnicodeDecodeError as e:
                    found += run[begin : begin + e.start] + self.replacement_token_ids * (e.end - e.start)
                    unsure = e.end - e.start if token is None and "unexpected end" in e.reason else 0
                    begin += e.end
            run = []
            if token is not None:
                found.append(token)
        return found, unsure


class StopString:
    """Finds a text in a stream of characters: the work is linear in the characters, however long the text is.

    After Knuth, Morris and Pratt: `fallback[i]` is the length of the longest beginning of the text that also ends its
    first i + 1 characters. It is filled in only as far as the stream has matched, and shared by copies.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0  # characters at the end of the stream that begin the text, and are not all of it
        self.failure_table = [0]

    def push(self, new: str) -> int | None:
        """Takes more characters; how many of them complete the text for the first time, None if none do."""
        text, matched, found = self.text, self.num_matched, None
        if not matched and text[0] not in new:
            return None
        for count, character in enumerate(new, 1):
            while matched and text[matched] != character:
                matched = self.failure_table[matched - 1]
            matched += text[matched] == character
            if matched > len(self.failure_table):
                self._extend_failure_table()
            if matched == len(text):
                found = found or count
                matched = self.failure_table[-1]
        self.num_matched = matched
        return found

    def _extend_failure_table(self) -> None:
        end = len(self.failure_table)
        length = self.failure_table[-1]
        while length and self.text[length] != self.text[end]:
            length = self.failure_table[length - 1]
        self.failure_table.append(length + (self.text[length] == self.text[end]))


def token_to_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """Returns what a token adds to a text that goes before it, as UTF-8; for a special token, its name.

    The bytes of a part of a character are those that the token stands for, where the tokenizer tells.
    """
    traits = _TokenizerInfo.for_tokenizer(tokenizer)
    if token_id in traits.special_tokens:
        return traits.special_tokens[token_id].encode()
    if token_id in traits.byte_values:
        return bytes([traits.byte_values[token_id]])
    options: Any = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before: Any = [tokenizer.convert_tokens_to_ids("a")]  # some decode a token differently at the start of a text
    if before[0] is None or tokenizer.decode(before, **options) != "a":
        before = []
    text = cast(str, tokenizer.decode([*before, token_id], **options))[len(before) :]
    spelled: Any = tokenizer.convert_ids_to_tokens(token_id) if REPLACEMENT_CHARACTER in text else ""
    if spelled and set(spelled) <= traits.char_to_byte.keys():
        data = bytes(traits.char_to_byte[letter] for letter in spelled)
        if data.decode(errors="replace") == text:
            return data
    return text.encode()


class Detokenizer:
    """Text of a growing list of tokens, and where a stop string cuts it.

    Only the last few tokens are decoded at each call. Text is held back while it may still change: an unfinished
    UTF-8 character, or the beginning of a stop string. A character that the prompt's last tokens begin and that these
    finish is part of the text; what remains U+FFFD of the prompt's bytes is not.

    Special tokens are left out of the text, but a stop string that contains one's text is found all the same, and cuts
    the text where it begins.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        stop_strings: Sequence[str] = (),
        visible_special_tokens: Mapping[int, str] = MappingProxyType({}),
        *,
        min_tokens: int = 0,
        stream_text: bool = True,
    ) -> None:
        """`shown`: special tokens that the text has all the same, and how. `min_tokens`: no stop string counts before.

        Where nobody reads along (`live` false, and no stop string) all text is made by `end`: a decode for each token
        of hundreds of requests would take the host longer than the step takes the GPU.
        """
        self.tokenizer, self.visible_special_tokens, self.min_tokens = tokenizer, visible_special_tokens, min_tokens
        self.stream_text = stream_text or bool(stop_strings)
        self.tokenizer_info = _TokenizerInfo.for_tokenizer(tokenizer)
        # Left out. `special` itself where none is shown: there may be a thousand.
        special = self.tokenizer_info.special_tokens
        self.skipped_special_tokens = (
            {t: text for t, text in special.items() if t not in visible_special_tokens}
            if visible_special_tokens
            else special
        )
        special_stop = {s for s in stop_strings if any(text in s for text in self.skipped_special_tokens.values())}
        self.special_stop_strings = [StopString(s) for s in stop_strings if s in special_stop]  # looked for in `raw`
        self.stop_strings = [StopString(s) for s in stop_strings if s not in special_stop]
        self.num_tokens = 0  # of tokens pushed
        self.text = ""  # everything decoded, held-back part included
        self.num_sent_chars = 0  # characters already returned
        self.raw_text = ""  # where a stop string asks for it: the text with special tokens
        self.special_token_spans: list[tuple[int, int]] = []  # and where in it those begin and end
        # Tokens whose text is taken, a list for each piece of it: the first of them must begin a character. The
        # prompt's last tokens come first: some tokenizers decode a token differently at the start of a text.
        last = [
            *islice(
                (t for t in reversed(prompt_token_ids) if t not in self.skipped_special_tokens),
                NUM_REDECODED_TOKENS + 3,
            )
        ][::-1]
        ends = [last[-n:] for n in range(NUM_REDECODED_TOKENS, NUM_REDECODED_TOKENS + 4)]
        self.context_groups = [
            next((end for end in ends if not self._decode(end)[0].startswith(REPLACEMENT_CHARACTER)), ends[0])
        ]
        self.pending_tokens: list[int] = []  # tokens after those
        text, self.num_unfinished_prompt_chars = (
            self._decode_window()
        )  # U+FFFD at the end of the prompt's text that may yet become a character
        self.num_decoded_chars = len(text) - self.num_unfinished_prompt_chars  # characters taken of the text of both

    def copy(self) -> "Detokenizer":
        """One that goes on from here by itself."""
        other = copy(self)
        other.context_groups, other.pending_tokens, other.special_token_spans = (
            [*self.context_groups],
            [*self.pending_tokens],
            [*self.special_token_spans],
        )
        other.stop_strings, other.special_stop_strings = (
            [copy(s) for s in self.stop_strings],
            [copy(s) for s in self.special_stop_strings],
        )
        return other

    def _decode_window(self) -> tuple[str, int]:
        return self._decode([*chain(*self.context_groups), *self.pending_tokens])

    def _decode(self, tokens: list[int]) -> tuple[str, int]:
        """Returns the text of tokens, and how many U+FFFD at its end may become a character with the next token."""
        text, begin = "", 0
        for i, token in enumerate(tokens) if self.visible_special_tokens else ():
            if token in self.visible_special_tokens:
                text += self._decode_plain(tokens[begin:i])[0] + self.visible_special_tokens[token]
                begin = i + 1
        last, unsure = self._decode_plain(tokens[begin:])
        return text + last, unsure

    def _decode_plain(self, tokens: list[int]) -> tuple[str, int]:
        unsure, options = 0, {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        if self.tokenizer_info.byte_values and not self.tokenizer_info.byte_values.keys().isdisjoint(tokens):
            tokens, unsure = self.tokenizer_info.replace_invalid_bytes(tokens)
        text = cast(str, self.tokenizer.decode(tokens, **options))
        return text, unsure if self.tokenizer_info.byte_values else int(text.endswith(REPLACEMENT_CHARACTER))

    def push(self, token: int, *, allow_stop: bool = True) -> tuple[str, bool]:
        """Takes a token. Returns the text that became certain with it, and whether a stop string ends it."""
        self.num_tokens += 1
        if not self.stream_text:
            return "", False
        before, raw_before = len(self.text), len(self.raw_text)
        if token in self.skipped_special_tokens:
            if self.special_stop_strings:
                self.raw_text += self.skipped_special_tokens[token]
                self.special_token_spans.append((raw_before, len(self.raw_text)))
        else:
            self.pending_tokens.append(token)
            text, unsure = self._decode_window()
            if unsure and len(self.pending_tokens) < MAX_PENDING_TOKENS:
                return "", False
            # After so many bytes that are no text, only the last of them can still begin a character.
            self._append_text(text[self.num_decoded_chars : len(text) - unsure])
            self.context_groups.append(self.pending_tokens)
            self.pending_tokens = []
            while sum(map(len, self.context_groups[1:])) >= NUM_REDECODED_TOKENS:
                del self.context_groups[0]
            text, unsure = self._decode_window()
            self.num_decoded_chars = len(text) - unsure
        cuts = self._match_stop_strings(self.stop_strings, before, self.text)
        cuts += map(
            self._to_visible_offset, self._match_stop_strings(self.special_stop_strings, raw_before, self.raw_text)
        )
        if cuts and allow_stop and self.num_tokens >= self.min_tokens:
            self.text = self.text[: min(cuts)]
            return self._emit_text(len(self.text)), True
        return self._emit_text(
            min(
                self._partial_match_start(self.text, self.stop_strings),
                self._to_visible_offset(self._partial_match_start(self.raw_text, self.special_stop_strings)),
            )
        ), False

    def flush(self, tokens: Sequence[int]) -> str:
        """Returns the text that was held back, when nothing comes after `tokens`, which are all of the completion."""
        if self.stream_text:
            self._append_text(self._decode_window()[0][self.num_decoded_chars :])
        else:
            shown = [t for t in tokens if t not in self.skipped_special_tokens]
            self._append_text(self._decode([*self.context_groups[0], *shown])[0][self.num_decoded_chars :])
        return self._emit_text(len(self.text))

    def _append_text(self, text: str) -> None:
        """Appends text, without the U+FFFD that the prompt's unfinished bytes have become."""
        if text:
            own = min(self.num_unfinished_prompt_chars, len(text) - len(text.lstrip(REPLACEMENT_CHARACTER)))
            self.text, self.num_unfinished_prompt_chars = self.text + text[own:], 0
            if self.special_stop_strings:
                self.raw_text += text[own:]

    def _to_visible_offset(self, raw_offset: int) -> int:
        """Returns where in the text a place of `raw` is."""
        after = len(self.raw_text) - raw_offset
        for begin, end in reversed(self.special_token_spans):
            if end <= raw_offset:
                break
            after -= end - max(begin, raw_offset)
        return len(self.text) - after

    def _match_stop_strings(self, stop_strings: Sequence[StopString], num_old_chars: int, text: str) -> list[int]:
        """Returns where stop strings begin that what is new of `text`, after `before`, completes."""
        new = text[num_old_chars:] if stop_strings else ""
        return [num_old_chars + n - len(s.text) for s in stop_strings if (n := s.push(new)) is not None]

    def _partial_match_start(self, text: str, stop_strings: Sequence[StopString]) -> int:
        """Returns where the longest end of the text begins that begins a stop string; its length if there is none."""
        return len(text) - max((s.num_matched for s in stop_strings), default=0)

    def _emit_text(self, end: int) -> str:
        new, self.num_sent_chars = self.text[self.num_sent_chars : end], max(self.num_sent_chars, end)
        return new
