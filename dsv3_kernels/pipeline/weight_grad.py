"""The hook by which a module lets a pipeline schedule compute its weight gradients later than its input gradients."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_active = threading.local()


class WeightGrad:
    """Defers the weight gradients of one stage and one microbatch.

    An autograd function takes the hook in its forward and calls it in its backward::

        @staticmethod
        def forward(ctx, x, weight):
            ctx.weight_grad = WeightGrad.capture()
            ...

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            return grad @ weight, ctx.weight_grad(weight, lambda: grad.mT @ x)

    In an "I" action (backward for the inputs) the call keeps the function for the "W" action and returns None.
    Everywhere else, outside a pipeline too, it computes the gradient and returns it, for autograd to accumulate.
    """

    def __init__(self) -> None:
        self._deferred: list[tuple[Tensor | None, Callable[[], Any]]] = []
        self._deferring = False

    @staticmethod
    def capture() -> WeightGrad:
        """The hook of the stage and microbatch whose forward is running in this thread."""
        hook = getattr(_active, "hook", None)
        return hook if hook is not None else WeightGrad()

    def __call__(self, weight: Tensor, compute: Callable[[], Tensor]) -> Tensor | None:
        """The gradient of ``weight``, or None once ``compute`` is kept for later."""
        if not weight.requires_grad:
            return None
        if self._deferring:
            self._deferred.append((weight, compute))
            return None
        return compute()

    def put(self, function: Callable[[], Any]) -> None:
        """Keeps a function that accumulates gradients by itself; runs it now if nothing is deferred."""
        if self._deferring:
            self._deferred.append((None, function))
        else:
            function()

    @contextmanager
    def active(self) -> Iterator[None]:
        """What :meth:`capture` returns in this thread."""
        before = getattr(_active, "hook", None)
        _active.hook = self
        try:
            yield
        finally:
            _active.hook = before

    @contextmanager
    def deferring(self) -> Iterator[None]:
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    @torch.no_grad()
    def run(self) -> None:
        """Computes what was deferred, in its order, and accumulates it in ``.grad``."""
        deferred, self._deferred = self._deferred, []
        for i, (weight, compute) in enumerate(deferred):
            deferred[i] = (None, compute)
            grad = compute()
            if weight is not None:
                if weight.grad is None:
                    weight.grad = grad.to(weight.dtype)
                else:
                    weight.grad += grad


class _DeferredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight_grad = WeightGrad.capture()
        ctx.bias = bias is not None
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        return (
            grad @ weight if ctx.needs_input_grad[0] else None,
            ctx.weight_grad(weight, lambda: rows.mT @ x.flatten(0, -2)),
            rows.sum(0) if ctx.bias and ctx.needs_input_grad[2] else None,
        )


def deferred_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` whose weight gradient follows the :class:`WeightGrad` hook.

    x [..., in], weight [out, in], bias [out]; the bias gradient is not deferred. ``weight`` must be a leaf.
    """
    return _DeferredLinear.apply(x, weight, bias)
