"""rms_norm_quantize_1x128 in Triton: rms_norm's rows, rounded, then quantised while they are in registers."""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from ._triton_encode import as_rows, copy_back, encode, magnitude, scale_of
from ._triton_rms_norm import row_roots, store_normed, tile


@triton.jit
def store_codes(q, scale, real, there, start, columns, scale_block, pow2):
    """Quantises columns `start` on of rows whose codes and scales begin at q and scale [ROWS, 1], where `there`."""
    ROWS: tl.constexpr = real.shape[0]
    CHUNK: tl.constexpr = real.shape[1]
    blocks = real.to(tl.float32).reshape(ROWS, CHUNK // 128, 128)
    scales = scale_of(tl.max(magnitude(blocks), 2), pow2)
    codes = encode(blocks, scales[:, :, None]).reshape(ROWS, CHUNK)
    column = (start + tl.arange(0, CHUNK))[None, :]
    tl.store(q + column, codes, mask=there & (column < columns))
    block = (start // 128 + tl.arange(0, CHUNK // 128).to(tl.int64))[None, :]
    tl.store(scale + block * scale_block, scales, mask=there & (block * 128 < columns))


@triton.jit(do_not_specialize=["rows", "eps"])
def triton_rms_norm_quantize_1x128(
    x, residual, weight, q, scale, normed, total, rows, columns, x_stride, residual_stride, scale_row, scale_block, eps,
    pow2, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    q, scale, there = q + (row * columns)[:, None], scale + (row * scale_row)[:, None], (row < rows)[:, None]
    rms = row_roots(x, residual, row, rows, columns, x_stride, residual_stride, eps, CHUNK)
    for start in range(0, columns, CHUNK):
        column = start + tl.arange(0, CHUNK)
        real = store_normed(
            x, residual, weight, normed, total, row, column, rows, columns, x_stride, residual_stride, rms
        )
        store_codes(q, scale, real, there, start, columns, scale_block, pow2)


def rms_norm_quantize_1x128(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, pow2_scale: bool, q: Tensor, scale: Tensor,
    normed: Tensor, total: Tensor,
) -> None:  # fmt: skip
    if not q.numel():
        return
    x, residual, scales = as_rows(x), as_rows(residual) if residual is not None else None, as_rows(scale)
    rows, columns = x.shape
    config = tile(rows, columns)
    strides = x.stride(0), residual.stride(0) if residual is not None else 0, *scales.stride()
    grid = (_triton.cdiv(rows, config["ROWS"]),)
    tensors = x, residual, weight.contiguous(), q, scales, normed, total
    _triton.launch(triton_rms_norm_quantize_1x128, grid, *tensors, rows, columns, *strides, eps, pow2_scale, **config)
    copy_back(scales, scale)
