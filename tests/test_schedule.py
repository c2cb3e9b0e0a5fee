"""The scheduler, simulated without a model over random loads."""

import hashlib
import itertools
from collections import Counter
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgen import batch, schedule
from fastgen.cache import pages
from fastgen.config import Schedule
from fastgen.schedule import Plan, Sequence, Span, State

SLOW = [HealthCheck.too_slow]
RANDOM = settings(derandomize=True, database=None, deadline=None, suppress_health_check=SLOW)


class Job(NamedTuple):
    """A request of the simulation; times in steps."""

    arrival: int
    prompt: int
    output: int  # tokens at most
    stop: int | None = None  # ends by itself after so many tokens
    abort: int | None = None  # is dropped so long after its arrival

    @property
    def limit(self) -> int:
        return self.prompt + self.output


class Load(NamedTuple):
    """What is simulated. Jobs in order of arrival; a job's id is its index."""

    page: int
    capacity: int  # pages, scratch included
    limits: dict[str, Any]
    jobs: tuple[Job, ...]


def needed(page: int, limit: int) -> int:
    """Pages of a sequence, counted position by position; the last token drawn is never written."""
    return len({position // page for position in range(limit - 1)})


@st.composite
def loads(draw: st.DrawFn) -> Load:
    """A load whose every job fits the cache when it is alone."""
    page, most = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    limits = {
        "policy": draw(st.sampled_from(sorted(schedule.POLICIES))),
        "max_requests": most,
        "token_budget": most + draw(st.integers(0, 9)),
        "prefill_chunk": draw(st.none() | st.integers(1, 6)),
    }
    job = st.builds(
        Job,
        arrival=st.integers(0, 12),
        prompt=st.integers(1, 16),
        output=st.integers(1, 8),
        stop=st.none() | st.integers(1, 8),
        abort=st.none() | st.integers(0, 15),
    )
    jobs = sorted(draw(st.lists(job, min_size=1, max_size=9)), key=lambda j: j.arrival)
    biggest = max(needed(page, j.limit) for j in jobs)
    return Load(page, 1 + biggest + draw(st.integers(0, 8)), limits, tuple(jobs))


def ids(state: State) -> list[int]:
    """Everyone the scheduler knows, first in line first."""
    return [s.id for s in (*state.running, *state.waiting)]


def audit(load: Load, before: State, after: State, plan: Plan) -> None:
    """Asserts what has to be true of any plan."""
    limits, running = Schedule(**load.limits), {s.id: s for s in after.running}
    # Admission: in order of arrival, as many as fit, with all pages they will need.
    assert ids(after) == ids(before)
    assert after.running[: len(before.running)] == before.running
    assert all(len(s.pages) == needed(load.page, load.jobs[s.id].limit) for s in after.running)
    if after.waiting:
        wanted = needed(load.page, after.waiting[0].limit)
        assert len(after.running) == limits.max_requests or wanted > pages.count(after.free)
    # Spans: one a sequence, of the tokens after those cached, in pages it holds.
    spans = {span.id: span for span in plan}
    assert len(spans) == len(plan)
    for span in plan:
        s = running[span.id]
        assert s.cached == span.start < span.stop <= s.known
        assert span.sample == (span.stop == s.known)
        assert span.pages == s.pages and span.stop <= len(s.pages) * load.page
    # Who: first those with one token left, who decode, then those with prompt left, in order of admission.
    left = {s.id: s.known - s.cached for s in after.running}
    decoding, prompts = [i for i in left if left[i] == 1], [i for i in left if left[i] > 1]
    if limits.policy == "prefill_first" and prompts:
        decoding = []
    # How much: prompts share what decoding leaves of the budget, first come, first served.
    sizes, budget = dict.fromkeys(decoding, 1), limits.token_budget - len(decoding)
    for i in prompts:
        if size := min(left[i], limits.prefill_chunk or limits.token_budget, budget):
            sizes[i] = size
            budget -= size
    assert [(span.id, span.stop - span.start) for span in plan] == list(sizes.items())
    assert sum(sizes.values()) <= limits.token_budget
    # Progress: someone always, and the first in line always where decoding does not wait for prompts.
    assert plan or not ids(after)
    if plan and limits.policy == "mixed":
        assert ids(after)[0] in spans


def patience(load: Load, id: int) -> int:
    """Steps within which a job ends: one for each token to compute, its own and those it may wait for."""
    ahead = load.jobs[: id + 1] if load.limits["policy"] == "mixed" else load.jobs
    return sum(job.limit - 1 for job in ahead)


@settings(RANDOM, max_examples=1000)
@given(load=loads())
def test_any_load(load: Load) -> None:
    """Pages leak, the budget breaks, someone starves or gets too much, under some arrivals, stops, aborts."""
    limits, jobs = Schedule(**load.limits), load.jobs
    state = State(load.page, pages.pool(load.capacity))
    drawn, cached = Counter[int](), Counter[int]()
    ended, aborted = set[int](), set[int]()

    def check() -> None:
        schedule.check(state, load.capacity, limits)

    for step in itertools.count():
        for id, job in enumerate(jobs):
            if job.arrival == step:
                state = schedule.add(state, Sequence(id, job.prompt, job.limit))
        check()
        late = {i for i, job in enumerate(jobs) if job.abort is not None and job.arrival + job.abort == step}
        late -= ended
        kept = [i for i in ids(state) if i not in late]
        state = schedule.drop(state, late | ended)  # those gone before are not there any more
        assert ids(state) == kept
        check()
        before = state
        state, plan = schedule.plan(state, limits)
        check()
        audit(load, before, state, plan)
        for span in plan:
            cached[span.id] = span.stop
            drawn[span.id] += span.sample
        stopped = {span.id for span in plan if span.sample and drawn[span.id] == jobs[span.id].stop}
        gone = stopped | {span.id for span in plan if drawn[span.id] == jobs[span.id].output}
        kept = [i for i in ids(state) if i not in gone]
        state = schedule.commit(state, plan, stopped)
        check()
        assert ids(state) == kept
        for s in state.running:
            assert (s.cached, s.known) == (cached[s.id], jobs[s.id].prompt + drawn[s.id])
        aborted |= late
        ended |= late | gone
        assert {*ids(state)} == {i for i, job in enumerate(jobs) if job.arrival <= step} - ended
        if len(ended) == len(jobs):
            break
        assert all(step - jobs[i].arrival + 1 < patience(load, i) for i in ids(state)), "someone starves"
    assert state == State(load.page, pages.pool(load.capacity))
    for id in set(range(len(jobs))) - aborted:
        assert drawn[id] == min(jobs[id].output, jobs[id].stop or jobs[id].output)


Memory = dict[int, tuple[int, int]]  # slot -> token, position


def next_token(tokens: list[int]) -> int:
    """A model: one of 256 tokens, decided by all before it."""
    return hashlib.blake2b(bytes(tokens), digest_size=1).digest()[0]


def ends(token: int) -> bool:
    return token % 8 == 0


def alone(prompt: list[int], limit: int) -> list[int]:
    """What the model generates without a scheduler."""
    tokens = list(prompt)
    while len(tokens) < limit:
        tokens.append(next_token(tokens))
        if ends(tokens[-1]):
            break
    return tokens


def step(plan: Plan, tokens: dict[int, list[int]], page: int, pad: int, memory: Memory) -> list[int]:
    """Tokens drawn by a model that sees nothing but the Batch of a plan and the cache, which it writes."""
    b = batch.stage(plan, tokens, page, pad=pad)
    token, position, slot, start, length = (x.tolist() for x in b[:5])
    assert len(token) == max(pad, sum(span.stop - span.start for span in plan)) == start[-1]
    real = start[len(plan)]  # padding follows, a token a row
    assert len({*slot[:real]}) == real, "a slot is written twice"
    assert length[len(plan) :] == [1] * (len(token) - real)
    assert all(x < page for x in slot[real:]) and not b.seat[len(plan) :].any(), "padding left the scratch page"
    memory |= dict(zip(slot, zip(token, position, strict=True), strict=True))
    drawn = []
    for r, span in enumerate(plan):
        assert {x // page for x in slot[start[r] : start[r + 1]]} <= {*span.pages}, "someone else's page"
        table = b.pages[b.seat[r]].tolist()
        seen = [memory[table[i // page] * page + i % page] for i in range(length[r])]
        assert [at for _, at in seen] == list(range(span.stop))
        if span.sample:
            assert b.output[len(drawn)] == start[r + 1] - 1
            drawn.append(next_token([t for t, _ in seen]))
    assert len(drawn) == len(b.output)
    return drawn


@settings(RANDOM, max_examples=200)
@given(load=loads(), pad=st.integers(0, 12))
def test_tokens_do_not_depend_on_the_load(load: Load, pad: int) -> None:
    """Limits, policy, neighbours or padding change what a sequence generates: its cache is not its own."""
    state, limits = State(load.page, pages.pool(load.capacity)), Schedule(**load.limits)
    tokens = {i: [next_token([i, j]) for j in range(job.prompt)] for i, job in enumerate(load.jobs)}
    wanted = {i: alone(tokens[i], job.limit) for i, job in enumerate(load.jobs)}
    memory: Memory = {}
    aborted = set[int]()
    for now in itertools.count():
        for id, job in enumerate(load.jobs):
            if job.arrival == now:
                state = schedule.add(state, Sequence(id, job.prompt, job.limit))
            if job.abort is not None and job.arrival + job.abort == now and id in ids(state):
                state = schedule.drop(state, [id])
                aborted.add(id)
        state, plan = schedule.plan(state, limits)
        drawing = [span.id for span in plan if span.sample]
        stopped = set()
        for id, token in zip(drawing, step(plan, tokens, load.page, pad, memory), strict=True):
            tokens[id].append(token)
            stopped |= {id} if ends(token) else set()
        state = schedule.commit(state, plan, stopped)
        if not ids(state) and now >= load.jobs[-1].arrival:
            break
        assert now < 1000, "nothing ends"
    for id, expected in wanted.items():
        assert tokens[id] == (expected[: len(tokens[id])] if id in aborted else expected)


def running(*lengths: tuple[int, int]) -> State:
    """Sequences (known, limit) admitted to a cache of 20 pages of 4 tokens."""
    state = State(4, pages.pool(21))
    for id, (known, limit) in enumerate(lengths):
        state = schedule.add(state, Sequence(id, known, limit))
    return schedule.admit(state, len(lengths))


@pytest.mark.parametrize(("limit", "expected"), [(2, 1), (5, 1), (6, 2), (9, 2), (10, 3)])
def test_last_token_needs_no_room(limit: int, expected: int) -> None:
    """The last token drawn is never fed back: a page for it would be wasted."""
    assert schedule.need(State(4, 0), limit) == expected


def test_nobody_overtakes() -> None:
    """A small request admitted before a big one that came first could keep it waiting for ever."""
    state = State(4, pages.pool(6))  # 5 pages
    for id, limit in enumerate([13, 13, 5]):  # 3, 3 and 1 pages
        state = schedule.add(state, Sequence(id, 4, limit))
    state = schedule.admit(state, 3)
    assert [s.id for s in state.running] == [0]
    assert [s.id for s in schedule.admit(schedule.drop(state, [0]), 3).running] == [1, 2]


def test_mixed_decodes_before_prompts() -> None:
    """The order that `Plan` promises, with the prompts filling the budget in chunks."""
    state = running((9, 20), (1, 9), (7, 9))
    _, plan = schedule.plan(state, Schedule(max_requests=3, token_budget=8, prefill_chunk=4))
    held = {s.id: (s.pages, s.seat) for s in state.running}
    assert plan == (
        Span(1, 0, 1, True, *held[1]),
        Span(0, 0, 4, False, *held[0]),
        Span(2, 0, 3, False, *held[2]),
    )


def test_prefill_first_does_not_decode_meanwhile() -> None:
    """Decoding beside prompts would make this policy the other one."""
    state, limits = running((9, 20), (1, 9)), Schedule(policy="prefill_first", max_requests=2, token_budget=8)
    plans = []
    for _ in range(3):
        state, plan = schedule.plan(state, limits)
        plans.append([span[:4] for span in plan])
        state = schedule.commit(state, plan, ())
    assert plans == [
        [(0, 0, 8, False)],
        [(0, 8, 9, True), (1, 0, 1, True)],
        [(0, 9, 10, True), (1, 1, 2, True)],
    ]


FIRST, SECOND = Sequence(0, 3, 5, 2, (1,), 1), Sequence(1, 6, 9, 0, (2, 3), 2)
SOUND = State(4, 0b110000, schedule.SEATS ^ 0b110, (Sequence(2, 1, 5),), (FIRST, SECOND))


@pytest.mark.parametrize(
    ("message", "broken"),
    [
        ("two owners", {"running": (FIRST, SECOND._replace(pages=(1, 2))), "free": 0b111000}),
        ("not taken", {"free": 0b110010}),  # a page is held and free
        ("lost", {"free": 0b100000}),
        ("lost", {"free": 0b110001}),  # scratch is free
        ("lost", {"free": 0b1110000}),  # a page that is not in the cache
        ("seat is lost", {"seats": schedule.SEATS ^ 0b1110}),
        ("not taken", {"running": (FIRST, SECOND._replace(seat=1))}),  # two in a seat
        ("queued twice", {"waiting": SOUND.waiting * 2}),
        ("queued twice", {"waiting": (Sequence(1, 6, 9),)}),  # waiting and running
        (None, {"running": (FIRST._replace(cached=3), SECOND)}),  # nothing left to compute
        (None, {"running": (FIRST._replace(cached=-1), SECOND)}),
        (None, {"running": (FIRST._replace(known=6), SECOND)}),  # beyond its limit
        (None, {"running": (FIRST, SECOND._replace(pages=(2,))), "free": 0b111000}),  # too few pages
        (
            None,
            {"running": (FIRST, SECOND, Sequence(3, 1, 2, 0, (4,), 3)), "free": 0b100000, "seats": ~0b1111},
        ),  # too many run
    ],
)
def test_check_finds(message: str | None, broken: dict[str, Any]) -> None:
    """A check that passes a broken state would make the tests above worth nothing."""
    limits = Schedule(max_requests=2)
    schedule.check(SOUND, 6, limits)
    with pytest.raises(AssertionError, match=message):
        schedule.check(SOUND._replace(**broken), 6, limits)
