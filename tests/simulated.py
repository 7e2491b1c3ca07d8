"""Kernels through the simulator: schedules, what a launch did, and which basic blocks a set of launches reached.

with coverage("quantize_1x128") as seen:
    ...  # launches, of CUDA or Triton kernels
assert seen.unreached(unreachable={"if (row >= p.rows) return;": "the grid has one warp a row"}) == []
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import basic_blocks
import checks
import pytest

import dsv3_kernels as dk
from dsv3_kernels import _simulator

needs_simulator = pytest.mark.skipif(_simulator.missing() is not None, reason=str(_simulator.missing()))

SCHEDULES = {
    "late": {"timing": "late", "order": "reverse"},  # copies and products at the last moment
    "random1": {"timing": "random", "order": "random", "seed": "1"},
    "random2": {"timing": "random", "order": "random", "seed": "2"},
}
_ROUNDING = "hardware" if checks.HARDWARE_ROUNDING else "float32"
_DEFAULTS = {
    "timing": "early",
    "order": "forward",
    "seed": "0",
    "rounding": _ROUNDING,
    "banks": "0",
    "sms": "132",
    "approximate": "0",
}


def _library() -> Any:
    library = ctypes.CDLL(str(_simulator.library()))
    library.dsv3SimCounters.restype = library.dsv3SimCoverage.restype = ctypes.c_size_t
    return library


def _text(function: Any, *args: Any) -> str:
    size = function(*args, None, ctypes.c_size_t(0)) + 1
    text = ctypes.create_string_buffer(size)
    function(*args, text, ctypes.c_size_t(size))
    return text.value.decode()


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
    """What the last launch did. Bytes: global_read, global_write, atomic (plain accesses), tma_read, tma_write (TMA and
    bulk copies), shared_read, shared_write. `instructions`: warp instructions by class (move, integer, float, special
    = ex2, rcp and their like, convert, memory by space: global, shared, local, param, generic; async = cp.async, TMA,
    bulk; wgmma, mma, warp = shuffles and votes, barrier, mbarrier, fence, control, other). `wgmma_cycles`: what the
    tensor cores take for the wgmmas at full rate, summed over SMs. Under `schedule(banks="1")` shared_wavefronts counts
    passes over the shared-memory banks, of which shared_ideal would do: the difference are bank conflicts. Retries of
    waits count as instructions and depend on the schedule."""
    counts = json.loads(_text(_library().dsv3SimCounters))
    return counts | {"instructions": basic_blocks.by_class(counts["instructions"])}


@contextlib.contextmanager
def launches(kernel: str, times: int = 1) -> Iterator[None]:
    """CUDA launches inside the block go to the simulator, and `kernel` is launched so many times."""
    before = dk.launch_counts()[kernel]
    with _simulator.active("cuda"):
        yield
    count = dk.launch_counts()[kernel] - before
    assert count == times, f"{kernel} ran {count} times, wanted {times}"


_ROOT = Path(__file__).resolve().parents[1]
_WRAPPERS = ("csrc/ptx/", "nvcc/", "/triton/language/", "/include/")  # what kernels are written with


@dataclass(frozen=True)
class Block:
    """A basic block of a kernel's PTX."""

    version: int  # of the PTX text, in order of first launch: Triton compiles a kernel for each set of constants
    count: int  # executions by warps
    kind: str  # "code"; "trap": ends in one; "spin": looks again; "predicated": one instruction with a guard
    ptx_line: int
    positions: tuple[str, ...]  # "file:line:column", from the innermost inlined function outwards

    @property
    def position(self) -> tuple[str, int]:
        """The innermost file and line that are neither an instruction wrapper's nor the toolkit's."""
        own = [p for p in self.positions if not any(w in p for w in _WRAPPERS)]
        file, line, _ = (own or list(self.positions) or ["?:0:0"])[0].rsplit(":", 2)
        return (str(Path(file).relative_to(_ROOT)) if Path(file).is_relative_to(_ROOT) else file), int(line)

    @property
    def source(self) -> str:
        """The text of that line."""
        file, line = self.position
        path = _ROOT / file
        return path.read_text().splitlines()[line - 1].strip() if path.is_file() else ""

    def __str__(self) -> str:
        file, line = self.position
        return f"PTX line {self.ptx_line}, {file}:{line} ({self.kind}): {self.source}"


_rows: dict[tuple[str, int], list[basic_blocks.Row]] = {}  # of a version of a kernel


def blocks(kernel: str) -> list[Block]:
    """Every basic block, and every predicated instruction, of the kernels of that name that this process launched."""
    lines = [line.split("\t") for line in _text(_library().dsv3SimCoverage, kernel.encode()).splitlines()]
    seen = []
    for number, group in itertools.groupby(lines, key=lambda fields: int(fields[0])):
        counts, lane_counts, code = [], [], []
        for _, count, lane_count, *fields in group:
            counts.append(int(count)), lane_counts.append(int(lane_count)), code.append(fields)
        if (kernel, number) not in _rows:
            _rows[kernel, number] = basic_blocks.rows_of(basic_blocks.parse(code))
        for row in _rows[kernel, number]:
            count = (lane_counts if row.counts_lanes else counts)[row.first]
            seen.append(Block(number, count, row.kind, int(code[row.first][3]), row.positions))
    return seen


class Coverage:
    """What the launches of a kernel reached between start and stop."""

    def __init__(self, kernel: str):
        self._kernel, self._before = kernel, blocks(kernel)
        self._seen: list[Block] | None = None

    def stop(self) -> None:
        self._seen = self.blocks()

    def blocks(self) -> list[Block]:
        """Blocks with their executions since the start, of the versions that were launched since."""
        if self._seen is not None:
            return self._seen
        before = {(b.version, b.ptx_line, b.kind): b.count for b in self._before}
        now = blocks(self._kernel)
        now = [replace(b, count=b.count - before.get((b.version, b.ptx_line, b.kind), 0)) for b in now]
        live = {b.version for b in now if b.count}
        return [b for b in now if b.version in live]

    def unreached(
        self,
        *,
        unreachable: Mapping[str, str] | None = None,
        kinds: tuple[str, ...] = ("code",),
        every: bool = False,
    ) -> list[str]:
        """Blocks of these kinds that no launch entered: "PTX line 120, csrc/quant/x.cu:48 (code): if (last) {".

        Copies of one place (line and column in all functions it was inlined into: what unrolling makes, and other
        versions) count as one block that is reached with any of them; with `every`, each for itself. `unreachable` maps
        a piece of that text to the reason why no launch can get there; such a block is left out, and an entry that fits
        no unreached block is returned as stale. AssertionError if the kernel was not launched."""
        seen = [b for b in self.blocks() if b.kind in kinds]
        assert self.blocks(), f"no kernel {self._kernel} was launched"

        def place(b: Block) -> object:
            return b if every else (b.kind, b.positions)

        reached = {place(b) for b in seen if b.count}
        first = {place(b): b for b in reversed(seen)}
        missed = [str(b) for b in sorted(first.values(), key=lambda b: b.ptx_line) if place(b) not in reached]
        listed = unreachable or {}
        stale = [f"listed as unreachable: {text}" for text in listed if not any(text in m for m in missed)]
        return [m for m in missed if not any(text in m for text in listed)] + stale


@contextlib.contextmanager
def coverage(kernel: str) -> Iterator[Coverage]:
    """Basic blocks reached by the launches of `kernel` inside the block, simulated CUDA or Triton."""
    seen = Coverage(kernel)
    try:
        yield seen
    finally:
        seen.stop()
