"""Checks of the outputs that a caller gives to a quantiser."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks as check


def codes_and_scale(
    op: str, q: Tensor, scale: Tensor, shape: Sequence[int], scale_shape: Sequence[int], first: int = 0
) -> None:
    """`out[first]` is contiguous E4M3 and `out[first + 1]` float32 in any strides, of these shapes."""
    check.dtype(op, f"out[{first}]", q, torch.float8_e4m3fn)
    check.dtype(op, f"out[{first + 1}]", scale, torch.float32)
    check.shape(op, f"out[{first}]", q, shape)
    check.shape(op, f"out[{first + 1}]", scale, scale_shape)
    check.contiguous(op, f"out[{first}]", q)


def apart(op: str, outputs: dict[str, Tensor], **inputs: Tensor | None) -> None:
    """All on one device, and no output shares memory with an input or with another output."""
    check.device(op, **inputs, **outputs)
    taken = dict(inputs)
    for index, (name, tensor) in enumerate(outputs.items()):
        check.overlap(op, f"out[{index}]", tensor, **taken)
        taken[name] = tensor
