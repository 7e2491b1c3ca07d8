"""FlashMLA's dense bfloat16 decode for Hopper: by its package where that is installed, else from prebuilt images.

A call is all that its library launches, three kernels. Facts behind the images: github.com/deepseek-ai/FlashMLA,
csrc/params.h (the structs below), csrc/api/dense_decode.h (their values, the order),
csrc/sm90/decode/dense/splitkv_mla.cuh (tensor maps, grid). `kernel` in a manifest: "get_mla_metadata" cuts the requests
into one part per SM and 64 rows of queries, "splitkv_mla" does the parts, "combine" joins what was cut; its `sizes` say
up to how many parts ("splits") it is compiled for.
"""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

from . import peers
from .cases import Call
from .launch import READ, READ_WRITE, WRITE, multiprocessors, tensor_map

PEER = "flash_mla"
ROWS, PAGE, WIDTH, VALUES = 64, 64, 576, 512  # queries of a CTA, keys of a page, elements of a key and of a value
OVERHEAD = 5  # pages that a part costs besides its own
META = 8  # int32 that say what a part is
COMBINE_HEADS = 8
SPLITS = (32, 64, 96, 128, 160)  # what "combine" is compiled for

# GetDecodeSchedMetaParams: 6 int; 5 pointers (topk_length, extra_topk_length, seqlens, metadata, num_splits); int;
# stream
PLAN = "<6i5Qi4xQ"
# DenseAttnDecodeParams: 9 int; is_causal; 2 float; 4 pointers (q, k, o, lse); 9 strides of q, k, o (batch, row, head);
# table and its stride; page; seqlens; metadata; parts; num_splits; total_num_splits; lse and o of parts; stream
DECODE = "<9i?3x2f4Q9qQqi4xQQi4xQi4x3Q"
# CombineParams: 4 int; lse, o, their 5 strides; those of parts; metadata, num_splits, parts; attn_sink; stream
COMBINE = "<4i2Q5i4x2Q5i4x2Qi4x2Q"
# TmaParams: shape and map of q, k and o, each at a multiple of 128 bytes; a map's CuTe copy takes 256
MAPS = "<4i112x128s128x2i120x128s128x4i112x128s128x"
assert (struct.calcsize(PLAN), struct.calcsize(DECODE)) == (80, 240), "csrc/params.h"
assert (struct.calcsize(COMBINE), struct.calcsize(MAPS)) == (136, 1152), "csrc/params.h, traits.h"


def decode(q: Tensor, cache: Tensor, table: Tensor, seqlens: Tensor, softmax_scale: float) -> Call:
    """flash_mla.get_mla_metadata and flash_mla_with_kvcache(causal=True): q [B, Sq, H, 576], cache [pages, 64, 576]."""
    b, queries, heads, _ = q.shape
    rows = queries * heads
    try:
        return _installed(q, cache, table, seqlens, softmax_scale)
    except ImportError:
        pass
    if cache.dtype is not torch.bfloat16 or cache.shape[1:] != (PAGE, WIDTH):
        raise ValueError(f"flash_mla: a bfloat16 cache of pages [{PAGE}, {WIDTH}], got {cache.dtype} {cache.shape}")
    sms = multiprocessors(q.device)
    parts = max(sms // -(-rows // ROWS), 1)
    wanted = next((most for most in SPLITS if parts <= most), 0)
    found = [peers.find(PEER, name) for name in ("get_mla_metadata", "splitkv_mla")]
    found.append(peers.find(PEER, "combine", splits=wanted))
    plan, mla, combine = (image.load(q.device) for image in found)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    out, lse = new(b, queries, heads, VALUES, dtype=q.dtype), new(b, queries, heads)
    metadata, splits = new(parts, META, dtype=torch.int32), new(b + 1, dtype=torch.int32)
    part_out, part_lse = new(b + parts, rows, VALUES), new(b + parts, rows)
    address = torch.Tensor.data_ptr

    plan_params = struct.pack(
        PLAN, b, queries, PAGE, OVERHEAD, -1, -1, 0, 0, address(seqlens), address(metadata), address(splits), parts, 0
    )
    causal = queries > 1
    mla_params = struct.pack(
        DECODE,
        *(b, queries, rows, WIDTH, VALUES, heads, 1, len(cache), heads),
        causal,
        *(softmax_scale, softmax_scale * math.log2(math.e)),
        *map(address, (q, cache, out, lse)),
        *(rows * WIDTH, PAGE * WIDTH, rows * VALUES),
        *(WIDTH, WIDTH, VALUES),
        *(WIDTH, WIDTH, rows * VALUES),
        *(address(table), table.stride(0), PAGE),
        *(address(seqlens), address(metadata), parts, address(splits), b + parts),
        *(address(part_lse), address(part_out), 0),
    )
    maps = struct.pack(
        MAPS,
        *(rows, WIDTH, 1, b),
        _map(q, (WIDTH, rows, 1, b)),
        *(1, len(cache)),
        _map(cache, (WIDTH, PAGE, 1, len(cache))),
        *(rows, VALUES, 1, b),
        _map(out, (VALUES, rows, 1, b)),
    )
    strides = rows, heads, rows * VALUES, heads * VALUES, VALUES
    combine_params = struct.pack(
        COMBINE,
        *(b, queries, heads, VALUES),
        *(address(lse), address(out), *strides),
        *(address(part_lse), address(part_out), *strides),
        *(address(metadata), address(splits), parts, 0, 0),
    )
    inputs = [(q, READ), (cache, READ), (table, READ), (seqlens, READ)]
    planned = [(metadata, READ), (splits, READ)]
    results = [(out, WRITE), (lse, WRITE)]
    launches = (
        (plan, (1, 1, 1), [plan_params], [inputs[3], (metadata, WRITE), (splits, WRITE)], 4 * (5 * b + 1)),
        (
            mla,
            (-(-rows // ROWS), 1, parts),
            [mla_params, maps],
            [*inputs, *planned, *results, (part_out, WRITE), (part_lse, WRITE)],
            None,
        ),
        (
            combine,
            (b * queries, 1, -(-heads // COMBINE_HEADS)),
            [combine_params],
            [*planned, (part_out, READ), (part_lse, READ), (out, READ_WRITE), (lse, READ_WRITE)],
            0,
        ),
    )

    def call() -> tuple[Tensor, Tensor]:
        for image, (kernel, grid, parameters, buffers, shared) in zip(found, launches, strict=True):
            kernel.launch(grid, image.threads, parameters, buffers, shared_bytes=shared, early=image.early)
        return out, lse

    return call


def _installed(q: Tensor, cache: Tensor, table: Tensor, seqlens: Tensor, softmax_scale: float) -> Call:
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata

    def call() -> tuple[Tensor, Tensor]:
        metadata, splits = get_mla_metadata(seqlens, q.shape[1] * q.shape[2], 1)
        out, lse = flash_mla_with_kvcache(
            *(q, cache[:, :, None], table, seqlens, VALUES, metadata, splits),
            softmax_scale=softmax_scale,
            causal=True,
        )
        return out, lse.mT

    return call


def _map(tensor: Tensor, dims: tuple[int, ...]) -> bytes:
    """[batch or page, 1, rows, elements], innermost first in `dims`: boxes of 64 rows of 128 bytes."""
    width, rows = dims[:2]
    strides = (width, rows * width, rows * width)
    return tensor_map(tensor, dims, strides, (64, ROWS, 1, 1), swizzle=128, promotion=128)
