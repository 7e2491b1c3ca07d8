"""What launchers in C++ take for a tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def target(tensor: Tensor) -> tuple[int, int]:
    """Device ordinal (-1: a CPU tensor, for the simulator) and the caller's stream on it."""
    device = tensor.get_device()
    return device, torch._C._cuda_getCurrentRawStream(device) if device >= 0 else 0


def layout(tensor: Tensor) -> tuple[int, ...]:
    """Address, sizes, strides: one tuple is cheaper to pass than its parts (`TensorArgument` in C++)."""
    return (tensor.data_ptr(), *tensor.shape, *tensor.stride())
