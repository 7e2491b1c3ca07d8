"""The mla family's CUDA kernels: tensors become addresses, sizes and strides. Arguments were checked by the op."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _host
from .._arguments import layout, target
from ._cuda_decode import mla_decode as mla_decode
from ._cuda_decode import mla_decode_cannot as mla_decode_cannot
from ._cuda_decode import mla_decode_choice as mla_decode_choice
from ._cuda_decode import mla_decode_plan as mla_decode_plan
from .rope import heads_of

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _float64(x: Tensor) -> str | None:
    return "float64: only the eager backend computes it" if x.dtype == torch.float64 else None


def rope_cannot(x: Tensor, *_: Any) -> str | None:
    return _float64(x)


def rope(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool, transposed: bool, out: Tensor) -> None:
    x, out = heads_of(x, positions), heads_of(out, positions)
    if not positions.is_contiguous():
        positions = positions.contiguous()
    _host.rope(
        layout(x),
        _TYPES[x.dtype],
        positions.data_ptr(),
        positions.dtype is torch.int64,
        layout(cos_sin),
        layout(out),
        interleaved,
        transposed,
        *target(x),
    )


def mla_cache_append_cannot(kv_cache: Tensor, *_: Any) -> str | None:
    return _misplaced(kv_cache)


def _misplaced(kv_cache: Tensor) -> str | None:
    """The FP8 format's float32 and 16-byte parts lie at such addresses only if its pages do."""
    if kv_cache.dtype is torch.uint8 and (kv_cache.data_ptr() % 16 or kv_cache.stride(0) % 16):
        return "kv_cache: a page does not start at a multiple of 16 bytes"
    return None


def mla_cache_append(kv_cache: Tensor, slots: Tensor, latent: Tensor, k_rope: Tensor, pow2_scale: bool) -> None:
    if not slots.is_contiguous():
        slots = slots.contiguous()
    _host.mla_cache_append(
        layout(kv_cache),
        slots.data_ptr(),
        layout(latent),
        layout(k_rope),
        kv_cache.dtype is torch.uint8,
        _TYPES.get(latent.dtype, 0),
        latent.element_size(),
        pow2_scale,
        *target(kv_cache),
    )


def mla_cache_gather_cannot(kv_cache: Tensor, *_: Any) -> str | None:
    return _misplaced(kv_cache)


def mla_cache_gather(
    kv_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    total: int,
    width: int,
    latent: Tensor,
    k_rope: Tensor,
) -> None:
    _host.mla_cache_gather(
        layout(kv_cache),
        layout(block_table),
        cu_seqlens.data_ptr(),
        layout(latent),
        layout(k_rope),
        kv_cache.dtype is torch.uint8,
        latent.element_size(),
        *target(kv_cache),
    )


def mla_prologue_cannot(
    x: Tensor, q_weight: Tensor, kv_weight: Tensor, positions: Tensor, cos_sin: Tensor, kv_cache: Tensor, *_: Any
) -> str | None:
    rank = q_weight.shape[0]
    if x.dtype is not torch.bfloat16:
        return f"{x.dtype}: the kernel computes bfloat16"
    if (kv_weight.shape[0], cos_sin.shape[1]) != (512, 64) or rank % 8 or not 0 < rank <= 2048:
        return f"widths {rank}, {kv_weight.shape[0]} and {cos_sin.shape[1]}: the kernel has at most 2048, 512 and 64"
    if q_weight.data_ptr() % 16 or kv_weight.data_ptr() % 16:
        return "a weight does not start at a multiple of 16 bytes"
    return _misaligned(x=x, kv_cache=kv_cache) or _misplaced(kv_cache)


def mla_prologue(
    x: Tensor,
    q_weight: Tensor,
    kv_weight: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    slots: Tensor,
    eps: float,
    pow2_scale: bool,
    cache_pow2_scale: bool,
    keys: bool,
    q: Tensor,
    scale: Tensor,
    latent: Tensor,
    k_rope: Tensor,
) -> None:
    positions, slots = positions.contiguous(), slots.contiguous()
    _host.mla_prologue(
        layout(x),
        q_weight.data_ptr(),
        _TYPES[q_weight.dtype],
        kv_weight.data_ptr(),
        _TYPES[kv_weight.dtype],
        positions.data_ptr(),
        positions.dtype is torch.int64,
        layout(cos_sin),
        slots.data_ptr(),
        q.shape[1],
        eps,
        layout(kv_cache),
        kv_cache.dtype is torch.uint8,
        q.data_ptr(),
        layout(scale),
        latent.data_ptr() if keys else 0,
        k_rope.data_ptr() if keys else 0,
        pow2_scale,
        cache_pow2_scale,
        *target(x),
    )


def mla_absorb_cannot(x: Tensor, weight: Tensor) -> str | None:
    if x.dtype is not torch.bfloat16:
        return f"{x.dtype}: the kernel computes bfloat16"
    heads, columns, depth = weight.shape
    if columns % 8 or depth % 8 or depth == 0:
        return f"weight: {columns} columns of {depth}: the kernel takes multiples of 8"
    if (heads > 1 and 0 in (weight.stride(0), x.stride(1))) or (x.shape[0] > 1 and x.stride(0) == 0):
        return "a stride of 0: the kernel copies no expanded dimension"
    return _misaligned(x=x, weight=weight if weight.stride(2) == 1 else weight.mT)


def mla_absorb(x: Tensor, weight: Tensor, out: Tensor) -> None:
    _host.mla_absorb(x, weight, out, *target(x))


def merge_attention_cannot(out_a: Tensor, *_: Any) -> str | None:
    return _float64(out_a)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    if out_a.dim() > 3:
        # Rows that no two strides describe are copied.
        rows, columns = lse.numel(), out_a.shape[-1]
        out_a, out_b = out_a.reshape(rows, columns), out_b.reshape(rows, columns)
        lse_a, lse_b = lse_a.reshape(rows), lse_b.reshape(rows)
    _host.merge_attention(
        layout(out_a),
        layout(lse_a),
        layout(out_b),
        layout(lse_b),
        _TYPES[out_a.dtype],
        out.data_ptr(),
        lse.data_ptr(),
        *target(out_a),
    )


def mla_prefill_cannot(
    q: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float, causal: bool
) -> str | None:
    if q.dtype is not torch.bfloat16:
        return f"{q.dtype}: the kernel computes bfloat16"
    widths = k_nope.shape[2], k_rope.shape[1], v.shape[2]
    if widths != (128, 64, 128):
        return f"widths {widths}: the kernel has 128 and 64 for keys, 128 for values"
    if not 0 < scale < math.inf:
        return f"softmax_scale {scale}: the kernel takes a positive one"
    return _misaligned(q=q, k_nope=k_nope, k_rope=k_rope, v=v)


def _misaligned(**tensors: Tensor) -> str | None:
    """Why tensor copies (TMA) cannot read an operand: it and its rows start at multiples of 16 bytes only."""
    bits = 0
    for x in tensors.values():
        bits |= x.data_ptr()
        for stride in x.stride()[:-1]:
            bits |= 2 * stride
    if bits % 16 == 0:
        return None
    for name, x in tensors.items():  # empty tensors and dimensions of one do not count
        starts = [x.data_ptr(), *(2 * x.stride(i) for i in range(x.dim() - 1) if x.shape[i] > 1)]
        if x.numel() and any(start % 16 for start in starts):
            return f"{name}: a row does not start at a multiple of 16 bytes"
    return None


def mla_prefill(
    q: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    causal: bool,
    out: Tensor,
    lse: Tensor,
    num_sms: int = 0,
) -> None:
    _host.mla_prefill(
        layout(q),
        layout(k_nope),
        layout(k_rope),
        layout(v),
        cu_q.data_ptr(),
        cu_k.data_ptr(),
        cu_q.shape[0] - 1,
        scale,
        causal,
        out.data_ptr(),
        lse.data_ptr(),
        num_sms,
        *target(q),
    )


def mla_prefill_backward_cannot(
    grad_out: Tensor, q: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor, out: Tensor, lse: Tensor, *bounds: Any
) -> str | None:
    return "no heads" if q.shape[1] == 0 else mla_prefill_cannot(q, k_nope, k_rope, v, *bounds)


HEAD_GROUPS = 16  # partial sums of the rotary key's gradient: 4 KB a key at most


def mla_prefill_backward(
    grad_out: Tensor,
    q: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    causal: bool,
    grad_q: Tensor,
    grad_k_nope: Tensor,
    grad_k_rope: Tensor,
    grad_v: Tensor,
    num_sms: int = 0,
) -> None:
    heads = q.shape[1]
    groups = -(-heads // -(-heads // HEAD_GROUPS))
    grad_out, out, lse = grad_out.contiguous(), out.contiguous(), lse.contiguous()
    rope_parts = lse.new_empty(groups, *k_rope.shape)
    delta = torch.empty_like(lse)
    _host.mla_prefill_backward(
        layout(grad_out),
        layout(q),
        layout(k_nope),
        layout(k_rope),
        layout(v),
        out.data_ptr(),
        lse.data_ptr(),
        cu_q.data_ptr(),
        cu_k.data_ptr(),
        cu_q.shape[0] - 1,
        scale,
        causal,
        delta.data_ptr(),
        rope_parts.data_ptr(),
        groups,
        grad_q.data_ptr(),
        grad_k_nope.data_ptr(),
        grad_k_rope.data_ptr(),
        grad_v.data_ptr(),
        num_sms,
        *target(q),
    )
