"""moe_unpermute and its gradient in Triton: a token's rows summed in the order of its choices; every row read once."""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _triton

COLUMNS = 1024  # of a program: 8 values a lane and choice, all choices' loads in flight; unmeasured


@triton.jit(do_not_specialize=["tokens", "weight_stride"])
def triton_moe_unpermute(
    rows, row_of, weights, out, tokens, columns, row_stride, weight_stride, K: tl.constexpr, COLUMNS: tl.constexpr
):
    across = tl.cdiv(columns, COLUMNS)
    token, column = (
        (tl.program_id(0) // across).to(tl.int64),
        tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS),
    )
    wide = tl.float64 if rows.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((COLUMNS,), wide)
    for k in tl.static_range(K):
        row = tl.load(row_of + token * K + k).to(tl.int64)
        part = tl.load(rows + row * row_stride + column, mask=(column < columns) & (row >= 0), other=0.0).to(wide)
        if weights is not None:
            part *= tl.load(weights + token * weight_stride + k, mask=row >= 0, other=0.0)
        total += part
    tl.store(out + token * columns + column, total.to(out.dtype.element_ty), mask=column < columns)


@triton.jit(do_not_specialize=["bound", "choices", "weight_stride"])
def triton_moe_unpermute_backward(
    grad, rows, row_of, source, weights, grad_rows, grad_weights, bound, choices, columns, row_stride, weight_stride,
    K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program r makes row r of grad_rows and that row's weight's gradient, and clears that of choice r if dropped."""
    number = tl.program_id(0)
    choice = tl.load(source + number)
    row, token = number.to(tl.int64), (tl.maximum(choice, 0) // K).to(tl.int64)
    wide = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    lane = tl.arange(0, COLUMNS)
    if choice < 0:
        for start in range(0, columns, COLUMNS):
            column = start + lane
            tl.store(
                grad_rows + row * columns + column,
                tl.zeros((COLUMNS,), grad_rows.dtype.element_ty),
                mask=column < columns,
            )
    else:
        sums = tl.zeros((COLUMNS,), wide)
        for start in range(0, columns, COLUMNS):
            column = start + lane
            real = tl.load(grad + token * columns + column, mask=column < columns, other=0.0).to(wide)
            if weights is not None:
                sums += tl.load(rows + row * row_stride + column, mask=column < columns, other=0.0).to(wide) * real
                real *= tl.load(weights + token * weight_stride + choice % K)
            tl.store(grad_rows + row * columns + column, real.to(grad_rows.dtype.element_ty), mask=column < columns)
        if weights is not None:
            tl.store(grad_weights + choice, tl.sum(sums, 0))
    if weights is not None:
        dropped = tl.load(row_of + number, mask=number < choices, other=0) < 0
        tl.store(grad_weights + number, 0.0, mask=dropped & (number < choices))


def _wide(columns: int) -> int:
    return min(COLUMNS, max(32, _triton.next_power_of_2(columns)))


def moe_unpermute(rows: Tensor, row_of: Tensor, weights: Tensor | None, out: Tensor) -> None:
    (tokens, choices), columns = row_of.shape, rows.shape[1]
    wide = _wide(columns)
    grid = (tokens * _triton.cdiv(columns, wide),)
    sizes = tokens, columns, rows.stride(0), weights.stride(0) if weights is not None else 0, choices, wide
    warps = max(1, wide // 256)
    tensors = rows, row_of.contiguous(), weights, out
    _triton.launch(triton_moe_unpermute, grid, *tensors, *sizes, num_warps=warps, enable_fp_fusion=False)


def moe_unpermute_backward(
    grad: Tensor, rows: Tensor | None, row_of: Tensor, source: Tensor, weights: Tensor | None,
    grad_rows: Tensor, grad_weights: Tensor,
) -> None:  # fmt: skip
    if rows is None or weights is None:
        rows = weights = None
    bound, columns = grad_rows.shape
    wide = _wide(columns)
    strides = (rows.stride(0), weights.stride(0)) if rows is not None and weights is not None else (0, 0)
    tensors = grad.contiguous(), rows, row_of.contiguous(), source, weights, grad_rows, grad_weights
    sizes = bound, row_of.numel(), columns, *strides, row_of.shape[1], wide
    _triton.launch(triton_moe_unpermute_backward, (bound,), *tensors, *sizes, num_warps=max(1, wide // 256))
