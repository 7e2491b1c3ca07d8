"""Triton's rope, cache and merge kernels under extreme schedules: the bits of eager, and every block reached."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from checks import same_bits
from simulated import SCHEDULES, coverage, needs_simulator, schedule

import dsv3_kernels as dk
from dsv3_kernels import _simulator

pytestmark = needs_simulator
BF16 = torch.bfloat16
Call = Callable[[], Any]


def rotated(interleaved: bool) -> Call:
    x, positions = torch.randn(11, 3, 70)[..., :48].to(BF16), torch.randint(0, 9, (11,))
    angles = torch.randn(9, 48)
    grad = torch.randn(11, 3, 48).to(BF16)

    def run() -> Any:
        ours = x.clone().requires_grad_()
        out = dk.rope(ours, positions, angles, interleaved=interleaved)
        out.backward(grad)
        return out.detach(), ours.grad

    return run


def appended(fp8: bool) -> Call:
    """-1 among the slots; the rest of the cache stays."""
    slots = torch.tensor([37, -1, 0, 5])
    width = 512 if fp8 else 40
    latent, k_rope = torch.randn(4, width).to(BF16), torch.randn(4, 64).to(BF16)
    cache = torch.full((3, 16, 656), 0x55, dtype=torch.uint8) if fp8 else torch.full((3, 16, width + 64), -7.0).to(BF16)

    def run() -> Any:
        ours = cache.clone()
        dk.mla_cache_append(ours, slots, latent, k_rope, pow2_scale=True)
        return ours

    return run


def gathered(fp8: bool) -> Call:
    """An empty request, rows that no request owns, pages in any order."""
    table = torch.tensor([[2, 0], [1, 1], [1, 4]], dtype=torch.int32)
    bounds = torch.tensor([0, 19, 19, 22], dtype=torch.int32)
    width = 512 if fp8 else 40
    cache = torch.zeros(5, 16, 656, dtype=torch.uint8) if fp8 else torch.randn(5, 16, width + 64).to(BF16)
    if fp8:
        dk.mla_cache_append(cache, torch.arange(80), torch.randn(80, 512), torch.randn(80, 64))
    return lambda: dk.mla_cache_gather(cache, table, bounds, 30, latent=width)


def calls() -> dict[str, list[Call]]:
    """By the kernel that they launch."""
    torch.manual_seed(0)
    return {
        "triton_rope": [rotated(True), rotated(False)],
        "triton_mla_cache_append": [appended(False)],
        "triton_mla_cache_append_fp8": [appended(True)],
        "triton_mla_cache_gather": [gathered(False)],
        "triton_mla_cache_gather_fp8": [gathered(True)],
    }


@pytest.mark.parametrize("kernel", calls())
def test_the_bits_of_eager_under_extreme_schedules(kernel):
    with coverage(kernel) as seen:
        for call in calls()[kernel]:
            wanted = call()
            for options in SCHEDULES.values():
                before = dk.launch_counts()[kernel]
                with dk.backend("sim:triton"), schedule(**options):
                    got = call()
                assert dk.launch_counts()[kernel] > before
                assert same_bits(got, wanted)
    assert seen.unreached(kinds=("code", "predicated")) == []


def test_merging_under_extreme_schedules():
    """Its exponential is not eager's: the bits of the plain schedule, whose error the op's own test bounds."""
    parts = torch.randn(2, 7, 1100).to(BF16), torch.randn(2, 7)
    parts[1][0, 2] = parts[1][:, 3] = -torch.inf
    args = parts[0][0], parts[1][0], parts[0][1], parts[1][1]
    with ExitStack() as stack:
        seen = stack.enter_context(coverage("triton_merge_attention"))
        stack.enter_context(dk.backend("sim:triton"))
        wanted = dk.merge_attention(*args)
        for options in SCHEDULES.values():
            with schedule(**options):
                assert same_bits(dk.merge_attention(*args), wanted)
    assert seen.unreached(kinds=("code", "predicated")) == []


def test_what_is_out_of_range_touches_nothing():
    """On a GPU nobody looks at the values: rows of unknown positions are NaN; other slots and pages are left out."""
    from dsv3_kernels.mla import _triton_mla_cache_append, _triton_mla_cache_gather, _triton_rope

    x, out = torch.randn(3, 8), torch.zeros(3, 8)
    cache, latent, k_rope = torch.randn(2, 16, 24), torch.randn(3, 16), torch.randn(3, 8)
    before, found = cache.clone(), (torch.ones(4, 16), torch.ones(4, 8))
    table, bounds = torch.tensor([[7], [-1], [1]], dtype=torch.int32), torch.tensor([0, 1, 2, 4], dtype=torch.int32)
    with _simulator.active("triton"):
        _triton_rope.rope(x, torch.tensor([-1, 0, 5]), torch.randn(5, 8), True, False, out)
        _triton_mla_cache_append.mla_cache_append(cache, torch.tensor([32, -2, 2**40]), latent, k_rope, False)
        _triton_mla_cache_gather.mla_cache_gather(cache, table, bounds, 4, 16, *found)
    assert out[[0, 2]].isnan().all() and out[1].isfinite().all() and torch.equal(cache, before)
    assert all(not part[:2].any() for part in found) and torch.equal(torch.cat(found, 1)[2:], cache[1, :2])
