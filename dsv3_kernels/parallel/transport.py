"""How rows get from rank to rank: in one process (virtual ranks), or by messages of a torch.distributed group."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

_TAG = 0x4550
_numbers = itertools.count()


class EPTimeoutError(RuntimeError):
    """A rank that is gone or late. ``peer`` is its number in the group, ``phase`` what it did not take part in."""

    def __init__(self, message: str, *, peer: int, phase: str) -> None:
        super().__init__(message)
        self.peer = peer
        self.phase = phase


class Exchange(Protocol):
    """Rows on their way."""

    def wait(self) -> list[Tensor]:
        """Per local rank: what it received, by source rank."""
        ...


class Transport(Protocol):
    num_ranks: int
    local_ranks: Sequence[int]

    def start(
        self, send: list[Tensor], send_counts: list[list[int]], recv_counts: list[list[int]], phase: str
    ) -> Exchange:
        """Starts moving rows. Per local rank: ``send`` [rows, width] is ordered by destination."""
        ...


class _Done:
    def __init__(self, received: list[Tensor]) -> None:
        self._received = received

    def wait(self) -> list[Tensor]:
        return self._received


class VirtualRanks:
    """All ranks live in this process."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.local_ranks: Sequence[int] = range(num_ranks)

    def start(
        self, send: list[Tensor], send_counts: list[list[int]], recv_counts: list[list[int]], phase: str
    ) -> Exchange:
        pieces = [tensor.split(counts) for tensor, counts in zip(send, send_counts, strict=True)]
        return _Done([torch.cat([source[rank] for source in pieces]) for rank in self.local_ranks])


class Group:
    """One rank of a torch.distributed group.

    NCCL moves rows with ``all_to_all_single``. On gloo, whose collectives do not say who failed, every pair of ranks
    has its own message, so that the missing one is known. A rank that gives up leaves a note in the group's store
    first: those who then miss it know that it is not the culprit.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: float) -> None:
        self.group = group
        self.num_ranks = group.size()
        self.rank = group.rank()
        self.local_ranks: Sequence[int] = (self.rank,)
        self.timeout = timeout
        self.pairwise = dist.get_backend(group) == "gloo"
        # All ranks of a group make their objects in the same order.
        self.notes = f"dsv3_kernels/ep/{group.group_name}/{next(_numbers)}"

    def start(
        self, send: list[Tensor], send_counts: list[list[int]], recv_counts: list[list[int]], phase: str
    ) -> Exchange:
        return _Messages(self, send[0].contiguous(), send_counts[0], recv_counts[0], phase)

    def leave_note(self) -> None:
        with contextlib.suppress(RuntimeError, ValueError):  # the store's own host may be the rank that is gone
            dist.distributed_c10d._get_default_store().set(f"{self.notes}/{self.rank}", "1")

    def has_note(self, rank: int) -> bool:
        try:
            return dist.distributed_c10d._get_default_store().check([f"{self.notes}/{rank}"])
        except (RuntimeError, ValueError):
            return False


class _Messages:
    def __init__(
        self, transport: Group, send: Tensor, send_counts: list[int], recv_counts: list[int], phase: str
    ) -> None:
        self.transport, self.phase = transport, phase
        self.deadline = time.monotonic() + transport.timeout
        self.send = send  # alive until it is sent
        self.received = send.new_empty(sum(recv_counts), *send.shape[1:])
        self.works: list[tuple[int, Any]] = []
        group, me = transport.group, transport.rank
        if not transport.pairwise:
            work = dist.all_to_all_single(self.received, send, recv_counts, send_counts, group=group, async_op=True)
            self.works.append((-1, work))
            return
        out, into = send.split(send_counts), self.received.split(recv_counts)
        into[me].copy_(out[me])
        lost = set()
        # Rank r talks to r + 1, r + 2, ... first: the messages of all ranks are spread evenly.
        for peer in ((me + i) % transport.num_ranks for i in range(1, transport.num_ranks)):
            try:
                if into[peer].numel():
                    work = dist.irecv(into[peer], group=group, group_src=peer, tag=_TAG)
                    self.works.append((peer, work))
                if out[peer].numel():
                    work = dist.isend(out[peer], group=group, group_dst=peer, tag=_TAG)
                    self.works.append((peer, work))
            except RuntimeError:
                lost.add(peer)
        if lost:
            self._give_up(lost, "gone")

    def wait(self) -> list[Tensor]:
        gone: set[int] = set()
        late: set[int] = set()
        for peer, work in self.works:
            left = max(0.001, self.deadline - time.monotonic())
            try:
                work.wait(timedelta(seconds=left))
            except RuntimeError as error:
                (late if "imed out" in str(error) else gone).add(peer)
        if gone or late:
            # A closed connection is surer than silence, but both may be ranks that gave up on a third one.
            self._give_up(gone | late, "gone" if gone else "late")
        return [self.received]

    def _give_up(self, lost: set[int], how: str) -> None:
        transport = self.transport
        suspects = [rank for rank in sorted(lost) if not transport.has_note(rank)] or sorted(lost)
        transport.leave_note()
        peer = suspects[0]
        raise EPTimeoutError(
            f"expert parallel: rank {transport.rank}, {self.phase}: rank {peer} is {how} "
            f"(timeout {transport.timeout} s)",
            peer=peer,
            phase=self.phase,
        )
