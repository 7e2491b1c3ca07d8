"""dequantize: FP8 codes and their scales back to numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._library import define
from .quantize_1x128 import blocks

OP = "dequantize"


def dequantize(q: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`q * scale`, computed in float32 and rounded once.

    The scale's shape tells the tile: `[..., N, ceil(K / 128)]` is 1x128, `[..., ceil(N / 128), ceil(K / 128)]` is
    128x128 (one row is both, and means the same). With a 128x128 scale this reads a weight of the released
    checkpoint, whose `weight_scale_inv` multiplies.

    Args:
        q: `[..., N, K]` or `[K]` float8_e4m3fn; the last dimension contiguous.
        scale: float32, in any strides.
        dtype: of the result: bfloat16, float16 or float32.

    Returns:
        `[..., N, K]` in `dtype`, contiguous.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape or stride. RuntimeError: devices differ.
    """
    check.dtype(OP, "q", q, torch.float8_e4m3fn)
    check.dtype(OP, "scale", scale, torch.float32)
    check.at_least(OP, "q", q, 1)
    check.rows(OP, "q", q)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"{OP}: dtype: got {check.name_of(dtype)}, wanted bfloat16 or float16 or float32")
    by_row = (*q.shape[:-1], blocks(q.shape[-1]))
    by_block = (*q.shape[:-2], blocks(q.shape[-2]), by_row[-1]) if q.dim() > 1 else by_row
    if tuple(scale.shape) not in (by_row, by_block):
        wanted = f"{list(by_row)} (1x128) or {list(by_block)} (128x128)"
        raise ValueError(f"{OP}: scale: got shape {list(scale.shape)}, wanted {wanted}")
    check.device(OP, q=q, scale=scale)
    return _op(q, scale, dtype)


def _allocate(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return q.new_empty(q.shape, dtype=dtype)


_op = define("dequantize(Tensor q, Tensor scale, ScalarType dtype) -> Tensor", allocate=_allocate)
