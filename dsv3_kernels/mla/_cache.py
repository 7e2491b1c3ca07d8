"""The rows of a latent cache, and the checks that every op on one shares."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check

PAGE_SIZES = (16, 32, 64, 128)
LATENT, ROPE = 512, 64  # DeepSeek-V3's kv_lora_rank and qk_rope_head_dim; the only ones that the FP8 format knows
SCALES = LATENT // 128
FP8_BYTES = LATENT + 4 * SCALES + 2 * ROPE  # 512 E4M3 codes, 4 float32 scales, 64 bfloat16
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_cache(op: str, kv_cache: Tensor) -> None:
    """A cache is `[pages, page, width]` floats or `[pages, page, 656]` bytes; rows lie contiguously in each page."""
    check.dtype(op, "kv_cache", kv_cache, *FLOATS, torch.uint8)
    width = FP8_BYTES if kv_cache.dtype == torch.uint8 else "width"
    check.shape(op, "kv_cache", kv_cache, ("pages", "page", width))
    page = kv_cache.shape[1]
    check.value(op, "kv_cache", page in PAGE_SIZES, page, "a page of 16, 32, 64 or 128 rows")
    packed = kv_cache.stride(2) == 1 and kv_cache.stride(1) == kv_cache.shape[2]
    check.value(op, "kv_cache", packed, list(kv_cache.stride()), "strides of contiguous pages")


def check_latent(op: str, kv_cache: Tensor, latent: int) -> int:
    """`latent` must fit the cache's rows; returns the width of the rotary part."""
    check.integer(op, "latent", latent, 1)
    if kv_cache.dtype == torch.uint8:
        check.value(op, "latent", latent == LATENT, latent, f"{LATENT}, what the FP8 format holds")
        return ROPE
    width = kv_cache.shape[2]
    check.value(op, "latent", latent <= width, latent, f"at most {width}, the width of the cache's rows")
    return width - latent


def check_table(op: str, kv_cache: Tensor, block_table: Tensor, requests: int) -> None:
    check.dtype(op, "block_table", block_table, torch.int32)
    check.shape(op, "block_table", block_table, (requests, "P"))
    check.rows(op, "block_table", block_table)
