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

from fastgen.core.model_config import ModelConfig
from fastgen.core.prefix_cache import PageCopies
from fastgen.core.types import KVCache

STAGING_BYTES = 2**28  # bytes of the ring and of the buffer for what comes back, each
MAX_LAYERS_PER_CHUNK = 8  # of a group, at most
HOST_ALIGNMENT = 2**21  # of host memory, bytes: huge pages are registered faster


def page_bytes(model_config: ModelConfig, page_size: int, itemsize: int) -> int:
    """Of a page in all layers, keys and values; `width` bytes an element."""
    return 2 * model_config.num_layers * page_size * model_config.num_kv_heads * model_config.head_dim * itemsize


def consecutive_runs(numbers: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(position, number, length) of each row of numbers that rise by one."""
    steps = count()
    for _, row in groupby(enumerate(numbers), key=lambda pair: pair[1] - next(steps)):
        (at, first), *more = row
        yield at, first, 1 + len(more)


def alloc_pinned(num_bytes: int) -> tuple[Tensor, mmap.mmap]:
    """`size` bytes that the GPU copies to and from directly, made by all cores, and what keeps them."""
    memory = mmap.mmap(-1, -(-num_bytes // HOST_ALIGNMENT) * HOST_ALIGNMENT)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    part = max(HOST_ALIGNMENT, len(whole) // 64 // HOST_ALIGNMENT * HOST_ALIGNMENT)

    def touch(x: Tensor) -> None:  # the first write to memory is what takes time
        x[:: mmap.PAGESIZE] = 0

    with ThreadPoolExecutor() as pool:
        list(pool.map(touch, whole.split(part)))
    if torch.cuda.is_available():
        driver: Any = torch.cuda.cudart()
        status = driver.cudaHostRegister(whole.data_ptr(), len(whole), 0)
        if int(status):
            raise MemoryError(f"the GPU's driver refused {len(whole) / 1e9:.1f} GB of pinned memory: {status}")
    return whole[:num_bytes], memory


class HostOffload:
    """Carries out the moves of each step for one engine."""

    def __init__(
        self, model_config: ModelConfig, page_size: int, dtype: torch.dtype, device: torch.device, num_host_pages: int
    ) -> None:
        self.model_config, self.page_size, self.device, self.num_host_pages = (
            model_config,
            page_size,
            device,
            num_host_pages,
        )
        self.cuda = device.type == "cuda"
        self.elements_per_page = page_size * model_config.num_kv_heads * model_config.head_dim  # of a page in one leaf
        self.layers_per_chunk = max(
            n for n in range(1, MAX_LAYERS_PER_CHUNK + 1) if model_config.num_layers % n == 0
        )  # layers of a group
        self.num_layer_chunks = model_config.num_layers // self.layers_per_chunk
        self.alloc_seconds = 0.0  # that it took to make the host's pages
        self.host_buffers: tuple[Tensor, ...] = ()  # [pages, leaves, elements] of each group; leaves as in `attach`
        self._host_memory: mmap.mmap | None = None
        if num_host_pages:
            start = time.perf_counter()
            size = (num_host_pages + 1) * page_bytes(model_config, page_size, dtype.itemsize)
            whole, self._host_memory = alloc_pinned(size)
            self.host_buffers = tuple(
                whole.view(dtype).view(
                    self.num_layer_chunks, num_host_pages + 1, 2 * self.layers_per_chunk, self.elements_per_page
                )
            )
            self.alloc_seconds = time.perf_counter() - start
        if self.cuda:
            leaves = 2 * self.layers_per_chunk
            self.num_staging_pages = max(
                1, STAGING_BYTES // (leaves * self.elements_per_page * dtype.itemsize)
            )  # pages of a group in a buffer
            shape = (self.num_staging_pages if num_host_pages else 0, leaves, self.elements_per_page)
            self._ring_buffer, self._fetch_buffer = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
            self._ring_position = 0  # where the ring goes on
            self._ring_in_use: list[tuple[int, int, Any]] = []  # its parts that are still read
            self._gather_stream, self._to_host_stream, self._to_device_stream = (
                torch.cuda.Stream(device) for _ in range(3)
            )
            self._prefetch_event: torch.cuda.Event | None = None  # what the next step has to wait for
            self._host_page_events: dict[int, Any] = {}  # pages of the host that were written or read last by this

    def attach_cache(self, cache: KVCache) -> None:
        """Say where the cache is."""
        self.kv_tensors = tuple(zip(cache.k, cache.v, strict=True))
        flat = [leaf for pair in self.kv_tensors for leaf in pair]
        n = 2 * self.layers_per_chunk
        self._chunk_tensors = [flat[i : i + n] for i in range(0, len(flat), n)]  # leaves of each group
        if self.cuda:
            self._words_per_page = self.elements_per_page * cache.k[0].itemsize // 8
            self._words_per_slot = n * self._words_per_page  # words of a slot of the buffers
            if self.elements_per_page * cache.k[0].itemsize % 8:
                raise ValueError("a page must be a multiple of 8 bytes: raise kv_cache.page_size")
            self._tensor_ptrs = torch.tensor([x.data_ptr() for x in flat], dtype=torch.int64, device=self.device)
            self._staging_ptrs = {
                name: torch.tensor([x.data_ptr() + 8 * self._words_per_page * i for i in range(n)], device=self.device)
                for name, x in (("ring", self._ring_buffer), ("inbox", self._fetch_buffer))
            }

    @property
    def staging_bytes(self) -> int:
        """Of the device's memory."""
        return self._ring_buffer.nbytes + self._fetch_buffer.nbytes if self.cuda else 0

    # --- moves ------------------------------------------------------------------------------------------------------

    def start_copies(self, copies: PageCopies) -> list[torch.cuda.Event]:
        """Set the moves of a step going. Each group of layers must wait for its event, if there are any.

        Copies within the device are made on the current stream, which waits itself for what needs no layer's patience.
        """
        if not self.cuda:
            self._copy_synchronously(copies)
            return []
        compute = torch.cuda.current_stream(self.device)
        self._wait_for_prefetch()
        gathered = self._copy_to_host(copies.to_host, compute) if copies.to_host else []
        if copies.on_device:
            if gathered:
                compute.wait_event(gathered[-1])  # they are in order
            self._launch_copy(
                self._tensor_ptrs,
                self._tensor_ptrs,
                list(zip(*copies.on_device, strict=True)),
                self._words_per_page,
                self._words_per_page,
            )
        arrived = self._copy_to_device(copies.to_device, compute, gathered) if copies.to_device else []
        if arrived and not copies.prefetch:
            return arrived
        if arrived:
            self._prefetch_event = arrived[-1]
        if (
            gathered and len(copies.to_host) * self.num_layer_chunks <= self.num_staging_pages
        ):  # the ring takes all at once
            compute.wait_event(gathered[-1])
            return []
        return gathered

    def _wait_for_prefetch(self) -> None:
        """The current stream waits for what the step before did not."""
        if self.cuda and self._prefetch_event is not None:
            torch.cuda.current_stream(self.device).wait_event(self._prefetch_event)
            self._prefetch_event = None

    def _copy_synchronously(self, copies: PageCopies) -> None:
        for group, leaves in enumerate(self._chunk_tensors):
            for i, leaf in enumerate(leaves):
                paged = leaf.view(-1, self.elements_per_page)
                if copies.to_host:
                    source, target = map(list, zip(*copies.to_host, strict=True))
                    self.host_buffers[group][target, i] = paged[source]
                if copies.on_device:
                    source, target = map(list, zip(*copies.on_device, strict=True))
                    paged[target] = paged[source]
                if copies.to_device:
                    source, target = map(list, zip(*copies.to_device, strict=True))
                    paged[target] = self.host_buffers[group][source, i]

    def _page_index_tensor(self, pairs: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(pairs, dtype=torch.int64, device="cpu").pin_memory().to(self.device, non_blocking=True)

    def _launch_copy(
        self, source: Tensor, target: Tensor, pairs: Sequence[Sequence[int]] | Tensor, *strides: int
    ) -> None:
        from fastgen.kernels.page_copy import (
            copy_pages,  # Triton comes with the GPU builds of torch, and not with others
        )

        index = pairs if isinstance(pairs, Tensor) else self._page_index_tensor(pairs)
        copy_pages(source, target, index, self._words_per_page, *strides)

    def _chunk_ptrs(self, layer_chunk: int) -> Tensor:
        """Addresses of a group's leaves."""
        n = 2 * self.layers_per_chunk
        return self._tensor_ptrs[layer_chunk * n : layer_chunk * n + n]

    def _wait_for_host_pages(self, stream: torch.cuda.Stream, host_pages: Sequence[int]) -> None:
        """Let a stream wait for whatever else reads or writes these pages of the host."""
        for event in {self._host_page_events[h] for h in host_pages if h in self._host_page_events}:
            stream.wait_event(event)

    def _reserve_ring_slots(self, num_pages: int) -> int:
        """A part of the ring; the gathering stream waits until it has been read."""
        if self._ring_position + num_pages > self.num_staging_pages:
            self._ring_position = 0
        first, self._ring_position = self._ring_position, self._ring_position + num_pages
        still = []
        for begin, end, event in self._ring_in_use:
            if begin < self._ring_position and first < end:
                self._gather_stream.wait_event(event)
            elif not event.query():
                still.append((begin, end, event))
        self._ring_in_use = still
        return first

    def _copy_to_host(
        self, to_host: Sequence[tuple[int, int]], compute_stream: torch.cuda.Stream
    ) -> list[torch.cuda.Event]:
        to_host = sorted(to_host, key=lambda pair: pair[1])
        hosts = [host for _, host in to_host]
        self._gather_stream.wait_stream(compute_stream)
        self._wait_for_host_pages(self._to_host_stream, hosts)
        events = []
        with torch.cuda.stream(self._gather_stream):
            pages = self._page_index_tensor(([page for page, _ in to_host], list(range(len(to_host)))))
        for group in range(self.num_layer_chunks):
            for first in range(0, len(to_host), self.num_staging_pages):
                part = hosts[first : first + self.num_staging_pages]
                at = self._reserve_ring_slots(len(part))
                with torch.cuda.stream(self._gather_stream):
                    index = torch.stack((pages[0, first : first + len(part)], pages[1, : len(part)] + at))
                    self._launch_copy(
                        self._chunk_ptrs(group),
                        self._staging_ptrs["ring"],
                        index,
                        self._words_per_page,
                        self._words_per_slot,
                    )
                    gathered = self._gather_stream.record_event()
                self._to_host_stream.wait_event(gathered)
                with torch.cuda.stream(self._to_host_stream):
                    for i, host, n in consecutive_runs(part):
                        self.host_buffers[group][host : host + n].copy_(
                            self._ring_buffer[at + i : at + i + n], non_blocking=True
                        )
                    self._ring_in_use.append((at, at + len(part), self._to_host_stream.record_event()))
            events.append(gathered)
        done = self._to_host_stream.record_event()
        self._host_page_events |= dict.fromkeys(hosts, done)
        return events

    def _copy_to_device(
        self,
        to_device: Sequence[tuple[int, int]],
        compute_stream: torch.cuda.Stream,
        gather_events: list[torch.cuda.Event],
    ) -> list[torch.cuda.Event]:
        to_device = sorted(to_device)
        hosts = [host for host, _ in to_device]
        self._to_device_stream.wait_stream(compute_stream)  # the pages may have been somebody else's until now
        self._wait_for_host_pages(self._to_device_stream, hosts)
        events = []
        with torch.cuda.stream(self._to_device_stream):
            pages = self._page_index_tensor((list(range(len(to_device))), [page for _, page in to_device]))
            for group in range(self.num_layer_chunks):
                if gather_events:
                    self._to_device_stream.wait_event(gather_events[group])
                for first in range(0, len(to_device), self.num_staging_pages):
                    part = hosts[first : first + self.num_staging_pages]
                    for i, host, n in consecutive_runs(part):
                        self._fetch_buffer[i : i + n].copy_(
                            self.host_buffers[group][host : host + n], non_blocking=True
                        )
                    index = torch.stack((pages[0, : len(part)], pages[1, first : first + len(part)]))
                    self._launch_copy(
                        self._staging_ptrs["inbox"],
                        self._chunk_ptrs(group),
                        index,
                        self._words_per_slot,
                        self._words_per_page,
                    )
                events.append(self._to_device_stream.record_event())
        self._host_page_events |= dict.fromkeys(hosts, events[-1])
        return events

    # --- values -----------------------------------------------------------------------------------------------------

    def read_pages(self, pages: Sequence[int], num_tokens: int) -> Tensor:
        """Keys and values of the first `tokens` tokens in `pages`, on the host: [layers, 2, tokens, kv heads, head]."""
        self._wait_for_prefetch()
        index = torch.tensor(pages, device=self.device)
        layers = [torch.stack([x.view(-1, self.elements_per_page)[index] for x in pair]) for pair in self.kv_tensors]
        return torch.stack(layers).view(len(layers), 2, -1, *self.kv_tensors[0][0].shape[1:])[:, :, :num_tokens].cpu()

    def write_pages(self, pages: Sequence[int], values: Tensor) -> None:
        """The reverse of `read`, for whole pages; nothing is written where a page is 0."""
        pages_ = torch.tensor(pages, device="cpu")
        wanted = pages_.nonzero()[:, 0]
        for pair, layer in zip(self.kv_tensors, values, strict=True):
            for leaf, x in zip(pair, layer, strict=True):
                paged = x.reshape(len(pages), self.elements_per_page)[wanted]
                leaf.view(-1, self.elements_per_page).index_copy_(0, pages_[wanted].to(self.device), paged.to(leaf))

    def close(self) -> None:
        """Let go of the host's pages."""
        if self._host_memory is not None and self.cuda:
            torch.cuda.synchronize(self.device)
            driver: Any = torch.cuda.cudart()
            driver.cudaHostUnregister(self.host_buffers[0].data_ptr())
        self.host_buffers, self._host_memory = (), None
