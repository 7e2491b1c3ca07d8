"""mla_decode_plan in Triton: one program that holds all requests in registers."""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .mla_decode_plan import FIXED_KEYS, FIXED_SPLITS, KEY_BLOCK

BLOCK: tl.constexpr = tl.constexpr(KEY_BLOCK)
PIECES: tl.constexpr = tl.constexpr(FIXED_SPLITS)
LEAST: tl.constexpr = tl.constexpr(FIXED_KEYS // KEY_BLOCK)


@triton.jit(do_not_specialize=["seqlens", "work", "splits", "bounds", "B", "W", "parts", "start_cost"])
def triton_mla_decode_plan(
    seqlens, work, splits, bounds, B, W, parts, start_cost, FIXED: tl.constexpr, REQUESTS: tl.constexpr
):
    request = tl.arange(0, REQUESTS)
    keys = tl.maximum(tl.load(seqlens + request, mask=request < B, other=0), 0).to(tl.int64)  # lengths up to 2^31 - 1
    blocks = tl.cdiv(keys, BLOCK)
    if FIXED:
        size = tl.maximum(tl.cdiv(tl.cdiv(keys, PIECES), BLOCK), LEAST)
        first = tl.zeros((REQUESTS,), tl.int64)  # of a request's pieces
        origin = first  # where the first piece begins, counted in blocks from the request's first key
        count = tl.maximum(tl.cdiv(blocks, size), 1)
    else:  # all requests in a row, each its start and then its blocks, cut into parts of equal length
        end = tl.cumsum(tl.where(request < B, blocks + start_cost, 0), 0)
        length = tl.max(end, 0)
        size = tl.maximum(tl.cdiv(length, parts), 1)
        first = tl.minimum(end - blocks, length - 1) // size
        origin = first * size - (end - blocks)
        count = tl.where(keys > 0, (end - 1) // size - first + 1, 1)
    count = tl.where(request < B, count, 0)
    after = tl.cumsum(count, 0)
    items = tl.max(after, 0)
    tl.store(splits, 0)
    tl.store(splits + 1 + request, after, mask=request < B)

    for piece in range(tl.max(count, 0)):
        low = tl.maximum(origin + piece * size, 0) * BLOCK
        high = tl.minimum((origin + (piece + 1) * size) * BLOCK, keys)
        at, mine = work + 4 * (after - count + piece), piece < count
        tl.store(at, request, mask=mine)
        tl.store(at + 1, low, mask=mine)
        tl.store(at + 2, high, mask=mine)
        tl.store(at + 3, tl.zeros_like(request) + piece, mask=mine)
    for start in range(4 * items, 4 * W, REQUESTS):
        tl.store(work + start + request, tl.full((REQUESTS,), -1, tl.int32), mask=start + request < 4 * W)

    # Items before part p: of a request's pieces `first`, `first + 1`, ... those before number p.
    for part in range(parts + 1):
        if FIXED:
            tl.store(bounds + part, (part * items // parts).to(tl.int32))
        else:
            tl.store(bounds + part, tl.sum(tl.minimum(tl.maximum(part - first, 0), count), 0).to(tl.int32))


def mla_decode_plan(
    seqlens: Tensor, parts: int, start_cost: int, fixed: bool, work: Tensor, splits: Tensor, bounds: Tensor
) -> None:
    requests = _triton.next_power_of_2(seqlens.shape[0])
    warps = 4 if requests <= 1024 else 8
    sizes = seqlens.shape[0], work.shape[0], parts, start_cost
    _triton.launch(
        triton_mla_decode_plan, (1,), seqlens, work, splits, bounds, *sizes, fixed, requests, num_warps=warps
    )
