# ruff: noqa: E501 - PTX reads better unbroken
"""Each lane-wise instruction against numpy, from the PTX ISA's text: edge values and random bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from simulator import SimError

RNG = np.random.default_rng(1)
REG = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}


def run(sim, text: str, *inputs: np.ndarray, out: type) -> np.ndarray:
    """Applies `text` to every element: {a}, {b}, {c} are registers of the inputs' sizes, {d} of the output's."""
    n = len(inputs[0])
    result = np.zeros(n, out)
    names = "abc"[: len(inputs)]
    sizes = dict(zip(names, (x.itemsize for x in inputs), strict=True)) | {"d": result.itemsize}
    body = [
        ".visible .entry k(" + ", ".join(f".param .u64 p{i}" for i in range(len(inputs) + 1)) + ", .param .u32 n) {",
        ".reg .pred %p, %q; .reg .b32 %i, %n, %t<3>; .reg .b64 %x<4>, %y;",
        *(f".reg .{REG[s]} %{r};" for r, s in sizes.items()),
        "mov.u32 %t0, %ctaid.x; mov.u32 %t1, %ntid.x; mov.u32 %t2, %tid.x; mad.lo.s32 %i, %t0, %t1, %t2;",
        "ld.param.u32 %n, [n]; setp.ge.u32 %p, %i, %n; @%p bra END;",
    ]
    for j, r in enumerate([*names, "d"]):
        body += [f"ld.param.u64 %x{j}, [p{j}]; mul.wide.u32 %y, %i, {sizes[r]}; add.s64 %x{j}, %x{j}, %y;"]
        if r != "d":
            body += [f"ld.global.{'u8' if sizes[r] == 1 else REG[sizes[r]]} %{r}, [%x{j}];"]
    body += [
        text.format(**{r: "%" + r for r in sizes}),
        f"st.global.{'u8' if result.itemsize == 1 else REG[result.itemsize]} [%x{len(inputs)}], %d;",
        "END: ret; }",
    ]
    sim.run("\n".join(body), *inputs, result, n, grid=-(-n // 256), block=256)
    return result


def ints(dtype, n=512):
    info = np.iinfo(dtype)
    edges = np.array([0, 1, 2, 31, 32, 33, info.max, info.min, info.max - 1, info.min + 1], dtype)
    return np.concatenate(
        [edges, RNG.permutation(edges), RNG.integers(info.min, info.max, n - 20, dtype, endpoint=True)]
    )


def floats(n=1024, dtype=np.float32):
    edges = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        math.inf,
        -math.inf,
        math.nan,
        1e-40,
        -1e-40,
        1.17549435e-38,
        3.4028235e38,
        0.1,
        448.0,
        464.0,
        57344.0,
        65504.0,
        65520.0,
    ]
    values = np.array(edges + edges[::-1], np.float64)
    random = RNG.standard_normal(n - len(values)) * 10.0 ** RNG.integers(-12, 12, n - len(values))
    with np.errstate(over="ignore"):
        return np.concatenate([values, random]).astype(dtype)


def same_floats(got: np.ndarray, want: np.ndarray):
    """Bit for bit, where any NaN of ours is the canonical one."""
    u = {2: np.uint16, 4: np.uint32, 8: np.uint64}[got.itemsize]
    nan = np.isnan(want)
    assert np.array_equal(np.isnan(got), nan)
    bad = (got.view(u) != want.view(u)) & ~nan
    assert not bad.any(), (np.nonzero(bad)[0][:5], got[bad][:5], want[bad][:5])
    if got.dtype == np.float32:
        assert np.all(got.view(u)[nan] == 0x7FFFFFFF)


WIDE = {np.int16: np.int32, np.uint16: np.uint32, np.int32: np.int64, np.uint32: np.uint64}
LETTER = {np.int16: "s16", np.uint16: "u16", np.int32: "s32", np.uint32: "u32", np.int64: "s64", np.uint64: "u64"}


@pytest.mark.parametrize("dtype", LETTER, ids=LETTER.values())
def test_integer_arithmetic(sim, dtype):
    t, bits = LETTER[dtype], 8 * np.dtype(dtype).itemsize
    a, b, c = ints(dtype), RNG.permutation(ints(dtype)), RNG.permutation(ints(dtype))
    A, B, C = (x.astype(object) for x in (a, b, c))

    def wrap(values, width=bits):
        return np.array([int(v) & (1 << width) - 1 for v in values], object)

    def check(text, want, *inputs, out=dtype):
        width = 8 * np.dtype(out).itemsize
        got = run(sim, text, *inputs, out=out)
        assert np.array_equal(wrap(got.astype(object), width), wrap(want, width)), text

    check(f"add.{t} {{d}}, {{a}}, {{b}};", A + B, a, b)
    check(f"sub.{t} {{d}}, {{a}}, {{b}};", A - B, a, b)
    check(f"mul.lo.{t} {{d}}, {{a}}, {{b}};", A * B, a, b)
    check(f"mul.hi.{t} {{d}}, {{a}}, {{b}};", [x >> bits for x in A * B], a, b)
    check(f"mad.lo.{t} {{d}}, {{a}}, {{b}}, {{c}};", A * B + C, a, b, c)
    check(f"min.{t} {{d}}, {{a}}, {{b}};", np.minimum(a, b), a, b)
    check(f"max.{t} {{d}}, {{a}}, {{b}};", np.maximum(a, b), a, b)
    check(f"sad.{t} {{d}}, {{a}}, {{b}}, {{c}};", abs(A - B) + C, a, b, c)
    nz = np.where(b == 0, dtype(3), b)
    check(
        f"div.{t} {{d}}, {{a}}, {{b}};",
        [abs(int(x)) // abs(int(y)) * (1 if (x < 0) == (y < 0) else -1) for x, y in zip(A, nz, strict=True)],
        a,
        nz,
    )
    check(
        f"rem.{t} {{d}}, {{a}}, {{b}};",
        [
            math.copysign(1, int(x)) * 0 + (abs(int(x)) % abs(int(y))) * (-1 if x < 0 else 1)
            if bits < 50
            else (abs(int(x)) % abs(int(y))) * (-1 if x < 0 else 1)
            for x, y in zip(A, nz, strict=True)
        ],
        a,
        nz,
    )
    shifts = RNG.integers(0, bits + 8, len(a)).astype(np.uint32)
    kind = f"b{bits}"
    check(f"shl.{kind} {{d}}, {{a}}, {{b}};", [int(x) << int(n) for x, n in zip(A, shifts, strict=True)], a, shifts)
    check(f"shr.{t} {{d}}, {{a}}, {{b}};", [int(x) >> int(n) for x, n in zip(A, shifts, strict=True)], a, shifts)
    if dtype in WIDE:
        check(f"mul.wide.{t} {{d}}, {{a}}, {{b}};", A * B, a, b, out=WIDE[dtype])
    if bits >= 32:
        u = wrap(A)
        check(f"popc.{kind} {{d}}, {{a}};", [bin(x).count("1") for x in u], a, out=np.uint32)
        check(f"clz.{kind} {{d}}, {{a}};", [bits - int(x).bit_length() for x in u], a, out=np.uint32)
        check(f"brev.{kind} {{d}}, {{a}};", [int(f"{x:0{bits}b}"[::-1], 2) for x in u], a)
        magnitude = [x if x >= 0 else ~x for x in A] if t[0] == "s" else u
        check(f"bfind.{t} {{d}}, {{a}};", [int(x).bit_length() - 1 for x in magnitude], a, out=np.uint32)
        check(
            f"bfind.shiftamt.{t} {{d}}, {{a}};",
            [bits - int(x).bit_length() if x else -1 for x in magnitude],
            a,
            out=np.uint32,
        )
        pos, length = (
            RNG.integers(0, bits + 4, len(a)).astype(np.uint32),
            RNG.integers(0, bits + 4, len(a)).astype(np.uint32),
        )

        def bfe(x, p, n):  # bit by bit, as the ISA writes it
            sign = 0 if t[0] == "u" or n == 0 else x >> min(p + n - 1, bits - 1) & 1
            return sum(((x >> (p + i) & 1) if i < n and p + i < bits else sign) << i for i in range(bits))

        check(
            f"bfe.{t} {{d}}, {{a}}, {{b}}, {{c}};",
            [bfe(int(x), int(p), int(n)) for x, p, n in zip(u, pos, length, strict=True)],
            a,
            pos,
            length,
        )

        def bfi(x, y, p, n):
            for i in range(n):
                if p + i < bits:
                    y = y & ~(1 << p + i) | (x >> i & 1) << p + i
            return y

        for p, n in ((0, bits), (5, 9), (bits - 3, 8), (bits + 2, 3), (7, 0)):
            check(
                f"bfi.{kind} {{d}}, {{a}}, {{b}}, {p}, {n};",
                [bfi(int(x), int(y), p, n) for x, y in zip(u, wrap(B), strict=True)],
                a,
                b,
            )


def test_carry_chains(sim):
    a, b, c = ints(np.uint64), RNG.permutation(ints(np.uint64)), RNG.permutation(ints(np.uint64))
    split = ".reg .b32 %l<3>, %h<3>; mov.b64 {{%l0, %h0}}, {a}; mov.b64 {{%l1, %h1}}, {b};"
    got = run(
        sim, split + "add.cc.u32 %l2, %l0, %l1; addc.u32 %h2, %h0, %h1; mov.b64 {d}, {{%l2, %h2}};", a, b, out=np.uint64
    )
    assert np.array_equal(got, a + b)
    got = run(
        sim, split + "sub.cc.u32 %l2, %l0, %l1; subc.u32 %h2, %h0, %h1; mov.b64 {d}, {{%l2, %h2}};", a, b, out=np.uint64
    )
    assert np.array_equal(got, a - b)
    text = split + "mad.lo.cc.u32 %l2, %l0, %l1, 7; madc.hi.u32 %h2, %l0, %l1, 9; mov.b64 {d}, {{%l2, %h2}};"
    low = np.uint64(0xFFFFFFFF)
    assert np.array_equal(run(sim, text, a, b, out=np.uint64), (a & low) * (b & low) + np.uint64(7 + (9 << 32)))
    del c


def test_bit_manipulation(sim):
    a, b, c = ints(np.uint32), RNG.permutation(ints(np.uint32)), RNG.permutation(ints(np.uint32))
    for lut in (0x96, 0xE8, 0x1B, 0xFE):
        want = np.zeros_like(a)
        for i in range(8):
            if lut >> i & 1:
                want |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        assert np.array_equal(run(sim, f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {lut};", a, b, c, out=np.uint32), want)

    def prmt(x, y, s):
        v = [(int(x) | int(y) << 32) >> 8 * i & 255 for i in range(8)]
        out = 0
        for i in range(4):
            k = s >> 4 * i & 15
            byte = v[k & 7]
            out |= ((255 if byte & 128 else 0) if k & 8 else byte) << 8 * i
        return out

    for s in (0x5410, 0x7632, 0x3210, 0x0123, 0xBA98, 0xC0F7):
        want = np.array([prmt(x, y, s) for x, y in zip(a, b, strict=True)], np.uint32)
        assert np.array_equal(run(sim, f"prmt.b32 {{d}}, {{a}}, {{b}}, {s};", a, b, out=np.uint32), want)
    # LLVM's way to say "any byte": a register that nothing writes, and whose byte another prmt drops.
    text = "{{ .reg .b32 %u, %v; prmt.b32 %v, {a}, %u, 0x3340; prmt.b32 {d}, %v, {a}, 0x7650; }}"
    assert np.array_equal(run(sim, text, a, out=np.uint32), a & 0xFFFFFF00 | a & 0xFF)
    wide = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    n = (c % 40).astype(np.uint32)
    for mode, m in (("wrap", n & 31), ("clamp", np.minimum(n, 32))):
        m = m.astype(np.uint64)
        assert np.array_equal(
            run(sim, f"shf.r.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}};", a, b, n, out=np.uint32),
            (wide >> m).astype(np.uint32),
        )
        left = np.array([((int(w) << int(k)) >> 32) & 0xFFFFFFFF for w, k in zip(wide, m, strict=True)], np.uint32)
        assert np.array_equal(run(sim, f"shf.l.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}};", a, b, n, out=np.uint32), left)
    four = lambda x, t: x.view(t).reshape(-1, 4).astype(np.int64)  # noqa: E731
    want = (four(a, np.int8) * four(b, np.int8)).sum(1) + c.view(np.int32)
    assert np.array_equal(
        run(sim, "dp4a.s32.s32 {d}, {a}, {b}, {c};", a, b, c, out=np.int32), want.astype(np.int64).astype(np.int32)
    )


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
def test_logic(sim, dtype):
    a, b = ints(dtype), RNG.permutation(ints(dtype))
    bits = 8 * np.dtype(dtype).itemsize
    for op, want in {"and": a & b, "or": a | b, "xor": a ^ b}.items():
        assert np.array_equal(run(sim, f"{op}.b{bits} {{d}}, {{a}}, {{b}};", a, b, out=dtype), want), op
    assert np.array_equal(run(sim, f"not.b{bits} {{d}}, {{a}};", a, out=dtype), ~a)
    assert np.array_equal(run(sim, f"cnot.b{bits} {{d}}, {{a}};", a, out=dtype), (a == 0).astype(dtype))


def test_conversions_between_float32_and_float64(sim):
    x = floats()
    same_floats(run(sim, "cvt.f64.f32 {d}, {a};", x, out=np.float64), x.astype(np.float64))
    y = floats(dtype=np.float64)
    with np.errstate(over="ignore"):
        same_floats(run(sim, "cvt.rn.f32.f64 {d}, {a};", y, out=np.float32), y.astype(np.float32))


def fused(x, y, z):
    """x y + z, rounded once: the product is exact in long double, and what the sum loses there decides a tie."""
    product = x.astype(np.longdouble) * y
    total = product + z
    back = total - product
    lost = (product - (total - back)) + (z - back)
    near = total.astype(np.float32)
    other = np.nextafter(near, np.where(total > near, np.inf, -np.inf).astype(np.float32))
    decides = (total - near == other - total) & (total != near) & (lost != 0)
    return np.where(decides & ((lost > 0) == (other > near)), other, near)


@pytest.mark.parametrize("ftz", ["", ".ftz"])
def test_float32_arithmetic(sim, ftz):
    a, b, c = floats(), RNG.permutation(floats()), RNG.permutation(floats())

    def flush(x):
        return np.where(np.abs(x) < np.float32(2**-126), np.copysign(np.float32(0), x), x) if ftz else x

    x, y, z = flush(a), flush(b), flush(c)
    with np.errstate(all="ignore"):
        for op, want in (("add", x + y), ("sub", x - y), ("mul", x * y), ("div.rn", x / y)):
            same_floats(run(sim, f"{op}{ftz}.f32 {{d}}, {{a}}, {{b}};", a, b, out=np.float32), flush(want))
        same_floats(run(sim, f"sqrt.rn{ftz}.f32 {{d}}, {{a}};", a, out=np.float32), flush(np.sqrt(x)))
        for op, pick in (("min", np.fmin), ("max", np.fmax)):
            got = run(sim, f"{op}{ftz}.f32 {{d}}, {{a}}, {{b}};", a, b, out=np.float32)
            tie = (x == 0) & (y == 0)
            same_floats(got[~tie], pick(x, y)[~tie])
            sign = np.signbit(x) | np.signbit(y) if op == "min" else np.signbit(x) & np.signbit(y)
            assert np.array_equal(np.signbit(got[tie]), sign[tie])
            got = run(sim, f"{op}{ftz}.NaN.f32 {{d}}, {{a}}, {{b}};", a, b, out=np.float32)
            assert np.array_equal(np.isnan(got), np.isnan(x) | np.isnan(y))
        got = run(sim, f"fma.rn{ftz}.f32 {{d}}, {{a}}, {{b}}, {{c}};", a, b, c, out=np.float32)
        same_floats(got, flush(fused(x, y, z)))
        saturated = run(sim, f"add{ftz}.sat.f32 {{d}}, {{a}}, {{b}};", a, b, out=np.float32)
        assert np.array_equal(saturated, np.nan_to_num(np.clip(x + y, 0, 1), nan=0))


@pytest.mark.parametrize(("mode", "toward"), [("rz", 0), ("rm", -math.inf), ("rp", math.inf)])
def test_float32_directed_rounding(sim, mode, toward):
    # close enough in size for long double's 64 bits to hold the sum
    a, b = (x[np.isfinite(x) & (np.abs(x) < 1e4) & (np.abs(x) > 1e-4)] for x in (floats(), RNG.permutation(floats())))
    n = min(len(a), len(b))
    a, b = a[:n], b[:n]
    for op, exact in (("add", a.astype(np.longdouble) + b), ("mul", a.astype(np.longdouble) * b)):
        near = exact.astype(np.float32)
        target = np.where(exact > 0, -math.inf, math.inf) if toward == 0 else np.full(n, toward)
        overshoot = (
            (near > exact)
            if toward == -math.inf
            else (near < exact)
            if toward == math.inf
            else (np.abs(near.astype(np.longdouble)) > np.abs(exact))
        )
        want = np.where(overshoot, np.nextafter(near, target.astype(np.float32)), near)
        same_floats(run(sim, f"{op}.{mode}.f32 {{d}}, {{a}}, {{b}};", a, b, out=np.float32), want)


def test_float64(sim):
    a, b = floats(dtype=np.float64), RNG.permutation(floats(dtype=np.float64))
    with np.errstate(all="ignore"):
        for op, want in (("add", a + b), ("sub", a - b), ("mul", a * b), ("div.rn", a / b)):
            same_floats(run(sim, f"{op}.f64 {{d}}, {{a}}, {{b}};", a, b, out=np.float64), want)
        same_floats(run(sim, "sqrt.rn.f64 {d}, {a};", a, out=np.float64), np.sqrt(a))


def test_approximations(sim):
    x = np.concatenate([RNG.uniform(0.01, 100, 500), RNG.uniform(-3, 3, 500)]).astype(np.float32)
    positive = np.abs(x)
    for op, inputs, want in (
        ("ex2.approx.ftz", x % 20, np.exp2), ("lg2.approx", positive, np.log2), ("rcp.approx.ftz", x, np.reciprocal),
        ("rsqrt.approx", positive, lambda v: 1 / np.sqrt(v)), ("sqrt.approx", positive, np.sqrt), ("sin.approx", x % 3, np.sin),
        ("cos.approx", x % 3, np.cos), ("tanh.approx", x % 3, np.tanh),
    ):  # fmt: skip
        inputs = inputs.astype(np.float32)
        got = run(sim, f"{op}.f32 {{d}}, {{a}};", inputs, out=np.float32)
        np.testing.assert_allclose(got, want(inputs.astype(np.float64)), rtol=2e-7, atol=2e-8, err_msg=op)


def test_approximations_err_when_told(sim):
    """Inside the ISA's bounds, some of them, differently for every seed and always the same; what is exact stays so."""
    x = np.concatenate([RNG.uniform(0.01, 100, 500), RNG.uniform(-3, 3, 500)]).astype(np.float32)
    y = RNG.permutation(x)
    positive = np.abs(x)
    for op, a, want, bound in (
        ("ex2.approx.ftz", x % 20, np.exp2(x.astype(np.float64) % 20), 2**-22),
        ("lg2.approx", positive, np.log2(positive, dtype=np.float64), 2**-22),
        ("rcp.approx.ftz", x, 1 / x.astype(np.float64), 2**-23),
        ("rsqrt.approx", positive, 1 / np.sqrt(positive, dtype=np.float64), 2**-22.9),
        ("sqrt.approx", positive, np.sqrt(positive, dtype=np.float64), 2**-23),
        ("sin.approx", x, np.sin(x, dtype=np.float64), 2**-23),
        ("tanh.approx", x, np.tanh(x, dtype=np.float64), 2**-11),
        ("div.approx", x, x.astype(np.float64) / y, 2**-22),
        ("div.full.ftz", x, x.astype(np.float64) / y, 2**-22),
    ):
        want = np.exp2(a.astype(np.float64)) if op.startswith("ex2") else want
        inputs = [a.astype(np.float32), *([y] if op.startswith("div") else [])]
        results = []
        for seed in (0, 1, 1, 2):
            sim.option(approximate=seed)
            text = f"{op}.f32 {{d}}, {{a}}{', {b}' if len(inputs) > 1 else ''};"
            results.append(run(sim, text, *inputs, out=np.float32))
            assert np.abs(results[-1] / want - 1).max() <= bound, op
        exact, first, again, second = results
        assert np.array_equal(first, again)
        assert 100 < (first != exact).sum() < 1000 > (first != second).sum() > 100, op
    powers = np.exp2(np.arange(-20, 20)).astype(np.float32)
    assert np.array_equal(run(sim, "rcp.approx.ftz.f32 {d}, {a};", powers, out=np.float32), 1 / powers)
    assert np.array_equal(run(sim, "div.rn.f32 {d}, {a}, {b};", x, y, out=np.float32), x / y)
    with pytest.raises(SimError, match="not supported"):  # there is none
        run(sim, "div.approx.f64 {d}, {a}, {b};", x.astype(np.float64), y.astype(np.float64), out=np.float64)


ALL16 = np.arange(65536, dtype=np.uint16)
HALF = {"f16": (torch.float16, np.float16), "bf16": (torch.bfloat16, None)}


def as_torch(bits: np.ndarray, dtype) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int16).copy()).view(dtype)


@pytest.mark.parametrize("kind", HALF)
def test_half_arithmetic(sim, kind):
    dtype = HALF[kind][0]
    a = RNG.permutation(ALL16)[:8192]
    b = RNG.permutation(ALL16)[:8192]
    x, y = as_torch(a, dtype).double(), as_torch(b, dtype).double()

    def check(text, want: torch.Tensor, *inputs):
        got = as_torch(run(sim, text, *inputs, out=np.uint16), dtype)
        want = want.to(dtype)
        nan = want.isnan()
        assert torch.equal(got.isnan(), nan), text
        assert torch.equal(got[~nan].view(torch.int16), want[~nan].view(torch.int16)), text

    check(f"add.{kind} {{d}}, {{a}}, {{b}};", x + y, a, b)
    check(f"sub.{kind} {{d}}, {{a}}, {{b}};", x - y, a, b)
    check(f"mul.{kind} {{d}}, {{a}}, {{b}};", x * y, a, b)
    near = (
        (np.abs(x.numpy()) < 2**5) & (np.abs(x.numpy()) > 2**-5),
        (np.abs(y.numpy()) < 2**9) & (np.abs(y.numpy()) > 2**-9),
    )
    n = min(near[0].sum(), near[1].sum())  # the exact result fits a float32
    p, q = a[near[0]][:n], b[near[1]][:n]
    u, v = as_torch(p, dtype).double(), as_torch(q, dtype).double()
    check(f"fma.rn.{kind} {{d}}, {{a}}, {{a}}, {{b}};", u * u + v, p, q)
    check(f"fma.rn.relu.{kind} {{d}}, {{a}}, {{a}}, {{b}};", (u * u + v).relu(), p, q)
    check(f"neg.{kind} {{d}}, {{a}};", -x, a)
    check(f"abs.{kind} {{d}}, {{a}};", x.abs(), a)


@pytest.mark.parametrize("kind", HALF)
def test_half_min_max(sim, kind):
    infinity, sign = {"f16": 0x7C00, "bf16": 0x7F80}[kind], 0x8000
    codes = [0, 1, infinity >> 1, infinity - 1, infinity, infinity + 1, 0x7FFF]
    codes = np.array([*codes, *(c | sign for c in codes), *RNG.integers(0, 1 << 16, 20)], np.uint16)
    a, b = (x.ravel().copy() for x in np.meshgrid(codes, codes))

    def rank(c: int) -> int:  # -0 is below +0
        return -1 - (c & 0x7FFF) if c & sign else c

    def choose(x: int, y: int, of, nan: bool, relu: bool) -> int:
        numbers = [c for c in (int(x), int(y)) if c & 0x7FFF <= infinity]
        if len(numbers) == 0 or (nan and len(numbers) == 1):
            return 0x7FFF
        chosen = of(numbers, key=rank)
        return 0 if relu and chosen & sign else chosen

    for name, of in (("min", min), ("max", max)):
        for modifier in ("", ".NaN", ".relu", ".relu.NaN"):
            want = [choose(x, y, of, "NaN" in modifier, "relu" in modifier) for x, y in zip(a, b, strict=True)]
            got = run(sim, f"{name}{modifier}.{kind} {{d}}, {{a}}, {{b}};", a, b, out=np.uint16)
            assert got.tolist() == want, (name, modifier)


@pytest.mark.parametrize(("name", "exact"), [("ex2.approx", torch.exp2), ("tanh.approx", torch.tanh)])
@pytest.mark.parametrize("kind", HALF)
def test_half_functions(sim, kind, name, exact):
    dtype = HALF[kind][0]
    info = torch.finfo(dtype)
    flush = ".ftz" if (name, kind) == ("ex2.approx", "bf16") else ""
    got = as_torch(run(sim, f"{name}{flush}.{kind} {{d}}, {{a}};", ALL16, out=np.uint16), dtype).double()
    x = as_torch(ALL16, dtype).double()
    want = exact(x)
    if flush:
        want = torch.where(want < info.smallest_normal, 0, want)
    assert torch.equal(got.isnan(), x.isnan())
    finite = want.abs() <= info.max
    error = (got - want).abs()[finite]
    assert bool((error <= info.eps / 2 * (want.abs()[finite] + info.smallest_normal)).all())
    assert bool((got[want > info.max] >= info.max).all())


def test_packed_half_arithmetic(sim):
    a, b = RNG.permutation(ALL16), RNG.permutation(ALL16)
    for kind, (dtype, _) in HALF.items():
        packed = run(sim, f"add.{kind}x2 {{d}}, {{a}}, {{b}};", a.view(np.uint32), b.view(np.uint32), out=np.uint32)
        single = run(sim, f"add.{kind} {{d}}, {{a}}, {{b}};", a, b, out=np.uint16)
        assert np.array_equal(packed.view(np.uint16), single)
        assert dtype


@pytest.mark.parametrize("kind", HALF)
def test_half_to_float_all_codes(sim, kind):
    got = run(sim, f"cvt.f32.{kind} {{d}}, {{a}};", ALL16, out=np.float32)
    want = as_torch(ALL16, HALF[kind][0]).float().numpy()
    assert np.array_equal(np.isnan(got), np.isnan(want)) and np.array_equal(
        got[~np.isnan(got)].view(np.uint32), want[~np.isnan(want)].view(np.uint32)
    )


def dense(dtype: torch.dtype) -> np.ndarray:
    """Every value of the narrow type, every midpoint of neighbours, and one float32 step on either side of both."""
    if dtype.itemsize == 1:
        codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    else:
        codes = torch.arange(0, 65536, 7).to(torch.uint16).view(dtype)
    values = codes.float()
    values = values[values.isfinite()].unique()
    points = torch.cat([values, (values[1:].double() + values[:-1].double()).div(2).float()])
    steps = [torch.nextafter(points, torch.tensor(s * math.inf)) for s in (-1, 1)]
    return torch.cat([points, *steps, torch.from_numpy(floats())]).numpy()


@pytest.mark.parametrize("kind", HALF)
@pytest.mark.parametrize("packed", [False, True])
def test_float_to_half(sim, kind, packed):
    dtype = HALF[kind][0]
    a = dense(dtype)
    want = torch.from_numpy(a).to(dtype)
    if packed:
        b = np.roll(a, 1)
        both = run(sim, f"cvt.rn.{kind}x2.f32 {{d}}, {{a}}, {{b}};", a, b, out=np.uint32)
        got = as_torch((both >> 16).astype(np.uint16), dtype)
        assert np.array_equal((both & 0xFFFF).astype(np.uint16), np.roll((both >> 16).astype(np.uint16), 1))
    else:
        got = as_torch(run(sim, f"cvt.rn.{kind}.f32 {{d}}, {{a}};", a, out=np.uint16), dtype)
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan) and torch.equal(got[~nan].view(torch.int16), want[~nan].view(torch.int16))


@pytest.mark.parametrize(
    ("kind", "dtype", "largest"), [("e4m3", torch.float8_e4m3fn, 0x7E), ("e5m2", torch.float8_e5m2, 0x7B)]
)
@pytest.mark.parametrize("source", ["f32", "f16x2"])
def test_float_to_fp8(sim, kind, dtype, largest, source):
    a = dense(dtype)
    if source == "f16x2":
        a = np.resize(torch.from_numpy(a).half().float().numpy(), (len(a) + 1) // 2 * 2)
        packed = torch.from_numpy(a).half().view(torch.int16).numpy().view(np.uint32)
        got = run(sim, f"cvt.rn.satfinite.{kind}x2.f16x2 {{d}}, {{a}};", packed, out=np.uint16).view(np.uint8)
    else:
        both = run(sim, f"cvt.rn.satfinite.{kind}x2.f32 {{d}}, {{a}}, {{b}};", a, np.roll(a, 1), out=np.uint16)
        got = (both >> 8).astype(np.uint8)
        assert np.array_equal((both & 255).astype(np.uint8), np.roll(got, 1))
    x = torch.from_numpy(a)
    top = torch.tensor([largest], dtype=torch.uint8).view(dtype).float().item()
    want = x.clamp(-top, top).to(dtype).view(torch.uint8).numpy()  # torch rounds to nearest even inside the range
    nan = np.isnan(a)
    assert np.array_equal(got[~nan], want[~nan]) and np.all(got[nan] == 0x7F)


@pytest.mark.parametrize(("kind", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_fp8_to_half_all_codes(sim, kind, dtype):
    codes = np.arange(256, dtype=np.uint8)
    got = run(sim, f"cvt.rn.f16x2.{kind}x2 {{d}}, {{a}};", codes.view(np.uint16), out=np.uint32).view(np.uint16)
    want = torch.from_numpy(codes).view(dtype).half()
    nan = want.isnan().numpy()
    assert np.array_equal(got[~nan], want.view(torch.int16).numpy().view(np.uint16)[~nan]) and np.all(
        got[nan] & 0x7FFF == 0x7FFF
    )


def test_float_to_int(sim):
    a = np.concatenate(
        [floats(), np.array([0.5, 1.5, 2.5, -0.5, -1.5, 2**31, 2**31 - 128, -(2**31), 2**63, 1e20, -1e20], np.float32)]
    )
    rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    for mode, fn in rounding.items():
        for t, dtype in (
            ("s32", np.int32),
            ("u32", np.uint32),
            ("s64", np.int64),
            ("u64", np.uint64),
            ("s16", np.int16),
            ("u16", np.uint16),
        ):
            info = np.iinfo(dtype)
            want = [
                0
                if math.isnan(v)
                else info.max
                if v > 1e30
                else info.min
                if v < -1e30
                else min(max(int(v), info.min), info.max)
                for v in fn(a.astype(np.float64))
            ]
            assert np.array_equal(run(sim, f"cvt.{mode}.{t}.f32 {{d}}, {{a}};", a, out=dtype), np.array(want, dtype)), (
                mode,
                t,
            )


@pytest.mark.parametrize("source", LETTER, ids=LETTER.values())
def test_int_to_float_and_int(sim, source):
    a = ints(source)
    same_floats(run(sim, f"cvt.rn.f32.{LETTER[source]} {{d}}, {{a}};", a, out=np.float32), a.astype(np.float32))
    same_floats(run(sim, f"cvt.rn.f64.{LETTER[source]} {{d}}, {{a}};", a, out=np.float64), a.astype(np.float64))
    for target in LETTER:
        assert np.array_equal(
            run(sim, f"cvt.{LETTER[target]}.{LETTER[source]} {{d}}, {{a}};", a, out=target), a.astype(target)
        )
        info = np.iinfo(target)
        want = np.array([min(max(int(v), info.min), info.max) for v in a], target)
        assert np.array_equal(
            run(sim, f"cvt.sat.{LETTER[target]}.{LETTER[source]} {{d}}, {{a}};", a, out=target), want
        ), (source, target)


def test_tf32(sim):
    a = floats()
    a = a[np.isfinite(a) & (np.abs(a) < 3e38)]
    bits = a.view(np.uint32)
    away = (bits + 0x1000) & 0xFFFFE000
    assert np.array_equal(run(sim, "cvt.rna.tf32.f32 {d}, {a};", a, out=np.uint32), away)
    even = (bits + 0xFFF + (bits >> 13 & 1)) & 0xFFFFE000
    assert np.array_equal(run(sim, "cvt.rn.tf32.f32 {d}, {a};", a, out=np.uint32), even)


def test_comparisons(sim):
    a = RNG.choice(floats(), 2048)
    b = np.where(RNG.random(2048) < 0.4, a, RNG.choice(floats(), 2048)).astype(np.float32)
    nan = np.isnan(a) | np.isnan(b)
    base = {"eq": a == b, "ne": (a != b) & ~nan, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    cases = base | {k + "u": v | nan for k, v in base.items()} | {"num": ~nan, "nan": nan}
    for name, want in cases.items():
        text = f"setp.{name}.f32 %q, {{a}}, {{b}}; selp.u32 {{d}}, 1, 0, %q;"
        assert np.array_equal(run(sim, text, a, b, out=np.uint32), want), name
    x, y = ints(np.uint32), RNG.permutation(ints(np.uint32))
    for name, want in (("lo", x < y), ("ls", x <= y), ("hi", x > y), ("hs", x >= y)):
        assert np.array_equal(
            run(sim, f"setp.{name}.u32 %q, {{a}}, {{b}}; selp.u32 {{d}}, 1, 0, %q;", x, y, out=np.uint32), want
        )
    text = "setp.lt.s32 %p, {a}, 0; setp.gt.or.u32 %q, {a}, {b}, !%p; set.lt.u32.u32 {d}, {a}, {b}; @%q mov.u32 {d}, 7;"
    want = np.where((x > y) | (x.view(np.int32) >= 0), 7, np.where(x < y, 0xFFFFFFFF, 0))
    assert np.array_equal(run(sim, text, x, y, out=np.uint32), want)


def test_rare_integer_instructions(sim):
    a, b, c = ints(np.uint32), RNG.permutation(ints(np.uint32)), RNG.permutation(ints(np.uint32))
    check = lambda text, want, *x: np.testing.assert_array_equal(run(sim, text, *x, out=np.uint32), want, text)  # noqa: E731
    check("not.b32 {d}, {a};", ~a, a)
    check("xor.b32 {d}, {a}, {b};", a ^ b, a, b)
    check("cnot.b32 {d}, {a};", a == 0, a)
    check("slct.u32.s32 {d}, {a}, {b}, {c};", np.where(c.view(np.int32) >= 0, a, b), a, b, c)
    for t, x in (("s32", a.view(np.int32)), ("s16", a.view(np.int16)), ("s64", a.view(np.int64))):
        with np.errstate(over="ignore"):
            assert np.array_equal(run(sim, f"abs.{t} {{d}}, {{a}};", x, out=x.dtype.type), np.abs(x)), t
            assert np.array_equal(run(sim, f"neg.{t} {{d}}, {{a}};", x, out=x.dtype.type), -x), t
    f = floats(len(a))
    check("slct.b32.f32 {d}, {a}, {b}, {c};", np.where(f >= 0, a, b), a, b, f)
    n, m = (RNG.integers(0, 40, len(a)).astype(np.uint32) for _ in range(2))

    def extended(x: int, width: int, signed: bool) -> int:
        low = x & (1 << width) - 1
        return (low - (1 << width) if signed and width and low >> width - 1 else low) & 0xFFFFFFFF

    for mode, limit in (("clamp", lambda v: min(int(v), 32)), ("wrap", lambda v: int(v) & 31)):
        for t in ("u32", "s32"):
            want = [extended(int(x), limit(k), t == "s32") for x, k in zip(a, n, strict=True)]
            check(f"szext.{mode}.{t} {{d}}, {{a}}, {{b}};", want, a, n)
        want = [((1 << limit(k)) - 1 << limit(i)) & 0xFFFFFFFF for i, k in zip(n, m, strict=True)]
        check(f"bmsk.{mode}.b32 {{d}}, {{a}}, {{b}};", want, n, m)
    for half, at in (("lo", 0), ("hi", 2)):
        for t, wide, narrow in (("s32", np.int16, np.int8), ("u32", np.uint16, np.uint8)):
            pairs, four = a.view(wide).reshape(-1, 2).astype(np.int64), b.view(narrow).reshape(-1, 4).astype(np.int64)
            want = ((pairs * four[:, at : at + 2]).sum(1) + c) & 0xFFFFFFFF
            check(f"dp2a.{half}.{t}.{t} {{d}}, {{a}}, {{b}}, {{c}};", want, a, b, c)

    def nth(mask: int, base: int, offset: int) -> int:
        if offset == 0:
            return base if mask >> base & 1 else 0xFFFFFFFF
        found = [i for i in (range(base, 32) if offset > 0 else range(base, -1, -1)) if mask >> i & 1]
        return found[abs(offset) - 1] if len(found) >= abs(offset) else 0xFFFFFFFF

    base, offset = RNG.integers(0, 32, len(a)).astype(np.uint32), RNG.integers(-6, 7, len(a)).astype(np.int32)
    want = [nth(int(x), int(i), int(o)) for x, i, o in zip(a, base, offset, strict=True)]
    check("fns.b32 {d}, {a}, {b}, {c};", want, a, base, offset)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float_classes_and_signs(sim, dtype):
    t, unsigned = ("f32", np.uint32) if dtype == np.float32 else ("f64", np.uint64)
    a = floats(dtype=dtype)
    a[:4] = np.array([np.finfo(dtype).tiny / 8, -np.finfo(dtype).tiny / 8, np.finfo(dtype).tiny, np.finfo(dtype).max])
    b = RNG.permutation(a)
    got = run(sim, f"copysign.{t} {{d}}, {{a}}, {{b}};", a, b, out=dtype)
    top = unsigned(1) << unsigned(8 * a.itemsize - 1)
    assert np.array_equal(got.view(unsigned), a.view(unsigned) & top | b.view(unsigned) & (top - unsigned(1)))
    for op, want in (("abs", np.abs(a)), ("neg", -a)):  # which NaN they give is not said
        got = run(sim, f"{op}.{t} {{d}}, {{a}};", a, out=dtype)
        assert np.array_equal(got, want, equal_nan=True)
        assert np.array_equal(np.signbit(got[~np.isnan(a)]), np.signbit(want[~np.isnan(a)]))
    small = (np.abs(a) < np.finfo(dtype).tiny) & (a != 0)
    classes = {"finite": np.isfinite(a), "infinite": np.isinf(a), "number": ~np.isnan(a), "notanumber": np.isnan(a)}
    for name, want in (classes | {"normal": np.isfinite(a) & ~small, "subnormal": small}).items():
        text = f"testp.{name}.{t} %q, {{a}}; selp.u32 {{d}}, 1, 0, %q;"
        assert np.array_equal(run(sim, text, a, out=np.uint32), want), name
