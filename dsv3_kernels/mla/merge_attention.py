"""merge_attention: two attentions of the same queries over different keys, joined."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._library import define
from ._cache import FLOATS

OP = "merge_attention"


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over the keys of both: outputs weighted by exp(lse), log-sum-exps added in that domain.

    A row whose lse is -inf has no weight, and its output is not read; where both are, the result is 0 and -inf.
    FlashAttention (arXiv 2205.14135), section 3.1, equation of the block-wise softmax.

    Args:
        out_a, out_b: `[..., D]` bfloat16, float16, float32 or float64, one dtype, the last dimension contiguous.
        lse_a, lse_b: `[...]` float32 (float64 for float64 outputs), base e.

    Returns:
        `out [..., D]`, `lse [...]`, new and of the same dtypes. Sums are formed in the dtype of the lse.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape or stride. RuntimeError: devices differ.
    """
    check.dtype(OP, "out_a", out_a, *FLOATS)
    check.at_least(OP, "out_a", out_a, 1)
    check.dtype(OP, "out_b", out_b, out_a.dtype)
    check.shape(OP, "out_b", out_b, out_a.shape)
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        check.dtype(OP, name, lse, torch.float64 if out_a.dtype == torch.float64 else torch.float32)
        check.shape(OP, name, lse, out_a.shape[:-1])
    check.rows(OP, "out_a", out_a)
    check.rows(OP, "out_b", out_b)
    check.device(OP, out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    return _op(out_a, lse_a, out_b, lse_b)


def _allocate(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


_op = define(
    "merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)", allocate=_allocate
)
