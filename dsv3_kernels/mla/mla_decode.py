"""mla_decode: attention of a few queries per request on the paged latent cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._library import define
from ._cache import FLOATS, LATENT, check_cache, check_latent, check_table
from .mla_decode_plan import Plan

OP = "mla_decode"


def mla_decode(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    plan: Plan | None = None,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
    latent: int = LATENT,
) -> tuple[Tensor, Tensor]:
    """Softmax attention in the absorbed form: all heads share one key of 576 per token, whose first 512 are the value.

    With `causal`, query i of Sq sees the keys before cache_seqlens - (Sq - 1 - i): the new tokens are in the cache
    already, and the last query sees them all. DeepSeek-V3 report (arXiv 2412.19437), section 2.1.1; absorption:
    DeepSeek-V2 (arXiv 2405.04434), section 2.1.2.

    Args:
        q: `[B, Sq, H, 576]` bfloat16, float16, float32 or float64: the 512 of the latent (q_nope W_UK), then the rotary
            64. Any number of heads; may be strided, the last dimension contiguous.
        kv_cache: `[pages, page, 576]` of q's dtype, or `[pages, page, 656]` uint8 (see `mla_cache_append`); page 16,
            32, 64 or 128. Slots past a request's length are not read and may hold NaN.
        block_table: `[B, P]` int32, pages of each request in order; entries past its length are not used.
        cache_seqlens: `[B]` int32, tokens in the cache, the new ones included.
        softmax_scale: factor on the scores. DeepSeek-V3: 192^-0.5 (0.1 ln 40 + 1)^2 = 0.1352338, not 576^-0.5.
        plan: of `mla_decode_plan`, for the kernels; the eager backend needs none. Without one a CUDA kernel shares out
            each of a few requests over a cluster, in one launch, where the table has room for few keys; a call makes a
            balanced plan of its own otherwise. How a request is cut then depends on the number of requests and on the
            table's width.
        out: where to write: the output, or `(output, lse)`.
        latent: width of the latent, 512; others with float caches only, in the eager and Triton backends.

    Returns:
        `out [B, Sq, H, 512]` in q's dtype; `lse [B, Sq, H]`, log-sum-exp in base e of the scaled scores, float32
        (float64 for float64 queries). A query without keys has out 0 and lse -inf.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape or stride; on the CPU also lengths or pages out of range.
        RuntimeError: devices differ.
    """
    check.dtype(OP, "q", q, *FLOATS)
    check.shape(OP, "q", q, ("B", "Sq", "H", "width"))
    check.rows(OP, "q", q)
    check_cache(OP, kv_cache)
    if kv_cache.dtype != torch.uint8:
        check.dtype(OP, "kv_cache", kv_cache, q.dtype, torch.uint8)
    check.value(OP, "q", q.shape[3] == latent + check_latent(OP, kv_cache, latent), q.shape[3], "the width of a key")
    requests = q.shape[0]
    check_table(OP, kv_cache, block_table, requests)
    check.dtype(OP, "cache_seqlens", cache_seqlens, torch.int32)
    check.shape(OP, "cache_seqlens", cache_seqlens, (requests,))
    check.contiguous(OP, "cache_seqlens", cache_seqlens)
    check.number(OP, "softmax_scale", softmax_scale)
    work, splits, parts = _plan(plan, requests)
    check.device(OP, q=q, kv_cache=kv_cache, block_table=block_table, cache_seqlens=cache_seqlens, plan=work)
    args = (q, kv_cache, block_table, cache_seqlens, work, splits, parts, float(softmax_scale), causal, latent)
    if out is None:
        return _op(*args)
    values, lse = out if isinstance(out, (tuple, list)) else (out, _empty_lse(q))
    check.dtype(OP, "out", values, q.dtype)
    check.shape(OP, "out", values, (*q.shape[:3], latent))
    check.rows(OP, "out", values)
    check.dtype(OP, "out[1]", lse, torch.float64 if q.dtype == torch.float64 else torch.float32)
    check.shape(OP, "out[1]", lse, q.shape[:3])
    check.contiguous(OP, "out[1]", lse)
    check.device(OP, q=q, out=values, lse=lse)
    check.overlap(OP, "out", values, q=q, kv_cache=kv_cache)
    check.overlap(OP, "out[1]", lse, q=q, kv_cache=kv_cache, out=values)
    _op.out(*args, values, lse)
    return values, lse


def _plan(plan: Plan | None, requests: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if plan is None:
        return None, None, None
    if not isinstance(plan, Plan):
        raise TypeError(f"{OP}: plan: got {type(plan).__name__}, wanted the Plan of mla_decode_plan")
    check.shape(OP, "plan.splits", plan.splits, (requests + 1,))
    return plan


def _empty_lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def _allocate(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    work: Tensor | None,
    splits: Tensor | None,
    parts: Tensor | None,
    softmax_scale: float,
    causal: bool,
    latent: int,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], latent), _empty_lse(q)


_ARGUMENTS = (
    "Tensor q, Tensor kv_cache, Tensor block_table, Tensor cache_seqlens, Tensor? work, Tensor? splits, Tensor? parts, "
    "float softmax_scale, bool causal, int latent"
)
_op = define(
    f"mla_decode({_ARGUMENTS}) -> (Tensor, Tensor)",
    allocate=_allocate,
    out=f"mla_decode_out({_ARGUMENTS}, Tensor(a!) out, Tensor(b!) lse) -> ()",
)
