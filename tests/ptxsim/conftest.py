"""The simulator, with its options as the tests expect them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from simulator import Simulator

DEFAULTS = {
    "seed": 0,
    "timing": "early",
    "sms": 132,
    "order": "forward",
    "eager": 0,
    "detect": 1,
    "rounding": "float32",
    "approximate": 0,
    "max_idle": 200_000_000,
    "banks": 0,
}


@pytest.fixture(scope="session")
def _simulator() -> Simulator:
    return Simulator()


@pytest.fixture
def sim(_simulator: Simulator) -> Simulator:
    _simulator.option(**DEFAULTS)
    yield _simulator
    _simulator.option(**DEFAULTS)
