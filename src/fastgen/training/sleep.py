"""Memory that can be given back and taken again at the same address, so that captured graphs stay true.

On a GPU an address is reserved once and physical memory is mapped to it by the driver's virtual memory management
(CUDA driver API, section 6.14). What is given back is the driver's: torch's allocator, in this process or another,
can have it. On a CPU it is a storage of torch, emptied and filled.
"""

import ctypes
import os
import weakref
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

ALIGNMENT_BYTES = 512  # bytes; of each tensor


class _MemLocation(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _MemAllocationProp(ctypes.Structure):
    """CUmemAllocationProp: pinned memory of a device, without handles for others."""

    _fields_ = (
        ("type", ctypes.c_int), ("handles", ctypes.c_int), ("place", _MemLocation), ("win32", ctypes.c_void_p),
        ("compression", ctypes.c_ubyte), ("rdma", ctypes.c_ubyte), ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )  # fmt: skip


class _MemAccessDesc(ctypes.Structure):
    """CUmemAccessDesc: read and write."""

    _fields_ = (("place", _MemLocation), ("flags", ctypes.c_int))


def _driver_call(name: str, *args: Any) -> None:
    status = getattr(ctypes.CDLL("libcuda.so.1"), name)(*args)
    if status == 2:
        raise torch.OutOfMemoryError(f"the GPU's driver has not enough memory left ({name})")
    if status:
        raise RuntimeError(f"the GPU's driver refused {name}: error {status}")


class _MappedMemory:
    """Bytes of a GPU behind a reserved address; `__cuda_array_interface__` makes a tensor of them."""

    def __init__(self, nbytes: int, device: int) -> None:
        place = _MemLocation(1, device)
        self._allocation_prop = _MemAllocationProp(type=1, place=place)
        # Other devices, too, or copies from them would be refused.
        peers = [i for i in range(torch.cuda.device_count()) if torch.cuda.can_device_access_peer(i, device)]
        self._access_descs = (_MemAccessDesc * (1 + len(peers)))(
            *(_MemAccessDesc(_MemLocation(1, i), 3) for i in (device, *peers))
        )
        grain = ctypes.c_size_t()
        _driver_call("cuMemGetAllocationGranularity", ctypes.byref(grain), ctypes.byref(self._allocation_prop), 0)
        self.nbytes = -(-nbytes // grain.value) * grain.value
        self._pid = os.getpid()
        self._address, self._handle = ctypes.c_uint64(), ctypes.c_uint64()
        zero = ctypes.c_uint64(0)
        _driver_call(
            "cuMemAddressReserve",
            ctypes.byref(self._address),
            ctypes.c_size_t(self.nbytes),
            ctypes.c_size_t(0),
            zero,
            zero,
        )
        self.mapped = False
        self.map_memory()
        weakref.finalize(self, _MappedMemory._free, self._address, self.nbytes, self.__dict__).atexit = False
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (self._address.value, False), "version": 3,
        }  # fmt: skip

    def map_memory(self) -> None:
        size, none = ctypes.c_size_t(self.nbytes), ctypes.c_uint64(0)
        _driver_call("cuMemCreate", ctypes.byref(self._handle), size, ctypes.byref(self._allocation_prop), none)
        _driver_call("cuMemMap", self._address, size, ctypes.c_size_t(0), self._handle, none)
        _driver_call(
            "cuMemSetAccess", self._address, size, self._access_descs, ctypes.c_size_t(len(self._access_descs))
        )
        self.mapped = True

    def unmap_memory(self) -> None:
        _unmap_and_release(self._address, self.nbytes, self._handle)
        self.mapped = False

    @staticmethod
    def _free(address: ctypes.c_uint64, nbytes: int, state: dict[str, Any]) -> None:
        if state["_pid"] != os.getpid():  # a fork has no part in it
            return
        torch.cuda.synchronize()
        if state["mapped"]:
            _unmap_and_release(address, nbytes, state["_handle"])
        _driver_call("cuMemAddressFree", address, ctypes.c_size_t(nbytes))


def _unmap_and_release(address: ctypes.c_uint64, nbytes: int, handle: ctypes.c_uint64) -> None:
    _driver_call("cuMemUnmap", address, ctypes.c_size_t(nbytes))
    _driver_call("cuMemRelease", handle)


class ReleasableMemory:
    """Room for tensors on one device, given back and taken again as a whole; the tensors stay, at their addresses.

    Their values are lost where `release` does not keep them. Reading or writing them meanwhile is an error of the
    device's.
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

    @staticmethod
    def bytes_needed(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> int:
        """That tensors of such shapes take."""
        return sum(-(-prod(shape) * dtype.itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for shape in shapes)

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros, of what is left."""
        size = prod(shape) * dtype.itemsize
        first, self._allocated_bytes = (
            self._allocated_bytes,
            self._allocated_bytes + -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES,
        )
        if self._allocated_bytes > self.nbytes:
            raise ValueError(f"a region of {self.nbytes} bytes has no room left for {size}")
        return self._buffer[first : first + size].view(dtype).view(*shape)

    @property
    def releasable(self) -> bool:
        """Whether it can be given back: a NumPy array that shares a CPU's memory keeps it."""
        return self._mapping is not None or self._buffer.untyped_storage().resizable()

    def release(self, *, keep_contents: bool = False) -> None:
        """Give the memory back. `keep`: what is in it goes to the host, and comes back with it."""
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
        """Take it again, zeros where nothing was kept. torch.OutOfMemoryError, and nothing lost, if others have it."""
        if self.resident:
            return
        if self._mapping is None:
            self._buffer.untyped_storage().resize_(max(1, self.nbytes))
        else:
            try:
                self._mapping.map_memory()
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()  # of what torch holds and does not use
                self._mapping.map_memory()
        if self._host_copy is None:
            self._buffer.zero_()
        else:
            self._buffer.copy_(self._host_copy)
        self.resident, self._host_copy = True, None
