"""Scheduling policies: the order of waiting sequences, mix of prefill and decode, groups of shared prefixes.

A new policy is one class and its entry in POLICIES (and in `config.SCHEDULING_POLICIES`, which names the choices). To
admit short prompts first, for example:

    class ShortestPromptFirst(MixedPolicy):
        def order_waiting(self, waiting):
            return tuple(sorted(waiting, key=lambda seq: seq.num_tokens))

The scheduler admits strictly in that order, so a policy that does not keep the order of arrival decides itself how long
a sequence may wait.
"""

from collections import defaultdict
from collections.abc import Iterable

from fastgen.core import scheduler
from fastgen.core.prefix_cache import Node
from fastgen.core.scheduler import Plan, Sequence, Span, State


def prefill_spans(running: Iterable[Sequence], token_budget: int, prefill_chunk: int) -> list[Span]:
    """Returns spans of prompt tokens in order of admission, until the budget is spent."""
    spans = []
    for seq in running:
        start, num_missing = seq.num_computed_tokens, seq.num_tokens - seq.num_computed_tokens
        n = min(num_missing, prefill_chunk, token_budget)
        if num_missing > 1 and n:
            spans.append(Span(seq.id, start, start + n, n == num_missing, seq.pages, seq.req_idx))
            token_budget -= n
    return spans


def decode_spans(running: Iterable[Sequence]) -> list[Span]:
    """Returns a span of one token for each sequence that has nothing else left to compute."""
    return [
        Span(seq.id, seq.num_computed_tokens, seq.num_tokens, True, seq.pages, seq.req_idx)
        for seq in running
        if seq.num_tokens - seq.num_computed_tokens == 1
    ]


class MixedPolicy:
    """First come, first served; every step decodes all decoding sequences and fills its budget with prompts."""

    decode_yields_to_prefill = False

    def order_waiting(self, waiting: tuple[Sequence, ...]) -> tuple[Sequence, ...]:
        """Returns the sequences as they are: preempted ones, then the others in order of arrival."""
        return waiting

    def plan_running(self, running: Iterable[Sequence], token_budget: int, prefill_chunk: int) -> list[Span]:
        """Returns the decode spans, then prefill spans up to the budget."""
        decode = decode_spans(running)
        return decode + prefill_spans(running, token_budget - len(decode), prefill_chunk)


class PrefillFirstPolicy(MixedPolicy):
    """First come, first served; prompts are computed alone, and decoding waits for as long as new prompts arrive."""

    decode_yields_to_prefill = True

    def plan_running(self, running: Iterable[Sequence], token_budget: int, prefill_chunk: int) -> list[Span]:
        """Returns prefill spans, or the decode spans if no sequence has prompt tokens to compute."""
        return prefill_spans(running, token_budget, prefill_chunk) or decode_spans(running)


POLICIES: dict[str, scheduler.SchedulingPolicy] = {"mixed": MixedPolicy(), "prefill_first": PrefillFirstPolicy()}


# --- shared prefixes ------------------------------------------------------------------------------------------------

SharedPrefixGroup = tuple[tuple[int, ...], int]  # rows of a plan, and the number of tokens that they share
# Reading a shared prefix once costs writing and reading partial results. Groups are used only if they spare a quarter
# of all keys, and so many keys that one more kernel launch is worth it (on one H200: nothing gained for 32 sequences
# of 1k tokens, half of the attention time for 128).
MIN_SAVED_DIVISOR, MIN_SAVED_KEYS = 4, 2**15


def find_shared_prefix_groups(
    state: State, plan: Plan, max_group_size: int, max_groups: int
) -> tuple[SharedPrefixGroup, ...]:
    """Returns groups of decoding rows whose first pages are the same; none if grouping would not be worthwhile.

    A row belongs to the deepest node of its path that other sequences read too.
    """
    by_id = {seq.id: seq for seq in state.running}
    rows: dict[Node, list[int]] = defaultdict(list)
    depth: dict[Node, int] = {}
    num_keys = 0
    for row, span in enumerate(plan):
        if span.stop - span.start > 1:
            break
        num_keys += span.stop
        path = by_id[span.id].path
        # Every reader of a node reads its ancestors: if the first node is not shared, none is.
        d = min(len(path), (span.stop - 1) // state.page_size) if path and path[0].ref_count > 1 else 0
        while d and path[d - 1].ref_count < 2:
            d -= 1
        if d:
            rows[path[d - 1]].append(row)
            depth[path[d - 1]] = d
    groups = [
        (tuple(members[i : i + max_group_size]), depth[node] * state.page_size)
        for node, members in rows.items()
        for i in range(0, len(members), max_group_size)
    ]
    groups = sorted((g for g in groups if len(g[0]) > 1), key=lambda g: (1 - len(g[0])) * g[1])[:max_groups]
    num_saved = sum((len(members) - 1) * num_shared for members, num_shared in groups)
    return tuple(groups) if num_saved >= MIN_SAVED_KEYS and num_saved * MIN_SAVED_DIVISOR >= num_keys else ()
