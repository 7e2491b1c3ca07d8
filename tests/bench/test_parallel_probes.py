"""The figures of many ranks: each probe runs and gives times."""

from __future__ import annotations

import pytest

from bench import parallel


@pytest.mark.parametrize("name", parallel.probes(quick=True))
def test_probe(name):
    figures = parallel.probes(quick=True)[name]()
    assert figures and all(unit.endswith("_s") and 0 < seconds < 60 for unit, seconds in figures.items())


def test_a_process_that_fails_is_an_error(monkeypatch):
    monkeypatch.setattr(parallel.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="a process of 2 failed"):
        parallel.processes(2)
