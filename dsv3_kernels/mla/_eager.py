"""The mla family in plain PyTorch: the definition of what is right."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are formed in: float32, or float64 for float64 tensors."""
    return torch.promote_types(dtype, torch.float32)


def rope(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool, transposed: bool) -> Tensor:
    in_range("rope", "positions", positions, 0, cos_sin.shape[0])
    cos, sin = cos_sin[positions.long()].chunk(2, -1)
    pairs = x.shape[-1] // 2
    broadcast = (*positions.shape, *(1,) * (x.dim() - 1 - positions.dim()), pairs)
    cos, sin = cos.reshape(broadcast), (-sin if transposed else sin).reshape(broadcast)
    real = x.to(wide(x.dtype))
    a, b = real.unflatten(-1, (pairs, 2)).unbind(-1) if interleaved else real.chunk(2, -1)
    pair = (a * cos - b * sin, a * sin + b * cos)
    rotated = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return rotated.to(x.dtype)


def in_range(op: str, argument: str, tensor: Tensor, low: int, high: int) -> None:
    """ValueError unless low <= values < high; on the CPU alone, where reading them waits for nobody."""
    if tensor.device.type != "cpu" or tensor.numel() == 0:
        return
    smallest, largest = (int(t) for t in tensor.aminmax())
    if smallest < low or largest >= high:
        got = smallest if smallest < low else largest
        raise ValueError(f"{op}: {argument}: got {got}, wanted values in [{low}, {high})")
