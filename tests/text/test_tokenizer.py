"""Prompts to tokens, and the tokenizers that other tests use."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastgen.event_stream import pair_prompts
from fastgen.text.tokenizer import (
    ChatPrompt,
    encode,
    encode_with_text,
    is_single_prompt,
    to_chat_prompts,
    to_prompt_list,
)

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
    """Makes a tokenizer of GPT-2's kind (Llama 3, Qwen): bytes are tokens, and tokens may end within a character."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special[:1]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def byte_fallback() -> PreTrainedTokenizerFast:
    """Makes a tokenizer of SentencePiece's kind (Mistral): bytes stand for characters outside the vocabulary."""
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
    """Returns one token per byte. GPT-2's alphabet keeps printable bytes; other bytes follow from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in visible]
    letters = {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(rest)}
    return [BYTE_LEVEL.convert_tokens_to_ids(letters[b]) for b in data]


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi é"}]


def test_encode() -> None:
    """Texts are tokenized, token ids copied, and messages rendered up to the assistant's turn."""
    text = "Hello, world! 漢字"
    assert encode(BYTE_LEVEL, text) == BYTE_LEVEL(text).input_ids
    ids = [5, 0, 7]
    assert encode(BYTE_LEVEL, ids) == encode(None, ids) == encode(None, tuple(ids)) == ids
    assert encode(None, ids) is not ids  # a copy: the caller may change the list
    chat = "<|im_start|>system: Be brief.<|im_end|><|im_start|>user: Hi é<|im_end|><|im_start|>assistant: "
    for messages in (MESSAGES, tuple(MESSAGES)):
        assert encode(BYTE_LEVEL, messages) == BYTE_LEVEL(chat).input_ids


@pytest.mark.parametrize("ids", [np.array([5, 0, 7]), torch.tensor([5, 0, 7]), list(np.array([5, 0, 7]))])
def test_encode_arrays(ids: Any) -> None:
    """Arrays of token ids become lists of ints."""
    assert is_single_prompt(ids)
    tokens = unchecked(encode)(None, ids)
    assert tokens == [5, 0, 7] and {type(t) for t in tokens} == {int}


def unchecked(function: Callable) -> Callable:
    """Returns the function without the tests' type check, for arguments that the annotations exclude."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


@pytest.mark.parametrize(
    ("prompt", "message"),
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
def test_invalid_prompts(prompt: Any, message: str) -> None:
    """The message of each error states what is accepted."""
    with pytest.raises(ValueError, match=message):
        unchecked(encode)(BYTE_LEVEL, prompt)


class Table:
    """A table with the interface of a pandas data frame."""

    columns = ("prompt", "answer")

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        *((x, f"not {type(x).__name__}") for x in (None, 5, True, b"ab", Path("x"), np.array(5), torch.tensor(5))),
        (Table(), "not Table: give one of its columns"),
    ],
)
def test_invalid_lists_of_prompts(prompts: Any, message: str) -> None:
    """Values that are not collections of prompts are rejected, also a table, which iterates over column names."""
    with pytest.raises(ValueError, match=message):
        unchecked(to_prompt_list)(prompts)


@pytest.mark.parametrize(
    ("sampling", "kind"),
    [(5, "int"), ({"n": 1}, "dict"), ("x", "str"), ([{}, {}], "a list with dict"), ([None, 0], "a list with int")],
)
def test_invalid_sampling(sampling: Any, kind: str) -> None:
    """Settings of another type are rejected."""
    with pytest.raises(ValueError, match=f"one SamplingParams or a list of them, got {kind}"):
        unchecked(pair_prompts)([[1], [2]], sampling)


@pytest.mark.parametrize("prompt", ["text", MESSAGES])
def test_encode_without_a_tokenizer(prompt: Any) -> None:
    """Without a tokenizer, only token ids are accepted."""
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
    """vLLM's two forms and tokenizers' outputs are prompts; the padding of a batch is removed."""
    tokens = [encode(BYTE_LEVEL, prompt) for prompt in unchecked(to_prompt_list)(prompts)]
    assert tokens == [encode(BYTE_LEVEL, prompt) for prompt in lists]


def test_encode_without_a_chat_template() -> None:
    """Without a chat template, messages are rejected and texts accepted."""
    assert encode(BYTE_FALLBACK, "a")
    with pytest.raises(ValueError, match="no chat template"):
        encode(BYTE_FALLBACK, MESSAGES)


def test_encode_text_without_tokens() -> None:
    """A text without tokens, here of spaces that the tokenizer drops, is rejected."""
    backend = Tokenizer(models.WordLevel({"a": 0, "?": 1}, "?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert encode(words, " a ") == [0]
    with pytest.raises(ValueError, match="needs at least one"):
        encode(words, "  ")


@pytest.mark.parametrize(
    ("prompts", "is_single"),
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
def test_is_single_prompt(prompts: object, is_single: bool) -> None:
    """Lists of texts, of token ids lists or of chats are several prompts."""
    assert is_single_prompt(prompts) == is_single


# --- chat templates ---------------------------------------------------------------------------------------------------

THINKING = TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"


def test_chat_prompts() -> None:
    """Options of the chat template; text of special tokens in messages and in variables stays text."""
    prompt = ChatPrompt(MESSAGES, chat_template=THINKING, chat_template_kwargs={"enable_thinking": False})
    ids, text = encode_with_text(BYTE_LEVEL, prompt)
    plain_ids, plain = encode_with_text(BYTE_LEVEL, MESSAGES)
    assert text == f"{plain}<think></think>" and ids[: len(plain_ids)] == plain_ids
    assert is_single_prompt(prompt) and to_prompt_list([prompt, prompt]) == [prompt, prompt]
    closed = encode_with_text(BYTE_LEVEL, ChatPrompt(MESSAGES, add_generation_prompt=False))[1]
    assert plain is not None and closed == plain.removesuffix("<|im_start|>assistant: ")
    begun = [*MESSAGES, {"role": "assistant", "content": "It is"}]
    options: Any = {"add_generation_prompt": False, "continue_final_message": True}
    assert encode_with_text(BYTE_LEVEL, ChatPrompt(begun, **options))[1] == f"{plain}It is"
    variables = {"name": "<|im_end|>"}
    own = ChatPrompt(MESSAGES, chat_template="{{ name }}<|im_end|>", chat_template_kwargs=variables)
    ids, text = encode_with_text(BYTE_LEVEL, own)
    assert ids.count(BYTE_LEVEL.eos_token_id) == 1 and text == "<|im_end|><|im_end|>"
    tools = [{"type": "function", "function": {"name": "f"}}]
    with_tools = ChatPrompt(MESSAGES, tools=tools, chat_template="{{ tools[0].function.name }}")
    assert encode(BYTE_LEVEL, with_tools) == BYTE_LEVEL("f").input_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"continue_final_message": True}, "needs add_generation_prompt=False"),
        ({"chat_template_kwargs": {"tokenize": True}}, "'tokenize' is no variable"),
        ({"chat_template": "{% for %}"}, "this chat template refuses"),
        ({"chat_template": "{{ '' }}"}, "renders these messages to no token"),
    ],
)
def test_wrong_options_of_chat_templates(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(BYTE_LEVEL, ChatPrompt(MESSAGES, **options))
    with pytest.raises(ValueError, match="chat takes a list of messages"):
        to_chat_prompts("Hello")
    assert len(to_chat_prompts([MESSAGES, MESSAGES], tools=[])) == 2


@pytest.mark.parametrize("mapping", [{"prompt": 5}, {"prompt": "a", "multi_modal_data": {}}, {"text": "a"}, {}])
def test_other_mappings_are_refused(mapping: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match='a mapping as a prompt is {"prompt": "a text"}'):
        encode(BYTE_LEVEL, mapping)
