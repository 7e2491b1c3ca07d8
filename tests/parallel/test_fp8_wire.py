"""Rows that travel in FP8: what arrives, what it weighs; training has the bits of rows quantised on arrival."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run
from test_expert_parallel import routed

import dsv3_kernels as dk
from dsv3_kernels.commands.train import TOY
from dsv3_kernels.model import Config, DeepSeekV3, train
from dsv3_kernels.model.weights import initialise
from dsv3_kernels.parallel import ExpertParallel

WIDE = 200  # a whole block of 128 and a part


def numbers(x: torch.Tensor) -> torch.Tensor:
    return dk.dequantize(*dk.quantize_1x128(x, pow2_scale=True), dtype=x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("capacity", [None, 90])
def test_what_arrives(dtype, capacity, monkeypatch):
    """The numbers of the codes, in the rows of a dispatch without; the same gradients; about half the bytes."""
    ranks, experts_count, top_k = 3, 7, 3
    data = routed("dropped", ranks, experts_count, top_k)
    xs = [torch.randn(len(x), WIDE).to(dtype).requires_grad_() for x, _, _ in data]
    chosen, gates = [e for _, e, _ in data], [w.float().requires_grad_() for _, _, w in data]
    ep = ExpertParallel(virtual_ranks=ranks, num_experts=experts_count, hidden=WIDE, max_tokens=20)
    sent, start = [], ep._transport.start

    def weigh(send, send_counts, recv_counts, phase):
        if phase == "dispatch/payload":
            sent.append(sum(t.numel() for t in send))
        return start(send, send_counts, recv_counts, phase)

    monkeypatch.setattr(ep._transport, "start", weigh)
    results = []
    for fp8_wire in (False, True):
        rows, scale, _, offsets, handle = ep.dispatch(xs, chosen, gates, capacity=capacity, fp8_wire=fp8_wire)
        assert scale is None and all(r.dtype == dtype for r in rows)
        out = ep.combine(rows, handle)
        grads = torch.autograd.grad([r.float().sin().sum() for r in rows], xs, retain_graph=True)
        results.append((rows, offsets, out, grads))
    (plain, offsets, *_), (coded, other, _, grads) = results
    for a, b, here, there in zip(plain, coded, offsets, other, strict=True):
        assert torch.equal(here, there)
        assert torch.equal(numbers(a.detach()), b.detach())
        assert torch.equal(numbers(b.detach()), b.detach())  # quantised so again: the same numbers
    assert all(g.dtype == dtype and g.isfinite().all() for g in grads)
    payload = {torch.bfloat16: 2, torch.float32: 4}[dtype] * WIDE
    rest = top_k * 8
    assert sent[0] * (WIDE + 8 + rest) == sent[1] * (payload + rest)


def test_wrong_rows():
    ep = ExpertParallel(virtual_ranks=1, num_experts=2, hidden=WIDE, max_tokens=4)
    x = torch.zeros(2, WIDE).to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"dispatch: fp8_wire: got torch.float8_e4m3fn rows, wanted float16"):
        ep.dispatch([x], [torch.zeros(2, 1, dtype=torch.int32)], [torch.ones(2, 1)], fp8_wire=True)


def training(rank: int) -> bool:
    """Whether a step of a model has the same bits with FP8 and with bfloat16 on the wire."""
    model = DeepSeekV3.sharded(Config(**TOY), dist.group.WORLD, 64).allocate("cpu").train()
    initialise(model, 0)
    tokens = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(rank))
    send, wires, results = ExpertParallel.dispatch_send, [], []
    for kept in (True, False):

        def noted(self, *arguments, kept=kept, fp8_wire=False, **options):
            wires.append(fp8_wire)
            return send(self, *arguments, fp8_wire=fp8_wire and kept, **options)

        ExpertParallel.dispatch_send = noted
        model.zero_grad()
        total, _ = train.loss(model, tokens, recipe="fp8")
        total.backward()
        results.append([total.detach(), *(p.grad for p in model.parameters())])
    assert len(wires) == 4 and all(wires)
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_training_has_the_same_bits():
    assert run(training, 2) == [True, True]
