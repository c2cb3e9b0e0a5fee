"""Prompts to tokens, and text as tokens arrive, with tokenizers of both kinds of byte handling."""

import codecs
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastgen.core import tokenizer as ours
from fastgen.core.request import pair_prompts
from fastgen.core.tokenizer import MAX_PENDING_TOKENS, Detokenizer, encode, is_single_prompt, to_prompt_list

QUICK = settings(derandomize=True, database=None, deadline=None, max_examples=150)
TEXT = st.text(st.one_of(st.sampled_from("ab é€😀👍🏽\ufffd"), st.characters(codec="utf-8")), max_size=20)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
TEXTS = [
    "Hello, world! It's a test.",
    "naïve café – “quoted” … €100",
    "漢字とかな、한국어 и кириллица",
    "👩‍👩‍👧‍👦 family, 🇩🇪 flag, 👍🏽 skin, e\u0301 accent",
    "  two  spaces\n\n\tand\r\nlines  ",
    "a\ufffdb \ufffd\ufffd literal replacement characters \ufffd",
    "abcabcababab abc ab a b c",
]


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind, as of Llama 3 and Qwen: any byte may be a token, and tokens may end within a character."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    made.add_special_tokens({"additional_special_tokens": special[:1]})
    made.chat_template = TEMPLATE
    return made


def byte_fallback() -> PreTrainedTokenizerFast:
    """SentencePiece's kind, as of Mistral: characters, and bytes for those that are not in the vocabulary."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdeHlo,w", "▁a", "ab"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("a", "b")]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


BYTE_LEVEL, BYTE_FALLBACK = byte_level(), byte_fallback()
KINDS = {"level": BYTE_LEVEL, "fallback": BYTE_FALLBACK}


def byte_tokens(data: bytes) -> list[int]:
    """A token a byte. Printable bytes stand for themselves in GPT-2's alphabet, the rest follow from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in visible]
    letters = {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(rest)}
    return [BYTE_LEVEL.convert_tokens_to_ids(letters[b]) for b in data]


def pieces(detokenizer: Detokenizer, tokens: list[int]) -> list[str]:
    """What each token gave, and the rest."""
    return [*(detokenizer.push(token)[0] for token in tokens), detokenizer.flush([])]


def whole(kind: PreTrainedTokenizerFast, prompt: list[int], tokens: list[int]) -> str:
    """The text of `tokens` after a prompt, decoded at once."""
    return kind.decode(prompt + tokens, skip_special_tokens=True)[len(kind.decode(prompt, skip_special_tokens=True)) :]


@pytest.mark.parametrize("prompt", ["", "Hello", "é and a long prompt before it, longer than the context"])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_text(kind: str, text: str, prompt: str) -> None:
    """Joined, and never with half a character: every piece is a part of the text itself."""
    tokenizer = KINDS[kind]
    before, tokens = tokenizer(prompt).input_ids, tokenizer(text).input_ids
    detokenizer = Detokenizer(tokenizer, before)
    got = pieces(detokenizer, tokens)
    want = whole(tokenizer, before, tokens)
    assert "".join(got) == want == detokenizer.text
    assert want.strip() == text.strip() and len(want) > 5
    assert sum(map(bool, got)) > len(set(text)) / 2  # it arrives bit by bit


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(prompt=TEXT, text=TEXT)
def test_any_text(kind: str, prompt: str, text: str) -> None:
    """Whatever the text and the prompt, and where tokens cut the characters of both."""
    before, tokens = KINDS[kind](prompt).input_ids, KINDS[kind](text).input_ids
    got = pieces(Detokenizer(KINDS[kind], before), tokens)
    assert (
        "".join(got)
        == whole(KINDS[kind], before, tokens)
        == Detokenizer(KINDS[kind], before, stream_text=False).flush(tokens)
    )


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_byte_by_byte(text: str) -> None:
    """A token a byte: each character comes with its last byte, if no replacement character leaves doubt."""
    detokenizer = Detokenizer(BYTE_LEVEL, [])
    for character in text:
        got = [detokenizer.push(token)[0] for token in byte_tokens(character.encode())]
        if "\ufffd" not in text:
            assert got == [""] * (len(got) - 1) + [character]
    detokenizer.flush([])
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
    """Bytes that are no text, of any length and place, with text between: as decoded at once."""
    data = b"".join(runs)
    got = pieces(Detokenizer(BYTE_LEVEL, []), byte_tokens(data))
    assert "".join(got) == data.decode(errors="replace")


@QUICK
@given(tokens=st.lists(st.integers(2, len(BYTE_LEVEL) - 1), max_size=60), cut=st.integers(0, 20))
def test_any_tokens(tokens: list[int], cut: int) -> None:
    """Random tokens of more than a byte, as an untrained model writes them."""
    got = pieces(Detokenizer(BYTE_LEVEL, []), tokens)
    assert "".join(got) == BYTE_LEVEL.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_prompt_that_ends_in_a_row_of_bytes(count: int) -> None:
    """The prompt's last tokens are read from the beginning of a character: the row would be none otherwise."""
    tokens = BYTE_FALLBACK("😀" * 5).input_ids
    assert len(tokens) == 21  # the first is a blank
    cut = 1 + 4 * count
    assert "".join(pieces(Detokenizer(BYTE_FALLBACK, tokens[:cut]), tokens[cut:])) == "😀" * (5 - count)


def each_byte(e: UnicodeError) -> tuple[str, int]:
    """U+FFFD for every byte that is part of no character, as SentencePiece has it."""
    assert isinstance(e, UnicodeDecodeError)
    return "\ufffd" * (e.end - e.start), e.end


codecs.register_error("each_byte", each_byte)


def reference(kind: str, tokens: list[int]) -> str:
    """The text of tokens, decoded at once, without special ones."""
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
    """Streamed, at once and after a fork alike, wherever the prompt ends; nothing is lost and nothing told twice."""
    some = st.integers(0, len(KINDS[kind]) - 1).map(lambda t: [t])
    bytes_ = st.sampled_from(RUNS).map(lambda b: byte_tokens(b) if kind == "level" else [3 + x for x in b])
    tokens = sum(data.draw(st.lists(st.one_of(some, bytes_), max_size=30)), list[int]())
    prompt, tokens = tokens[:cut], tokens[cut:]
    detokenizer = Detokenizer(KINDS[kind], prompt)
    begun = "".join(detokenizer.push(t)[0] for t in tokens[:fork])
    streams = [begun + "".join(pieces(d, tokens[fork:])) for d in (detokenizer.copy(), detokenizer)]
    at_once = Detokenizer(KINDS[kind], prompt, stream_text=False)
    assert all(at_once.push(t) == ("", False) for t in tokens)
    before, everything = reference(kind, prompt), reference(kind, prompt + tokens)
    # Characters of the prompt that the completion does not change are the prompt's.
    want = everything[len(os.path.commonprefix([before, everything])) :]
    assert streams == [want, want] and at_once.flush(tokens) == at_once.text == want


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("known", [1, 2, 3])
def test_a_prompt_that_ends_within_a_character(kind: str, known: int) -> None:
    """The completion has the character it finishes, and all after it; what it does not finish is the prompt's."""

    def tokens(data: bytes) -> list[int]:
        return byte_tokens(data) if kind == "level" else [3 + b for b in data]

    smile = "😀".encode()
    prompt = KINDS[kind]("a ab").input_ids + tokens(smile[:known])
    for rest, want in ((smile[known:] + b" two", "😀 two"), (b" two", " two"), (b"", ""), (smile, "😀")):
        assert "".join(pieces(Detokenizer(KINDS[kind], prompt), tokens(rest))) == want
        assert Detokenizer(KINDS[kind], prompt, stream_text=False).flush(tokens(rest)) == want


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
        ("a<|im_end|>b", ("ab",), ""),  # others are found in the text, which has no special tokens
        ("a<|im_end|>bc", ("bc", "<|im_end|>b"), "a"),  # the earliest in the text
        ("a<|im_end|>b", ("im_end",), None),
        ("é<|im_start|>€", ("é<|im_start|>€",), ""),
    ],
)
@pytest.mark.parametrize("as_text", [False, True])
def test_stop_strings_with_special_tokens(text: str, stop: tuple[str, ...], want: str | None, as_text: bool) -> None:
    """They stop, whether the special token was drawn or spelled, and nothing of them is ever sent."""
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
    got += "" if stopped else detokenizer.flush([])
    final = BYTE_LEVEL.decode(tokens, skip_special_tokens=True) if want is None else want
    assert (got, detokenizer.text, stopped) == (final, final, want is not None)


def test_min_tokens_and_special_tokens() -> None:
    """Before so many tokens, no stop string counts."""
    tokens = BYTE_LEVEL("<|im_start|>a<|im_start|>b").input_ids
    detokenizer = Detokenizer(BYTE_LEVEL, [], ("<|im_start|>",), min_tokens=2)
    assert [detokenizer.push(t) for t in tokens[:3]] == [("", False), ("a", False), ("", True)]


def test_special_tokens_are_not_text() -> None:
    """They are left out, and do not disturb what is around them."""
    a, b = BYTE_LEVEL("Hello, wor").input_ids, BYTE_LEVEL("ld! é").input_ids
    special = BYTE_LEVEL.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    assert "".join(pieces(Detokenizer(BYTE_LEVEL, special), a + special + b + special)) == "Hello, world! é"


class Counting:
    """A tokenizer that notes how many tokens it decodes."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def decode(self, tokens: list[int], **options: Any) -> str:
        self.lengths.append(len(tokens))
        return BYTE_LEVEL.decode(tokens, **options)


@pytest.mark.parametrize("data", [b"\x80", b"\xf0\x9f\x98", b"a", "€".encode()])
def test_work_and_delay_are_bounded(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes, a token costs two short decodes, and text waits for no more than a few tokens."""
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
        ("Hello END more", ("more", "END"), "Hello "),  # the earliest, in whatever order they are given
        ("xENDSTOPy", ("STOP", "NDS"), "xE"),
        ("EEEND", ("END",), "EE"),  # a false start within a start
        ("aab", ("aaab", "ab"), "a"),
        ("END", ("END",), ""),
        ("EN", ("END",), "EN"),  # held back, then released at the end
        ("né–d €fin", ("€f",), "né–d "),
        ("no stop here", ("END", "STOP"), None),
        ("nothing asked for", (), None),
    ],
)
def test_stop_strings(text: str, stop: tuple[str, ...], want: str | None, step: int) -> None:
    """Cut at the first stop string, wherever tokens begin and end."""
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
        got.append(detokenizer.flush([]))
    final = text if want is None else want
    assert "".join(got) == detokenizer.text == final
    assert stopped == any(s in text for s in stop)


def test_overlapping_stop_strings() -> None:
    """The shorter of "ab" and "abc" decides when it is complete; nothing of either is ever sent."""
    for stop in (("ab", "abc"), ("abc", "ab")):
        detokenizer = Detokenizer(BYTE_LEVEL, [], stop)
        x, a, b = byte_tokens(b"xab")
        assert [detokenizer.push(t) for t in (x, a, b)] == [("x", False), ("", False), ("", True)]
        assert detokenizer.text == "x"


def test_what_is_held_back() -> None:
    """The beginning of a stop string, and only as long as it may become one."""
    detokenizer = Detokenizer(BYTE_LEVEL, [], ("END", "NX"))
    sent = [detokenizer.push(token) for token in byte_tokens(b"aENEz")]
    assert sent == [("a", False), ("", False), ("", False), ("EN", False), ("Ez", False)]
    assert detokenizer.flush([]) == ""
    assert detokenizer.push(byte_tokens(b"E")[0]) == ("", False)
    assert detokenizer.flush([]) == "E" and detokenizer.text == "aENEzE"


@QUICK
@given(
    words=st.lists(st.text("abc", min_size=1, max_size=4), max_size=12),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    early=st.integers(0, 6),
)
def test_any_stop_strings(words: list[str], stop: list[str], early: int) -> None:
    """After each token: the cut of a plain search, nothing sent that is cut later, nothing held without need."""
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
    assert sent + detokenizer.flush([]) == detokenizer.text == text


def test_may_stop_only_later() -> None:
    """Where min_tokens forbids stopping, a stop string is text; a later one that overlaps it still counts."""
    detokenizer = Detokenizer(BYTE_LEVEL, [], ("aa",))
    a, b = byte_tokens(b"ab")
    assert detokenizer.push(a, allow_stop=False) == ("", False)
    assert detokenizer.push(a, allow_stop=False) == ("a", False)
    assert detokenizer.push(b) == ("ab", False)  # the one that is over does not count
    assert [detokenizer.push(t) for t in (a, a)] == [("", False), ("", True)]
    assert detokenizer.text == "aab"


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi é"}]


def test_encode() -> None:
    """Text, tokens as they are, and messages up to the model's turn."""
    text = "Hello, world! 漢字"
    assert encode(BYTE_LEVEL, text) == BYTE_LEVEL(text).input_ids
    ids = [5, 0, 7]
    assert encode(BYTE_LEVEL, ids) == encode(None, ids) == encode(None, tuple(ids)) == ids
    assert encode(None, ids) is not ids  # it is kept, and the caller's may change
    chat = "<|im_start|>system: Be brief.<|im_end|><|im_start|>user: Hi é<|im_end|><|im_start|>assistant: "
    for messages in (MESSAGES, tuple(MESSAGES)):
        assert encode(BYTE_LEVEL, messages) == BYTE_LEVEL(chat).input_ids


@pytest.mark.parametrize("ids", [np.array([5, 0, 7]), torch.tensor([5, 0, 7]), list(np.array([5, 0, 7]))])
def test_encode_arrays(ids: Any) -> None:
    """Token ids come as arrays too; what is kept are ints."""
    assert is_single_prompt(ids)
    tokens = unchecked(encode)(None, ids)
    assert tokens == [5, 0, 7] and {type(t) for t in tokens} == {int}


def unchecked(function: Callable) -> Callable:
    """Without the tests' check of types, for what the annotations do not allow."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (5, "not int"),
        (None, "not NoneType"),
        ({"role": "user"}, r"a mapping as a prompt is .* got the keys \['role'\]"),
        ({"prompt": 5}, "a mapping as a prompt"),
        ({"prompt": "a", "multi_modal_data": {"image": 1}}, r"\['multi_modal_data', 'prompt'\]"),
        ({"prompt_token_ids": "a"}, "a mapping as a prompt"),
        ({"messages": MESSAGES}, "a mapping as a prompt"),
        ({}, "a mapping as a prompt"),
        ({"input_ids": [[1, 2], [3]]}, "have 2 rows"),
        (b"bytes", "not bytes"),
        ("a\ud800", "half of a surrogate pair"),
        ({"input_ids": "abc"}, "input_ids of a prompt are token ids, or rows of them, not str"),
        ({"input_ids": None}, "not NoneType"),
        ({"input_ids": [[1], 5]}, "rows of them"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "the same shape"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 1], [1, 1]]}, "the same shape"),
        ("", "at least one token"),
        ([], "at least one token"),
        ((), "at least one token"),
        ([1, "a"], "a chat message is a dict with 'role' and 'content', got 1"),
        ([1, 2.5], "a chat message is a dict"),
        ([True, False], "a chat message is a dict"),
        (["two", "texts"], "a chat message is a dict"),
        ([{"content": "no role"}], "a chat message is a dict"),
        ([MESSAGES[0], "text"], "a chat message is a dict"),
    ],
)
def test_what_is_no_prompt(prompt: Any, said: str) -> None:
    """Each mistake with what is wanted instead."""
    with pytest.raises(ValueError, match=said):
        unchecked(encode)(BYTE_LEVEL, prompt)


class Table:
    """What a data frame of pandas is like."""

    columns = ("prompt", "answer")

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        *((x, f"not {type(x).__name__}") for x in (None, 5, True, b"ab", Path("x"), np.array(5), torch.tensor(5))),
        (Table(), "not Table: give one of its columns"),
    ],
)
def test_what_are_no_prompts(prompts: Any, said: str) -> None:
    """A table is iterated by its columns' names, which are nobody's prompts."""
    with pytest.raises(ValueError, match=said):
        unchecked(to_prompt_list)(prompts)


@pytest.mark.parametrize(
    ("sampling", "kind"),
    [(5, "int"), ({"n": 1}, "dict"), ("x", "str"), ([{}, {}], "a list with dict"), ([None, 0], "a list with int")],
)
def test_what_is_no_sampling(sampling: Any, kind: str) -> None:
    """Settings of another kind are refused before anything runs."""
    with pytest.raises(ValueError, match=f"one SamplingParams or a list of them, got {kind}"):
        unchecked(pair_prompts)([[1], [2]], sampling)


@pytest.mark.parametrize("prompt", ["text", MESSAGES])
def test_encode_without_a_tokenizer(prompt: Any) -> None:
    """Only token ids do."""
    with pytest.raises(ValueError, match="without a tokenizer"):
        encode(None, prompt)


@pytest.mark.parametrize(
    ("prompts", "lists"),
    [
        ({"prompt": "Hi"}, ["Hi"]),
        ({"prompt_token_ids": [5, 0, 7]}, [[5, 0, 7]]),
        ({"prompt_token_ids": torch.tensor([5, 0]), "prompt": "its text"}, [[5, 0]]),
        ({"prompt": None, "prompt_token_ids": (5, 0)}, [[5, 0]]),
        ([{"prompt": "Hi"}, {"prompt_token_ids": [5, 0]}, "you"], ["Hi", [5, 0], "you"]),
        (BYTE_LEVEL("Hi é"), ["Hi é"]),
        (BYTE_LEVEL("Hi é", return_tensors="pt"), ["Hi é"]),
        ([BYTE_LEVEL("Hi é"), [5]], ["Hi é", [5]]),
        (BYTE_LEVEL(["Hi", "a longer one"]), ["Hi", "a longer one"]),
        ({"input_ids": torch.tensor([[9, 5, 0], [9, 9, 7]]), "attention_mask": [[0, 1, 1], [0, 0, 1]]}, [[5, 0], [7]]),
        (np.array(["Hi", "you"]), ["Hi", "you"]),
    ],
)
def test_mappings_are_prompts(prompts: Any, lists: list[Any]) -> None:
    """vLLM's two forms and what a tokenizer returns, one or many; a batch's padding is no part of a prompt."""
    tokens = [encode(BYTE_LEVEL, prompt) for prompt in unchecked(to_prompt_list)(prompts)]
    assert tokens == [encode(BYTE_LEVEL, prompt) for prompt in lists]


def test_encode_without_a_chat_template() -> None:
    """Text does, messages do not."""
    assert encode(BYTE_FALLBACK, "a")
    with pytest.raises(ValueError, match="no chat template"):
        encode(BYTE_FALLBACK, MESSAGES)


def test_encode_text_without_tokens() -> None:
    """A tokenizer that drops blanks leaves nothing of them, and nothing can be continued."""
    backend = Tokenizer(models.WordLevel({"a": 0, "?": 1}, "?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert encode(words, " a ") == [0]
    with pytest.raises(ValueError, match="needs at least one"):
        encode(words, "  ")


@pytest.mark.parametrize(
    ("prompts", "one"),
    [
        ("text", True),
        ([1, 2], True),
        ((1, 2), True),
        (MESSAGES, True),
        (["text", "text"], False),
        ([[1, 2], [3]], False),
        ([MESSAGES, MESSAGES], False),
        (np.zeros((2, 3), int), False),
        ([], False),
        ({"a", "b"}, False),
        ({"prompt": "a"}, True),
        ([{"prompt": "a"}, {"prompt_token_ids": [1]}], False),
        (np.array(["a", "b"]), False),
        (np.array([1, 2]), True),
    ],
)
def test_is_one(prompts: object, one: bool) -> None:
    """A list of texts, of token lists or of chats is many prompts."""
    assert is_single_prompt(prompts) == one


def test_load(tmp_path: Path) -> None:
    """From the checkpoint's folder, or beside its file, with the chat template; None where there is none."""
    assert ours.load(tmp_path) is None
    BYTE_LEVEL.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "config.json"):
        loaded = ours.load(path)
        assert loaded is not None and encode(loaded, MESSAGES) == encode(BYTE_LEVEL, MESSAGES)
        assert loaded.decode(loaded("Hello, 漢字").input_ids) == "Hello, 漢字"


@pytest.mark.parametrize(
    ("file", "data", "names"),
    [
        (
            "tokenizer.model",
            b"\n\x0e\n\x05<unk>",
            "sentencepiece and protobuf: pip install sentencepiece protobuf, or put",
        ),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "tiktoken: pip install tiktoken, or put"),
        ("tekken.json", b"{}", "mistral-common: pip install mistral-common, or put"),
    ],
)
def test_what_a_tokenizer_needs(
    file: str, data: bytes, names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packages by which its file can be read, by name, where they are not installed."""
    (tmp_path / file).write_bytes(data)
    monkeypatch.setattr(ours, "find_spec", lambda name: None)
    monkeypatch.setattr(ours, "sys", SimpleNamespace(modules={}))
    with pytest.raises(ValueError, match=f"{file} cannot be read without {names} the model's tokenizer.json"):
        ours.load(tmp_path)


def test_a_folder_of_mistral_with_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tokenizer.json is read, also where mistral-common is installed, whose own tokenizer can do less."""
    BYTE_LEVEL.save_pretrained(tmp_path)
    (tmp_path / "tekken.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", None)
    loaded = ours.load(tmp_path)
    assert loaded is not None and encode(loaded, MESSAGES) == encode(BYTE_LEVEL, MESSAGES)
