"""Output that follows a grammar, on a tiny random model whose tokens are bytes."""

import json
import re
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import fastgen
from fastgen import Output, SamplingParams
from fastgen.grammar import Guides
from fastgen.sampling import restrict

pytest.importorskip("llguidance")
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCAB = {c: i for i, c in enumerate(BYTES)} | {"</s>": 256, "ab": 257, "12": 258}
SPEC = fastgen.from_hf(tiny.config(vocab=300, context=256, eos_token_id=256))  # more tokens than the tokenizer has
PARAMS = tiny.weights(SPEC, times=1)
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "yy"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
DATE = r"[0-9]{4}-[01][0-9]"


def fits(value: dict[str, Any]) -> bool:
    return value.keys() == {"a", "b"} and value["a"] in range(100) and value["b"] in ("x", "yy")


FORMS: dict[str, Any] = {
    f"regex:{DATE}": lambda text: re.fullmatch(DATE, text),
    "json:" + json.dumps(SCHEMA): lambda text: (
        json.loads(text)["a"] in range(100) and json.loads(text)["b"] in ("x", "yy")
    ),
    'lark:start: "yes" | "no" | "ab"': lambda text: text in ("yes", "no", "ab"),
}


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE(VOCAB, [("a", "b"), ("1", "2")]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return tokenizer()


def engine(words: PreTrainedTokenizerFast | None, **settings: Any) -> fastgen.Engine:
    return fastgen.Engine(PARAMS, SPEC, words, progress=False, **settings)


def guided(grammar: str, **more: Any) -> SamplingParams:
    return SamplingParams(**{"grammar": grammar, "max_tokens": 200} | more)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("grammar", FORMS)
def test_every_output_follows(grammar: str, overlap: bool, words: PreTrainedTokenizerFast) -> None:
    """Drawn hot from a random model, what ends by itself matches; so do greedy, filtered and penalised outputs."""
    kinds = [
        {"temperature": 3, "n": 8},
        {"temperature": 0},
        {"temperature": 1, "top_p": 0.9, "repetition_penalty": 1.2},
    ]
    prompts = ["once", "12", "ab"] * 2
    with engine(words, overlap=overlap, max_requests=7) as e:
        outputs = e.generate(prompts, [guided(grammar, seed=i, **kinds[i % 3]) for i in range(6)], progress=False)
    ended = [c for o in outputs for c in o.completions if c.finish_reason == "stop"]
    assert len(ended) > 8
    for c in ended:
        assert c.token_ids[-1] == 256 and FORMS[grammar](c.text), c.text


def test_neighbours_are_not_disturbed(words: PreTrainedTokenizerFast) -> None:
    """A mask that reaches another row changes what it draws."""
    plain = [SamplingParams(seed=i, max_tokens=20) for i in range(4)]
    with engine(words) as e:
        alone = e.generate(["one", "two", "three", "four"], plain, progress=False)
        mixed = e.generate(
            ["one", "x", "two", "y", "three", "four"],
            [plain[0], guided(f"regex:{DATE}", seed=7), plain[1], guided("json:", seed=8), *plain[2:]],
            progress=False,
        )
    assert [o.completions[0].token_ids for o in (mixed[0], mixed[2], mixed[4], mixed[5])] == [
        o.completions[0].token_ids for o in alone
    ]


def finish(e: fastgen.Engine) -> dict[int, Output]:
    done = {}
    while e.unfinished:
        done |= {event.request_id: event.output for event in e.step() if event.output is not None}
    return done


def test_forks_and_snapshots_stay_within_the_grammar(words: PreTrainedTokenizerFast) -> None:
    """A copy that begins the grammar anew, or moves the original along with it."""
    with engine(words) as e, engine(words) as other:
        id = e.add("once", guided(f"regex:{DATE}", seed=1))
        for _ in range(4):
            e.step()
        copies, saved = e.fork(id, 3, seeds=[1, 2, 3]), e.snapshot(id)
        done = finish(e)
        again = other.restore(saved)
        assert finish(other)[again].completions[0].text == done[id].completions[0].text
    texts = [done[i].completions[0].text for i in (id, *copies)]
    assert texts[0] == texts[1] and all(re.fullmatch(DATE, t) and t[:2] == texts[0][:2] for t in texts)


def test_preempted_requests_go_on(words: PreTrainedTokenizerFast) -> None:
    """A request that was parked begins its grammar anew."""
    grammar = "regex:(ab|12){20}!"
    with engine(words, cache_tokens=64, page_size=4) as e:
        outputs = e.generate(["once"] * 4, [guided(grammar, seed=i, max_tokens=50) for i in range(4)], progress=False)
        assert e.counts.parked
    for o in outputs:
        assert re.fullmatch(grammar[6:], o.completions[0].text)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("[0-9]+", "must begin with regex:, json:, lark:"),
        ("regex:[", "regex grammar"),
        ("json:{", "json grammar"),
        ('json:{"type": 3}', "json grammar"),
        ("lark:xx", "lark grammar"),
    ],
)
def test_bad_grammars(grammar: str, message: str, words: PreTrainedTokenizerFast) -> None:
    """A grammar that cannot be used is refused before anything runs, and disturbs nobody."""
    with engine(words) as e:
        id = e.add("once", SamplingParams(max_tokens=3, ignore_eos=True))
        with pytest.raises(ValueError, match=message):
            e.add("once", guided(grammar))
        assert [*finish(e)] == [id]


def test_what_a_grammar_needs(words: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a tokenizer or the package it says what to do; it decides itself where the output ends."""
    with engine(None) as e, pytest.raises(ValueError, match="needs a tokenizer"):
        e.add([1, 2], guided("json:"))
    monkeypatch.setattr("fastgen.grammar.find_spec", lambda name: None)
    with engine(words) as e, pytest.raises(ValueError, match=r"pip install fastgen\[guide\]"):
        e.add("once", guided("json:"))
    for wrong in ({"min_tokens": 3}, {"ignore_eos": True}, {"grammar": 7}):
        with pytest.raises(ValueError, match="grammar"):
            SamplingParams(**{"grammar": "json:"} | wrong)


def test_a_grammar_that_fails_ends_its_request_alone(words: PreTrainedTokenizerFast) -> None:
    """A parser that gives up takes the step of all others with it."""
    with engine(words) as e:
        one, two = (e.add("once", guided(f"regex:{DATE}", seed=i)) for i in range(2))
        e.step()
        sample = next(s for s in e._samples.values() if s.output.request_id == one)
        assert sample.guide is not None
        sample.guide.matcher.consume_token(words.encode("z")[0])  # no digit
        done = finish(e)
    assert done[one].completions[0].finish_reason in ("abort", "stop")
    assert re.fullmatch(DATE, done[two].completions[0].text)


@settings(deadline=None, max_examples=50)
@given(allowed=st.lists(st.integers(0, 99), max_size=20), rows=st.integers(1, 3))
def test_restrict(allowed: list[int], rows: int) -> None:
    """Bits against plain indexing."""
    bits = np.zeros((rows, 4), np.uint32)
    for t in allowed:
        bits[0, t // 32] |= np.uint32(1 << t % 32)
    logits = torch.randn(rows, 100)
    got = restrict(logits, torch.from_numpy(bits.view(np.int32)).to(logits.device))
    wanted = torch.full_like(logits, float("-inf"))
    wanted[0, allowed] = logits[0, allowed]
    assert torch.equal(got, wanted)


def test_masks_of_many(words: PreTrainedTokenizerFast) -> None:
    """Rows without a guide allow everything; a finished one allows the end alone."""
    guides = Guides(words, 300, frozenset([256]))
    a, b = guides.guide("regex:a"), guides.guide("regex:a")
    b.push(words.encode("a")[0])
    b.push(256)
    bits = guides.masks([(1, a), (3, b)], 5).view(np.uint32)
    found = [{t for t in range(300) if bits[r, t // 32] >> np.uint32(t % 32) & 1} for r in range(5)]
    assert found[0] == found[2] == found[4] == {*range(300)}
    assert found[1] == {words.encode("a")[0]} and found[3] == {256}
