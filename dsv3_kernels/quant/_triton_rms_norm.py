"""rms_norm and its gradient in Triton, with the bits of eager: sums have the one order of all backends.

A row is read twice, 2048 columns at a time: for its sum, then, from the first-level cache, for what is made of it. That
leaves the registers to rows in flight, and takes rows of any length.
"""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .._triton_sums import halves
from ._triton_encode import as_rows

WIDEST = 8192  # columns of which a program holds its part of the weight's gradient in registers, 32 a lane
SLOTS = 256  # rows whose parts of the weight's gradient are added up apart: the order of eager


def tile(rows: int, columns: int) -> dict[str, Any]:
    """ROWS and CHUNK, columns at a time: 8 values a lane, as the sums go. Nothing is fused, as in eager."""
    chunk = min(2048, max(128, _triton.next_power_of_2(columns)))
    height = min(2048 // chunk, _triton.next_power_of_2(rows))
    return {"ROWS": height, "CHUNK": chunk, "num_warps": max(1, height * chunk // 256), "enable_fp_fusion": False}


@triton.jit
def add_columns(total, terms):
    """total [ROWS, LANES] + terms [ROWS, 8 * LANES]: lane i adds columns 8 i to 8 i + 7, one after the other."""
    even, odd = tl.split(terms.reshape(total.shape[0], total.shape[1], 2, 2, 2))
    c04, c26 = tl.split(even)
    c15, c37 = tl.split(odd)
    c0, c4 = tl.split(c04)
    c1, c5 = tl.split(c15)
    c2, c6 = tl.split(c26)
    c3, c7 = tl.split(c37)
    return total + c0 + c1 + c2 + c3 + c4 + c5 + c6 + c7


@triton.jit
def reciprocal_root(squares, columns, eps):
    """1 / sqrt(mean square + eps), each operation rounded to nearest."""
    mean = tl.div_rn(squares, tl.full(squares.shape, 1.0, tl.float32) * columns)
    root = tl.sqrt_rn(mean + eps)
    return tl.div_rn(tl.full(root.shape, 1.0, tl.float32), root)


@triton.jit
def load_sum(x, residual, row, column, rows, columns, x_stride, residual_stride):
    """x + residual, rounded to x's dtype; zeros outside."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    if residual is not None:
        other = tl.load(residual + row[:, None] * residual_stride + column[None, :], mask=inside, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(x.dtype.element_ty)
    return value, inside


@triton.jit
def row_roots(x, residual, row, rows, columns, x_stride, residual_stride, eps, CHUNK: tl.constexpr):
    """What the rows of x + residual are divided by to norm them, inverted: [ROWS, 1]."""
    total = tl.zeros((row.shape[0], CHUNK // 8), tl.float32)
    for start in range(0, columns, CHUNK):
        column = start + tl.arange(0, CHUNK)
        value, _ = load_sum(x, residual, row, column, rows, columns, x_stride, residual_stride)
        value = value.to(tl.float32)
        total = add_columns(total, value * value)
    return reciprocal_root(halves(total), columns, eps)


@triton.jit
def norm(value, weight, column, columns, rms):
    """The norm of a chunk [ROWS, CHUNK], rounded to its dtype."""
    factor = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    return (value.to(tl.float32) * rms * factor[None, :]).to(value.dtype)


@triton.jit
def store_normed(x, residual, weight, normed, total, row, column, rows, columns, x_stride, residual_stride, rms):
    """Stores a chunk of the norm, and of x + residual; returns the norm, rounded."""
    value, inside = load_sum(x, residual, row, column, rows, columns, x_stride, residual_stride)
    place = row[:, None] * columns + column[None, :]
    if residual is not None:
        tl.store(total + place, value, mask=inside)
    result = norm(value, weight, column, columns, rms)
    tl.store(normed + place, result, mask=inside)
    return result


@triton.jit(do_not_specialize=["rows", "eps"])
def triton_rms_norm(
    x, residual, weight, normed, total, rows, columns, x_stride, residual_stride, eps,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rms = row_roots(x, residual, row, rows, columns, x_stride, residual_stride, eps, CHUNK)
    for start in range(0, columns, CHUNK):
        column = start + tl.arange(0, CHUNK)
        store_normed(x, residual, weight, normed, total, row, column, rows, columns, x_stride, residual_stride, rms)


@triton.jit(do_not_specialize=["rows", "eps"])
def triton_rms_norm_backward(
    grad, x, weight, grad_total, grad_x, parts, rows, columns, x_stride, eps,
    SLOTS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program p takes rows p, p + SLOTS, ... and adds up their part of the weight's gradient in that order."""
    everywhere = tl.arange(0, BLOCK)
    there = everywhere < columns
    sums = tl.zeros((BLOCK,), tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), rows, SLOTS):
        squares = tl.zeros((1, CHUNK // 8), tl.float32)
        products = tl.zeros((1, CHUNK // 8), tl.float32)
        for start in range(0, columns, CHUNK):
            column = start + tl.arange(0, CHUNK)
            value = tl.load(x + row * x_stride + column, mask=column < columns, other=0.0).to(tl.float32)
            pull = tl.load(grad + row * columns + column, mask=column < columns, other=0.0).to(tl.float32)
            pull *= tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
            squares = add_columns(squares, (value * value)[None, :])
            products = add_columns(products, (pull * value)[None, :])
        rms = reciprocal_root(halves(squares), columns, eps)
        product = halves(products)
        mean = tl.div_rn(product, tl.full(product.shape, 1.0, tl.float32) * columns) * rms  # of pull * unit
        mean, rms = mean.reshape(1), rms.reshape(1)

        value = tl.load(x + row * x_stride + everywhere, mask=there, other=0.0).to(tl.float32)
        pull = tl.load(grad + row * columns + everywhere, mask=there, other=0.0).to(tl.float32)
        unit = value * rms
        sums += pull * unit
        pull *= tl.load(weight + everywhere, mask=there, other=0.0).to(tl.float32)
        result = rms * (pull - unit * mean)
        if grad_total is not None:
            result += tl.load(grad_total + row * columns + everywhere, mask=there, other=0.0).to(tl.float32)
        tl.store(grad_x + row * columns + everywhere, result.to(grad_x.dtype.element_ty), mask=there)
    tl.store(parts + tl.program_id(0) * columns + everywhere, sums, mask=there)


@triton.jit(do_not_specialize=["count"])
def triton_rms_norm_backward_weight(parts, grad_weight, count, columns, SLOTS: tl.constexpr, WIDE: tl.constexpr):
    """The parts' sum: 8 groups, slot i in group i % 8, each added up in order; then halves."""
    column, group = tl.program_id(0) * WIDE + tl.arange(0, WIDE), tl.arange(0, 8)
    sums = tl.zeros((WIDE, 8), tl.float32)
    for slot in range(0, SLOTS, 8):
        inside = (column < columns)[:, None] & (slot + group < count)[None, :]
        sums += tl.load(parts + (slot + group)[None, :] * columns + column[:, None], mask=inside, other=0.0)
    total = halves(sums).reshape(WIDE)
    tl.store(grad_weight + column, total.to(grad_weight.dtype.element_ty), mask=column < columns)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, normed: Tensor, total: Tensor) -> None:
    if not normed.numel():
        return
    x, residual = as_rows(x), as_rows(residual) if residual is not None else None
    rows, columns = x.shape
    config = tile(rows, columns)
    strides = x.stride(0), residual.stride(0) if residual is not None else 0
    grid = (_triton.cdiv(rows, config["ROWS"]),)
    tensors = x, residual, weight.contiguous(), normed, total
    _triton.launch(triton_rms_norm, grid, *tensors, rows, columns, *strides, eps, **config)


def rms_norm_backward_cannot(grad: Tensor, *_: object) -> str | None:
    return f"the Triton kernel takes up to {WIDEST} columns, got {grad.shape[-1]}" if grad.shape[-1] > WIDEST else None


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, grad_total: Tensor | None, grad_x: Tensor, grad_weight: Tensor
) -> None:
    if not grad_x.numel():
        grad_weight.zero_()
        return
    x = as_rows(x)
    rows, columns = x.shape
    count = min(rows, SLOTS)
    parts = torch.empty(count, columns, dtype=torch.float32, device=x.device)
    block = max(128, _triton.next_power_of_2(columns))
    tensors = grad, x, weight.contiguous(), grad_total, grad_x, parts
    sizes = rows, columns, x.stride(0), eps, SLOTS, min(block, 2048), block
    warps = min(8, max(1, block // 512))
    _triton.launch(triton_rms_norm_backward, (count,), *tensors, *sizes, num_warps=warps, enable_fp_fusion=False)
    wide = 64
    grid = (_triton.cdiv(columns, wide),)
    _triton.launch(triton_rms_norm_backward_weight, grid, parts, grad_weight, count, columns, SLOTS, wide, num_warps=4)
