"""mla_absorb in Triton: a program takes one tile of one head."""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton


def _tile(tokens: int, columns: int, depth: int, warps: int, stages: int) -> dict[str, int]:
    return {"BM": tokens, "BN": columns, "BK": depth, "num_warps": warps, "num_stages": stages}


# By tokens and bytes of a number. Few tokens: a program streams weights, and several of them share an SM. All of it
# follows from shared memory ((BM + BN) x BK a stage) and registers (BM x BN sums), and is unmeasured.
CONFIGS = _triton.Table(
    "mla_absorb",
    ({"bytes": 2, "tokens": 16}, _tile(16, 64, 128, 4, 3)),
    ({"bytes": 2, "tokens": 32}, _tile(32, 64, 64, 4, 4)),
    ({"bytes": 2, "tokens": 64}, _tile(64, 64, 64, 4, 4)),
    ({"bytes": 2, "sm": 89}, _tile(128, 64, 64, 8, 3)),
    ({"bytes": 2}, _tile(128, 128, 64, 8, 3)),
    ({"tokens": 16}, _tile(16, 32, 32, 4, 2)),
    ({}, _tile(64, 32, 32, 4, 2)),
    candidates=tuple(
        _tile(m, n, k, w, s)
        for m, n, w in ((16, 64, 4), (16, 128, 4), (32, 64, 4), (64, 64, 4), (64, 128, 8), (128, 64, 8), (128, 128, 8))
        for k in (64, 128)
        for s in (2, 3, 4)
    ),
)


@triton.jit(do_not_specialize=["tokens", "heads"])
def triton_mla_absorb(
    x, x_token, x_head, weight, w_head, w_column, w_depth, out, out_token, out_head, tokens, heads, N, K,
    PRECISION: tl.constexpr, WHOLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # Columns, then heads: programs that run side by side share x and write whole rows.
    tile, columns = tl.program_id(0), tl.cdiv(N, BN)
    head, first = tile // columns % heads, tile // columns // heads * BM
    n0 = tile % columns * BN
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    there, known = m < tokens - first, n < N - n0
    x += first.to(tl.int64) * x_token + head.to(tl.int64) * x_head
    weight += head.to(tl.int64) * w_head + n0.to(tl.int64) * w_column
    x_at = x + (m[:, None] * x_token + k[None, :])
    w_at = weight + (n[None, :] * w_column + k[:, None] * w_depth)
    total = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        x_there, w_there = there[:, None], known[None, :]
        if not WHOLE:
            left = k < K - k0
            x_there, w_there = x_there & left[None, :], w_there & left[:, None]
        a, b = tl.load(x_at, mask=x_there, other=0.0), tl.load(w_at, mask=w_there, other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        x_at += BK
        w_at += BK * w_depth
    out += first.to(tl.int64) * out_token + head.to(tl.int64) * out_head + n0
    at = out + (m[:, None] * out_token + n[None, :])
    tl.store(at, total.to(out.dtype.element_ty), mask=there[:, None] & known[None, :])


def mla_absorb_cannot(x: Tensor, weight: Tensor) -> str | None:
    if x.dtype is torch.float64:
        return "the Triton kernel does not take float64"
    return _triton.far(x.stride(0), *weight.stride()[1:])


def mla_absorb(x: Tensor, weight: Tensor, out: Tensor) -> None:
    if why := _triton.far(out.stride(0)):
        raise RuntimeError(f"mla_absorb: out: Triton {why}")
    (tokens, heads, depth), columns = x.shape, weight.shape[1]
    config = CONFIGS(x, tokens=tokens, bytes=x.element_size())
    tiles = _triton.cdiv(columns, config["BN"]) * _triton.cdiv(tokens, config["BM"]) * heads
    _triton.launch(
        triton_mla_absorb,
        (tiles,),
        x,
        *x.stride()[:2],
        weight,
        *weight.stride(),
        out,
        *out.stride()[:2],
        tokens,
        heads,
        columns,
        depth,
        "tf32x3" if x.dtype is torch.float32 else "tf32",
        depth % config["BK"] == 0,
        **config,
    )
