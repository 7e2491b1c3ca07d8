"""moe_update_bias, exactly."""

from __future__ import annotations

import pytest
import torch
from checks import compiles, opcheck, same_bits

import dsv3_kernels as dk

OP = "moe_update_bias"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("counted", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_experts", [1, 3, 256])
def test_against_the_definition(backend, device, dtype, counted, num_experts):
    bias = torch.randn(num_experts, dtype=dtype)
    counts = torch.randint(0, 5, (num_experts,), dtype=counted)
    total = int(counts.sum())
    wanted = bias.clone()
    for e, n in enumerate(counts.tolist()):
        step = (total > num_experts * n) - (total < num_experts * n)
        wanted[e] = bias[e] + torch.tensor(0.001, dtype=dtype) * step
    ours = bias.to(device)
    assert dk.moe_update_bias(ours, counts.to(device), 0.001) is None
    assert same_bits(ours.cpu(), wanted)


def test_the_mean_is_exact(backend, device):
    """Counts that float32 cannot tell apart, and a mean that is no integer."""
    bias = torch.zeros(3, device=device)
    counts = torch.tensor([2**24 + 1, 2**24, 2**24], dtype=torch.int32, device=device)
    dk.moe_update_bias(bias, counts, 1.0)
    assert bias.tolist() == [-1.0, 1.0, 1.0]
    dk.moe_update_bias(bias, torch.full((3,), 2**31 - 1, dtype=torch.int32, device=device), 1.0)
    assert bias.tolist() == [-1.0, 1.0, 1.0]


def test_balance_changes_nothing(backend, device):
    bias = torch.randn(8, device=device)
    before = bias.clone()
    for count in (0, 7):
        dk.moe_update_bias(bias, torch.full((8,), count, device=device), 0.5)
    assert same_bits(bias, before)


def test_evens_out_a_skewed_router(device):
    """Gate, count, update: the load of the busiest expert falls towards the mean."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(512, 8, generator=generator) + torch.linspace(-2, 2, 8)
    bias, busiest = torch.zeros(8), []
    for _ in range(80):
        _, experts = dk.moe_gate(logits, bias, num_groups=1, topk_groups=1, top_k=2, scaling=1.0)
        counts = dk.moe_permute(torch.zeros(512, 1), experts, 8)[3].counts
        busiest.append(int(counts.max()))
        dk.moe_update_bias(bias, counts, 0.02)
    assert busiest[0] > 3 * 128 and busiest[-1] < 1.2 * 128


def test_memory_around_it_stays(backend, device):
    store = torch.full((6, 2), torch.nan, device=device)
    bias = store[1:5, 0]
    bias.zero_()
    dk.moe_update_bias(bias, torch.tensor([0, 1, 2, 3], device=device), 1.0)
    assert bias.tolist() == [1.0, 1.0, -1.0, -1.0] and int(store.isnan().sum()) == 8


def test_empty(backend, device):
    dk.moe_update_bias(torch.zeros(0, device=device), torch.zeros(0, dtype=torch.int32, device=device), 1.0)


def test_op_contract(device):
    counts = torch.tensor([1, 5, 0], dtype=torch.int32, device=device)
    opcheck(torch.ops.dsv3_kernels.moe_update_bias.default, (torch.randn(3, device=device), counts, 0.5))


def test_compiles():
    def step(bias):
        bias = bias * 2
        dk.moe_update_bias(bias, torch.tensor([1, 5, 0]), 0.5)
        return bias

    compiles(step, torch.randn(3))


B, N = torch.zeros(4), torch.zeros(4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "words", "args"),
    [
        (TypeError, "bias: got list", ([], N, 1.0)),
        (TypeError, "bias: got dtype bfloat16, wanted float32 or float64", (B.bfloat16(), N, 1.0)),
        (TypeError, "counts: got dtype float32, wanted int32 or int64", (B, N.float(), 1.0)),
        (TypeError, "speed: got str, wanted a number", (B, N, "1")),
        (ValueError, r"bias: got shape \[1, 4\], wanted \[E\]", (B[None], N, 1.0)),
        (ValueError, r"counts: got shape \[3\], wanted \[4\]", (B, N[:3], 1.0)),
        (RuntimeError, "counts: got device meta, wanted cpu as bias", (B, N.to("meta"), 1.0)),
    ],
)
def test_rejects(error, words, args):
    with pytest.raises(error, match=f"^moe_update_bias: {words}"):
        dk.moe_update_bias(*args)
