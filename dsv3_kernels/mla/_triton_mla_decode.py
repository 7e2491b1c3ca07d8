"""mla_decode in Triton: a program takes a split of one request's keys for a block of rows (queries x heads); a second
kernel joins a request's splits.

A latent row is read once, in four blocks of 128: transposed it is the key, as it lies it is the value. The codes of an
FP8 cache are multiplied as they are (16 bits hold them exactly): scores take the scales afterwards, weights before.
"""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from ._cache import LATENT, ROPE

LN2 = tl.constexpr(0.6931471805599453)
SPLIT = 512  # keys that are worth a split of their own where no plan says; unmeasured


def _blocks(rows: int, keys: int, warps: int) -> dict[str, int]:
    return {"BH": rows, "BN": keys, "num_warps": warps, "num_stages": 2}


# By rows of a request and bytes of the cache's numbers. The float32 sum of BH x 512 is in registers: at 64 rows and 8
# warps 128 of a thread. Shared memory holds q and one or two blocks of BN x 576: 163 KB on sm_80, 99 KB on sm_89 (and
# sm_86), 227 KB on sm_90. All of it follows from that and is unmeasured; float32 spills.
CONFIGS = _triton.Table(
    "mla_decode",
    ({"bytes": 1, "rows": 16, "sm": 89}, _blocks(16, 32, 8)),
    ({"bytes": 1, "rows": 16}, _blocks(16, 64, 8)),
    ({"bytes": 1, "rows": 32}, _blocks(32, 32, 8)),
    ({"bytes": 1, "sm": 89}, _blocks(32, 32, 8)),
    ({"bytes": 1}, _blocks(64, 32, 8)),
    ({"bytes": 2, "rows": 16, "sm": 89}, _blocks(16, 32, 4)),
    ({"bytes": 2, "rows": 16}, _blocks(16, 64, 4)),
    ({"bytes": 2, "rows": 32, "sm": 89}, _blocks(32, 32, 8)),
    ({"bytes": 2, "rows": 32}, _blocks(32, 64, 8)),
    ({"bytes": 2, "sm": 80}, _blocks(64, 32, 8)),
    ({"bytes": 2, "sm": 89}, _blocks(32, 32, 8)),
    ({"bytes": 2}, _blocks(64, 64, 8)),
    ({}, _blocks(16, 16, 8)),
    candidates=tuple(
        {**_blocks(h, n, w), "num_stages": s}
        for h in (16, 32, 64)
        for n in (16, 32, 64)
        for w in (4, 8)
        for s in (1, 2, 3)
    ),
)


@triton.jit
def _add_scores(s, q, k, scale, precision: tl.constexpr):
    """s + q (scale k)^T."""
    if scale is None:
        return tl.dot(q, tl.trans(k), s, input_precision=precision)
    else:
        return s + tl.dot(q, tl.trans(k), input_precision=precision) * scale[None, :]


@triton.jit
def _add_values(total, p, k, scale, precision: tl.constexpr):
    """total + p (scale k)."""
    if scale is not None:
        p = p * scale[None, :]
    return tl.dot(p.to(k.dtype), k, total, input_precision=precision)


@triton.jit
def _latent(cache, row, seen, block: tl.constexpr, unit: tl.constexpr, dtype: tl.constexpr):
    """Block `block` of 128 of the latent rows [BN, 128]. `row` counts 16 bytes, `unit` elements."""
    at = (row * unit)[:, None] + (128 * block + tl.arange(0, 128))[None, :]
    codes = cache.to(tl.pointer_type(tl.float8e4nv)) if cache.dtype.element_ty == tl.uint8 else cache
    return tl.load(codes + at, mask=seen[:, None], other=0.0).to(dtype)


@triton.jit
def _scale(cache, row, seen, block: tl.constexpr):
    """The scales of that block in an FP8 cache [BN]."""
    return tl.load(cache.to(tl.pointer_type(tl.float32)) + 128 + block + row * 4, mask=seen, other=0.0)


@triton.jit(
    do_not_specialize=[
        "page_stride", "page_bits", "table", "table_stride", "seqlens", "work", "part_lse", "scale", "causal", "Q",
        "H", "SPLITS",
    ]
)  # fmt: skip
def triton_mla_decode(
    q,
    q_request,
    q_query,
    q_head,
    cache,
    page_stride,
    page_bits,
    table,
    table_stride,
    seqlens,
    work,
    part,
    part_lse,
    scale,
    causal,
    Q,
    H,
    SPLITS,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
):
    """page_stride counts 16 bytes, which are UNIT elements of the cache. `scale` is that of scores to the base 2."""
    FP8: tl.constexpr = cache.dtype.element_ty == tl.uint8
    row_blocks = tl.cdiv(Q * H, BH)
    item, block = tl.program_id(0) // row_blocks, tl.program_id(0) % row_blocks
    if work is None:
        request, split = item // SPLITS, item % SPLITS
        length = tl.load(seqlens + request)
        size = tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), 64), 1) * 64
        first, last = split * size, tl.minimum(split * size + size, length)
        if (first >= length) & (split > 0):
            return
    else:
        request = tl.load(work + 4 * item)
        if request < 0:
            return
        first, last = tl.load(work + 4 * item + 1), tl.load(work + 4 * item + 2)
        length = tl.load(seqlens + request)

    r = block * BH + tl.arange(0, BH)
    query, head = r // H, r % H
    inside = (r < Q * H)[:, None]
    limit = tl.minimum(length - causal * (Q - 1 - query), last)  # keys that a row sees
    d, e = tl.arange(0, 128), tl.arange(0, 64)
    q += request.to(tl.int64) * q_request
    row_at = (query.to(tl.int64) * q_query + head.to(tl.int64) * q_head)[:, None]
    q_at = row_at + d[None, :]
    q0 = tl.load(q + q_at, mask=inside, other=0.0)
    q1 = tl.load(q + 128 + q_at, mask=inside, other=0.0)
    q2 = tl.load(q + 256 + q_at, mask=inside, other=0.0)
    q3 = tl.load(q + 384 + q_at, mask=inside, other=0.0)
    qr = tl.load(q + 512 + row_at + e[None, :], mask=inside, other=0.0)
    rotary = cache.to(tl.pointer_type(tl.bfloat16)) + 264 if FP8 else cache + 512
    table += request.to(tl.int64) * table_stride

    top = tl.full((BH,), -float("inf"), tl.float32)
    total = tl.zeros((BH,), tl.float32)
    o0 = tl.zeros((BH, 128), tl.float32)
    o1 = tl.zeros((BH, 128), tl.float32)
    o2 = tl.zeros((BH, 128), tl.float32)
    o3 = tl.zeros((BH, 128), tl.float32)
    for start in range(first, last, BN):
        key = start + tl.arange(0, BN)
        seen = key < last
        number = tl.load(table + (key >> page_bits), mask=seen, other=0)
        row = number.to(tl.int64) * page_stride + (key & ((1 << page_bits) - 1)) * (41 if FP8 else 576 // UNIT)
        k0 = _latent(cache, row, seen, 0, UNIT, q0.dtype)
        c0 = _scale(cache, row, seen, 0) if FP8 else None
        k1 = _latent(cache, row, seen, 1, UNIT, q0.dtype)
        c1 = _scale(cache, row, seen, 1) if FP8 else None
        k2 = _latent(cache, row, seen, 2, UNIT, q0.dtype)
        c2 = _scale(cache, row, seen, 2) if FP8 else None
        k3 = _latent(cache, row, seen, 3, UNIT, q0.dtype)
        c3 = _scale(cache, row, seen, 3) if FP8 else None
        kr = tl.load(rotary + (row * (8 if FP8 else UNIT))[:, None] + e[None, :], mask=seen[:, None], other=0.0).to(
            q0.dtype
        )
        s = tl.zeros((BH, BN), tl.float32)
        s = _add_scores(s, q0, k0, c0, PRECISION)
        s = _add_scores(s, q1, k1, c1, PRECISION)
        s = _add_scores(s, q2, k2, c2, PRECISION)
        s = _add_scores(s, q3, k3, c3, PRECISION)
        s = tl.dot(qr, tl.trans(kr), s, input_precision=PRECISION)
        s = tl.where(key[None, :] < limit[:, None], s * scale, -float("inf"))
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new == -float("inf"), 0.0, new)
        p, shrink = tl.exp2(s - base[:, None]), tl.exp2(top - base)
        top, total = new, total * shrink + tl.sum(p, 1)
        o0 = _add_values(o0 * shrink[:, None], p, k0, c0, PRECISION)
        o1 = _add_values(o1 * shrink[:, None], p, k1, c1, PRECISION)
        o2 = _add_values(o2 * shrink[:, None], p, k2, c2, PRECISION)
        o3 = _add_values(o3 * shrink[:, None], p, k3, c3, PRECISION)

    norm = 1 / tl.where(total == 0, 1.0, total)[:, None]
    top += tl.log2(total)
    part += item.to(tl.int64) * (Q * H * 512)
    at = r[:, None] * 512 + d[None, :]
    tl.store(part + at, o0 * norm, mask=inside)
    tl.store(part + 128 + at, o1 * norm, mask=inside)
    tl.store(part + 256 + at, o2 * norm, mask=inside)
    tl.store(part + 384 + at, o3 * norm, mask=inside)
    tl.store(part_lse + item.to(tl.int64) * (Q * H) + r, top, mask=r < Q * H)


@triton.jit(do_not_specialize=["seqlens", "splits", "lse", "part_lse", "Q", "H", "SPLITS"])
def triton_mla_decode_join(
    part, part_lse, seqlens, splits, out, out_request, out_query, out_head, lse, Q, H, SPLITS, CHUNK: tl.constexpr
):
    """One row of a request: its splits in order, CHUNK at a time. Log-sum-exps of splits are to the base 2."""
    request, r = tl.program_id(0) // (Q * H), tl.program_id(0) % (Q * H)
    if splits is None:
        length = tl.load(seqlens + request)
        first = request * SPLITS
        last = first + tl.maximum(tl.cdiv(length, tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), 64), 1) * 64), 1)
    else:
        first, last = tl.load(splits + request), tl.load(splits + request + 1)
    d = tl.arange(0, 512)
    top = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    mean = tl.zeros((512,), tl.float32)
    for start in range(first, last, CHUNK):
        item = start + tl.arange(0, CHUNK)
        row = item.to(tl.int64) * (Q * H) + r
        each = tl.load(part_lse + row, mask=item < last, other=-float("inf"))
        values = tl.load(part + row[:, None] * 512 + d[None, :], mask=(item < last)[:, None], other=0.0)
        new = tl.maximum(top, tl.max(each, 0))
        base = tl.where(new == -float("inf"), 0.0, new)
        weights, shrink = tl.exp2(each - base), tl.exp2(top - base)
        top, total = new, total * shrink + tl.sum(weights, 0)
        mean = mean * shrink + tl.sum(values * weights[:, None], 0)
    mean /= tl.where(total == 0, 1.0, total)
    out += request.to(tl.int64) * out_request + (r // H).to(tl.int64) * out_query + (r % H).to(tl.int64) * out_head
    tl.store(out + d, mean.to(out.dtype.element_ty))
    tl.store(lse + request.to(tl.int64) * (Q * H) + r, (top + tl.log2(total)) * LN2)


def mla_decode_cannot(q: Tensor, kv_cache: Tensor, *rest: Any) -> str | None:
    latent = rest[-1]
    if (latent, q.shape[3]) != (LATENT, LATENT + ROPE):
        return f"takes a latent of {LATENT} and a rotary part of {ROPE}, got {latent} and {q.shape[3] - latent}"
    if q.dtype == torch.float64:
        return "takes no float64"
    if kv_cache.stride(0) * kv_cache.itemsize % 16 and kv_cache.shape[0] > 1:
        return "takes pages that begin multiples of 16 bytes apart"
    if kv_cache.dtype == torch.uint8:
        if q.dtype == torch.float16:
            return "takes no float16 queries on an FP8 cache, whose scales can be too small for it"
        if kv_cache.data_ptr() % 16:
            return "takes an FP8 cache that begins at a multiple of 16 bytes"
        if _triton.sm(q) < 89:
            return f"an FP8 cache needs compute capability 8.9, got {_triton.sm(q) / 10}"
    return None


@functools.cache
def _sms(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device >= 0 else 132


def mla_decode(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seqlens: Tensor,
    work: Tensor | None,
    splits: Tensor | None,
    parts: Tensor | None,
    scale: float,
    causal: bool,
    latent: int,
    out: Tensor,
    lse: Tensor,
) -> None:
    (requests, queries, heads, _), page = q.shape, kv_cache.shape[1]
    rows = queries * heads
    if not requests * rows:
        return
    config = CONFIGS(q, rows=rows, bytes=max(kv_cache.itemsize, q.itemsize // 4 * 4))
    row_blocks = _triton.cdiv(rows, config["BH"])
    if work is None:  # enough programs for the device, of SPLIT keys or more
        most = _triton.cdiv(block_table.shape[1] * page, SPLIT)
        count = max(1, min(_triton.cdiv(_sms(q.get_device()), requests * row_blocks), most))
        items = requests * count
    else:
        count, items = 1, work.shape[0]
    part = q.new_empty(items, rows, LATENT, dtype=torch.float32)
    part_lse = q.new_empty(items, rows, dtype=torch.float32)
    unit = 16 // kv_cache.itemsize
    _triton.launch(
        triton_mla_decode,
        (items * row_blocks,),
        q,
        *q.stride()[:3],
        kv_cache,
        kv_cache.stride(0) // unit,
        page.bit_length() - 1,
        block_table,
        block_table.stride(0),
        seqlens,
        work,
        part,
        part_lse,
        scale * 1.4426950408889634,
        int(causal),
        queries,
        heads,
        count,
        unit,
        "tf32x3" if q.dtype == torch.float32 else "tf32",
        **config,
    )
    _triton.launch(
        triton_mla_decode_join,
        (requests * rows,),
        part,
        part_lse,
        seqlens,
        splits,
        out,
        *out.stride()[:3],
        lse,
        queries,
        heads,
        count,
        8,
        num_warps=4,
    )
