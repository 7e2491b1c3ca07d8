"""Paged latent caches for the tests: slots that no token owns are NaN, unused table entries far out of range."""

from __future__ import annotations

import torch

NOWHERE = 2147480000
FP8 = torch.uint8


def encode(latent: torch.Tensor, k_rope: torch.Tensor, pow2_scale: bool = False) -> torch.Tensor:
    """Rows of the 656-byte format, block by block; each division is rounded once from float64 to float32."""
    codes = torch.empty(latent.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(latent.shape[0], 4, dtype=torch.float32)
    for b in range(4):
        tile = latent[:, 128 * b : 128 * b + 128].double()
        amax = tile.abs().amax(1)
        scale = (amax.clamp(min=float(torch.tensor(1e-4))) / 448).float()
        if pow2_scale:
            scale = torch.exp2(scale.double().log2().ceil()).float()
        scale[~amax.isfinite()] = torch.nan
        ratio = (tile / scale.double()[:, None]).float()
        ratio[~amax.isfinite()] = torch.nan
        codes[:, 128 * b : 128 * b + 128], scales[:, b] = ratio.to(torch.float8_e4m3fn), scale
    return torch.cat([t.view(torch.uint8) for t in (codes, scales, k_rope.bfloat16().contiguous())], 1)


def decode(rows: torch.Tensor) -> torch.Tensor:
    """Keys [n, 576] in float64 of 656-byte rows."""
    codes = rows[:, :512].contiguous().view(torch.float8_e4m3fn).double()
    scales = rows[:, 512:528].contiguous().view(torch.float32).double()
    rope = rows[:, 528:].contiguous().view(torch.bfloat16).double()
    return torch.cat([codes * scales.repeat_interleave(128, 1), rope], 1)


def empty(pages: int, page: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """A cache of NaN only (bytes 0xFF are NaN as codes, scales and bfloat16)."""
    if dtype == FP8:
        return torch.full((pages, page, 656), 0xFF, dtype=torch.uint8)
    return torch.full((pages, page, width), torch.nan, dtype=dtype)


def filled(lengths, page: int, dtype: torch.dtype, width: int = 576, latent: int = 512, pow2_scale: bool = False):
    """(cache, block table, lengths as a tensor, each request's keys in float64), pages in random order."""
    counts = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(counts) + 3)
    cache = empty(len(order), page, width, dtype)
    table = torch.full((len(lengths), max(counts, default=0) + 1), NOWHERE, dtype=torch.int32)
    keys, used = [], 0
    for b, n in enumerate(lengths):
        rows = torch.randn(n, width)
        rows[:, :latent] *= torch.exp(torch.randn(n, 1))  # magnitudes differ from token to token
        if dtype == FP8:
            stored = encode(rows[:, :512], rows[:, 512:], pow2_scale)
            keys.append(decode(stored))
        else:
            stored = rows.to(dtype)
            keys.append(stored.double())
        mine = order[used : used + counts[b]]
        used += counts[b]
        table[b, : counts[b]] = mine
        for i, at in enumerate(mine.tolist()):
            piece = stored[i * page : (i + 1) * page]
            cache[at, : len(piece)] = piece
    return cache, table, torch.tensor(lengths, dtype=torch.int32), keys
