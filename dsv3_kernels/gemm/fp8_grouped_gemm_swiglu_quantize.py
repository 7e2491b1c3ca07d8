"""fp8_grouped_gemm_swiglu_quantize: the first half of an expert: gate and up products, SwiGLU, FP8."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._library import define
from ..quant.quantize_1x128 import empty_scale
from .fp8_grouped_gemm import check_operands

OP = "fp8_grouped_gemm_swiglu_quantize"


def fp8_grouped_gemm_swiglu_quantize(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    *,
    weights: Tensor | None = None,
    pow2_scale: bool = False,
    num_sms: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`silu_mul_quantize_1x128` of `fp8_grouped_gemm`, without rounding in between: products stay in float32.

    Rows of `B[g]` are the gate's, then up's, F each. What comes out is the A of the expert's second product
    (DeepSeek-V3 technical report, arXiv 2412.19437, section 3.3.2). Rows from `offsets[G]` on are not read, and are
    zero in q and in scale.

    Args:
        a: `[S, K]` float8_e4m3fn.
        a_scale: `[S, ceil(K / 128)]` float32 (1x128), in any strides.
        b: `[G, 2 F, K]` float8_e4m3fn, 2 F a multiple of 8. Rows of a and b: contiguous, a multiple of 16 bytes apart.
        b_scale: `[G, ceil(2 F / 128), ceil(K / 128)]` (128x128) or `[G, 2 F, ceil(K / 128)]` (1x128) float32.
        offsets: `[G + 1]` int32, on the device: rising from 0 to at most S.
        weights: `[S]` float32, one per row, in any strides: multiplied in before the quantisation.
        pow2_scale: round scales up to powers of two.
        num_sms: leave the other SMs to someone else; a GPU's matter.

    Returns:
        `q [S, F]` float8_e4m3fn, contiguous; `scale [S, ceil(F / 128)]` float32 with strides `(1, round_up(S, 4))`.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape or stride. RuntimeError: devices differ.
    """
    check_operands(OP, a, a_scale, b, b_scale, offsets)
    if weights is not None:
        check.dtype(OP, "weights", weights, torch.float32)
        check.shape(OP, "weights", weights, a.shape[:1])
        check.device(OP, a=a, weights=weights)
    return _op(a, a_scale, b, b_scale, offsets, weights, pow2_scale, num_sms)


def allocate(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    pow2_scale: bool,
    num_sms: int | None,
) -> tuple[Tensor, Tensor]:
    """Zeros: no implementation writes the rows that no group owns."""
    q = a.new_zeros((a.shape[0], b.shape[1] // 2), dtype=torch.float8_e4m3fn)
    return q, empty_scale(q, q.shape[1], "mn").zero_()


_op = define(
    "fp8_grouped_gemm_swiglu_quantize(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor offsets, "
    "Tensor? weights, bool pow2_scale, int? num_sms) -> (Tensor, Tensor)",
    allocate=allocate,
)
