"""What the host may cost. Least times of many repetitions, so that a busy machine does not decide."""

from __future__ import annotations

import pytest

from bench import overhead, timing
from dsv3_kernels._library import OPS

LAUNCHER_US, OP_US, IMPORT_S = 3.0, 8.0, 0.3
EMPTY_CALL_US = 0.03  # of the core that the budgets are for: an empty Python function, called
SLACK = 1.25
WITH_KERNELS = [op for op, row in OPS.items() if row.cuda and row.out]


def slowness() -> float:
    """How much slower this core is, now, than the one that the budgets are for; 1 where it is faster."""
    return max(1.0, timing.fastest(lambda: None) / EMPTY_CALL_US)


@pytest.mark.parametrize("op", WITH_KERNELS)
def test_launch(op):
    try:
        figures = overhead.launch_time(op)
    except overhead.Unavailable as why:
        pytest.skip(str(why))
    limit = SLACK * slowness()
    assert 0 < figures["launcher_us"] <= LAUNCHER_US * limit, figures
    assert figures["launcher_us"] < figures["op_us"] <= OP_US * limit, figures
    assert figures["op_us"] < figures["public_us"], figures


def test_import():
    assert overhead.import_time(rounds=3)["import_s"] <= IMPORT_S


def test_every_launch_is_probed():
    assert {f"launch {op}" for op in WITH_KERNELS} <= set(overhead.probes(quick=True))
    assert "build" in overhead.probes(quick=False)
