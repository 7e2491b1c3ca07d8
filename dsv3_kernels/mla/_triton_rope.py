"""rope in Triton: rows of pairs, each read and written once; nothing is fused, so the bits are eager's."""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .rope import heads_of

VALUES = 1024  # pairs of a program: 8 a lane with 4 warps; unmeasured


@triton.jit(do_not_specialize=["rows", "heads", "table_rows"])
def triton_rope(
    x, positions, cos_sin, out, rows, heads, width, table_rows, token_stride, head_stride, table_stride,
    out_token, out_head,
    INTERLEAVED: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pair, pairs, there = tl.arange(0, PAIRS), width // 2, row < rows
    token = row // heads
    inside = there[:, None] & (pair < pairs)[None, :]
    position = tl.load(positions + token, mask=there, other=0).to(tl.int64)[:, None]
    known = inside & (position >= 0) & (position < table_rows)  # the others' rows become NaN
    angle = cos_sin + position * table_stride + pair[None, :]
    cos, sin = tl.load(angle, mask=known, other=float("nan")), tl.load(angle + pairs, mask=known, other=float("nan"))
    source = x + (token * token_stride + row % heads * head_stride)[:, None]
    target = out + (token * out_token + row % heads * out_head)[:, None]
    if INTERLEAVED:
        column = tl.arange(0, 2 * PAIRS)[None, :]
        whole = there[:, None] & (column < width)
        both = tl.load(source + column, mask=whole, other=0.0).to(tl.float32)
        a, b = tl.split(both.reshape(ROWS, PAIRS, 2))
    else:
        a = tl.load(source + pair[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(source + pairs + pair[None, :], mask=inside, other=0.0).to(tl.float32)
    if TRANSPOSED:
        c, d = a * cos + b * sin, b * cos - a * sin
    else:
        c, d = a * cos - b * sin, a * sin + b * cos
    c, d = c.to(out.dtype.element_ty), d.to(out.dtype.element_ty)
    if INTERLEAVED:
        tl.store(target + column, tl.join(c, d).reshape(ROWS, 2 * PAIRS), mask=whole)
    else:
        tl.store(target + pair[None, :], c, mask=inside)
        tl.store(target + pairs + pair[None, :], d, mask=inside)


def rope_cannot(x: Tensor, *_: object) -> str | None:
    return "the Triton kernel does not take float64" if x.dtype is torch.float64 else None


def rope(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool, transposed: bool, out: Tensor) -> None:
    if not out.numel():
        return
    heads, width = math.prod(x.shape[positions.dim() : -1]), x.shape[-1]
    x, out = heads_of(x, positions), heads_of(out, positions)
    rows, pairs = x.shape[0] * heads, _triton.next_power_of_2(width // 2)
    tall = max(1, min(VALUES // pairs, _triton.next_power_of_2(rows)))
    strides = x.stride(0), x.stride(1), cos_sin.stride(0), out.stride(0), out.stride(1)
    sizes = rows, heads, width, cos_sin.shape[0], *strides, interleaved, transposed, tall, pairs
    grid = (_triton.cdiv(rows, tall),)
    warps = min(16, max(1, tall * pairs // 256))
    tensors = x, positions.contiguous(), cos_sin, out
    _triton.launch(triton_rope, grid, *tensors, *sizes, num_warps=warps, enable_fp_fusion=False)
