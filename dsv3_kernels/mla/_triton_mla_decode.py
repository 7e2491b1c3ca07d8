"""mla_decode in Triton: a program takes a split of one request's keys for a block of rows (queries x heads); a second
kernel joins a request's splits.

A latent row is read once, in blocks of columns: transposed it is the key, as it lies it is the value. The codes of an
FP8 cache are multiplied as they are (16 bits hold them exactly): scores take the scales afterwards, weights before.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from ._cache import LATENT, ROPE
from ._triton_cache import cannot

LN2 = tl.constexpr(0.6931471805599453)
SPLIT = 512  # keys that are worth a split of their own where no plan says; unmeasured


def _blocks(rows: int, keys: int, warps: int, stages: int = 2) -> dict[str, int]:
    return {"BH": rows, "BN": keys, "num_warps": warps, "num_stages": stages}


# By rows of a request and bytes of the cache's numbers. The float32 sum of BH x 512 is in registers: at 64 rows and 8
# warps 128 of a thread. Shared memory holds q and one or two blocks of BN x 576: 163 KB on sm_80, 99 KB on sm_89 (and
# sm_86), 227 KB on sm_90. All of it follows from that and is unmeasured.
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
    ({}, _blocks(16, 16, 8, 1)),
    candidates=tuple(
        _blocks(h, n, w, s) for h in (16, 32, 64) for n in (16, 32, 64) for w in (4, 8) for s in (1, 2, 3)
    ),
)


@triton.jit
def _columns(pointer, row, there, first: tl.constexpr, end: tl.constexpr, WIDE: tl.constexpr):
    """WIDE columns from `first` on of the rows that begin at `row`; zeros past `end`, and where not `there`."""
    column = first + tl.arange(0, WIDE)
    inside = there[:, None]
    if first + WIDE > end:
        inside = inside & (column < end)[None, :]
    return tl.load(pointer + (row[:, None] + column[None, :]), mask=inside, other=0.0)


@triton.jit
def _add_scores(s, q, k, scale, precision: tl.constexpr):
    """s + q (scale k)^T."""
    if scale is None:
        return tl.dot(q, tl.trans(k), s, input_precision=precision)
    else:  # the product starts from a zero made of s: so ptxas cannot keep those of all blocks and add them up last
        product = tl.dot(q, tl.trans(k), tl.minimum(tl.abs(s), 0.0), input_precision=precision)
        return s + product * scale[None, :]


@triton.jit
def _add_values(total, p, k, scale, precision: tl.constexpr):
    """total + p (scale k)."""
    if scale is not None:
        p = p * scale[None, :]
    return tl.dot(p.to(k.dtype), k, total, input_precision=precision)


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
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_ROPE: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    WGMMA: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
):
    """Rows of the cache begin at multiples of UNIT of its elements, in which page_stride counts. `scale` is that of
    scores to the base 2. With WGMMA nothing is moved out of the loop: the descriptors of q's parts would be 72
    registers there, beside 128 of the sum."""
    FP8: tl.constexpr = cache.dtype.element_ty == tl.uint8
    BLOCKS: tl.constexpr = (LATENT + WIDE - 1) // WIDE
    BY_BLOCK: tl.constexpr = q.dtype.element_ty == tl.float32  # whose blocks side by side are too many registers
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
    query, head, inside = r // H, r % H, r < Q * H
    limit = tl.minimum(length - causal * (Q - 1 - query), last)  # keys that a row sees
    q += request.to(tl.int64) * q_request
    q_row = query.to(tl.int64) * q_query + head.to(tl.int64) * q_head
    q_rotary = _columns(q, q_row, inside, LATENT, LATENT + ROPE, WIDE_ROPE)
    q_blocks, o_blocks = (), ()
    for i in tl.static_range(BLOCKS):
        q_blocks += (_columns(q, q_row, inside, WIDE * i, LATENT, WIDE),)
        o_blocks += (tl.zeros((BH, WIDE), tl.float32),)
    codes = cache.to(tl.pointer_type(tl.float8e4nv)) if FP8 else cache
    scales = cache.to(tl.pointer_type(tl.float32)) + LATENT // 4
    rotary = cache.to(tl.pointer_type(tl.bfloat16)) + LATENT // 2 + LATENT // 64 if FP8 else cache + LATENT
    table += request.to(tl.int64) * table_stride

    top = tl.full((BH,), -float("inf"), tl.float32)
    total = tl.zeros((BH,), tl.float32)
    for start in tl.range(first, last, BN, disable_licm=WGMMA):
        key = start + tl.arange(0, BN)
        seen = key < last
        number = tl.load(table + (key >> page_bits), mask=seen, other=0)
        row = number.to(tl.int64) * page_stride + (key & ((1 << page_bits) - 1)) * (
            41 if FP8 else (LATENT + ROPE) // UNIT
        )
        s = tl.zeros((BH, BN), tl.float32)
        if BY_BLOCK:
            k_rotary = _columns(rotary, row * (8 if FP8 else UNIT), seen, 0, ROPE, WIDE_ROPE).to(q.dtype.element_ty)
            s = _add_scores(s, q_rotary, k_rotary, None, PRECISION)
        k_blocks, k_scales = (), ()
        for i in tl.static_range(BLOCKS):
            k_blocks += (_columns(codes, row * UNIT, seen, WIDE * i, LATENT, WIDE).to(q.dtype.element_ty),)
            if FP8:
                k_scales += (tl.load(scales + i + row * 4, mask=seen, other=0.0),)
            if BY_BLOCK:
                s = _add_scores(s, q_blocks[i], k_blocks[i], k_scales[i] if FP8 else None, PRECISION)
        if not BY_BLOCK:
            k_rotary = _columns(rotary, row * (8 if FP8 else UNIT), seen, 0, ROPE, WIDE_ROPE).to(q.dtype.element_ty)
            for i in tl.static_range(BLOCKS):
                s = _add_scores(s, q_blocks[i], k_blocks[i], k_scales[i] if FP8 else None, PRECISION)
            s = _add_scores(s, q_rotary, k_rotary, None, PRECISION)
        s = tl.where(key[None, :] < limit[:, None], s * scale, -float("inf"))
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new == -float("inf"), 0.0, new)
        p, shrink = tl.exp2(s - base[:, None]), tl.exp2(top - base)
        top, total = new, total * shrink + tl.sum(p, 1)
        sums = ()
        for i in tl.static_range(BLOCKS):
            scale_i = k_scales[i] if FP8 else None
            sums += (_add_values(o_blocks[i] * shrink[:, None], p, k_blocks[i], scale_i, PRECISION),)
        o_blocks = sums

    norm = 1 / tl.where(total == 0, 1.0, total)[:, None]
    top += tl.log2(total)
    part += item.to(tl.int64) * (Q * H * LATENT)
    for i in tl.static_range(BLOCKS):
        column = WIDE * i + tl.arange(0, WIDE)
        at, there = r[:, None] * LATENT + column[None, :], inside[:, None] & (column < LATENT)[None, :]
        tl.store(part + at, o_blocks[i] * norm, mask=there)
    tl.store(part_lse + item.to(tl.int64) * (Q * H) + r, top, mask=inside)


@triton.jit(do_not_specialize=["seqlens", "splits", "lse", "part_lse", "Q", "H", "SPLITS"])
def triton_mla_decode_join(
    part, part_lse, seqlens, splits, out, out_request, out_query, out_head, lse, Q, H, SPLITS, LATENT: tl.constexpr,
    WIDE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One row of a request: its splits in order, CHUNK at a time. Log-sum-exps of splits are to the base 2."""
    request, r = tl.program_id(0) // (Q * H), tl.program_id(0) % (Q * H)
    if splits is None:
        length = tl.load(seqlens + request)
        first = request * SPLITS
        last = first + tl.maximum(tl.cdiv(length, tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), 64), 1) * 64), 1)
    else:
        first, last = tl.load(splits + request), tl.load(splits + request + 1)
    d = tl.arange(0, WIDE)
    top = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    mean = tl.zeros((WIDE,), tl.float32)
    for start in range(first, last, CHUNK):
        item = start + tl.arange(0, CHUNK)
        row = item.to(tl.int64) * (Q * H) + r
        each = tl.load(part_lse + row, mask=item < last, other=-float("inf"))
        there = (item < last)[:, None] & (d < LATENT)[None, :]
        values = tl.load(part + row[:, None] * LATENT + d[None, :], mask=there, other=0.0)
        new = tl.maximum(top, tl.max(each, 0))
        base = tl.where(new == -float("inf"), 0.0, new)
        weights, shrink = tl.exp2(each - base), tl.exp2(top - base)
        top, total = new, total * shrink + tl.sum(weights, 0)
        mean = mean * shrink + tl.sum(values * weights[:, None], 0)
    mean /= tl.where(total == 0, 1.0, total)
    out += request.to(tl.int64) * out_request + (r // H).to(tl.int64) * out_query + (r % H).to(tl.int64) * out_head
    tl.store(out + d, mean.to(out.dtype.element_ty), mask=d < LATENT)
    tl.store(lse + request.to(tl.int64) * (Q * H) + r, (top + tl.log2(total)) * LN2)


def mla_decode_cannot(q: Tensor, kv_cache: Tensor, *rest: Any) -> str | None:
    latent = rest[-1]
    rope = q.shape[3] - latent
    if latent > LATENT or rope > ROPE:
        return f"takes a latent of up to {LATENT} and a rotary part of up to {ROPE}, got {latent} and {rope}"
    if q.dtype == torch.float64:
        return "takes no float64"
    if kv_cache.dtype == torch.uint8 and q.dtype == torch.float16:
        return "takes no float16 queries on an FP8 cache, whose scales can be too small for it"
    return cannot(kv_cache)


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
    (requests, queries, heads, width), (_, page, row) = q.shape, kv_cache.shape
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
    part = q.new_empty(items, rows, latent, dtype=torch.float32)
    part_lse = q.new_empty(items, rows, dtype=torch.float32)
    unit = math.gcd(16 // kv_cache.itemsize, row, kv_cache.stride(0))
    wgmma = config["BH"] >= 64 and q.itemsize == 2 and _triton.sm(q) >= 90
    wide = 64 if q.itemsize == 4 else 256 if wgmma and kv_cache.itemsize == 2 else 128  # FP8 has a scale for every 128
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
        latent,
        width - latent,
        min(wide, max(16, _triton.next_power_of_2(latent))),
        max(16, _triton.next_power_of_2(width - latent)),
        unit,
        "tf32x3" if q.dtype == torch.float32 else "tf32",
        wgmma,
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
        latent,
        max(128, _triton.next_power_of_2(latent)),
        8,
        num_warps=4,
    )
