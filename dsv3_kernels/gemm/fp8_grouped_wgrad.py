"""fp8_grouped_wgrad: the weight gradient of each expert, a product over its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._library import define
from . import _operands

OP = "fp8_grouped_wgrad"


def fp8_grouped_wgrad(
    a_t: Tensor,
    a_scale: Tensor,
    b_t: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
    out_dtype: torch.dtype = torch.float32,
    num_sms: int | None = None,
) -> Tensor:
    """`D[g] = A_t[:, tokens of g] @ B_t[:, tokens of g].T`, where g owns columns `offsets[g]:offsets[g + 1]`.

    Promoted to float32 every 128 tokens, as `fp8_gemm` does; both operands have one scale per row and 128 tokens
    (DeepSeek-V3 technical report, arXiv 2412.19437, section 3.3.2). With output gradients as A_t and layer inputs as
    B_t it is the gradient of `fp8_grouped_gemm`'s weights. An empty group gives zeros, or leaves `out[g]` alone when
    accumulating. Columns past `offsets[G]` are not read.

    Args:
        a_t: `[M, S]` float8_e4m3fn, any M.
        a_scale: `[M, ceil(S / 128)]` float32 (1x128), in any strides.
        b_t: `[N, S]` float8_e4m3fn, N a multiple of 8. Rows of a_t and b_t: contiguous, a multiple of 16 bytes apart.
        b_scale: `[N, ceil(S / 128)]` float32 (1x128), in any strides.
        offsets: `[G + 1]` int32, on the device: multiples of 128 rising from 0 to at most S. Padding inside a group is
            zeros with finite scales: what `quantize_1x128_both(offsets=...)` returns.
        out: `[G, M, N]` bfloat16 or float32 to write into, rows contiguous; its dtype goes before `out_dtype`.
        accumulate: add to what `out` holds, in float32.
        out_dtype: bfloat16 or float32.
        num_sms: leave the other SMs to someone else; a GPU's matter.

    Returns:
        `[G, M, N]`; `out` itself when it was given.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape or stride; offsets off a multiple of 128 (eager alone can see
        them). RuntimeError: devices differ.
    """
    _operands.codes(OP, "a_t", a_t, ("M", "S"))
    _operands.codes(OP, "b_t", b_t, ("N", a_t.shape[1]))
    _operands.columns(OP, "b_t", b_t.shape[0])
    _operands.row_scale(OP, "a_scale", a_scale, a_t)
    _operands.row_scale(OP, "b_scale", b_scale, b_t)
    _operands.indices(OP, "offsets", offsets)
    check.device(OP, a_t=a_t, a_scale=a_scale, b_t=b_t, b_scale=b_scale, offsets=offsets)
    if out is None:
        check.value(OP, "accumulate", not accumulate, accumulate, "an out to add to")
        _operands.output_dtype(OP, out_dtype)
        return _op(a_t, a_scale, b_t, b_scale, offsets, out_dtype, num_sms)
    inputs = {"a_t": a_t, "a_scale": a_scale, "b_t": b_t, "b_scale": b_scale, "offsets": offsets}
    _operands.output(OP, out, (offsets.shape[0] - 1, a_t.shape[0], b_t.shape[0]), **inputs)
    if accumulate:
        _accumulate(a_t, a_scale, b_t, b_scale, offsets, num_sms, out)
    else:
        _op.out(a_t, a_scale, b_t, b_scale, offsets, out.dtype, num_sms, out)
    return out


def _allocate(
    a_t: Tensor,
    a_scale: Tensor,
    b_t: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    out_dtype: torch.dtype,
    num_sms: int | None,
) -> Tensor:
    return a_t.new_empty((offsets.shape[0] - 1, a_t.shape[0], b_t.shape[0]), dtype=out_dtype)


_INPUTS = "Tensor a_t, Tensor a_scale, Tensor b_t, Tensor b_scale, Tensor offsets"
_op = define(
    f"fp8_grouped_wgrad({_INPUTS}, ScalarType out_dtype, int? num_sms) -> Tensor",
    allocate=_allocate,
    out=f"fp8_grouped_wgrad_out({_INPUTS}, ScalarType out_dtype, int? num_sms, Tensor(a!) out) -> ()",
)
_accumulate = define(f"fp8_grouped_wgrad_accumulate({_INPUTS}, int? num_sms, Tensor(a!) out) -> ()", allocate=None)
