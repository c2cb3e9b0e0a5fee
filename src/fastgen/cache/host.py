"""Pages on their way: copied within the device, to the host's memory, and back, behind and ahead of the steps.

Layers travel in groups: keys and values of a group lie together in a page of the host, so that a page, or several
side by side, is one copy, and few calls set a step's moves going. On the way they pass through staging buffers of the
device:

    out   gather pages of a group -> staging ring -> host     the ring's part is free when the copy is done
    back  host -> staging -> scatter to the group's pages     a group at a time, an event after each

What a step itself reads is waited for group by group; what the next step reads comes while this one computes.
"""

import mmap
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, groupby
from typing import Any

import torch
from torch import Tensor

from fastgen.models.spec import Spec
from fastgen.schedule import Moves
from fastgen.types import Cache

STAGING = 2**28  # bytes of the ring and of the buffer for what comes back, each
LAYERS = 8  # of a group, at most
ALIGN = 2**21  # of host memory, bytes: huge pages are registered faster


def page_bytes(spec: Spec, page: int, width: int) -> int:
    """Of a page in all layers, keys and values; `width` bytes an element."""
    return 2 * spec.layers * page * spec.kv_heads * spec.head * width


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(position, number, length) of each row of numbers that rise by one."""
    steps = count()
    for _, row in groupby(enumerate(numbers), key=lambda pair: pair[1] - next(steps)):
        (at, first), *more = row
        yield at, first, 1 + len(more)


def pinned(size: int) -> tuple[Tensor, mmap.mmap]:
    """`size` bytes that the GPU copies to and from directly, made by all cores, and what keeps them."""
    memory = mmap.mmap(-1, -(-size // ALIGN) * ALIGN)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    part = max(ALIGN, len(whole) // 64 // ALIGN * ALIGN)

    def touch(x: Tensor) -> None:  # the first write to memory is what takes time
        x[:: mmap.PAGESIZE] = 0

    with ThreadPoolExecutor() as pool:
        list(pool.map(touch, whole.split(part)))
    if torch.cuda.is_available():
        driver: Any = torch.cuda.cudart()
        status = driver.cudaHostRegister(whole.data_ptr(), len(whole), 0)
        if int(status):
            raise MemoryError(f"the GPU's driver refused {len(whole) / 1e9:.1f} GB of pinned memory: {status}")
    return whole[:size], memory


class Mover:
    """Carries out the moves of each step for one engine."""

    def __init__(self, spec: Spec, page: int, dtype: torch.dtype, device: torch.device, host_pages: int) -> None:
        self.spec, self.page, self.device, self.host_pages = spec, page, device, host_pages
        self.cuda = device.type == "cuda"
        self.elements = page * spec.kv_heads * spec.head  # of a page in one leaf
        self.together = max(n for n in range(1, LAYERS + 1) if spec.layers % n == 0)  # layers of a group
        self.groups = spec.layers // self.together
        self.seconds = 0.0  # that it took to make the host's pages
        self.host: tuple[Tensor, ...] = ()  # [pages, leaves, elements] of each group; leaves as in `attach`
        self._memory: mmap.mmap | None = None
        if host_pages:
            start = time.perf_counter()
            size = (host_pages + 1) * page_bytes(spec, page, dtype.itemsize)
            whole, self._memory = pinned(size)
            self.host = tuple(whole.view(dtype).view(self.groups, host_pages + 1, 2 * self.together, self.elements))
            self.seconds = time.perf_counter() - start
        if self.cuda:
            leaves = 2 * self.together
            self.slots = max(1, STAGING // (leaves * self.elements * dtype.itemsize))  # pages of a group in a buffer
            shape = (self.slots if host_pages else 0, leaves, self.elements)
            self._ring, self._inbox = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
            self._at = 0  # where the ring goes on
            self._taken: list[tuple[int, int, Any]] = []  # its parts that are still read
            self._gather, self._out, self._in = (torch.cuda.Stream(device) for _ in range(3))
            self._early: torch.cuda.Event | None = None  # what the next step has to wait for
            self._busy: dict[int, Any] = {}  # pages of the host that were written or read last by this

    def attach(self, cache: Cache) -> None:
        """Say where the cache is."""
        self.leaves = tuple(zip(cache.k, cache.v, strict=True))
        flat = [leaf for pair in self.leaves for leaf in pair]
        n = 2 * self.together
        self._of = [flat[i : i + n] for i in range(0, len(flat), n)]  # leaves of each group
        if self.cuda:
            self._words = self.elements * cache.k[0].itemsize // 8
            self._slot = n * self._words  # words of a slot of the buffers
            if self.elements * cache.k[0].itemsize % 8:
                raise ValueError("a page must be a multiple of 8 bytes: raise pages.page_size")
            self._table = torch.tensor([x.data_ptr() for x in flat], dtype=torch.int64, device=self.device)
            self._buffers = {
                name: torch.tensor([x.data_ptr() + 8 * self._words * i for i in range(n)], device=self.device)
                for name, x in (("ring", self._ring), ("inbox", self._inbox))
            }

    @property
    def bytes(self) -> int:
        """Of the device's memory."""
        return self._ring.nbytes + self._inbox.nbytes if self.cuda else 0

    # --- moves ------------------------------------------------------------------------------------------------------

    def move(self, moves: Moves) -> list[torch.cuda.Event]:
        """Set the moves of a step going. Each group of layers must wait for its event, if there are any.

        Copies within the device are made on the current stream, which waits itself for what needs no layer's patience.
        """
        if not self.cuda:
            self._at_once(moves)
            return []
        compute = torch.cuda.current_stream(self.device)
        self._settle()
        gathered = self._page_out(moves.out, compute) if moves.out else []
        if moves.copies:
            if gathered:
                compute.wait_event(gathered[-1])  # they are in order
            self._kernel(self._table, self._table, list(zip(*moves.copies, strict=True)), self._words, self._words)
        arrived = self._page_in(moves.back, compute, gathered) if moves.back else []
        if arrived and not moves.early:
            return arrived
        if arrived:
            self._early = arrived[-1]
        if gathered and len(moves.out) * self.groups <= self.slots:  # the ring takes all at once
            compute.wait_event(gathered[-1])
            return []
        return gathered

    def _settle(self) -> None:
        """The current stream waits for what the step before did not."""
        if self.cuda and self._early is not None:
            torch.cuda.current_stream(self.device).wait_event(self._early)
            self._early = None

    def _at_once(self, moves: Moves) -> None:
        for group, leaves in enumerate(self._of):
            for i, leaf in enumerate(leaves):
                paged = leaf.view(-1, self.elements)
                if moves.out:
                    source, target = map(list, zip(*moves.out, strict=True))
                    self.host[group][target, i] = paged[source]
                if moves.copies:
                    source, target = map(list, zip(*moves.copies, strict=True))
                    paged[target] = paged[source]
                if moves.back:
                    source, target = map(list, zip(*moves.back, strict=True))
                    paged[target] = self.host[group][source, i]

    def _index(self, pairs: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(pairs, dtype=torch.int64, device="cpu").pin_memory().to(self.device, non_blocking=True)

    def _kernel(self, source: Tensor, target: Tensor, pairs: Sequence[Sequence[int]] | Tensor, *strides: int) -> None:
        from fastgen.ops.moves import move  # Triton comes with the GPU builds of torch, and not with others

        index = pairs if isinstance(pairs, Tensor) else self._index(pairs)
        move(source, target, index, self._words, *strides)

    def _leaves(self, group: int) -> Tensor:
        """Addresses of a group's leaves."""
        n = 2 * self.together
        return self._table[group * n : group * n + n]

    def _await(self, stream: torch.cuda.Stream, hosts: Sequence[int]) -> None:
        """Let a stream wait for whatever else reads or writes these pages of the host."""
        for event in {self._busy[h] for h in hosts if h in self._busy}:
            stream.wait_event(event)

    def _room(self, size: int) -> int:
        """A part of the ring; the gathering stream waits until it has been read."""
        if self._at + size > self.slots:
            self._at = 0
        first, self._at = self._at, self._at + size
        still = []
        for begin, end, event in self._taken:
            if begin < self._at and first < end:
                self._gather.wait_event(event)
            elif not event.query():
                still.append((begin, end, event))
        self._taken = still
        return first

    def _page_out(self, out: Sequence[tuple[int, int]], compute: torch.cuda.Stream) -> list[torch.cuda.Event]:
        out = sorted(out, key=lambda pair: pair[1])
        hosts = [host for _, host in out]
        self._gather.wait_stream(compute)
        self._await(self._out, hosts)
        events = []
        with torch.cuda.stream(self._gather):
            pages = self._index(([page for page, _ in out], list(range(len(out)))))
        for group in range(self.groups):
            for first in range(0, len(out), self.slots):
                part = hosts[first : first + self.slots]
                at = self._room(len(part))
                with torch.cuda.stream(self._gather):
                    index = torch.stack((pages[0, first : first + len(part)], pages[1, : len(part)] + at))
                    self._kernel(self._leaves(group), self._buffers["ring"], index, self._words, self._slot)
                    gathered = self._gather.record_event()
                self._out.wait_event(gathered)
                with torch.cuda.stream(self._out):
                    for i, host, n in runs(part):
                        self.host[group][host : host + n].copy_(self._ring[at + i : at + i + n], non_blocking=True)
                    self._taken.append((at, at + len(part), self._out.record_event()))
            events.append(gathered)
        done = self._out.record_event()
        self._busy |= dict.fromkeys(hosts, done)
        return events

    def _page_in(
        self, back: Sequence[tuple[int, int]], compute: torch.cuda.Stream, gathered: list[torch.cuda.Event]
    ) -> list[torch.cuda.Event]:
        back = sorted(back)
        hosts = [host for host, _ in back]
        self._in.wait_stream(compute)  # the pages may have been somebody else's until now
        self._await(self._in, hosts)
        events = []
        with torch.cuda.stream(self._in):
            pages = self._index((list(range(len(back))), [page for _, page in back]))
            for group in range(self.groups):
                if gathered:
                    self._in.wait_event(gathered[group])
                for first in range(0, len(back), self.slots):
                    part = hosts[first : first + self.slots]
                    for i, host, n in runs(part):
                        self._inbox[i : i + n].copy_(self.host[group][host : host + n], non_blocking=True)
                    index = torch.stack((pages[0, : len(part)], pages[1, first : first + len(part)]))
                    self._kernel(self._buffers["inbox"], self._leaves(group), index, self._slot, self._words)
                events.append(self._in.record_event())
        self._busy |= dict.fromkeys(hosts, events[-1])
        return events

    # --- values -----------------------------------------------------------------------------------------------------

    def read(self, pages: Sequence[int], tokens: int) -> Tensor:
        """Keys and values of the first `tokens` tokens in `pages`, on the host: [layers, 2, tokens, kv heads, head]."""
        self._settle()
        index = torch.tensor(pages, device=self.device)
        layers = [torch.stack([x.view(-1, self.elements)[index] for x in pair]) for pair in self.leaves]
        return torch.stack(layers).view(len(layers), 2, -1, *self.leaves[0][0].shape[1:])[:, :, :tokens].cpu()

    def write(self, pages: Sequence[int], values: Tensor) -> None:
        """The reverse of `read`, for whole pages; nothing is written where a page is 0."""
        pages_ = torch.tensor(pages, device="cpu")
        wanted = pages_.nonzero()[:, 0]
        for pair, layer in zip(self.leaves, values, strict=True):
            for leaf, x in zip(pair, layer, strict=True):
                paged = x.reshape(len(pages), self.elements)[wanted]
                leaf.view(-1, self.elements).index_copy_(0, pages_[wanted].to(self.device), paged.to(leaf))

    def close(self) -> None:
        """Let go of the host's pages."""
        if self._memory is not None and self.cuda:
            torch.cuda.synchronize(self.device)
            driver: Any = torch.cuda.cudart()
            driver.cudaHostUnregister(self.host[0].data_ptr())
        self.host, self._memory = (), None
