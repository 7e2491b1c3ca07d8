"""How each op calls its Triton kernels, a file a family: what is compiled for every chip without running it.

The tensors have the sizes of DeepSeek-V3 and no values; a launcher reads none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Call:
    """`run()` must launch `kernels`; their PTX for sm_90 together holds the `instructions` (regular expressions)."""

    run: Callable[[], Any]
    kernels: tuple[str, ...]
    instructions: tuple[str, ...] = ()
    least: int = 80  # the lowest compute capability: 89 for FP8


def bf16(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def f32(*shape: int) -> torch.Tensor:
    return torch.empty(shape)


def e4m3(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float8_e4m3fn)


def i32(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32)
