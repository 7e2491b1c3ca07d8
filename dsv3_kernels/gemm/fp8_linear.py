"""fp8_linear and Fp8Linear: a linear layer whose three products run in FP8, by DeepSeek-V3's recipe."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .. import backends
from .._library import records
from ..quant.quantize_1x128 import quantize_1x128
from ..quant.quantize_1x128_both import quantize_1x128_both
from ..quant.quantize_128x128 import quantize_128x128
from . import _operands
from .fp8_gemm import fp8_gemm

OP = "fp8_linear"


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    pow2_scale: bool = False,
) -> Tensor:
    """`x @ weight.T + bias`, with the products of forward and backward in FP8 and everything else as given.

    Everything is E4M3 with scales from the values at hand: x and the output's gradient in tiles of 1x128, the weight
    in blocks of 128x128, and both factors of the weight's gradient in tiles of 128 tokens, quantised from the numbers
    themselves (DeepSeek-V3 technical report, arXiv 2412.19437, section 3.3). What is kept for backward is FP8.

    Args:
        x: `[..., K]` bfloat16 or float32; the last dimension contiguous.
        weight: `[N, K]` bfloat16 or float32, the master copy; N and K multiples of 16.
        bias: `[N]` bfloat16 or float32.
        out_dtype: bfloat16 or float32; x's dtype when None.
        pow2_scale: round all scales up to powers of two.

    Returns:
        `[..., N]` in `out_dtype`. Gradients, once: of x in its dtype, of weight and bias summed in float32, which is
        how a float32 weight gets them (autograd rounds them to any other dtype of the weight's).

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape or stride. RuntimeError: devices differ.
    """
    check_layer(OP, x, weight, ("N", "K"))
    check.at_least(OP, "x", x, 1)
    check.shape(OP, "x", x, (..., weight.shape[1]))
    if bias is not None:
        check.dtype(OP, "bias", bias, *_operands.OUTPUTS)
        check.shape(OP, "bias", bias, weight.shape[:1])
        check.contiguous(OP, "bias", bias)
    check.device(OP, x=x, weight=weight, bias=bias)
    out_dtype = output_dtype(OP, out_dtype, x)
    if records(x, weight, bias):
        return _Fp8Linear.apply(x, weight, bias, out_dtype, pow2_scale)
    rows = quantize_1x128(x.reshape(-1, x.shape[-1]), pow2_scale=pow2_scale)
    product = fp8_gemm(*rows, *quantize_128x128(weight, pow2_scale=pow2_scale), bias=bias, out_dtype=out_dtype)
    return product.view(*x.shape[:-1], weight.shape[0])


def check_layer(op: str, x: Tensor, weight: Tensor, shape: tuple[str, ...]) -> None:
    """What the layers of this family ask of x and weight."""
    check.dtype(op, "x", x, *_operands.OUTPUTS)
    check.dtype(op, "weight", weight, *_operands.OUTPUTS)
    check.shape(op, "weight", weight, shape)
    n, k = weight.shape[-2:]
    check.value(op, "weight", n % 16 == 0 and k % 16 == 0, [n, k], "multiples of 16")
    check.rows(op, "x", x)
    check.rows(op, "weight", weight)


def output_dtype(op: str, asked: torch.dtype | None, x: Tensor) -> torch.dtype:
    if asked is not None:
        _operands.output_dtype(op, asked)
    return asked or x.dtype


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype, pow2_scale: bool
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        x_t = x_t_scale = None
        if ctx.needs_input_grad[1]:
            q, scale, x_t, x_t_scale, _ = quantize_1x128_both(rows, pow2_scale=pow2_scale)
        else:
            q, scale = quantize_1x128(rows, pow2_scale=pow2_scale)
        w, w_scale = quantize_128x128(weight, pow2_scale=pow2_scale)
        ctx.save_for_backward(x_t, x_t_scale, *((w, w_scale) if ctx.needs_input_grad[0] else (None, None)))
        ctx.shape, ctx.dtype, ctx.pow2_scale = x.shape, x.dtype, pow2_scale
        backends.save_for_backward(ctx)
        return fp8_gemm(q, scale, w, w_scale, bias=bias, out_dtype=out_dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_t, x_t_scale, w, w_scale = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1]).contiguous()
        grad_x = grad_weight = grad_bias = None
        with backends.restored(ctx):
            if ctx.needs_input_grad[1]:
                q, scale, q_t, q_t_scale, _ = quantize_1x128_both(grad, pow2_scale=ctx.pow2_scale)
                grad_weight = fp8_gemm(q_t, q_t_scale, x_t, x_t_scale, out_dtype=torch.float32)
            elif ctx.needs_input_grad[0]:
                q, scale = quantize_1x128(grad, pow2_scale=ctx.pow2_scale)
            if ctx.needs_input_grad[0]:
                # A block of 128 x 128 is one in the transpose too: codes and scales are transposed, not made anew.
                grad_x = fp8_gemm(q, scale, w.t().contiguous(), w_scale.t(), out_dtype=ctx.dtype).view(ctx.shape)
            if ctx.needs_input_grad[2]:
                grad_bias = grad.sum(0, dtype=torch.float32)
        return grad_x, grad_weight, grad_bias, None, None


class Fp8Linear(torch.nn.Linear):
    """`torch.nn.Linear` on `fp8_linear`: the weight is float32 (the master copy), the products are FP8.

    Args:
        in_features, out_features: multiples of 16.
        bias: add a learned bias; off by default, as in DeepSeek-V3's layers.
        device, dtype: of the parameters.
        pow2_scale: round all scales up to powers of two.

    Returns:
        from `forward(x [..., in_features])`: `[..., out_features]` in x's dtype.

    Raises:
        ValueError: in_features or out_features is no multiple of 16. From `forward`: as `fp8_linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        pow2_scale: bool = False,
    ) -> None:
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            check.value("Fp8Linear", name, size > 0 and size % 16 == 0, size, "a multiple of 16")
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.pow2_scale = pow2_scale

    def forward(self, input: Tensor) -> Tensor:
        return fp8_linear(input, self.weight, bias=self.bias, pow2_scale=self.pow2_scale)
