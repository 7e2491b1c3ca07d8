"""Parallelism across GPUs: expert placement, expert parallelism, and a cost model of both."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = ("eplb", "simulate")
_NAMES = {
    "EPCapacityError": "expert_parallel",
    "EPTimeoutError": "transport",
    "ExpertParallel": "expert_parallel",
    "Trace": "overlap",
    "two_microbatch": "overlap",
}

__all__ = ["EPCapacityError", "EPTimeoutError", "ExpertParallel", "Trace", "eplb", "simulate", "two_microbatch"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in _NAMES:
        return getattr(import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
