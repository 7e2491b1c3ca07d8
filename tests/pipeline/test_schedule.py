"""Schedules: the published tables, validity over all sizes, and that broken schedules are found out."""

from __future__ import annotations

from dataclasses import replace

import pytest

import dsv3_kernels as dk
from dsv3_kernels.pipeline import Action, Kind, Schedule, ScheduleError

NAMES = ("1f1b", "zb1p", "dualpipe", "dualpipev")
UNIT = {"forward": 1, "backward": 2, "weight": 1, "overlapped": 3}


def allowed(name: str, ranks: int, microbatches: int) -> bool:
    if name == "dualpipe":
        return ranks % 2 == 0 and microbatches % 2 == 0 and microbatches >= 2 * ranks
    return name != "dualpipev" or microbatches >= 2 * ranks


def stages(name: str, ranks: int) -> int:
    return 2 * ranks if name == "dualpipev" else ranks


def published_bubble(name: str, pp: int, f: float, b: float, w: float, fb: float) -> float:
    """Table of the DualPipe README; pp counts stages."""
    if name == "1f1b":
        return (pp - 1) * (f + b)
    if name == "zb1p":
        return (pp - 1) * (f + b - 2 * w)
    return (pp / 2 - 1) * (fb + b - 3 * w)


@pytest.mark.parametrize(
    ("name", "ranks", "overlapped", "makespan", "bubble", "activations"),
    [
        ("1f1b", 8, 3, 81, 21, 8),
        ("zb1p", 8, 3, 67, 7, 8),
        ("dualpipe", 8, 3, 66, 6, 9),
        ("dualpipev", 4, 3, 126, 6, 9),
        ("dualpipe", 8, 2.5, 59, 4.5, 9),
    ],
)
def test_published_table(name, ranks, overlapped, makespan, bubble, activations):
    s = dk.pipeline.schedule(name, ranks, 20).simulate(UNIT | {"overlapped": overlapped, "p2p": 0.0})
    assert (s.makespan, s.bubble, s.peak_activations) == (makespan, bubble, activations)


def test_middle_and_outer_ranks_of_dualpipe():
    idle = dk.pipeline.schedule("dualpipe", 16, 40).simulate(UNIT | {"overlapped": 2.5}).idle
    assert idle[0] == idle[15] == 7.5
    assert max(idle) == idle[7] == 10.5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [2, 4, 6, 10, 16])
@pytest.mark.parametrize("extra", [0, 6])
def test_bubble_formula(name, ranks, extra):
    pp = stages(name, ranks)
    microbatches = 2 * pp + extra
    # 1F1B and ZB1P meet their formula whatever the durations, W being no longer than F and the input part. DualPipe
    # meets it where B = 2F = 2W, and stays below it where the input part is no shorter than F, and W no longer.
    for f, b, w, fb in ((1, 2, 1, 3), (1, 2, 1, 2.5), (1.5, 4, 1, 4.5), (1, 3, 0.5, 4), (1, 2.2, 1, 2.6)):
        s = dk.pipeline.schedule(name, ranks, microbatches)
        simulated = s.simulate({"forward": f, "backward": b, "weight": w, "overlapped": fb})
        formula = published_bubble(name, pp, f, b, w, fb)
        if name in ("1f1b", "zb1p") or b == 2 * f == 2 * w:
            assert simulated.bubble == pytest.approx(formula, abs=1e-9)
        else:
            assert simulated.bubble <= formula + 1e-9
    peaks = s.simulate(UNIT).peaks
    if name == "1f1b":
        assert peaks == tuple(range(pp, 0, -1))
    else:
        assert set(peaks) == {pp if name == "zb1p" else pp + 1}


def test_bubble_of_dualpipe_does_not_depend_on_the_microbatches():
    bubbles = {dk.pipeline.schedule("dualpipe", 6, m).simulate(UNIT).bubble for m in (12, 14, 24, 40)}
    assert bubbles == {4.0}


@pytest.mark.parametrize("name", NAMES)
def test_impossible_arguments_are_refused_and_no_others(name):
    for ranks in range(1, 17):
        for microbatches in range(1, 65):
            if allowed(name, ranks, microbatches):
                # Two of each are built here, more in the tests below.
                if microbatches in (1, 2 * ranks):
                    assert dk.pipeline.schedule(name, ranks, microbatches).num_microbatches == microbatches
                continue
            with pytest.raises(ValueError, match=r"num_ranks|num_microbatches"):
                dk.pipeline.schedule(name, ranks, microbatches)


def check_valid(name: str, ranks: int, microbatches: int) -> None:
    s = dk.pipeline.schedule(name, ranks, microbatches)
    report = s.validate()
    limit = stages(name, ranks) + name.startswith("dualpipe")
    assert max(report.peak_activations) <= limit
    assert max(report.peak_received) <= 4
    assert report.messages == 2 * microbatches * (stages(name, ranks) - 1 - (name == "dualpipev"))
    assert s.simulate(UNIT).peaks == report.peak_activations


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", range(2, 17))
def test_sizes_are_valid(name, ranks):
    for microbatches in sorted({1, 3, ranks - 1, 2 * ranks, 2 * ranks + 1, 2 * ranks + 2, 64}):
        if allowed(name, ranks, microbatches):
            check_valid(name, ranks, microbatches)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_sizes_are_valid(name):
    """Every thirteenth size, another set of them for each number of ranks."""
    for ranks in range(2, 17):
        for microbatches in range(1 + 3 * ranks % 13, 65, 13):
            if allowed(name, ranks, microbatches):
                check_valid(name, ranks, microbatches)


def test_one_rank():
    assert dk.pipeline.schedule("1f1b", 1, 3).simulate(UNIT).bubble == 0
    report = dk.pipeline.schedule("dualpipev", 1, 2).validate()
    assert report.messages == 0


@pytest.mark.parametrize("name", NAMES)
def test_more_buffers_never_hurt(name):
    s = dk.pipeline.schedule(name, 4, 10)
    assert s.validate() == s.validate(buffers=1) == s.validate(buffers=5)


def test_forward_only():
    s = dk.pipeline.schedule("dualpipe", 4, 8).forward_only()
    report = s.validate()
    assert report.messages == 8 * 3
    assert {a.kind for actions in s.actions for a in actions if not a.is_communication} == {Kind.FORWARD}


def edit(s: Schedule, rank: int, change) -> Schedule:
    actions = list(s.actions)
    row = list(actions[rank])
    change(row)
    actions[rank] = tuple(row)
    return replace(s, actions=tuple(actions))


def swap(row: list[Action], first: str, second: str) -> None:
    names = [str(a) for a in row]
    i, j = names.index(first), names.index(second)
    row[i], row[j] = row[j], row[i]


def drop(row: list[Action], name: str) -> None:
    del row[[str(a) for a in row].index(name)]


@pytest.mark.parametrize(
    ("name", "rank", "change", "words"),
    [
        ("1f1b", 0, lambda r: drop(r, "0F1"), "stage 0, microbatch 1: got B, wanted F B or F I W"),
        ("1f1b", 0, lambda r: r.append(Action(Kind.WEIGHT, 0, 0)), "stage 0, microbatch 0: got F B W"),
        ("1f1b", 0, lambda r: r.append(Action(Kind.FORWARD, 1, 0)), "rank 0: 1F0 is not its work"),
        ("1f1b", 3, lambda r: swap(r, "3F0", "3B0"), "stage 3, microbatch 0: got B F"),
        ("zb1p", 1, lambda r: swap(r, "1I0", "1W0"), "stage 1, microbatch 0: got F W I"),
        ("1f1b", 1, lambda r: drop(r, "1SF2->2"), "rank 1: F tensor of stage 1, microbatch 2 is never sent"),
        ("1f1b", 1, lambda r: drop(r, "1RF2<-0"), "rank 1: 1F2 starts before its input of stage 0 is there"),
        ("1f1b", 0, lambda r: swap(r, "0F1", "0SF1->1"), "rank 0: 0SF1->1 is sent before it is made"),
        ("1f1b", 1, lambda r: r.insert(0, r[0]), "rank 1: 1RF0<-0 is received twice"),
        ("1f1b", 0, lambda r: r.insert(2, r[1]), "rank 0: 0SF0->1 is sent before it is made, or twice"),
        (
            "1f1b",
            0,
            lambda r: r.__setitem__(1, r[1]._replace(peer=2)),
            "rank 0: 0SF0->2 goes to a rank that does not use",
        ),
        (
            "1f1b",
            1,
            lambda r: r.__setitem__(0, r[0]._replace(peer=3)),
            "rank 1: 1RF0<-3 comes from a rank that does not",
        ),
    ],
)
def test_broken_schedules_are_found(name, rank, change, words):
    with pytest.raises(ScheduleError, match=words.replace("|", r"\|")):
        edit(dk.pipeline.schedule(name, 4, 6), rank, change).validate()


def test_message_order():
    s = dk.pipeline.schedule("1f1b", 2, 4)

    # Rank 0 computes its first two forwards the other way round, and so sends them in the other order.
    def change(row):
        swap(row, "0F0", "0F1")
        swap(row, "0SF0->1", "0SF1->1")

    with pytest.raises(ScheduleError, match="rank 0 to rank 1, message 0: sent 0SF1->1, received 1RF0<-0"):
        edit(s, 0, change).validate()


def test_deadlock_depends_on_the_buffers():
    """Both ranks send, compute, and only then receive: a deadlock, unless the links hold a message."""
    f, i, w, b = Kind.FORWARD, Kind.INPUT, Kind.WEIGHT, Kind.BACKWARD
    send_f, recv_f, send_b, recv_b = Kind.SEND_FORWARD, Kind.RECV_FORWARD, Kind.SEND_BACKWARD, Kind.RECV_BACKWARD
    first = [Action(f, 0, 0), Action(send_f, 0, 0, peer=1), Action(f, 0, 1), Action(send_f, 0, 1, peer=1)]
    first += [Action(f, 0, 2), Action(send_f, 0, 2, peer=1)]
    last = []
    for m in range(3):
        first += [Action(recv_b, 0, m, peer=1), Action(b, 0, m)]
        last += [Action(recv_f, 1, m, peer=0), Action(f, 1, m), Action(i, 1, m), Action(send_b, 1, m, peer=0)]
        last += [Action(w, 1, m)]
    s = replace(dk.pipeline.schedule("1f1b", 2, 3), actions=(tuple(first), tuple(last)), activation_limit=3)
    with pytest.raises(
        ScheduleError, match=r"deadlock with 0 buffers .*: rank 0 in \[0SF1->1\]; rank 1 in \[1SB0->0\]"
    ):
        s.validate()
    assert s.validate(buffers=1).messages == 6
    assert s.simulate(UNIT).makespan > 0


def test_memory_limit():
    s = dk.pipeline.schedule("dualpipe", 4, 8)
    assert s.validate(max_activations=5).peak_activations == (5, 5, 5, 5)
    with pytest.raises(ScheduleError, match="rank 0 holds 5 live activations, more than 4"):
        s.validate(max_activations=4)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("gpipe", 4, 8), ValueError, "name must be one of 1f1b, zb1p, dualpipe, dualpipev, got 'gpipe'"),
        (("1f1b", 0, 8), ValueError, "num_ranks must be at least 1, got 0"),
        (("1f1b", 2, -1), ValueError, "num_microbatches must be at least 1, got -1"),
        (("1f1b", 2.0, 8), TypeError, "num_ranks must be an int, got float"),
        (("1f1b", 2, True), TypeError, "num_microbatches must be an int, got bool"),
        (("dualpipe", 3, 8), ValueError, "even num_ranks .*, got 3"),
        (("dualpipe", 4, 9), ValueError, "even num_microbatches .*, got 9"),
        (("dualpipe", 4, 6), ValueError, r"num_microbatches >= 2 \* num_ranks = 8, got 6"),
        (("dualpipev", 4, 7), ValueError, r"num_microbatches >= 2 \* num_ranks = 8, got 7"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        dk.pipeline.schedule(*arguments)
