# ruff: noqa: E501 - PTX reads better unbroken
"""Memory: loads, stores, address spaces, atomics, asynchronous stores, edited tensor maps: each against a model written
from the PTX ISA."""

from __future__ import annotations

import numpy as np
import pytest
from simulator import HEADER, SimError, TensorMap
from test_warp import warp, words

RNG = np.random.default_rng(6)
START = "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;"


def kernel(body: str, params: str) -> str:
    return (
        HEADER
        + f".visible .entry k({params}) {{ .reg .b16 %h<8>; .reg .b32 %r<32>; .reg .b64 %d<32>; .reg .pred %p<8>; mov.u32 %r0, %tid.x;\n{body}\nret; }}"
    )


# ---- ld, st

TYPES = {
    "u8": np.uint8, "s8": np.int8, "b8": np.uint8, "u16": np.uint16, "s16": np.int16, "b16": np.uint16, "u32": np.uint32,
    "s32": np.int32, "b32": np.uint32, "f32": np.uint32, "u64": np.uint64, "s64": np.int64, "b64": np.uint64, "f64": np.uint64,
}  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("space", ["global", "shared", "local", "generic"])
def test_loads_extend_and_stores_truncate(sim, kind, space):
    """A register may be wider than the type: a load extends by its sign, a store takes the low bits."""
    dtype = np.dtype(TYPES[kind])
    x, out = RNG.integers(0, 256, 32 * dtype.itemsize, np.uint8).view(dtype), np.zeros(32, np.uint64)
    wide = kind[0] in "us" or kind in ("b8", "b16") or dtype.itemsize == 8
    reg, size = ("%d9", 64) if wide else ("%r9", 32)
    where = {
        "global": ("", "%d0", ".global"),
        "shared": (f"mov.u32 %r2, s; mad.lo.u32 %r2, %r0, {dtype.itemsize}, %r2;", "%r2", ".shared"),
        "local": ("mov.u32 %r2, l;", "%r2", ".local"),
        "generic": ("", "%d0", ""),
    }[space]
    through = f"st{where[2]}.{kind} [{where[1]}], {reg}; ld{where[2]}.{kind} {reg}, [{where[1]}];"
    body = f""".shared .align 8 .b8 s[256]; .local .align 8 .b8 l[8]; ld.param.u64 %d0, [x]; mad.wide.u32 %d0, %r0, {dtype.itemsize}, %d0; mov.b64 %d9, -1; {where[0]}
    ld.global.{kind} {reg}, [%d0]; {through} ld.param.u64 %d1, [out]; mad.wide.u32 %d1, %r0, 8, %d1; {"" if wide else "cvt.u64.u32 %d9, %r9;"} st.global.u64 [%d1], %d9;"""
    sim.run(kernel(body, ".param .u64 x, .param .u64 out"), x, out, block=32)
    want = x.astype(np.int64).astype(np.uint64) if kind[0] == "s" else x.astype(np.uint64)
    assert np.array_equal(out, want), size


@pytest.mark.parametrize(
    ("vector", "kind"),
    [("v2", "u8"), ("v4", "u8"), ("v2", "b16"), ("v4", "b16"), ("v2", "b32"), ("v4", "b32"), ("v2", "b64")],
)
@pytest.mark.parametrize("how", ["", ".nc", ".relaxed.gpu", ".acquire.sys", ".volatile", "ldu"])
def test_vectors_and_qualifiers(sim, vector, kind, how):
    n, size = int(vector[1]), int(kind[1:]) // 8
    x, out = RNG.integers(0, 256, 32 * n * size, np.uint8), np.zeros(32 * n * size, np.uint8)
    regs = ", ".join(f"%{'h' if size <= 2 else 'r' if size == 4 else 'd'}{k + 4}" for k in range(n))
    nc = ".L1::no_allocate.L2::128B" if how == ".nc" else ""
    load = f"ldu.global.{vector}.{kind}" if how == "ldu" else (
        f"ld.volatile.global.{vector}.{kind}" if how == ".volatile" else f"ld{'' if how == '.nc' else how}.global{'.nc' if how == '.nc' else ''}{nc}.{vector}.{kind}"
    )  # fmt: skip
    store = {
        ".relaxed.gpu": ".relaxed.gpu.global",
        ".acquire.sys": ".release.sys.global",
        ".volatile": ".volatile.global",
    }
    body = f"""ld.param.u64 %d0, [x]; ld.param.u64 %d1, [out]; mad.wide.u32 %d0, %r0, {n * size}, %d0; mad.wide.u32 %d1, %r0, {n * size}, %d1;
    {load} {{{regs}}}, [%d0]; st{store.get(how, ".global.wb")}.{vector}.{kind} [%d1], {{{regs}}};"""
    sim.run(kernel(body, ".param .u64 x, .param .u64 out"), x, out, block=32)
    assert np.array_equal(out, x)


def test_address_spaces(sim):
    """cvta there and back, isspacep, and addresses of variables of the module."""
    module = ".global .align 4 .u32 g[4] = {7, 8, 9, 10}; .const .align 4 .u32 c[2] = {11, 12};"
    body = """.shared .align 4 .b32 s; .local .align 4 .b32 l; mov.u32 %n0, s; st.shared.u32 [%n0], 5; bar.warp.sync -1; cvt.u64.u32 %a, %n0; cvta.shared.u64 %b, %a; ld.u32 %o0, [%b];
    cvta.to.shared.u64 %w0, %b; setp.eq.u64 %p0, %w0, %a; selp.u32 %o1, 1, 0, %p0; mov.u64 %w1, g; cvta.global.u64 %w1, %w1; ld.u32 %o2, [%w1+8]; ld.const.u32 %o3, [c+4];
    isspacep.shared %p1, %b; isspacep.global %p2, %w1; isspacep.global %p3, %b; isspacep.shared %p4, %w1; mov.u32 %n1, l; st.local.u32 [l], 6; cvt.u64.u32 %w2, %n1; cvta.local.u64 %w2, %w2;
    isspacep.local %p5, %w2; ld.u32 %o4, [%w2]; selp.u32 %o5, 1, 0, %p1; selp.u32 %n2, 2, 0, %p2; or.b32 %o5, %o5, %n2; selp.u32 %n2, 4, 0, %p3; or.b32 %o5, %o5, %n2;
    selp.u32 %n2, 8, 0, %p4; or.b32 %o5, %o5, %n2; selp.u32 %n2, 16, 0, %p5; or.b32 %o5, %o5, %n2;"""
    got = warp(sim, body, outputs=6, extra=module)
    assert [set(g.tolist()) for g in got] == [{5}, {1}, {9}, {12}, {6}, {1 | 2 | 16}]


@pytest.mark.parametrize("bits", [32, 64])
def test_address_of_a_parameter(sim, bits):
    """A parameter's address fits 32 bits in its own space; cvta.param makes it generic."""
    move = "mov.b32 %r1, bytes; cvt.u64.u32 %d1, %r1;" if bits == 32 else "mov.b64 %d1, bytes;"
    body = f"{move} cvta.param.u64 %d1, %d1; ld.u32 %r2, [%d1+8]; ld.param.u64 %d0, [out]; st.global.u32 [%d0], %r2;"
    out = np.zeros(1, np.uint32)
    sim.run(kernel(body, ".param .u64 out, .param .align 8 .b8 bytes[16]"), out, bytes(range(16)), block=1)
    assert out[0] == 0x0B0A0908


def test_addresses_in_a_cluster(sim):
    """mapa names another CTA's byte, getctarank tells whose it is."""
    body = f"""{START} .shared .align 4 .b32 s; mov.u32 %r1, s; mov.u32 %r2, %cluster_ctarank; add.u32 %r3, %r2, 1; and.b32 %r3, %r3, 3; mapa.shared::cluster.u32 %r4, %r1, %r3;
    getctarank.shared::cluster.u32 %r5, %r4; cvt.u64.u32 %d2, %r1; cvta.shared.u64 %d2, %d2; mapa.u64 %d3, %d2, %r3; getctarank.u64 %r6, %d3; isspacep.shared::cluster %p1, %d3; isspacep.shared::cta %p2, %d3;
    add.u32 %r7, %r2, 50; st.u32 [%d3], %r7; barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; ld.shared.u32 %r8, [s]; ld.shared::cluster.u32 %r9, [%r4];
    selp.u32 %r10, 1, 0, %p1; selp.u32 %r11, 1, 0, %p2; ld.param.u64 %d0, [out]; mad.wide.u32 %d0, %r2, 24, %d0; st.global.v2.u32 [%d0], {{%r5, %r6}}; st.global.v2.u32 [%d0+8], {{%r8, %r9}}; st.global.v2.u32 [%d0+16], {{%r10, %r11}}; {START}"""
    out = np.zeros((4, 6), np.uint32)
    sim.run(kernel(body, ".param .u64 out"), out, grid=4, block=1, cluster=4)
    assert out.tolist() == [[(r + 1) % 4, (r + 1) % 4, 50 + (r + 3) % 4, 50 + r, 1, 0] for r in range(4)]


# ---- atomics


def model(op: str, old: int, b: int, c: int, bits: int, signed: bool) -> int:
    value = lambda v: v - (1 << bits) if signed and v >> bits - 1 else v  # noqa: E731
    return {
        "add": old + b,
        "min": min(value(old), value(b)),
        "max": max(value(old), value(b)),
        "and": old & b,
        "or": old | b,
        "xor": old ^ b,
        "exch": b,
        "cas": c if old == b else old,
        "inc": 0 if old >= b else old + 1,
        "dec": b if old == 0 or old > b else old - 1,
    }[op] & (1 << bits) - 1


ATOMS = [f"{op}.{t}" for t in ("u32", "s32", "u64", "s64") for op in ("min", "max")]
ATOMS += ["add.u32", "add.s32", "add.u64", "and.b32", "or.b32", "xor.b32", "exch.b32", "cas.b32", "inc.u32", "dec.u32"]
ATOMS += ["and.b64", "or.b64", "xor.b64", "exch.b64", "cas.b64", "cas.b16"]


@pytest.mark.parametrize("op", ATOMS)
@pytest.mark.parametrize("space", ["global", "shared"])
def test_integer_atomics(sim, op, space):
    """Eight words, four lanes on each, one after the other; red does the same without a result."""
    name, kind = op.split(".")
    bits = int(kind[1:])
    dtype = {16: np.uint16, 32: np.uint32, 64: np.uint64}[bits]
    r = {16: "h", 32: "r", 64: "d"}[bits]
    memory, b = RNG.integers(0, 7, 8).astype(dtype), RNG.integers(0, 7, 32).astype(dtype)
    if kind[0] in "us":
        memory[::2] += dtype(1) << (bits - 1)
        b[::3] += dtype(1) << (bits - 1)
    c = RNG.integers(0, 1 << 15, 32).astype(dtype)
    third = f", %{r}5" if name == "cas" else ""
    old, start = np.zeros(32, dtype), memory.copy()
    for reduction in (False, True):
        if reduction and name in ("exch", "cas"):
            continue
        memory[:] = start
        action = f"red.{{}}.{op} [{{}}], %{r}4;" if reduction else f"atom.{{}}.{op} %{r}6, [{{}}], %{r}4{third};"
        move = f"ld.{{}}.b{bits} %{r}7, [{{}}]; st.{{}}.b{bits} [{{}}], %{r}7;"
        inside = (
            f"{move.format('global', '%d1', 'shared', '%r2')} bar.warp.sync -1; {action.format('shared', '%r2')} bar.warp.sync -1; {move.format('shared', '%r2', 'global', '%d1')}"
            if space == "shared"
            else action.format("relaxed.gpu.global", "%d1")
        )
        body = f""".shared .align 8 .b8 s[64]; ld.param.u64 %d1, [memory]; and.b32 %r1, %r0, 7; mad.wide.u32 %d1, %r1, {bits // 8}, %d1; mov.u32 %r2, s; mad.lo.u32 %r2, %r1, {bits // 8}, %r2;
        ld.param.u64 %d2, [b]; mad.wide.u32 %d2, %r0, {bits // 8}, %d2; ld.global.b{bits} %{r}4, [%d2]; ld.param.u64 %d2, [c]; mad.wide.u32 %d2, %r0, {bits // 8}, %d2; ld.global.b{bits} %{r}5, [%d2];
        mov.b{bits} %{r}6, 0; {inside} ld.param.u64 %d2, [old]; mad.wide.u32 %d2, %r0, {bits // 8}, %d2; st.global.b{bits} [%d2], %{r}6;"""
        sim.run(
            kernel(body, ".param .u64 memory, .param .u64 b, .param .u64 c, .param .u64 old"),
            memory,
            b,
            c,
            old,
            block=32,
        )
        want = [int(v) for v in start]
        for lane in range(32):
            if not reduction:
                assert int(old[lane]) == want[lane % 8], lane
            want[lane % 8] = model(name, want[lane % 8], int(b[lane]), int(c[lane]), bits, kind[0] == "s")
        assert [int(v) for v in memory] == want


FLOAT_ATOMS = {
    "add.f32": (np.float32, 1), "add.f64": (np.float64, 1), "add.noftz.f16": (np.float16, 1), "add.noftz.f16x2": (np.float16, 2),
    "min.noftz.f16": (np.float16, 1), "max.noftz.f16x2": (np.float16, 2), "add.v2.f32": (np.float32, 2), "add.v4.f32": (np.float32, 4),
    "add.noftz.v4.f16x2": (np.float16, 8),
}  # fmt: skip


@pytest.mark.parametrize("op", FLOAT_ATOMS)
def test_float_atomics(sim, op):
    dtype, n = FLOAT_ATOMS[op]
    step = n * np.dtype(dtype).itemsize
    memory, b = RNG.standard_normal((4, n)).astype(dtype), RNG.standard_normal((32, n)).astype(dtype)
    start, kind, count = memory.copy(), op.rsplit(".", 1)[1], int(op.split(".v")[1][0]) if ".v" in op else 1
    r, bits = {2: ("h", 16), 4: ("r", 32), 8: ("d", 64)}[step // count]
    regs = ", ".join(f"%{r}{4 + k}" for k in range(count))
    value = f"{{{regs}}}" if count > 1 else regs
    vector = f".v{count}" if count > 1 else ""
    body = f"""ld.param.u64 %d1, [memory]; and.b32 %r1, %r0, 3; mad.wide.u32 %d1, %r1, {step}, %d1; ld.param.u64 %d2, [b]; mad.wide.u32 %d2, %r0, {step}, %d2;
    ld.global{vector}.b{bits} {value}, [%d2]; red.relaxed.gpu.global.{op} [%d1], {value};"""
    sim.run(kernel(body, ".param .u64 memory, .param .u64 b"), memory, b, block=32)
    want = start
    for lane in range(32):
        f = {"add": np.add, "min": np.minimum, "max": np.maximum}[op[:3]]
        want[lane % 4] = f(want[lane % 4], b[lane]).astype(dtype)
    assert np.array_equal(memory, want), kind


def test_atomics_of_128_bits(sim):
    memory = np.array([1, 2], np.uint64)
    body = """.reg .b128 %q<3>; ld.param.u64 %d0, [memory]; ld.param.u64 %d1, [out]; mov.b64 %d2, 1; mov.b64 %d3, 2; mov.b64 %d4, 30; mov.b64 %d5, 40; mov.b128 %q0, {%d2, %d3}; mov.b128 %q1, {%d4, %d5};
    atom.global.cas.b128 %q2, [%d0], %q0, %q1; mov.b128 {%d6, %d7}, %q2; st.global.v2.u64 [%d1], {%d6, %d7}; atom.global.cas.b128 %q2, [%d0], %q0, %q0; mov.b128 {%d6, %d7}, %q2; st.global.v2.u64 [%d1+16], {%d6, %d7};
    atom.global.exch.b128 %q2, [%d0], %q0; mov.b128 {%d6, %d7}, %q2; st.global.v2.u64 [%d1+32], {%d6, %d7};"""
    out = np.zeros(6, np.uint64)
    sim.run(kernel(body, ".param .u64 memory, .param .u64 out"), memory, out, block=1)
    assert out.tolist() == [1, 2, 30, 40, 30, 40] and memory.tolist() == [1, 2]


# ---- st.async, red.async: remote stores that complete on the receiver's mbarrier


def remote(action: str, nbytes: int, wait: bool = True) -> str:
    """Each thread of CTA 0 acts on CTA 1's memory; CTA 1 waits for the bytes of all and copies its memory out."""
    return f"""{{ .shared .align 128 .b8 s[1024]; .shared .align 8 .b64 bar; mov.u32 %r1, s; mov.u32 %r2, bar; mov.u32 %r3, %cluster_ctarank; setp.eq.u32 %p0, %r3, 0; setp.ne.u32 %p1, %r0, 0;
    @%p0 bra READY; mad.lo.u32 %r4, %r0, 16, %r1; ld.param.u64 %d0, [x]; mad.wide.u32 %d0, %r0, 16, %d0; ld.global.v4.u32 {{%r5, %r6, %r7, %r8}}, [%d0]; st.shared.v4.u32 [%r4], {{%r5, %r6, %r7, %r8}}; @%p1 bra READY;
    mbarrier.init.shared.b64 [%r2], 1; fence.mbarrier_init.release.cluster; mbarrier.arrive.expect_tx.shared.b64 _, [%r2], {32 * nbytes};
    READY: barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; @!%p0 bra RECEIVE;
    mapa.shared::cluster.u32 %r10, %r1, 1; mapa.shared::cluster.u32 %r11, %r2, 1; mad.lo.u32 %r10, %r0, 16, %r10; ld.param.u64 %d1, [y]; mad.wide.u32 %d1, %r0, 16, %d1; ld.global.v4.u32 {{%r12, %r13, %r14, %r15}}, [%d1];
    mov.b64 %d4, {{%r12, %r13}}; mov.b64 %d5, {{%r14, %r15}}; {action} bra END;
    RECEIVE: {"W: mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0; @!%p2 bra W;" if wait else ""} mad.lo.u32 %r4, %r0, 16, %r1; ld.shared.v4.u32 {{%r5, %r6, %r7, %r8}}, [%r4]; ld.param.u64 %d2, [out]; mad.wide.u32 %d2, %r0, 16, %d2; st.global.v4.u32 [%d2], {{%r5, %r6, %r7, %r8}};
    END: barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; }}"""


def run_remote(sim, action, nbytes, wait=True):
    x, y, out = (words(128) for _ in range(3))
    sim.run(
        kernel(remote(action, nbytes, wait), ".param .u64 x, .param .u64 y, .param .u64 out"),
        x,
        y,
        out,
        grid=2,
        block=32,
        cluster=2,
    )
    return x.reshape(32, 4), y.reshape(32, 4), out.reshape(32, 4)


STORES = {
    "b32 [%r10], %r12": 1, "u32 [%r10], %r12": 1, "b64 [%r10], %d4": 2, "v2.b32 [%r10], {%r12, %r13}": 2,
    "v4.b32 [%r10], {%r12, %r13, %r14, %r15}": 4, "v2.b64 [%r10], {%d4, %d5}": 4,
}  # fmt: skip


def st_async(sim, form: str, **change) -> None:
    n = STORES[form]
    kind, operands = form.split(" ", 1)
    vector, kind = (f".v{kind[1]}", kind[3:]) if kind[0] == "v" else ("", kind)
    action = f"st.async.shared::cluster.mbarrier::complete_tx::bytes{vector}.{kind} {operands}, [%r11];"
    x, y, out = run_remote(sim, action, **{"nbytes": 4 * n} | change)
    assert np.array_equal(out[:, :n], y[:, :n]) and np.array_equal(out[:, n:], x[:, n:])


@pytest.mark.parametrize("timing", ["early", "late", "random"])
@pytest.mark.parametrize("form", STORES)
def test_st_async(sim, form, timing):
    sim.option(timing=timing)
    st_async(sim, form)
    text = r"race on shared memory of CTA 1.*nothing orders|CTA 1 may exit before .*has written its shared"
    with pytest.raises(SimError, match=text):
        st_async(sim, form, wait=False)
    with pytest.raises(SimError, match="deadlock"):
        st_async(sim, form, nbytes=4 * STORES[form] + 4)


@pytest.mark.parametrize("timing", ["early", "late"])
@pytest.mark.parametrize(
    "op", ["add.u32", "add.s32", "add.u64", "min.u32", "max.s32", "inc.u32", "dec.u32", "and.b32", "or.b32", "xor.b32"]
)
def test_red_async(sim, op, timing):
    sim.option(timing=timing)
    name, kind = op.split(".")
    bits = int(kind[1:])
    value = "%d4" if bits == 64 else "%r12"
    action = (
        f"red.async.relaxed.cluster.{name}.shared::cluster.mbarrier::complete_tx::bytes.{kind} [%r10], {value}, [%r11];"
    )
    x, y, out = run_remote(
        sim, action.replace(f"cluster.{name}.shared", "cluster.shared").replace("bytes.", f"bytes.{name}."), bits // 8
    )
    got, old, b = (v.copy().view(np.uint64 if bits == 64 else np.uint32)[:, 0] for v in (out, x, y))
    assert [int(v) for v in got] == [
        model(name, int(o), int(v), 0, bits, kind[0] == "s") for o, v in zip(old, b, strict=True)
    ]
    assert np.array_equal(out[:, bits // 32 :], x[:, bits // 32 :])


# ---- tensor maps edited by the kernel

EDIT = {
    "global_address": ".b1024.b64 [%r2], %d5", "global_dim": ".b1024.b32 [%r2], 1, 6", "global_stride": ".b1024.b64 [%r2], 0, 256",
    "box_dim": ".b1024.b32 [%r2], 1, 4", "element_stride": ".b1024.b32 [%r2], 1, 2", "swizzle_mode": ".b1024.b32 [%r2], 3", "fill_mode": ".b1024.b32 [%r2], 1",
    "elemtype": ".b1024.b32 [%r2], 2", "rank": ".b1024.b32 [%r2], 0", "interleave_layout": ".b1024.b32 [%r2], 0",
}  # fmt: skip


def edited(field: str, rows: int, acquire: str, rank: int = 2) -> str:
    """One thread loads [rows, 32] float32 through a map that the warp copied to shared memory, edited and published."""
    edit = "" if field == "none" else f"tensormap.replace.tile.{field}.shared::cta{EDIT[field]};"
    coordinates = "{0, 0}" if rank == 2 else "{0}"
    return f"""{{ .shared .align 128 .b8 m[128]; .shared .align 1024 .b8 s[8192]; .shared .align 8 .b64 bar; ld.param.u64 %d0, [map]; ld.param.u64 %d5, [other]; ld.param.u64 %d6, [work]; mov.u32 %r1, s; mov.u32 %r2, m; mov.u32 %r3, bar;
    mad.lo.u32 %r4, %r0, 4, %r2; mad.wide.u32 %d1, %r0, 4, %d0; ld.global.u32 %r5, [%d1]; st.shared.u32 [%r4], %r5; bar.warp.sync -1; setp.ne.u32 %p0, %r0, 0; @%p0 bra J; {edit}
    mbarrier.init.shared.b64 [%r3], 1; J: bar.warp.sync -1; tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%d6], [%r2], 128; @%p0 bra K; {acquire}
    mbarrier.arrive.expect_tx.shared.b64 _, [%r3], {rows * 128}; cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r1], [%d6, {coordinates}], [%r3];
    K: bar.warp.sync -1; W: mbarrier.try_wait.parity.shared.b64 %p1, [%r3], 0; @!%p1 bra W; mov.u32 %r6, %r0; L: setp.ge.u32 %p2, %r6, {32 * rows}; @%p2 bra E; mad.lo.u32 %r7, %r6, 4, %r1; ld.shared.u32 %r8, [%r7];
    ld.param.u64 %d2, [out]; mad.wide.u32 %d2, %r6, 4, %d2; st.global.u32 [%d2], %r8; add.u32 %r6, %r6, 32; bra L; E: }}"""


ACQUIRE = "fence.proxy.tensormap::generic.acquire.gpu [%d6], 128;"


@pytest.mark.parametrize("timing", ["early", "late"])
@pytest.mark.parametrize("field", ["none", *EDIT])
def test_tensormap_replace(sim, field, timing):
    sim.option(timing=timing)
    memory, other = (RNG.standard_normal((n, 32)).astype(np.float32) for n in (16, 8))
    x = memory[:8]
    mapped = np.frombuffer(TensorMap(sim, "f32", x.ctypes.data, [32, 8], [128], [32, 8]).data, np.uint8)
    raw, space = np.zeros(128 + 128, np.uint8), np.zeros(128 + 128, np.uint8)
    work = space[-space.ctypes.data % 128 :][:128]
    source = raw[-raw.ctypes.data % 128 :][:128]
    source[:] = mapped
    rows, rank = {"box_dim": 4, "element_stride": 4, "rank": 1}.get(field, 8), 1 if field == "rank" else 2
    out = np.zeros((rows, 32), np.float32)
    params = ", ".join(f".param .u64 {p}" for p in ("map", "other", "work", "out"))
    body = kernel(edited(field, rows, ACQUIRE, rank), params)
    sim.run(body, source, other, work, out, block=32, buffers=[(memory, 1)])
    want = {
        "global_address": other, "global_dim": np.concatenate([x[:6], np.zeros((2, 32), np.float32)]), "box_dim": x[:4], "element_stride": x[::2], "rank": x[:1], "global_stride": memory[::2],
        "swizzle_mode": np.stack([x[r].reshape(8, 4)[np.arange(8) ^ r].ravel() for r in range(8)]),
    }.get(field, x)  # fmt: skip
    assert np.array_equal(out, want)


def test_a_rank_of_dimensions_that_were_never_set(sim):
    x, work, out = (np.zeros((n, 32), np.float32) for n in (8, 8, 8))
    space = np.zeros(128 + 128, np.uint8)
    source = space[-space.ctypes.data % 128 :][:128]
    source[:] = np.frombuffer(TensorMap(sim, "f32", x.ctypes.data, [32, 8], [128], [32, 8]).data, np.uint8)
    body = edited("rank", 8, ACQUIRE, 3).replace("[%r2], 0;", "[%r2], 2;").replace("{0}", "{0, 0, 0}")
    place = work.reshape(-1).view(np.uint8)[-work.ctypes.data % 128 :][:128]
    with pytest.raises(SimError, match="element stride of dimension 2 was never set"):
        sim.run(
            kernel(body, ", ".join(f".param .u64 {p}" for p in ("map", "other", "work", "out"))),
            *(source, x, place, out),
            block=32,
        )
