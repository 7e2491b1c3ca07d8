"""Benchmarks of the gemm family, at the shapes of DeepSeek-V3's layers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import dsv3_kernels as dk

from . import peer_deep_gemm
from .bench_quant import normal, scales, uneven_offsets
from .cases import Call, Case

SAMPLE = 16  # rows of an output that are held against float64
# Tensor cores keep 14 bits between promotions: 1e-4 of normal operands (docs/gemm.md); bfloat16 rounds once more.
ACCUMULATION, ROUNDING = 2**-12, 2**-8


def off(op: str, got: Tensor, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> str | None:
    """What is wrong with some rows of `A @ B.T`, spread over the whole."""
    rows = torch.linspace(0, got.shape[0] - 1, min(SAMPLE, got.shape[0]), device=got.device).long()
    left = dk.dequantize(a[0][rows], a[1][rows], dtype=torch.float32).double()
    right = dk.dequantize(*b, dtype=torch.float32).double()
    wanted, size = left @ right.T, left.abs() @ right.abs().T
    bound = ACCUMULATION * size + (ROUNDING * wanted.abs() if got.dtype is torch.bfloat16 else 0)
    wrong = int(((got[rows].double() - wanted).abs() > bound).sum()) + int((~got[rows].isfinite()).sum())
    return f"{op}: {wrong} of {wanted.numel()} elements are off" if wrong else None


def first(problems: Any) -> str | None:
    return next((problem for problem in problems if problem), None)


def fp8_gemm(m: int, n: int, k: int, *, quick: bool = False, cpu: bool = False) -> Case:
    def make(device: torch.device) -> tuple[Any, ...]:
        a, b = dk.quantize_1x128(normal(device, m, k)), dk.quantize_128x128(normal(device, n, k, seed=1))
        return *a, *b, torch.empty(m, n, dtype=torch.bfloat16, device=device)

    return Case(
        op="fp8_gemm",
        shape={"M": m, "N": n, "K": k},
        make=make,
        run=lambda a, a_scale, b, b_scale, out: dk.fp8_gemm(a, a_scale, b, b_scale, out=out),
        check=lambda inputs, out: off("fp8_gemm", out, inputs[:2], inputs[2:4]),
        bytes=(m + n) * k + scales(m, k) + scales(n, k) // 128 + 2 * m * n,
        flops=2 * m * n * k,
        unit="fp8",
        peers={
            "deep_gemm": peer_deep_gemm.gemm,
            "torch 1x128": torch_blockwise,
            "torch per tensor": torch_per_tensor,
            "torch bf16": torch_bfloat16,
        },
        checked=("deep_gemm",),
        devices=("cuda", "cpu") if cpu else ("cuda",),
        quick=quick,
    )


def quantised_gemm(m: int, n: int, k: int, *, quick: bool = False) -> Case:
    """From bfloat16 activations: what a layer pays, where a rival's kernel alone is not all of it."""

    def make(device: torch.device) -> tuple[Any, ...]:
        out = torch.empty(m, n, dtype=torch.bfloat16, device=device)
        return normal(device, m, k).bfloat16(), *dk.quantize_128x128(normal(device, n, k, seed=1)), out

    def run(x: Tensor, b: Tensor, b_scale: Tensor, out: Tensor) -> Tensor:
        return dk.fp8_gemm(*dk.quantize_1x128(x), b, b_scale, out=out)

    def check(inputs: tuple[Any, ...], out: Tensor) -> str | None:
        x, b, b_scale, _ = inputs
        return off("quantize_1x128 and fp8_gemm", out, dk.quantize_1x128(x), (b, b_scale))

    def deep(x: Tensor, b: Tensor, b_scale: Tensor, out: Tensor) -> Call:
        import deep_gemm
        from deep_gemm.utils import per_token_cast_to_fp8

        return lambda: deep_gemm.fp8_gemm_nt(per_token_cast_to_fp8(x, use_ue8m0=False), (b, b_scale), out)

    def deep_with_ours(x: Tensor, b: Tensor, b_scale: Tensor, out: Tensor) -> Call:
        """Its product behind our quantisation, which writes scales in its layout."""
        a, a_scale = dk.quantize_1x128(x)
        product = peer_deep_gemm.gemm(a, a_scale, b, b_scale, out)

        def call() -> Tensor:
            dk.quantize_1x128(x, out=(a, a_scale))
            return product()

        return call

    def bfloat16(x: Tensor, b: Tensor, b_scale: Tensor, out: Tensor) -> Call:
        weight = dk.dequantize(b, b_scale).t()
        return lambda: torch.mm(x, weight, out=out)

    return Case(
        op="fp8_gemm",
        shape={"M": m, "N": n, "K": k, "from": "bfloat16"},
        make=make,
        run=run,
        check=check,
        bytes=2 * m * k + n * k + scales(n, k) // 128 + 2 * m * n,
        flops=2 * m * n * k,
        unit="fp8",
        peers={"deep_gemm": deep, "quantize_1x128, deep_gemm": deep_with_ours, "torch bf16": bfloat16},
        checked=("quantize_1x128, deep_gemm",),
        quick=quick,
    )


def torch_blockwise(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor) -> Call:
    """The same problem; cuBLAS wants B's scales padded to four per row."""
    from torch.nn.functional import ScalingType, scaled_mm

    padded = torch.nn.functional.pad(b_scale, (0, -b_scale.shape[1] % 4))[:, : b_scale.shape[1]]
    recipes = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
    return lambda: scaled_mm(a, b.t(), a_scale, recipes[0], padded.t(), recipes[1], output_dtype=out.dtype)


def torch_per_tensor(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor) -> Call:
    """An easier problem: one scale per tensor, and no promotion."""
    one = torch.ones((), device=a.device)
    return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=out.dtype)


def torch_bfloat16(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor) -> Call:
    left, right = dk.dequantize(a, a_scale), dk.dequantize(b, b_scale).t()
    return lambda: torch.mm(left, right, out=out)


def weight_gradient(m: int, n: int, tokens: int, *, quick: bool = False) -> Case:
    """Both scales 1x128, added into float32: the weight gradient of a dense layer over microbatches."""

    def make(device: torch.device) -> tuple[Any, ...]:
        a, b = dk.quantize_1x128(normal(device, m, tokens)), dk.quantize_1x128(normal(device, n, tokens, seed=1))
        return *a, *b, torch.zeros(m, n, device=device)

    def check(inputs: tuple[Any, ...], out: Tensor) -> str | None:
        wrong = off("fp8_gemm_accumulate", out, inputs[:2], inputs[2:4])
        out.zero_()  # the next side starts from nothing too
        return wrong

    return Case(
        op="fp8_gemm_accumulate",
        shape={"M": m, "N": n, "K": tokens},
        make=make,
        run=lambda a, a_scale, b, b_scale, out: dk.fp8_gemm(a, a_scale, b, b_scale, out=out, accumulate=True),
        check=check,
        bytes=(m + n) * tokens + scales(m, tokens) + scales(n, tokens) + 8 * m * n,
        flops=2 * m * n * tokens,
        unit="fp8",
        peers={"deep_gemm": peer_deep_gemm.accumulate},
        checked=("deep_gemm",),
        quick=quick,
    )


def grouped_inputs(device: torch.device, groups: int, rows: int, n: int, k: int) -> tuple[Tensor, ...]:
    """A, B and offsets; groups of uneven sizes, multiples of 128 where they are large, as rivals need them."""
    offsets = uneven_offsets(device, rows, groups)
    if rows >= 256 * groups:
        offsets = (offsets + 64) // 128 * 128
    b = dk.quantize_128x128(normal(device, groups, n, k, seed=1))
    return *dk.quantize_1x128(normal(device, rows, k)), *b, offsets


def fp8_grouped_gemm(groups: int, rows: int, n: int, k: int, *, quick: bool = False, cpu: bool = False) -> Case:
    def make(device: torch.device) -> tuple[Any, ...]:
        out = torch.empty(rows, n, dtype=torch.bfloat16, device=device)
        return *grouped_inputs(device, groups, rows, n, k), out

    def check(inputs: tuple[Any, ...], out: Tensor) -> str | None:
        a, a_scale, b, b_scale, offsets, _ = inputs
        bounds = offsets.tolist()
        parts = [slice(*pair) for pair in pairwise(bounds)]
        return first(
            off("fp8_grouped_gemm", out[part], (a[part], a_scale[part]), (b[g], b_scale[g]))
            for g, part in enumerate(parts)
            if part.stop > part.start
        )

    return Case(
        op="fp8_grouped_gemm",
        shape={"G": groups, "S": rows, "N": n, "K": k},
        make=make,
        run=lambda a, a_scale, b, b_scale, offsets, out: dk.fp8_grouped_gemm(a, a_scale, b, b_scale, offsets, out=out),
        check=check,
        bytes=(rows + groups * n) * k + scales(rows, k) + groups * scales(n, k) // 128 + 2 * rows * n,
        flops=2 * rows * n * k,
        unit="fp8",
        peers={"deep_gemm": peer_deep_gemm.contiguous},
        checked=("deep_gemm",),
        devices=("cuda", "cpu") if cpu else ("cuda",),
        quick=quick,
    )


def fp8_masked_gemm(groups: int, most: int, mean: int, n: int, k: int, *, quick: bool = False) -> Case:
    def make(device: torch.device) -> tuple[Any, ...]:
        a, b = (
            dk.quantize_1x128(normal(device, groups, most, k)),
            dk.quantize_128x128(normal(device, groups, n, k, seed=1)),
        )
        counts = uneven_offsets(device, groups * mean, groups).diff()
        return *a, *b, counts, torch.empty(groups, most, n, dtype=torch.bfloat16, device=device)

    def check(inputs: tuple[Any, ...], out: Tensor) -> str | None:
        a, a_scale, b, b_scale, counts, _ = inputs
        return first(
            off("fp8_masked_gemm", out[g, :count], (a[g, :count], a_scale[g, :count]), (b[g], b_scale[g]))
            for g, count in enumerate(counts.tolist())
            if count
        )

    rows = groups * mean
    return Case(
        op="fp8_masked_gemm",
        shape={"G": groups, "Tmax": most, "rows": mean, "N": n, "K": k},
        make=make,
        run=lambda a, a_scale, b, b_scale, counts, out: dk.fp8_masked_gemm(
            a, a_scale, b, b_scale, counts, expected_m=mean, out=out
        ),
        check=check,
        bytes=(rows + groups * n) * k + scales(rows, k) + groups * scales(n, k) // 128 + 2 * rows * n,
        flops=2 * rows * n * k,
        unit="fp8",
        peers={"deep_gemm": lambda *inputs: peer_deep_gemm.masked(*inputs, mean)},
        checked=("deep_gemm",),
        quick=quick,
    )


def fp8_grouped_wgrad(
    groups: int, tokens: int, m: int, n: int, *, accumulate: bool = False, quick: bool = False, cpu: bool = False
) -> Case:
    op = "fp8_grouped_wgrad_accumulate" if accumulate else "fp8_grouped_wgrad"

    def make(device: torch.device) -> tuple[Any, ...]:
        offsets = uneven_offsets(device, tokens, groups)
        a, b = (
            dk.quantize_1x128_both(normal(device, tokens, size, seed=seed), offsets=offsets)[2:]
            for seed, size in enumerate((m, n))
        )
        return *a[:2], *b, torch.zeros(groups, m, n, device=device)

    def run(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, out: Tensor) -> Tensor:
        return dk.fp8_grouped_wgrad(a, a_scale, b, b_scale, offsets, out=out, accumulate=accumulate)

    def zeroed(*inputs: Tensor) -> Call:
        """Its kernel only adds."""
        add = peer_deep_gemm.k_grouped(*inputs)

        def call() -> Tensor:
            inputs[-1].zero_()
            return add()

        return call

    def check(inputs: tuple[Any, ...], out: Tensor) -> str | None:
        a, a_scale, b, b_scale, offsets, _ = inputs
        bounds = offsets.tolist()
        wrong = first(
            off(
                op,
                out[g],
                (a[:, start:end], a_scale[:, start // 128 : end // 128]),
                (b[:, start:end], b_scale[:, start // 128 : end // 128]),
            )
            for g, (start, end) in enumerate(pairwise(bounds))
        )
        out.zero_()  # the next side starts from nothing too
        return wrong

    return Case(
        op=op,
        shape={"G": groups, "S": tokens, "M": m, "N": n},
        make=make,
        run=run,
        check=check,
        bytes=(m + n) * tokens + scales(m + n, tokens) + (8 if accumulate else 4) * groups * m * n,
        flops=2 * tokens * m * n,
        unit="fp8",
        peers={"deep_gemm": peer_deep_gemm.k_grouped} if accumulate else {"zero_, deep_gemm": zeroed},
        checked=("deep_gemm", "zero_, deep_gemm"),
        devices=("cuda", "cpu") if cpu else ("cuda",),
        quick=quick,
    )


def fp8_grouped_gemm_swiglu_quantize(groups: int, rows: int, f: int, k: int, *, quick: bool = False) -> Case:
    def check(inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> str | None:
        a, a_scale, b, b_scale, offsets = inputs
        gate_up = dk.fp8_grouped_gemm(a, a_scale, b, b_scale, offsets, out_dtype=torch.float32)
        gate, up = gate_up.chunk(2, -1)
        wanted = torch.nn.functional.silu(gate) * up
        got = dk.dequantize(*outputs, dtype=torch.float32)
        # A step of E4M3, and what products summed in another order may differ by: on normal data sum |a| |b| is about
        # sqrt(K) times the result.
        scale = outputs[1].repeat_interleave(128, -1)[:, :f]
        spread = gate_up.square().mean(-1, keepdim=True).sqrt() * gate_up.abs().amax(-1, keepdim=True)
        bound = torch.maximum(wanted.abs() * 2**-3, scale * 2**-9) + 2 * ACCUMULATION * k**0.5 * spread
        return None if ((got - wanted).abs() <= bound).all() else "fp8_grouped_gemm_swiglu_quantize: codes are off"

    return Case(
        op="fp8_grouped_gemm_swiglu_quantize",
        shape={"G": groups, "S": rows, "F": f, "K": k},
        make=lambda device: grouped_inputs(device, groups, rows, 2 * f, k),
        run=dk.fp8_grouped_gemm_swiglu_quantize,
        check=check,
        bytes=(rows + 2 * groups * f) * k + scales(rows, k) + groups * scales(2 * f, k) // 128 + rows * f,
        flops=4 * rows * f * k,
        unit="fp8",
        quick=quick,
    )


# N x K: the query and latent projection of one token, both together; the query's up projection; the key's and value's;
# attention's output; an expert's gate and up; its down; the dense layers' gate and up, and down.
LAYERS = ((2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
EXPERT = ((4096, 7168), (7168, 2048))
DENSE = ((36864, 7168), (7168, 18432), (7168, 14336))  # the first layers' MLP; the projection before the MTP module
OTHERS = ((6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048))  # experts of other sizes, in DeepGEMM's tests
SWEEP = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096)
CASES = [
    *(fp8_gemm(m, n, k, quick=m in (16, 128, 4096), cpu=(m, n) == (1, 576)) for m in SWEEP for n, k in LAYERS),
    *(fp8_gemm(m, n, k) for m in (64, 128, 4096) for n, k in DENSE),
    *(fp8_gemm(4096, k, n) for n, k in LAYERS if (k, n) not in LAYERS),  # gradients of the inputs
    *(quantised_gemm(m, n, k, quick=m == 4096) for m in (1, 64, 128, 4096) for n, k in LAYERS),
    *(weight_gradient(n, k, 4096, quick=(n, k) == (7168, 2048)) for n, k in LAYERS),
    fp8_grouped_gemm(2, 8, 256, 256, cpu=True),
    *(fp8_grouped_gemm(g, 32768, n, k, quick=g == 8) for g in (4, 8) for n, k in EXPERT),
    *(fp8_grouped_gemm(g, 32768, n, k) for g in (4, 8) for n, k in OTHERS),
    *(fp8_grouped_gemm(g, rows, 4096, 7168) for g, rows in ((256, 4096), (8, 32), (32, 512))),
    *(fp8_masked_gemm(9, 1024, m, n, k, quick=m == 128) for m in (4, 16, 64, 128) for n, k in EXPERT),
    *(fp8_masked_gemm(g, 1024, 1024 // g, n, k) for g in (1, 2, 4) for n, k in EXPERT),
    *(
        fp8_masked_gemm(g, 4096, m, n, k)
        for g, m in ((32, 192), (6, 1024), (32, 20), (6, 20))
        for n, k in ((4096, 7168), *OTHERS)
    ),
    fp8_grouped_wgrad(2, 256, 128, 256, cpu=True),
    fp8_grouped_wgrad(8, 32768, 4096, 7168, quick=True),
    fp8_grouped_wgrad(8, 32768, 7168, 2048),
    *(fp8_grouped_wgrad(g, 32768, m, n, accumulate=True) for g in (4, 8, 16) for m, n in EXPERT),
    fp8_grouped_gemm_swiglu_quantize(8, 32768, 2048, 7168, quick=True),
]
