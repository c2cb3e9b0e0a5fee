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

from fastgen.cache import pages

Block = tuple[int, ...]  # the tokens of a page
Namespace = int | tuple[int, str]  # whose tree: of an adapter (0: none), or of an adapter and a salt
SCANNED = 64  # children looked at for one that begins alike, the newest first


def namespace(adapter: int, salt: str | None) -> Namespace:
    """The namespace of a request's adapter and salt."""
    return adapter if salt is None else (adapter, salt)


class Node:
    """Tokens of one page, and where their keys and values lie: `page` on the device, `host` beside it, 0 if not there.

    `born` is the step that fills the page: only later steps may copy it.
    """

    __slots__ = ("__weakref__", "born", "host", "kids", "page", "parent", "parked", "refs", "tokens")

    def __init__(self, parent: "Node | None", tokens: Block, page: int = 0, born: int = 0) -> None:
        self.parent, self.tokens, self.page, self.born = parent, tokens, page, born
        self.host = self.refs = 0
        self.parked = False  # of a sequence that was preempted
        self.kids: dict[Block, Node] = {}

    def walk(self) -> "Iterator[Node]":
        """All nodes below this one."""
        stack = [*self.kids.values()]
        while stack:
            node = stack.pop()
            yield node
            stack += node.kids.values()


class Match(NamedTuple):
    """What of a sequence is cached."""

    path: tuple[Node, ...]  # its first pages, whole
    tail: Node | None = None  # a page that begins with the next `common` tokens
    common: int = 0
    soon: bool = False  # the step being planned will leave such a page behind


@dataclass(slots=True)
class Counts:
    """What the hierarchy did so far; tokens and pages."""

    asked: int = 0  # tokens of sequences that were admitted
    reused: int = 0  # of those, tokens that were cached
    copied: int = 0  # pages copied, since somebody goes on within them
    evicted: int = 0  # pages taken from what was cached
    paged_out: int = 0
    paged_in: int = 0
    parked: int = 0  # preemptions


class Tree:
    """Changed in place by the functions of `schedule`."""

    def __init__(
        self, page: int, device_pages: int, host_pages: int = 0, *, prefix: bool = True, only_parked: bool = False
    ) -> None:
        """`device_pages` with scratch, `host_pages` without. `prefix` false: idle nodes leave the device at once.
        `only_parked`: the host takes the pages of preempted sequences alone."""
        self.page, self.prefix, self.only_parked = page, prefix, only_parked
        self.pages, self.host_pages = device_pages, host_pages
        self.free, self.host_free = pages.pool(device_pages), pages.pool(host_pages + 1)
        self.roots: dict[Namespace, Node] = {}  # of each adapter
        # Held by those who read from them and by the nodes under them, which nobody forgets while they have a page.
        self.salted_roots: WeakValueDictionary[Namespace, Node] = WeakValueDictionary()
        self.idle: dict[Node, None] = {}  # the least recently used first
        self.hosted: dict[Node, None] = {}  # nodes with a page of the host, likewise
        self.clock = 0  # steps planned
        self.counts = Counts()
        self.least = max(1, page // 8)  # tokens that are worth copying a page for
        # What the next step moves before it computes, in this order:
        self.out: list[tuple[int, int]] = []  # (page of the device, page of the host)
        self.copies: list[tuple[int, int]] = []  # (page, page)
        self.back: list[tuple[int, int]] = []  # (page of the host, page of the device)
        self.arriving: set[Node] = set()  # whose pages `back` fills
        self._pinned: set[Node] = set()  # read by one of these: their pages stay

    @property
    def active(self) -> bool:
        """Whether anything is kept at all."""
        return self.prefix or self.host_pages > 0

    def root(self, namespace: Namespace = 0) -> Node:
        """Of the tree of a namespace, as it is now."""
        roots = self.roots if isinstance(namespace, int) else self.salted_roots
        root = roots.get(namespace)
        if root is None:
            root = roots[namespace] = Node(None, ())
        return root

    def begin(self) -> None:
        """A new plan."""
        self.clock += 1
        self.arriving.clear()
        self._pinned.clear()

    def moves(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """`out`, `copies` and `back`, which are empty then."""
        last = {host: page for page, host in self.out}  # one that was given to another meanwhile is written once
        found = tuple((page, host) for host, page in last.items()), (*self.copies,), (*self.back,)
        self.out, self.copies, self.back = [], [], []
        return found

    # --- pages ------------------------------------------------------------------------------------------------------

    def available(self) -> int:
        """Pages that `take` can give."""
        return pages.count(self.free) + len(self.idle)

    def take(self) -> int:
        """A page, if need be that of the node that has been idle for longest. 0: there is none."""
        if self.free:
            (page,), self.free = pages.take(self.free, 1)
            return page
        node = next((n for n in self.idle if n not in self._pinned), None)
        if node is None:
            return 0
        self.counts.evicted += 1
        return self._evict(node)

    def give(self, page: int) -> None:
        """A page that no node has is free again."""
        self.free = pages.give(self.free, (page,))

    def _evict(self, node: Node) -> int:
        """Take an idle node's page away: to the host if there is room, and else for ever."""
        self.idle.pop(node, None)
        page, node.page = node.page, 0
        if not node.host and (node.parked or not self.only_parked) and (host := self._host_page()):
            node.host = host
            self.hosted[node] = None
            self.out.append((page, host))
            self.counts.paged_out += 1
        if not node.host:
            self._forget(node)
        return page

    def _host_page(self) -> int:
        """A page of the host, if need be one that was not used for longest. 0: there is none."""
        if self.host_free:
            (page,), self.host_free = pages.take(self.host_free, 1)
            return page
        for node in self.hosted:
            if node in self._pinned or node.born == self.clock or (not node.page and (node.kids or node.refs)):
                continue
            del self.hosted[node]
            host, node.host = node.host, 0
            if not node.page:
                self._detach(node)
            return host
        return 0

    def _detach(self, node: Node) -> None:
        if node.parent is not None and node.parent.kids.get(node.tokens) is node:
            del node.parent.kids[node.tokens]

    def _forget(self, node: Node) -> None:
        """Remove a node without pages, and what hangs on it."""
        self._detach(node)
        for below in [*node.walk()]:
            assert not below.refs, "a page was taken from under somebody who holds the next one"
            if below in self.idle:
                del self.idle[below]
                self.give(below.page)
            self._free_host(below)
            below.kids.clear()
        node.kids.clear()  # no cycle keeps them, nor a salt's root above them

    def _free_host(self, node: Node) -> None:
        if node.host:
            del self.hosted[node]
            self.host_free = pages.give(self.host_free, (node.host,))
            node.host = 0

    # --- nodes ------------------------------------------------------------------------------------------------------

    def match(self, tokens: Sequence[int], known: int, namespace: Namespace = 0) -> Match:
        """The longest cached beginning of the first `known` tokens."""
        path, node, page = list[Node](), self.root(namespace), self.page
        while len(path) < known // page:
            kid = node.kids.get(tuple(tokens[len(path) * page : (len(path) + 1) * page]))
            if kid is None:
                break
            path.append(node := kid)
        rest = tuple(tokens[len(path) * page : min(known - 1, (len(path) + 1) * page)])  # the last one is computed
        best, common = None, self.least - 1
        for kid in islice(reversed(node.kids.values()), SCANNED if len(rest) > common else 0):
            same = next((i for i, (a, b) in enumerate(zip(kid.tokens, rest, strict=False)) if a != b), None)
            same = min(len(kid.tokens), len(rest)) if same is None else same
            if same > common:
                best, common = kid, same
        if best is None:
            return Match(tuple(path))
        return Match(tuple(path), best, common, best.born == self.clock)

    def hold(self, path: Iterable[Node]) -> None:
        """Sequences begin to read these pages; what is on the host only comes back. There must be pages for it."""
        path = tuple(path)
        for node in path:
            self.idle.pop(node, None)
            node.refs += 1
        for node in path:
            if not node.page:
                node.page, node.born = self.take(), self.clock
                assert node.page, "held more than there is room for"
                self.back.append((node.host, node.page))
                self.arriving.add(node)
                self.counts.paged_in += 1
        for node in reversed(path):
            if node.host:
                self.hosted[node] = self.hosted.pop(node)

    def join(self, node: Node, page: int) -> None:
        """Hold a node whose tokens somebody's own page has, too: one of the two is enough."""
        if node.page:
            self.hold((node,))
            self.give(page)
        else:
            node.page, node.refs = page, 1

    def pin(self, tail: Node) -> None:
        """Its pages stay until the next plan."""
        self._pinned.add(tail)

    def copy(self, tail: Node, page: int) -> None:
        """Fill `page` with the tail's before the step. It must be pinned before any page is taken."""
        if tail.page:
            self.copies.append((tail.page, page))
        else:
            self.back.append((tail.host, page))
            self.counts.paged_in += 1
        self.counts.copied += 1
        if tail in self.idle:
            self.idle[tail] = self.idle.pop(tail)

    def insert(self, parent: Node, tokens: Block, page: int) -> Node:
        """A node for a page that the step being planned fills, held once."""
        node = Node(parent, tokens, page, self.clock)
        node.refs = 1
        parent.kids[tokens] = node
        return node

    def rename(self, node: Node, tokens: Block) -> None:
        """More tokens of its page are filled."""
        parent = node.parent
        assert parent is not None and tokens not in parent.kids
        del parent.kids[node.tokens]
        node.tokens, node.born = tokens, self.clock
        parent.kids[tokens] = node

    def disown(self, node: Node) -> None:
        """Forget a tail; its page is its one holder's own."""
        self._free_host(node)
        self._detach(node)

    def release(self, path: Sequence[Node], *, stale: bool = False, parked: bool = False) -> None:
        """Somebody holds these no longer. `stale`: they are of a tree that is no more."""
        for node in reversed(path):
            node.refs -= 1
            node.parked |= parked
            if node.refs:
                continue
            if stale:
                self.give(node.page)
            else:
                self.idle[node] = None
                if not self.prefix:
                    self.give(self._evict(node))

    def reset(self) -> None:
        """Nothing that is cached counts any more: the parameters have changed. What is held is freed by its holders."""
        for node in self.idle:
            self.give(node.page)
        for node in [*self.hosted]:
            self._free_host(node)
        self.idle.clear()
        self.roots.clear()
        self.salted_roots.clear()

    def reset_adapter(self, adapter: int) -> None:
        """The same for what is cached under one adapter, with any salt, which has changed or is gone."""
        salted = [key for key in self.salted_roots if isinstance(key, tuple) and key[0] == adapter]
        roots = [self.roots.pop(adapter, None), *(self.salted_roots.pop(key, None) for key in salted)]
        for node in [node for root in roots if root is not None for node in root.walk()]:
            if node in self.idle:
                del self.idle[node]
                self.give(node.page)
            self._free_host(node)

    def check(self, owned: Sequence[int], held: dict[Node, int]) -> None:
        """Asserts that every page has exactly one owner. `owned`: pages that sequences have for themselves; `held`:
        how many sequences hold each node."""
        roots = {*self.roots.values(), *self.salted_roots.values()}
        nodes = [n for root in roots for n in root.walk()]
        known = {*nodes, *held}  # the held ones of a former tree, too
        used = [*owned, *(n.page for n in known if n.page)]
        assert len(used) == len(set(used)), "a page has two owners"
        assert pages.give(self.free, tuple(used)) == pages.pool(self.pages), "a page is lost"
        hosts = [n.host for n in known if n.host]
        assert len(hosts) == len(set(hosts)), "a page of the host has two owners"
        assert pages.give(self.host_free, tuple(hosts)) == pages.pool(self.host_pages + 1), "a page of the host is lost"
        assert {n for n in nodes if n.host} == {*self.hosted}
        assert {n for n in nodes if n.page and not n.refs} == {*self.idle}, "a page that nobody holds is not idle"
        assert all(n.refs == held.get(n, 0) for n in known), "a node has other holders than it counts"
        place = {n: i for i, n in enumerate(self.idle)}
        for n in nodes:
            assert n.page or n.host, "a node without a page"
            assert n.parent is not None and n.parent.kids[n.tokens] is n
            assert 0 < len(n.tokens) <= self.page and (len(n.tokens) == self.page or not n.kids)
            if n.page and n.parent not in roots:
                assert n.parent.page and n.parent.refs >= (n.refs > 0), "a page hangs on none"
                assert n.parent not in place or n in place and place[n] < place[n.parent], "a parent would go first"
