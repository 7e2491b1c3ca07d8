"""fp8_grouped_linear: the linear layers of all experts, in FP8 by DeepSeek-V3's recipe."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .. import _checks as check
from .. import backends
from .._library import records
from ..quant.quantize_1x128 import quantize_1x128
from ..quant.quantize_1x128_both import quantize_1x128_both
from ..quant.quantize_128x128 import quantize_128x128
from . import _operands
from .fp8_grouped_gemm import fp8_grouped_gemm
from .fp8_grouped_wgrad import fp8_grouped_wgrad
from .fp8_linear import check_layer, output_dtype

OP = "fp8_grouped_linear"


def fp8_grouped_linear(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> Tensor:
    """`x[rows of g] @ weight[g].T` in FP8, forward and backward, where g owns rows `offsets[g]:offsets[g + 1]`.

    The recipe is `fp8_linear`'s (DeepSeek-V3 technical report, arXiv 2412.19437, section 3.3). Rows from `offsets[G]`
    on are read by nothing, whatever they hold: zero in the result, and zero in the gradient of x.

    Args:
        x: `[S, K]` bfloat16 or float32; the last dimension contiguous.
        weight: `[G, N, K]` bfloat16 or float32, the master copies; N and K multiples of 16.
        offsets: `[G + 1]` int32, on the device: rising from 0 to at most S.
        out_dtype: bfloat16 or float32; x's dtype when None.
        pow2_scale: round all scales up to powers of two.

    Returns:
        `[S, N]` in `out_dtype`. Gradients, once: of x in its dtype, of weight summed in float32, zero for an expert
        without rows.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape or stride. RuntimeError: devices differ.
    """
    check_layer(OP, x, weight, ("G", "N", "K"))
    check.shape(OP, "x", x, ("S", weight.shape[2]))
    _operands.indices(OP, "offsets", offsets, weight.shape[0] + 1)
    check.device(OP, x=x, weight=weight, offsets=offsets)
    out_dtype = output_dtype(OP, out_dtype, x)
    if records(x, weight):
        return _Fp8GroupedLinear.apply(x, weight, offsets, out_dtype, pow2_scale)
    rows = quantize_1x128(x, pow2_scale=pow2_scale)
    return fp8_grouped_gemm(*rows, *quantize_128x128(weight, pow2_scale=pow2_scale), offsets, out_dtype=out_dtype)


class _Fp8GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor, out_dtype: torch.dtype, pow2_scale: bool
    ) -> Tensor:
        x_t = x_t_scale = None
        if ctx.needs_input_grad[1]:
            q, scale, x_t, x_t_scale, _ = quantize_1x128_both(x, offsets=offsets, pow2_scale=pow2_scale)
        else:
            q, scale = quantize_1x128(x, pow2_scale=pow2_scale)
        w, w_scale = quantize_128x128(weight, pow2_scale=pow2_scale)
        ctx.save_for_backward(x_t, x_t_scale, *((w, w_scale) if ctx.needs_input_grad[0] else (None, None)), offsets)
        ctx.dtype, ctx.pow2_scale = x.dtype, pow2_scale
        backends.save_for_backward(ctx)
        return fp8_grouped_gemm(q, scale, w, w_scale, offsets, out_dtype=out_dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_t, x_t_scale, w, w_scale, offsets = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_weight = None
        with backends.restored(ctx):
            if ctx.needs_input_grad[1]:
                both = quantize_1x128_both(grad, offsets=offsets, pow2_scale=ctx.pow2_scale)
                q, scale, q_t, q_t_scale, offsets_t = both
                grad_weight = fp8_grouped_wgrad(q_t, q_t_scale, x_t, x_t_scale, cast(Tensor, offsets_t))
            else:
                q, scale = quantize_1x128(grad, pow2_scale=ctx.pow2_scale)
            if ctx.needs_input_grad[0]:
                # A block of 128 x 128 is one in the transpose too: codes and scales are transposed, not made anew.
                grad_x = fp8_grouped_gemm(q, scale, w.mT.contiguous(), w_scale.mT, offsets, out_dtype=ctx.dtype)
        return grad_x, grad_weight, None, None, None
