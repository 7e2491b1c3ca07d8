"""Benchmarks of the moe family. All of it moves bytes: the ceiling is the copy bandwidth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dsv3_kernels as dk

from .cases import Case

V3 = {"num_groups": 8, "topk_groups": 4, "top_k": 8, "scaling": 2.5}
EXPERTS = 256


def normal(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(sum(shape)), device=device)


def routing(device: torch.device, tokens: int, num_experts: int) -> Tensor:
    """8 different experts for each token."""
    return normal(device, tokens, num_experts).topk(8, sorted=False).indices.int()


def moe_gate(tokens: int, *, quick: bool = False) -> Case:
    def make(device: torch.device) -> tuple[Any, ...]:
        return normal(device, tokens, EXPERTS), normal(device, EXPERTS) / 8

    def check(inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> str | None:
        with dk.backend("eager"):
            wanted = dk.moe_gate(*inputs, **V3)
        # A backend with another exponential may decide differently where two scores all but tie.
        agree = (outputs[1] == wanted[1]).all(-1)
        close = (outputs[0] - wanted[0])[agree].abs() <= 1e-6 * wanted[0][agree]
        return (
            None if agree.float().mean() >= 0.999 and close.all() else "moe_gate: other experts or weights than eager"
        )

    return Case(
        op="moe_gate",
        shape={"T": tokens, "E": EXPERTS},
        make=make,
        run=lambda logits, bias: dk.moe_gate(logits, bias, **V3),
        check=check,
        bytes=tokens * (EXPERTS * 4 + 8 * 8),
        quick=quick,
    )


def moe_gate_backward(tokens: int) -> Case:
    def make(device: torch.device) -> tuple[Any, ...]:
        logits = normal(device, tokens, EXPERTS)
        weights, experts = dk.moe_gate(logits, None, **V3)
        return normal(device, *weights.shape), logits, experts

    def run(*inputs: Tensor) -> Tensor:
        return torch.ops.dsv3_kernels.moe_gate_backward(*inputs, 2.5, True, "sigmoid")

    def check(inputs: tuple[Any, ...], output: Tensor) -> str | None:
        with dk.backend("eager"):
            wanted = run(*inputs)
        size = 2.5 * inputs[0].abs().sum(-1, keepdim=True)
        return None if ((output - wanted).abs() <= size * 2**-21).all() else "moe_gate_backward: the gradient is off"

    return Case(
        op="moe_gate_backward",
        shape={"T": tokens, "E": EXPERTS},
        make=make,
        run=run,
        check=check,
        bytes=tokens * (EXPERTS * 8 + 8 * 8),
    )


def moe_permute(tokens: int, columns: int, num_experts: int, alignment: int, *, quick: bool = False) -> Case:
    """FP8 rows with their scales, as they are sent to experts."""

    def make(device: torch.device) -> tuple[Any, ...]:
        q, scale = dk.quantize_1x128(normal(device, tokens, columns).bfloat16())
        return q, routing(device, tokens, num_experts), scale

    def run(q: Tensor, experts: Tensor, scale: Tensor) -> tuple[Any, ...]:
        return dk.moe_permute(q, experts, num_experts, scale=scale, alignment=alignment)

    def check(inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> str | None:
        rows, row_scale, _, handle = outputs
        owned = handle.source >= 0
        token = handle.source[owned].long() // 8
        same = torch.equal(rows.view(torch.uint8)[owned], inputs[0].view(torch.uint8)[token])
        same = same and torch.equal(row_scale[owned], inputs[2][token]) and int(owned.sum()) == 8 * tokens
        return None if same else "moe_permute: a row is not its token's"

    return Case(
        op="moe_permute",
        shape={"T": tokens, "H": columns, "E": num_experts, "alignment": alignment},
        make=make,
        run=run,
        check=check,
        bytes=tokens * 9 * (columns + columns // 128 * 4) + tokens * 8 * 12,
        quick=quick,
    )


def permuted(device: torch.device, tokens: int, columns: int) -> tuple[Any, ...]:
    x, experts = normal(device, tokens, columns).bfloat16(), routing(device, tokens, EXPERTS)
    rows, _, _, handle = dk.moe_permute(x, experts, EXPERTS)
    return rows, handle, normal(device, tokens, 8).abs()


def moe_unpermute(tokens: int, columns: int, *, quick: bool = False) -> Case:
    def check(inputs: tuple[Any, ...], output: Tensor) -> str | None:
        with dk.backend("eager"):
            return None if torch.equal(output, dk.moe_unpermute(*inputs)) else "moe_unpermute: other bits than eager"

    return Case(
        op="moe_unpermute",
        shape={"T": tokens, "H": columns},
        make=lambda device: permuted(device, tokens, columns),
        run=dk.moe_unpermute,
        check=check,
        bytes=tokens * columns * 2 * 9 + tokens * 8 * 8,
        quick=quick,
    )


def moe_unpermute_backward(tokens: int, columns: int) -> Case:
    def make(device: torch.device) -> tuple[Any, ...]:
        rows, handle, weights = permuted(device, tokens, columns)
        return normal(device, tokens, columns).bfloat16(), rows, handle.row_of, handle.source, weights

    def check(inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> str | None:
        with dk.backend("eager"):
            wanted = torch.ops.dsv3_kernels.moe_unpermute_backward(*inputs)
        size = columns * inputs[0].float().abs().amax() * inputs[1].float().abs().amax()
        close = ((outputs[1] - wanted[1]).abs() <= 1e-6 * size).all()
        return None if torch.equal(outputs[0], wanted[0]) and close else "moe_unpermute_backward: a gradient is off"

    return Case(
        op="moe_unpermute_backward",
        shape={"T": tokens, "H": columns},
        make=make,
        run=lambda *inputs: torch.ops.dsv3_kernels.moe_unpermute_backward(*inputs),
        check=check,
        bytes=tokens * columns * 2 * 17 + tokens * 8 * 12,
    )


def moe_update_bias() -> Case:
    """A speed of 0 keeps the bias as it was, however often it runs."""

    def make(device: torch.device) -> tuple[Any, ...]:
        return normal(device, EXPERTS), (normal(device, EXPERTS) * 100).int()

    def run(bias: Tensor, counts: Tensor) -> Tensor:
        dk.moe_update_bias(bias, counts, 0.0)
        return bias

    def check(inputs: tuple[Any, ...], output: Tensor) -> str | None:
        return None if torch.equal(output, normal(output.device, EXPERTS)) else "moe_update_bias: the bias is off"

    return Case(
        op="moe_update_bias", shape={"E": EXPERTS}, make=make, run=run, check=check, bytes=EXPERTS * 12, quick=True
    )


def moe_balance_loss(tokens: int, sequences: int) -> Case:
    def make(device: torch.device) -> tuple[Any, ...]:
        ids = torch.arange(tokens, device=device) * sequences // tokens
        return normal(device, tokens, EXPERTS).sigmoid(), routing(device, tokens, EXPERTS), ids.int()

    def run(scores: Tensor, experts: Tensor, ids: Tensor) -> Tensor:
        return dk.moe_balance_loss(scores, experts, seq_ids=ids, alpha=1.0)

    def check(inputs: tuple[Any, ...], output: Tensor) -> str | None:
        with dk.backend("eager"):
            wanted = run(*inputs)
        return None if (output - wanted).abs() <= 1e-5 * wanted else "moe_balance_loss: the loss is off"

    return Case(
        op="moe_balance_loss",
        shape={"T": tokens, "E": EXPERTS, "S": sequences},
        make=make,
        run=run,
        check=check,
        bytes=tokens * (EXPERTS * 8 + 8 * 4),
    )


def moe_balance_loss_backward(tokens: int, sequences: int) -> Case:
    forward = moe_balance_loss(tokens, sequences)

    def make(device: torch.device) -> tuple[Any, ...]:
        return torch.ones((), device=device), *forward.make(device)

    def run(*inputs: Tensor) -> Tensor:
        return torch.ops.dsv3_kernels.moe_balance_loss_backward(*inputs, 1.0)

    def check(inputs: tuple[Any, ...], output: Tensor) -> str | None:
        with dk.backend("eager"):
            wanted = run(*inputs)
        close = (output - wanted).abs() <= 1e-5 * wanted.abs().max()
        return None if close.all() else "moe_balance_loss_backward: the gradient is off"

    return Case(
        op="moe_balance_loss_backward",
        shape=forward.shape,
        make=make,
        run=run,
        check=check,
        bytes=tokens * (EXPERTS * 12 + 8 * 4),
    )


CASES = [
    moe_gate(128, quick=True),
    moe_gate(4096, quick=True),
    moe_gate_backward(4096),
    moe_permute(128, 7168, EXPERTS, 1, quick=True),
    moe_permute(4096, 7168, EXPERTS, 128, quick=True),
    moe_permute(4096, 7168, 32, 1),
    moe_unpermute(128, 7168, quick=True),
    moe_unpermute(4096, 7168, quick=True),
    moe_unpermute_backward(4096, 7168),
    moe_update_bias(),
    moe_balance_loss(4096, 4),
    moe_balance_loss_backward(4096, 4),
]
