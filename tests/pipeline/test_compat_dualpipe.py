"""Code written for DeepSeek's DualPipe runs on ours: its stages, its weight-gradient store, its step."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run
from torch import nn

from dsv3_kernels.compat.dualpipe import (
    DualPipe,
    DualPipeV,
    WeightGradStore,
    run_backward,
    set_p2p_tensor_dtype,
    set_p2p_tensor_shapes,
)

WIDTH, CHUNKS, ROWS = 5, 8, 3


class Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors

        def accumulate():
            update = grad.flatten(0, -2).T @ x.flatten(0, -2)
            weight.grad = update if weight.grad is None else weight.grad + update
            Block.deferred += WeightGradStore.enabled is False and ctx.later

        ctx.later = WeightGradStore.enabled
        if WeightGradStore.enabled:
            WeightGradStore.put(accumulate)
        else:
            accumulate()
        return grad @ weight, None


class Block(nn.Module):
    deferred = 0

    def __init__(self, index):
        super().__init__()
        generator = torch.Generator().manual_seed(index)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) / 2)

    def forward(self, x):
        return torch.tanh(Matmul.apply(x, self.weight))


class Overlapping(Block):
    overlapped = 0

    @classmethod
    def overlapped_forward_backward(
        cls, module0, inputs0, criterion0, labels0, module1, loss1, outputs1, output_grads1
    ):
        cls.overlapped += 1
        outputs0 = [module0(*inputs0)]
        loss0 = None if criterion0 is None else criterion0(*outputs0, *labels0)
        if loss1 is None:
            run_backward(outputs1, output_grads1)
        else:
            loss1.backward()
            loss1.detach_()
        return outputs0, loss0


def criterion(output, target):
    return torch.nn.functional.mse_loss(output, target).clone()


def trains(rank, kind, block):
    ranks = dist.get_world_size()
    num_stages = ranks if kind is DualPipe else 2 * ranks
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(2, CHUNKS * ROWS, 2, WIDTH, generator=generator, dtype=torch.float64)
    reference = nn.Sequential(*(Block(i) for i in range(num_stages)))
    outputs = [reference(part) for part in x.chunk(CHUNKS)]
    losses = torch.stack([criterion(o, part) for o, part in zip(outputs, y.chunk(CHUNKS), strict=True)])
    losses.sum().backward()
    losses, outputs = losses.detach(), torch.cat(outputs).detach()

    set_p2p_tensor_shapes([(ROWS, 2, WIDTH)])
    set_p2p_tensor_dtype(torch.float64)
    mine = [rank, num_stages - 1 - rank]
    model = kind(nn.Sequential(*(block(i) for i in mine)))
    inputs, labels = [], []
    if kind is DualPipeV:
        part = slice(None)
        if rank == 0:
            inputs, labels = [x], [y]
    else:
        # The first rank feeds the first half and gets the results of the second; the last rank the other way round.
        part = 1 if rank == 0 else 0
        if rank in (0, ranks - 1):
            inputs, labels = [x.chunk(2)[1 - part]], [y.chunk(2)[part]]
    Block.deferred = 0
    loss, result = model.step(*inputs, num_chunks=CHUNKS, criterion=criterion, labels=labels)
    assert result is None
    ends = bool(labels)
    pick = (lambda t: t) if kind is DualPipeV else (lambda t: t.chunk(2)[part])
    if ends:
        torch.testing.assert_close(loss, pick(losses), rtol=1e-12, atol=0)
    else:
        assert loss is None
    if kind is DualPipe:  # sum the two copies, as the user of DualPipe does
        for a, b in zip(model.module[0].parameters(), model.module[1].parameters(), strict=True):
            firsts, seconds = ([torch.empty_like(a.grad) for _ in range(ranks)] for _ in range(2))
            dist.all_gather(firsts, a.grad)
            dist.all_gather(seconds, b.grad)
            a.grad += seconds[ranks - 1 - rank]
            b.grad += firsts[ranks - 1 - rank]
    for index, module in zip(mine, model.module, strict=True):
        torch.testing.assert_close(module.weight.grad, reference[index].weight.grad, rtol=1e-12, atol=1e-14)
    deferred = Block.deferred

    with torch.no_grad():
        loss, result = model.step(*inputs, num_chunks=CHUNKS, criterion=criterion, labels=labels, return_outputs=True)
    if ends:
        torch.testing.assert_close(loss, pick(losses), rtol=1e-12, atol=0)
        torch.testing.assert_close(result, pick(outputs), rtol=1e-12, atol=1e-14)
    else:
        assert loss is None and result is None
    if rank == 0:
        with pytest.raises(ValueError, match="inputs: got none, wanted some on rank 0"):
            model.step(num_chunks=CHUNKS, criterion=criterion, labels=labels)
    return deferred, getattr(block, "overlapped", 0)


def trains_all(rank):
    return [trains(rank, kind, block) for kind in (DualPipe, DualPipeV) for block in (Block, Overlapping)]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_training_and_inference(ranks):
    for results in run(trains_all, ranks):
        plain, overlapping = results[0], results[1]
        assert plain[0] > 0 and overlapping[0] == plain[0]  # as many weight gradients came later
        assert plain[1] == 0 and overlapping[1] > 0


def test_store():
    done = []
    WeightGradStore.put(lambda: done.append(1))
    WeightGradStore.put(lambda: done.append(2))
    WeightGradStore.flush()
    WeightGradStore.put(lambda: done.append(3))
    WeightGradStore.flush()
    WeightGradStore.pop()
    assert done == [1, 2]
    WeightGradStore.pop()
    assert done == [1, 2, 3]
    with pytest.raises(RuntimeError, match="nothing was flushed"):
        WeightGradStore.pop()
    WeightGradStore.put(lambda: done.append(4))
    WeightGradStore.clear()
    WeightGradStore.flush()
    WeightGradStore.pop()
    assert done == [1, 2, 3]
