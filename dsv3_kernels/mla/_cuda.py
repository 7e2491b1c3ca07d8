"""The mla family's CUDA kernels: tensors become addresses, sizes and strides. Arguments were checked by the op."""

from __future__ import annotations

from ._cuda_decode import mla_decode_plan as mla_decode_plan
