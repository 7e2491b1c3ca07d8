"""mla_cache_append in Triton: a program writes one token's row, copied or quantised."""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from ..quant._triton_encode import encode, magnitude, scale_of
from ._cache import LATENT, ROPE, SCALES
from ._triton_cache import cannot


@triton.jit(do_not_specialize=["pages"])
def triton_mla_cache_append(
    kv_cache, slots, latent, k_rope, pages, page, latents, ropes, page_stride, latent_stride, rope_stride,
    WIDE: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if (slot >= 0) & (slot < pages.to(tl.int64) * page):
        row = kv_cache + slot // page * page_stride + slot % page * (latents + ropes)
        column = tl.arange(0, WIDE)
        value = tl.load(latent + token * latent_stride + column, mask=column < latents, other=0.0)
        tl.store(row + column, value, mask=column < latents)
        column = tl.arange(0, NARROW)
        value = tl.load(k_rope + token * rope_stride + column, mask=column < ropes, other=0.0)
        tl.store(row + latents + column, value, mask=column < ropes)


@triton.jit(do_not_specialize=["pages"])
def triton_mla_cache_append_fp8(
    kv_cache, slots, latent, k_rope, pages, page, page_stride, latent_stride, rope_stride, pow2,
    SCALES: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """A row: SCALES * 128 codes, SCALES float32, ROPE bfloat16."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if (slot >= 0) & (slot < pages.to(tl.int64) * page):
        row = kv_cache + slot // page * page_stride + slot % page * (SCALES * 132 + ROPE * 2)
        block, part = tl.arange(0, SCALES), tl.arange(0, ROPE)
        place = block[:, None] * 128 + tl.arange(0, 128)[None, :]
        real = tl.load(latent + token * latent_stride + place).to(tl.float32)
        scale = scale_of(tl.max(magnitude(real), 1), pow2)
        tl.store(row + place, encode(real, scale[:, None]).to(tl.uint8, bitcast=True))
        tl.store((row + SCALES * 128).to(tl.pointer_type(tl.float32)) + block, scale)
        rotary = tl.load(k_rope + token * rope_stride + part).to(tl.bfloat16)
        tl.store((row + SCALES * 132).to(tl.pointer_type(tl.bfloat16)) + part, rotary)


def mla_cache_append_cannot(kv_cache: Tensor, *_: object) -> str | None:
    return cannot(kv_cache)


def mla_cache_append(kv_cache: Tensor, slots: Tensor, latent: Tensor, k_rope: Tensor, pow2_scale: bool) -> None:
    grid, tensors = (slots.shape[0],), (kv_cache, slots.contiguous(), latent, k_rope)
    sizes, strides = kv_cache.shape[:2], (kv_cache.stride(0), latent.stride(0), k_rope.stride(0))
    if kv_cache.dtype is torch.uint8:
        _triton.launch(
            triton_mla_cache_append_fp8, grid, *tensors, *sizes, *strides, pow2_scale, SCALES, ROPE, num_warps=1
        )
        return
    latents, ropes = latent.shape[1], k_rope.shape[1]
    wide, narrow = (max(32, _triton.next_power_of_2(n)) for n in (latents, ropes))
    warps = min(16, max(1, wide // LATENT))
    _triton.launch(
        triton_mla_cache_append, grid, *tensors, *sizes, latents, ropes, *strides, wide, narrow, num_warps=warps
    )
