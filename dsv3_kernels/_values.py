"""Whether the numbers in index tensors (lengths, tables, offsets, slots, experts) are what an op can use.

Kernels do not look: they stay inside the tensors and compute nonsense quietly, since nothing may wait for the device. A
function here reads the tensors of the op of its name, and raises `ValueError` in words: for CPU tensors in the eager
backend always, elsewhere where `dk.check_values()` or `DSV3_KERNELS_CHECK_VALUES` ask for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Check = Callable[..., None]
_CHECKS: dict[str, Check] = {}


def check(op: str, args: tuple[Any, ...], device: torch.device) -> None:
    """ValueError when an index tensor among the arguments of `torch.ops.dsv3_kernels.<op>` holds what it must not.

    RuntimeError inside a CUDA graph's capture, which cannot read the device.
    """
    function = _CHECKS.get(op)
    if function is None:
        return
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{op}: check_values: reads the device, which the capture of a CUDA graph cannot do")
    function(op, *args)


def _of(*ops: str) -> Callable[[Check], Check]:
    def enter(function: Check) -> Check:
        _CHECKS.update(dict.fromkeys(ops, function))
        return function

    return enter


def in_range(op: str, argument: str, tensor: Tensor, low: int, high: int) -> None:
    """low <= values < high"""
    if tensor.numel() == 0:
        return
    smallest, largest = (int(t) for t in tensor.aminmax())
    if smallest < low or largest >= high:
        got = smallest if smallest < low else largest
        raise ValueError(f"{op}: {argument}: got {got}, wanted values in [{low}, {high})")


def bounds(op: str, argument: str, offsets: Tensor, rows: int, multiple: int = 1) -> None:
    """0 <= offsets[0] <= offsets[1] <= ... <= rows, all of them multiples"""
    values = offsets.tolist()
    shown = f"{values[:8]}{' and more' if len(values) > 8 else ''}"
    if values != sorted(values) or values[0] < 0 or values[-1] > rows:
        raise ValueError(f"{op}: {argument}: got {shown}, wanted non-decreasing values in [0, {rows}]")
    if any(value % multiple for value in values):
        raise ValueError(f"{op}: {argument}: got {shown}, wanted multiples of {multiple}")


# quant


@_of("quantize_1x128_both")
def _quantize_both(op: str, x: Tensor, offsets: Tensor | None, *_: Any) -> None:
    if offsets is not None:
        bounds(op, "offsets", offsets, x.shape[0])


# gemm


@_of("fp8_grouped_gemm", "fp8_grouped_gemm_swiglu_quantize")
def _grouped(op: str, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, *_: Any) -> None:
    bounds(op, "offsets", offsets, a.shape[0])


@_of("fp8_masked_gemm")
def _masked(op: str, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, *_: Any) -> None:
    in_range(op, "counts", counts, 0, a.shape[1] + 1)


@_of("fp8_grouped_wgrad", "fp8_grouped_wgrad_accumulate")
def _wgrad(op: str, a_t: Tensor, a_scale: Tensor, b_t: Tensor, b_scale: Tensor, offsets: Tensor, *_: Any) -> None:
    bounds(op, "offsets", offsets, a_t.shape[1], 128)


# mla


@_of("rope")
def _rope(op: str, x: Tensor, positions: Tensor, cos_sin: Tensor, *_: Any) -> None:
    in_range(op, "positions", positions, 0, cos_sin.shape[0])


@_of("mla_prefill")
def _prefill(
    op: str, q: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *_: Any
) -> None:
    bounds(op, "cu_seqlens_q", cu_q, q.shape[0])
    bounds(op, "cu_seqlens_k", cu_k, v.shape[0])


@_of("mla_decode")
def _decode(op: str, q: Tensor, kv_cache: Tensor, block_table: Tensor, seqlens: Tensor, *_: Any) -> None:
    _pages(op, "cache_seqlens", kv_cache, block_table, seqlens)


@_of("mla_cache_append")
def _append(op: str, kv_cache: Tensor, slots: Tensor, *_: Any) -> None:
    in_range(op, "slots", slots, -1, kv_cache.shape[0] * kv_cache.shape[1])


@_of("mla_prologue")
def _prologue(
    op: str,
    x: Tensor,
    q_weight: Tensor,
    kv_weight: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    slots: Tensor,
    *_: Any,
) -> None:
    in_range(op, "positions", positions, 0, cos_sin.shape[0])
    in_range(op, "slots", slots, -1, kv_cache.shape[0] * kv_cache.shape[1])


@_of("mla_cache_gather")
def _gather(op: str, kv_cache: Tensor, block_table: Tensor, cu_seqlens: Tensor, total: int, *_: Any) -> None:
    in_range(op, "cu_seqlens", cu_seqlens, 0, total + 1)
    _pages(op, "cu_seqlens, differences", kv_cache, block_table, cu_seqlens.diff())


def _pages(op: str, argument: str, kv_cache: Tensor, block_table: Tensor, lengths: Tensor) -> None:
    """Lengths that the table covers, with pages that the cache has."""
    page, entries = kv_cache.shape[1], block_table.shape[1]
    in_range(op, argument, lengths, 0, entries * page + 1)
    used = torch.arange(0, entries * page, page, device=lengths.device) < lengths[:, None]
    in_range(op, "block_table", block_table[used], 0, kv_cache.shape[0])


# moe


@_of("moe_permute")
def _permute(op: str, x: Tensor, experts: Tensor, scale: Tensor | None, num_experts: int, *_: Any) -> None:
    in_range(op, "experts", experts, -1, num_experts)


@_of("moe_balance_loss")
def _balance(op: str, scores: Tensor, experts: Tensor, seq_ids: Tensor, *_: Any) -> None:
    in_range(op, "seq_ids", seq_ids, -1, scores.shape[0])
    in_range(op, "experts", experts, -1, scores.shape[1])
