from __future__ import annotations

from collections.abc import Callable

import torch

import dsv3_kernels as dk
from dsv3_kernels.mla.mla_decode_plan import Plan

from . import Call, bf16, i32

WGMMA = r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.bf16\.bf16"
MMA = r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16"


def decode(heads: int, fp8: bool, plan: bool) -> Callable[[], object]:
    """128 requests of up to 4096 tokens."""

    def run() -> object:
        cache = torch.empty(8192, 64, 656, dtype=torch.uint8) if fp8 else bf16(8192, 64, 576)
        given = Plan(i32(259, 4), i32(129), i32(133)) if plan else None
        return dk.mla_decode(bf16(128, 1, heads, 576), cache, i32(128, 64), i32(128), softmax_scale=1.0, plan=given)

    return run


KERNELS = ("triton_mla_decode", "triton_mla_decode_join")
CALLS = {
    "mla_decode": [
        Call(decode(128, False, True), KERNELS, (WGMMA,)),
        Call(decode(16, False, False), KERNELS, (MMA,)),
        Call(decode(128, True, True), KERNELS, (WGMMA,), 89),
        Call(decode(16, True, False), KERNELS, (MMA,), 89),
    ],
    "mla_decode_plan": [
        Call(lambda: dk.mla_decode_plan(i32(128), num_queries=1, num_heads=128), ("triton_mla_decode_plan",)),
        Call(
            lambda: dk.mla_decode_plan(i32(128), num_queries=1, num_heads=128, policy="fixed"),
            ("triton_mla_decode_plan",),
        ),
    ],
}
