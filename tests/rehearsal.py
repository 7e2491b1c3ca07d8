"""A make-believe GPU, on which the tests of a GPU are rehearsed where there is none: `pytest --rehearse`.

Its tensors say cuda:0 and live on the CPU, its kernels run in the simulator, with a GPU's rounding where the
environment asks for it. An operation on tensors of both devices fails as it would there, and so does a call that names
a backend which the device does not have. What needs the driver itself (graphs, streams, pinned memory) cannot be
rehearsed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import dsv3_kernels as dk
from dsv3_kernels import backends
from dsv3_kernels._library import OPS

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SIMULATED = {"cuda": "sim:cuda", "triton": "sim:triton"}
# These trace or count operations themselves.
NOT_REHEARSED = ("op_contract", "compiles")
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
MAY_MIX = INDEXING | {"aten::copy_", "aten::_to_copy"}  # and scalars always


class OnGpu(torch.Tensor):
    """A tensor on the GPU; `inner` is where its bytes really are."""

    inner: torch.Tensor
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnGpu:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        self = torch.Tensor._make_wrapper_subclass(cls, inner.size(), **layout, device=CPU)
        self.inner = inner
        return self

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        like = next((a for a in args if isinstance(a, torch.Tensor)), None)
        if like is not None:
            args, kwargs = (), {"device": like.device, "dtype": like.dtype}
        copy = kwargs.pop("copy", False)
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        stays = (device is None or device.type == "cuda") and dtype in (None, self.dtype)
        return self if stays and not copy else torch.ops.aten._to_copy(self, device=device or GPU, dtype=dtype)

    def cpu(self) -> torch.Tensor:
        return self.to(CPU)

    def cuda(self) -> torch.Tensor:
        return self

    def numpy(self) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def item(self) -> Any:
        return self.inner.item()

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __repr__(self) -> str:
        return f"OnGpu({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    """The operation on the bytes, with the GPU's rules for what may meet and where results are."""
    name, (flat, spec) = func._schema.name, tree_flatten((args, kwargs))
    ours = [a for a in flat if isinstance(a, OnGpu)]
    others = [a for a in flat if isinstance(a, torch.Tensor) and not isinstance(a, OnGpu)]
    others = [a for a in others if not hasattr(a, "anywhere")]
    if ours and any(a.dim() for a in others) and name not in MAY_MIX:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu")
    # Autograd takes our tensors for the CPU's. Its casts leave a gradient where it is; zeros that it makes, for a
    # gradient that nobody gave, may be of either device.
    backward = torch._C._current_graph_task_id() != -1
    device = None if backward and ours else kwargs.get("device")
    on_gpu = bool(ours) if device is None else torch.device(device).type == "cuda"
    if name == "aten::copy_":
        on_gpu = isinstance(args[0], OnGpu)
    args, kwargs = tree_unflatten([a.inner if isinstance(a, OnGpu) else a for a in flat], spec)
    if on_gpu and kwargs.get("device") is not None:
        kwargs["device"] = CPU
    with _backend_of(name, args) if ours and name.startswith("dsv3_kernels::") else contextlib.nullcontext():
        out = func(*args, **kwargs)
    known = {id(a.inner): a for a in ours}  # what was written in place stays the tensor it was

    def back(t: Any) -> Any:
        if not isinstance(t, torch.Tensor):
            return t
        if on_gpu:
            return known[id(t)] if id(t) in known else OnGpu(t)
        if backward and not others:
            t.anywhere = True
        return t

    return tree_map(back, out)


def _backend_of(name: str, args: tuple) -> contextlib.AbstractContextManager[None]:
    """The backend that the GPU would take for an op of the library, forced or free: for the CPU, where it runs."""
    op = name.partition("::")[2]
    if op not in OPS:
        op = op.removesuffix("_out")
        args = args[: len(getattr(torch.ops.dsv3_kernels, op).default._schema.arguments)]
    chosen = backends._choose(op, args, GPU)[0]
    return dk.backend(SIMULATED.get(chosen, chosen))


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})


class _Function(TorchFunctionMode):
    """Names cuda:0 where a call says cuda, before torch asks a driver for the current device."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        def named(x: Any) -> Any:
            if func is torch.Tensor.to and isinstance(x, str):
                x = torch.device(x)
            return GPU if isinstance(x, torch.device) and x.type == "cuda" else x

        args, kwargs = tree_map(named, tuple(args)), dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = named(torch.device(kwargs["device"]))
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == GPU:
            del kwargs["device"]
            return func(*args, **kwargs).to(GPU)
        return func(*args, **kwargs)


FACTS = SimpleNamespace(multi_processor_count=132, major=9, minor=0, name="make-believe H200", total_memory=141 << 30)
ANSWERS = {  # of torch.cuda
    "is_available": True,
    "device_count": 1,
    "current_device": 0,
    "get_device_capability": (9, 0),
    "get_device_name": FACTS.name,
    "get_device_properties": FACTS,
    "synchronize": None,
    "is_current_stream_capturing": False,
    "_lazy_init": None,
}


@contextlib.contextmanager
def device() -> Iterator[None]:
    """The GPU is there inside the block."""
    really = backends.missing

    def missing(op: str, name: str, where: torch.device) -> str | None:
        on_gpu = where.type == "cuda" and name in SIMULATED
        return really(op, SIMULATED[name], CPU) if on_gpu else really(op, name, where)

    with contextlib.ExitStack() as stack:
        for name, answer in ANSWERS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer: answer))
        stack.enter_context(mock.patch.object(backends, "missing", missing))
        stack.enter_context(_Function())
        stack.enter_context(_Dispatch())
        yield


def left_out(item: pytest.Item) -> bool:
    """Whether a test of a GPU cannot be rehearsed."""
    return item.get_closest_marker("gpu") is not None or any(name in item.name for name in NOT_REHEARSED)
