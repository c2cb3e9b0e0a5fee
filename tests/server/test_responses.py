"""Single tokens, echoed prompts and texts in responses."""

import asyncio
import os
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_detokenizer import RUNS
from test_tokenizer import BYTE_FALLBACK, KINDS, QUICK, byte_tokens

from fastgen.core.request import Completion, Event, Output, SequenceState
from fastgen.sampling_params import SamplingParams
from fastgen.server.app_state import AppState
from fastgen.server.engine_process import TokenDelta
from fastgen.server.responses import Choice, ChoiceDelta, EchoedPrompt, TextResponseBuilder, TokenDecoder
from fastgen.text.detokenizer import token_to_bytes
from fastgen.text.text_processor import TextProcessor

STOP_STRINGS = ["a", "ab", "é", " H", "<|im_end|>", "b<|im_end|>", "</s>", "a</s>b"]
DECODERS = {kind: TokenDecoder(tokenizer) for kind, tokenizer in KINDS.items()}


def ids(*pieces: str) -> list[int]:
    return [BYTE_FALLBACK.convert_tokens_to_ids(piece) for piece in pieces]


def choice(kind: str, prompt: list[int], params: SamplingParams, *deltas: TokenDelta) -> Choice:
    """Returns a choice after token deltas."""
    choice = Choice(0, DECODERS[kind], prompt, params, stream_text=True, visible_special_tokens={})
    for delta in deltas:
        choice.push(delta)
    return choice


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_tokens(kind: str) -> None:
    """The bytes of every token: spaces before words, parts of characters, special tokens."""
    tokenizer = KINDS[kind]
    for id, piece in ((i, tokenizer.convert_ids_to_tokens(i)) for i in range(len(tokenizer))):
        data = token_to_bytes(tokenizer, id)
        if id in tokenizer.all_special_ids:
            assert data == piece.encode()
        elif kind == "fallback" and piece.startswith("<0x"):
            assert data == bytes([id - 3])
        elif kind == "fallback":
            assert data == piece.replace("▁", " ").encode()
        else:
            assert data.decode(errors="replace") == tokenizer.decode([id])
    if kind == "level":
        assert [token_to_bytes(tokenizer, i) for i in byte_tokens(bytes(range(256)))] == [
            bytes([b]) for b in range(256)
        ]


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(text=st.text(st.sampled_from(" abHe😀é\n"), max_size=12))
def test_tokens_joined_are_the_text(kind: str, text: str) -> None:
    """The bytes of tokens in logprobs join to the text, and so do their texts without partial characters."""
    prompt, tokens = KINDS[kind]("a").input_ids, KINDS[kind](text).input_ids
    tokens = [t for t in tokens if kind == "level" or t > 2]
    delta = TokenDelta(0, tokens, [-1.0] * len(tokens), None, finish_reason="length")
    text = choice(kind, prompt, SamplingParams(logprobs=0), delta).accumulated.text
    entries = [DECODERS[kind].format_logprob(t, 0.0) for t in tokens]
    joined = "".join(entry["token"] for entry in entries)
    assert bytes(b for entry in entries for b in entry["bytes"]).decode() == text
    assert "\ufffd" in joined or joined == text


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(data=st.data(), stop=st.lists(st.sampled_from(STOP_STRINGS), max_size=2), stream_text=st.booleans())
def test_library_and_server_return_the_same_text(
    kind: str, data: st.DataObject, stop: list[str], stream_text: bool
) -> None:
    """The same tokens have the same text, end, finish and stop reason in both, however steps group the tokens."""
    tokenizer = KINDS[kind]
    token = st.integers(0, len(tokenizer) - 1) | st.sampled_from(tokenizer("ab He é<|im_end|>b a😀").input_ids)
    prompt, tokens = (data.draw(st.lists(token, min_size=1, max_size=n)) for n in (5, 24))
    max_length, eos = len(prompt) + len(tokens), frozenset({tokenizer.eos_token_id})
    min_tokens = data.draw(st.integers(0, len(tokens)))
    ends = data.draw(st.lists(token, max_size=2))
    params = SamplingParams(stop=tuple(stop), stop_token_ids=tuple(ends), min_tokens=min_tokens, max_tokens=len(tokens))

    def events(params: SamplingParams, text: TextProcessor) -> tuple[list[Event], Completion]:
        """Returns the library's events until the completion finishes."""
        detokenizer = text.new_detokenizer(prompt, params, stream_text=stream_text)
        state = SequenceState(Output(0, prompt, [Completion()]), 0, params, 0, max_length, eos, detokenizer)
        events = list[Event]()
        while not events or not events[-1].finish_reason:
            events.append(state.append_token(tokens[len(events)], -1.0, ()))
        return events, state.completion

    library, completion = events(params, TextProcessor(tokenizer))
    assert "".join(e.text for e in library) == completion.text
    # The engine behind a server has neither a tokenizer nor stop strings.
    engine, _ = events(replace(params, stop=()), TextProcessor(None))
    options: Any = {"stream_text": stream_text, "visible_special_tokens": {}}
    served, text = Choice(0, DECODERS[kind], prompt, params, **options), ""
    while not served.accumulated.finish_reason:
        size = data.draw(st.integers(1, len(engine)))
        group, engine = engine[:size], engine[size:]
        group_tokens = [t for e in group for t in e.token_ids]
        text += served.push(TokenDelta(0, group_tokens, None, None, group[-1].finish_reason)).text
    total = served.accumulated
    assert text == total.text == completion.text and total.token_ids == completion.token_ids
    assert (total.finish_reason, total.stop_reason) == (completion.finish_reason, completion.stop_reason)


def test_tokens_with_the_same_text() -> None:
    """Top logprobs name them by their ids, except the sampled or most likely one."""
    blank_a, a, byte_a, space, byte_space = ids("▁a", "a", "<0x61>", "▁", "<0x20>")
    top = {byte_a: -0.1, a: -0.2, blank_a: -0.3, byte_space: -1.0, space: -2.0}
    builder = TextResponseBuilder(DECODERS["fallback"])
    for sampled, want in (
        (a, [f"token_id:{byte_a}", "a", " a", " ", f"token_id:{space}"]),
        (byte_a, ["a", f"token_id:{a}", " a", " ", f"token_id:{space}"]),
        (space, ["a", f"token_id:{a}", " a", f"token_id:{byte_space}", " "]),
    ):
        actual: Any = builder._format_logprobs(ChoiceDelta("", [sampled], [top[sampled]], [top], [0]), 0)
        assert list(actual["top_logprobs"][0].items()) == [*zip(want, top.values(), strict=True)]
        assert actual["top_logprobs"][0][actual["tokens"][0]] == top[sampled]
    part = byte_tokens(b"\xf0\x9f")
    actual = TextResponseBuilder(DECODERS["level"])._format_logprobs(
        ChoiceDelta("", part[:1], [-0.1], [dict.fromkeys(part, -0.1)], [0]), 0
    )
    assert len(actual["top_logprobs"][0]) == 2 and actual["tokens"] == ["\ufffd"]


def echo(kind: str, prompt: Any) -> tuple[EchoedPrompt, list[int]]:
    """Returns a prompt as an HTTP worker echoes it, and its tokens."""
    state = AppState.__new__(AppState)

    async def run_tokenizer(function: Any, *_: Any) -> Any:
        return function(KINDS[kind])

    state.run_tokenizer = run_tokenizer  # type: ignore[method-assign]
    tokens = KINDS[kind](prompt).input_ids if isinstance(prompt, str) else prompt
    return asyncio.run(state.echo_prompt(prompt, tokens)), tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text", ["ab", " ab", "a<|im_end|>b", "<|im_start|>user: Hello<|im_end|>", "a</s>", "é😀 a", "<s>a <|im_end|> b"]
)
@pytest.mark.parametrize("as_ids", [False, True])
def test_echo(kind: str, text: str, as_ids: bool) -> None:
    """The echo has the prompt's text with special tokens, and each token's offset."""
    prompt: Any = KINDS[kind](text).input_ids if as_ids else text
    actual, tokens = echo(kind, prompt)
    assert actual.text == (text if kind == "level" else KINDS[kind].decode(tokens)) and len(actual.text_offsets) == len(
        tokens
    )
    for token, at in zip(tokens, actual.text_offsets, strict=True):
        piece = DECODERS[kind].decode_token(token)
        at_start = at == 0 and actual.text.startswith(piece.strip())
        assert "\ufffd" in piece or actual.text[at:].startswith(piece) or at_start


def test_echo_without_tokens_that_the_tokenizer_adds() -> None:
    """A BOS token added to a text is left out of the echoed text; in token ids it is the client's and stays."""
    plain = BYTE_FALLBACK("ab a", add_special_tokens=False).input_ids
    words = DECODERS["fallback"]
    tokens = [1, *plain, 2]
    assert words.echo_prompt(tokens, range(1, len(plain) + 1)) == EchoedPrompt("ab a", [0, 0, 1, 2, 4])
    assert words.echo_prompt(tokens[:-1], range(len(plain) + 1)).text == BYTE_FALLBACK.decode(tokens[:-1]) == "<s> ab a"


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(runs=st.lists(st.sampled_from(RUNS), max_size=6))
def test_echo_of_any_bytes(kind: str, runs: list[bytes]) -> None:
    """Each token's offset is that of the character that it belongs to."""
    data = b"".join(runs)
    tokens = byte_tokens(data) if kind == "level" else [3 + b for b in data]
    actual, _ = echo(kind, tokens)
    complete = data.decode(errors="replace")
    cut = kind == "fallback" and complete.startswith(" ")
    assert actual.text == complete[cut:] and actual.text_offsets == sorted(actual.text_offsets)
    for i, at in enumerate(actual.text_offsets):
        assert os.path.commonprefix([data[:i].decode(errors="ignore"), complete]) in complete[: at + cut + 1]
