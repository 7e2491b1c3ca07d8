"""The CUDA kernels of decode. Arguments were checked by the op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _host
from .._arguments import target
from ._cache import LATENT, ROPE


def mla_decode_plan(
    lengths: Tensor, parts: int, start_cost: int, fixed: bool, work: Tensor, splits: Tensor, bounds: Tensor
) -> None:
    _host.mla_decode_plan(lengths, start_cost, fixed, work, splits, bounds, *target(lengths))


def mla_decode_cannot(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    work: Tensor | None,
    splits: Tensor | None,
    parts: Tensor | None,
    softmax_scale: float,
    *_: Any,
) -> str | None:
    if q.dtype is not torch.bfloat16:
        return f"q: {q.dtype}: the kernels take bfloat16"
    if q.shape[3] != LATENT + ROPE:
        return f"q: a width of {q.shape[3]}: the kernels take {LATENT + ROPE}"
    if kv_cache.data_ptr() % 16 or kv_cache.stride(0) * kv_cache.element_size() % 16:
        return "kv_cache: a page does not start at a multiple of 16 bytes"
    if not softmax_scale > 0:
        return f"softmax_scale: {softmax_scale}: the kernels take a positive one"
    return None


def mla_decode(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    work: Tensor | None,
    splits: Tensor | None,
    bounds: Tensor | None,
    softmax_scale: float,
    causal: bool,
    latent: int,
    out: Tensor,
    lse: Tensor,
    *,
    simple: bool = False,  # the reference kernel, for tests
) -> None:
    requests, queries, heads, _ = q.shape
    rows = queries * heads
    if requests == 0 or rows == 0:
        return
    if work is None or splits is None or bounds is None:
        from .mla_decode_plan import mla_decode_plan as make_plan

        work, splits, bounds = make_plan(
            cache_seqlens, num_queries=queries, num_heads=heads, kv_dtype=kv_cache.dtype, policy="balanced"
        )
    items = work.shape[0]
    # As many items as requests: each has one. Otherwise items of a request in several leave partial results here.
    workspace = q.new_empty(items * rows * (LATENT + 1), dtype=torch.float32) if items > requests else None
    _host.mla_decode(
        q,
        kv_cache,
        block_table,
        cache_seqlens,
        work,
        splits,
        bounds,
        softmax_scale,
        causal,
        out,
        lse,
        workspace,
        simple,
        *target(q),
    )
