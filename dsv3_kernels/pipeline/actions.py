"""The vocabulary of pipeline schedules: what one rank does, one step at a time."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What an action does. Compute: F, B, I, W, FB. Communication: SF, RF, SB, RB."""

    FORWARD = "F"
    BACKWARD = "B"
    """Full backward: gradients of the inputs and of the weights."""
    INPUT = "I"
    """Backward for the inputs only; a later WEIGHT action of the same stage and microbatch completes it."""
    WEIGHT = "W"
    OVERLAPPED = "FB"
    """One forward and one full backward, of two different microbatches, interleaved by the model."""
    SEND_FORWARD = "SF"
    """Sends the stage's output to the rank of the next stage."""
    RECV_FORWARD = "RF"
    """Posts the receive of the stage's input, from the rank of the previous stage."""
    SEND_BACKWARD = "SB"
    """Sends the gradient of the stage's input to the rank of the previous stage."""
    RECV_BACKWARD = "RB"
    """Posts the receive of the gradient of the stage's output, from the rank of the next stage."""


SENDS = frozenset({Kind.SEND_FORWARD, Kind.SEND_BACKWARD})
RECEIVES = frozenset({Kind.RECV_FORWARD, Kind.RECV_BACKWARD})
COMMUNICATION = SENDS | RECEIVES


class Action(NamedTuple):
    """One step of one rank.

    ``stage`` is the model stage on this rank and ``microbatch`` the microbatch. For OVERLAPPED they name the forward,
    and ``backward`` is the (stage, microbatch) of the backward. For communication ``peer`` is the other rank.
    """

    kind: Kind
    stage: int
    microbatch: int
    backward: tuple[int, int] | None = None
    peer: int = -1

    def __str__(self) -> str:
        if self.backward is not None:
            return f"{self.stage}F{self.microbatch}|{self.backward[0]}B{self.backward[1]}"
        text = f"{self.stage}{self.kind}{self.microbatch}"
        if self.kind in SENDS:
            return f"{text}->{self.peer}"
        return f"{text}<-{self.peer}" if self.kind in RECEIVES else text

    @property
    def is_communication(self) -> bool:
        return self.kind in COMMUNICATION

    def parts(self) -> tuple[tuple[Kind, int, int], ...]:
        """The (kind, stage, microbatch) that a compute action carries out: two for OVERLAPPED, else one."""
        if self.backward is None:
            return ((self.kind, self.stage, self.microbatch),)
        return (Kind.FORWARD, self.stage, self.microbatch), (Kind.BACKWARD, *self.backward)


Lists = tuple[tuple[Action, ...], ...]


class ScheduleError(ValueError):
    """A schedule that cannot run: a broken dependency, a deadlock, or too many live activations."""


def without_communication(lists: Iterable[Iterable[Action]]) -> Lists:
    return tuple(tuple(a for a in actions if a.kind not in COMMUNICATION) for actions in lists)
