"""moe_gate: which experts each token goes to, and with what weights."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .. import _checks as check
from .. import backends
from .._library import define, records

OP = "moe_gate"


def moe_gate(
    logits: Tensor,
    bias: Tensor | None,
    *,
    num_groups: int,
    topk_groups: int,
    top_k: int,
    scaling: float,
    normalize: bool = True,
    score: Literal["sigmoid", "softmax"] = "sigmoid",
) -> tuple[Tensor, Tensor]:
    """Choose `top_k` experts per token by biased scores within the best groups; weigh them by unbiased scores.

    score = sigmoid(logits), or softmax over the experts. Experts are ranked by score + bias. A group is E / num_groups
    neighbouring experts; its rank is the sum of its two best biased scores; experts outside the `topk_groups` best
    groups count as -inf. At equal values the lower index wins. weight = scaling * score, and with `normalize` the
    scores of the chosen are first divided by their sum + 1e-20.
    DeepSeek-V3 report (arXiv 2412.19437), section 2.1.2, equations 12 to 16, and node-limited routing.

    Args:
        logits: `[T, E]` float32 (or float64); the last dimension contiguous.
        bias: `[E]` of the same dtype, or None for none.
        num_groups: divides E, with two experts or more per group; 1 for none.
        topk_groups: groups that a token may use. top_k: experts per token, no more than those groups hold.
        scaling: factor on the weights (2.5 in DeepSeek-V3). normalize: make the weights sum to `scaling`.
        score: what turns logits into scores.

    Returns:
        `weights [T, K]` in the dtype of the logits, differentiable in `logits`, once; `experts [T, K]` int32, in
        descending order of their biased scores.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape, stride or number. RuntimeError: devices differ.
    """
    check.dtype(OP, "logits", logits, torch.float32, torch.float64)
    check.shape(OP, "logits", logits, ("T", "E"))
    check.rows(OP, "logits", logits)
    num_experts = logits.shape[1]
    if bias is not None:
        check.dtype(OP, "bias", bias, logits.dtype)
        check.shape(OP, "bias", bias, (num_experts,))
        check.device(OP, logits=logits, bias=bias)
    check.integer(OP, "num_groups", num_groups, 1)
    size = num_experts // num_groups
    fits = size * num_groups == num_experts and (num_groups == 1 or size >= 2)
    check.value(OP, "num_groups", fits, num_groups, f"a divisor of {num_experts} that leaves two experts per group")
    check.integer(OP, "topk_groups", topk_groups, 1)
    check.value(OP, "topk_groups", topk_groups <= num_groups, topk_groups, f"at most num_groups, {num_groups}")
    check.integer(OP, "top_k", top_k, 1)
    check.value(OP, "top_k", top_k <= topk_groups * size, top_k, f"at most {topk_groups * size}, the experts left")
    check.number(OP, "scaling", scaling)
    check.one_of(OP, "score", score, "sigmoid", "softmax")
    args = (logits, bias, num_groups, topk_groups, top_k, float(scaling), normalize, score)
    return _Gate.apply(*args) if records(logits) else _op(*args)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        bias: Tensor | None,
        num_groups: int,
        topk_groups: int,
        top_k: int,
        scaling: float,
        normalize: bool,
        score: str,
    ) -> tuple[Tensor, Tensor]:
        backends.save_for_backward(ctx)
        weights, experts = _op(logits, bias, num_groups, topk_groups, top_k, scaling, normalize, score)
        ctx.save_for_backward(logits, experts)
        ctx.scalars = scaling, normalize, score
        ctx.mark_non_differentiable(experts)
        return weights, experts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_weights: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        logits, experts = ctx.saved_tensors
        with backends.restored(ctx):
            grad = _backward(grad_weights.contiguous(), logits, experts, *ctx.scalars)
        return grad, None, None, None, None, None, None, None


def _allocate(
    logits: Tensor, bias: Tensor | None, num_groups: int, topk_groups: int, top_k: int, *_: Any
) -> tuple[Tensor, Tensor]:
    tokens = logits.shape[0]
    return logits.new_empty(tokens, top_k), logits.new_empty(tokens, top_k, dtype=torch.int32)


def _allocate_backward(grad_weights: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


_op = define(
    "moe_gate(Tensor logits, Tensor? bias, int num_groups, int topk_groups, int top_k, float scaling, bool normalize, "
    "str score) -> (Tensor, Tensor)",
    allocate=_allocate,
)
_backward = define(
    "moe_gate_backward(Tensor grad_weights, Tensor logits, Tensor experts, float scaling, bool normalize, str score) "
    "-> Tensor",
    allocate=_allocate_backward,
)
