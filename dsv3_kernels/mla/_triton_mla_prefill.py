"""mla_prefill in Triton, forward and backward: a head's key is its own part and a rotary part that all share, 128
and 64 columns in DeepSeek-V3.

A program has a tile of the queries or keys of one sequence and head, and walks over the other side; the bounds of the
sequences stay on the device. The backward pass forms the weights anew from the log-sum-exp, twice: once for the
queries' gradient, once for the keys' and values'. It has no atomics; the rotary key's gradient is summed over the heads
in their order by a kernel of its own.
"""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .._triton_segments import segment_of, tiles

LOG2E = 1.4426950408889634
WIDTHS = (16, 32, 64, 128), (16, 32, 64), (16, 32, 64, 128)  # of a head's key, the shared rotary key, a value
LN2 = tl.constexpr(0.6931471805599453)
RUNTIME = ["cu_q", "cu_k", "lse", "row_sums", "parts", "scale", "causal", "T", "S", "H", "B"]


def _tile(queries: int, keys: int, warps: int, stages: int) -> dict[str, int]:
    return {"BM": queries, "BN": keys, "num_warps": warps, "num_stages": stages}


# BM queries x BN keys. Shared memory holds the program's own tile and num_stages (sm_80, sm_89: one less) of the other
# side's, 40 or 80 KB each at 64 rows; the float32 sums are in registers. 163 KB on sm_80, 99 KB on sm_89 (and sm_86),
# 227 KB on sm_90. All of it follows from that and is unmeasured.
FORWARD = _triton.Table(
    "mla_prefill",
    ({"sm": 80}, _tile(128, 64, 8, 3)),
    ({"sm": 89}, _tile(64, 32, 4, 2)),
    ({}, _tile(128, 64, 8, 3)),
    candidates=tuple(_tile(m, n, w, s) for m in (64, 128) for n in (32, 64, 128) for w in (4, 8) for s in (2, 3)),
)
QUERIES = _triton.Table(
    "mla_prefill_backward_queries",
    ({"sm": 89}, _tile(64, 32, 8, 2)),
    ({}, _tile(64, 64, 8, 2)),
    candidates=tuple(_tile(m, n, w, s) for m in (64, 128) for n in (32, 64) for w in (4, 8) for s in (1, 2, 3)),
)
KEYS = _triton.Table(
    "mla_prefill_backward_keys",
    ({"sm": 89, "nope": 64}, _tile(32, 32, 8, 2)),
    ({"sm": 89}, _tile(64, 32, 8, 2)),
    ({}, _tile(32, 64, 8, 2)),
    candidates=tuple(_tile(m, n, w, s) for m in (32, 64) for n in (32, 64, 128) for w in (4, 8) for s in (1, 2, 3)),
)


@triton.jit
def _span(bounds, count, sequence):
    """First row and number of rows of a sequence; none before the first and after the last."""
    first = tl.load(bounds + tl.minimum(tl.maximum(sequence, 0), count))
    end = tl.load(bounds + tl.minimum(tl.maximum(sequence + 1, 0), count))
    return first, end - first


@triton.jit
def _rows(pointer, first, stride, n, width: tl.constexpr, inside):
    """Rows first + n of a matrix of `width` columns; zeros where not `inside`."""
    at = (n * stride)[:, None] + tl.arange(0, width)[None, :]
    return tl.load(pointer + first.to(tl.int64) * stride + at, mask=inside[:, None], other=0.0)


@triton.jit
def _scores(x, x_rotary, y, y_rotary):
    """x y^T over both parts."""
    return tl.dot(x_rotary, tl.trans(y_rotary), tl.dot(x, tl.trans(y)))


@triton.jit
def _weights_and_gradient(x, x_rotary, x_value, y, y_rotary, y_value, seen, top, row_sum, scale):
    """(P, dS) of a block, or transposed with keys as x: of the values and dO one is x_value, the other y_value."""
    s = _scores(x, x_rotary, y, y_rotary) * (scale / LN2) - top
    p = tl.where(seen, tl.exp2(s), 0.0)
    return p, (p * (tl.dot(x_value, tl.trans(y_value)) - row_sum)).to(y.dtype)


@triton.jit(do_not_specialize=RUNTIME)
def triton_mla_prefill(
    q,
    q_row,
    q_head,
    k_nope,
    k_nope_row,
    k_nope_head,
    k_rope,
    k_rope_row,
    v,
    v_row,
    v_head,
    cu_q,
    cu_k,
    out,
    lse,
    scale,
    causal,
    T,
    H,
    B,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """`scale` is that of scores to the base 2."""
    row_tiles = T // BM + B + 2
    tile, head = row_tiles - 1 - tl.program_id(0) % row_tiles, (tl.program_id(0) // row_tiles).to(tl.int64)
    sequence, first, end = segment_of(cu_q, B, T, tile, BM)  # the last tiles of a sequence see the most keys: first
    if first >= end:
        return
    query0, queries = _span(cu_q, B, sequence)
    key0, keys = _span(cu_k, B, sequence)
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    inside = m < end - first
    # A row sees the keys before its limit.
    limit = tl.minimum(keys, tl.where(causal != 0, keys - queries + first - query0 + 1 + m, keys))
    last = tl.max(tl.where(inside, limit, 0), 0)
    x = _rows(q + head * q_head, first, q_row, m, NOPE, inside)
    x_rotary = _rows(q + head * q_head + NOPE, first, q_row, m, ROPE, inside)
    top = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    mean = tl.zeros((BM, VALUE), tl.float32)
    for start in range(0, last, BN):
        seen = start + n < last
        y = _rows(k_nope + head * k_nope_head, key0 + start, k_nope_row, n, NOPE, seen)
        y_rotary = _rows(k_rope, key0 + start, k_rope_row, n, ROPE, seen)
        s = _scores(x, x_rotary, y, y_rotary)
        s = tl.where((start + n)[None, :] < limit[:, None], s * scale, -float("inf"))
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new == -float("inf"), 0.0, new)
        p, shrink = tl.exp2(s - base[:, None]), tl.exp2(top - base)
        top, total = new, total * shrink + tl.sum(p, 1)
        z = _rows(v + head * v_head, key0 + start, v_row, n, VALUE, seen)
        mean = tl.dot(p.to(z.dtype), z, mean * shrink[:, None])
    mean /= tl.where(total == 0, 1.0, total)[:, None]
    out += (first.to(tl.int64) * H + head) * VALUE
    tl.store(
        out + (m * (H * VALUE))[:, None] + tl.arange(0, VALUE)[None, :],
        mean.to(out.dtype.element_ty),
        mask=inside[:, None],
    )
    tl.store(lse + (first.to(tl.int64) * H + head) + m * H, (top + tl.log2(total)) * LN2, mask=inside)


@triton.jit(do_not_specialize=RUNTIME)
def triton_mla_prefill_backward_row_sums(grad, out, row_sums, T, VALUE: tl.constexpr, ROWS: tl.constexpr):
    """rowsum(dO * O) of T rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * VALUE + tl.arange(0, VALUE)[None, :]
    x = tl.load(grad + at, mask=(row < T)[:, None], other=0.0).to(tl.float32)
    y = tl.load(out + at, mask=(row < T)[:, None], other=0.0).to(tl.float32)
    tl.store(row_sums + row, tl.sum(x * y, 1), mask=row < T)


@triton.jit(do_not_specialize=RUNTIME)
def triton_mla_prefill_backward_queries(
    grad,
    q,
    q_row,
    q_head,
    k_nope,
    k_nope_row,
    k_nope_head,
    k_rope,
    k_rope_row,
    v,
    v_row,
    v_head,
    cu_q,
    cu_k,
    lse,
    row_sums,
    grad_q,
    scale,
    causal,
    T,
    H,
    B,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dS = P * (dO V^T - rowsum(dO * O)), dQ = dS K. `scale` is that of the scores in base e."""
    row_tiles = T // BM + B + 2
    tile, head = row_tiles - 1 - tl.program_id(0) % row_tiles, (tl.program_id(0) // row_tiles).to(tl.int64)
    sequence, first, end = segment_of(cu_q, B, T, tile, BM)
    if first >= end:
        return
    query0, queries = _span(cu_q, B, sequence)
    key0, keys = _span(cu_k, B, sequence)
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    inside = m < end - first
    limit = tl.minimum(keys, tl.where(causal != 0, keys - queries + first - query0 + 1 + m, keys))
    last = tl.max(tl.where(inside, limit, 0), 0)
    x = _rows(q + head * q_head, first, q_row, m, NOPE, inside)
    x_rotary = _rows(q + head * q_head + NOPE, first, q_row, m, ROPE, inside)
    g = _rows(grad + head * VALUE, first, H * VALUE, m, VALUE, inside)
    at = first.to(tl.int64) * H + head
    top = tl.load(lse + at + m * H, mask=inside, other=0.0) / LN2  # never read where a row sees no key
    row_sum = tl.load(row_sums + at + m * H, mask=inside, other=0.0)
    total = tl.zeros((BM, NOPE), tl.float32)
    total_rotary = tl.zeros((BM, ROPE), tl.float32)
    for start in range(0, last, BN):
        seen = start + n < last
        y = _rows(k_nope + head * k_nope_head, key0 + start, k_nope_row, n, NOPE, seen)
        y_rotary = _rows(k_rope, key0 + start, k_rope_row, n, ROPE, seen)
        z = _rows(v + head * v_head, key0 + start, v_row, n, VALUE, seen)
        sees = (start + n)[None, :] < limit[:, None]
        _, ds = _weights_and_gradient(x, x_rotary, g, y, y_rotary, z, sees, top[:, None], row_sum[:, None], scale)
        total = tl.dot(ds, y, total)
        total_rotary = tl.dot(ds, y_rotary, total_rotary)
    at = (m * (H * (NOPE + ROPE)))[:, None] + tl.arange(0, NOPE)[None, :]
    at_rotary = (m * (H * (NOPE + ROPE)))[:, None] + tl.arange(0, ROPE)[None, :]
    grad_q += (first.to(tl.int64) * H + head) * (NOPE + ROPE)
    tl.store(grad_q + at, (total * scale).to(grad_q.dtype.element_ty), mask=inside[:, None])
    tl.store(grad_q + NOPE + at_rotary, (total_rotary * scale).to(grad_q.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=RUNTIME)
def triton_mla_prefill_backward_keys(
    grad,
    q,
    q_row,
    q_head,
    k_nope,
    k_nope_row,
    k_nope_head,
    k_rope,
    k_rope_row,
    v,
    v_row,
    v_head,
    cu_q,
    cu_k,
    lse,
    row_sums,
    grad_k_nope,
    grad_v,
    parts,
    scale,
    causal,
    S,
    H,
    B,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dV = P^T dO, dK = dS^T Q; of the rotary key the head's part, float32, in parts [S, H, ROPE]."""
    row_tiles = S // BN + B + 2
    tile, head = tl.program_id(0) % row_tiles, (tl.program_id(0) // row_tiles).to(tl.int64)
    sequence, first, end = segment_of(cu_k, B, S, tile, BN)  # the first tiles of a sequence are seen by most queries
    if first >= end:
        return
    query0, queries = _span(cu_q, B, sequence)
    key0, keys = _span(cu_k, B, sequence)
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    inside = n < end - first
    nearest = tl.where(causal != 0, first - key0 + n - (keys - queries), 0)  # the first query that sees a key
    y = _rows(k_nope + head * k_nope_head, first, k_nope_row, n, NOPE, inside)
    y_rotary = _rows(k_rope, first, k_rope_row, n, ROPE, inside)
    z = _rows(v + head * v_head, first, v_row, n, VALUE, inside)
    total = tl.zeros((BN, NOPE), tl.float32)
    total_rotary = tl.zeros((BN, ROPE), tl.float32)
    total_v = tl.zeros((BN, VALUE), tl.float32)
    for start in range(tl.maximum(tl.min(nearest, 0), 0), queries, BM):
        sees = start + m < queries
        x = _rows(q + head * q_head, query0 + start, q_row, m, NOPE, sees)
        x_rotary = _rows(q + head * q_head + NOPE, query0 + start, q_row, m, ROPE, sees)
        g = _rows(grad + head * VALUE, query0 + start, H * VALUE, m, VALUE, sees)
        at = (query0 + start).to(tl.int64) * H + head
        top = tl.load(lse + at + m * H, mask=sees, other=0.0) / LN2
        row_sum = tl.load(row_sums + at + m * H, mask=sees, other=0.0)
        seen = (start + m)[None, :] >= nearest[:, None]  # past the last query x and g are 0
        p, ds = _weights_and_gradient(y, y_rotary, z, x, x_rotary, g, seen, top[None, :], row_sum[None, :], scale)
        total_v = tl.dot(p.to(g.dtype), g, total_v)
        total = tl.dot(ds, x, total)
        total_rotary = tl.dot(ds, x_rotary, total_rotary)
    row = first.to(tl.int64) * H + head
    at = (n * (H * NOPE))[:, None] + tl.arange(0, NOPE)[None, :]
    at_v = (n * (H * VALUE))[:, None] + tl.arange(0, VALUE)[None, :]
    at_rotary = (n * (H * ROPE))[:, None] + tl.arange(0, ROPE)[None, :]
    tl.store(grad_k_nope + row * NOPE + at, (total * scale).to(grad_k_nope.dtype.element_ty), mask=inside[:, None])
    tl.store(grad_v + row * VALUE + at_v, total_v.to(grad_v.dtype.element_ty), mask=inside[:, None])
    tl.store(parts + row * ROPE + at_rotary, total_rotary * scale, mask=inside[:, None])


@triton.jit(do_not_specialize=RUNTIME)
def triton_mla_prefill_backward_join(parts, grad_k_rope, S, H, ROPE: tl.constexpr, ROWS: tl.constexpr):
    """The rotary key's gradient: its parts, head by head."""
    row, d = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, ROPE)
    inside = (row < S)[:, None]
    total = tl.zeros((ROWS, ROPE), tl.float32)
    for head in range(H):
        total += tl.load(parts + ((row * H + head) * ROPE)[:, None] + d[None, :], mask=inside, other=0.0)
    tl.store(grad_k_rope + row[:, None] * ROPE + d[None, :], total.to(grad_k_rope.dtype.element_ty), mask=inside)


def mla_prefill_cannot(q: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor, *_: Any) -> str | None:
    widths = _widths(k_nope, k_rope, v)
    if any(width not in allowed for width, allowed in zip(widths, WIDTHS, strict=True)):
        return f"takes widths of 16, 32, 64 and (not rotary) 128, got {widths[0]}, {widths[1]} and {widths[2]}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, got {q.dtype}"
    return _triton.far(q.stride(0), k_nope.stride(0), k_rope.stride(0), v.stride(0))


def mla_prefill(
    q: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    causal: bool,
    out: Tensor,
    lse: Tensor,
) -> None:
    (rows, heads), sequences = lse.shape, cu_q.shape[0] - 1
    config = FORWARD(q)
    grid = (tiles(rows, sequences, config["BM"]) * heads if rows else 0,)
    operands = *_operands(q, k_nope, k_rope, v), cu_q, cu_k
    sizes = scale * LOG2E, int(causal), rows, heads, sequences
    _triton.launch(triton_mla_prefill, grid, *operands, out, lse, *sizes, *_widths(k_nope, k_rope, v), **config)


def _operands(q: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor) -> tuple[Any, ...]:
    """Each with its strides of rows and heads."""
    return q, *q.stride()[:2], k_nope, *k_nope.stride()[:2], k_rope, k_rope.stride(0), v, *v.stride()[:2]


def _widths(k_nope: Tensor, k_rope: Tensor, v: Tensor) -> tuple[int, int, int]:
    return k_nope.shape[2], k_rope.shape[1], v.shape[2]


def mla_prefill_backward_cannot(grad_out: Tensor, *rest: Any) -> str | None:
    return mla_prefill_cannot(*rest)


def mla_prefill_backward(
    grad_out: Tensor,
    q: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    causal: bool,
    grad_q: Tensor,
    grad_k_nope: Tensor,
    grad_k_rope: Tensor,
    grad_v: Tensor,
) -> None:
    (rows, heads), keys, sequences = lse.shape, k_rope.shape[0], cu_q.shape[0] - 1
    operands = grad_out, *_operands(q, k_nope, k_rope, v), cu_q, cu_k, lse
    row_sums, widths = torch.empty_like(lse), _widths(k_nope, k_rope, v)
    grid = (_triton.cdiv(rows * heads, 32),)
    _triton.launch(
        triton_mla_prefill_backward_row_sums, grid, grad_out, out, row_sums, rows * heads, widths[2], 32, num_warps=4
    )
    config = QUERIES(q)
    grid = (tiles(rows, sequences, config["BM"]) * heads if rows else 0,)
    sizes = scale, int(causal), rows, heads, sequences
    _triton.launch(triton_mla_prefill_backward_queries, grid, *operands, row_sums, grad_q, *sizes, *widths, **config)
    config = KEYS(q, nope=widths[0])
    grid = (tiles(keys, sequences, config["BN"]) * heads if keys else 0,)
    sizes = scale, int(causal), keys, heads, sequences
    parts = q.new_empty(keys, heads, widths[1], dtype=torch.float32)
    grads = grad_k_nope, grad_v, parts
    _triton.launch(triton_mla_prefill_backward_keys, grid, *operands, row_sums, *grads, *sizes, *widths, **config)
    grid = (_triton.cdiv(keys, 16),)
    _triton.launch(triton_mla_prefill_backward_join, grid, parts, grad_k_rope, keys, heads, widths[1], 16, num_warps=4)
