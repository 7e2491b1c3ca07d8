from __future__ import annotations

import torch

import dsv3_kernels as dk

from . import Call, bf16, e4m3, f32, i32

T, H, F = 4096, 7168, 2048
CODES = r"cvt\.rn\.satfinite\.e4m3x2\.f32"


def norm_with_gradients() -> None:
    dk.rms_norm(bf16(T, H), bf16(H), 1e-6, residual=bf16(T, H))
    op = torch.ops.dsv3_kernels.rms_norm_backward
    op(bf16(T, H), bf16(T, H), bf16(H), 1e-6, bf16(T, H))
    op(f32(3, 8192), f32(3, 8192), f32(8192), 1e-6, f32(3, 8192))  # the widest


def norm_quantized(columns: int) -> None:
    dk.rms_norm_quantize_1x128(bf16(T, columns), bf16(columns), 1e-6, residual=bf16(T, columns))


BACKWARD = "triton_rms_norm_backward", "triton_rms_norm_backward_weight"
CALLS = {
    "quantize_1x128": [
        Call(lambda: dk.quantize_1x128(bf16(T, H)), ("triton_quantize_1x128",), (CODES, r"ld\.global\.v4"), 89),
        Call(lambda: dk.quantize_1x128(f32(8, F), pow2_scale=True), ("triton_quantize_1x128",), (), 89),
    ],
    "quantize_128x128": [
        Call(lambda t=t: dk.quantize_128x128(t(F, H)), ("triton_quantize_128x128",), (CODES, r"ld\.global\.v4"), 89)
        for t in (bf16, f32)
    ],
    "quantize_1x128_both": [
        Call(lambda: dk.quantize_1x128_both(bf16(T, H)), ("triton_quantize_1x128_both",), (CODES,), 89),
        Call(lambda: dk.quantize_1x128_both(f32(T, H), offsets=i32(257)), ("triton_quantize_1x128_both",), (), 89),
    ],
    "dequantize": [
        Call(lambda: dk.dequantize(e4m3(T, H), f32(T, H // 128)), ("triton_dequantize",), (r"st\.global\.v4",), 89),
        Call(lambda: dk.dequantize(e4m3(F, H), f32(F // 128, H // 128)), ("triton_dequantize",), (), 89),
    ],
    "silu_mul_quantize_1x128": [
        Call(
            lambda rows=rows: dk.silu_mul_quantize_1x128(bf16(rows, 2 * F), weights=f32(rows)),
            ("triton_silu_mul_quantize_1x128",),
            (CODES, r"ld\.global\.v4"),
            89,
        )
        for rows in (8, T)
    ],
    "rms_norm": [Call(lambda: dk.rms_norm(bf16(T, 512), bf16(512), 1e-6), ("triton_rms_norm",), (r"ld\.global\.v4",))],
    "rms_norm_backward": [Call(norm_with_gradients, ("triton_rms_norm", *BACKWARD))],
    "rms_norm_quantize_1x128": [
        Call(
            lambda columns=columns: norm_quantized(columns),
            ("triton_rms_norm_quantize_1x128",),
            (CODES, r"ld\.global\.v4"),
            89,
        )
        for columns in (1536, H)
    ],
}
