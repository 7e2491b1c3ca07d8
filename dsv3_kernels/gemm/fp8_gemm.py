"""fp8_gemm: D = A @ B.T in FP8 with fine-grained scales."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import _checks as check
from .._library import define
from . import _operands

OP = "fp8_gemm"


def fp8_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulate: bool = False,
    policy: Literal["auto", "fixed"] = "auto",
    num_sms: int | None = None,
) -> Tensor:
    """`D = A @ B.T`, both operands E4M3 with float32 scales per 128 of K.

    Every 128 of K are multiplied in FP8 and promoted: `D += partial * (a_scale * b_scale)` in float32; then come the
    bias and, when accumulating, what `out` held, and one rounding to the output's dtype. DeepSeek-V3 technical report
    (arXiv 2412.19437), section 3.3.2. On eager, a partial product is the exact sum rounded once to float32: a row of D
    is a function of its row of A alone, whatever the batch. Not differentiable: `fp8_linear` is.

    Args:
        a: `[M, K]` float8_e4m3fn, any M and K.
        a_scale: `[M, ceil(K / 128)]` float32 (1x128), in any strides.
        b: `[N, K]` float8_e4m3fn, N a multiple of 8. Rows of a and b are contiguous and a multiple of 16 bytes apart.
        b_scale: `[ceil(N / 128), ceil(K / 128)]` (128x128) or `[N, ceil(K / 128)]` (1x128) float32, in any strides.
        bias: `[N]` bfloat16 or float32.
        out: `[M, N]` bfloat16 or float32 to write into, rows contiguous; its dtype goes before `out_dtype`.
        out_dtype: bfloat16 or float32.
        accumulate: add to what `out` holds.
        policy: "fixed" makes a row's bits independent of M; "auto" picks tiles and splits by shape.
        num_sms: leave the other SMs to someone else; a GPU's matter.

    Returns:
        `[M, N]`; `out` itself when it was given.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape, stride or policy. RuntimeError: devices differ.
    """
    _operands.codes(OP, "a", a, ("M", "K"))
    _operands.codes(OP, "b", b, ("N", a.shape[1]))
    _operands.columns(OP, "b", b.shape[0])
    _operands.row_scale(OP, "a_scale", a_scale, a)
    _operands.weight_scale(OP, b_scale, b)
    if bias is not None:
        check.dtype(OP, "bias", bias, *_operands.OUTPUTS)
        check.shape(OP, "bias", bias, b.shape[:1])
        check.contiguous(OP, "bias", bias)
    check.one_of(OP, "policy", policy, "auto", "fixed")
    check.device(OP, a=a, a_scale=a_scale, b=b, b_scale=b_scale, bias=bias)
    if out is None:
        check.value(OP, "accumulate", not accumulate, accumulate, "an out to add to")
        _operands.output_dtype(OP, out_dtype)
        return _op(a, a_scale, b, b_scale, bias, out_dtype, policy, num_sms)
    inputs = {"a": a, "a_scale": a_scale, "b": b, "b_scale": b_scale, "bias": bias}
    _operands.output(OP, out, (a.shape[0], b.shape[0]), **inputs)
    if accumulate:
        _accumulate(a, a_scale, b, b_scale, bias, policy, num_sms, out)
    else:
        _op.out(a, a_scale, b, b_scale, bias, out.dtype, policy, num_sms, out)
    return out


def _allocate(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    policy: str,
    num_sms: int | None,
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


_INPUTS = "Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor? bias"
_op = define(
    f"fp8_gemm({_INPUTS}, ScalarType out_dtype, str policy, int? num_sms) -> Tensor",
    allocate=_allocate,
    out=f"fp8_gemm_out({_INPUTS}, ScalarType out_dtype, str policy, int? num_sms, Tensor(a!) out) -> ()",
)
_accumulate = define(
    f"fp8_gemm_accumulate({_INPUTS}, str policy, int? num_sms, Tensor(a!) out) -> ()",
    allocate=None,
)
