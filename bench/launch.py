"""Kernels that the package does not ship, through the package's seam: rivals' images and the microbenchmarks.

The functions are those of csrc/host/driver.h by their C interface, with `ctypes`: of libcuda.so.1 for CUDA tensors,
which takes a cubin, of the simulator for CPU tensors, which takes the PTX. A launch is Python and slow: what is timed
is the replay of a graph of it (docs/bench.md).
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3_kernels import _simulator

READ, WRITE, READ_WRITE = 1, 2, 3  # how a kernel uses a buffer: csrc/host/driver.h, Access
Buffer = tuple[Tensor, int]
Extent = tuple[int, int, int]

# cuda.h; csrc/host/cuda_abi.h says where each comes from
MULTIPROCESSORS, SHARED_LIMIT, CLUSTER, EARLY = 16, 8, 4, 6
MAP_TYPES = {torch.float8_e4m3fn: 0, torch.uint8: 0, torch.float32: 7, torch.bfloat16: 9}  # CU_TENSOR_MAP_DATA_TYPE_*
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}  # bytes: CU_TENSOR_MAP_SWIZZLE_*
PROMOTIONS = {0: 0, 64: 1, 128: 2, 256: 3}  # bytes: CU_TENSOR_MAP_L2_PROMOTION_L2_*


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


class Driver:
    """A library of driver functions. A call that fails is a RuntimeError with the driver's words."""

    def __init__(self, path: str) -> None:
        try:
            self._library = ctypes.CDLL(path)
        except OSError as error:
            raise RuntimeError(f"bench: no driver: {error}") from None
        self.drop_in = hasattr(self._library, "dsv3SimDeclareBuffer")
        self("cuInit", 0)

    def __call__(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._library, name)(*arguments):
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{name} failed: {(text.value or b'no text').decode()} ({code})")

    def multiprocessors(self, ordinal: int) -> int:
        device, value = ctypes.c_int(), ctypes.c_int()
        self("cuDeviceGet", ctypes.byref(device), ordinal)
        self("cuDeviceGetAttribute", ctypes.byref(value), MULTIPROCESSORS, device)
        return value.value

    def parameters(self, kernel: ctypes.c_void_p) -> list[int]:
        """Bytes of each parameter of a kernel."""
        sizes, offset, size = [], ctypes.c_size_t(), ctypes.c_size_t()
        while not self._library.cuKernelGetParamInfo(
            kernel, ctypes.c_size_t(len(sizes)), ctypes.byref(offset), ctypes.byref(size)
        ):
            sizes.append(size.value)
        return sizes


@functools.cache
def _driver_at(path: str) -> Driver:
    return Driver(path)


def driver_of(device: torch.device) -> Driver:
    """libcuda.so.1 for a CUDA device, the simulator for the CPU. RuntimeError where it is missing."""
    if device.type == "cuda":
        return _driver_at("libcuda.so.1")
    if why := _simulator.missing():
        raise RuntimeError(why)
    return _driver_at(str(_simulator.library()))


def multiprocessors(device: torch.device) -> int:
    return driver_of(device).multiprocessors(device.index or 0)


class Kernel:
    """One kernel of an image file, loaded for a device.

    `path` is without its ending: the driver takes `<path>.cubin`, the simulator `<path>.ptx`. `shared_bytes` is the
    most dynamic shared memory that a launch may ask for. RuntimeError for a missing file, an image that does not load
    and a symbol that is not in it.
    """

    def __init__(
        self, path: Path, symbol: str, device: torch.device, *, shared_bytes: int = 0, cluster: int = 1
    ) -> None:
        self.name, self.device, self.shared_bytes, self.cluster = path.name, device, shared_bytes, cluster
        self._driver = driver_of(device)
        self._ordinal = device.index or 0
        file = path.with_name(f"{path.name}{'.ptx' if self._driver.drop_in else '.cubin'}")
        if not file.is_file():
            raise RuntimeError(f"bench: the image {file} is missing")
        self._make_current()
        self._code = file.read_bytes() + b"\0"  # PTX is text that ends in a zero; the driver reads it later, too
        library, self._kernel = ctypes.c_void_p(), ctypes.c_void_p()
        none = ctypes.c_void_p()
        try:
            self._driver("cuLibraryLoadData", ctypes.byref(library), self._code, none, none, 0, none, none, 0)
            self._driver("cuLibraryGetKernel", ctypes.byref(self._kernel), library, symbol.encode())
            if shared_bytes:
                self._driver("cuKernelSetAttribute", SHARED_LIMIT, shared_bytes, self._kernel, self._ordinal)
        except RuntimeError as error:
            raise RuntimeError(f"bench: image {file}, kernel {symbol}: {error}") from None
        self._sizes = self._driver.parameters(self._kernel)

    def _make_current(self) -> None:
        """torch has made its context current where it worked in this thread before."""
        context = ctypes.c_void_p()
        self._driver("cuCtxGetCurrent", ctypes.byref(context))
        if not context:
            self._driver("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._ordinal)
            self._driver("cuCtxSetCurrent", context)

    def launch(
        self,
        grid: Extent,
        threads: int,
        parameters: Sequence[bytes],
        buffers: Sequence[Buffer],
        *,
        shared_bytes: int | None = None,
        early: bool = False,
    ) -> None:
        """On torch's current stream. `buffers` is all the memory that the kernel touches (the simulator checks it);
        `early` lets it start before its predecessor ends. ValueError when the parameters are not the kernel's."""
        if (given := [len(parameter) for parameter in parameters]) != self._sizes:
            raise ValueError(
                f"bench: kernel {self.name} takes parameters of {self._sizes} bytes, its launcher has {given}: "
                "another version of it, or compiled by another CUDA"
            )
        shared = self.shared_bytes if shared_bytes is None else shared_bytes
        if shared > self.shared_bytes:
            raise ValueError(
                f"bench: kernel {self.name}: {shared} bytes of shared memory, its image has {self.shared_bytes}"
            )
        attributes = (_Attribute * 2)()
        count = 0
        if self.cluster > 1:
            attributes[count].id, attributes[count].value[:3] = CLUSTER, (self.cluster, 1, 1)
            count += 1
        if early:
            attributes[count].id, attributes[count].value[0] = EARLY, 1
            count += 1
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        config = _Config(grid, (threads, 1, 1), shared, stream, attributes, count)
        values = [ctypes.create_string_buffer(parameter, len(parameter)) for parameter in parameters]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        try:
            if self._driver.drop_in:
                for tensor, access in buffers:
                    self._driver("dsv3SimDeclareBuffer", *_span(tensor), access)
            self._driver("cuLaunchKernelEx", ctypes.byref(config), self._kernel, pointers, ctypes.c_void_p())
        except RuntimeError as error:
            raise RuntimeError(
                f"bench: kernel {self.name}, grid {grid}, {threads} threads, {shared} bytes: {error}"
            ) from None


def _span(tensor: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_size_t]:
    """From the first to the last byte of a tensor."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    length = (last + 1) * tensor.element_size() if tensor.numel() else 0
    return ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(length)


def pointer(tensor: Tensor | None) -> bytes:
    """A pointer parameter."""
    return struct.pack("<Q", 0 if tensor is None else tensor.data_ptr())


def word(value: int) -> bytes:
    """A 32-bit parameter."""
    return struct.pack("<I", value)


def tensor_map(
    tensor: Tensor,
    dims: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    *,
    swizzle: int,
    promotion: int = 256,
) -> bytes:
    """A tensor map, 128 bytes. `dims`, `box`, and `strides` (of all dimensions but the first), count elements,
    innermost first; `swizzle` and `promotion` count bytes."""
    rank, size = len(dims), tensor.element_size()
    storage = ctypes.create_string_buffer(192)
    start = -ctypes.addressof(storage) % 64  # the driver wants a map at a multiple of 64
    byte_strides = [stride * size for stride in strides]
    driver_of(tensor.device)(
        "cuTensorMapEncodeTiled",
        ctypes.c_void_p(ctypes.addressof(storage) + start),
        MAP_TYPES[tensor.dtype],
        rank,
        ctypes.c_void_p(tensor.data_ptr()),
        (ctypes.c_uint64 * rank)(*dims),
        (ctypes.c_uint64 * max(rank - 1, 1))(*byte_strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        0,
        SWIZZLES[swizzle],
        PROMOTIONS[promotion],
        0,
    )
    return storage.raw[start : start + 128]
