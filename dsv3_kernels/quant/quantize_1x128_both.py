"""quantize_1x128_both: FP8 rows and FP8 columns of the same numbers, for a backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._library import define
from . import _outputs
from .quantize_1x128 import blocks, empty_scale

OP = "quantize_1x128_both"
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


def quantize_1x128_both(
    x: Tensor, *, offsets: Tensor | None = None, pow2_scale: bool = False, out: Outputs | None = None
) -> Outputs:
    """Quantise x along its rows and, transposed, along its columns; both from the numbers themselves, in one pass.

    `q, scale` are `quantize_1x128(x)`: what a forward product or an input gradient reads. `q_t, scale_t` hold x
    transposed, with one scale per column of x and 128 tokens: what a weight gradient reads, which sums over tokens
    (DeepSeek-V3 technical report, arXiv 2412.19437, section 3.3.2: 1x128 tiles become 128x1 tiles in backward).

    With `offsets`, the tokens of group g are rows `offsets[g]:offsets[g + 1]`; each group starts a new block in q_t,
    at column `offsets_t[g]`, and is padded with zeros (finite scales) to a multiple of 128. Nothing reads the offsets
    on the host: T' is a bound.

    Args:
        x: `[T, K]` bfloat16, float16 or float32; the last dimension contiguous.
        offsets: `[G + 1]` int32, on the device: rising from 0 to at most T.
        pow2_scale: round scales up to powers of two.
        out: `(q, scale, q_t, scale_t, offsets_t)` to write into: q, q_t and offsets_t contiguous, scales in any
            strides; the last is None without offsets.

    Returns:
        `q [T, K]` and `q_t [K, T']` float8_e4m3fn, contiguous; `scale [T, ceil(K / 128)]` and `scale_t [K, T' / 128]`
        float32, stored column by column as `quantize_1x128` does; `offsets_t [G + 1]` int32, multiples of 128, or None
        without offsets. T' is T, with offsets T + 127 G, rounded up to a multiple of 128. What belongs to no group
        (rows of q from `offsets[G]` on, columns of q_t from `offsets_t[G]` on, and their scales) is unspecified.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape or stride. RuntimeError: devices differ.
    """
    check.dtype(OP, "x", x, torch.bfloat16, torch.float16, torch.float32)
    check.shape(OP, "x", x, ("T", "K"))
    check.rows(OP, "x", x)
    if offsets is not None:
        check.dtype(OP, "offsets", offsets, torch.int32)
        check.shape(OP, "offsets", offsets, ("G + 1",))
        check.value(OP, "offsets", offsets.shape[0] > 0, 0, "at least one element")
        check.contiguous(OP, "offsets", offsets)
        check.device(OP, x=x, offsets=offsets)
    if out is None:
        q, scale, q_t, scale_t, offsets_t = _op(x, offsets, pow2_scale)
        return q, scale, q_t, scale_t, None if offsets is None else offsets_t
    check.value(OP, "out", len(out) == 5, len(out), "5 tensors")
    q, scale, q_t, scale_t, offsets_t = out
    tokens, columns = x.shape
    wide = width(x, offsets)
    _outputs.codes_and_scale(OP, q, scale, (tokens, columns), (tokens, blocks(columns)))
    _outputs.codes_and_scale(OP, q_t, scale_t, (columns, wide), (columns, blocks(wide)), first=2)
    if offsets is None:
        check.value(OP, "out[4]", offsets_t is None, type(offsets_t).__name__, "None without offsets")
        offsets_t = x.new_empty(0, dtype=torch.int32)
    else:
        check.dtype(OP, "out[4]", offsets_t, torch.int32)
        check.shape(OP, "out[4]", offsets_t, offsets.shape)
        check.contiguous(OP, "out[4]", offsets_t)
    outputs = {"q": q, "scale": scale, "q_t": q_t, "scale_t": scale_t, "offsets_t": offsets_t}
    _outputs.apart(OP, outputs, x=x, offsets=offsets)
    _op.out(x, offsets, pow2_scale, *outputs.values())
    return out


def width(x: Tensor, offsets: Tensor | None) -> int:
    """T': columns of q_t, whatever the offsets hold."""
    padding = 127 * (offsets.shape[0] - 1) if offsets is not None else 0
    return 128 * blocks(x.shape[0] + padding)


def _allocate(x: Tensor, offsets: Tensor | None, pow2_scale: bool) -> tuple[Tensor, ...]:
    q = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    q_t = x.new_empty((x.shape[1], width(x, offsets)), dtype=torch.float8_e4m3fn)
    offsets_t = x.new_empty(offsets.shape if offsets is not None else (0,), dtype=torch.int32)
    return q, empty_scale(q, q.shape[1], "mn"), q_t, empty_scale(q_t, q_t.shape[1], "mn"), offsets_t


_INPUTS = "Tensor x, Tensor? offsets, bool pow2_scale"
_op = define(
    f"quantize_1x128_both({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    allocate=_allocate,
    out=f"quantize_1x128_both_out({_INPUTS}, Tensor(a!) q, Tensor(b!) scale, Tensor(c!) q_t, Tensor(d!) scale_t, "
    "Tensor(e!) offsets_t) -> ()",
)
