"""Benchmarks of the quant family. All of it moves bytes: the ceiling is the copy bandwidth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dsv3_kernels as dk

from .cases import Call, Case

E4M3 = torch.float8_e4m3fn


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
        random = torch.Generator(device).manual_seed(0)
        x = torch.randn(tokens, columns, generator=random, device=device).bfloat16()
        return (x, dk.quantize_1x128(x))

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


# K: hidden size, an expert's inner size, attention's output, the dense inner size.
CASES = [
    quantize_1x128(1, 7168, quick=True, cpu=True),
    quantize_1x128(128, 7168, quick=True, cpu=True),
    quantize_1x128(4096, 2048, quick=True),
    quantize_1x128(4096, 7168, quick=True),
    quantize_1x128(4096, 16384),
    quantize_1x128(4096, 18432),
    quantize_1x128(32768, 7168),
]
