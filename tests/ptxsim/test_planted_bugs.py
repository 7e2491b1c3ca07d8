# ruff: noqa: E501 - PTX reads better unbroken
"""A known-good kernel runs right and silently; each planted bug is reported by what it is."""

from __future__ import annotations

import os
import re
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from simulator import HEADER, SimError, TensorMap

from build_backend import toolchain

BUGS = [
    "none",
    "no proxy fence",
    "wrong parity",
    "too many bytes",
    "too few bytes",
    "early release",
    "wrong SBO",
    "no wait",
    "exit before store",
    "barrier count",
    "no barrier",
    "swapped LBO and SBO",
    "no release wait",
]
SHARED = 3 * 2 * 128 * 64 * 2 + 128 * 128 * 2 + 64
RNG = np.random.default_rng(0)


@pytest.fixture(scope="session")
def ptx(tmp_path_factory) -> str:
    nvcc = toolchain.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    out = tmp_path_factory.mktemp("ptx") / "gemm.ptx"
    subprocess.run(
        [
            nvcc.nvcc,
            "-std=c++17",
            "-O3",
            "-lineinfo",
            "-gencode=arch=compute_90a,code=compute_90a",
            "-ptx",
            "-o",
            out,
            Path(__file__).with_name("gemm.cu"),
        ],
        check=True,
        env={k: v for k, v in os.environ.items() if k != "LD_PRELOAD"},  # a sanitizer's library is ours, not nvcc's
    )
    return out.read_text()


def bf16(x: np.ndarray) -> np.ndarray:
    return ((x.astype(np.float32).view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


def wide(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def gemm(sim, ptx: str, bug: str = "none", M=256, N=200, K=328, grid=2):
    a, b, d = bf16(RNG.standard_normal((M, K))), bf16(RNG.standard_normal((N, K))), np.full((M, N), 0x7FC0, np.uint16)

    def over(x, rows):
        return TensorMap(sim, "bf16", x.ctypes.data, [x.shape[1], x.shape[0]], [x.strides[0]], [64, rows], 128).data

    params = (
        over(a, 128)
        + over(b, 128)
        + over(d, 64)
        + struct.pack("<4i", -(-M // 128), -(-N // 128), -(-K // 64), BUGS.index(bug))
    )
    params = params.ljust(-(-len(params) // 128) * 128, b"\0")
    sim.load(ptx, "gemm").launch(params, grid=grid, block=384, shared=SHARED, buffers=[(a, 1), (b, 1), (d, 2)])
    want = wide(a) @ wide(b).T
    error = np.abs(wide(d) - want)
    assert error.max() <= 2**-8 * np.abs(want).max(), error.max()


@pytest.mark.parametrize("timing", ["early", "late", "random"])
@pytest.mark.parametrize("grid", [1, 4])
def test_good_kernel(sim, ptx, timing, grid):
    sim.option(timing=timing, seed=7 if timing == "random" else 0)
    gemm(sim, ptx, grid=grid)


def test_same_seed_same_run(sim, ptx):
    runs = []
    for _ in range(2):
        sim.option(timing="random", seed=3)
        gemm(sim, ptx)
        runs.append(sim.counters())
    assert runs[0] == runs[1]


REPORTS = {
    "no proxy fence": "no proxy fence",
    "wrong parity": r"deadlock.*waits for mbarrier at shared offset \d+ parity 0 \(phase 0: 0 of 8 arrivals",
    "too many bytes": r"deadlock.*waits for mbarrier.*1 of 1 arrivals, 32768 bytes came, 128 outstanding",
    "too few bytes": r"deadlock.*waits for mbarrier.*1 of 1 arrivals, 32768 bytes came, -128 outstanding",
    "early release": r"race on shared memory.*asynchronous write.*wgmma.*nothing waits for that operation",
    "wrong SBO": r"operand A of a wgmma is no regular part of the tensor.*SBO 512.*with SBO 1024 it would be",
    "swapped LBO and SBO": "no regular part of the tensor.*LBO 1024, SBO 16.*with LBO and SBO swapped it would be",
    "no wait": r"an accumulator is read before wgmma.wait_group|race on shared memory.*wgmma",
    "exit before store": "exits before a bulk store has read its shared memory",
    "barrier count": "deadlock.*waits at barrier 1: 128 of 160 threads|is used with 160 threads",
    "no barrier": r"race on shared memory.*read.*stmatrix.*(nothing orders them|no proxy fence)",
    "no release wait": r"race on shared memory.*stmatrix|nothing waits for that operation",
}


@pytest.mark.parametrize("timing", ["early", "late"])
@pytest.mark.parametrize("bug", REPORTS)
def test_planted(sim, ptx, bug, timing):
    sim.option(timing=timing)
    with pytest.raises(SimError) as error:
        gemm(sim, ptx, bug, grid=1)
    assert re.search(REPORTS[bug], str(error.value), re.S), str(error.value)
    assert "gemm.cu:" in str(error.value)


@pytest.mark.parametrize("timing", ["early", "late"])
def test_setmaxnreg_over_the_pool(sim, ptx, timing):
    sim.option(timing=timing)
    with pytest.raises(SimError, match=r"setmaxnreg.inc to 240: waits for 2304 registers, the CTA's pool has"):
        gemm(sim, re.sub(r"(setmaxnreg\.inc\S+\s+)232", r"\g<1>240", ptx))


# ---- small kernels in PTX


def kernel(body: str, shared: str = ".shared .align 16 .b8 s[1024];", params: str = ".param .u64 out") -> str:
    return (
        HEADER
        + f".visible .entry k({params}) {{ .reg .b32 %r<16>; .reg .b64 %d<8>; .reg .pred %p<4>; {shared}\nmov.u32 %r0, %tid.x;\n{body}\nret; }}"
    )


def expect(sim, text: str, body: str, *args, **launch):
    out = np.zeros(1024, np.uint32)
    with pytest.raises(SimError, match=text):
        sim.run(kernel(body), out, *args, **launch)


def test_shared_memory_race_between_warps(sim):
    write = "mov.u32 %r1, s; mad.lo.s32 %r2, %r0, 4, %r1; st.shared.u32 [%r2], %r0;"
    read = "xor.b32 %r3, %r0, 32; mad.lo.s32 %r2, %r3, 4, %r1; ld.shared.u32 %r4, [%r2]; ld.param.u64 %d0, [out]; mul.wide.u32 %d1, %r0, 4; add.s64 %d0, %d0, %d1; st.global.u32 [%d0], %r4;"
    expect(sim, "race on shared memory.*nothing orders them|uninitialised", write + read, block=64)
    out = np.zeros(64, np.uint32)
    sim.run(kernel(write + "bar.sync 0;" + read), out, block=64)
    assert np.array_equal(out, np.arange(64) ^ 32)


def test_global_race_between_ctas(sim):
    body = "mov.u32 %r1, %ctaid.x; ld.param.u64 %d0, [out]; st.global.u32 [%d0], %r1;"
    expect(
        sim,
        "race on buffer 0.*CTA 1|race on buffer 0",
        "add.u32 %r0, %r0, 1;"
        + body.replace("st.global.u32 [%d0], %r1", "add.u32 %r1, %r1, 7; st.global.u32 [%d0], %r1"),
        grid=2,
        block=32,
    )


def test_flag_between_ctas(sim):
    """CTA 1 waits for CTA 0's flag; release and acquire make its data visible."""

    def body(release: str, acquire: str) -> str:
        return f"""ld.param.u64 %d0, [out]; mov.u32 %r1, %ctaid.x; setp.ne.u32 %p0, %r0, 0; @%p0 bra END; setp.ne.u32 %p1, %r1, 0; @%p1 bra WAIT;
        st.global.u32 [%d0], 5; st.{release}.gpu.global.u32 [%d0+4], 1; bra END;
        WAIT: ld.{acquire}.gpu.global.u32 %r2, [%d0+4]; setp.eq.u32 %p2, %r2, 0; @%p2 bra WAIT;
        ld.global.u32 %r3, [%d0]; st.global.u32 [%d0+8], %r3; END:"""

    for order in ("forward", "reverse"):
        sim.option(order=order, eager=1)
        out = np.zeros(4, np.uint32)
        sim.run(kernel(body("release", "acquire")), out, grid=2, block=32)
        assert out[2] == 5
        expect(sim, "race on buffer 0", body("relaxed", "acquire"), grid=2, block=32)
    # With room for one CTA at a time in reverse order, the waiting one can never be helped.
    sim.option(order="reverse", eager=0, sms=1, max_idle=100_000)
    expect(
        sim, "(?s)deadlock.*runs without effect", body("release", "acquire") + "mov.u32 %r5, s;", grid=64, block=1024
    )


@pytest.mark.parametrize("timing", ["early", "late"])
def test_cp_async_reads_what_another_cta_writes(sim, timing):
    sim.option(timing=timing)
    body = """ld.param.u64 %d0, [out]; mov.u32 %r1, %ctaid.x; mov.u32 %r2, s; setp.ne.u32 %p0, %r1, 0; @%p0 bra COPY; st.global.u32 [%d0], 5; bra END;
    COPY: cp.async.ca.shared.global [%r2], [%d0+OFFSET], 4; cp.async.wait_all; END:"""
    sim.run(kernel(body.replace("OFFSET", "4")), np.zeros(4, np.uint32), grid=2, block=1)
    expect(sim, "(?s)race on buffer 0.*cp.async", body.replace("OFFSET", "0"), grid=2, block=1)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (
            "ld.param.u64 %d0, [out]; ld.global.u32 %r1, [%d0+4096];",
            "out-of-bounds global read of 4 bytes at byte offset 4096 of buffer 'buffer 0' of 4096 bytes",
        ),
        (
            "ld.param.u64 %d0, [out]; st.global.u32 [%d0+-4], %r0;",
            "out-of-bounds global write of 4 bytes at 4 bytes before buffer",
        ),
        ("ld.param.u64 %d0, [out]; ld.global.u32 %r1, [%d0+2];", "misaligned read of 4 bytes"),
        ("mov.u32 %r1, s; st.shared.u32 [%r1+1024], %r0;", "out-of-bounds shared write"),
        ("mov.u32 %r1, s; st.shared.v4.u32 [%r1+8], {%r0, %r0, %r0, %r0};", "misaligned shared write of 16 bytes"),
        (
            "ld.param.u64 %d0, [out]; mov.u32 %r1, s; ld.shared.u32 %r2, [%r1]; add.u32 %r2, %r2, 1; st.global.u32 [%d0], %r2;",
            "uninitialised value is stored to global",
        ),
        ("add.u32 %r2, %r3, 1; setp.eq.u32 %p0, %r2, 0; @%p0 bra END; END:", "uninitialised value used as predicate"),
        ("mov.u32 %r1, s; add.u32 %r1, %r1, %r5; st.shared.u32 [%r1], 1;", "uninitialised value used as address"),
        ("trap;", "^trap"),
        (
            "setp.lt.u32 %p0, %r0, 16; @%p0 bra A; shfl.sync.idx.b32 %r1, %r0, 0, 31, -1; bra END; A: vote.sync.any.pred %p1, %p0, -1; END:",
            "deadlock.*waits for lanes that never come",
        ),
        ("shfl.sync.idx.b32 %r1, %r0, 0, 31, 1;", "not in its own member mask"),
        ("bar.sync 1, 48;", "no multiple of 32"),
        (
            "setp.ge.u32 %p0, %r0, 32; @%p0 bra A; bar.sync 1, 64; A: bar.sync 2, 64;",
            "deadlock.*barrier 1: 32 of 64 threads",
        ),
        ("mov.u32 %r1, s; mbarrier.try_wait.parity.shared.b64 %p0, [%r1], 0;", "no mbarrier has been initialised"),
        (
            "mov.u32 %r1, s; mbarrier.init.shared.b64 [%r1], 1; mbarrier.arrive.shared.b64 _, [%r1], 2;",
            "arrival without a pending count|init of a live",
        ),
    ],
)
def test_reports(sim, body, text):
    expect(sim, "(?s)" + text, body, block=64 if "deadlock.*barrier" in text else 32)


def test_unknown_instruction_is_named(sim):
    with pytest.raises(SimError, match=r"PTX line .*frobnicate.f32"):
        sim.run(kernel("frobnicate.f32 %r1, %r2;"), np.zeros(1, np.uint32))
    with pytest.raises(SimError, match=r"modifier .wobbly is not supported"):
        sim.run(kernel("add.wobbly.s32 %r1, %r0, %r0;"), np.zeros(1, np.uint32))
    with pytest.raises(SimError, match=r"^PTX line \d+: red\.async\.relaxed\.cluster\.cas"):  # no such operation
        sim.run(
            kernel("red.async.relaxed.cluster.cas.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r1], %r0, [%r2];"),
            np.zeros(1, np.uint32),
        )
    with pytest.raises(SimError, match="a scope is missing"):
        sim.run(kernel("ld.acquire.global.u32 %r1, [%d0];"), np.zeros(1, np.uint32))


SYNC = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
RELAXED = "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;"


def cluster_kernel(start=RELAXED, middle=SYNC, end=RELAXED) -> str:
    """Two CTAs write into each other's shared memory, then read their own, then the other's."""
    return kernel(f"""mov.u32 %r1, s; mov.u32 %r2, %cluster_ctarank; xor.b32 %r3, %r2, 1; mapa.shared::cluster.u32 %r4, %r1, %r3;
    mad.lo.s32 %r5, %r0, 4, %r4; mad.lo.s32 %r6, %r2, 100, %r0; {start} st.shared::cluster.u32 [%r5], %r6;
    {middle}
    mad.lo.s32 %r7, %r0, 4, %r1; ld.shared.u32 %r8, [%r7]; ld.param.u64 %d0, [out]; mov.u32 %r9, %ctaid.x; mad.lo.s32 %r9, %r9, 32, %r0; mul.wide.u32 %d1, %r9, 4; add.s64 %d0, %d0, %d1;
    st.global.u32 [%d0], %r8; ld.shared::cluster.u32 %r10, [%r5]; st.global.u32 [%d0+256], %r10; {end}""")


@pytest.mark.parametrize("order", [{}, {"timing": "late"}, {"seed": 5, "timing": "random"}], ids=str)
def test_cluster_barriers(sim, order):
    sim.option(**order)
    out = np.zeros(128, np.uint32)
    launch = {"grid": 2, "block": 32, "cluster": 2}
    sim.run(cluster_kernel(), out, **launch)
    lanes = np.arange(32)
    assert np.array_equal(out, np.concatenate([lanes + 100, lanes, lanes, lanes + 100]))
    for text, missing in {
        "shared memory of CTA rank . is accessed before that CTA is known to have started": {"start": ""},
        "race on shared memory of CTA .*nothing orders them|uninitialised": {"middle": RELAXED},
        "CTA . may exit before warp 0 of CTA . accesses its shared memory|whose threads have all exited": {"end": ""},
    }.items():
        with pytest.raises(SimError, match=text):
            sim.run(cluster_kernel(**missing), np.zeros(128, np.uint32), **launch)


def remote_arrive(fence="fence.mbarrier_init.release.cluster;", start=RELAXED, wait=True, end="") -> str:
    """Rank 1 arrives at rank 0's mbarrier."""
    wait = "@!%p1 bra E; W: mbarrier.try_wait.parity.shared.b64 %p2, [bar], 0; @!%p2 bra W;" if wait else ""
    return kernel(
        f"""mov.u32 %r1, bar; mov.u32 %r2, %cluster_ctarank; setp.eq.u32 %p0, %r0, 0; setp.eq.u32 %p1, %r2, 0;
    @%p0 mbarrier.init.shared::cta.b64 [%r1], 32; {fence} {start}
    @%p1 bra WAIT; mapa.shared::cluster.u32 %r3, %r1, 0; mbarrier.arrive.shared::cluster.b64 _, [%r3]; WAIT: {wait} E: {end}""",
        ".shared .align 8 .b64 bar;",
    )


@pytest.mark.parametrize("order", [{}, {"timing": "late"}, {"seed": 5, "timing": "random"}], ids=str)
def test_mbarriers_of_other_ctas(sim, order):
    sim.option(**order)
    launch = {"grid": 2, "block": 32, "cluster": 2}
    out = np.zeros(1, np.uint32)
    sim.run(remote_arrive(), out, **launch)
    sim.run(remote_arrive(wait=False, end=RELAXED), out, **launch)
    sim.run(remote_arrive(fence="", start=SYNC), out, **launch)
    for text, missing in {
        "race on an mbarrier of CTA 0: .*a cluster barrier is missing|no mbarrier has been initialised": {"start": ""},
        "race on an mbarrier of CTA 0: .*fence.mbarrier_init is missing": {"fence": ""},
        "CTA 0 may exit before warp 0 of CTA 1 accesses its shared memory|whose threads have all": {"wait": False},
    }.items():
        with pytest.raises(SimError, match=text):
            sim.run(remote_arrive(**missing), out, **launch)


@pytest.mark.parametrize("seed", range(4))
def test_mbarrier_used_before_a_barrier(sim, seed):
    sim.option(seed=seed)
    body = "setp.eq.u32 %p0, %r0, 0; @%p0 mbarrier.init.shared::cta.b64 [bar], 64; {} mbarrier.arrive.shared::cta.b64 _, [bar];"
    sim.run(kernel(body.format("bar.sync 0;"), ".shared .align 8 .b64 bar;"), np.zeros(1, np.uint32), block=64)
    with pytest.raises(
        SimError, match=r"race on an mbarrier.*(a barrier of the CTA|bar.warp.sync) is missing|no mbarrier"
    ):
        sim.run(kernel(body.format(""), ".shared .align 8 .b64 bar;"), np.zeros(1, np.uint32), block=64)


def mn_major(sim, lbo=2048, sbo=1024, mode=1) -> None:
    """D [64, 128] = A [64, 16] * B [16, 128], both bf16 and loaded by TMA, B with N contiguous in two panels of 64."""
    a, b = bf16(RNG.standard_normal((64, 16))), bf16(RNG.standard_normal((16, 128)))
    out = np.zeros((64, 128), np.float32)
    maps = (
        TensorMap(sim, "bf16", a.ctypes.data, [16, 64], [32], [16, 64], 32),
        TensorMap(sim, "bf16", b.ctypes.data, [128, 16], [256], [64, 16], 128),
    )
    high = [16 >> 4 << 16 | 256 >> 4 << 32 | 3 << 62, lbo >> 4 << 16 | sbo >> 4 << 32 | mode << 62]
    tma = "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
    acc = ", ".join(f"%a{i}" for i in range(64))
    body = f""".reg .b32 %a<64>; .shared .align 1024 .b8 m[8192]; .shared .align 8 .b64 bar; mov.u32 %r1, m; add.u32 %r2, %r1, 4096;
    setp.ne.u32 %p0, %r0, 0; @%p0 bra J; mbarrier.init.shared::cta.b64 [bar], 1; fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 6144; mov.b64 %d0, ma; cvta.param.u64 %d0, %d0; mov.b64 %d1, mb; cvta.param.u64 %d1, %d1;
    {tma} [%r1], [%d0, {{0, 0}}], [bar]; {tma} [%r2], [%d1, {{0, 0}}], [bar]; add.u32 %r3, %r2, 2048; {tma} [%r3], [%d1, {{64, 0}}], [bar];
    J: bar.sync 0; W: mbarrier.try_wait.parity.shared.b64 %p1, [bar], 0; @!%p1 bra W;
    and.b32 %r3, %r1, 0x3ffff; shr.u32 %r3, %r3, 4; cvt.u64.u32 %d2, %r3; or.b64 %d2, %d2, {high[0]};
    and.b32 %r3, %r2, 0x3ffff; shr.u32 %r3, %r3, 4; cvt.u64.u32 %d3, %r3; or.b64 %d3, %d3, {high[1]};
    wgmma.fence.sync.aligned; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {{{acc}}}, %d2, %d3, 0, 1, 1, 0, 1;
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    ld.param.u64 %d4, [out]; shr.u32 %r3, %r0, 5; shl.b32 %r3, %r3, 4; and.b32 %r4, %r0, 31; shr.u32 %r5, %r4, 2; add.u32 %r3, %r3, %r5; and.b32 %r4, %r4, 3;
    shl.b32 %r3, %r3, 9; mad.lo.u32 %r3, %r4, 8, %r3; cvt.u64.u32 %d5, %r3; add.s64 %d4, %d4, %d5;
    {" ".join(f"st.global.b32 [%d4+{4096 * (i >> 1 & 1) + 32 * (i >> 2) + 4 * (i & 1)}], %a{i};" for i in range(64))}"""
    params = ".param .align 64 .b8 ma[128], .param .align 64 .b8 mb[128], .param .u64 out"
    sim.run(kernel(body, "", params), *maps, out, block=128, buffers=[(a, 1), (b, 1)])
    assert np.abs(out - wide(a) @ wide(b)).max() < 1e-4


@pytest.mark.parametrize("timing", ["early", "late"])
def test_descriptor_of_an_mn_major_operand(sim, timing):
    """N is contiguous in panels of 64 columns, LBO apart; SBO is the step of eight rows of k."""
    sim.option(timing=timing)
    mn_major(sim)
    irregular = r"operand B of a wgmma is no regular part of the tensor.*"
    for text, wrong in {
        irregular + "LBO 1024, SBO 2048.*with LBO and SBO swapped it would be": {"lbo": 1024, "sbo": 2048},
        irregular + "are read twice .*LBO 2048, SBO 2048.*with SBO 1024 it would be": {"sbo": 2048},
        irregular + "are read twice .*LBO 1024, SBO 1024": {"lbo": 1024},
        irregular + "LBO 2048, SBO 512.*with SBO 1024 it would be": {"sbo": 512},
        # Spans of 64 bytes: the last panel is past the operand, where the mbarrier is.
        irregular + "swizzle mode 2|race on shared memory.*asynchronous read.*mbarrier.init": {"mode": 2},
        irregular + "swizzle mode 0": {"mode": 0},
    }.items():
        with pytest.raises(SimError, match=text):
            mn_major(sim, **wrong)
    with pytest.raises(SimError, match=r"reaches shared offset|uninitialised|mbarrier.init"):  # there is no panel
        mn_major(sim, lbo=4096)


def test_tensor_map_proxy(sim):
    """A map that the kernel wrote is used by a copy: the proxy fence makes it seen."""
    x, work = np.arange(32, dtype=np.uint8), np.zeros(256, np.uint8)
    tensor = TensorMap(sim, "u8", x.ctypes.data, [32], [], [32])
    space = work[-work.ctypes.data % 128 :][:128]
    body = """.shared .align 128 .b8 t[128]; .shared .align 8 .b64 bar; mov.b64 %d0, map; cvta.param.u64 %d0, %d0; ld.param.u64 %d1, [work]; mad.wide.u32 %d2, %r0, 4, %d0; mad.wide.u32 %d3, %r0, 4, %d1;
    ld.u32 %r1, [%d2]; st.global.u32 [%d3], %r1; bar.sync 0; setp.ne.u32 %p0, %r0, 0; @%p0 bra E; mbarrier.init.shared.b64 [bar], 1; mov.u32 %r2, t; mov.u32 %r3, bar;
    mbarrier.arrive.expect_tx.shared.b64 _, [bar], 32; {} cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r2], [%d1, {{0}}], [%r3];
    W: mbarrier.try_wait.parity.shared.b64 %p1, [bar], 0; @!%p1 bra W; E:"""
    params = ".param .align 64 .b8 map[128], .param .u64 work"
    fence = "fence.proxy.tensormap::generic.acquire.gpu [%d1], 128;"
    sim.run(kernel(body.format(fence), "", params), tensor, space, buffers=[(x, 1)])
    with pytest.raises(SimError, match=r"race on the tensor map in buffer .*st.global.u32.*no fence.proxy.tensormap"):
        sim.run(kernel(body.format(""), "", params), tensor, space, buffers=[(x, 1)])
    with pytest.raises(SimError, match=r"no fence\.proxy\.tensormap"):  # the writer's half does not do
        fence = "fence.proxy.tensormap::generic.release.gpu;"
        sim.run(kernel(body.format(fence), "", params), tensor, space, buffers=[(x, 1)])


def test_launch_limits(sim):
    k = sim.load(kernel("mov.u32 %r1, s;"))
    out = np.zeros(4, np.uint32)
    for text, launch in {
        "1088 threads per CTA": {"block": (64, 17)},
        "block dimension 0 is 1056": {"block": 1056},
        "no multiple of the cluster": {"grid": 3, "cluster": 2},
        "needs NON_PORTABLE": {"grid": 16, "cluster": 16},
        "is more than a CTA|more than a CTA may have": {"shared": 232448},
        "grid dimension 0 is 0": {"grid": 0},
    }.items():
        with pytest.raises(SimError, match=text):
            k.launch(out, **launch)
    many = sim.load(kernel("mov.u32 %r1, s;").replace(") {", ") .maxnreg 128 {", 1))
    many.launch(out, block=512)
    with pytest.raises(SimError, match="128 registers for each of 544 threads; an SM has 65536"):
        many.launch(out, block=544)


def test_matrix_rows_are_aligned(sim):
    for load in (
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r3}, [%r2];",
        "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r2], {%r0};",
    ):
        fill = "mov.u32 %r1, s; mad.lo.u32 %r2, %r0, 16, %r1; st.shared.v4.u32 [%r2], {%r0, %r0, %r0, %r0}; bar.sync 0;"
        sim.run(kernel(fill + load), np.zeros(1, np.uint32))
        expect(sim, "misaligned shared (read|write) of 16 bytes", fill + "add.u32 %r2, %r2, 8;" + load)
