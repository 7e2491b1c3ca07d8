"""What launchers of Triton kernels share: counts, configurations, and what is said where they cannot run."""

from __future__ import annotations

import json

import pytest
import torch
from simulated import needs_simulator

import dsv3_kernels as dk
from dsv3_kernels import _triton, backends

X = torch.zeros(3, 256)


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.setattr(_triton, "tables", {})


@needs_simulator
def test_launches_are_counted_and_an_empty_grid_is_none():
    def count():
        return dk.launch_counts()["triton_quantize_1x128"]

    with dk.backend("sim:triton"):
        before = count()
        dk.quantize_1x128(X)
        assert count() == before + 1
        dk.quantize_1x128(X[:0])
        assert count() == before + 1
    dk.quantize_1x128(X)
    assert count() == before + 1 and dk.launch_counts()["triton_nothing"] == 0


@needs_simulator
@pytest.mark.parametrize(("kernel", "fused"), [("triton_silu_mul_quantize_1x128", True), ("triton_rope", False)])
def test_whether_products_and_sums_are_fused_does_not_depend_on_the_environment(monkeypatch, kernel, fused):
    made = []
    launch = _triton.launch
    monkeypatch.setattr(_triton, "launch", lambda *args, **options: made.append(launch(*args, **options)))
    for variable in ("0", "1"):
        monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", variable)
        with dk.backend("sim:triton"):
            if kernel == "triton_rope":
                dk.rope(torch.zeros(3, 1, 64), torch.arange(3), torch.zeros(8, 64))
            else:
                dk.silu_mul_quantize_1x128(X)
    assert [m.metadata.enable_fp_fusion for m in made] == [fused, fused] and {m.name for m in made} == {kernel}


@needs_simulator
def test_explain_names_the_kernels():
    with dk.backend("sim:triton"):
        said = dk.explain("quantize_1x128", X, False, "mn")
    assert (said.backend, said.kernels) == ("sim:triton", ("triton_quantize_1x128",))


@pytest.mark.parametrize(("n", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (4, 4), (129, 256)])
def test_next_power_of_2(n, power):
    assert _triton.next_power_of_2(n) == power


def test_the_first_row_whose_bounds_hold(tables):
    table = _triton.Table("op", ({"m": 64, "n": 8}, {"B": 1}), ({"sm": 89}, {"B": 2}), ({}, {"B": 3}))
    assert table(X, m=64, n=8) == {"B": 1} and table(X, m=65, n=8) == table(X, m=1, n=9) == {"B": 3}
    with pytest.raises(ValueError, match=r"^Table: op: the last row must have no bounds$"):
        _triton.Table("op", ({"m": 64}, {"B": 1}))


def test_what_was_measured_on_a_gpu_goes_first(tables, monkeypatch, tmp_path):
    ops = {"op": [[{"m": 4}, {"B": 7}]]}
    (tmp_path / "nvidia_l40s.json").write_text(json.dumps({"gpu": "NVIDIA L40S", "sm": 89, "ops": ops}))
    monkeypatch.setattr(_triton, "TUNED", tmp_path)
    monkeypatch.setattr(_triton, "chip", lambda index: (89, "NVIDIA L40S"))
    _triton.tuned.cache_clear()
    table = _triton.Table("op", ({"sm": 89}, {"B": 2}), ({}, {"B": 3}))
    assert table(X, m=4) == {"B": 7} and table(X, m=5) == {"B": 2}
    _triton.tuned.cache_clear()


def test_fp8_needs_compute_capability_8_9(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(backends, "_capability", lambda device: (8, 6))
    gpu = torch.device("cuda:0")
    assert backends.missing("quantize_1x128", "triton", gpu) == "needs compute capability 8.9 (FP8), got 8.6"
    for op, row in backends.OPS.items():
        assert dk.is_supported(op, gpu, "triton") == (row.triton and not row.fp8), op
    assert not dk.is_supported("mla_prologue", gpu, "triton") and dk.is_supported("mla_decode", gpu, "triton")
    monkeypatch.setattr(backends, "_capability", lambda device: (7, 5))
    monkeypatch.setitem(backends.OPS, "rope", type(backends.OPS["rope"])("mla", triton=True))
    assert backends.missing("rope", "triton", gpu) == "needs compute capability 8.0, got 7.5"


def test_without_triton(monkeypatch):
    monkeypatch.setattr(backends, "_triton_missing", lambda: "triton is not installed")
    with (
        dk.backend("triton"),
        pytest.raises(RuntimeError, match=r"cannot serve this call \(triton: triton is not installed\)$"),
    ):
        dk.quantize_1x128(X)
