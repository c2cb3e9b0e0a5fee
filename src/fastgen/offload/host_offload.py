"""HostOffload: copies KV cache pages between the device and pinned host memory, concurrently with the steps.

Keys and values of a chunk of layers lie side by side in a host page, so that a page, or several consecutive ones, is
one copy. Copies go through staging buffers on the device:

    to host      gather kernel -> staging ring -> host     the ring's slots are free when the copy is done
    to device    host -> staging -> scatter kernel         one layer chunk at a time, an event after each

A step waits for the pages that it reads layer chunk by layer chunk; prefetched pages arrive while it computes.
"""

import mmap
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, groupby
from typing import Any

import torch
from jaxtyping import Int, Shaped, UInt8
from torch import Tensor

from fastgen.core.prefix_cache import PageCopies, PagePairs
from fastgen.core.runner import PageCopier
from fastgen.core.types import KVCache
from fastgen.quantization.kv_cache import RowFormat, pages_to_rows, rows_to_pages

STAGING_BYTES = 2**28  # of each of the two staging buffers
MAX_LAYERS_PER_CHUNK = 8
HOST_ALIGNMENT = 2**21  # bytes of a huge page, which the driver registers faster


def page_bytes(num_layers: int, page_size: int, rows: RowFormat) -> int:
    """Returns the bytes of a page's keys and values in all layers."""
    return 2 * num_layers * page_size * rows.num_bytes


def consecutive_runs(numbers: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yields (index, first number, length) of each run of numbers that increase by one."""
    i = count()
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - next(i)):
        (index, first), *others = run
        yield index, first, 1 + len(others)


def alloc_pinned(num_bytes: int) -> tuple[UInt8[Tensor, " bytes"], mmap.mmap]:
    """Allocates pinned host memory with all cores; returns it with the mapping that keeps it alive.

    Raises MemoryError if the driver refuses to pin the memory.
    """
    mapping = mmap.mmap(-1, -(-num_bytes // HOST_ALIGNMENT) * HOST_ALIGNMENT)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    chunk_size = max(HOST_ALIGNMENT, len(memory) // 64 // HOST_ALIGNMENT * HOST_ALIGNMENT)

    def fault_in(chunk: Tensor) -> None:  # the first write to memory is what takes time
        chunk[:: mmap.PAGESIZE] = 0

    with ThreadPoolExecutor() as pool:
        list(pool.map(fault_in, memory.split(chunk_size)))
    if torch.cuda.is_available():
        driver: Any = torch.cuda.cudart()
        status = driver.cudaHostRegister(memory.data_ptr(), len(memory), 0)
        if int(status):
            raise MemoryError(f"the GPU's driver refused {len(memory) / 1e9:.1f} GB of pinned memory: {status}")
    return memory[:num_bytes], mapping


class HostOffload(PageCopier):
    """Copies the pages of one engine's KV cache: within the device, to host pages and back."""

    def __init__(
        self, num_layers: int, page_size: int, rows: RowFormat, device: torch.device, num_host_pages: int
    ) -> None:
        self.page_size, self.num_host_pages, self.rows, dtype = page_size, num_host_pages, rows, rows.dtype
        self.device, self.cuda = device, device.type == "cuda"
        self.elements_per_page = page_size * rows.shape[0] * rows.shape[1]  # of one tensor
        layers_per_chunk = max(n for n in range(1, MAX_LAYERS_PER_CHUNK + 1) if num_layers % n == 0)
        self.num_layer_chunks, self.tensors_per_chunk = num_layers // layers_per_chunk, 2 * layers_per_chunk
        self.alloc_seconds, self._prefetch_event = 0.0, None  # the next step waits for the event
        # Of each layer chunk [pages, tensors, elements]; tensors are k, v of the first layer, k, v of the second, ….
        self.host_buffers: tuple[Shaped[Tensor, "pages tensors elements"], ...] = ()
        self._host_mapping: mmap.mmap | None = None
        if num_host_pages:
            start = time.perf_counter()
            size = (num_host_pages + 1) * page_bytes(num_layers, page_size, rows)
            memory, self._host_mapping = alloc_pinned(size)
            shape = self.num_layer_chunks, num_host_pages + 1, self.tensors_per_chunk, self.elements_per_page
            self.host_buffers = tuple(memory.view(dtype).view(shape))
            self.alloc_seconds = time.perf_counter() - start
        if self.cuda:
            slot_bytes = self.tensors_per_chunk * self.elements_per_page * dtype.itemsize
            self.num_staging_pages = max(1, STAGING_BYTES // slot_bytes)
            shape = self.num_staging_pages if num_host_pages else 0, self.tensors_per_chunk, self.elements_per_page
            self._ring_buffer, self._fetch_buffer = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
            self._ring_position = 0  # slot after the last reserved one
            self._ring_in_use: list[tuple[int, int, Any]] = []  # (first slot, end, event after the copy)
            streams = (torch.cuda.Stream(device) for _ in range(3))
            self._gather_stream, self._to_host_stream, self._to_device_stream = streams
            self._host_page_events: dict[int, Any] = {}  # after the last copy to or from a host page

    def attach_cache(self, cache: KVCache) -> None:
        """Sets the cache whose pages are copied. Raises ValueError if a page is not a multiple of 8 bytes."""
        super().__init__(cache, self.page_size)
        tensors, n = [x for pair in self.pages for x in pair], self.tensors_per_chunk
        if self.cuda:
            size = tensors[0][0].nbytes  # of a page of one tensor
            if size % 8:
                raise ValueError("a page must be a multiple of 8 bytes: raise kv_cache.page_size")
            self._words_per_page, self._words_per_slot = size // 8, n * size // 8
            ptrs = [[x.data_ptr() for x in tensors]]  # device addresses
            ptrs += ([x.data_ptr() + size * i for i in range(n)] for x in (self._ring_buffer, self._fetch_buffer))
            self._tensor_ptrs, self._ring_ptrs, self._fetch_ptrs = (torch.tensor(x, device=self.device) for x in ptrs)
            self._chunk_ptrs = self._tensor_ptrs.split(n)

    @property
    def staging_bytes(self) -> int:
        """Bytes of device memory in the staging buffers."""
        return self._ring_buffer.nbytes + self._fetch_buffer.nbytes if self.cuda else 0

    # --- copies of a step -------------------------------------------------------------------------------------------

    def start_copies(self, copies: PageCopies) -> list[torch.cuda.Event]:
        """Starts a step's copies. Returns an event per layer chunk that its layers must wait for, or an empty list.

        Copies within the device run on the current stream. The current stream itself waits where waiting once, for all
        layers, costs little.
        """
        if not self.cuda:
            self._copy_synchronously(copies)
            return []
        compute_stream = torch.cuda.current_stream(self.device)
        self._wait_for_prefetch()
        gathered = self._copy_to_host(copies.to_host) if copies.to_host else []
        if copies.on_device:
            if gathered:
                compute_stream.wait_event(gathered[-1])  # the last chunk is gathered last
            pairs, stride = self._page_index_tensor(list(zip(*copies.on_device, strict=True))), self._words_per_page
            self._launch_copy(self._tensor_ptrs, self._tensor_ptrs, pairs, stride, stride)
        arrived = self._copy_to_device(copies.to_device, gathered) if copies.to_device else []
        if arrived and not copies.prefetch:
            return arrived
        if arrived:
            self._prefetch_event = arrived[-1]
        if gathered and len(copies.to_host) * self.num_layer_chunks <= self.num_staging_pages:  # all fit the ring
            compute_stream.wait_event(gathered[-1])
            return []
        return gathered

    def _wait_for_prefetch(self) -> None:
        """Makes the current stream wait for the pages that were prefetched during the previous step."""
        if self._prefetch_event is not None:
            torch.cuda.current_stream(self.device).wait_event(self._prefetch_event)
            self._prefetch_event = None

    def _copy_synchronously(self, copies: PageCopies) -> None:
        cache = [x.flatten(1) for pair in self.pages for x in pair]
        host = [x for buffer in self.host_buffers for x in buffer.unbind(1)]
        for pairs, sources, targets in (
            (copies.to_host, cache, host), (copies.on_device, cache, cache), (copies.to_device, host, cache)
        ):  # fmt: skip
            if pairs:
                source, target = map(list, zip(*pairs, strict=True))
                for x, y in zip(sources, targets, strict=True):
                    y[target] = x[source]

    def _page_index_tensor(self, rows: Sequence[Sequence[int]]) -> Int[Tensor, "2 pairs"]:
        return torch.tensor(rows, dtype=torch.int64, device="cpu").pin_memory().to(self.device, non_blocking=True)

    def _launch_copy(self, source_ptrs: Tensor, target_ptrs: Tensor, page_pairs: Tensor, *strides: int) -> None:
        from fastgen.kernels.page_copy import copy_pages  # Triton comes with the GPU builds of torch alone

        copy_pages(source_ptrs, target_ptrs, page_pairs, self._words_per_page, *strides)

    def _wait_for_host_pages(self, stream: torch.cuda.Stream, host_pages: Sequence[int]) -> None:
        """Makes a stream wait for earlier copies to and from these host pages."""
        for event in {self._host_page_events[h] for h in host_pages if h in self._host_page_events}:
            stream.wait_event(event)

    def _reserve_ring_slots(self, num_pages: int) -> int:
        """Returns the first of consecutive ring slots; the gather stream waits until their last copy is done."""
        if self._ring_position + num_pages > self.num_staging_pages:
            self._ring_position = 0
        first, self._ring_position = self._ring_position, self._ring_position + num_pages
        in_use = []
        for start, end, event in self._ring_in_use:
            if start < self._ring_position and first < end:
                self._gather_stream.wait_event(event)
            elif not event.query():
                in_use.append((start, end, event))
        self._ring_in_use = in_use
        return first

    def _copy_to_host(self, to_host: PagePairs) -> list[torch.cuda.Event]:
        """Starts copies of (page, host page) pairs. Returns an event per layer chunk: after it, pages may change."""
        pages, host_pages = zip(*sorted(to_host, key=lambda pair: pair[1]), strict=True)
        gathered_events = []
        self._gather_stream.wait_stream(torch.cuda.current_stream(self.device))
        self._wait_for_host_pages(self._to_host_stream, host_pages)
        with torch.cuda.stream(self._gather_stream):
            index = self._page_index_tensor((pages, range(len(pages))))
        for chunk, source_ptrs in enumerate(self._chunk_ptrs):
            for first in range(0, len(pages), self.num_staging_pages):
                hosts = host_pages[first : first + self.num_staging_pages]
                slot, n = self._reserve_ring_slots(len(hosts)), len(hosts)
                with torch.cuda.stream(self._gather_stream):
                    pairs = torch.stack((index[0, first : first + n], index[1, :n] + slot))
                    self._launch_copy(source_ptrs, self._ring_ptrs, pairs, self._words_per_page, self._words_per_slot)
                    gathered = self._gather_stream.record_event()
                self._to_host_stream.wait_event(gathered)
                with torch.cuda.stream(self._to_host_stream):
                    for i, host, length in consecutive_runs(hosts):
                        source = self._ring_buffer[slot + i : slot + i + length]
                        self.host_buffers[chunk][host : host + length].copy_(source, non_blocking=True)
                    self._ring_in_use.append((slot, slot + n, self._to_host_stream.record_event()))
            gathered_events.append(gathered)
        self._host_page_events |= dict.fromkeys(host_pages, self._to_host_stream.record_event())
        return gathered_events

    def _copy_to_device(self, to_device: PagePairs, gathered_events: list[torch.cuda.Event]) -> list[torch.cuda.Event]:
        """Starts copies of (host page, page) pairs. Returns an event per layer chunk: after it, pages are valid."""
        host_pages, pages = zip(*sorted(to_device), strict=True)
        arrived_events = []
        # Until now, other sequences may have used the pages.
        self._to_device_stream.wait_stream(torch.cuda.current_stream(self.device))
        self._wait_for_host_pages(self._to_device_stream, host_pages)
        with torch.cuda.stream(self._to_device_stream):
            index = self._page_index_tensor((range(len(pages)), pages))
            for chunk, target_ptrs in enumerate(self._chunk_ptrs):
                if gathered_events:
                    self._to_device_stream.wait_event(gathered_events[chunk])
                for first in range(0, len(pages), self.num_staging_pages):
                    hosts = host_pages[first : first + self.num_staging_pages]
                    for i, host, length in consecutive_runs(hosts):
                        source = self.host_buffers[chunk][host : host + length]
                        self._fetch_buffer[i : i + length].copy_(source, non_blocking=True)
                    pairs = torch.stack((index[0, : len(hosts)], index[1, first : first + len(hosts)]))
                    self._launch_copy(self._fetch_ptrs, target_ptrs, pairs, self._words_per_slot, self._words_per_page)
                arrived_events.append(self._to_device_stream.record_event())
        self._host_page_events |= dict.fromkeys(host_pages, arrived_events[-1])
        return arrived_events

    # --- snapshots --------------------------------------------------------------------------------------------------

    def read_pages(self, pages: Sequence[int], num_tokens: int) -> Shaped[Tensor, "layers 2 tokens K H"]:
        """Returns keys and values of the first `num_tokens` tokens in these pages on the host; rows if quantized."""
        self._wait_for_prefetch()
        values = super().read_pages(pages, len(pages) * self.page_size)
        if self.rows.dtype == torch.uint8:
            values = pages_to_rows(self.rows.heads, self.page_size, values)
        return values[:, :, :num_tokens]

    def write_pages(self, pages: Sequence[int], values: Shaped[Tensor, "layers 2 tokens K H"]) -> None:
        """Writes full pages of keys and values, rows if quantized; skips those whose page number is 0."""
        if self.rows.dtype == torch.uint8:
            values = rows_to_pages(self.rows.heads, self.page_size, values)
        super().write_pages(pages, values)

    def close(self) -> None:
        """Releases the host pages."""
        super().close()
        if self._host_mapping is not None and self.cuda:
            torch.cuda.synchronize(self.device)
            driver: Any = torch.cuda.cudart()
            driver.cudaHostUnregister(self.host_buffers[0].data_ptr())
        self.host_buffers, self._host_mapping = (), None
