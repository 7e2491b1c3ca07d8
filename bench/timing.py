"""Timers. On a GPU: device events around a replayed CUDA graph, with an L2 cache full of somebody else's clean lines.

Sides are interleaved, one call of each in turn, so that clocks, temperature and neighbours act on all of them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
LEAST, MOST = 10, 200  # repetitions


@dataclass(frozen=True)
class Timing:
    """Times of one side in microseconds."""

    median: float
    p20: float
    p80: float
    count: int
    method: str

    @classmethod
    def of(cls, times: Sequence[float], method: str) -> Timing:
        return cls(quantile(times, 0.5), quantile(times, 0.2), quantile(times, 0.8), len(times), method)


def quantile(values: Sequence[float], share: float) -> float:
    """The quantile, interpolated between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def repetitions(seconds_each: float, budget: float) -> int:
    """How often to repeat within the budget, all sides together."""
    return max(LEAST, min(MOST, int(budget / max(seconds_each, 1e-6))))


def measure(sides: dict[str, Call], device: torch.device, budget: float) -> dict[str, Timing]:
    """Time the calls against each other for about `budget` seconds (of their own time, preparation excluded)."""
    return _measure_gpu(sides, device, budget) if device.type == "cuda" else _measure_cpu(sides, budget)


def _measure_cpu(sides: dict[str, Call], budget: float) -> dict[str, Timing]:
    times: dict[str, list[float]] = {name: [] for name in sides}

    def once(name: str) -> float:
        started = time.perf_counter()
        sides[name]()
        return time.perf_counter() - started

    for name in sides:
        once(name)  # first calls load and allocate
    count = repetitions(sum(once(name) for name in sides), budget)
    for turn in range(count):
        for name in _rotated(list(sides), turn):
            times[name].append(once(name) * 1e6)
    return {name: Timing.of(values, "perf_counter, warm caches") for name, values in times.items()}


class Flush:
    """Fills the L2 cache by reading: its lines are clean, so that no write-back disturbs what is timed next."""

    def __init__(self, device: torch.device) -> None:
        size = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 2**28)
        self.buffer = torch.zeros(size // 4, dtype=torch.int32, device=device)
        self.result = torch.empty((), dtype=torch.int32, device=device)

    def __call__(self) -> None:
        torch.amax(self.buffer, out=self.result)


def _measure_gpu(sides: dict[str, Call], device: torch.device, budget: float) -> dict[str, Timing]:
    flush = Flush(device)
    calls: dict[str, Call] = {}
    methods: dict[str, str] = {}
    for name, side in sides.items():
        calls[name], methods[name] = graphed(side)
    pairs: dict[str, list[tuple[Any, Any]]] = {name: [] for name in sides}

    def once(name: str) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush()
        start.record()
        calls[name]()
        end.record()
        pairs[name].append((start, end))

    def elapsed() -> dict[str, list[float]]:
        torch.cuda.synchronize(device)
        return {name: [a.elapsed_time(b) * 1e3 for a, b in events] for name, events in pairs.items()}

    for _ in range(5):
        for name in sides:
            once(name)
    each = sum(min(values) for values in elapsed().values()) * 1e-6 + 1.5e-4 * len(sides)  # the flushes take time, too
    for events in pairs.values():
        events.clear()
    for turn in range(repetitions(each, budget)):
        for name in _rotated(list(sides), turn):
            once(name)
        if turn % 32 == 31:
            torch.cuda.synchronize(device)  # the queue must not fill up: launches would wait inside the events
    return {name: Timing.of(values, methods[name]) for name, values in elapsed().items()}


def steady(sides: dict[str, Call], device: torch.device, seconds: float, rounds: int = 2) -> dict[str, float]:
    """Microseconds a call, back to back, once clocks and power have settled: a side is called for `seconds` on end, the
    second half of which counts; the sides take turns, and the median of the rounds is kept."""
    on_gpu = device.type == "cuda"
    calls = {name: graphed(side)[0] if on_gpu else side for name, side in sides.items()}
    wait = (lambda: torch.cuda.synchronize(device)) if on_gpu else (lambda: None)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in _rotated(list(calls), turn):
            _repeat(calls[name], seconds / 2, wait)
            found[name].append(_repeat(calls[name], seconds / 2, wait) * 1e6)
    return {name: quantile(values, 0.5) for name, values in found.items()}


def _repeat(call: Call, seconds: float, wait: Call) -> float:
    """What a call takes over `seconds` of them or more, in batches so long that the wait at their end hardly counts."""
    batch, count, started = 1, 0, time.perf_counter()
    while True:
        for _ in range(batch):
            call()
        wait()
        count += batch
        taken = time.perf_counter() - started
        if taken >= seconds:
            return taken / count
        batch = max(1, int(count / taken * min(0.1, seconds / 4)))


def graphed(call: Call) -> tuple[Call, str]:
    """The call as a CUDA graph, so that the host's time is not measured; as it is where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call, "events, cold L2"
    return graph.replay, "events around a graph, cold L2"


def _rotated(names: list[str], turn: int) -> list[str]:
    start = turn % len(names)
    return names[start:] + names[:start]


@dataclass(frozen=True)
class HostTime:
    """Host time of one call: the least in microseconds, and how many empty Python calls take as long.

    The second is what budgets are held against: a slower core slows both down alike.
    """

    us: float
    empty_calls: float


def host_time(call: Call, *, rounds: int = 100, calls: int = 50) -> HostTime:
    """Time a call in short rounds, with rounds of empty calls between; the least of each is what nothing disturbed."""

    def empty() -> None:
        pass

    def seconds(function: Call) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            function()
        return time.perf_counter() - started

    seconds(call)
    pairs = [(seconds(call), seconds(empty)) for _ in range(rounds)]
    least, unit = (min(times) for times in zip(*pairs, strict=True))
    return HostTime(least / calls * 1e6, least / unit)
