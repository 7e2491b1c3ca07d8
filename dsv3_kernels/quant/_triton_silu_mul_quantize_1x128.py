"""silu_mul_quantize_1x128 in Triton: quantize_1x128's tiles, of the activation of two halves of a row."""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from ._triton_encode import as_rows, copy_back, encode, magnitude, scale_of

# As quantize_1x128, with half the rows: a value is made of two. Unmeasured.
CONFIGS = _triton.Table(
    "silu_mul_quantize_1x128",
    ({"rows": 64}, {"ROWS": 2, "num_warps": 1}),
    ({}, {"ROWS": 16, "num_warps": 4}),
    candidates=tuple({"ROWS": r, "num_warps": w} for r in (2, 4, 8, 16, 32) for w in (1, 2, 4, 8) if r >= 2 * w),
)


@triton.jit
def silu_mul(gate, up):
    """gate / (1 + exp(-gate)) * up in float32."""
    gate = gate.to(tl.float32)
    return gate / (1.0 + tl.exp(-gate)) * up.to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def triton_silu_mul_quantize_1x128(
    x, weights, q, scale, rows, columns, x_stride, weight_stride, scale_row, scale_block,
    pow2, ROWS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(columns, 128)
    block = tl.program_id(0) % blocks
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = block * 128 + tl.arange(0, 128)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    gate = x + row[:, None] * x_stride + column[None, :]
    hidden = silu_mul(tl.load(gate, mask=inside, other=0.0), tl.load(gate + columns, mask=inside, other=0.0))
    if weights is not None:
        hidden *= tl.load(weights + row * weight_stride, mask=row < rows, other=0.0)[:, None]
    scales = scale_of(tl.max(magnitude(hidden), 1), pow2)
    tl.store(scale + row * scale_row + block.to(tl.int64) * scale_block, scales, mask=row < rows)
    tl.store(q + row[:, None] * columns + column[None, :], encode(hidden, scales[:, None]), mask=inside)


def silu_mul_quantize_1x128(
    gate_up: Tensor, weights: Tensor | None, pow2_scale: bool, q: Tensor, scale: Tensor
) -> None:
    if not q.numel():
        return
    x, scales = as_rows(gate_up), as_rows(scale)
    rows, columns = x.shape[0], q.shape[-1]
    weights = weights.reshape(-1) if weights is not None else None
    config = CONFIGS(x, rows=rows)
    grid = (_triton.cdiv(rows, config["ROWS"]) * scales.shape[1],)
    strides = x.stride(0), weights.stride(0) if weights is not None else 0, *scales.stride()
    _triton.launch(
        triton_silu_mul_quantize_1x128, grid, x, weights, q, scales, rows, columns, *strides, pow2_scale, **config
    )
    copy_back(scales, scale)
