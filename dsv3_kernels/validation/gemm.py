"""Cases of the gemm family: FP8 operands in, float64 products of the same codes and scales as the reference."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

import dsv3_kernels as dk

from . import Inputs, Near, Problem, case, rounded, summing
from .quant import near_codes, quantize, real

K = 320  # two and a half blocks


def operand(r: Inputs, *shape: int, rows: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, float64 values on the CPU) of random numbers in blocks of `rows` x 128."""
    q, scale = quantize(r.randn(*shape), rows, 128)
    return q.to(r.device), scale.to(r.device), real(q, scale, rows)


def product(r: Inputs, a: Tensor, b: Tensor, dtype: torch.dtype = torch.bfloat16) -> Near:
    """`a [M, K] @ b [N, K].T` in float64 with its bound."""
    return rounded(a @ b.mT, r.dot(a.abs() @ b.abs().mT, a.shape[-1], fp8=True), dtype)


@case("fp8_gemm")
def fp8_gemm(r: Inputs) -> Problem:
    a, a_scale, a64 = operand(r, 70, K)
    b, b_scale, b64 = operand(r, 136, K, rows=128)
    return Problem(
        f"[70, {K}] x [136, {K}]", lambda: {"out": dk.fp8_gemm(a, a_scale, b, b_scale)}, {"out": product(r, a64, b64)}
    )


@case("fp8_gemm")
def fp8_gemm_bias(r: Inputs) -> Problem:
    """One row, 1x128 scales on both sides, a bias, float32 out."""
    a, a_scale, a64 = operand(r, 1, K)
    b, b_scale, b64 = operand(r, 24, K)
    bias = r.randn(24)
    value = a64 @ b64.mT + bias.cpu().double()
    bound = r.dot(a64.abs() @ b64.abs().mT + bias.cpu().double().abs(), K, fp8=True)

    def run() -> dict[str, Tensor]:
        return {"out": dk.fp8_gemm(a, a_scale, b, b_scale, bias=bias, out_dtype=torch.float32)}

    return Problem(f"[1, {K}] x [24, {K}] 1x128, bias, f32", run, {"out": rounded(value, bound, torch.float32)})


@case("fp8_gemm_accumulate")
def fp8_gemm_accumulate(r: Inputs) -> Problem:
    a, a_scale, a64 = operand(r, 33, K)
    b, b_scale, b64 = operand(r, 16, K, rows=128)
    start = r.randn(33, 16)
    value = a64 @ b64.mT + start.cpu().double()
    bound = r.dot(a64.abs() @ b64.abs().mT + start.cpu().double().abs(), K, fp8=True)

    def run() -> dict[str, Tensor]:
        out = start.clone()
        dk.fp8_gemm(a, a_scale, b, b_scale, out=out, out_dtype=torch.float32, accumulate=True)
        return {"out": out}

    return Problem(f"[33, {K}] x [16, {K}] accumulate, f32", run, {"out": rounded(value, bound, torch.float32)})


GROUPS = (0, 3, 3, 70)  # three groups: 3 rows, none, 67


def grouped(r: Inputs, a: Tensor, b: Tensor, groups: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> Near:
    """Rows of group g times `b[g].T`."""
    parts = [product(r, a[s:e], b[g], dtype) for g, (s, e) in enumerate(pairwise(groups))]
    return Near(torch.cat([p.value for p in parts]), torch.cat([p.bound for p in parts]))


@case("fp8_grouped_gemm")
def fp8_grouped_gemm(r: Inputs) -> Problem:
    """Rows past the last offset are left alone."""
    a, a_scale, a64 = operand(r, 75, K)
    b, b_scale, b64 = operand(r, 3, 24, K, rows=128)
    offsets = r.ints(*GROUPS)
    wanted = grouped(r, a64, b64, GROUPS)
    tail = torch.full((5, 24), 7.0, dtype=torch.float64)
    wanted = Near(torch.cat([wanted.value, tail]), torch.cat([wanted.bound, torch.zeros(5, 24)]))

    def run() -> dict[str, Tensor]:
        out = torch.full((75, 24), 7.0, dtype=torch.bfloat16, device=r.device)
        dk.fp8_grouped_gemm(a, a_scale, b, b_scale, offsets, out=out)
        return {"out": out}

    return Problem(f"[75, {K}] x [3, 24, {K}]", run, {"out": wanted})


@case("fp8_masked_gemm")
def fp8_masked_gemm(r: Inputs) -> Problem:
    """Rows past a group's count are left alone, whatever stands in them."""
    counts = (5, 0, 9)
    a, a_scale, a64 = operand(r, 3, 9, K)
    b, b_scale, b64 = operand(r, 3, 24, K, rows=128)
    for group, count in enumerate(counts):
        a_scale[group, count:] = torch.nan
    value, bound = torch.full((3, 9, 24), 7.0, dtype=torch.float64), torch.zeros(3, 9, 24, dtype=torch.float64)
    for group, count in enumerate(counts):
        part = product(r, a64[group, :count], b64[group])
        value[group, :count], bound[group, :count] = part.value, part.bound

    def run() -> dict[str, Tensor]:
        out = torch.full((3, 9, 24), 7.0, dtype=torch.bfloat16, device=r.device)
        dk.fp8_masked_gemm(a, a_scale, b, b_scale, r.ints(*counts), expected_m=5, out=out)
        return {"out": out}

    return Problem(f"[3, 9, {K}] x [3, 24, {K}]", run, {"out": Near(value, bound)})


def wgrad_problem(r: Inputs, accumulate: bool) -> Problem:
    """Groups of 100 (padded to 128), none and 256 tokens; the empty one gives zeros, or leaves what is there alone."""
    starts = (0, 128, 128, 384)
    x, dy = r.randn(40, 384), r.randn(24, 384)
    x[:, 100:128] = 0
    dy[:, 100:128] = 0
    (a, a_scale), (b, b_scale) = quantize(x, 1, 128), quantize(dy, 1, 128)
    a64, b64 = real(a, a_scale), real(b, b_scale)
    parts = [product(r, a64[:, s:e], b64[:, s:e], torch.float32) for s, e in pairwise(starts)]
    value, bound = torch.stack([p.value for p in parts]), torch.stack([p.bound for p in parts])
    start = r.randn(3, 40, 24)
    if accumulate:
        value, bound = value + start.cpu().double(), bound + (value.abs() + start.cpu().double().abs()) * summing(384)
        bound[1] = 0
    operands = [t.to(r.device) for t in (a, a_scale, b, b_scale)]

    def run() -> dict[str, Tensor]:
        if not accumulate:
            return {"out": dk.fp8_grouped_wgrad(*operands, r.ints(*starts))}
        out = start.clone()
        dk.fp8_grouped_wgrad(*operands, r.ints(*starts), out=out, accumulate=True)
        return {"out": out}

    return Problem(
        f"[40, 384] x [24, 384], 3 groups{', accumulate' if accumulate else ''}", run, {"out": Near(value, bound)}
    )


@case("fp8_grouped_wgrad")
def fp8_grouped_wgrad(r: Inputs) -> Problem:
    return wgrad_problem(r, accumulate=False)


@case("fp8_grouped_wgrad_accumulate")
def fp8_grouped_wgrad_accumulate(r: Inputs) -> Problem:
    return wgrad_problem(r, accumulate=True)


@case("fp8_grouped_gemm_swiglu_quantize")
def fp8_grouped_gemm_swiglu_quantize(r: Inputs) -> Problem:
    a, a_scale, a64 = operand(r, 70, K)
    b, b_scale, b64 = operand(r, 3, 2 * 128, K, rows=128)
    weights = r.randn(70).abs()
    hidden = grouped(r, a64, b64, GROUPS, torch.float32)
    (gate, up), (gate_error, up_error) = hidden.value.chunk(2, -1), hidden.bound.chunk(2, -1)
    value = gate * torch.sigmoid(gate) * up * weights.cpu().double()[:, None]
    # silu is 1.1-Lipschitz; a kernel may round the product to bfloat16 nowhere
    error = (1.1 * gate_error * up.abs() + gate.abs() * up_error + gate_error * up_error) * weights.cpu().double()[
        :, None
    ]

    def run() -> dict[str, Tensor]:
        q, scale = dk.fp8_grouped_gemm_swiglu_quantize(a, a_scale, b, b_scale, r.ints(*GROUPS), weights=weights)
        return {"real": real(q, scale), "scale": scale}

    return Problem(f"[70, {K}] x [3, 2 x 128, {K}]", run, near_codes(value, error + value.abs() * 2.0**-20))


def columns(x: Tensor) -> Tensor:
    """`x [T, K]` through FP8 in blocks of 128 tokens and one column, float64."""
    return real(*quantize(x.mT.contiguous(), 1, 128)).mT


def rows(x: Tensor) -> Tensor:
    """`x [T, K]` through FP8 in blocks of one token and 128 columns, float64."""
    return real(*quantize(x, 1, 128))


@case("quantize_1x128", "quantize_128x128", "fp8_gemm", title="fp8_linear")
def fp8_linear(r: Inputs) -> Problem:
    x, w, bias = r.randn(6, K, dtype=torch.bfloat16), r.randn(32, K), r.randn(32)
    a64, b64 = rows(x), real(*quantize(w, 128, 128), 128)
    value = a64 @ b64.mT + bias.cpu().double()
    bound = r.dot(a64.abs() @ b64.abs().mT + bias.cpu().double().abs(), K, fp8=True)
    wanted = rounded(value, bound, torch.bfloat16)
    return Problem(f"[6, {K}] -> 32, bias", lambda: {"out": dk.fp8_linear(x, w, bias=bias)}, {"out": wanted})


@case("quantize_1x128_both", "quantize_128x128", "fp8_gemm", title="fp8_linear, gradients")
def fp8_linear_gradient(r: Inputs) -> Problem:
    """dx from rows of dy and the weight's 128x128 codes; dw from columns of dy and x."""
    tokens, outputs = 144, 32
    x, w, dy = r.randn(tokens, K), r.randn(outputs, K), r.randn(tokens, outputs)
    w64 = real(*quantize(w, 128, 128), 128)
    dx = product(r, rows(dy), w64.mT, torch.float32)
    dw = product(r, columns(dy).mT, columns(x).mT, torch.float32)

    def run() -> dict[str, Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        return dict(zip(("x", "weight"), torch.autograd.grad(dk.fp8_linear(*leaves), leaves, dy), strict=True))

    return Problem(f"[{tokens}, {K}] -> {outputs}, gradients", run, {"x": dx, "weight": dw})


@case("quantize_1x128", "quantize_128x128", "fp8_grouped_gemm", title="fp8_grouped_linear")
def fp8_grouped_linear(r: Inputs) -> Problem:
    x, w = r.randn(70, K, dtype=torch.bfloat16), r.randn(3, 32, K)
    wanted = grouped(r, rows(x), real(*quantize(w, 128, 128), 128), GROUPS)
    return Problem(
        f"[70, {K}] -> [3, 32]", lambda: {"out": dk.fp8_grouped_linear(x, w, r.ints(*GROUPS))}, {"out": wanted}
    )


@case(
    *("quantize_1x128_both", "quantize_128x128", "fp8_grouped_gemm", "fp8_grouped_wgrad"),
    title="fp8_grouped_linear, gradients",
)
def fp8_grouped_linear_gradient(r: Inputs) -> Problem:
    groups, outputs = (0, 3, 3, 150), 32
    x, w, dy = r.randn(150, K), r.randn(3, outputs, K), r.randn(150, outputs)
    w64 = real(*quantize(w, 128, 128), 128)
    dx = grouped(r, rows(dy), w64.mT, groups, torch.float32)
    spans = list(pairwise(groups))
    parts = [product(r, columns(dy[s:e]).mT, columns(x[s:e]).mT, torch.float32) for s, e in spans]
    dw = Near(torch.stack([p.value for p in parts]), torch.stack([p.bound for p in parts]))

    def run() -> dict[str, Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        out = dk.fp8_grouped_linear(*leaves, r.ints(*groups))
        return dict(zip(("x", "weight"), torch.autograd.grad(out, leaves, dy), strict=True))

    return Problem(f"[150, {K}] -> [3, {outputs}], gradients", run, {"x": dx, "weight": dw})
