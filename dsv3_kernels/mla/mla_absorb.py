"""mla_absorb: a matrix for every head, which decoding multiplies queries with before attention and outputs after it."""

from __future__ import annotations

from torch import Tensor

from .. import _checks as check
from .._library import define
from ._cache import FLOATS

OP = "mla_absorb"


def mla_absorb(x: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`out[t, h] = x[t, h] @ weight[h].T`, sums in float32 (float64 for float64).

    Both halves of the up-projection `kv_b [H, 128 + 128, 512]` serve as they lie: `kv_b[:, :128].mT` takes a query's
    128 into the latent space, `kv_b[:, 128:]` takes what `mla_decode` returns out of it. Absorption: DeepSeek-V2 (arXiv
    2405.04434), section 2.1.2.

    Args:
        x: `[T, H, K]` bfloat16, float16, float32 or float64; may be strided, the last dimension contiguous.
        weight: `[H, N, K]` in x's dtype; either of its last two dimensions contiguous.
        out: where to write, `[T, H, N]` in x's dtype, shares no memory with x or weight; may be strided, the last
            dimension contiguous: `q[..., :512]` of queries `[T, H, 576]`, whose other columns stay as they are.

    Returns:
        `[T, H, N]` in x's dtype: `out` where that is given. Not differentiable: for serving. A row of the result
        depends on its row of x alone, not on T.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape or stride, or memory shared. RuntimeError: devices differ.
    """
    check.dtype(OP, "x", x, *FLOATS)
    check.shape(OP, "x", x, ("T", "H", "K"))
    check.rows(OP, "x", x)
    check.dtype(OP, "weight", weight, x.dtype)
    check.shape(OP, "weight", weight, (x.shape[1], "N", x.shape[2]))
    if weight.stride(2) != 1 and weight.stride(1) != 1 and weight.numel() and 1 not in weight.shape[1:]:
        wanted = "1 in one of the last two dimensions"
        raise ValueError(f"{OP}: weight: got strides {list(weight.stride())}, wanted {wanted}")
    check.device(OP, x=x, weight=weight, out=out)
    if out is None:
        return _op(x, weight)
    check.dtype(OP, "out", out, x.dtype)
    check.shape(OP, "out", out, (*x.shape[:2], weight.shape[1]))
    check.rows(OP, "out", out)
    check.overlap(OP, "out", out, x=x, weight=weight)
    _op.out(x, weight, out)
    return out


def _allocate(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[1])


_op = define(
    "mla_absorb(Tensor x, Tensor weight) -> Tensor",
    allocate=_allocate,
    out="mla_absorb_out(Tensor x, Tensor weight, Tensor(a!) out) -> ()",
)
