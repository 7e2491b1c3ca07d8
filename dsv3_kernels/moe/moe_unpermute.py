"""moe_unpermute: the experts' rows back to their tokens, weighted and summed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .. import backends
from .._library import define, records
from ._handle import PermuteHandle

OP = "moe_unpermute"


def moe_unpermute(rows: Tensor, handle: PermuteHandle, weights: Tensor | None = None) -> Tensor:
    """out[t] = sum over k of weights[t, k] * rows[row of choice (t, k)], in float32 and in the order of k.

    Choices that were dropped add nothing, whatever their weights; padding and unspecified rows are not read.
    DeepSeek-V3 report (arXiv 2412.19437), section 2.1.2, equation 12.

    Args:
        rows: `[R, H]` bfloat16, float16, float32 or float64, in the order of `moe_permute`'s rows (H may differ from
            x's); the last dimension contiguous.
        handle: of `moe_permute`.
        weights: `[T, K]` float32 (float64 for float64 rows), or None for a plain sum.

    Returns:
        `[T, H]` in the dtype of the rows. Differentiable in `rows` and `weights`, once; the gradient of padding and of
        rows past the last segment is zero.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape or stride. RuntimeError: devices differ.
    """
    check.dtype(OP, "rows", rows, torch.bfloat16, torch.float16, torch.float32, torch.float64)
    if not isinstance(handle, PermuteHandle):
        raise TypeError(f"{OP}: handle: got {type(handle).__name__}, wanted the PermuteHandle of moe_permute")
    row_of, source = handle.row_of, handle.source
    check.shape(OP, "rows", rows, (source.shape[0], "H"))
    check.rows(OP, "rows", rows)
    if weights is not None:
        check.dtype(OP, "weights", weights, torch.float64 if rows.dtype == torch.float64 else torch.float32)
        check.shape(OP, "weights", weights, row_of.shape)
        check.rows(OP, "weights", weights)
    check.device(OP, rows=rows, handle=row_of, weights=weights)
    return _Unpermute.apply(rows, row_of, source, weights) if records(rows, weights) else op(rows, row_of, weights)


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, row_of: Tensor, source: Tensor, weights: Tensor | None) -> Tensor:
        backends.save_for_backward(ctx)
        ctx.save_for_backward(rows if weights is not None else None, row_of, source, weights)
        return op(rows, row_of, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        rows, row_of, source, weights = ctx.saved_tensors
        with backends.restored(ctx):
            grad_rows, grad_weights = _backward(grad.contiguous(), rows, row_of, source, weights)
        return grad_rows, None, None, None if weights is None else grad_weights


def _allocate(rows: Tensor, row_of: Tensor, weights: Tensor | None) -> Tensor:
    return rows.new_empty(row_of.shape[0], rows.shape[1])


def _allocate_backward(
    grad: Tensor, rows: Tensor | None, row_of: Tensor, source: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    grad_weights = weights.new_empty(weights.shape) if weights is not None else grad.new_empty(0)
    return grad.new_empty(source.shape[0], grad.shape[1]), grad_weights


op = define("moe_unpermute(Tensor rows, Tensor row_of, Tensor? weights) -> Tensor", allocate=_allocate)
_backward = define(
    "moe_unpermute_backward(Tensor grad, Tensor? rows, Tensor row_of, Tensor source, Tensor? weights) "
    "-> (Tensor, Tensor)",
    allocate=_allocate_backward,
)
