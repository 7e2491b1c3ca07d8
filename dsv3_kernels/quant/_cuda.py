"""The quant family's CUDA kernels: tensors become addresses, sizes and strides. Arguments were checked by the op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _host
from .._arguments import target

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _rows(x: Tensor) -> Tensor:
    """`[..., K]` as `[T, K]`: rows that no single stride describes are copied."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _scale_rows(scale: Tensor) -> Tensor:
    """The same for scales to be written: `_returned` must follow."""
    if scale.dim() == 2:
        return scale
    return (scale if scale.dim() == 1 else scale.flatten(0, -2)).reshape(-1, scale.shape[-1])


def _returned(written: Tensor, scale: Tensor) -> None:
    if written is not scale and written.data_ptr() != scale.data_ptr():
        scale.copy_(written.view(scale.shape))


def quantize_1x128(x: Tensor, pow2_scale: bool, scale_layout: str, q: Tensor, scale: Tensor) -> None:
    x, written = _rows(x), _scale_rows(scale)
    _host.quantize_1x128(
        x.data_ptr(),
        q.data_ptr(),
        written.data_ptr(),
        *x.shape,
        x.stride(0),
        *written.stride(),
        pow2_scale,
        _TYPES[x.dtype],
        *target(x),
    )
    _returned(written, scale)


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


def quantize_1x128_both(
    x: Tensor,
    offsets: Tensor | None,
    pow2_scale: bool,
    q: Tensor,
    scale: Tensor,
    q_t: Tensor,
    scale_t: Tensor,
    offsets_t: Tensor,
) -> None:
    _host.quantize_1x128_both(
        x.data_ptr(),
        0 if offsets is None else offsets.data_ptr(),
        q.data_ptr(),
        scale.data_ptr(),
        q_t.data_ptr(),
        scale_t.data_ptr(),
        offsets_t.data_ptr(),
        *x.shape,
        q_t.shape[1],
        0 if offsets is None else offsets.shape[0] - 1,
        x.stride(0),
        *scale.stride(),
        *scale_t.stride(),
        pow2_scale,
        _TYPES[x.dtype],
        *target(x),
    )


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor) -> None:
    if q.dim() > 3:
        # Leading dimensions that no single stride describes are copied.
        q, scale = (t.reshape(-1, *t.shape[-2:]) for t in (q, scale))
    by_row = q.dim() == 1 or scale.shape[-2] == q.shape[-2]
    _host.dequantize(q, scale, out.data_ptr(), by_row, _TYPES[dtype], *target(q))


def silu_mul_quantize_1x128(
    gate_up: Tensor, weights: Tensor | None, pow2_scale: bool, q: Tensor, scale: Tensor
) -> None:
    x, written = _rows(gate_up), _scale_rows(scale)
    if weights is not None and weights.dim() != 1:
        weights = weights.reshape(-1)
    rows, columns = x.shape
    _host.silu_mul_quantize_1x128(
        x.data_ptr(),
        0 if weights is None else weights.data_ptr(),
        q.data_ptr(),
        written.data_ptr(),
        rows,
        columns // 2,
        x.stride(0),
        0 if weights is None else weights.stride(0),
        *written.stride(),
        pow2_scale,
        _TYPES[x.dtype],
        *target(x),
    )
    _returned(written, scale)


MOST_NORM_COLUMNS = 8192


def rms_norm_cannot(x: Tensor, *_: Any) -> str | None:
    if x.shape[-1] <= MOST_NORM_COLUMNS:
        return None
    return f"got rows of {x.shape[-1]} columns, where the kernel keeps up to {MOST_NORM_COLUMNS} in registers"


rms_norm_quantize_1x128_cannot = rms_norm_cannot


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, normed: Tensor, total: Tensor) -> None:
    rows = _rows(x)
    added = None if residual is None else _rows(residual)
    _host.rms_norm(
        rows.data_ptr(),
        0 if added is None else added.data_ptr(),
        weight.data_ptr(),
        normed.data_ptr(),
        0 if added is None else total.data_ptr(),
        *rows.shape,
        rows.stride(0),
        0 if added is None else added.stride(0),
        eps,
        _TYPES[x.dtype],
        _TYPES[weight.dtype],
        *target(x),
    )


def rms_norm_quantize_1x128(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    pow2_scale: bool,
    q: Tensor,
    scale: Tensor,
    normed: Tensor,
    total: Tensor,
) -> None:
    rows, written = _rows(x), _scale_rows(scale)
    added = None if residual is None else _rows(residual)
    _host.rms_norm_quantize_1x128(
        rows.data_ptr(),
        0 if added is None else added.data_ptr(),
        weight.data_ptr(),
        normed.data_ptr(),
        0 if added is None else total.data_ptr(),
        q.data_ptr(),
        written.data_ptr(),
        *rows.shape,
        rows.stride(0),
        0 if added is None else added.stride(0),
        *written.stride(),
        eps,
        pow2_scale,
        _TYPES[x.dtype],
        _TYPES[weight.dtype],
        *target(x),
    )
    _returned(written, scale)


def rms_norm_backward_cannot(grad: Tensor, x: Tensor, *_: Any) -> str | None:
    return rms_norm_cannot(x)


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    grad_total: Tensor | None,
    grad_x: Tensor,
    grad_weight: Tensor,
) -> None:
    rows = _rows(x)
    count, columns = rows.shape
    partial = x.new_empty((min(count, 256), columns), dtype=torch.float32)
    _host.rms_norm_backward(
        grad.data_ptr(),
        rows.data_ptr(),
        weight.data_ptr(),
        0 if grad_total is None else grad_total.data_ptr(),
        grad_x.data_ptr(),
        grad_weight.data_ptr(),
        partial.data_ptr(),
        count,
        columns,
        rows.stride(0),
        eps,
        _TYPES[x.dtype],
        _TYPES[weight.dtype],
        *target(x),
    )
