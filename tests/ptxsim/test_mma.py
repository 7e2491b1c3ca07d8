"""mma.sync against float64, its fragments placed as the PTX ISA draws them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from simulator import HEADER

RNG = np.random.default_rng(8)
DTYPES = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "tf32": torch.float32,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "s8": torch.int8,
    "u8": torch.uint8,
}
CASES = [("f32", k, a, a) for a, ks in {"bf16": (8, 16), "f16": (8, 16), "tf32": (4, 8)}.items() for k in ks]
CASES += [("f16", k, "f16", "f16") for k in (8, 16)]
CASES += [(d, 32, a, b) for d in ("f32", "f16") for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")]
CASES += [("s32", k, a, b) for k in (16, 32) for a in ("s8", "u8") for b in ("s8", "u8")]


def operand(kind: str, *shape: int) -> torch.Tensor:
    if kind in ("s8", "u8"):
        info = torch.iinfo(DTYPES[kind])
        return torch.from_numpy(RNG.integers(info.min, info.max + 1, shape)).to(DTYPES[kind])
    x = torch.from_numpy(RNG.standard_normal(shape, dtype=np.float32))
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32) if kind == "tf32" else x.to(DTYPES[kind])


def words(x: torch.Tensor) -> np.ndarray:
    """[rows, k] -> the 32-bit registers [rows, k * size / 4], elements of low k in the low bits."""
    return x.contiguous().view(torch.uint8).numpy().view(np.uint32)


def fragments(x: np.ndarray, rows: int) -> np.ndarray:
    """Lane l holds row l/4 (+8) and word l%4 (+4, +8 ...) of [rows, n] registers: rows first, then words."""
    steps = [(r, c) for c in range(0, max(4, x.shape[1]), 4) for r in range(0, rows, 8)]
    return np.array([[x[lane // 4 + r, lane % 4 + c] for r, c in steps] for lane in range(32)], np.uint32)


def mma(sim, d: str, k: int, a: str, b: str, modifier: str = "", c=None, operands=None):
    """D [16, 8] = A [16, k] * B [8, k]^T + C; returns it with A, B and C."""
    x, y = operands or (operand(a, 16, k), operand(b, 8, k))
    if c is None:
        c = (RNG.standard_normal((16, 8)) * 9).astype({"f32": np.float32, "f16": np.float16, "s32": np.int32}[d])
    fa, fb = fragments(words(x), 16), fragments(words(y), 8)
    # accumulators: a pair of columns per lane and half of the rows, two registers or one
    pairs = np.array([[c[i // 4 + r, i % 4 * 2 : i % 4 * 2 + 2] for r in (0, 8)] for i in range(32)])
    fc = np.ascontiguousarray(pairs).view(np.uint32).reshape(32, -1)
    counts = [f.shape[1] for f in (fa, fb, fc)]
    loads = "".join(
        f"ld.param.u64 %d0, [p{n}]; mad.wide.u32 %d0, %r0, {4 * m}, %d0;"
        + "".join(f"ld.global.b32 %{'abc'[n]}{i}, [%d0+{4 * i}];" for i in range(m))
        for n, m in enumerate(counts)
    )
    regs = ["{" + ", ".join(f"%{r}{i}" for i in range(m)) + "}" for r, m in zip("abc", counts, strict=True)]
    stores = "".join(f"st.global.b32 [%d0+{4 * i}], %c{i};" for i in range(counts[2]))
    sim.run(
        HEADER
        + ".visible .entry k(.param .u64 p0, .param .u64 p1, .param .u64 p2) { .reg .b32 %r<2>, %a<8>, %b<8>, %c<8>;"
        + f".reg .b64 %d<2>; mov.u32 %r0, %laneid; {loads}"
        + f"mma.sync.aligned.m16n8k{k}.row.col{modifier}.{d}.{a}.{b}.{d} "
        + f"{regs[2]}, {regs[0]}, {regs[1]}, {regs[2]};\n{stores} ret; }}",
        fa,
        fb,
        fc,
    )
    out = fc.view(c.dtype).reshape(32, 2, 2)
    got = np.zeros_like(c)
    for lane in range(32):
        for half in range(2):
            got[lane // 4 + 8 * half, lane % 4 * 2 : lane % 4 * 2 + 2] = out[lane, half]
    return got, x, y, c


def check_mma(sim, d: str, k: int, a: str, b: str, loose: float = 0.0) -> None:
    """`loose`: relative to the largest addend, what the sum may be off beside float32's rounding."""
    got, x, y, c = mma(sim, d, k, a, b)
    want = (x.double() @ y.double().T).numpy() + c
    if d == "s32":
        assert np.array_equal(got, want)
    else:
        addend = max(float(x.double().abs().max() * y.double().abs().max()), float(np.abs(c).max()))
        assert np.abs(got - want).max() <= {"f32": 1e-5, "f16": 2**-9}[d] * np.abs(want).max() + loose * addend


@pytest.mark.parametrize(("d", "k", "a", "b"), CASES)
def test_mma(sim, d, k, a, b):
    check_mma(sim, d, k, a, b)


def test_mma_saturates_when_told(sim):
    edges = RNG.choice(np.array([-(2**31), 2**31 - 1]), (16, 8)).astype(np.int32)
    for modifier in ("", ".satfinite"):
        got, x, y, c = mma(sim, "s32", 32, "s8", "s8", modifier, edges)
        want = (x.long() @ y.long().T).numpy() + c.astype(np.int64)
        assert (want > 2**31 - 1).any() and (want < -(2**31)).any()
        wrapped = np.clip(want, -(2**31), 2**31 - 1) if modifier else want.astype(np.int32)
        assert np.array_equal(got, wrapped)
