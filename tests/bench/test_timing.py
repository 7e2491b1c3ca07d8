"""The GPU timer's order of events, on a GPU that only writes down what it is asked."""

from __future__ import annotations

import contextlib
import re
import time
from types import SimpleNamespace

import pytest
import torch

from bench import timing


@pytest.fixture
def gpu(monkeypatch):
    """torch.cuda in miniature: a log, a clock that work moves on, graphs that replay what they captured."""
    log, clock, captured = [], [0.0], []

    def work(name, milliseconds):
        if captured and captured[-1] is not None:
            captured[-1].append((name, milliseconds))
        else:
            log.append(name)
            clock[0] += milliseconds

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")
            self.at = clock[0]

        def elapsed_time(self, other):
            return other.at - self.at

    class Graph(list):
        def replay(self):
            log.append("replay")
            for name, milliseconds in self:
                work(name, milliseconds)

    @contextlib.contextmanager
    def graph(target):
        captured.append(target)
        try:
            yield
        finally:
            captured.pop()

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": graph,
        "Stream": lambda: stream,
        "stream": lambda s: contextlib.nullcontext(),
        "current_stream": lambda: stream,
        "synchronize": lambda device=None: log.append("synchronize"),
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=2**20),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(timing.Flush, "__call__", lambda self: work("flush", 0.1))
    return SimpleNamespace(log=log, work=work, captured=captured)


def test_order_and_times(gpu):
    calls = {"ours": lambda: gpu.work("ours", 0.5), "theirs": lambda: gpu.work("theirs", 2.0)}
    found = timing._measure_gpu(calls, torch.device("cpu"), 0.05)
    assert found["ours"].median == pytest.approx(500) and found["theirs"].p80 == pytest.approx(2000)
    assert {t.method for t in found.values()} == {"events around a graph, cold L2"}
    timed = gpu.log[gpu.log.index("flush") :]
    pieces = [name for name in timed if name != "synchronize"]
    one = [pieces[i : i + 5] for i in range(0, len(pieces), 5)]
    assert all(p[:3] == ["flush", "event", "replay"] and p[4] == "event" for p in one)
    order = [p[3] for p in one][10:]  # behind the warm-up
    assert order[:4] == ["ours", "theirs", "theirs", "ours"] and len(order) == 2 * found["ours"].count
    assert gpu.log[-1] == "synchronize"


def test_steady_is_back_to_back_and_in_turns(gpu):
    calls = []
    sides = {name: lambda name=name: (calls.append(name), time.sleep(0.002 * len(name)))[0] for name in ("a", "bb")}
    found = timing.steady(sides, torch.device("cpu"), seconds=0.1)
    order = [name for name, before in zip(calls, ["", *calls], strict=False) if name != before]
    assert order == ["a", "bb", "a"]  # the order rotates: a bb, bb a
    assert 1.5 < found["bb"] / found["a"] < 2.5 and found["a"] >= 2000
    gpu.log.clear()
    timing.steady({"side": lambda: gpu.work("kernel", 1)}, torch.device("cuda"), seconds=0.02, rounds=1)
    runs = "".join({"replay": "r", "kernel": "k", "synchronize": "s"}[name] for name in gpu.log)
    assert re.fullmatch("kkks((rk)+s)+", runs) and "flush" not in gpu.log


def test_what_cannot_be_captured_is_called(gpu):
    def call():
        if gpu.captured:
            raise RuntimeError("operation not permitted when stream is capturing")
        gpu.work("ours", 0.5)

    found = timing._measure_gpu({"ours": call}, torch.device("cpu"), 0.01)
    assert found["ours"].method == "events, cold L2" and found["ours"].median == pytest.approx(500)
    assert "replay" not in gpu.log


def test_flush_reads_more_than_the_cache(monkeypatch):
    properties = SimpleNamespace(L2_cache_size=2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    flush = timing.Flush(torch.device("cpu"))
    assert flush.buffer.numel() * 4 == 2**28
    flush.buffer[-1] = 5
    flush()
    assert flush.result.item() == 5
