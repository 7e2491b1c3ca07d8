"""rope: rotary position embedding, and YaRN's table of angles."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .. import backends
from .._library import define, records

OP = "rope"


def rope(
    x: Tensor, positions: Tensor, cos_sin: Tensor, *, interleaved: bool = True, out: Tensor | None = None
) -> Tensor:
    """Rotate the pairs of `x` by the angles of its positions.

    A pair (a, b) becomes (a cos - b sin, a sin + b cos), in float32. DeepSeek's weights pair neighbours, (x0, x1),
    (x2, x3), ...: `interleaved=True`, and so does every cache of this package; `interleaved=False` pairs
    (x0, x[D/2]), (x1, x[D/2 + 1]), .... The output keeps the order of the input.
    RoFormer (arXiv 2104.09864), section 3.2.

    Args:
        x: `[..., D]` bfloat16, float16, float32 or float64; the last dimension contiguous, D even.
        positions: int32 or int64, the shape of x's first dimensions: `[T]` for x `[T, D]` or `[T, heads, D]`.
            Values in [0, P).
        cos_sin: `[P, D]` float32 (float64 for a float64 x): row p holds D/2 cosines, then D/2 sines (`yarn_cos_sin`).
        interleaved: which elements are a pair.
        out: where to write, of x's shape and dtype, shares no memory with x; may be strided as `q[..., 512:]` of
            queries `[T, heads, 576]` is, the last dimension contiguous. Without autograd.

    Returns:
        `out`, or a new tensor of x's shape and dtype. Differentiable in x, once.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape or stride; on the CPU also a position outside the table.
        RuntimeError: devices differ.
    """
    check.dtype(OP, "x", x, torch.bfloat16, torch.float16, torch.float32, torch.float64)
    check.dtype(OP, "positions", positions, torch.int32, torch.int64)
    check.dtype(OP, "cos_sin", cos_sin, torch.float64 if x.dtype == torch.float64 else torch.float32)
    check.at_least(OP, "x", x, 1)
    check.rows(OP, "x", x)
    check.value(OP, "x", x.shape[-1] % 2 == 0, x.shape[-1], "an even last dimension")
    leading = x.shape[:-1]
    fits = positions.dim() <= len(leading) and positions.shape == leading[: positions.dim()]
    check.value(OP, "positions", fits, list(positions.shape), f"the shape of x's first dimensions, {list(leading)}")
    check.shape(OP, "cos_sin", cos_sin, ("P", x.shape[-1]))
    check.rows(OP, "cos_sin", cos_sin)
    check.device(OP, x=x, positions=positions, cos_sin=cos_sin, out=out)
    if out is not None:
        check.dtype(OP, "out", out, x.dtype)
        check.shape(OP, "out", out, x.shape)
        check.rows(OP, "out", out)
        _check_strides(out, positions)
        check.overlap(OP, "out", out, x=x, positions=positions, cos_sin=cos_sin)
        check.value(OP, "out", not records(x), "an x that requires grad", "none: nothing is recorded for autograd")
        _op.out(x, positions, cos_sin, interleaved, False, out)
        return out
    if records(x):
        return _Rope.apply(x, positions, cos_sin, interleaved)
    return _op(x, positions, cos_sin, interleaved, False)


def yarn_cos_sin(
    head_dim: int,
    max_positions: int,
    *,
    base: float,
    factor: float,
    original_max: int,
    beta_fast: float,
    beta_slow: float,
    mscale: float,
    mscale_all_dim: float,
    device: torch.device | str | None,
) -> Tensor:
    """Cosines and sines of every position, for `rope`.

    YaRN (arXiv 2309.00071, section 3.2, "NTK-by-parts"): frequencies that turn fewer than `beta_slow` times within
    `original_max` positions are divided by `factor`, those that turn more than `beta_fast` times stay, a linear ramp
    lies between. `factor=1` is plain RoPE. The table is multiplied by m(mscale) / m(mscale_all_dim) with
    m(s) = 0.1 s ln(factor) + 1: that is 1 in every DeepSeek-V3 release, whose attention scale takes m(mscale_all_dim)^2
    instead. Computed in float32, as the angles that the released weights were trained with, and on the CPU, so that
    every device has the same table.

    Args:
        head_dim: D, the rotated width (64 in DeepSeek-V3), even.
        max_positions: P, the number of rows.
        base: theta. original_max: positions of the first training. device: where the table goes.

    Returns:
        `[P, D]` float32: D/2 cosines, then D/2 sines.

    Raises:
        TypeError: a size is not an int. ValueError: an odd or negative size, or a factor below 1.
    """
    name = "yarn_cos_sin"
    check.integer(name, "head_dim", head_dim, 0)
    check.integer(name, "max_positions", max_positions, 0)
    check.integer(name, "original_max", original_max, 1)
    check.value(name, "head_dim", head_dim % 2 == 0, head_dim, "an even number")
    check.value(name, "base", base > 1, base, "a number above 1")
    check.value(name, "factor", factor >= 1, factor, "at least 1")
    inverse = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if factor > 1:

        def turns(rotations: float) -> float:
            """The index of the frequency that makes so many rotations within `original_max` positions."""
            return head_dim * math.log(original_max / (2 * math.pi * rotations)) / (2 * math.log(base))

        low, high = max(math.floor(turns(beta_fast)), 0), min(math.ceil(turns(beta_slow)), head_dim - 1)
        width = high - low if high > low else 0.001
        keep = 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
        inverse = inverse / factor * (1 - keep) + inverse * keep

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0

    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), inverse)
    table = torch.cat([angles.cos(), angles.sin()], -1) * (magnitude(mscale) / magnitude(mscale_all_dim))
    return table.to(device) if device is not None else table


def heads_of(x: Tensor, positions: Tensor) -> Tensor:
    """`[tokens, heads, D]`, as kernels take x and out: a copy where no strides describe it so."""
    return x if x.dim() == 3 and positions.dim() == 1 else x.reshape(_heads_shape(x, positions))


def _heads_shape(x: Tensor, positions: Tensor) -> tuple[int, int, int]:
    return positions.numel(), math.prod(x.shape[positions.dim() : -1]), x.shape[-1]


def _check_strides(out: Tensor, positions: Tensor) -> None:
    """ValueError where only a copy of `out` would be `[tokens, heads, D]`."""
    if out.dim() == 3 and positions.dim() == 1:
        return
    try:
        out.view(_heads_shape(out, positions))
    except RuntimeError as error:
        wanted = "strides that make it [tokens, heads, D]"
        raise ValueError(f"{OP}: out: got strides {list(out.stride())}, wanted {wanted}") from error


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
        backends.save_for_backward(ctx)
        ctx.save_for_backward(positions, cos_sin)
        ctx.interleaved = interleaved
        return _op(x, positions, cos_sin, interleaved, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        positions, cos_sin = ctx.saved_tensors
        with backends.restored(ctx):
            return _op(grad.contiguous(), positions, cos_sin, ctx.interleaved, True), None, None, None


def _allocate(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool, transposed: bool) -> Tensor:
    return x.new_empty(x.shape)


# `transposed` applies the transposed matrix, the rotation by the negative angle: the gradient.
_ARGUMENTS = "Tensor x, Tensor positions, Tensor cos_sin, bool interleaved, bool transposed"
_op = define(f"rope({_ARGUMENTS}) -> Tensor", allocate=_allocate, out=f"rope_out({_ARGUMENTS}, Tensor(a!) out) -> ()")
