"""mla_prefill in Triton through the simulator, forward and backward: any schedule, every basic block."""

from __future__ import annotations

import contextlib

import pytest
import torch
from checks import close, roundoff, same_bits
from simulated import SCHEDULES, coverage, needs_simulator, schedule
from test_mla_prefill import NAMES, SCALE, bounds_of, definition, inputs

import dsv3_kernels as dk

pytestmark = needs_simulator

FORWARD = "triton_mla_prefill"
BACKWARD = [f"{FORWARD}_backward_{part}" for part in ("row_sums", "queries", "keys", "join")]


def run(tensors, cu_q, cu_k, grad_out, causal):
    """Results and gradients, and that every kernel ran once."""
    before = dk.launch_counts()
    ours = [t.detach().requires_grad_() for t in tensors]
    with dk.backend("sim:triton"):
        out, lse = dk.mla_prefill(*ours, cu_q, cu_k, softmax_scale=SCALE, causal=causal)
    grads = torch.autograd.grad(out, ours, grad_out)
    assert dk.launch_counts() - before == dict.fromkeys((FORWARD, *BACKWARD), 1)
    return [out.detach(), lse, *grads]


def check(got, tensors, cu_q, cu_k, grad_out, causal) -> None:
    dtype = tensors[0].dtype
    wanted = definition(*tensors, cu_q, cu_k, grad_out, causal, dtype, factor=roundoff(dtype))
    for name, result, want, bound in zip(NAMES, got, *wanted, strict=True):
        close(result, want, bound, name)


@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("causal", [True, False])
def test_any_schedule(causal, options) -> None:
    """Tails of queries and keys, several tiles, a sequence without keys; the weights of some tiles are all hidden."""
    cu_q, cu_k = bounds_of([130, 0, 3]), bounds_of([70, 5, 0])
    tensors = inputs(133, 75, 2, torch.bfloat16)
    args = tensors, cu_q, cu_k, torch.randn(133, 2, 128).bfloat16(), causal
    with contextlib.ExitStack() as stack:
        seen = [stack.enter_context(coverage(kernel)) for kernel in (FORWARD, *BACKWARD)]
        got = run(*args)
        with schedule(**options):
            again = run(*args)
    check(got, *args)
    assert same_bits(got, again)
    assert [missed for kernel in seen for missed in kernel.unreached()] == []


@pytest.mark.parametrize("widths", [(64, 32, 64), (32, 16, 128), (128, 64, 16)], ids=str)
def test_other_widths(widths) -> None:
    """Queries, keys and values lie in wider rows of NaN."""
    cu_q, cu_k = bounds_of([70, 0, 3]), bounds_of([100, 5, 0])
    apart = [
        torch.full((*t.shape[:-1], t.shape[-1] + 8), torch.nan).bfloat16() for t in inputs(73, 105, 2, BF16, widths)
    ]
    tensors = [wide[..., :-8] for wide in apart]
    for t, values in zip(tensors, inputs(73, 105, 2, BF16, widths), strict=True):
        t.copy_(values)
    args = tensors, cu_q, cu_k, torch.randn(73, 2, widths[2]).bfloat16(), True
    with contextlib.ExitStack() as stack:
        seen = [stack.enter_context(coverage(kernel)) for kernel in (FORWARD, *BACKWARD)]
        got = run(*args)
        with schedule(**SCHEDULES["late"]):
            again = run(*args)
        check(got, *args)
        tensors[0][1, 0, 0] = torch.nan
        poisoned = run(*args)[0]
    assert poisoned[1, 0].isnan().all() and int(poisoned.isnan().sum()) == widths[2]
    assert same_bits(got, again) and [missed for kernel in seen for missed in kernel.unreached()] == []
    assert all(wide[..., -8:].isnan().all() for wide in apart)


@pytest.mark.slow  # five kernels compile for it
def test_float16() -> None:
    cu = bounds_of([20, 9])
    args = inputs(29, 29, 1, torch.float16), cu, cu, torch.randn(29, 1, 128).half(), True
    check(run(*args), *args)


@pytest.mark.parametrize(("queries", "keys", "sequences"), [(3, 0, 1), (0, 3, 1), (3, 3, 0), (3, 3, 2)])
def test_nothing_to_attend_to(queries, keys, sequences) -> None:
    """No keys, no queries, no sequence, sequences of no rows: everything is written all the same."""
    cu_q, cu_k = (torch.zeros(sequences + 1, dtype=torch.int32) for _ in range(2))
    if sequences == 1:
        cu_q[1], cu_k[1] = queries, keys
    tensors = [t.requires_grad_() for t in inputs(queries, keys, 2, torch.bfloat16)]
    with dk.backend("sim:triton"):
        out, lse = dk.mla_prefill(*tensors, cu_q, cu_k, softmax_scale=SCALE)
    grads = torch.autograd.grad(out, tensors, torch.randn_like(out))
    assert not out.any() and lse.isneginf().all() and not any(g.any() for g in grads)


BF16 = torch.bfloat16
FAR = torch.empty(2 << 24, dtype=torch.bfloat16).as_strided((2, 1, 192), (1 << 24, 192, 1))


@pytest.mark.parametrize(
    ("words", "tensors"),
    [
        (r"takes widths of 16, 32, 64 and \(not rotary\) 128, got 16, 8 and 16", inputs(2, 2, 1, BF16, (16, 8, 16))),
        (r"takes widths .* got 128, 128 and 64", inputs(2, 2, 1, BF16, (128, 128, 64))),
        ("takes bfloat16 and float16, got torch.float32", inputs(2, 2, 1)),
        (
            "takes rows less than 16777216 elements apart, got 16777216",
            [FAR, *inputs(2, 2, 1, torch.bfloat16)[1:]],
        ),
    ],
)
def test_what_it_does_not_take(words, tensors) -> None:
    cu = bounds_of([2])
    with dk.backend("sim:triton"), pytest.raises(RuntimeError, match=words):
        dk.mla_prefill(*tensors, cu, cu, softmax_scale=SCALE)
