"""The scheduler and its tree of pages, simulated over random loads with a model that reads what the pages hold."""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgen import Completion, Output, SamplingParams
from fastgen.config import SCHEDULING_POLICIES, SchedulerConfig
from fastgen.core import scheduler, scheduling_policy
from fastgen.core.batch import InputBuffers
from fastgen.core.prefix_cache import Namespace, PageCopies, PrefixCache
from fastgen.core.request import SequenceState
from fastgen.core.scheduler import Plan, SchedulerOutput, SchedulingPolicy, Sequence, State
from fastgen.core.scheduling_policy import POLICIES, MixedPolicy, find_shared_prefix_groups

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
RANDOM = settings(derandomize=True, database=None, deadline=None, suppress_health_check=SLOW)


@pytest.fixture(autouse=True, scope="module")
def little_is_worth() -> Iterator[None]:
    """Groups of few keys, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduling_policy, "MIN_SAVED_KEYS", 1)
        yield


class Job(NamedTuple):
    """A request of the simulation; times in steps."""

    arrival: int
    prompt: tuple[int, ...]
    output: int  # tokens at most
    abort: int | None = None  # is dropped so long after its arrival
    fork: int | None = None  # goes on twice, so long after its arrival
    whole: bool = False
    namespace: Namespace = 0

    @property
    def limit(self) -> int:
        return len(self.prompt) + self.output


class Load(NamedTuple):
    """What is simulated. Jobs in order of arrival; a job's id is its index."""

    page: int
    capacity: int  # pages, scratch included
    host: int  # pages
    tree: dict[str, bool]
    limits: dict[str, Any]
    late: bool  # tokens are known a step after they are drawn
    jobs: tuple[Job, ...]

    def state(self) -> State:
        return State(PrefixCache(self.page, self.capacity, self.host, **self.tree))


@st.composite
def loads(draw: st.DrawFn) -> Load:
    """A load whose every job fits the cache when it is alone; prompts begin alike more often than not."""
    page, most = draw(st.sampled_from((1, 2, 3, 4, 9))), draw(st.integers(1, 6))
    limits = {
        "policy": draw(st.sampled_from(sorted(POLICIES))),
        "max_num_seqs": most,
        "token_budget": most + draw(st.integers(0, 12)),
        "prefill_chunk": draw(st.none() | st.integers(1, 6)),
    }
    stems = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), min_size=1, max_size=3))
    prompt = st.builds(
        lambda stem, n, end: tuple((*stem[:n], *end)) or (7,),
        st.sampled_from(stems),
        st.integers(0, 14),
        st.lists(st.integers(0, 2), max_size=4),
    )
    job = st.builds(
        Job,
        arrival=st.sampled_from((0, 0, 0, 1, 2, 5, 9, 12)),
        prompt=prompt,
        output=st.integers(1, 20),
        abort=st.none() | st.none() | st.integers(0, 15),
        fork=st.none() | st.none() | st.integers(0, 9),
        whole=st.sampled_from((False, False, False, True)),
        namespace=st.sampled_from((0, 0, 0, (0, "a"), (0, "a"), (0, "b"), 1, (1, "a"))),
    )
    jobs = sorted(draw(st.lists(job, min_size=1, max_size=12)), key=lambda j: j.arrival)
    biggest = max(-(-(j.limit - 1) // page) for j in jobs)
    tree = {
        "enable_prefix_caching": draw(st.sampled_from((True, True, False))),
        "offload_preempted_only": draw(st.booleans()),
    }
    capacity, host = 1 + biggest + draw(st.integers(0, 4)), draw(st.sampled_from((0, 1, 3, 8, 30)))
    return Load(page, capacity, host, tree, limits, draw(st.booleans()), tuple(jobs))


def next_token(tokens: list[int]) -> int:
    """A model: a token of a small vocabulary, decided by all before it."""
    return hashlib.blake2b(bytes(tokens), digest_size=1).digest()[0] % 16


def ends(token: int) -> bool:
    return token == 15


def alone(prompt: tuple[int, ...], limit: int) -> list[int]:
    """What the model generates without a scheduler."""
    tokens = list(prompt)
    while len(tokens) < limit:
        tokens.append(next_token(tokens))
        if ends(tokens[-1]):
            break
    return tokens


def sample(tokens: list[int]) -> SequenceState:
    """What staging wants of a request."""
    made = SequenceState(Output(0, tokens, [Completion()]), 0, SamplingParams(), 0, 99, frozenset(), None)
    made.token_ids = tokens
    return made


def ids(state: State) -> list[int]:
    """Everyone the scheduler knows, first in line first."""
    return [s.id for s in (*state.running, *state.waiting)]


Written = tuple[int, int, Namespace]  # a token, its position, and whose it is


@dataclass
class Run:
    """A simulation: what an engine does, with a model that sees nothing but batches and pages."""

    load: Load
    state: State = field(init=False)
    tokens: dict[int, list[int]] = field(default_factory=dict)  # known
    seats: list[int] = field(init=False)  # token last drawn in each
    flying: list[tuple[int, int]] | None = None  # sequence, token: drawn and not yet known
    memory: dict[int, Written] = field(default_factory=dict)  # by slot
    host: dict[tuple[int, int], Written | None] = field(default_factory=dict)
    early: dict[int, Written | None] = field(default_factory=dict)  # on its way to the memory
    ended: set[int] = field(default_factory=set)
    steps: int = 0

    def __post_init__(self) -> None:
        self.limits = SchedulerConfig(**self.load.limits)
        self.state = self.load.state()
        most = self.limits.max_num_seqs
        self.seats = [0] * (most + 1)
        wide = self.load.capacity
        self.stager = InputBuffers(most, wide, self.load.page, 9, torch.device("cpu"))

    def check(self) -> None:
        scheduler.check(self.state, self.limits)

    def add(self, id: int, job: Job) -> None:
        self.tokens[id] = list(job.prompt)
        new = Sequence(id, len(job.prompt), job.limit, job.whole, namespace=job.namespace)
        self.state = scheduler.add(self.state, new)

    def drop(self, ids: set[int]) -> None:
        self.state = scheduler.remove(self.state, ids, self.tokens)
        self.ended |= ids
        self.check()

    def receive(self) -> None:
        """What was drawn becomes known, and who stops is dropped."""
        flying, self.flying = self.flying or [], None
        stopped = set()
        for id, token in flying:
            if id not in self.ended:
                self.tokens[id].append(token)
                if ends(token) or len(self.tokens[id]) == self.load.jobs[id % 100].limit:
                    stopped.add(id)
        self.drop(stopped)

    def step(self) -> Plan:
        before = self.state
        self.state, scheduled = scheduler.plan(before, self.limits, POLICIES[self.limits.policy], self.tokens)
        plan = scheduled.plan
        self.check()
        self.audit(before, scheduled)
        drawn = self.compute(plan, scheduled.page_copies) if plan else []
        if plan:
            self.state = scheduler.commit(self.state, plan, self.tokens)
            self.check()
            self.steps += 1
        self.receive()
        self.flying = drawn
        if not self.load.late:
            self.receive()
        return plan

    def audit(self, before: State, scheduled: SchedulerOutput) -> None:
        """Asserts what has to be true of any plan."""
        limits, after, plan = self.limits, self.state, scheduled.plan
        running = {s.id: s for s in after.running}
        assert sorted(ids(after)) == sorted(ids(before))
        preempted = [*scheduled.preempted]
        assert not (preempted and scheduled.admitted)
        kept = [s.id for s in before.running if s.id not in preempted]
        assert [s.id for s in after.running] == kept + [s.id for s in scheduled.admitted]
        last = [s.id for s in before.running][::-1][: len(preempted)]
        assert preempted == last, "not the last admitted were preempted"
        assert [s.id for s in after.waiting[: len(preempted)]] == preempted[::-1], "preempted sequences are not first"
        spans = {span.id: span for span in plan}
        assert len(spans) == len(plan) and sum(x.stop - x.start for x in plan) <= limits.token_budget
        sizes = [x.stop - x.start > 1 for x in plan]
        assert sizes == sorted(sizes), "those who decode do not come first"
        for span in plan:
            s = running[span.id]
            assert s.num_computed_tokens == span.start < span.stop <= s.num_tokens and span.pages == s.pages
            assert span.needs_sampling == (span.stop == s.num_tokens)
            assert span.stop - span.start <= (limits.prefill_chunk or limits.token_budget)
            assert span.stop <= len(s.pages) * self.load.page
        if limits.policy == "prefill_first" and any(sizes):
            assert not any(
                x.stop - x.start == 1 and x.id in kept and x.needs_sampling for x in plan if x.start > 0
            ) or all(running[x.id].num_tokens - x.start <= 1 for x in plan if x.stop - x.start == 1)
        assert plan or not ids(after), "nothing happens"
        if plan and limits.policy == "mixed":
            assert ids(before)[0] in spans, "the first in line does not advance"

    def compute(self, plan: Plan, moves: PageCopies) -> list[tuple[int, int]]:
        """Moves and writes on the memory; the tokens drawn from what each sequence then sees."""
        page = self.load.page
        for slot, value in self.early.items():  # what the step before did not wait for
            if value is None:
                self.memory.pop(slot, None)
            else:
                self.memory[slot] = value
        self.early.clear()
        places: list[int] = [t for _, t in moves.on_device] + [t for _, t in moves.to_device]
        assert len(places) == len(set(places)), "a page is filled twice"
        assert not {s for s, _ in moves.on_device} & set(places), "a page is copied while it is filled"
        for p, h in moves.to_host:
            assert 0 < h <= self.load.host
            self.host |= {(h, i): self.memory.get(p * page + i) for i in range(page)}
        for source, target in moves.on_device:
            for i in range(page):
                self.memory.pop(target * page + i, None)
                if (x := self.memory.get(source * page + i)) is not None:
                    self.memory[target * page + i] = x
        for h, target in moves.to_device:
            for i in range(page):
                self.memory.pop(target * page + i, None)
                if moves.prefetch:
                    self.early[target * page + i] = self.host.get((h, i))
                elif (x := self.host.get((h, i))) is not None:
                    self.memory[target * page + i] = x
        size, rows = sum(x.stop - x.start for x in plan) + 3, self.limits.max_num_seqs + 1
        b, _ = self.stager.fill(plan, {x.id: sample(self.tokens[x.id]) for x in plan}, size, rows, self.steps)
        token, position, slot, start, length, seat = (x.tolist() for x in b[:6])
        token = [self.seats[-t] if t < 0 else t for t in token]
        assert all(x < page for x in slot[start[len(plan)] :]), "padding left the scratch page"
        spaces = {s.id: s.namespace for s in self.state.running}
        for r, span in enumerate(plan):
            for i in range(start[r], start[r + 1]):
                if span.writes_kv:
                    assert slot[i] >= page
                    self.memory[slot[i]] = token[i], position[i], spaces[span.id]
                else:
                    assert slot[i] < page and span.stop - span.start == 1
        drawn = []
        for r, span in enumerate(plan):
            table = b.page_table[seat[r]].tolist()
            assert table[: len(span.pages)] == list(span.pages), "the table is not what the sequence holds"
            seen = [self.memory[table[i // page] * page + i % page] for i in range(length[r])]
            assert [at for _, at, _ in seen] == list(range(span.stop))
            known = self.tokens[span.id]
            assert [t for t, *_ in seen][: len(known)] == known[: span.stop], "it reads somebody else's tokens"
            assert {space for *_, space in seen} == {spaces[span.id]}, "it reads what was computed for another salt"
            if span.needs_sampling:
                drawn.append((span.id, next_token([t for t, *_ in seen])))
                self.seats[span.req_idx] = drawn[-1][1]
        self.groups(plan)
        return drawn

    def groups(self, plan: Plan) -> None:
        """Groups read the same pages, whole ones, and leave each sequence something of its own to read."""
        found = find_shared_prefix_groups(self.state, plan, 3, 2)
        rows = [r for members, _ in found for r in members]
        assert len(rows) == len(set(rows)) and len(found) <= 2
        for members, keys in found:
            assert 1 < len(members) <= 3 and keys > 0 and keys % self.load.page == 0
            assert len({plan[r].pages[: keys // self.load.page] for r in members}) == 1
            assert all(keys < plan[r].stop == plan[r].start + 1 for r in members)


@settings(RANDOM, max_examples=200)
@given(load=loads())
def test_any_load(load: Load) -> None:
    """Pages leak or are mixed up, someone starves, or a token depends on its company, under some arrivals, sharing,
    forks, stops, aborts, evictions and preemptions."""
    run, jobs = Run(load), load.jobs
    forked = set[int]()
    for now in itertools.count():
        for id, job in enumerate(jobs):
            if job.arrival == now:
                run.add(id, job)
        for id, job in enumerate(jobs):
            present = id in ids(run.state) and id not in run.ended
            if job.fork is not None and job.arrival + job.fork == now and present:
                run.receive()  # a fork goes on from what is known
                if id not in run.ended:
                    known = run.tokens[id]
                    run.tokens[100 + id] = [*known]
                    new = Sequence(100 + id, len(known), job.limit, namespace=job.namespace)
                    run.state = scheduler.fork(run.state, id, new, run.tokens)
                    forked.add(100 + id)
                    run.check()
            if job.abort is not None and job.arrival + job.abort == now and present:
                run.drop({id} - run.ended)
        run.step()
        if not ids(run.state) and not run.flying and now > jobs[-1].arrival:
            break
        assert now <= 13 + 2 * sum(job.limit + 2 for job in jobs) * 2, "someone starves"
    for id, found in run.tokens.items():
        job = jobs[id % 100]
        wanted = alone(job.prompt, job.limit)
        assert found == (wanted[: len(found)] if job.abort is not None else wanted)
    tree = run.state.prefix_cache
    assert tree.num_available_pages() == load.capacity - 1, "a page is lost"
    tree.begin_step()  # the last plan's nodes are not pinned any longer
    assert all(root.children for root in tree.salted_roots.values()), "a salt without anything cached is remembered"
    if not tree.enabled:
        assert not tree.idle_nodes


# --- single rules ---------------------------------------------------------------------------------------------------


class Played:
    """Plans of a few sequences on a tree of 20 pages of 4 tokens, unless told otherwise."""

    def __init__(
        self, page: int = 4, pages: int = 21, host: int = 0, policy: SchedulingPolicy | None = None, **limits: Any
    ) -> None:
        self.policy = policy
        self.state = State(PrefixCache(page, pages, host))
        self.limits = SchedulerConfig(**{"max_num_seqs": 8, "token_budget": 64} | limits)
        self.tokens: dict[int, list[int]] = {}

    def add(self, id: int, prompt: list[int], limit: int | None = None, namespace: Namespace = 0) -> None:
        self.tokens[id] = prompt
        new = Sequence(id, len(prompt), limit or len(prompt) + 5, namespace=namespace)
        self.state = scheduler.add(self.state, new)

    def plan(self) -> tuple[Plan, PageCopies]:
        """Plans a step without committing it."""
        policy = self.policy or POLICIES[self.limits.policy]
        self.state, self.scheduled = scheduler.plan(self.state, self.limits, policy, self.tokens)
        scheduler.check(self.state, self.limits)
        return self.scheduled.plan, self.scheduled.page_copies

    def step(self) -> tuple[list[tuple[int, int, int]], PageCopies]:
        """(sequence, start, stop) of what is computed; every token drawn is 9."""
        plan, moves = self.plan()
        for span in plan:
            if span.needs_sampling:
                self.tokens[span.id] = [*self.tokens[span.id], 9]
        self.state = scheduler.commit(self.state, plan, self.tokens)
        scheduler.check(self.state, self.limits)
        return [(x.id, x.start, x.stop) for x in plan], moves


def test_the_same_step_shares_whole_pages() -> None:
    """A prompt that arrives twice is computed twice."""
    p = Played()
    p.add(0, [*range(10)])
    p.add(1, [*range(8), 30, 31, 32])
    spans, moves = p.step()
    assert spans == [(0, 0, 10), (1, 8, 11)]
    a, b = (s.pages for s in p.state.running)
    assert a[:2] == b[:2] and a[2] != b[2] and not moves.on_device


def test_samples_wait_a_step_and_copy_the_last_page() -> None:
    """Samples of a prompt compute its last page each, or keep those behind them waiting."""
    p = Played()
    for id in range(3):
        p.add(id, [*range(10)])
    p.add(3, [40, 41])
    spans, moves = p.step()
    assert spans == [(0, 0, 10), (3, 0, 2)] and not moves.on_device
    spans, moves = p.step()
    assert spans == [(0, 10, 11), (1, 9, 10), (2, 9, 10), (3, 2, 3)][:1] + [(3, 2, 3), (1, 9, 10), (2, 9, 10)]
    assert len(moves.on_device) == 2 and len({source for source, _ in moves.on_device}) == 1


def test_a_prompt_that_is_all_cached_computes_its_last_token() -> None:
    """Nothing to compute would leave nothing to draw from; its key is there, so it is not written again."""
    p = Played()
    p.add(0, [*range(8)])
    p.step()
    p.add(1, [*range(8)])
    plan, moves = p.plan()
    assert [x[1:4] for x in plan] == [(8, 9, True), (7, 8, True)]
    assert [x.writes_kv for x in plan] == [True, False] and not moves.on_device
    assert p.state.running[1].pages == p.state.running[0].pages[:2]


def test_prompts_that_are_scored_are_computed() -> None:
    """A prompt's logprobs need the hidden states of all its tokens."""
    p = Played()
    p.add(0, [*range(8)])
    p.step()
    p.tokens[1] = [*range(8)]
    p.state = scheduler.add(p.state, Sequence(1, 8, 12, needs_prompt_logprobs=True))
    assert (1, 0, 8) in p.step()[0]


def test_conversation_goes_on() -> None:
    """The next turn computes what is new alone, within the page where the last one ended."""
    p = Played()
    p.add(0, [*range(9)], limit=11)
    while p.state.running or p.state.waiting:
        p.step()
    assert p.tokens[0] == [*range(9), 9, 9]
    p.add(1, [*p.tokens[0], 50, 51, 52])
    spans, moves = p.step()
    assert spans == [(1, 10, 14)] and len(moves.on_device) == 1  # the last token drawn was never computed
    assert p.state.prefix_cache.stats.num_hit_tokens == 10


def test_least_recently_used_go_first() -> None:
    """A prompt in use all the time is forgotten before one that nobody asks for."""
    p = Played(pages=5, max_num_seqs=1)
    for id, first in enumerate((10, 20, 10, 30)):  # two pages each
        p.add(id, [first, 1, 2, 3, 4, 5, 6, 7], limit=9)
        p.step()
    for id, (first, hit) in enumerate(((10, 7), (30, 7), (20, 0)), 4):
        p.add(id, [first, 1, 2, 3, 4, 5, 6, 7], limit=9)
        assert p.step()[0] == [(id, hit, 8)]


def test_salts_share_nothing() -> None:
    """Neither whole pages, nor tails, nor what is planned in the same step; requests of one salt share all of it."""
    p = Played(pages=60)
    spaces: list[Namespace] = [0, (0, "a"), (0, "b"), (1, "a"), 1]
    prompt = [*range(11)]
    for id, space in enumerate(spaces):
        p.add(id, prompt, 12, space)
    assert p.step()[0] == [(id, 0, 11) for id in range(5)]
    for id, space in enumerate(spaces, 5):
        p.add(id, prompt, 12, space)
    assert sorted(p.step()[0]) == [(id, 10, 11) for id in range(5, 10)]
    assert (
        p.state.prefix_cache.insert_idle_pages(prompt, (0, "b"))
        == ()
        != p.state.prefix_cache.insert_idle_pages(prompt, (0, "c"))
    )
    p.state.prefix_cache.reset_adapter(1)
    scheduler.check(p.state, p.limits)
    for id, space in enumerate(spaces, 10):
        p.add(id, prompt, 12, space)
    assert sorted(p.step()[0]) == [*((id, 10, 11) for id in (10, 11, 12)), (13, 0, 11), (14, 0, 11)]
    p.state.prefix_cache.reset()
    scheduler.check(p.state, p.limits)
    assert not p.state.prefix_cache.salted_roots and p.state.prefix_cache.num_available_pages() == 59


def test_salts_are_forgotten_with_what_was_cached_for_them() -> None:
    """Each request may bring another one. On the host they stay as long as their pages."""
    for host in (0, 6):
        p = Played(pages=7, host=host, max_num_seqs=1)
        for id in range(40):
            p.add(id, [id, *range(7)], 9, (0, f"salt {id}"))
            p.step()
        assert p.state.prefix_cache.num_available_pages() == 6 and not p.state.running
        assert {int(key[1].split()[1]) for key in p.state.prefix_cache.salted_roots if isinstance(key, tuple)} == {
            *range(40 - 3 - host // 2, 40)
        }


def test_other_parameters_find_nothing() -> None:
    """After an update pages of the old parameters are served, or those in use are lost."""
    p = Played()
    p.add(0, [*range(12)])
    p.step()
    p.state.prefix_cache.reset()
    scheduler.check(p.state, p.limits)
    p.add(1, [*range(12)])
    assert (1, 0, 12) in p.step()[0]
    p.add(2, [*range(12)])
    assert (2, 11, 12) in p.step()[0]  # computed with the new ones
    for _ in range(6):
        p.step()
    assert not p.state.running and p.state.prefix_cache.num_available_pages() == 20


def test_the_host_keeps_what_leaves() -> None:
    """What does not fit the device is computed again though the host has it."""
    p = Played(pages=5, host=8, max_num_seqs=1)
    out = []
    for id, first in enumerate((10, 20, 30)):
        p.add(id, [first, 1, 2, 3, 4, 5, 6, 7], limit=9)
        out += p.step()[1].to_host
    assert len(out) == 2
    p.add(3, [10, 1, 2, 3, 4, 5, 6, 7, 8], limit=10)
    spans, moves = p.step()
    assert spans == [(3, 8, 9)] and [h for h, _ in moves.to_device] == [h for _, h in out][::-1]


def test_who_came_last_makes_way() -> None:
    """Two sequences that outgrow the cache: the first one is stopped, or both are."""
    p = Played(pages=6)
    p.add(0, [*range(7)], limit=17)
    p.add(1, [*range(20, 25)], limit=15)
    preempted = []
    for _ in range(22):
        p.step()
        preempted += p.scheduled.preempted
    assert preempted and set(preempted) == {1}
    assert len(p.tokens[0]) == 17 and len(p.tokens[1]) == 15 and not p.state.running


def test_nobody_overtakes() -> None:
    """A small request admitted before a big one that came first could keep it waiting for ever."""
    p = Played(pages=7)  # 6 pages
    for id, length in enumerate((13, 9, 3)):  # 4, 3 and 1 pages
        p.add(id, [id * 20 + i for i in range(length)])
    assert [x[0] for x in p.step()[0]] == [0]


def test_mixed_decodes_before_prompts() -> None:
    """The order that `Plan` promises, with the prompts filling the budget in chunks."""
    p = Played(token_budget=8, prefill_chunk=4)
    for id, length in enumerate((9, 1, 7)):
        p.add(id, [id * 20 + i for i in range(length)])
    assert p.step()[0] == [(1, 0, 1), (0, 0, 4), (2, 0, 3)]


def test_prefill_first_does_not_decode_meanwhile() -> None:
    """Decoding beside prompts would make this policy the other one."""
    p = Played(policy=POLICIES["prefill_first"], token_budget=8)
    p.add(0, [*range(9)])
    p.add(1, [40])
    plans = [p.step()[0] for _ in range(2)]
    p.add(2, [*range(60, 66)])
    plans += [p.step()[0] for _ in range(2)]
    assert plans == [[(0, 0, 8)], [(0, 8, 9), (1, 0, 1)], [(2, 0, 6)], [(0, 9, 10), (1, 1, 2), (2, 6, 7)]]


class ShortestPromptFirst(MixedPolicy):
    """A policy as a user would write it: short prompts are admitted first."""

    def order_waiting(self, waiting: tuple[Sequence, ...]) -> tuple[Sequence, ...]:
        return tuple(sorted(waiting, key=lambda seq: seq.num_tokens))


def test_a_policy_is_one_class() -> None:
    """The scheduler admits in another order than the policy's, or plans its spans by other rules."""
    plans = {}
    for name, policy in (("mixed", None), ("shortest", ShortestPromptFirst())):
        p = Played(policy=policy, token_budget=8)
        for id, length in enumerate((6, 4, 2)):
            p.add(id, [id * 20 + i for i in range(length)])
        plans[name] = [p.step()[0] for _ in range(2)]
    assert plans["mixed"] == [[(0, 0, 6), (1, 0, 2)], [(0, 6, 7), (1, 2, 4), (2, 0, 2)]]
    assert plans["shortest"] == [[(2, 0, 2), (1, 0, 4), (0, 0, 2)], [(2, 2, 3), (1, 4, 5), (0, 2, 6)]]


def test_every_policy_can_be_configured() -> None:
    """A policy cannot be chosen by name, or a name has no policy."""
    assert {*POLICIES} == {*SCHEDULING_POLICIES}


def test_groups_read_what_they_share() -> None:
    """Sequences of two prompts: each group reads its own prompt, and one that is alone is in none."""
    p = Played(pages=90, max_num_seqs=9, token_budget=300)
    for id in range(7):
        p.add(id, [100 * (id // 3) + i for i in range(32)], limit=50)
    for _ in range(3):
        p.step()
    plan, _ = p.plan()
    who = [[plan[r].id for r in members] for members, _ in find_shared_prefix_groups(p.state, plan, 16, 9)]
    assert sorted(map(sorted, who)) == [[0, 1, 2], [3, 4, 5]]
    assert {keys for _, keys in find_shared_prefix_groups(p.state, plan, 16, 9)} == {32}
    assert len(find_shared_prefix_groups(p.state, plan, 2, 9)) == 2  # the third of each is alone
    assert len(find_shared_prefix_groups(p.state, plan, 16, 1)) == 1
    few = Played()
    few.add(0, [*range(6)], limit=20)
    few.add(1, [*range(4), 50, *range(60, 79)], limit=40)
    for _ in range(3):
        few.step()
    plan, _ = few.plan()
    assert few.state.running[0].path[0].ref_count == 2
    assert find_shared_prefix_groups(few.state, plan, 16, 9) == ()  # four keys of some thirty are not worth it


def sound() -> Played:
    """Two that share a page, have nodes, tails and pages of their own, one that waits, idle pages on both sides."""
    p = Played(pages=9, host=4, max_num_seqs=2)
    p.add(9, [*range(70, 78)], limit=9)
    p.step()
    p.add(0, [*range(6)], limit=20)
    p.add(1, [*range(4), 50, 51, 52], limit=20)
    p.add(2, [1], limit=2)
    for _ in range(4):
        p.step()
    assert p.state.prefix_cache.idle_nodes and p.state.waiting
    return p


def _first(p: Played) -> Sequence:
    return p.state.running[0]


BREAKS: dict[str, tuple[str | None, Any]] = {
    "two owners": (
        "two owners",
        lambda p: setattr(next(iter(p.state.prefix_cache.idle_nodes)), "page", _first(p).pages[0]),
    ),
    "free and held": (
        "not allocated",
        lambda p: setattr(
            p.state.prefix_cache, "free_pages", p.state.prefix_cache.free_pages | 1 << _first(p).pages[0]
        ),
    ),
    "lost": ("lost", lambda p: p.state.prefix_cache.allocate_page()),
    "scratch is free": (
        "lost",
        lambda p: setattr(p.state.prefix_cache, "free_pages", p.state.prefix_cache.free_pages | 1),
    ),
    "host page lost": ("host page is lost", lambda p: setattr(p.state.prefix_cache, "free_host_pages", 0)),
    "a holder too many": ("reference count", lambda p: setattr(_first(p).path[0], "ref_count", 5)),
    "not idle": ("not idle", lambda p: p.state.prefix_cache.idle_nodes.clear()),
    "parent first": ("parent would go first", lambda p: _reverse(p.state.prefix_cache.idle_nodes)),
    "waits with pages": (None, lambda p: setattr(p, "state", p.state._replace(waiting=(_first(p)._replace(id=7),)))),
    "twice": ("queued twice", lambda p: setattr(p, "state", p.state._replace(waiting=p.state.waiting * 2))),
    "req_idx": (
        "not allocated",
        lambda p: setattr(p, "state", p.state._replace(free_req_indices=scheduler.ALL_REQ_INDICES)),
    ),
    "beyond its limit": (None, lambda p: _change(p, num_tokens=99)),
    "nothing to compute": (None, lambda p: _change(p, num_computed_tokens=_first(p).num_tokens)),
    "too few pages": (
        "without a page",
        lambda p: _change(p, num_computed_tokens=_first(p).num_tokens - 1, pages=_first(p).pages[:1]),
    ),
}


def _reverse(idle: dict) -> None:
    nodes = [*idle][::-1]
    idle.clear()
    idle.update(dict.fromkeys(nodes))


def _change(p: Played, **values: Any) -> None:
    first, *rest = p.state.running
    p.state = p.state._replace(running=(first._replace(**values), *rest))


@pytest.mark.parametrize("name", BREAKS)
def test_check_finds(name: str) -> None:
    """A check that passes a broken state would make the tests above worth nothing."""
    p = sound()
    scheduler.check(p.state, p.limits)
    message, damage = BREAKS[name]
    damage(p)
    with pytest.raises(AssertionError, match=message):
        scheduler.check(p.state, p.limits)


def test_planted_pages_are_found() -> None:
    """Pages brought from elsewhere are not matched, or overwrite what is there."""
    p = Played()
    p.add(0, [*range(6)])
    p.step()
    filled = p.state.prefix_cache.insert_idle_pages([*range(13)])
    scheduler.check(p.state, p.limits)
    assert len(filled) == 3 and filled[0] == 0 and all(filled[1:])
    assert p.state.prefix_cache.insert_idle_pages([*range(13)]) == ()
    p.add(1, [*range(13), 50])
    assert (1, 12, 14) in p.step()[0]
    assert p.state.prefix_cache.insert_idle_pages([*range(200, 300)]) == ()  # no room
