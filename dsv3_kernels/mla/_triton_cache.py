"""What the Triton kernels on a latent cache ask of it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _triton


def cannot(kv_cache: Tensor) -> str | None:
    """The FP8 format's scales and rotary keys are aligned only if its pages are, and old GPUs have no E4M3."""
    if kv_cache.dtype is not torch.uint8:
        return None
    if _triton.sm(kv_cache) < 89:
        return f"a uint8 cache (FP8) needs compute capability 8.9, got {_triton.sm(kv_cache) / 10}"
    if kv_cache.data_ptr() % 16 or kv_cache.stride(0) % 16:
        return "kv_cache: a page does not start at a multiple of 16 bytes"
    return None
