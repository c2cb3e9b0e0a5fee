"""Memory that is released and reacquired at the same address, so that captured graphs stay valid.

On a GPU an address is reserved once and physical memory is mapped to it by the driver's virtual memory management
(CUDA driver API, section 6.14). Released memory is the driver's: torch's allocator, in this process or another, can
take it. On a CPU it is a torch storage, resized to nothing and back.
"""

import ctypes
import os
import weakref
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastgen.checkpoint import weights
from fastgen.config import check_choice


class _MemLocation(ctypes.Structure):
    """Mirrors CUmemLocation: a device."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _MemAllocationProp(ctypes.Structure):
    """Mirrors CUmemAllocationProp: pinned memory of a device, without handles for others."""

    _fields_ = (
        ("type", ctypes.c_int), ("handles", ctypes.c_int), ("location", _MemLocation), ("win32", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )  # fmt: skip


class _MemAccessDesc(ctypes.Structure):
    """Mirrors CUmemAccessDesc: read and write."""

    _fields_ = (("location", _MemLocation), ("flags", ctypes.c_int))


def _driver_call(name: str, *args: Any) -> None:
    status = getattr(ctypes.CDLL("libcuda.so.1"), name)(*args)
    if status == 2:
        raise torch.OutOfMemoryError(f"the GPU driver does not have enough memory left ({name})")
    if status:
        raise RuntimeError(f"the GPU's driver refused {name}: error {status}")


class _MappedMemory:
    """GPU memory mapped to a reserved address; torch makes a tensor of it by `__cuda_array_interface__`."""

    def __init__(self, nbytes: int, device: int) -> None:
        self._allocation_prop = _MemAllocationProp(type=1, location=_MemLocation(1, device))
        # Peers have access too, or copies from them would be refused.
        peers = [i for i in range(torch.cuda.device_count()) if torch.cuda.can_device_access_peer(i, device)]
        access = [_MemAccessDesc(_MemLocation(1, i), 3) for i in (device, *peers)]
        self._access_descs = (_MemAccessDesc * len(access))(*access)
        granularity, zero = ctypes.c_size_t(), ctypes.c_uint64(0)
        _driver_call("cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(self._allocation_prop), 0)
        self._size = ctypes.c_size_t(-(-nbytes // granularity.value) * granularity.value)
        self._pid, self._mapped = os.getpid(), False
        self._address, self._handle = ctypes.c_uint64(), ctypes.c_uint64()
        _driver_call("cuMemAddressReserve", ctypes.byref(self._address), self._size, ctypes.c_size_t(0), zero, zero)
        self.map_memory()
        weakref.finalize(self, _free, self.__dict__).atexit = False
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (self._address.value, False), "version": 3,
        }  # fmt: skip

    def map_memory(self) -> None:
        none, num_descs = ctypes.c_uint64(0), ctypes.c_size_t(len(self._access_descs))
        _driver_call("cuMemCreate", ctypes.byref(self._handle), self._size, ctypes.byref(self._allocation_prop), none)
        _driver_call("cuMemMap", self._address, self._size, ctypes.c_size_t(0), self._handle, none)
        _driver_call("cuMemSetAccess", self._address, self._size, self._access_descs, num_descs)
        self._mapped = True

    def unmap_memory(self) -> None:
        _driver_call("cuMemUnmap", self._address, self._size)
        _driver_call("cuMemRelease", self._handle)
        self._mapped = False


def _free(state: dict[str, Any]) -> None:
    """Frees memory and address, from the attributes of a `_MappedMemory` that is gone."""
    if state["_pid"] != os.getpid():  # it belongs to the process that a fork came from
        return
    torch.cuda.synchronize()
    if state["_mapped"]:
        _driver_call("cuMemUnmap", state["_address"], state["_size"])
        _driver_call("cuMemRelease", state["_handle"])
    _driver_call("cuMemAddressFree", state["_address"], state["_size"])


class ReleasableMemory:
    """Memory for tensors on one device, released and reacquired in one piece; the tensors stay, at their addresses.

    Their values are lost unless `release` keeps them. Reading or writing them meanwhile causes a device fault.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.device, self.nbytes, self.resident, self._allocated_bytes = device, nbytes, True, 0
        self._host_copy: Tensor | None = None
        self._mapping: _MappedMemory | None = None
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            torch.cuda.init()
            with torch.cuda.device(index):
                torch.empty(1, device=device)  # the driver needs a context
                self._mapping = _MappedMemory(max(1, nbytes), index)
            self._buffer = torch.as_tensor(self._mapping, device=device)
        else:
            self._buffer = torch.empty(max(1, nbytes), dtype=torch.uint8, device=device)
        self._buffer.zero_()

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Returns a tensor of zeros in the memory that is left. Raises ValueError if that is too little."""
        first, size = self._allocated_bytes, prod(shape) * dtype.itemsize
        self._allocated_bytes += weights.align(size)
        if self._allocated_bytes > self.nbytes:
            raise ValueError(f"a region of {self.nbytes} bytes has fewer than {size} bytes left")
        return self._buffer[first : first + size].view(dtype).view(*shape)

    @property
    def releasable(self) -> bool:
        """Whether the memory can be released: a NumPy array that shares a CPU's memory keeps it allocated."""
        return self._mapping is not None or self._buffer.untyped_storage().resizable()

    def release(self, *, keep_contents: bool = False) -> None:
        """Unmaps the memory. `keep_contents` copies what is in it to the host; `reacquire` copies it back."""
        if not self.resident:
            return
        self._host_copy = self._buffer.to("cpu", copy=True) if keep_contents else None
        if self._mapping is None:
            self._buffer.untyped_storage().resize_(0)
        else:
            torch.cuda.synchronize(self.device)
            self._mapping.unmap_memory()
        self.resident = False

    def reacquire(self) -> None:
        """Maps the memory again, zeros unless its contents were kept. Nothing is lost if it raises OutOfMemoryError."""
        if self.resident:
            return
        if self._mapping is None:
            self._buffer.untyped_storage().resize_(max(1, self.nbytes))
        else:
            try:
                self._mapping.map_memory()
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()  # torch may cache memory that it does not use
                self._mapping.map_memory()
        if self._host_copy is None:
            self._buffer.zero_()
        else:
            self._buffer.copy_(self._host_copy)
        self.resident, self._host_copy = True, None


class EngineMemory:
    """The memory that one engine can release, by what it holds: "cache", and "params" if the engine loaded them."""

    def __init__(self) -> None:
        self.regions: dict[str, ReleasableMemory] = {}

    def allocate(self, name: str, device: torch.device, nbytes: int) -> ReleasableMemory:
        """Allocates the bytes of "cache" or "params" on a device."""
        self.regions[name] = ReleasableMemory(nbytes, device)
        return self.regions[name]

    @property
    def resident(self) -> bool:
        """Whether none of the memory is released."""
        return all(r.resident for r in self.regions.values())

    def require(self, *names: str) -> None:
        """Raises ValueError if one of these regions is released."""
        if released := [name for name in names if name in self.regions and not self.regions[name].resident]:
            raise ValueError(f"the memory of {' and '.join(released)} was given back: call wake_up() first")

    def select(self, memory: str) -> dict[str, ReleasableMemory]:
        """Returns the regions to release for "cache", "params" or "all". Raises ValueError if they cannot be."""
        check_choice("memory", memory, ["cache", "params", "all"])
        if memory == "params" and "params" not in self.regions:
            raise ValueError("sleep: these parameters were given to the engine, and belong to the caller")
        regions = {name: r for name, r in self.regions.items() if memory in (name, "all") and r.resident}
        if not all(r.releasable for r in regions.values()):
            problem = "a NumPy array shares this memory (`x.numpy()`) and keeps it allocated: use `x.clone().numpy()`"
            raise ValueError(f"sleep: {problem}")
        return regions

    def release(self, memory: str) -> int:
        """Releases what `select` returns, and keeps the parameters in the host's memory. Returns the bytes."""
        regions = self.select(memory)
        for name, region in regions.items():
            region.release(keep_contents=name == "params")
        return sum(r.nbytes for r in regions.values())

    def reacquire(self, all_reduce_min: Callable[[int], int]) -> tuple[int, torch.OutOfMemoryError | None]:
        """Reacquires all released memory of all ranks, or of none. Returns the bytes, and the error if it failed."""
        released, error = {name: r for name, r in self.regions.items() if not r.resident}, None
        try:
            for region in released.values():
                region.reacquire()
        except torch.OutOfMemoryError as e:
            error = e
        if not all_reduce_min(int(error is None)):
            error = error or torch.OutOfMemoryError("wake_up: another rank's device does not have enough memory left")
            for name, region in released.items():
                region.release(keep_contents=name == "params")
        return sum(r.nbytes for r in released.values()), error
