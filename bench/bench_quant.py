"""Benchmarks of the quant family. All of it moves bytes: the ceiling is the copy bandwidth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dsv3_kernels as dk

from .cases import Call, Case

E4M3 = torch.float8_e4m3fn
EPS = 1e-6


def normal(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    """A second operand takes another seed: rows that equal the first one's make sums of squares, of one sign."""
    random = torch.Generator(device).manual_seed(sum(shape) + 1_000_003 * seed)
    return torch.randn(shape, generator=random, device=device).bfloat16()


def scales(rows: int, columns: int) -> int:
    """Bytes of 1x128 scales."""
    return rows * -(-columns // 128) * 4


def uneven_offsets(device: torch.device, rows: int, groups: int) -> Tensor:
    """Where groups of 0.7 to 1.3 times the mean size begin and end; the last ends at `rows`."""
    sizes = torch.linspace(0.7, 1.3, groups, dtype=torch.float64)[torch.arange(groups) * 5 % groups]
    ends = (sizes.cumsum(0) * rows / sizes.sum()).round()
    return torch.nn.functional.pad(ends, (1, 0)).int().to(device)


def same_bits(got: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors agree bit for bit, whatever their strides."""
    return torch.equal(got.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))


def against_eager(op: str, outputs: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> str | None:
    """The bits that eager gives: the definition, tested against float64."""
    wrong = [i for i, pair in enumerate(zip(outputs, wanted, strict=True)) if not same_bits(*pair)]
    return f"{op}: output {wrong[0]} has other bits than eager" if wrong else None


def compiled_definition(x: Tensor) -> Call:
    """torch.compile's kernel for the op's definition, in plain PyTorch."""

    def definition(x: Tensor) -> tuple[Tensor, Tensor]:
        blocks = x.float().unflatten(-1, (-1, 128))
        scale = blocks.abs().amax(-1).clamp(min=1e-4) / 448
        return (blocks / scale[..., None]).to(E4M3).flatten(-2), scale

    function = torch.compile(definition, dynamic=False)
    function(x)
    return lambda: function(x)


def deep_gemm_cast(x: Tensor) -> Call:
    from deep_gemm.utils import per_token_cast_to_fp8

    return lambda: per_token_cast_to_fp8(x, use_ue8m0=False)


def quantize_1x128(tokens: int, columns: int, *, quick: bool = False, cpu: bool = False) -> Case:
    def make(device: torch.device) -> tuple[Any, ...]:
        x = normal(device, tokens, columns)
        return x, dk.quantize_1x128(x)

    def run(x: Tensor, out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return dk.quantize_1x128(x, out=out)

    def check(inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> str | None:
        with dk.backend("eager"):
            return against_eager("quantize_1x128", outputs, dk.quantize_1x128(inputs[0]))

    return Case(
        op="quantize_1x128",
        shape={"T": tokens, "K": columns},
        make=make,
        run=run,
        check=check,
        bytes=tokens * columns * 3 + tokens * -(-columns // 128) * 4,
        peers={
            "torch.compile": lambda x, out: compiled_definition(x),
            "deep_gemm": lambda x, out: deep_gemm_cast(x),
        },
        devices=("cuda", "cpu") if cpu else ("cuda",),
        quick=quick,
    )


def quantize_128x128(rows: int, columns: int, *, quick: bool = False, cpu: bool = False) -> Case:
    def make(device: torch.device) -> tuple[Any, ...]:
        w = normal(device, rows, columns)
        return w, dk.quantize_128x128(w)

    def check(inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> str | None:
        with dk.backend("eager"):
            return against_eager("quantize_128x128", outputs, dk.quantize_128x128(inputs[0]))

    return Case(
        op="quantize_128x128",
        shape={"N": rows, "K": columns},
        make=make,
        run=lambda w, out: dk.quantize_128x128(w, out=out),
        check=check,
        bytes=rows * columns * 3 + scales(rows, columns) // 128,
        devices=("cuda", "cpu") if cpu else ("cuda",),
        quick=quick,
    )


def quantize_1x128_both(tokens: int, columns: int, groups: int, *, quick: bool = False, cpu: bool = False) -> Case:
    """Tokens spread over the groups unevenly, as a router spreads them."""

    def make(device: torch.device) -> tuple[Any, ...]:
        x, offsets = normal(device, tokens, columns), uneven_offsets(device, tokens, groups) if groups else None
        return x, offsets, dk.quantize_1x128_both(x, offsets=offsets)

    def check(inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> str | None:
        with dk.backend("eager"):
            wanted = dk.quantize_1x128_both(inputs[0], offsets=inputs[1])
        used = int(wanted[4][-1]) if groups else wanted[2].shape[1]
        owned = [[t[0], t[1], t[2][:, :used], t[3][:, : used // 128]] for t in (outputs, wanted)]
        return against_eager("quantize_1x128_both", tuple(owned[0]), tuple(owned[1]))

    return Case(
        op="quantize_1x128_both",
        shape={"T": tokens, "K": columns, "G": groups},
        make=make,
        run=lambda x, offsets, out: dk.quantize_1x128_both(x, offsets=offsets, out=out),
        check=check,
        bytes=tokens * columns * 4 + 2 * scales(tokens, columns),
        devices=("cuda", "cpu") if cpu else ("cuda",),
        quick=quick,
    )


def dequantize(rows: int, columns: int, *, quick: bool = False) -> Case:
    def make(device: torch.device) -> tuple[Any, ...]:
        return dk.quantize_128x128(normal(device, rows, columns))

    def check(inputs: tuple[Any, ...], output: Tensor) -> str | None:
        with dk.backend("eager"):
            return against_eager("dequantize", (output,), (dk.dequantize(*inputs),))

    return Case(
        op="dequantize",
        shape={"N": rows, "K": columns},
        make=make,
        run=dk.dequantize,
        check=check,
        bytes=rows * columns * 3,
        quick=quick,
    )


def silu_mul_quantize_1x128(tokens: int, columns: int, *, quick: bool = False, cpu: bool = False) -> Case:
    def make(device: torch.device) -> tuple[Any, ...]:
        gate_up = normal(device, tokens, 2 * columns)
        return gate_up, dk.silu_mul_quantize_1x128(gate_up)

    def check(inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> str | None:
        gate, up = inputs[0].float().chunk(2, -1)
        wanted = torch.nn.functional.silu(gate) * up
        got = dk.dequantize(*outputs, dtype=torch.float32)
        scale = outputs[1].repeat_interleave(128, -1)[:, :columns]
        bound = torch.maximum(wanted.abs() * 2**-4, scale * 2**-10) * 1.001
        return None if ((got - wanted).abs() <= bound).all() else "silu_mul_quantize_1x128: a code is off by a step"

    return Case(
        op="silu_mul_quantize_1x128",
        shape={"T": tokens, "F": columns},
        make=make,
        run=lambda gate_up, out: dk.silu_mul_quantize_1x128(gate_up, out=out),
        check=check,
        bytes=tokens * columns * 5 + scales(tokens, columns),
        devices=("cuda", "cpu") if cpu else ("cuda",),
        quick=quick,
    )


def norm_inputs(device: torch.device, tokens: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    return normal(device, tokens, columns), 1 + normal(device, columns) / 8, normal(device, tokens, columns)


def normed_badly(op: str, inputs: tuple[Any, ...], normed: Tensor, total: Tensor) -> str | None:
    """Both outputs of rms_norm with a residual: the sum to the bit, the norm to a step of bfloat16."""
    x, weight, residual = inputs
    wide = total.float()
    wanted = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight.float()
    if not same_bits(total, x + residual):
        return f"{op}: the sum has other bits than eager"
    return None if ((normed.float() - wanted).abs() <= 2**-8 * 1.01 * wanted.abs()).all() else f"{op}: the norm is off"


def rms_norm(tokens: int, columns: int, *, quick: bool = False, cpu: bool = False) -> Case:
    return Case(
        op="rms_norm",
        shape={"T": tokens, "H": columns},
        make=lambda device: norm_inputs(device, tokens, columns),
        run=lambda x, weight, residual: dk.rms_norm(x, weight, EPS, residual=residual),
        check=lambda inputs, outputs: normed_badly("rms_norm", inputs, *outputs),
        bytes=tokens * columns * 8,
        peers={"torch.compile": compiled_norm},
        devices=("cuda", "cpu") if cpu else ("cuda",),
        quick=quick,
    )


def compiled_norm(x: Tensor, weight: Tensor, residual: Tensor) -> Call:
    def definition(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return torch.nn.functional.rms_norm(total, total.shape[-1:], weight, EPS), total

    function = torch.compile(definition, dynamic=False)
    function(x, weight, residual)
    return lambda: function(x, weight, residual)


def rms_norm_backward(tokens: int, columns: int) -> Case:
    def make(device: torch.device) -> tuple[Any, ...]:
        grad, weight, x = norm_inputs(device, tokens, columns)
        return grad, x, weight

    def check(inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> str | None:
        grad, x, weight = (t.double() for t in inputs)
        rms = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
        pull = grad * weight
        wanted = rms * (pull - x * rms * (pull * x * rms).mean(-1, keepdim=True))
        size = rms * (pull.abs() + (x * rms).abs() * (pull * x * rms).abs().mean(-1, keepdim=True))
        sums = (grad * x * rms).sum(0), (grad * x * rms).abs().sum(0)
        ok = ((outputs[0] - wanted).abs() <= 2**-8 * wanted.abs() + 1e-5 * size).all()
        ok &= ((outputs[1] - sums[0]).abs() <= 2**-8 * sums[0].abs() + 1e-5 * sums[1]).all()
        return None if ok else "rms_norm_backward: a gradient is off"

    return Case(
        op="rms_norm_backward",
        shape={"T": tokens, "H": columns},
        make=make,
        run=lambda grad, x, weight: torch.ops.dsv3_kernels.rms_norm_backward(grad, x, weight, EPS, None),
        check=check,
        bytes=tokens * columns * 6,
    )


def rms_norm_quantize_1x128(tokens: int, columns: int, *, quick: bool = False, cpu: bool = False) -> Case:
    def make(device: torch.device) -> tuple[Any, ...]:
        x, weight, residual = norm_inputs(device, tokens, columns)
        return x, weight, residual, dk.rms_norm_quantize_1x128(x, weight, EPS, residual=residual)

    def check(inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> str | None:
        q, scale, normed, total = outputs
        with dk.backend("eager"):
            wrong = against_eager("rms_norm_quantize_1x128", (q, scale), dk.quantize_1x128(normed))
        return wrong or normed_badly("rms_norm_quantize_1x128", inputs[:3], normed, total)

    return Case(
        op="rms_norm_quantize_1x128",
        shape={"T": tokens, "H": columns},
        make=make,
        run=lambda x, weight, residual, out: dk.rms_norm_quantize_1x128(x, weight, EPS, residual=residual, out=out),
        check=check,
        bytes=tokens * columns * 9 + scales(tokens, columns),
        devices=("cuda", "cpu") if cpu else ("cuda",),
        quick=quick,
    )


# K: hidden size, an expert's inner size, attention's output, the dense inner size.
CASES = [
    quantize_1x128(1, 7168, quick=True, cpu=True),
    quantize_1x128(128, 7168, quick=True, cpu=True),
    quantize_1x128(4096, 2048, quick=True),
    quantize_1x128(4096, 7168, quick=True),
    quantize_1x128(4096, 16384),
    quantize_1x128(4096, 18432),
    quantize_1x128(32768, 7168),
    quantize_128x128(7168, 2048, quick=True),
    quantize_128x128(2112, 1536, cpu=True),
    quantize_128x128(7168, 18432),
    quantize_1x128_both(128, 512, 2, cpu=True),
    quantize_1x128_both(4096, 7168, 0, quick=True),
    quantize_1x128_both(32768, 2048, 8),
    dequantize(7168, 2048, quick=True),
    dequantize(7168, 18432),
    silu_mul_quantize_1x128(1, 2048, quick=True, cpu=True),
    silu_mul_quantize_1x128(4096, 2048, quick=True),
    silu_mul_quantize_1x128(4096, 18432),
    rms_norm(1, 7168, quick=True, cpu=True),
    rms_norm(4096, 7168, quick=True),
    rms_norm_backward(4096, 7168),
    rms_norm_quantize_1x128(1, 7168, quick=True, cpu=True),
    rms_norm_quantize_1x128(4096, 7168, quick=True),
]
