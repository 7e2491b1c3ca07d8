"""Kernels through the simulator: schedules, and what a launch did."""

from __future__ import annotations

import contextlib
import ctypes
import json
from collections.abc import Iterator
from typing import Any

import pytest

import dsv3_kernels as dk
from dsv3_kernels import _simulator

needs_simulator = pytest.mark.skipif(_simulator.missing() is not None, reason=str(_simulator.missing()))

SCHEDULES = {
    "late": {"timing": "late", "order": "reverse"},  # copies and products at the last moment
    "random1": {"timing": "random", "order": "random", "seed": "1"},
    "random2": {"timing": "random", "order": "random", "seed": "2"},
}
_DEFAULTS = {"timing": "early", "order": "forward", "seed": "0", "fp8_truncate": "0", "banks": "0"}


def _library() -> Any:
    return ctypes.CDLL(str(_simulator.library()))


@contextlib.contextmanager
def schedule(**options: str) -> Iterator[None]:
    """Launches inside the block run under these options of the simulator."""
    library = _library()
    try:
        for name, value in options.items():
            assert library.dsv3SimSetOption(name.encode(), value.encode()) == 0, f"no option {name}={value}"
        yield
    finally:
        for name in options:
            library.dsv3SimSetOption(name.encode(), _DEFAULTS[name].encode())


def counters() -> dict[str, Any]:
    """What the last launch did."""
    library = _library()
    library.dsv3SimCounters.restype = ctypes.c_size_t
    text = ctypes.create_string_buffer(4096)
    library.dsv3SimCounters(text, ctypes.c_size_t(4096))
    return json.loads(text.value)


@contextlib.contextmanager
def launches(kernel: str, times: int = 1) -> Iterator[None]:
    """CUDA launches inside the block go to the simulator, and `kernel` is launched so many times."""
    before = dk.launch_counts()[kernel]
    with _simulator.active("cuda"):
        yield
    count = dk.launch_counts()[kernel] - before
    assert count == times, f"{kernel} ran {count} times, wanted {times}"
