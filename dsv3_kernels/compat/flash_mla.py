"""FlashMLA's decode (github.com/deepseek-ai/FlashMLA) by its own names, on :func:`dsv3_kernels.mla_decode`.

Differences: dense attention only, over float *and* FP8 caches, with pages of 16 to 128 tokens, on any device; wrong
arguments are errors in words. Its conventions are kept: the log-sum-exp is `[batch, heads, queries]` in base e and +inf
for a query without keys; `softmax_scale` is the root of the key's width when not given (which is not DeepSeek-V3's);
`causal` is off when not given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..mla.mla_decode import mla_decode
from ..mla.mla_decode_plan import Plan, mla_decode_plan

__all__ = ["FlashMLASchedMeta", "flash_mla_with_kvcache", "get_mla_metadata"]

OP = "flash_mla_with_kvcache"
LATENT = 512


class FlashMLASchedMeta:
    """The plan of a step, made by the first call that is given this object and shared by the others.

    It belongs to shapes and to the *values* of `cache_seqlens`: take a new one when they change.
    """

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.config: dict[str, Any] = {}

    def of(self, cache_seqlens: Tensor, config: dict[str, Any]) -> Plan:
        if self.plan is None:
            self.config = config
            self.plan = mla_decode_plan(
                cache_seqlens,
                num_queries=config["queries"],
                num_heads=config["heads"],
                kv_dtype=config["dtype of the cache"],
            )
        for name, value in config.items():
            if value != self.config[name]:
                raise ValueError(
                    f"{OP}: tile_scheduler_metadata: its first call had {name} {self.config[name]}, this one {value}"
                )
        return self.plan


def get_mla_metadata(*_: Any, **__: Any) -> tuple[FlashMLASchedMeta, None]:
    """An empty plan, whatever the arguments (older versions took lengths and heads, newer ones nothing), and None."""
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta,
    num_splits: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a few queries per request on a paged latent cache; see :func:`dsv3_kernels.mla_decode`.

    Args:
        q: `[B, Sq, H, 576]`. k_cache: `[pages, page, 1, 576]`, or with `is_fp8_kvcache` `[pages, page, 1, 656]` of one
            byte each. block_table: `[B, P]` int32. cache_seqlens: `[B]` int32. head_dim_v: 512.
        tile_scheduler_metadata: of `get_mla_metadata`. num_splits: None.
        softmax_scale: by default 576^-0.5; DeepSeek-V3's is 0.1352338. causal: bottom right.
        The others are of sparse attention, and must be None.

    Returns:
        `out [B, Sq, H, 512]` and the log-sum-exp `[B, H, Sq]` float32, base e, +inf where there are no keys.

    Raises:
        NotImplementedError: sparse attention, or several key heads. TypeError, ValueError, RuntimeError: as
            `mla_decode`.
    """
    sparse = {
        "indices": indices,
        "attn_sink": attn_sink,
        "extra_k_cache": extra_k_cache,
        "extra_indices_in_kvcache": extra_indices_in_kvcache,
        "topk_length": topk_length,
        "extra_topk_length": extra_topk_length,
    }
    for name, value in sparse.items():
        if value is not None:
            raise NotImplementedError(f"{OP}: {name}: sparse attention is not there; wanted None")
    if block_table is None or cache_seqlens is None:
        raise TypeError(f"{OP}: block_table and cache_seqlens: got None, wanted tensors (dense attention)")
    if not isinstance(tile_scheduler_metadata, FlashMLASchedMeta):
        got = type(tile_scheduler_metadata).__name__
        raise TypeError(f"{OP}: tile_scheduler_metadata: got {got}, wanted what get_mla_metadata returns first")
    if num_splits is not None:
        raise TypeError(f"{OP}: num_splits: got {type(num_splits).__name__}, wanted None, as get_mla_metadata returns")
    if head_dim_v != LATENT:
        raise ValueError(f"{OP}: head_dim_v: got {head_dim_v}, wanted {LATENT}")
    if q.dim() != 4 or k_cache.dim() != 4:
        raise ValueError(
            f"{OP}: q and k_cache: got shapes {list(q.shape)} and {list(k_cache.shape)}, wanted four dimensions each"
        )
    if k_cache.shape[2] != 1:
        raise NotImplementedError(f"{OP}: k_cache: got {k_cache.shape[2]} key heads, wanted 1, which all queries share")
    if is_fp8_kvcache != (k_cache.element_size() == 1):
        raise TypeError(f"{OP}: is_fp8_kvcache: got {is_fp8_kvcache} with a cache of {k_cache.dtype}")
    cache = k_cache[:, :, 0].view(torch.uint8) if is_fp8_kvcache else k_cache[:, :, 0]
    config = {
        "requests": q.shape[0],
        "queries": q.shape[1],
        "heads": q.shape[2],
        "page": cache.shape[1],
        "dtype of the cache": cache.dtype,
        "causal": causal,
    }
    out, lse = mla_decode(
        q,
        cache,
        block_table,
        cache_seqlens,
        softmax_scale=q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale,
        causal=causal,
        plan=tile_scheduler_metadata.of(cache_seqlens, config),
    )
    return out, lse.masked_fill(lse == -torch.inf, torch.inf).transpose(1, 2)
