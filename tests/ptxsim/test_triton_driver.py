"""Triton's own launch code, led into the simulator."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
import triton_kernels as kernels
from simulator import LIBRARY
from triton.tools.tensor_descriptor import TensorDescriptor

from dsv3_kernels import _triton_simulator


@pytest.fixture
def driver(sim):
    with _triton_simulator.active(str(LIBRARY)):
        yield sim


@triton.autotune([triton.Config({"BLOCK": 128}), triton.Config({"BLOCK": 512}, num_warps=2)], key=["n"])
@triton.jit
def scale(x, out, factor, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) * factor, mask=i < n)


@triton.jit
def host_descriptors(da, db, dc, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(da.load([m, k]), db.load([n, k]).T, acc)
    dc.store([m, n], acc.to(tl.bfloat16))


def test_launch_with_a_grid_function(driver):
    x, y = torch.randn(1000), torch.randn(1000)
    out = torch.full((1000,), float("nan"))
    kernels.add[lambda meta: (triton.cdiv(1000, meta["BLOCK"]),)](x, y, out, 1000, BLOCK=256)
    assert torch.equal(out, x + y)
    assert driver.counters()["kernel"] == "add"
    kernels.add[(0,)](x, y, out, 0, BLOCK=256)


def test_views_and_autotuning(driver):
    x, out = torch.randn(2, 700), torch.zeros(3, 700)
    scale[lambda meta: (triton.cdiv(700, meta["BLOCK"]),)](x[1], out[1], 2.5, 700)
    assert torch.equal(out[1], x[1] * 2.5) and not out[0].any() and not out[2].any()
    with pytest.raises(RuntimeError, match="out-of-bounds global"):
        kernels.add[(1,)](x, x, torch.empty(10), 700, BLOCK=1024)


@pytest.mark.parametrize("timing", ["early", "late"])
def test_host_tensor_descriptors(driver, timing):
    driver.option(timing=timing)
    a, b = torch.randn(100, 192, dtype=torch.bfloat16), torch.randn(72, 192, dtype=torch.bfloat16)
    c = torch.full((100, 72), float("nan"), dtype=torch.bfloat16)
    args = [TensorDescriptor.from_tensor(t, [64, 64]) for t in (a, b, c)]
    host_descriptors[(2, 2)](*args, 192, BM=64, BN=64, BK=64)
    want = a.double() @ b.double().T
    assert (c.double() - want).abs().max() < 2**-7 * want.abs().max()
    assert driver.counters()["tma_read"] > 0


def test_device_tensor_descriptors_need_no_allocator(driver):
    a, b = torch.randn(64, 128, dtype=torch.bfloat16), torch.randn(64, 128, dtype=torch.bfloat16)
    c = torch.full((64, 64), float("nan"), dtype=torch.bfloat16)
    kernels.matmul_tma[(1, 1)](a, b, c, 64, 64, 128, BM=64, BN=64, BK=64)
    want = a.double() @ b.double().T
    assert (c.double() - want).abs().max() < 2**-7 * want.abs().max()


def test_driver_is_put_back(sim):
    before = triton.runtime.driver._active
    with _triton_simulator.active(str(LIBRARY)):
        assert triton.runtime.driver._active is not before
    assert triton.runtime.driver._active is before
