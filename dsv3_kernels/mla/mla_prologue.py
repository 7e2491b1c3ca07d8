"""mla_prologue: what stands between the down-projections of an attention layer and its attention, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._library import define
from ..quant.quantize_1x128 import empty_scale
from ._cache import LATENT, ROPE, check_cache

OP = "mla_prologue"
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def mla_prologue(
    x: Tensor,
    q_weight: Tensor,
    kv_weight: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    slots: Tensor,
    *,
    eps: float,
    pow2_scale: bool = False,
    cache_pow2_scale: bool = False,
    keys: bool = False,
) -> tuple[Tensor, ...]:
    """Norm and quantise the queries' latent; norm the keys' latent, rotate the rotary key, append both to the cache.

    To the bit `rms_norm_quantize_1x128` of the first part of each row of x, and `mla_cache_append` of `rms_norm` of the
    second and `rope` of the third. DeepSeek-V3 report (arXiv 2412.19437), section 2.1.1, equations 1 to 4 and 6; norms
    as released.

    Args:
        x: `[T, Q + 576]` bfloat16, float16 or float32, the last dimension contiguous: what the down-projections of
            queries (Q: 1536 in DeepSeek-V3) and of keys and values (512) and the rotary key's projection (64) give,
            side by side.
        q_weight: `[Q]`, kv_weight: `[512]`: of the norms, bfloat16, float16 or float32. A float cache may have another
            width than 512.
        positions: `[T]` int32 or int64, rows of `cos_sin [P, 64]` float32 (`yarn_cos_sin`); neighbours are pairs.
        kv_cache: as of `mla_cache_append`, x's dtype or uint8; written in place. slots: `[T]` int64; -1 skips a token.
        eps: added to the mean squares. pow2_scale, cache_pow2_scale: round the scales of the queries, and of a uint8
            cache, up to powers of two.
        keys: return the latent and the rotary key as well, which attention in the expanded form wants.

    Returns:
        `q [T, Q]` float8_e4m3fn; `scale [T, ceil(Q / 128)]` float32 with strides `(1, round_up(T, 4))`; with `keys`
        also `latent [T, 512]` and `k_rope [T, 64]` in x's dtype. Not differentiable.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape or stride; on the CPU also a slot outside the cache or a
        position outside the table. RuntimeError: devices differ.
    """
    check.dtype(OP, "x", x, *FLOATS)
    check.dtype(OP, "q_weight", q_weight, *FLOATS)
    check.dtype(OP, "kv_weight", kv_weight, *FLOATS)
    check.shape(OP, "q_weight", q_weight, ("Q",))
    check.shape(OP, "kv_weight", kv_weight, ("latent",))
    check_cache(OP, kv_cache)
    fp8 = kv_cache.dtype == torch.uint8
    if not fp8:
        check.dtype(OP, "kv_cache", kv_cache, x.dtype, torch.uint8)
    latent = kv_weight.shape[0]
    check.value(OP, "kv_weight", not fp8 or latent == LATENT, latent, f"{LATENT}, what the FP8 format holds")
    rope = ROPE if fp8 else kv_cache.shape[2] - latent
    check.value(OP, "kv_cache", rope >= 0 and rope % 2 == 0, rope, "an even rotary width beside the latent")
    check.shape(OP, "x", x, ("T", q_weight.shape[0] + latent + rope))
    check.rows(OP, "x", x)
    check.contiguous(OP, "q_weight", q_weight)
    check.contiguous(OP, "kv_weight", kv_weight)
    check.dtype(OP, "positions", positions, torch.int32, torch.int64)
    check.shape(OP, "positions", positions, (x.shape[0],))
    check.dtype(OP, "cos_sin", cos_sin, torch.float32)
    check.shape(OP, "cos_sin", cos_sin, ("P", rope))
    check.rows(OP, "cos_sin", cos_sin)
    check.dtype(OP, "slots", slots, torch.int64)
    check.shape(OP, "slots", slots, (x.shape[0],))
    check.number(OP, "eps", eps)
    tensors = {"q_weight": q_weight, "kv_weight": kv_weight, "positions": positions, "cos_sin": cos_sin, "slots": slots}
    check.device(OP, x=x, kv_cache=kv_cache, **tensors)
    check.overlap(OP, "kv_cache", kv_cache, x=x, **tensors)
    made = _op(x, q_weight, kv_weight, positions, cos_sin, kv_cache, slots, eps, pow2_scale, cache_pow2_scale, keys)
    return made if keys else made[:2]


def _allocate(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (tokens, _), rank = x.shape, q_weight.shape[0]
    q = x.new_empty((tokens, rank), dtype=torch.float8_e4m3fn)
    shapes = [(tokens, kv_weight.shape[0]), (tokens, cos_sin.shape[1])] if keys else [(0,), (0,)]
    return q, empty_scale(q, rank, "mn"), x.new_empty(shapes[0]), x.new_empty(shapes[1])


_op = define(
    "mla_prologue(Tensor x, Tensor q_weight, Tensor kv_weight, Tensor positions, Tensor cos_sin, "
    "Tensor(a!) kv_cache, Tensor slots, float eps, bool pow2_scale, bool cache_pow2_scale, bool keys) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    allocate=_allocate,
)
