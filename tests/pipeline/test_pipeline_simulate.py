"""The simulator: latency, uneven stages, overlap by stage, and the plot."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from itertools import pairwise

import pytest

import dsv3_kernels as dk
from dsv3_kernels.pipeline import Costs, Kind, ScheduleError

UNIT = {"forward": 1, "backward": 2, "weight": 1, "overlapped": 3}


def test_latency_of_one_microbatch():
    """One microbatch goes down and up the line: three hops each way."""
    s = dk.pipeline.schedule("1f1b", 4, 1).simulate(UNIT | {"p2p": 0.25})
    assert s.makespan == 4 * 3 + 6 * 0.25
    assert s.bubble == 3 * 3 + 6 * 0.25


def test_latency_by_link():
    """Only the link from rank 1 to rank 2 is slow."""
    cost = UNIT | {"p2p": lambda source, destination: 5.0 if (source, destination) == (1, 2) else 0.0}
    assert dk.pipeline.schedule("1f1b", 4, 1).simulate(cost).makespan == 4 * 3 + 5


def test_no_latency_within_a_device():
    """The turn of DualPipeV is on one device."""
    assert dk.pipeline.schedule("dualpipev", 1, 2).simulate(UNIT | {"p2p": 100.0}).makespan == 12


def test_uneven_stages():
    """One microbatch through an embedding (stage 0) and a head (stage 3): the sum of all stages."""
    costs = {"forward": [1.5, 1, 1, 4], "backward": [2.5, 2, 2, 8], "weight": [1, 1, 1, 3]}
    assert dk.pipeline.schedule("1f1b", 4, 1).simulate(costs).makespan == 7.5 + 14.5
    # Many microbatches: the head's rank is never idle but in warm-up and cool-down.
    s = dk.pipeline.schedule("1f1b", 4, 12).simulate(costs)
    assert s.makespan == 12 * 12 + 3.5 + 6.5
    assert s.idle[3] == 10


def test_overlapped_by_stage_and_default():
    s = dk.pipeline.schedule("dualpipe", 4, 8)
    by_stage = s.simulate({"forward": 1, "backward": 2, "overlapped": lambda f, b: 2.5})
    assert by_stage.makespan == s.simulate({"forward": 1, "backward": 2, "weight": 1, "overlapped": 2.5}).makespan
    assert s.simulate({"forward": 1, "backward": 2}).makespan == s.simulate(UNIT).makespan


def test_spans_keep_the_rules():
    """Against the definition: no rank computes two things at once, and nothing starts before its input has arrived."""
    schedule = dk.pipeline.schedule("dualpipe", 6, 14)
    s = schedule.simulate({"forward": 1.1, "backward": 2.3, "weight": 0.9, "overlapped": 2.7, "p2p": 0.3})
    end = {}
    for timeline in s.spans:
        for before, after in pairwise(timeline):
            assert before.end <= after.start
        for span in timeline:
            for kind, stage, microbatch in span.action.parts():
                end["F" if kind == Kind.FORWARD else "W" if kind == Kind.WEIGHT else "B", stage, microbatch] = span.end
    for timeline in s.spans:
        for span in timeline:
            for kind, stage, microbatch in span.action.parts():
                if kind == Kind.FORWARD and stage > 0:
                    assert span.start >= end["F", stage - 1, microbatch] + 0.3
                if kind in (Kind.BACKWARD, Kind.INPUT) and stage < 5:
                    assert span.start >= end["B", stage + 1, microbatch] + 0.3
                if kind == Kind.WEIGHT:
                    assert span.start >= end["B", stage, microbatch]
    assert s.makespan == max(end.values())
    work = [sum(x.end - x.start for x in t) for t in s.spans]
    assert s.bubble == pytest.approx(s.makespan - min(work))


def test_a_deadlock_is_an_error():
    s = dk.pipeline.schedule("1f1b", 2, 2)
    broken = replace(s, actions=(s.actions[0], tuple(a for a in s.actions[1] if a.kind != Kind.SEND_BACKWARD)))
    with pytest.raises(ScheduleError, match="cannot go on: rank 0 before 0B0"):
        broken.simulate(UNIT)


@pytest.mark.parametrize(
    ("costs", "error", "words"),
    [
        ({"forward": 1}, ValueError, "must give 'backward'"),
        ({}, ValueError, "must give 'forward' and 'backward'"),
        (UNIT | {"wait": 1}, ValueError, "unknown cost 'wait'"),
        (UNIT | {"forward": -1}, ValueError, "'forward'.*not negative, got -1"),
        (UNIT | {"p2p": math.nan}, ValueError, "'p2p'.*finite"),
        (UNIT | {"backward": [2, 2, 2]}, ValueError, "'backward'.*got 3 numbers, wanted one, or 4"),
        (UNIT | {"weight": 3}, ValueError, "'weight'] is a part of .*3.0 > 2.0"),
        (UNIT | {"overlapped": "3"}, TypeError, "'overlapped'.*must be a number, got str"),
        (UNIT | {"forward": ["a"] * 4}, TypeError, "'forward'.*must be a number, got str"),
    ],
)
def test_bad_costs(costs, error, words):
    with pytest.raises(error, match=words.replace("[", r"\[")):
        dk.pipeline.schedule("1f1b", 4, 4).simulate(costs)


def test_costs_object():
    s = dk.pipeline.schedule("zb1p", 4, 8)
    assert s.simulate(Costs(1, 2, 1)).makespan == s.simulate(UNIT).makespan
    assert str(s.simulate(UNIT)).startswith("simulated zb1p: 4 ranks, 8 microbatches, makespan 27, bubble 3")


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    simulation = dk.pipeline.schedule("dualpipev", 2, 6).simulate(UNIT)
    path = tmp_path / "schedule.png"
    figure = simulation.plot(path)
    (axes,) = figure.axes
    assert "simulated" in axes.get_title()
    assert [t.get_text() for t in axes.get_yticklabels()] == ["rank 0", "rank 1"]
    # One box per part of every action, and together they cover what the ranks compute.
    parts = sum(len(span.action.parts()) for timeline in simulation.spans for span in timeline)
    assert len(axes.collections) == parts
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", data[16:24])) > 100
