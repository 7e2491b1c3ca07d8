"""DeepSeek-V3's FP8 training recipe (arXiv:2412.19437, section 3.3), as the model's layers use it.

Every product is E4M3 in, float32 accumulated, bfloat16 out (float32 for weight gradients). Scales are made on the spot:

| operand | block | scale |
|---|---|---|
| input of a forward product, gradient of an output | 1 token x 128 channels | float32 |
| weight | 128 x 128 | float32 |
| both factors of a weight gradient | 128 tokens x 1 channel | float32 |
| input of o_proj, rows of the experts, gradient of the experts' outputs | as above | powers of two |

Powers of two go where codes are tiled one way for the forward product (or a message between ranks) and the other way
for the weight gradient: moving between such tiles adds next to no error.

Backward keeps no activation that it can have cheaply. Of the rows that reach the experts and of what SwiGLU reads it
keeps FP8 codes; the output of SwiGLU, of every norm, and queries, keys and values it computes again (section 3.2.3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from .. import backends
from ..gemm.fp8_gemm import fp8_gemm
from ..gemm.fp8_grouped_gemm import fp8_grouped_gemm
from ..gemm.fp8_grouped_wgrad import fp8_grouped_wgrad
from ..gemm.fp8_linear import check_layer
from ..mla.mla_prefill import mla_prefill  # noqa: F401  (registers the op)
from ..pipeline.weight_grad import WeightGrad
from ..quant.dequantize import dequantize
from ..quant.quantize_1x128 import quantize_1x128
from ..quant.quantize_1x128_both import quantize_1x128_both
from ..quant.quantize_128x128 import quantize_128x128
from ..quant.silu_mul_quantize_1x128 import silu_mul_quantize_1x128

Codes = tuple[Tensor, Tensor]


class Recipe:
    """The products of one pass in FP8, forward and backward. A weight is quantised once per pass."""

    def __init__(self, pow2_scale: bool = False) -> None:
        self.pow2_scale = pow2_scale  # of every scale, wherever
        self._codes: dict[Tensor, Codes] = {}
        self._hollow = False

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        offsets: Tensor | None = None,
        *,
        pow2: bool = False,
        keep_codes: bool = False,
    ) -> Tensor:
        """`x @ weight.T` for x [T, K], weight [N, K]; with `offsets`, group g's rows times weight[g].

        For backward `x` itself is kept, or its codes with `keep_codes`; `pow2`: x's scales are powers of two.
        """
        check_layer("fp8 recipe", x, weight, ("N", "K") if offsets is None else ("G", "N", "K"))
        pow2 = pow2 or self.pow2_scale
        return _Linear.apply(
            x, weight, *self._quantized(weight), offsets, pow2, self.pow2_scale, keep_codes, self._hollow
        )

    def swiglu_linear(
        self, gate_up: Tensor, weight: Tensor, offsets: Tensor | None = None, *, pow2_grad: bool = False
    ) -> Tensor:
        """`(silu(gate) * up) @ weight.T` for gate_up [T, 2 F], of which FP8 codes are kept.

        pow2_grad: the scales of the output's gradient are powers of two.
        """
        check_layer("fp8 recipe", gate_up, weight, ("N", "K") if offsets is None else ("G", "N", "K"))
        pow2_grad = pow2_grad or self.pow2_scale
        return _SwigluLinear.apply(gate_up, weight, *self._quantized(weight), offsets, self.pow2_scale, pow2_grad)

    def _quantized(self, weight: Tensor) -> Codes:
        if weight not in self._codes:
            self._codes[weight] = quantize_128x128(weight.detach(), pow2_scale=self.pow2_scale)
        return self._codes[weight]

    def again(self, function: Callable[..., Any], *inputs: Any, attention: bool = False) -> Any:
        """function(*inputs), of which backward keeps the inputs alone: it runs the function a second time.

        Of `attention` the result is kept too. In other functions, which use none of their products themselves, the
        second run leaves products out. The function must have no side effects.
        """

        def contexts() -> tuple[Any, Any]:
            first, second = contextlib.nullcontext(), contextlib.nullcontext()
            if attention:
                first, second = create_selective_checkpoint_contexts([torch.ops.dsv3_kernels.mla_prefill.default])
            return first, self._second_run(second, forced, hollow=not attention)

        forced = backends.forced()
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    @contextlib.contextmanager
    def _second_run(self, context: Any, forced: str | None, *, hollow: bool) -> Iterator[None]:
        """It may be in a thread of autograd's, where no backend is forced."""
        with context, backends.backend(forced):
            self._hollow = hollow
            try:
                yield
            finally:
                self._hollow = False


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        w: Tensor,
        w_scale: Tensor,
        offsets: Tensor | None,
        pow2: bool,
        pow2_grad: bool,
        keep_codes: bool,
        hollow: bool,
    ) -> Tensor:
        if hollow:  # only what is saved counts
            ctx.save_for_backward(x, None, w, w_scale, offsets)
            return x.new_empty(x.shape[0], weight.shape[-2])
        q, scale = quantize_1x128(x, pow2_scale=pow2)
        ctx.save_for_backward(*((q, scale) if keep_codes else (x, None)), w, w_scale, offsets)
        ctx.dtype, ctx.pow2, ctx.pow2_grad = x.dtype, pow2, pow2_grad
        ctx.weight, ctx.weight_grad = weight, WeightGrad.capture()
        backends.save_for_backward(ctx)
        return _product(q, scale, w, w_scale, offsets, x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, w, w_scale, offsets = ctx.saved_tensors
        with backends.restored(ctx):
            if scale is not None:
                x = dequantize(x, scale, dtype=ctx.dtype)
            q, scale, q_t, q_t_scale, _ = quantize_1x128_both(
                grad.contiguous(), offsets=offsets, pow2_scale=ctx.pow2_grad
            )
            grad_x = _product(q, scale, w.mT.contiguous(), w_scale.mT, offsets, ctx.dtype)
            grad_weight = _weight_gradient(ctx, q_t, q_t_scale, x, offsets)
        return grad_x, grad_weight, *([None] * 7)


class _SwigluLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate_up: Tensor,
        weight: Tensor,
        w: Tensor,
        w_scale: Tensor,
        offsets: Tensor | None,
        pow2: bool,
        pow2_grad: bool,
    ) -> Tensor:
        q, scale = silu_mul_quantize_1x128(gate_up, pow2_scale=pow2)
        ctx.save_for_backward(*quantize_1x128(gate_up, pow2_scale=pow2), w, w_scale, offsets)
        ctx.dtype, ctx.pow2, ctx.pow2_grad = gate_up.dtype, pow2, pow2_grad
        ctx.weight, ctx.weight_grad = weight, WeightGrad.capture()
        backends.save_for_backward(ctx)
        return _product(q, scale, w, w_scale, offsets, gate_up.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, kept_scale, w, w_scale, offsets = ctx.saved_tensors
        with backends.restored(ctx):
            gate, up = dequantize(kept, kept_scale, dtype=torch.float32).chunk(2, dim=-1)
            q, scale, q_t, q_t_scale, _ = quantize_1x128_both(
                grad.contiguous(), offsets=offsets, pow2_scale=ctx.pow2_grad
            )
            pull = _product(q, scale, w.mT.contiguous(), w_scale.mT, offsets, torch.float32)
            sigmoid = torch.sigmoid(gate)
            silu = gate * sigmoid
            grad_weight = _weight_gradient(ctx, q_t, q_t_scale, silu * up, offsets)
            grad_gate_up = torch.cat([pull * up * (sigmoid + silu * (1 - sigmoid)), pull * silu], dim=-1)
        return grad_gate_up.to(ctx.dtype), grad_weight, *([None] * 5)


def _product(
    q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, offsets: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if offsets is None:
        return fp8_gemm(q, scale, w, w_scale, out_dtype=dtype)
    return fp8_grouped_gemm(q, scale, w, w_scale, offsets, out_dtype=dtype)


def _weight_gradient(ctx: Any, grad_t: Tensor, grad_scale: Tensor, x: Tensor, offsets: Tensor | None) -> Tensor | None:
    """grad.T @ x in float32, both in tiles of 128 tokens; None where a pipeline's schedule has it computed later."""

    def compute() -> Tensor:
        with backends.restored(ctx):
            _, _, x_t, x_scale, offsets_t = quantize_1x128_both(x, offsets=offsets, pow2_scale=ctx.pow2)
            if offsets_t is None:
                return fp8_gemm(grad_t, grad_scale, x_t, x_scale, out_dtype=torch.float32)
            return fp8_grouped_wgrad(grad_t, grad_scale, x_t, x_scale, offsets_t)

    gradient: Tensor | None = ctx.weight_grad(ctx.weight, compute)
    return gradient
