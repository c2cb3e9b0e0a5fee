"""Continuous batching as pure functions on values: what runs next, and what is true after it ran.

    add -> waiting --admit--> running --plan/commit, step by step--> gone (stop) or removed (drop)

A sequence holds the pages of its longest possible length from admission on, so no step can run out of them:

    pages 1..n-1  =  free  +  pages of the running sequences, each page with one owner;  page 0 is scratch
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

from fastgen.cache import pages
from fastgen.config import Schedule

SEATS = -2  # a pool of as many free seats as are ever needed; seat 0 is padding's


class Sequence(NamedTuple):
    """One sequence being generated, in tokens."""

    id: int
    known: int  # prompt and generated so far
    limit: int  # prompt and the most it may generate
    cached: int = 0  # whose keys and values are computed
    pages: tuple[int, ...] = ()
    seat: int = 0  # row of the device's tables while it runs


class State(NamedTuple):
    """Everything the scheduler knows."""

    page: int  # tokens of a page
    free: int  # pool of free pages
    seats: int = SEATS  # pool of free seats
    waiting: tuple[Sequence, ...] = ()  # in order of arrival
    running: tuple[Sequence, ...] = ()  # in order of admission


class Span(NamedTuple):
    """Tokens [start, stop) of a sequence, computed in one step; `sample`: the next token is drawn from the last."""

    id: int
    start: int
    stop: int
    sample: bool
    pages: tuple[int, ...]
    seat: int = 0


Plan = tuple[Span, ...]  # decoding sequences first


def need(state: State, tokens: int) -> int:
    """Pages that hold `tokens`; the last token drawn is never written."""
    return -(-(tokens - 1) // state.page)


def add(state: State, sequence: Sequence) -> State:
    """Queue a sequence; the caller has checked that it fits the cache at all."""
    return state._replace(waiting=(*state.waiting, sequence))


def drop(state: State, ids: Collection[int]) -> State:
    """Without the sequences `ids`, waiting or running; their pages are free again."""
    if not ids:
        return state
    free, seats = state.free, state.seats
    for s in state.running:
        if s.id in ids:
            free, seats = pages.give(free, s.pages), pages.give(seats, (s.seat,))
    waiting, running = (tuple(s for s in group if s.id not in ids) for group in (state.waiting, state.running))
    return state._replace(free=free, seats=seats, waiting=waiting, running=running)


def admit(state: State, most: int) -> State:
    """Move sequences from waiting to running, in order of arrival, while a place and all their pages are free."""
    free, seats, running = state.free, state.seats, list(state.running)
    admitted = 0
    for s in state.waiting:
        wanted = need(state, s.limit)
        if len(running) >= most or wanted > pages.count(free):
            break  # nobody overtakes: the first in line cannot starve
        held, free = pages.take(free, wanted)
        (seat,), seats = pages.take(seats, 1)
        running.append(s._replace(pages=held, seat=seat))
        admitted += 1
    return state._replace(free=free, seats=seats, running=tuple(running), waiting=state.waiting[admitted:])


def _prefill(running: tuple[Sequence, ...], budget: int, chunk: int) -> list[Span]:
    """Prompt tokens in order of admission, until the budget is spent."""
    spans = []
    for s in running:
        n = min(s.known - s.cached, chunk, budget)
        if s.known - s.cached > 1 and n:
            spans.append(Span(s.id, s.cached, s.cached + n, s.cached + n == s.known, s.pages, s.seat))
            budget -= n
    return spans


def _decode(running: tuple[Sequence, ...]) -> list[Span]:
    return [Span(s.id, s.cached, s.known, True, s.pages, s.seat) for s in running if s.known - s.cached == 1]


def mixed(running: tuple[Sequence, ...], limits: Schedule) -> Plan:
    """Everyone who decodes, then prompts up to the budget."""
    decode = _decode(running)
    left = limits.token_budget - len(decode)
    return (*decode, *_prefill(running, left, limits.prefill_chunk or limits.token_budget))


def prefill_first(running: tuple[Sequence, ...], limits: Schedule) -> Plan:
    """Prompts alone while there are any, else everyone who decodes (who waits as long as new prompts keep coming)."""
    prefill = _prefill(running, limits.token_budget, limits.prefill_chunk or limits.token_budget)
    return tuple(prefill or _decode(running))


POLICIES: dict[str, Callable[[tuple[Sequence, ...], Schedule], Plan]] = {
    "mixed": mixed,
    "prefill_first": prefill_first,
}


def plan(state: State, limits: Schedule) -> tuple[State, Plan]:
    """Admit who fits, and choose the tokens of the next step. Empty only when nothing runs or waits."""
    state = admit(state, limits.max_requests)
    return state, POLICIES[limits.policy](state.running, limits)


def commit(state: State, done: Plan, stopped: Collection[int]) -> State:
    """The state after a planned step: tokens cached, one token more for each that sampled, `stopped` ones gone.

    A sequence at its limit stops by itself.
    """
    spans = {span.id: span for span in done}
    running, ended = [], set(stopped)
    for s in state.running:
        if span := spans.get(s.id):
            s = s._replace(cached=span.stop, known=s.known + span.sample)
        if s.known == s.limit:
            ended.add(s.id)
        running.append(s)
    return drop(state._replace(running=tuple(running)), ended)


def check(state: State, capacity: int, limits: Schedule) -> None:
    """Asserts the invariants; `capacity` is the number of pages, scratch included."""
    held = [page for s in state.running for page in s.pages]
    assert len(held) == len(set(held)), "a page has two owners"
    assert pages.give(state.free, tuple(held)) == pages.pool(capacity), "a page is lost"
    assert pages.give(state.seats, tuple(s.seat for s in state.running)) == SEATS, "a seat is lost"
    assert len(state.running) <= limits.max_requests
    ids = [s.id for s in (*state.waiting, *state.running)]
    assert len(ids) == len(set(ids)), "a sequence is queued twice"
    for s in state.running:
        assert 0 <= s.cached < s.known <= s.limit
        assert len(s.pages) == need(state, s.limit)
