"""Promotion every 128 of K, against a kernel that does without, where tensor cores add as a GPU's do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from operands import product
from simulated import launches, needs_simulator, schedule

from dsv3_kernels.gemm import _cuda

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "build"), str(TESTS / "ptxsim")]
from simulator import Kernel, Simulator  # noqa: E402
from tools import ROOT, needs_nvcc, toolchain  # noqa: E402

pytestmark = [needs_simulator, needs_nvcc]


@pytest.fixture
def without_promotion(tmp_path: Path) -> Kernel:
    ptx, source = tmp_path / "kernel.ptx", Path(__file__).with_name("without_promotion.cu")
    flags = ["-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", f"-I{ROOT / 'csrc'}", "-ptx"]
    status, log = toolchain.run([toolchain.find_nvcc().nvcc, *flags, "-o", ptx, source])
    assert status == 0, log
    return Simulator().load(ptx.read_text(), "without_promotion")


def test_short_sums_need_promotion(without_promotion: Kernel) -> None:
    """Terms of one sign: an accumulator that runs on over K = 16384 loses what one emptied every 128 keeps."""
    generator, k = torch.Generator().manual_seed(6), 16384
    a = torch.randint(0x30, 0x40, (64, k), generator=generator, dtype=torch.uint8)
    a[8:] = 0  # enough for the point
    b = torch.randint(0x30, 0x40, (8, k), generator=generator, dtype=torch.uint8)
    x, y = a.view(torch.float8_e4m3fn)[:8], b.view(torch.float8_e4m3fn)
    ones = torch.ones(8, k // 128)
    wanted, _ = product(x, ones, y, ones[:1])

    def error(out: torch.Tensor) -> float:
        return float(((out.double() - wanted).abs() / wanted).max())

    carried, exact, promoted = torch.zeros(64, 8), torch.zeros(64, 8), torch.zeros(8, 8)
    with schedule(rounding="hardware"):
        without_promotion.launch(a.numpy(), b.numpy(), carried.numpy(), k, block=128)
        with launches("fp8_gemm_128x128_block"):
            _cuda.fp8_gemm(x, ones, y, ones[:1], None, torch.float32, "fixed", None, promoted)
    with schedule(rounding="float32"):
        without_promotion.launch(a.numpy(), b.numpy(), exact.numpy(), k, block=128)
    assert error(exact[:8]) < 1e-6  # the kernel is right where the accumulator is
    assert 1e-6 < error(promoted) < 1e-3 < 0.1 < error(carried[:8])
