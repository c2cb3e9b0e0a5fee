"""The prefix cache: a radix tree over the pages of the KV cache, so that equal prefixes are computed and stored once.

A node is one page. Its keys and values depend on the tokens from the root to the node and on nothing else, so any
sequence that begins with those tokens can read the page. With pages of four tokens:

    root ── page 5 [a b c d] ── page 8 [e f g h] ── page 3 [i j]     partial node: a page not yet full
                            └── page 6 [x y z z]

    a sequence of a b c d e f g h i j ...    reads pages 5 and 8, and writes page 3, which it alone holds
    a new prompt  a b c d e f q ...          matches page 5, and two tokens of page 8, which are copied to a new page

- Match. A prompt shares the nodes of its full pages. Then the child with the longest common beginning is copied, if
  that saves at least `min_copy_tokens` tokens: the sequence continues in the copy (copy-on-write).
- Reference counts. A node counts the running sequences that read its page. At zero the node is *idle*: the page stays
  until another allocation needs it. Idle nodes are evicted in order of last use; a sequence releases children before
  parents, so that a leaf is always evicted first.
- Eviction. The page moves to a page of host memory if there is one; otherwise the node is removed from the tree. A
  match loads host pages back.
- Namespaces. Each LoRA adapter has a root of its own, because the same tokens have other keys and values under another
  adapter. So has each cache salt of an adapter, so that a request cannot learn from its cache hits what requests of
  other salts contain. The root of a salt is forgotten with the last node below it.

Every page has one owner. A device page is scratch (0), free, private to a running sequence, or a node's. A host page is
free or a node's. The tree changes while a step is planned, before the device runs it: a node may be shared within the
step that fills its page (a layer writes before it reads), but is copied only by later steps.

This module needs no torch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple
from weakref import WeakValueDictionary

from fastgen.core import page_pool

PageTokens = tuple[int, ...]  # the tokens of one page
Namespace = int | tuple[int, str]  # an adapter (0: none), or an adapter and a cache salt
PagePairs = tuple[tuple[int, int], ...]  # (source page, target page)
MAX_SCANNED_CHILDREN = 64  # children compared to find the longest common beginning, the newest first


def make_namespace(adapter: int, salt: str | None) -> Namespace:
    """Returns the namespace of requests with this adapter and cache salt."""
    return adapter if salt is None else (adapter, salt)


class Node:
    """One page of tokens, with its place on the device (`page`) and on the host (`host_page`); 0 means neither.

    `filled_at_step` is the step that fills the page: only later steps may copy from it.
    """

    __slots__ = (
        *("parent", "tokens", "page", "host_page", "filled_at_step", "ref_count", "preempted", "children"),
        "__weakref__",
    )

    def __init__(self, parent: "Node | None", tokens: PageTokens, page: int = 0, filled_at_step: int = 0) -> None:
        self.parent, self.tokens, self.page, self.filled_at_step = parent, tokens, page, filled_at_step
        self.host_page = self.ref_count = 0
        self.preempted = False  # whether a sequence that was preempted had read the page
        self.children: dict[PageTokens, Node] = {}

    def iter_descendants(self) -> "Iterator[Node]":
        """Yields all nodes below this one."""
        stack = [*self.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()


class Match(NamedTuple):
    """The cached prefix of a sequence."""

    path: tuple[Node, ...]  # nodes of its full pages
    partial_node: Node | None = None  # a node whose page begins with the next `num_common_tokens` tokens
    num_common_tokens: int = 0
    pending: bool = False  # the step being planned fills `partial_node`: it can be copied one step later


class PageCopies(NamedTuple):
    """Page copies before a step's computation, in this order: device to host, device to device, host to device.

    The layers of the step wait for the loaded pages, one layer after the other. With `prefetch`, no sequence of this
    step reads a loaded page, so only the next step waits.
    """

    to_host: PagePairs = ()
    on_device: PagePairs = ()
    to_device: PagePairs = ()
    prefetch: bool = False


@dataclass(slots=True)
class CacheStats:
    """Counters since the engine started."""

    num_queried_tokens: int = 0  # tokens of admitted sequences
    num_hit_tokens: int = 0  # of these, tokens found in the prefix cache
    num_copied_pages: int = 0  # pages copied to continue within them
    num_evicted_pages: int = 0  # cached pages that were taken from the device
    num_offloaded_pages: int = 0  # pages copied to the host
    num_loaded_pages: int = 0  # pages copied back from the host
    num_preemptions: int = 0


class PrefixCache:
    """Radix tree of cached pages, with the pools of free pages. The functions of `scheduler` change it in place."""

    def __init__(
        self, page_size: int, num_device_pages: int, num_host_pages: int = 0, *, enable_prefix_caching: bool = True,
        offload_preempted_only: bool = False,
    ) -> None:  # fmt: skip
        """Makes an empty tree. `num_device_pages` counts the scratch page.

        Without `enable_prefix_caching`, idle pages leave the device at once. With `offload_preempted_only`, only pages
        of preempted sequences move to the host.
        """
        self.page_size, self.num_device_pages, self.num_host_pages = page_size, num_device_pages, num_host_pages
        self.enable_prefix_caching, self.offload_preempted_only = enable_prefix_caching, offload_preempted_only
        self.free_pages, self.free_host_pages = map(page_pool.new_pool, (num_device_pages, num_host_pages + 1))
        self.roots: dict[Namespace, Node] = {}  # by adapter
        # By adapter and salt. A salt's root lives as long as a node below it or a sequence that was admitted to it.
        self.salted_roots: WeakValueDictionary[Namespace, Node] = WeakValueDictionary()
        self.idle_nodes: dict[Node, None] = {}  # nodes with a device page and no reader, least recently used first
        self.host_nodes: dict[Node, None] = {}  # nodes with a host page, least recently used first
        self.step_idx = 0  # number of planned steps
        self.stats = CacheStats()
        self.min_copy_tokens = max(1, page_size // 8)
        # Copies that the step being planned begins with, see PageCopies.
        self.to_host: list[tuple[int, int]] = []
        self.on_device: list[tuple[int, int]] = []
        self.to_device: list[tuple[int, int]] = []
        self.loading_nodes: set[Node] = set()  # nodes whose page `to_device` fills
        self._pinned_nodes: set[Node] = set()  # nodes that a copy reads: not evicted before the next plan

    @property
    def enabled(self) -> bool:
        """Whether pages outlive their sequence, on the device or on the host."""
        return self.enable_prefix_caching or self.num_host_pages > 0

    def get_root(self, namespace: Namespace = 0) -> Node:
        """Returns the current root of a namespace. `reset` replaces it."""
        roots = self.roots if isinstance(namespace, int) else self.salted_roots
        root = roots.get(namespace)
        if root is None:
            root = roots[namespace] = Node(None, ())
        return root

    def begin_step(self) -> None:
        """Begins a new plan."""
        self.step_idx += 1
        self.loading_nodes.clear()
        self._pinned_nodes.clear()

    def pop_page_copies(self) -> PageCopies:
        """Returns the queued page copies and empties the queues."""
        # A host page that was assigned twice within the plan is written once.
        source_of = {host_page: page for page, host_page in self.to_host}
        to_host = tuple((page, host_page) for host_page, page in source_of.items())
        copies = PageCopies(to_host, (*self.on_device,), (*self.to_device,))
        self.to_host, self.on_device, self.to_device = [], [], []
        return copies

    # --- pages ------------------------------------------------------------------------------------------------------

    def num_available_pages(self) -> int:
        """Returns the number of pages that are free or idle."""
        return page_pool.num_free(self.free_pages) + len(self.idle_nodes)

    def allocate_page(self) -> int:
        """Returns a free page, or else the page of the least recently used idle node. 0: every page is in use."""
        if self.free_pages:
            (page,), self.free_pages = page_pool.allocate(self.free_pages, 1)
            return page
        node = next((n for n in self.idle_nodes if n not in self._pinned_nodes), None)
        if node is None:
            return 0
        self.stats.num_evicted_pages += 1
        return self._evict(node)

    def free_page(self, page: int) -> None:
        """Frees a page that belongs to no node."""
        self.free_pages = page_pool.free(self.free_pages, (page,))

    def _evict(self, node: Node) -> int:
        """Evicts the device page of an idle node and returns the page.

        Queues a copy to the host unless the host has the page already; without room there, the node is removed.
        """
        self.idle_nodes.pop(node, None)
        page, node.page = node.page, 0
        offload = not node.host_page and (node.preempted or not self.offload_preempted_only)
        if offload and (host_page := self._allocate_host_page()):
            node.host_page = host_page
            self.host_nodes[node] = None
            self.to_host.append((page, host_page))
            self.stats.num_offloaded_pages += 1
        if not node.host_page:
            self._remove_subtree(node)
        return page

    def _allocate_host_page(self) -> int:
        """Returns a free host page, or else the least recently used one that no node needs. 0: there is none."""
        if self.free_host_pages:
            (host_page,), self.free_host_pages = page_pool.allocate(self.free_host_pages, 1)
            return host_page
        for node in self.host_nodes:
            being_read = node in self._pinned_nodes or node.filled_at_step == self.step_idx
            if being_read or (not node.page and (node.children or node.ref_count)):
                continue
            del self.host_nodes[node]
            host_page, node.host_page = node.host_page, 0
            if not node.page:
                self._detach(node)
            return host_page
        return 0

    def _detach(self, node: Node) -> None:
        if node.parent is not None and node.parent.children.get(node.tokens) is node:
            del node.parent.children[node.tokens]

    def _remove_subtree(self, node: Node) -> None:
        """Removes a node without pages and all nodes below it, which nothing can reach any more."""
        self._detach(node)
        for child in [*node.iter_descendants()]:
            assert not child.ref_count, "a page was evicted while a sequence reads a page below it"
            self._free_pages_of(child)
            child.children.clear()
        node.children.clear()  # no reference cycle keeps the subtree or a salt's root alive

    def _free_pages_of(self, node: Node) -> None:
        """Frees a node's host page, and its device page if no sequence reads it."""
        if node in self.idle_nodes:
            del self.idle_nodes[node]
            self.free_page(node.page)
        self._free_host_page(node)

    def _free_host_page(self, node: Node) -> None:
        if node.host_page:
            del self.host_nodes[node]
            self.free_host_pages = page_pool.free(self.free_host_pages, (node.host_page,))
            node.host_page = 0

    # --- nodes ------------------------------------------------------------------------------------------------------

    def match(self, token_ids: Sequence[int], num_tokens: int, namespace: Namespace = 0) -> Match:
        """Returns the longest cached prefix of the first `num_tokens` tokens."""
        path, node, page_size = list[Node](), self.get_root(namespace), self.page_size
        while len(path) < num_tokens // page_size:
            child = node.children.get(tuple(token_ids[len(path) * page_size : (len(path) + 1) * page_size]))
            if child is None:
                break
            path.append(node := child)
        # The last token is always computed: its logits are needed.
        suffix = tuple(token_ids[len(path) * page_size : min(num_tokens - 1, (len(path) + 1) * page_size)])
        best, num_common = None, self.min_copy_tokens - 1
        for child in islice(reversed(node.children.values()), MAX_SCANNED_CHILDREN if len(suffix) > num_common else 0):
            differs_at = next((i for i, (a, b) in enumerate(zip(child.tokens, suffix, strict=False)) if a != b), None)
            num_equal = min(len(child.tokens), len(suffix)) if differs_at is None else differs_at
            if num_equal > num_common:
                best, num_common = child, num_equal
        if best is None:
            return Match(tuple(path))
        return Match(tuple(path), best, num_common, best.filled_at_step == self.step_idx)

    def acquire(self, path: Iterable[Node]) -> None:
        """Adds a reader to each node, and queues loading of the pages that are only on the host.

        The caller has checked that enough pages are available.
        """
        path = tuple(path)
        for node in path:
            self.idle_nodes.pop(node, None)
            node.ref_count += 1
        for node in path:
            if not node.page:
                node.page, node.filled_at_step = self.allocate_page(), self.step_idx
                assert node.page, "acquired more pages than are available"
                self.to_device.append((node.host_page, node.page))
                self.loading_nodes.add(node)
                self.stats.num_loaded_pages += 1
        for node in reversed(path):
            if node.host_page:
                self.host_nodes[node] = self.host_nodes.pop(node)

    def adopt_page(self, node: Node, page: int) -> None:
        """Adds a reader to a node, with a private page of the same tokens: the node takes it, or it is freed."""
        if node.page:
            self.acquire((node,))
            self.free_page(page)
        else:
            node.page, node.ref_count = page, 1

    def pin(self, node: Node) -> None:
        """Protects a node from eviction until the next plan."""
        self._pinned_nodes.add(node)

    def copy_partial_page(self, node: Node, page: int) -> None:
        """Queues a copy of a node's page to `page`. The caller has pinned the node before it allocated any page."""
        if node.page:
            self.on_device.append((node.page, page))
        else:
            self.to_device.append((node.host_page, page))
            self.stats.num_loaded_pages += 1
        self.stats.num_copied_pages += 1
        if node in self.idle_nodes:
            self.idle_nodes[node] = self.idle_nodes.pop(node)

    def insert(self, parent: Node, tokens: PageTokens, page: int) -> Node:
        """Adds a node with one reader, for a page that the step being planned fills."""
        node = Node(parent, tokens, page, self.step_idx)
        node.ref_count = 1
        parent.children[tokens] = node
        return node

    def extend_node(self, node: Node, tokens: PageTokens) -> None:
        """Replaces a partial node's tokens by `tokens`, a longer run that the step being planned completes."""
        parent = node.parent
        assert parent is not None and tokens not in parent.children
        del parent.children[node.tokens]
        node.tokens, node.filled_at_step = tokens, self.step_idx
        parent.children[tokens] = node

    def detach_partial(self, node: Node) -> None:
        """Removes a partial node from the tree. Its device page becomes private to its only reader."""
        self._free_host_page(node)
        self._detach(node)

    def release(self, path: Sequence[Node], *, stale: bool = False, preempted: bool = False) -> None:
        """Removes a reader from each node; nodes without readers become idle.

        `stale`: a reset has replaced the tree, so the pages are freed. `preempted`: the reader will come back.
        """
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

    def insert_idle_pages(self, token_ids: Sequence[int], namespace: Namespace = 0) -> tuple[int, ...]:
        """Inserts idle nodes for the full pages of `token_ids`; returns the page of each, for the caller to fill.

        A page is 0 where the tree already has it. Returns () if nothing is missing, or if too few pages are available.
        """
        size = self.page_size
        blocks = [tuple(token_ids[i : i + size]) for i in range(0, len(token_ids) - size + 1, size)]
        num_cached = len(self.match(token_ids, len(token_ids), namespace).path)
        if len(blocks) > self.num_available_pages() or num_cached == len(blocks):
            return ()
        pages, path, to_fill = [self.allocate_page() for _ in blocks], [self.get_root(namespace)], list[int]()
        for tokens, page in zip(blocks, pages, strict=True):
            node = path[-1].children.get(tokens)
            to_fill.append(0 if node is not None and node.page else page)
            if node is None:
                node = self.insert(path[-1], tokens, page)
            else:
                self.adopt_page(node, page)
            path.append(node)
        self.release(path[1:])
        return tuple(to_fill)

    def reset(self) -> None:
        """Empties the cache after a weight update. Pages of running sequences are freed when the sequences end."""
        for node in self.idle_nodes:
            self.free_page(node.page)
        for node in [*self.host_nodes]:
            self._free_host_page(node)
        self.idle_nodes.clear()
        self.roots.clear()
        self.salted_roots.clear()

    def reset_adapter(self, adapter: int) -> None:
        """Removes what is cached for one adapter, with any salt, after the adapter was changed or removed."""
        salted = [key for key in self.salted_roots if isinstance(key, tuple) and key[0] == adapter]
        roots = [self.roots.pop(adapter, None), *(self.salted_roots.pop(key, None) for key in salted)]
        for node in [node for root in roots if root is not None for node in root.iter_descendants()]:
            self._free_pages_of(node)

    def check(self, private_pages: Sequence[int], ref_counts: dict[Node, int]) -> None:
        """Asserts that every page has exactly one owner and that nodes are in order.

        `private_pages` are pages of running sequences outside the tree, `ref_counts` the number of readers by node.
        """
        roots = {*self.roots.values(), *self.salted_roots.values()}
        nodes = [n for root in roots for n in root.iter_descendants()]
        all_nodes = {*nodes, *ref_counts}  # nodes from before a reset may still have readers
        pages = [*private_pages, *(n.page for n in all_nodes if n.page)]
        assert len(pages) == len(set(pages)), "a page has two owners"
        pool = page_pool.free(self.free_pages, tuple(pages))
        assert pool == page_pool.new_pool(self.num_device_pages), "a page is lost"
        host_pages = [n.host_page for n in all_nodes if n.host_page]
        assert len(host_pages) == len(set(host_pages)), "a host page has two owners"
        pool = page_pool.free(self.free_host_pages, tuple(host_pages))
        assert pool == page_pool.new_pool(self.num_host_pages + 1), "a host page is lost"
        assert {n for n in nodes if n.host_page} == {*self.host_nodes}
        idle = {n for n in nodes if n.page and not n.ref_count}
        assert idle == {*self.idle_nodes}, "a page without readers is not idle"
        assert all(n.ref_count == ref_counts.get(n, 0) for n in all_nodes), "a node has a wrong reference count"
        order = {n: i for i, n in enumerate(self.idle_nodes)}
        for n in nodes:
            assert n.page or n.host_page, "a node without a page"
            assert n.parent is not None and n.parent.children[n.tokens] is n
            assert 0 < len(n.tokens) <= self.page_size and (len(n.tokens) == self.page_size or not n.children)
            if n.page and n.parent not in roots:
                assert n.parent.page and n.parent.ref_count >= (n.ref_count > 0), "a page has no parent page"
                assert n.parent not in order or n in order and order[n] < order[n.parent], "a parent would go first"
