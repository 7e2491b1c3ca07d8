"""Two microbatches at once: the bits of one after the other, in less time."""

from __future__ import annotations

import json
import time

import pytest
import torch
import torch.distributed as dist
from ranks import run
from test_expert_parallel import HIDDEN, compute, expert_matrices, routed

import dsv3_kernels as dk
from dsv3_kernels.parallel import ExpertParallel, Trace, two_microbatch

EXPERTS, TOP_K, LAYERS = 7, 3, 3


def network(ep, ranks, matrices):
    """A program of some layers; a microbatch is (x, experts, weights), with lists of them over virtual ranks."""

    def each(function, *values):
        return [function(*v) for v in zip(*values, strict=True)] if isinstance(values[0], list) else function(*values)

    def experts_of(rank, rows, offsets):
        return compute(ep, rank, rows, offsets, matrices).tanh()

    def program(microbatch):
        x, experts, weights = microbatch
        for _ in range(LAYERS):
            hidden = each(lambda t: t.sin(), x)
            pending = ep.dispatch_send(hidden, experts, weights)
            yield "dispatch"
            rows, _, _, offsets, handle = ep.dispatch_recv(pending)
            several = isinstance(rows, list)
            y = each(experts_of, list(ranks), rows, offsets) if several else experts_of(ranks[0], rows, offsets)
            pending = ep.combine_send(y, handle)
            yield "combine"
            x = each(lambda a, b: a + b, x, ep.combine_recv(pending))
        return x

    return program


def alone(program, microbatch):
    generator = program(microbatch)
    while True:
        try:
            next(generator)
        except StopIteration as stop:
            return stop.value


def leaves(microbatch):
    x, experts, weights = microbatch
    x, weights = ([t.detach().clone().requires_grad_() for t in part] for part in (x, weights))
    return x, experts, weights


def gradients(results, microbatches):
    total = sum((r.cos() * r).sum() for result in results for r in result)
    return torch.autograd.grad(total, [t for x, _, w in microbatches for t in (*x, *w)])


def test_bits_of_one_after_the_other():
    ep = ExpertParallel(virtual_ranks=3, num_experts=EXPERTS, hidden=HIDDEN, max_tokens=20)
    program = network(ep, range(3), expert_matrices(EXPERTS))
    batches = [
        list(map(list, zip(*routed(k, 3, EXPERTS, TOP_K, seed=s), strict=True)))
        for k, s in (("random", 1), ("empty rank", 2))
    ]
    ours, theirs = [leaves(b) for b in batches], [leaves(b) for b in batches]
    trace = Trace()
    got, wanted = two_microbatch(program, *ours, trace=trace), [alone(program, b) for b in theirs]
    for a, b in zip(got, wanted, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    pairs = zip(gradients(got, ours), gradients(wanted, theirs), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def processes(rank, ranks):
    data = [
        [leaves([[t] for t in routed("random", ranks, EXPERTS, TOP_K, seed=s)[rank]]) for s in (1, 2)] for _ in range(2)
    ]
    single = [[(x[0], e[0], w[0]) for x, e, w in batches] for batches in data]
    ep = ExpertParallel(dist.group.WORLD, EXPERTS, HIDDEN, 20, timeout=30)
    program = network(ep, [rank], expert_matrices(EXPERTS))
    got = two_microbatch(program, *single[0])
    wanted = [alone(program, b) for b in single[1]]
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)
    ours, theirs = ([[r] for r in results] for results in (got, wanted))
    pairs = zip(gradients(ours, data[0]), gradients(theirs, data[1]), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    return True


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes(ranks):
    assert run(processes, ranks, ranks) == [True] * ranks


def test_trace(tmp_path):
    def program(name):
        yield f"{name} out"
        yield f"{name} back"
        return name

    trace = Trace()
    assert two_microbatch(program, "a", "b", trace=trace) == ("a", "b")
    computed = [(s.microbatch, s.name) for s in trace.spans if s.kind == "compute"]
    assert computed == [(0, "a out"), (1, "b out"), (0, "a back"), (1, "b back"), (0, "end"), (1, "end")]
    exchanged = [s for s in trace.spans if s.kind == "exchange"]
    assert [(s.microbatch, s.name) for s in exchanged] == [(0, "a out"), (1, "b out"), (0, "a back"), (1, "b back")]
    for span in exchanged:  # the other microbatch computes within it
        assert any(
            s.kind == "compute" and s.microbatch != span.microbatch and span.start <= s.start and s.end <= span.end
            for s in trace.spans
        )
    trace.save(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    assert len(spans) == len(trace.spans) and all(e["dur"] >= 0 and e["cat"] in ("compute", "exchange") for e in spans)
    assert {e["args"]["name"] for e in events if e["name"] == "thread_name"} == {
        f"microbatch {i}: {kind}" for i in (0, 1) for kind in ("compute", "exchange")
    }


def test_exchanges_are_hidden():
    """Rows that take 20 ms to arrive, between computations of 20 ms: two microbatches take hardly longer than one."""
    seconds, steps = 0.02, 4

    def program(_):
        for _ in range(steps):
            time.sleep(seconds)
            arrival = time.monotonic() + seconds
            yield "exchange"
            time.sleep(max(0.0, arrival - time.monotonic()))

    def taken():
        start = time.monotonic()
        two_microbatch(program, 0, 1)
        return time.monotonic() - start

    best = min(taken() for _ in range(5))  # a busy machine sleeps longer than it was told
    assert 2 * steps * seconds <= best < 3 * steps * seconds  # one after the other: 4


def test_uneven_and_failing_programs():
    closed = []

    def program(count):
        try:
            for i in range(abs(count)):
                yield f"exchange {i}"
            if count < 0:
                raise ValueError("lost")
            return count
        finally:
            closed.append(count)

    assert two_microbatch(program, 1, 5) == (1, 5)
    assert two_microbatch(program, 3, 0) == (3, 0)
    closed.clear()
    with pytest.raises(ValueError, match="lost"):
        two_microbatch(program, 5, -2)
    assert sorted(closed) == [-2, 5]


def test_bad_programs():
    def nameless(_):
        yield 1

    with pytest.raises(TypeError, match="two_microbatch: program: yielded int, wanted the exchange's name"):
        two_microbatch(nameless, 0, 1)
    with pytest.raises(TypeError, match="two_microbatch: program: returned int, wanted a generator"):
        two_microbatch(lambda x: x, 0, 1)


def test_public_name():
    assert dk.parallel.two_microbatch is two_microbatch
