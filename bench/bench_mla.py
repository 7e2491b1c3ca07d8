"""Benchmarks of the mla family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dsv3_kernels as dk

# There: mla_prefill, mla_prefill_backward, mla_prologue, mla_cache_append, mla_cache_gather, merge_attention, rope.
from . import bench_mla_prefill, peer_flash_mla
from .bench_quant import normal
from .cases import Call, Case

PAGE, WIDTH = 64, 576
# Of keys, one copy per head: what torch's attention takes where none of its fused kernels serves.
EXPANDED_BYTES = 2**34
SCALE = 0.1352338


def lengths(device: torch.device, requests: int, keys: int) -> Tensor:
    """Between a half and all of `keys`, the longest first in no order."""
    spread = torch.linspace(0.5, 1, requests, dtype=torch.float64)[torch.arange(requests) * 7 % requests]
    return (spread * keys).round().clamp(min=1).int().to(device)


def mla_decode_plan(requests: int, keys: int, heads: int, *, quick: bool = False, cpu: bool = False) -> Case:
    def run(seqlens: Tensor) -> Any:
        return dk.mla_decode_plan(seqlens, num_queries=1, num_heads=heads)

    def check(inputs: tuple[Any, ...], plan: Any) -> str | None:
        with dk.backend("eager"):
            wanted = run(*inputs)
        same = all(torch.equal(a, b) for a, b in zip(plan, wanted, strict=True))
        return None if same else "mla_decode_plan: differs from eager's"

    return Case(
        op="mla_decode_plan",
        shape={"B": requests, "keys": keys, "H": heads},
        make=lambda device: (lengths(device, requests, keys),),
        run=run,
        check=check,
        bytes=4 * requests + 16 * (requests + 132) + 4 * (requests + 132),
        devices=("cuda", "cpu") if cpu else ("cuda",),
        quick=quick,
    )


def mla_decode(
    requests: int,
    keys: int,
    heads: int,
    queries: int = 1,
    *,
    fp8: bool = False,
    planned: bool = True,
    quick: bool = False,
    cpu: bool = False,
) -> Case:
    """The plan and the joining of partial results are part of what is timed; or, not `planned`, no plan is given."""
    seen = int(lengths(torch.device("cpu"), requests, keys).sum())

    def make(device: torch.device) -> tuple[Any, ...]:
        pages = -(-keys // PAGE)
        table = torch.randperm(requests * pages, generator=torch.Generator().manual_seed(0)).view(requests, pages)
        if fp8:
            cache = torch.zeros(requests * pages, PAGE, 656, dtype=torch.uint8, device=device)
            slots = torch.arange(requests * pages * PAGE, device=device)
            for some in slots.split(1 << 16):
                dk.mla_cache_append(cache, some, normal(device, len(some), 512), normal(device, len(some), 64))
        else:
            cache = normal(device, requests * pages, PAGE, 576)
        q = normal(device, requests, queries, heads, 576)
        out = q.new_empty(requests, queries, heads, 512), q.new_empty(requests, queries, heads, dtype=torch.float32)
        plan = dk.mla_decode_plan(
            lengths(device, requests, keys), num_queries=queries, num_heads=heads, kv_dtype=cache.dtype
        )
        return q, cache, table.int().to(device), lengths(device, requests, keys), plan, out

    def run(q: Tensor, cache: Tensor, table: Tensor, seqlens: Tensor, plan: Any, out: Any) -> Any:
        if not planned:
            plan = None
        elif q.is_cuda:
            plan = dk.mla_decode_plan(seqlens, num_queries=queries, num_heads=heads, kv_dtype=cache.dtype)
        return dk.mla_decode(q, cache, table, seqlens, softmax_scale=SCALE, plan=plan, out=out)

    def check(inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> str | None:
        q, cache, table, seqlens = inputs[:4]
        for b in {0, requests - 1}:
            with dk.backend("eager"):
                one = q[b : b + 1], cache, table[b : b + 1], seqlens[b : b + 1]
                wanted = dk.mla_decode(*one, softmax_scale=SCALE)
            for got, right in zip(outputs, wanted, strict=True):
                if not ((got[b : b + 1] - right).float().norm() <= 0.02 * right.float().norm()):
                    return f"mla_decode: request {b} is off"
        return None

    peers = {} if fp8 else {"flash_mla": flash_mla, "flashinfer": flashinfer}
    if not fp8 and requests * heads * keys * WIDTH * 2 <= EXPANDED_BYTES:
        peers["torch sdpa"] = expanded_sdpa
    return Case(
        op="mla_decode",
        shape={"B": requests, "keys": keys, "H": heads, "Sq": queries, "cache": "fp8" if fp8 else "bf16"}
        | ({} if planned else {"plan": "none"}),
        make=make,
        run=run,
        check=check,
        bytes=seen * (656 if fp8 else 1152) + requests * queries * heads * (576 + 512) * 2,
        flops=2 * seen * queries * heads * (576 + 512),
        unit="bf16",
        peers=peers,
        checked=("flash_mla",),
        devices=("cuda", "cpu") if cpu else ("cuda",),
        quick=quick,
    )


def flash_mla(q: Tensor, cache: Tensor, table: Tensor, seqlens: Tensor, plan: Any, out: Any) -> Call:
    return peer_flash_mla.decode(q, cache, table, seqlens, SCALE)


def flashinfer(q: Tensor, cache: Tensor, table: Tensor, seqlens: Tensor, plan: Any, out: Any) -> Call:
    """Its plan waits for the device, so that it is made beforehand: an easier problem."""
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    requests, queries, heads, _ = q.shape
    pages = (seqlens + PAGE - 1) // PAGE
    used = torch.arange(table.shape[1], device=q.device) < pages[:, None]
    starts = torch.arange(requests + 1, dtype=torch.int32, device=q.device) * queries
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(1 << 27, dtype=torch.uint8, device=q.device), backend="fa3")
    page_starts = torch.nn.functional.pad(pages.cumsum(0), (1, 0)).int()
    wrapper.plan(
        starts, page_starts, table[used], seqlens, heads, 512, 64, PAGE, True, SCALE, q.dtype, cache.dtype
    )  # fmt: skip
    q_parts, cache_parts = q.flatten(0, 1).split([512, 64], dim=-1), cache.split([512, 64], dim=-1)
    return lambda: wrapper.run(*q_parts, *cache_parts, return_lse=True)


def expanded_sdpa(q: Tensor, cache: Tensor, table: Tensor, seqlens: Tensor, plan: Any, out: Any) -> Call:
    """Keys gathered into a rectangle beforehand, the mask made beforehand: an easier problem."""
    keys = cache[table.long()].flatten(1, 2)[:, None].expand(-1, q.shape[2], -1, -1)
    place = torch.arange(keys.shape[2], device=q.device)
    behind = torch.arange(q.shape[1] - 1, -1, -1, device=q.device)
    mask = (place < (seqlens[:, None] - behind)[..., None])[:, None]
    queries = q.transpose(1, 2)
    attention = torch.nn.functional.scaled_dot_product_attention
    return lambda: attention(queries, keys, keys[..., :512], attn_mask=mask, scale=SCALE)


def mla_absorb(tokens: int, latent: bool, *, quick: bool = False, cpu: bool = False) -> Case:
    """Both halves of kv_b of DeepSeek-V3 as they lie: into decode's queries, or out of its outputs."""
    heads, columns, depth = 128, 512 if latent else 128, 128 if latent else 512

    def make(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        kv_b = normal(device, heads, 256, 512)
        if latent:
            x, q = normal(device, tokens, heads, 192)[..., :128], torch.zeros(tokens, heads, 576, device=device)
            return x, kv_b[:, :128].mT, q.bfloat16()[..., :512]
        x = normal(device, tokens, heads, 512)
        return x, kv_b[:, 128:], x.new_empty(tokens, heads, 128)

    def check(inputs: tuple[Tensor, ...], out: Tensor) -> str | None:
        with dk.backend("eager"):
            wanted = dk.mla_absorb(*inputs[:2])
        return None if (out - wanted).float().norm() <= 0.01 * wanted.float().norm() else "mla_absorb: is off"

    return Case(
        op="mla_absorb",
        shape={"T": tokens, "H": heads, "N": columns, "K": depth},
        make=make,
        run=lambda x, weight, out: dk.mla_absorb(x, weight, out=out),
        check=check,
        bytes=2 * heads * (columns * depth + tokens * (columns + depth)),
        flops=2 * tokens * heads * columns * depth,
        unit="bf16",
        peers={"torch bmm": bmm},
        devices=("cuda", "cpu") if cpu else ("cuda",),
        quick=quick,
    )


def bmm(x: Tensor, weight: Tensor, out: Tensor) -> Call:
    """Into memory of its own: a copy into the queries (torch.cat) would come on top."""
    return lambda: torch.bmm(x.transpose(0, 1), weight.mT)


HEADS = (16, 32, 64, 128)
QUICK = {(2, 1024, 16, False), (128, 1024, 16, False), (128, 4096, 128, False), (128, 4096, 64, True)}
DECODE = [(b, keys, heads) for b in (1, 2, 16, 128) for keys in (1024, 4096, 16384, 65536) for heads in HEADS]

CASES = [
    *bench_mla_prefill.CASES,
    mla_absorb(2, True, cpu=True),
    *(
        mla_absorb(tokens, latent, quick=tokens in (128, 4096))
        for tokens in (1, 64, 128, 256, 4096)
        for latent in (True, False)
    ),
    mla_decode_plan(2, 1024, 16, cpu=True),
    mla_decode_plan(128, 4096, 128, quick=True),
    mla_decode_plan(4096, 1024, 16),
    mla_decode(2, 128, 4, cpu=True),
    # Without a plan: one launch, of a cluster for each request; the sweep below has the first two with their plans.
    *(mla_decode(2, 1024, heads, planned=False, quick=heads == 16) for heads in (16, 128)),
    mla_decode(2, 1024, 16, fp8=True, planned=False),
    mla_decode(16, 1024, 16, planned=False),
    *(mla_decode(1, 2560, 16, planned=planned) for planned in (False, True)),
    *(mla_decode(*shape, fp8=fp8, quick=(*shape, fp8) in QUICK) for shape in DECODE for fp8 in (False, True)),
    # What FlashMLA's tests time: 128 heads, one and two queries.
    *(mla_decode(128, keys, 128, fp8=fp8) for keys in (2048, 8192, 32768) for fp8 in (False, True)),
    *(mla_decode(128, keys, 128, 2, fp8=fp8) for keys in (4096, 8192, 16384, 32768) for fp8 in (False, True)),
    *(mla_decode(32, 4096, 16, queries) for queries in (2, 4)),
]
