"""What the Triton GEMMs share: configurations, the place of a tile, its product and its store.

`tl.dot` starts every 128 of K from zero, and a float32 sum outside takes their results: the promotion costs one FMA per
output and k-block. Pointers to a tile are 64-bit sums, offsets inside it 32-bit.
"""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import triton
import triton.language as tl

from .. import _triton

BAND = tl.constexpr(8)  # rows of tiles that go down a column together: they share B in L2, and their A from the last
# Beside the scales of B per row there are no registers for what can be moved out of the loop over tiles. Triton 3.8 and
# 3.9 spill four of those without this, 3.6 and 3.7 two with it.
STAYS = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8))

# What is specialised has a kernel of its own for every 1 and every multiple of 16. Two things gain by it: the output's
# strides (wide stores) and b_scale_row (with 1, a thread's 32 scales of B are one address, otherwise 32 in registers).
RUNTIME = [
    "a_group", "a_stride", "a_scale", "a_scale_group", "a_scale_row", "a_scale_block", "b_group", "b_stride", "b_scale",
    "b_scale_group", "b_scale_block", "offsets", "counts", "M", "N", "K", "G",
]  # fmt: skip

# Eight warps: the sum and the block of 128 x 128 are 128 registers of a thread, and of four warps they would spill.
# BM of 64 is the least that `wgmma` takes. On sm_90 a stage is (BM + BN) x 128 bytes, and a tile has an SM to itself.
LARGE = {"BM": 128, "BN": 128, "num_warps": 8, "num_stages": 4}
NARROW = {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 4}
MEDIUM = {"BM": 64, "BN": 128, "num_warps": 8, "num_stages": 4}
SMALL = {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 4}


def configs(op: str) -> _triton.Table:
    """By `rows` of a group and `tiles` of 128 x 128 altogether: few tiles leave SMs without any, and are made smaller.

    `apart` is 1 where B's scales per row lie apart: LARGE would spill their addresses. All of it follows from the
    budget (132 SMs of sm_90; 99 KB of shared memory on sm_89) and is unmeasured.
    """
    return _triton.Table(
        op,
        ({"rows": 64, "tiles": 66}, SMALL),
        ({"rows": 64}, MEDIUM),
        ({"tiles": 66}, MEDIUM),
        ({"apart": 0, "sm": 89}, {**LARGE, "num_stages": 3}),
        ({"apart": 0}, LARGE),
        ({}, NARROW),
        candidates=tuple(
            {"BM": m, "BN": n, "num_warps": w, "num_stages": s}
            for m, n, w in ((128, 128, 8), (128, 64, 8), (64, 128, 8), (64, 64, 4), (32, 128, 4), (16, 128, 4))
            for s in (3, 4, 5)
        ),
    )


def apart(by_row: bool, b_scale_row: int) -> int:
    return int(by_row and b_scale_row != 1)


def multiple(depth: int) -> int:
    """What the kernels are told that K is a multiple of: 128 needs no mask, 16 keeps loads of 16 bytes."""
    return 128 if depth % 128 == 0 else 16 if depth % 16 == 0 else 1


@triton.jit
def place(tile, row_tiles, column_tiles):
    """Row and column of tile number `tile`: bands of BAND rows, each column by column."""
    first = tile // (BAND * column_tiles) * BAND
    height = tl.minimum(row_tiles - first, BAND)
    within = tile % (BAND * column_tiles)
    return first + within % height, within // height


@triton.jit
def promoted(
    a,
    a_stride,
    a_scale,
    a_scale_row,
    a_scale_block,
    rows,
    b,
    b_stride,
    b_scale,
    b_scale_at,
    b_scale_block,
    columns,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BY_ROW: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    """`A @ B.T [BM, BN]` in float32, of which `rows` and `columns` exist; the others are not read, and are zero.

    Pointers are those of the tile's first row and k-block; b has one scale for the whole tile, or with BY_ROW
    one per row, at the offsets b_scale_at [BN]. a_stride and b_stride count 16 bytes. K is a multiple of MULTIPLE.
    """
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, 128)
    a_at = m[:, None] * (a_stride * 16) + k[None, :]
    b_at = n[None, :] * (b_stride * 16) + k[:, None]
    left = K // MULTIPLE * MULTIPLE
    total = tl.zeros((BM, BN), tl.float32)
    for _ in range(tl.cdiv(K, 128)):
        a_inside, b_inside = (m < rows)[:, None], (n < columns)[None, :]
        if MULTIPLE < 128:
            a_inside, b_inside = a_inside & (k < left)[None, :], b_inside & (k < left)[:, None]
        product = tl.dot(tl.load(a + a_at, mask=a_inside, other=0.0), tl.load(b + b_at, mask=b_inside, other=0.0))
        scale = tl.load(a_scale + m * a_scale_row, mask=m < rows, other=0.0)
        if BY_ROW:
            by_column = tl.load(b_scale + b_scale_at, mask=n < columns, other=0.0)
            total += product * scale[:, None] * by_column[None, :]
        else:
            total += product * (scale * tl.load(b_scale))[:, None]
        a += 128
        b += 128
        a_scale += a_scale_block
        b_scale += b_scale_block
        left -= 128
    return total


@triton.jit
def multiply_group(
    a, a_stride, a_scale, a_scale_row, a_scale_block, m0, rows,
    b, b_group, b_stride, b_scale, b_scale_group, b_scale_row, b_scale_block, g, column, out, out_stride, N, K,
    BY_ROW: tl.constexpr, MULTIPLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Writes a tile of `out`: the `rows` of A from m0 on times tile number `column` of the rows of B's group g.

    m0 and g are 64-bit. N is a multiple of 8.
    """
    n0, columns = column.to(tl.int64) * BN, N // 8 * 8 - column * BN
    total = promoted(
        a + m0 * (a_stride * 16), a_stride, a_scale + m0 * a_scale_row, a_scale_row, a_scale_block, rows,
        b + (g * b_group + n0 * b_stride) * 16, b_stride,
        b_scale + g * b_scale_group + (n0 if BY_ROW else n0 // 128) * b_scale_row, tl.arange(0, BN) * b_scale_row,
        b_scale_block, columns, K, BM, BN, BY_ROW, MULTIPLE,
    )  # fmt: skip
    store(out + (m0 * out_stride + n0), out_stride, rows, columns, total, False, BM, BN)


@triton.jit
def store(out, out_stride, rows, columns, total, ACCUMULATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Writes the tile's `rows` and `columns` at `out`, added to what is there with ACCUMULATE."""
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    at = out + (m[:, None] * out_stride + n[None, :])
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    if ACCUMULATE:
        total += tl.load(at, mask=inside).to(tl.float32)
    tl.store(at, total.to(out.dtype.element_ty), mask=inside)
