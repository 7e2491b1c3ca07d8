"""The quant family's CUDA kernels: tensors become addresses, sizes and strides. Arguments were checked by the op."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _host
from .._arguments import target

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def quantize_1x128(x: Tensor, pow2_scale: bool, scale_layout: str, q: Tensor, scale: Tensor) -> None:
    columns = x.shape[-1]
    if x.dim() != 2:
        # Rows that no single stride describes are copied; so are scales, and back.
        x = x.reshape(-1, columns)
        rows = scale if scale.dim() == 1 else scale.flatten(0, -2)
        written = rows.reshape(-1, scale.shape[-1])
        quantize_1x128(x, pow2_scale, scale_layout, q, written)
        if written.data_ptr() != scale.data_ptr():
            scale.copy_(written.view(scale.shape))
        return
    _host.quantize_1x128(
        x.data_ptr(),
        q.data_ptr(),
        scale.data_ptr(),
        x.shape[0],
        columns,
        x.stride(0),
        scale.stride(0),
        scale.stride(1),
        pow2_scale,
        _TYPES[x.dtype],
        *target(x),
    )


def quantize_128x128(w: Tensor, pow2_scale: bool, q: Tensor, scale: Tensor) -> None:
    if w.dim() > 3:
        # Leading dimensions that no single stride describes are copied; so are scales, and back.
        matrices = w.reshape(-1, *w.shape[-2:])
        written = scale.reshape(-1, *scale.shape[-2:])
        quantize_128x128(matrices, pow2_scale, q.view(matrices.shape), written)
        if written.data_ptr() != scale.data_ptr():
            scale.copy_(written.view(scale.shape))
        return
    sizes, strides, scale_strides = tuple(w.shape), w.stride(), scale.stride()
    if w.dim() == 2:  # a batch of one, whose strides are of no matter
        sizes, strides, scale_strides = (1, *sizes), (0, *strides), (0, *scale_strides)
    _host.quantize_128x128(
        w.data_ptr(),
        q.data_ptr(),
        scale.data_ptr(),
        *sizes,
        *strides[:-1],
        *scale_strides,
        pow2_scale,
        _TYPES[w.dtype],
        *target(w),
    )
