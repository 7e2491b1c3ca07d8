"""Runs PTX on the simulator through the CUDA driver functions that it exports."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import ClassVar

import numpy as np

LIBRARY = Path(os.environ.get("DSV3_KERNELS_DRIVER") or Path(__file__).parents[2] / "build/ptxsim/libptxsim.so")

HEADER = ".version 8.8\n.target sm_90a\n.address_size 64\n"


class SimError(RuntimeError):
    def __init__(self, code: int, text: str):
        super().__init__(text)
        self.code = code


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]


class TensorMap:
    """A tensor map over a numpy array (or an address), encoded by cuTensorMapEncodeTiled."""

    TYPES: ClassVar[dict[str, int]] = {
        "u8": 0,
        "u16": 1,
        "u32": 2,
        "s32": 3,
        "u64": 4,
        "s64": 5,
        "f16": 6,
        "f32": 7,
        "f64": 8,
        "bf16": 9,
        "tf32": 11,
    }

    def __init__(self, sim, kind, address, dims, strides, box, swizzle=0, fill=0, element_strides=None):
        raw = ctypes.create_string_buffer(128 + 64)
        start = (ctypes.addressof(raw) + 63) // 64 * 64
        n = len(dims)
        sim.call(
            "cuTensorMapEncodeTiled",
            ctypes.c_void_p(start),
            self.TYPES[kind] if isinstance(kind, str) else kind,
            ctypes.c_uint32(n),
            ctypes.c_void_p(address),
            (ctypes.c_uint64 * n)(*dims),
            (ctypes.c_uint64 * max(1, n - 1))(*strides),
            (ctypes.c_uint32 * n)(*box),
            (ctypes.c_uint32 * n)(*(element_strides or [1] * n)),
            0,
            {0: 0, 32: 1, 64: 2, 128: 3}.get(swizzle, swizzle),
            0,
            fill,
        )
        self.data = ctypes.string_at(start, 128)
        self.address = address
        self._how = (kind, dims, strides, box, swizzle, fill, element_strides)

    def over(self, sim, address: int) -> TensorMap:
        """The same map of a tensor that lies elsewhere."""
        kind, *rest = self._how
        return TensorMap(sim, kind, address, *rest)


class Simulator:
    def __init__(self, path: Path = LIBRARY):
        if not path.exists():
            raise RuntimeError(f"{path} is not there: run `make -C csrc/ptxsim`")
        self.lib = ctypes.CDLL(str(path))
        self.lib.dsv3SimLastError.restype = ctypes.c_char_p
        self.lib.dsv3SimCounters.restype = self.lib.dsv3SimOpcodes.restype = ctypes.c_size_t
        self.call("cuInit", 0)

    def call(self, name: str, *args) -> None:
        code = getattr(self.lib, name)(*args)
        if code:
            raise SimError(code, (self.lib.dsv3SimLastError() or b"").decode())

    def option(self, **values) -> None:
        for name, value in values.items():
            self.call("dsv3SimSetOption", name.encode(), str(value).encode())

    def load(self, ptx: str, name: str | None = None) -> Kernel:
        return Kernel(self, ptx, name)

    def run(self, body: str, *args, **launch) -> None:
        """Launches hand-written PTX. `body` may leave out the header."""
        Kernel(self, body if ".version" in body else HEADER + body).launch(*args, **launch)

    def text(self, function: str) -> str:
        """What one of the functions gives that fill a buffer."""
        call = getattr(self.lib, function)
        size = call(None, ctypes.c_size_t(0)) + 1
        text = ctypes.create_string_buffer(size)
        call(text, ctypes.c_size_t(size))
        return text.value.decode()

    def counters(self) -> dict:
        return json.loads(self.text("dsv3SimCounters"))


class Kernel:
    """One kernel of a PTX module. The module is unloaded with the object."""

    def __init__(self, sim: Simulator, ptx: str, name: str | None = None):
        self.sim = sim
        self.library = ctypes.c_void_p()
        sim.call("cuLibraryLoadData", ctypes.byref(self.library), ptx.encode(), None, None, 0, None, None, 0)
        if name is None:
            name = ptx.split(".entry")[1].split("(")[0].strip()
        self.kernel = ctypes.c_void_p()
        sim.call("cuLibraryGetKernel", ctypes.byref(self.kernel), self.library, name.encode())
        self.function = ctypes.c_void_p()
        sim.call("cuKernelGetFunction", ctypes.byref(self.function), self.kernel)

    def __del__(self):
        if self.library:
            self.sim.lib.cuLibraryUnload(self.library)

    def launch(self, *args, grid=1, block=32, shared=0, cluster=None, early=False, buffers=(), declare=True):
        """numpy arrays go as pointers and are declared readable and writable; ints as 32 bits (np.int64 as 64), floats
        as float32, bytes and tensor maps as they are. `buffers`: further (array, access) reached otherwise. `early`:
        by programmatic stream serialization, beside the end of the launch before."""
        values = []
        keep = []
        for a in args:
            if isinstance(a, np.ndarray):
                if declare and a.nbytes:
                    self.sim.call(
                        "dsv3SimDeclareBuffer",
                        ctypes.c_void_p(a.ctypes.data),
                        ctypes.c_size_t(_span(a)),
                        3 if a.flags.writeable else 1,
                    )
                values.append(ctypes.c_uint64(a.ctypes.data))
            elif isinstance(a, TensorMap):
                values.append(ctypes.create_string_buffer(a.data, 128))
            elif isinstance(a, bytes):
                values.append(ctypes.create_string_buffer(a, len(a)))
            elif isinstance(a, (np.int64, np.uint64)):
                values.append(ctypes.c_uint64(int(a) & (1 << 64) - 1))
            elif isinstance(a, (bool, int, np.integer)):
                values.append(ctypes.c_uint32(int(a) & 0xFFFFFFFF))
            else:
                values.append(ctypes.c_float(a))
        for array, access in buffers:
            keep.append(array)
            self.sim.call(
                "dsv3SimDeclareBuffer", ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(_span(array)), access
            )
        params = (ctypes.c_void_p * max(1, len(values)))(*[ctypes.addressof(v) for v in values])
        if shared > 48 * 1024:
            self.sim.call("cuKernelSetAttribute", 8, shared, self.kernel, 0)
        config = _Config((ctypes.c_uint * 3)(*_dims(grid)), (ctypes.c_uint * 3)(*_dims(block)), shared, None, None, 0)
        attributes = []
        if cluster is not None:
            attributes.append(_Attribute(4, 0, (ctypes.c_uint * 16)(*_dims(cluster))))
        if early:
            attributes.append(_Attribute(6, 0, (ctypes.c_uint * 16)(1)))
        config.attributes = (_Attribute * len(attributes))(*attributes)
        config.num_attributes = len(attributes)
        self.sim.call("cuLaunchKernelEx", ctypes.byref(config), self.function, params, None)


def _dims(d) -> tuple[int, int, int]:
    d = (d,) if isinstance(d, int) else tuple(d)
    return d + (1,) * (3 - len(d))


def _span(a: np.ndarray) -> int:
    return sum((n - 1) * s for n, s in zip(a.shape, a.strides, strict=True)) + a.itemsize if a.size else 0
