"""fp8_masked_gemm: one FP8 GEMM per expert, each expert's rows in a slab of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._library import define
from . import _operands

OP = "fp8_masked_gemm"


def fp8_masked_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    counts: Tensor,
    *,
    expected_m: int | None = None,
    out: Tensor | None = None,
    num_sms: int | None = None,
) -> Tensor:
    """`D[g, :counts[g]] = A[g, :counts[g]] @ B[g].T`, as `fp8_gemm` computes it.

    The experts of an MoE layer in decoding, where a fixed shape suits a CUDA graph and only the device knows how many
    rows each expert got (the layout of DeepEP's low-latency dispatch). Rows past a count are not read, and not
    written: they stay as they are in a given `out`, and are zero in a fresh one.

    Args:
        a: `[G, Tmax, K]` float8_e4m3fn.
        a_scale: `[G, Tmax, ceil(K / 128)]` float32 (1x128), in any strides.
        b: `[G, N, K]` float8_e4m3fn, N a multiple of 8. Rows of a and b: contiguous, a multiple of 16 bytes apart.
        b_scale: `[G, ceil(N / 128), ceil(K / 128)]` (128x128) or `[G, N, ceil(K / 128)]` (1x128) float32, any strides.
        counts: `[G]` int32, on the device: 0 to Tmax.
        expected_m: rows per expert to choose tiles for; changes speed alone.
        out: `[G, Tmax, N]` bfloat16 or float32 to write into, rows contiguous.
        num_sms: leave the other SMs to someone else; a GPU's matter.

    Returns:
        `[G, Tmax, N]` bfloat16; `out` itself when it was given.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape or stride. RuntimeError: devices differ.
    """
    _operands.codes(OP, "a", a, ("G", "Tmax", "K"))
    _operands.codes(OP, "b", b, (a.shape[0], "N", a.shape[2]))
    _operands.columns(OP, "b", b.shape[1])
    _operands.row_scale(OP, "a_scale", a_scale, a)
    _operands.weight_scale(OP, b_scale, b)
    _operands.indices(OP, "counts", counts, a.shape[0])
    check.device(OP, a=a, a_scale=a_scale, b=b, b_scale=b_scale, counts=counts)
    shape = (a.shape[0], a.shape[1], b.shape[1])
    if out is None:
        out = a.new_zeros(shape, dtype=torch.bfloat16)
    else:
        _operands.output(OP, out, shape, a=a, a_scale=a_scale, b=b, b_scale=b_scale, counts=counts)
    _op(a, a_scale, b, b_scale, counts, expected_m, num_sms, out)
    return out


# The op writes a part of its output that only the device knows, so it has no functional form.
_op = define(
    "fp8_masked_gemm(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor counts, int? expected_m, int? num_sms, "
    "Tensor(a!) out) -> ()",
    allocate=None,
)
