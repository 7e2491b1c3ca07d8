"""moe_permute: rows sorted by expert, for the grouped GEMMs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .. import backends
from .._library import define, records
from ._handle import PermuteHandle
from .moe_unpermute import op as unpermute

OP = "moe_permute"
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def moe_permute(
    x: Tensor, experts: Tensor, num_experts: int, *, scale: Tensor | None = None, alignment: int = 1
) -> tuple[Tensor, Tensor | None, Tensor, PermuteHandle]:
    """Copy each token to its experts: the rows of expert e are rows[offsets[e]:offsets[e + 1]], in token order.

    Nothing waits for the device: R = T K + E (alignment - 1) rows are returned whatever the routing, which is enough.

    Args:
        x: `[T, H]` bfloat16, float16, float32, float64 or float8_e4m3fn; the last dimension contiguous.
        experts: `[T, K]` int32 or int64 in [-1, num_experts); -1 drops the choice.
        num_experts: E.
        scale: `[T, G]` float32, scales of x's rows, permuted with them; in any strides.
        alignment: every expert's segment starts at a multiple of it, and padding rows at its end are zero.

    Returns:
        `rows [R, H]` in x's dtype, differentiable in x (not FP8), once; `row_scale [R, G]`, column-major where `scale`
        is, or None without `scale`; `offsets [E + 1]` int32, multiples of `alignment`; the `PermuteHandle`, whose
        `counts [E]` are the rows without padding. Rows past offsets[E] are unspecified.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape, stride or number; on the CPU also an expert out of range.
        RuntimeError: devices differ.
    """
    check.dtype(OP, "x", x, *FLOATS, torch.float8_e4m3fn)
    check.shape(OP, "x", x, ("T", "H"))
    check.rows(OP, "x", x)
    check.dtype(OP, "experts", experts, torch.int32, torch.int64)
    check.shape(OP, "experts", experts, (x.shape[0], "K"))
    check.value(OP, "experts", experts.shape[1] > 0, list(experts.shape), "at least one expert per token")
    check.integer(OP, "num_experts", num_experts, 1)
    check.integer(OP, "alignment", alignment, 1)
    if scale is not None:
        check.dtype(OP, "scale", scale, torch.float32)
        check.shape(OP, "scale", scale, (x.shape[0], "G"))
    check.device(OP, x=x, experts=experts, scale=scale)
    if records(x) and x.dtype in FLOATS:
        rows, row_scale, offsets, *maps = _Permute.apply(x, experts, scale, num_experts, alignment)
    else:
        rows, row_scale, offsets, *maps = _op(x, experts, scale, num_experts, alignment)
    return rows, None if scale is None else row_scale, offsets, PermuteHandle(*maps)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, experts: Tensor, scale: Tensor | None, num_experts: int, alignment: int
    ) -> tuple[Tensor, ...]:
        backends.save_for_backward(ctx)
        rows, *rest = _op(x, experts, scale, num_experts, alignment)
        ctx.save_for_backward(rest[3])
        ctx.mark_non_differentiable(*rest)
        return rows, *rest

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, *_: Any) -> tuple[Tensor, None, None, None, None]:
        (row_of,) = ctx.saved_tensors
        with backends.restored(ctx):
            return unpermute(grad_rows.contiguous(), row_of, None), None, None, None, None


def empty_scale(scale: Tensor | None, x: Tensor, rows: int) -> Tensor:
    """Uninitialised scales for the rows, column-major where `scale` is; no elements without `scale`."""
    if scale is None:
        return x.new_empty(0, dtype=torch.float32)
    blocks = scale.shape[1]
    if blocks > 1 and scale.stride(1) > 1:
        return scale.new_empty_strided((rows, blocks), (1, (rows + 3) // 4 * 4))
    return scale.new_empty(rows, blocks)


def _allocate(x: Tensor, experts: Tensor, scale: Tensor | None, num_experts: int, alignment: int) -> tuple[Tensor, ...]:
    tokens, choices = experts.shape
    rows = tokens * choices + num_experts * (alignment - 1)

    def integers(*size: int) -> Tensor:
        return x.new_empty(size, dtype=torch.int32)

    return (
        x.new_empty(rows, x.shape[1]),
        empty_scale(scale, x, rows),
        integers(num_experts + 1),
        integers(num_experts),
        integers(tokens, choices),
        integers(rows),
    )


_op = define(
    "moe_permute(Tensor x, Tensor experts, Tensor? scale, int num_experts, int alignment) "
    "-> (Tensor rows, Tensor row_scale, Tensor offsets, Tensor counts, Tensor row_of, Tensor source)",
    allocate=_allocate,
)
