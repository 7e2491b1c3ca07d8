"""moe_balance_loss and its gradient in Triton: choices counted by sequence and expert, then every score read once.

The atomics add integers, whose sum has one value; what is added up in floats has one order.
"""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton

MOST = 4096  # experts of a token that its program's registers hold, 32 a lane
TOKENS = 128  # of a program that counts
SUM_FLOOR = tl.constexpr(1e-20)


@triton.jit(do_not_specialize=["tokens", "num_experts", "expert_stride", "choice_stride", "id_stride"])
def triton_moe_balance_loss_count(
    experts, seq_ids, counts, lengths, tokens, num_experts, expert_stride, choice_stride, id_stride,
    K: tl.constexpr, CHOICES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """counts [sequences, E] and lengths [sequences], of which there are as many as tokens; both begin at 0."""
    token, choice = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, CHOICES)[None, :]
    sequence = tl.load(seq_ids + token * id_stride, mask=token < tokens, other=-1).to(tl.int64)
    there = (sequence >= 0) & (sequence < tokens)
    tl.atomic_add(lengths + sequence, 1, mask=there, sem="relaxed")
    inside = there[:, None] & (choice < K)
    expert = tl.load(experts + token[:, None] * expert_stride + choice * choice_stride, mask=inside, other=-1).to(
        tl.int64
    )
    kept = inside & (expert >= 0) & (expert < num_experts)
    tl.atomic_add(counts + sequence[:, None] * num_experts + expert, 1, mask=kept, sem="relaxed")


@triton.jit
def _loads(
    scores, seq_ids, counts, lengths, row, tokens, num_experts, score_stride, id_stride, K, EXPERTS: tl.constexpr
):
    """(scores, f / T of eager's `_loads`, which are inside) of the tokens of a program, zero outside."""
    expert = tl.arange(0, EXPERTS)[None, :]
    sequence = tl.load(seq_ids + row * id_stride, mask=row < tokens, other=-1).to(tl.int64)
    inside = ((sequence >= 0) & (sequence < tokens))[:, None] & (expert < num_experts)
    length = tl.load(lengths + sequence, mask=(sequence >= 0) & (sequence < tokens), other=1).to(tl.float32)
    factor = tl.div_rn(tl.full(length.shape, 1.0, tl.float32) * num_experts / K, tl.maximum(length * length, 1.0))
    count = tl.load(counts + sequence[:, None] * num_experts + expert, mask=inside, other=0)
    value = tl.load(scores + row[:, None] * score_stride + expert, mask=inside, other=0.0)
    return value, count.to(tl.float32) * factor[:, None], inside


@triton.jit(do_not_specialize=["tokens", "num_experts", "id_stride"])
def triton_moe_balance_loss_terms(
    scores, seq_ids, counts, lengths, terms, tokens, num_experts, score_stride, id_stride,
    K: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    value, load, _ = _loads(
        scores, seq_ids, counts, lengths, row, tokens, num_experts, score_stride, id_stride, K, EXPERTS
    )
    share = tl.div_rn(value, tl.zeros_like(value) + (tl.sum(value, 1) + SUM_FLOOR)[:, None])
    tl.store(terms + row, tl.sum(load * share, 1), mask=row < tokens)


@triton.jit(do_not_specialize=["tokens", "alpha"])
def triton_moe_balance_loss_sum(terms, lengths, out, tokens, alpha, BLOCK: tl.constexpr):
    """alpha / the number of sequences, times the sum of the terms if they are given."""
    sums, sequences = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.int32)
    for start in range(0, tokens, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sequences += (tl.load(lengths + at, mask=at < tokens, other=0) > 0).to(tl.int32)
        if terms is not None:
            sums += tl.load(terms + at, mask=at < tokens, other=0.0)
    factor = alpha / tl.maximum(tl.sum(sequences, 0), 1).to(tl.float32)
    tl.store(out, factor if terms is None else tl.sum(sums, 0) * factor)


@triton.jit(do_not_specialize=["tokens", "num_experts", "id_stride"])
def triton_moe_balance_loss_backward(
    grad, scores, seq_ids, counts, lengths, factor, grad_scores, tokens, num_experts, score_stride, id_stride,
    K: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    row, expert = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, EXPERTS)[None, :]
    value, load, inside = _loads(
        scores, seq_ids, counts, lengths, row, tokens, num_experts, score_stride, id_stride, K, EXPERTS
    )
    total = tl.zeros_like(value) + (tl.sum(value, 1) + SUM_FLOOR)[:, None]
    pulled = tl.sum(load * tl.div_rn(value, total), 1)[:, None]
    result = tl.div_rn(load - pulled, total) * (tl.load(grad) * tl.load(factor))
    there = (row < tokens)[:, None] & (expert < num_experts)
    tl.store(grad_scores + row[:, None] * num_experts + expert, tl.where(inside, result, 0.0), mask=there)


def _cannot(scores: Tensor) -> str | None:
    if scores.dtype is not torch.float32:
        return f"the Triton kernel takes float32 scores, got {scores.dtype}"
    return f"the Triton kernel takes up to {MOST} experts, got {scores.shape[1]}" if scores.shape[1] > MOST else None


def moe_balance_loss_cannot(scores: Tensor, *_: object) -> str | None:
    return _cannot(scores)


def moe_balance_loss_backward_cannot(grad: Tensor, scores: Tensor, *_: object) -> str | None:
    return _cannot(scores)


def _count(scores: Tensor, experts: Tensor, seq_ids: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...], int]:
    """Counts and lengths, then the sizes, constants and grid that the kernels on scores share."""
    (tokens, num_experts), choices = scores.shape, experts.shape[1]
    zeros = torch.zeros(tokens * (num_experts + 1), dtype=torch.int32, device=scores.device)
    counts, lengths = zeros[: tokens * num_experts], zeros[tokens * num_experts :]
    sizes = tokens, num_experts, *experts.stride(), seq_ids.stride(0), choices, _triton.next_power_of_2(choices), TOKENS
    grid = (_triton.cdiv(tokens, TOKENS),)
    _triton.launch(triton_moe_balance_loss_count, grid, experts, seq_ids, counts, lengths, *sizes, num_warps=4)
    width = max(32, _triton.next_power_of_2(num_experts))
    tall = max(1, 1024 // width)
    sizes = tokens, num_experts, scores.stride(0), seq_ids.stride(0), choices, width, tall
    return counts, lengths, sizes, _triton.cdiv(tokens, tall)


def _sum(terms: Tensor | None, lengths: Tensor, out: Tensor, alpha: float) -> None:
    _triton.launch(triton_moe_balance_loss_sum, (1,), terms, lengths, out, lengths.shape[0], alpha, 1024, num_warps=4)


def moe_balance_loss(scores: Tensor, experts: Tensor, seq_ids: Tensor, alpha: float, loss: Tensor) -> None:
    counts, lengths, sizes, programs = _count(scores, experts, seq_ids)
    terms = torch.empty(scores.shape[0], dtype=torch.float32, device=scores.device)
    tensors = scores, seq_ids, counts, lengths, terms
    _triton.launch(triton_moe_balance_loss_terms, (programs,), *tensors, *sizes, num_warps=4)
    _sum(terms, lengths, loss, alpha)


def moe_balance_loss_backward(
    grad: Tensor, scores: Tensor, experts: Tensor, seq_ids: Tensor, alpha: float, grad_scores: Tensor
) -> None:
    counts, lengths, sizes, programs = _count(scores, experts, seq_ids)
    factor = torch.empty(1, dtype=torch.float32, device=scores.device)
    _sum(None, lengths, factor, alpha)
    tensors = grad, scores, seq_ids, counts, lengths, factor, grad_scores
    _triton.launch(triton_moe_balance_loss_backward, (programs,), *tensors, *sizes, num_warps=4)
