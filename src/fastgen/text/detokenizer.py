"""Incremental text of generated tokens, cut at stop strings, for the library and the server alike."""

from collections.abc import Mapping, Sequence
from copy import copy
from itertools import chain, islice
from types import MappingProxyType
from typing import Any, cast
from weakref import WeakKeyDictionary

from fastgen.text import Tokenizer

NUM_REDECODED_TOKENS = 6  # minimum number of earlier tokens decoded again with each new token
REPLACEMENT_CHARACTER = "\ufffd"  # stands for bytes that are not UTF-8
MAX_PENDING_TOKENS = 8  # maximum number of tokens whose text is held back: more than any character has


class TokenizerInfo:
    """Special tokens and single-byte tokens of a tokenizer, which decoding needs."""

    _cache: "WeakKeyDictionary[Tokenizer, TokenizerInfo]" = WeakKeyDictionary()

    def __init__(self, tokenizer: Tokenizer) -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode  # already imported by the tokenizer's loader

        added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
        self.special_tokens = {id: token.content for id, token in added.items() if token.special}
        ids: Any = tokenizer.convert_tokens_to_ids([f"<0x{b:02X}>" for b in range(256)])
        self.replacement_token_ids: list[int] = [ids[b] for b in REPLACEMENT_CHARACTER.encode()]
        # SentencePiece's byte fallback: all 256 tokens exist and decode to bytes.
        has_fallback = len({*ids}) == 256 and None not in ids
        has_fallback = has_fallback and tokenizer.decode(self.replacement_token_ids) == REPLACEMENT_CHARACTER
        self.byte_values: dict[int, int] = {id: b for b, id in enumerate(ids)} if has_fallback else {}
        self.char_to_byte = {char: byte for byte, char in bytes_to_unicode().items()}  # the alphabet of byte-level BPE

    @classmethod
    def for_tokenizer(cls, tokenizer: Tokenizer) -> "TokenizerInfo":
        """Returns the tokenizer's information, computed once per tokenizer."""
        if (info := cls._cache.get(tokenizer)) is None:
            info = cls._cache[tokenizer] = cls(tokenizer)
        return info

    def replace_invalid_bytes(self, token_ids: Sequence[int]) -> tuple[list[int], int]:
        """Replaces each byte token that belongs to no character by the byte tokens of U+FFFD.

        The decoder of the tokenizers library gives up all characters of a run of bytes for one invalid byte. Also
        returns how many bytes at the end may still become a character.
        """
        result, run, num_incomplete = list[int](), list[int](), 0
        for token in (*token_ids, None):
            if token in self.byte_values:
                run.append(token)
                continue
            data, start = bytes(self.byte_values[t] for t in run), 0
            while start < len(run):
                try:
                    data[start:].decode()
                    result += run[start:]
                    break
                except UnicodeDecodeError as e:
                    result += run[start : start + e.start] + self.replacement_token_ids * (e.end - e.start)
                    num_incomplete = e.end - e.start if token is None and "unexpected end" in e.reason else 0
                    start += e.end
            run = []
            if token is not None:
                result.append(token)
        return result, num_incomplete


def token_to_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """Returns the UTF-8 bytes that a token appends to a text; for a special token, the bytes of its name.

    A token that is part of a character yields its own bytes where the tokenizer defines them, else U+FFFD.
    """
    info = TokenizerInfo.for_tokenizer(tokenizer)
    if token_id in info.special_tokens:
        return info.special_tokens[token_id].encode()
    if token_id in info.byte_values:
        return bytes([info.byte_values[token_id]])
    options: Any = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    prefix: Any = [tokenizer.convert_tokens_to_ids("a")]  # some tokenizers decode a text's first token differently
    if prefix[0] is None or tokenizer.decode(prefix, **options) != "a":
        prefix = []
    text = cast(str, tokenizer.decode([*prefix, token_id], **options))[len(prefix) :]
    spelling: Any = tokenizer.convert_ids_to_tokens(token_id) if REPLACEMENT_CHARACTER in text else ""
    if spelling and set(spelling) <= info.char_to_byte.keys():
        data = bytes(info.char_to_byte[char] for char in spelling)
        if data.decode(errors="replace") == text:
            return data
    return text.encode()


class StopString:
    """Searches a stream of characters for a text, in time linear in the stream's length (Knuth, Morris and Pratt).

    `failure_table[i]` is the length of the longest proper prefix of the text that is a suffix of its first i + 1
    characters. The table grows only as far as the stream has matched, and copies share it.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0  # length of the longest proper prefix of the text that ends the stream
        self.failure_table = [0]

    def push(self, new_text: str) -> int | None:
        """Adds characters; returns how many of them complete the first match, or None without a match."""
        text, num_matched, end = self.text, self.num_matched, None
        if not num_matched and text[0] not in new_text:
            return None
        for count, character in enumerate(new_text, 1):
            while num_matched and text[num_matched] != character:
                num_matched = self.failure_table[num_matched - 1]
            num_matched += text[num_matched] == character
            if num_matched > len(self.failure_table):
                self._extend_failure_table()
            if num_matched == len(text):
                end = end or count
                num_matched = self.failure_table[-1]
        self.num_matched = num_matched
        return end

    def _extend_failure_table(self) -> None:
        end, length = len(self.failure_table), self.failure_table[-1]
        while length and self.text[length] != self.text[end]:
            length = self.failure_table[length - 1]
        self.failure_table.append(length + (self.text[length] == self.text[end]))


class Detokenizer:
    """Converts a growing list of tokens to text and cuts the text at the first stop string.

    Each token decodes only the last few tokens again. Text that may still change is held back: an incomplete UTF-8
    character, or the beginning of a stop string. A character that the prompt's last tokens begin and the first
    generated tokens complete belongs to the text; U+FFFD that remains of the prompt's bytes does not.

    The text leaves out special tokens. A stop string that contains a special token's text still matches, and cuts the
    text where the stop string begins.
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
        include_stop_string: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        """`visible_special_tokens` maps special tokens that the text includes to their text; without
        `skip_special_tokens`, the text includes all of them. Stop strings do not count before `min_tokens` tokens. With
        `include_stop_string`, the text ends after the stop string.

        Without `stream_text` and stop strings, `flush` decodes everything at once: decoding each token of hundreds of
        sequences would take the host longer than the step takes the GPU.
        """
        self.tokenizer, self.visible_special_tokens, self.min_tokens = tokenizer, visible_special_tokens, min_tokens
        self.stream_text, self.include_stop_string = stream_text or bool(stop_strings), include_stop_string
        self.info = TokenizerInfo.for_tokenizer(tokenizer)
        if not skip_special_tokens:
            self.visible_special_tokens = visible_special_tokens = self.info.special_tokens
        # Not copied without a visible one: a tokenizer may have a thousand special tokens.
        self.skipped_tokens = skipped = self.info.special_tokens
        if visible_special_tokens:
            self.skipped_tokens = skipped = {t: s for t, s in skipped.items() if t not in visible_special_tokens}
        special = {s for s in stop_strings if any(text in s for text in skipped.values())}
        self.special_stop_strings = [StopString(s) for s in stop_strings if s in special]  # searched for in `raw_text`
        self.stop_strings = [StopString(s) for s in stop_strings if s not in special]
        self.num_tokens = 0
        self.text = ""  # decoded text, with the part that is held back
        self.num_sent_chars = 0  # characters of `text` returned so far
        self.stop_string: str | None = None  # that has cut the text
        self.raw_text = ""  # the text with special tokens, only for `special_stop_strings`
        self.special_token_spans: list[tuple[int, int]] = []  # (start, end) of special tokens in `raw_text`
        # Decoded tokens, one list per piece of text: the first list must begin a character. The prompt's last tokens
        # come first, since some tokenizers decode a text's first token differently.
        visible_prompt = (t for t in reversed(prompt_token_ids) if t not in skipped)
        last = [*islice(visible_prompt, NUM_REDECODED_TOKENS + 3)][::-1]
        ends = [last[-n:] for n in range(NUM_REDECODED_TOKENS, NUM_REDECODED_TOKENS + 4)]
        complete = (end for end in ends if not self._decode(end)[0].startswith(REPLACEMENT_CHARACTER))
        self.context_groups = [next(complete, ends[0])]
        self.pending_tokens: list[int] = []  # tokens after `context_groups` whose text is not taken yet
        # U+FFFD at the end of the prompt's text that may become a character.
        text, self.num_unfinished_prompt_chars = self._decode_window()
        self.num_decoded_chars = len(text) - self.num_unfinished_prompt_chars  # taken characters of the window's text

    def copy(self) -> "Detokenizer":
        """Returns an independent copy, for a fork of the sequence."""
        other = copy(self)
        other.context_groups, other.pending_tokens = [*self.context_groups], [*self.pending_tokens]
        other.special_token_spans = [*self.special_token_spans]
        other.stop_strings = [copy(s) for s in self.stop_strings]
        other.special_stop_strings = [copy(s) for s in self.special_stop_strings]
        return other

    def push(self, token_id: int, *, allow_stop: bool = True) -> tuple[str, bool]:
        """Adds a token; returns the text that became certain, and whether a stop string has cut the text."""
        self.num_tokens += 1
        is_skipped = token_id in self.skipped_tokens
        if not is_skipped:
            self.pending_tokens.append(token_id)
        if not self.stream_text:
            return "", False
        start, raw_start = len(self.text), len(self.raw_text)
        if is_skipped:
            if self.special_stop_strings:
                self.raw_text += self.skipped_tokens[token_id]
                self.special_token_spans.append((raw_start, len(self.raw_text)))
        else:
            text, num_incomplete = self._decode_window()
            if num_incomplete and len(self.pending_tokens) < MAX_PENDING_TOKENS:
                return "", False
            # After MAX_PENDING_TOKENS invalid bytes, only the last of them can still begin a character.
            self._append_text(text[self.num_decoded_chars : len(text) - num_incomplete])
            self.context_groups.append(self.pending_tokens)
            self.pending_tokens = []
            while sum(map(len, self.context_groups[1:])) >= NUM_REDECODED_TOKENS:
                del self.context_groups[0]
            text, num_incomplete = self._decode_window()
            self.num_decoded_chars = len(text) - num_incomplete
        matches = _find_matches(self.stop_strings, start, self.text)
        for match_start, match_end, stop_string in _find_matches(self.special_stop_strings, raw_start, self.raw_text):
            matches.append((self._to_text_offset(match_start), self._to_text_offset(match_end), stop_string))
        if matches and allow_stop and self.num_tokens >= self.min_tokens:
            match_start, match_end, self.stop_string = min(matches)
            self.text = self.text[: match_end if self.include_stop_string else match_start]
            return self._emit_text(len(self.text)), True
        raw_end = self._to_text_offset(_certain_end(self.special_stop_strings, self.raw_text))
        return self._emit_text(min(_certain_end(self.stop_strings, self.text), raw_end)), False

    def flush(self) -> str:
        """Returns the text that was held back, when no token follows; nothing after a stop string."""
        if self.stop_string is None:
            self._append_text(self._decode_window()[0][self.num_decoded_chars :])
        return self._emit_text(len(self.text))

    def _decode_window(self) -> tuple[str, int]:
        return self._decode([*chain(*self.context_groups), *self.pending_tokens])

    def _decode(self, token_ids: list[int]) -> tuple[str, int]:
        """Returns the tokens' text, and how many U+FFFD at its end the next token may turn into a character."""
        text, start = "", 0
        for i, token in enumerate(token_ids) if self.visible_special_tokens else ():
            if token in self.visible_special_tokens:
                text += self._decode_run(token_ids[start:i])[0] + self.visible_special_tokens[token]
                start = i + 1
        last_text, num_incomplete = self._decode_run(token_ids[start:])
        return text + last_text, num_incomplete

    def _decode_run(self, token_ids: list[int]) -> tuple[str, int]:
        """As `_decode`, for tokens without a visible special token."""
        num_incomplete, byte_values = 0, self.info.byte_values
        if byte_values and not byte_values.keys().isdisjoint(token_ids):
            token_ids, num_incomplete = self.info.replace_invalid_bytes(token_ids)
        options: Any = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        text = cast(str, self.tokenizer.decode(token_ids, **options))
        return text, num_incomplete if byte_values else int(text.endswith(REPLACEMENT_CHARACTER))

    def _append_text(self, text: str) -> None:
        """Appends text without the U+FFFD that the prompt's incomplete bytes have become."""
        if text:
            num_replaced = min(self.num_unfinished_prompt_chars, len(text) - len(text.lstrip(REPLACEMENT_CHARACTER)))
            self.text, self.num_unfinished_prompt_chars = self.text + text[num_replaced:], 0
            if self.special_stop_strings:
                self.raw_text += text[num_replaced:]

    def _to_text_offset(self, raw_offset: int) -> int:
        """Converts an offset in `raw_text` to the offset in `text`."""
        num_chars_after = len(self.raw_text) - raw_offset
        for start, end in reversed(self.special_token_spans):
            if end <= raw_offset:
                break
            num_chars_after -= end - max(start, raw_offset)
        return len(self.text) - num_chars_after

    def _emit_text(self, end: int) -> str:
        new_text, self.num_sent_chars = self.text[self.num_sent_chars : end], max(self.num_sent_chars, end)
        return new_text


def _find_matches(stop_strings: Sequence[StopString], num_old_chars: int, text: str) -> list[tuple[int, int, str]]:
    """Returns (start, end, stop string) of matches that the characters after the first `num_old_chars` complete."""
    new_text = text[num_old_chars:] if stop_strings else ""
    ends = [(s.text, num_old_chars + n) for s in stop_strings if (n := s.push(new_text)) is not None]
    return [(end - len(string), end, string) for string, end in ends]


def _certain_end(stop_strings: Sequence[StopString], text: str) -> int:
    """Returns the offset of the longest suffix of `text` that begins a stop string, or the length of `text`."""
    return len(text) - max((s.num_matched for s in stop_strings), default=0)
