"""fp8_gemm in Triton: a program takes one tile, or `num_sms` programs walk over all."""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from ._triton_tile import RUNTIME, STAYS, apart, configs, multiple, place, promoted, store

CONFIGS = configs("fp8_gemm")
ANY = 1 << 30  # policy "fixed": the configuration of the largest sizes, whatever M


@triton.jit(do_not_specialize=RUNTIME)
def triton_fp8_gemm(
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
    bias,
    out,
    out_stride,
    M,
    N,
    K,
    BY_ROW: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    MULTIPLE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    row_tiles, column_tiles = tl.cdiv(M, BM), tl.cdiv(N, BN)
    STAY: tl.constexpr = BY_ROW and STAYS
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), disable_licm=STAY):
        row, column = place(tile, row_tiles, column_tiles)
        m0, n0 = row.to(tl.int64) * BM, column.to(tl.int64) * BN
        rows, columns = (M - m0).to(tl.int32), (N // 8 * 8 - n0).to(tl.int32)  # N is a multiple of 8
        total = promoted(
            a + m0 * (a_stride * 16),
            a_stride,
            a_scale + m0 * a_scale_row,
            a_scale_row,
            a_scale_block,
            rows,
            b + n0 * (b_stride * 16),
            b_stride,
            b_scale + (n0 if BY_ROW else n0 // 128) * b_scale_row,
            tl.arange(0, BN) * b_scale_row,
            b_scale_block,
            columns,
            K,
            BM,
            BN,
            BY_ROW,
            MULTIPLE,
        )
        if bias is not None:
            n = tl.arange(0, BN)
            total += tl.load(bias + n0 + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
        store(out + (m0 * out_stride + n0), out_stride, rows, columns, total, ACCUMULATE, BM, BN)


def fp8_gemm_cannot(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *_: Any) -> str | None:
    return _triton.far(a.stride(-2), a_scale.stride(-2), b.stride(-2), b_scale.stride(-2))


def fp8_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    policy: str,
    num_sms: int | None,
    out: Tensor,
) -> None:
    _gemm(a, a_scale, b, b_scale, bias, policy, num_sms, out, False)


fp8_gemm_accumulate_cannot = fp8_gemm_cannot


def fp8_gemm_accumulate(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    policy: str,
    num_sms: int | None,
    out: Tensor,
) -> None:
    _gemm(a, a_scale, b, b_scale, bias, policy, num_sms, out, True)


def _gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    policy: str,
    num_sms: int | None,
    out: Tensor,
    accumulate: bool,
) -> None:
    (m, k), n = a.shape, b.shape[0]
    if why := _triton.far(out.stride(-2)):
        raise RuntimeError(f"fp8_gemm: out: Triton {why}")
    by_row = b_scale.shape[0] == n
    rows, tiles = (m, _triton.cdiv(m, 128) * _triton.cdiv(n, 128)) if policy == "auto" else (ANY, ANY)
    config = CONFIGS(a, rows=rows, tiles=tiles, apart=apart(by_row, b_scale.stride(0)))
    tiles = _triton.cdiv(m, config["BM"]) * _triton.cdiv(n, config["BN"])
    _triton.launch(
        triton_fp8_gemm,
        (min(tiles, num_sms or tiles),),
        a,
        a.stride(0) // 16,
        a_scale,
        *a_scale.stride(),
        b,
        b.stride(0) // 16,
        b_scale,
        *b_scale.stride(),
        bias,
        out,
        out.stride(0),
        m,
        n,
        k,
        by_row,
        accumulate,
        multiple(k),
        **config,
    )
