"""Benchmarks of the mla family outside decoding: cache ops, rope, merge, prefill. `bench_mla.py` lists them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dsv3_kernels as dk

from .bench_quant import against_eager, normal
from .cases import Case

PAGE = 64
BYTES = {"bf16": 1152, "fp8": 656}  # of a token in the cache


def cache(device: torch.device, tokens: int, kind: str) -> Tensor:
    pages = -(-tokens // PAGE)
    if kind == "fp8":
        return torch.zeros(pages, PAGE, 656, dtype=torch.uint8, device=device)
    return torch.zeros(pages, PAGE, 576, dtype=torch.bfloat16, device=device)


def mla_cache_append(tokens: int, kind: str, *, quick: bool = False) -> Case:
    def make(device: torch.device) -> tuple[Any, ...]:
        slots = torch.randperm(tokens, generator=torch.Generator().manual_seed(0)).to(device)
        return cache(device, tokens, kind), slots, normal(device, tokens, 512), normal(device, tokens, 64)

    def run(kv_cache: Tensor, slots: Tensor, latent: Tensor, k_rope: Tensor) -> Tensor:
        dk.mla_cache_append(kv_cache, slots, latent, k_rope)
        return kv_cache

    def check(inputs: tuple[Any, ...], output: Tensor) -> str | None:
        with dk.backend("eager"):
            wanted = run(torch.zeros_like(inputs[0]), *inputs[1:])
        return against_eager("mla_cache_append", (output,), (wanted,))

    return Case(
        op="mla_cache_append",
        shape={"T": tokens, "cache": kind},
        make=make,
        run=run,
        check=check,
        bytes=tokens * (1152 + 8 + BYTES[kind]),
        quick=quick,
    )


def mla_cache_gather(requests: int, keys: int, kind: str, *, quick: bool = False) -> Case:
    total, pages = requests * keys, -(-keys // PAGE)

    def make(device: torch.device) -> tuple[Any, ...]:
        kv_cache = cache(device, requests * pages * PAGE, kind)
        slots = torch.arange(kv_cache.shape[0] * PAGE, device=device)
        dk.mla_cache_append(kv_cache, slots, normal(device, len(slots), 512), normal(device, len(slots), 64))
        order = torch.randperm(requests * pages, generator=torch.Generator().manual_seed(1))
        bounds = torch.arange(requests + 1, dtype=torch.int32) * keys
        return kv_cache, order.int().view(requests, pages).to(device), bounds.to(device)

    def run(*inputs: Tensor) -> Any:
        return dk.mla_cache_gather(*inputs, total)

    def check(inputs: tuple[Any, ...], outputs: Any) -> str | None:
        with dk.backend("eager"):
            return against_eager("mla_cache_gather", outputs, run(*inputs))

    return Case(
        op="mla_cache_gather",
        shape={"B": requests, "keys": keys, "cache": kind},
        make=make,
        run=run,
        check=check,
        bytes=total * (1152 + BYTES[kind]),
        quick=quick,
    )


def merge_attention(tokens: int, heads: int, *, quick: bool = False) -> Case:
    def make(device: torch.device) -> tuple[Any, ...]:
        outs = [normal(device, tokens, heads, width) for width in (128, 128)]
        lses = [normal(device, tokens, heads, shift).float().sum(-1) for shift in (2, 3)]
        return outs[0], lses[0], outs[1], lses[1]

    def check(inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> str | None:
        out_a, lse_a, out_b, lse_b = (t.double() for t in inputs)
        lse = torch.logaddexp(lse_a, lse_b)
        parts = out_a * (lse_a - lse).exp()[..., None], out_b * (lse_b - lse).exp()[..., None]
        ok = ((outputs[0] - parts[0] - parts[1]).abs() <= 2**-8 * (parts[0].abs() + parts[1].abs())).all()
        ok &= ((outputs[1] - lse).abs() <= 1e-5 * lse.abs().clamp(min=1)).all()
        return None if ok else "merge_attention: off"

    return Case(
        op="merge_attention",
        shape={"T": tokens, "H": heads},
        make=make,
        run=dk.merge_attention,
        check=check,
        bytes=tokens * heads * (3 * 256 + 12),
        quick=quick,
    )


def rope(tokens: int, heads: int, *, quick: bool = False) -> Case:
    def make(device: torch.device) -> tuple[Any, ...]:
        q = normal(device, tokens, heads, 192)[..., 128:]
        angles = torch.rand(tokens, 32, generator=torch.Generator().manual_seed(0)) * 6.28
        table = torch.cat([angles.cos(), angles.sin()], -1).to(device)
        return q, torch.arange(tokens, dtype=torch.int32, device=device), table

    def check(inputs: tuple[Any, ...], output: Tensor) -> str | None:
        with dk.backend("eager"):
            wanted = dk.rope(*inputs)
        # The compiler of the GPU's eager may fuse a product with a sum.
        return None if ((output - wanted).abs() <= 2**-7 * wanted.abs() + 1e-6).all() else "rope: off"

    return Case(
        op="rope",
        shape={"T": tokens, "H": heads},
        make=make,
        run=dk.rope,
        check=check,
        bytes=tokens * heads * 256 + tokens * 256,
        quick=quick,
    )


# Decoding steps, and the chunks of a prompt.
CASES = [
    rope(128, 128, quick=True),
    rope(8192, 128, quick=True),
    rope(8192, 1),
    *[mla_cache_append(tokens, kind, quick=tokens == 128) for tokens in (128, 8192) for kind in BYTES],
    *[mla_cache_gather(requests, 8192, kind, quick=requests == 1) for requests in (1, 16) for kind in BYTES],
    merge_attention(2048, 128, quick=True),
]
