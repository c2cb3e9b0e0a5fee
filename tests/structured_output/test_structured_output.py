"""Output that follows a grammar, from a tiny random model whose tokens are bytes."""

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
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
from fastgen.core.sampling import apply_token_mask
from fastgen.extras import install_command
from fastgen.structured_output import token_masks
from fastgen.structured_output.grammar_compiler import TrialLimits, compile_grammar
from fastgen.structured_output.token_masks import GrammarBackend, json_depth
from fastgen.structured_output.trial_process import GrammarCancelled

pytest.importorskip("llguidance")
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCAB = {c: i for i, c in enumerate(BYTES)} | {"</s>": 256, "ab": 257, "12": 258}
# More tokens than the tokenizer has.
SPEC = fastgen.from_hf_config(tiny.config(vocab=300, context=256, eos_token_id=256))
PARAMS = tiny.weights(SPEC, times=1)
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "yy"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
DATE = r"[0-9]{4}-[01][0-9]"


MATCHES: dict[str, Any] = {
    f"regex:{DATE}": lambda text: re.fullmatch(DATE, text),
    "json:" + json.dumps(SCHEMA): lambda text: (
        json.loads(text)["a"] in range(100) and json.loads(text)["b"] in ("x", "yy")
    ),
    'lark:start: "yes" | "no" | "ab"': lambda text: text in ("yes", "no", "ab"),
}


def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE(VOCAB, [("a", "b"), ("1", "2")]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return tokenizer()


def engine(words: PreTrainedTokenizerFast | None, **settings: Any) -> fastgen.Engine:
    return fastgen.Engine(PARAMS, SPEC, words, progress=False, **settings)


def with_grammar(grammar: str, **settings: Any) -> SamplingParams:
    return SamplingParams(**{"grammar": grammar, "max_tokens": 200} | settings)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("grammar", MATCHES)
def test_every_output_follows(grammar: str, overlap: bool, words: PreTrainedTokenizerFast) -> None:
    """Outputs that end by themselves match: at a high temperature, greedy, filtered and penalized."""
    settings = [
        {"temperature": 3, "n": 8}, {"temperature": 0}, {"temperature": 1, "top_p": 0.9, "repetition_penalty": 1.2},
    ]  # fmt: skip
    prompts = ["once", "12", "ab"] * 2
    with engine(words, overlap=overlap, max_num_seqs=7) as e:
        outputs = e.generate(
            prompts, [with_grammar(grammar, seed=i, **settings[i % 3]) for i in range(6)], progress=False
        )
    ended = [c for o in outputs for c in o.completions if c.finish_reason == "stop"]
    assert len(ended) > 8
    for c in ended:
        assert c.token_ids[-1] == 256 and MATCHES[grammar](c.text), c.text


def test_masks_leave_other_rows_alone(words: PreTrainedTokenizerFast) -> None:
    """Requests without a grammar sample the same tokens beside requests with one as without them."""
    plain = [SamplingParams(seed=i, max_tokens=20) for i in range(4)]
    with engine(words) as e:
        alone = e.generate(["one", "two", "three", "four"], plain, progress=False)
        mixed = e.generate(
            ["one", "x", "two", "y", "three", "four"],
            [plain[0], with_grammar(f"regex:{DATE}", seed=7), plain[1], with_grammar("json:", seed=8), *plain[2:]],
            progress=False,
        )
    assert [o.completions[0].token_ids for o in (mixed[0], mixed[2], mixed[4], mixed[5])] == [
        o.completions[0].token_ids for o in alone
    ]


def finish(e: fastgen.Engine) -> dict[int, Output]:
    outputs = {}
    while e.has_unfinished_requests:
        outputs |= {event.request_id: event.output for event in e.step() if event.output is not None}
    return outputs


def test_forks_and_snapshots_stay_within_the_grammar(words: PreTrainedTokenizerFast) -> None:
    """Forks and restored snapshots continue in the grammar's state, independently of the original."""
    with engine(words) as e, engine(words) as other:
        id = e.add("once", with_grammar(f"regex:{DATE}", seed=1))
        for _ in range(4):
            e.step()
        copies, saved = e.fork(id, 3, seeds=[1, 2, 3]), e.snapshot(id)
        outputs = finish(e)
        again = other.restore(saved)
        assert finish(other)[again].completions[0].text == outputs[id].completions[0].text
    texts = [outputs[i].completions[0].text for i in (id, *copies)]
    assert texts[0] == texts[1] and all(re.fullmatch(DATE, t) and t[:2] == texts[0][:2] for t in texts)


def test_preempted_requests_keep_their_grammar_state(words: PreTrainedTokenizerFast) -> None:
    """A preempted request continues in the state that its grammar had reached."""
    grammar = "regex:(ab|12){20}!"
    with engine(words, cache_tokens=64, page_size=4) as e:
        outputs = e.generate(
            ["once"] * 4, [with_grammar(grammar, seed=i, max_tokens=50) for i in range(4)], progress=False
        )
        assert e.cache_stats.num_preemptions
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
    """A grammar that cannot be used is refused before anything runs; other requests are not affected."""
    with engine(words) as e:
        id = e.add("once", SamplingParams(max_tokens=3, ignore_eos=True))
        with pytest.raises(ValueError, match=message):
            e.add("once", with_grammar(grammar))
        assert [*finish(e)] == [id]


def test_what_a_grammar_needs(words: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors name a missing tokenizer or package; settings that contradict a grammar's end are refused."""
    with engine(None) as e, pytest.raises(ValueError, match="needs a tokenizer"):
        e.add([1, 2], with_grammar("json:"))
    monkeypatch.setattr("fastgen.structured_output.token_masks.find_spec", lambda name: None)
    with engine(words) as e, pytest.raises(ValueError, match=re.escape(install_command("guide"))):
        e.add("once", with_grammar("json:"))
    for wrong in ({"min_tokens": 3}, {"ignore_eos": True}, {"grammar": 7}):
        with pytest.raises(ValueError, match="grammar"):
            SamplingParams(**{"grammar": "json:"} | wrong)


def test_a_grammar_that_fails_ends_its_request_alone(words: PreTrainedTokenizerFast) -> None:
    """A parser that gives up does not end the step of other requests."""
    with engine(words) as e:
        failing, following = (e.add("once", with_grammar(f"regex:{DATE}", seed=i)) for i in range(2))
        e.step()
        state = next(s for s in e.core.sequence_states.values() if s.output.request_id == failing)
        assert state.matcher is not None
        state.matcher.matcher.consume_token(words.encode("z")[0])  # no digit
        outputs = finish(e)
    failed = outputs[failing].completions[0]
    assert failed.finish_reason == "error" and "the grammar cannot be followed any further" in failed.error
    assert re.fullmatch(DATE, outputs[following].completions[0].text)


def nested(depth: int) -> str:
    return '{"items": ' * depth + "{}" + "}" * depth


def refs(count: int) -> str:
    """Returns a schema with a chain of references."""
    chain = {f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(count)}
    return json.dumps({"$ref": "#/$defs/d0", "$defs": chain | {f"d{count}": {}}})


def rules(count: int) -> str:
    """Returns a grammar with a chain of rules."""
    return "\n".join(["start: r0", *(f'r{i}: "a" r{i + 1}' for i in range(count)), f'r{count}: "b"'])


LETTERS = [{"type": "string", "pattern": f".*{chr(97 + i)}.*{chr(98 + i)}.*"} for i in range(25)]
HARD = {
    "json:" + nested(500): "nested 501 levels deep, and the limit is 128",
    "json:" + '{"const": ' + "[" * 200_000 + "]" * 200_000 + "}": "nested 200001 levels deep",
    "json:" + '["' * 500 + '"]' * 500: "nested|Expecting",
    'lark:start: %json {"items": ' + nested(3000) + "}": "lark grammar",
    "json:" + refs(500): "too long a chain",
    "lark:" + rules(1000): "too long a chain",
    "lark:" + rules(50_000): "too big|too long a chain|longer than 0.6 s",
    "lark:start: " + "(" * 5000 + '"a"' + ")" * 5000: "too deeply nested",
    "lark:start: " + '"a"? ' * 20_000: "too big|longer than 0.6 s|nested too deeply",
    "regex:" + "(" * 5000 + ")" * 5000: "regex grammar",
    "regex:(a{1000}){1000}": "regex grammar",
    "json:" + json.dumps({"allOf": LETTERS}): "longer than 0.6 s to compile|more than 64 MiB of memory",
    'json:{"type": "integer", "multipleOf": 1000003}': "longer than 0.6 s to compile|more than 64 MiB of memory",
    "json:" + json.dumps({"allOf": [{"multipleOf": p} for p in (1000003, 999983, 1000033)]}): "json grammar",
    "json:" + json.dumps({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}): "json grammar",
    "regex:" + "a" * (2**20 + 1): "1048577 characters exceed the limit of 1048576",
}


@pytest.fixture(scope="module")
def small(words: PreTrainedTokenizerFast) -> Iterator[GrammarBackend]:
    """Returns a backend whose trials reach their limits soon."""
    grammars = GrammarBackend(words, 300, frozenset([256]))
    grammars._trial_process.limits = TrialLimits(cpu_seconds=0.6, memory_bytes=2**26, stack_bytes=2**19)
    yield grammars
    grammars.close()


@pytest.mark.parametrize("number", range(len(HARD)))
def test_grammars_that_would_end_or_stop_the_process(number: int, small: GrammarBackend) -> None:
    """Each grammar is refused with its reason, the second time too, and the next grammar is compiled."""
    grammar, message = [*HARD.items()][number]
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            small.make_matchers(grammar)
    assert len(small.make_matchers("regex:a", 3)) == 3


def test_json_depth() -> None:
    """Brackets in strings do not count, and escaped quotes do not end strings."""
    assert json_depth('{"a[[[": [{"b\\"]]{{{": []}, {}], "c": "\\\\"}') == 4
    assert json_depth("[" * 10**5) == 10**5 and json_depth('"[') == 1 and not json_depth("3")


def test_a_trial_is_cancelled(small: GrammarBackend) -> None:
    """Cancelling ends the trial's process, not just the wait, long before the limits would."""
    small.make_matchers("regex:a")
    small._trial_process.close()
    small._trial_process.limits = TrialLimits(cpu_seconds=60.0)
    stop = threading.Event()
    timer = threading.Timer(0.1, stop.set)
    timer.start()
    begin = time.monotonic()
    with pytest.raises(GrammarCancelled):
        small.make_matchers("json:" + json.dumps({"allOf": LETTERS[1:]}), cancel_event=stop)
    assert time.monotonic() - begin < 5
    process = small._trial_process.process
    assert process is not None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while children.exists() and children.read_text():
        assert time.monotonic() - begin < 5
        time.sleep(0.01)
    assert small.make_matchers("regex:ab")


def test_a_killed_trial_process_is_restarted(small: GrammarBackend) -> None:
    """The next trial after a kill starts the process again."""
    small.make_matchers("regex:a")
    assert small._trial_process.process is not None
    small._trial_process.process.kill()
    small._trial_process.process.wait()
    assert small.make_matchers("regex:abc")
    with pytest.raises(ValueError, match="regex grammar"):
        small.make_matchers("regex:[c")


def test_fast_grammars_are_compiled_again_and_slow_ones_copied(
    small: GrammarBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow grammar is compiled once for all completions and requests, and again after its matcher failed; its memory
    counts while a matcher lives."""
    calls = list[str]()

    def compile(*args: Any) -> Any:
        calls.append(args[2])
        return compile_grammar(*args)

    monkeypatch.setattr(token_masks, "compile_grammar", compile)
    small.make_matchers("regex:x+", 3)
    assert calls == ["x+"] * 3
    monkeypatch.setattr(token_masks, "FAST_COMPILE_SECONDS", 0)
    monkeypatch.setitem(small._trial_results, token_masks._grammar_key("regex:y+"), {"bytes": 1000})
    before = small._compiled_bytes[0]
    matchers = small.make_matchers("regex:y+", 3) + small.make_matchers("regex:y+", 2)
    assert calls[3:] == ["y+"] and small._compiled_bytes[0] == before + 1000
    matchers[0].accept_token(small.tokenizer.encode("y")[0])  # type: ignore[union-attr]
    assert not matchers[1].matcher.is_accepting() and matchers[0].matcher.is_accepting()
    small._compiled_matchers.popitem()[1].error = "an error"
    assert not small.make_matchers("regex:y+")[0].failed and calls[3:] == ["y+"] * 2
    monkeypatch.setattr(token_masks, "MAX_COMPILED_BYTES", 500)
    small._compiled_matchers.clear()
    with pytest.raises(ValueError, match="try again later"):
        small.make_matchers("regex:y+")
    del matchers
    assert small._compiled_bytes[0] == before


def test_a_slow_mask_ends_its_request_alone(words: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step after a slow step computes masks one by one, and fails the slow matcher alone."""
    from llguidance import numpy

    fill_all, fill_row, slow = numpy.fill_next_token_bitmask_par, numpy.fill_next_token_bitmask, list[Any]()

    def burn(matchers: list[Any]) -> None:
        end = time.thread_time() + 0.1 * any(m is s for m in matchers for s in slow)
        while time.thread_time() < end:
            pass

    def slow_par(pool: Any, matchers: Any, bits: Any) -> None:
        burn([m for m, _ in matchers])
        fill_all(pool, matchers, bits)

    def slow_one(matcher: Any, bits: Any, row: int) -> None:
        burn([matcher])
        fill_row(matcher, bits, row)

    monkeypatch.setattr(numpy, "fill_next_token_bitmask_par", slow_par)
    monkeypatch.setattr(numpy, "fill_next_token_bitmask", slow_one)
    monkeypatch.setattr(token_masks, "MAX_MASK_SECONDS", 0.09)
    with engine(words) as e:
        ids = [e.add("once", with_grammar(f"regex:{DATE}", seed=i)) for i in range(3)]
        e.step()
        state = next(s for s in e.core.sequence_states.values() if s.output.request_id == ids[1])
        assert state.matcher is not None
        slow.append(state.matcher.matcher)
        outputs = finish(e)
    c = outputs[ids[1]].completions[0]
    assert c.finish_reason == "error" and "its next tokens take longer than 0.09 s to find" in c.error
    assert re.fullmatch(DATE, outputs[ids[0]].completions[0].text) and re.fullmatch(
        DATE, outputs[ids[2]].completions[0].text
    )


def test_asyncio_compiles_beside_the_steps(words: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests run while grammars compile; cancelling a request cancels its compilation; errors name the prompt."""

    async def main(e: fastgen.AsyncEngine) -> None:
        make, cancel_events, is_released = e.engine.grammars.make_matchers, list[threading.Event](), threading.Event()

        def waiting(grammar: str, num_matchers: int = 1, cancel_event: threading.Event | None = None) -> Any:
            if cancel_event is None:
                return make(grammar, num_matchers)
            cancel_events.append(cancel_event)
            while not (cancel_event.wait(0.005) or is_released.is_set()):
                pass
            return make(grammar, num_matchers, cancel_event)

        monkeypatch.setattr(e.engine.grammars, "make_matchers", waiting)
        params = [with_grammar(f"regex:{DATE}", seed=i, n=2) for i in range(2)]
        running, cancelled = (asyncio.create_task(e.add("once", p)) for p in params)
        plain = [o async for _, o in e.generate(["a", "b"], SamplingParams(max_tokens=20))]
        assert len(plain) == 2 and not running.done() and not cancelled.done()
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        is_released.set()
        output = await (await running).output()
        assert all(re.fullmatch(DATE, c.text) for c in output.completions if c.finish_reason == "stop")
        assert [cancel_event.is_set() for cancel_event in cancel_events] == [False, True]
        assert not e.engine.grammars._prebuilt_matchers.get(token_masks._grammar_key(f"regex:{DATE}"))
        with pytest.raises(ValueError, match="prompt 1: json grammar: it is nested 501 levels"):
            await anext(e.generate(["a", "b"], [SamplingParams(max_tokens=5), with_grammar("json:" + nested(500))]))

    with engine(words) as e, fastgen.AsyncEngine(e) as ae:
        asyncio.run(main(ae))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("where", ["push", "flush"])
def test_a_tokenizer_that_fails_ends_its_request_alone(
    where: str, overlap: bool, words: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in one request's detokenization, in the middle or at the end, leaves other requests' texts alone."""
    params = [SamplingParams(max_tokens=6, seed=i, ignore_eos=True) for i in range(3)]
    with engine(words, overlap=overlap) as e:
        expected = [o.completions[0] for o in e.generate(["a", "b", "c"], params)]
        ids = [e.add(p, s) for p, s in zip("abc", params, strict=True)]
        state = next(s for s in e.core.sequence_states.values() if s.output.request_id == ids[1])
        monkeypatch.setattr(state.detokenizer, where, lambda *_, **__: 1 / 0)
        outputs = finish(e)
        assert not e.core.sequence_states and e.generate("a", params[0])[0].completions[0] == expected[0]
    failed = outputs[ids[1]].completions[0]
    assert failed.finish_reason == "error" and failed.error == "ZeroDivisionError: division by zero"
    assert failed.token_ids == expected[1].token_ids[: 1 if where == "push" else 6]
    assert [outputs[i].completions[0] for i in (ids[0], ids[2])] == [expected[0], expected[2]]


@settings(deadline=None, max_examples=50)
@given(allowed=st.lists(st.integers(0, 99), max_size=20), rows=st.integers(1, 3))
def test_token_masks_are_applied(allowed: list[int], rows: int) -> None:
    """Applying bit masks equals plain indexing."""
    bits = np.zeros((rows, 4), np.uint32)
    for t in allowed:
        bits[0, t // 32] |= np.uint32(1 << t % 32)
    logits = torch.randn(rows, 100)
    actual = apply_token_mask(logits, torch.from_numpy(bits.view(np.int32)).to(logits.device))
    expected = torch.full_like(logits, float("-inf"))
    expected[0, allowed] = logits[0, allowed]
    assert torch.equal(actual, expected)


def test_masks_of_several_matchers(words: PreTrainedTokenizerFast) -> None:
    """Rows without a matcher allow every token; a finished matcher allows only the end."""
    grammars = GrammarBackend(words, 300, frozenset([256]))
    a, b = grammars.make_matchers("regex:a", 2)
    b.accept_token(words.encode("a")[0])
    b.accept_token(256)
    bits = grammars.token_masks([(1, a), (3, b)], 5).view(np.uint32)
    allowed = [{t for t in range(300) if bits[r, t // 32] >> np.uint32(t % 32) & 1} for r in range(5)]
    assert allowed[0] == allowed[2] == allowed[4] == {*range(300)}
    assert allowed[1] == {words.encode("a")[0]} and allowed[3] == {256}


def test_ranks_agree_on_a_grammar(words: PreTrainedTokenizerFast, small: GrammarBackend) -> None:
    """Rank 0 makes its workers compile only grammars that passed; the caller's ranks refuse a grammar together."""

    def rank_backend(**options: Any) -> GrammarBackend:
        grammars = GrammarBackend(words, 300, frozenset([256]), **options)
        grammars._trial_process = small._trial_process
        return grammars

    calls, accepted = list[tuple[str, int]](), list[bool]()
    first = rank_backend(precompile_on_workers=lambda *call: calls.append(call), all_reduce_min=lambda _: 0)
    assert len(first.compile(with_grammar("regex:ab", n=2))) == 2 and first.compile(SamplingParams(n=2)) == [None] * 2
    with pytest.raises(ValueError, match="regex grammar"):
        first.compile(with_grammar("regex:["))
    first.precompile(with_grammar("regex:abb", n=2), threading.Event())
    assert calls == [("regex:ab", 2), ("regex:abb", 2)] and first.has_prebuilt("regex:abb", 2)
    assert first.compile(with_grammar("regex:abb")) and len(calls) == 2, "the workers have compiled it already"

    other = rank_backend(all_reduce_min=lambda accepts: accepted.append(bool(accepts)) or accepts)
    assert other.compile(with_grammar("regex:ab"))
    with pytest.raises(ValueError, match="regex grammar"):
        other.compile(with_grammar("regex:["))
    assert accepted == [True, False]
    with pytest.raises(ValueError, match="another rank refuses the grammar"):
        rank_backend(all_reduce_min=lambda _: 0).compile(with_grammar("regex:ab"))
    worker = GrammarBackend(words, 300, frozenset([256]), all_reduce_min=lambda _: 0)
    worker.skip_trials = True
    worker.prebuild_matchers("regex:ab", 2)
    assert len(worker.compile(with_grammar("regex:ab", n=2))) == 2 and worker._trial_process.process is None
