"""What is cached, where it lies, and who holds it: a tree of prefixes over pages. No torch here.

    page of the device   0 scratch | free | a running sequence's own | a node's
    page of the host     0 none    | free | a node's

A node stands for the tokens of one page that follow its parent's: its keys and values depend on all tokens from the
root to it, and on nothing else. Sequences that begin alike hold the same nodes, from the root on. A node that nobody
holds is idle: it stays until its page is wanted, the least recently used first, and then moves to the host's pages
or is forgotten. Children are released before their parents, so they are also taken before them.

Each adapter has a root of its own: the same tokens have other keys and values under another one. So has each salt
under each adapter: requests of different salts share no page, so that how much of a prompt was cached tells nothing
of requests of another salt. A salt's root is forgotten with the last node under it.

A node of fewer tokens than a page holds is a *tail*: the end of what somebody computed. Nobody but the sequence that
still fills the page holds it; others copy the page and go on in the copy.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple
from weakref import WeakValueDictionary

from fastgen.core import kv_cache

PageTokens = tuple[int, ...]  # the tokens of a page
Namespace = int | tuple[int, str]  # whose tree: of an adapter (0: none), or of an adapter and a salt
MAX_SCANNED_CHILDREN = 64  # children looked at for one that begins alike, the newest first


def make_namespace(adapter: int, salt: str | None) -> Namespace:
    """The namespace of a request's adapter and salt."""
    return adapter if salt is None else (adapter, salt)


class Node:
    """Tokens of one page, and where their keys and values lie: `page` on the device, `host` beside it, 0 if not there.

    `born` is the step that fills the page: only later steps may copy it.
    """

    __slots__ = (
        "__weakref__",
        "filled_at_step",
        "host_page",
        "children",
        "page",
        "parent",
        "preempted",
        "ref_count",
        "tokens",
    )

    def __init__(self, parent: "Node | None", tokens: PageTokens, page: int = 0, filled_at_step: int = 0) -> None:
        self.parent, self.tokens, self.page, self.filled_at_step = parent, tokens, page, filled_at_step
        self.host_page = self.ref_count = 0
        self.preempted = False  # of a sequence that was preempted
        self.children: dict[PageTokens, Node] = {}

    def iter_descendants(self) -> "Iterator[Node]":
        """All nodes below this one."""
        stack = [*self.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()


class Match(NamedTuple):
    """What of a sequence is cached."""

    path: tuple[Node, ...]  # its first pages, whole
    partial_node: Node | None = None  # a page that begins with the next `common` tokens
    num_common_tokens: int = 0
    pending: bool = False  # the step being planned will leave such a page behind


@dataclass(slots=True)
class CacheStats:
    """What the hierarchy did so far; tokens and pages."""

    num_queried_tokens: int = 0  # tokens of sequences that were admitted
    num_hit_tokens: int = 0  # of those, tokens that were cached
    num_copied_pages: int = 0  # pages copied, since somebody goes on within them
    num_evicted_pages: int = 0  # pages taken from what was cached
    num_offloaded_pages: int = 0
    num_loaded_pages: int = 0
    num_preemptions: int = 0  # preemptions


class PrefixCache:
    """Changed in place by the functions of `schedule`."""

    def __init__(
        self,
        page_size: int,
        num_device_pages: int,
        num_host_pages: int = 0,
        *,
        enable_prefix_caching: bool = True,
        offload_preempted_only: bool = False,
    ) -> None:
        """`device_pages` with scratch, `host_pages` without. `prefix` false: idle nodes leave the device at once.
        `only_parked`: the host takes the pages of preempted sequences alone."""
        self.page_size, self.enable_prefix_caching, self.offload_preempted_only = (
            page_size,
            enable_prefix_caching,
            offload_preempted_only,
        )
        self.num_device_pages, self.num_host_pages = num_device_pages, num_host_pages
        self.free_pages, self.free_host_pages = (
            kv_cache.new_pool(num_device_pages),
            kv_cache.new_pool(num_host_pages + 1),
        )
        self.roots: dict[Namespace, Node] = {}  # of each adapter
        # Held by those who read from them and by the nodes under them, which nobody forgets while they have a page.
        self.salted_roots: WeakValueDictionary[Namespace, Node] = WeakValueDictionary()
        self.idle_nodes: dict[Node, None] = {}  # the least recently used first
        self.host_nodes: dict[Node, None] = {}  # nodes with a page of the host, likewise
        self.step_idx = 0  # steps planned
        self.stats = CacheStats()
        self.min_copy_tokens = max(1, page_size // 8)  # tokens that are worth copying a page for
        # What the next step moves before it computes, in this order:
        self.to_host: list[tuple[int, int]] = []  # (page of the device, page of the host)
        self.on_device: list[tuple[int, int]] = []  # (page, page)
        self.to_device: list[tuple[int, int]] = []  # (page of the host, page of the device)
        self.loading_nodes: set[Node] = set()  # whose pages `back` fills
        self._pinned_nodes: set[Node] = set()  # read by one of these: their pages stay

    @property
    def enabled(self) -> bool:
        """Whether anything is kept at all."""
        return self.enable_prefix_caching or self.num_host_pages > 0

    def get_root(self, namespace: Namespace = 0) -> Node:
        """Of the tree of a namespace, as it is now."""
        roots = self.roots if isinstance(namespace, int) else self.salted_roots
        root = roots.get(namespace)
        if root is None:
            root = roots[namespace] = Node(None, ())
        return root

    def begin_step(self) -> None:
        """A new plan."""
        self.step_idx += 1
        self.loading_nodes.clear()
        self._pinned_nodes.clear()

    def pop_page_copies(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """`out`, `copies` and `back`, which are empty then."""
        last = {host: page for page, host in self.to_host}  # one that was given to another meanwhile is written once
        found = tuple((page, host) for host, page in last.items()), (*self.on_device,), (*self.to_device,)
        self.to_host, self.on_device, self.to_device = [], [], []
        return found

    # --- pages ------------------------------------------------------------------------------------------------------

    def num_available_pages(self) -> int:
        """Pages that `take` can give."""
        return kv_cache.num_free(self.free_pages) + len(self.idle_nodes)

    def allocate_page(self) -> int:
        """A page, if need be that of the node that has been idle for longest. 0: there is none."""
        if self.free_pages:
            (page,), self.free_pages = kv_cache.allocate(self.free_pages, 1)
            return page
        node = next((n for n in self.idle_nodes if n not in self._pinned_nodes), None)
        if node is None:
            return 0
        self.stats.num_evicted_pages += 1
        return self._evict(node)

    def free_page(self, page: int) -> None:
        """A page that no node has is free again."""
        self.free_pages = kv_cache.free(self.free_pages, (page,))

    def _evict(self, node: Node) -> int:
        """Take an idle node's page away: to the host if there is room, and else for ever."""
        self.idle_nodes.pop(node, None)
        page, node.page = node.page, 0
        if (
            not node.host_page
            and (node.preempted or not self.offload_preempted_only)
            and (host := self._allocate_host_page())
        ):
            node.host_page = host
            self.host_nodes[node] = None
            self.to_host.append((page, host))
            self.stats.num_offloaded_pages += 1
        if not node.host_page:
            self._remove_subtree(node)
        return page

    def _allocate_host_page(self) -> int:
        """A page of the host, if need be one that was not used for longest. 0: there is none."""
        if self.free_host_pages:
            (page,), self.free_host_pages = kv_cache.allocate(self.free_host_pages, 1)
            return page
        for node in self.host_nodes:
            if (
                node in self._pinned_nodes
                or node.filled_at_step == self.step_idx
                or (not node.page and (node.children or node.ref_count))
            ):
                continue
            del self.host_nodes[node]
            host, node.host_page = node.host_page, 0
            if not node.page:
                self._detach(node)
            return host
        return 0

    def _detach(self, node: Node) -> None:
        if node.parent is not None and node.parent.children.get(node.tokens) is node:
            del node.parent.children[node.tokens]

    def _remove_subtree(self, node: Node) -> None:
        """Remove a node without pages, and what hangs on it."""
        self._detach(node)
        for below in [*node.iter_descendants()]:
            assert not below.ref_count, "a page was taken from under somebody who holds the next one"
            if below in self.idle_nodes:
                del self.idle_nodes[below]
                self.free_page(below.page)
            self._free_host_page(below)
            below.children.clear()
        node.children.clear()  # no cycle keeps them, nor a salt's root above them

    def _free_host_page(self, node: Node) -> None:
        if node.host_page:
            del self.host_nodes[node]
            self.free_host_pages = kv_cache.free(self.free_host_pages, (node.host_page,))
            node.host_page = 0

    # --- nodes ------------------------------------------------------------------------------------------------------

    def match(self, tokens: Sequence[int], num_tokens: int, namespace: Namespace = 0) -> Match:
        """The longest cached beginning of the first `known` tokens."""
        path, node, page = list[Node](), self.get_root(namespace), self.page_size
        while len(path) < num_tokens // page:
            kid = node.children.get(tuple(tokens[len(path) * page : (len(path) + 1) * page]))
            if kid is None:
                break
            path.append(node := kid)
        rest = tuple(tokens[len(path) * page : min(num_tokens - 1, (len(path) + 1) * page)])  # the last one is computed
        best, common = None, self.min_copy_tokens - 1
        for kid in islice(reversed(node.children.values()), MAX_SCANNED_CHILDREN if len(rest) > common else 0):
            same = next((i for i, (a, b) in enumerate(zip(kid.tokens, rest, strict=False)) if a != b), None)
            same = min(len(kid.tokens), len(rest)) if same is None else same
            if same > common:
                best, common = kid, same
        if best is None:
            return Match(tuple(path))
        return Match(tuple(path), best, common, best.filled_at_step == self.step_idx)

    def acquire(self, path: Iterable[Node]) -> None:
        """Sequences begin to read these pages; what is on the host only comes back. There must be pages for it."""
        path = tuple(path)
        for node in path:
            self.idle_nodes.pop(node, None)
            node.ref_count += 1
        for node in path:
            if not node.page:
                node.page, node.filled_at_step = self.allocate_page(), self.step_idx
                assert node.page, "held more than there is room for"
                self.to_device.append((node.host_page, node.page))
                self.loading_nodes.add(node)
                self.stats.num_loaded_pages += 1
        for node in reversed(path):
            if node.host_page:
                self.host_nodes[node] = self.host_nodes.pop(node)

    def adopt_page(self, node: Node, page: int) -> None:
        """Hold a node whose tokens somebody's own page has, too: one of the two is enough."""
        if node.page:
            self.acquire((node,))
            self.free_page(page)
        else:
            node.page, node.ref_count = page, 1

    def pin(self, node: Node) -> None:
        """Its pages stay until the next plan."""
        self._pinned_nodes.add(node)

    def copy_partial_page(self, node: Node, page: int) -> None:
        """Fill `page` with the tail's before the step. It must be pinned before any page is taken."""
        if node.page:
            self.on_device.append((node.page, page))
        else:
            self.to_device.append((node.host_page, page))
            self.stats.num_loaded_pages += 1
        self.stats.num_copied_pages += 1
        if node in self.idle_nodes:
            self.idle_nodes[node] = self.idle_nodes.pop(node)

    def insert(self, parent: Node, tokens: PageTokens, page: int) -> Node:
        """A node for a page that the step being planned fills, held once."""
        node = Node(parent, tokens, page, self.step_idx)
        node.ref_count = 1
        parent.children[tokens] = node
        return node

    def extend_node(self, node: Node, tokens: PageTokens) -> None:
        """More tokens of its page are filled."""
        parent = node.parent
        assert parent is not None and tokens not in parent.children
        del parent.children[node.tokens]
        node.tokens, node.filled_at_step = tokens, self.step_idx
        parent.children[tokens] = node

    def detach_partial(self, node: Node) -> None:
        """Forget a tail; its page is its one holder's own."""
        self._free_host_page(node)
        self._detach(node)

    def release(self, path: Sequence[Node], *, stale: bool = False, preempted: bool = False) -> None:
        """Somebody holds these no longer. `stale`: they are of a tree that is no more."""
        for node in reversed(path):
            node.ref_count -= 1
            node.preempted |= preempted
            if node.ref_count:
                continue
            if stale:
                self.free_page(node.page)
            else:
                self.idle_nodes[node] = None
                if not self.enable_prefix_caching:
                    self.free_page(self._evict(node))

    def reset(self) -> None:
        """Nothing that is cached counts any more: the parameters have changed. What is held is freed by its holders."""
        for node in self.idle_nodes:
            self.free_page(node.page)
        for node in [*self.host_nodes]:
            self._free_host_page(node)
        self.idle_nodes.clear()
        self.roots.clear()
        self.salted_roots.clear()

    def reset_adapter(self, adapter: int) -> None:
        """The same for what is cached under one adapter, with any salt, which has changed or is gone."""
        salted = [key for key in self.salted_roots if isinstance(key, tuple) and key[0] == adapter]
        roots = [self.roots.pop(adapter, None), *(self.salted_roots.pop(key, None) for key in salted)]
        for node in [node for root in roots if root is not None for node in root.iter_descendants()]:
            if node in self.idle_nodes:
                del self.idle_nodes[node]
                self.free_page(node.page)
            self._free_host_page(node)

    def check(self, private_pages: Sequence[int], ref_counts: dict[Node, int]) -> None:
        """Asserts that every page has exactly one owner. `owned`: pages that sequences have for themselves; `held`:
        how many sequences hold each node."""
        roots = {*self.roots.values(), *self.salted_roots.values()}
        nodes = [n for root in roots for n in root.iter_descendants()]
        known = {*nodes, *ref_counts}  # the held ones of a former tree, too
        used = [*private_pages, *(n.page for n in known if n.page)]
        assert len(used) == len(set(used)), "a page has two owners"
        assert kv_cache.free(self.free_pages, tuple(used)) == kv_cache.new_pool(self.num_device_pages), "a page is lost"
        hosts = [n.host_page for n in known if n.host_page]
        assert len(hosts) == len(set(hosts)), "a page of the host has two owners"
        assert kv_cache.free(self.free_host_pages, tuple(hosts)) == kv_cache.new_pool(self.num_host_pages + 1), (
            "a page of the host is lost"
        )
        assert {n for n in nodes if n.host_page} == {*self.host_nodes}
        assert {n for n in nodes if n.page and not n.ref_count} == {*self.idle_nodes}, (
            "a page that nobody holds is not idle"
        )
        assert all(n.ref_count == ref_counts.get(n, 0) for n in known), "a node has other holders than it counts"
        place = {n: i for i, n in enumerate(self.idle_nodes)}
        for n in nodes:
            assert n.page or n.host_page, "a node without a page"
            assert n.parent is not None and n.parent.children[n.tokens] is n
            assert 0 < len(n.tokens) <= self.page_size and (len(n.tokens) == self.page_size or not n.children)
            if n.page and n.parent not in roots:
                assert n.parent.page and n.parent.ref_count >= (n.ref_count > 0), "a page hangs on none"
                assert n.parent not in place or n in place and place[n] < place[n.parent], "a parent would go first"
