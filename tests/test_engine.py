"""The engine on a tiny random model: tokens do not depend on their company, and nothing is lost or leaked."""

import gc
import itertools
import json
import pkgutil
import random
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import fastgen
from fastgen import Event, Output, SamplingParams
from fastgen.core import scheduler
from fastgen.core.attention import reference
from fastgen.core.sampling import exponential_noise
from fastgen.core.scheduler import Span

CONFIG = tiny.config("Mistral", **tiny.WINDOWED)
SPEC = fastgen.from_hf_config(CONFIG)
PARAMS = tiny.weights(SPEC)
DICE = random.Random(0)
PROMPTS = [[DICE.randrange(61) for _ in range(n)] for n in (5, 1, 23, 9, 2, 17)]
GREEDY = SamplingParams(temperature=0, max_tokens=10)
DRAWN = [SamplingParams(seed=i, max_tokens=10) for i in range(len(PROMPTS))]


class Engine(fastgen.Engine):
    """Checks the scheduler's invariants after every step, and that nobody waits for steps that do nothing."""

    idle = 0  # steps in a row

    def step(self) -> list[Event]:
        before, events = self.state, super().step()
        scheduler.check(self.state, self.config.schedule)
        self.idle = 0 if events or self.state != before else self.idle + 1
        assert self.idle < 9, "nothing happens any more"
        return events


def engine(**settings: Any) -> Engine:
    return Engine(PARAMS, SPEC, **settings)


def logits(tokens: list[int]) -> Tensor:
    """[T, V] computed at once, by the attention that is the specification, in a cache of its own."""
    batch = fastgen.build_batch((Span(0, 0, len(tokens), True, (1, 2, 3, 4)),), {0: tokens}, 16)
    cache = fastgen.new_kv_cache(SPEC, 5 * 16)
    return fastgen.compute_logits(PARAMS, fastgen.hidden_states(PARAMS, cache, batch, SPEC, reference))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("page_size", [1, 8, 16, 48])
def test_forward_of_the_engines_own_batch(page_size: int, overlap: bool) -> None:
    """The logits of a step, computed again from parameters, cache and batch: what the step drew, and its logprobs."""
    e = engine(page_size=page_size, overlap=overlap, prefix_cache=False, max_num_seqs=4)
    assert e.last_batch is None
    for prompt in PROMPTS[:3]:
        e.add(prompt, replace(GREEDY, logprobs=0, max_tokens=5))
    launched: list[Tensor] = []  # of each step, the logprobs that forward gives for its rows
    drawn: list[list[tuple[int, float]]] = []
    while e.has_unfinished_requests:
        steps, events = e.num_steps, e.step()
        if e.num_steps > steps:
            assert e.last_batch is not None and e.last_batch.page_size == page_size
            launched.append(fastgen.forward(e.params, e.cache, e.last_batch, e.model_config).log_softmax(-1))
        drawn += [[(x.token_ids[0], x.logprobs[0]) for x in events if x.logprobs]]
    drawn = [step for step in drawn if step]
    assert len(drawn) == 5 and all(len(step) == 3 for step in drawn)
    for step, value in zip(drawn, launched, strict=False):
        best = value.max(-1)
        for token, logprob in step:
            row = best.indices.tolist().index(token)
            assert float(best.values[row]) == pytest.approx(logprob, abs=1e-5)
    e.close()


def greedy(prompt: list[int], n: int, banned: Iterable[int] = (), until: int = 0) -> list[int]:
    """The most likely tokens, one after the other, all computed anew for each; some banned at first."""
    tokens = list(prompt)
    for i in range(n):
        last = logits(tokens)[-1]
        last[list(banned) if i < until else []] = float("-inf")
        tokens.append(int(last.argmax()))
    return tokens[len(prompt) :]


WANTED = [greedy(prompt, 10) for prompt in PROMPTS]


def tokens(outputs: Iterable[Output]) -> list[list[int]]:
    """Of every completion."""
    return [c.token_ids for output in outputs for c in output.completions]


def collect(events: Iterable[Event]) -> dict[int, Output]:
    """Outputs by request; asserts that the events told each of them once and completely."""
    told, outputs = defaultdict[tuple[int, int], list[Event]](list), dict[int, Output]()
    for event in events:
        assert event.request_id not in outputs, "an event after the last one"
        assert not any(e.finish_reason for e in told[event.request_id, event.index])
        told[event.request_id, event.index].append(event)
        if event.output is not None:
            outputs[event.request_id] = event.output
    assert outputs.keys() == {id for id, _ in told}
    for (id, index), parts in told.items():
        c = outputs[id].completions[index]
        assert [t for e in parts for t in e.token_ids] == c.token_ids
        assert "".join(e.text for e in parts) == c.text
        assert parts[-1].finish_reason == c.finish_reason is not None
    return outputs


def drain(engine: Engine) -> list[Event]:
    """All events that are left."""
    events = []
    while engine.has_unfinished_requests:
        events += engine.step()
        assert len(events) < 1000, "it reports without end"
    return events


def idle(engine: Engine) -> None:
    """Asserts that nothing runs, waits or is still to be reported, and that every page is free."""
    assert not engine.has_unfinished_requests
    assert engine.step() == []  # the first call after a stream was left aborts its requests
    state = engine.state
    assert not state.running and not state.waiting
    scheduler.check(state, engine.config.schedule)
    assert state.prefix_cache.num_available_pages() == engine.cache_capacity // state.page_size


# --- the same tokens in any company -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn() -> list[list[int]]:
    """What DRAWN gives for each prompt alone."""
    return [tokens(engine().generate(p, s))[0] for p, s in zip(PROMPTS, DRAWN, strict=True)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prefill_chunk": 3},
        {"token_budget": 4, "max_num_seqs": 4},
        {"token_budget": 7, "max_num_seqs": 1},
        {"page_size": 1},
        {"page_size": 4, "prefill_chunk": 7},
        {"page_size": 4, "cache_tokens": 36},  # room for the longest prompt and little else
        {"policy": "prefill_first"},
        {"policy": "prefill_first", "token_budget": 8, "max_num_seqs": 3, "page_size": 4},
        {"overlap": True},
        {"overlap": True, "token_budget": 7, "max_num_seqs": 3, "cache_tokens": 128},
        {"attention": "reference"},
        {"attention": "reference", "page_size": 4, "prefill_chunk": 3, "cache_tokens": 64},
    ],
    ids=str,
)
def test_tokens_do_not_depend_on_settings(settings: dict[str, Any], drawn: list[list[int]]) -> None:
    """Chunks, budget, pages, queueing, policy or attention change what a request generates."""
    e = engine(**settings)
    assert tokens(e.generate(PROMPTS, GREEDY)) == WANTED
    assert tokens(e.generate(PROMPTS, DRAWN)) == drawn
    mixed = e.generate([*PROMPTS, *PROMPTS[::-1]], [GREEDY] * len(PROMPTS) + DRAWN[::-1])
    assert tokens(mixed) == WANTED + drawn[::-1]
    idle(e)


def test_model_reads_its_context() -> None:
    """The tests above prove little if the model forgot everything but the last token."""
    assert len({*map(tuple, WANTED)}) == len(PROMPTS) and min(len({*w}) for w in WANTED) > 3
    end = PROMPTS[2][-2:]
    assert len({greedy([first, *end], 1)[0] for first in range(20)}) > 1


def test_alone_is_as_recomputed(drawn: list[list[int]]) -> None:
    """One request on its own goes wrong, or its noise is not that of its seed and position."""
    for prompt, wanted in zip(PROMPTS, WANTED, strict=True):
        assert tokens(engine().generate(prompt, GREEDY)) == [wanted]
    for prompt, wanted, params in zip(PROMPTS, drawn, DRAWN, strict=True):
        z, position = logits(prompt + wanted)[len(prompt) - 1 : -1], len(prompt) + torch.arange(10)
        noise = exponential_noise(torch.full((10,), params.seed), position, 61)
        assert (z - noise.log()).argmax(-1).tolist() == wanted


def test_requests_that_come_and_go() -> None:
    """Arrivals and aborts between the steps disturb those who are running."""
    e, dice, events = engine(page_size=4, cache_tokens=96, prefill_chunk=5), random.Random(1), []
    added, aborted = dict[int, int](), dict[int, Output]()
    for _ in range(60):
        if dice.random() < 0.5:
            which = dice.randrange(len(PROMPTS))
            added[e.add(PROMPTS[which], GREEDY)] = which
        if added and dice.random() < 0.3:
            id = dice.choice(list(added))
            if (output := e.abort(id)) is not None:
                aborted[id] = output
        events += e.step()
    outputs = collect(events + drain(e))
    assert outputs.keys() == added.keys() and len(aborted) > 4 and len(added) - len(aborted) > 9
    for id, output in outputs.items():
        (got,), wanted = tokens([output]), WANTED[added[id]]
        assert got == (wanted[: len(got)] if id in aborted else wanted)
    idle(e)


def test_requests_share_steps() -> None:
    """Running one after the other would be right, and slow: six requests need no more steps than one."""
    e = engine()
    e.generate(PROMPTS, GREEDY)
    assert e.num_steps == 10
    e = engine(prefill_chunk=3)
    e.generate(PROMPTS[3], GREEDY)
    assert e.num_steps == 3 + 9


# --- seeds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"prefill_chunk": 3, "cache_tokens": 48, "page_size": 4}], ids=str)
def test_samples_of_a_request(settings: dict[str, Any], drawn: list[list[int]]) -> None:
    """The samples are copies, or the first depends on how many there are."""
    e = engine(**settings)
    outputs = e.generate(PROMPTS, [replace(s, n=3) for s in DRAWN])
    assert [o.completions[0].token_ids for o in outputs] == drawn
    for output in outputs:
        assert len({*map(tuple, tokens([output]))}) == 3
    assert tokens(engine().generate(PROMPTS[0], replace(DRAWN[0], n=3))) == tokens(outputs[:1])
    idle(e)


def test_requests_without_a_seed_differ() -> None:
    """A fixed default seed would give everyone the same answer."""
    e = engine()
    assert len({*map(tuple, tokens(e.generate([PROMPTS[0]] * 4, SamplingParams(max_tokens=10))))}) == 4


def test_engine_seed() -> None:
    """A run cannot be repeated, or the engine's seed reaches requests that bring one."""
    same, again, other = (tokens(engine(seed=s).generate(PROMPTS, SamplingParams(max_tokens=10))) for s in (5, 5, 6))
    assert same == again
    assert not any(a == b for a, b in zip(same, other, strict=True))
    assert tokens(engine(seed=5).generate(PROMPTS, DRAWN)) == tokens(engine(seed=6).generate(PROMPTS, DRAWN))


# --- one at a time ------------------------------------------------------------------------------------------


def test_step_gives_every_token_once() -> None:
    """Events are lost, doubled, or do not add up to the output."""
    e = engine(prefill_chunk=4)
    ids = [e.add(p, replace(GREEDY, n=2)) for p in PROMPTS]
    outputs = collect(drain(e))
    assert [*ids] == sorted(outputs)
    assert [c for id in ids for c in tokens([outputs[id]])] == [w for w in WANTED for _ in range(2)]
    assert all(c.finish_reason == "length" for o in outputs.values() for c in o.completions)
    idle(e)
    assert e.step() == []


def test_abort_a_running_request() -> None:
    """What it has so far is lost, its pages stay taken, or nobody hears of it."""
    e = engine()
    id, other = e.add(PROMPTS[0], GREEDY), e.add(PROMPTS[1], GREEDY)
    events = [event for _ in range(4) for event in e.step()]
    output = e.abort(id)
    assert output is not None and output.request_id == id and output.finished
    assert tokens([output]) == [WANTED[0][:4]]
    assert output.completions[0].finish_reason == "abort"
    assert [s.id for s in e.state.running] == [1]
    last = e.step()
    assert last[0].output is output and last[0].token_ids == []
    outputs = collect(events + last + drain(e))
    assert outputs.keys() == {id, other} and tokens([outputs[other]]) == [WANTED[1]]
    idle(e)


def test_abort_a_waiting_request() -> None:
    """A request that never ran is reported, and does not run."""
    e = engine(max_num_seqs=1)
    first, second = e.add(PROMPTS[0], GREEDY), e.add(PROMPTS[1], replace(GREEDY, n=2))
    e.step()
    output = e.abort(second)
    assert output is not None and tokens([output]) == [[], []]
    assert sum(event.output is output for event in e.step()) == 1
    assert {event.request_id for event in drain(e)} == {first}


def test_abort_when_some_samples_have_ended() -> None:
    """The reasons of samples that ended before are overwritten."""
    e, events = engine(), []
    e.add(PROMPTS[0], SamplingParams(n=8, seed=0, max_tokens=30, stop_token_ids=tuple(range(12))))
    while not any(event.finish_reason for event in events):
        events += e.step()
    ended = {event.index for event in events if event.finish_reason}
    output = e.abort(0)
    assert output is not None and 0 < len(ended) < 8
    assert {i for i, c in enumerate(output.completions) if c.finish_reason == "stop"} == ended
    assert collect(events + drain(e))[0] is output
    idle(e)


def test_abort_what_does_not_run() -> None:
    """It is an error, or it reports a request twice."""
    e = engine()
    assert e.abort(0) is None
    one, two = e.add(PROMPTS[0], GREEDY), e.add(PROMPTS[1], GREEDY)
    assert e.abort(one) is not None
    assert e.abort(one) is None
    events = drain(e)
    assert e.abort(two) is None
    assert collect(events).keys() == {one, two}
    idle(e)


# --- many at once -------------------------------------------------------------------------------------------


def test_outputs_are_in_the_order_of_the_prompts() -> None:
    """Requests that end earlier come first."""
    lengths = [9, 2, 7, 1, 10, 3]
    outputs = engine().generate(PROMPTS, [replace(GREEDY, max_tokens=n) for n in lengths])
    assert [o.prompt_token_ids for o in outputs] == PROMPTS
    assert tokens(outputs) == [w[:n] for w, n in zip(WANTED, lengths, strict=True)]


def test_one_or_many_prompts() -> None:
    """A list of token ids taken for many prompts, or a list of prompts for one."""
    e = engine()
    assert tokens(e.generate(PROMPTS[0], GREEDY)) == tokens(e.generate([PROMPTS[0]], GREEDY)) == WANTED[:1]
    assert tokens(e.generate(tuple(PROMPTS[:2]), [GREEDY, GREEDY])) == WANTED[:2]
    assert e.generate([], GREEDY) == []


def test_stream_gives_all_events() -> None:
    """Events of some requests are left out, or the ids do not count up from the first."""
    e = engine()
    e.generate(PROMPTS[0], GREEDY)
    outputs = collect(e.stream(PROMPTS, GREEDY))
    assert sorted(outputs) == [1, 2, 3, 4, 5, 6]
    assert tokens(outputs[id] for id in sorted(outputs)) == WANTED
    idle(e)


@pytest.mark.parametrize("seen", [1, 3, 8])
def test_leaving_a_stream_aborts(seen: int) -> None:
    """What nobody waits for goes on running, or is reported to the next caller."""
    e = engine(max_num_seqs=4)
    for event, _ in zip(e.stream(PROMPTS, GREEDY), range(seen), strict=False):
        assert event.token_ids
    idle(e)
    assert tokens(e.generate(PROMPTS, GREEDY)) == WANTED


def test_error_in_the_body_of_a_stream() -> None:
    """A notebook keeps the traceback, and with it what was streaming."""
    e = engine()
    with pytest.raises(ZeroDivisionError) as kept:
        for _ in e.stream(PROMPTS, GREEDY):
            _ = 1 / 0
    idle(e)
    assert kept.tb is not None


def test_aborting_from_within_a_stream() -> None:
    """The loop waits for ever for a request that was aborted in it."""
    e, events = engine(), []
    for event in e.stream(PROMPTS, GREEDY):
        events.append(event)
        if len(events) == 7:
            e.abort(2)
    outputs = collect(events)
    assert [o.completions[0].finish_reason for o in outputs.values()].count("abort") == 1
    assert tokens(outputs[id] for id in (0, 1, 3, 4, 5)) == WANTED[:2] + WANTED[3:]
    idle(e)


def test_interleaved_streams() -> None:
    """One stream swallows the other's events."""
    e = engine(max_num_seqs=4)
    one, two = e.stream(PROMPTS[:3], GREEDY), e.stream(PROMPTS[3:], GREEDY)
    both = list(itertools.zip_longest(one, two))
    first, second = (collect(event for event in events if event is not None) for events in zip(*both, strict=True))
    assert (sorted(first), sorted(second)) == ([0, 1, 2], [3, 4, 5])
    assert tokens({**first, **second}[id] for id in range(6)) == WANTED
    idle(e)


def test_generate_beside_single_steps() -> None:
    """Events of requests in flight are lost or doubled by a call that does not wait for them."""
    e = engine(max_num_seqs=4)
    ids = [e.add(PROMPTS[0], GREEDY), e.add(PROMPTS[1], replace(GREEDY, max_tokens=3))]
    events = e.step()
    assert tokens(e.generate(PROMPTS[2:4], GREEDY)) == WANTED[2:4]
    ids.append(e.add(PROMPTS[4], GREEDY))
    assert tokens(e.generate(PROMPTS[5], replace(GREEDY, max_tokens=2))) == [WANTED[5][:2]]
    assert e.has_unfinished_requests
    outputs = collect(events + drain(e))
    assert tokens(outputs[id] for id in ids) == [WANTED[0], WANTED[1][:3], WANTED[4]]
    idle(e)


# --- interrupts and errors ----------------------------------------------------------------------------------

PLACES = (
    "fastgen.compiled.runner.forward_and_sample",
    "fastgen.core.batch.InputBuffers.fill",
    "fastgen.compiled.runner.ModelRunner.sample",
    "fastgen.core.request.SequenceState.append_token",
    "fastgen.core.scheduler.commit",
)
PUSH = PLACES[3]  # whose errors are a request's own


def failing(monkeypatch: pytest.MonkeyPatch, place: str, call: int, error: type[BaseException]) -> None:
    """Raise `error` once, at the beginning of the call-th call of a function."""
    inner, calls = pkgutil.resolve_name(place), itertools.count()

    def outer(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise error
        return inner(*args, **kwargs)

    monkeypatch.setattr(place, outer)


def by_steps(e: Engine) -> None:
    for prompt in PROMPTS:
        e.add(prompt, GREEDY)
    drain(e)


WAYS: dict[str, Callable[[Engine], object]] = {
    "generate": lambda e: e.generate(PROMPTS, GREEDY),
    "stream": lambda e: list(e.stream(PROMPTS, GREEDY)),
    "step": by_steps,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("call", "overlap"), [(0, False), (4, False), (4, True)])
def test_interrupt(way: str, place: str, call: int, overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a notebook leaves pages taken, or tokens of half a step behind."""
    e = engine(max_num_seqs=4, prefill_chunk=7, overlap=overlap)
    failing(monkeypatch, place, call, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        WAYS[way](e)
    drain(e)
    idle(e)
    assert tokens(e.generate(PROMPTS, GREEDY)) == WANTED
    idle(e)


def test_interrupt_keeps_what_was_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that had ended, its events not fetched yet, is lost with those that were running."""
    e = engine()
    id = e.add(PROMPTS[0], replace(GREEDY, max_tokens=2))
    e.generate(PROMPTS[1], GREEDY)
    failing(monkeypatch, "fastgen.compiled.runner.forward_and_sample", 3, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        e.generate(PROMPTS[2], GREEDY)
    assert tokens([collect(drain(e))[id]]) == [WANTED[0][:2]]
    idle(e)


@pytest.mark.parametrize("way", ["generate", "stream"])
@pytest.mark.parametrize("place", [place for place in PLACES if place != PUSH])
def test_error(way: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the device runs out of memory, say, the engine is of no more use."""
    e = engine(max_num_seqs=4, prefill_chunk=7)
    failing(monkeypatch, place, 3, RuntimeError)
    with pytest.raises(RuntimeError):
        WAYS[way](e)
    idle(e)
    assert tokens(e.generate(PROMPTS, GREEDY)) == WANTED


def test_error_of_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tokenizer or a grammar raises about one request ends the others, too."""
    e = engine(max_num_seqs=4, prefill_chunk=7)
    failing(monkeypatch, PUSH, 3, RuntimeError)
    ended = [output.completions[0] for output in e.generate(PROMPTS, GREEDY)]
    (failed,) = [i for i, c in enumerate(ended) if c.finish_reason == "error"]
    assert ended[failed].error == "RuntimeError: " and len(ended[failed].token_ids) < len(WANTED[failed])
    assert [c.token_ids for i, c in enumerate(ended) if i != failed] == [w for i, w in enumerate(WANTED) if i != failed]
    idle(e)


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([1] * 64, {"max_tokens": 1}, r"64 prompt tokens and max_tokens=1 .* context of 64 tokens: the prompt alone"),
        ([1] * 70, {"max_tokens": None}, r"70 prompt tokens .* context of 64 tokens: the prompt alone is too long"),
        ([1] * 20, {"max_tokens": 45}, r"20 prompt tokens and max_tokens=45 .* context of 64 .* at most 44"),
        ([1, 61], {}, r"prompt: token 61 is outside the vocabulary of 61"),
        ([-1], {}, r"prompt: token -1 is outside"),
        ([1], {"stop_token_ids": (3, 61)}, r"stop_token_ids: token 61 is outside"),
        ([1], {"logit_bias": {99: 1.0}}, r"logit_bias: token 99 is outside"),
        ([1], {"logprobs": 62}, r"logprobs=62 is more than the vocabulary of 61"),
        ([1], {"prompt_logprobs": 62}, r"prompt_logprobs=62 is more than the vocabulary of 61"),
        ([1], {"stop": ("x",)}, r"stop strings need a tokenizer"),
        ([], {}, r"the prompt is empty"),
        ("", {}, r"the prompt is empty"),
        ("text", {}, r"without a tokenizer"),
        ([{"role": "user", "content": "hi"}], {}, r"without a tokenizer"),
        ([True], {}, r"without a tokenizer"),
    ],
)
def test_refused(prompt: Any, params: dict[str, Any], message: str) -> None:
    """What can never run is queued, or refused without saying why."""
    e = engine()
    with pytest.raises(ValueError, match=message):
        e.add(prompt, SamplingParams(**{"max_tokens": 4, **params}))
    idle(e)
    assert e.add(PROMPTS[0], GREEDY) == 0


def test_refused_by_the_cache() -> None:
    """What the cache can never hold would wait for ever, and all behind it; what just fits has to run."""
    e = engine(page_size=4, cache_tokens=35)  # 32, in whole pages
    with pytest.raises(ValueError, match=r"40 prompt tokens .* cache of 32 tokens: the prompt alone is too long"):
        e.add([1] * 40, GREEDY)
    with pytest.raises(ValueError, match=r"23 prompt tokens and max_tokens=11 .* cache of 32 .* at most 10"):
        e.add(PROMPTS[2], replace(GREEDY, max_tokens=11))
    assert tokens(e.generate(PROMPTS[2], GREEDY)) == [WANTED[2]]


def test_just_fits_the_context() -> None:
    """The longest request allowed is refused, or overruns the cache."""
    assert tokens(engine().generate([1] * 63, replace(GREEDY, max_tokens=1))) == [greedy([1] * 63, 1)]
    everything = replace(GREEDY, max_tokens=1, logprobs=61, prompt_logprobs=61)
    assert len(engine().generate([0, 60], everything)[0].completions[0].top_logprobs[0]) == 61


@pytest.mark.parametrize("way", ["generate", "stream"])
def test_one_bad_prompt_of_many(way: str) -> None:
    """The message does not say which, some of the others stay queued, or requests in flight suffer."""
    e = engine()
    id = e.add(PROMPTS[0], GREEDY)
    events = e.step()
    with pytest.raises(ValueError, match=r"^prompt 2: prompt: token 61 is outside"):
        getattr(e, way)([PROMPTS[1], PROMPTS[2], [61], PROMPTS[3]], GREEDY)
    assert [s.output.request_id for s in e.core.sequence_states.values()] == [id]
    assert collect(events + drain(e)).keys() == {id}
    idle(e)
    with pytest.raises(ValueError, match=r"^prompt: token 61"):
        getattr(e, way)([61], GREEDY)
    with pytest.raises(ValueError, match="1 sampling settings for 2 prompts"):
        getattr(e, way)(PROMPTS[:2], [GREEDY])
    idle(e)


# --- how a completion ends ----------------------------------------------------------------------------------

END = WANTED[2][4]  # a token that the third prompt comes to
UNTIL = WANTED[2].index(END) + 1


@pytest.mark.parametrize(
    ("eos", "params", "wanted", "reason"),
    [
        ((), {}, WANTED[2], "length"),
        ((END,), {}, WANTED[2][:UNTIL], "stop"),
        ((60, END), {}, WANTED[2][:UNTIL], "stop"),
        ((END,), {"ignore_eos": True}, WANTED[2], "length"),
        ((), {"stop_token_ids": (END,)}, WANTED[2][:UNTIL], "stop"),
        ((END,), {"stop_token_ids": (END,), "ignore_eos": True}, WANTED[2][:UNTIL], "stop"),
        ((END,), {"max_tokens": UNTIL}, WANTED[2][:UNTIL], "stop"),
        ((END,), {"max_tokens": UNTIL - 1}, WANTED[2][: UNTIL - 1], "length"),
    ],
)
def test_finish_reason(eos: tuple[int, ...], params: dict[str, Any], wanted: list[int], reason: str) -> None:
    """A completion runs past its end, stops too early, or gives the wrong reason."""
    e = Engine(PARAMS, replace(SPEC, eos_token_ids=eos))
    (output,) = e.generate(PROMPTS[2], replace(GREEDY, **params))
    assert (output.completions[0].token_ids, output.completions[0].finish_reason) == (wanted, reason)
    idle(e)


def test_min_tokens() -> None:
    """The end token is drawn too early, or stays banned."""
    e = Engine(PARAMS, replace(SPEC, eos_token_ids=(END,)))
    for least in range(9):
        wanted = greedy(PROMPTS[2], 10, [END], least)
        wanted = wanted[: wanted.index(END) + 1] if END in wanted else wanted
        assert len(wanted) > least
        assert tokens(e.generate(PROMPTS[2], replace(GREEDY, min_tokens=least))) == [wanted]


def test_no_max_tokens() -> None:
    """It ends before context or cache is full, or runs beyond."""
    endless = replace(GREEDY, max_tokens=None)
    (output,) = engine().generate(PROMPTS[2], endless)
    assert len(output.completions[0].token_ids) == 64 - 23 and output.completions[0].finish_reason == "length"
    (small,) = engine(page_size=4, cache_tokens=40).generate(PROMPTS[2], endless)
    assert small.completions[0].token_ids == output.completions[0].token_ids[: 41 - 23]


def letters(**special: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are characters from "0" on."""
    t = Tokenizer(models.WordLevel({chr(48 + i): i for i in range(61)}, unk_token="0"))
    t.pre_tokenizer, t.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=t, **special)


def spelled(tokens: list[int]) -> str:
    return "".join(chr(48 + t) for t in tokens)


def test_text_and_stop_strings() -> None:
    """Text does not follow the tokens, a stop string stays in it, or it does not end the request."""
    e, wanted = Engine(PARAMS, SPEC, letters()), spelled(WANTED[2])
    sampling = [GREEDY, replace(GREEDY, stop=(wanted[4:6],))]
    outputs = collect(e.stream([spelled(PROMPTS[2])] * 2, sampling))
    assert outputs[0].prompt_token_ids == PROMPTS[2]
    (plain,), (cut,) = outputs[0].completions, outputs[1].completions
    assert (plain.text, plain.token_ids, plain.finish_reason) == (wanted, WANTED[2], "length")
    assert (cut.text, cut.token_ids, cut.finish_reason) == (wanted[:4], WANTED[2][:6], "stop")
    idle(e)


def test_tokenizer_end_token() -> None:
    """Checkpoints whose config names no end token would never stop."""
    e = Engine(PARAMS, SPEC, letters(eos_token=spelled([END])))
    (c,) = e.generate(PROMPTS[2], GREEDY)[0].completions
    assert (c.token_ids, c.finish_reason) == (WANTED[2][:UNTIL], "stop")


# --- logprobs -----------------------------------------------------------------------------------------------


def test_logprobs() -> None:
    """They are another distribution's or another token's, or are given to those who did not ask."""
    asked = [GREEDY, replace(GREEDY, logprobs=0), replace(GREEDY, logprobs=5), replace(DRAWN[3], logprobs=2)]
    outputs = engine().generate(PROMPTS[:4], asked)
    none, only, five, two = (o.completions[0] for o in outputs)
    assert none.logprobs is none.top_logprobs is only.top_logprobs is None
    for output in outputs[1:]:
        c, n = output.completions[0], len(output.prompt_token_ids)
        direct = logits(output.prompt_token_ids + c.token_ids).log_softmax(-1)[n - 1 : -1]
        torch.testing.assert_close(torch.tensor(c.logprobs), direct[range(10), c.token_ids], atol=1e-4, rtol=1e-4)
        for row, top in zip(direct, c.top_logprobs or (), strict=False):
            assert list(top) == row.topk(len(top)).indices.tolist()
            torch.testing.assert_close(torch.tensor([*top.values()]), row[[*top]], atol=1e-4, rtol=1e-4)
    assert [len(top) for top in five.top_logprobs] == [5] * 10 and [len(top) for top in two.top_logprobs] == [2] * 10
    assert five.logprobs == [next(iter(top.values())) for top in five.top_logprobs]


def test_logprobs_in_events() -> None:
    """A stream's events carry another token's logprobs than the output does."""
    events = list(engine().stream(PROMPTS[0], replace(GREEDY, logprobs=3)))
    (c,) = events[-1].output.completions
    assert [x for e in events for x in e.logprobs] == c.logprobs
    assert [x for e in events for x in e.top_logprobs] == c.top_logprobs


@pytest.mark.parametrize("top_k", [61, 2**31, 2**70])
def test_top_k_beyond_the_vocabulary(top_k: int) -> None:
    """Is all of the vocabulary."""
    params = SamplingParams(seed=1, max_tokens=6)
    outputs = engine().generate([PROMPTS[0]] * 2, [params, replace(params, top_k=top_k)])
    assert outputs[0].completions[0].token_ids == outputs[1].completions[0].token_ids


def test_logprob_modes() -> None:
    """Raw logprobs feel temperature, filters and bias, or processed ones do not; in one batch."""
    raw = SamplingParams(temperature=0.5, top_k=3, logit_bias={7: 2.0}, seed=1, max_tokens=6, logprobs=4)
    outputs = engine().generate([PROMPTS[0]] * 2, [raw, replace(raw, logprob_mode="processed")])
    assert outputs[0].completions[0].token_ids == outputs[1].completions[0].token_ids
    for output, mode in zip(outputs, ("raw", "processed"), strict=True):
        (c,) = output.completions
        z = logits(PROMPTS[0] + c.token_ids)[len(PROMPTS[0]) - 1 : -1]
        if mode == "processed":
            z[:, 7] += 2.0
            z /= 0.5
            z = z.masked_fill(z < z.topk(3).values[:, -1:], float("-inf"))
        direct = z.log_softmax(-1)
        torch.testing.assert_close(torch.tensor(c.logprobs), direct[range(6), c.token_ids], atol=1e-4, rtol=1e-4)
        for row, top in zip(direct, c.top_logprobs, strict=True):
            torch.testing.assert_close(torch.tensor([*top.values()]), row.topk(4).values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"prefill_chunk": 3}, {"token_budget": 7, "max_num_seqs": 3}], ids=str)
@pytest.mark.parametrize("rows", [1, 2, None])
def test_prompt_logprobs(settings: dict[str, Any], rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are shifted, or lost or doubled where a prompt or its logits are computed in pieces."""
    if rows is not None:
        inner = pkgutil.resolve_name("fastgen.core.step.compute_logits")

        def bounded(params: fastgen.Params, x: Tensor, *rest: Any) -> Any:
            assert len(x) <= rows, "more logits at once than allowed"
            return inner(params, x, *rest)

        monkeypatch.setattr("fastgen.core.step.LOGITS_PER_CHUNK", rows * 61 + 60)
        monkeypatch.setattr("fastgen.core.step.compute_logits", bounded)
    params = [replace(GREEDY, prompt_logprobs=k, n=2) for k in (0, 3, 2, 1, None, 61)]
    e = engine(**settings)
    for output, asked in zip(e.generate(PROMPTS, params), params, strict=True):
        prompt, found, tops = output.prompt_token_ids, output.prompt_logprobs, output.prompt_top_logprobs
        if asked.prompt_logprobs is None:
            assert found is tops is None
            continue
        direct = logits(prompt).log_softmax(-1)[:-1]
        assert found[0] is None and len(found) == len(prompt)
        wanted = direct[range(len(prompt) - 1), prompt[1:]]
        torch.testing.assert_close(torch.tensor(found[1:]), wanted, atol=1e-4, rtol=1e-4)
        if not asked.prompt_logprobs:
            assert tops is None
            continue
        assert tops[0] is None and len(tops) == len(prompt)
        for row, top in zip(direct, tops[1:], strict=True):
            values, index = row.topk(asked.prompt_logprobs)
            assert list(top)[:10] == index.tolist()[:10]
            torch.testing.assert_close(torch.tensor([*top.values()]), values, atol=1e-4, rtol=1e-4)


# --- beginning and end --------------------------------------------------------------------------------------


def test_close_frees_the_cache() -> None:
    """The memory of an engine that is not needed any more stays taken."""
    with engine() as e:
        cache = weakref.ref(e.cache.k[0])
        assert tokens(e.generate(PROMPTS[0], GREEDY)) == WANTED[:1]
        e.add(PROMPTS[1], GREEDY)
        e.step()
        assert cache() is not None
    assert cache() is None
    assert e.state.prefix_cache.num_available_pages() == e.cache_capacity // e.state.page_size


def test_close_after_an_error() -> None:
    """The error of the block is swallowed, or the cache kept."""
    with pytest.raises(ValueError, match="empty"), engine() as e:
        e.generate("", GREEDY)
    assert not hasattr(e, "runner") and not hasattr(e.core, "runner")


def test_random_weights(tmp_path: Path) -> None:
    """`random` needs a checkpoint, or draws other weights than `init` does for the same seed."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    where = str(torch.get_default_device())
    with Engine.from_pretrained(tmp_path, random_weights=True, random_seed=3, device=where, prefill_chunk=2) as e:
        assert e.config.schedule.prefill_chunk == 2 and e.tokenizer is None and e.model_config == SPEC
        got = tokens(e.generate(PROMPTS, GREEDY))
    assert got == tokens(Engine(fastgen.init(SPEC, 3), SPEC).generate(PROMPTS, GREEDY))


def test_interrupt_ends_other_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream beside the one that was interrupted waits for ever for requests that are gone."""
    e = engine()
    one, two = e.stream(PROMPTS[0], GREEDY), e.stream(PROMPTS[1], GREEDY)
    events = [next(two)]
    failing(monkeypatch, "fastgen.compiled.runner.forward_and_sample", 0, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        next(one)
    (output,) = collect(events + list(two)).values()
    assert output.completions[0].finish_reason == "abort"
    idle(e)


@pytest.mark.parametrize(
    ("place", "error"),
    [
        (place, error)
        for place in PLACES
        for error in (KeyboardInterrupt, RuntimeError)
        if (place, error) != (PUSH, RuntimeError)
    ],
)
def test_failed_call_reports_requests_in_flight(
    place: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who added a request by hand never hears that an interrupted call ended it, or misses tokens of its last step."""
    e = engine()
    ids = [e.add(p, replace(GREEDY, max_tokens=3)) for p in PROMPTS[:4]]
    failing(monkeypatch, place, 10 if place.endswith("append_token") else 2, error)
    with pytest.raises(error):
        e.generate(PROMPTS[4:], GREEDY)
    outputs = collect(drain(e))
    assert sorted(outputs) == ids
    for id, output in outputs.items():
        (got,) = tokens([output])
        assert got == WANTED[id][: len(got)] and len(got) >= 2 - (not place.endswith(("append_token", "commit")))
    assert [len(c.token_ids) == 3 for o in outputs.values() for c in o.completions] == [
        c.finish_reason == "length" for o in outputs.values() for c in o.completions
    ]
    idle(e)


def test_close_ends_streams() -> None:
    """A stream that outlives its engine waits for ever."""
    with engine() as e:
        events = e.stream(PROMPTS[0], GREEDY)
        first = next(events)
    assert collect([first, *events])[0].completions[0].finish_reason == "abort"


def test_close_twice() -> None:
    """Closing inside of `with` is an error at its end."""
    with engine() as e:
        e.close()


def test_text_without_tokens() -> None:
    """A text that the tokenizer makes nothing of never gets a step, and generate never returns."""
    stripped = letters()
    stripped.backend_tokenizer.normalizer = normalizers.Strip()
    e = Engine(PARAMS, SPEC, stripped)
    with pytest.raises(ValueError, match="at least one"):
        e.generate(" ", GREEDY)
    idle(e)


def test_stream_that_is_never_read() -> None:
    """Its requests run beside all that follow, and their events pile up."""
    e = engine()
    events = e.stream(PROMPTS, GREEDY)
    del events
    idle(e)


@pytest.mark.parametrize("page", [16, 48, 128])
def test_default_cache_holds_the_longest_request(page: int) -> None:
    """Rounding the capacity down to whole pages refuses what the context allows."""
    e = engine(page_size=page, max_num_seqs=1)
    assert len(tokens(e.generate([1], replace(GREEDY, max_tokens=None)))[0]) == 63


def test_interrupt_while_adding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that was half added stays, and can never finish."""
    e = engine()
    failing(monkeypatch, "fastgen.core.request.SequenceState.__init__", 2, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        e.generate(PROMPTS[0], replace(GREEDY, n=3))
    idle(e)
    assert tokens(e.generate(PROMPTS[0], GREEDY)) == WANTED[:1]


def test_error_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error in the middle of a step, requests in flight go on with tokens or logprobs doubled."""
    e = engine()
    for p in PROMPTS[:3]:
        e.add(p, replace(GREEDY, prompt_logprobs=0))
    failing(monkeypatch, "fastgen.core.runner.compute_target_logprobs", 1, RuntimeError)
    with pytest.raises(RuntimeError):
        e.step()
    for id, output in collect(drain(e)).items():
        if output.completions[0].finish_reason != "abort":
            assert tokens([output]) == [WANTED[id]]
            assert len(output.prompt_logprobs) == len(PROMPTS[id])
    idle(e)


# --- looking inside -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_profile(overlap: bool, tmp_path: Path) -> None:
    """Some steps of what runs are traced, with the engine's own ranges; its tokens stay the same."""
    e = engine(overlap=overlap)
    with e.profile(num_steps=3, path=tmp_path / "trace.json", skip_first=1) as p:
        assert tokens(e.generate(PROMPTS, GREEDY)) == WANTED
    assert p.summary.num_steps == 3 and p.trace == tmp_path / "trace.json"
    names = {event.get("name", "") for event in json.loads(p.trace.read_text())["traceEvents"]}
    assert {"plan", "stage", "forward", "wait", "commit"} <= names
    text = str(p.summary)
    assert "linear" in text and "attention" in text and "params" in text
    idle(e)


def test_table() -> None:
    """What the engine chose is told in a few lines."""
    text = engine(cache_tokens=640, page_size=8).summary()
    assert "640 tokens, 80 pages of 8" in text and "512 sequences" in text and "eager" in text


def test_random_load() -> None:
    """Arrivals and aborts in the middle of overlapped steps: each request's tokens are those it has alone."""
    dice = random.Random(1)
    kinds = [{}, {"temperature": 0}, {"top_p": 0.8, "top_k": 9}, {"repetition_penalty": 1.3, "logprobs": 2},
             {"temperature": 0, "prompt_logprobs": 1}, {"min_tokens": 4, "logprobs": 0}]  # fmt: skip
    e = engine(overlap=True, max_num_seqs=9, token_budget=24, cache_tokens=640, page_size=8)
    asked, done, aborted = dict[int, tuple[list[int], SamplingParams]](), list[Output](), set[int]()
    for _ in range(200):
        if len(asked) - len(done) < 12 and dice.random() < 0.5:
            prompt = [dice.randrange(61) for _ in range(dice.choice((1, 2, 9, 30)))]
            n, seed = dice.randrange(4, 20), dice.randrange(1000)
            params = SamplingParams(**dice.choice(kinds), seed=seed, max_tokens=n, stop_token_ids=(7, 8))
            asked[e.add(prompt, params)] = prompt, params
        if dice.random() < 0.03 and e.state.running:
            request = e.core.sequence_states[dice.choice(e.state.running).id].output.request_id
            aborted.add(request)
            e.abort(request)
        done += [event.output for event in e.step() if event.output is not None]
    done += [event.output for event in drain(e) if event.output is not None]
    idle(e)
    assert sorted(o.request_id for o in done) == sorted(asked) and len(done) > 30 and aborted
    alone = engine(max_num_seqs=1)
    for output in done[:50]:
        (want,) = alone.generate([asked[output.request_id][0]], asked[output.request_id][1])
        (got,), (whole,) = output.completions, want.completions
        n = len(got.token_ids)
        assert got.token_ids == whole.token_ids[:n] and (n == len(whole.token_ids) or output.request_id in aborted)
        if got.logprobs is not None and whole.logprobs is not None:
            assert got.logprobs == pytest.approx(whole.logprobs[:n], abs=1e-4)
        if output.prompt_logprobs is not None and want.prompt_logprobs is not None and n:
            assert output.prompt_logprobs[1:] == pytest.approx(want.prompt_logprobs[1:], abs=1e-4)


def test_memory_is_given_back_at_once() -> None:
    """An engine that nobody holds keeps its cache until Python looks for cycles: the next one finds no memory."""
    e = engine()
    e.generate(PROMPTS[0], GREEDY)
    leaf = weakref.ref(e.cache.k[0])
    gc.collect()
    gc.disable()
    try:
        del e
        assert leaf() is None
    finally:
        gc.enable()
