"""Pipeline schedules as explicit per-rank action lists.

* ``1f1b``: one forward, one backward (PipeDream-Flush, Narayanan et al. 2021).
* ``zb1p``: the same memory with weight gradients deferred into the bubble (ZB-H1, Qi et al., "Zero Bubble Pipeline
  Parallelism", 2023).
* ``dualpipe``: microbatches fed from both ends, forward and backward overlapped (DeepSeek-V3 technical report, section
  3.2.1).
* ``dualpipev``: DualPipe cut in half: every device holds stages r and 2n-1-r (Qi et al., "Cut-in-half").

The compute order is given; communication is inserted by :func:`insert_communication`, the same way for every schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from .actions import Action, Kind, Lists
from .simulate import Costs, Simulation, play, simulate
from .validate import Validation, validate


@dataclass(frozen=True)
class Schedule:
    """Per-rank action lists of one training step.

    ``actions[r]`` is what rank ``r`` does, in order. A run of consecutive communication actions is one batch: all of it
    is posted at once, and a compute action waits only for what it needs.

    Attributes:
        num_ranks: devices. ``num_stages``: pieces the model is cut into (twice the devices for "dualpipev").
        activation_limit: live activations (forwards whose backward, weight part included, is not done) per rank that
            the schedule promises not to exceed.
        training: False for a schedule of forwards alone.
    """

    name: str
    num_ranks: int
    num_microbatches: int
    num_stages: int
    activation_limit: int
    actions: Lists
    training: bool = True

    def rank_of(self, stage: int, microbatch: int) -> int:
        """The rank that computes ``stage`` for ``microbatch``."""
        if self.name == "dualpipe" and microbatch >= self.num_microbatches // 2:
            return self.num_ranks - 1 - stage
        return min(stage, self.num_stages - 1 - stage) if self.name == "dualpipev" else stage

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that ``rank`` holds, in the order in which it keeps their modules."""
        if self.name in ("dualpipe", "dualpipev"):
            return rank, self.num_stages - 1 - rank
        return (rank,)

    @property
    def mirrored(self) -> bool:
        """Whether every stage exists twice, on ranks s and n-1-s, so that its gradients must be summed over both."""
        return self.name == "dualpipe"

    def forward_only(self) -> Schedule:
        """The same order with the forwards alone (evaluation)."""
        compute = tuple(
            tuple(
                a._replace(kind=Kind.FORWARD, backward=None)
                for a in actions
                if a.kind in (Kind.FORWARD, Kind.OVERLAPPED)
            )
            for actions in self.actions
        )
        return replace(self, actions=insert_communication(compute, self.rank_of, self.num_stages), training=False)

    def validate(self, *, buffers: int = 0, max_activations: int | None = None) -> Validation:
        """Checks dependencies, message order, deadlock and memory; see
        :func:`dsv3_kernels.pipeline.validate.validate`."""
        return validate(self, buffers=buffers, max_activations=max_activations)

    def simulate(self, costs: Mapping[str, Any] | Costs) -> Simulation:
        """Plays the lists against a clock; see :func:`dsv3_kernels.pipeline.simulate.simulate`."""
        return simulate(self, costs)

    def __str__(self) -> str:
        head = f"{self.name}: {self.num_ranks} ranks, {self.num_stages} stages, {self.num_microbatches} microbatches"
        return "\n".join([head, *(f"rank {r}: {' '.join(map(str, a))}" for r, a in enumerate(self.actions))])


class _Rank:
    """The compute list of one rank, written in terms of its chunks (modules) with microbatches counted per chunk."""

    def __init__(self, stages: Sequence[int], first_microbatch: Sequence[int]) -> None:
        self.stages = stages
        self.actions: list[Action] = []
        self._forwards = list(first_microbatch)
        self._backwards = list(first_microbatch)
        self._deferred: list[tuple[int, int]] = []

    def forward(self, chunk: int) -> None:
        self.actions.append(Action(Kind.FORWARD, self.stages[chunk], self._forwards[chunk]))
        self._forwards[chunk] += 1

    def _next_backward(self, chunk: int) -> tuple[int, int]:
        self._backwards[chunk] += 1
        return self.stages[chunk], self._backwards[chunk] - 1

    def backward(self, chunk: int, defer_weight: bool = False) -> None:
        target = self._next_backward(chunk)
        if defer_weight:
            self._deferred.append(target)
        self.actions.append(Action(Kind.INPUT if defer_weight else Kind.BACKWARD, *target))

    def weight(self) -> None:
        self.actions.append(Action(Kind.WEIGHT, *self._deferred.pop(0)))

    def overlapped(self, forward: int, backward: int) -> None:
        self.forward(forward)
        self.actions[-1] = self.actions[-1]._replace(kind=Kind.OVERLAPPED, backward=self._next_backward(backward))


def _one_f_one_b(num_ranks: int, num_microbatches: int) -> list[_Rank]:
    ranks = []
    for rank in range(num_ranks):
        r = _Rank([rank], [0])
        warmup = min(num_ranks - rank - 1, num_microbatches)
        for _ in range(warmup):
            r.forward(0)
        for i in range(num_microbatches):
            if i + warmup < num_microbatches:
                r.forward(0)
            r.backward(0)
        ranks.append(r)
    return ranks


def _zb1p(num_ranks: int, num_microbatches: int) -> list[_Rank]:
    """1F1B in which rank r lags r microbatches behind with its weight gradients: every rank then holds num_ranks
    activations, and the last rank's cool-down is filled with them."""
    ranks = []
    for rank in range(num_ranks):
        r = _Rank([rank], [0])
        warmup = min(num_ranks - rank - 1, num_microbatches)
        for _ in range(warmup):
            r.forward(0)
        for i in range(num_microbatches):
            if i + warmup < num_microbatches:
                r.forward(0)
            r.backward(0, defer_weight=True)
            if i >= rank:
                r.weight()
        for _ in range(min(rank, num_microbatches)):
            r.weight()
        ranks.append(r)
    return ranks


def _bidirectional(r: _Rank, depth: int, half: int, microbatches: int) -> None:
    """The eight phases of DualPipe for a rank that is ``depth`` steps from its end of the pipeline (0 the end, ``half``
    - 1 the middle), chunk 0 being the direction that enters at that end; ``microbatches`` per direction."""
    outer = half - 1 - depth
    for _ in range(2 * outer):
        r.forward(0)
    for _ in range(depth + 1):
        r.forward(0)
        r.forward(1)
    for _ in range(outer):
        r.backward(1, defer_weight=True)
        r.weight()
        r.forward(1)
    for i in range(microbatches - 2 * half + depth + 1):
        if i == 0 and outer == 0:
            # The two middle ranks keep their first pair apart: the gradient leaves one forward earlier.
            r.forward(0)
            r.backward(1)
        else:
            r.overlapped(0, 1)
        r.overlapped(1, 0)
    for _ in range(outer):
        r.backward(1)
        r.overlapped(1, 0)
    # Drain: the second half of these 2 * (depth + 1) backwards defers its weight part to the end.
    for i in range(2 * (depth + 1)):
        r.backward(1 - i % 2, defer_weight=i > depth)
    for _ in range(outer):
        r.weight()
        r.backward(0, defer_weight=True)
    for _ in range(depth + 1):
        r.weight()


def _dualpipe(num_ranks: int, num_microbatches: int) -> list[_Rank]:
    half, each = num_ranks // 2, num_microbatches // 2
    ranks = []
    for rank in range(num_ranks):
        # The direction that enters at rank 0 carries the first half of the microbatches.
        stages, first = [rank, num_ranks - 1 - rank], [0, each]
        if rank >= half:
            stages, first = stages[::-1], first[::-1]
        r = _Rank(stages, first)
        _bidirectional(r, min(rank, num_ranks - 1 - rank), half, each)
        ranks.append(r)
    return ranks


def _dualpipev(num_ranks: int, num_microbatches: int) -> list[_Rank]:
    ranks = []
    for rank in range(num_ranks):
        r = _Rank([rank, 2 * num_ranks - 1 - rank], [0, 0])
        _bidirectional(r, rank, num_ranks, num_microbatches)
        ranks.append(r)
    return ranks


_ORDERS: dict[str, Callable[[int, int], list[_Rank]]] = {
    "1f1b": _one_f_one_b,
    "zb1p": _zb1p,
    "dualpipe": _dualpipe,
    "dualpipev": _dualpipev,
}


def insert_communication(compute: Lists, rank_of: Callable[[int, int], int], num_stages: int) -> Lists:
    """Adds sends and receives to compute lists.

    The lists are played against a clock of nominal durations. A send stands right after the compute action that
    produced the tensor, its receive at the receiver's first gap between two actions from that moment on. So

    * messages between two ranks are received in the order in which they are sent (no tags needed), and
    * even if every batch blocks until all of it is matched, nothing deadlocks: a rank stuck in a batch waits for one
      that is stuck in a batch of an earlier time, and there is a first.
    """
    nominal = Costs(forward=1.0, backward=2.0, weight=1.0, overlapped=3.0, p2p=0.0)
    spans = play(compute, rank_of, num_stages, nominal, implicit_sends=True)

    messages: list[tuple[float, int, int, Action, Action]] = []  # sent at, sender, index in its list, send, receive
    for rank, timeline in enumerate(spans):
        for index, span in enumerate(timeline):
            for kind, stage, microbatch in span.action.parts():
                if kind == Kind.FORWARD and stage < num_stages - 1:
                    send, receive, other = Kind.SEND_FORWARD, Kind.RECV_FORWARD, stage + 1
                elif kind in (Kind.BACKWARD, Kind.INPUT) and stage > 0:
                    send, receive, other = Kind.SEND_BACKWARD, Kind.RECV_BACKWARD, stage - 1
                else:
                    continue
                peer = rank_of(other, microbatch)
                if peer != rank:
                    sent = Action(send, stage, microbatch, peer=peer)
                    received = Action(receive, other, microbatch, peer=rank)
                    messages.append((span.end, rank, index, sent, received))

    messages.sort(key=lambda m: m[:3])
    gaps: list[list[list[Action]]] = [[[] for _ in range(len(t) + 1)] for t in spans]
    cursor = [0] * len(spans)
    for time, rank, index, sent, received in messages:
        gaps[rank][index + 1].append(sent)
        # Messages come in order of time, so a receiver's cursor only moves on.
        timeline, at = spans[sent.peer], cursor[sent.peer]
        while at < len(timeline) and timeline[at].start < time:
            at += 1
        cursor[sent.peer] = at
        gaps[sent.peer][at].append(received)

    lists = []
    for timeline, gap in zip(spans, gaps, strict=True):
        actions = list(gap[0])
        for span, after in zip(timeline, gap[1:], strict=True):
            actions.append(span.action)
            actions += after
        lists.append(tuple(actions))
    return tuple(lists)


def _check_arguments(name: str, num_ranks: int, num_microbatches: int) -> None:
    if name not in _ORDERS:
        raise ValueError(f"schedule: name must be one of {', '.join(_ORDERS)}, got {name!r}")
    for argument, value in (("num_ranks", num_ranks), ("num_microbatches", num_microbatches)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"schedule: {argument} must be an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"schedule: {argument} must be at least 1, got {value}")
    if name == "dualpipe":
        if num_ranks % 2:
            raise ValueError(
                f"schedule: dualpipe needs an even num_ranks (two pipelines meet in the middle), got {num_ranks}"
            )
        if num_microbatches % 2:
            raise ValueError(
                f"schedule: dualpipe needs an even num_microbatches (half from each end), got {num_microbatches}"
            )
    if name in ("dualpipe", "dualpipev") and num_microbatches < 2 * num_ranks:
        raise ValueError(
            f"schedule: {name} needs num_microbatches >= 2 * num_ranks = {2 * num_ranks}, got {num_microbatches}"
        )


@lru_cache(maxsize=64)
def _build(name: str, num_ranks: int, num_microbatches: int) -> Schedule:
    num_stages = 2 * num_ranks if name == "dualpipev" else num_ranks
    limit = num_stages + (name in ("dualpipe", "dualpipev"))
    compute = tuple(tuple(r.actions) for r in _ORDERS[name](num_ranks, num_microbatches))
    empty = Schedule(name, num_ranks, num_microbatches, num_stages, limit, compute)
    return replace(empty, actions=insert_communication(compute, empty.rank_of, num_stages))


def schedule(name: str, num_ranks: int, num_microbatches: int) -> Schedule:
    """The action lists of a pipeline schedule.

    Args:
        name: "1f1b", "zb1p", "dualpipe" or "dualpipev".
        num_ranks: number of devices; even for "dualpipe". "dualpipev" cuts the model into ``2 * num_ranks`` stages, the
            others into ``num_ranks`` ("dualpipe" holds each of them twice).
        num_microbatches: microbatches of one step; for "dualpipe" even and at least ``2 * num_ranks`` (the first half
            enters at rank 0, the second at the last rank), for "dualpipev" at least ``2 * num_ranks``.

    Raises:
        TypeError: an argument that is not an int.
        ValueError: an unknown name or impossible sizes.
    """
    _check_arguments(name, num_ranks, num_microbatches)
    return _build(name, num_ranks, num_microbatches)


__all__ = ["Schedule", "insert_communication", "schedule"]
