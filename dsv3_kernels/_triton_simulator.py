"""Leads Triton's launches into the PTX simulator: inside `active(path)` a `kernel[grid](...)` on CPU tensors compiles
for sm_90 as ever and executes its PTX. Grids, autotuning, host and device tensor descriptors work unchanged."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.cache import get_cache_manager

_DEVICE = 1 << 10  # no CUDA ordinal: Triton keeps compiled kernels apart by device
_MAX_SHARED = 232448
_FORMATS = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp16": "e", "fp32": "f", "f32": "f", "fp64": "d",
}  # fmt: skip
_lock = threading.RLock()  # Triton has one active driver for the process


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16))


class _Library:
    """The driver functions of the simulator at `path`."""

    def __init__(self, path: str):
        self._functions = ctypes.CDLL(path)
        self._functions.dsv3SimLastError.restype = ctypes.c_char_p

    def call(self, name: str, *args: Any) -> None:
        if getattr(self._functions, name)(*args):
            text = self._functions.dsv3SimLastError() or b"no report"
            raise RuntimeError(f"simulator: {text.decode()}")

    def load(self, ptx: str, name: str) -> ctypes.c_void_p:
        library, kernel = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuLibraryLoadData", ctypes.byref(library), ptx.encode(), None, None, 0, None, None, 0)
        self.call("cuLibraryGetKernel", ctypes.byref(kernel), library, name.encode())
        self.call("cuKernelGetFunction", ctypes.byref(kernel), kernel)  # decodes it
        return kernel


class _Launcher:
    """What Triton makes of a compiled kernel, once; called for every launch."""

    def __init__(self, library: _Library, source: Any, metadata: Any):
        self._library, self._metadata = library, metadata
        self._types = list(source.signature.values())
        self._descriptors = list(getattr(metadata, "tensordesc_meta", None) or [])
        files = get_cache_manager(metadata.hash).get_group(f"{source.name[:150]}.json") or {}
        paths = [path for name, path in files.items() if name.endswith(".ptx")]
        if not paths:
            raise RuntimeError(f"simulator: Triton's cache holds no PTX of {metadata.name}")
        self._kernel = library.load(Path(paths[0]).read_text(), metadata.name)
        if metadata.shared > 48 * 1024:
            library.call("cuKernelSetAttribute", 8, metadata.shared, self._kernel, 0)

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: Any, packed: Any, launch: Any, *rest: Any
    ) -> None:
        enter, leave, *args = rest
        if x * y * z == 0:
            return
        values: list[bytes] = []
        keep: list[Any] = []
        descriptors = iter(self._descriptors)
        for kind, value in zip(self._types, args, strict=True):
            self._add(values, kind, value, descriptors)
        programs = x * y * z * getattr(self._metadata, "num_ctas", 1)
        for size in (self._metadata.global_scratch_size, getattr(self._metadata, "profile_scratch_size", 0)):
            scratch = torch.zeros(size * programs, dtype=torch.uint8)  # the copy of a storage is 1024-byte aligned
            keep.append(scratch)
            values.append(struct.pack("Q", self._pointer(scratch) if size else 0))
        buffers = [ctypes.create_string_buffer(v, len(v)) for v in values]
        pointers = (ctypes.c_void_p * len(buffers))(*[ctypes.addressof(b) for b in buffers])
        shape = ctypes.c_uint * 3
        config = _Config(shape(x, y, z), shape(32 * self._metadata.num_warps, 1, 1), self._metadata.shared)
        ctas = getattr(self._metadata, "num_ctas", 1)
        if ctas > 1:
            cluster = _Attribute(4, 0, (ctypes.c_uint * 16)(ctas, 1, 1))
            keep.append(cluster)
            config.grid[0] = x * ctas
            config.attributes, config.num_attributes = ctypes.addressof(cluster), 1
        if enter is not None:
            enter(launch)
        self._library.call("cuLaunchKernelEx", ctypes.byref(config), self._kernel, pointers, None)
        if leave is not None:
            leave(launch)

    def _add(self, values: list[bytes], kind: Any, value: Any, descriptors: Iterator[Any]) -> None:
        if isinstance(kind, tuple):
            for inner_kind, inner in zip(kind, value, strict=True):
                self._add(values, inner_kind, inner, descriptors)
        elif kind == "constexpr":
            return
        elif kind.startswith("*"):
            values.append(struct.pack("Q", self._pointer(value)))
        elif kind.startswith("tensordesc"):
            self._add_descriptor(values, value, next(descriptors, None))
        elif kind == "bf16":
            values.append(torch.tensor(value, dtype=torch.bfloat16).view(torch.int16).numpy().tobytes())
        else:
            code = _FORMATS[kind]
            values.append(struct.pack(code, int(value) if code in "bhiqBHIQ" else value))

    def _pointer(self, tensor: Any) -> int:
        """Declares the tensor's storage to the next launch."""
        if tensor is None:
            return 0
        if isinstance(tensor, int):
            return tensor
        storage = tensor.untyped_storage()
        span = ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes())
        self._library.call("dsv3SimDeclareBuffer", *span, 3)
        return int(tensor.data_ptr())

    def _add_descriptor(self, values: list[bytes], descriptor: Any, meta: Any) -> None:
        shape, strides = list(descriptor.shape), list(descriptor.strides)
        base = self._pointer(descriptor.base)
        nan = descriptor.padding == "nan"
        sizes = [struct.pack("i", n) for n in shape] + [struct.pack("q", n) for n in strides]
        if meta is None:  # the kernel was compiled without TMA
            flags = struct.pack("b", nan), struct.pack("b", getattr(descriptor, "round_f32_to_tf32", False))
            values += [struct.pack("Q", base), *(struct.pack("q", n) for n in shape + strides), *flags, *sizes]
            return
        element, rank = meta["elem_size"], len(shape)
        kind = {8: 10, 9: 8, 10: 9}.get(
            meta["elem_type"], meta["elem_type"]
        )  # tensormap.replace's number -> the driver's
        if getattr(descriptor, "round_f32_to_tf32", False):
            kind = 11
        raw = ctypes.create_string_buffer(192)
        start = (ctypes.addressof(raw) + 63) // 64 * 64
        dims = (ctypes.c_uint64 * rank)(*reversed(shape))
        pitch = (ctypes.c_uint64 * max(1, rank - 1))(*[s * element for s in reversed(strides[:-1])])
        box = (ctypes.c_uint32 * rank)(*reversed(meta["block_size"]))
        ones = (ctypes.c_uint32 * rank)(*[1] * rank)
        layout = ctypes.c_void_p(start), kind, rank, ctypes.c_void_p(base), dims, pitch, box, ones
        self._library.call("cuTensorMapEncodeTiled", *layout, 0, meta["swizzle"], 2, int(nan))
        values += [ctypes.string_at(start, 128), *sizes]


class _Utilities:
    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": _MAX_SHARED, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

    @staticmethod
    def load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple[str, int, int, int, int]:
        return name, 0, 0, 0, 1024  # the launcher loads the PTX: module, function, registers, spills, threads


class SimulatorDriver(DriverBase):
    def __init__(self, library: str):
        super().__init__()
        self.utils = _Utilities()
        self.launcher_cls = functools.partial(_Launcher, _Library(library))

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("the simulator compiles no launcher")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return _DEVICE

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> Callable[..., Sequence[float]]:
        def once(kernel_call: Callable[[], Any], *, quantiles: Sequence[float] = (0.5,), **_: Any) -> Sequence[float]:
            kernel_call()  # every configuration of an autotuned kernel runs; the first is kept
            return [1.0] * len(quantiles)

        return once

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(0)

    def clear_cache(self, cache: torch.Tensor) -> None:
        pass


@functools.cache
def _driver(library: str) -> SimulatorDriver:
    return SimulatorDriver(library)


@contextlib.contextmanager
def active(library: str) -> Iterator[None]:
    """Triton's launches inside the block run on the simulator at `library`; other threads wait to enter theirs."""
    config = triton.runtime.driver
    with _lock:
        before = config._active
        config.set_active(_driver(library))
        try:
            yield
        finally:
            config._active = before
