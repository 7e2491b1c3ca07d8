"""quantize_128x128 in Triton: a program holds one block in registers, so that every byte is moved once."""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from ._triton_encode import encode, magnitude, scale_of

# 64 values a lane with 8 warps: room for the loads in flight and no spill. It follows from the registers; unmeasured.
CONFIGS = _triton.Table("quantize_128x128", ({}, {"num_warps": 8}), candidates=({"num_warps": 8}, {"num_warps": 16}))


@triton.jit
def triton_quantize_128x128(
    w, q, scale, rows, columns, matrix_stride, row_stride, scale_matrix, scale_row, scale_column, pow2
):
    across, down = tl.cdiv(columns, 128), tl.cdiv(rows, 128)
    block, left = tl.program_id(0) // across, tl.program_id(0) % across
    matrix, top = (block // down).to(tl.int64), (block % down).to(tl.int64)
    row, column = top * 128 + tl.arange(0, 128), left * 128 + tl.arange(0, 128)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    source = w + matrix * matrix_stride + row[:, None] * row_stride + column[None, :]
    real = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    one = scale_of(tl.max(tl.max(magnitude(real), 1), 0), pow2)
    tl.store(scale + matrix * scale_matrix + top * scale_row + left.to(tl.int64) * scale_column, one)
    tl.store(q + (matrix * rows + row[:, None]) * columns + column[None, :], encode(real, one), mask=inside)


def quantize_128x128(w: Tensor, pow2_scale: bool, q: Tensor, scale: Tensor) -> None:
    if not q.numel():
        return
    # Leading dimensions that no single stride describes are copied; so are scales, and back.
    matrices, scales = w.reshape(-1, *w.shape[-2:]), scale.reshape(-1, *scale.shape[-2:])
    grid = (scales.numel(),)
    rows, columns = w.shape[-2:]
    strides = matrices.stride(0), matrices.stride(1), *scales.stride()
    _triton.launch(
        triton_quantize_128x128, grid, matrices, q, scales, rows, columns, *strides, pow2_scale, **CONFIGS(w)
    )
    if scales.data_ptr() != scale.data_ptr():
        scale.copy_(scales.view(scale.shape))
