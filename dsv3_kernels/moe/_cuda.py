"""The moe family's CUDA kernels. Arguments were checked by the op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _host
from .._arguments import target

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
MOST_GATE_EXPERTS, MOST_GATE_LANES = 512, 32
MOST_PERMUTE_EXPERTS = 1024


def moe_gate_cannot(
    logits: Tensor, bias: Tensor | None, num_groups: int, topk_groups: int, top_k: int, *_: Any
) -> str | None:
    if num_groups > MOST_GATE_LANES:
        return f"got {num_groups} groups, where a warp ranks up to {MOST_GATE_LANES}"
    return _gate_cannot(logits, top_k)


def _gate_cannot(logits: Tensor, top_k: int) -> str | None:
    if logits.dtype is not torch.float32:
        return "got float64 logits, wanted float32"
    if logits.shape[1] > MOST_GATE_EXPERTS:
        return f"got {logits.shape[1]} experts, where a warp holds up to {MOST_GATE_EXPERTS}"
    if top_k > MOST_GATE_LANES:
        return f"got {top_k} choices, where a warp holds up to {MOST_GATE_LANES}"
    return None


def moe_gate(
    logits: Tensor,
    bias: Tensor | None,
    num_groups: int,
    topk_groups: int,
    top_k: int,
    scaling: float,
    normalize: bool,
    score: str,
    weights: Tensor,
    experts: Tensor,
) -> None:
    _host.moe_gate(
        logits,
        bias,
        weights.data_ptr(),
        experts.data_ptr(),
        num_groups,
        topk_groups,
        top_k,
        scaling,
        normalize,
        score == "softmax",
        *target(logits),
    )


def moe_gate_backward_cannot(grad_weights: Tensor, logits: Tensor, experts: Tensor, *_: Any) -> str | None:
    return _gate_cannot(logits, experts.shape[1])


def moe_gate_backward(
    grad_weights: Tensor,
    logits: Tensor,
    experts: Tensor,
    scaling: float,
    normalize: bool,
    score: str,
    grad_logits: Tensor,
) -> None:
    _host.moe_gate_backward(
        grad_weights.data_ptr(),
        logits,
        experts.data_ptr(),
        grad_logits.data_ptr(),
        experts.shape[1],
        scaling,
        normalize,
        score == "softmax",
        *target(logits),
    )


def moe_permute_cannot(
    x: Tensor, experts: Tensor, scale: Tensor | None, num_experts: int, alignment: int
) -> str | None:
    if num_experts <= MOST_PERMUTE_EXPERTS:
        return None
    return f"got {num_experts} experts, where a CTA counts up to {MOST_PERMUTE_EXPERTS}"


def moe_permute(
    x: Tensor,
    experts: Tensor,
    scale: Tensor | None,
    num_experts: int,
    alignment: int,
    rows: Tensor,
    row_scale: Tensor,
    offsets: Tensor,
    counts: Tensor,
    row_of: Tensor,
    source: Tensor,
) -> None:
    _host.moe_permute(
        x,
        experts,
        scale,
        num_experts,
        alignment,
        rows,
        row_scale,
        offsets.data_ptr(),
        counts.data_ptr(),
        row_of.data_ptr(),
        source.data_ptr(),
        *target(x),
    )


def moe_unpermute(rows: Tensor, row_of: Tensor, weights: Tensor | None, out: Tensor) -> None:
    _host.moe_unpermute(rows, _TYPES[rows.dtype], row_of, weights, out.data_ptr(), *target(rows))


def moe_unpermute_backward(
    grad: Tensor,
    rows: Tensor | None,
    row_of: Tensor,
    source: Tensor,
    weights: Tensor | None,
    grad_rows: Tensor,
    grad_weights: Tensor,
) -> None:
    _host.moe_unpermute_backward(
        grad.data_ptr(),
        rows,
        _TYPES[grad.dtype],
        row_of,
        source.data_ptr(),
        weights,
        grad_rows,
        grad_weights.data_ptr(),
        *target(grad),
    )
