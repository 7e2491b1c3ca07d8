"""What the host may cost, in empty Python calls, so that a busy machine does not decide."""

from __future__ import annotations

import time

import pytest

from bench import overhead, timing
from dsv3_kernels._library import OPS

LAUNCHER_US, OP_US, IMPORT_S = 3.0, 8.0, 0.3
EMPTY_CALL_US = 0.03  # of the core that the budgets are for: calling an empty Python function
SLACK = 1.25  # clocks and neighbours move the figures
WITH_KERNELS = [op for op, row in OPS.items() if row.cuda and row.out]


@pytest.mark.parametrize("op", WITH_KERNELS)
def test_launch(op):
    """A core with busy neighbours is slower for seconds on end: it has half a minute to show what the host costs."""
    started, unit = time.monotonic(), EMPTY_CALL_US / SLACK
    while True:
        figures = overhead.launch_time(op)
        launcher_us, op_us = (figures[f"{name}_empty_calls"] * unit for name in ("launcher", "op"))
        within = 0 < launcher_us <= LAUNCHER_US and op_us <= OP_US
        if within or time.monotonic() - started > 30:
            break
    assert within, figures
    assert figures["launcher_us"] < figures["op_us"] < figures["public_us"], figures


def test_import():
    assert overhead.import_time(rounds=3)["import_s"] <= IMPORT_S


def test_every_launch_is_probed():
    assert {f"launch {op}" for op in WITH_KERNELS} <= set(overhead.probes(quick=True))
    assert "build" in overhead.probes(quick=False)


def test_host_time():
    once, twice = (timing.host_time(lambda n=n: sum(range(n))) for n in (2000, 4000))
    assert once.us > 1 and 1.5 < twice.empty_calls / once.empty_calls < 2.7
