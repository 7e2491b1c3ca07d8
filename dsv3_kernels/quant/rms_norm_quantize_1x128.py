"""rms_norm_quantize_1x128: residual addition, norm and FP8 quantisation in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._library import define
from . import _outputs
from .quantize_1x128 import blocks, empty_scale
from .rms_norm import check_arguments

OP = "rms_norm_quantize_1x128"


def rms_norm_quantize_1x128(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    pow2_scale: bool = False,
    out: tuple[Tensor, Tensor, Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`quantize_1x128` of `rms_norm(x, weight, eps, residual=residual)`, to the bit, in one pass over x.

    What is quantised is `normed` as it is returned, rounded to x's dtype. DeepSeek-V3 technical report
    (arXiv 2412.19437), section 3.3.2.

    Args:
        x: `[..., H]` bfloat16, float16 or float32; the last dimension contiguous.
        weight: `[H]`, bfloat16, float16 or float32.
        eps: added to the mean square.
        residual: as x in shape and dtype.
        pow2_scale: round scales up to powers of two.
        out: `(q, scale, normed, residual)` to write into, contiguous but for the scale; the last is None without a
            residual.

    Returns:
        `q [..., H]` float8_e4m3fn; `scale [..., ceil(H / 128)]` float32 with strides `(1, round_up(T, 4))` over the T
        flattened leading dimensions; `normed [..., H]` in x's dtype; `x + residual`, or None without a residual.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape or stride. RuntimeError: devices differ.
    """
    check_arguments(OP, x, weight, residual)
    if out is None:
        q, scale, normed, total = _op(x, weight, eps, residual, pow2_scale)
        return q, scale, normed, None if residual is None else total
    check.value(OP, "out", len(out) == 4, len(out), "4 tensors")
    q, scale, normed, total = out
    _outputs.codes_and_scale(OP, q, scale, x.shape, (*x.shape[:-1], blocks(x.shape[-1])))
    check.dtype(OP, "out[2]", normed, x.dtype)
    check.shape(OP, "out[2]", normed, x.shape)
    check.contiguous(OP, "out[2]", normed)
    if residual is None:
        check.value(OP, "out[3]", total is None, type(total).__name__, "None without a residual")
        total = x.new_empty(0)
    else:
        check.dtype(OP, "out[3]", total, x.dtype)
        check.shape(OP, "out[3]", total, x.shape)
        check.contiguous(OP, "out[3]", total)
    outputs = {"q": q, "scale": scale, "normed": normed, "total": total}
    _outputs.apart(OP, outputs, x=x, weight=weight, residual=residual)
    _op.out(x, weight, eps, residual, pow2_scale, *outputs.values())
    return out


def _allocate(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, pow2_scale: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    total = x.new_empty(x.shape if residual is not None else (0,))
    return q, empty_scale(x, x.shape[-1], "mn"), x.new_empty(x.shape), total


_INPUTS = "Tensor x, Tensor weight, float eps, Tensor? residual, bool pow2_scale"
_op = define(
    f"rms_norm_quantize_1x128({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    allocate=_allocate,
    out=f"rms_norm_quantize_1x128_out({_INPUTS}, Tensor(a!) q, Tensor(b!) scale, Tensor(c!) normed, Tensor(d!) total)"
    " -> ()",
)
