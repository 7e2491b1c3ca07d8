"""The model as pipeline stages: forward and backward in pieces, interleaved, and on ranks of experts times stages."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from ranks import run
from test_trainer import TINY

from dsv3_kernels.model import Config, DeepSeekV3, train
from dsv3_kernels.model.optimizer import AdamW
from dsv3_kernels.model.stage import Stage, stages
from dsv3_kernels.model.weights import initialise
from dsv3_kernels.parallel import ExpertParallel
from dsv3_kernels.pipeline import Pipeline

DEEP = TINY | {"num_hidden_layers": 4}
STEPS, MICROBATCHES, WIDTH = 3, 4, 12
OPTIONS = {"lr": 5e-3, "weight_decay": 0.1}


def batch(step: int, rows: int) -> torch.Tensor:
    starts = torch.randint(31, (rows, 1), generator=torch.Generator().manual_seed(step))
    return (starts + torch.arange(WIDTH)) ** 2 % 31


def made(which, count, recipe="float32", **options) -> list[Stage]:
    out = stages(Config(**DEEP), which, count, recipe=recipe, **options)
    for stage in out:
        initialise(stage, 0)
        stage.train()
    return out


def two_steps(recipe: str, pieces: bool, group=None) -> dict[str, torch.Tensor]:
    """Gradients of two microbatches through two stages; in pieces, a backward beside the other's forward."""
    first, last = made([0, 1], 2, recipe, **({} if group is None else {"group": group, "max_tokens": 64}))
    one, two = batch(0, 2), batch(1, 2)

    def enter(tokens):
        outputs = first(tokens)
        return outputs, [o.detach().requires_grad_() for o in outputs]

    hook = Stage.overlapped_forward_backward
    out1, in1 = enter(one)
    loss1 = last.loss(*last(*in1), one)
    if pieces:
        out2, _ = hook(first, [two], None, [], last, loss1, [], [])
        in2 = [o.detach().requires_grad_() for o in out2]
        _, loss2 = hook(last, in2, last.loss, [two], first, None, out1, [x.grad for x in in1])
        for _ in last.backward(loss2.tape, [loss2], [torch.ones_like(loss2)]):
            pass
        for _ in first.backward(out2[0].tape, out2, [x.grad for x in in2]):
            pass
    else:
        out2, in2 = enter(two)
        loss1.backward()
        loss2 = last.loss(*last(*in2), two)
        torch.autograd.backward(out1, [x.grad for x in in1])
        loss2.backward()
        torch.autograd.backward(out2, [x.grad for x in in2])
    grads = {f"{i} {name}": p.grad for i, s in enumerate((first, last)) for name, p in s.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    return grads


@pytest.mark.parametrize("recipe", ["float32", "bf16", "fp8"])
def test_pieces_are_the_whole(recipe):
    whole, cut = two_steps(recipe, False), two_steps(recipe, True)
    for name, grad in whole.items():
        assert torch.allclose(cut[name], grad, rtol=1e-5, atol=1e-6 * float(grad.abs().max())), name


def test_stages_are_the_model():
    """Names, losses and gradients of the model that is not cut."""
    config = Config(**DEEP)
    model = DeepSeekV3.sharded(config, None).allocate("cpu").train()
    initialise(model, 0)
    first, last = made([0, 1], 2)
    names = [{n for n, _ in stage.named_parameters()} for stage in (first, last)]
    assert names[0] | names[1] == {n for n, _ in model.named_parameters()}
    assert names[0] & names[1] == {"model.embed_tokens.weight"}
    tokens = batch(0, 3)
    total, _ = train.loss(model, tokens)
    total.backward()
    loss = last.loss(*last(*first(tokens)), tokens)
    loss.backward()
    assert math.isclose(loss.item(), total.item(), rel_tol=1e-6)
    wanted, got = train.gradients(model), train.gradients(first) | train.gradients(last)
    for name, grad in wanted.items():
        assert float((got[name] - grad).norm()) <= 1e-5 * float(grad.norm()) + 1e-9, name


def order(rank: int) -> tuple[list[str], float]:
    """Exchanges as they start, where a forward and a backward are overlapped, and how far from one after the other."""
    started: list[str] = []
    start = ExpertParallel._start

    def noted(self, send, send_counts, recv_counts, phase):
        started.append(phase)
        return start(self, send, send_counts, recv_counts, phase)

    ExpertParallel._start = noted
    group = dist.group.WORLD
    whole = two_steps("float32", False, group)
    first = len(started)
    cut = two_steps("float32", True, group)
    worst = max(float((cut[n] - g).abs().max() / g.abs().max().clamp(min=1e-9)) for n, g in whole.items())
    return started[first:], worst


def test_exchanges_alternate():
    """Where stage 0 (one MoE layer) goes forward and stage 1 (two, and the MTP layer's) backward."""
    (started, worst), (other, _) = run(order, 2)
    assert started == other and worst <= 1e-5
    forward = ["dispatch/counts", "dispatch/payload", "combine/payload"]
    backward = ["combine backward", "dispatch backward"]
    assert started[: 3 + 6 + 3] == forward * 4  # of the first microbatch, alone
    # The first stage forward, beside the MTP layer's and the second stage's two MoE layers backward
    assert started[12:21] == [*forward[:2], *backward, backward[0], forward[2], backward[1], *backward]


def one_process() -> tuple[list[float], dict]:
    model = DeepSeekV3.sharded(Config(**DEEP), None).allocate("cpu").train()
    initialise(model, 0)
    optimizer, losses = AdamW(model.parameters(), **OPTIONS), []
    for step in range(STEPS):
        optimizer.zero_grad()
        total, _ = train.loss(model, batch(step, 2 * MICROBATCHES))
        total.backward()
        optimizer.step()
        train.update_bias(model, 0.01)
        losses.append(total.item())
    return losses, {n: p.detach().clone() for n, p in model.state_dict().items()}


def on_four(rank: int, recipe: str) -> tuple[list[float], dict, int]:
    """Two stages by two ranks that share each stage's experts: DualPipe over the stages, own sequences on each."""
    stage, side = divmod(rank, 2)
    experts = [dist.new_group([0, 1]), dist.new_group([2, 3])][stage]
    pipeline = [dist.new_group([0, 2]), dist.new_group([1, 3])][side]
    parts = made([stage, 1 - stage], 2, recipe, group=experts, max_tokens=2 * WIDTH)
    overlapped, hook = [], Stage.overlapped_forward_backward.__func__

    def counted(cls, *arguments):
        overlapped.append(1)
        return hook(cls, *arguments)

    Stage.overlapped_forward_backward = classmethod(counted)
    pipe = Pipeline(parts, pipeline, "dualpipe")
    parameters = list({id(p): (n, p) for part in parts for n, p in part.named_parameters()}.values())
    last = next(part for part in parts if part.last)
    optimizer, losses = AdamW([p for _, p in parameters], **OPTIONS), []
    for step in range(STEPS):
        optimizer.zero_grad()
        mine = batch(step, 2 * MICROBATCHES)[side::2]
        lost, _ = pipe.step(mine, labels=mine, criterion=last.loss, num_microbatches=MICROBATCHES)
        for name, p in parameters:
            if ".experts." not in name or "shared" in name:
                dist.all_reduce(p.grad, group=experts)
            p.grad /= 2 * MICROBATCHES
        mean = lost.mean()
        dist.all_reduce(mean, group=experts)
        losses.append(mean.item() / 2)
        optimizer.step()
        train.update_bias(last.whole, 0.01, dist.group.WORLD)
    state = {n: p.detach() for part in parts for n, p in part.state_dict().items()}
    return losses, state, len(overlapped)


@pytest.mark.parametrize("recipe", ["float32", "fp8"])
def test_experts_and_stages_train_as_one_process(recipe):
    """In FP8, where microbatches are quantised on their own and weight gradients wait, as near as FP8 is."""
    losses, wanted = one_process()
    results = run(on_four, 4, recipe)
    assert losses[-1] < 0.9 * losses[0]
    for got, state, overlapped in results:
        assert overlapped == STEPS
        near = 1e-5 if recipe == "float32" else 5e-3
        assert all(math.isclose(a, b, rel_tol=near) for a, b in zip(got, losses, strict=True))
        for name, value in state.items() if recipe == "float32" else ():
            reference = wanted[name]
            if ".mlp.experts." not in name:
                assert float((value - reference).norm()) <= 2e-4 * float(reference.norm()) + 1e-7, name
    for name, reference in wanted.items() if recipe == "float32" else ():
        if ".mlp.experts." in name:
            whole = torch.cat([results[side][1][name] for side in (0, 1)])
            assert float((whole - reference).norm()) <= 2e-4 * float(reference.norm()), name


def test_bad_stages():
    for which, count, words in (
        ([0], 5, "count: got 5, wanted 1 to 4"),
        ([2], 2, r"which: got \[2\], wanted stages 0 to 1"),
        ([1], 2, r"which: got \[1\], wanted the first and the last stage on one rank"),
    ):
        with pytest.raises(ValueError, match=words):
            stages(Config(**DEEP), which, count)
    assert len(stages(Config(**DEEP), [1], 4)) == 1
    assert len(stages(Config(**DEEP | {"num_nextn_predict_layers": 0}), [1], 2)) == 1
    with pytest.raises(ValueError, match="recipe: got 'int8'"):
        stages(Config(**DEEP), [0, 1], 2, recipe="int8")
