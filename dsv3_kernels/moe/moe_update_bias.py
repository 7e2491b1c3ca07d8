"""moe_update_bias: load balance without an auxiliary loss."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._library import define

OP = "moe_update_bias"


def moe_update_bias(bias: Tensor, counts: Tensor, speed: float) -> None:
    """bias += speed * sign(mean(counts) - counts), in place: overloaded experts become less likely, idle ones more.

    The sign is exact: it is that of sum(counts) - E counts, in integers. Across ranks, add the counts up first.
    DeepSeek-V3 report (arXiv 2412.19437), section 2.1.2, "auxiliary-loss-free load balancing"; Wang et al.
    (arXiv 2408.15664), algorithm 1.

    Args:
        bias: `[E]` float32 or float64, in any stride.
        counts: `[E]` int32 or int64, tokens that chose each expert (`handle.counts` of `moe_permute`).
        speed: 0.001 for most of DeepSeek-V3's training.

    Returns:
        None.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape. RuntimeError: devices differ.
    """
    check.dtype(OP, "bias", bias, torch.float32, torch.float64)
    check.shape(OP, "bias", bias, ("E",))
    check.dtype(OP, "counts", counts, torch.int32, torch.int64)
    check.shape(OP, "counts", counts, bias.shape)
    check.number(OP, "speed", speed)
    check.device(OP, bias=bias, counts=counts)
    _op(bias, counts, float(speed))


_op = define("moe_update_bias(Tensor(a!) bias, Tensor counts, float speed) -> ()", allocate=None)
