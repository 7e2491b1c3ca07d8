"""mla_cache_append: new tokens into the latent cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._library import define
from ._cache import FLOATS, LATENT, ROPE, check_cache

OP = "mla_cache_append"


def mla_cache_append(
    kv_cache: Tensor, slots: Tensor, latent: Tensor, k_rope: Tensor, *, pow2_scale: bool = False
) -> None:
    """Write each token's latent and rotary key to its slot of the cache, in place.

    A float cache takes `[latent | k_rope]`. A uint8 cache takes 656 bytes per token: 512 E4M3 codes, 4 float32 scales
    of 128 codes each (real = code * scale; the rule of `quantize_1x128`), and 64 bfloat16 of the rotary key.

    Args:
        kv_cache: `[pages, page, latent + rope]` bfloat16, float16, float32 or float64, or `[pages, page, 656]` uint8;
            page 16, 32, 64 or 128, rows contiguous within a page.
        slots: `[T]` int64: page * page_size + place in the page, all different; -1 skips the token.
        latent: `[T, 512]`, after its norm, k_rope: `[T, 64]`, after `rope`; the last dimension contiguous. The cache's
            dtype; bfloat16, float16 or float32 for a uint8 cache. Float caches take any widths that sum to theirs.
        pow2_scale: round the scales of a uint8 cache up to powers of two.

    Returns:
        None.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape or stride; on the CPU also a slot outside the cache.
        RuntimeError: devices differ.
    """
    check_cache(OP, kv_cache)
    check.dtype(OP, "slots", slots, torch.int64)
    check.shape(OP, "slots", slots, ("T",))
    fp8 = kv_cache.dtype == torch.uint8
    check.dtype(OP, "latent", latent, *(FLOATS[:3] if fp8 else (kv_cache.dtype,)))
    check.dtype(OP, "k_rope", k_rope, latent.dtype)
    tokens = slots.shape[0]
    check.shape(OP, "latent", latent, (tokens, LATENT if fp8 else "latent"))
    check.shape(OP, "k_rope", k_rope, (tokens, ROPE if fp8 else kv_cache.shape[2] - latent.shape[1]))
    check.rows(OP, "latent", latent)
    check.rows(OP, "k_rope", k_rope)
    check.device(OP, kv_cache=kv_cache, slots=slots, latent=latent, k_rope=k_rope)
    check.overlap(OP, "kv_cache", kv_cache, latent=latent, k_rope=k_rope)
    _op(kv_cache, slots, latent, k_rope, pow2_scale)


_op = define(
    "mla_cache_append(Tensor(a!) kv_cache, Tensor slots, Tensor latent, Tensor k_rope, bool pow2_scale) -> ()",
    allocate=None,
)
