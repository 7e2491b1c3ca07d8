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


def _plan(op: str, a: Tensor, b: Tensor, b_scale: Tensor, groups: int, out_bytes: int, *choice: Any) -> dict[str, Any]:
    """What the launcher would choose; `choice`: policy, expected_m, num_sms. CPU tensors stand for an H200's."""
    by_row = b_scale.shape[-2] == b.shape[-2]
    sizes = (groups, a.shape[-2], b.shape[-2], a.shape[-1])
    if 0 in sizes:
        return {}
    policy, expected_m, num_sms = choice
    plan: dict[str, Any] = _host.fp8_plan(
        op, *sizes, by_row, out_bytes, policy, expected_m or 0, num_sms or 0, a.get_device()
    )
    return plan


def fp8_gemm_plan(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    policy: str = "auto",
    num_sms: int | None = None,
) -> dict[str, Any]:
    return _plan("fp8_gemm", a, b, b_scale, 1, out_dtype.itemsize, policy, None, num_sms)


def fp8_gemm_accumulate_plan(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    policy: str,
    num_sms: int | None,
    out: Tensor,
) -> dict[str, Any]:
    return _plan("fp8_gemm", a, b, b_scale, 1, 2 * out.element_size(), policy, None, num_sms)


def fp8_grouped_gemm_plan(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    num_sms: int | None = None,
    out: Tensor | None = None,
) -> dict[str, Any]:
    out_bytes = 2 if out is None else out.element_size()
    return _plan("fp8_grouped_gemm", a, b, b_scale, b.shape[0], out_bytes, "auto", None, num_sms)


def fp8_masked_gemm_plan(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    counts: Tensor,
    expected_m: int | None = None,
    num_sms: int | None = None,
    out: Tensor | None = None,
) -> dict[str, Any]:
    out_bytes = 2 if out is None else out.element_size()
    return _plan("fp8_masked_gemm", a, b, b_scale, b.shape[0], out_bytes, "auto", expected_m, num_sms)


def fp8_grouped_wgrad_plan(
    a_t: Tensor,
    a_scale: Tensor,
    b_t: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    out_dtype: torch.dtype = torch.float32,
    num_sms: int | None = None,
) -> dict[str, Any]:
    groups = offsets.shape[0] - 1
    return _plan("fp8_grouped_wgrad", a_t, b_t, b_scale, groups, out_dtype.itemsize, "auto", None, num_sms)


def fp8_grouped_wgrad_accumulate_plan(
    a_t: Tensor, a_scale: Tensor, b_t: Tensor, b_scale: Tensor, offsets: Tensor, num_sms: int | None, out: Tensor
) -> dict[str, Any]:
    groups = offsets.shape[0] - 1
    return _plan("fp8_grouped_wgrad", a_t, b_t, b_scale, groups, 2 * out.element_size(), "auto", None, num_sms)


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


fp8_grouped_gemm_swiglu_quantize_cannot = fp8_gemm_cannot


def fp8_grouped_gemm_swiglu_quantize(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    pow2_scale: bool,
    num_sms: int | None,
    q: Tensor,
    scale: Tensor,
) -> None:
    launch = _host.fp8_grouped_gemm_swiglu_quantize
    launch(a, a_scale, b, b_scale, offsets, weights, q, scale, pow2_scale, num_sms or 0, *target(a))
