"""merge_attention in Triton: rows of two partial results, read and written once."""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton

VALUES = 2048  # of a program: 16 a lane with 4 warps; unmeasured


@triton.jit(do_not_specialize=["rows"])
def triton_merge_attention(
    out_a, lse_a, out_b, lse_b, out, lse, rows, columns, stride_a, stride_b, lse_stride_a, lse_stride_b,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    a = tl.load(lse_a + row * lse_stride_a, mask=there, other=0.0)
    b = tl.load(lse_b + row * lse_stride_b, mask=there, other=0.0)
    top = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    top = tl.where(top == float("-inf"), 0.0, top)
    a, b = tl.exp(a - top), tl.exp(b - top)
    total = a + b
    tl.store(lse + row, top + tl.log(total), mask=there)
    divisor = tl.where(total == 0, 1.0, total)[:, None]
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = there[:, None] & (column < columns)
        # What has weight 0 is not read.
        left = tl.load(out_a + row[:, None] * stride_a + column, mask=inside & (a != 0)[:, None], other=0.0)
        right = tl.load(out_b + row[:, None] * stride_b + column, mask=inside & (b != 0)[:, None], other=0.0)
        merged = (left.to(tl.float32) * a[:, None] + right.to(tl.float32) * b[:, None]) / divisor
        tl.store(out + row[:, None] * columns + column, merged.to(out.dtype.element_ty), mask=inside)


def merge_attention_cannot(out_a: Tensor, *_: object) -> str | None:
    return "the Triton kernel does not take float64" if out_a.dtype is torch.float64 else None


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    columns, rows = out.shape[-1], lse.numel()
    # Rows that no single stride describes are copied.
    outs = [t.reshape(rows, columns) for t in (out_a, out_b)]
    lses = [t.reshape(rows) for t in (lse_a, lse_b)]
    wide = min(1024, max(32, _triton.next_power_of_2(columns)))
    tall = min(VALUES // wide, _triton.next_power_of_2(rows))
    strides = *(t.stride(0) for t in outs), *(t.stride(0) for t in lses)
    sizes = rows, columns, *strides, tall, wide
    warps = max(1, tall * wide // 512)
    grid = (_triton.cdiv(rows, tall),)
    _triton.launch(triton_merge_attention, grid, outs[0], lses[0], outs[1], lses[1], out, lse, *sizes, num_warps=warps)
