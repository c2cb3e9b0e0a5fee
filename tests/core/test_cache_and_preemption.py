"""Reuse, host pages, preemption, forks and snapshots on a tiny random model: they never change what a request gets."""

import copy
import itertools
import pkgutil
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import fastgen
from fastgen import Event, Output, SamplingParams, Snapshot
from fastgen.core import scheduler
from fastgen.core.prefix_cache import PageCopies
from fastgen.core.request import sample_seed
from fastgen.offload.host_offload import HostOffload, consecutive_runs, page_bytes
from fastgen.quantization.kv_cache import row_format

SPEC = fastgen.from_hf_config(tiny.config("Mistral", **tiny.WINDOWED))
PARAMS = tiny.weights(SPEC)
DICE = random.Random(0)
STEM = [DICE.randrange(61) for _ in range(21)]
GREEDY = SamplingParams(temperature=0, max_tokens=9, logprobs=0)


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are characters from "0" on."""
    t = Tokenizer(models.WordLevel({chr(48 + i): i for i in range(61)}, unk_token="0"))
    t.pre_tokenizer, t.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=t)


class Engine(fastgen.Engine):
    """Checks the scheduler's invariants after every step, and that nobody waits for steps that do nothing."""

    before: Callable[["Engine"], object] | None = None  # what is done to it before each step
    still = 0  # steps in a row that did nothing

    def step(self) -> list[Event]:
        if self.before is not None:
            self.before(self)
        state, events = self.state, super().step()
        scheduler.check(self.state, self.config.schedule)
        self.still = 0 if events or self.state != state or not self.has_unfinished_requests else self.still + 1
        assert self.still < 9, "nothing happens any more"
        return events


def engine(pages: int | None = None, *, host: int = 0, params: fastgen.Params = PARAMS, **given: Any) -> Engine:
    """With so many pages on the device and on the host."""
    page = given.setdefault("page_size", 4)
    if host:
        rows = row_format(SPEC, given.get("kv_cache_dtype", "auto"), torch.float32)
        given |= {"offload": "host", "host_gb": (host + 0.5) * page_bytes(SPEC.num_layers, page, rows) / 1e9}
    if pages:
        given["cache_tokens"] = pages * page
    return Engine(params, SPEC, LETTERS, **given)


LETTERS = letters()
OFF = {"prefix_cache": False}
PLAIN = {dtype: engine(64, **OFF, kv_cache_dtype=dtype) for dtype in ("auto", "fp8")}
KNOWN: dict[tuple[tuple[int, ...], str, str], Output] = {}


def plain(prompt: Sequence[int], params: SamplingParams, cache_dtype: str = "auto") -> Output:
    """What a request gets alone, with the hierarchy off."""
    key = tuple(prompt), repr(params), cache_dtype
    if key not in KNOWN:
        (KNOWN[key],) = PLAIN[cache_dtype].generate([[*prompt]], params)
    return KNOWN[key]


def close(got: Sequence[float | None] | None, want: Sequence[float | None] | None) -> None:
    """Equal but for rounding."""
    assert (got is None) == (want is None)
    if got is not None and want is not None:
        assert len(got) == len(want) and (got[:1] == [None]) == (want[:1] == [None])
        known, wanted = ([x for x in xs if x is not None] for xs in (got, want))
        assert known == pytest.approx(wanted, abs=CLOSE)


CLOSE = 1e-5


def same(got: Output, want: Output) -> None:
    """The same tokens, text and reasons; logprobs within 1e-5.

    Logprobs are not bitwise equal, since a matrix product's rounding changes with its number of rows, and so with
    who shares a step, and with how much of a prompt is computed.
    """
    assert got.prompt_token_ids == want.prompt_token_ids and len(got.completions) == len(want.completions)
    for a, b in zip(got.completions, want.completions, strict=True):
        assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
        close(a.logprobs, b.logprobs)
        for x, y in zip(a.top_logprobs or [], b.top_logprobs or [], strict=True):
            assert x == pytest.approx(y, abs=CLOSE)
    close(got.prompt_logprobs, want.prompt_logprobs)


def drain(e: Engine) -> dict[int, Output]:
    """Steps until all is done; the outputs by request."""
    done = dict[int, Output]()
    for _ in range(5000):
        if not e.has_unfinished_requests:
            break
        done |= {event.request_id: event.output for event in e.step() if event.output is not None}
    assert not e.has_unfinished_requests, "it never ends"
    return done


def idle(e: Engine) -> None:
    """Asserts that nothing runs or waits, and that no page is lost."""
    assert not e.has_unfinished_requests and not e.state.running and not e.state.waiting
    scheduler.check(e.state, e.config.schedule)
    assert e.state.prefix_cache.num_available_pages() == e.cache_capacity // e.state.page_size


def evict(e: Engine) -> None:
    """Every idle page leaves the device."""
    tree = e.state.prefix_cache
    for page in [*iter(tree.allocate_page, 0)]:
        tree.free_page(page)
    assert not tree.idle_nodes.keys() - tree._pinned_nodes


def park_at_random(monkeypatch: pytest.MonkeyPatch, dice: random.Random, often: float) -> None:
    """From now on any plan may find that the newest sequences have to make way."""
    room = scheduler._Planner.allocate_or_preempt

    def more(planner: Any) -> None:
        room(planner)
        while len(planner.running) > 1 and dice.random() < often:
            planner.preempt_last()

    monkeypatch.setattr(scheduler._Planner, "allocate_or_preempt", more)


# --- the same results -----------------------------------------------------------------------------------------------


def load() -> list[tuple[list[int], SamplingParams]]:
    """Requests of all kinds, whose prompts begin alike more often than not."""
    dice = random.Random(3)
    kinds = [
        {"temperature": 0, "logprobs": 2},
        {"temperature": 0, "logprobs": 0, "n": 2},
        {"logprobs": 0, "n": 3, "temperature": 0.9, "top_p": 0.9},
        {"temperature": 0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "logprobs": 0},
        {"prompt_logprobs": 1, "temperature": 0},
        {"top_k": 20, "min_tokens": 3, "stop_token_ids": (7, 8, 9, 10, 11, 12), "logprobs": 1},
        {"temperature": 0.8, "stop": ("0", "1", "2", "3", "4"), "logprobs": 0},
        {"prompt_logprobs": 0, "n": 2, "logprobs": 0},
    ]
    found = list[tuple[list[int], SamplingParams]]()
    for seed, kind in enumerate(kinds + kinds[:3]):
        prompt = STEM[: dice.randrange(2, 22)] + [dice.randrange(61) for _ in range(dice.randrange(4))]
        found.append((prompt, SamplingParams(**kind, seed=seed, max_tokens=dice.randrange(4, 8))))
    found.append(found[0])  # one that is the same, and a next turn
    first = plain(*found[0]).completions[0].token_ids
    found.append((found[0][0] + first + [5, 6, 7], GREEDY))
    return found


LOAD = load()
HIERARCHIES = {
    "device": {},
    "device and host": {"host": 40},
    "small host": {"host": 5},
    "host": {"host": 60, **OFF},
    "parked": {"host": 40, "offload_policy": "preempted"},
    "parked alone": {"host": 30, "offload_policy": "preempted", **OFF},
    "none": OFF,
}
WAYS = [
    {"page_size": 4, "pages": 16},
    {"page_size": 1, "pages": 48, "overlap": True, "prefill_chunk": 5},
    {"page_size": 16, "pages": 4, "overlap": True, "policy": "prefill_first", "token_budget": 16, "max_num_seqs": 5},
    {"page_size": 4, "pages": 12, "policy": "prefill_first", "prefill_chunk": 7},
]


HIERARCHIES_AND_FORCES = [
    (name, force) for i, name in enumerate(HIERARCHIES) for force in (("", "evict park"), ("evict", "park"))[i % 2]
]


@pytest.mark.parametrize(
    ("name", "force", "cache_dtype"),
    [
        *((*case, "auto") for case in HIERARCHIES_AND_FORCES),
        ("device", "evict park", "fp8"),
        ("device and host", "evict", "fp8"),
        ("small host", "", "fp8"),
        ("host", "park", "fp8"),
        ("none", "", "fp8"),
    ],
)
def test_results_never_change(name: str, force: str, cache_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody reads pages of others, or pages that were moved badly, or is not what it was after it made way."""
    at = 4 * [*HIERARCHIES].index(name) + ["", "evict", "park", "evict park"].index(force)
    way = WAYS[(at + at // 4) % len(WAYS)]  # each hierarchy and each force meets every way
    e = engine(**{**way, **HIERARCHIES[name]}, kv_cache_dtype=cache_dtype)
    if "evict" in force:
        e.before = evict
    if "park" in force:
        park_at_random(monkeypatch, random.Random(at), 0.15)
    prompts, params = zip(*LOAD, strict=True)
    for got, (prompt, how) in zip(e.generate([*prompts], [*params]), LOAD, strict=True):
        same(got, plain(prompt, how, cache_dtype))
    idle(e)
    c = e.cache_stats
    kept = name != "none" and not ("evict" in force and name == "device")
    assert (c.num_hit_tokens > 0) == (name != "none") or not kept
    assert c.num_preemptions or "park" not in force
    if "host" in HIERARCHIES[name] and ("offload_policy" not in HIERARCHIES[name] or c.num_preemptions):
        assert c.num_offloaded_pages
    if "host" not in HIERARCHIES[name]:
        assert not c.num_offloaded_pages and not c.num_loaded_pages


@pytest.mark.parametrize(
    ("name", "way", "cache_dtype"),
    [
        *zip(("device", "device and host", "host", "none"), WAYS, 4 * ("auto",), strict=True),
        ("device and host", WAYS[0], "fp8"),
    ],
)
def test_forks_and_aborts_at_random_steps(
    name: str, way: dict[str, Any], cache_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork with its source's seed is another request than its source, or somebody suffers from it or from aborts."""
    dice = random.Random(f"{name}{way}")
    e = engine(**{**way, **HIERARCHIES[name]}, kv_cache_dtype=cache_dtype)
    park_at_random(monkeypatch, dice, 0.05)
    wanted = dict[int, tuple[Output, list[int]]]()  # request -> what it gets, and which completions those are
    aborted, done = set[int](), dict[int, Output]()
    left, forks = [x for x in LOAD if x[1].stop == ()], 0
    while left or e.has_unfinished_requests:
        if left and dice.random() < 0.7:
            prompt, params = left.pop()
            wanted[e.add(prompt, params)] = plain(prompt, params, cache_dtype), [*range(params.n)]
        going = sorted({s.output.request_id for s in e.core.sequence_states.values()})
        if going and dice.random() < 0.25 and forks < 12:
            source = dice.choice(going)
            e.core.finish_step()  # it may end with what is on the way
            if any(s.output.request_id == source for s in e.core.sequence_states.values()):
                now = e.core.unfinished_sequences(source)
                index = dice.choice([*now])
                (new,) = e.fork(source, index=index, seeds=[e.core.sequence_states[now[index]].seed])
                wanted[new] = wanted[source][0], [wanted[source][1][index]]
                forks += 1
        if going and dice.random() < 0.02:
            aborted.add(source := dice.choice(going))
            if (output := e.abort(source)) is not None:
                done[source] = output
        done |= {event.request_id: event.output for event in e.step() if event.output is not None}
    idle(e)
    assert forks > 5 and done.keys() == wanted.keys()
    for id, (want, which) in wanted.items():
        assert len(done[id].completions) == len(which)
        for got, index in zip(done[id].completions, which, strict=True):
            full = want.completions[index]
            n = len(got.token_ids) if id in aborted else len(full.token_ids)
            assert got.token_ids == full.token_ids[:n]
            close(got.logprobs, full.logprobs and full.logprobs[:n])
        if id not in aborted and done[id].prompt_logprobs is not None:
            close(done[id].prompt_logprobs, want.prompt_logprobs)


def test_512_requests_through_a_cache_for_four() -> None:
    """A request is dropped, starves, or gets something else where hundreds wait for the pages of a few."""
    dice = random.Random(0)
    asked = [(STEM[: dice.randrange(4, 14)] + [dice.randrange(61)], replace(GREEDY, max_tokens=dice.randrange(1, 5)))
             for _ in range(512)]  # fmt: skip
    e, free = engine(20, host=64), engine(512 * 5, **OFF)  # the longest takes 5 pages
    outputs = e.generate([p for p, _ in asked], [s for _, s in asked])
    assert len(outputs) == 512
    for got, want in zip(outputs, free.generate([p for p, _ in asked], [s for _, s in asked]), strict=True):
        same(got, want)
    idle(e)
    assert (
        e.num_steps > 20 * free.num_steps
        and e.cache_stats.num_queried_tokens >= sum(len(p) for p, _ in asked)
        and e.cache_stats.num_hit_tokens
    )


# --- forks ----------------------------------------------------------------------------------------------------------

KINDS = {
    "greedy": GREEDY,
    "drawn": SamplingParams(seed=5, max_tokens=9, logprobs=0),
    "penalties": SamplingParams(seed=6, max_tokens=9, repetition_penalty=1.4, frequency_penalty=0.5, logprobs=1),
    "scored": SamplingParams(temperature=0, max_tokens=9, prompt_logprobs=1),
}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_fork(kind: str, overlap: bool) -> None:
    """A fork forgets what came before it, its events tell it again, or its seed is not its own."""
    params, prompt = KINDS[kind], STEM[:14]
    want = plain(prompt, params)
    others = set[tuple[int, ...]]()
    for after in (0, 1, 4, 7):
        e = engine(40, overlap=overlap, prefill_chunk=6)
        source = e.add(prompt, params)
        for _ in range(after):
            e.step()
        twin, other = e.fork(source, 2, seeds=[params.seed or 0, 1000 + after])
        assert [x for x in e.core.sequence_states if e.core.sequence_states[x].output.request_id == source]
        before = [*next(s for s in e.core.sequence_states.values() if s.output.request_id == twin).completion.token_ids]
        told, done = list[int](), dict[int, Output]()
        while e.has_unfinished_requests:
            for event in e.step():
                told += event.token_ids if event.request_id == twin else []
                done |= {event.request_id: event.output} if event.output is not None else {}
        same(done[source], want)
        same(done[twin], want)
        assert before + told == want.completions[0].token_ids
        (c,) = done[other].completions
        assert c.token_ids[: len(before)] == before and len(c.token_ids) == 9
        others.add(tuple(c.token_ids))
        if after > 3:
            assert e.cache_stats.num_hit_tokens >= 2 * 13, "the forks computed the prompt again"
        idle(e)
    assert len(others) == 1 if params.temperature == 0 else len(others) > 2


def test_fork_copies_no_more_than_a_page() -> None:
    """A fork computes or copies what it could share; or writes into its source's page."""
    e = engine(40)
    source = e.add(STEM[:9], GREEDY)
    for _ in range(2):
        e.step()
    e.fork(source, 3)
    e.step()
    first, *others = e.state.running
    assert len(others) == 3 and all(s.pages[:2] == first.pages[:2] for s in others)
    assert len({s.pages[2] for s in e.state.running}) == 4
    assert (
        e.cache_stats.num_copied_pages == 3 and e.cache_stats.num_hit_tokens == 3 * 10
    )  # all but the last token drawn
    for output in drain(e).values():
        same(output, plain(STEM[:9], GREEDY))


def test_fork_of_a_waiting_request() -> None:
    """What has no page yet cannot be forked."""
    e = engine(40, max_num_seqs=1)
    first, second = e.add(STEM[:9], GREEDY), e.add(STEM[:7], KINDS["drawn"])
    e.step()
    (new,) = e.fork(second, seeds=[5])
    done = drain(e)
    same(done[first], plain(STEM[:9], GREEDY))
    same(done[second], plain(STEM[:7], KINDS["drawn"]))
    same(done[new], done[second])


@pytest.mark.parametrize("host", [0, 20])
def test_fork_of_a_parked_request(host: int) -> None:
    """What gave its pages away has lost its tokens for those who fork it."""
    e = engine(8, host=host)
    ids = [e.add([first, *STEM[:9]], replace(GREEDY, max_tokens=18)) for first in (1, 2)]
    while not e.cache_stats.num_preemptions:
        e.step()
    assert [s.id for s in e.state.waiting] == [1]
    before = len(e.core.sequence_states[1].completion.token_ids)
    (new,) = e.fork(ids[1])
    done = drain(e)
    assert before > 3
    for id, first in zip((*ids, new), (1, 2, 2), strict=True):
        same(done[id], plain([first, *STEM[:9]], replace(GREEDY, max_tokens=18)))
    idle(e)


def test_fork_of_one_of_several() -> None:
    """Another completion is forked than the one that was asked for."""
    params = SamplingParams(seed=3, n=3, max_tokens=9, logprobs=0)
    e = engine(60)
    source = e.add(STEM[:9], params)
    for _ in range(4):
        e.step()
    (new,) = e.fork(source, index=2, seeds=[sample_seed(3, 2)])
    done = drain(e)
    same(done[source], plain(STEM[:9], params))
    (c,), want = done[new].completions, done[source].completions[2]
    assert c.token_ids == want.token_ids
    close(c.logprobs, want.logprobs)


def test_fork_refused() -> None:
    """A fork of what has ended is queued, or the message does not say what is wrong."""
    e = engine(60)
    id = e.add(STEM[:9], SamplingParams(temperature=0, max_tokens=3))
    with pytest.raises(ValueError, match=r"n=2 copies and 1 seeds"):
        e.fork(id, 2, seeds=[1])
    with pytest.raises(ValueError, match=r"fork: n must be"):
        e.fork(id, 0)
    with pytest.raises(ValueError, match=r"completion 1 has ended; \[0\] go on"):
        e.fork(id, index=1)
    drain(e)
    for call in (e.fork, e.snapshot):
        with pytest.raises(ValueError, match=r"request 0 is not running here"):
            call(id)
    idle(e)


# --- snapshots ------------------------------------------------------------------------------------------------------

TARGETS: dict[str, tuple[bool, dict[str, Any], int]] = {  # with pages, the other engine, tokens found of 13
    "same": (True, {}, 12),
    "no pages": (False, {}, 0),
    "small pages": (True, {"page_size": 1}, 13),
    "large pages": (True, {"page_size": 16}, 0),
    "prefix off": (True, OFF, 0),
    "host": (True, {"host": 20}, 12),
    "host only": (True, {"host": 20, **OFF}, 0),
    "small cache": (True, {"pages": 6}, 12),
}


@pytest.mark.parametrize("target", TARGETS)
def test_snapshot(target: str, tmp_path: Path) -> None:
    """A request that was saved goes on otherwise than it would have; text, logprobs or pages get lost on the way."""
    (with_pages, given, found), overlap = TARGETS[target], [*TARGETS].index(target) % 2 == 1
    kinds = {k: KINDS[k] for k in ("greedy", "penalties")} | {"stop": replace(KINDS["drawn"], stop=("zzz",))}
    e, other = engine(60, overlap=overlap), engine(**{"pages": 40, **given}, overlap=overlap)
    for kind, params in kinds.items():
        prompt, file = STEM[:10], tmp_path / f"{kind}.safetensors"
        source = e.add([1, *prompt], params)
        for _ in range(3):
            e.step()
        e.snapshot(source, include_pages=with_pages).save(file)
        same(drain(e)[source], plain([1, *prompt], params))
        scheduler.check(other.state, other.config.schedule)
        other.params_changed()  # finds nothing but what the snapshot brings
        reused, snapshot = other.cache_stats.num_hit_tokens, Snapshot.load(file)
        assert bool(snapshot.pages) == with_pages and len(snapshot.completions[0].token_ids) == 3
        id = other.restore(snapshot)
        scheduler.check(other.state, other.config.schedule)
        told, done = list[Event](), None
        while other.has_unfinished_requests:
            told += other.step()
            done = told[-1].output if told else None
        assert done is not None and {event.request_id for event in told} == {id}
        want = plain([1, *prompt], params)
        same(done, want)
        assert [t for event in told for t in event.token_ids] == want.completions[0].token_ids[3:]
        assert "".join(event.text for event in told) == want.completions[0].text[3:]
        assert other.cache_stats.num_hit_tokens - reused == found
        idle(other)


@pytest.mark.parametrize(
    ("source_dtype", "target_dtype", "page"),
    [("fp8", "fp8", 4), ("fp8", "fp8", 3), ("fp8", "auto", 4), ("auto", "fp8", 4)],
)
def test_snapshot_of_an_fp8_cache(source_dtype: str, target_dtype: str, page: int, tmp_path: Path) -> None:
    """Keys and values go to caches of the same dtype, of any page size; others compute the tokens again."""
    e, other = engine(40, kv_cache_dtype=source_dtype), engine(40, kv_cache_dtype=target_dtype, page_size=page)
    source = e.add(STEM[:13], GREEDY)
    for _ in range(3):
        e.step()
    e.snapshot(source, include_pages=True).save(tmp_path / "x")
    snapshot = Snapshot.load(tmp_path / "x")
    tokens, want = snapshot.completions[0].token_ids, plain(STEM[:13], GREEDY, source_dtype)
    assert tokens == want.completions[0].token_ids[: len(tokens)]
    assert snapshot.pages[0].dtype == (torch.uint8 if source_dtype == "fp8" else torch.float32)
    (output,) = (drain(other)[id] for id in [other.restore(snapshot)])
    assert (other.cache_stats.num_hit_tokens > 0) == (source_dtype == target_dtype)
    if source_dtype == target_dtype:
        same(output, want)
    else:  # goes on as the other engine does from the same tokens
        rest = plain(STEM[:13] + tokens, replace(GREEDY, max_tokens=9 - len(tokens)), target_dtype)
        assert output.completions[0].token_ids == tokens + rest.completions[0].token_ids
    idle(other)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_snapshot_of_several(steps: int, tmp_path: Path) -> None:
    """Completions that have ended run again, those that go on get each other's seeds or pages; or ones not begun."""
    params = SamplingParams(seed=4, n=4, max_tokens=9, logprobs=1, stop_token_ids=tuple(range(10)), prompt_logprobs=1)
    e = engine(80, max_num_seqs=3)
    source = e.add(STEM[:11], params)
    for _ in range(steps):
        e.step()
    e.snapshot(source, include_pages=True).save(tmp_path / "x")
    snapshot = Snapshot.load(tmp_path / "x")
    if steps == 5:
        assert {c.finish_reason for c in snapshot.completions} >= {"stop", None}
    other = engine(80)
    id = other.restore(snapshot)
    want = plain(STEM[:11], params)
    same(drain(other)[id], want)
    same(drain(e)[source], want)
    idle(other)


@pytest.mark.parametrize("steps", [0, 3])
def test_a_snapshot_does_not_change(steps: int) -> None:
    """A snapshot grows with the request it was taken of, or with one that was made of it."""
    params = SamplingParams(temperature=0, max_tokens=9, logprobs=2, prompt_logprobs=1)
    e = engine(60)
    source = e.add(STEM[:9], params)
    for _ in range(steps):
        e.step()
    snapshot = e.snapshot(source)
    same(drain(e)[source], plain(STEM[:9], params))
    for _ in range(2):
        id = e.restore(snapshot)
        same(drain(e)[id], plain(STEM[:9], params))
    (c,) = snapshot.completions
    assert len(c.token_ids) == len(c.logprobs or ()) == len(c.top_logprobs or ()) == steps


def test_snapshot_of_a_fork() -> None:
    """A fork that is saved goes on as its source, or with its source's other completions."""
    e = engine(60)
    source = e.add(STEM[:9], SamplingParams(seed=3, n=2, max_tokens=9))
    for _ in range(4):
        e.step()
    (new,) = e.fork(source, index=1, seeds=[77])
    for _ in range(2):
        e.step()
    other = engine(60)
    id = other.restore(e.snapshot(new, include_pages=True))
    same(drain(other)[id], drain(e)[new])


@pytest.mark.parametrize("part", ["embed", "first", "down", "norm"])
def test_pages_of_other_parameters_are_not_used(part: str) -> None:
    """Keys and values of one model are read by another, or by the same one after it was trained."""
    params = tiny.weights(SPEC)
    e, other = engine(40), engine(40, params=params)
    first = params.layers[0]
    {"embed": params.embed[30:], "first": first.qkv[9:], "down": first.down, "norm": first.ffn_norm}[part].mul_(1.01)
    source = e.add(STEM[:14], GREEDY)
    for _ in range(3):
        e.step()
    snapshot = e.snapshot(source, include_pages=True)
    id = other.restore(snapshot)
    (got,) = drain(other)[id].completions
    assert not other.cache_stats.num_hit_tokens
    begun = snapshot.completions[0].token_ids
    fresh = engine(40, params=params, **OFF)
    (want,) = fresh.generate([STEM[:14] + begun], replace(GREEDY, max_tokens=6))
    assert got.token_ids == begun + want.completions[0].token_ids


def test_restore_refused(tmp_path: Path) -> None:
    """What does not fit is queued for ever, or what is no snapshot is read as one."""
    e = engine(16)
    id = e.add(STEM[:9], replace(GREEDY, max_tokens=None))
    for _ in range(20):
        e.step()
    snapshot = e.snapshot(id, include_pages=True)
    small = engine(5)
    with pytest.raises(ValueError, match=r"cache of 20"):
        small.restore(snapshot)
    idle(small)
    with pytest.raises(ValueError, match=r"do not fit"):
        engine(3).restore(replace(snapshot, sampling=GREEDY))
    (tmp_path / "x").write_text("no")
    with pytest.raises(ValueError, match=r"is not a snapshot"):
        Snapshot.load(tmp_path / "x")


def damaged(snapshot: Snapshot) -> dict[str, tuple[Callable[[Snapshot], Any], str]]:
    """Changes of a snapshot that no engine makes, and what is said of them."""

    def pages(change: Callable[[Tensor], Tensor]) -> Callable[[Snapshot], Any]:
        return lambda s: s.pages.update({0: change(s.pages[0].clone())})

    def one(**changes: Any) -> Callable[[Snapshot], Any]:
        return lambda s: [setattr(s.completions[0], name, value) for name, value in changes.items()]

    return {
        "zeros": (pages(torch.zeros_like), "checksum"),
        "one bit": (pages(lambda x: x.index_fill_(2, torch.tensor([1]), 0.5)), "checksum"),
        "nan": (pages(lambda x: x.mul_(float("nan"))), "NaN"),
        "integers": (pages(Tensor.int), "int32"),
        "half": (pages(Tensor.half), "checksum"),
        "heads": (pages(lambda x: x[:, :, :, :1]), "checksum"),
        "layers": (pages(lambda x: x[:1]), "checksum"),
        "dimensions": (pages(lambda x: x[0]), "layers, 2"),
        "none": (lambda s: s.pages.update({0: None}), "NoneType"),
        "of nobody": (lambda s: s.pages.update({7: s.pages[0]}), "wrong type"),
        "other tokens": (lambda s: setattr(s, "prompt_token_ids", (2, *s.prompt_token_ids[1:])), "checksum"),
        "token": (one(token_ids=[1, 61, 2]), "token 61 is outside"),
        "negative token": (
            lambda s: setattr(s, "prompt_token_ids", (-1, *s.prompt_token_ids[1:])),
            "token -1 is outside",
        ),
        "text token": (
            lambda s: setattr(s, "prompt_token_ids", ("1", *s.prompt_token_ids[1:])),
            "token '1' is outside",
        ),
        "no prompt": (lambda s: setattr(s, "prompt_token_ids", ()), "no prompt"),
        "seed": (lambda s: s.seeds.update({0: 2**70}), "not within"),
        "seed's kind": (lambda s: s.seeds.update({0: "x"}), "not within"),
        "seed of nobody": (lambda s: s.seeds.update({3: 1}), "unfinished ones"),
        "no seed": (lambda s: s.seeds.clear(), "unfinished ones"),
        "ended": (one(finish_reason="stop"), "unfinished ones"),
        "reason": (one(finish_reason="why"), "finish reason"),
        "logprobs": (one(logprobs=[0.0]), "1 values for 3 tokens"),
        "no logprobs": (one(logprobs=None), "logprobs where"),
        "versions": (one(weight_versions=["1"] * 3), "not a valid value"),
        "params": (lambda s: setattr(s, "sampling", {}), "SamplingParams"),
        "completions": (lambda s: setattr(s, "completions", [None]), "wrong type"),
    }


def test_damaged_snapshots_are_refused() -> None:
    """What was changed is restored and answered from, or cached: then the same prompt is wrong for everybody."""
    e, other = engine(60), engine(60)
    source = e.add(STEM[:14], replace(GREEDY, logprobs=0))
    for _ in range(3):
        e.step()
    snapshot = e.snapshot(source, include_pages=True)
    for name, (change, reason) in damaged(snapshot).items():
        wrong = copy.deepcopy(snapshot)
        change(wrong)
        with pytest.raises(ValueError, match=reason):
            other.restore(wrong)
        with pytest.raises(ValueError, match="snapshot: "):
            wrong.save("/nowhere")
        assert (
            not other.has_unfinished_requests
            and other.state.prefix_cache.num_available_pages() == other.state.prefix_cache.num_device_pages - 1
        ), name
    id = other.restore(snapshot)
    same(drain(other)[id], plain(STEM[:14], replace(GREEDY, logprobs=0)))
    assert other.cache_stats.num_hit_tokens


def test_damaged_snapshot_files_are_refused(tmp_path: Path) -> None:
    """Cut anywhere, or with any byte changed, it is refused by name."""
    e, file, dice = engine(60), tmp_path / "s.safetensors", random.Random(0)
    source = e.add(STEM[:9], GREEDY)
    for _ in range(3):
        e.step()
    e.snapshot(source, include_pages=True).save(file)
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    at = [
        *range(0, 12),
        *(dice.randrange(12, header) for _ in range(60)),
        *(dice.randrange(header, len(whole)) for _ in range(60)),
    ]
    for i in at:
        changed = bytearray(whole)
        changed[i] ^= 1 << dice.randrange(8)
        file.write_bytes(changed)
        try:
            other = Snapshot.load(file)
        except ValueError as error:
            assert "s.safetensors" in str(error)
        else:  # blanks that fill the header up, or the name of the format's own field
            assert i < header and other.checksum == e.snapshot(source, include_pages=True).checksum
    for n in (0, 3, 8, 60, header, header + 5, len(whole) - 1):
        file.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=r"s\.safetensors"):
            Snapshot.load(file)
    with pytest.raises(FileNotFoundError):
        Snapshot.load(tmp_path / "none")
    with pytest.raises(ValueError, match="damaged"):
        Snapshot.load(tmp_path)


@pytest.mark.parametrize("how", ["told", "noticed"])
def test_pages_of_parameters_before_an_update_are_not_saved(how: str) -> None:
    """Keys and values computed before an update would be taken for the new parameters' wherever they are restored."""
    params = tiny.weights(SPEC)
    e = engine(40, params=params)
    source = e.add(STEM[:14], GREEDY)
    for _ in range(3):
        e.step()
    assert e.snapshot(source, include_pages=True).pages
    if how == "told":
        e.update_params([("model.norm.weight", params.final_norm * 2)], partial=True)
    else:
        params.final_norm.mul_(2)
    snapshot = e.snapshot(source, include_pages=True)
    assert not snapshot.pages and e.weight_version == 1
    other = engine(40, params=params)
    id = other.restore(snapshot)
    (got,) = drain(other)[id].completions
    (want,) = engine(40, params=params, **OFF).generate(
        [STEM[:14] + snapshot.completions[0].token_ids], replace(GREEDY, max_tokens=6)
    )
    assert got.token_ids == snapshot.completions[0].token_ids + want.completions[0].token_ids


def test_restore_evicts_what_is_idle() -> None:
    """Pages that come with a snapshot take the place of pages in use, or are written where others lie."""
    e = engine(60)
    source = e.add(STEM[:18], GREEDY)
    for _ in range(4):
        e.step()
    snapshot = e.snapshot(source, include_pages=True)
    for host in (0, 9):
        other = engine(11, host=host)
        other.generate([[2, *STEM[:11]], [3, *STEM[:11]], [*STEM[:9]]], GREEDY)
        id, beside = other.restore(snapshot), other.add([2, *STEM[:11]], GREEDY)
        done = drain(other)
        same(done[id], plain(STEM[:18], GREEDY))
        same(done[beside], plain([2, *STEM[:11]], GREEDY))
        idle(other)


# --- parameters that change, steps that fail ------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"host": 30}, {"host": 40, **OFF}, {"overlap": True, "host": 8}], ids=str)
def test_touch(given: dict[str, Any]) -> None:
    """After the parameters were changed in place, pages of the old ones are read: on the device or from the host."""
    params = tiny.weights(SPEC)
    e, prompts = engine(16, params=params, **given), [p for p, _ in LOAD][:8]
    e.generate(prompts, GREEDY)
    running = e.add(STEM, replace(GREEDY, max_tokens=12))  # goes on, with old keys and new parameters
    for _ in range(4):
        e.step()
    for w in (params.embed, *(layer.qkv for layer in params.layers)):
        w += 0.02 * torch.randn(w.shape, generator=torch.Generator().manual_seed(1), device="cpu").to(w)
    e.params_changed()
    fresh = engine(64, params=params, **OFF).generate(prompts, GREEDY)
    for got, want in zip(e.generate(prompts, GREEDY), fresh, strict=True):
        same(got, want)
    assert any(o.completions[0].token_ids != plain(p, GREEDY).completions[0].token_ids
               for o, p in zip(fresh, prompts, strict=True))  # fmt: skip
    drain(e)
    assert running not in {s.output.request_id for s in e.core.sequence_states.values()}
    idle(e)


@pytest.mark.parametrize(
    ("place", "given"),
    [
        ("fastgen.compiled.runner.forward_and_sample", {}),
        ("fastgen.compiled.runner.ModelRunner.sample", {"overlap": True, "host": 30}),
        ("fastgen.offload.host_offload.HostOffload.start_copies", {"overlap": True, "host": 30, **OFF}),
    ],
)
def test_a_step_that_fails(place: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that a step was to fill, and did not, are found by those who come later."""
    e, prompts, calls = engine(20, **given), [p for p, _ in LOAD][:8], itertools.count()
    inner = pkgutil.resolve_name(place)

    def outer(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 5:
            for leaf in (*e.cache.k, *e.cache.v, *e.page_copier.host_buffers):
                leaf.fill_(3.0)  # whatever is there now, nobody may count on it
            raise RuntimeError("of the device")
        return inner(*args, **kwargs)

    monkeypatch.setattr(place, outer)
    with pytest.raises(RuntimeError, match="of the device"):
        e.generate(prompts, GREEDY)
    idle(e)
    assert not [*e.state.prefix_cache.get_root().iter_descendants()]
    for got, prompt in zip(e.generate(prompts, GREEDY), prompts, strict=True):
        same(got, plain(prompt, GREEDY))
    idle(e)


# --- counts ---------------------------------------------------------------------------------------------------------


def test_counts_of_reuse() -> None:
    """What was found is counted twice, not at all, or for somebody else."""
    e = engine(40)
    one, two = (e.generate([STEM[:n]], GREEDY)[0].num_cached_tokens for n in (14, 14))
    assert (one, two) == (0, 13)  # the last one is computed, to draw from
    assert (e.cache_stats.num_queried_tokens, e.cache_stats.num_hit_tokens) == (28, 13)
    (three,) = e.generate([STEM[:13] + [60, 59]], GREEDY)
    assert (
        three.num_cached_tokens == 13 and e.cache_stats.num_copied_pages == 2
    )  # three pages, and a token of the fourth
    before = e.cache_stats.num_queried_tokens
    (four,) = e.generate([[60, *STEM[:9]]], replace(GREEDY, n=3))
    assert four.num_cached_tokens == 18 and e.cache_stats.num_queried_tokens - before == 30  # computed once for three
    assert (
        not e.cache_stats.num_preemptions
        and not e.cache_stats.num_evicted_pages
        and not e.cache_stats.num_offloaded_pages
    )
    off = engine(40, **OFF)
    assert [o.num_cached_tokens for o in off.generate([STEM[:14]] * 2, GREEDY)] == [0, 0]
    assert off.cache_stats.num_hit_tokens == off.cache_stats.num_copied_pages == 0


def test_salts_keep_prefixes_apart(tmp_path: Path) -> None:
    """What another salt has cached is not found, nor by a fork or in a snapshot's pages; tokens are the same."""
    e, other, prompt = engine(40, host=8), engine(40), STEM[:14]
    want = plain(prompt, GREEDY)
    for salt, found in ((None, 0), ("a", 0), ("b", 0), ("a", 13), (None, 13), ("b", 13), ("", None), (3, None)):
        if found is None:
            with pytest.raises(ValueError, match="cache_salt must be a text of 1 to 256"):
                replace(GREEDY, cache_salt=salt)
            continue
        (output,) = e.generate([prompt], replace(GREEDY, cache_salt=salt))
        assert output.num_cached_tokens == found and output.completions[0].token_ids == want.completions[0].token_ids
    source = e.add(prompt, replace(GREEDY, cache_salt="a"))
    for _ in range(3):
        e.step()
    e.snapshot(source, include_pages=True).save(tmp_path / "salted")
    (fork,) = e.fork(source)
    done = drain(e)
    assert done[fork].completions[0].token_ids == done[source].completions[0].token_ids == want.completions[0].token_ids
    snapshot = Snapshot.load(tmp_path / "salted")
    assert snapshot.sampling.cache_salt == "a"
    restored = other.restore(snapshot)
    same(drain(other)[restored], want)
    assert other.cache_stats.num_hit_tokens == 16
    for salt, found in ((None, 0), ("b", 0), ("a", 13)):
        assert other.generate([prompt], replace(GREEDY, cache_salt=salt))[0].num_cached_tokens == found


def test_counts_of_the_host() -> None:
    """Pages that leave and come back are not counted, or travel more often than they need."""
    e = engine(6, host=20)
    for first in (1, 2, 1):
        (o,) = e.generate([[first, *STEM[:15]]], replace(GREEDY, max_tokens=1))
    assert o.num_cached_tokens == 15 and (e.cache_stats.num_loaded_pages, e.cache_stats.num_evicted_pages) == (2, 4)
    assert e.cache_stats.num_offloaded_pages == 4
    (again,) = e.generate([[1, *STEM[:15]]], replace(GREEDY, max_tokens=1))
    assert again.num_cached_tokens == 15 and e.cache_stats.num_loaded_pages == 2  # is there now


# --- anything -------------------------------------------------------------------------------------------------------

OPS = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 16), st.integers(0, 2), st.integers(1, 8)),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.sampled_from(("abort", "fork", "snapshot", "pages")), st.integers(0, 9)),
    st.tuples(st.sampled_from(("touch", "evict"))),
)


@settings(derandomize=True, database=None, deadline=None, max_examples=12, suppress_health_check=[*HealthCheck])
@given(
    ops=st.lists(OPS, min_size=4, max_size=24),
    page=st.sampled_from((1, 3, 4)),
    host=st.sampled_from((0, 5, 30)),
    prefix=st.booleans(),
    overlap=st.booleans(),
    policy=st.sampled_from(("mixed", "prefill_first")),
)
def test_any_operations(
    ops: list[tuple[Any, ...]], page: int, host: int, prefix: bool, overlap: bool, policy: str
) -> None:
    """Some order of operations loses a page, or gives a request what it would not have got alone."""
    e = engine(-(-24 // page) + 1, page_size=page, host=host, prefix_cache=prefix, overlap=overlap, policy=policy,
               max_num_seqs=4, token_budget=12)  # fmt: skip
    asked, done, dropped = dict[int, tuple[list[int], SamplingParams]](), dict[int, Output](), set[int]()
    for name, *values in ops:
        going = sorted({s.output.request_id for s in e.core.sequence_states.values()})
        if name == "add":
            length, end, n = values
            prompt, params = STEM[: length - 1] + [end], replace(GREEDY, max_tokens=n)
            asked[e.add(prompt, params)] = prompt, params
        elif name == "step":
            for _ in range(values[0]):
                done |= {event.request_id: event.output for event in e.step() if event.output is not None}
        elif name == "touch":
            e.params_changed()  # the parameters are what they were
        elif name == "evict":
            evict(e)
        elif going:
            id = going[values[0] % len(going)]
            if name == "abort":
                dropped.add(id)
                e.abort(id)
            else:
                e.core.finish_step()
                if id in {s.output.request_id for s in e.core.sequence_states.values()}:
                    new = e.fork(id)[0] if name == "fork" else e.restore(e.snapshot(id, include_pages=name == "pages"))
                    asked[new] = asked[id]
        scheduler.check(e.state, e.config.schedule)
    done |= drain(e)
    idle(e)
    assert done.keys() == asked.keys()
    for id in asked.keys() - dropped:
        same(done[id], plain(*asked[id]))


# --- pages on their way ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "rows"),
    [([], []), ([4], [(0, 4, 1)]), ([4, 5, 6, 9, 8, 2, 3], [(0, 4, 3), (3, 9, 1), (4, 8, 1), (5, 2, 2)]),
     ([3, 3, 4], [(0, 3, 1), (1, 3, 2)])],
)  # fmt: skip
def test_runs(numbers: list[int], rows: list[tuple[int, int, int]]) -> None:
    """Pages that do not lie side by side travel as if they did."""
    assert [*consecutive_runs(numbers)] == rows


def mover(pages: int, host: int, page: int = 4) -> tuple[HostOffload, fastgen.KVCache]:
    """With a cache whose elements are all different."""
    cache = fastgen.new_kv_cache(SPEC, pages * page)
    for i, leaf in enumerate((*cache.k, *cache.v)):
        leaf.copy_(torch.arange(leaf.numel()).view(leaf.shape) + 10000 * i)
    made = HostOffload(SPEC.num_layers, page, row_format(SPEC, "auto", torch.float32), cache.k[0].device, host)
    made.attach_cache(cache)
    return made, cache


def paged(cache: fastgen.KVCache) -> Tensor:
    """[layers, keys and values, pages, elements], copied."""
    return torch.stack([torch.stack([x.reshape(-1, 64) for x in pair]) for pair in zip(cache.k, cache.v, strict=True)])


def wait(events: Iterable[torch.cuda.Event]) -> None:
    for event in events:
        torch.cuda.current_stream().wait_event(event)


def test_moves_in_their_order() -> None:
    """A page is overwritten before it is saved, or read before it is there."""
    m, cache = mover(8, 3)
    was = paged(cache)
    # 5 leaves for the host, is filled with a copy of 6, and comes back as 7; 6 is saved beside its copy.
    wait(m.start_copies(PageCopies(to_host=((5, 2), (6, 1)), on_device=((6, 5),), to_device=((2, 7),))))
    now = paged(cache)
    assert torch.equal(now[:, :, 7], was[:, :, 5]) and torch.equal(now[:, :, 5], was[:, :, 6])
    assert torch.equal(now[:, :, :5], was[:, :, :5]) and torch.equal(now[:, :, 6], was[:, :, 6])
    wait(m.start_copies(PageCopies(to_device=((1, 2), (2, 1)))))
    now = paged(cache)
    assert torch.equal(now[:, :, 2], was[:, :, 6]) and torch.equal(now[:, :, 1], was[:, :, 5])
    m.close()


def test_read_and_write() -> None:
    """Keys and values of a sequence are somebody else's, in another order, or land in scratch."""
    m, cache = mover(8, 0)
    values = m.read_pages([3, 1, 6], 10)
    assert values.shape == (2, 2, 10, 2, 8)
    for i, page in enumerate((3, 1, 6)):
        n = min(4, 10 - 4 * i)
        for kv, leaves in enumerate((cache.k, cache.v)):
            for layer, leaf in enumerate(leaves):
                assert torch.equal(values[layer, kv, 4 * i : 4 * i + n], leaf[4 * page : 4 * page + n].cpu())
    was = paged(cache)
    m.write_pages([7, 0, 2], m.read_pages([3, 1, 6], 12))
    now = paged(cache)
    assert torch.equal(now[:, :, 7], was[:, :, 3]) and torch.equal(now[:, :, 2], was[:, :, 6])
    rest = [0, 1, 3, 4, 5, 6]
    assert torch.equal(now[:, :, rest], was[:, :, rest])
    m.close()


def test_host_pages_are_counted() -> None:
    """An engine takes more memory of the host than it was told, or none without saying so."""
    e = engine(8, host=7)
    assert e.page_copier.num_host_pages == 7 and "7 pages" in e.summary()
    with pytest.raises(ValueError, match=r"host_gb=1e-06 holds not even a page"):
        Engine(PARAMS, SPEC, offload="host", host_gb=1e-6)
    e.close()
    assert not e.__dict__.get("_host_offload")


def test_moves_kernel() -> None:
    """The kernel moves other words than indexing does, or more than a page; in any number of programs."""
    pytest.importorskip("triton")
    from fastgen.kernels.page_copy import WORDS_PER_PROGRAM, copy_pages

    for words in (5, WORDS_PER_PROGRAM + 3):
        source, target = (torch.randint(2**40, (3, 6, n)) for n in (words + 2, words + 4))
        want = target.clone()
        index = torch.tensor([[4, 0, 2], [1, 5, 3]])
        want[:, index[1], :words] = source[:, index[0], :words]
        tables = (torch.tensor([x.data_ptr() for x in leaves], dtype=torch.int64) for leaves in (source, target))
        copy_pages(*tables, index, words, words + 2, words + 4)
        assert torch.equal(target, want)
