"""The gemm family's CUDA kernels. Arguments were checked by the op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _host
from .._arguments import target


def _misaligned(a: Tensor, b: Tensor) -> str | None:
    """Why tensor copies (TMA) cannot read the operands: they start at multiples of 16 bytes only."""
    if (a.data_ptr() | b.data_ptr()) % 16 == 0:
        return None
    for argument, tensor in (("the first operand", a), ("the second operand", b)):
        if tensor.numel() and tensor.data_ptr() % 16:
            return f"{argument} starts {tensor.data_ptr() % 16} bytes past a multiple of 16"
    return None


def fp8_gemm_cannot(a: Tensor, a_scale: Tensor, b: Tensor, *_: Any) -> str | None:
    return _misaligned(a, b)


def fp8_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    policy: str,
    num_sms: int | None,
    out: Tensor,
) -> None:
    _gemm(a, a_scale, b, b_scale, bias, policy, num_sms, out, False)


fp8_gemm_accumulate_cannot = fp8_gemm_cannot


def fp8_gemm_accumulate(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    policy: str,
    num_sms: int | None,
    out: Tensor,
) -> None:
    _gemm(a, a_scale, b, b_scale, bias, policy, num_sms, out, True)


def _gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    policy: str,
    num_sms: int | None,
    out: Tensor,
    accumulate: bool,
) -> None:
    _host.fp8_gemm(a, a_scale, b, b_scale, bias, out, accumulate, policy, num_sms or 0, *target(a))


fp8_grouped_gemm_cannot = fp8_gemm_cannot


def fp8_grouped_gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, num_sms: int | None, out: Tensor
) -> None:
    _grouped(_host.fp8_grouped_gemm, a, a_scale, b, b_scale, offsets, out, False, num_sms)


def _grouped(
    launch: Any,
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    groups: Tensor,
    out: Tensor,
    accumulate: bool,
    num_sms: int | None,
    expected_m: int | None = None,
    policy: str = "auto",
) -> None:
    """The launchers that take offsets or counts."""
    launch(a, a_scale, b, b_scale, groups, out, accumulate, policy, expected_m or 0, num_sms or 0, *target(a))


fp8_masked_gemm_cannot = fp8_gemm_cannot


def fp8_masked_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    counts: Tensor,
    expected_m: int | None,
    num_sms: int | None,
    out: Tensor,
) -> None:
    _grouped(_host.fp8_masked_gemm, a, a_scale, b, b_scale, counts, out, False, num_sms, expected_m)


fp8_grouped_wgrad_cannot = fp8_gemm_cannot


def fp8_grouped_wgrad(
    a_t: Tensor,
    a_scale: Tensor,
    b_t: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    out_dtype: torch.dtype,
    num_sms: int | None,
    out: Tensor,
) -> None:
    _grouped(_host.fp8_grouped_wgrad, a_t, a_scale, b_t, b_scale, offsets, out, False, num_sms)


fp8_grouped_wgrad_accumulate_cannot = fp8_gemm_cannot


def fp8_grouped_wgrad_accumulate(
    a_t: Tensor, a_scale: Tensor, b_t: Tensor, b_scale: Tensor, offsets: Tensor, num_sms: int | None, out: Tensor
) -> None:
    _grouped(_host.fp8_grouped_wgrad, a_t, a_scale, b_t, b_scale, offsets, out, True, num_sms)
