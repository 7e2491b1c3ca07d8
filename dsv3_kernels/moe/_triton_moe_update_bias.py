"""moe_update_bias in Triton: one program, exact integers."""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _triton

MOST = 65536  # experts that one program takes


@triton.jit(do_not_specialize=["count", "bias_stride", "counts_stride"])
def triton_moe_update_bias(bias, counts, count, bias_stride, counts_stride, SPEED: tl.constexpr, BLOCK: tl.constexpr):
    """The speed is a constant, since it is one for most of a training, and has float64's digits so."""
    expert = tl.arange(0, BLOCK).to(tl.int64)
    there = expert < count
    load = tl.load(counts + expert * counts_stride, mask=there, other=0).to(tl.int64)
    excess = tl.sum(load, 0) - count * load
    place = bias + expert * bias_stride
    speed = tl.full(expert.shape, SPEED, bias.dtype.element_ty)
    step = tl.where(excess > 0, speed, tl.where(excess < 0, -speed, 0.0))
    tl.store(place, tl.load(place, mask=there, other=0.0) + step, mask=there)


def moe_update_bias_cannot(bias: Tensor, *_: object) -> str | None:
    return f"the Triton kernel takes up to {MOST} experts, got {bias.shape[0]}" if bias.shape[0] > MOST else None


def moe_update_bias(bias: Tensor, counts: Tensor, speed: float) -> None:
    count = bias.shape[0]
    block = max(32, _triton.next_power_of_2(count))
    sizes = count, bias.stride(0), counts.stride(0), speed, block
    warps = min(16, max(1, block // 256))
    _triton.launch(triton_moe_update_bias, (1,), bias, counts, *sizes, num_warps=warps)
