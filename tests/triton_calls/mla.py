from __future__ import annotations

from collections.abc import Callable

import torch

import dsv3_kernels as dk
from dsv3_kernels.mla.mla_decode_plan import Plan

from . import Call, bf16, f32, i32

WGMMA = r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.bf16\.bf16"
MMA = r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16"


def decode(heads: int, fp8: bool, plan: bool) -> Callable[[], object]:
    """128 requests of up to 4096 tokens."""

    def run() -> object:
        cache = torch.empty(8192, 64, 656, dtype=torch.uint8) if fp8 else bf16(8192, 64, 576)
        given = Plan(i32(259, 4), i32(129), i32(133)) if plan else None
        return dk.mla_decode(bf16(128, 1, heads, 576), cache, i32(128, 64), i32(128), softmax_scale=1.0, plan=given)

    return run


def prefill(backward: bool, nope: int = 128, rope: int = 64, value: int = 128) -> object:
    """Two sequences of 4096 tokens; keys and values as the up-projection leaves them."""
    tokens, heads = 8192, 128
    kv, bounds = bf16(tokens, heads, nope + value), i32(3)
    inputs = bf16(tokens, heads, nope + rope), kv[..., :nope], bf16(tokens, rope), kv[..., nope:]
    forward = dk.mla_prefill  # its module registers the backward op
    if not backward:
        return forward(*inputs, bounds, bounds, softmax_scale=1.0)
    given = bf16(tokens, heads, value), *inputs, bf16(tokens, heads, value), f32(tokens, heads)
    return torch.ops.dsv3_kernels.mla_prefill_backward(*given, bounds, bounds, 1.0, True)


def rotate(interleaved: bool) -> object:
    return dk.rope(bf16(4096, 128, 64), i32(4096), f32(4096, 64), interleaved=interleaved)


def cache_of(fp8: bool) -> torch.Tensor:
    return torch.empty(8192, 64, 656, dtype=torch.uint8) if fp8 else bf16(8192, 64, 576)


def append(fp8: bool) -> object:
    slots = torch.zeros(4096, dtype=torch.int64)
    return dk.mla_cache_append(cache_of(fp8), slots, bf16(4096, 512), bf16(4096, 64))


def merge() -> object:
    return dk.merge_attention(bf16(4096, 128, 128), f32(4096, 128), bf16(4096, 128, 128), f32(4096, 128))


def absorb(tokens: int, latent: bool, dtype: torch.dtype = torch.bfloat16) -> object:
    """Into the latent space, straight into decode's queries, or out of it; kv_b as it lies."""
    kv_b = torch.empty(128, 256, 512, dtype=dtype)
    if latent:
        q = torch.empty(tokens, 128, 576, dtype=dtype)
        return dk.mla_absorb(torch.empty(tokens, 128, 192, dtype=dtype)[..., :128], kv_b[:, :128].mT, out=q[..., :512])
    return dk.mla_absorb(torch.empty(tokens, 128, 512, dtype=dtype), kv_b[:, 128:])


def prologue(fp8: bool) -> object:
    tokens, slots = 4096, torch.zeros(4096, dtype=torch.int64)
    weights = bf16(1536), bf16(512)
    return dk.mla_prologue(bf16(tokens, 2112), *weights, i32(tokens), f32(4096, 64), cache_of(fp8), slots, eps=1e-6)


def decode_of(latent: int, dtype: torch.dtype) -> object:
    """A few heads, a latent of another width."""
    q, cache = torch.empty(128, 1, 16, latent + 64, dtype=dtype), torch.empty(8192, 64, latent + 64, dtype=dtype)
    return dk.mla_decode(q, cache, i32(128, 64), i32(128), softmax_scale=1.0, latent=latent)


VECTORS = (r"ld\.global\.v4",)
HEADS = ((128, 64, 128), (64, 32, 64))  # own key, rotary key, value
KERNELS = ("triton_mla_decode", "triton_mla_decode_join")
CALLS = {
    "rope": [
        Call(lambda interleaved=interleaved: rotate(interleaved), ("triton_rope",), VECTORS)
        for interleaved in (True, False)
    ],
    "mla_cache_append": [
        Call(lambda: append(False), ("triton_mla_cache_append",), VECTORS),
        Call(lambda: append(True), ("triton_mla_cache_append_fp8",), (r"cvt\.rn\.satfinite\.e4m3x2\.f32",), 89),
    ],
    "mla_prologue": [
        Call(
            lambda fp8=fp8: prologue(fp8), ("triton_mla_prologue",), (*VECTORS, r"cvt\.rn\.satfinite\.e4m3x2\.f32"), 89
        )
        for fp8 in (False, True)
    ],
    "mla_cache_gather": [
        Call(
            lambda fp8=fp8: dk.mla_cache_gather(cache_of(fp8), i32(64, 64), i32(65), 8192),
            (f"triton_mla_cache_gather{end}",),
            VECTORS,
            least,
        )
        for fp8, end, least in ((False, "", 80), (True, "_fp8", 89))
    ],
    "merge_attention": [Call(merge, ("triton_merge_attention",), VECTORS)],
    "mla_absorb": [
        *(
            Call(lambda t=tokens, latent=latent: absorb(t, latent), ("triton_mla_absorb",), (instruction,))
            for tokens, instruction in ((8, MMA), (32, MMA), (64, WGMMA), (4096, WGMMA))
            for latent in (True, False)
        ),
        *(
            Call(lambda t=tokens: absorb(t, True, torch.float32), ("triton_mla_absorb",), (r"mma.*tf32",))
            for tokens in (8, 4096)
        ),
    ],
    "mla_decode": [
        Call(decode(128, False, True), KERNELS, (WGMMA,)),
        Call(decode(16, False, False), KERNELS, (MMA,)),
        Call(decode(128, True, True), KERNELS, (WGMMA,), 89),
        Call(decode(16, True, False), KERNELS, (MMA,), 89),
        Call(lambda: decode_of(512, torch.float32), KERNELS, (r"mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.tf32",)),
        Call(lambda: decode_of(256, torch.bfloat16), KERNELS, (MMA,)),
    ],
    "mla_prefill": [
        Call(lambda widths=widths: prefill(False, *widths), ("triton_mla_prefill",), (WGMMA,)) for widths in HEADS
    ],
    "mla_prefill_backward": [
        Call(
            lambda widths=widths: prefill(True, *widths),
            tuple(f"triton_mla_prefill_backward_{part}" for part in ("row_sums", "queries", "keys", "join")),
            (WGMMA,),
        )
        for widths in HEADS
    ],
    "mla_decode_plan": [
        Call(lambda: dk.mla_decode_plan(i32(128), num_queries=1, num_heads=128), ("triton_mla_decode_plan",)),
        Call(
            lambda: dk.mla_decode_plan(i32(128), num_queries=1, num_heads=128, policy="fixed"),
            ("triton_mla_decode_plan",),
        ),
    ],
}
