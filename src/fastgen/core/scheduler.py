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

from fastgen.config import SchedulerConfig
from fastgen.core import kv_cache
from fastgen.core.prefix_cache import Match, Namespace, Node, PrefixCache

ALL_REQ_INDICES = -2  # a pool of as many free seats as are ever needed; seat 0 is padding's
TokensById = Mapping[
    int, Tokens[int]
]  # of each sequence the tokens whose values are known; the last ones may be on the way


class Sequence(NamedTuple):
    """One sequence being generated, in tokens."""

    id: int
    num_tokens: int  # prompt and generated so far
    max_length: int  # prompt and the most it may generate
    needs_prompt_logprobs: bool = False  # all of it is computed: its prompt is scored
    num_computed_tokens: int = 0  # whose keys and values are computed
    num_cached_tokens: int = 0  # of those, found in the tree when it was admitted
    pages: tuple[int, ...] = ()
    path: tuple[Node, ...] = ()  # nodes of its first pages
    partial_node: Node | None = None  # node of the page after those
    root: Node | None = None  # of the tree it was admitted to: another one is of other parameters
    req_idx: int = 0  # row of the device's tables while it runs
    namespace: Namespace = 0  # of what is cached for it: its adapter, and its salt if it has one


class State(NamedTuple):
    """Everything the scheduler knows."""

    prefix_cache: PrefixCache
    free_req_indices: int = ALL_REQ_INDICES  # pool of free seats
    waiting: tuple[Sequence, ...] = ()  # in order of arrival, parked ones first
    running: tuple[Sequence, ...] = ()  # in order of admission

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.prefix_cache.page_size


class Span(NamedTuple):
    """Tokens [start, stop) of a sequence, computed in one step; `sample`: the next token is drawn from the last."""

    id: int
    start: int
    stop: int
    needs_sampling: bool
    pages: tuple[int, ...]
    req_idx: int = 0
    writes_kv: bool = True  # False: a single token whose key and value are cached already


class PageCopies(NamedTuple):
    """What happens besides computing, in this order: pages are copied to the host (`out`), on the device (`copies`),
    and from the host (`back`). What comes back is wanted by the step's layers, one after the other, or, where `early`,
    not before the next step: whoever waits for it has no part in this one."""

    to_host: tuple[tuple[int, int], ...] = ()
    on_device: tuple[tuple[int, int], ...] = ()
    to_device: tuple[tuple[int, int], ...] = ()
    prefetch: bool = False
    admitted: tuple[Sequence, ...] = ()
    preempted: tuple[int, ...] = ()


Plan = tuple[Span, ...]  # decoding sequences first


def num_pages_for(page_size: int, num_tokens: int) -> int:
    """Pages that hold `tokens`."""
    return -(-num_tokens // page_size)


def add(state: State, *sequences: Sequence) -> State:
    """Queue sequences; the caller has checked that each fits the cache at all."""
    return state._replace(waiting=(*state.waiting, *sequences))


# --- what a sequence holds ------------------------------------------------------------------------------------------


def publish_full_pages(prefix_cache: PrefixCache, s: Sequence, tokens: Tokens[int], num_tokens: int) -> Sequence:
    """Its whole pages of the first `upto` tokens become nodes; where there is one of the same tokens, it reads that."""
    page, end = prefix_cache.page_size, min(num_tokens, len(tokens))
    while prefix_cache.enabled and s.root is prefix_cache.get_root(s.namespace) and (len(s.path) + 1) * page <= end:
        i = len(s.path)
        block, parent = (
            tuple(tokens[i * page : (i + 1) * page]),
            s.path[-1] if s.path else prefix_cache.get_root(s.namespace),
        )
        node = parent.children.get(block)
        if node is None:
            if s.partial_node is not None:
                node = s.partial_node
                prefix_cache.extend_node(node, block)
            else:
                node = prefix_cache.insert(parent, block, s.pages[i])
        elif (i + 1) * page > s.num_computed_tokens or node in prefix_cache.loading_nodes:
            break  # the step being planned fills both, or one is on its way; the next one may choose
        else:
            if s.partial_node is not None:
                prefix_cache.detach_partial(s.partial_node)
            prefix_cache.adopt_page(node, s.pages[i])
            s = s._replace(pages=(*s.pages[:i], node.page, *s.pages[i + 1 :]))
        s = s._replace(path=(*s.path, node), partial_node=None)
    return s


def publish_partial_page(prefix_cache: PrefixCache, s: Sequence, tokens: Tokens[int], num_tokens: int) -> Sequence:
    """Others may copy what the page after its whole ones holds of the first `upto` tokens."""
    rest = tuple(tokens[len(s.path) * prefix_cache.page_size : min(num_tokens, len(tokens))])
    parent = s.path[-1] if s.path else prefix_cache.get_root(s.namespace)
    fits = (
        prefix_cache.min_copy_tokens <= len(rest) < prefix_cache.page_size
        and prefix_cache.enabled
        and s.root is prefix_cache.get_root(s.namespace)
    )
    if not fits or rest in parent.children:
        return s
    if s.partial_node is not None:
        prefix_cache.extend_node(s.partial_node, rest)
        return s
    return s._replace(partial_node=prefix_cache.insert(parent, rest, s.pages[len(s.path)]))


def release(prefix_cache: PrefixCache, s: Sequence, tokens: Tokens[int], *, preempted: bool = False) -> None:
    """It runs no longer: what is known of it stays in the tree as long as nobody wants the pages."""
    stale = s.root is not prefix_cache.get_root(s.namespace)
    s = publish_partial_page(
        prefix_cache, publish_full_pages(prefix_cache, s, tokens, s.num_computed_tokens), tokens, s.num_computed_tokens
    )
    for page in s.pages[len(s.path) + (s.partial_node is not None) :]:
        prefix_cache.free_page(page)
    prefix_cache.release((*s.path, *((s.partial_node,) if s.partial_node else ())), stale=stale, preempted=preempted)


def remove(state: State, ids: Collection[int], tokens_by_id: TokensById) -> State:
    """Without the sequences `ids`, waiting or running."""
    if not ids:
        return state
    seats = state.free_req_indices
    for s in state.running:
        if s.id in ids:
            release(state.prefix_cache, s, tokens_by_id[s.id])
            seats = kv_cache.free(seats, (s.req_idx,))
    waiting, running = (tuple(s for s in group if s.id not in ids) for group in (state.waiting, state.running))
    return state._replace(free_req_indices=seats, waiting=waiting, running=running)


def preempt_all(state: State, new_prefix_cache: PrefixCache, tokens_by_id: TokensById) -> State:
    """All who run wait again, first in line, with nothing computed; `tree` is a new one, in which nothing is cached."""
    for s in state.running:
        release(state.prefix_cache, s, tokens_by_id[s.id])
    waiting = tuple(_reset_for_recompute(s) for s in state.running)
    new_prefix_cache.stats.num_preemptions += len(waiting)
    return State(new_prefix_cache, waiting=(*waiting, *state.waiting))


def _reset_for_recompute(s: Sequence) -> Sequence:
    return s._replace(num_computed_tokens=0, pages=(), path=(), partial_node=None, root=None, req_idx=0)


# --- a step ---------------------------------------------------------------------------------------------------------


def _plan_prefill(running: Iterable[Sequence], token_budget: int, prefill_chunk: int) -> list[Span]:
    """Prompt tokens in order of admission, until the budget is spent."""
    spans = []
    for s in running:
        n = min(s.num_tokens - s.num_computed_tokens, prefill_chunk, token_budget)
        if s.num_tokens - s.num_computed_tokens > 1 and n:
            spans.append(
                Span(
                    s.id,
                    s.num_computed_tokens,
                    s.num_computed_tokens + n,
                    s.num_computed_tokens + n == s.num_tokens,
                    s.pages,
                    s.req_idx,
                )
            )
            token_budget -= n
    return spans


def _plan_decode(running: Iterable[Sequence]) -> list[Span]:
    return [
        Span(s.id, s.num_computed_tokens, s.num_tokens, True, s.pages, s.req_idx)
        for s in running
        if s.num_tokens - s.num_computed_tokens == 1
    ]


def _plan_mixed(running: Iterable[Sequence], token_budget: int, prefill_chunk: int) -> list[Span]:
    """Everyone who decodes, then prompts up to the budget."""
    decode = _plan_decode(running)
    return decode + _plan_prefill(running, token_budget - len(decode), prefill_chunk)


def _plan_prefill_first(running: Iterable[Sequence], token_budget: int, prefill_chunk: int) -> list[Span]:
    """Prompts alone while there are any, else everyone who decodes (who waits as long as new prompts keep coming)."""
    return _plan_prefill(running, token_budget, prefill_chunk) or _plan_decode(running)


POLICIES: dict[str, Callable[[Iterable[Sequence], int, int], list[Span]]] = {
    "mixed": _plan_mixed,
    "prefill_first": _plan_prefill_first,
}


class _Planner:
    """The work of one `plan`: lists that it fills."""

    def __init__(self, state: State, config: SchedulerConfig, tokens_by_id: TokensById) -> None:
        self.prefix_cache, self.free_req_indices, self.config, self.tokens_by_id = (
            state.prefix_cache,
            state.free_req_indices,
            config,
            tokens_by_id,
        )
        self.running, self.waiting = list(state.running), state.waiting
        self.has_compute = False  # whether the step has something to compute meanwhile when pages come back
        self.preempted: list[Sequence] = []
        self.admitted: list[Sequence] = []
        self.prefill_chunk = config.prefill_chunk or config.token_budget
        self.spans = {x.id: x for x in POLICIES[config.policy](self.running, config.token_budget, self.prefill_chunk)}

    def preempt_last(self) -> None:
        """Take the pages of the sequence that was admitted last."""
        s = self.running.pop()
        release(self.prefix_cache, s, self.tokens_by_id[s.id], preempted=True)
        self.free_req_indices = kv_cache.free(self.free_req_indices, (s.req_idx,))
        self.spans.pop(s.id, None)
        self.preempted.append(_reset_for_recompute(s))
        self.prefix_cache.stats.num_preemptions += 1

    def allocate_or_preempt(self) -> None:
        """Pages for the tokens that running sequences compute; who was admitted last makes way."""
        i = 0
        while i < len(self.running):
            s = self.running[i]
            span = self.spans.get(s.id)
            missing = num_pages_for(self.prefix_cache.page_size, span.stop) - len(s.pages) if span else 0
            while missing > 0 and i < len(self.running):
                if page := self.prefix_cache.allocate_page():
                    s = self.running[i] = s._replace(pages=(*s.pages, page))
                    missing -= 1
                else:
                    self.preempt_last()
            i += 1

    def publish_planned(self) -> None:
        """What the planned spans fill is there for those admitted now: they read it after it is written."""
        for i, s in enumerate(self.running):
            if span := self.spans.get(s.id):
                self.running[i] = self._publish_span(s, span)

    def _publish_span(self, s: Sequence, span: Span) -> Sequence:
        tokens = self.tokens_by_id[s.id]
        s = publish_full_pages(self.prefix_cache, s, tokens, span.stop)
        if span.needs_sampling and (span.stop - span.start > 1 or not span.writes_kv):
            s = publish_partial_page(self.prefix_cache, s, tokens, span.stop)
        self.spans[s.id] = span._replace(pages=s.pages, req_idx=s.req_idx)
        return s

    def admit(self) -> None:
        """In order of arrival, while there is budget, a seat and room for all that is known of a sequence.

        Nobody overtakes, but for those who wait a step for a page that is being filled and that they then copy.
        """
        if not self.waiting:
            return
        left = self.config.token_budget - sum(x.stop - x.start for x in self.spans.values())
        delayed = list[Sequence]()
        for at, s in enumerate(self.waiting):
            full = len(self.running) >= self.config.max_num_seqs or left <= 0
            found = Match(()) if full or s.needs_prompt_logprobs else self._match_prefix(s)
            if found.pending:
                delayed.append(s)
                continue
            if full or (new := self._try_admit(s, found, left)) is None:
                self.waiting = (*delayed, *self.waiting[at:])
                return
            s, span = new
            if span is not None:
                left -= span.stop - span.start
                self.spans[s.id] = span
                s = self._publish_span(s, span)
            self.running.append(s)
            self.admitted.append(s)
        self.waiting = tuple(delayed)

    def _match_prefix(self, s: Sequence) -> Match:
        return (
            self.prefix_cache.match(self.tokens_by_id[s.id], s.num_tokens, s.namespace)
            if self.prefix_cache.enabled
            else Match(())
        )

    def _try_admit(self, s: Sequence, match: Match, token_budget: int) -> tuple[Sequence, Span | None] | None:
        """The sequence as a running one, and its first span. None: there are not the pages for it.

        It has no span yet where its pages are on their way and others compute meanwhile.
        """
        tree, path, coming = self.prefix_cache, match.path, len(self.prefix_cache.to_device)
        own = num_pages_for(tree.page_size, s.num_tokens) - len(path)
        free = (
            tree.num_available_pages() - sum(n in tree.idle_nodes for n in path) - len(self.running)
        )  # each may want one more soon
        wanted = own + sum(not n.page for n in path)
        if wanted > free:
            return None
        tail = match.partial_node if wanted + (match.partial_node in tree.idle_nodes) <= free else None
        if tail is not None:
            tree.pin(tail)
        tree.acquire(path)
        held = tuple(tree.allocate_page() for _ in range(own))
        assert all(held), "there were fewer pages than counted"
        if tail is not None:
            tree.copy_partial_page(tail, held[0])
        reached = len(path) * tree.page_size + (match.num_common_tokens if tail else 0)
        start = min(reached, s.num_tokens - 1)
        n = min(s.num_tokens - start, self.prefill_chunk, token_budget)
        (seat,), self.free_req_indices = kv_cache.allocate(self.free_req_indices, 1)
        held, root = (*(x.page for x in path), *held), tree.get_root(s.namespace)
        s = s._replace(
            num_computed_tokens=start, num_cached_tokens=start, req_idx=seat, pages=held, path=path, root=root
        )
        tree.stats.num_queried_tokens += s.num_tokens
        tree.stats.num_hit_tokens += start
        if self.has_compute and (len(tree.to_device) > coming or any(n in tree.loading_nodes for n in path)):
            return s, None
        return s, Span(s.id, start, start + n, start + n == s.num_tokens, s.pages, seat, start == reached)


def plan(state: State, config: SchedulerConfig, tokens_by_id: TokensById) -> tuple[State, Plan, PageCopies]:
    """Choose the tokens of the next step, find pages for them, and admit who fits.

    Empty only when nothing runs or waits. The tree is changed as if the step had been done: it must be, or be reset.
    """
    tree = state.prefix_cache
    tree.begin_step()
    p = _Planner(state, config, tokens_by_id)
    p.allocate_or_preempt()
    # Where prompts come first, those who decode do so only if nobody is admitted with a prompt to compute.
    patient = config.policy == "prefill_first" and all(x.stop - x.start == 1 for x in p.spans.values())
    p.has_compute = bool(p.spans)
    others, p.spans = (p.spans, {}) if patient else ({}, p.spans)
    p.publish_planned()
    if not p.preempted:
        p.admit()
    if patient and all(x.stop - x.start == 1 for x in p.spans.values()):
        p.spans = others | p.spans
        p.publish_planned()
    spans = tuple(sorted(p.spans.values(), key=lambda x: x.stop - x.start > 1))
    out, copies, back = tree.pop_page_copies() if spans else ((), (), ())
    moves = PageCopies(out, copies, back, p.has_compute, tuple(p.admitted), tuple(s.id for s in p.preempted))
    return State(tree, p.free_req_indices, (*reversed(p.preempted), *p.waiting), tuple(p.running)), spans, moves


def commit(state: State, executed_plan: Plan, tokens_by_id: TokensById) -> State:
    """Returns the state after a planned step: computed tokens advance, and each sampled sequence has one token more.

    Sequences that reach `max_length` leave. `remove` ends sequences that stop for any other reason.
    """
    spans = {span.id: span for span in executed_plan}
    running, ended = [], set[int]()
    for s in state.running:
        if span := spans.get(s.id):
            s = s._replace(num_computed_tokens=span.stop, num_tokens=s.num_tokens + span.needs_sampling)
        if s.num_tokens == s.max_length:
            ended.add(s.id)
        running.append(s)
    return remove(state._replace(running=tuple(running)), ended, tokens_by_id)


def fork(state: State, id: int, child: Sequence, tokens_by_id: TokensById) -> State:
    """Queue `new`, which goes on from all tokens of sequence `id`; a running one's pages are there to be shared."""
    running = list(state.running)
    for i, s in enumerate(running):
        if s.id == id:
            running[i] = publish_partial_page(
                state.prefix_cache,
                publish_full_pages(state.prefix_cache, s, tokens_by_id[id], s.num_computed_tokens),
                tokens_by_id[id],
                s.num_computed_tokens,
            )
    return add(state._replace(running=tuple(running)), child)


def insert_idle_pages(prefix_cache: PrefixCache, tokens: Tokens[int], namespace: Namespace = 0) -> tuple[int, ...]:
    """Whole pages for `tokens`, from the first one on, as idle nodes of the tree, which the caller fills; 0 for those
    that are there already. None of them if there is not the room.
    """
    blocks = [
        tuple(tokens[i : i + prefix_cache.page_size])
        for i in range(0, len(tokens) - prefix_cache.page_size + 1, prefix_cache.page_size)
    ]
    if len(blocks) > prefix_cache.num_available_pages() or len(
        prefix_cache.match(tokens, len(tokens), namespace).path
    ) == len(blocks):
        return ()
    held, path, filled = [prefix_cache.allocate_page() for _ in blocks], [prefix_cache.get_root(namespace)], list[int]()
    for block, page in zip(blocks, held, strict=True):
        node = path[-1].children.get(block)
        filled.append(0 if node is not None and node.page else page)
        if node is None:
            node = prefix_cache.insert(path[-1], block, page)
        else:
            prefix_cache.adopt_page(node, page)
        path.append(node)
    prefix_cache.release(path[1:])
    return tuple(filled)


# --- groups ---------------------------------------------------------------------------------------------------------

SharedPrefixGroup = tuple[tuple[int, ...], int]  # rows of a plan, and how many tokens they share
# What groups must spare to be worth their partial results, which are written and read again: a quarter of all keys,
# and so many that a launch more is less (on an H200, 32 sequences of 1k gain nothing, 128 half of attention's time).
MIN_SAVED_DIVISOR, MIN_SAVED_KEYS = 4, 2**15


def find_shared_prefix_groups(
    state: State, plan: Plan, max_group_size: int, max_groups: int
) -> tuple[SharedPrefixGroup, ...]:
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
        d = min(len(path), (span.stop - 1) // state.page_size) if path and path[0].ref_count > 1 else 0
        while d and path[d - 1].ref_count < 2:
            d -= 1
        if d:
            rows[path[d - 1]].append(row)
            depth[path[d - 1]] = d
    found = [
        (tuple(members[i : i + max_group_size]), depth[node] * state.page_size)
        for node, members in rows.items()
        for i in range(0, len(members), max_group_size)
    ]
    found = sorted((g for g in found if len(g[0]) > 1), key=lambda g: (1 - len(g[0])) * g[1])[:max_groups]
    saved = sum((len(members) - 1) * keys for members, keys in found)
    return tuple(found) if saved >= MIN_SAVED_KEYS and saved * MIN_SAVED_DIVISOR >= total else ()


def check(state: State, config: SchedulerConfig) -> None:
    """Asserts the invariants."""
    assert kv_cache.free(state.free_req_indices, tuple(s.req_idx for s in state.running)) == ALL_REQ_INDICES, (
        "a seat is lost"
    )
    assert len(state.running) <= config.max_num_seqs
    ids = [s.id for s in (*state.waiting, *state.running)]
    assert len(ids) == len(set(ids)), "a sequence is queued twice"
    owned, held = [], defaultdict[Node, int](int)
    for s in state.running:
        assert 0 <= s.num_computed_tokens < s.num_tokens <= s.max_length
        assert len(s.pages) >= num_pages_for(state.page_size, s.num_computed_tokens), "cached tokens without a page"
        nodes = (*s.path, *((s.partial_node,) if s.partial_node else ()))
        assert [n.page for n in nodes] == [*s.pages[: len(nodes)]], "a sequence reads other pages than it holds"
        for parent, node in zip((s.root, *s.path), nodes, strict=False):
            assert node.parent is parent
            held[node] += 1
        owned += s.pages[len(nodes) :]
    for s in state.waiting:
        assert not s.pages and not s.path and s.num_computed_tokens == 0
    state.prefix_cache.check(owned, held)
