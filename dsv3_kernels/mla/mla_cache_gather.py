"""mla_cache_gather: cached tokens, packed."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._library import define
from ._cache import LATENT, check_cache, check_latent, check_table

OP = "mla_cache_gather"


def mla_cache_gather(
    kv_cache: Tensor, block_table: Tensor, cu_seqlens: Tensor, total: int, *, latent: int = LATENT
) -> tuple[Tensor, Tensor]:
    """Copy the first tokens of every request out of the cache, for attention in the expanded form.

    Request b gives its first cu_seqlens[b + 1] - cu_seqlens[b] tokens, to the rows from cu_seqlens[b] on.

    Args:
        kv_cache: as `mla_cache_append` fills it. block_table: `[B, P]` int32, pages of each request in order; entries
            past the tokens asked for are not used. cu_seqlens: `[B + 1]` int32, non-decreasing, from 0 on.
        total: rows to return, cu_seqlens[B] or more; the rows from cu_seqlens[B] on are zero.
        latent: width of the latent, 512; other widths with float caches only.

    Returns:
        `latent [total, 512]`, `k_rope [total, 64]`, in the cache's dtype; bfloat16 from a uint8 cache.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape or stride; on the CPU also bounds or pages out of range.
        RuntimeError: devices differ.
    """
    check_cache(OP, kv_cache)
    check.dtype(OP, "cu_seqlens", cu_seqlens, torch.int32)
    check.shape(OP, "cu_seqlens", cu_seqlens, ("B + 1",))
    check.contiguous(OP, "cu_seqlens", cu_seqlens)
    check.value(OP, "cu_seqlens", cu_seqlens.shape[0] > 0, [0], "shape [B + 1]")
    check_table(OP, kv_cache, block_table, cu_seqlens.shape[0] - 1)
    check.integer(OP, "total", total, 0)
    check_latent(OP, kv_cache, latent)
    check.device(OP, kv_cache=kv_cache, block_table=block_table, cu_seqlens=cu_seqlens)
    return _op(kv_cache, block_table, cu_seqlens, total, latent)


def _allocate(
    kv_cache: Tensor, block_table: Tensor, cu_seqlens: Tensor, total: int, latent: int
) -> tuple[Tensor, Tensor]:
    rope, dtype = check_latent(OP, kv_cache, latent), kv_cache.dtype
    dtype = torch.bfloat16 if dtype == torch.uint8 else dtype
    return kv_cache.new_empty(total, latent, dtype=dtype), kv_cache.new_empty(total, rope, dtype=dtype)


_op = define(
    "mla_cache_gather(Tensor kv_cache, Tensor block_table, Tensor cu_seqlens, SymInt total, int latent) "
    "-> (Tensor, Tensor)",
    allocate=_allocate,
)
