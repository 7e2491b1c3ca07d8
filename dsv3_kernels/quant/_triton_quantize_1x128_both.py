"""quantize_1x128_both in Triton: a program reads 128 tokens of a group by 128 columns once, and quantises both ways."""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from ._triton_encode import encode, magnitude, scale_of

# 64 values a lane with 8 warps, as quantize_128x128: it follows from the registers; unmeasured.
CONFIGS = _triton.Table("quantize_1x128_both", ({}, {"num_warps": 8}), candidates=({"num_warps": 8}, {"num_warps": 16}))
GROUPS = tl.constexpr(128)  # bounds that are looked at together


@triton.jit
def _padded_group(offsets, offsets_t, groups, at, first):
    """(first token, end) of the group that owns columns at:at + 128 of q_t, end 0 where none does.

    Every program adds up all groups' padded lengths; the `first` one writes them down.
    """
    past, start, total = 0, 0, 0  # groups that end at or before `at`, where the last of them ends, all lengths
    for base in range(0, groups, GROUPS):
        group = base + tl.arange(0, GROUPS)
        low = tl.load(offsets + group, mask=group < groups, other=0)
        high = tl.load(offsets + group + 1, mask=group < groups, other=0)
        padded = (high - low + 127) // 128 * 128
        ends = total + tl.cumsum(padded, 0)
        tl.store(offsets_t + group + 1, ends, mask=first & (group < groups))
        before = (group < groups) & (ends <= at)
        past += tl.sum(before.to(tl.int32), 0)
        start = tl.maximum(start, tl.max(tl.where(before, ends, 0), 0))
        total += tl.sum(padded, 0)
    tl.store(offsets_t, 0, mask=first)
    owned = past < groups
    token = tl.load(offsets + past, mask=owned, other=0) + at - start
    return token, tl.load(offsets + past + 1, mask=owned, other=0)


@triton.jit(do_not_specialize=["tokens"])
def triton_quantize_1x128_both(
    x, offsets, q, scale, q_t, scale_t, offsets_t, tokens, columns, wide, groups, x_stride,
    scale_row, scale_block, scale_t_row, scale_t_block, pow2,
):  # fmt: skip
    across = tl.maximum(tl.cdiv(columns, 128), 1)
    left, at = tl.program_id(0) % across, tl.program_id(0) // across * 128
    if offsets is not None:
        first, end = _padded_group(offsets, offsets_t, groups, at, tl.program_id(0) == 0)
        if end == 0:
            return
    else:
        first, end = at, tokens
    token, place = first + tl.arange(0, 128).to(tl.int64), at + tl.arange(0, 128).to(tl.int64)
    column = left * 128 + tl.arange(0, 128)
    inside = (token < end)[:, None] & (column < columns)[None, :]
    real = tl.load(x + token[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    size = magnitude(real)
    by_row, by_column = scale_of(tl.max(size, 1), pow2), scale_of(tl.max(size, 0), pow2)
    tl.store(scale + token * scale_row + left.to(tl.int64) * scale_block, by_row, mask=(token < end) & (columns > 0))
    tl.store(q + token[:, None] * columns + column[None, :], encode(real, by_row[:, None]), mask=inside)
    column = column.to(tl.int64)
    tl.store(scale_t + column * scale_t_row + at.to(tl.int64) // 128 * scale_t_block, by_column, mask=column < columns)
    codes = tl.trans(encode(real, by_column[None, :]))
    tl.store(
        q_t + column[:, None] * wide + place[None, :], codes, mask=(column < columns)[:, None] & (place < wide)[None, :]
    )


def quantize_1x128_both(
    x: Tensor, offsets: Tensor | None, pow2_scale: bool, q: Tensor, scale: Tensor, q_t: Tensor, scale_t: Tensor,
    offsets_t: Tensor,
) -> None:  # fmt: skip
    (tokens, columns), wide = x.shape, q_t.shape[1]
    tiles = wide // 128 * scale.shape[1]
    if offsets is not None:
        tiles = max(1, tiles)  # offsets_t is written whatever the size of x
    groups = offsets.shape[0] - 1 if offsets is not None else 0
    strides = x.stride(0), *scale.stride(), *scale_t.stride()
    tensors = x, offsets, q, scale, q_t, scale_t, offsets_t
    _triton.launch(
        triton_quantize_1x128_both, (tiles,), *tensors, tokens, columns, wide, groups, *strides, pow2_scale,
        **CONFIGS(x),
    )  # fmt: skip
