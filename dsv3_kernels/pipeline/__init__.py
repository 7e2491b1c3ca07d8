"""Pipeline parallelism: schedules as explicit action lists, a validator, a simulator and an executor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .actions import Action, Kind, ScheduleError
from .schedule import Schedule, schedule
from .simulate import Costs, Simulation

if TYPE_CHECKING:
    from .executor import Pipeline, PipelineError
    from .weight_grad import WeightGrad, deferred_linear

_LAZY = {
    "Pipeline": "executor",
    "PipelineError": "executor",
    "WeightGrad": "weight_grad",
    "deferred_linear": "weight_grad",
}


def __getattr__(name: str) -> Any:
    """Schedules need no torch; the executor and its hooks are imported when they are first asked for."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Action",
    "Costs",
    "Kind",
    "Pipeline",
    "PipelineError",
    "Schedule",
    "ScheduleError",
    "Simulation",
    "WeightGrad",
    "deferred_linear",
    "schedule",
]
