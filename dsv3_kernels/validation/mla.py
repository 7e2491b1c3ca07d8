"""Cases of the mla family."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import dsv3_kernels as dk

from . import UNIT, Bits, Inputs, Near, Problem, case, rounded, summing
from .quant import near_codes, quantize, real, rms

BF16 = torch.bfloat16
LATENT, ROPE, SCALE = 512, 64, 192**-0.5


def attend(q: Tensor, k: Tensor, v: Tensor, spread: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, its bound, lse, its bound) of queries `[Sq, H, D]` on keys `[S, H, D]`, the last query seeing all keys.

    Query i sees keys < S - (Sq - 1 - i). `spread` is the relative error of the operands themselves.
    """
    sq, s = q.shape[0], k.shape[0]
    logits = torch.einsum("qhd,shd->hqs", q, k) * SCALE
    magnitudes = torch.einsum("qhd,shd->hqs", q.abs(), k.abs()) * SCALE
    seen = torch.arange(s) < s - (sq - 1 - torch.arange(sq))[:, None]
    logits = logits.masked_fill(~seen, -torch.inf)
    lse = logits.logsumexp(-1)
    p = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    error = (magnitudes * seen).amax(-1, keepdim=True) if s else magnitudes.new_zeros(*magnitudes.shape[:-1], 1)
    error = error * (summing(q.shape[-1]) + spread)  # of a logit, and so of a probability
    out, magnitude = torch.einsum("hqs,shd->qhd", p, v), torch.einsum("hqs,shd->qhd", p, v.abs())
    relative = (2 * error + summing(s) + UNIT[BF16] + spread).transpose(0, 1)  # kernels round probabilities to bfloat16
    return out, magnitude * relative, lse.transpose(0, 1), (error[..., 0] + summing(s)).transpose(0, 1) + 1e-6


def decode_problem(
    r: Inputs, cache: Tensor, keys: Tensor, spread: float, shape: str, queries: int, plan: str | None
) -> Problem:
    """Decode over pages in an order of their own; `keys [slots, 576]` float64 is what the cache holds."""
    heads, page, lengths = 16, cache.shape[1], (0, 1, 64, 131)
    q = r.randn(len(lengths), queries, heads, LATENT + ROPE, dtype=BF16)
    table = torch.full((len(lengths), 3), 10**6, dtype=torch.int32)  # entries past the length are never read
    free = iter((5, 2, 0, 4, 3, 1))
    for row, length in enumerate(lengths):
        for column in range(-(-length // page)):
            table[row, column] = next(free)
    found: list[tuple[Tensor, ...]] = []
    for row, length in enumerate(lengths):
        index = torch.arange(length)
        kv = keys[table[row][index // page] * page + index % page][:, None].expand(-1, heads, -1)
        found.append(attend(q[row].cpu().double(), kv, kv[..., :LATENT], spread))
    out64, out_bound, lse64, lse_bound = (torch.stack(parts) for parts in zip(*found, strict=True))
    used = {int(table[row, index // page]) * page + index % page for row, n in enumerate(lengths) for index in range(n)}
    unread = [slot for slot in range(cache.shape[0] * page) if slot not in used]
    poison = 0x7F if cache.dtype == torch.uint8 else torch.nan
    cache.view(-1, cache.shape[-1])[unread] = poison
    seqlens, table = r.ints(*lengths), table.to(r.device)

    def run() -> dict[str, Tensor]:
        ready = None
        if plan is not None:
            ready = dk.mla_decode_plan(seqlens, num_queries=queries, num_heads=heads, kv_dtype=cache.dtype, policy=plan)
        out, lse = dk.mla_decode(q, cache, table, seqlens, softmax_scale=SCALE, plan=ready)
        return {"out": out, "lse": lse}

    wanted = {
        "out": rounded(out64, out_bound, BF16),
        "lse": Near(lse64, lse_bound),
    }
    return Problem(shape, run, wanted)


@case("mla_decode")
def mla_decode(r: Inputs) -> Problem:
    """Lengths 0, 1, 64 and 131, two queries each; slots that no sequence owns hold NaN."""
    cache = r.randn(6, 64, LATENT + ROPE, dtype=BF16)
    return decode_problem(
        r, cache, cache.cpu().double().flatten(0, 1), 0.0, "4 x 2 queries, 16 heads, up to 131 keys", 2, None
    )


@case("mla_decode", "mla_decode_plan")
def mla_decode_with_plan(r: Inputs) -> Problem:
    cache = r.randn(6, 64, LATENT + ROPE, dtype=BF16)
    return decode_problem(r, cache, cache.cpu().double().flatten(0, 1), 0.0, "4 x 1 query, fixed plan", 1, "fixed")


def packed(latent: Tensor, k_rope: Tensor) -> Tensor:
    """The 656-byte form of tokens: 512 codes, 4 float32 scales, 64 bfloat16."""
    q, scale = quantize(latent, 1, 128)
    return torch.cat([t.cpu().contiguous().view(torch.uint8) for t in (q, scale, k_rope)], -1)


def fp8_problem(r: Inputs, words: str, plan: str | None) -> Problem:
    latent, k_rope = r.randn(384, LATENT, dtype=BF16), r.randn(384, ROPE, dtype=BF16)
    cache = packed(latent, k_rope).view(6, 64, 656).to(r.device)
    keys = torch.cat([real(*quantize(latent, 1, 128)), k_rope.cpu().double()], -1)
    spread = 0.0 if r.backend == "eager" else UNIT[BF16]  # kernels may turn codes into bfloat16
    return decode_problem(r, cache, keys, spread, f"4 x 1 query, FP8 cache{words}", 1, plan)


@case("mla_decode")
def mla_decode_fp8_cache(r: Inputs) -> Problem:
    return fp8_problem(r, "", None)


@case("mla_decode", "mla_decode_plan")
def mla_decode_fp8_cache_with_plan(r: Inputs) -> Problem:
    return fp8_problem(r, ", balanced plan", "balanced")


def prefill_inputs(r: Inputs, tokens: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    heads = 2
    shapes = ((tokens, heads, 192), (keys, heads, 128), (keys, ROPE), (keys, heads, 128))
    return [r.randn(*shape, dtype=dtype) for shape in shapes]


def prefill(inputs: Sequence[Tensor], cu_q: Sequence[int], cu_k: Sequence[int]) -> list[Tensor]:
    """(out, bound, lse, bound) over all sequences."""
    q, k_nope, k_rope, v = inputs
    k = torch.cat([k_nope, k_rope[:, None].expand(-1, k_nope.shape[1], -1)], -1)
    parts = [
        attend(q[q0:q1], k[k0:k1], v[k0:k1]) for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False)
    ]
    return [torch.cat(part) for part in zip(*parts, strict=True)]


@case("mla_prefill")
def mla_prefill(r: Inputs) -> Problem:
    """A sequence alone, one without queries, one whose queries follow cached keys, one whose first queries see none."""
    cu_q, cu_k = (0, 20, 20, 27, 31), (0, 20, 25, 65, 67)
    inputs = prefill_inputs(r, 31, 67, BF16)
    out, out_bound, lse, lse_bound = prefill([t.cpu().double() for t in inputs], cu_q, cu_k)

    def run() -> dict[str, Tensor]:
        got = dk.mla_prefill(*inputs, r.ints(*cu_q), r.ints(*cu_k), softmax_scale=SCALE)
        return dict(zip(("out", "lse"), got, strict=True))

    return Problem(
        "31 queries, 67 keys, 4 sequences", run, {"out": rounded(out, out_bound, BF16), "lse": Near(lse, lse_bound)}
    )


@case("mla_prefill", "mla_prefill_backward")
def mla_prefill_gradient(r: Inputs) -> Problem:
    cu_q, cu_k = (0, 20, 27), (0, 20, 60)
    dtype = torch.float32 if r.backend == "eager" else BF16
    inputs, seed = prefill_inputs(r, 27, 60, dtype), r.randn(27, 2, 128, dtype=dtype)
    leaves = [t.cpu().double().requires_grad_() for t in inputs]
    grads = torch.autograd.grad(prefill(leaves, cu_q, cu_k)[0], leaves, seed.cpu().double())
    # Every gradient is a sum over probabilities times bounded numbers: the same sums over magnitudes bound its error.
    names = ("q", "k_nope", "k_rope", "v")
    size = [grad.abs().amax() for grad in grads]
    unit = summing(60) * 40 if dtype == torch.float32 else 2.0**-5
    wanted = {name: rounded(g, unit * s.expand(g.shape), dtype) for name, g, s in zip(names, grads, size, strict=True)}

    def run() -> dict[str, Tensor]:
        ours = [t.clone().requires_grad_() for t in inputs]
        out, _ = dk.mla_prefill(*ours, r.ints(*cu_q), r.ints(*cu_k), softmax_scale=SCALE)
        return dict(zip(names, torch.autograd.grad(out, ours, seed), strict=True))

    return Problem("27 queries, 60 keys, gradients", run, wanted)


SLOTS = (70, -1, 3, 0, 127)


def append_problem(r: Inputs, fp8: bool) -> Problem:
    latent, k_rope = r.spread(5, LATENT, dtype=BF16), r.randn(5, ROPE, dtype=BF16)
    rows = packed(latent, k_rope) if fp8 else torch.cat([latent, k_rope], -1).cpu()
    width = rows.shape[-1]
    before = torch.full((2, 64, width), 7, dtype=rows.dtype)
    wanted = before.clone()
    for row, slot in zip(rows, SLOTS, strict=True):
        if slot >= 0:
            wanted.view(-1, width)[slot] = row
    slots = torch.tensor(SLOTS, device=r.device)

    def run() -> dict[str, Tensor]:
        cache = before.to(r.device, copy=True)
        dk.mla_cache_append(cache, slots, latent, k_rope)
        return {"cache": cache}

    return Problem(f"5 tokens, {'FP8' if fp8 else 'bf16'} cache", run, {"cache": Bits(wanted)})


@case("mla_cache_append")
def mla_cache_append(r: Inputs) -> Problem:
    return append_problem(r, fp8=False)


@case("mla_cache_append")
def mla_cache_append_fp8(r: Inputs) -> Problem:
    return append_problem(r, fp8=True)


@case("mla_prologue")
def mla_prologue(r: Inputs) -> Problem:
    x = r.randn(5, 1536 + LATENT + ROPE, dtype=BF16)
    weights = [1 + r.randn(width, dtype=BF16) / 8 for width in (1536, LATENT)]
    angles = torch.outer(torch.arange(9).double(), 10000.0 ** (-torch.arange(0, ROPE, 2).double() / ROPE))
    table = torch.cat([angles.cos(), angles.sin()], -1).float()
    positions = torch.tensor([8, 0, 3, 3, 1])
    parts = x.cpu().double().split([1536, LATENT, ROPE], -1)
    query, key = (rms(part, weight.cpu().double(), 1e-6) for part, weight in zip(parts, weights, strict=False))
    cos, sin = table[positions].double().chunk(2, -1)
    rotary = rotate(parts[2], cos, sin, True)
    norms = [rounded(value, value.abs() * summing(1536), BF16) for value in (query, key)]
    ropes = rounded(rotary, 4 * summing(2) * torch.ones((), dtype=torch.float64), BF16)
    before = torch.full((2, 64, LATENT + ROPE), 7, dtype=BF16)
    slots = torch.tensor(SLOTS, device=r.device)

    def run() -> dict[str, Tensor]:
        cache = before.to(r.device, copy=True)
        args = x, *weights, positions.to(r.device), table.to(r.device), cache, slots
        q, scale, latent, k_rope = dk.mla_prologue(*args, eps=1e-6, keys=True)
        rows = cache.view(-1, LATENT + ROPE)[slots[slots >= 0]]
        return {"real": real(q, scale), "scale": scale, "latent": latent, "k_rope": k_rope, "cache": rows}

    kept = slots.cpu() >= 0
    cached = Near(
        torch.cat([key, rotary], -1)[kept], torch.cat([norms[1].bound, ropes.bound.expand(5, ROPE)], -1)[kept]
    )
    wanted = near_codes(query, norms[0].bound) | {"latent": norms[1], "k_rope": ropes, "cache": cached}
    return Problem("5 tokens, bf16 cache", run, wanted)


def absorb_problem(r: Inputs, columns: int, depth: int, start: int) -> Problem:
    """Five tokens of three heads; half of kv_b, a column or a row contiguous, into part of wider rows of 7."""
    kv_b, x = r.randn(3, 256, LATENT, dtype=BF16), r.randn(5, 3, 192 if depth < LATENT else LATENT, dtype=BF16)
    half = kv_b[:, start : start + 128]
    weight, x = half.mT if depth < LATENT else half, x[..., :depth]
    value, size = (
        torch.einsum("thk,hnk->thn", a.cpu().double(), b.cpu().double())
        for a, b in ((x, weight), (x.abs(), weight.abs()))
    )

    def run() -> dict[str, Tensor]:
        rows = torch.full((5, 3, columns + ROPE), 7, dtype=BF16, device=r.device)
        dk.mla_absorb(x, weight, out=rows[..., :columns])
        return {"out": rows[..., :columns].contiguous(), "beside": rows[..., columns:].contiguous()}

    beside = Bits(torch.full((5, 3, ROPE), 7, dtype=BF16))
    wanted: dict[str, Bits | Near] = {"out": rounded(value, size * summing(depth), BF16), "beside": beside}
    return Problem(f"5 tokens, 3 heads, {depth} -> {columns}", run, wanted)


@case("mla_absorb")
def mla_absorb_queries(r: Inputs) -> Problem:
    return absorb_problem(r, LATENT, 128, 0)


@case("mla_absorb")
def mla_absorb_outputs(r: Inputs) -> Problem:
    return absorb_problem(r, 128, LATENT, 128)


def gather_problem(r: Inputs, fp8: bool) -> Problem:
    """Two sequences of 70 and 3 tokens in three pages."""
    latent, k_rope = r.spread(192, LATENT, dtype=BF16), r.randn(192, ROPE, dtype=BF16)
    cache = packed(latent, k_rope) if fp8 else torch.cat([latent, k_rope], -1)
    cache = cache.view(3, 64, -1).to(r.device)
    slots = torch.cat([128 + torch.arange(64), torch.arange(6), 64 + torch.arange(3)])
    held = real(*quantize(latent, 1, 128)).float().bfloat16() if fp8 else latent.cpu()
    table = torch.tensor([[2, 0], [1, 99]], dtype=torch.int32, device=r.device)

    def run() -> dict[str, Tensor]:
        got = dk.mla_cache_gather(cache, table, r.ints(0, 70, 73), 73)
        return dict(zip(("latent", "k_rope"), got, strict=True))

    wanted = {"latent": Bits(held[slots]), "k_rope": Bits(k_rope.cpu()[slots])}
    return Problem(f"73 tokens, {'FP8' if fp8 else 'bf16'} cache", run, wanted)


@case("mla_cache_gather")
def mla_cache_gather(r: Inputs) -> Problem:
    return gather_problem(r, fp8=False)


@case("mla_cache_gather")
def mla_cache_gather_fp8(r: Inputs) -> Problem:
    return gather_problem(r, fp8=True)


@case("merge_attention")
def merge_attention(r: Inputs) -> Problem:
    """One side empty, then both: an empty row has lse -inf and output 0."""
    outs, lses = [r.randn(7, 4, 128) for _ in range(2)], [r.randn(7, 4) for _ in range(2)]
    for side, row in ((0, 2), (0, 3), (1, 3)):
        outs[side][row], lses[side][row] = 0, -torch.inf
    a, b, lse_a, lse_b = (t.cpu().double() for t in (*outs, *lses))
    lse = torch.logaddexp(lse_a, lse_b)
    shift = lse.masked_fill(lse == -torch.inf, 0)
    wa, wb = torch.exp(lse_a - shift)[..., None], torch.exp(lse_b - shift)[..., None]
    value, magnitude = wa * a + wb * b, wa * a.abs() + wb * b.abs()

    def run() -> dict[str, Tensor]:
        return dict(zip(("out", "lse"), dk.merge_attention(outs[0], lses[0], outs[1], lses[1]), strict=True))

    wanted = {"out": Near(value, magnitude * summing(4) * 2), "lse": Near(lse, (shift.abs() + 1) * summing(2))}
    return Problem("[7, 4, 128] f32", run, wanted)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The rotation in float64; `cos` and `sin` are `[T, 1, D/2]`."""
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    parts = (a * cos - b * sin, a * sin + b * cos)
    return torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)


def rope_problem(r: Inputs, shape: str, dtype: torch.dtype, interleaved: bool, gradient: bool) -> Problem:
    x, seed = r.randn(5, 3, ROPE, dtype=dtype), r.randn(5, 3, ROPE, dtype=dtype)
    positions = r.randint(0, 900, 5)
    angles = torch.outer(torch.arange(900).double(), 10000.0 ** (-torch.arange(0, ROPE, 2).double() / ROPE))
    table = torch.cat([angles.cos(), angles.sin()], -1).float()
    cos, sin = table[positions.cpu()].double()[:, None].chunk(2, -1)
    leaf = x.cpu().double().requires_grad_()
    value = rotate(leaf, cos, sin, interleaved)
    if gradient:
        (value,) = torch.autograd.grad(value, leaf, seed.cpu().double())
    table = table.to(r.device)

    def run() -> dict[str, Tensor]:
        ours = x.clone().requires_grad_(gradient)
        out = dk.rope(ours, positions, table, interleaved=interleaved)
        return {"x": torch.autograd.grad(out, ours, seed)[0] if gradient else out}

    bound = 4 * summing(2) * torch.ones((), dtype=torch.float64)
    return Problem(shape, run, {"x": rounded(value.detach(), bound, dtype)})


@case("rope")
def rope(r: Inputs) -> Problem:
    return rope_problem(r, "[5, 3, 64] bf16", BF16, True, False)


@case("rope")
def rope_halves(r: Inputs) -> Problem:
    return rope_problem(r, "[5, 3, 64] f32, halves", torch.float32, False, False)


@case("rope")
def rope_gradient(r: Inputs) -> Problem:
    return rope_problem(r, "[5, 3, 64] f32, gradient", torch.float32, True, True)
