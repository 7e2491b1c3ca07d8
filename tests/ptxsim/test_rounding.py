"""How tensor cores add under `rounding=hardware`: bit for bit what H100 and H200 answered, and at the edges."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_hopper import wgmma_product
from test_mma import DTYPES, mma

PUBLISHED = json.loads(Path(__file__).with_name("hardware").joinpath("published/rounding.json").read_text())["cases"]
ALIGN = {"bf16": 25, "f16": 25, "tf32": 25, "e4m3": 13, "e5m2": 13}  # bits of wgmma; mma.sync shares all but fp8's
K = {"bf16": 16, "f16": 16, "tf32": 8, "e4m3": 32, "e5m2": 32}


def values(text: str | list[str], dtype: torch.dtype) -> torch.Tensor:
    """Numbers from their bits in hexadecimal, rows from a list."""
    raw = np.frombuffer(bytes.fromhex("".join(text)), f">u{dtype.itemsize}").astype(f"<u{dtype.itemsize}")
    return (
        torch.from_numpy(raw.view(np.uint8).copy())
        .view(dtype)
        .reshape(*([len(text), -1] if type(text) is list else [-1]))
    )


def dots(sim, instruction: str, kind: str, a: torch.Tensor, b: torch.Tensor, c: np.ndarray) -> np.ndarray:
    """c[i] + a[i] . b[i], as diagonals of products; what is left of K is zero. c is float32 or float16."""
    half, k, (n, depth) = c.dtype == np.float16, K[kind], a.shape
    rows, columns = (64, 64) if instruction == "wgmma" else (16, 8)
    out = np.empty_like(c)
    for first in range(0, n, columns):
        at = np.arange(min(columns, n - first))
        x, y = torch.zeros(rows, k), torch.zeros(columns, k)
        x[at, :depth], y[at, :depth] = a[first:][: len(at)].float(), b[first:][: len(at)].float()
        x, y = x.to(DTYPES[kind]), y.to(DTYPES[kind])
        z = np.zeros((rows, columns), c.dtype)
        z[at, at] = c[first:][: len(at)]
        if instruction == "wgmma":
            d = wgmma_product(sim, kind, x, y, c=z, accumulate=True, half=half)
        else:
            d, *_ = mma(sim, "f16" if half else "f32", k, kind, kind, c=z, operands=(x, y))
        out[first:][: len(at)] = d[at, at]
    return out


def case(row: dict) -> str:
    return f"{row['gpu']}-{row['instruction']}-{row['d']}-{row['type']}"


@pytest.mark.parametrize("row", PUBLISHED, ids=case)
def test_bits_of_hardware(sim, row):
    dtype = DTYPES[row["type"]]
    accumulator = torch.float16 if row["d"] == "f16" else torch.float32
    a, b = values(row["a"], dtype), values(row["b"], dtype)
    c, answer = values(row["c"], accumulator).numpy(), values(row["answer"], accumulator).numpy()
    assert a.shape == b.shape == (12, a.shape[1]) and c.shape == answer.shape == (12,)

    def wrong(rounding: str, instruction: str) -> int:
        sim.option(rounding=rounding)
        got = dots(sim, instruction, row["type"], a, b, c)
        return int((got.view(np.uint8) != answer.view(np.uint8)).reshape(12, -1).any(1).sum())

    assert wrong("hardware", row["instruction"]) == 0
    fp8 = row["type"] in ("e4m3", "e5m2")
    if not fp8:  # the two instructions share the tensor core
        assert wrong("hardware", "wgmma") == 0
    if row["d"] == "f32":  # these rows tell it from other ways of adding
        assert wrong("float32", row["instruction"]) > 6
    if fp8:  # and fp8's two instructions from each other
        assert wrong("hardware", "mma.sync" if row["instruction"] == "wgmma" else "wgmma") > 2


def rows(*lists: list[float], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(lists, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    ("instruction", "kind"),
    [("wgmma", kind) for kind in ALIGN] + [("mma.sync", kind) for kind in ("bf16", "f16", "tf32")],
)
def test_what_is_cut_off(sim, instruction, kind):
    """Beside a product of 1 that another takes away again, so that the sum's own mantissa does not matter."""
    align = ALIGN[kind]
    sim.option(rounding="hardware")
    half = -(-align // 2)  # 2^-align as a product of two numbers
    dtype = DTYPES[kind]
    ulp = [2.0**-half, 2.0 ** (half - align)]

    def dot(x: list[float], y: list[float], c: float = 0.0) -> float:
        got = dots(sim, instruction, kind, rows(x, dtype=dtype), rows(y, dtype=dtype), np.float32([c]))
        return float(got[0]) * 2.0**align

    one, other = [1, -1], [1, 1]
    for sign in (1, -1):
        for size, kept in ((1, 1), (1.5, 1), (1.75, 1), (2, 2), (0.5, 0), (0.75, 0)):  # toward zero
            assert dot([*one, sign * size * ulp[0]], [*other, ulp[1]]) == sign * kept, (sign, size)
            assert dot(one, other, sign * size * 2.0**-align) == sign * kept, (sign, size)
    # 1.5 * 1.5 counts as 1, its factors' exponents; 1.5 * 2 as 2; and C among the rest.
    assert dot([1.5, -1.5, ulp[0]], [1.5, 1.5, ulp[1]]) == 1
    assert dot([1.5, -1.5, ulp[0]], [2, 2, ulp[1]]) == 0
    assert dot([-1, ulp[0]], [1, ulp[1]], 1.0) == 1
    assert dot([-1.5, ulp[0]], [2, ulp[1]], 3.0) == 0


@pytest.mark.parametrize(("kind", "bits"), [("bf16", 23), ("e4m3", 13)])
def test_the_sum_is_cut_off_too(sim, kind, bits):
    sim.option(rounding="hardware")
    dtype = DTYPES[kind]
    for sign in (1, -1):
        x, y = [sign, sign, sign * 2.0**-7, sign * 2.0**-7], [1, 1, 2.0 ** (7 - bits), 2.0 ** (6 - bits)]
        got = dots(sim, "wgmma", kind, rows(x, dtype=dtype), rows(y, dtype=dtype), np.float32([0]))
        assert got[0] == sign * 2  # 2 + 1.5 ulp/2, of which 1/2 ulp is lost before and 1/2 after
        x[3] = x[2]
        y[3] = y[2]
        got = dots(sim, "wgmma", kind, rows(x, dtype=dtype), rows(y, dtype=dtype), np.float32([0]))
        assert got[0] == sign * (2 + 2.0 ** (1 - bits))


def test_float16_accumulators_round_to_nearest_even(sim):
    sim.option(rounding="hardware")
    for tail, answer in ((0.5, 0), (0.75, 1), (1.5, 2), (1, 1)):
        x, y = [1, tail * 2.0**-5], [1, 2.0**-5]
        got = dots(sim, "wgmma", "f16", rows(x, dtype=torch.float16), rows(y, dtype=torch.float16), np.float16([0]))
        assert (float(got[0]) - 1) * 2**10 == answer, tail


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_fp8_without_wgmma(sim, kind):
    """mma.sync takes elements 0 and 1 of every four first, without C, and rounds when it adds C to nearest."""
    sim.option(rounding="hardware")
    dtype = DTYPES[kind]

    def dot(c: float, **at: float) -> float:
        x, y = torch.zeros(1, 32), torch.ones(1, 32)
        for name, value in at.items():
            x[0, int(name[1:])] = value
        y[0, 31] = 2.0**-6
        return float(dots(sim, "mma.sync", kind, x.to(dtype), y.to(dtype), np.float32([c]))[0])

    tiny = 2.0**-6  # times y[31] 2^-12
    assert dot(0.0, k2=1, k6=-1, k31=tiny) == 2.0**-12  # one product: nothing is lost below 2^-25
    assert dot(2.0**24 + 2, k0=1) == 2.0**24 + 4  # to nearest even
    assert dot(2.0**25, k0=1, k31=tiny) == 2.0**25


def test_infinities_subnormals_and_zeros(sim):
    sim.option(rounding="hardware")
    inf, nan = float("inf"), float("nan")
    for x, y, c, answer in (
        ([inf, 1], [1, 1], 0.0, inf),
        ([inf, -inf], [1, 1], 0.0, nan),
        ([inf, 1], [0, 1], 0.0, nan),
        ([nan, 1], [1, 1], 0.0, nan),
        ([1, 1], [1, 1], -inf, -inf),
        ([1, 1], [1, 1], nan, nan),
        ([2.0**127, 2.0**127], [2, 2], 0.0, inf),
        ([2.0**-127, 0], [2.0**-22, 0], 0.0, 2.0**-149),
        ([1.5 * 2.0**-127, 0], [2.0**-22, 0], 0.0, 2.0**-149),
        ([0, 0], [0, 0], 0.0, 0.0),
        ([-1, 1], [1, 1], -0.0, 0.0),
        ([0, 0], [-1, -1], -0.0, 0.0),
    ):
        kind = [rows(v, dtype=torch.bfloat16) for v in (x, y)]
        got = dots(sim, "wgmma", "bf16", *kind, np.float32([c]))
        assert np.array_equal(got, np.float32([answer]), equal_nan=True), (x, y, c)
        assert np.signbit(got[0]) == (answer == -inf) or np.isnan(answer), (x, y, c)
