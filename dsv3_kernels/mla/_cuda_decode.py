"""The CUDA kernels of decode. Arguments were checked by the op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _host
from .._arguments import target
from . import mla_decode_plan as _planning
from ._cache import LATENT, ROPE

_WIDTH = LATENT + ROPE


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
    if q.shape[3] != _WIDTH:
        return f"q: a width of {q.shape[3]}: the kernels take {_WIDTH}"
    if kv_cache.data_ptr() % 16 or kv_cache.stride(0) * kv_cache.element_size() % 16:
        return "kv_cache: a page does not start at a multiple of 16 bytes"
    if not softmax_scale > 0:
        return f"softmax_scale: {softmax_scale}: the kernels take a positive one"
    return None


def _cluster(q: Tensor, kv_cache: Tensor, block_table: Tensor) -> int:
    longest = block_table.shape[1] * kv_cache.shape[1] if kv_cache.shape[0] else 0
    return _planning.cluster_size(q.shape[0], q.shape[1] * q.shape[2], longest, _planning.multiprocessors(q))


def mla_decode_choice(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    work: Tensor | None = None,
    splits: Tensor | None = None,
    parts: Tensor | None = None,
    *_: Any,
) -> dict[str, Any]:
    """What a call launches, for `dk.explain`; nothing where that is nothing, or the kernels do not take it."""
    requests, queries, heads, width = q.shape
    if requests == 0 or queries * heads == 0 or q.dtype is not torch.bfloat16 or width != _WIDTH:
        return {}
    fp8, row_blocks = kv_cache.dtype is torch.uint8, -(-queries * heads // _planning.ROW_BLOCK)
    cluster = _cluster(q, kv_cache, block_table) if work is None else 0
    kind = "fp8" if fp8 else "bf16"
    if cluster:
        kernel = f"mla_decode_{kind}_cluster"
        words = f"{requests * row_blocks} clusters of {cluster}, one launch without a plan (unmeasured model)"
        return {"kernel": kernel, "kernels": (kernel,), "cluster": cluster, "words": words}
    kernel = f"mla_decode_{kind}{'_pair' if not fp8 and row_blocks % 2 == 0 else ''}"
    if work is None:
        parts_made = _planning.parts(_planning.multiprocessors(q), queries * heads)
        first: tuple[str, ...] = ("mla_decode_plan",)
        several = parts_made > 1
    else:
        first, several = (), work.shape[0] > requests
    kernels = (*first, kernel, *(("mla_decode_combine",) if several else ()))
    words = f"by {'a plan that the call makes' if first else 'the given plan'}, {row_blocks} blocks of 64 rows"
    return {"kernel": kernel, "kernels": kernels, "cluster": 0, "words": words}


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
        cluster = 0 if simple else _cluster(q, kv_cache, block_table)
        if cluster:
            _host.mla_decode_cluster(
                q, kv_cache, block_table, cache_seqlens, softmax_scale, causal, out, lse, cluster, *target(q)
            )
            return
        work, splits, bounds = _planning.mla_decode_plan(
            cache_seqlens, num_queries=queries, num_heads=heads, kv_dtype=kv_cache.dtype, policy="balanced"
        )
    items = work.shape[0]
    # As many items as requests: each has one. Otherwise items of a request in several leave partial results here, in
    # float32 as lse (naming a dtype costs half a microsecond).
    workspace = lse.new_empty(items * rows * (LATENT + 1)) if items > requests else None
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
