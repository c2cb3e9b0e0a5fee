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

ALIGN = 512  # bytes; of each tensor


class _Place(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Kind(ctypes.Structure):
    """CUmemAllocationProp: pinned memory of a device, without handles for others."""

    _fields_ = (
        ("type", ctypes.c_int), ("handles", ctypes.c_int), ("place", _Place), ("win32", ctypes.c_void_p),
        ("compression", ctypes.c_ubyte), ("rdma", ctypes.c_ubyte), ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )  # fmt: skip


class _Access(ctypes.Structure):
    """CUmemAccessDesc: read and write."""

    _fields_ = (("place", _Place), ("flags", ctypes.c_int))


def _call(name: str, *args: Any) -> None:
    status = getattr(ctypes.CDLL("libcuda.so.1"), name)(*args)
    if status == 2:
        raise torch.OutOfMemoryError(f"the GPU's driver has not enough memory left ({name})")
    if status:
        raise RuntimeError(f"the GPU's driver refused {name}: error {status}")


class _Mapped:
    """Bytes of a GPU behind a reserved address; `__cuda_array_interface__` makes a tensor of them."""

    def __init__(self, size: int, device: int) -> None:
        place = _Place(1, device)
        self._kind = _Kind(type=1, place=place)
        # Other devices, too, or copies from them would be refused.
        peers = [i for i in range(torch.cuda.device_count()) if torch.cuda.can_device_access_peer(i, device)]
        self._access = (_Access * (1 + len(peers)))(*(_Access(_Place(1, i), 3) for i in (device, *peers)))
        grain = ctypes.c_size_t()
        _call("cuMemGetAllocationGranularity", ctypes.byref(grain), ctypes.byref(self._kind), 0)
        self.size = -(-size // grain.value) * grain.value
        self._process = os.getpid()
        self._at, self._handle = ctypes.c_uint64(), ctypes.c_uint64()
        zero = ctypes.c_uint64(0)
        _call("cuMemAddressReserve", ctypes.byref(self._at), ctypes.c_size_t(self.size), ctypes.c_size_t(0), zero, zero)
        self.mapped = False
        self.map()
        weakref.finalize(self, _Mapped._free, self._at, self.size, self.__dict__).atexit = False
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (self._at.value, False), "version": 3,
        }  # fmt: skip

    def map(self) -> None:
        size, none = ctypes.c_size_t(self.size), ctypes.c_uint64(0)
        _call("cuMemCreate", ctypes.byref(self._handle), size, ctypes.byref(self._kind), none)
        _call("cuMemMap", self._at, size, ctypes.c_size_t(0), self._handle, none)
        _call("cuMemSetAccess", self._at, size, self._access, ctypes.c_size_t(len(self._access)))
        self.mapped = True

    def unmap(self) -> None:
        _unmap(self._at, self.size, self._handle)
        self.mapped = False

    @staticmethod
    def _free(at: ctypes.c_uint64, size: int, state: dict[str, Any]) -> None:
        if state["_process"] != os.getpid():  # a fork has no part in it
            return
        torch.cuda.synchronize()
        if state["mapped"]:
            _unmap(at, size, state["_handle"])
        _call("cuMemAddressFree", at, ctypes.c_size_t(size))


def _unmap(at: ctypes.c_uint64, size: int, handle: ctypes.c_uint64) -> None:
    _call("cuMemUnmap", at, ctypes.c_size_t(size))
    _call("cuMemRelease", handle)


class Region:
    """Room for tensors on one device, given back and taken again as a whole; the tensors stay, at their addresses.

    Their values are lost where `release` does not keep them. Reading or writing them meanwhile is an error of the
    device's.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.device, self.size, self.held, self._used = device, size, True, 0
        self._kept: Tensor | None = None
        self._mapped: _Mapped | None = None
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            torch.cuda.init()
            with torch.cuda.device(index):
                torch.empty(1, device=device)  # the driver needs a context
                self._mapped = _Mapped(max(1, size), index)
            self._bytes = torch.as_tensor(self._mapped, device=device)
        else:
            self._bytes = torch.empty(max(1, size), dtype=torch.uint8, device=device)
        self._bytes.zero_()

    @staticmethod
    def bytes(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> int:
        """That tensors of such shapes take."""
        return sum(-(-prod(shape) * dtype.itemsize // ALIGN) * ALIGN for shape in shapes)

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros, of what is left."""
        size = prod(shape) * dtype.itemsize
        first, self._used = self._used, self._used + -(-size // ALIGN) * ALIGN
        if self._used > self.size:
            raise ValueError(f"a region of {self.size} bytes has no room left for {size}")
        return self._bytes[first : first + size].view(dtype).view(*shape)

    @property
    def resizable(self) -> bool:
        """Whether it can be given back: a NumPy array that shares a CPU's memory keeps it."""
        return self._mapped is not None or self._bytes.untyped_storage().resizable()

    def release(self, *, keep: bool = False) -> None:
        """Give the memory back. `keep`: what is in it goes to the host, and comes back with it."""
        if not self.held:
            return
        self._kept = self._bytes.to("cpu", copy=True) if keep else None
        if self._mapped is None:
            self._bytes.untyped_storage().resize_(0)
        else:
            torch.cuda.synchronize(self.device)
            self._mapped.unmap()
        self.held = False

    def restore(self) -> None:
        """Take it again, zeros where nothing was kept. torch.OutOfMemoryError, and nothing lost, if others have it."""
        if self.held:
            return
        if self._mapped is None:
            self._bytes.untyped_storage().resize_(max(1, self.size))
        else:
            try:
                self._mapped.map()
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()  # of what torch holds and does not use
                self._mapped.map()
        if self._kept is None:
            self._bytes.zero_()
        else:
            self._bytes.copy_(self._kept)
        self.held, self._kept = True, None
