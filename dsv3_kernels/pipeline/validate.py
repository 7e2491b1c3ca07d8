"""Proves of a schedule that it can run: dependencies, message order, deadlock, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .actions import RECEIVES, SENDS, Action, Kind, ScheduleError
from .simulate import peak_activations

if TYPE_CHECKING:
    from .schedule import Schedule


@dataclass(frozen=True)
class Validation:
    """What a valid schedule needs, per rank."""

    peak_activations: tuple[int, ...]
    """Peak live activations, in microbatches of one stage."""
    peak_received: tuple[int, ...]
    """Peak number of tensors for which a receive is posted and that are not consumed yet."""
    messages: int
    """Messages of one step, all ranks together."""


def validate(schedule: Schedule, *, buffers: int = 0, max_activations: int | None = None) -> Validation:
    """Checks a schedule and returns what it needs.

    Checked are: every stage and microbatch has one forward, one full backward or an input and a weight part, on the
    rank that holds the stage, in this order; every tensor is made before it is sent, sent before it is used, and sent
    once; messages between two ranks are received in the order in which they are sent; the step ends, with batches of
    communication that block until all their messages are taken; live activations stay within the limit.

    Args:
        buffers: messages that a link (an ordered pair of ranks) holds before a sender blocks. 0, the strictest, is a
            rendezvous: a batch completes when every peer has reached its side.
        max_activations: limit per rank; default ``schedule.activation_limit``.

    Raises:
        ScheduleError: with the rank, the action and the rule.
    """
    if buffers < 0:
        raise ValueError(f"validate: buffers must not be negative, got {buffers}")
    if len(schedule.actions) != schedule.num_ranks:
        raise ScheduleError(f"{schedule.num_ranks} ranks need as many lists, got {len(schedule.actions)}")
    _check_complete(schedule)
    received = tuple(_check_rank(schedule, rank) for rank in range(schedule.num_ranks))
    messages = _check_deadlock(schedule, buffers)

    limit = schedule.activation_limit if max_activations is None else max_activations
    peaks = tuple(peak_activations(actions) for actions in schedule.actions)
    for rank, peak in enumerate(peaks):
        if schedule.training and peak > limit:
            raise ScheduleError(f"rank {rank} holds {peak} live activations, more than {limit}")
    return Validation(peaks, received, messages)


def _check_complete(schedule: Schedule) -> None:
    """Every part of every microbatch exists exactly once, on its rank."""
    done: dict[tuple[int, int], list[Kind]] = {}
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            if action.is_communication:
                continue
            for kind, stage, microbatch in action.parts():
                inside = 0 <= stage < schedule.num_stages and 0 <= microbatch < schedule.num_microbatches
                if not inside or schedule.rank_of(stage, microbatch) != rank:
                    raise ScheduleError(f"rank {rank}: {action} is not its work")
                done.setdefault((stage, microbatch), []).append(kind)
    wanted = (
        [[Kind.FORWARD, Kind.BACKWARD], [Kind.FORWARD, Kind.INPUT, Kind.WEIGHT]]
        if schedule.training
        else [[Kind.FORWARD]]
    )
    for stage in range(schedule.num_stages):
        for microbatch in range(schedule.num_microbatches):
            kinds = done.get((stage, microbatch), [])
            if kinds not in wanted:
                words = " or ".join(map(" ".join, wanted))
                raise ScheduleError(
                    f"stage {stage}, microbatch {microbatch}: got {' '.join(kinds) or 'nothing'}, wanted {words}"
                )


def _check_rank(schedule: Schedule, rank: int) -> int:
    """Tensors of one rank are there before they are used or sent; returns the peak of posted and unconsumed
    receives."""
    last = schedule.num_stages - 1
    inputs: set[tuple[str, int, int]] = set()  # what compute may consume: ("F" | "B", stage, microbatch)
    outputs: set[tuple[str, int, int]] = set()  # what may be sent
    owed: set[tuple[str, int, int]] = set()  # made here for another rank, not sent
    posted = peak = 0
    for action in schedule.actions[rank]:
        if action.kind in RECEIVES:
            way = "F" if action.kind == Kind.RECV_FORWARD else "B"
            source = action.stage + (-1 if way == "F" else 1)
            if not 0 <= source <= last or schedule.rank_of(source, action.microbatch) != action.peer:
                raise ScheduleError(f"rank {rank}: {action} comes from a rank that does not make it")
            if (way, action.stage, action.microbatch) in inputs:
                raise ScheduleError(f"rank {rank}: {action} is received twice")
            inputs.add((way, action.stage, action.microbatch))
            posted += 1
            peak = max(peak, posted)
            continue
        if action.kind in SENDS:
            key = ("F" if action.kind == Kind.SEND_FORWARD else "B", action.stage, action.microbatch)
            if key not in outputs:
                raise ScheduleError(f"rank {rank}: {action} is sent before it is made, or twice")
            target = action.stage + (1 if key[0] == "F" else -1)
            if schedule.rank_of(target, action.microbatch) != action.peer:
                raise ScheduleError(f"rank {rank}: {action} goes to a rank that does not use it")
            outputs.discard(key)
            owed.discard(key)
            continue
        for kind, stage, microbatch in action.parts():
            if kind == Kind.WEIGHT:
                continue
            way = "F" if kind == Kind.FORWARD else "B"
            back, ahead = (stage - 1, stage + 1) if way == "F" else (stage + 1, stage - 1)
            if 0 <= back <= last:
                if (way, stage, microbatch) not in inputs:
                    raise ScheduleError(f"rank {rank}: {action} starts before its input of stage {back} is there")
                inputs.discard((way, stage, microbatch))
                posted -= schedule.rank_of(back, microbatch) != rank
            if 0 <= ahead <= last:
                if schedule.rank_of(ahead, microbatch) == rank:
                    inputs.add((way, ahead, microbatch))
                else:
                    outputs.add((way, stage, microbatch))
                    owed.add((way, stage, microbatch))
    if owed or inputs:
        way, stage, microbatch = min(owed or inputs)
        what = "never sent" if owed else "received or made, but never used"
        raise ScheduleError(f"rank {rank}: {way} tensor of stage {stage}, microbatch {microbatch} is {what}")
    return peak


def _message(action: Action) -> tuple[str, int, int]:
    """What a message is, whichever side names it: way, the stage that made the tensor, microbatch."""
    if action.kind in SENDS:
        return "F" if action.kind == Kind.SEND_FORWARD else "B", action.stage, action.microbatch
    if action.kind == Kind.RECV_FORWARD:
        return "F", action.stage - 1, action.microbatch
    return "B", action.stage + 1, action.microbatch


def _check_deadlock(schedule: Schedule, buffers: int) -> int:
    """Plays the batches of communication with bounded links; returns the number of messages."""
    # Per link: what is sent and received, in order. Each communication action gets its place in its link.
    sent: dict[tuple[int, int], list[Action]] = {}
    received: dict[tuple[int, int], list[Action]] = {}
    batches: list[list[list[tuple[Action, tuple[int, int], int]]]] = []
    for rank, actions in enumerate(schedule.actions):
        mine: list[list[tuple[Action, tuple[int, int], int]]] = []
        previous_was_compute = True
        for action in actions:
            if not action.is_communication:
                previous_was_compute = True
                continue
            outgoing = action.kind in SENDS
            link = (rank, action.peer) if outgoing else (action.peer, rank)
            queue = (sent if outgoing else received).setdefault(link, [])
            queue.append(action)
            if previous_was_compute:
                mine.append([])
                previous_was_compute = False
            mine[-1].append((action, link, len(queue) - 1))
        batches.append(mine)

    for link in sent.keys() | received.keys():
        outgoing_messages, incoming = sent.get(link, []), received.get(link, [])
        for i in range(max(len(outgoing_messages), len(incoming))):
            s = outgoing_messages[i] if i < len(outgoing_messages) else None
            r = incoming[i] if i < len(incoming) else None
            if s is None or r is None or _message(s) != _message(r):
                raise ScheduleError(
                    f"rank {link[0]} to rank {link[1]}, message {i}: sent {s or 'nothing'}, received {r or 'nothing'}"
                )

    posted_sends = dict.fromkeys(sent, 0)
    posted_receives = dict.fromkeys(sent, 0)
    position = [0] * schedule.num_ranks
    is_posted = [False] * schedule.num_ranks
    progress = True
    while progress:
        progress = False
        for rank, mine in enumerate(batches):
            while position[rank] < len(mine):
                batch = mine[position[rank]]
                if not is_posted[rank]:
                    for action, link, _ in batch:
                        (posted_sends if action.kind in SENDS else posted_receives)[link] += 1
                    is_posted[rank] = progress = True
                if not all(
                    i < posted_receives[link] + buffers if action.kind in SENDS else i < posted_sends[link]
                    for action, link, i in batch
                ):
                    break
                position[rank] += 1
                is_posted[rank] = False
                progress = True
    stuck = [
        f"rank {r} in [{', '.join(str(a) for a, _, _ in batches[r][p])}]"
        for r, p in enumerate(position)
        if p < len(batches[r])
    ]
    if stuck:
        raise ScheduleError(f"deadlock with {buffers} buffers per link: {'; '.join(stuck)}")
    return sum(map(len, sent.values()))
