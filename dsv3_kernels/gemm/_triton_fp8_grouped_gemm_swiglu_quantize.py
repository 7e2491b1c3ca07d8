"""fp8_grouped_gemm_swiglu_quantize in Triton, fused: a tile is 128 columns of the gate and the same of up."""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .._triton_segments import segment_of
from .._triton_segments import tiles as tiles_of
from ..quant._triton_encode import encode, magnitude, scale_of
from ._triton_tile import RUNTIME, multiple, place, promoted

# 64 rows: both halves in float32 are then the registers of a 128 x 128 tile. Unmeasured.
CONFIGS = _triton.Table(
    "fp8_grouped_gemm_swiglu_quantize",
    ({}, {"BM": 64, "num_warps": 8, "num_stages": 4}),
    candidates=tuple({"BM": m, "num_warps": 8, "num_stages": s} for m in (16, 32, 64) for s in (3, 4, 5)),
)


@triton.jit(do_not_specialize=[*RUNTIME, "weights", "weights_stride", "scale_block", "F"])
def triton_fp8_grouped_gemm_swiglu_quantize(
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
    weights,
    weights_stride,
    q,
    scale,
    scale_block,
    M,
    F,
    K,
    G,
    POW2: tl.constexpr,
    BY_ROW: tl.constexpr,
    APART: tl.constexpr,
    MULTIPLE: tl.constexpr,
    BM: tl.constexpr,
):
    row_tiles, column_tiles = M // BM + G + 2, tl.cdiv(F, 128)
    for tile in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row, column = place(tile, row_tiles, column_tiles)
        group, first, end = segment_of(offsets, G, M, row, BM)
        if (group >= 0) & (group < G) & (first < end):
            m0, n0, g = first.to(tl.int64), column.to(tl.int64) * 128, group.to(tl.int64)
            rows, columns = end - first, F // 4 * 4 - column * 128  # F is a multiple of 4
            x, x_scale = a + m0 * (a_stride * 16), a_scale + m0 * a_scale_row
            y, y_scale = b + g * b_group * 16, b_scale + g * b_scale_group
            n, u0 = tl.arange(0, 128), F + n0
            gate_at = n * b_scale_row
            up_at = gate_at
            if APART:  # up begins inside a block of B's scales: a tile of it has two
                up_at = (u0 % 128 + n).to(tl.int32) // 128 * b_scale_row
            gate = promoted(
                x,
                a_stride,
                x_scale,
                a_scale_row,
                a_scale_block,
                rows,
                y + n0 * (b_stride * 16),
                b_stride,
                y_scale + (n0 if BY_ROW else n0 // 128) * b_scale_row,
                gate_at,
                b_scale_block,
                columns,
                K,
                BM,
                128,
                BY_ROW,
                MULTIPLE,
            )
            up = promoted(
                x,
                a_stride,
                x_scale,
                a_scale_row,
                a_scale_block,
                rows,
                y + u0 * (b_stride * 16),
                b_stride,
                y_scale + (u0 if BY_ROW else u0 // 128) * b_scale_row,
                up_at,
                b_scale_block,
                columns,
                K,
                BM,
                128,
                BY_ROW or APART,
                MULTIPLE,
            )
            m = tl.arange(0, BM)
            hidden = gate / (1 + tl.exp(-gate)) * up
            if weights is not None:
                by_row = tl.load(weights + (m0 + m) * weights_stride, mask=m < rows, other=0.0)
                hidden *= by_row[:, None]
            scales = scale_of(tl.max(magnitude(hidden), 1), POW2)
            tl.store(scale + column.to(tl.int64) * scale_block + m0 + m, scales, mask=m < rows)
            inside = (m < rows)[:, None] & (n < columns)[None, :]
            tl.store(q + (m0 * F + n0) + (m[:, None] * F + n[None, :]), encode(hidden, scales[:, None]), mask=inside)


def fp8_grouped_gemm_swiglu_quantize_cannot(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *_: Any
) -> str | None:
    return _triton.far(a.stride(-2), a_scale.stride(-2), b.stride(-2), b_scale.stride(-2))


def fp8_grouped_gemm_swiglu_quantize(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    pow2_scale: bool,
    num_sms: int | None,
    q: Tensor,
    scale: Tensor,
) -> None:
    (m, k), (groups, n), f = a.shape, b.shape[:2], q.shape[1]
    if not q.numel() * groups:
        return
    by_row = b_scale.shape[1] == n
    config = CONFIGS(a, rows=m // groups)
    tiles = tiles_of(m, groups, config["BM"]) * scale.shape[1]
    _triton.launch(
        triton_fp8_grouped_gemm_swiglu_quantize,
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
        weights,
        0 if weights is None else weights.stride(0),
        q,
        scale,
        scale.stride(1),
        m,
        f,
        k,
        groups,
        pow2_scale,
        by_row,
        not by_row and f % 128 != 0,
        multiple(k),
        **config,
    )
