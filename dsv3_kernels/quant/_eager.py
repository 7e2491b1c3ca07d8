"""The quant family in plain PyTorch: the definition of what is right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantize_1x128 import empty_scale

E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4  # an all-zero block gets a finite scale, and zeros


def scale_of(amax: Tensor, pow2_scale: bool) -> Tensor:
    """Scale of blocks whose largest magnitude is `amax` (float32); NaN where that is not finite."""
    scale = amax.clamp(min=AMAX_FLOOR) / E4M3_MAX
    if pow2_scale:
        # The floor keeps scales normal, so carrying the mantissa into the exponent rounds up to a power of two.
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & ~0x7FFFFF).view(torch.float32)
    return torch.where(amax.isfinite(), scale, torch.nan)


def encode(x: Tensor, scale: Tensor) -> Tensor:
    """E4M3 codes of `x / scale` (broadcast); NaN is the positive one everywhere."""
    real = x / scale
    return torch.where(real.isnan(), torch.nan, real).to(torch.float8_e4m3fn)


def quantize_1x128(x: Tensor, pow2_scale: bool, scale_layout: str) -> tuple[Tensor, Tensor]:
    columns = x.shape[-1]
    padded = F.pad(x.float(), (0, -columns % 128)).unflatten(-1, (-1, 128)) if columns else x.new_empty(*x.shape[:-1], 0, 128).float()
    scale = scale_of(padded.abs().amax(-1), pow2_scale)
    q = encode(padded, scale[..., None]).flatten(-2)[..., :columns].contiguous()
    return q, empty_scale(x, columns, scale_layout).copy_(scale)
