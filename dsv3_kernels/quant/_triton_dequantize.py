"""dequantize in Triton: a program decodes ROWS rows of one block of 128 columns."""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton

# As quantize_1x128: few rows must still fill the chip; unmeasured.
CONFIGS = _triton.Table(
    "dequantize",
    ({"rows": 64}, {"ROWS": 2, "num_warps": 1}),
    ({}, {"ROWS": 32, "num_warps": 4}),
    candidates=tuple({"ROWS": r, "num_warps": w} for r in (2, 8, 16, 32, 64) for w in (1, 2, 4, 8) if r >= 2 * w),
)


@triton.jit(do_not_specialize=["rows"])
def triton_dequantize(
    q, scale, out, rows, columns, matrix_stride, row_stride, scale_matrix, scale_row, scale_block,
    TALL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A scale is for TALL rows: 1 or 128."""
    across, down = tl.cdiv(columns, 128), tl.cdiv(rows, ROWS)
    tile, block = tl.program_id(0) // across, tl.program_id(0) % across
    matrix, row = (tile // down).to(tl.int64), (tile % down).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = block * 128 + tl.arange(0, 128)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    codes = tl.load(q + matrix * matrix_stride + row[:, None] * row_stride + column[None, :], mask=inside, other=0.0)
    place = matrix * scale_matrix + row // TALL * scale_row + block.to(tl.int64) * scale_block
    real = codes.to(tl.float32) * tl.load(scale + place, mask=row < rows, other=0.0)[:, None]
    tl.store(
        out + (matrix * rows + row[:, None]) * columns + column[None, :], real.to(out.dtype.element_ty), mask=inside
    )


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor) -> None:
    if not q.numel():
        return
    by_row = q.dim() == 1 or scale.shape[-2] == q.shape[-2]
    leading = (1, -1) if by_row else (-1, q.shape[-2])
    matrices = q.reshape(*leading, q.shape[-1])
    scales = scale.reshape(matrices.shape[0], -1, scale.shape[-1])
    count, rows, columns = matrices.shape
    config = CONFIGS(q, rows=count * rows)
    grid = (count * _triton.cdiv(rows, config["ROWS"]) * scales.shape[2],)
    strides = matrices.stride(0), matrices.stride(1), *scales.stride()
    _triton.launch(
        triton_dequantize, grid, matrices, scales, out, rows, columns, *strides, 1 if by_row else 128, **config
    )
