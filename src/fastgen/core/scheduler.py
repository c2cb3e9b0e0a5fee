"""The scheduler: which tokens the next step computes, for which sequences, in which pages of the KV cache.

    add ──> waiting ──admit──> running ──commit, once a step──> removed (stop, length or abort)
               ^                  │
               └─────preempt──────┘

`plan` chooses a step, the engine runs it, `commit` records it. A sequence needs a page for every `page_size` tokens
that it has computed. The first pages of a running sequence are nodes of the prefix cache; the others are private:

    tokens    a b c d   e f g h   i j k l   m n . .       page_size 4; `.` is a slot not written yet
    pages     5         8         3         7
              └── path: full pages, ──┘     └ private, or partial_node: published for others to copy
                  shared with others

Admission. Sequences are admitted in the `scheduling_policy`'s order while the step has tokens left and pages for all
known tokens of the sequence are available. The longest cached prefix is shared instead of computed. A sequence whose
best match is a page that this step only fills waits one step and then copies that page.

Preemption. Running sequences that need another page take free pages, then idle pages of the prefix cache. If there are
none, the one admitted last is preempted (`preempt_last`): it gives up its pages, which stay cached until evicted,
moves to the front of the waiting sequences, and later resumes with what is still cached. The sequence that was admitted
first is never preempted, and any single sequence fits the cache, so some sequence always advances.

Sequences and State are immutable; only the prefix cache changes in place. Without torch: scheduling can be simulated.
"""

from collections import abc, defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from fastgen.config import SchedulerConfig
from fastgen.core import page_pool
from fastgen.core.prefix_cache import Match, Namespace, Node, PageCopies, PrefixCache

ALL_REQ_INDICES = -2  # an unbounded pool in which only row 0 (padding) is allocated
TokenIds = abc.Sequence[int]
# The known tokens of each sequence. While steps overlap, the last token may still be computed, and missing.
TokensById = Mapping[int, TokenIds]


class Sequence(NamedTuple):
    """One sequence being generated, as the scheduler sees it: counts of tokens, and pages."""

    id: int
    num_tokens: int  # prompt and generated so far
    max_length: int  # prompt and the most that may be generated
    needs_prompt_logprobs: bool = False  # every token is computed, without prefix cache hits
    num_computed_tokens: int = 0  # tokens whose keys and values are computed, or planned to be
    num_cached_tokens: int = 0  # of these, tokens found in the prefix cache at admission
    pages: tuple[int, ...] = ()
    path: tuple[Node, ...] = ()  # nodes of its first pages
    partial_node: Node | None = None  # node of the page after those
    root: Node | None = None  # the root at admission; a later root is one of other parameters
    req_idx: int = 0  # row of the device's request tables while it runs
    namespace: Namespace = 0


class State(NamedTuple):
    """Everything the scheduler knows."""

    prefix_cache: PrefixCache
    free_req_indices: int = ALL_REQ_INDICES  # a page_pool of free rows of the request tables
    waiting: tuple[Sequence, ...] = ()  # preempted sequences, then the others in order of arrival
    running: tuple[Sequence, ...] = ()  # in order of admission

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.prefix_cache.page_size


class Span(NamedTuple):
    """Tokens [start, stop) of a sequence, computed in one step. A span of one token decodes, a longer one prefills."""

    id: int
    start: int
    stop: int
    needs_sampling: bool  # whether the logits of its last token are sampled
    pages: tuple[int, ...]
    req_idx: int = 0
    writes_kv: bool = True  # False: its one token's key and value are cached already


Plan = tuple[Span, ...]  # decoding sequences first


class SchedulerOutput(NamedTuple):
    """A planned step. `plan` is empty only when no sequence waits or runs."""

    plan: Plan
    page_copies: PageCopies
    admitted: tuple[Sequence, ...]
    preempted: tuple[int, ...]  # ids


@runtime_checkable
class SchedulingPolicy(Protocol):
    """The decisions that the scheduler leaves open. `scheduling_policy` has the policies to choose from."""

    decode_yields_to_prefill: bool  # whether decoding sequences skip a step that admits a prompt

    def order_waiting(self, waiting: tuple[Sequence, ...]) -> tuple[Sequence, ...]:
        """Returns the waiting sequences in the order in which they are to be admitted."""
        ...

    def plan_running(self, running: abc.Sequence[Sequence], token_budget: int, prefill_chunk: int) -> list[Span]:
        """Returns the spans of running sequences for one step: at most `token_budget` tokens in all and `prefill_chunk`
        tokens for each sequence."""
        ...


def num_pages_for(page_size: int, num_tokens: int) -> int:
    """Returns the number of pages that hold `num_tokens` tokens."""
    return -(-num_tokens // page_size)


def add(state: State, *sequences: Sequence) -> State:
    """Adds sequences to the waiting ones. The caller has checked that each fits the cache by itself."""
    return state._replace(waiting=(*state.waiting, *sequences))


# --- the pages of a sequence ----------------------------------------------------------------------------------------


def publish_full_pages(prefix_cache: PrefixCache, seq: Sequence, token_ids: TokenIds, num_tokens: int) -> Sequence:
    """Publishes the sequence's full pages of its first `num_tokens` tokens in the prefix cache.

    Where the prefix cache has a page of the same tokens already, the sequence reads that page and frees its own.
    """
    size, root = prefix_cache.page_size, prefix_cache.get_root(seq.namespace)
    if not prefix_cache.enabled or seq.root is not root:
        return seq
    for i in range(len(seq.path), min(num_tokens, len(token_ids)) // size):
        tokens, parent = tuple(token_ids[i * size : (i + 1) * size]), seq.path[-1] if seq.path else root
        node = parent.children.get(tokens)
        if node is None and seq.partial_node is not None:
            node = seq.partial_node
            prefix_cache.extend_node(node, tokens)
        elif node is None:
            node = prefix_cache.insert(parent, tokens, seq.pages[i])
        elif (i + 1) * size > seq.num_computed_tokens or node in prefix_cache.loading_nodes:
            break  # the step being planned fills one page or both: publishing waits for the next step
        else:
            if seq.partial_node is not None:
                prefix_cache.detach_partial(seq.partial_node)
            prefix_cache.adopt_page(node, seq.pages[i])
            seq = seq._replace(pages=(*seq.pages[:i], node.page, *seq.pages[i + 1 :]))
        seq = seq._replace(path=(*seq.path, node), partial_node=None)
    return seq


def publish_partial_page(prefix_cache: PrefixCache, seq: Sequence, token_ids: TokenIds, num_tokens: int) -> Sequence:
    """Publishes the page after the full ones, which holds the last of the first `num_tokens` tokens, so that other
    sequences can copy it. Nothing is published if copying would not be worthwhile."""
    root = prefix_cache.get_root(seq.namespace)
    tokens = tuple(token_ids[len(seq.path) * prefix_cache.page_size : min(num_tokens, len(token_ids))])
    parent = seq.path[-1] if seq.path else root
    if (
        not prefix_cache.min_copy_tokens <= len(tokens) < prefix_cache.page_size
        or not prefix_cache.enabled
        or seq.root is not root
        or tokens in parent.children
    ):
        return seq
    if seq.partial_node is not None:
        prefix_cache.extend_node(seq.partial_node, tokens)
        return seq
    return seq._replace(partial_node=prefix_cache.insert(parent, tokens, seq.pages[len(seq.path)]))


def publish(prefix_cache: PrefixCache, seq: Sequence, token_ids: TokenIds, num_tokens: int) -> Sequence:
    """Publishes all pages of the sequence's first `num_tokens` tokens, the partial one too."""
    seq = publish_full_pages(prefix_cache, seq, token_ids, num_tokens)
    return publish_partial_page(prefix_cache, seq, token_ids, num_tokens)


def release_pages(prefix_cache: PrefixCache, seq: Sequence, token_ids: TokenIds, *, preempted: bool = False) -> None:
    """Publishes what a running sequence has computed and releases its pages, which stay cached until evicted."""
    stale = seq.root is not prefix_cache.get_root(seq.namespace)
    seq = publish(prefix_cache, seq, token_ids, seq.num_computed_tokens)
    nodes = (*seq.path, *((seq.partial_node,) if seq.partial_node else ()))
    for page in seq.pages[len(nodes) :]:
        prefix_cache.free_page(page)
    prefix_cache.release(nodes, stale=stale, preempted=preempted)


def remove(state: State, ids: Collection[int], tokens_by_id: TokensById) -> State:
    """Removes the sequences `ids`, waiting or running."""
    if not ids:
        return state
    free_req_indices = state.free_req_indices
    for seq in state.running:
        if seq.id in ids:
            release_pages(state.prefix_cache, seq, tokens_by_id[seq.id])
            free_req_indices = page_pool.free(free_req_indices, (seq.req_idx,))
    waiting, running = (tuple(s for s in group if s.id not in ids) for group in (state.waiting, state.running))
    return state._replace(free_req_indices=free_req_indices, waiting=waiting, running=running)


def preempt_all(state: State, new_prefix_cache: PrefixCache, tokens_by_id: TokensById) -> State:
    """Preempts every running sequence and replaces the prefix cache by a new, empty one."""
    for seq in state.running:
        release_pages(state.prefix_cache, seq, tokens_by_id[seq.id])
    new_prefix_cache.stats.num_preemptions += len(state.running)
    return State(new_prefix_cache, waiting=(*map(_reset_for_recompute, state.running), *state.waiting))


def _reset_for_recompute(seq: Sequence) -> Sequence:
    return seq._replace(num_computed_tokens=0, pages=(), path=(), partial_node=None, root=None, req_idx=0)


def fork(state: State, id: int, child: Sequence, tokens_by_id: TokensById) -> State:
    """Adds `child`, which continues from all tokens of sequence `id`; a running parent publishes its pages for it."""
    prefix_cache, tokens = state.prefix_cache, tokens_by_id[id]
    running = (publish(prefix_cache, s, tokens, s.num_computed_tokens) if s.id == id else s for s in state.running)
    return add(state._replace(running=tuple(running)), child)


# --- a step ---------------------------------------------------------------------------------------------------------


def plan(
    state: State, config: SchedulerConfig, policy: SchedulingPolicy, tokens_by_id: TokensById
) -> tuple[State, SchedulerOutput]:
    """Plans the next step: chooses its tokens, allocates their pages, and admits waiting sequences.

    The prefix cache changes as if the step had run. If the step fails, the caller replaces the prefix cache.
    """
    state.prefix_cache.begin_step()
    p = _Planner(state, config, policy, tokens_by_id)
    p.allocate_or_preempt()
    yields = policy.decode_yields_to_prefill and not _has_prefill(p.spans.values())
    p.has_compute = bool(p.spans)
    decode, p.spans = (p.spans, {}) if yields else ({}, p.spans)
    p.publish_planned()
    if not p.preempted:
        p.admit()
    if yields and not _has_prefill(p.spans.values()):
        p.spans = decode | p.spans
        p.publish_planned()
    spans = tuple(sorted(p.spans.values(), key=lambda x: x.stop - x.start > 1))
    copies = state.prefix_cache.pop_page_copies() if spans else PageCopies()
    output = SchedulerOutput(
        spans, copies._replace(prefetch=p.has_compute), tuple(p.admitted), tuple(s.id for s in p.preempted)
    )
    waiting = (*map(_reset_for_recompute, reversed(p.preempted)), *p.waiting)
    return State(state.prefix_cache, p.free_req_indices, waiting, tuple(p.running)), output


def commit(state: State, executed_plan: Plan, tokens_by_id: TokensById) -> State:
    """Records that a planned step runs: its tokens are computed, and each sampling sequence is one token longer.

    Sequences that have reached their maximum length are removed.
    """
    spans = {span.id: span for span in executed_plan}
    running, finished = [], set[int]()
    for seq in state.running:
        if span := spans.get(seq.id):
            seq = seq._replace(num_computed_tokens=span.stop, num_tokens=seq.num_tokens + span.needs_sampling)
        if seq.num_tokens == seq.max_length:
            finished.add(seq.id)
        running.append(seq)
    return remove(state._replace(running=tuple(running)), finished, tokens_by_id)


def _has_prefill(spans: Iterable[Span]) -> bool:
    return any(span.stop - span.start > 1 for span in spans)


class _Planner:
    """The lists and counters that one `plan` fills."""

    def __init__(
        self, state: State, config: SchedulerConfig, policy: SchedulingPolicy, tokens_by_id: TokensById
    ) -> None:
        self.prefix_cache, self.free_req_indices = state.prefix_cache, state.free_req_indices
        self.config, self.tokens_by_id = config, tokens_by_id
        self.running, self.waiting = list(state.running), policy.order_waiting(state.waiting)
        self.has_compute = False  # whether running sequences compute in this step while admitted ones load pages
        self.preempted: list[Sequence] = []  # the last admitted first
        self.admitted: list[Sequence] = []
        self.prefill_chunk = config.prefill_chunk or config.token_budget
        spans = policy.plan_running(self.running, config.token_budget, self.prefill_chunk)
        self.spans = {span.id: span for span in spans}

    def preempt_last(self) -> None:
        """Preempts the sequence that was admitted last."""
        seq = self.running.pop()
        release_pages(self.prefix_cache, seq, self.tokens_by_id[seq.id], preempted=True)
        self.free_req_indices = page_pool.free(self.free_req_indices, (seq.req_idx,))
        self.spans.pop(seq.id, None)
        self.preempted.append(seq)
        self.prefix_cache.stats.num_preemptions += 1

    def allocate_or_preempt(self) -> None:
        """Allocates the pages that the planned spans fill, in order of admission, and preempts where there are none.

        No starvation: the last admitted sequence is preempted first, possibly the one that needs the page, and never
        the first admitted one. What a sequence has computed is taken by older sequences only.
        """
        i = 0
        while i < len(self.running):
            seq = self.running[i]
            span = self.spans.get(seq.id)
            num_missing = num_pages_for(self.prefix_cache.page_size, span.stop) - len(seq.pages) if span else 0
            while num_missing > 0 and i < len(self.running):
                if page := self.prefix_cache.allocate_page():
                    seq = self.running[i] = seq._replace(pages=(*seq.pages, page))
                    num_missing -= 1
                else:
                    self.preempt_last()
            i += 1

    def publish_planned(self) -> None:
        """Publishes the pages this step will fill, so that sequences admitted in the same plan can share them; the step
        writes them before it reads them."""
        for i, seq in enumerate(self.running):
            if span := self.spans.get(seq.id):
                self.running[i] = self._publish_span(seq, span)

    def _publish_span(self, seq: Sequence, span: Span) -> Sequence:
        token_ids = self.tokens_by_id[seq.id]
        seq = publish_full_pages(self.prefix_cache, seq, token_ids, span.stop)
        if span.needs_sampling and (span.stop - span.start > 1 or not span.writes_kv):
            seq = publish_partial_page(self.prefix_cache, seq, token_ids, span.stop)
        self.spans[seq.id] = span._replace(pages=seq.pages, req_idx=seq.req_idx)
        return seq

    def admit(self) -> None:
        """Admits waiting sequences while tokens of the step, rows of the tables and pages are available.

        No starvation: admission stops at the first sequence that does not fit, so a later, smaller one never overtakes
        it. The exceptions are sequences that skip one step until the page they will copy is filled.
        """
        if not self.waiting:
            return
        token_budget = self.config.token_budget - sum(x.stop - x.start for x in self.spans.values())
        delayed = list[Sequence]()
        for i, seq in enumerate(self.waiting):
            full = len(self.running) >= self.config.max_num_seqs or token_budget <= 0
            match = Match(()) if full or seq.needs_prompt_logprobs else self._match_prefix(seq)
            if match.pending:
                delayed.append(seq)
                continue
            if full or (admission := self._try_admit(seq, match, token_budget)) is None:
                self.waiting = (*delayed, *self.waiting[i:])
                return
            seq, span = admission
            if span is not None:
                token_budget -= span.stop - span.start
                self.spans[seq.id] = span
                seq = self._publish_span(seq, span)
            self.running.append(seq)
            self.admitted.append(seq)
        self.waiting = tuple(delayed)

    def _match_prefix(self, seq: Sequence) -> Match:
        if not self.prefix_cache.enabled:
            return Match(())
        return self.prefix_cache.match(self.tokens_by_id[seq.id], seq.num_tokens, seq.namespace)

    def _try_admit(self, seq: Sequence, match: Match, token_budget: int) -> tuple[Sequence, Span | None] | None:
        """Returns the sequence as a running one, and its first span; None if too few pages are available.

        The span is None if the sequence has to wait for host pages while others compute.
        """
        prefix_cache, path, num_loads = self.prefix_cache, match.path, len(self.prefix_cache.to_device)
        num_private = num_pages_for(prefix_cache.page_size, seq.num_tokens) - len(path)
        # Of the available pages, those of `path` stay, and every running sequence may need another one soon.
        num_available = (
            prefix_cache.num_available_pages() - sum(n in prefix_cache.idle_nodes for n in path) - len(self.running)
        )
        num_needed = num_private + sum(not n.page for n in path)
        if num_needed > num_available:
            return None
        # A copied page must stay until it is copied. If that takes one page too many, the copy is left out.
        can_copy = num_needed + (match.partial_node in prefix_cache.idle_nodes) <= num_available
        partial_node = match.partial_node if can_copy else None
        if partial_node is not None:
            prefix_cache.pin(partial_node)
        prefix_cache.acquire(path)
        private_pages = tuple(prefix_cache.allocate_page() for _ in range(num_private))
        assert all(private_pages), "fewer pages were available than counted"
        if partial_node is not None:
            prefix_cache.copy_partial_page(partial_node, private_pages[0])
        num_cached = len(path) * prefix_cache.page_size + (match.num_common_tokens if partial_node else 0)
        start = min(num_cached, seq.num_tokens - 1)  # the last token is computed in any case: its logits are needed
        stop = start + min(seq.num_tokens - start, self.prefill_chunk, token_budget)
        (req_idx,), self.free_req_indices = page_pool.allocate(self.free_req_indices, 1)
        seq = seq._replace(
            num_computed_tokens=start, num_cached_tokens=start, pages=(*(n.page for n in path), *private_pages),
            path=path, root=prefix_cache.get_root(seq.namespace), req_idx=req_idx,
        )  # fmt: skip
        prefix_cache.stats.num_queried_tokens += seq.num_tokens
        prefix_cache.stats.num_hit_tokens += start
        loads = len(prefix_cache.to_device) > num_loads or any(n in prefix_cache.loading_nodes for n in path)
        if self.has_compute and loads:
            return seq, None
        return seq, Span(seq.id, start, stop, stop == seq.num_tokens, seq.pages, req_idx, start == num_cached)


def check(state: State, config: SchedulerConfig) -> None:
    """Asserts the invariants of the scheduler's state and of its prefix cache."""
    req_indices = page_pool.free(state.free_req_indices, tuple(s.req_idx for s in state.running))
    assert req_indices == ALL_REQ_INDICES, "a row of the request tables is lost"
    assert len(state.running) <= config.max_num_seqs
    ids = [s.id for s in (*state.waiting, *state.running)]
    assert len(ids) == len(set(ids)), "a sequence is queued twice"
    private_pages, ref_counts = [], defaultdict[Node, int](int)
    for s in state.running:
        assert 0 <= s.num_computed_tokens < s.num_tokens <= s.max_length
        assert len(s.pages) >= num_pages_for(state.page_size, s.num_computed_tokens), "computed tokens without a page"
        nodes = (*s.path, *((s.partial_node,) if s.partial_node else ()))
        assert [n.page for n in nodes] == [*s.pages[: len(nodes)]], "a sequence's nodes have other pages than it reads"
        for parent, node in zip((s.root, *s.path), nodes, strict=False):
            assert node.parent is parent
            ref_counts[node] += 1
        private_pages += s.pages[len(nodes) :]
    for s in state.waiting:
        assert not s.pages and not s.path and s.num_computed_tokens == 0
    state.prefix_cache.check(private_pages, ref_counts)
