"""fp8_masked_gemm in Triton: a tile for every place that a full slab would have; those past a count end at once."""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from ._triton_tile import RUNTIME, apart, configs, multiple, multiply_group, place

CONFIGS = configs("fp8_masked_gemm")


@triton.jit(do_not_specialize=RUNTIME)
def triton_fp8_masked_gemm(
    a,
    a_group,
    a_stride,
    a_scale,
    a_scale_group,
    a_scale_row,
    a_scale_block,
    b,
    b_group,
    b_stride,
    b_scale,
    b_scale_group,
    b_scale_row,
    b_scale_block,
    counts,
    out,
    out_group,
    out_stride,
    M,
    N,
    K,
    G,
    BY_ROW: tl.constexpr,
    MULTIPLE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    row_tiles, column_tiles = tl.cdiv(M, BM), tl.cdiv(N, BN)
    tiles = row_tiles * column_tiles
    for number in range(tl.program_id(0), G * tiles, tl.num_programs(0)):
        row, column = place(number % tiles, row_tiles, column_tiles)
        rows = tl.load(counts + number // tiles) - row * BM
        if rows > 0:
            g = (number // tiles).to(tl.int64)
            multiply_group(
                a + g * a_group * 16, a_stride, a_scale + g * a_scale_group, a_scale_row, a_scale_block,
                row.to(tl.int64) * BM, rows,
                b, b_group, b_stride, b_scale, b_scale_group, b_scale_row, b_scale_block, g, column,
                out + g * out_group, out_stride, N, K, BY_ROW, MULTIPLE, BM, BN,
            )  # fmt: skip


def fp8_masked_gemm_cannot(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *rest: Any) -> str | None:
    return _triton.far(a.stride(-2), a_scale.stride(-2), b.stride(-2), b_scale.stride(-2), rest[-1].stride(-2))


def fp8_masked_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    counts: Tensor,
    expected_m: int | None,
    num_sms: int | None,
    out: Tensor,
) -> None:
    (groups, m, k), n = a.shape, b.shape[1]
    expected = min(expected_m or m, m)
    tiles = groups * _triton.cdiv(expected, 128) * _triton.cdiv(n, 128)
    by_row = b_scale.shape[1] == n
    config = CONFIGS(a, rows=expected, tiles=tiles, apart=apart(by_row, b_scale.stride(1)))
    tiles = groups * _triton.cdiv(m, config["BM"]) * _triton.cdiv(n, config["BN"])
    _triton.launch(
        triton_fp8_masked_gemm,
        (min(tiles, num_sms or tiles),),
        a,
        a.stride(0) // 16,
        a.stride(1) // 16,
        a_scale,
        *a_scale.stride(),
        b,
        b.stride(0) // 16,
        b.stride(1) // 16,
        b_scale,
        *b_scale.stride(),
        counts,
        out,
        out.stride(0),
        out.stride(1),
        m,
        n,
        k,
        groups,
        by_row,
        multiple(k),
        **config,
    )
