"""Argument checks in words: op, argument, got, wanted. One call per fact; nothing here reads tensor values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype(op: str, argument: str, tensor: Any, *wanted: torch.dtype) -> None:
    """TypeError unless `tensor` is a Tensor of one of the `wanted` dtypes (of any, if none is named)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {argument}: got {type(tensor).__name__}, wanted a Tensor")
    if wanted and tensor.dtype not in wanted:
        names = " or ".join(name_of(d) for d in wanted)
        raise TypeError(f"{op}: {argument}: got dtype {name_of(tensor.dtype)}, wanted {names}")


def shape(op: str, argument: str, tensor: Any, wanted: Sequence[Any]) -> None:
    """ValueError unless the shape fits: an int must be equal, a str names a free dimension, ... is any leading ones."""
    got = tensor.shape
    if got == wanted:
        return
    fits = wanted
    if fits and fits[0] is Ellipsis:
        fits = fits[1:]
        got = got[max(len(got) - len(fits), 0) :]
    if len(got) == len(fits):
        for index, want in enumerate(fits):
            if not isinstance(want, str) and got[index] != want:
                break
        else:
            return
    words = ", ".join("..." if w is Ellipsis else str(w) for w in wanted)
    raise ValueError(f"{op}: {argument}: got shape {list(tensor.shape)}, wanted [{words}]")


def at_least(op: str, argument: str, tensor: Tensor, dims: int) -> None:
    """ValueError unless `tensor` has `dims` dimensions or more."""
    if tensor.dim() < dims:
        raise ValueError(f"{op}: {argument}: got {tensor.dim()} dimensions, wanted at least {dims}")


def rows(op: str, argument: str, tensor: Tensor) -> None:
    """ValueError unless the last dimension is contiguous (stride 1)."""
    if tensor.numel() and tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{op}: {argument}: got stride {tensor.stride(-1)} in the last dimension, wanted 1")


def contiguous(op: str, argument: str, tensor: Any) -> None:
    """ValueError unless the tensor is contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(f"{op}: {argument}: got strides {list(tensor.stride())}, wanted a contiguous tensor")


def device(op: str, **tensors: Tensor | None) -> None:
    """RuntimeError unless all given tensors are on one device."""
    first = device = None
    for argument, tensor in tensors.items():
        if tensor is None:
            continue
        if device is None:
            first, device = argument, tensor.device
        elif tensor.device != device:
            raise RuntimeError(f"{op}: {argument}: got device {tensor.device}, wanted {device} as {first}")


def value(op: str, argument: str, ok: bool, got: Any, wanted: str) -> None:
    """ValueError unless `ok`."""
    if not ok:
        raise ValueError(f"{op}: {argument}: got {got!r}, wanted {wanted}")


def integer(op: str, argument: str, got: Any, least: int) -> None:
    """TypeError unless `got` is an int (and no bool), ValueError if it is below `least`."""
    if isinstance(got, bool) or not isinstance(got, (int, torch.SymInt)):
        raise TypeError(f"{op}: {argument}: got {type(got).__name__}, wanted an int")
    if got < least:
        raise ValueError(f"{op}: {argument}: got {got}, wanted at least {least}")


def number(op: str, argument: str, got: Any) -> None:
    """TypeError unless `got` is a Python number (and no bool)."""
    if isinstance(got, bool) or not isinstance(got, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{op}: {argument}: got {type(got).__name__}, wanted a number")


def one_of(op: str, argument: str, got: Any, *wanted: Any) -> None:
    """ValueError unless `got` is one of `wanted`."""
    if got not in wanted:
        raise ValueError(f"{op}: {argument}: got {got!r}, wanted {' or '.join(repr(w) for w in wanted)}")


def overlap(op: str, argument: str, output: Tensor, **inputs: Tensor | None) -> None:
    """ValueError when an output shares memory with an input: a kernel would read what it has overwritten."""
    if torch.compiler.is_compiling():
        return  # functionalisation gives outputs storage of their own
    memory = output.untyped_storage().data_ptr()
    for other, tensor in inputs.items():
        if tensor is None or tensor.untyped_storage().data_ptr() != memory:
            continue
        if _spans_meet(output, tensor):
            raise ValueError(f"{op}: {argument}: shares memory with {other}, wanted memory of its own")


def _spans_meet(a: Tensor, b: Tensor) -> bool:
    (a0, a1), (b0, b1) = _span(a), _span(b)
    return a0 < b1 and b0 < a1


def _span(tensor: Tensor) -> tuple[int, int]:
    if tensor.numel() == 0:
        return 0, 0
    start = tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()
