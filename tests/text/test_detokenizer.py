"""Incremental text of generated tokens and its cut at stop strings, with both kinds of byte handling."""

import codecs
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer import BYTE_FALLBACK, BYTE_LEVEL, KINDS, QUICK, TEXT, TEXTS, byte_tokens
from transformers import PreTrainedTokenizerFast

from fastgen.text.detokenizer import MAX_PENDING_TOKENS, Detokenizer


def decode_at_once(detokenizer: Detokenizer, tokens: list[int]) -> str:
    """Returns the text that `flush` decodes where nothing is streamed."""
    for token in tokens:
        assert detokenizer.push(token) == ("", False)
    return detokenizer.flush()


def stream(detokenizer: Detokenizer, tokens: list[int]) -> list[str]:
    """Returns the text that each token makes certain, and the text that `flush` returns."""
    return [*(detokenizer.push(token)[0] for token in tokens), detokenizer.flush()]


def decode_after(kind: PreTrainedTokenizerFast, prompt: list[int], tokens: list[int]) -> str:
    """Returns the text of `tokens` after a prompt, decoded in one call."""
    return kind.decode(prompt + tokens, skip_special_tokens=True)[len(kind.decode(prompt, skip_special_tokens=True)) :]


@pytest.mark.parametrize("prompt", ["", "Hello", "é and a long prompt before it, longer than the context"])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_pieces_join_to_the_text(kind: str, text: str, prompt: str) -> None:
    """Pieces join to the decoded text, contain only complete characters, and arrive token by token."""
    tokenizer = KINDS[kind]
    before, tokens = tokenizer(prompt).input_ids, tokenizer(text).input_ids
    detokenizer = Detokenizer(tokenizer, before)
    got = stream(detokenizer, tokens)
    want = decode_after(tokenizer, before, tokens)
    assert "".join(got) == want == detokenizer.text
    assert want.strip() == text.strip() and len(want) > 5
    assert sum(map(bool, got)) > len(set(text)) / 2


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(prompt=TEXT, text=TEXT)
def test_any_text(kind: str, prompt: str, text: str) -> None:
    """Streaming, `flush` alone and one call agree for any prompt and text, wherever tokens cut characters."""
    before, tokens = KINDS[kind](prompt).input_ids, KINDS[kind](text).input_ids
    got = stream(Detokenizer(KINDS[kind], before), tokens)
    assert (
        "".join(got)
        == decode_after(KINDS[kind], before, tokens)
        == decode_at_once(Detokenizer(KINDS[kind], before, stream_text=False), tokens)
    )


@pytest.mark.parametrize("text", TEXTS)
def test_one_byte_tokens(text: str) -> None:
    """With one token per byte, a character appears with its last byte, unless U+FFFD makes it ambiguous."""
    detokenizer = Detokenizer(BYTE_LEVEL, [])
    for character in text:
        got = [detokenizer.push(token)[0] for token in byte_tokens(character.encode())]
        if "\ufffd" not in text:
            assert got == [""] * (len(got) - 1) + [character]
    detokenizer.flush()
    assert detokenizer.text == text


@QUICK
@given(
    runs=st.lists(
        st.one_of(
            st.binary(min_size=1, max_size=40),
            st.text(max_size=8).map(str.encode),
            st.sampled_from([b"\x80" * 13, b"\xf0\x9f\x98" * 9, b"\xe2\x82", b"\xff" * 30, "é€😀".encode()]),
        ),
        max_size=8,
    )
)
def test_any_bytes(runs: list[bytes]) -> None:
    """Runs of invalid bytes between texts decode as in one call."""
    data = b"".join(runs)
    got = stream(Detokenizer(BYTE_LEVEL, []), byte_tokens(data))
    assert "".join(got) == data.decode(errors="replace")


@QUICK
@given(tokens=st.lists(st.integers(2, len(BYTE_LEVEL) - 1), max_size=60), cut=st.integers(0, 20))
def test_any_tokens(tokens: list[int], cut: int) -> None:
    """Random tokens of several bytes, as an untrained model generates, decode as in one call."""
    got = stream(Detokenizer(BYTE_LEVEL, []), tokens)
    assert "".join(got) == BYTE_LEVEL.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_prompt_that_ends_in_a_run_of_bytes(count: int) -> None:
    """The prompt's context begins at the start of a character, without which the run of bytes would be invalid."""
    tokens = BYTE_FALLBACK("😀" * 5).input_ids
    assert len(tokens) == 21  # the first is a blank
    cut = 1 + 4 * count
    assert "".join(stream(Detokenizer(BYTE_FALLBACK, tokens[:cut]), tokens[cut:])) == "😀" * (5 - count)


def each_byte(e: UnicodeError) -> tuple[str, int]:
    """Replaces each byte that belongs to no character by U+FFFD, as SentencePiece does."""
    assert isinstance(e, UnicodeDecodeError)
    return "\ufffd" * (e.end - e.start), e.end


codecs.register_error("each_byte", each_byte)


def reference(kind: str, tokens: list[int]) -> str:
    """Returns the text of tokens without special tokens, decoded in one call."""
    if kind == "level":
        return BYTE_LEVEL.decode(tokens, skip_special_tokens=True)
    pieces = [BYTE_FALLBACK.convert_ids_to_tokens(t) for t in tokens if t not in (1, 2)]
    data = b"".join(bytes([int(p[3:5], 16)]) if p.startswith("<0x") else p.replace("▁", " ").encode() for p in pieces)
    return data.decode(errors="each_byte").removeprefix(" ")


RUNS = [
    b"\xf0\x9f\x98",
    b"\x80",
    b"\x9f\x98\x80",
    b"\xe2\x82",
    "é€😀".encode(),
    b"a ",
    "\ufffd".encode(),
    b"\xf0\x9f\x98\x80",
]


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(data=st.data(), cut=st.integers(0, 40), fork=st.integers(0, 40))
def test_any_tokens_after_any(kind: str, data: st.DataObject, cut: int, fork: int) -> None:
    """Streaming, `flush` alone and a fork agree, wherever the prompt ends; no text is lost or repeated."""
    any_token = st.integers(0, len(KINDS[kind]) - 1).map(lambda t: [t])
    runs = st.sampled_from(RUNS).map(lambda b: byte_tokens(b) if kind == "level" else [3 + x for x in b])
    tokens = sum(data.draw(st.lists(st.one_of(any_token, runs), max_size=30)), list[int]())
    prompt, tokens = tokens[:cut], tokens[cut:]
    detokenizer = Detokenizer(KINDS[kind], prompt)
    begun = "".join(detokenizer.push(t)[0] for t in tokens[:fork])
    streams = [begun + "".join(stream(d, tokens[fork:])) for d in (detokenizer.copy(), detokenizer)]
    at_once = Detokenizer(KINDS[kind], prompt, stream_text=False)
    assert all(at_once.push(t) == ("", False) for t in tokens)
    before, everything = reference(kind, prompt), reference(kind, prompt + tokens)
    # Characters of the prompt that the completion does not change belong to the prompt.
    want = everything[len(os.path.commonprefix([before, everything])) :]
    assert streams == [want, want] and at_once.flush() == at_once.text == want


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("known", [1, 2, 3])
def test_a_prompt_that_ends_within_a_character(kind: str, known: int) -> None:
    """A character that the completion finishes belongs to the completion; an unfinished one to the prompt."""

    def tokens(data: bytes) -> list[int]:
        return byte_tokens(data) if kind == "level" else [3 + b for b in data]

    smile = "😀".encode()
    prompt = KINDS[kind]("a ab").input_ids + tokens(smile[:known])
    for rest, want in ((smile[known:] + b" two", "😀 two"), (b" two", " two"), (b"", ""), (smile, "😀")):
        assert "".join(stream(Detokenizer(KINDS[kind], prompt), tokens(rest))) == want
        assert decode_at_once(Detokenizer(KINDS[kind], prompt, stream_text=False), tokens(rest)) == want


@pytest.mark.parametrize(
    ("text", "stop", "want"),
    [
        ("ab<|im_start|>cd", ("<|im_start|>",), "ab"),
        ("ab<|im_end|>cd", ("<|im_start|>",), None),
        ("abx<|im_end|>cd", ("x<|im_end|>",), "ab"),
        ("aby<|im_end|>cd", ("x<|im_end|>",), None),
        ("abx<|im_end|>cd", ("<|im_end|>cd",), "abx"),
        ("ab<|im_end|>c<|im_start|>d", ("<|im_end|>c<|im_start|>",), "ab"),
        ("a<|im_end|><|im_end|>b<|im_start|>c", ("b<|im_start|>", "zz"), "a"),
        ("a<|im_end|>b", ("ab",), ""),  # without a special token, the stop string is searched for in the text
        ("a<|im_end|>bc", ("bc", "<|im_end|>b"), "a"),  # the earliest in the text
        ("a<|im_end|>b", ("im_end",), None),
        ("é<|im_start|>€", ("é<|im_start|>€",), ""),
    ],
)
@pytest.mark.parametrize("as_text", [False, True])
def test_stop_strings_with_special_tokens(text: str, stop: tuple[str, ...], want: str | None, as_text: bool) -> None:
    """Stop strings match special tokens, whether sampled or spelled, and no part of a stop string is returned."""
    tokens = BYTE_LEVEL(text).input_ids
    if as_text:
        tokens, places = byte_tokens(text.encode()), [text.find(s) for s in stop if s in text]
        want = text[: min(places)] if places else None
    detokenizer, got, stopped = Detokenizer(BYTE_LEVEL, [], stop), "", False
    for token in tokens:
        piece, stopped = detokenizer.push(token)
        got += piece
        if stopped:
            break
    got += "" if stopped else detokenizer.flush()
    final = BYTE_LEVEL.decode(tokens, skip_special_tokens=True) if want is None else want
    assert (got, detokenizer.text, stopped) == (final, final, want is not None)


def test_min_tokens_and_special_tokens() -> None:
    """Stop strings do not count before `min_tokens` tokens."""
    tokens = BYTE_LEVEL("<|im_start|>a<|im_start|>b").input_ids
    detokenizer = Detokenizer(BYTE_LEVEL, [], ("<|im_start|>",), min_tokens=2)
    assert [detokenizer.push(t) for t in tokens[:3]] == [("", False), ("a", False), ("", True)]


def test_special_tokens_are_not_text() -> None:
    """Special tokens are left out and do not change the text around them."""
    a, b = BYTE_LEVEL("Hello, wor").input_ids, BYTE_LEVEL("ld! é").input_ids
    special = BYTE_LEVEL.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    assert "".join(stream(Detokenizer(BYTE_LEVEL, special), a + special + b + special)) == "Hello, world! é"


class Counting:
    """A tokenizer that records how many tokens each call decodes."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def decode(self, tokens: list[int], **options: Any) -> str:
        self.lengths.append(len(tokens))
        return BYTE_LEVEL.decode(tokens, **options)


@pytest.mark.parametrize("data", [b"\x80", b"\xf0\x9f\x98", b"a", "€".encode()])
def test_work_and_delay_are_bounded(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token costs at most two short decodes, and holds text back for at most MAX_PENDING_TOKENS tokens."""
    tokens = byte_tokens(data * (3000 // len(data)))
    counting = Counting()
    detokenizer = Detokenizer(BYTE_LEVEL, byte_tokens(b"x" * 500))
    monkeypatch.setattr(detokenizer, "tokenizer", counting)
    waited = [0]
    for token in tokens:
        waited.append(0 if detokenizer.push(token)[0] else waited[-1] + 1)
    assert max(counting.lengths) <= 24 and len(counting.lengths) <= 2 * len(tokens)
    assert max(waited) <= MAX_PENDING_TOKENS


@pytest.mark.parametrize("step", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "stop", "want"),
    [
        ("Hello END more", ("END",), "Hello "),
        ("Hello END more", ("more", "END"), "Hello "),  # the first match counts, in any order of stop strings
        ("xENDSTOPy", ("STOP", "NDS"), "xE"),
        ("EEEND", ("END",), "EE"),  # a false start within a start
        ("aab", ("aaab", "ab"), "a"),
        ("END", ("END",), ""),
        ("EN", ("END",), "EN"),  # held back, then released at the end
        ("né–d €fin", ("€f",), "né–d "),
        ("no stop here", ("END", "STOP"), None),
        ("without stop strings", (), None),
    ],
)
def test_stop_strings(text: str, stop: tuple[str, ...], want: str | None, step: int) -> None:
    """The text ends before the first stop string, wherever tokens begin and end."""
    tokens = byte_tokens(text.encode())
    if step == 100:
        tokens = BYTE_LEVEL(text).input_ids
    detokenizer = Detokenizer(BYTE_LEVEL, tokens[:1] * step, stop)
    got, stopped = [], False
    for token in tokens:
        piece, stopped = detokenizer.push(token)
        got.append(piece)
        if stopped:
            break
    if not stopped:
        got.append(detokenizer.flush())
    final = text if want is None else want
    assert "".join(got) == detokenizer.text == final
    assert stopped == any(s in text for s in stop)


def test_overlapping_stop_strings() -> None:
    """The shorter of "ab" and "abc" stops as soon as it is complete; no part of either is returned."""
    for stop in (("ab", "abc"), ("abc", "ab")):
        detokenizer = Detokenizer(BYTE_LEVEL, [], stop)
        x, a, b = byte_tokens(b"xab")
        assert [detokenizer.push(t) for t in (x, a, b)] == [("x", False), ("", False), ("", True)]
        assert detokenizer.text == "x"


def test_beginning_of_a_stop_string_is_held_back() -> None:
    """Text is held back only as long as it may become a stop string."""
    detokenizer = Detokenizer(BYTE_LEVEL, [], ("END", "NX"))
    sent = [detokenizer.push(token) for token in byte_tokens(b"aENEz")]
    assert sent == [("a", False), ("", False), ("", False), ("EN", False), ("Ez", False)]
    assert detokenizer.flush() == ""
    assert detokenizer.push(byte_tokens(b"E")[0]) == ("", False)
    assert detokenizer.flush() == "E" and detokenizer.text == "aENEzE"


@QUICK
@given(
    words=st.lists(st.text("abc", min_size=1, max_size=4), max_size=12),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    early=st.integers(0, 6),
)
def test_any_stop_strings(words: list[str], stop: list[str], early: int) -> None:
    """After each token, cut and held-back text equal those of a plain search."""
    tokens = [t for word in words for t in BYTE_LEVEL(word).input_ids]
    detokenizer = Detokenizer(BYTE_LEVEL, [], tuple(stop))
    text = sent = ""
    for n, token in enumerate(tokens):
        old, may_stop = len(text), n >= early
        text += BYTE_LEVEL.decode([token])
        found = [i for s in stop for i in range(len(text)) if text.startswith(s, i) and i + len(s) > old]
        piece, stopped = detokenizer.push(token, allow_stop=may_stop)
        sent += piece
        assert stopped == (may_stop and bool(found))
        if stopped:
            assert sent == detokenizer.text == text[: min(found)]
            return
        rests = [text[i:] for i in range(len(text))]
        held = max((len(r) for r in rests if any(s.startswith(r) and s != r for s in stop)), default=0)
        assert sent == text[: max(len(text) - held, len(sent) - len(piece))]
    assert sent + detokenizer.flush() == detokenizer.text == text


def test_stop_strings_that_do_not_count_yet() -> None:
    """A stop string before `min_tokens` is text; a later match that overlaps it still counts."""
    detokenizer = Detokenizer(BYTE_LEVEL, [], ("aa",))
    a, b = byte_tokens(b"ab")
    assert detokenizer.push(a, allow_stop=False) == ("", False)
    assert detokenizer.push(a, allow_stop=False) == ("a", False)
    assert detokenizer.push(b) == ("ab", False)  # the earlier match no longer counts
    assert [detokenizer.push(t) for t in (a, a)] == [("", False), ("", True)]
    assert detokenizer.text == "aab"
