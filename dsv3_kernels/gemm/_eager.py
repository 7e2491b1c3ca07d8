"""The gemm family in plain PyTorch: the definition of what is right.

A product of two E4M3 codes is a multiple of 2^-18 below 2^18, so a float64 sum of 128 of them is exact in any order.
Rounded once to float32 and promoted in the order of k, it makes every result a function of its row and column alone:
the same bits for any batch, group, thread count or device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..quant._eager import decode, silu_mul_quantize_1x128
from ..quant.quantize_1x128 import blocks
from .fp8_grouped_gemm_swiglu_quantize import allocate


def promoted(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """`A @ B.T` in float32: `[M, K]` by `[N, K]`, promoted every 128 of K."""
    rows, columns = a.shape[0], b.shape[0]
    if b_scale.shape[0] != columns:
        b_scale = b_scale.repeat_interleave(128, 0)[:columns]
    total = a.new_zeros((rows, columns), dtype=torch.float32)
    for block in range(blocks(a.shape[1])):
        k = slice(128 * block, 128 * block + 128)
        partial = (decode(a[:, k], torch.float64) @ decode(b[:, k], torch.float64).t()).float()
        # Two roundings, one operation each: a fused one could round elements differently by their place in memory.
        total += partial.mul_(a_scale[:, block, None] * b_scale[:, block])
    return total


def segments(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """The groups that have rows, and their rows. Reads the offsets on the host: on a GPU, eager waits for it here."""
    bounds = offsets.tolist()
    for group, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end > start:
            yield group, slice(start, end)


def fp8_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    policy: str,
    num_sms: int | None,
) -> Tensor:
    total = promoted(a, a_scale, b, b_scale)
    return (total if bias is None else total.add_(bias)).to(out_dtype)


def fp8_gemm_accumulate(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    policy: str,
    num_sms: int | None,
    out: Tensor,
) -> None:
    out.copy_(fp8_gemm(a, a_scale, b, b_scale, bias, torch.float32, policy, num_sms).add_(out))


def fp8_grouped_gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, num_sms: int | None, out: Tensor
) -> None:
    for group, rows in segments(offsets):
        out[rows] = promoted(a[rows], a_scale[rows], b[group], b_scale[group])


def fp8_masked_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    counts: Tensor,
    expected_m: int | None,
    num_sms: int | None,
    out: Tensor,
) -> None:
    for group, count in enumerate(counts.tolist()):
        if count > 0:
            out[group, :count] = promoted(a[group, :count], a_scale[group, :count], b[group], b_scale[group])


def fp8_grouped_gemm_swiglu_quantize(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    pow2_scale: bool,
    num_sms: int | None,
) -> tuple[Tensor, Tensor]:
    q, scale = allocate(a, a_scale, b, b_scale, offsets, weights, pow2_scale, num_sms)
    for group, rows in segments(offsets):
        gate_up = promoted(a[rows], a_scale[rows], b[group], b_scale[group])
        by_row = None if weights is None else weights[rows]
        q[rows], scale[rows] = silu_mul_quantize_1x128(gate_up, by_row, pow2_scale)
    return q, scale


def fp8_grouped_wgrad(
    a_t: Tensor,
    a_scale: Tensor,
    b_t: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    out_dtype: torch.dtype,
    num_sms: int | None,
) -> Tensor:
    out = a_t.new_zeros((offsets.shape[0] - 1, a_t.shape[0], b_t.shape[0]), dtype=out_dtype)
    for group, total in _weight_gradients(a_t, a_scale, b_t, b_scale, offsets):
        out[group] = total
    return out


def fp8_grouped_wgrad_accumulate(
    a_t: Tensor,
    a_scale: Tensor,
    b_t: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    num_sms: int | None,
    out: Tensor,
) -> None:
    for group, total in _weight_gradients(a_t, a_scale, b_t, b_scale, offsets):
        out[group] = total.add_(out[group])


def _weight_gradients(
    a_t: Tensor, a_scale: Tensor, b_t: Tensor, b_scale: Tensor, offsets: Tensor
) -> Iterator[tuple[int, Tensor]]:
    for group, tokens in segments(offsets):
        if tokens.start % 128 or tokens.stop % 128:
            raise ValueError(f"fp8_grouped_wgrad: offsets: got {offsets.tolist()}, wanted multiples of 128")
        tiles = slice(tokens.start // 128, tokens.stop // 128)
        yield group, promoted(a_t[:, tokens], a_scale[:, tiles], b_t[:, tokens], b_scale[:, tiles])
