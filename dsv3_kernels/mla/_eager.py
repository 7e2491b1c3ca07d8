"""The mla family in plain PyTorch: the definition of what is right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .._eager import wide
from ..quant._eager import quantize_1x128, rms_norm
from ._cache import LATENT, ROPE, SCALES
from .mla_decode_plan import FIXED_KEYS, FIXED_SPLITS, KEY_BLOCK, items


def rope(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool, transposed: bool) -> Tensor:
    cos, sin = cos_sin[positions.long()].chunk(2, -1)
    pairs = x.shape[-1] // 2
    broadcast = (*positions.shape, *(1,) * (x.dim() - 1 - positions.dim()), pairs)
    cos, sin = cos.reshape(broadcast), (-sin if transposed else sin).reshape(broadcast)
    real = x.to(wide(x.dtype))
    a, b = real.unflatten(-1, (pairs, 2)).unbind(-1) if interleaved else real.chunk(2, -1)
    pair = (a * cos - b * sin, a * sin + b * cos)
    rotated = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return rotated.to(x.dtype)


# Attention of expanded heads. Neighbouring sequences of equal lengths are one batch, and queries are taken in blocks of
# this many: it bounds the memory of the scores, and lets causal blocks skip the keys that none of their queries sees.
QUERY_BLOCK = 128


@dataclass(frozen=True)
class Run:
    """Neighbouring sequences of equal lengths: `count` of them, and the rows that they own."""

    count: int
    queries: int  # per sequence
    keys: int
    query_rows: slice
    key_rows: slice

    def blocks(self, causal: bool) -> Iterator[tuple[slice, int, int]]:
        """Blocks of queries: (queries, keys that some of them see, keys that the first sees, negative where none)."""
        for start in range(0, self.queries, QUERY_BLOCK):
            stop, shift = min(start + QUERY_BLOCK, self.queries), self.keys - self.queries
            last, first = (shift + stop, shift + start + 1) if causal else (self.keys, self.keys)
            if last > 0:
                yield slice(start, stop), last, first


def _runs(op: str, cu_q: Tensor, cu_k: Tensor, queries: int, keys: int) -> Iterator[Run]:
    """The sequences that have both queries and keys."""
    bounds_q, bounds_k = cu_q.tolist(), cu_k.tolist()
    for name, bounds, rows in (("cu_seqlens_q", bounds_q, queries), ("cu_seqlens_k", bounds_k, keys)):
        if bounds[0] < 0 or bounds[-1] > rows or any(a > b for a, b in pairwise(bounds)):
            raise ValueError(f"{op}: {name}: got {bounds[:8]}, wanted non-decreasing values in [0, {rows}]")
    lengths = [(q1 - q0, k1 - k0) for (q0, q1), (k0, k1) in zip(pairwise(bounds_q), pairwise(bounds_k), strict=True)]
    q0, k0 = bounds_q[0], bounds_k[0]
    for (length_q, length_k), group in groupby(lengths):
        count = len(list(group))
        q1, k1 = q0 + count * length_q, k0 + count * length_k
        if length_q and length_k:
            yield Run(count, length_q, length_k, slice(q0, q1), slice(k0, k1))
        q0, k0 = q1, k1


def _heads(rows: Tensor, count: int) -> Tensor:
    """Rows `[count * L, H, D]` of `count` sequences -> `[count * H, L, D]` in the dtype of sums."""
    batched = rows.unflatten(0, (count, rows.shape[0] // count)).transpose(1, 2)
    return batched.to(wide(rows.dtype), memory_format=torch.contiguous_format).flatten(0, 1)


def _key_heads(run: Run, k_nope: Tensor, k_rope: Tensor) -> Tensor:
    """Keys `[count * H, keys, nope + rope]`: each head's own part beside the shared one."""
    rows, (_, heads, nope), rope = run.key_rows, k_nope.shape, k_rope.shape[1]
    k = k_nope.new_empty(run.count, heads, run.keys, nope + rope, dtype=wide(k_nope.dtype))
    k[..., :nope] = k_nope[rows].unflatten(0, (run.count, run.keys)).transpose(1, 2)
    k[..., nope:] = k_rope[rows].view(run.count, 1, run.keys, rope)
    return k.flatten(0, 1)


def _store(rows: Tensor, heads: Tensor, count: int) -> None:
    """The inverse of `_heads`: `[count * H, L, D]` into the given rows."""
    batched = rows.unflatten(0, (count, rows.shape[0] // count)).transpose(1, 2)
    batched.copy_(heads.unflatten(0, (count, rows.shape[1])))


def _product(a: Tensor, b: Tensor, scale: float, minus: Tensor | None = None) -> Tensor:
    """scale * a @ b^T - minus, for batches of matrices."""
    added = -minus if minus is not None else a.new_zeros(())
    return torch.baddbmm(added, a, b.transpose(1, 2), beta=0 if minus is None else 1, alpha=scale)


def _mask(s: Tensor, first: int) -> Tensor:
    """-inf where query i looks past its `first + i` keys (in place)."""
    queries, keys = s.shape[1:]
    seen = max(first, 0)  # by all
    if seen < keys:
        hidden = torch.ones(queries, keys - seen, dtype=torch.bool, device=s.device).triu(first - seen)
        s[..., seen:].masked_fill_(hidden, -torch.inf)
    return s


def softmax_sums(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (overwritten) -> (weights, not normalised; 1 / their sum; log-sum-exp). Without keys: 0, 0, -inf."""
    top = s.amax(-1, keepdim=True)
    top.masked_fill_(top == -torch.inf, 0)
    p = s.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    return p, total.reciprocal().masked_fill_(total == 0, 0), top + total.log()


def mla_prefill(
    q: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=wide(q.dtype))
    for run in _runs("mla_prefill", cu_q, cu_k, q.shape[0], v.shape[0]):
        qs, vs = _heads(q[run.query_rows], run.count), _heads(v[run.key_rows], run.count)
        ks = _key_heads(run, k_nope, k_rope)
        outs, lses = qs.new_zeros(*qs.shape[:2], v.shape[2]), qs.new_full((*qs.shape[:2], 1), -torch.inf)
        for rows, keys, first in run.blocks(causal):
            p, norm, lses[:, rows] = softmax_sums(_mask(_product(qs[:, rows], ks[:, :keys], scale), first))
            outs[:, rows] = torch.bmm(p, vs[:, :keys]).mul_(norm)
        _store(out[run.query_rows], outs, run.count)
        _store(lse[run.query_rows, :, None], lses, run.count)
    return out, lse


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """FlashAttention-2 (arXiv 2307.08691), section 3.1.2: the weights P again from the log-sum-exp, then dV = P^T dO,
    dS = P * (dO V^T - rowsum(dO * O)), dQ = dS K, dK = dS^T Q. The rotary key's gradient is a sum over the heads."""
    nope = k_nope.shape[2]
    grad_q, grad_k_nope, grad_k_rope, grad_v = (t.new_zeros(t.shape) for t in (q, k_nope, k_rope, v))
    for run in _runs("mla_prefill_backward", cu_q, cu_k, q.shape[0], v.shape[0]):
        count, rows_q, rows_k = run.count, run.query_rows, run.key_rows
        qs, dos, vs = _heads(q[rows_q], count), _heads(grad_out[rows_q], count), _heads(v[rows_k], count)
        ks = _key_heads(run, k_nope, k_rope)
        # A row without keys has scores -inf: any finite log-sum-exp makes its weights 0.
        lses = _heads(lse[rows_q].masked_fill(lse[rows_q] == -torch.inf, 0)[..., None], count)
        row_sums = (grad_out[rows_q].to(lse.dtype) * out[rows_q]).sum(-1, keepdim=True)
        row_sums = _heads(row_sums, count)
        dq, dk, dv = torch.zeros_like(qs), torch.zeros_like(ks), torch.zeros_like(vs)
        for rows, keys, first in run.blocks(causal):
            p = _mask(_product(qs[:, rows], ks[:, :keys], scale, minus=lses[:, rows]), first).exp_()
            ds = _product(dos[:, rows], vs[:, :keys], 1.0, minus=row_sums[:, rows]).mul_(p)
            dv[:, :keys] += torch.bmm(p.transpose(1, 2), dos[:, rows])
            dk[:, :keys] += torch.bmm(ds.transpose(1, 2), qs[:, rows])
            dq[:, rows] = torch.bmm(ds, ks[:, :keys])
        dk.mul_(scale)
        _store(grad_q[rows_q], dq.mul_(scale), count)
        _store(grad_k_nope[rows_k], dk[..., :nope], count)
        grad_k_rope[rows_k] = dk[..., nope:].unflatten(0, (count, -1)).sum(1).flatten(0, 1).to(k_rope.dtype)
        _store(grad_v[rows_k], dv, count)
    return grad_q, grad_k_nope, grad_k_rope, grad_v


# The latent cache.


def _encode(latent: Tensor, k_rope: Tensor, pow2_scale: bool) -> Tensor:
    """Rows of a uint8 cache."""
    codes, scale = quantize_1x128(latent, pow2_scale, "k")
    return torch.cat([t.contiguous().view(torch.uint8) for t in (codes, scale, k_rope.bfloat16())], -1)


def _decode(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys `[..., latent + rope]` of contiguous cache rows, as `dtype`."""
    if rows.dtype != torch.uint8:
        return rows.to(dtype)
    codes, scale, rope = rows.split([LATENT, 4 * SCALES, 2 * ROPE], -1)
    codes = codes.view(torch.float8_e4m3fn).float().unflatten(-1, (SCALES, 128))
    latent = (codes * scale.contiguous().view(torch.float32)[..., None]).flatten(-2)
    return torch.cat([latent.to(dtype), rope.contiguous().view(torch.bfloat16).to(dtype)], -1)


def mla_cache_append(kv_cache: Tensor, slots: Tensor, latent: Tensor, k_rope: Tensor, pow2_scale: bool) -> None:
    page = kv_cache.shape[1]
    kept = slots >= 0
    slots, latent, k_rope = slots[kept], latent[kept], k_rope[kept]
    rows = _encode(latent, k_rope, pow2_scale) if kv_cache.dtype == torch.uint8 else torch.cat([latent, k_rope], -1)
    kv_cache[slots // page, slots % page] = rows


def mla_prologue(
    x: Tensor,
    q_weight: Tensor,
    kv_weight: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    slots: Tensor,
    eps: float,
    pow2_scale: bool,
    cache_pow2_scale: bool,
    keys: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, k_rope = x.split([q_weight.shape[0], kv_weight.shape[0], cos_sin.shape[1]], -1)
    q, scale = quantize_1x128(rms_norm(query, q_weight, eps, None)[0], pow2_scale, "mn")
    latent, k_rope = rms_norm(key, kv_weight, eps, None)[0], rope(k_rope, positions, cos_sin, True, False)
    mla_cache_append(kv_cache, slots, latent, k_rope, cache_pow2_scale)
    return (q, scale, latent, k_rope) if keys else (q, scale, x.new_empty(0), x.new_empty(0))


def mla_absorb(x: Tensor, weight: Tensor) -> Tensor:
    real = wide(x.dtype)
    product = torch.bmm(x.transpose(0, 1).to(real), weight.mT.to(real))
    return product.transpose(0, 1).to(x.dtype).contiguous()


def mla_cache_gather(
    kv_cache: Tensor, block_table: Tensor, cu_seqlens: Tensor, total: int, latent: int
) -> tuple[Tensor, Tensor]:
    page, requests = kv_cache.shape[1], block_table.shape[0]
    token = torch.arange(total, device=kv_cache.device)
    request = torch.searchsorted(cu_seqlens[1:], token.to(cu_seqlens.dtype), right=True)
    owned = (request < requests) & (token >= cu_seqlens[0])
    dtype = torch.bfloat16 if kv_cache.dtype == torch.uint8 else kv_cache.dtype
    if requests == 0 or block_table.shape[1] == 0 or kv_cache.shape[0] == 0:
        keys = kv_cache.new_zeros(total, _key_width(kv_cache), dtype=dtype)
    else:
        request = torch.where(owned, request, 0)
        place = torch.where(owned, token - cu_seqlens[request], 0)
        pages = torch.where(owned, block_table[request, place // page], 0)
        keys = _decode(kv_cache[pages, place % page], dtype).masked_fill_(~owned[:, None], 0)
    return keys[:, :latent].contiguous(), keys[:, latent:].contiguous()


def _key_width(kv_cache: Tensor) -> int:
    return LATENT + ROPE if kv_cache.dtype == torch.uint8 else kv_cache.shape[2]


def _request_keys(kv_cache: Tensor, block_table: Tensor, seqlens: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys of each request `[B, L, width]`, zero past its length. On the CPU, L is no longer than need be."""
    page = kv_cache.shape[1]
    if seqlens.device.type == "cpu":
        longest = int(seqlens.max()) if seqlens.numel() else 0
        block_table = block_table[:, : -(-longest // page)]
    if block_table.numel() == 0 or kv_cache.shape[0] == 0:
        return kv_cache.new_zeros(block_table.shape[0], 0, _key_width(kv_cache), dtype=dtype)
    used = torch.arange(0, block_table.shape[1] * page, page, device=seqlens.device) < seqlens[:, None]
    pages = torch.where(used, block_table, 0)
    keys = _decode(kv_cache[pages].flatten(1, 2), dtype)
    past = torch.arange(keys.shape[1], device=seqlens.device) >= seqlens[:, None]
    return keys.masked_fill_(past[..., None], 0)


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
) -> tuple[Tensor, Tensor]:
    queries = q.shape[1]
    keys = _request_keys(kv_cache, block_table, seqlens, wide(q.dtype))
    if keys.shape[1] == 0 or q.numel() == 0:
        return q.new_zeros(*q.shape[:3], latent), q.new_full(q.shape[:3], -torch.inf, dtype=wide(q.dtype))
    s = _product(q.to(keys.dtype).flatten(1, 2), keys, scale)
    behind = torch.arange(queries - 1, -1, -1, device=q.device) if causal else seqlens.new_zeros(queries)
    hidden = torch.arange(keys.shape[1], device=q.device) >= (seqlens[:, None] - behind)[..., None]
    s.view(*q.shape[:3], -1).masked_fill_(hidden[:, :, None], -torch.inf)
    p, norm, lse = softmax_sums(s)
    out = torch.bmm(p, keys[..., :latent]).mul_(norm).to(q.dtype)
    return out.view(*q.shape[:3], latent), lse.view(q.shape[:3])


def mla_decode_plan(seqlens: Tensor, parts: int, start_cost: int, fixed: bool) -> tuple[Tensor, Tensor, Tensor]:
    requests, device = seqlens.shape[0], seqlens.device
    work = seqlens.new_full((items(requests, parts, fixed), 4), -1)
    if requests == 0:
        return work, seqlens.new_zeros(1), seqlens.new_zeros(parts + 1)
    keys = seqlens.clamp(min=0).long()
    item, part = torch.arange(work.shape[0], device=device), torch.arange(parts + 1, device=device)
    if fixed:
        size = _blocks(_ceil(keys, FIXED_SPLITS)).clamp(min=FIXED_KEYS // KEY_BLOCK) * KEY_BLOCK
        counts = _ceil(keys, size).clamp(min=1)
    else:
        # All requests in a row, each its start and then its blocks of keys, cut into parts of equal length.
        end = (_blocks(keys) + start_cost).cumsum(0)
        start = end - _blocks(keys)
        share = _ceil(end[-1], parts)
        first = torch.minimum(start, end[-1] - 1) // share
        counts = torch.where(keys > 0, (end - 1) // share - first + 1, 1)
    splits = F.pad(counts.cumsum(0), (1, 0))
    request = torch.searchsorted(splits[1:], item, right=True).clamp(max=requests - 1)
    split = item - splits[request]
    if fixed:
        low, high = split * size[request], (split + 1) * size[request]
        bounds = part * splits[-1] // parts
    else:
        mine = first[request] + split
        low = ((mine * share - start[request]).clamp(min=0)) * KEY_BLOCK
        high = ((mine + 1) * share - start[request]) * KEY_BLOCK
        bounds = torch.searchsorted(torch.where(item < splits[-1], mine, parts), part)
    rows = torch.stack([request, low, torch.minimum(high, keys[request]), split], 1)
    work = torch.where((item < splits[-1])[:, None], rows, work)
    return work.int(), splits.int(), bounds.int()


def _ceil(a: Tensor, b: Tensor | int) -> Tensor:
    return (a + b - 1) // b


def _blocks(keys: Tensor) -> Tensor:
    return _ceil(keys, KEY_BLOCK)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    top = torch.maximum(lse_a, lse_b)
    top = torch.where(top == -torch.inf, 0, top)
    weights = [(lse - top).exp()[..., None] for lse in (lse_a, lse_b)]
    total = weights[0] + weights[1]
    parts = [torch.where(w == 0, 0, out.to(w.dtype) * w) for out, w in zip((out_a, out_b), weights, strict=True)]
    merged = (parts[0] + parts[1]) / torch.where(total == 0, 1, total)
    return merged.to(out_a.dtype), top + total.squeeze(-1).log()
