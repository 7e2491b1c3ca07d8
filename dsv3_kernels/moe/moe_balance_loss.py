"""moe_balance_loss: the complementary loss that keeps single sequences balanced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .. import backends
from .._library import define, records

OP = "moe_balance_loss"


def moe_balance_loss(scores: Tensor, experts: Tensor, *, seq_ids: Tensor, alpha: float) -> Tensor:
    """alpha * sum over experts of f P, per sequence, averaged over the sequences.

    In a sequence of T tokens f[i] = E / (K T) * (tokens that chose expert i), and P[i] is the mean over its tokens of
    scores[t, i] / (sum(scores[t]) + 1e-20): perfect balance gives alpha. f is a constant to the gradient.
    DeepSeek-V3 report (arXiv 2412.19437), section 2.1.2, equations 17 to 20.

    Args:
        scores: `[T, E]` float32 or float64, not negative: the unbiased scores, `sigmoid(logits)`; the last dimension
            contiguous.
        experts: `[T, K]` int32 or int64, the choices of `moe_gate`; -1 is counted for no expert.
        seq_ids: `[T]` int32 or int64, the sequence of each token, in [-1, T), in any order; a token with -1 is left
            out. Numbers that no token has do not count as sequences.
        alpha: factor, 0.0001 in DeepSeek-V3.

    Returns:
        A scalar in the dtype of the scores, differentiable in `scores`, once; 0 without tokens.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape or stride; on the CPU also ids out of range.
        RuntimeError: devices differ.
    """
    check.dtype(OP, "scores", scores, torch.float32, torch.float64)
    check.shape(OP, "scores", scores, ("T", "E"))
    check.rows(OP, "scores", scores)
    tokens = scores.shape[0]
    check.dtype(OP, "experts", experts, torch.int32, torch.int64)
    check.shape(OP, "experts", experts, (tokens, "K"))
    check.value(OP, "experts", experts.shape[1] > 0, list(experts.shape), "at least one expert per token")
    check.dtype(OP, "seq_ids", seq_ids, torch.int32, torch.int64)
    check.shape(OP, "seq_ids", seq_ids, (tokens,))
    check.number(OP, "alpha", alpha)
    check.device(OP, scores=scores, experts=experts, seq_ids=seq_ids)
    args = (scores, experts, seq_ids, float(alpha))
    return _BalanceLoss.apply(*args) if records(scores) else _op(*args)


class _BalanceLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, experts: Tensor, seq_ids: Tensor, alpha: float) -> Tensor:
        backends.save_for_backward(ctx)
        ctx.save_for_backward(scores, experts, seq_ids)
        ctx.alpha = alpha
        return _op(scores, experts, seq_ids, alpha)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        with backends.restored(ctx):
            return _backward(grad, *ctx.saved_tensors, ctx.alpha), None, None, None


def _allocate(scores: Tensor, experts: Tensor, seq_ids: Tensor, alpha: float) -> Tensor:
    return scores.new_empty(())


def _allocate_backward(grad: Tensor, scores: Tensor, *_: Any) -> Tensor:
    return scores.new_empty(scores.shape)


_op = define(
    "moe_balance_loss(Tensor scores, Tensor experts, Tensor seq_ids, float alpha) -> Tensor", allocate=_allocate
)
_backward = define(
    "moe_balance_loss_backward(Tensor grad, Tensor scores, Tensor experts, Tensor seq_ids, float alpha) -> Tensor",
    allocate=_allocate_backward,
)
