"""Checks that every op's test uses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsv3_kernels import _simulator

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
HARDWARE_ROUNDING = _simulator.adds_as_hardware()  # of every launch on the simulator: make rehearse


def no_skip(report: Any) -> Any:
    """A test or module that is skipped for want of a tool is a failure where CI is set: `make venv` brings them all."""
    if report.outcome == "skipped" and not hasattr(report, "wasxfail") and os.environ.get("CI"):
        why = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"CI is set, and this was not run: {why}"
    return report


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes, for comparisons that know NaN and the sign of zero."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def same_bits(a: Any, b: Any) -> bool:
    """Whether two tensors, or tuples of tensors, agree bit for bit (dtype and shape included)."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
    return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))


def close(got: Tensor, wanted: Tensor, bound: Tensor | float, what: str = "result") -> None:
    """Element by element: |got - wanted| <= bound, in float64; NaN and inf must stand at the same places."""
    got, wanted = got.detach().double().cpu(), wanted.detach().double().cpu()
    assert got.shape == wanted.shape, f"{what}: shape {list(got.shape)}, wanted {list(wanted.shape)}"
    finite = wanted.isfinite()
    assert torch.equal(got.isfinite(), finite), f"{what}: not finite at other places than wanted"
    assert torch.equal(got[~finite].nan_to_num(nan=7.0), wanted[~finite].nan_to_num(nan=7.0)), (
        f"{what}: wrong inf or NaN"
    )
    limit = bound if isinstance(bound, Tensor) else torch.tensor(bound, dtype=torch.float64)
    limit = limit.detach().double().cpu().expand(wanted.shape)
    excess = torch.where(finite, (got - wanted).abs() - limit, torch.zeros((), dtype=torch.float64))
    if excess.numel() and excess.max() > 0:
        where = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        raise AssertionError(
            f"{what}: {int((excess > 0).sum())} of {excess.numel()} elements off; worst at {where}: "
            f"got {got[where]:.9g}, wanted {wanted[where]:.9g}, bound {limit[where]:.3g}"
        )


def opcheck(op: Any, args: Sequence[Any], *, grad_free: bool = True) -> None:
    """torch.library.opcheck, all four utilities; its schema test cannot compare float8, so ours stands in for it there.

    `op` is an OpOverload, for example `torch.ops.dsv3_kernels.quantize_1x128.default`.
    """
    utilities = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    results = op(*[_copy(a) for a in args])
    flat = [t for t in (results if isinstance(results, (tuple, list)) else (results,)) if isinstance(t, Tensor)]
    float8 = any(isinstance(t, Tensor) and t.dtype in FLOAT8 for t in (*args, *flat))
    if not float8:
        utilities.append("test_schema")
    torch.library.opcheck(op, tuple(args), test_utils=tuple(utilities))
    no_mutation(op, args)
    if grad_free:
        no_gradient_leaks(op, args)


def no_mutation(op: Any, args: Sequence[Any]) -> None:
    """The op writes to no argument that its schema does not mark, and returns no view of an argument."""
    ours = [_copy(a) for a in args]
    before = [bits(a) if isinstance(a, Tensor) else None for a in ours]
    results = op(*ours)
    for spec, argument, old in zip(op._schema.arguments, ours, before, strict=False):
        if old is not None and not (spec.alias_info and spec.alias_info.is_write):
            assert torch.equal(bits(argument), old), f"{op}: wrote to {spec.name}, which its schema does not mark"
    storages = {a.untyped_storage().data_ptr() for a in ours if isinstance(a, Tensor) and a.numel()}
    for result in results if isinstance(results, (tuple, list)) else (results,):
        if isinstance(result, Tensor) and result.numel():
            assert result.untyped_storage().data_ptr() not in storages, f"{op}: returns memory of an argument"


def no_gradient_leaks(op: Any, args: Sequence[Any]) -> None:
    """Called with inputs that require grad, the bare op records nothing: gradients are made outside it."""
    ours = [
        a.detach().clone().requires_grad_()
        if isinstance(a, Tensor) and a.is_floating_point() and a.dtype not in FLOAT8
        else a
        for a in args
    ]
    if any(spec.alias_info and spec.alias_info.is_write for spec in op._schema.arguments):
        return
    results = op(*ours)
    for result in results if isinstance(results, (tuple, list)) else (results,):
        if isinstance(result, Tensor):
            assert result.grad_fn is None and not result.requires_grad, f"{op}: leaks a grad_fn"


def _copy(argument: Any) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    out = torch.empty_strided(argument.size(), argument.stride(), dtype=argument.dtype, device=argument.device)
    if argument.dtype in FLOAT8:
        out.view(torch.uint8).copy_(argument.view(torch.uint8))
        return out
    return out.copy_(argument)


def compiles(function: Any, *args: Any) -> Any:
    """Run `function(*args)` under torch.compile(fullgraph=True) and demand the bits of the plain call."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*args)
    plain = function(*args)
    assert same_bits(compiled, plain), "torch.compile gives other bits"
    return compiled


def compiles_with_gradients(function: Any, *args: Any) -> None:
    """As `compiles`, and the gradients of the result's sum (weighted by position) have the bits of the plain ones."""

    def run(call: Any) -> list[Tensor]:
        ours = [a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args]
        result = call(*ours)
        results = [r for r in (result if isinstance(result, (tuple, list)) else (result,)) if r.requires_grad]
        weights = [torch.linspace(-1, 1, r.numel(), device=r.device).view(r.shape).to(r.dtype) for r in results]
        wanted = [a for a in ours if isinstance(a, Tensor) and a.requires_grad]
        return [*(r.detach() for r in results), *torch.autograd.grad(results, wanted, weights)]

    torch._dynamo.reset()
    assert same_bits(run(torch.compile(function, fullgraph=True, backend="aot_eager")), run(function))


def roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to `dtype` in its normal range."""
    return torch.finfo(dtype).eps / 2
