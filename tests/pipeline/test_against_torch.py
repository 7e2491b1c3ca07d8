"""Our action lists beside those of torch.distributed.pipelining, where it has the same schedule."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch.distributed.pipelining.schedules as torch_schedules

import dsv3_kernels as dk
from dsv3_kernels.pipeline.actions import Kind, without_communication

KINDS = {
    "FORWARD": Kind.FORWARD,
    "FULL_BACKWARD": Kind.BACKWARD,
    "BACKWARD_INPUT": Kind.INPUT,
    "BACKWARD_WEIGHT": Kind.WEIGHT,
}


def torch_order(name: str, ranks: int, microbatches: int) -> list[list[tuple]]:
    """Per rank the (kind, stage, microbatch) of every compute action; a pair for an overlapped one."""
    if name == "1f1b":
        stand_in = SimpleNamespace(_num_stages=ranks, _n_microbatches=microbatches)
        order = torch_schedules.Schedule1F1B._get_pipeline_order(stand_in)
        lists = [order[rank] for rank in range(ranks)]
    else:
        stand_in = SimpleNamespace(pp_group_size=ranks, _n_microbatches=microbatches)
        one = torch_schedules.ScheduleDualPipeV._calculate_single_rank_operations
        lists = [one(stand_in, rank) for rank in range(ranks)]

    def part(action):
        return KINDS[action.computation_type.name], action.stage_index, action.microbatch_index

    found = []
    for actions in lists:
        # 1F1B's list ends in the reduction of gradients, which is no step of ours.
        steps = [a for a in actions if a is not None and a.computation_type.name in (*KINDS, "OVERLAP_F_B")]
        found.append([tuple(map(part, a.sub_actions)) if a.sub_actions else (part(a),) for a in steps])
    return found


@pytest.mark.parametrize("name", ["1f1b", "dualpipev"])
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (2, 7), (3, 6), (4, 8), (4, 20), (8, 16), (8, 33)])
def test_same_lists(name: str, ranks: int, microbatches: int) -> None:
    ours = [
        [a.parts() for a in actions]
        for actions in without_communication(dk.pipeline.schedule(name, ranks, microbatches).actions)
    ]
    theirs = torch_order(name, ranks, microbatches)
    if name == "1f1b":  # torch 2.13 counts the last rank's forwards from 1
        forwards = iter(range(microbatches))
        theirs[-1] = [((k, stage, next(forwards) if k is Kind.FORWARD else m),) for ((k, stage, m),) in theirs[-1]]
    assert ours == theirs
