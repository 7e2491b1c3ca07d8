"""Sums whose order is written down, so that all backends have the same bits."""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def halves(total):
    """Sum of each row of [ROWS, up to 256 lanes], kept: its second half is added to the first until one is left."""
    for _ in tl.static_range(8):
        if total.shape[1] > 1:
            parts = total.reshape(total.shape[0], 2, total.shape[1] // 2).permute(0, 2, 1)
            low, high = tl.split(parts)
            total = low + high
    return total


@triton.jit
def in_turn(values, COUNT: tl.constexpr):
    """Sum over the middle of [ROWS, COUNT, LANES], one after the other; adding the zeros of the others changes none."""
    number = tl.arange(0, COUNT)[None, :, None]
    total = tl.zeros((values.shape[0], values.shape[2]), tl.float32)
    for i in tl.static_range(COUNT):
        total += tl.sum(tl.where(number == i, values, 0.0), 1)
    return total
