"""silu_mul_quantize_1x128: the SwiGLU activation, straight into FP8."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._library import define
from . import _outputs
from .quantize_1x128 import blocks, empty_scale

OP = "silu_mul_quantize_1x128"


def silu_mul_quantize_1x128(
    gate_up: Tensor,
    *,
    weights: Tensor | None = None,
    pow2_scale: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`silu(gate) * up`, times each row's weight, in float32 and never rounded before it is quantised 1x128.

    `silu(x) = x / (1 + exp(-x))`; gate is the first half of the columns, up the second (Shazeer, arXiv 2002.05202;
    DeepSeek-V3 technical report, arXiv 2412.19437, section 3.3.2 for the tile). A weight may be the router's, which a
    later sum over experts then leaves out.

    Args:
        gate_up: `[..., 2 F]` bfloat16, float16 or float32; the last dimension contiguous. F need not divide by 128.
        weights: `[...]` float32, one per row, in any strides.
        pow2_scale: round scales up to powers of two.
        out: `(q, scale)` to write into: q contiguous, scale in any strides.

    Returns:
        `q [..., F]` float8_e4m3fn, contiguous; `scale [..., ceil(F / 128)]` float32 with strides `(1, round_up(T, 4))`
        over the T flattened leading dimensions, as `quantize_1x128` lays it out.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape or stride. RuntimeError: devices differ.
    """
    check.dtype(OP, "gate_up", gate_up, torch.bfloat16, torch.float16, torch.float32)
    check.at_least(OP, "gate_up", gate_up, 1)
    check.rows(OP, "gate_up", gate_up)
    check.value(OP, "gate_up", gate_up.shape[-1] % 2 == 0, gate_up.shape[-1], "an even number of columns")
    if weights is not None:
        check.dtype(OP, "weights", weights, torch.float32)
        check.shape(OP, "weights", weights, gate_up.shape[:-1])
        check.device(OP, gate_up=gate_up, weights=weights)
    if out is None:
        return _op(gate_up, weights, pow2_scale)
    q, scale = out
    shape = (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    _outputs.codes_and_scale(OP, q, scale, shape, (*shape[:-1], blocks(shape[-1])))
    _outputs.apart(OP, {"q": q, "scale": scale}, gate_up=gate_up, weights=weights)
    _op.out(gate_up, weights, pow2_scale, q, scale)
    return out


def _allocate(gate_up: Tensor, weights: Tensor | None, pow2_scale: bool) -> tuple[Tensor, Tensor]:
    *leading, columns = gate_up.shape
    q = gate_up.new_empty((*leading, columns // 2), dtype=torch.float8_e4m3fn)
    return q, empty_scale(gate_up, columns // 2, "mn")


_op = define(
    "silu_mul_quantize_1x128(Tensor gate_up, Tensor? weights, bool pow2_scale) -> (Tensor, Tensor)",
    allocate=_allocate,
    out="silu_mul_quantize_1x128_out(Tensor gate_up, Tensor? weights, bool pow2_scale, "
    "Tensor(a!) q, Tensor(b!) scale) -> ()",
)
