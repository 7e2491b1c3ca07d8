"""What the build's tests share."""

from __future__ import annotations

import ctypes
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from build_backend import host, toolchain  # noqa: E402

needs_nvcc = pytest.mark.skipif(toolchain.find_nvcc() is None, reason="no nvcc here: see build_backend/toolchain.py")


def disassembler() -> str | None:
    """cuobjdump: of the package index, of a Triton wheel, or on PATH (a Python is searched, nothing is imported)."""
    for folder in map(Path, sys.path):
        for inside in ("nvidia/cu13/bin", "triton/backends/nvidia/bin"):
            if (tool := folder / inside / "cuobjdump").is_file():
                return str(tool)
    return shutil.which("cuobjdump")


needs_disassembler = pytest.mark.skipif(
    disassembler() is None, reason="no cuobjdump here: pip install nvidia-cuda-cuobjdump"
)


def sass(cubin: Path) -> dict[str, str]:
    """{kernel: its machine code, an instruction a line}."""
    status, text = toolchain.run([disassembler(), "-sass", cubin])
    assert status == 0, text
    kernels = {}
    for block in re.split(r"\n\s*Function : ", text)[1:]:
        name, _, body = block.partition("\n")
        kernels[name.strip()] = "\n".join(re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^;]+;)", body))
    return kernels


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    cluster: int
    programmatic: bool
    stream: int
    context: int
    params: bytes


class NullDriver:
    """The driver that does nothing (csrc/host/null_driver.cpp), seen from the tests."""

    def __init__(self) -> None:
        self.path = str(host.build_null_driver())
        self.library = ctypes.CDLL(self.path)
        self.library.nullLaunch.restype = ctypes.c_char_p
        self.library.nullParams.restype = ctypes.c_void_p
        self.library.cuCtxPushCurrent_v2.argtypes = [ctypes.c_void_p]

    def reset(self) -> None:
        self.library.nullReset()

    def record(self, on: bool) -> None:
        self.library.nullRecord(int(on))

    def fail(self, function: str, error: int) -> None:
        """The next call of `function` returns `error`."""
        self.library.nullFail(function.encode(), error)

    def calls(self, function: str) -> int:
        return self.library.nullCalls(function.encode())

    @property
    def launches(self) -> list[Launch]:
        found = []
        for index in range(self.library.nullLaunches()):
            v = (ctypes.c_uint64 * 12)()
            kernel = self.library.nullLaunch(index, v).decode()
            params = ctypes.string_at(self.library.nullParams(index), v[9])
            found.append(Launch(kernel, tuple(v[0:3]), tuple(v[3:6]), v[6], v[7], bool(v[8]), v[10], v[11], params))
        return found

    @property
    def buffers(self) -> list[tuple[int, int, int]]:
        """(address, bytes, access) that the last launch declared."""
        found = []
        for index in range(self.library.nullBuffers()):
            v = (ctypes.c_uint64 * 3)()
            self.library.nullBuffer(index, v)
            found.append(tuple(v))
        return found
