"""Shared by the families' eager implementations."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are formed in: float32, or float64 for float64 tensors."""
    return torch.promote_types(dtype, torch.float32)


def in_range(op: str, argument: str, tensor: Tensor, low: int, high: int) -> None:
    """ValueError unless low <= values < high; on the CPU alone, where reading them waits for nobody."""
    if tensor.device.type != "cpu" or tensor.numel() == 0:
        return
    smallest, largest = (int(t) for t in tensor.aminmax())
    if smallest < low or largest >= high:
        got = smallest if smallest < low else largest
        raise ValueError(f"{op}: {argument}: got {got}, wanted values in [{low}, {high})")
