"""Shared by the families' eager implementations."""

from __future__ import annotations

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are formed in: float32, or float64 for float64 tensors."""
    return torch.promote_types(dtype, torch.float32)
