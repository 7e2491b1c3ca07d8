"""fp8_grouped_gemm_swiglu_quantize's kernels through the simulator: always the bits of the two ops in a row."""

from __future__ import annotations

import pytest
import torch
from checks import same_bits
from simulated import SCHEDULES, counters, coverage, launches, needs_simulator, schedule
from torch import Tensor

import dsv3_kernels as dk
from dsv3_kernels.gemm import _cuda

pytestmark = needs_simulator

BLOCK, ROW = "fp8_grouped_gemm_swiglu_quantize_block", "fp8_grouped_gemm_swiglu_quantize_row"
NAN_CODE = 0x7F
GROUPS = {
    "ragged": [0, 3, 3, 131, 132],  # a boundary inside a tile, an empty group, one row
    "many": [0, *range(1, 36)],  # more groups than a warp has lanes
    "short": [0, 20, 40],
    "none": [0, 0, 0],
}


class Case:
    """Operands whose unowned rows are NaN, outputs inside canaries; `got` are the owned rows' codes and scales."""

    def __init__(self, groups: str, f: int, k: int, *, by_row: bool = False, weighted: bool = True, seed: int = 0):
        self.random = torch.Generator().manual_seed(seed)
        bounds = GROUPS[groups]
        self.used, self.f, blocks = bounds[-1], f, -(-k // 128)
        rows, count = self.used + 5, len(bounds) - 1
        self.offsets = torch.tensor(bounds, dtype=torch.int32)
        self.a, self.b = self.codes(rows, k), self.codes(count * 2 * f, k).view(count, 2 * f, k)
        self.a_scale = self.scales(blocks, rows).t()
        self.b_scale = self.scales(count, 2 * f if by_row else -(-2 * f // 128), blocks)
        self.weights = torch.randn(rows, 2, generator=self.random)[:, 1] if weighted else None
        for unowned in (self.a_scale, self.weights):
            if unowned is not None:
                unowned[self.used :] = torch.nan
        self.a[self.used :].view(torch.uint8).fill_(NAN_CODE)

    def codes(self, rows: int, columns: int) -> Tensor:
        values = torch.randint(0, 256, (rows, columns), generator=self.random, dtype=torch.int32)
        return torch.where(values & 0x7F == NAN_CODE, 0x38, values).to(torch.uint8).view(torch.float8_e4m3fn)

    def scales(self, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=self.random) + 0.5) / 256

    def run(self, kernel: str, *, pow2: bool = False, sms: int | None = None, offset: int = 8) -> list[Tensor]:
        rows = self.a.shape[0]
        memory = torch.full((rows * self.f + 32,), 0x55, dtype=torch.uint8)
        q = memory[offset : offset + rows * self.f].view(torch.float8_e4m3fn).view(rows, self.f)
        scales = torch.full((-(-self.f // 128) + 1, rows + 3), -1.0)
        scale = scales[:-1, :rows].t()
        args = self.a, self.a_scale, self.b, self.b_scale, self.offsets, self.weights, pow2, sms, q, scale
        with launches(kernel):
            _cuda.fp8_grouped_gemm_swiglu_quantize(*args)
        mine = slice(offset, offset + self.used * self.f)
        memory_rest, scales_rest = memory.clone(), scales.clone()
        memory_rest[mine], scales_rest[:-1, : self.used] = 0x55, -1.0
        assert (memory_rest == 0x55).all() and (scales_rest == -1).all(), "wrote what no group owns"
        return [q[: self.used].clone(), scale[: self.used].contiguous()]

    def in_two_ops(self, pow2: bool = False) -> list[Tensor]:
        with dk.backend("sim:cuda"):
            operands = self.a, self.a_scale, self.b, self.b_scale, self.offsets
            gate_up = dk.fp8_grouped_gemm(*operands, out_dtype=torch.float32)[: self.used]
            weights = None if self.weights is None else self.weights[: self.used]
            q, scale = dk.silu_mul_quantize_1x128(gate_up, weights=weights, pow2_scale=pow2)
        return [q, scale.contiguous()]


CASES = {
    # groups, F, K, scales of B by row, weights, SMs, bytes past an aligned address
    BLOCK: [
        ("ragged", 256, 5 * 128 + 16, False, True, 1, 8),  # ring and parity wrap over several tiles of one CTA
        ("many", 128, 16, False, False, 3, 1),  # codes byte by byte
    ],
    ROW: [
        ("short", 136, 144, False, True, None, 8),  # up begins inside a block of scales; a tail of F
        ("short", 20, 272, True, False, 1, 8),  # F no multiple of 8: byte by byte
        ("ragged", 136, 144, True, True, 2, 8),
    ],
}


@pytest.mark.parametrize("kernel", CASES)
def test_the_two_ops_in_a_row_and_every_block(kernel: str) -> None:
    with coverage(kernel) as seen:
        for pow2, (groups, f, k, by_row, weighted, sms, offset) in enumerate(CASES[kernel]):
            case = Case(groups, f, k, by_row=by_row, weighted=weighted)
            got = case.run(kernel, pow2=bool(pow2), sms=sms, offset=offset)
            assert same_bits(got, case.in_two_ops(bool(pow2))), (groups, f, k)
            assert same_bits(got, case.run(kernel, pow2=bool(pow2), offset=offset)), "another grid gives other bits"
    assert seen.unreached() == []


@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("kernel", CASES)
def test_any_schedule(kernel: str, options: dict[str, str]) -> None:
    case = Case("short", 128, 5 * 128 + 16, by_row=kernel == ROW)
    first = case.run(kernel, sms=1)
    with schedule(**options):
        assert same_bits(case.run(kernel, sms=1), first)


def test_groups_without_rows_and_products_without_k() -> None:
    assert Case("none", 128, 128).run(BLOCK)[0].numel() == 0
    case = Case("short", 128, 0)
    q, scale = case.run(BLOCK)
    assert not (q.view(torch.uint8) & 0x7F).any() and torch.equal(scale, torch.full_like(scale, 1e-4) / 448)


def test_nan_stays_in_its_row_and_block() -> None:
    case = Case("short", 256, 128)
    clean = case.run(BLOCK)
    case.b_scale[0, 3] = torch.nan  # up's second block of 128 columns, of group 0
    case.a_scale[5] = torch.nan
    q, scale = case.run(BLOCK)
    hit = torch.zeros(40, 2, dtype=torch.bool)
    hit[:20, 1], hit[5] = True, True
    assert torch.equal(scale.isnan(), hit)
    spread = hit.repeat_interleave(128, 1)
    assert (q.view(torch.uint8)[spread] == NAN_CODE).all()
    assert torch.equal(q.view(torch.uint8)[~spread], clean[0].view(torch.uint8)[~spread])


def test_budget() -> None:
    """Bytes and cycles per k-block as the file's head has them; every code once; no bank met twice."""
    blocks, case = 3, Case("short", 128, 384)
    case.offsets[1:] = 40  # one group with rows: one tile
    with schedule(banks="1"):
        case.run(BLOCK)
    spent = counters()
    assert spent["wgmma_cycles"] == blocks * 1024 and spent["tma_read"] == blocks * 128 * (45 + 256)
    assert spent["global_write"] == 40 * (128 + 4)
    assert spent["shared_wavefronts"] == spent["shared_ideal"] > 0
