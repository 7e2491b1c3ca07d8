"""The FP8 GEMM kernels through the simulator: their PTX and their launchers, element by element against float64.

Shapes are the smallest that reach a case: ring and parity wrap, tails, several tiles on one CTA, ragged groups.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from checks import same_bits
from operands import NAN_CODE, Case, canvas, check, codes, make, only_wrote, product, scales
from simulated import counters, launches, needs_simulator, schedule
from torch import Tensor

import dsv3_kernels as dk
from dsv3_kernels import _host, _simulator
from dsv3_kernels.gemm import _cuda

pytestmark = needs_simulator


def run(kernel: str, call, *args) -> None:
    with launches(kernel):
        call(*args)


def gemm(
    case: Case, out: Tensor, kernel: str, *, bias: Tensor | None = None, sms: int | None = None, split: int = 1
) -> None:
    policy = f"{kernel.split('_')[2]}/{split}"
    run(kernel, _cuda.fp8_gemm, case.a, case.a_scale, case.b, case.b_scale, bias, out.dtype, policy, sms, out)


def grouped(kernel: str, *operands: Tensor, accumulate: bool = False, sms: int | None = None) -> None:
    """`operands`: a, a_scale, b, b_scale, offsets or counts, out."""
    op, tile = re.fullmatch(r"(\w+?)_(\d+x\d+)\w*", kernel).groups()
    run(kernel, _cuda._grouped, getattr(_host, op), *operands, accumulate, sms, None, tile)


SQUARE, ROW = "fp8_gemm_128x128_block", "fp8_gemm_128x128_row"
TALL, WIDE = "fp8_gemm_256x128_block", "fp8_gemm_128x192_block"
PAIR, TALL_PAIR = "fp8_gemm_128x256_block", "fp8_gemm_256x256_block"  # two CTAs that share A


@pytest.mark.parametrize(
    ("kernel", "m", "n", "k", "sms"),
    [
        (SQUARE, 128, 128, 128, None),  # one tile, one k-block
        (SQUARE, 1, 8, 16, None),  # the smallest
        (SQUARE, 77, 120, 80, None),  # tails of M, N and K
        (SQUARE, 128, 128, 7 * 128, None),  # ring wrap: six stages
        (SQUARE, 64, 64, 13 * 128 + 48, None),  # parity wrap, and a tail of K
        (SQUARE, 129, 136, 384, None),  # two by two tiles, three of them slivers
        (ROW, 128, 128, 128, None),
        (ROW, 77, 120, 7 * 128 + 16, None),
        (ROW, 200, 264, 256, 1),  # six tiles on one CTA: the ring runs on across tiles
        (TALL, 256, 128, 128, 1),
        (TALL, 250, 120, 9 * 128 + 16, 1),  # ring and parity wrap: four stages
        (TALL, 512, 256, 128, 1),  # several tiles on one CTA
        (WIDE, 128, 192, 128, 1),
        (WIDE, 100, 184, 11 * 128 + 16, 1),  # ring and parity wrap: five stages
        (WIDE, 128, 384, 256, 1),  # the second tile starts inside a block of B's scales
        (PAIR, 128, 256, 128, 2),
        (PAIR, 1, 136, 16, 2),  # the smallest: the second CTA has 8 columns, and half of A is no row at all
        (PAIR, 130, 504, 13 * 128 + 48, 2),  # ring and parity wrap: six stages; four tiles on one pair
        (PAIR, 200, 752, 384, 4),  # two pairs, six tiles
        (TALL_PAIR, 250, 248, 9 * 128 + 16, 2),  # ring and parity wrap: four stages
        (TALL_PAIR, 300, 504, 256, 2),  # several tiles on one pair
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gemm(kernel: str, m: int, n: int, k: int, sms: int | None, dtype: torch.dtype) -> None:
    case = make(m, n, k, by_row=kernel == ROW)
    out, memory = canvas((m, n), dtype)
    gemm(case, out, kernel, sms=sms)
    check(out, case.wanted, case.size)
    only_wrote(memory, out)
    again, _ = canvas((m, n), dtype)
    gemm(case, again, kernel, sms=sms)
    assert same_bits(out, again)


@pytest.mark.parametrize(
    ("rows", "m", "n", "k", "split", "sms", "by_row"),
    [
        (8, 8, 128, 128, 1, None, False),  # one tile, one k-block
        (8, 1, 8, 16, 1, None, True),  # the smallest
        (8, 5, 136, 25 * 128 + 16, 1, None, True),  # ring and parity wrap: twelve stages; tails of M, N and K
        (8, 3, 136, 400, 8, None, False),  # four k-blocks for eight CTAs
        (16, 20, 264, 256, 1, 1, False),  # six tiles on one CTA: the ring runs on across tiles
        (16, 16, 120, 23 * 128, 2, None, True),
        (32, 31, 264, 21 * 128, 1, None, False),  # ring and parity wrap: ten stages
        (32, 32, 128, 1100, 8, None, True),
        (64, 61, 136, 17 * 128 + 16, 1, None, False),  # ring and parity wrap: eight stages
        (64, 128, 264, 1300, 4, None, False),  # six clusters
        (64, 64, 128, 17 * 128, 2, None, True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gemm_of_few_rows(
    rows: int, m: int, n: int, k: int, split: int, sms: int | None, by_row: bool, dtype: torch.dtype
) -> None:
    case = make(m, n, k, by_row=by_row)
    kernel = f"fp8_gemm_{rows}x128"
    out, memory = canvas((m, n), dtype)
    gemm(case, out, kernel, sms=sms, split=split)
    check(out, case.wanted, case.size)
    only_wrote(memory, out)
    again, _ = canvas((m, n), dtype)
    gemm(case, again, kernel, sms=sms, split=split)
    assert same_bits(out, again)


@pytest.mark.parametrize("split", [2, 8])
def test_parts_of_k_are_summed_in_the_order_of_rank(split: int) -> None:
    """Each CTA's part is what a product over its k-blocks alone gives; their sum has the bits of adding in order."""
    case, blocks = make(30, 264, 9 * 128), 9
    out, wanted = torch.empty(30, 264), torch.zeros(30, 264)
    gemm(case, out, "fp8_gemm_32x128", split=split)
    bounds = [blocks * rank // split for rank in range(split + 1)]
    for first, last in pairwise(bounds):
        k, scale, part = slice(128 * first, 128 * last), slice(first, last), torch.empty(30, 264)
        share = replace(
            case, a=case.a[:, k], b=case.b[:, k], a_scale=case.a_scale[:, scale], b_scale=case.b_scale[:, scale]
        )
        gemm(share, part, "fp8_gemm_32x128")
        wanted += part
    assert same_bits(out, wanted)


@pytest.mark.parametrize("layout", ["k", "gaps"])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("m", [100, 9])
def test_gemm_takes_scales_as_they_are(m: int, layout: str, by_row: bool) -> None:
    case = make(m, 136, 272, by_row=by_row, layout=layout)
    out, _ = canvas((m, 136), torch.float32)
    gemm(case, out, "fp8_gemm_16x128" if m == 9 else ROW if by_row else SQUARE)
    check(out, case.wanted, case.size)


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [8, 1])  # 1: rows that no vector store may touch
@pytest.mark.parametrize(("kernel", "split"), [(SQUARE, 1), ("fp8_gemm_32x128", 1), ("fp8_gemm_64x128", 2)])
def test_gemm_adds_bias_and_what_was_there(
    kernel: str, split: int, bias_dtype, dtype: torch.dtype, offset: int
) -> None:
    case = make(70, 72, 144)
    bias = None if bias_dtype is None else torch.randn(72, generator=torch.Generator().manual_seed(1)).to(bias_dtype)
    out, memory = canvas((70, 72), dtype, offset=offset)
    out.copy_(torch.randn(70, 72, generator=torch.Generator().manual_seed(2)))
    wanted = case.wanted + out.double() + (0 if bias is None else bias.double())
    policy = f"{kernel.split('_')[2]}/{split}"
    run(kernel, _cuda.fp8_gemm_accumulate, case.a, case.a_scale, case.b, case.b_scale, bias, policy, None, out)
    check(out, wanted, case.size + wanted.abs())
    only_wrote(memory, out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("kernel", "m", "n", "cycles", "split"),
    [
        (SQUARE, 128, 128, 512, 1),
        (ROW, 128, 128, 512, 1),
        (TALL, 256, 128, 1024, 1),
        (WIDE, 128, 192, 768, 1),
        (PAIR, 128, 256, 1024, 1),
        (TALL_PAIR, 256, 256, 2048, 1),
        ("fp8_gemm_64x128", 64, 128, 256, 1),
        ("fp8_gemm_64x128", 64, 128, 256, 8),
        ("fp8_gemm_32x128", 32, 128, 128, 2),
        ("fp8_gemm_16x128", 16, 128, 64, 4),
        ("fp8_gemm_8x128", 8, 128, 32, 1),
    ],
)
def test_gemm_keeps_to_its_budget(kernel: str, m: int, n: int, cycles: int, split: int, dtype: torch.dtype) -> None:
    """Bytes and cycles per k-block as docs/gemm.md has them; every output byte once; no bank met twice."""
    blocks = 3 if split == 1 else split
    case = make(m, n, 128 * blocks, by_row=kernel == ROW)
    with schedule(banks="1"):
        gemm(case, torch.empty(m, n, dtype=dtype), kernel, sms=1, split=split)
    spent = counters()
    assert spent["wgmma_cycles"] == blocks * cycles
    assert spent["tma_read"] == blocks * 128 * (m + n)
    columns_of_a = 2 if kernel in (PAIR, TALL_PAIR) else 1  # both CTAs copy the scales of A's rows
    assert spent["global_read"] == blocks * 4 * columns_of_a * (m + (n if m < 128 or kernel == ROW else 2))
    assert spent["global_write"] == m * n * dtype.itemsize
    assert spent["shared_wavefronts"] == spent["shared_ideal"] > 0


def test_gemm_without_k_is_the_bias() -> None:
    case = make(3, 16, 0)
    bias = torch.arange(16, dtype=torch.float32)
    out, memory = canvas((3, 16), torch.float32)
    gemm(case, out, SQUARE, bias=bias)
    assert torch.equal(out, bias.expand(3, 16))
    only_wrote(memory, out)


def test_gemm_without_rows_launches_nothing() -> None:
    case = make(0, 16, 32)
    before = dk.launch_counts()
    with _simulator.active("cuda"):
        _cuda.fp8_gemm(
            case.a, case.a_scale, case.b, case.b_scale, None, torch.float32, "auto", None, torch.empty(0, 16)
        )
    assert dk.launch_counts() == before


def test_gemm_rows_do_not_depend_on_m() -> None:
    case = make(256, 128, 640)
    outs = []
    for m in (256, 65, 1):
        out = torch.empty(m, 128)
        args = (case.a[:m], case.a_scale[:m], case.b, case.b_scale, None, torch.float32, "fixed", None, out)
        run(SQUARE, _cuda.fp8_gemm, *args)
        outs.append(out)
    assert same_bits(outs[0][:65], outs[1]) and same_bits(outs[0][:1], outs[2])


def test_gemm_keeps_nan_in_its_row_and_block() -> None:
    case = make(130, 128, 256)
    case.a_scale[5, 1] = torch.nan
    out = torch.empty(130, 128)
    gemm(case, out, SQUARE)
    wanted, size = product(case.a, case.a_scale, case.b, case.b_scale)
    assert out[5].isnan().all()
    check(out, wanted, size.nan_to_num())


GROUPS = {
    "few": [0, 3, 3, 12, 13, 30],  # tiles of one row, of many
    "ragged": [0, 3, 3, 131, 132, 260],  # a boundary inside a tile, an empty group, one row
    "empty": [0, 0, 0, 0],
    "many": [0, *range(1, 70, 2)],  # more groups than a warp has lanes
    "short": [0, 40, 90],  # rows that no group owns
    "tall": [0, 300, 512],
    "pairs": [0, 3, 3, 303],
}


@pytest.mark.parametrize(
    ("kernel", "groups", "sms", "dtype"),
    [
        ("fp8_grouped_gemm_128x128_block", "ragged", None, torch.bfloat16),
        ("fp8_grouped_gemm_128x128_block", "ragged", 1, torch.float32),
        ("fp8_grouped_gemm_128x128_block", "many", 3, torch.bfloat16),
        ("fp8_grouped_gemm_128x128_block", "empty", None, torch.float32),
        ("fp8_grouped_gemm_128x128_row", "short", 2, torch.float32),
        ("fp8_grouped_gemm_256x128_block", "tall", 1, torch.bfloat16),
        ("fp8_grouped_gemm_256x256_block", "pairs", 2, torch.bfloat16),
        ("fp8_grouped_gemm_256x256_block", "many", 4, torch.float32),
        ("fp8_grouped_gemm_256x256_block", "empty", None, torch.float32),
        ("fp8_grouped_gemm_64x128", "ragged", 1, torch.bfloat16),
        ("fp8_grouped_gemm_32x128", "short", None, torch.float32),
        ("fp8_grouped_gemm_16x128", "few", 2, torch.bfloat16),
        ("fp8_grouped_gemm_8x128", "few", None, torch.float32),
        ("fp8_grouped_gemm_8x128", "many", 3, torch.bfloat16),
        ("fp8_grouped_gemm_8x128", "empty", None, torch.float32),
    ],
)
def test_grouped_gemm(kernel: str, groups: str, sms: int | None, dtype: torch.dtype) -> None:
    offsets = GROUPS[groups]
    rows, k, count = offsets[-1] + (20 if groups != "tall" else 0), 272, len(offsets) - 1
    n = 136 if groups == "ragged" or kernel.endswith("256x256_block") else 40
    generator = torch.Generator().manual_seed(3)
    by_row = kernel.endswith("row")
    a, a_scale = codes(rows, k, generator), scales(rows, 3, generator, "mn")
    b = torch.stack([codes(n, k, generator).view(torch.uint8) for _ in range(count)]).contiguous().view(a.dtype)
    b_scale = torch.rand(count, n if by_row else (n + 127) // 128, 3, generator=generator) + 0.5
    a[offsets[-1] :].view(torch.uint8).fill_(NAN_CODE)
    a_scale[offsets[-1] :] = torch.nan
    out, memory = canvas((rows, n), dtype)
    grouped(kernel, a, a_scale, b, b_scale, torch.tensor(offsets, dtype=torch.int32), out, sms=sms)
    for g in range(count):
        span = slice(offsets[g], offsets[g + 1])
        check(out[span], *product(a[span], a_scale[span], b[g], b_scale[g]), f"group {g}")
    only_wrote(memory, out[: offsets[-1]])


@pytest.mark.parametrize(
    "kernel", ["128x128_block", "128x128_row", "64x128", "32x128", "16x128", "8x128"], ids=lambda tile: tile
)
def test_masked_gemm(kernel: str) -> None:
    few = not kernel.startswith("128")
    counts, most, n, k = [3, 0, 40 if few else 150, 20 if few else 70, 1], 40 if few else 150, 136, 144
    generator = torch.Generator().manual_seed(4)
    by_row = kernel.endswith("row")
    a = torch.stack([codes(most, k, generator).view(torch.uint8) for _ in counts]).contiguous()
    a_scale = torch.rand(len(counts), most, 2, generator=generator) + 0.5
    for g, rows in enumerate(counts):
        a[g, rows:] = NAN_CODE
        a_scale[g, rows:] = torch.nan
    a = a.view(torch.float8_e4m3fn)
    b = torch.stack([codes(n, k, generator).view(torch.uint8) for _ in counts]).contiguous().view(a.dtype)
    b_scale = torch.rand(len(counts), n if by_row else 2, 2, generator=generator) + 0.5
    out, memory = canvas((len(counts), most, n), torch.bfloat16)
    grouped(f"fp8_masked_gemm_{kernel}", a, a_scale, b, b_scale, torch.tensor(counts, dtype=torch.int32), out, sms=2)
    for g, rows in enumerate(counts):
        wanted = product(a[g, :rows], a_scale[g, :rows], b[g], b_scale[g])
        check(out[g, :rows], *wanted, f"group {g}")
    assert int((~memory.isnan()).sum()) == sum(counts) * n


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(
    ("kernel", "m", "dtype"),
    [
        ("fp8_grouped_wgrad_128x128", 72, torch.float32),
        ("fp8_grouped_wgrad_128x128", 72, torch.bfloat16),
        ("fp8_grouped_wgrad_256x128", 200, torch.float32),
        ("fp8_grouped_wgrad_256x256", 200, torch.float32),
    ],
)
def test_grouped_wgrad(kernel: str, m: int, dtype: torch.dtype, accumulate: bool) -> None:
    offsets, n = [0, 128, 128, 128 * 8, 128 * 9], 136 if kernel.endswith("256x256") else 40
    total = 128 * 10
    generator = torch.Generator().manual_seed(5)
    a, b = codes(m, total, generator), codes(n, total, generator)
    a_scale, b_scale = scales(m, 10, generator, "k"), scales(n, 10, generator, "mn")
    for x in (a, b):
        x[:, offsets[-1] :].view(torch.uint8).fill_(NAN_CODE)
    out, memory = canvas((4, m, n), dtype)
    old = torch.zeros(4, m, n, dtype=torch.float64)
    if accumulate:
        out.copy_(torch.randn(4, m, n, generator=generator))
        old = out.double()
    operands = (a, a_scale, b, b_scale, torch.tensor(offsets, dtype=torch.int32), out)
    grouped(kernel, *operands, accumulate=accumulate, sms=2 if kernel.endswith("256x256") else 1)
    for g in range(4):
        k = slice(offsets[g], offsets[g + 1])
        blocks = slice(offsets[g] // 128, offsets[g + 1] // 128)
        wanted, size = product(a[:, k], a_scale[:, blocks], b[:, k], b_scale[:, blocks])
        check(out[g], wanted + old[g], size + old[g].abs(), f"group {g}")
    assert int((~memory.isnan()).sum()) == out.numel()
