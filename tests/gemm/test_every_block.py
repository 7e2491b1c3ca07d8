"""Every FP8 GEMM kernel under every schedule, until each basic block of its PTX has run; and beyond 2^31 elements."""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checks import same_bits
from operands import canvas, check, codes, make, only_wrote, product, scales
from simulated import SCHEDULES, coverage, launches, needs_simulator, schedule
from torch import Tensor

from dsv3_kernels import _host
from dsv3_kernels.gemm import _cuda

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "build"))
from tools import NullDriver

BF16, F32 = torch.bfloat16, torch.float32
KERNELS = [name for name, row in _host.kernels().items() if re.match(r"fp8_\w*(gemm|wgrad)_\d+x", name)]
# Output's dtype, its first column (1: rows that no vector store may touch), bias, whether it adds to what is there.
VARIANTS = [
    (BF16, 8, None, False),
    (BF16, 8, F32, True),
    (BF16, 1, BF16, True),
    (F32, 8, BF16, True),
    (F32, 1, None, True),
    (F32, 8, None, False),
]
Run = Callable[[], Tensor]


def parts(kernel: str) -> tuple[str, int, int]:
    op, rows, columns = re.match(r"(\w+?)_(\d+)x(\d+)", kernel).groups()
    return op, int(rows), int(columns)


def besides(columns: int) -> int:
    """Columns more for a pair of CTAs, which takes an even number of their tiles."""
    return 128 if columns == 256 else 0


def fresh(shape: tuple[int, ...], dtype: torch.dtype, offset: int, accumulate: bool) -> tuple[Tensor, Tensor, Tensor]:
    """An output on its canvas, and what it adds to, in float64."""
    out, memory = canvas(shape, dtype, offset=offset)
    if accumulate:
        out.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(2)))
        return out, memory, out.double()
    return out, memory, torch.zeros(shape, dtype=torch.float64)


def dense(kernel: str) -> Iterator[Run]:
    """First, for every schedule: two tiles on one CTA, each the main loop's four k-blocks and one with a tail."""
    _, rows, columns = parts(kernel)
    m, n, few = rows - 3, columns + 24 + besides(columns), rows < 128
    long, short, none = (make(m, n, k, by_row=kernel.endswith("row")) for k in (528, 16, 0))
    by_row = make(m, n, 400, by_row=True)
    cases = [(long, 1, VARIANTS[0])]
    if few:  # K shared out, in the end over more CTAs than it has k-blocks
        cases += [(long, 2, VARIANTS[1]), (by_row, 8, VARIANTS[0])]
    cases += [(short, 1, variant) for variant in VARIANTS] + [(none, 1, VARIANTS[1])]
    for case, split, (dtype, offset, bias_dtype, accumulate) in cases:
        bias = None if bias_dtype is None else torch.arange(n).to(bias_dtype)

        def run(case=case, split=split, dtype=dtype, offset=offset, bias=bias, accumulate=accumulate) -> Tensor:
            out, memory, old = fresh((m, n), dtype, offset, accumulate)
            args = (case.a, case.a_scale, case.b, case.b_scale, bias)
            _cuda._gemm(*args, f"{rows}x{columns}/{split}", 1 if split == 1 else None, out, accumulate)
            plus = old if bias is None else old + bias.double()
            check(out, case.wanted + plus, case.size + plus.abs())
            only_wrote(memory, out)
            return out

        yield run


def groups(kernel: str) -> Iterator[Run]:
    """Grouped and masked: an empty group, one of one row, one of two tiles; more groups than a warp has lanes; no K."""
    op, rows, columns = parts(kernel)
    by_row, masked = kernel.endswith("row"), op == "fp8_masked_gemm"
    ragged = [1, 0, rows + 2]
    cases = [(ragged, 528, by_row, VARIANTS[0]), ([1] * 35, 16, by_row or rows < 128, VARIANTS[0])]
    cases += [(ragged, 16, by_row, variant) for variant in VARIANTS] + [([2, 1], 0, by_row, VARIANTS[0])]
    for counts, k, with_rows, (dtype, offset, _, accumulate) in cases:
        n = (columns if counts is ragged else 0) + 8 + besides(columns)
        generator = torch.Generator().manual_seed(3)
        blocks, ends = (k + 127) // 128, [0, *torch.tensor(counts).cumsum(0).tolist()]
        planes, most = (len(counts), max(counts)) if masked else (1, ends[-1])
        a, b = (
            torch.stack([codes(x, k, generator).view(torch.uint8) for _ in range(y)]).view(torch.float8_e4m3fn)
            for x, y in ((most, planes), (n, len(counts)))
        )
        a_scale = torch.rand(planes, most, blocks, generator=generator) + 0.5
        b_scale = torch.rand(len(counts), n if with_rows else (n + 127) // 128, blocks, generator=generator) + 0.5
        places = [(g, slice(0, c)) if masked else (0, slice(ends[g], ends[g + 1])) for g, c in enumerate(counts)]
        nobodys = torch.ones(planes, most, dtype=torch.bool)
        for place in places:
            nobodys[place] = False
        operands = [a, a_scale, b, b_scale, torch.tensor(counts if masked else ends, dtype=torch.int32)]
        if not masked:
            operands[:2] = a[0], a_scale[0]

        def run(
            operands=operands, places=places, nobodys=nobodys, dtype=dtype, offset=offset, accumulate=accumulate
        ) -> Tensor:
            n, n_rows = operands[2].shape[1], int((~nobodys).sum())
            out, memory, old = fresh((*nobodys.shape, n), dtype, offset, accumulate)
            out[nobodys] = torch.nan
            where = out if masked else out[0]
            _cuda._grouped(getattr(_host, op), *operands, where, accumulate, 2, None, f"{rows}x{columns}")
            for g, (plane, span) in enumerate(places):
                left = operands[:2] if not masked else (operands[0][plane], operands[1][plane])
                wanted, size = product(left[0][span], left[1][span], operands[2][g], operands[3][g])
                was = old[plane, span]
                check(out[plane, span], wanted + was, size + was.abs(), f"group {g}")
            assert int((~memory.isnan()).sum()) == n_rows * n
            return out

        yield run


def wgrad(kernel: str) -> Iterator[Run]:
    """Groups of five k-blocks, none and one."""
    op, rows, columns = parts(kernel)
    m, n, bounds = rows - 3, columns + 8 + besides(columns), [0, 640, 640, 768]
    generator = torch.Generator().manual_seed(5)
    a, b = codes(m, 768, generator), codes(n, 768, generator)
    a_scale, b_scale = scales(m, 6, generator, "k"), scales(n, 6, generator, "mn")
    for index, (dtype, offset, _, accumulate) in enumerate(VARIANTS):
        ends = bounds if index < 2 else [0, 0, 128]

        def run(ends=ends, dtype=dtype, offset=offset, accumulate=accumulate) -> Tensor:
            count = len(ends) - 1
            out, memory, old = fresh((count, m, n), dtype, offset, accumulate)
            operands = (a, a_scale, b, b_scale, torch.tensor(ends, dtype=torch.int32), out)
            _cuda._grouped(getattr(_host, op), *operands, accumulate, 2, None, f"{rows}x{columns}")
            for g in range(count):
                k, blocks = slice(ends[g], ends[g + 1]), slice(ends[g] // 128, ends[g + 1] // 128)
                wanted, size = product(a[:, k], a_scale[:, blocks], b[:, k], b_scale[:, blocks])
                check(out[g], wanted + old[g], size + old[g].abs(), f"group {g}")
            assert int((~memory.isnan()).sum()) == out.numel()
            return out

        yield run


@needs_simulator
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_block_under_every_schedule(kernel: str) -> None:
    op = parts(kernel)[0]
    runs = list({"fp8_gemm": dense, "fp8_grouped_wgrad": wgrad}.get(op, groups)(kernel))
    with coverage(kernel) as seen:
        with launches(kernel, len(runs)):
            first = [run() for run in runs]
        for options in SCHEDULES.values():
            with schedule(**options), launches(kernel, 2):
                assert all(same_bits(run(), out) for run, out in zip(runs[:2], first, strict=False))
    assert seen.unreached() == []


# Beyond 2^31 elements. Memory that nobody touches costs nothing.

STRIDE = 2**30 + 8  # the third row is past 2^31 elements, and past 2^32 bytes


@needs_simulator
@pytest.mark.parametrize("kernel", ["fp8_gemm_8x128", "fp8_gemm_128x128_block"])
def test_rows_beyond_32_bits(kernel: str) -> None:
    case = make(3, 24, 128)
    memory = torch.empty(2 * STRIDE + 25, dtype=BF16)
    for offset in (0, 1):
        out = memory[offset:].as_strided((3, 24), (STRIDE, 1), offset)
        memory[2 * STRIDE - 8 :] = torch.nan
        with launches(kernel):
            _cuda._gemm(case.a, case.a_scale, case.b, case.b_scale, None, kernel.split("_")[2], None, out, False)
        check(out, case.wanted, case.size)
        around = torch.ones(33, dtype=torch.bool)
        around[8 + offset : 32 + offset] = False
        assert memory[2 * STRIDE - 8 :][around].isnan().all()


@needs_simulator
def test_groups_beyond_32_bits() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = codes(8, 256, generator), codes(8, 256, generator)
    a_scale, b_scale = scales(8, 2, generator, "k"), scales(8, 2, generator, "k")
    out = torch.empty(2 * STRIDE + 64, dtype=BF16).as_strided((2, 8, 8), (2 * STRIDE, 8, 1))
    with launches("fp8_grouped_wgrad_128x128"):
        args = (a, a_scale, b, b_scale, torch.tensor([0, 128, 256], dtype=torch.int32), out)
        _cuda._grouped(_host.fp8_grouped_wgrad, *args, False, None)
    for g in range(2):
        k = slice(128 * g, 128 * g + 128)
        check(out[g], *product(a[:, k], a_scale[:, g : g + 1], b[:, k], b_scale[:, g : g + 1]))


@pytest.fixture(scope="module")
def driver() -> NullDriver:
    return NullDriver()


def test_parameters_of_more_than_32_bits(driver: NullDriver) -> None:
    """M N = 2.8e9: what the kernel is told, and what the simulator would be."""
    m, n = 70000, 40000
    a, b = (torch.empty(x, 128, dtype=torch.uint8).view(torch.float8_e4m3fn) for x in (m, n))
    out = torch.empty(m, n, dtype=BF16)
    driver.reset()
    with _host.use_driver(driver.path):
        _cuda._gemm(a, torch.empty(m, 1), b, torch.empty(313, 1), None, "128x128", None, out, False)
    (launch,) = driver.launches
    _, _, row_stride = struct.unpack_from("<3q", launch.params, 2 * 128 + 2 * 40)
    assert row_stride == n and struct.unpack_from("<5i", launch.params, 2 * 128 + 2 * 40 + 40 + 12) == (
        m,
        n,
        1,
        547,
        313,
    )
    assert driver.buffers[-1] == (out.data_ptr(), 2 * m * n, 2) and m * n > 2**31


def test_more_than_the_kernels_count_is_refused(driver: NullDriver) -> None:
    """Extents and tiles are 32-bit: an operand that has one row of memory stands for billions."""
    row = torch.zeros(1, 16, dtype=torch.uint8).view(torch.float8_e4m3fn)
    many, scale = row.expand(2**31, 16), torch.zeros(1, 1)
    with _host.use_driver(driver.path):
        with pytest.raises(RuntimeError, match=r"^fp8_gemm: M: got 2147483648, wanted less than 2\^31"):
            out = torch.zeros(1, 8).expand(2**31, 8)
            _cuda._gemm(many, scale.expand(2**31, 1), row.expand(8, 16), scale, None, "fixed", None, out, False)
        with pytest.raises(RuntimeError, match=r"^fp8_gemm: tiles of the output: got 4398046511104, wanted"):
            half, out = row.expand(2**28, 16), torch.zeros(1, 1).expand(2**28, 2**28)
            blocks = scale.expand(2**21, 1)
            _cuda._gemm(half, scale.expand(2**28, 1), half, blocks, None, "fixed", None, out, False)
        with pytest.raises(RuntimeError, match=r"^fp8_gemm: a_scale: got a row stride of 16777216 elements"):
            wide = torch.empty(2**24 + 1).as_strided((2, 1), (2**24, 1))
            _cuda._gemm(
                row.expand(2, 16), wide, row.expand(8, 16), scale, None, "fixed", None, torch.zeros(2, 8), False
            )
