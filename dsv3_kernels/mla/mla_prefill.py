"""mla_prefill: attention of expanded heads, for prefill and training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .. import backends
from .._library import define, records

OP = "mla_prefill"


def mla_prefill(
    q: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of packed sequences; each head's key is its own 128 and a rotary 64 that all heads share.

    Sequence b owns the rows cu_seqlens_q[b]:cu_seqlens_q[b+1] of q, and cu_seqlens_k[b]:cu_seqlens_k[b+1] of the keys
    and values. `causal` is aligned at the bottom right: of m queries and n keys, query i sees keys 0..n-m+i.
    DeepSeek-V3 report (arXiv 2412.19437), section 2.1.1, equations 6 to 11.

    Args:
        q: `[T, H, 192]` bfloat16, float16, float32 or float64: 128 without and 64 with rotary embedding.
        k_nope: `[S, H, 128]`, k_rope: `[S, 64]`, v: `[S, H, 128]`, all of q's dtype. All four may be strided, the last
            dimension contiguous. The eager backend takes any widths, Triton's powers of two from 16 up to these.
        cu_seqlens_q, cu_seqlens_k: `[B + 1]` int32, non-decreasing, from 0 on.
        softmax_scale: factor on the scores. DeepSeek-V3: 192^-0.5 (0.1 ln 40 + 1)^2 = 0.1352338.
        causal: mask the keys after each query.

    Returns:
        `out [T, H, 128]` in q's dtype; `lse [T, H]`, log-sum-exp in base e of the scaled scores, float32 (float64 for
        float64 inputs). A query without keys, or of no sequence, has out 0 and lse -inf. `out` is differentiable in
        q, k_nope, k_rope and v, once; `lse` is not.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape or stride; on the CPU also bounds that decrease or lead outside.
        RuntimeError: devices differ.
    """
    check.dtype(OP, "q", q, torch.bfloat16, torch.float16, torch.float32, torch.float64)
    for name, tensor in (("k_nope", k_nope), ("k_rope", k_rope), ("v", v)):
        check.dtype(OP, name, tensor, q.dtype)
    check.shape(OP, "q", q, ("T", "H", "D"))
    check.shape(OP, "k_rope", k_rope, ("S", "R"))
    keys, heads, rope = k_rope.shape[0], q.shape[1], k_rope.shape[1]
    check.shape(OP, "k_nope", k_nope, (keys, heads, q.shape[2] - rope))
    check.shape(OP, "v", v, (keys, heads, "V"))
    for name, tensor in (("q", q), ("k_nope", k_nope), ("k_rope", k_rope), ("v", v)):
        check.rows(OP, name, tensor)
    for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check.dtype(OP, name, tensor, torch.int32)
        check.shape(OP, name, tensor, ("B + 1",))
        check.contiguous(OP, name, tensor)
    check.value(OP, "cu_seqlens_q", cu_seqlens_q.shape[0] > 0, [0], "shape [B + 1]")
    check.shape(OP, "cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape)
    check.number(OP, "softmax_scale", softmax_scale)
    check.device(OP, q=q, k_nope=k_nope, k_rope=k_rope, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    scale = float(softmax_scale)
    if not records(q, k_nope, k_rope, v):
        return _op(q, k_nope, k_rope, v, cu_seqlens_q, cu_seqlens_k, scale, causal)
    # torch.compile takes no tensor twice, and self-attention has one tensor of bounds.
    other = None if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k
    return _Prefill.apply(q, k_nope, k_rope, v, cu_seqlens_q, other, scale, causal)


class _Prefill(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k_nope: Tensor,
        k_rope: Tensor,
        v: Tensor,
        cu_q: Tensor,
        other: Tensor | None,
        scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        backends.save_for_backward(ctx)
        out, lse = _op(q, k_nope, k_rope, v, cu_q, cu_q if other is None else other, scale, causal)
        ctx.save_for_backward(q, k_nope, k_rope, v, out, lse, cu_q, other)
        ctx.scale, ctx.causal = scale, causal
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        *saved, cu_q, other = ctx.saved_tensors
        cu_k = cu_q if other is None else other
        with backends.restored(ctx):
            grads = _backward(grad_out.contiguous(), *saved, cu_q, cu_k, ctx.scale, ctx.causal)
        return *grads, None, None, None, None


def _allocate(
    q: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=lse_dtype)


def _allocate_backward(
    grad_out: Tensor, q: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(k_nope.shape), q.new_empty(k_rope.shape), q.new_empty(v.shape)


_op = define(
    "mla_prefill(Tensor q, Tensor k_nope, Tensor k_rope, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "float softmax_scale, bool causal) -> (Tensor, Tensor)",
    allocate=_allocate,
)
_backward = define(
    "mla_prefill_backward(Tensor grad_out, Tensor q, Tensor k_nope, Tensor k_rope, Tensor v, Tensor out, Tensor lse, "
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, float softmax_scale, bool causal) -> (Tensor, Tensor, Tensor, Tensor)",
    allocate=_allocate_backward,
)
