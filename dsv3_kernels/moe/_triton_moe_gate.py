"""moe_gate and its gradient in Triton, with the bits of eager: scores, sums and quotients one by one, ties by index."""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .._triton_sums import halves, in_turn

MOST = {"sigmoid": 4096, "softmax": 1024}  # experts of a token: 8 a lane, and a sum in turn that is unrolled 32 times
CLOSED = tl.constexpr(0x7FFFFF)  # key of -inf
SUM_FLOOR = tl.constexpr(1e-20)


def tile(width: int) -> dict[str, Any]:
    """Tokens of a program: 8 values a lane. Nothing is fused, as in eager."""
    return {"TOKENS": max(1, 1024 // width), "num_warps": max(4, width // 256), "enable_fp_fusion": False}


@triton.jit
def exp(x):
    """Eager's `_exp`: x = n ln 2 + r, a polynomial in r, times 2^n in two factors."""
    within = tl.minimum(tl.maximum(x, -104.0), 89.0)
    n = within * 1.44269504088896341 + 12582912.0 - 12582912.0  # rounded to nearest even: 1.5 * 2^23 leaves no fraction
    r = within - n * 0.693359375 - n * -2.12194440e-4
    p = tl.full(r.shape, 1.9875691500e-4, tl.float32)
    p = p * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    y = p * (r * r) + r + 1.0
    power = n.to(tl.int32)
    half = power >> 1
    low = ((half + 127) << 23).to(tl.float32, bitcast=True)
    high = ((power - half + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x == x, y * low * high, x)


@triton.jit
def lane_sum(values):
    """Sum of each row [TOKENS, 32 n], kept: 32 lanes in turn, then halves of them."""
    count: tl.constexpr = values.shape[1] // 32
    return halves(in_turn(values.reshape(values.shape[0], count, 32), count))


@triton.jit
def softmax_of(logits, row, stride, tokens, experts, WIDE: tl.constexpr):
    """(largest logit, what the powers are divided by) of each token, [TOKENS, 1]."""
    expert = tl.arange(0, WIDE)[None, :]
    there = (row < tokens)[:, None] & (expert < experts)
    values = tl.load(logits + row[:, None] * stride + expert, mask=there, other=float("-inf"))
    # The largest by integers in the order of the numbers: a NaN is one, and the largest.
    bits = values.to(tl.int32, bitcast=True)
    key = tl.where(values == values, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), 0x7FC00000)
    key = tl.max(key, 1)[:, None]
    largest = tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)
    powers = tl.where(expert < experts, exp(values - largest), 0.0)
    return largest, lane_sum(powers)


@triton.jit
def scores_of(values, largest, total, SOFTMAX: tl.constexpr):
    if SOFTMAX:
        return tl.div_rn(exp(values - largest), tl.zeros_like(values) + total)
    return tl.div_rn(tl.full(values.shape, 1.0, tl.float32), exp(-values) + 1.0)


@triton.jit
def key_of(value):
    """Integers from 0 on in the order of the numbers; NaN is the largest, as PyTorch sorts it."""
    bits = value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    key = tl.where(bits >= 0x80000000, 0xFFFFFFFF - bits, bits + 0x80000000)
    return tl.where(value == value, key, 0xFFFFFFFF)


@triton.jit
def value_of(key):
    bits = tl.where(key >= 0x80000000, key - 0x80000000, 0xFFFFFFFF - key)
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def ranked(key, index):
    """Integers of which the largest has the largest key and, of equal ones, the lowest index."""
    return (key << 16) + (0xFFFF - index)


@triton.jit
def open_groups(key, group, member, SIZE: tl.constexpr, groups, size, topk_groups):
    """Which groups [TOKENS, GROUPS, 1] are among the best by the sum of their two best; keys [TOKENS, GROUPS, SIZE]."""
    inside = (group < groups) & (member < size)
    rank = tl.where(inside, ranked(key, member), -1)
    best = tl.max(rank, 2)[:, :, None]
    second = tl.max(tl.where(rank == best, -1, rank), 2)[:, :, None]
    total = value_of(tl.maximum(best, 0) >> 16) + value_of(tl.maximum(second, 0) >> 16)
    rank = tl.where(group < groups, ranked(key_of(total), group), -1)
    is_open = rank < -1  # none
    for _ in range(topk_groups):
        winner = tl.max(rank, 1)[:, None]
        is_open = is_open | (rank == winner)
        rank = tl.where(rank == winner, -1, rank)
    return is_open


@triton.jit(do_not_specialize=["tokens", "groups", "size", "topk_groups", "top_k", "scaling"])
def triton_moe_gate(
    logits, bias, weights, experts, tokens, stride, bias_stride, groups, size, topk_groups, top_k, scaling,
    NORMALIZE: tl.constexpr, SOFTMAX: tl.constexpr, LIMITED: tl.constexpr,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, CHOICES: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """A token's experts are [GROUPS, SIZE] in its registers, powers of two; expert group * size + member."""
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    group, member = tl.arange(0, GROUPS)[None, :, None], tl.arange(0, SIZE)[None, None, :]
    inside, index = (group < groups) & (member < size), group * size + member
    there = (row < tokens)[:, None, None] & inside
    values = tl.load(logits + row[:, None, None] * stride + index, mask=there, other=0.0)
    largest, total = 0.0, 0.0
    if SOFTMAX:
        largest, total = softmax_of(logits, row, stride, tokens, groups * size, WIDE)
        largest, total = largest[:, :, None], total[:, :, None]
    scores = scores_of(values, largest, total, SOFTMAX)
    biased = scores
    if bias is not None:
        biased += tl.load(bias + index * bias_stride, mask=inside, other=0.0)
    key = key_of(biased)
    if LIMITED:
        key = tl.where(open_groups(key, group, member, SIZE, groups, size, topk_groups), key, CLOSED)
    rank = tl.where(inside, ranked(key, index), -1).reshape(TOKENS, GROUPS * SIZE)
    flat = scores.reshape(TOKENS, GROUPS * SIZE)

    choice = tl.arange(0, CHOICES)[None, :]
    chosen = tl.zeros((TOKENS, CHOICES), tl.int32)
    weight = tl.zeros((TOKENS, CHOICES), tl.float32)
    sums = tl.zeros((TOKENS, 1), tl.float32)
    for k in range(top_k):
        best = tl.max(rank, 1)[:, None]
        score = tl.sum(tl.where(rank == best, flat, 0.0), 1)[:, None]
        chosen = tl.where(choice == k, 0xFFFF - (best & 0xFFFF).to(tl.int32), chosen)
        weight = tl.where(choice == k, score, weight)
        sums += score
        rank = tl.where(rank == best, -1, rank)
    if NORMALIZE:
        weight = tl.div_rn(weight, tl.zeros_like(weight) + (sums + SUM_FLOOR))
    place, there = row[:, None] * top_k + choice, (row < tokens)[:, None] & (choice < top_k)
    tl.store(weights + place, weight * scaling, mask=there)
    tl.store(experts + place, chosen, mask=there)


@triton.jit(do_not_specialize=["tokens", "count", "top_k", "scaling"])
def triton_moe_gate_backward(
    grad_weights, logits, experts, grad_logits, tokens, count, stride, top_k, scaling,
    NORMALIZE: tl.constexpr, SOFTMAX: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    live, expert = (row < tokens)[:, None], tl.arange(0, WIDE)[None, :]
    there = live & (expert < count)
    values = tl.load(logits + row[:, None] * stride + expert, mask=there, other=0.0)
    largest, total = 0.0, 0.0
    if SOFTMAX:
        largest, total = softmax_of(logits, row, stride, tokens, count, WIDE)
    scores = scores_of(values, largest, total, SOFTMAX)
    place = row[:, None] * top_k

    # With w = s / D, D = sum(s) + floor: ds = (g - sum(g w)) / D.
    sums, dot = tl.zeros((TOKENS, 1), tl.float32), tl.zeros((TOKENS, 1), tl.float32)
    if NORMALIZE:
        for k in range(top_k):
            chosen = tl.load(experts + place + k, mask=live, other=-1)
            sums += tl.sum(tl.where(expert == chosen, scores, 0.0), 1)[:, None]
        sums += SUM_FLOOR
        for k in range(top_k):
            chosen = tl.load(experts + place + k, mask=live, other=-1)
            score = tl.sum(tl.where(expert == chosen, scores, 0.0), 1)[:, None]
            dot += tl.load(grad_weights + place + k, mask=live, other=0.0) * scaling * tl.div_rn(score, sums)
    grads = tl.zeros((TOKENS, WIDE), tl.float32)
    for k in range(top_k):
        chosen = tl.load(experts + place + k, mask=live, other=-1)
        grad = tl.load(grad_weights + place + k, mask=live, other=0.0) * scaling
        if NORMALIZE:
            grad = tl.div_rn(grad - dot, sums)
        grads = tl.where(expert == chosen, grad, grads)
    if SOFTMAX:
        result = scores * (grads - lane_sum(tl.where(expert < count, grads * scores, 0.0)))
    else:
        result = grads * scores * (1.0 - scores)
    tl.store(grad_logits + row[:, None] * count + expert, result, mask=there)


def _cannot(logits: Tensor, score: str) -> str | None:
    if logits.dtype is not torch.float32:
        return f"the Triton kernel takes float32 logits, got {logits.dtype}"
    most, count = MOST[score], logits.shape[1]
    return f"the Triton kernel takes up to {most} experts of a {score}, got {count}" if count > most else None


def moe_gate_cannot(logits: Tensor, *rest: Any) -> str | None:
    return _cannot(logits, rest[-1])


def moe_gate_backward_cannot(grad_weights: Tensor, logits: Tensor, *rest: Any) -> str | None:
    return _cannot(logits, rest[-1])


def moe_gate(
    logits: Tensor, bias: Tensor | None, num_groups: int, topk_groups: int, top_k: int, scaling: float,
    normalize: bool, score: str, weights: Tensor, experts: Tensor,
) -> None:  # fmt: skip
    tokens, count = logits.shape
    limited = topk_groups < num_groups
    if not limited:
        num_groups = 1
    size = count // num_groups
    groups, members = _triton.next_power_of_2(num_groups), _triton.next_power_of_2(size)
    wide = max(32, _triton.next_power_of_2(count))
    config = tile(max(groups * members, wide))
    constants = normalize, score == "softmax", limited, groups, members, _triton.next_power_of_2(top_k), wide
    sizes = tokens, logits.stride(0), bias.stride(0) if bias is not None else 0, num_groups, size, topk_groups, top_k
    grid = (_triton.cdiv(tokens, config["TOKENS"]),)
    _triton.launch(triton_moe_gate, grid, logits, bias, weights, experts, *sizes, scaling, *constants, **config)


def moe_gate_backward(
    grad_weights: Tensor, logits: Tensor, experts: Tensor, scaling: float, normalize: bool, score: str,
    grad_logits: Tensor,
) -> None:  # fmt: skip
    tokens, count = logits.shape
    wide = max(32, _triton.next_power_of_2(count))
    config = tile(wide)
    tensors = grad_weights.contiguous(), logits, experts.contiguous(), grad_logits
    sizes = tokens, count, logits.stride(0), experts.shape[1], scaling
    grid = (_triton.cdiv(tokens, config["TOKENS"]),)
    _triton.launch(triton_moe_gate_backward, grid, *tensors, *sizes, normalize, score == "softmax", wide, **config)
