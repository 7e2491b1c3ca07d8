"""Where a number stopped being finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .weights import pieces

if TYPE_CHECKING:
    from .model import DeepSeekV3


def bad_weight(model: DeepSeekV3) -> str | None:
    """In words: the first weight that is not finite."""
    for piece in pieces(model):
        if not torch.isfinite(piece.view(getattr(piece.module, piece.attribute).detach())).all():
            return f"{_layer(piece.name)}, {piece.name}: the weight is not finite"
    return None


def bad_result(model: DeepSeekV3, call: Callable[[], Any]) -> str | None:
    """In words: the first result inside `call()` with a NaN where its inputs have none."""
    running: list[str] = []
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(_entering(running, name)))
        handles.append(module.register_forward_hook(lambda *_: running.pop() and None, always_call=True))
    try:
        with torch.no_grad(), _Watch(running) as watch:
            call()
    finally:
        for handle in handles:
            handle.remove()
    return watch.found


def _entering(running: list[str], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any) -> None:
        running.append(name)

    return hook


class _Watch(TorchDispatchMode):
    def __init__(self, running: list[str]) -> None:
        super().__init__()
        self.running = running
        self.found: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        clean = self.found is None and not _has_nan((args, kwargs))  # before: an operation may be in place
        out = func(*args, **(kwargs or {}))
        if clean and _has_nan(out):
            where = self.running[-1] if self.running else "the loss"
            self.found = f"{_layer(where)}, {where}: the result of {func._schema.name.split('::')[-1]} is nan"
        return out


def _has_nan(tree: Any) -> bool:
    floats = (t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.is_floating_point() and t.element_size() > 1)
    return any(bool(torch.isnan(t).any()) for t in floats)


def _layer(name: str) -> str:
    parts = name.split(".")
    return f"layer {parts[2]}" if parts[:2] == ["model", "layers"] and len(parts) > 2 else "outside the layers"
