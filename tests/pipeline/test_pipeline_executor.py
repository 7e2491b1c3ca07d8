"""The executor on gloo: the same losses and gradients as one process, and what it holds meanwhile."""

from __future__ import annotations

import os
import signal
import time
import weakref

import pytest
import torch
import torch.distributed as dist
from ranks import run
from torch import nn

import dsv3_kernels as dk
from dsv3_kernels.pipeline import Pipeline, PipelineError, WeightGrad, deferred_linear
from dsv3_kernels.pipeline.executor import _split

NAMES = ("1f1b", "zb1p", "dualpipe", "dualpipev")
WIDTH = 6


class Stage(nn.Module):
    """A residual block: one linear layer defers its weight gradient, the other does not; ``idle`` is never used."""

    overlapped = 0

    def __init__(self, index: int, dtype: torch.dtype = torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(index)
        make = lambda *shape: nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) / 3)  # noqa: E731
        self.up, self.bias, self.down, self.idle = (
            make(2 * WIDTH, WIDTH),
            make(2 * WIDTH),
            make(WIDTH, 2 * WIDTH),
            make(2),
        )

    def forward(self, x):
        h = torch.nn.functional.gelu(deferred_linear(x, self.up, self.bias))
        return x + torch.nn.functional.linear(h, self.down)


class OverlapStage(Stage):
    @classmethod
    def overlapped_forward_backward(
        cls, module0, inputs0, criterion0, labels0, module1, loss1, outputs1, output_grads1
    ):
        assert isinstance(module0, cls) and isinstance(module1, cls)
        Stage.overlapped += 1
        if loss1 is not None:
            loss1.backward()
        else:
            torch.autograd.backward(outputs1, output_grads1)
        outputs = (module0(*inputs0),)
        return outputs, None if criterion0 is None else criterion0(*outputs, *labels0)


def criterion(output, target):
    return ((output - target) ** 2).mean() * 3


def batch(size: int, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(99)
    x, y = torch.randn(2, size, 3, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return x, y


def stages_of(name, rank, ranks):
    if name == "dualpipe":
        return [rank, ranks - 1 - rank]
    return [rank, 2 * ranks - 1 - rank] if name == "dualpipev" else [rank]


def sequential(num_stages, x, y, num_microbatches, stage=Stage, dtype=torch.float64):
    stages = [stage(i, dtype) for i in range(num_stages)]
    losses, outputs = [], []
    for xs, ys in zip(x.chunk(num_microbatches), y.chunk(num_microbatches), strict=True):
        for module in stages:
            xs = module(xs)
        losses.append(criterion(xs, ys))
        losses[-1].backward()
        outputs.append(xs.detach())
    return stages, torch.stack(losses).detach(), torch.cat(outputs)


def close(got, wanted, tolerance):
    assert got is not None and got.dtype == wanted.dtype and got.shape == wanted.shape
    error = ((got - wanted).abs().max() / wanted.abs().max()).item()
    assert error <= tolerance, error


def equals_sequential(rank, name, microbatches, stage, dtype, tolerance):
    ranks = dist.get_world_size()
    x, y = batch(2 * microbatches, dtype)
    num_stages = 2 * ranks if name == "dualpipev" else ranks
    reference, losses_wanted, outputs_wanted = sequential(num_stages, x, y, microbatches, dtype=dtype)
    mine = stages_of(name, rank, ranks)
    modules = [stage(i, dtype) for i in mine]
    pipeline = Pipeline(modules if len(modules) > 1 else modules[0], None, name)
    schedule = pipeline.schedule(microbatches)
    ends = [m for m in range(microbatches) if schedule.rank_of(num_stages - 1, m) == rank]
    starts = [m for m in range(microbatches) if schedule.rank_of(0, m) == rank]
    for step in (1, 2):  # the second step accumulates
        losses, outputs = pipeline.step(
            x if starts else None,
            labels=y if ends else None,
            criterion=criterion if ends else None,
            num_microbatches=microbatches,
            return_outputs=step == 2,
        )
        close(losses, losses_wanted, tolerance)
        for index, module in zip(mine, modules, strict=True):
            for (key, p), wanted in zip(module.named_parameters(), reference[index].parameters(), strict=True):
                if key == "idle":
                    assert p.grad is None
                else:
                    close(p.grad, wanted.grad * step, tolerance)
    parts = outputs_wanted.chunk(microbatches)
    if ends:
        close(outputs, torch.cat([parts[m] for m in ends]), tolerance)
    else:
        assert outputs is None
    with torch.no_grad():
        losses, outputs = pipeline.step(x, labels=y, criterion=criterion, num_microbatches=microbatches)
    close(losses, losses_wanted, tolerance)
    assert outputs is None
    with torch.no_grad():
        losses, outputs = pipeline.step(x, num_microbatches=microbatches, return_outputs=True)
    assert losses is None and (outputs is None) == (not ends)
    return [p.grad for m in modules for p in m.parameters()]


def many(rank, cases):
    return [equals_sequential(rank, *case) for case in cases]


def cases(ranks):
    for name in NAMES:
        least = 2 * ranks if name.startswith("dualpipe") else 1
        for microbatches in (least, least + 2) if ranks == 2 else (least + 2,):
            yield name, microbatches, Stage, torch.float64, 1e-12


@pytest.mark.parametrize("ranks", [1, 2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_equals_one_process(ranks):
    todo = [c for c in cases(ranks) if ranks > 1 or c[0] != "dualpipe"]
    todo += [("dualpipe" if ranks > 1 else "dualpipev", 2 * ranks, OverlapStage, torch.float64, 1e-12)]
    todo += [("zb1p", 5, Stage, torch.float32, 2e-6)]
    results = run(many, ranks, todo)
    # The two copies of a stage end with the same bits.
    for case, grads in zip(todo, zip(*results, strict=True), strict=True):
        if case[0] == "dualpipe":
            half = len(grads[0]) // 2
            for r in range(ranks):
                mirror = grads[ranks - 1 - r]
                assert all(
                    (a is None and b is None) or torch.equal(a, b)
                    for a, b in zip(grads[r][:half], mirror[half:], strict=True)
                )


def holds(rank, name, microbatches):
    """Peak number of microbatches with saved tensors alive, counted by autograd's hooks."""
    ranks = dist.get_world_size()
    modules = [Stage(i) for i in stages_of(name, rank, ranks)]
    parameters = {p.data_ptr() for m in modules for p in m.parameters()}
    alive: dict[int, int] = {}
    forwards, peak = 0, 0

    def count(*_):
        nonlocal forwards
        forwards += 1

    for module in modules:
        module.register_forward_pre_hook(count)

    def gone(forward):
        alive[forward] -= 1
        if not alive[forward]:
            del alive[forward]

    def pack(tensor):
        nonlocal peak
        if tensor.data_ptr() in parameters:
            return tensor
        memory = tensor.detach().numpy().copy()
        alive[forwards] = alive.get(forwards, 0) + 1
        weakref.finalize(memory, gone, forwards)
        peak = max(peak, len(alive))
        return torch.from_numpy(memory)

    x, y = batch(microbatches)
    pipeline = Pipeline(modules, None, name)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        pipeline.step(x, labels=y, criterion=criterion, num_microbatches=microbatches)
    assert not alive and forwards == microbatches * len(modules) // (2 if name == "dualpipe" else 1)
    return peak


def hold_many(rank, cases):
    return [holds(rank, *case) for case in cases]


def test_live_activations_are_those_of_the_simulator():
    todo = [(name, 10) for name in NAMES]
    for (name, microbatches), peaks in zip(todo, zip(*run(hold_many, 4, todo), strict=True), strict=True):
        wanted = dk.pipeline.schedule(name, 4, microbatches).simulate({"forward": 1, "backward": 2}).peaks
        assert peaks == wanted, name


def counts_overlaps(rank):
    modules = [OverlapStage(i) for i in stages_of("dualpipe", rank, 2)]
    x, y = batch(8)
    Pipeline(modules, None).step(x, labels=y, criterion=criterion, num_microbatches=8)
    return Stage.overlapped


def test_the_overlap_hook_is_called_as_the_schedule_says():
    schedule = dk.pipeline.schedule("dualpipe", 2, 8)
    assert run(counts_overlaps, 2) == [sum(a.kind == "FB" for a in actions) for actions in schedule.actions]


class Many(nn.Module):
    """Several tensors between stages: integers, booleans, bytes, empty, without gradient."""

    def __init__(self, index, num_stages):
        super().__init__()
        self.index, self.last = index, num_stages - 1
        self.weight = nn.Parameter(torch.tensor([0.5 + index], dtype=torch.float64))
        self.shift = nn.Parameter(torch.tensor([0.25], dtype=torch.float64))

    def forward(self, x, positions, mask, codes=None, unused=None, empty=None):
        if self.index == 0:
            codes, unused, empty = (x.float() / 4).to(torch.float8_e4m3fn), x * self.shift, x[:, :0]
        assert positions.dtype == torch.int64 and mask.dtype == torch.bool and codes.dtype == torch.float8_e4m3fn
        assert empty.shape[1] == 0 and not codes.requires_grad
        x = torch.where(mask, x * self.weight, x) + positions + codes.to(x.dtype)
        return x if self.index == self.last else (x, positions + 1, ~mask, codes, unused, empty)


def many_tensors(rank, name):
    ranks = dist.get_world_size()
    num_stages = 2 * ranks if name == "dualpipev" else ranks
    x, y = batch(12)
    positions = torch.arange(x.numel()).view_as(x) % 5
    whole = (x, positions, positions % 2 == 0)
    reference = [Many(i, num_stages) for i in range(num_stages)]
    losses = []
    for part, target in zip(_split(whole, 4, "inputs"), y.chunk(4), strict=True):
        for module in reference:
            part = module(*part) if isinstance(part, tuple) else module(part)
        losses.append(criterion(part, target))
        losses[-1].backward()
    modules = [Many(i, num_stages) for i in stages_of(name, rank, ranks)]
    got, _ = Pipeline(modules, None, name, timeout=20).step(whole, labels=[y], criterion=criterion, num_microbatches=4)
    close(got, torch.stack(losses).detach(), 1e-12)
    for module in modules:
        close(module.weight.grad, reference[module.index].weight.grad, 1e-12)
        # Its tensor goes down the line, where nobody uses it: a gradient of zero comes back.
        assert module.shift.grad is None or not module.shift.grad.any()


def many_tensors_all(rank):
    for name in NAMES:
        many_tensors(rank, name)


def test_several_tensors_between_stages():
    run(many_tensors_all, 2)


def refuses(rank):
    """Argument checks; each is made before the first message, so that one rank may fail alone."""
    stage = Stage(rank)
    x, y = batch(6)
    bad = [
        (lambda: Pipeline([stage, stage, stage], None), ValueError, "modules: got 3, wanted 2"),
        (lambda: Pipeline([stage], None, "dualpipev"), ValueError, "modules: got 1, wanted 2"),
        (lambda: Pipeline(stage, None, "gpipe"), ValueError, "name must be one of"),
        (lambda: Pipeline(stage, None, dk.pipeline.schedule("1f1b", 3, 4)), ValueError, "for 3 ranks, wanted 2"),
        (lambda: Pipeline(stage, None, "1f1b", rank_mapping=[0, 0]), ValueError, "rank_mapping"),
    ]
    one = Pipeline(stage, None, "1f1b")
    fixed = Pipeline(stage, None, dk.pipeline.schedule("1f1b", 2, 4))
    step = {"labels": y, "criterion": criterion}
    bad += [
        (lambda: one.step(x, **step, num_microbatches=0), ValueError, "num_microbatches must be at least 1"),
        (
            lambda: Pipeline([stage, Stage(1 - rank)], None).step(x, **step, num_microbatches=5),
            ValueError,
            "even num_micro",
        ),
        (lambda: fixed.step(x, **step, num_microbatches=3), ValueError, "got 3, but the schedule is for 4"),
    ]
    if rank == 0:
        bad += [
            (
                lambda: one.step(x, num_microbatches=4),
                ValueError,
                "inputs: got a batch of 6, wanted a multiple of .* 4",
            ),
            (lambda: one.step(None, num_microbatches=3), ValueError, "inputs: got None, wanted a batch on rank 0"),
            (lambda: one.step([x, 3], num_microbatches=3), TypeError, "inputs: got int"),
            (lambda: one.step(torch.tensor(1.0), num_microbatches=3), ValueError, "inputs: got a batch of none"),
        ]
    else:
        bad += [
            (
                lambda: one.step(labels=y[:5], criterion=criterion, num_microbatches=3),
                ValueError,
                "labels: got a batch of 5",
            ),
            (lambda: one.step(labels=y, num_microbatches=3), ValueError, "criterion: got None, wanted one on rank 1"),
        ]
    for call, error, words in bad:
        with pytest.raises(error, match=words):
            call()
    # And the pipeline still works.
    losses, _ = fixed.step(x[:4], labels=y[:4], criterion=criterion, num_microbatches=4)
    assert losses.shape == (4,) and losses.isfinite().all()


def test_bad_arguments_in_words():
    run(refuses, 2)


class Restless(nn.Module):
    """Returns another shape for the third microbatch."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        self.calls += 1
        return x[:, : 2 if self.calls == 3 else 3] * self.weight


def changing_shape(rank):
    x, y = batch(6, torch.float32)
    pipeline = Pipeline(Restless(), None, "1f1b", timeout=2)
    words = "stage 0 returned float32 .* for microbatch 2, but float32" if rank == 0 else "rank 0 is gone or late"
    with pytest.raises(ValueError if rank == 0 else PipelineError, match=words):
        pipeline.step(x, labels=y, criterion=criterion, num_microbatches=6)


def test_a_shape_that_changes_is_an_error():
    run(changing_shape, 2)


def killed(rank, name, victim, timeout):
    ranks = dist.get_world_size()
    modules = [Stage(i) for i in stages_of(name, rank, ranks)]
    x, y = batch(8)
    pipeline = Pipeline(modules, None, name, timeout=timeout)
    if rank == victim:
        calls = 0

        def die(*_):
            nonlocal calls
            calls += 1
            if calls == 4:
                os.kill(os.getpid(), signal.SIGKILL)

        for module in modules:
            module.register_forward_pre_hook(die)
    start = time.monotonic()
    with pytest.raises(PipelineError, match=rf"rank {rank}[, ].*rank \d+"):
        pipeline.step(x, labels=y, criterion=criterion, num_microbatches=8)
    return time.monotonic() - start


@pytest.mark.parametrize(("name", "victim"), [("1f1b", 2), ("dualpipe", 0)])
def test_a_killed_rank_is_an_error_on_all_others(name, victim):
    """Neighbours see the connection close, the others wait for the timeout of 1 s; the group's is a minute."""
    seconds = run(killed, 3 + (name == "dualpipe"), name, victim, 1.0, lost=(victim,))
    assert all(s < 10 for r, s in enumerate(seconds) if r != victim)


def test_weight_grad_outside_a_pipeline():
    """Without a pipeline the hook is transparent: gradients are those of torch's linear."""
    generator = torch.Generator().manual_seed(0)
    x, w, b = (
        torch.randn(*s, generator=generator, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (5, 4), (5,))
    )
    got = torch.autograd.grad(deferred_linear(x, w, b).square().sum(), (x, w, b))
    wanted = torch.autograd.grad(torch.nn.functional.linear(x, w, b).square().sum(), (x, w, b))
    for a, e in zip(got, wanted, strict=True):
        close(a, e, 1e-14)
    assert torch.autograd.gradcheck(deferred_linear, (x, w, b))
    frozen = w.detach()
    assert torch.autograd.grad(deferred_linear(x, frozen).sum(), x)[0].shape == x.shape


def test_weight_grad_defers():
    hook = WeightGrad()
    w = nn.Parameter(torch.ones(2, 2))
    done = []
    with hook.deferring():
        assert hook(w, lambda: torch.full((2, 2), 3.0)) is None
        assert hook(torch.ones(1), lambda: done.append("frozen")) is None
        hook.put(lambda: done.append("put"))
    assert w.grad is None and not done
    hook.run()
    hook.run()
    assert done == ["put"] and torch.equal(w.grad, torch.full((2, 2), 3.0))
    hook.put(lambda: done.append("now"))
    assert done == ["put", "now"]
    assert torch.equal(hook(w, lambda: torch.zeros(1)), torch.zeros(1))
