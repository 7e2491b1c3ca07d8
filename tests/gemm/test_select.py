"""The choice of a kernel: a pure function of sizes and SMs, what `explain` prints and what is launched."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import dsv3_kernels as dk
from dsv3_kernels import _host

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "build"))
from tools import NullDriver

E4M3 = torch.float8_e4m3fn
LAYERS = ((2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))


def plan(m: int, n: int, k: int, *, by_row: bool = False, policy: str = "auto", sms: int = 0, op: str = "fp8_gemm"):
    return _host.fp8_plan(op, 1, m, n, k, by_row, 2, policy, 0, sms, -1)


@pytest.fixture(scope="module")
def driver() -> NullDriver:
    return NullDriver()


def operands(m: int, n: int, k: int, by_row: bool = False) -> tuple[torch.Tensor, ...]:
    blocks = -(-k // 128)
    rows = n if by_row else -(-n // 128)
    return (
        torch.empty(m, k, dtype=torch.uint8).view(E4M3),
        torch.empty(m, blocks),
        torch.empty(n, k, dtype=torch.uint8).view(E4M3),
        torch.empty(rows, blocks),
    )


@pytest.mark.parametrize(("n", "k"), LAYERS)
def test_few_rows_take_few_rows(n: int, k: int) -> None:
    """Tokens on wgmma's narrow side up to 64; K is shared out only where all clusters run at once."""
    for m in (1, 8, 16, 32, 48, 64, 100, 128, 512, 4096):
        for by_row in (False, True):
            found = plan(m, n, k, by_row=by_row)
            if m <= 32 and n > 1024:
                assert found["tile"] == (max(8, m), 128)
            if m >= 4096:
                assert found["tile"][0] >= 128 and found["split"] == 1
            assert found["split"] == 1 or (found["waves"] == 1 and found["tiles"] * found["split"] <= 132)
            assert found["us"] > 0 and not found["measured"]


def test_fixed_does_not_look_at_m() -> None:
    for by_row, kernel in ((False, "fp8_gemm_128x128_block"), (True, "fp8_gemm_128x128_row")):
        for m in (1, 64, 4096, 100000):
            found = plan(m, 2112, 7168, by_row=by_row, policy="fixed")
            assert (found["kernel"], found["split"]) == (kernel, 1)


def test_a_named_tile_is_taken() -> None:
    assert plan(1, 2112, 7168, policy="256x128")["kernel"] == "fp8_gemm_256x128_block"
    assert plan(1, 2112, 7168, policy="32x128/8")["split"] == 8
    for policy in ("100x128", "256x128/2", "8x128/3", "best"):
        with pytest.raises(ValueError, match=f"no such kernel: {policy}"):
            plan(1, 2112, 7168, policy=policy)
    with pytest.raises(ValueError, match="no such kernel: 256x128"):
        plan(1, 2112, 7168, by_row=True, policy="256x128")
    with pytest.raises(ValueError, match="not an FP8 GEMM: rope"):
        plan(1, 2112, 7168, op="rope")


def test_more_work_takes_longer() -> None:
    """The model rises with every size, and falls with SMs."""
    for n, k in LAYERS:
        times = [plan(m, n, k)["us"] for m in (1, 64, 128, 1024, 4096)]
        assert times == sorted(times)
        assert plan(1024, n, k, sms=16)["us"] > plan(1024, n, k, sms=64)["us"] > plan(1024, n, k)["us"]
    # 4096 x 7168 at M = 4096 takes 152 us at the datasheet's rate, 1979 TFLOPS at most
    assert 2 * 4096 * 4096 * 7168 / 1979e6 < plan(4096, 4096, 7168)["us"] < 2.5 * 2 * 4096 * 4096 * 7168 / 1979e6


@pytest.mark.parametrize(("m", "n"), [(1, 2112), (30, 2112), (64, 2112), (200, 2112), (2000, 2112), (2000, 4096)])
@pytest.mark.parametrize("num_sms", [None, 1, 20])
@pytest.mark.parametrize("by_row", [False, True])
def test_what_explain_says_is_launched(driver: NullDriver, m: int, n: int, num_sms: int | None, by_row: bool) -> None:
    from dsv3_kernels.gemm import _cuda

    a = operands(m, n, 1024, by_row)
    found = _cuda.fp8_gemm_plan(*a, None, torch.bfloat16, "auto", num_sms)
    assert found["pair"] == (n == 4096 and num_sms != 1 and not by_row)
    driver.reset()
    with _host.use_driver(driver.path):
        _cuda.fp8_gemm(*a, None, torch.bfloat16, "auto", num_sms, torch.empty(m, n, dtype=torch.bfloat16))
    (launch,) = driver.launches
    assert (launch.kernel, launch.cluster) == (found["kernel"], 2 if found["pair"] else found["split"])
    assert launch.grid[0] <= (num_sms or 132) and launch.grid[0] % launch.cluster == 0


@pytest.mark.parametrize(("n", "k"), LAYERS)
def test_pairs_have_columns_for_both(n: int, k: int) -> None:
    """Two CTAs share A where N has an even number of 128 columns, and many rows make L2 the next bound."""
    for m in (1024, 4096):
        found = plan(m, n, k)
        assert found["pair"] == (n > 2112 and found["tile"] == (256, 256)) and (n % 256 == 0 or not found["pair"])
    assert any(plan(4096, *layer)["pair"] for layer in LAYERS)
    assert not plan(4096, 4096, 7168, sms=1)["pair"]
    for op in ("fp8_grouped_gemm", "fp8_grouped_wgrad"):
        assert plan(4096, 4096, 7168, by_row=op.endswith("wgrad"), op=op)["pair"]
    with pytest.raises(ValueError, match="no such kernel: 256x256"):
        plan(4096, 2112, 7168, policy="256x256")


def test_explain_prints_the_plan() -> None:
    a = operands(5, 2112, 7168)
    large = str(dk.explain("fp8_gemm", *operands(4096, 4096, 7168)))
    assert "fp8_gemm_256x256_block: 256 tiles of 256 x 256 to a pair of CTAs, 4 stages, waves: 4; " in large
    text = str(dk.explain("fp8_gemm", *a))
    assert "on Hopper: fp8_gemm_8x128: 17 tiles of 8 x 128, K shared by 4, 12 stages, waves: 1; " in text
    assert "bound by memory (unmeasured model)" in text
    assert dk.explain("fp8_gemm", *a, None, torch.float32, "fixed").plan["kernel"] == "fp8_gemm_128x128_block"
    assert dk.explain("fp8_gemm", *a, None, torch.float32, "auto", 4).plan["split"] == 1
    grouped = (a[0], a[1], a[2][None], a[3][None])
    assert dk.explain("fp8_grouped_gemm", *grouped, torch.zeros(2)).plan["kernel"] == "fp8_grouped_gemm_8x128"
    slabs = (a[0][None], a[1][None], *grouped[2:], torch.zeros(1))
    assert dk.explain("fp8_masked_gemm", *slabs, 1).plan["kernel"] == "fp8_masked_gemm_8x128"
    wide = (*operands(256, 256, 256, True), torch.zeros(3))
    assert dk.explain("fp8_grouped_wgrad", *wide).plan["waves"] == 1
    assert dk.explain("fp8_gemm").plan == {} and dk.explain("fp8_gemm", *operands(0, 8, 16)).plan == {}
