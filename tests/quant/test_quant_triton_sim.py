"""The Triton kernels of the family under extreme schedules: the bits of eager, and every block reached."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from checks import same_bits
from simulated import SCHEDULES, coverage, needs_simulator, schedule

import dsv3_kernels as dk

pytestmark = needs_simulator
BF16 = torch.bfloat16


def ops() -> Any:
    for name in ("rms_norm", "rms_norm_quantize_1x128", "quantize_1x128_both"):
        getattr(dk, name)  # defines the ops
    return torch.ops.dsv3_kernels


def offsets(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def both(tokens: int, columns: int, bounds: torch.Tensor | None) -> Callable[[], Any]:
    """What belongs to groups, and padding; the rest is unspecified."""
    x = torch.randn(tokens, columns)
    end = (
        128 * -(-tokens // 128)
        if bounds is None
        else int((bounds.diff() + 127).div(128, rounding_mode="floor").sum()) * 128
    )
    used = tokens if bounds is None else int(bounds[-1])

    def run():
        q, scale, q_t, scale_t, offsets_t = ops().quantize_1x128_both(x, bounds, False)
        return q[:used], scale[:used].contiguous(), q_t[:, :end], scale_t[:, : end // 128].contiguous(), offsets_t

    return run


def normed(rows: int, columns: int) -> list[Callable[[], Any]]:
    x, r, grad, total = (torch.randn(rows, columns).to(BF16) for _ in range(4))
    weight = torch.randn(columns)
    return [
        lambda: ops().rms_norm(x, weight, 1e-6, r),
        lambda: ops().rms_norm(x, weight, 1e-6, None)[:1],
        lambda: ops().rms_norm_quantize_1x128(x, weight, 1e-6, r, True),
        lambda: ops().rms_norm_backward(grad, x, weight, 1e-6, total),
        lambda: ops().rms_norm_backward(grad, x, weight, 1e-6, None),
    ]


def calls() -> dict[str, list[Callable[[], Any]]]:
    """By the first kernel that they launch."""
    torch.manual_seed(0)
    x, w = torch.randn(70, 200).to(BF16), torch.randn(3, 130, 136)
    q, scale = dk.quantize_128x128(w)
    norms = [call for shape in ((2, 2304), (5, 200)) for call in normed(*shape)]
    return {
        "triton_quantize_1x128": [lambda: dk.quantize_1x128(x), lambda: dk.quantize_1x128(x[:3], pow2_scale=True)],
        "triton_quantize_128x128": [lambda: dk.quantize_128x128(w)],
        "triton_quantize_1x128_both": [both(130, 136, None), both(140, 136, offsets(0, 3, 3, 135))],
        "triton_dequantize": [lambda: dk.dequantize(q, scale)],
        "triton_rms_norm": norms[0::5] + norms[1::5],
        "triton_rms_norm_quantize_1x128": norms[2::5],
        "triton_rms_norm_backward": norms[3::5] + norms[4::5],
    }


@pytest.mark.parametrize("kernel", calls())
def test_the_bits_of_eager_under_extreme_schedules(kernel):
    with ExitStack() as stack:
        kernels = [kernel, *(["triton_rms_norm_backward_weight"] if kernel == "triton_rms_norm_backward" else [])]
        seen = [stack.enter_context(coverage(name)) for name in kernels]
        for call in calls()[kernel]:
            wanted = call()
            for options in SCHEDULES.values():
                before = dk.launch_counts()[kernel]
                with dk.backend("sim:triton"), schedule(**options):
                    got = call()
                assert dk.launch_counts()[kernel] == before + 1
                assert same_bits(got, wanted)
    unreachable = {kernel: {"tl.store(parts + ": "no row in a program: each has one"}} if len(seen) > 1 else {}
    for name, one in zip(kernels, seen, strict=True):
        assert one.unreached(kinds=("code", "predicated"), unreachable=unreachable.get(name)) == []


def test_swiglu_under_extreme_schedules():
    """Its exponential is not eager's: the bits of the plain schedule, whose error the op's own test bounds."""
    gate_up, weights = torch.randn(70, 400).to(BF16), torch.randn(70)
    with dk.backend("sim:triton"), coverage("triton_silu_mul_quantize_1x128") as seen:
        for rows, factors in ((70, weights), (3, None)):
            wanted = dk.silu_mul_quantize_1x128(gate_up[:rows], weights=factors)
            for options in SCHEDULES.values():
                with schedule(**options):
                    assert same_bits(dk.silu_mul_quantize_1x128(gate_up[:rows], weights=factors), wanted)
    assert seen.unreached(kinds=("code", "predicated")) == []
