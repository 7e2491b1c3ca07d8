"""quantize_1x128: FP8 activations, one scale per row and 128 columns."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import _checks as check
from .._library import define
from . import _outputs

OP = "quantize_1x128"


def quantize_1x128(
    x: Tensor,
    *,
    pow2_scale: bool = False,
    scale_layout: Literal["mn", "k"] = "mn",
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise each run of 128 columns of a row to E4M3 with a scale of its own.

    `scale = max(amax, 1e-4) / 448` and `q = round(x / scale)` in IEEE float32, so that every backend gives the same
    bits; `real = q * scale`. A NaN or an infinity makes its block's scale and codes NaN, and no other's.
    The tile of the FP8 recipe: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2.

    Args:
        x: `[..., K]` bfloat16, float16 or float32; the last dimension contiguous. K need not divide by 128.
        pow2_scale: round scales up to powers of two.
        scale_layout: "mn" stores scales column by column, strides `(1, round_up(T, 4))` over the T flattened leading
            dimensions, as a GEMM's tensor copies want them; "k" stores them row-major.
        out: `(q, scale)` to write into: q contiguous, scale in any strides.

    Returns:
        `q [..., K]` float8_e4m3fn, contiguous; `scale [..., ceil(K / 128)]` float32.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape, stride or layout. RuntimeError: devices differ.
    """
    check.dtype(OP, "x", x, torch.bfloat16, torch.float16, torch.float32)
    check.at_least(OP, "x", x, 1)
    check.rows(OP, "x", x)
    check.one_of(OP, "scale_layout", scale_layout, "mn", "k")
    if out is None:
        return _op(x, pow2_scale, scale_layout)
    q, scale = out
    _outputs.codes_and_scale(OP, q, scale, x.shape, (*x.shape[:-1], blocks(x.shape[-1])))
    _outputs.apart(OP, {"q": q, "scale": scale}, x=x)
    _op.out(x, pow2_scale, scale_layout, q, scale)
    return out


def blocks(columns: int) -> int:
    """Number of scales for so many columns."""
    return (columns + 127) // 128


def empty_scale(x: Tensor, columns: int, scale_layout: str) -> Tensor:
    """Uninitialised scales for `x [..., columns]`, in the layout asked for."""
    leading = x.shape[:-1]
    size = (*leading, blocks(columns))
    if scale_layout == "k":
        return x.new_empty(size, dtype=torch.float32)
    strides: list[int] = []
    rows = 1
    for extent in reversed(leading):
        strides.insert(0, rows)
        rows = rows * extent
    return x.new_empty_strided(size, (*strides, (rows + 3) // 4 * 4), dtype=torch.float32)


def _allocate(x: Tensor, pow2_scale: bool, scale_layout: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), empty_scale(x, x.shape[-1], scale_layout)


_op = define(
    "quantize_1x128(Tensor x, bool pow2_scale, str scale_layout) -> (Tensor, Tensor)",
    allocate=_allocate,
    out="quantize_1x128_out(Tensor x, bool pow2_scale, str scale_layout, Tensor(a!) q, Tensor(b!) scale) -> ()",
)
