"""rms_norm: root-mean-square norm, with the residual addition before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .. import backends
from .._library import define, records

OP = "rms_norm"
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """`x * rsqrt(mean(x^2) + eps) * weight` over the last dimension, in float32, rounded once.

    With a residual, `x + residual` is rounded to x's dtype first, returned, and normed: what a transformer block does
    between its halves (Zhang and Sennrich, arXiv 1910.07467, equation 4). Differentiable, once, in all three tensors.

    Args:
        x: `[..., H]` bfloat16, float16 or float32; the last dimension contiguous.
        weight: `[H]`, bfloat16, float16 or float32.
        eps: added to the mean square.
        residual: as x in shape and dtype.

    Returns:
        `normed [..., H]` in x's dtype, contiguous; with a residual `(normed, x + residual)`.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape or stride. RuntimeError: devices differ.
    """
    check_arguments(OP, x, weight, residual)
    if records(x, weight, residual):
        normed, total = _RmsNorm.apply(x, weight, eps, residual)
    else:
        normed, total = _op(x, weight, eps, residual)
    return normed if residual is None else (normed, total)


def check_arguments(op: str, x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    check.dtype(op, "x", x, *FLOATS)
    check.dtype(op, "weight", weight, *FLOATS)
    check.at_least(op, "x", x, 1)
    check.rows(op, "x", x)
    check.shape(op, "weight", weight, (x.shape[-1],))
    if residual is not None:
        check.dtype(op, "residual", residual, x.dtype)
        check.shape(op, "residual", residual, x.shape)
        check.rows(op, "residual", residual)
    check.device(op, x=x, weight=weight, residual=residual)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        normed, total = _op(x, weight, eps, residual)
        ctx.save_for_backward(x if residual is None else total, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        backends.save_for_backward(ctx)
        return normed, total if residual is not None else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if grad is None:
            return grad_total, None, None, grad_total
        with backends.restored(ctx):
            grad_total = None if grad_total is None else grad_total.contiguous()
            grad_x, grad_weight = _backward(grad.contiguous(), x, weight, ctx.eps, grad_total)
        return grad_x, grad_weight, None, grad_x if ctx.needs_input_grad[3] else None


def _allocate(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape if residual is not None else (0,))


def _allocate_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, grad_total: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


_op = define(
    "rms_norm(Tensor x, Tensor weight, float eps, Tensor? residual) -> (Tensor, Tensor)",
    allocate=_allocate,
)
_backward = define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, Tensor? grad_total) -> (Tensor, Tensor)",
    allocate=_allocate_backward,
)
