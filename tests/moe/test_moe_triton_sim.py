"""The Triton kernels of the family under extreme schedules: the bits of eager, and every block reached."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from checks import same_bits
from simulated import SCHEDULES, coverage, needs_simulator, schedule
from torch import Tensor

import dsv3_kernels as dk

pytestmark = needs_simulator
V3 = {"num_groups": 8, "topk_groups": 4, "top_k": 8, "scaling": 2.5}
ODD = {"num_groups": 3, "topk_groups": 2, "top_k": 5, "scaling": 1.5, "score": "softmax"}
OPEN = {"num_groups": 1, "topk_groups": 1, "top_k": 3, "scaling": 1.0, "normalize": False}
Call = Callable[[], Any]


def gate(experts: int, options: dict[str, Any], biased: bool) -> Call:
    """With ties, between experts and between groups, and a NaN."""
    logits = (2 * torch.randn(9, experts)).round(decimals=1)
    logits[2] = 0
    logits[4, 3] = torch.nan
    bias, grad = torch.randn(experts).round(decimals=1) if biased else None, torch.randn(9, options["top_k"])

    def run() -> Any:
        ours = logits.clone().requires_grad_()
        weights, chosen = dk.moe_gate(ours, bias, **options)
        weights.backward(grad)
        return weights.detach().nan_to_num(7.0), chosen, ours.grad.nan_to_num(7.0)

    return run


def routing(tokens: int, choices: int, experts: int) -> Tensor:
    """A fifth of the choices dropped."""
    chosen = torch.rand(tokens, experts).argsort(1)[:, :choices]
    return chosen.masked_fill(torch.rand(tokens, choices) < 0.2, -1)


def permute(alignment: int, scaled: bool) -> Call:
    x, experts = torch.randn(150, 140), routing(150, 3, 5)
    scale = torch.randn(150, 2) if scaled else None

    def run() -> Any:
        rows, row_scale, offsets, handle = dk.moe_permute(x, experts, 5, scale=scale, alignment=alignment)
        used = int(offsets[-1])
        return rows[:used], row_scale[:used] if scaled else offsets, offsets, *handle

    return run


def unpermute(weighted: bool) -> Call:
    with dk.backend("eager"):
        handle = dk.moe_permute(torch.zeros(30, 1), routing(30, 3, 5), 5, alignment=4)[3]
    rows, weights, grad = torch.randn(handle.source.shape[0], 1100), torch.rand(30, 3), torch.randn(30, 1100)

    def run() -> Any:
        ours = rows.clone().requires_grad_()
        out = dk.moe_unpermute(ours, handle, weights if weighted else None)
        out.backward(grad)
        return out.detach(), ours.grad

    return run


def update(dtype: torch.dtype) -> Call:
    bias, counts = torch.randn(40, dtype=dtype), torch.randint(0, 3, (40,))

    def run() -> Any:
        ours = bias.clone()
        dk.moe_update_bias(ours, counts, 0.001)
        return ours

    return run


def calls() -> dict[tuple[str, ...], list[Call]]:
    """By the kernels that they launch."""
    torch.manual_seed(0)
    return {
        ("triton_moe_gate", "triton_moe_gate_backward"): [
            gate(256, V3, True),
            gate(21, ODD, False),
            gate(7, OPEN, True),
        ],
        ("triton_moe_permute_count", "triton_moe_permute_scan", "triton_moe_permute_copy"): [
            permute(4, True),
            permute(1, False),
            permute(1000, False),  # more padding than choices
        ],
        ("triton_moe_unpermute", "triton_moe_unpermute_backward"): [unpermute(True), unpermute(False)],
        ("triton_moe_update_bias",): [update(torch.float32), update(torch.float64)],
    }


@pytest.mark.parametrize(("experts", "options"), [(1030, {**OPEN, "num_groups": 5}), (4096, V3), (1024, ODD | OPEN)])
def test_a_gate_of_many_experts_has_the_bits_of_eager(experts, options):
    call = gate(experts, options, biased=True)
    before = dk.launch_counts()
    with dk.backend("sim:triton"):
        got = call()
    launched = dk.launch_counts() - before
    assert launched == {"triton_moe_gate": 1, "triton_moe_gate_backward": 1}
    assert same_bits(got, call())


def test_more_experts_are_refused():
    with dk.backend("sim:triton"):
        with pytest.raises(RuntimeError, match="takes up to 4096 experts of a sigmoid, got 4104"):
            dk.moe_gate(torch.randn(1, 4104), None, **V3)
        with pytest.raises(RuntimeError, match="takes up to 1024 experts of a softmax, got 1032"):
            dk.moe_gate(torch.randn(1, 1032), None, **V3, score="softmax")


@pytest.mark.parametrize("kernels", calls(), ids=lambda k: k[0])
def test_the_bits_of_eager_under_extreme_schedules(kernels):
    with ExitStack() as stack:
        seen = [stack.enter_context(coverage(name)) for name in kernels]
        for call in calls()[kernels]:
            wanted = call()
            for options in SCHEDULES.values():
                before = dk.launch_counts()
                with dk.backend("sim:triton"), schedule(**options):
                    got = call()
                assert [dk.launch_counts()[name] - before[name] for name in kernels] == [1] * len(kernels)
                assert same_bits(got, wanted)
    for one in seen:
        assert one.unreached(kinds=("code", "predicated")) == []


def test_the_gradient_of_weights_has_one_order():
    """Its sum is not eager's: the bits of the plain schedule, whose error the op's own test bounds."""
    handle = dk.moe_permute(torch.zeros(30, 1), routing(30, 3, 5), 5)[3]
    rows, grad, weights = torch.randn(90, 1100), torch.randn(30, 1100), torch.rand(30, 3)
    with dk.backend("sim:triton"):
        args = grad, rows, handle.row_of, handle.source, weights
        wanted = torch.ops.dsv3_kernels.moe_unpermute_backward(*args)
        for options in SCHEDULES.values():
            with schedule(**options):
                assert same_bits(torch.ops.dsv3_kernels.moe_unpermute_backward(*args), wanted)


def test_balance_has_one_order():
    """Its sums are not eager's either. Counts are added up by atomics, in the order of the schedule."""
    scores, experts, grad = torch.rand(300, 40), routing(300, 3, 40), torch.randn(())
    ids = torch.randint(-1, 4, (300,))
    names = [f"triton_moe_balance_loss_{part}" for part in ("count", "terms", "sum", "backward")]

    def run() -> Any:
        ours = scores.clone().requires_grad_()
        loss = dk.moe_balance_loss(ours, experts, seq_ids=ids, alpha=0.1)
        loss.backward(grad)
        return loss.detach(), ours.grad

    with ExitStack() as stack:
        seen = [stack.enter_context(coverage(name)) for name in names]
        stack.enter_context(dk.backend("sim:triton"))
        wanted, before = run(), dk.launch_counts()
        for options in SCHEDULES.values():
            with schedule(**options):
                assert same_bits(run(), wanted)
        assert [dk.launch_counts()[name] - before[name] for name in names] == [6, 3, 6, 3]
    for one in seen:
        assert one.unreached(kinds=("code", "predicated")) == []
