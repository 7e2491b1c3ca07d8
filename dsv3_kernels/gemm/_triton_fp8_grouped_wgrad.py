"""fp8_grouped_wgrad in Triton: a tile of each group's gradient, over the tokens of the group."""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from ._triton_tile import RUNTIME, STAYS, apart, configs, place, promoted, store

CONFIGS = configs("fp8_grouped_wgrad")


@triton.jit(do_not_specialize=RUNTIME)
def triton_fp8_grouped_wgrad(
    a,
    a_stride,
    a_scale,
    a_scale_row,
    a_scale_block,
    b,
    b_stride,
    b_scale,
    b_scale_row,
    b_scale_block,
    offsets,
    out,
    out_group,
    out_stride,
    M,
    N,
    G,
    ACCUMULATE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    row_tiles, column_tiles = tl.cdiv(M, BM), tl.cdiv(N, BN)
    tiles = row_tiles * column_tiles
    for number in tl.range(tl.program_id(0), G * tiles, tl.num_programs(0), disable_licm=STAYS):
        row, column = place(number % tiles, row_tiles, column_tiles)
        start, end = tl.load(offsets + number // tiles), tl.load(offsets + number // tiles + 1)
        g, m0, n0 = (number // tiles).to(tl.int64), row.to(tl.int64) * BM, column.to(tl.int64) * BN
        rows, columns = M - row * BM, N // 8 * 8 - column * BN  # N is a multiple of 8
        if ACCUMULATE:  # what an empty group has may be NaN: it is not touched
            rows = tl.where(start < end, rows, 0)
        block = (start // 128).to(tl.int64)  # offsets are multiples of 128
        total = promoted(
            a + (m0 * a_stride * 16 + block * 128),
            a_stride,
            a_scale + (m0 * a_scale_row + block * a_scale_block),
            a_scale_row,
            a_scale_block,
            rows,
            b + (n0 * b_stride * 16 + block * 128),
            b_stride,
            b_scale + block * b_scale_block + n0 * b_scale_row,
            tl.arange(0, BN) * b_scale_row,
            b_scale_block,
            columns,
            end - start,
            BM,
            BN,
            True,
            128,
        )
        at = out + (g * out_group + m0 * out_stride + n0)
        store(at, out_stride, rows, columns, total, ACCUMULATE, BM, BN)


def fp8_grouped_wgrad_cannot(a_t: Tensor, a_scale: Tensor, b_t: Tensor, b_scale: Tensor, *_: Any) -> str | None:
    return _triton.far(a_t.stride(-2), a_scale.stride(-2), b_t.stride(-2), b_scale.stride(-2))


def fp8_grouped_wgrad(
    a_t: Tensor,
    a_scale: Tensor,
    b_t: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    out_dtype: torch.dtype,
    num_sms: int | None,
    out: Tensor,
) -> None:
    _wgrad(a_t, a_scale, b_t, b_scale, offsets, num_sms, out, False)


fp8_grouped_wgrad_accumulate_cannot = fp8_grouped_wgrad_cannot


def fp8_grouped_wgrad_accumulate(
    a_t: Tensor, a_scale: Tensor, b_t: Tensor, b_scale: Tensor, offsets: Tensor, num_sms: int | None, out: Tensor
) -> None:
    _wgrad(a_t, a_scale, b_t, b_scale, offsets, num_sms, out, True)


def _wgrad(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    num_sms: int | None,
    out: Tensor,
    accumulate: bool,
) -> None:
    groups, m, n = out.shape
    if why := _triton.far(out.stride(-2)):
        raise RuntimeError(f"fp8_grouped_wgrad: out: Triton {why}")
    tiles = groups * _triton.cdiv(m, 128) * _triton.cdiv(n, 128)
    config = CONFIGS(a, rows=m, tiles=tiles, apart=apart(True, b_scale.stride(0)))
    tiles = groups * _triton.cdiv(m, config["BM"]) * _triton.cdiv(n, config["BN"])
    _triton.launch(
        triton_fp8_grouped_wgrad,
        (min(tiles, num_sms or tiles),),
        a,
        a.stride(0) // 16,
        a_scale,
        *a_scale.stride(),
        b,
        b.stride(0) // 16,
        b_scale,
        *b_scale.stride(),
        offsets,
        out,
        out.stride(0),
        out.stride(1),
        m,
        n,
        groups,
        accumulate,
        **config,
    )
