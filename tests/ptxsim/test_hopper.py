# ruff: noqa: E501 - PTX reads better unbroken
"""mbarrier, asynchronous copies, TMA, matrix instructions: each against a model written from the PTX ISA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from simulator import HEADER, SimError, TensorMap

RNG = np.random.default_rng(2)


def kernel(body: str, params: str = ".param .u64 out", shared: int = 32768) -> str:
    return (
        HEADER
        + f".visible .entry k({params}) {{ .reg .b16 %h<8>; .reg .b32 %r<32>; .reg .b64 %d<32>; .reg .pred %p<8>;\n"
        f".shared .align 1024 .b8 s[{shared}]; .shared .align 8 .b8 bar[64];\n"
        "mov.u32 %r0, %tid.x; mov.u32 %r1, s; mov.u32 %r2, bar; setp.eq.u32 %p0, %r0, 0;\n" + body + "\nret; }"
    )


INIT = "@%p0 mbarrier.init.shared::cta.b64 [%r2], {n}; @%p0 fence.mbarrier_init.release.cluster; bar.sync 0;"
WAIT = "W{n}: mbarrier.try_wait.parity.shared::cta.b64 %p7, [%r2], {parity}; @!%p7 bra W{n};"
# every thread copies its share of `n` bytes of shared memory to out
DUMP = """mul.lo.u32 %r20, %r0, 4; D: setp.ge.u32 %p6, %r20, {n}; @%p6 bra DE; ld.param.u64 %d20, [out]; cvt.u64.u32 %d21, %r20; add.s64 %d20, %d20, %d21;
add.u32 %r21, %r1, %r20; ld.shared.u32 %r22, [%r21]; st.global.u32 [%d20], %r22; mov.u32 %r23, %ntid.x; mad.lo.u32 %r20, %r23, 4, %r20; bra D; DE:"""


def swizzle(x: int, bytes_: int) -> int:
    return x ^ (((x >> 7) & (bytes_ // 16 - 1 if bytes_ else 0)) << 4)


# ---- mbarrier


def test_mbarrier_phases(sim):
    body = (
        INIT.format(n=3)
        + """
    ld.param.u64 %d0, [out]; @!%p0 bra END;
    mbarrier.test_wait.parity.shared.b64 %p1, [%r2], 1; selp.u32 %r3, 1, 0, %p1; st.global.u32 [%d0], %r3;
    mbarrier.arrive.shared.b64 %d1, [%r2], 2;
    mbarrier.test_wait.shared.b64 %p1, [%r2], %d1; selp.u32 %r3, 1, 0, %p1; st.global.u32 [%d0+4], %r3;
    mbarrier.pending_count.b64 %r3, %d1; st.global.u32 [%d0+8], %r3;
    mbarrier.arrive.expect_tx.shared.b64 %d2, [%r2], 32;
    mbarrier.test_wait.shared.b64 %p1, [%r2], %d1; selp.u32 %r3, 1, 0, %p1; st.global.u32 [%d0+12], %r3;
    mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r2], 32;
    mbarrier.test_wait.shared.b64 %p1, [%r2], %d1; selp.u32 %r3, 1, 0, %p1; st.global.u32 [%d0+16], %r3;
    mbarrier.test_wait.parity.shared.b64 %p1, [%r2], 0; selp.u32 %r3, 1, 0, %p1; st.global.u32 [%d0+20], %r3;
    mbarrier.arrive_drop.shared.b64 %d3, [%r2]; mbarrier.arrive.shared.b64 _, [%r2], 2;
    mbarrier.arrive.shared.b64 %d3, [%r2]; mbarrier.pending_count.b64 %r3, %d3; st.global.u32 [%d0+24], %r3;
    mbarrier.inval.shared.b64 [%r2]; st.shared.u64 [%r2], 0; mbarrier.init.shared.b64 [%r2], 1;
    mbarrier.arrive.shared.b64 %d3, [%r2]; mbarrier.pending_count.b64 %r3, %d3; st.global.u32 [%d0+28], %r3; END:"""
    )
    out = np.full(8, 99, np.uint32)
    sim.run(kernel(body), out, block=64)
    # a fresh barrier has "completed" parity 1; three arrivals and the bytes complete phase 0; after arrive_drop two are expected
    assert out.tolist() == [1, 0, 3, 0, 1, 1, 2, 1]


@pytest.mark.parametrize("timing", ["early", "late", "random"])
def test_cp_async(sim, timing):
    sim.option(timing=timing)
    body = """ld.param.u64 %d0, [src]; mul.wide.u32 %d1, %r0, 16; add.s64 %d0, %d0, %d1; mad.lo.u32 %r3, %r0, 16, %r1;
    cp.async.cg.shared.global [%r3], [%d0], 16; cp.async.commit_group;
    cp.async.ca.shared.global [%r3+2048], [%d0], 4, 3; cp.async.commit_group;
    cp.async.ca.shared.global [%r3+2056], [%d0], 8, 0;
    cp.async.wait_group 1; bar.sync 0; ld.shared.u32 %r4, [%r3]; cp.async.wait_all; bar.sync 0;""" + DUMP.format(n=4096)
    src, out = RNG.integers(0, 256, 2048, np.uint8), np.zeros(4096, np.uint8)
    uninitialised = body.replace(
        DUMP.format(n=4096), "ld.shared.u32 %r5, [%r3+2052]; ld.param.u64 %d9, [out]; st.global.u32 [%d9], %r5;"
    )
    with pytest.raises(SimError, match="uninitialised"):
        sim.run(kernel(uninitialised, ".param .u64 src, .param .u64 out"), src, out, block=128)
    body = body.replace("cp.async.wait_all", "st.shared.u32 [%r3+2052], 0; cp.async.wait_all")
    sim.run(kernel(body, ".param .u64 src, .param .u64 out"), src, out, block=128)
    assert np.array_equal(out[:2048], src)
    rows = out[2048:].reshape(128, 16)
    assert np.array_equal(rows[:, :3], src.reshape(128, 16)[:, :3]) and not rows[:, 3:].any()
    with pytest.raises(SimError, match="race on shared memory"):
        sim.run(
            kernel(body.replace("cp.async.wait_group 1; bar.sync 0;", ""), ".param .u64 src, .param .u64 out"),
            src,
            out,
            block=128,
        )


@pytest.mark.parametrize("timing", ["early", "late"])
def test_cp_async_mbarrier(sim, timing):
    sim.option(timing=timing)
    body = (
        INIT.format(n=64)
        + """ld.param.u64 %d0, [src]; mul.wide.u32 %d1, %r0, 16; add.s64 %d0, %d0, %d1; mad.lo.u32 %r3, %r0, 16, %r1;
    cp.async.cg.shared.global [%r3], [%d0], 16; cp.async.mbarrier.arrive.noinc.shared.b64 [%r2];"""
        + WAIT.format(n=0, parity=0)
        + DUMP.format(n=1024)
    )
    src, out = RNG.integers(0, 256, 1024, np.uint8), np.zeros(1024, np.uint8)
    sim.run(kernel(body, ".param .u64 src, .param .u64 out"), src, out, block=64)
    assert np.array_equal(src, out)


@pytest.mark.parametrize("timing", ["early", "late", "random"])
def test_bulk_copies(sim, timing):
    """global -> shared, shared -> global, reduction; the source may be overwritten after wait_group.read."""
    sim.option(timing=timing)
    body = (
        INIT.format(n=1)
        + """ld.param.u64 %d0, [src]; ld.param.u64 %d1, [out]; @!%p0 bra J;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 512;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%d0], 512, [%r2]; J:"""
        + WAIT.format(n=0, parity=0)
        + """
    @!%p0 bra END; cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r1], 512; cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;
    st.shared.u32 [%r1], 0; cp.async.bulk.wait_group 0;
    cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%d1+16], [%r1+16], 256; cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; END:"""
    )
    src, out = RNG.standard_normal(128).astype(np.float32), np.zeros(128, np.float32)
    sim.run(kernel(body, ".param .u64 src, .param .u64 out"), src, out, block=64)
    want = src.copy()
    want[4:68] += src[4:68]
    assert np.array_equal(out, want)
    with pytest.raises(SimError, match="race on shared memory"):
        sim.run(
            kernel(body.replace("cp.async.bulk.wait_group.read 0;", ""), ".param .u64 src, .param .u64 out"),
            src,
            out,
            block=64,
        )
    with pytest.raises(SimError, match="multiple of 16"):
        sim.run(
            kernel(body.replace("[%d0], 512,", "[%d0], 520,"), ".param .u64 src, .param .u64 out"), src, out, block=64
        )


# ---- tensor copies

ELEMENT = {"u8": np.uint8, "bf16": np.uint16, "f32": np.float32, "u64": np.uint64}


def tensor_load(sim, x, kind, box, coord, mode=0, fill=0, element_strides=None):
    rank, size = (
        x.ndim,
        int(np.prod([-(-b // s) for b, s in zip(box, element_strides or [1] * x.ndim, strict=True)])) * x.itemsize,
    )
    tensor = TensorMap(
        sim, kind, x.ctypes.data, x.shape[::-1], x.strides[-2::-1] if rank > 1 else [], box, mode, fill, element_strides
    )
    body = (
        INIT.format(n=1)
        + f"""mov.b64 %d0, map; cvta.param.u64 %d0, %d0; @!%p0 bra J; mbarrier.arrive.expect_tx.shared.b64 _, [%r2], {size};
    cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r1], [%d0, {{{", ".join(map(str, coord))}}}], [%r2]; J:"""
        + WAIT.format(n=0, parity=0)
        + DUMP.format(n=size)
    )
    out = np.zeros(size, np.uint8)
    sim.run(
        kernel(body, ".param .align 64 .b8 map[128], .param .u64 out", 65536), tensor, out, block=128, buffers=[(x, 1)]
    )
    return out


@pytest.mark.parametrize("timing", ["early", "late"])
@pytest.mark.parametrize("mode", [0, 32, 64, 128])
@pytest.mark.parametrize("kind", ELEMENT)
def test_tensor_load_swizzled(sim, kind, mode, timing):
    sim.option(timing=timing)
    dtype = np.dtype(ELEMENT[kind])
    inner = (mode or 64) // dtype.itemsize
    x = RNG.integers(1, 200, (40, inner * 3)).astype(dtype)
    row, column = -3, inner + 16 // dtype.itemsize
    out = tensor_load(sim, x, kind, [inner, 48], [column, row], mode)
    want = np.zeros((48, inner), dtype)
    want[3:43] = x[:, column : column + inner]
    got = np.zeros_like(out)
    for i in range(out.size):
        got[i] = out[swizzle(i, mode)]
    assert np.array_equal(got.view(dtype).reshape(48, inner), want)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_tensor_load_ranks_and_edges(sim, rank):
    shape = (3, 4, 5, 6, 32)[-rank:]
    x = RNG.integers(1, 255, shape).astype(np.float32)
    box = [16, 3, 2, 2, 2][:rank]
    coord = [24, 4, -1, 3, 2][:rank]
    out = tensor_load(sim, x, "f32", box, coord).view(np.float32).reshape(box[::-1])
    want = np.zeros(box[::-1], np.float32)
    for index in np.ndindex(*box[::-1]):
        at = tuple(i + c for i, c in zip(index, coord[::-1], strict=True))
        if all(0 <= a < n for a, n in zip(at, shape, strict=True)):
            want[index] = x[at]
    assert np.array_equal(out, want)


def test_tensor_load_nan_fill_and_element_strides(sim):
    x = RNG.standard_normal((6, 16)).astype(np.float32)
    out = tensor_load(sim, x, "f32", [16, 4], [4, 4], fill=1).view(np.float32).reshape(4, 16)
    assert np.array_equal(out[:2, :12], x[4:, 4:]) and np.isnan(out[2:]).all() and np.isnan(out[:, 12:]).all()
    out = tensor_load(sim, x, "f32", [16, 6], [0, 1], element_strides=[1, 2]).view(np.float32).reshape(3, 16)
    assert np.array_equal(out, np.stack([x[1], x[3], x[5]]))


@pytest.mark.parametrize("timing", ["early", "late"])
@pytest.mark.parametrize("reduce", [False, True])
def test_tensor_store_clips(sim, reduce, timing):
    sim.option(timing=timing)
    out = np.arange(10 * 16, dtype=np.float32).reshape(10, 16)
    before = out.copy()
    tensor = TensorMap(sim, "f32", out.ctypes.data, [14, 9], [64], [8, 4], 32)
    verb, op = ("cp.reduce.async.bulk", ".add") if reduce else ("cp.async.bulk", "")
    body = f"""cvt.rn.f32.u32 %r3, %r0; mul.lo.u32 %r4, %r0, 4; shr.u32 %r5, %r4, 7; and.b32 %r5, %r5, 1; shl.b32 %r5, %r5, 4; xor.b32 %r4, %r4, %r5; add.u32 %r4, %r4, %r1;
    st.shared.u32 [%r4], %r3; fence.proxy.async.shared::cta; bar.sync 0; mov.b64 %d0, map; @!%p0 bra END;
    {verb}.tensor.2d.global.shared::cta{op}.tile.bulk_group [%d0, {{8, 6}}], [%r1]; cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; END:"""
    sim.run(kernel(body, ".param .align 64 .b8 map[128]"), tensor, block=32, buffers=[(out, 3)])
    tile = np.arange(32, dtype=np.float32).reshape(4, 8)[:3, :6]
    want = before.copy()
    want[6:9, 8:14] = tile + (before[6:9, 8:14] if reduce else 0)
    assert np.array_equal(out, want)
    with pytest.raises(SimError, match="negative coordinate"):
        sim.run(
            kernel(body.replace("{8, 6}", "{8, -1}"), ".param .align 64 .b8 map[128]"),
            tensor,
            block=32,
            buffers=[(out, 3)],
        )


@pytest.mark.parametrize("timing", ["early", "late"])
def test_multicast(sim, timing):
    """Each CTA of four loads a quarter and multicasts it; every CTA ends with the whole tile."""
    sim.option(timing=timing)
    x = RNG.integers(0, 255, (16, 64), np.uint8)
    tensor = TensorMap(sim, "u8", x.ctypes.data, [64, 16], [64], [64, 4])
    body = (
        INIT.format(n=1)
        + """barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned; mov.u32 %r3, %cluster_ctarank; mov.b64 %d0, map; mov.u16 %h0, 15; @!%p0 bra J;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 1024; mul.lo.u32 %r4, %r3, 4; mad.lo.u32 %r5, %r3, 256, %r1;
    cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%r5], [%d0, {0, %r4}], [%r2], %h0; J:"""
        + WAIT.format(n=0, parity=0)
        + """
    mul.lo.u32 %r20, %r0, 4; DD: setp.ge.u32 %p6, %r20, 1024; @%p6 bra EE; add.u32 %r21, %r1, %r20; ld.shared.u32 %r22, [%r21]; mad.lo.u32 %r23, %r3, 1024, %r20;
    ld.param.u64 %d20, [out]; cvt.u64.u32 %d21, %r23; add.s64 %d20, %d20, %d21; st.global.u32 [%d20], %r22; add.u32 %r20, %r20, 256; bra DD; EE:
    barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;"""
    )
    out = np.zeros((4, 16, 64), np.uint8)
    sim.run(
        kernel(body, ".param .align 64 .b8 map[128], .param .u64 out"),
        tensor,
        out,
        grid=4,
        block=64,
        cluster=4,
        buffers=[(x, 1)],
    )
    assert all(np.array_equal(o, x) for o in out)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"address": 8}, "global address"),
        ({"strides": [72]}, "no multiple of 16 bytes"),
        ({"box": [512, 4]}, r"boxDim\[0\]"),
        ({"box": [4, 4]}, "multiple of 16"),
        ({"box": [64, 4], "swizzle": 32}, "wider than the swizzle"),
        ({"dims": [0, 4]}, r"globalDim\[0\]"),
        ({"fill": 1}, "NaN fill"),
        ({"kind": 77}, "data type"),
        ({"element_strides": [1, 9]}, "elementStrides"),
    ],
)
def test_tensor_map_rules(sim, change, text):
    good = {"kind": "u8", "address": 4096, "dims": [64, 16], "strides": [64], "box": [64, 4]}
    TensorMap(sim, **good)
    with pytest.raises(SimError, match=text):
        TensorMap(sim, **good | change)


# ---- ldmatrix, stmatrix


@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix_stmatrix(sim, trans):
    t = ".trans" if trans else ""
    body = f"""mad.lo.u32 %r3, %r0, 16, %r1; ld.param.u64 %d0, [src]; mul.wide.u32 %d1, %r0, 16; add.s64 %d0, %d0, %d1; ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%d0]; st.shared.v4.u32 [%r3], {{%r4, %r5, %r6, %r7}};
    bar.sync 0; ldmatrix.sync.aligned.m8n8.x4{t}.shared.b16 {{%r8, %r9, %r10, %r11}}, [%r3]; ld.param.u64 %d2, [out]; add.s64 %d2, %d2, %d1; st.global.v4.u32 [%d2], {{%r8, %r9, %r10, %r11}};
    add.u32 %r3, %r3, 1024; stmatrix.sync.aligned.m8n8.x4{t}.shared.b16 [%r3], {{%r8, %r9, %r10, %r11}}; bar.sync 0; ld.shared.v4.u32 {{%r4, %r5, %r6, %r7}}, [%r3]; st.global.v4.u32 [%d2+512], {{%r4, %r5, %r6, %r7}};"""
    src = RNG.integers(0, 65536, (4, 8, 8)).astype(np.uint16)
    out = np.zeros(512, np.uint16)
    sim.run(kernel(body, ".param .u64 src, .param .u64 out"), src, out, block=32)
    lanes = out[:256].reshape(32, 4, 2)
    for lane in range(32):
        for j in range(4):
            for e in range(2):
                r, c = lane // 4, 2 * (lane % 4) + e
                assert lanes[lane, j, e] == (src[j, c, r] if trans else src[j, r, c])
    assert np.array_equal(out[256:], src.ravel())


@pytest.mark.parametrize(("source", "fails"), [("%r5", False), ("%r6", True)])
def test_copies_of_one_matrix_may_be_stored_at_once(sim, source, fails):
    """Two warps and two lanes' rows: the same values race with nothing, as with plain stores; a warp's own do."""
    body = f"""and.b32 %r3, %r0, 3; mad.lo.u32 %r3, %r3, 16, %r1; shr.u32 %r6, %r0, 5; mov.u32 %r5, 7;
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r3], {{{source}}}; bar.sync 0;"""
    if fails:
        with pytest.raises(SimError, match="race on shared memory"):
            sim.run(kernel(body), np.zeros(1, np.uint32), block=64)
    else:
        sim.run(kernel(body), np.zeros(1, np.uint32), block=64)


# ---- wgmma: operands placed in shared memory as the descriptor says

TYPES = {
    "bf16": (torch.bfloat16, 16, "f32.bf16.bf16"),
    "f16": (torch.float16, 16, "f32.f16.f16"),
    "e4m3": (torch.float8_e4m3fn, 32, "f32.e4m3.e4m3"),
    "e5m2": (torch.float8_e5m2, 32, "f32.e5m2.e5m2"),
    "tf32": (torch.float32, 8, "f32.tf32.tf32"),
    "s8": (torch.int8, 32, "s32.s8.s8"),
}
MODES = {0: 0, 128: 1, 64: 2, 32: 3}


def place(x: np.ndarray, mode: int, mn_major: bool) -> tuple[np.ndarray, int, int]:
    """x [mn, k] as bytes in shared memory, with LBO and SBO."""
    es, (mn, k) = x.itemsize, x.shape
    span = mode or 16
    rows, contiguous = (k, mn) if mn_major else (mn, k)
    image = np.zeros(rows * max(span, contiguous * es) + 4096, np.uint8)
    data = np.ascontiguousarray(x.T if mn_major else x).view(np.uint8).reshape(rows, contiguous * es)
    for r in range(rows):
        for c in range(contiguous * es):
            image[swizzle(c // span * rows * span + r * span + c % span, mode)] = data[r, c]
    panel = rows * span
    if mode:
        return image, panel if mn_major else 16, 8 * span
    return (image, 128, panel) if mn_major else (image, panel, 128)


def operand(kind: str, *shape) -> torch.Tensor:
    dtype = TYPES[kind][0]
    if dtype == torch.int8:
        return torch.from_numpy(RNG.integers(-128, 128, shape, dtype=np.int8))
    x = torch.from_numpy(RNG.standard_normal(shape, dtype=np.float32))
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32) if kind == "tf32" else x.to(dtype)


def raw(x: torch.Tensor) -> np.ndarray:
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]).numpy()


def fragment(a: torch.Tensor) -> np.ndarray:
    """The four registers of A of every thread of a warpgroup."""
    x, e = raw(a), 4 // a.element_size()
    out = np.zeros((128, 4, e), x.dtype)
    for t in range(128):
        w, g, q = t // 32, t % 32 // 4, t % 4
        for r in range(4):
            for i in range(e):
                out[t, r, i] = x[16 * w + g + 8 * (r & 1), e * q + 4 * e * (r >> 1) + i]
    return out


def wgmma_product(
    sim, kind, a, b, mode=128, trans=(False, False), registers=False, accumulate=False, scale=(1, 1), half=False,
    c=2.0, barrier="fence.proxy.async.shared::cta; bar.sync 0;", wait="wgmma.wait_group.sync.aligned 0;",
    fence="wgmma.fence.sync.aligned;",
) -> np.ndarray:  # fmt: skip
    """A [64, k] times B [n, k] transposed, on accumulators of C [64, n]."""
    n, (_, k, op) = len(b), TYPES[kind]
    op = op.replace("f32", "f16", 1) if half else op
    ia, lbo_a, sbo_a = place(raw(a), mode, trans[0])
    ib, lbo_b, sbo_b = place(raw(b), mode, trans[1])
    start_b = (len(ia) + 1023) // 1024 * 1024
    image = np.zeros(start_b + (len(ib) + 1023) // 1024 * 1024, np.uint8)
    image[: len(ia)] = ia
    image[start_b : start_b + len(ib)] = ib
    nd = n // 4 if half else n // 2
    acc = ", ".join(f"%a{i}" for i in range(nd))

    def descriptor(r: str, d: str, lbo: int, sbo: int) -> str:
        high = lbo >> 4 << 16 | sbo >> 4 << 32 | MODES[mode] << 62
        return f"and.b32 %r10, {r}, 0x3ffff; shr.u32 %r10, %r10, 4; cvt.u64.u32 {d}, %r10; or.b64 {d}, {d}, {high};"

    imm = [] if kind == "s8" else [*map(str, scale)]
    if kind in ("bf16", "f16"):
        imm += [str(int(t)) for t in (trans[1:] if registers else trans)]
    body = f""".reg .b32 %a<{nd}>; .reg .b32 %f<4>;
    mul.lo.u32 %r3, %r0, 16; C: setp.ge.u32 %p1, %r3, {len(image)}; @%p1 bra CE; ld.param.u64 %d0, [image]; cvt.u64.u32 %d1, %r3; add.s64 %d0, %d0, %d1;
    ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%d0]; add.u32 %r8, %r1, %r3; st.shared.v4.u32 [%r8], {{%r4, %r5, %r6, %r7}}; add.u32 %r3, %r3, 2048; bra C; CE:
    {barrier} add.u32 %r9, %r1, {start_b};
    {descriptor("%r1", "%d2", lbo_a, sbo_a)} {descriptor("%r9", "%d3", lbo_b, sbo_b)}
    ld.param.u64 %d4, [regs]; mul.wide.u32 %d5, %r0, 16; add.s64 %d4, %d4, %d5; ld.global.v4.u32 {{%f0, %f1, %f2, %f3}}, [%d4];
    ld.param.u64 %d6, [out]; mul.wide.u32 %d7, %r0, 4; add.s64 %d6, %d6, %d7;
    {" ".join(f"ld.global.b32 %a{i}, [%d6+{512 * i}];" for i in range(nd))}
    {fence} setp.ne.u32 %p2, {int(accumulate)}, 0;
    wgmma.mma_async.sync.aligned.m64n{n}k{k}.{op} {{{acc}}}, {"{%f0, %f1, %f2, %f3}" if registers else "%d2"}, %d3, {", ".join(["%p2", *imm])};
    wgmma.commit_group.sync.aligned; {wait}
    {" ".join(f"st.global.b32 [%d6+{512 * i}], %a{i};" for i in range(nd))}"""
    # Thread t's accumulator i: its row and column; two halves share a register.
    t, i = np.arange(128)[:, None], np.arange(n // 2)
    at = 16 * (t // 32) + t % 32 // 4 + 8 * (i >> 1 & 1), 8 * (i >> 2) + 2 * (t % 4) + (i & 1)
    c = np.broadcast_to(c, (64, n)).astype(np.float16 if half else np.int32 if kind == "s8" else np.float32)
    out = np.ascontiguousarray(c[at].view(np.uint32 if half else c.dtype).T)
    regs = fragment(a) if registers else np.zeros((128, 4), np.uint32)
    sim.run(
        kernel(body, ".param .u64 image, .param .u64 regs, .param .u64 out", max(len(image), 1024)),
        image,
        regs,
        out,
        block=128,
    )
    got = np.empty_like(c)
    got[at] = np.ascontiguousarray(out.T).view(c.dtype)
    return got


def wgmma(sim, kind, n, *args, accumulate=False, scale=(1, 1), half=False, operands=None, loose=0.0, **options):
    """Compares one product with float64; `loose`: relative to the largest addend, what else the sum may be off."""
    a, b = operands or (operand(kind, 64, TYPES[kind][1]), operand(kind, n, TYPES[kind][1]))
    got = wgmma_product(sim, kind, a, b, *args, accumulate=accumulate, scale=scale, half=half, **options)
    want = (a.double() @ b.double().T).numpy() * scale[0] * scale[1] + (2 if accumulate else 0)
    tolerance = 0 if kind == "s8" else 2**-9 * np.abs(want).max() if half else 1e-5 * max(1, np.abs(want).max())
    tolerance += loose * float(a.double().abs().max() * b.double().abs().max())
    assert np.abs(got - want).max() <= tolerance


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", TYPES)
def test_wgmma_k_major(sim, kind, mode):
    wgmma(sim, kind, 32, mode, accumulate=mode == 64)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("trans", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_wgmma_mn_major(sim, kind, trans, mode):
    wgmma(sim, kind, 128, mode, trans)


@pytest.mark.parametrize("kind", TYPES)
def test_wgmma_registers(sim, kind):
    wgmma(sim, kind, 64, registers=True, trans=(False, kind == "bf16"))


@pytest.mark.parametrize("n", range(8, 257, 8))
def test_wgmma_every_n(sim, n):
    wgmma(sim, "e4m3", n)


def test_wgmma_scales_and_half_accumulators(sim):
    wgmma(sim, "bf16", 16, scale=(-1, 1), accumulate=True)
    wgmma(sim, "f16", 24, half=True, accumulate=True)
    wgmma(sim, "e5m2", 24, half=True)


@pytest.mark.parametrize("order", [{}, {"timing": "late"}, {"timing": "random", "seed": 4}], ids=str)
def test_wgmma_is_one_operation_of_four_warps(sim, order):
    """It starts when the last warp has issued it: what each wrote and fenced before that is seen. It is over for all at
    once: any of them may then overwrite the operands."""
    sim.option(**order)
    fence, wait = "fence.proxy.async.shared::cta;", "wgmma.wait_group.sync.aligned 0;"
    overwrite = "@%p0 st.shared.u32 [%r9], 0; @%p0 st.shared.u32 [%r1], 0;"
    wgmma(sim, "bf16", 64, barrier=fence, wait=wait + overwrite)
    with pytest.raises(SimError, match=r"race on shared memory.*no proxy fence"):
        wgmma(sim, "bf16", 64, barrier="bar.sync 0;")
    with pytest.raises(SimError, match=r"race on shared memory.*(nothing waits for that operation|nothing orders)"):
        wgmma(sim, "bf16", 64, wait=overwrite + wait)


@pytest.mark.parametrize("registers", [False, True])
def test_wgmma_fence(sim, registers):
    """What threads have written into the registers of a wgmma is seen by it after wgmma.fence."""
    what = "an accumulator of a wgmma has been written since the last wgmma.fence"
    with pytest.raises(SimError, match=what):
        wgmma(sim, "bf16", 16, registers=registers, fence="")
    late = "wgmma.fence.sync.aligned; mov.b32 %f0, %f1;"
    if registers:
        with pytest.raises(SimError, match=r"an A register of a wgmma has been written since the last wgmma.fence"):
            wgmma(sim, "bf16", 16, registers=True, fence=late)
    else:
        wgmma(sim, "bf16", 16, fence=late)  # no register of this wgmma


def test_proxy_fence_of_another_space(sim):
    for space in ("", ".shared::cta", ".shared::cluster"):
        wgmma(sim, "bf16", 16, barrier=f"fence.proxy.async{space}; bar.sync 0;")
    with pytest.raises(SimError, match=r"race on shared memory.*no proxy fence"):
        wgmma(sim, "bf16", 16, barrier="fence.proxy.async.global; bar.sync 0;")


def test_wgmma_that_a_warp_does_not_issue(sim):
    sim.option(max_idle=100_000)
    with pytest.raises(SimError, match=r"(?s)deadlock.*asynchronous operations that cannot finish"):
        wgmma(
            sim,
            "bf16",
            64,
            barrier="fence.proxy.async; setp.ge.u32 %p3, %r0, 96; @%p3 bra SLEEP; bra GO; SLEEP: bra SLEEP; GO:",
        )


@pytest.mark.parametrize("first", [0, 1])
def test_buffers_that_touch(sim, first):
    """An address that ends one buffer and begins the next belongs to the latter."""
    x = np.arange(16, dtype=np.int32)
    parts, out = (x[:8], x[8:]), np.zeros(1, np.int32)
    body = """.visible .entry k(.param .u64 p, .param .u64 q, .param .u64 d) {
        .reg .b64 %a; .reg .b32 %v; ld.param.u64 %a, [p]; ld.global.u32 %v, [%a];
        ld.param.u64 %a, [d]; st.global.u32 [%a], %v; ret; }"""
    sim.run(body, parts[first], parts[1 - first], out, block=1)
    assert out[0] == 8 * first
