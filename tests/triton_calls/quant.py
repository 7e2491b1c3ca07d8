from __future__ import annotations

import dsv3_kernels as dk

from . import Call, bf16, f32

H = 7168
CALLS = {
    "quantize_1x128": [
        Call(
            lambda: dk.quantize_1x128(bf16(4096, H)),
            ("triton_quantize_1x128",),
            (r"cvt\.rn\.satfinite\.e4m3x2\.f32", r"ld\.global\.v4"),
            89,
        ),
        Call(lambda: dk.quantize_1x128(f32(8, 2048), pow2_scale=True), ("triton_quantize_1x128",), (), 89),
    ],
}
