"""DeepGEMM's FP8 kernels for Hopper: by its package where that is installed, else from prebuilt images.

A peer made here has its scales in the layout that the kernels take already, so that a call is one launch in both ways.
Facts behind the images: github.com/deepseek-ai/DeepGEMM, csrc/jit_kernels/impls/sm90_fp8_gemm_1d2d.hpp and _1d1d.hpp
(parameters, tensor maps), csrc/apis/gemm.hpp (what a call launches). `kernel` in a manifest is the library's function;
`block` is M, N, K of its tile; `sizes` holds what is compiled in (N, K, G, SMs; for grouped weight gradients M, N, G,
SMs) and the M that its library chooses this tile for. Each is a persistent kernel with a CTA per SM.

    1D2D  sfb, grouped_layout, m, n, k, maps of A, B, D, sfa
    1D1D  a, b, grouped_layout, map_buffer, m, n, k, maps of A, B, sfa, sfb, D
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import peers
from .cases import Call
from .launch import READ, READ_WRITE, WRITE, Buffer, multiprocessors, pointer, tensor_map, word
from .peers import Image

PEER = "deep_gemm"
BLOCK_K = 128  # scales are 1x128: every tile's depth, in bytes the swizzle's span too
ALIGNMENT = 128  # rows at which a group of the contiguous layout may start
STORE_ROWS = 64  # of D that the 1D1D kernel stores at a time
MAPS_PER_SM = 4  # the grouped 1D1D kernel rewrites maps of A and B for each group, in global memory


def installed() -> Any:
    """The package, or None."""
    try:
        return importlib.import_module(PEER)
    except ImportError:
        return None


def gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor) -> Call:
    """deep_gemm.fp8_gemm_nt: A [M, K], B [N, K], bfloat16 D."""
    if library := installed():
        return _with(out, lambda: library.fp8_gemm_nt((a, a_scale), (b, b_scale), out))
    (m, k), n = a.shape, b.shape[0]
    image = peers.find(PEER, "fp8_gemm_nt", M=m, N=n, K=k, SMs=multiprocessors(a.device))
    return _1d2d(image, a, a_scale, b, b_scale, out, None, groups=1)


def contiguous(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, out: Tensor) -> Call:
    """deep_gemm.m_grouped_fp8_gemm_nt_contiguous: rows of A in order of their groups, [G, N, K] weights."""
    if bool((offsets % ALIGNMENT).any()):
        raise ValueError(f"deep_gemm: groups start at multiples of {ALIGNMENT} rows, got offsets {offsets.tolist()}")
    place = torch.arange(len(a), device=a.device)
    group_of_row = (torch.searchsorted(offsets.long(), place, right=True) - 1).int()
    group_of_row[place >= offsets[-1]] = -1  # skipped
    if library := installed():
        call = library.m_grouped_fp8_gemm_nt_contiguous
        return _with(out, lambda: call((a, a_scale), (b, b_scale), out, group_of_row))
    groups, n, k = b.shape
    image = peers.find(
        PEER, "m_grouped_fp8_gemm_nt_contiguous", M=len(a), N=n, K=k, G=groups, SMs=multiprocessors(a.device)
    )
    return _1d2d(image, a, a_scale, b, b_scale, out, group_of_row, groups=1)


def masked(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out: Tensor, expected_m: int
) -> Call:
    """deep_gemm.m_grouped_fp8_gemm_nt_masked: A [G, Tmax, K], of which the first counts[g] rows count."""
    if library := installed():
        scale = a_scale.mT.contiguous().mT
        call = library.m_grouped_fp8_gemm_nt_masked
        return _with(out, lambda: call((a, scale), (b, b_scale), out, counts, expected_m))
    groups, n, k = b.shape
    image = peers.find(
        PEER, "m_grouped_fp8_gemm_nt_masked", M=expected_m, N=n, K=k, G=groups, SMs=multiprocessors(a.device)
    )
    return _1d2d(image, a, a_scale, b, b_scale, out, counts, groups=groups)


def accumulate(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor) -> Call:
    """deep_gemm.fp8_gemm_nt with 1x128 scales on both sides: added into a float32 D."""
    if library := installed():
        return _with(out, lambda: library.fp8_gemm_nt((a, a_scale), (b, b_scale), out, c=out, recipe=(1, 1, BLOCK_K)))
    (m, k), n = a.shape, b.shape[0]
    image = peers.find(PEER, "fp8_gemm_nt_accumulate", M=m, N=n, K=k, SMs=multiprocessors(a.device))
    buffers = [(a, READ), (b, READ)]
    maps = [_rows(t, size) for t, size in zip((a, b), _tile(image), strict=True)]
    return _1d1d(image, [b"\0" * 8] * 4, (m, n, k), maps, a_scale, b_scale, out, buffers)


def k_grouped(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, out: Tensor) -> Call:
    """deep_gemm.k_grouped_fp8_gemm_nt_contiguous: `A[:, group] @ B[:, group].T` added into float32 D [G, M, N].

    Its operands are a K-major matrix per group, one after the other: repacked here, outside of what is timed.
    """
    groups, m, n = out.shape
    ends = offsets.tolist()
    depths, used = [end - start for start, end in pairwise(ends)], ends[-1] // BLOCK_K
    if any(depth % BLOCK_K for depth in depths) or not used:
        raise ValueError(f"deep_gemm: groups of K are multiples of {BLOCK_K} and not all empty, got {depths}")
    library, sms = installed(), 0
    if not library:
        sms = multiprocessors(a.device)
        image = peers.find(PEER, "k_grouped_fp8_gemm_nt_contiguous", M=m, N=n, G=groups, SMs=sms)
    flat = [torch.cat([t[:, s:e].reshape(-1) for s, e in pairwise(ends)]) for t in (a, b)]
    counts = torch.tensor(depths, dtype=torch.int32, device=a.device)
    a_scale, b_scale = a_scale[:, :used], b_scale[:, :used]
    if library:
        operands = [(t, s.mT.contiguous().mT) for t, s in zip(flat, (a_scale, b_scale), strict=True)]
        call = library.k_grouped_fp8_gemm_nt_contiguous
        return _with(out, lambda: call(*operands, out, depths, counts, c=out))
    buffer = torch.empty(sms * MAPS_PER_SM * 128, dtype=torch.uint8, device=a.device)
    first = next(depth for depth in depths if depth)
    maps = [
        tensor_map(t, (first, size), (first,), (BLOCK_K, tile), swizzle=BLOCK_K)
        for t, size, tile in zip(flat, (m, n), _tile(image), strict=True)
    ]
    buffers = [(flat[0], READ), (flat[1], READ), (counts, READ), (buffer, READ_WRITE)]
    pointers = [pointer(t) for t in (*flat, counts, buffer)]
    return _1d1d(image, pointers, (m, n, ends[-1]), maps, a_scale, b_scale, out, buffers)


def _with(out: Tensor, call: Callable[[], Any]) -> Call:
    """The call, which writes `out`, as one that gives it."""

    def run() -> Tensor:
        call()
        return out

    return run


def _1d2d(
    image: Image,
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    out: Tensor,
    layout: Tensor | None,
    *,
    groups: int,
) -> Call:
    """Scales 1x128 of A and 128x128 of B; `groups` is that of A and D, whose rows then follow each other."""
    m, (n, k) = a.shape[-2], b.shape[-2:]
    image.check(N=n, K=k)
    block_m, block_n = _tile(image)
    scales = _mn_major(a_scale)
    swizzle = next(span for span in (128, 64, 32) if 2 * block_n % span == 0)
    maps = [
        _rows(a.view(-1, k), block_m),
        _rows(b.view(-1, k), block_n),
        tensor_map(out, (n, m * groups), (out.stride(-2),), (swizzle // 2, block_m), swizzle=swizzle),
        _scales(scales, block_m, groups),
    ]
    b_scale = b_scale.contiguous()
    parameters = [pointer(b_scale), pointer(layout), word(m), word(n), word(k), *maps]
    buffers = [(a, READ), (scales, READ), (b, READ), (b_scale, READ), (out, WRITE)]
    return _call(image, parameters, buffers + ([] if layout is None else [(layout, READ)]), out)


def _1d1d(
    image: Image,
    pointers: list[bytes],
    shape: tuple[int, int, int],
    maps: list[bytes],
    a_scale: Tensor,
    b_scale: Tensor,
    out: Tensor,
    buffers: list[Buffer],
) -> Call:
    """Scales 1x128 on both sides, D added to."""
    m, n, _ = shape
    image.check(M=m, N=n)
    block_m, block_n = _tile(image)
    sfa, sfb = _mn_major(a_scale), _mn_major(b_scale)
    d = tensor_map(out, (n, out.numel() // n), (out.stride(-2),), (block_n, min(block_m, STORE_ROWS)), swizzle=0)
    maps = [*maps, _scales(sfa, block_m, 1), _scales(sfb, block_n, 1), d]
    parameters = [*pointers, *map(word, shape), *maps]
    return _call(image, parameters, [*buffers, (sfa, READ), (sfb, READ), (out, READ_WRITE)], out)


def _tile(image: Image) -> tuple[int, int]:
    """M and N of the kernel's tile."""
    if len(image.block) != 3 or image.block[2] != BLOCK_K:
        raise ValueError(f"deep_gemm: image {image.path.name}: block is [M, N, {BLOCK_K}], got {list(image.block)}")
    return image.block[0], image.block[1]


def _call(image: Image, parameters: list[bytes], buffers: list[Buffer], out: Tensor) -> Call:
    kernel = image.load(out.device)
    grid = (multiprocessors(out.device), 1, 1)

    def call() -> Tensor:
        kernel.launch(grid, image.threads, parameters, buffers, early=image.early)
        return out

    return call


def _mn_major(scale: Tensor) -> Tensor:
    """Scales [..., M, K / 128] with M innermost, padded to 16 bytes (and the padding): no copy where they are so."""
    *batch, m, k = scale.shape
    padded = -(-m // 4) * 4
    wanted = [*([padded * k] * len(batch)), 1, padded]
    room = scale.untyped_storage().nbytes() // 4 - scale.storage_offset()
    if list(scale.stride()) != wanted or room < math.prod(batch) * k * padded:
        scale = scale.new_zeros(*batch, k, padded)[..., :m].mT.copy_(scale)
    return scale.as_strided((*batch, padded, k), wanted)


def _scales(scale: Tensor, block: int, groups: int) -> bytes:
    """Map of scales with M innermost: a box is one tile's, for one block of K."""
    rows, columns = scale.shape[-2:]
    return tensor_map(scale, (rows, columns * groups), (rows,), (block, 1), swizzle=0)


def _rows(codes: Tensor, block: int) -> bytes:
    """Map of a K-major matrix of codes: a box is one tile's rows of 128 codes."""
    rows, k = codes.shape
    return tensor_map(codes, (k, rows), (codes.stride(0),), (BLOCK_K, block), swizzle=BLOCK_K)
