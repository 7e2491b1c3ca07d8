"""Checks of GEMM operands, shared by the family: what every `fp8_*` op says of its A, B, scales, outputs and bias."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from ..quant.quantize_1x128 import blocks

OUTPUTS = (torch.bfloat16, torch.float32)


def codes(op: str, argument: str, q: Tensor, shape: tuple[int | str, ...]) -> None:
    """E4M3, of this shape, rows contiguous and a multiple of 16 bytes apart, as tensor copies (TMA) need them."""
    check.dtype(op, argument, q, torch.float8_e4m3fn)
    check.shape(op, argument, q, shape)
    if q.shape[-1] % 16 == 0 and q.is_contiguous():
        return
    check.rows(op, argument, q)
    if q.numel():
        for size, stride in zip(q.shape[:-1], q.stride(), strict=False):
            if size > 1 and stride % 16:
                raise ValueError(f"{op}: {argument}: got a row stride of {stride} bytes, wanted a multiple of 16")


def row_scale(op: str, argument: str, scale: Tensor, q: Tensor) -> None:
    """One scale per row of `q` and 128 columns."""
    check.dtype(op, argument, scale, torch.float32)
    check.shape(op, argument, scale, (*q.shape[:-1], blocks(q.shape[-1])))


def weight_scale(op: str, scale: Tensor, b: Tensor) -> None:
    """One scale per 128 x 128 block of `b`, or per row and 128 columns."""
    check.dtype(op, "b_scale", scale, torch.float32)
    *groups, n, k = b.shape
    by_block, by_row = (*groups, blocks(n), blocks(k)), (*groups, n, blocks(k))
    if scale.shape not in (by_block, by_row):
        got, wanted = list(scale.shape), f"{list(by_block)} (128x128) or {list(by_row)} (1x128)"
        raise ValueError(f"{op}: b_scale: got shape {got}, wanted {wanted}")


def columns(op: str, argument: str, n: int) -> None:
    """N, the number of output columns, is what `argument` has rows."""
    check.value(op, argument, n % 8 == 0, n, "a multiple of 8 rows (N)")


def indices(op: str, argument: str, tensor: Tensor, length: int | None = None) -> None:
    """Offsets or counts: int32, on the device; their values are the caller's promise."""
    check.dtype(op, argument, tensor, torch.int32)
    check.shape(op, argument, tensor, ("G + 1",) if length is None else (length,))
    check.value(op, argument, length is not None or tensor.shape[0] > 0, 0, "at least one element")
    check.contiguous(op, argument, tensor)


def output_dtype(op: str, dtype: torch.dtype) -> None:
    if dtype not in OUTPUTS:
        raise TypeError(f"{op}: out_dtype: got {check.name_of(dtype)}, wanted bfloat16 or float32")


def output(op: str, out: Tensor, shape: tuple[int, ...], **inputs: Tensor | None) -> None:
    """A given output: bfloat16 or float32, rows contiguous, sharing memory with no input (which share a device)."""
    check.dtype(op, "out", out, *OUTPUTS)
    check.shape(op, "out", out, shape)
    check.rows(op, "out", out)
    first = next(iter(inputs))
    check.device(op, **{first: inputs[first]}, out=out)
    check.overlap(op, "out", out, **inputs)
