"""The CUDA kernels of decode: tensors become addresses, sizes and strides. Arguments were checked by the op."""

from __future__ import annotations

from torch import Tensor

from .. import _host
from .._arguments import target


def mla_decode_plan(
    lengths: Tensor, parts: int, start_cost: int, fixed: bool, work: Tensor, splits: Tensor, bounds: Tensor
) -> None:
    _host.mla_decode_plan(
        lengths.data_ptr(),
        lengths.shape[0],
        parts,
        start_cost,
        fixed,
        work.data_ptr(),
        work.shape[0],
        splits.data_ptr(),
        bounds.data_ptr(),
        *target(lengths),
    )
