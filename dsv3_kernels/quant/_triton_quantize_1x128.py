"""quantize_1x128 in Triton: a program quantises ROWS rows of one block of 128 columns, read and written once."""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from ._triton_encode import as_rows, copy_back, encode, magnitude, scale_of

# Rows of a program and warps: few rows must still fill the chip. Both follow from the budget (8 values a lane and 16
# bytes a load in bfloat16; 32 values where there are rows enough to keep more loads in flight) and are unmeasured.
CONFIGS = _triton.Table(
    "quantize_1x128",
    ({"rows": 64}, {"ROWS": 2, "num_warps": 1}),
    ({}, {"ROWS": 32, "num_warps": 4}),
    candidates=tuple({"ROWS": r, "num_warps": w} for r in (2, 4, 8, 16, 32, 64) for w in (1, 2, 4, 8) if r >= 2 * w),
)


@triton.jit(do_not_specialize=["rows"])
def triton_quantize_1x128(x, q, scale, rows, columns, x_stride, scale_row, scale_block, pow2, ROWS: tl.constexpr):
    blocks = tl.cdiv(columns, 128)
    block = tl.program_id(0) % blocks
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = block * 128 + tl.arange(0, 128)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    real = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    scales = scale_of(tl.max(magnitude(real), 1), pow2)
    tl.store(scale + row * scale_row + block.to(tl.int64) * scale_block, scales, mask=row < rows)
    tl.store(q + row[:, None] * columns + column[None, :], encode(real, scales[:, None]), mask=inside)


def quantize_1x128(x: Tensor, pow2_scale: bool, scale_layout: str, q: Tensor, scale: Tensor) -> None:
    if not q.numel():
        return
    x, scales = as_rows(x), as_rows(scale)
    rows, columns = x.shape
    config = CONFIGS(x, rows=rows)
    grid = (_triton.cdiv(rows, config["ROWS"]) * scales.shape[1],)
    strides = x.stride(0), scales.stride(0), scales.stride(1)
    _triton.launch(triton_quantize_1x128, grid, x, q, scales, rows, columns, *strides, pow2_scale, **config)
    copy_back(scales, scale)
