"""Continuous batching: what runs next, and what is true after it ran. No torch, so that it can be simulated.

    add -> waiting --plan--> running --commit, step by step--> gone (stop) or removed (drop)
              ^---- parked ----|

Sequences are values; the tree of pages is the one thing here that is changed in place (`cache.prefix`). A running
sequence holds the pages its tokens need so far:

    pages     0 .. len(path) - 1        len(path)                  .. and on
    hold      whole blocks of tokens,   perhaps the tail: a page   pages of its own
              nodes of the tree         others may copy from

When pages run out, first idle ones are taken from the tree; then the sequences that were admitted last are parked:
they give up their pages, wait in front of all others, and later begin with what is still cached of them. The first in
line is never parked for another, and any one sequence fits the cache alone, so that it always advances.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from collections.abc import Sequence as Tokens
from typing import NamedTuple

from fastgen.cache import pages
from fastgen.cache.prefix import Match, Namespace, Node, Tree
from fastgen.config import Schedule

SEATS = -2  # a pool of as many free seats as are ever needed; seat 0 is padding's
Known = Mapping[int, Tokens[int]]  # of each sequence the tokens whose values are known; the last ones may be on the way


class Sequence(NamedTuple):
    """One sequence being generated, in tokens."""

    id: int
    known: int  # prompt and generated so far
    limit: int  # prompt and the most it may generate
    whole: bool = False  # all of it is computed: its prompt is scored
    cached: int = 0  # whose keys and values are computed
    reused: int = 0  # of those, found in the tree when it was admitted
    pages: tuple[int, ...] = ()
    path: tuple[Node, ...] = ()  # nodes of its first pages
    tail: Node | None = None  # node of the page after those
    root: Node | None = None  # of the tree it was admitted to: another one is of other parameters
    seat: int = 0  # row of the device's tables while it runs
    namespace: Namespace = 0  # of what is cached for it: its adapter, and its salt if it has one


class State(NamedTuple):
    """Everything the scheduler knows."""

    tree: Tree
    seats: int = SEATS  # pool of free seats
    waiting: tuple[Sequence, ...] = ()  # in order of arrival, parked ones first
    running: tuple[Sequence, ...] = ()  # in order of admission

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self.tree.page


class Span(NamedTuple):
    """Tokens [start, stop) of a sequence, computed in one step; `sample`: the next token is drawn from the last."""

    id: int
    start: int
    stop: int
    sample: bool
    pages: tuple[int, ...]
    seat: int = 0
    write: bool = True  # False: a single token whose key and value are cached already


class Moves(NamedTuple):
    """What happens besides computing, in this order: pages are copied to the host (`out`), on the device (`copies`),
    and from the host (`back`). What comes back is wanted by the step's layers, one after the other, or, where `early`,
    not before the next step: whoever waits for it has no part in this one."""

    out: tuple[tuple[int, int], ...] = ()
    copies: tuple[tuple[int, int], ...] = ()
    back: tuple[tuple[int, int], ...] = ()
    early: bool = False
    admitted: tuple[Sequence, ...] = ()
    parked: tuple[int, ...] = ()


Plan = tuple[Span, ...]  # decoding sequences first


def need(page: int, tokens: int) -> int:
    """Pages that hold `tokens`."""
    return -(-tokens // page)


def add(state: State, *sequences: Sequence) -> State:
    """Queue sequences; the caller has checked that each fits the cache at all."""
    return state._replace(waiting=(*state.waiting, *sequences))


# --- what a sequence holds ------------------------------------------------------------------------------------------


def extend(tree: Tree, s: Sequence, tokens: Tokens[int], upto: int) -> Sequence:
    """Its whole pages of the first `upto` tokens become nodes; where there is one of the same tokens, it reads that."""
    page, end = tree.page, min(upto, len(tokens))
    while tree.active and s.root is tree.root(s.namespace) and (len(s.path) + 1) * page <= end:
        i = len(s.path)
        block, parent = tuple(tokens[i * page : (i + 1) * page]), s.path[-1] if s.path else tree.root(s.namespace)
        node = parent.kids.get(block)
        if node is None:
            if s.tail is not None:
                node = s.tail
                tree.rename(node, block)
            else:
                node = tree.insert(parent, block, s.pages[i])
        elif (i + 1) * page > s.cached or node in tree.arriving:
            break  # the step being planned fills both, or one is on its way; the next one may choose
        else:
            if s.tail is not None:
                tree.disown(s.tail)
            tree.join(node, s.pages[i])
            s = s._replace(pages=(*s.pages[:i], node.page, *s.pages[i + 1 :]))
        s = s._replace(path=(*s.path, node), tail=None)
    return s


def show_tail(tree: Tree, s: Sequence, tokens: Tokens[int], upto: int) -> Sequence:
    """Others may copy what the page after its whole ones holds of the first `upto` tokens."""
    rest = tuple(tokens[len(s.path) * tree.page : min(upto, len(tokens))])
    parent = s.path[-1] if s.path else tree.root(s.namespace)
    fits = tree.least <= len(rest) < tree.page and tree.active and s.root is tree.root(s.namespace)
    if not fits or rest in parent.kids:
        return s
    if s.tail is not None:
        tree.rename(s.tail, rest)
        return s
    return s._replace(tail=tree.insert(parent, rest, s.pages[len(s.path)]))


def release(tree: Tree, s: Sequence, tokens: Tokens[int], *, parked: bool = False) -> None:
    """It runs no longer: what is known of it stays in the tree as long as nobody wants the pages."""
    stale = s.root is not tree.root(s.namespace)
    s = show_tail(tree, extend(tree, s, tokens, s.cached), tokens, s.cached)
    for page in s.pages[len(s.path) + (s.tail is not None) :]:
        tree.give(page)
    tree.release((*s.path, *((s.tail,) if s.tail else ())), stale=stale, parked=parked)


def drop(state: State, ids: Collection[int], tokens: Known) -> State:
    """Without the sequences `ids`, waiting or running."""
    if not ids:
        return state
    seats = state.seats
    for s in state.running:
        if s.id in ids:
            release(state.tree, s, tokens[s.id])
            seats = pages.give(seats, (s.seat,))
    waiting, running = (tuple(s for s in group if s.id not in ids) for group in (state.waiting, state.running))
    return state._replace(seats=seats, waiting=waiting, running=running)


def park(state: State, tree: Tree, tokens: Known) -> State:
    """All who run wait again, first in line, with nothing computed; `tree` is a new one, in which nothing is cached."""
    for s in state.running:
        release(state.tree, s, tokens[s.id])
    waiting = tuple(_parked(s) for s in state.running)
    tree.counts.parked += len(waiting)
    return State(tree, waiting=(*waiting, *state.waiting))


def _parked(s: Sequence) -> Sequence:
    return s._replace(cached=0, pages=(), path=(), tail=None, root=None, seat=0)


# --- a step ---------------------------------------------------------------------------------------------------------


def _prefill(running: Iterable[Sequence], budget: int, chunk: int) -> list[Span]:
    """Prompt tokens in order of admission, until the budget is spent."""
    spans = []
    for s in running:
        n = min(s.known - s.cached, chunk, budget)
        if s.known - s.cached > 1 and n:
            spans.append(Span(s.id, s.cached, s.cached + n, s.cached + n == s.known, s.pages, s.seat))
            budget -= n
    return spans


def _decode(running: Iterable[Sequence]) -> list[Span]:
    return [Span(s.id, s.cached, s.known, True, s.pages, s.seat) for s in running if s.known - s.cached == 1]


def _mixed(running: Iterable[Sequence], budget: int, chunk: int) -> list[Span]:
    """Everyone who decodes, then prompts up to the budget."""
    decode = _decode(running)
    return decode + _prefill(running, budget - len(decode), chunk)


def _prefill_first(running: Iterable[Sequence], budget: int, chunk: int) -> list[Span]:
    """Prompts alone while there are any, else everyone who decodes (who waits as long as new prompts keep coming)."""
    return _prefill(running, budget, chunk) or _decode(running)


POLICIES: dict[str, Callable[[Iterable[Sequence], int, int], list[Span]]] = {
    "mixed": _mixed,
    "prefill_first": _prefill_first,
}


class _Planner:
    """The work of one `plan`: lists that it fills."""

    def __init__(self, state: State, limits: Schedule, tokens: Known) -> None:
        self.tree, self.seats, self.limits, self.tokens = state.tree, state.seats, limits, tokens
        self.running, self.waiting = list(state.running), state.waiting
        self.busy = False  # whether the step has something to compute meanwhile when pages come back
        self.parked: list[Sequence] = []
        self.admitted: list[Sequence] = []
        self.chunk = limits.prefill_chunk or limits.token_budget
        self.spans = {x.id: x for x in POLICIES[limits.policy](self.running, limits.token_budget, self.chunk)}

    def park(self) -> None:
        """Take the pages of the sequence that was admitted last."""
        s = self.running.pop()
        release(self.tree, s, self.tokens[s.id], parked=True)
        self.seats = pages.give(self.seats, (s.seat,))
        self.spans.pop(s.id, None)
        self.parked.append(_parked(s))
        self.tree.counts.parked += 1

    def room(self) -> None:
        """Pages for the tokens that running sequences compute; who was admitted last makes way."""
        i = 0
        while i < len(self.running):
            s = self.running[i]
            span = self.spans.get(s.id)
            missing = need(self.tree.page, span.stop) - len(s.pages) if span else 0
            while missing > 0 and i < len(self.running):
                if page := self.tree.take():
                    s = self.running[i] = s._replace(pages=(*s.pages, page))
                    missing -= 1
                else:
                    self.park()
            i += 1

    def show(self) -> None:
        """What the planned spans fill is there for those admitted now: they read it after it is written."""
        for i, s in enumerate(self.running):
            if span := self.spans.get(s.id):
                self.running[i] = self._shown(s, span)

    def _shown(self, s: Sequence, span: Span) -> Sequence:
        tokens = self.tokens[s.id]
        s = extend(self.tree, s, tokens, span.stop)
        if span.sample and (span.stop - span.start > 1 or not span.write):
            s = show_tail(self.tree, s, tokens, span.stop)
        self.spans[s.id] = span._replace(pages=s.pages, seat=s.seat)
        return s

    def admit(self) -> None:
        """In order of arrival, while there is budget, a seat and room for all that is known of a sequence.

        Nobody overtakes, but for those who wait a step for a page that is being filled and that they then copy.
        """
        if not self.waiting:
            return
        left = self.limits.token_budget - sum(x.stop - x.start for x in self.spans.values())
        delayed = list[Sequence]()
        for at, s in enumerate(self.waiting):
            full = len(self.running) >= self.limits.max_requests or left <= 0
            found = Match(()) if full or s.whole else self._match(s)
            if found.soon:
                delayed.append(s)
                continue
            if full or (new := self._enter(s, found, left)) is None:
                self.waiting = (*delayed, *self.waiting[at:])
                return
            s, span = new
            if span is not None:
                left -= span.stop - span.start
                self.spans[s.id] = span
                s = self._shown(s, span)
            self.running.append(s)
            self.admitted.append(s)
        self.waiting = tuple(delayed)

    def _match(self, s: Sequence) -> Match:
        return self.tree.match(self.tokens[s.id], s.known, s.namespace) if self.tree.active else Match(())

    def _enter(self, s: Sequence, found: Match, left: int) -> tuple[Sequence, Span | None] | None:
        """The sequence as a running one, and its first span. None: there are not the pages for it.

        It has no span yet where its pages are on their way and others compute meanwhile.
        """
        tree, path, coming = self.tree, found.path, len(self.tree.back)
        own = need(tree.page, s.known) - len(path)
        free = tree.available() - sum(n in tree.idle for n in path) - len(self.running)  # each may want one more soon
        wanted = own + sum(not n.page for n in path)
        if wanted > free:
            return None
        tail = found.tail if wanted + (found.tail in tree.idle) <= free else None
        if tail is not None:
            tree.pin(tail)
        tree.hold(path)
        held = tuple(tree.take() for _ in range(own))
        assert all(held), "there were fewer pages than counted"
        if tail is not None:
            tree.copy(tail, held[0])
        reached = len(path) * tree.page + (found.common if tail else 0)
        start = min(reached, s.known - 1)
        n = min(s.known - start, self.chunk, left)
        (seat,), self.seats = pages.take(self.seats, 1)
        held, root = (*(x.page for x in path), *held), tree.root(s.namespace)
        s = s._replace(cached=start, reused=start, seat=seat, pages=held, path=path, root=root)
        tree.counts.asked += s.known
        tree.counts.reused += start
        if self.busy and (len(tree.back) > coming or any(n in tree.arriving for n in path)):
            return s, None
        return s, Span(s.id, start, start + n, start + n == s.known, s.pages, seat, start == reached)


def plan(state: State, limits: Schedule, tokens: Known) -> tuple[State, Plan, Moves]:
    """Choose the tokens of the next step, find pages for them, and admit who fits.

    Empty only when nothing runs or waits. The tree is changed as if the step had been done: it must be, or be reset.
    """
    tree = state.tree
    tree.begin()
    p = _Planner(state, limits, tokens)
    p.room()
    # Where prompts come first, those who decode do so only if nobody is admitted with a prompt to compute.
    patient = limits.policy == "prefill_first" and all(x.stop - x.start == 1 for x in p.spans.values())
    p.busy = bool(p.spans)
    others, p.spans = (p.spans, {}) if patient else ({}, p.spans)
    p.show()
    if not p.parked:
        p.admit()
    if patient and all(x.stop - x.start == 1 for x in p.spans.values()):
        p.spans = others | p.spans
        p.show()
    spans = tuple(sorted(p.spans.values(), key=lambda x: x.stop - x.start > 1))
    out, copies, back = tree.moves() if spans else ((), (), ())
    moves = Moves(out, copies, back, p.busy, tuple(p.admitted), tuple(s.id for s in p.parked))
    return State(tree, p.seats, (*reversed(p.parked), *p.waiting), tuple(p.running)), spans, moves


def commit(state: State, done: Plan, stopped: Collection[int], tokens: Known) -> State:
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
    return drop(state._replace(running=tuple(running)), ended, tokens)


def fork(state: State, id: int, new: Sequence, tokens: Known) -> State:
    """Queue `new`, which goes on from all tokens of sequence `id`; a running one's pages are there to be shared."""
    running = list(state.running)
    for i, s in enumerate(running):
        if s.id == id:
            running[i] = show_tail(state.tree, extend(state.tree, s, tokens[id], s.cached), tokens[id], s.cached)
    return add(state._replace(running=tuple(running)), new)


def plant(tree: Tree, tokens: Tokens[int], namespace: Namespace = 0) -> tuple[int, ...]:
    """Whole pages for `tokens`, from the first one on, as idle nodes of the tree, which the caller fills; 0 for those
    that are there already. None of them if there is not the room.
    """
    blocks = [tuple(tokens[i : i + tree.page]) for i in range(0, len(tokens) - tree.page + 1, tree.page)]
    if len(blocks) > tree.available() or len(tree.match(tokens, len(tokens), namespace).path) == len(blocks):
        return ()
    held, path, filled = [tree.take() for _ in blocks], [tree.root(namespace)], list[int]()
    for block, page in zip(blocks, held, strict=True):
        node = path[-1].kids.get(block)
        filled.append(0 if node is not None and node.page else page)
        if node is None:
            node = tree.insert(path[-1], block, page)
        else:
            tree.join(node, page)
        path.append(node)
    tree.release(path[1:])
    return tuple(filled)


# --- groups ---------------------------------------------------------------------------------------------------------

Group = tuple[tuple[int, ...], int]  # rows of a plan, and how many tokens they share
# What groups must spare to be worth their partial results, which are written and read again: a quarter of all keys,
# and so many that a launch more is less (on an H200, 32 sequences of 1k gain nothing, 128 half of attention's time).
WORTH, LEAST = 4, 2**15


def groups(state: State, plan: Plan, width: int, most: int) -> tuple[Group, ...]:
    """Decoding rows that read the same pages, at most `width` in a group and `most` groups, if that is worth while.

    A row is put with those who share its deepest node that others hold too.
    """
    by_id = {s.id: s for s in state.running}
    rows: dict[Node, list[int]] = defaultdict(list)
    depth: dict[Node, int] = {}
    total = 0
    for row, span in enumerate(plan):
        if span.stop - span.start > 1:
            break
        total += span.stop
        path = by_id[span.id].path
        # Whoever holds a node holds those before it.
        d = min(len(path), (span.stop - 1) // state.page) if path and path[0].refs > 1 else 0
        while d and path[d - 1].refs < 2:
            d -= 1
        if d:
            rows[path[d - 1]].append(row)
            depth[path[d - 1]] = d
    found = [
        (tuple(members[i : i + width]), depth[node] * state.page)
        for node, members in rows.items()
        for i in range(0, len(members), width)
    ]
    found = sorted((g for g in found if len(g[0]) > 1), key=lambda g: (1 - len(g[0])) * g[1])[:most]
    saved = sum((len(members) - 1) * keys for members, keys in found)
    return tuple(found) if saved >= LEAST and saved * WORTH >= total else ()


def check(state: State, limits: Schedule) -> None:
    """Asserts the invariants."""
    assert pages.give(state.seats, tuple(s.seat for s in state.running)) == SEATS, "a seat is lost"
    assert len(state.running) <= limits.max_requests
    ids = [s.id for s in (*state.waiting, *state.running)]
    assert len(ids) == len(set(ids)), "a sequence is queued twice"
    owned, held = [], defaultdict[Node, int](int)
    for s in state.running:
        assert 0 <= s.cached < s.known <= s.limit
        assert len(s.pages) >= need(state.page, s.cached), "cached tokens without a page"
        nodes = (*s.path, *((s.tail,) if s.tail else ()))
        assert [n.page for n in nodes] == [*s.pages[: len(nodes)]], "a sequence reads other pages than it holds"
        for parent, node in zip((s.root, *s.path), nodes, strict=False):
            assert node.parent is parent
            held[node] += 1
        owned += s.pages[len(nodes) :]
    for s in state.waiting:
        assert not s.pages and not s.path and s.cached == 0
    state.tree.check(owned, held)
