from __future__ import annotations

import torch

import dsv3_kernels as dk

from . import Call, bf16, e4m3, f32, i32

H, F, G = 7168, 2048, 32
WGMMA = (r"wgmma\.mma_async\.sync\.aligned\.m64n(64|128)k32\.f32\.e4m3\.e4m3",)


def call(kernel: str, run) -> Call:
    return Call(run, (kernel,), WGMMA, 89)


def rows(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A 1x128 operand, its scales next to each other along the rows."""
    *groups, m, k = shape
    return e4m3(*shape), f32(*groups, k // 128, m).mT


def blocks(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A 128x128 operand."""
    return e4m3(*shape), f32(*shape[:-2], shape[-2] // 128, shape[-1] // 128)


CALLS = {
    "fp8_gemm": [
        call("triton_fp8_gemm", lambda: dk.fp8_gemm(*rows(4096, H), *blocks(4096, H))),
        call("triton_fp8_gemm", lambda: dk.fp8_gemm(*rows(64, H), *blocks(24576, H), bias=bf16(24576))),
        call("triton_fp8_gemm", lambda: dk.fp8_gemm(*rows(64, H), *rows(2112, H), out_dtype=torch.float32)),
        call("triton_fp8_gemm", lambda: dk.fp8_gemm(*rows(4096, H), e4m3(F, H), f32(F, H // 128))),  # they lie apart
    ],
    "fp8_gemm_accumulate": [
        call("triton_fp8_gemm", lambda: dk.fp8_gemm(*rows(H, 4096), *rows(F, 4096), out=f32(H, F), accumulate=True)),
        call("triton_fp8_gemm", lambda: dk.fp8_gemm(*rows(64, H), *rows(H, H), out=bf16(64, H), accumulate=True)),
    ],
    "fp8_grouped_gemm": [
        call("triton_fp8_grouped_gemm", lambda: dk.fp8_grouped_gemm(*rows(8192, H), *blocks(G, 2 * F, H), i32(G + 1))),
        call("triton_fp8_grouped_gemm", lambda: dk.fp8_grouped_gemm(*rows(256, F), *rows(G, H, F), i32(G + 1))),
    ],
    "fp8_masked_gemm": [
        call("triton_fp8_masked_gemm", lambda: dk.fp8_masked_gemm(*rows(G, 512, H), *blocks(G, 2 * F, H), i32(G))),
        call(
            "triton_fp8_masked_gemm",
            lambda: dk.fp8_masked_gemm(*rows(G, 512, F), *rows(G, H, F), i32(G), expected_m=16),
        ),
    ],
    "fp8_grouped_wgrad": [
        call("triton_fp8_grouped_wgrad", lambda: dk.fp8_grouped_wgrad(*rows(2 * F, 8192), *rows(H, 8192), i32(G + 1))),
        call("triton_fp8_grouped_wgrad", lambda: dk.fp8_grouped_wgrad(*rows(64, 1024), *rows(H, 1024), i32(G + 1))),
    ],
    "fp8_grouped_wgrad_accumulate": [
        call(
            "triton_fp8_grouped_wgrad",
            lambda: dk.fp8_grouped_wgrad(
                *rows(2 * F, 8192), *rows(H, 8192), i32(G + 1), out=f32(G, 2 * F, H), accumulate=True
            ),
        ),
    ],
    "fp8_grouped_gemm_swiglu_quantize": [
        call(
            "triton_fp8_grouped_gemm_swiglu_quantize",
            lambda: dk.fp8_grouped_gemm_swiglu_quantize(
                *rows(8192, H), *blocks(G, 2 * F, H), i32(G + 1), weights=f32(8192)
            ),
        ),
        call(
            "triton_fp8_grouped_gemm_swiglu_quantize",
            lambda: dk.fp8_grouped_gemm_swiglu_quantize(*rows(256, H), *rows(G, 2 * F, H), i32(G + 1)),
        ),
    ],
}
