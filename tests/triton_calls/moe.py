from __future__ import annotations

import torch

import dsv3_kernels as dk

from . import Call, bf16, e4m3, f32, i32

T, H, E, K = 4096, 7168, 256, 8
V3 = {"num_groups": 8, "topk_groups": 4, "top_k": K, "scaling": 2.5}
ROWS = T * K + E * 127
PERMUTE = "triton_moe_permute_count", "triton_moe_permute_scan", "triton_moe_permute_copy"
VECTORS = (r"ld\.global\.v4",)


def ops() -> object:
    for name in ("moe_gate", "moe_unpermute"):
        getattr(dk, name)  # defines the ops
    return torch.ops.dsv3_kernels


def gate_backward(experts: int, score: str) -> None:
    ops().moe_gate_backward(f32(T, K), f32(T, experts), i32(T, K), 2.5, True, score)


BALANCE = tuple(f"triton_moe_balance_loss_{part}" for part in ("count", "terms", "sum", "backward"))


def balance(*, backward: bool) -> None:
    scores, experts, ids = f32(T, E), torch.zeros(T, K, dtype=torch.int32), torch.zeros(T, dtype=torch.int32)
    if backward:
        dk.moe_balance_loss  # noqa: B018 (defines the op)
        torch.ops.dsv3_kernels.moe_balance_loss_backward(f32(), scores, experts, ids, 1e-4)
    else:
        dk.moe_balance_loss(scores, experts, seq_ids=ids, alpha=1e-4)


CALLS = {
    "moe_balance_loss": [Call(lambda: balance(backward=False), BALANCE[:3])],
    "moe_balance_loss_backward": [Call(lambda: balance(backward=True), (BALANCE[0], *BALANCE[2:]))],
    "moe_gate": [
        Call(lambda: dk.moe_gate(f32(T, E), f32(E), **V3), ("triton_moe_gate",)),
        Call(lambda: dk.moe_gate(f32(T, 4096), f32(4096), **V3), ("triton_moe_gate",)),  # as many experts as it takes
        Call(lambda: dk.moe_gate(f32(T, 1024), None, **V3, score="softmax"), ("triton_moe_gate",)),
    ],
    "moe_gate_backward": [
        Call(lambda: gate_backward(E, "sigmoid"), ("triton_moe_gate_backward",)),
        Call(lambda: gate_backward(4096, "sigmoid"), ("triton_moe_gate_backward",)),
        Call(lambda: gate_backward(1024, "softmax"), ("triton_moe_gate_backward",)),
    ],
    "moe_permute": [
        Call(lambda: dk.moe_permute(e4m3(T, H), i32(T, K), E, scale=f32(T, H // 128), alignment=128), PERMUTE),
        Call(lambda: dk.moe_permute(bf16(T, H), i32(T, K), 4096), PERMUTE),
    ],
    "moe_unpermute": [
        Call(lambda: ops().moe_unpermute(bf16(ROWS, H), i32(T, K), f32(T, K)), ("triton_moe_unpermute",), VECTORS)
    ],
    "moe_unpermute_backward": [
        Call(
            lambda: ops().moe_unpermute_backward(bf16(T, H), bf16(ROWS, H), i32(T, K), i32(ROWS), f32(T, K)),
            ("triton_moe_unpermute_backward",),
            VECTORS,
        )
    ],
    "moe_update_bias": [Call(lambda: dk.moe_update_bias(f32(E), i32(E), 0.001), ("triton_moe_update_bias",))],
}
