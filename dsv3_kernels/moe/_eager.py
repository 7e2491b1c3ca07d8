"""The moe family in plain PyTorch: the definition of what is right."""

from __future__ import annotations

import torch
from torch import Tensor

SUM_FLOOR = 1e-20  # keeps weights finite where every chosen score has underflowed


def _scores(logits: Tensor, score: str) -> Tensor:
    if score == "softmax":
        return logits.softmax(-1)
    # Not torch.sigmoid: on the CPU it rounds the elements left over by its vectors differently, so that equal logits
    # would get unequal scores and ties would go astray.
    return (1 + (-logits).exp()).reciprocal()


def _ranked(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of each row, in descending order; at equal values the lower index first."""
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[..., :count]


def moe_gate(
    logits: Tensor,
    bias: Tensor | None,
    num_groups: int,
    topk_groups: int,
    top_k: int,
    scaling: float,
    normalize: bool,
    score: str,
) -> tuple[Tensor, Tensor]:
    scores = _scores(logits, score)
    biased = scores if bias is None else scores + bias
    if topk_groups < num_groups:
        groups = biased.unflatten(-1, (num_groups, biased.shape[-1] // num_groups))
        best = _ranked(groups.topk(2).values.sum(-1), topk_groups)
        closed = torch.ones(groups.shape[:2], dtype=torch.bool, device=groups.device).scatter_(1, best, False)
        biased = groups.masked_fill(closed[..., None], -torch.inf).flatten(-2)
    experts = _ranked(biased, top_k)
    weights = scores.gather(-1, experts)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + SUM_FLOOR)
    return weights * scaling, experts.int()


def moe_gate_backward(
    grad_weights: Tensor, logits: Tensor, experts: Tensor, scaling: float, normalize: bool, score: str
) -> Tensor:
    scores = _scores(logits, score)
    chosen = experts.long()
    grad = grad_weights * scaling
    if normalize:  # w = s / D, D = sum(s) + floor: ds = (g - sum(g w)) / D
        s = scores.gather(-1, chosen)
        total = s.sum(-1, keepdim=True) + SUM_FLOOR
        grad = (grad - (grad * (s / total)).sum(-1, keepdim=True)) / total
    grad = torch.zeros_like(scores).scatter_(-1, chosen, grad)
    if score == "sigmoid":
        return grad * scores * (1 - scores)
    return scores * (grad - (grad * scores).sum(-1, keepdim=True))
