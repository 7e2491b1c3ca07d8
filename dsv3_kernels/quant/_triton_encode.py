"""What the quantisers share: scales and E4M3 codes with the bits of IEEE division, and tensors seen as rows."""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def divide(x, divisor, reciprocal):
    """x / divisor with the bits of IEEE division as far as E4M3 can see, in five instructions instead of about twelve.

    reciprocal is 1 / divisor rounded to nearest. csrc/quant/divide.h has the proof and its conditions. Triton's -x is
    0 - x: the reciprocal is negated and not the remainders, so that -0 / divisor stays -0.
    """
    quotient = x * reciprocal
    quotient = tl.fma(tl.fma(divisor, quotient, -x), -reciprocal, quotient)
    return tl.fma(tl.fma(divisor, quotient, -x), -reciprocal, quotient)


@triton.jit
def magnitude(x):
    """|x| as an integer that orders as |x| does, infinities and then NaN last: maxima of it lose no NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(largest, pow2):
    """Scale of blocks whose largest `magnitude` is given: a positive normal number, or NaN for what is not finite."""
    amax = tl.maximum(largest.to(tl.float32, bitcast=True), 1e-4)
    scale = tl.div_rn(amax, tl.full(amax.shape, 448.0, tl.float32))
    # Carrying a mantissa that is not zero into the exponent rounds up to a power of two.
    power = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    scale = tl.where(pow2, power, scale)
    return tl.where(largest < 0x7F800000, scale, float("nan"))


@triton.jit
def encode(x, scale):
    """E4M3 codes of x / scale (broadcast), rounded to nearest even and saturated; NaN is 0x7F."""
    return divide(x, scale, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)).to(tl.float8e4nv)


def as_rows(x: Tensor) -> Tensor:
    """x as a matrix, its last dimension the columns: a view, or a copy where no single stride describes the rows."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def copy_back(rows: Tensor, x: Tensor) -> None:
    """Gives x what was written to `as_rows(x)`, if that was a copy."""
    if rows.data_ptr() != x.data_ptr():
        x.copy_(rows.view(x.shape))
