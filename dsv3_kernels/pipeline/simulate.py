"""Discrete-event simulation of a pipeline schedule: who computes what, when, and who waits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from .actions import Action, Kind, Lists, ScheduleError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .schedule import Schedule

PerStage = float | Sequence[float]


class Span(NamedTuple):
    """One compute action on a rank's time line."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Costs:
    """Durations, in any one unit of time.

    ``forward``, ``backward`` (input and weight part together) and ``weight`` are numbers, or one number per stage for
    uneven stages (an embedding or a head makes the first or last stage longer). ``overlapped`` is the duration of an
    interleaved forward-backward pair: a number, or a function of (forward stage, backward stage); by default the two
    one after the other. ``p2p`` is the time from the end of a compute action to the arrival of what it sends: a number,
    or a function of (source rank, destination rank).
    """

    forward: PerStage
    backward: PerStage
    weight: PerStage
    overlapped: float | Callable[[int, int], float] | None = None
    p2p: float | Callable[[int, int], float] = 0.0

    @classmethod
    def of(cls, costs: Mapping[str, Any] | Costs, num_stages: int) -> Costs:
        """Checks a mapping with the keys forward, backward[, weight = backward / 2][, overlapped][, p2p]."""
        if isinstance(costs, Costs):
            costs = {k: v for k, v in vars(costs).items() if v is not None}
        known = ("forward", "backward", "weight", "overlapped", "p2p")
        if unknown := [k for k in costs if k not in known]:
            raise ValueError(f"simulate: unknown cost {', '.join(map(repr, unknown))}; known are {', '.join(known)}")
        if missing := [k for k in known[:2] if k not in costs]:
            raise ValueError(f"simulate: costs must give {' and '.join(map(repr, missing))}")

        def per_stage(key: str, value: Any) -> tuple[float, ...]:
            values = [value] * num_stages if isinstance(value, int | float) else list(value)
            if len(values) != num_stages:
                raise ValueError(
                    f"simulate: costs[{key!r}]: got {len(values)} numbers, wanted one, or {num_stages} (one per stage)"
                )
            return tuple(_duration(f"costs[{key!r}]", v) for v in values)

        forward, backward = (per_stage(k, costs[k]) for k in known[:2])
        weight = per_stage("weight", costs["weight"]) if "weight" in costs else tuple(b / 2 for b in backward)
        for stage, (b, w) in enumerate(zip(backward, weight, strict=True)):
            if w > b:
                raise ValueError(
                    f"simulate: costs['weight'] is a part of costs['backward'], but stage {stage} has {w} > {b}"
                )
        single = {k: costs[k] for k in known[3:] if costs.get(k) is not None}
        single = {k: v if callable(v) else _duration(f"costs[{k!r}]", v) for k, v in single.items()}
        return cls(forward, backward, weight, **single)

    def duration(self, action: Action) -> float:
        def at(cost: PerStage, stage: int) -> float:
            return cost if isinstance(cost, int | float) else cost[stage]

        if action.backward is not None:
            if callable(self.overlapped):
                return self.overlapped(action.stage, action.backward[0])
            if self.overlapped is not None:
                return self.overlapped
            return at(self.forward, action.stage) + at(self.backward, action.backward[0])
        if action.kind == Kind.FORWARD:
            return at(self.forward, action.stage)
        if action.kind == Kind.WEIGHT:
            return at(self.weight, action.stage)
        full = at(self.backward, action.stage)
        return full - at(self.weight, action.stage) if action.kind == Kind.INPUT else full

    def latency(self, source: int, destination: int) -> float:
        return self.p2p(source, destination) if callable(self.p2p) else self.p2p


def _duration(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"simulate: {name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"simulate: {name} must be finite and not negative, got {value}")
    return float(value)


def play(
    lists: Lists,
    rank_of: Callable[[int, int], int],
    num_stages: int,
    costs: Costs,
    *,
    implicit_sends: bool = False,
) -> list[list[Span]]:
    """Runs the lists against a clock: per rank, when each compute action starts and ends.

    A compute action starts when the rank is free and its tensors are there; a tensor of another rank is there ``p2p``
    after the send was reached (``implicit_sends``: after the compute action that made it). Raises
    :class:`ScheduleError` where no rank can go on.
    """
    # When the output of a forward (F), or the input gradient of a backward (B), of a stage can be used: on the rank
    # that made it, and by the neighbouring rank.
    local: dict[tuple[str, int, int], float] = {}
    arrived: dict[tuple[str, int, int], float] = {}

    def ready(kind: Kind, stage: int, microbatch: int) -> float | None:
        rank = rank_of(stage, microbatch)
        if kind == Kind.WEIGHT:
            return local.get(("B", stage, microbatch))
        if kind == Kind.FORWARD:
            if stage == 0:
                return 0.0
            source, key = stage - 1, ("F", stage - 1, microbatch)
        else:
            own = local.get(("F", stage, microbatch))
            if stage == num_stages - 1 or own is None:
                return own
            source, key = stage + 1, ("B", stage + 1, microbatch)
        return (local if rank_of(source, microbatch) == rank else arrived).get(key)

    spans: list[list[Span]] = [[] for _ in lists]
    clock = [0.0] * len(lists)
    position = [0] * len(lists)
    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(lists):
            while position[rank] < len(actions):
                action = actions[position[rank]]
                if action.is_communication:
                    if action.kind in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD):
                        key = ("F" if action.kind == Kind.SEND_FORWARD else "B", action.stage, action.microbatch)
                        arrived[key] = clock[rank] + costs.latency(rank, action.peer)
                    position[rank] += 1
                    progress = True
                    continue
                start = clock[rank]
                blocked = False
                for kind, stage, microbatch in action.parts():
                    if (at := ready(kind, stage, microbatch)) is None:
                        blocked = True
                        break
                    start = max(start, at)
                if blocked:
                    break
                end = start + costs.duration(action)
                for kind, stage, microbatch in action.parts():
                    if kind != Kind.WEIGHT:
                        key = ("F" if kind == Kind.FORWARD else "B", stage, microbatch)
                        local[key] = end
                        if implicit_sends:
                            arrived[key] = end
                spans[rank].append(Span(action, start, end))
                clock[rank] = end
                position[rank] += 1
                progress = True
    stuck = [f"rank {r} before {lists[r][p]}" for r, p in enumerate(position) if p < len(lists[r])]
    if stuck:
        raise ScheduleError(f"the schedule cannot go on: {'; '.join(stuck)}")
    return spans


def peak_activations(actions: Sequence[Action]) -> int:
    """Most forwards that are begun and whose backward, weight part included, is not done, along one rank's list."""
    live = peak = 0
    for action in actions:
        if action.kind in (Kind.FORWARD, Kind.OVERLAPPED):
            live += 1
            peak = max(peak, live)
        if action.kind in (Kind.BACKWARD, Kind.WEIGHT, Kind.OVERLAPPED):
            live -= 1
    return peak


@dataclass(frozen=True)
class Simulation:
    """A simulated step. Times are in the unit of the costs."""

    schedule: Schedule
    costs: Costs
    spans: list[list[Span]]

    @cached_property
    def makespan(self) -> float:
        """From the first action of any rank to the last."""
        return max((t[-1].end for t in self.spans if t), default=0.0)

    @cached_property
    def idle(self) -> tuple[float, ...]:
        """Per rank: makespan less its computing time."""
        return tuple(self.makespan - sum(s.end - s.start for s in t) for t in self.spans)

    @property
    def bubble(self) -> float:
        """The worst rank's idle time."""
        return max(self.idle)

    @cached_property
    def peaks(self) -> tuple[int, ...]:
        """Per rank: peak live activations, in microbatches of one stage."""
        return tuple(peak_activations([s.action for s in t]) for t in self.spans)

    @property
    def peak_activations(self) -> int:
        """The worst rank's peak of live activations."""
        return max(self.peaks)

    def plot(self, path: Any = None) -> Figure:
        """A coloured time line, one row per rank; written to ``path`` if given (the suffix says the format).

        Needs matplotlib (RuntimeError without it).
        """
        from .plot import plot

        return plot(self, path)

    def __str__(self) -> str:
        return (
            f"simulated {self.schedule.name}: {self.schedule.num_ranks} ranks, {self.schedule.num_microbatches} "
            f"microbatches, makespan {self.makespan:g}, "
            f"bubble {self.bubble:g}, peak activations {self.peak_activations}"
        )


def simulate(schedule: Schedule, costs: Mapping[str, Any] | Costs) -> Simulation:
    """Plays a schedule against a clock.

    Args:
        costs: a mapping with "forward", "backward" (input + weight part) and optionally "weight" (default half of
            backward), "overlapped" (default forward + backward), "p2p" (default 0); see :class:`Costs` for per-stage
            values.

    Raises:
        ValueError: unknown, missing, negative or not finite costs, or a per-stage list of the wrong length.
        TypeError: a cost that is not a number.
        ScheduleError: the lists deadlock.
    """
    checked = Costs.of(costs, schedule.num_stages)
    return Simulation(schedule, checked, play(schedule.actions, schedule.rank_of, schedule.num_stages, checked))
