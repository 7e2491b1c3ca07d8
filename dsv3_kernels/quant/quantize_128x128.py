"""quantize_128x128: FP8 weights, one scale per 128 x 128 block."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._library import define
from . import _outputs
from .quantize_1x128 import blocks

OP = "quantize_128x128"


def quantize_128x128(
    w: Tensor, *, pow2_scale: bool = False, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Quantise each 128 x 128 block of a matrix, or of a stack of them, to E4M3 with a scale of its own.

    `scale = max(amax, 1e-4) / 448` and `q = round(w / scale)` in IEEE float32; `real = q * scale`. A NaN or an
    infinity makes its block's scale and codes NaN, and no other's.
    The tile of weights: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2; `scale` is what the released
    checkpoint calls `weight_scale_inv`.

    Args:
        w: `[..., N, K]` bfloat16, float16 or float32; the last dimension contiguous. N and K need not divide by 128:
            the blocks at the edges are smaller.
        pow2_scale: round scales up to powers of two.
        out: `(q, scale)` to write into: q contiguous, scale in any strides.

    Returns:
        `q [..., N, K]` float8_e4m3fn and `scale [..., ceil(N / 128), ceil(K / 128)]` float32, both contiguous.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape or stride. RuntimeError: devices differ.
    """
    check.dtype(OP, "w", w, torch.bfloat16, torch.float16, torch.float32)
    check.at_least(OP, "w", w, 2)
    check.rows(OP, "w", w)
    if out is None:
        return _op(w, pow2_scale)
    q, scale = out
    _outputs.codes_and_scale(OP, q, scale, w.shape, _scale_shape(w))
    _outputs.apart(OP, {"q": q, "scale": scale}, w=w)
    _op.out(w, pow2_scale, q, scale)
    return out


def _scale_shape(w: Tensor) -> tuple[int, ...]:
    return (*w.shape[:-2], blocks(w.shape[-2]), blocks(w.shape[-1]))


def _allocate(w: Tensor, pow2_scale: bool) -> tuple[Tensor, Tensor]:
    return w.new_empty(w.shape, dtype=torch.float8_e4m3fn), w.new_empty(_scale_shape(w), dtype=torch.float32)


_op = define(
    "quantize_128x128(Tensor w, bool pow2_scale) -> (Tensor, Tensor)",
    allocate=_allocate,
    out="quantize_128x128_out(Tensor w, bool pow2_scale, Tensor(a!) q, Tensor(b!) scale) -> ()",
)
