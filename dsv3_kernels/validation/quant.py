"""Cases of the quant family."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

import dsv3_kernels as dk

from . import E4M3, UNIT, Bits, Inputs, Near, Problem, case, rounded, summing

FLOOR = float(torch.tensor(1e-4))
U = UNIT[torch.float32]


def scales(amax: Tensor, pow2: bool = False) -> Tensor:
    """float32 scales of blocks whose largest magnitude is `amax` (float64): one rounding, that of IEEE division."""
    scale = (amax.clamp(min=FLOOR) / 448).float()
    return torch.exp2(scale.double().log2().ceil()).float() if pow2 else scale


def blocks(x: Tensor, rows: int, columns: int) -> Tensor:
    """`x [..., N, K]` in float64 as `[..., N/rows, rows, K/columns, columns]`, zero-padded."""
    n, k = x.shape[-2:]
    padded = x.new_zeros((*x.shape[:-2], n + -n % rows, k + -k % columns), dtype=torch.float64)
    padded[..., :n, :k] = x
    return padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))


def quantize(x: Tensor, rows: int, columns: int, pow2: bool = False) -> tuple[Tensor, Tensor]:
    """Codes and scales of `x [..., N, K]` in blocks of rows x columns, from float64."""
    n, k = x.shape[-2:]
    tiles = blocks(x.cpu(), rows, columns)
    scale = scales(tiles.abs().amax((-3, -1)), pow2)
    q = (tiles / scale.double()[..., :, None, :, None]).float().to(E4M3)
    return q.flatten(-4, -3).flatten(-2)[..., :n, :k].contiguous(), scale


def real(q: Tensor, scale: Tensor, rows: int = 1) -> Tensor:
    """float64 values of codes `q [..., N, K]` with scales `[..., N/rows, K/128]`."""
    n, k = q.shape[-2:]
    wide = scale.cpu().double().repeat_interleave(rows, -2)[..., :n, :].repeat_interleave(128, -1)[..., :k]
    return q.cpu().double() * wide


@case("quantize_1x128")
def quantize_1x128(r: Inputs) -> Problem:
    x = r.spread(5, 300, dtype=torch.bfloat16)
    q, scale = quantize(x, 1, 128)

    def run() -> dict[str, Tensor]:
        return dict(zip(("q", "scale"), dk.quantize_1x128(x), strict=True))

    return Problem("[5, 300] bf16", run, {"q": Bits(q), "scale": Bits(scale)})


@case("quantize_1x128")
def quantize_1x128_pow2_rows(r: Inputs) -> Problem:
    x = r.spread(3, 256)
    q, scale = quantize(x, 1, 128, pow2=True)

    def run() -> dict[str, Tensor]:
        return dict(zip(("q", "scale"), dk.quantize_1x128(x, pow2_scale=True, scale_layout="k"), strict=True))

    return Problem("[3, 256] f32, powers of two", run, {"q": Bits(q), "scale": Bits(scale)})


@case("quantize_128x128")
def quantize_128x128(r: Inputs) -> Problem:
    w = r.spread(2, 200, 300, dtype=torch.bfloat16)
    q, scale = quantize(w, 128, 128)

    def run() -> dict[str, Tensor]:
        return dict(zip(("q", "scale"), dk.quantize_128x128(w), strict=True))

    return Problem("[2, 200, 300] bf16", run, {"q": Bits(q), "scale": Bits(scale)})


@case("quantize_1x128_both")
def quantize_1x128_both(r: Inputs) -> Problem:
    """Groups of 0, 5 and 130 tokens: each group's columns start a new block and are padded with zeros."""
    x = r.spread(135, 192, dtype=torch.bfloat16)
    groups = (0, 0, 5, 135)
    offsets = r.ints(*groups)
    q, scale = quantize(x, 1, 128)
    columns = [quantize(x[a:b].t(), 1, 128) for a, b in pairwise(groups)]
    q_t = torch.cat([torch.nn.functional.pad(c.view(torch.uint8), (0, -c.shape[1] % 128)) for c, _ in columns], 1).view(
        E4M3
    )
    scale_t = torch.cat([s for _, s in columns], 1)
    starts = [0, 0, 128, 384]
    wanted = {
        "q": q,
        "scale": scale,
        "q_t": q_t,
        "scale_t": scale_t,
        "offsets_t": torch.tensor(starts, dtype=torch.int32),
    }

    def run() -> dict[str, Tensor]:
        got = dict(zip(wanted, dk.quantize_1x128_both(x, offsets=offsets), strict=True))
        return got | {"q_t": got["q_t"][:, :384], "scale_t": got["scale_t"][:, :3]}

    return Problem("[135, 192] bf16, 3 groups", run, {name: Bits(value) for name, value in wanted.items()})


@case("dequantize")
def dequantize(r: Inputs) -> Problem:
    q, scale = (t.to(r.device) for t in quantize(r.spread(200, 300), 128, 128))
    wanted = real(q, scale, 128).float().bfloat16()
    return Problem("[200, 300] 128x128", lambda: {"x": dk.dequantize(q, scale)}, {"x": Bits(wanted)})


@case("dequantize")
def dequantize_1x128(r: Inputs) -> Problem:
    q, scale = (t.to(r.device) for t in quantize(r.spread(7, 300), 1, 128))
    wanted = real(q, scale).float()
    return Problem("[7, 300] 1x128", lambda: {"x": dk.dequantize(q, scale, dtype=torch.float32)}, {"x": Bits(wanted)})


def near_codes(value: Tensor, error: Tensor, q: str = "real", scale: str = "scale") -> dict[str, Bits | Near]:
    """What quantised `value` (float64, known to `error`) must be: its scale, and its codes to half a step of E4M3."""
    tiles = blocks(value, 1, 128)
    amax = tiles.abs().amax((-3, -1))
    slack = blocks(error, 1, 128).amax((-3, -1)) / 448
    step = amax.clamp(min=FLOOR).repeat_interleave(128, -1)[..., : value.shape[-1]] / 448 * 2.0**-10
    limit = error + (value.abs() + error) * UNIT[E4M3] + step * (1 + 1e-5)
    wanted = (amax.clamp(min=FLOOR)) / 448
    return {q: Near(value, limit), scale: Near(wanted, slack + wanted * 4 * U)}


@case("silu_mul_quantize_1x128")
def silu_mul_quantize_1x128(r: Inputs) -> Problem:
    gate_up = r.randn(5, 384, dtype=torch.bfloat16)
    weights = r.randn(5).abs()
    gate, up = gate_up.cpu().double().chunk(2, -1)
    value = gate * torch.sigmoid(gate) * up * weights.cpu().double()[:, None]

    def run() -> dict[str, Tensor]:
        q, scale = dk.silu_mul_quantize_1x128(gate_up, weights=weights)
        return {"real": real(q, scale), "scale": scale}

    return Problem("[5, 2 x 192] bf16, weighted", run, near_codes(value, value.abs() * summing(1)))


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm in float64."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@case("rms_norm")
def rms_norm(r: Inputs) -> Problem:
    x, weight = r.spread(5, 300, dtype=torch.bfloat16), r.randn(300, dtype=torch.bfloat16)
    value = rms(x.cpu().double(), weight.cpu().double(), 1e-6)
    wanted = rounded(value, value.abs() * summing(300), torch.bfloat16)
    return Problem("[5, 300] bf16", lambda: {"normed": dk.rms_norm(x, weight, 1e-6)}, {"normed": wanted})


@case("rms_norm")
def rms_norm_residual(r: Inputs) -> Problem:
    x, residual, weight = r.randn(3, 256), r.randn(3, 256), r.randn(256)
    total = x.cpu().double() + residual.cpu().double()
    value = rms(total, weight.cpu().double(), 1e-6)
    normed = Near(value, value.abs() * summing(256))

    def run() -> dict[str, Tensor]:
        return dict(zip(("normed", "residual"), dk.rms_norm(x, weight, 1e-6, residual=residual), strict=True))

    return Problem("[3, 256] f32 + residual", run, {"normed": normed, "residual": Bits(total.float())})


@case("rms_norm", "rms_norm_backward")
def rms_norm_gradient(r: Inputs) -> Problem:
    x, weight, seed = r.randn(7, 300), r.randn(300), r.randn(7, 300)
    leaves = [t.cpu().double().requires_grad_() for t in (x, weight)]
    wanted_x, wanted_w = torch.autograd.grad(rms(leaves[0], leaves[1], 1e-6), leaves, seed.cpu().double())
    magnitude = (seed.cpu().double() * leaves[1]).abs().detach() + 1

    def run() -> dict[str, Tensor]:
        ours = [t.clone().requires_grad_() for t in (x, weight)]
        return dict(zip(("x", "weight"), torch.autograd.grad(dk.rms_norm(*ours, 1e-6), ours, seed), strict=True))

    error_x = summing(300) * (magnitude + magnitude.mean(-1, keepdim=True) * 4)
    error_w = summing(300) * (seed.cpu().double() * rms(leaves[0], torch.ones(300), 1e-6)).abs().sum(0).detach()
    return Problem("[7, 300] f32, gradients", run, {"x": Near(wanted_x, error_x), "weight": Near(wanted_w, error_w)})


@case("rms_norm_quantize_1x128")
def rms_norm_quantize_1x128(r: Inputs) -> Problem:
    x, residual, weight = r.randn(5, 300), r.randn(5, 300), r.randn(300)
    total = (x.cpu().double() + residual.cpu().double()).float()
    value = rms(total.double(), weight.cpu().double(), 1e-6)
    error = value.abs() * summing(300)
    wanted = near_codes(value, error) | {"normed": Near(value, error), "residual": Bits(total)}

    def run() -> dict[str, Tensor]:
        q, scale, normed, summed = dk.rms_norm_quantize_1x128(x, weight, 1e-6, residual=residual)
        return {"real": real(q, scale), "scale": scale, "normed": normed, "residual": summed}

    return Problem("[5, 300] f32 + residual", run, wanted)
