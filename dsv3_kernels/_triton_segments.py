"""Tiles of rows that lie in segments of any lengths, which only the device knows."""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import triton
import triton.language as tl


def tiles(rows: int, segments: int, block: int) -> int:
    """Tiles that any bounds fit in, for `segment_of`."""
    return rows // block + segments + 2


@triton.jit
def _bound(bounds, count, rows, i):
    """Bound i of 0, bounds[0], ..., bounds[count], rows: the rows before and after all segments are segments too."""
    inner = tl.load(bounds + tl.minimum(tl.maximum(i - 1, 0), count))
    return tl.where(i == 0, 0, tl.where(i > count + 1, rows, inner))


@triton.jit
def segment_of(bounds, count, rows, tile, BLOCK: tl.constexpr):
    """(segment, first row, end of the segment) of tile number `tile`; first row >= end where the tile has no rows.

    `bounds` are count + 1 rising int32. Rows before them are segment -1, rows after them segment `count`.
    Segment g begins at tile bound(g) // BLOCK + g, which leaves it tiles enough and rises with g: a binary search.
    """
    low, high = 0, count + 2
    while high - low > 1:
        middle = (low + high) // 2
        if _bound(bounds, count, rows, middle) // BLOCK + middle <= tile:
            low = middle
        else:
            high = middle
    start = _bound(bounds, count, rows, low)
    return low - 1, start + (tile - (start // BLOCK + low)) * BLOCK, _bound(bounds, count, rows, low + 1)
