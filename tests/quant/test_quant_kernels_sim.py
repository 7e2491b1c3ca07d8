"""The quant family's CUDA kernels through the simulator: every basic block, any schedule, the bits of eager.

The ops' own tests run on these kernels too; here are the cases that only a kernel has.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import same_bits
from simulated import SCHEDULES, counters, coverage, needs_simulator, schedule
from torch import Tensor

import dsv3_kernels as dk

pytestmark = needs_simulator

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
EPS = 1e-6
Call = Callable[[], Any]


def rows(count: int, columns: int, dtype: torch.dtype, *, offset: int = 0, seed: int = 0) -> Tensor:
    """Random rows of very different sizes, NaN around them; `offset` elements past an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    memory = torch.full((count + 1, (columns + 39) // 8 * 8), torch.nan, dtype=dtype)
    view = memory[:count, offset : offset + columns]
    sizes = torch.exp(2 * torch.randn(count, 1, generator=generator))
    return view.copy_(torch.randn(count, columns, generator=generator) * sizes)


def owned(outputs: Any, offsets: Tensor | None) -> list[Tensor]:
    """What belongs to a group, of quantize_1x128_both's results."""
    q, scale, q_t, scale_t, offsets_t = outputs
    if offsets is None:
        return [q, scale, q_t, scale_t]
    used, wide = int(offsets[-1]), int(offsets_t[-1])
    return [q[:used], scale[:used], q_t[:, :wide], scale_t[:, : wide // 128], offsets_t]


def both(dtype: torch.dtype) -> list[Call]:
    """One group; groups that are empty, of one row, and 33 of them, more than a warp has lanes; unaligned rows."""
    many = [0, *range(0, 64, 2)]
    found = []
    for tokens, columns, bounds, offset in (
        (130, 648, None, 0),
        (140, 136, [0, 0, 1, 135, 135], 0),
        (70, 17, many, 3),
        (0, 8, [0, 0], 0),
    ):
        x = rows(tokens, columns, dtype, offset=offset)
        offsets = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
        if offsets is not None:
            x[int(offsets[-1]) :] = torch.nan
        found.append(lambda x=x, offsets=offsets: owned(dk.quantize_1x128_both(x, offsets=offsets), offsets))
    return found


def silu(dtype: torch.dtype) -> list[Call]:
    weights = torch.randn(9, 2)[:, 1]
    return [
        lambda: dk.silu_mul_quantize_1x128(rows(9, 2 * 1160, dtype), weights=weights),
        lambda: dk.silu_mul_quantize_1x128(rows(3, 34, dtype, offset=1), pow2_scale=True),
        lambda: dk.silu_mul_quantize_1x128(rows(9, 34, dtype, offset=1), weights=weights),
        lambda: dk.silu_mul_quantize_1x128(rows(1, 16, dtype)),
    ]


def decoded(dtype: torch.dtype) -> list[Call]:
    """Both tiles; a stack with gaps between its matrices; rows that no vector access may touch."""
    found: list[Call] = []
    for shape, offset in (((2, 130, 272), 0), ((3, 1100 * 4), 0), ((5, 301), 1)):
        *leading, columns = shape
        codes = torch.randint(0, 0x7F, (*leading[:-1], leading[-1] + 1, columns // 8 * 8 + 32), dtype=torch.uint8)
        q = codes[..., : leading[-1], offset : offset + columns].view(torch.float8_e4m3fn)
        for per in (1, 128):
            scale = torch.rand(*leading[:-1], -(-leading[-1] // per), -(-columns // 128))
            found.append(lambda q=q, scale=scale: dk.dequantize(q, scale, dtype=dtype))
    return found


def norm_inputs(columns: int, dtype: torch.dtype, offset: int) -> tuple[Tensor, Tensor, Tensor]:
    return rows(3, columns, dtype, offset=offset), torch.randn(columns), rows(3, columns, dtype, offset=offset, seed=1)


def norms(op: Any, dtype: torch.dtype, columns: int) -> list[Call]:
    """With and without residual, aligned and not, all types of weight."""
    found = []
    for offset, weight_dtype in itertools.product((0, 1), TYPES.values()):
        x, weight, residual = norm_inputs(columns - offset, dtype, offset)
        weight = weight.to(weight_dtype)
        found.append(lambda x=x, weight=weight: op(x, weight, EPS))
        found.append(lambda x=x, weight=weight, residual=residual: op(x, weight, EPS, residual=residual))
    return found


def norm_gradients(dtype: torch.dtype) -> list[Call]:
    """More rows than slots in one of them: a slot then holds two."""
    found = []
    shapes = ((2056, 3), (24, 257), (24, 1), (17, 2), (17, 2), (17, 2))
    for (columns, count), weight_dtype in zip(shapes, 2 * [*TYPES.values()], strict=True):
        x, grad = rows(count, columns, dtype, offset=columns % 2), rows(count, columns, dtype, seed=2).contiguous()
        weight = torch.randn(columns).to(weight_dtype)
        for total in (None, grad * 2):
            args = grad, x, weight, EPS, total
            found.append(lambda args=args: torch.ops.dsv3_kernels.rms_norm_backward(*args))
    return found


KERNELS: dict[str, list[Call]] = {}
for name, dtype in TYPES.items():
    KERNELS[f"quantize_1x128_both_{name}"] = both(dtype)
    KERNELS[f"silu_mul_quantize_1x128_{name}"] = silu(dtype)
    KERNELS[f"dequantize_{name}"] = decoded(dtype)
    for op in ("rms_norm", "rms_norm_quantize_1x128"):
        KERNELS[f"{op}_warp_{name}"] = norms(getattr(dk, op), dtype, 1800)  # a part of the last step
        KERNELS[f"{op}_row_{name}"] = norms(getattr(dk, op), dtype, 6200)
    KERNELS[f"rms_norm_backward_{name}"] = norm_gradients(dtype)
KERNELS["rms_norm_backward_weight"] = norm_gradients(torch.float32)


def tensors(result: Any) -> list[Tensor]:
    results = [result] if isinstance(result, Tensor) else result
    return [t.contiguous() for t in results if t is not None]


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_block_and_any_schedule_and_the_bits_of_eager(kernel: str) -> None:
    """SwiGLU's exponential alone has other bits: its test bounds them."""
    with coverage(kernel) as seen, dk.backend("sim:cuda"):
        got = [tensors(call()) for call in KERNELS[kernel]]
    assert seen.unreached() == []
    if not kernel.startswith("silu"):
        with dk.backend("eager"):
            wanted = [tensors(call()) for call in KERNELS[kernel]]
        assert [same_bits(a, b) for a, b in zip(got, wanted, strict=True)] == [True] * len(got)
    for options in SCHEDULES.values():
        with schedule(**options), dk.backend("sim:cuda"):
            assert same_bits([tensors(call()) for call in KERNELS[kernel][:2]], got[:2])


def test_both_moves_each_byte_once() -> None:
    """Two groups of one block each; the offsets (12 bytes) are read by all 8 warps of the one CTA per block."""
    x, offsets = rows(256, 512, torch.bfloat16).contiguous(), torch.tensor([0, 128, 256], dtype=torch.int32)
    with dk.backend("sim:cuda"):
        dk.quantize_1x128_both(x, offsets=offsets)
    spent, ctas = counters(), 4  # a third and a fourth find no group
    assert 0 < spent["global_read"] - 256 * 512 * 2 <= ctas * 8 * 16
    assert spent["global_write"] == 2 * 256 * 512 + 2 * 256 * 512 // 128 * 4 + 12


@pytest.mark.parametrize("weighted", [False, True])
def test_silu_moves_each_byte_once(weighted: bool) -> None:
    gate_up, weights = rows(8, 2048, torch.bfloat16).contiguous(), torch.ones(8) if weighted else None
    with dk.backend("sim:cuda"):
        dk.silu_mul_quantize_1x128(gate_up, weights=weights)
    spent = counters()
    assert spent["global_read"] == gate_up.numel() * 2 + (8 * 32 * 4 if weighted else 0)  # a word for a warp's 32 lanes
    assert spent["global_write"] == 8 * 1024 + 8 * 8 * 4


def test_norm_moves_each_byte_once() -> None:
    x, weight, residual = rows(2, 7168, torch.bfloat16), torch.ones(7168), rows(2, 7168, torch.bfloat16)
    with dk.backend("sim:cuda"):
        dk.rms_norm_quantize_1x128(x, weight, EPS, residual=residual)
    spent = counters()
    assert spent["global_read"] == 2 * 7168 * (2 + 2 + 4)
    assert spent["global_write"] == 2 * 7168 * (2 + 2 + 1) + 2 * 56 * 4


def test_a_weight_is_multiplied_in_before_the_scale() -> None:
    gate_up = rows(5, 512, torch.float32)
    with dk.backend("sim:cuda"):
        plain, half = (
            dk.silu_mul_quantize_1x128(gate_up),
            dk.silu_mul_quantize_1x128(gate_up, weights=torch.full((5,), 0.5)),
        )
    assert same_bits(plain[0], half[0]) and torch.equal(plain[1], 2 * half[1])


def test_rows_that_are_too_long_are_passed_over() -> None:
    x, weight = torch.randn(2, 8200), torch.ones(8200)
    with dk.backend("sim:cuda"), pytest.raises(RuntimeError, match="got rows of 8200 columns, where the kernel keeps"):
        dk.rms_norm(x, weight, EPS)
