"""mla_prologue in Triton: of a token's two programs one norms and quantises the query's latent, the other norms the
key's, turns the rotary key and writes both to the cache. The pieces are those of the four ops, and so are the bits."""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from ..quant._triton_rms_norm import load_sum, norm, row_roots
from ..quant._triton_rms_norm_quantize_1x128 import store_codes
from ._triton_cache import cannot


@triton.jit(do_not_specialize=["eps", "table_rows", "pages"])
def triton_mla_prologue(
    x, q_weight, kv_weight, positions, cos_sin, kv_cache, slots, q, scale, latent, k_rope, x_stride, rank, latents,
    ropes, table_stride, table_rows, page_stride, page, pages, scale_row, scale_block, eps, pow2, cache_pow2,
    KEYS: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """CHUNK of the query's columns and WIDE of the key's at a time. Everything has one row, as the pieces want it."""
    row = (tl.program_id(0) // 2).to(tl.int64) + tl.arange(0, 1)
    rows, there = row + 1, (row >= 0)[:, None]
    if tl.program_id(0) % 2 == 0:
        rms = row_roots(x, None, row, rows, rank, x_stride, 0, eps, CHUNK)
        for start in range(0, rank, CHUNK):
            column = start + tl.arange(0, CHUNK)
            value, _ = load_sum(x, None, row, column, rows, rank, x_stride, 0)
            real = norm(value, q_weight, column, rank, rms)
            store_codes(
                q + (row * rank)[:, None], scale + (row * scale_row)[:, None], real, there, start, rank, scale_block,
                pow2,
            )  # fmt: skip
        return

    x += rank
    rms = row_roots(x, None, row, rows, latents, x_stride, 0, eps, WIDE)
    FP8: tl.constexpr = kv_cache.dtype.element_ty == tl.uint8
    slot = tl.load(slots + row)
    kept = ((slot >= 0) & (slot < pages.to(tl.int64) * page))[:, None]
    # A row of an FP8 cache: the latent's codes, a float32 for every 128 of them, the rotary key in bfloat16.
    width = latents + latents // 32 + ropes * 2 if FP8 else latents + ropes
    to = (kv_cache + slot // page * page_stride + slot % page * width)[:, None]
    pair, position = tl.arange(0, PAIRS), tl.load(positions + row).to(tl.int64)[:, None]
    half = (pair < ropes // 2)[None, :]
    known = half & (position >= 0) & (position < table_rows)  # the others' rows become NaN
    angle = cos_sin + position * table_stride + pair[None, :]
    cos = tl.load(angle, mask=known, other=float("nan"))
    sin = tl.load(angle + ropes // 2, mask=known, other=float("nan"))
    part = tl.arange(0, 2 * PAIRS)[None, :]
    both = tl.load(x + latents + (row * x_stride)[:, None] + part, mask=part < ropes, other=0.0).to(tl.float32)
    a, b = tl.split(both.reshape(1, PAIRS, 2))
    turned = tl.join(a * cos - b * sin, a * sin + b * cos).reshape(1, 2 * PAIRS).to(x.dtype.element_ty)
    if KEYS:
        tl.store(k_rope + (row * ropes)[:, None] + part, turned, mask=part < ropes)
    rotary = (to + latents + latents // 32).to(tl.pointer_type(tl.bfloat16)) if FP8 else to + latents
    tl.store(rotary + part, turned.to(rotary.dtype.element_ty), mask=kept & (part < ropes))

    for start in range(0, latents, WIDE):
        column = start + tl.arange(0, WIDE)
        value, inside = load_sum(x, None, row, column, rows, latents, x_stride, 0)
        real = norm(value, kv_weight, column, latents, rms)
        if KEYS:
            tl.store(latent + (row * latents)[:, None] + column[None, :], real, mask=inside)
        if FP8:
            codes, scales = to.to(tl.pointer_type(tl.float8e4nv)), (to + latents).to(tl.pointer_type(tl.float32))
            store_codes(codes, scales, real, kept, start, latents, 1, cache_pow2)
        else:
            tl.store(to + column[None, :], real, mask=inside & kept)


def mla_prologue_cannot(
    x: Tensor, q_weight: Tensor, kv_weight: Tensor, positions: Tensor, cos_sin: Tensor, kv_cache: Tensor, *_: Any
) -> str | None:
    return cannot(kv_cache)


def mla_prologue(
    x: Tensor,
    q_weight: Tensor,
    kv_weight: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    slots: Tensor,
    eps: float,
    pow2_scale: bool,
    cache_pow2_scale: bool,
    keys: bool,
    q: Tensor,
    scale: Tensor,
    latent: Tensor,
    k_rope: Tensor,
) -> None:
    (pages, page, _), rank, latents, ropes = kv_cache.shape, q.shape[1], kv_weight.shape[0], cos_sin.shape[1]
    chunk, wide = (min(2048, max(128, _triton.next_power_of_2(n))) for n in (rank, latents))
    tensors = x, q_weight, kv_weight, positions.contiguous(), cos_sin, kv_cache, slots.contiguous()
    sizes = x.stride(0), rank, latents, ropes, cos_sin.stride(0), cos_sin.shape[0], kv_cache.stride(0), page, pages
    _triton.launch(
        triton_mla_prologue, (2 * x.shape[0],), *tensors, q, scale, latent, k_rope, *sizes, *scale.stride(), eps,
        pow2_scale, cache_pow2_scale, keys, chunk, wide, max(16, _triton.next_power_of_2(ropes // 2)),
        num_warps=max(1, max(chunk, wide) // 256), enable_fp_fusion=False,
    )  # fmt: skip
