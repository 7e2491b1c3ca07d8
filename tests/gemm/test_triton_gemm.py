"""The Triton GEMMs through the simulator: every tile size, poisoned surroundings, any schedule, every basic block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from checks import same_bits
from operands import NAN_CODE, Case, canvas, check, codes, make, only_wrote, product, scales
from simulated import SCHEDULES, Coverage, coverage, needs_simulator, schedule
from torch import Tensor

import dsv3_kernels as dk
from dsv3_kernels import _triton
from dsv3_kernels.gemm._triton_tile import LARGE, MEDIUM, NARROW, SMALL

pytestmark = needs_simulator


@contextlib.contextmanager
def launched(kernel: str, times: int = 1) -> Iterator[None]:
    """Triton launches inside the block go to the simulator; `kernel` runs so often, and nothing else does."""
    before = dk.launch_counts()
    with dk.backend("sim:triton"):
        yield
    assert dk.launch_counts() - before == {kernel: times}


def gemm(case: Case, out: Tensor, **options) -> None:
    with launched("triton_fp8_gemm"):
        assert dk.fp8_gemm(case.a, case.a_scale, case.b, case.b_scale, out=out, **options) is out


# Configuration, M, N, K, scales of B per row, layout of the scales, policy
TILES = [
    (SMALL, 1, 8, 16, False, "mn", "auto"),  # the smallest
    (SMALL, 33, 72, 300, True, "gaps", "auto"),  # tails of all three; the second tile of N is one column of 16 bytes
    (MEDIUM, 130, 136, 144, False, "k", "auto"),
    (MEDIUM, 65, 136, 129, True, "mn", "auto"),
    (LARGE, 130, 136, 272, False, "mn", "fixed"),
    (LARGE, 100, 264, 640, True, "mn", "fixed"),  # more k-blocks than stages
    (NARROW, 130, 72, 144, True, "k", "fixed"),
]


@pytest.mark.parametrize(("config", "m", "n", "k", "by_row", "layout", "policy"), TILES)
@pytest.mark.parametrize(("dtype", "offset"), [(torch.bfloat16, 8), (torch.float32, 1)])  # 1: no wide store fits
def test_gemm(config, m, n, k, by_row, layout, policy, dtype, offset, monkeypatch) -> None:
    """Programs walk over the tiles; rows, columns and scales around the operands are NaN, and the output's stay."""
    case = make(m, n, k, by_row=by_row, layout=layout)
    seen = []
    launch = _triton.launch
    monkeypatch.setattr(_triton, "launch", lambda *args, **options: seen.append(options) or launch(*args, **options))
    out, memory = canvas((m, n), dtype, offset=offset)
    gemm(case, out, policy=policy)
    assert seen == [config]
    check(out, case.wanted, case.size)
    only_wrote(memory, out)
    again, _ = canvas((m, n), dtype, offset=offset)
    gemm(case, again, policy=policy, num_sms=2)
    assert same_bits(out, again)


@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize(("m", "n", "k", "policy"), [(64, 64, 784, "auto"), (128, 128, 784, "fixed")])
def test_gemm_under_any_schedule(m: int, n: int, k: int, policy: str, options: dict[str, str]) -> None:
    case = make(m, n, k)
    out, again = torch.empty(m, n), torch.empty(m, n)
    gemm(case, out, policy=policy)
    with schedule(**options):
        gemm(case, again, policy=policy)
    check(out, case.wanted, case.size)
    assert same_bits(out, again)


def test_bands() -> None:
    """More rows of tiles than a band has, and a last band that is lower."""
    case = make(64 * 9 + 1, 136, 16)
    out, memory = canvas((64 * 9 + 1, 136), torch.bfloat16)
    gemm(case, out)
    check(out, case.wanted, case.size)
    only_wrote(memory, out)


def everything(seen: Coverage) -> None:
    assert seen.unreached() == []


def test_gemm_reaches_every_block() -> None:
    case = make(130, 136, 300, by_row=True)
    bias, out = torch.randn(136), torch.zeros(130, 136)
    with coverage("triton_fp8_gemm") as seen:
        gemm(case, out, bias=bias, accumulate=True, num_sms=2)
        gemm(make(1, 8, 128), torch.empty(1, 8))
        gemm(make(1, 8, 0), torch.empty(1, 8))
        gemm(make(70, 72, 640), torch.empty(70, 72, dtype=torch.bfloat16), policy="fixed")
    everything(seen)


def grouped(offsets: list[int], total: int, n: int, k: int, by_row: bool):
    """Operands of a grouped product, NaN in the rows that no group owns; and what each group's rows should be."""
    generator = torch.Generator().manual_seed(3)
    groups = len(offsets) - 1
    a, a_scale = codes(total, k, generator), scales(total, -(-k // 128), generator, "mn")
    a.view(torch.uint8)[offsets[-1] :] = NAN_CODE
    a_scale[offsets[-1] :] = torch.nan
    b = torch.stack([codes(n, k, generator).view(torch.uint8) for _ in range(groups)]).contiguous().view(a.dtype)
    b_scale = torch.rand(groups, n if by_row else -(-n // 128), -(-k // 128), generator=generator) + 0.5
    wanted = [
        product(a[start:end], a_scale[start:end], b[g], b_scale[g]) for g, (start, end) in enumerate(pairwise(offsets))
    ]
    return a, a_scale, b, b_scale, torch.tensor(offsets, dtype=torch.int32), wanted


@pytest.mark.parametrize("options", [{}, *SCHEDULES.values()], ids=["early", *SCHEDULES])
@pytest.mark.parametrize(("by_row", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_grouped_gemm(by_row: bool, dtype: torch.dtype, options: dict[str, str]) -> None:
    offsets, n, k = [0, 3, 3, 150, 150, 214, 215], 72, 144
    *operands, wanted = grouped(offsets, 240, n, k, by_row)
    out, memory = canvas((240, n), dtype)
    with coverage("triton_fp8_grouped_gemm") as seen, launched("triton_fp8_grouped_gemm"), schedule(**options):
        dk.fp8_grouped_gemm(*operands, out=out, num_sms=2)
    everything(seen)
    for g, expected in enumerate(wanted):
        check(out[offsets[g] : offsets[g + 1]], *expected, f"group {g}")
    only_wrote(memory, out[: offsets[-1]])


@pytest.mark.parametrize(("by_row", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_masked_gemm(by_row: bool, dtype: torch.dtype) -> None:
    counts, most, n, k = [3, 0, 150, 64, 1], 150, 72, 144
    *operands, _, wanted = grouped([0, *torch.tensor(counts).cumsum(0).tolist()], sum(counts), n, k, by_row)
    a = torch.full((len(counts), most, k), NAN_CODE, dtype=torch.uint8)
    a_scale = torch.full((len(counts), most, 2), torch.nan)
    start = 0
    for g, rows in enumerate(counts):
        a[g, :rows] = operands[0].view(torch.uint8)[start : start + rows]
        a_scale[g, :rows] = operands[1][start : start + rows]
        start += rows
    out, memory = canvas((len(counts), most, n), dtype)
    args = a.view(torch.float8_e4m3fn), a_scale, *operands[2:], torch.tensor(counts, dtype=torch.int32)
    with coverage("triton_fp8_masked_gemm") as seen, launched("triton_fp8_masked_gemm", 2):
        dk.fp8_masked_gemm(*args, out=out, num_sms=3)
        dk.fp8_masked_gemm(*args, out=out)
    everything(seen)
    for g, rows in enumerate(counts):
        check(out[g, :rows], *wanted[g], f"group {g}")
    assert int((~memory.isnan()).sum()) == sum(counts) * n


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("m", "dtype"), [(72, torch.bfloat16), (40, torch.float32)])
def test_grouped_wgrad(m: int, dtype: torch.dtype, accumulate: bool) -> None:
    offsets, n = [0, 128, 128, 128 * 7, 128 * 8], 72
    generator = torch.Generator().manual_seed(5)
    a, b = codes(m, 128 * 9, generator), codes(n, 128 * 9, generator)
    a_scale, b_scale = scales(m, 9, generator, "k"), scales(n, 9, generator, "mn")
    for q, scale in ((a, a_scale), (b, b_scale)):
        q.view(torch.uint8)[:, offsets[-1] :] = NAN_CODE
        scale[:, 8:] = torch.nan
    out, memory = canvas((4, m, n), dtype)
    old = torch.zeros(4, m, n, dtype=torch.float64)
    if accumulate:
        out.copy_(torch.randn(4, m, n, generator=generator))
        out[1] = -0.0  # a sum with anything would be 0.0
        old = out.double()
    args = a, a_scale, b, b_scale, torch.tensor(offsets, dtype=torch.int32)
    with coverage("triton_fp8_grouped_wgrad") as seen, launched("triton_fp8_grouped_wgrad"):
        dk.fp8_grouped_wgrad(*args, out=out, accumulate=accumulate, num_sms=3)
    everything(seen)
    assert same_bits(out[1], torch.full_like(out[1], -0.0 if accumulate else 0.0))
    for g in range(4):
        k, blocks = slice(offsets[g], offsets[g + 1]), slice(offsets[g] // 128, offsets[g + 1] // 128)
        wanted, size = product(a[:, k], a_scale[:, blocks], b[:, k], b_scale[:, blocks])
        check(out[g], wanted + old[g], size + old[g].abs(), f"group {g}")
    assert int((~memory.isnan()).sum()) == out.numel()


@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("f", [128, 148])  # 148: up begins inside a block of B's scales
def test_swiglu_under_any_schedule(f: int, options: dict[str, str]) -> None:
    """The bits of the default schedule, which the op's own tests hold against float64."""
    offsets = [0, 3, 3, 80]
    *operands, _ = grouped(offsets, 90, 2 * f, 144, False)
    operands[3].mul_(2**-9)
    kernel = "triton_fp8_grouped_gemm_swiglu_quantize"
    with coverage(kernel) as seen, launched(kernel, 2):
        first = dk.fp8_grouped_gemm_swiglu_quantize(*operands, num_sms=3)
        with schedule(**options):
            again = dk.fp8_grouped_gemm_swiglu_quantize(*operands)
    everything(seen)
    assert same_bits(first, again) and not first[0].view(torch.uint8)[80:].any()


def test_rows_too_far_apart() -> None:
    """Offsets inside a tile are 32-bit; memory that nobody touches costs nothing."""
    case = make(2, 8, 128)
    memory = torch.empty(1 << 25, dtype=torch.bfloat16)
    far, said = memory.as_strided((2, 8), (1 << 24, 1)), "takes rows less than 16777216 elements apart, got 16777216"
    a = memory.view(torch.float8_e4m3fn).as_strided((2, 128), (1 << 24, 1))
    with dk.backend("sim:triton"):
        with pytest.raises(RuntimeError, match=f"^fp8_gemm: out: Triton {said}"):
            dk.fp8_gemm(case.a, case.a_scale, case.b, case.b_scale, out=far)
        with pytest.raises(RuntimeError, match=rf"^fp8_gemm: .*\(sim:triton: {said}\)"):
            dk.fp8_gemm(a, case.a_scale, case.b, case.b_scale)
        bounds, b = torch.tensor([0, 2], dtype=torch.int32), (case.b[None], case.b_scale[None])
        with pytest.raises(RuntimeError, match=rf"^fp8_grouped_gemm: .*{said}"):
            dk.fp8_grouped_gemm(case.a, case.a_scale, *b, bounds, out=far)
        with pytest.raises(RuntimeError, match=rf"^fp8_masked_gemm: .*{said}"):
            dk.fp8_masked_gemm(case.a[None], case.a_scale[None], *b, bounds[1:], out=far[None])
        with pytest.raises(RuntimeError, match=rf"^fp8_grouped_wgrad: out: Triton {said}"):
            dk.fp8_grouped_wgrad(
                case.a, case.a_scale, case.b, case.b_scale.expand(8, 1), torch.tensor([0, 128]).int(), out=far[None]
            )
        with pytest.raises(RuntimeError, match=rf"^fp8_grouped_gemm_swiglu_quantize: .*{said}"):
            dk.fp8_grouped_gemm_swiglu_quantize(a, case.a_scale, *b, bounds)
