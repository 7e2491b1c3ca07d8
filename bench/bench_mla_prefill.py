"""Benchmarks of the mla family outside decoding: cache ops, rope, merge, prefill. `bench_mla.py` lists them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dsv3_kernels as dk

from .bench_quant import against_eager, normal
from .cases import Call, Case

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


def mla_prologue(tokens: int, kind: str, *, quick: bool = False) -> Case:
    def make(device: torch.device) -> tuple[Any, ...]:
        angles = torch.rand(tokens, 32, generator=torch.Generator().manual_seed(0)) * 6.28
        table = torch.cat([angles.cos(), angles.sin()], -1).to(device)
        positions = torch.arange(tokens, dtype=torch.int32, device=device)
        weights = [1 + normal(device, width) / 8 for width in (1536, 512)]
        x, slots = normal(device, tokens, 2112), torch.arange(tokens, device=device)
        return x, *weights, positions, table, cache(device, tokens, kind), slots

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        return *dk.mla_prologue(*inputs, eps=1e-6), inputs[5]

    def check(inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> str | None:
        with dk.backend("eager"):
            wanted = run(*inputs[:5], torch.zeros_like(inputs[5]), inputs[6])
        return against_eager("mla_prologue", outputs, wanted)

    return Case(
        op="mla_prologue",
        shape={"T": tokens, "cache": kind},
        make=make,
        run=run,
        check=check,
        bytes=tokens * (4224 + 1536 + 48 + BYTES[kind] + 268),
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


def rope(tokens: int, heads: int, *, quick: bool = False, cpu: bool = False) -> Case:
    """From the up-projection's queries into those of decode."""

    def make(device: torch.device) -> tuple[Any, ...]:
        q = normal(device, tokens, heads, 192)[..., 128:]
        angles = torch.rand(tokens, 32, generator=torch.Generator().manual_seed(0)) * 6.28
        table = torch.cat([angles.cos(), angles.sin()], -1).to(device)
        out = torch.zeros(tokens, heads, 576, dtype=q.dtype, device=device)[..., 512:]
        return q, torch.arange(tokens, dtype=torch.int32, device=device), table, out

    def check(inputs: tuple[Any, ...], output: Tensor) -> str | None:
        with dk.backend("eager"):
            wanted = dk.rope(*inputs[:3])
        # The compiler of the GPU's eager may fuse a product with a sum.
        return None if ((output - wanted).abs() <= 2**-7 * wanted.abs() + 1e-6).all() else "rope: off"

    return Case(
        op="rope",
        shape={"T": tokens, "H": heads},
        make=make,
        run=lambda q, positions, table, out: dk.rope(q, positions, table, out=out),
        check=check,
        bytes=tokens * heads * 256 + tokens * 256,
        devices=("cuda", "cpu") if cpu else ("cuda",),
        quick=quick,
    )


SCALE = 0.1352338


def heads_of_a_chunk(device: torch.device, queries: int, keys: int, sequences: int, heads: int) -> tuple[Any, ...]:
    """Packed sequences of equal lengths; keys and values are the halves of one tensor, as W_UKV leaves them."""
    kv = normal(device, sequences * keys, heads, 256)
    bounds = [torch.arange(sequences + 1, dtype=torch.int32, device=device) * length for length in (queries, keys)]
    q, k_rope = normal(device, sequences * queries, heads, 192), normal(device, sequences * keys, 64)
    return q, kv[..., :128], k_rope, kv[..., 128:], *bounds


def pairs(queries: int, keys: int, causal: bool) -> int:
    """Of a query and a key that it sees, of queries that are the last of the keys."""
    return queries * keys - (queries * (queries - 1) // 2 if causal else 0)


def one_head(inputs: tuple[Any, ...], queries: int, keys: int, causal: bool) -> tuple[Tensor, ...]:
    """q, k, v of the last sequence's last head in float64, its weights and log-sum-exps."""
    q, k_nope, k_rope, v = (t[-n:] for t, n in zip(inputs, (queries, keys, keys, keys), strict=False))
    q, k, v = q[:, -1].double(), torch.cat([k_nope[:, -1], k_rope], -1).double(), v[:, -1].double()
    s = SCALE * q @ k.mT
    if causal:
        at = [torch.arange(n, device=s.device) for n in (queries, keys)]
        s.masked_fill_(at[1] > at[0][:, None] + keys - queries, -torch.inf)
    lse = s.logsumexp(-1)
    return q, k, v, s.sub_(lse[:, None]).exp_(), lse


def off(what: str, got: Tensor, wanted: Tensor) -> str | None:
    """More than 1% of the largest value: an order above what bfloat16 costs, an order below what a mistake does."""
    return None if (got.double() - wanted).abs().max() <= 1e-2 * wanted.abs().max() else f"{what}: off"


def cudnn(*inputs: Any) -> Call:
    """torch's attention with cuDNN forced, on keys that were expanded beforehand. One sequence, causal."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k_nope, k_rope, v = inputs[:4]
    k = torch.cat([k_nope, k_rope[:, None].expand(-1, q.shape[1], -1)], -1)
    heads = [t.transpose(0, 1)[None] for t in (q, k, v)]

    def attend() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, scale=SCALE)

    attend()
    return attend


def cudnn_backward(*inputs: Any) -> Call:
    """Its gradients, by the operator that autograd would call; what its forward leaves for it is made beforehand."""
    q, k_nope, k_rope, v, grad = inputs[:5]
    k = torch.cat([k_nope, k_rope[:, None].expand(-1, q.shape[1], -1)], -1)
    q, k, v, grad = (t.transpose(0, 1)[None] for t in (q, k, v, grad))
    forward = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse, *bounds, seed, offset, _ = forward(q, k, v, None, True, 0.0, True, scale=SCALE)
    backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    rest = lse, seed, offset, None, *bounds, 0.0, True
    return lambda: backward(grad, q, k, v, out, *rest, scale=SCALE)


def mla_prefill(
    queries: int, keys: int, sequences: int, heads: int, causal: bool = True, *, quick: bool = False
) -> Case:
    def check(inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> str | None:
        _, _, v, p, lse = one_head(inputs, queries, keys, causal)
        wrong = off("mla_prefill", outputs[0][-queries:, -1], p @ v)
        return wrong or off("mla_prefill: lse", outputs[1][-queries:, -1], lse)

    return Case(
        op="mla_prefill",
        shape={"B": sequences, "queries": queries, "keys": keys, "H": heads, "causal": int(causal)},
        make=lambda device: heads_of_a_chunk(device, queries, keys, sequences, heads),
        run=lambda *inputs: dk.mla_prefill(*inputs, softmax_scale=SCALE, causal=causal),
        check=check,
        bytes=sequences * heads * (queries * 640 + keys * 512) + sequences * keys * 128,
        flops=640 * heads * sequences * pairs(queries, keys, causal),
        unit="bf16",
        peers={"torch, cuDNN": cudnn} if causal and sequences == 1 and queries == keys else {},
        quick=quick,
    )


def mla_prefill_backward(tokens: int, sequences: int, heads: int, *, quick: bool = False) -> Case:
    def make(device: torch.device) -> tuple[Any, ...]:
        inputs = heads_of_a_chunk(device, tokens, tokens, sequences, heads)
        out, lse = dk.mla_prefill(*inputs, softmax_scale=SCALE)
        return (*inputs[:4], normal(device, *out.shape), out, lse, *inputs[4:])

    def run(q: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor, grad_out: Tensor, *rest: Any) -> Any:
        return torch.ops.dsv3_kernels.mla_prefill_backward(grad_out, q, k_nope, k_rope, v, *rest, SCALE, True)

    def check(inputs: tuple[Any, ...], grads: tuple[Tensor, ...]) -> str | None:
        q, k, v, p, _ = one_head(inputs, tokens, tokens, True)
        grad = inputs[4][-tokens:, -1].double()
        ds = p * (grad @ v.mT - (grad * (p @ v)).sum(-1, keepdim=True)) * SCALE
        wanted = ds @ k, (ds.mT @ q)[:, :128], p.mT @ grad
        got = [t[-tokens:, -1] for t in (grads[0], grads[1], grads[3])]
        wrong = [off("mla_prefill_backward", *pair) for pair in zip(got, wanted, strict=True)]
        return next((text for text in wrong if text), None)

    return Case(
        op="mla_prefill_backward",
        shape={"B": sequences, "T": tokens, "H": heads},
        make=make,
        run=run,
        check=check,
        bytes=sequences * tokens * (heads * (2 * 384 + 2 * 512 + 2 * 256 + 4) + 256),
        flops=1664 * heads * sequences * pairs(tokens, tokens, True),
        unit="bf16",
        peers={"torch, cuDNN": cudnn_backward} if sequences == 1 else {},
        quick=quick,
    )


# Decoding steps, and the chunks of a prompt.
CASES = [
    rope(2, 4, cpu=True),
    rope(128, 128, quick=True),
    rope(8192, 128, quick=True),
    rope(8192, 1),
    *[mla_cache_append(tokens, kind, quick=tokens == 128) for tokens in (128, 8192) for kind in BYTES],
    *[mla_prologue(tokens, kind, quick=tokens == 128) for tokens in (1, 128, 8192) for kind in BYTES],
    *[mla_cache_gather(requests, 8192, kind, quick=requests == 1) for requests in (1, 16) for kind in BYTES],
    merge_attention(2048, 128, quick=True),
    mla_prefill(4096, 4096, 1, 128, quick=True),
    mla_prefill(8192, 8192, 1, 128),
    mla_prefill(1024, 1024, 8, 128),
    mla_prefill(2048, 16384, 1, 128, causal=False),
    mla_prefill_backward(4096, 1, 128, quick=True),
    mla_prefill_backward(8192, 1, 128),
]
