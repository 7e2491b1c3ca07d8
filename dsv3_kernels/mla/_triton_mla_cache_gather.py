"""mla_cache_gather in Triton: a program finds the requests of a few output rows and copies or decodes their tokens."""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from ._cache import LATENT, ROPE, SCALES
from ._triton_cache import cannot

ROWS = 8  # of a program: 36 values a lane with 4 warps, in bfloat16; unmeasured


@triton.jit
def sources(block_table, cu_seqlens, token, total, requests, steps, pages, page, table_stride):
    """(page of the cache, place in it, whether the cache has it) of output rows; the request by binary search."""
    low, high = tl.zeros_like(token), tl.zeros_like(token) + requests
    for _ in range(steps):  # of the requests' ends, those at or before the token
        middle = (low + high) // 2
        end = tl.load(cu_seqlens + middle + 1, mask=low < high, other=0)
        before = (low < high) & (end <= token)
        high = tl.where(before | (low >= high), high, middle)
        low = tl.where(before, middle + 1, low)
    owned = (token < total) & (low < requests) & (token >= tl.load(cu_seqlens))
    place = token - tl.load(cu_seqlens + low, mask=owned, other=0)
    at = low.to(tl.int64) * table_stride + place // page
    which = tl.load(block_table + at, mask=owned, other=-1).to(tl.int64)
    return which, place % page, (which >= 0) & (which < pages)


@triton.jit(do_not_specialize=["total", "requests", "steps", "pages", "table_stride"])
def triton_mla_cache_gather(
    kv_cache, block_table, cu_seqlens, latent, k_rope, total, requests, steps, pages, page, latents, ropes, page_stride,
    table_stride, WIDE: tl.constexpr, NARROW: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    which, place, owned = sources(block_table, cu_seqlens, token, total, requests, steps, pages, page, table_stride)
    row, token = (kv_cache + which * page_stride + place * (latents + ropes))[:, None], token.to(tl.int64)[:, None]
    column = tl.arange(0, WIDE)[None, :]
    value = tl.load(row + column, mask=owned[:, None] & (column < latents), other=0.0)
    tl.store(latent + token * latents + column, value, mask=(token < total) & (column < latents))
    column = tl.arange(0, NARROW)[None, :]
    value = tl.load(row + latents + column, mask=owned[:, None] & (column < ropes), other=0.0)
    tl.store(k_rope + token * ropes + column, value, mask=(token < total) & (column < ropes))


@triton.jit(do_not_specialize=["total", "requests", "steps", "pages", "table_stride"])
def triton_mla_cache_gather_fp8(
    kv_cache, block_table, cu_seqlens, latent, k_rope, total, requests, steps, pages, page, page_stride, table_stride,
    SCALES: tl.constexpr, ROPE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A row: SCALES * 128 codes, SCALES float32, ROPE bfloat16."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    which, place, owned = sources(block_table, cu_seqlens, token, total, requests, steps, pages, page, table_stride)
    row, token = kv_cache + which * page_stride + place * (SCALES * 132 + ROPE * 2), token.to(tl.int64)
    block, part = tl.arange(0, SCALES)[None, :], tl.arange(0, ROPE)[None, :]
    column = block[:, :, None] * 128 + tl.arange(0, 128)[None, None, :]
    codes = tl.load(row[:, None, None] + column, mask=owned[:, None, None], other=0).to(tl.float8e4nv, bitcast=True)
    scales = (row + SCALES * 128).to(tl.pointer_type(tl.float32))[:, None] + block
    scale = tl.load(scales, mask=owned[:, None], other=0.0)
    real = (codes.to(tl.float32) * scale[:, :, None]).to(tl.bfloat16)
    tl.store(latent + token[:, None, None] * (SCALES * 128) + column, real, mask=(token < total)[:, None, None])
    rotary = (row + SCALES * 132).to(tl.pointer_type(tl.bfloat16))[:, None] + part
    value = tl.load(rotary, mask=owned[:, None], other=0.0)
    tl.store(k_rope + token[:, None] * ROPE + part, value, mask=(token < total)[:, None])


def mla_cache_gather_cannot(kv_cache: Tensor, *_: object) -> str | None:
    return cannot(kv_cache)


def mla_cache_gather(
    kv_cache: Tensor, block_table: Tensor, cu_seqlens: Tensor, total: int, width: int, latent: Tensor, k_rope: Tensor
) -> None:
    requests = cu_seqlens.shape[0] - 1
    tensors = kv_cache, block_table, cu_seqlens, latent, k_rope
    grid, sizes = (_triton.cdiv(total, ROWS),), (total, requests, requests.bit_length(), *kv_cache.shape[:2])
    strides = kv_cache.stride(0), block_table.stride(0)
    if kv_cache.dtype is torch.uint8:
        constants = SCALES, ROPE, ROWS
        _triton.launch(triton_mla_cache_gather_fp8, grid, *tensors, *sizes, *strides, *constants, num_warps=4)
        return
    ropes = k_rope.shape[1]
    wide, narrow = (max(32, _triton.next_power_of_2(n)) for n in (width, ropes))
    constants = wide, narrow, max(1, ROWS * LATENT // max(wide, LATENT))
    grid = (_triton.cdiv(total, constants[2]),)
    _triton.launch(triton_mla_cache_gather, grid, *tensors, *sizes, width, ropes, *strides, *constants, num_warps=4)
