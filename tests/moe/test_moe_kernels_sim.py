"""The moe family's CUDA kernels through the simulator: every basic block, any schedule, the bits of eager.

The ops' own tests run on these kernels too; here are the cases that only a kernel has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import same_bits
from simulated import SCHEDULES, counters, coverage, needs_simulator, schedule
from torch import Tensor

import dsv3_kernels as dk

pytestmark = needs_simulator

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
GROUPED = {"num_groups": 8, "topk_groups": 4, "top_k": 8, "scaling": 2.5}
Call = Callable[[], Any]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gates(num_experts: int) -> list[Call]:
    """Groups or none, bias or none, both scores; a group's lanes come to 4, 8 and 1; a tail of experts."""
    found: list[Call] = []
    for count, options in (
        (num_experts, GROUPED),
        (num_experts - 6, {**GROUPED, "num_groups": 2, "topk_groups": 1, "score": "softmax"}),
        (num_experts - 32, {**GROUPED, "num_groups": 32, "normalize": False}),
        (num_experts - 3, {**GROUPED, "num_groups": 1, "topk_groups": 1, "top_k": 32, "score": "softmax"}),
    ):
        logits, bias = torch.randn(9, count, generator=generator()), torch.randn(count, generator=generator(1)) / 4
        grad = torch.randn(9, options["top_k"], generator=generator(2))
        for added in (bias, None):

            def run(
                logits: Tensor = logits, bias: Tensor | None = added, grad: Tensor = grad, options: Any = options
            ) -> Any:
                ours = logits.clone().requires_grad_()
                weights, experts = dk.moe_gate(ours, bias, **options)
                weights.backward(grad)
                return weights.detach(), experts, ours.grad

            found.append(run)
    return found


def routing(tokens: int, choices: int, num_experts: int, seed: int = 0) -> Tensor:
    """A fifth of the choices dropped."""
    experts = torch.rand(tokens, num_experts, generator=generator(seed)).argsort(1)[:, :choices]
    return experts.masked_fill(torch.rand(tokens, choices, generator=generator(seed + 1)) < 0.2, -1)


def permutations() -> list[Call]:
    """More choices than a CTA takes; more of a token than a thread holds; both widths of index; bytes and vectors."""
    found: list[Call] = []
    for tokens, choices, num_experts, columns, alignment, dtype in (
        (300, 4, 7, 8, 1, torch.int64),
        (40, 9, 16, 2056, 16, torch.int32),
        (5, 2, 3, 17, 4, torch.int32),
        (0, 2, 3, 16, 4, torch.int32),
    ):
        x = torch.randn(tokens, columns, generator=generator()).bfloat16()
        experts = routing(tokens, choices, num_experts).to(dtype)
        for scale in (None, torch.rand(3, tokens, generator=generator(3)).t()):

            def run(
                x: Tensor = x,
                experts: Tensor = experts,
                scale: Tensor | None = scale,
                e: int = num_experts,
                a: int = alignment,
            ) -> Any:
                rows, row_scale, offsets, handle = dk.moe_permute(x, experts, e, scale=scale, alignment=a)
                used = int(offsets[-1])
                scales = () if row_scale is None else (row_scale[:used],)
                return rows[:used], offsets, *handle, *scales

            found.append(run)
    return found


def returns(dtype: torch.dtype, backward: bool) -> list[Call]:
    """Weighted or not, aligned or not, more choices than are loaded at once, and than are summed at once."""
    found: list[Call] = []
    for choices, columns, offset in ((5, 4112, 0), (33, 15, 1)):
        experts = routing(3, choices, 40)
        _, _, _, handle = dk.moe_permute(torch.zeros(3, 1), experts, 40, alignment=2)
        memory = torch.full((handle.source.shape[0], columns + 8), torch.nan, dtype=dtype)
        rows = memory[:, offset : offset + columns]
        owned = handle.source >= 0
        rows[owned] = torch.randn(int(owned.sum()), columns, generator=generator()).to(dtype)
        weights = torch.rand(3, choices, generator=generator(1)).to(torch.promote_types(dtype, torch.float32))
        grad = torch.randn(3, columns, generator=generator(2)).to(dtype)
        for factors in (weights, None):
            if backward:
                args = grad, rows if factors is not None else None, handle.row_of, handle.source, factors
                found.append(lambda args=args: torch.ops.dsv3_kernels.moe_unpermute_backward(*args))
            else:
                found.append(lambda rows=rows, handle=handle, w=factors: dk.moe_unpermute(rows, handle, w))
    return found


KERNELS: dict[str, list[Call]] = {}
for experts in (256, 512):
    KERNELS[f"moe_gate_{experts}"] = KERNELS[f"moe_gate_backward_{experts}"] = gates(experts)
for kernel in ("place", "copy_vectors", "copy_bytes"):
    KERNELS[f"moe_permute_{kernel}"] = permutations()
for name, dtype in TYPES.items():
    KERNELS[f"moe_unpermute_{name}"] = returns(dtype, False)
    KERNELS[f"moe_unpermute_backward_{name}"] = returns(dtype, True)


def tensors(result: Any) -> list[Tensor]:
    return [t.contiguous() for t in ([result] if isinstance(result, Tensor) else result)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_block_and_any_schedule_and_the_bits_of_eager(kernel: str) -> None:
    """The gradient of unpermute's weights alone has other bits: its test bounds it."""
    with coverage(kernel) as seen, dk.backend("sim:cuda"):
        got = [tensors(call()) for call in KERNELS[kernel]]
    assert seen.unreached() == []
    with dk.backend("eager"):
        wanted = [tensors(call()) for call in KERNELS[kernel]]
    if kernel.startswith("moe_unpermute_backward"):
        assert all(torch.allclose(a[1], b[1], rtol=1e-5, atol=1e-5) for a, b in zip(got, wanted, strict=True))
        exact = [[a[:1] for a in results] for results in (got, wanted)]
    else:
        exact = [got, wanted]
    assert [same_bits(a, b) for a, b in zip(*exact, strict=True)] == [True] * len(got)
    for options in SCHEDULES.values():
        with schedule(**options), dk.backend("sim:cuda"):
            assert same_bits([tensors(call()) for call in KERNELS[kernel][:2]], got[:2])


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_the_gate_has_the_bits_of_eager_for_any_logits(score: str) -> None:
    """Scores that overflow, underflow, are subnormal, tie; -inf; NaN goes first and makes the weights NaN."""
    logits = torch.randn(40, 256, generator=generator()) * torch.exp(2 * torch.randn(40, 1, generator=generator(1)))
    logits[1], logits[2, ::3], logits[3, 5] = 0, -torch.inf, torch.nan
    logits[4] = torch.linspace(-110, 110, 256)
    runs = []
    for name in ("eager", "sim:cuda"):
        with dk.backend(name):
            runs.append(dk.moe_gate(logits, None, **GROUPED, score=score))
    (weights, experts), (wanted, chosen) = runs
    assert torch.equal(experts, chosen)
    assert torch.equal(weights.isnan(), wanted.isnan()) and same_bits(weights.nan_to_num(), wanted.nan_to_num())


def test_bytes_of_permute_and_back() -> None:
    """Rows: read once, written once per choice. The way back: every choice's row once."""
    x, experts = torch.randn(16, 1024).bfloat16(), torch.arange(64).view(16, 4) % 5
    with dk.backend("sim:cuda"):
        rows, _, _, handle = dk.moe_permute(x, experts, 5)
        spent = counters()
        assert 0 < spent["global_read"] - 16 * 2048 <= 16 * 8 * 4 * 32 * 4  # a token's places, a word to each lane
        assert spent["global_write"] == 64 * 2048
        dk.moe_unpermute(rows, handle)
        assert counters()["global_write"] == 16 * 2048
        assert 0 < counters()["global_read"] - 64 * 2048 <= 16 * 8 * 4 * 32 * 4


def test_nothing_to_gate() -> None:
    with dk.backend("sim:cuda"):
        weights, experts = dk.moe_gate(torch.empty(0, 256), None, **GROUPED)
    assert weights.shape == experts.shape == (0, 8)


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("got 520 experts, where a warp holds up to 512", lambda: dk.moe_gate(torch.zeros(1, 520), None, **GROUPED)),
        ("got float64 logits", lambda: dk.moe_gate(torch.zeros(1, 256).double(), None, **GROUPED)),
        (
            "got 64 groups, where a warp ranks up to 32",
            lambda: dk.moe_gate(torch.zeros(1, 256), None, **{**GROUPED, "num_groups": 64}),
        ),
        (
            "got 33 choices, where a warp holds up to 32",
            lambda: dk.moe_gate(torch.zeros(1, 256), None, **{**GROUPED, "top_k": 33}),
        ),
        (
            "got 1025 experts, where a CTA counts up to 1024",
            lambda: dk.moe_permute(torch.zeros(1, 8), torch.zeros(1, 1, dtype=torch.int32), 1025),
        ),
    ],
)
def test_what_the_kernels_do_not_serve_is_passed_over(words: str, call: Call) -> None:
    with dk.backend("sim:cuda"), pytest.raises(RuntimeError, match=words):
        call()
