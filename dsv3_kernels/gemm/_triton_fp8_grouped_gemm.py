"""fp8_grouped_gemm in Triton: tiles find their group on the device; a tile ends with its group."""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .._triton_segments import segment_of
from .._triton_segments import tiles as tiles_of
from ._triton_tile import RUNTIME, apart, configs, multiple, multiply_group, place

CONFIGS = configs("fp8_grouped_gemm")


@triton.jit(do_not_specialize=RUNTIME)
def triton_fp8_grouped_gemm(
    a,
    a_stride,
    a_scale,
    a_scale_row,
    a_scale_block,
    b,
    b_group,
    b_stride,
    b_scale,
    b_scale_group,
    b_scale_row,
    b_scale_block,
    offsets,
    out,
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
    row_tiles, column_tiles = M // BM + G + 2, tl.cdiv(N, BN)
    for tile in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row, column = place(tile, row_tiles, column_tiles)
        group, first, end = segment_of(offsets, G, M, row, BM)
        if (group >= 0) & (group < G) & (first < end):
            multiply_group(
                a, a_stride, a_scale, a_scale_row, a_scale_block, first.to(tl.int64), end - first,
                b, b_group, b_stride, b_scale, b_scale_group, b_scale_row, b_scale_block, group.to(tl.int64), column,
                out, out_stride, N, K, BY_ROW, MULTIPLE, BM, BN,
            )  # fmt: skip


def fp8_grouped_gemm_cannot(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, num_sms: int | None, out: Tensor
) -> str | None:
    return _triton.far(a.stride(-2), a_scale.stride(-2), b.stride(-2), b_scale.stride(-2), out.stride(-2))


def fp8_grouped_gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, num_sms: int | None, out: Tensor
) -> None:
    (m, k), (groups, n) = a.shape, b.shape[:2]
    if not m * n * groups:
        return
    by_row = b_scale.shape[1] == n
    tiles = _triton.cdiv(m, 128) * _triton.cdiv(n, 128)
    config = CONFIGS(a, rows=m // groups, tiles=tiles, apart=apart(by_row, b_scale.stride(1)))
    tiles = tiles_of(m, groups, config["BM"]) * _triton.cdiv(n, config["BN"])
    _triton.launch(
        triton_fp8_grouped_gemm,
        (min(tiles, num_sms or tiles),),
        a,
        a.stride(0) // 16,
        a_scale,
        *a_scale.stride(),
        b,
        b.stride(0) // 16,
        b.stride(1) // 16,
        b_scale,
        *b_scale.stride(),
        offsets,
        out,
        out.stride(0),
        m,
        n,
        k,
        groups,
        by_row,
        multiple(k),
        **config,
    )
