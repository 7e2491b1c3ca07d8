"""Ranks that die or hang, at every phase: each survivor names the culprit and the phase, in time, and goes on.

The seeds are printed, so that a failure can be had again: `run(struck, ...)` with the arguments of `fault(seed)`.
"""

from __future__ import annotations

import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import run
from test_expert_parallel import HIDDEN, routed

from dsv3_kernels.parallel import EPTimeoutError, ExpertParallel

PHASES = ("dispatch/counts", "dispatch/payload", "combine/payload", "combine backward", "dispatch backward")
TIMEOUT = 1.0
EXPERTS = 9


class Fault(NamedTuple):
    seed: int
    ranks: int
    victim: int
    phase: str
    signal: int
    delay: float
    """Seconds from the start of the phase until the signal."""


def fault(seed: int, how: int) -> Fault:
    generator = random.Random(seed)
    ranks = generator.choice((2, 3, 3, 4))
    delay = generator.choice((0.0, 0.0, 0.01, 0.1))
    return Fault(seed, ranks, generator.randrange(ranks), PHASES[seed % len(PHASES)], how, delay)


def struck(rank: int, case: Fault, folder: str):
    """(peer named, phase named, seconds since the signal) of a survivor, which then works on in a smaller group."""
    x, experts, weights = routed("random", case.ranks, EXPERTS, 3, seed=case.seed)[rank]
    ep = ExpertParallel(None, EXPERTS, HIDDEN, 20, timeout=TIMEOUT)
    x.requires_grad_(), weights.requires_grad_()
    start, struck_at = ep._transport.start, os.path.join(folder, "struck")

    def trap(send, send_counts, recv_counts, phase):
        if phase == case.phase and rank == case.victim:
            time.sleep(case.delay)
            with open(struck_at, "w") as file:
                file.write(str(time.clock_gettime(time.CLOCK_MONOTONIC)))
            os.kill(os.getpid(), case.signal)
        return start(send, send_counts, recv_counts, phase)

    ep._transport.start = trap
    try:
        rows, _, _, _, handle = ep.dispatch(x, experts, weights)
        ep.combine(rows.sin(), handle).sum().backward()
    except EPTimeoutError as error:
        with open(struck_at) as file:
            seconds = time.clock_gettime(time.CLOCK_MONOTONIC) - float(file.read())
        assert f"rank {rank}, {error.phase}: rank {error.peer} is" in str(error)
        go_on(rank, case, folder, x.detach(), experts, weights.detach())
        return error.peer, error.phase, seconds
    raise AssertionError("nothing was noticed")


def go_on(rank: int, case: Fault, folder: str, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> None:
    """A fresh group of the survivors, in the same processes."""
    dist.destroy_process_group()
    number = rank - (rank > case.victim)
    store = os.path.join(folder, "store")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=case.ranks - 1)
    again = ExpertParallel(None, EXPERTS, HIDDEN, 20, timeout=20)
    rows, _, _, _, handle = again.dispatch(x, experts, weights)
    difference = again.combine(rows, handle) - x * weights.sum(-1, keepdim=True)
    assert difference.abs().max() < 1e-12


def problems(case: Fault, folder: str) -> list[str]:
    os.makedirs(folder)
    found = []
    for rank, result in enumerate(run(struck, case.ranks, case, folder, lost=(case.victim,))):
        if rank == case.victim:
            continue
        peer, phase, seconds = result
        if peer != case.victim:
            found.append(f"{case}: rank {rank} named {peer}")
        # A rank that already had the victim's message misses it in the next exchange.
        if phase not in PHASES[PHASES.index(case.phase) :][:2]:
            found.append(f"{case}: rank {rank} named the phase {phase}")
        if seconds > TIMEOUT + 1:
            found.append(f"{case}: rank {rank} took {seconds:.2f} s")
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("how", "count"), [(signal.SIGKILL, 60), (signal.SIGSTOP, 40)], ids=["killed", "stalled"])
def test_every_survivor_names_the_culprit(how: int, count: int, tmp_path) -> None:
    cases = [fault(seed, how) for seed in range(count)]
    print("seeds", [case.seed for case in cases])
    assert {case.phase for case in cases} == set(PHASES)
    with ThreadPoolExecutor(4 if how == signal.SIGSTOP else 2) as pool:  # stalled groups mostly wait
        reports = pool.map(lambda case: problems(case, str(tmp_path / str(case.seed))), cases)
        found = [problem for report in reports for problem in report]
    assert not found, "\n".join(found)
