"""bad_words, allowed_token_ids and logits_processors, on a tiny random model whose tokens are bytes and more."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydantic
import pytest
import tiny
import torch
from test_tokenizer import BYTE_LEVEL

import fastgen
from fastgen import SamplingParams, Snapshot
from fastgen.structured_output.token_filter import encode_bad_words
from fastgen.structured_output.token_masks import GrammarBackend

SPEC = fastgen.from_hf_config(tiny.config(vocab=330, context=512, eos_token_id=BYTE_LEVEL.eos_token_id))
PARAMS = tiny.weights(SPEC)
GREEDY = SamplingParams(temperature=0, max_tokens=12)
PROMPT = "Hello, world! It's a test."


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "overlap"])
def engine(request: pytest.FixtureRequest) -> Any:
    settings: Any = {"page_size": 16, "cache_tokens": 2048, "overlap": request.param, "progress": False}
    with fastgen.Engine(PARAMS, SPEC, BYTE_LEVEL, **settings) as e:
        yield e


def test_allowed_token_ids(engine: fastgen.Engine) -> None:
    """Only these are sampled, by their own probabilities, and other requests of the step are as without them."""
    allowed = [7, 64, 65, 300, 329]
    sampling = SamplingParams(allowed_token_ids=allowed, n=4, seed=1, logprobs=330, logprob_mode="processed")
    filtered, other = engine.generate([PROMPT, "abc"], [replace(sampling, max_tokens=20), GREEDY])
    assert {t for c in filtered.completions for t in c.token_ids} <= {*allowed}
    for c in filtered.completions:
        assert len(c.token_ids) == 20 and c.top_logprobs is not None
        finite = {t: p for t, p in c.top_logprobs[0].items() if p > float("-inf")}
        assert finite.keys() == {*allowed} and sum(2.718281828459045**p for p in finite.values()) == pytest.approx(1)
    assert other.completions[0].token_ids == engine.generate("abc", GREEDY)[0].completions[0].token_ids


def test_bad_words(engine: fastgen.Engine) -> None:
    """The last token of a bad word is banned where the others came before it, and nowhere else."""
    (plain,) = engine.generate(PROMPT, GREEDY)[0].completions
    i = next(
        i for i in range(1, 11)
        if encode_bad_words(BYTE_LEVEL, [BYTE_LEVEL.decode(plain.token_ids[i : i + 2])])[0]
        == tuple(plain.token_ids[i : i + 2]) and plain.token_ids[i : i + 2] != plain.token_ids[i - 1 : i + 1]
    )  # fmt: skip
    word = BYTE_LEVEL.decode(plain.token_ids[i : i + 2])
    output, untouched = engine.generate([PROMPT, PROMPT], [replace(GREEDY, bad_words=[word]), GREEDY])  # type: ignore[arg-type]
    (banned,) = output.completions
    assert banned.token_ids[: i + 1] == plain.token_ids[: i + 1] and banned.token_ids[i + 1] != plain.token_ids[i + 1]
    assert word not in banned.text and untouched.completions[0].token_ids == plain.token_ids
    (unmoved,) = engine.generate(PROMPT, replace(GREEDY, bad_words=("never said",)))[0].completions
    assert unmoved.token_ids == plain.token_ids


def test_words_within_a_text_begin_with_a_space() -> None:
    ids = encode_bad_words(BYTE_LEVEL, ["a"])
    assert [BYTE_LEVEL.decode(x) for x in ids] == ["a", " a"]
    assert all(len(x) == 1 for x in ids)


def test_forks_and_snapshots_keep_their_constraints(engine: fastgen.Engine, tmp_path: Path) -> None:
    allowed = tuple(range(40, 80))
    params = SamplingParams(temperature=0, max_tokens=12, allowed_token_ids=allowed, bad_words=("BB", "A"))
    (whole,) = engine.generate(PROMPT, params)
    id = engine.add(PROMPT, params)
    for _ in range(5):
        engine.step()
    (copy,) = engine.fork(id)
    engine.snapshot(id).save(tmp_path / "s")
    restored = engine.restore(Snapshot.load(tmp_path / "s"))
    outputs = {e.request_id: e.output for _ in range(99) if engine.has_unfinished_requests for e in engine.step()}
    for request in (id, copy, restored):
        output = outputs[request]
        assert output is not None and output.prompt == PROMPT
        assert output.completions[0].token_ids == whole.completions[0].token_ids


def test_logits_processors(engine: fastgen.Engine) -> None:
    """A function of the generated tokens and the logits, or of the prompt's too; raw logprobs stay the model's."""
    (top,) = engine.generate(PROMPT, replace(GREEDY, logprobs=2))[0].completions
    assert top.top_logprobs is not None
    calls = list[tuple[list[int], list[int]]]()

    def ban_best(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits[logits.argmax()] = float("-inf")
        return logits

    def only_seven(prompt_token_ids: list[int], token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        calls.append((prompt_token_ids, token_ids))
        return torch.where(torch.arange(len(logits)) == 7, logits, float("-inf"))

    settings = [
        replace(GREEDY, logits_processors=(ban_best,), logprobs=0),
        replace(GREEDY, logits_processors=(only_seven,), max_tokens=3),
        GREEDY,
    ]
    second, sevens, plain = (o.completions[0] for o in engine.generate([PROMPT] * 3, settings))
    (_, (runner_up, logprob)) = top.top_logprobs[0].items()
    assert second.token_ids[0] == runner_up and second.logprobs is not None
    assert second.logprobs[0] == pytest.approx(logprob, abs=1e-4)
    assert sevens.token_ids == [7, 7, 7] and plain.token_ids == top.token_ids
    prompt = BYTE_LEVEL(PROMPT).input_ids
    assert calls == [(prompt, []), (prompt, [7]), (prompt, [7, 7])]


def test_a_failing_logits_processor_ends_its_request_alone(engine: fastgen.Engine) -> None:
    def fails(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(token_ids) == 2:
            raise KeyError("mistake")
        return logits

    settings = [
        replace(GREEDY, logits_processors=(fails,)),
        replace(GREEDY, logits_processors=(lambda ids, logits: logits[:5],)),
        GREEDY,
    ]
    failed, wrong_shape, plain = (o.completions[0] for o in engine.generate([PROMPT] * 3, settings))
    assert (failed.finish_reason, len(failed.token_ids)) == ("error", 2)
    assert "a logits processor failed: KeyError: 'mistake'" in failed.error
    assert r"must return logits of shape (330,), got (5,)" in wrong_shape.error
    assert plain.token_ids == engine.generate(PROMPT, GREEDY)[0].completions[0].token_ids


def test_nothing_allowed_is_an_error_of_the_request(engine: fastgen.Engine) -> None:
    (a,) = BYTE_LEVEL("a").input_ids
    (c,) = engine.generate(PROMPT, SamplingParams(allowed_token_ids=(a,), bad_words=("a",)))[0].completions
    assert c.finish_reason == "error" and "forbid every token" in c.error and not c.token_ids


def test_with_a_grammar(engine: fastgen.Engine) -> None:
    pytest.importorskip("llguidance")
    for overlap_seed in range(2):
        params = SamplingParams(grammar="regex:[ab]{3}", bad_words=("a",), seed=overlap_seed)
        assert engine.generate(PROMPT, params)[0].completions[0].text == "bbb"
    schema = {"type": "object", "properties": {"x": {"const": 1}}, "required": ["x"], "additionalProperties": False}
    assert SamplingParams(grammar=schema).grammar.startswith('json:{"type": "object"')


def test_wrong_input(engine: fastgen.Engine, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"allowed_token_ids: token 330 is outside the vocabulary of 330"):
        engine.add(PROMPT, SamplingParams(allowed_token_ids=(330,)))
    with pytest.raises(ValueError, match="bad_words need a tokenizer"):
        GrammarBackend(None, 330, frozenset()).compile(SamplingParams(bad_words=("a",)))
    function = replace(GREEDY, logits_processors=(lambda ids, logits: logits,))
    with pytest.raises(ValueError, match="tensor_parallel=1 and no replicas"):
        GrammarBackend(BYTE_LEVEL, 330, frozenset(), is_single_rank=False).compile(function)
    id = engine.add(PROMPT, function)
    engine.step()
    with pytest.raises(ValueError, match="functions cannot be saved to a file"):
        engine.snapshot(id).save(tmp_path / "s")
    engine.abort(id)
    for wrong in ({"allowed_token_ids": []}, {"bad_words": [" "]}, {"logits_processors": [3]}, {"grammar": 5},
                  {"truncate_prompt_tokens": 0}, {"skip_special_tokens": "no"}, {"grammar": {"a": {1}}}):  # fmt: skip
        with pytest.raises(ValueError, match=f"SamplingParams.{next(iter(wrong))}"):
            SamplingParams(**wrong)  # type: ignore[arg-type]


def test_text_of_the_output(engine: fastgen.Engine) -> None:
    """Stop strings and special tokens in the text, why it ended, the sum of logprobs, and the prompt's last tokens."""
    (plain,) = engine.generate(PROMPT, replace(GREEDY, logprobs=0))[0].completions
    assert plain.cumulative_logprob == sum(plain.logprobs or ()) and plain.stop_reason is None
    stop = plain.text[4:6]
    cut, kept = (
        engine.generate(PROMPT, replace(GREEDY, stop=(stop,), include_stop_str_in_output=keep))[0].completions[0]
        for keep in (False, True)
    )
    assert kept.text == cut.text + stop and plain.text.startswith(kept.text)
    assert (cut.stop_reason, cut.finish_reason) == (kept.stop_reason, "stop") == (stop, "stop")
    special = {BYTE_LEVEL.eos_token_id: 50.0}
    for skip, text in ((True, ""), (False, "<|im_end|>")):
        params = replace(GREEDY, logit_bias=special, skip_special_tokens=skip)
        (c,) = engine.generate(PROMPT, params)[0].completions
        assert (c.text, c.finish_reason, c.stop_reason) == (text, "stop", None)
    first = plain.token_ids[0]
    (ended,) = engine.generate(PROMPT, replace(GREEDY, stop_token_ids=(first,)))[0].completions
    assert ended.stop_reason == first
    (ids,) = engine.generate(PROMPT, replace(GREEDY, logprobs=0, detokenize=False))[0].completions
    assert (ids.text, ids.token_ids, ids.finish_reason) == ("", plain.token_ids, plain.finish_reason)
    assert not any(event.text for event in engine.stream(PROMPT, replace(GREEDY, detokenize=False)))
    with pytest.raises(ValueError, match="SamplingParams.stop needs the text, and detokenize is false"):
        replace(GREEDY, stop=(stop,), detokenize=False)
    last = BYTE_LEVEL(PROMPT).input_ids[-3:]
    (short,), (same,) = (
        engine.generate(x, replace(GREEDY, truncate_prompt_tokens=k)) for x, k in ((PROMPT, 3), (last, None))
    )
    assert short.prompt_token_ids == last and short.completions == same.completions
    assert short.prompt == PROMPT and same.prompt is None
    (mapped,) = engine.generate({"prompt": PROMPT, "prompt_token_ids": last}, GREEDY)
    assert (mapped.prompt, mapped.completions) == (PROMPT, same.completions)
    chat_message = [{"role": "user", "content": "Hi"}]
    (thought,) = engine.chat(chat_message, GREEDY, add_generation_prompt=False)
    assert thought.prompt == "<|im_start|>user: Hi<|im_end|>"
    assert len(engine.chat([chat_message, chat_message], GREEDY)) == 2
    (chat,) = engine.generate([{"role": "user", "content": "Hi <|im_end|>"}], GREEDY)
    assert chat.prompt == "<|im_start|>user: Hi <|im_end|><|im_end|><|im_start|>assistant: "


def test_chat_of_an_async_engine(engine: fastgen.Engine) -> None:
    """The outputs, and the errors of the template's options, are those of `Engine.chat`."""
    conversations = [[{"role": "user", "content": text}] for text in ("Hi", "Hello")]
    expected = engine.chat(conversations, GREEDY, add_generation_prompt=False)

    async def main() -> dict[int, fastgen.Output]:
        with fastgen.AsyncEngine(engine) as e:
            chat = e.chat(conversations, GREEDY, add_generation_prompt=False)
            outputs = {i: output async for i, output in chat}
            with pytest.raises(ValueError, match="add_generation_prompt=False"):
                _ = [x async for x in e.chat(conversations, GREEDY, continue_final_message=True)]
            return outputs

    outputs = asyncio.run(main())
    assert [(outputs[i].prompt, outputs[i].completions) for i in range(2)] == [
        (o.prompt, o.completions) for o in expected
    ]


def test_grammar_from_a_pydantic_model() -> None:
    class Point(pydantic.BaseModel):
        x: int

    assert SamplingParams(grammar=Point).grammar == SamplingParams(grammar=Point.model_json_schema()).grammar
    assert json.loads(SamplingParams(grammar=Point).grammar.removeprefix("json:")) == Point.model_json_schema()
    with pytest.raises(ValueError, match="a pydantic model class"):
        SamplingParams(grammar=Point(x=1))
