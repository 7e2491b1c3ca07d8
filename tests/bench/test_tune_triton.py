"""The tuner, with the simulator's count of instructions for a clock."""

from __future__ import annotations

import json

import pytest
import torch
from simulated import counters, needs_simulator

import dsv3_kernels as dk
from bench import tune_triton
from bench.bench_quant import quantize_1x128
from dsv3_kernels import _triton

CPU = torch.device("cpu")


def instructions(call):
    call()
    return float(sum(counters()["instructions"].values()))


@needs_simulator
def test_the_best_candidate_is_written_and_taken(monkeypatch, tmp_path):
    case = quantize_1x128(70, 256)
    with dk.backend("sim:triton"):
        case.run(*case.make(CPU))  # imports the table
    table = _triton.tables["quantize_1x128"]
    candidates = ({"ROWS": 2, "num_warps": 1}, {"ROWS": 0, "num_warps": 1}, {"ROWS": 8, "num_warps": 1})  # 0: no tile
    monkeypatch.setattr(table, "candidates", candidates)
    monkeypatch.setattr(table, "rows", (({}, candidates[0]),))
    found = tune_triton.tune(case, CPU, instructions, backend="sim:triton")
    assert found == {"quantize_1x128": ({"rows": 70}, candidates[2])}

    monkeypatch.setattr(_triton, "TUNED", tmp_path)
    monkeypatch.setattr(_triton, "chip", lambda index: (90, "NVIDIA H200"))
    monkeypatch.setattr(table, "_chosen", {})
    _triton.tuned.cache_clear()
    path = tune_triton.write({op: [row] for op, row in found.items()}, CPU, tmp_path)
    assert path.name == "nvidia_h200.json" and json.loads(path.read_text())["sm"] == 90
    try:
        assert table(torch.empty(0), rows=70) == candidates[2] and table(torch.empty(0), rows=71) == candidates[0]
        tune_triton.write({"another": [({}, {"B": 1})]}, CPU, tmp_path)
        assert set(json.loads(path.read_text())["ops"]) == {"quantize_1x128", "another"}
    finally:
        _triton.tuned.cache_clear()


@needs_simulator
def test_a_winner_with_wrong_outputs_is_not_taken(monkeypatch):
    case = quantize_1x128(70, 256)
    wrong = type(case)(**{**vars(case), "check": lambda inputs, outputs: "off"})
    with dk.backend("sim:triton"):
        case.run(*case.make(CPU))
    table = _triton.tables["quantize_1x128"]
    monkeypatch.setattr(table, "candidates", ({"ROWS": 8, "num_warps": 1},))
    monkeypatch.setattr(table, "rows", (({}, {"ROWS": 2, "num_warps": 1}),))
    monkeypatch.setattr(table, "_chosen", {})
    assert tune_triton.tune(wrong, CPU, instructions, backend="sim:triton") == {}


def test_rows_are_ordered_by_their_bounds():
    rows = [({"m": 64, "n": 8}, {"B": 1}), ({"m": 8, "n": 8}, {"B": 2}), ({"n": 8, "m": 64}, {"B": 3})]
    assert tune_triton.ordered(rows) == [({"m": 8, "n": 8}, {"B": 2}), ({"n": 8, "m": 64}, {"B": 3})]


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune_triton.main([]) == 2 and "sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("op", ["quantize_1x128"])
def test_a_forced_table_is_given_back(op):
    import dsv3_kernels.quant._triton_quantize_1x128  # noqa: F401

    table = _triton.tables[op]
    with tune_triton.forced(op, {"ROWS": 5}):
        assert table(torch.empty(0), rows=3) == {"ROWS": 5}
    assert table(torch.empty(0), rows=3) == dict(table.rows[0][1])
