"""Wrong numbers in index tensors: refused in words where that is asked for, and always on the CPU by eager."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from simulated import needs_simulator

import dsv3_kernels as dk
from dsv3_kernels import _library, _values

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def fp8(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.uint8).view(E4M3)


def grouped(*offsets: int) -> Any:
    args = fp8(6, 128), torch.ones(6, 1), fp8(2, 16, 128), torch.ones(2, 1, 1), ints(*offsets)
    return dk.fp8_grouped_gemm(*args)


def swiglu(*offsets: int) -> Any:
    args = fp8(6, 128), torch.ones(6, 1), fp8(2, 32, 128), torch.ones(2, 1, 1), ints(*offsets)
    return dk.fp8_grouped_gemm_swiglu_quantize(*args)


def masked(*counts: int) -> Any:
    return dk.fp8_masked_gemm(fp8(2, 4, 128), torch.ones(2, 4, 1), fp8(2, 16, 128), torch.ones(2, 1, 1), ints(*counts))


def wgrad(*offsets: int, accumulate: bool = False) -> Any:
    args = fp8(16, 256), torch.ones(16, 2), fp8(8, 256), torch.ones(8, 2), ints(*offsets)
    return dk.fp8_grouped_wgrad(*args, out=torch.zeros(2, 16, 8) if accumulate else None, accumulate=accumulate)


def both(*offsets: int) -> Any:
    return dk.quantize_1x128_both(torch.ones(6, 8), offsets=ints(*offsets))


def rope(*positions: int) -> Any:
    return dk.rope(torch.ones(2, 4), ints(*positions), torch.ones(5, 4))


def prefill(q: tuple[int, ...] = (0, 2, 4), k: tuple[int, ...] = (0, 2, 4)) -> Any:
    x = torch.ones(4, 1, 192, dtype=BF16)
    keys = x[..., :128], torch.ones(4, 64, dtype=BF16), x[..., :128]
    return dk.mla_prefill(x, *keys, ints(*q), ints(*k), softmax_scale=1.0)


def decode(length: int = 20, page: int = 1) -> Any:
    cache, table = torch.zeros(3, 16, 576, dtype=BF16), ints(0, page)[None]
    q = torch.ones(1, 1, 1, 576, dtype=BF16)
    return dk.mla_decode(q, cache, table, ints(length), softmax_scale=1.0)


def append(*slots: int) -> Any:
    cache = torch.zeros(2, 16, 576)
    return dk.mla_cache_append(cache, ints(*slots, dtype=torch.int64), torch.ones(2, 512), torch.ones(2, 64))


def prologue(position: int = 0, slot: int = 0) -> Any:
    x = torch.ones(1, 128 + 512 + 64, dtype=BF16)
    weights = torch.ones(128, dtype=BF16), torch.ones(512, dtype=BF16)
    cache, slots = torch.zeros(2, 16, 576, dtype=BF16), ints(slot, dtype=torch.int64)
    return dk.mla_prologue(x, *weights, ints(position), torch.ones(5, 64), cache, slots, eps=1e-6)


def gather(bounds: tuple[int, ...] = (0, 3, 20), page: int = 1) -> Any:
    cache, table = torch.zeros(3, 16, 576, dtype=BF16), torch.tensor([[0, 1], [2, page]], dtype=torch.int32)
    return dk.mla_cache_gather(cache, table, ints(*bounds), 20)


def permute(*experts: int) -> Any:
    return dk.moe_permute(torch.ones(2, 8), ints(*experts).view(2, 1), 4)


def balance(expert: int = 0, sequence: int = 0) -> Any:
    return dk.moe_balance_loss(torch.ones(1, 4), ints(expert)[None], seq_ids=ints(sequence), alpha=1.0)


# op: a call that is right, and calls that are wrong with the words that say so.
CASES: dict[str, tuple[Callable[[], Any], list[tuple[Callable[[], Any], str]]]] = {
    "quantize_1x128_both": (
        lambda: both(0, 2, 6),
        [
            (lambda: both(0, 3, 2), r"offsets: got \[0, 3, 2\], wanted non-decreasing values in \[0, 6\]"),
            (lambda: both(0, 3, 7), r"offsets: got \[0, 3, 7\]"),
            (lambda: both(-1, 3, 6), r"offsets: got \[-1, 3, 6\]"),
        ],
    ),
    "fp8_grouped_gemm": (
        lambda: grouped(1, 3, 5),
        [(lambda: grouped(0, 7, 7), r"offsets: got \[0, 7, 7\]"), (lambda: grouped(3, 0, 6), "offsets: got")],
    ),
    "fp8_grouped_gemm_swiglu_quantize": (lambda: swiglu(0, 0, 6), [(lambda: swiglu(0, 4, 9), "offsets: got")]),
    "fp8_masked_gemm": (
        lambda: masked(0, 4),
        [
            (lambda: masked(5, 0), r"counts: got 5, wanted values in \[0, 5\)"),
            (lambda: masked(1, -2), "counts: got -2"),
        ],
    ),
    "fp8_grouped_wgrad": (
        lambda: wgrad(0, 128, 256),
        [
            (lambda: wgrad(0, 64, 256), r"offsets: got \[0, 64, 256\], wanted multiples of 128"),
            (lambda: wgrad(0, 128, 384), r"offsets: got \[0, 128, 384\], wanted non-decreasing"),
        ],
    ),
    "fp8_grouped_wgrad_accumulate": (
        lambda: wgrad(0, 128, 256, accumulate=True),
        [(lambda: wgrad(0, 256, 128, accumulate=True), "offsets: got")],
    ),
    "rope": (
        lambda: rope(0, 4),
        [
            (lambda: rope(0, 5), r"positions: got 5, wanted values in \[0, 5\)"),
            (lambda: rope(-1, 0), "positions: got -1"),
        ],
    ),
    "mla_prefill": (
        prefill,
        [
            (lambda: prefill(q=(0, 3, 2)), "cu_seqlens_q: got"),
            (lambda: prefill(k=(0, 3, 5)), r"cu_seqlens_k: got \[0, 3, 5\], wanted non-decreasing values in \[0, 4\]"),
        ],
    ),
    "mla_decode": (
        decode,
        [
            (lambda: decode(length=33), r"cache_seqlens: got 33, wanted values in \[0, 33\)"),
            (lambda: decode(length=-1), "cache_seqlens: got -1"),
            (lambda: decode(page=3), r"block_table: got 3, wanted values in \[0, 3\)"),
        ],
    ),
    "mla_cache_append": (
        lambda: append(-1, 31),
        [
            (lambda: append(0, 32), r"slots: got 32, wanted values in \[-1, 32\)"),
            (lambda: append(-2, 0), "slots: got -2"),
        ],
    ),
    "mla_prologue": (
        prologue,
        [(lambda: prologue(position=5), "positions: got 5"), (lambda: prologue(slot=32), "slots: got 32")],
    ),
    "mla_cache_gather": (
        gather,
        [
            (lambda: gather(bounds=(0, 3, 21)), "cu_seqlens: got 21"),
            (lambda: gather(bounds=(0, 20, 3)), "cu_seqlens, differences: got -17"),
            (lambda: gather(page=-1), "block_table: got -1"),
        ],
    ),
    "moe_permute": (
        lambda: permute(-1, 3),
        [(lambda: permute(0, 4), "experts: got 4"), (lambda: permute(-2, 0), "-2")],
    ),
    "moe_balance_loss": (
        balance,
        [(lambda: balance(expert=4), "experts: got 4"), (lambda: balance(sequence=1), "seq_ids: got 1")],
    ),
}


def test_every_op_with_index_tensors_is_here() -> None:
    assert set(CASES) == set(_values._CHECKS) and set(CASES) <= set(_library.OPS)


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("served_by", ["eager", pytest.param("sim", marks=needs_simulator)])
def test_wrong_values_are_refused_in_words(op: str, served_by: str) -> None:
    right, wrong = CASES[op]
    asked = contextlib.nullcontext() if served_by == "eager" else dk.check_values()
    with dk.backend(served_by), asked:
        right()
        for call, words in wrong:
            with pytest.raises(ValueError, match=f"^{op}: .*{words}"):
                call()


@needs_simulator
def test_kernels_do_not_look_unless_asked() -> None:
    with dk.backend("sim"), dk.check_values(), dk.check_values(False):
        append(0, 32)
        grouped(3, 0, 6)


def test_entries_that_nobody_uses_may_be_anything() -> None:
    decode(length=16, page=2147480000)
    gather(bounds=(0, 3, 5), page=-1)


@needs_simulator
def test_the_environment_asks_for_the_process() -> None:
    program = (
        "import torch, dsv3_kernels as dk\n"
        "with dk.backend('sim'):\n"
        "    dk.rope(torch.ones(1, 4), torch.tensor([5], dtype=torch.int32), torch.ones(5, 4))\n"
    )
    for value, refused in (("1", True), ("0", False)):
        run = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "DSV3_KERNELS_CHECK_VALUES": value},
            capture_output=True,
            text=True,
        )
        assert (run.returncode != 0) == refused
        assert not refused or "ValueError: rope: positions: got 5" in run.stderr


def test_a_capture_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its tensors are on the GPU; CPU tensors are read as ever, and nobody asks CUDA about them."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    rope(0, 1)
    args = torch.ones(2, 4), ints(0, 1), torch.ones(5, 4), True, False
    with pytest.raises(RuntimeError, match=r"^rope: check_values: reads the device, which the capture of a CUDA graph"):
        _values.check("rope", args, torch.device("cuda"))
