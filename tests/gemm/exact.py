"""FP8 operands with uneven magnitudes, their exact values, and the error that a GEMM on them may have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from checks import HARDWARE_ROUNDING, close, roundoff
from torch import Tensor

import dsv3_kernels as dk

E4M3 = torch.float8_e4m3fn
# Error of a float32 result, in units of sum |a| |b|: what float32 promotion of exact partial sums costs, with room.
EXACT_SUMS = 1e-5
# FP8 tensor cores cut off what lies 13 bits below the largest of the 33 addends of a step, and sums after 13 bits (see
# tests/ptxsim/hardware). Seen with the simulator's model of it, over the tests of this folder: up to 2^-9.8.
HARDWARE_SUMS = 2.0**-9
SIMULATED = HARDWARE_SUMS if HARDWARE_ROUNDING else EXACT_SUMS
FLOAT32 = {
    "eager": EXACT_SUMS,
    "sim:cuda": SIMULATED,
    "sim:triton": SIMULATED,
    "cuda": HARDWARE_SUMS,
    "triton": HARDWARE_SUMS,
}


def uneven(*shape: int) -> Tensor:
    """Magnitudes that differ from row to row and from column to column: a misplaced scale cannot hide."""
    return torch.randn(shape) * torch.exp(2 * torch.randn(*shape[:-1], 1)) * torch.exp(torch.randn(shape[-1]))


def values(q: Tensor, scale: Tensor) -> Tensor:
    """What codes and scales stand for, in float64."""
    q, scale = q.cpu().float().double(), scale.cpu().double()
    if scale.shape[-2] != q.shape[-2]:
        scale = scale.repeat_interleave(128, -2)[..., : q.shape[-2], :]
    return q * scale.repeat_interleave(128, -1)[..., : q.shape[-1]]


def rows(device: torch.device, *shape: int) -> tuple[Tensor, Tensor]:
    """A 1x128 operand whose rows lie a multiple of 16 bytes apart; between them lie NaN codes."""
    with dk.backend("eager"):  # the op under test is another one
        q, scale = dk.quantize_1x128(uneven(*shape))
    return padded(q.to(device)), scale.to(device)


def blocks(device: torch.device, *shape: int) -> tuple[Tensor, Tensor]:
    """A 128x128 operand, as `rows`."""
    with dk.backend("eager"):
        q, scale = dk.quantize_128x128(uneven(*shape))
    return padded(q.to(device)), scale.to(device)


def padded(q: Tensor) -> Tensor:
    width = q.shape[-1]
    if width % 16 == 0:
        return q
    store = torch.full((*q.shape[:-1], -(-width // 16) * 16), 0x7F, dtype=torch.uint8, device=q.device)
    store[..., :width] = q.view(torch.uint8)
    return store.view(E4M3)[..., :width]


def product(got: Tensor, a: Tensor, b: Tensor, backend: str | None = None, *plus: Tensor) -> None:
    """`got` is A @ B.T plus what is added, element by element, within the error of its dtype and of its backend, by
    default the one that its device takes by itself."""
    backend = backend or ("cuda" if got.is_cuda else "eager")
    wanted, size = a @ b.mT, a.abs() @ b.abs().mT
    for addend in plus:
        wanted, size = wanted + addend.double(), size + addend.double().abs()
    rounding = roundoff(got.dtype) * wanted.abs() if got.dtype is not torch.float32 else 0.0
    close(got, wanted, FLOAT32[backend] * size + rounding)


def offsets(counts: Sequence[int], device: torch.device | str) -> Tensor:
    """Where groups of these sizes begin and end."""
    return torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32, device=device)


def poison(q: Tensor, scale: Tensor) -> None:
    """Make codes and scales NaN: what an op must not read."""
    q.view(torch.uint8).fill_(0x7F)
    scale.fill_(torch.nan)
