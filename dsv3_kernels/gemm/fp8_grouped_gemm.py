"""fp8_grouped_gemm: one FP8 GEMM per expert, rows of all experts in one tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._library import define
from . import _operands

OP = "fp8_grouped_gemm"


def fp8_grouped_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    num_sms: int | None = None,
) -> Tensor:
    """`D[rows of g] = A[rows of g] @ B[g].T`, as `fp8_gemm` computes it, where g owns rows `offsets[g]:offsets[g + 1]`.

    The experts of an MoE layer on tokens sorted by expert (DeepSeek-V3 technical report, arXiv 2412.19437,
    section 3.3.2). Groups have any number of rows, none included. Rows from `offsets[G]` on are not read, and not
    written: they stay as they are in a given `out`, and are zero in a fresh one.

    Args:
        a: `[S, K]` float8_e4m3fn.
        a_scale: `[S, ceil(K / 128)]` float32 (1x128), in any strides.
        b: `[G, N, K]` float8_e4m3fn, N a multiple of 8. Rows of a and b: contiguous, a multiple of 16 bytes apart.
        b_scale: `[G, ceil(N / 128), ceil(K / 128)]` (128x128) or `[G, N, ceil(K / 128)]` (1x128) float32, any strides.
        offsets: `[G + 1]` int32, on the device: rising from 0 to at most S.
        out: `[S, N]` bfloat16 or float32 to write into, rows contiguous; its dtype goes before `out_dtype`.
        out_dtype: bfloat16 or float32.
        num_sms: leave the other SMs to someone else; a GPU's matter.

    Returns:
        `[S, N]`; `out` itself when it was given.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape or stride. RuntimeError: devices differ.
    """
    check_operands(OP, a, a_scale, b, b_scale, offsets)
    if out is None:
        _operands.output_dtype(OP, out_dtype)
        out = a.new_zeros((a.shape[0], b.shape[1]), dtype=out_dtype)
    else:
        inputs = {"a": a, "a_scale": a_scale, "b": b, "b_scale": b_scale, "offsets": offsets}
        _operands.output(OP, out, (a.shape[0], b.shape[1]), **inputs)
    _op(a, a_scale, b, b_scale, offsets, num_sms, out)
    return out


def check_operands(op: str, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor) -> None:
    _operands.codes(op, "a", a, ("S", "K"))
    _operands.codes(op, "b", b, ("G", "N", a.shape[1]))
    _operands.columns(op, "b", b.shape[1])
    _operands.row_scale(op, "a_scale", a_scale, a)
    _operands.weight_scale(op, b_scale, b)
    _operands.indices(op, "offsets", offsets, b.shape[0] + 1)
    check.device(op, a=a, a_scale=a_scale, b=b, b_scale=b_scale, offsets=offsets)


# The op writes a part of its output that only the device knows, so it has no functional form.
_op = define(
    "fp8_grouped_gemm(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor offsets, int? num_sms, "
    "Tensor(a!) out) -> ()",
    allocate=None,
)
