"""What tests of the decode kernels share: queries, caches, what is right and how far off a kernel may be, cases."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from latent_cache import NOWHERE, decode, empty
from torch import Tensor

SCALE = 0.1352338
LENGTHS = {str(n): [n] for n in (0, 1, 63, 64, 65, 129, 300)} | {"mixed": [1, 2000]}


def queries(requests: int, count: int, heads: int, factor: float = 0.2) -> Tensor:
    return (torch.randn(requests, count, heads, 576) * factor).bfloat16()


def attention(q: Tensor, keys: Tensor, count: int, causal: bool, scale: float, exact: bool) -> tuple[Tensor, Tensor]:
    """One request `[Sq, H, 576]` x `[n, 576]`: in float64, or as kernels form it (`exact=False`): scores in float32,
    weights not normalised and rounded to bfloat16, sums in float32."""
    real = torch.float64 if exact else torch.float32
    out, lse = torch.zeros(count, q.shape[1], 512, dtype=real), torch.full((count, q.shape[1]), -torch.inf, dtype=real)
    for i in range(count):
        seen = keys[: max(len(keys) - (count - 1 - i), 0) if causal else len(keys)].to(real)
        if len(seen) == 0:
            continue
        s = q[i].to(real) @ seen.T * scale
        top = s.amax(1, keepdim=True)
        p = (s - top).exp()
        total = p.sum(1, keepdim=True)
        lse[i] = (top + total.log())[:, 0]
        out[i] = (p if exact else p.bfloat16().float()) @ seen[:, :512] / total
    return (out, lse) if exact else (out.bfloat16().double(), lse)


def check(got: tuple[Tensor, Tensor], q: Tensor, keys: list[Tensor], causal: bool = True, scale: float = SCALE) -> None:
    """No more than twice the error of `attention(exact=False)`, request by request, and the log-sum-exp to 1e-5."""
    count = q.shape[1]
    for b, rows in enumerate(keys):
        wanted, lse = attention(q[b], rows, count, causal, scale, True)
        close_by, _ = attention(q[b], rows, count, causal, scale, False)
        out = got[0][b].double()
        allowed = 2 * (close_by - wanted).abs().max() + 1e-30
        assert out.isfinite().all(), f"request {b}: not finite"
        off = (out - wanted).abs().max()
        assert off <= allowed, f"request {b}: off by {off:.3g}, allowed {allowed:.3g}"
        assert torch.equal(got[1][b].isneginf(), lse.isneginf()), f"request {b}: rows without keys"
        some = ~lse.isneginf()
        assert (out[~some] == 0).all()
        lse_off = (got[1][b].double() - lse)[some].abs() - 1e-5 * lse[some].abs().clamp(min=1)
        assert (lse_off <= 0).all(), f"request {b}: log-sum-exp"


def as_read(keys: list[Tensor], cache: Tensor, table: Tensor, lengths: Tensor) -> list[Tensor]:
    """An FP8 cache's keys as the kernel has them: bf16(code * bf16(scale))."""
    rows = []
    for b, n in enumerate(lengths.tolist()):
        mine = cache[table[b, : -(-n // cache.shape[1])].long()].flatten(0, 1)[:n]
        codes = mine[:, :512].contiguous().view(torch.float8_e4m3fn).float()
        scales = mine[:, 512:528].contiguous().view(torch.float32).bfloat16().float()
        latent = (codes * scales.repeat_interleave(128, 1)).bfloat16().double()
        rows.append(torch.cat([latent, decode(mine)[:, 512:]], 1))
    return rows


def cache_of(rows: Tensor, page: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """One request whose cache rows are these."""
    pages = -(-len(rows) // page)
    cache = empty(pages, page, rows.shape[1], rows.dtype)
    cache.view(pages * page, -1)[: len(rows)] = rows
    table = torch.cat([torch.arange(pages), torch.tensor([NOWHERE])]).int()[None]
    return cache, table, torch.tensor([len(rows)], dtype=torch.int32)


def hostile(kind: str) -> tuple[Tensor, Tensor]:
    q, rows = torch.randn(1, 2, 3, 576) * 0.2, torch.randn(200, 576)
    if kind == "large":
        q = q * 50
    elif kind == "dominating":
        rows[77] = q[0, 0, 0] * 200
    elif kind == "late":  # the maximum grows with every tile
        rows = rows + torch.arange(200)[:, None] / 20 * q[0, 0, 0]
    elif kind == "equal":
        q = q * 0
    elif kind == "same":
        rows = rows[:1].expand(200, -1)
    return q.bfloat16(), rows.bfloat16()


def pairwise(axes: Sequence[Sequence[Any]], cost: Callable[[list[Any]], float]) -> list[list[Any]]:
    """Every pair of values of any two parameters stands in some case: greedily, the most new pairs first, the cheaper
    of equals."""
    wanted = {
        ((i, a), (j, b)) for i, j in itertools.combinations(range(len(axes)), 2) for a in axes[i] for b in axes[j]
    }
    order = torch.Generator().manual_seed(7)
    found = []
    while wanted:
        best, gain = [], (0, 0.0)
        for _ in range(60):
            first = next(iter(sorted(wanted, key=str)))
            values = [axis[int(torch.randint(len(axis), (), generator=order))] for axis in axes]
            for i, value in first:
                values[i] = value
            pairs = {((i, values[i]), (j, values[j])) for i, j in itertools.combinations(range(len(axes)), 2)}
            if (len(pairs & wanted), -cost(values)) > gain:
                best, gain = values, (len(pairs & wanted), -cost(values))
        found.append(best)
        wanted -= {((i, best[i]), (j, best[j])) for i, j in itertools.combinations(range(len(axes)), 2)}
    return found
