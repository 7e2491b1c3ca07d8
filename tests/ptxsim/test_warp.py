# ruff: noqa: E501 - PTX reads better unbroken
"""Instructions that lanes of a warp run together, control flow and barriers: each against a model written from the PTX
ISA."""

from __future__ import annotations

import numpy as np
import pytest
from simulator import HEADER, SimError

RNG = np.random.default_rng(5)
ALL = 0xFFFFFFFF


def warp(sim, body: str, *inputs: np.ndarray, outputs: int = 1, block: int = 32, extra: str = "") -> list[np.ndarray]:
    """Runs `body` in `block` threads: %i0, %i1 ... hold each thread's inputs (32 or 64 bits wide), %o0 ... are stored."""
    words = {4: "b32", 8: "b64"}
    params = ", ".join(f".param .u64 p{k}" for k in range(len(inputs) + outputs))
    text = [
        extra,
        f".visible .entry k({params}) {{ .reg .b32 %t, %n<8>, %o<{outputs}>; .reg .b64 %a, %b, %w<4>; .reg .pred %p<8>; .reg .b16 %h<4>;",
        "mov.u32 %t, %tid.x;",
    ]
    for k, x in enumerate(inputs):
        text.append(
            f".reg .{words[x.itemsize]} %i{k}; ld.param.u64 %a, [p{k}]; mad.wide.u32 %a, %t, {x.itemsize}, %a; ld.global.{words[x.itemsize]} %i{k}, [%a];"
        )
    text += ["".join(f"mov.u32 %o{k}, 0;" for k in range(outputs)), body]
    for k in range(outputs):
        text.append(f"ld.param.u64 %a, [p{len(inputs) + k}]; mad.wide.u32 %a, %t, 4, %a; st.global.u32 [%a], %o{k};")
    out = [np.zeros(block, np.uint32) for _ in range(outputs)]
    sim.run("\n".join([*text, "ret; }"]), *inputs, *out, block=block)
    return out


def words(n: int = 32) -> np.ndarray:
    return RNG.integers(0, 1 << 32, n, dtype=np.uint32)


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8, 4])
def test_shfl(sim, mode, width):
    x, segment = words(), 32 - width
    for b in (0, 1, 3, 7, 31):
        clamp = 0 if mode == "up" else 31
        body = f"shfl.sync.{mode}.b32 %o0|%p0, %i0, {b}, {segment << 8 | clamp}, {ALL}; selp.u32 %o1, 1, 0, %p0;"
        got, found = warp(sim, body, x, outputs=2)
        for lane in range(32):
            first, last = lane // width * width, lane // width * width + width - 1
            source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | b % width}[mode]
            inside = source >= first if mode == "up" else source <= last
            assert (got[lane], found[lane]) == (x[source if inside else lane], inside), (b, lane)


def test_shfl_of_a_lane_outside_is_undefined(sim):
    body = "setp.lt.u32 %p0, %t, 16; @!%p0 bra E; shfl.sync.idx.b32 %o0, %i0, 20, 31, 0xffff; E:"
    with pytest.raises(SimError, match="uninitialised value is stored"):
        warp(sim, body, words())


@pytest.mark.parametrize("odd", [False, True])
def test_vote(sim, odd):
    x = words() & 1 if odd else np.full(32, 1, np.uint32)
    body = (
        "setp.ne.u32 %p0, %i0, 0;"
        + "".join(
            f"vote.sync.{m}.pred %p1, {n}%p0, {ALL}; selp.u32 %o{k}, 1, 0, %p1;"
            for k, (m, n) in enumerate([("all", ""), ("any", ""), ("uni", ""), ("any", "!")])
        )
        + f"vote.sync.ballot.b32 %o4, %p0, {ALL};"
    )
    every, some, same, none, ballot = warp(sim, body, x, outputs=5)
    assert set(every) == {int(x.all())} and set(some) == {int(x.any())} and set(none) == {int(not x.all())}
    assert set(same) == {int(x.all() or not x.any())}
    assert set(ballot) == {sum(1 << i for i in range(32) if x[i])}


def test_groups_of_lanes(sim):
    """Two halves of a diverged warp vote, match and reduce apart."""
    x = (words() % 3).astype(np.uint32)
    half = "setp.ge.u32 %p0, %t, 16; selp.b32 %n0, 0xffff0000, 0xffff, %p0;"
    body = (
        half
        + "setp.eq.u32 %p1, %i0, 1; @%p0 bra H; vote.sync.ballot.b32 %o0, %p1, 0xffff; redux.sync.add.u32 %o1, %i0, 0xffff; bra E;"
        + "H: vote.sync.ballot.b32 %o0, %p1, 0xffff0000; redux.sync.add.u32 %o1, %i0, 0xffff0000; E: match.any.sync.b32 %o2, %i0, %n0;"
    )
    ballot, total, match = warp(sim, body, x, outputs=3)
    for lane in range(32):
        group = range(lane // 16 * 16, lane // 16 * 16 + 16)
        assert ballot[lane] == sum(1 << i for i in group if x[i] == 1)
        assert total[lane] == sum(int(x[i]) for i in group)
        assert match[lane] == sum(1 << i for i in group if x[i] == x[lane])


@pytest.mark.parametrize("bits", [32, 64])
def test_match(sim, bits):
    dtype = np.uint32 if bits == 32 else np.uint64
    for x in ((words() % 5).astype(dtype) << (bits - 8), np.full(32, 9, dtype)):
        body = f"match.any.sync.b{bits} %o0, %i0, {ALL}; match.all.sync.b{bits} %o1|%p0, %i0, {ALL}; selp.u32 %o2, 1, 0, %p0;"
        any_, all_, same = warp(sim, body, x, outputs=3)
        assert any_.tolist() == [sum(1 << i for i in range(32) if x[i] == v) for v in x]
        alike = len(set(x.tolist())) == 1
        assert set(all_) == {ALL if alike else 0} and set(same) == {int(alike)}


def test_redux(sim):
    x = words()
    signed = x.astype(np.int32)
    want = {
        "add.u32": int(x.sum()),
        "add.s32": int(x.sum()),
        "min.u32": x.min(),
        "max.u32": x.max(),
        "min.s32": signed.min(),
        "max.s32": signed.max(),
        "and.b32": np.bitwise_and.reduce(x),
        "or.b32": np.bitwise_or.reduce(x),
        "xor.b32": np.bitwise_xor.reduce(x),
    }
    for op, value in want.items():
        (got,) = warp(sim, f"redux.sync.{op} %o0, %i0, {ALL};", x)
        assert set(got.tolist()) == {int(value) & ALL}, op


def test_elect_and_activemask(sim):
    body = (
        "setp.lt.u32 %p0, %t, 20; @%p0 bra E; elect.sync %o0|%p1, 0xfff00000; selp.u32 %o1, 1, 0, %p1; activemask.b32 %o2; bra F;"
        "E: elect.sync _|%p1, 0xfffff; selp.u32 %o1, 1, 0, %p1; activemask.b32 %o2; F:"
    )
    leader, chosen, active = warp(sim, body, outputs=3)
    assert set(leader[20:]) == {20} and chosen.nonzero()[0].tolist() == [0, 20]
    assert set(active[:20]) == {0xFFFFF} and set(active[20:]) == {0xFFF00000}


def test_movmatrix(sim):
    """Lane l holds elements (l/4, 2 (l%4)) and (l/4, 2 (l%4) + 1) of an 8x8 matrix, and then of its transpose."""
    m = RNG.integers(0, 1 << 16, (8, 8)).astype(np.uint32)
    pair = lambda a: np.array([a[i // 4, i % 4 * 2] | a[i // 4, i % 4 * 2 + 1] << 16 for i in range(32)], np.uint32)  # noqa: E731
    (got,) = warp(sim, "movmatrix.sync.aligned.m8n8.trans.b16 %o0, %i0;", pair(m))
    assert np.array_equal(got, pair(m.T))


# ---- control flow


def test_branch_table(sim):
    body = (
        "TABLE: .branchtargets A, B, C; and.b32 %n0, %i0, 3; setp.eq.u32 %p0, %n0, 3; @%p0 bra.uni D; brx.idx %n0, TABLE;"
        "A: mov.u32 %o0, 10; bra E; B: mov.u32 %o0, 11; bra E; C: mov.u32 %o0, 12; bra E; D: mov.u32 %o0, 13; E:"
    ).replace("bra.uni", "bra")
    x = words()
    (got,) = warp(sim, body, x)
    assert np.array_equal(got, 10 + (x & 3))
    with pytest.raises(SimError, match="branch index 3 of 3 targets"):
        warp(sim, body.replace("@%p0 bra D;", ""), np.full(32, 3, np.uint32))


def test_printf(sim, capfd):
    fmt = b"lane %u of 100%%: %d %5.2f %s %llx|%lld %c %p\n\0"
    body = f"""
.extern .func (.param .b32 result) vprintf (.param .b64 format, .param .b64 arguments);
.global .align 1 .b8 fmt[{len(fmt)}] = {{{", ".join(map(str, fmt))}}};
.global .align 1 .b8 word[4] = {{111, 110, 101, 0}};
.visible .entry k() {{
  .local .align 8 .b8 args[64]; .reg .b64 %d<6>; .reg .b32 %r<3>;
  cvta.global.u64 %d0, fmt; mov.b64 %d1, args; cvta.local.u64 %d1, %d1; cvta.global.u64 %d2, word;
  mov.u32 %r0, %laneid; st.u32 [%d1], %r0;
  st.u32 [%d1+4], -7; st.f64 [%d1+8], 0d4009000000000000; st.u64 [%d1+16], %d2;
  st.u64 [%d1+24], 0x123456789abcdef; st.u64 [%d1+32], -5; st.u32 [%d1+40], 65; st.u64 [%d1+48], 255;
  {{ .param .b64 p0; st.param.b64 [p0], %d0; .param .b64 p1; st.param.b64 [p1], %d1; .param .b32 r;
    call.uni (r), vprintf, (p0, p1); }}
  ret; }}"""
    sim.run(body, block=2)
    line = "lane {} of 100%: -7  3.12 one 123456789abcdef|-5 A 0xff\n"
    assert capfd.readouterr().out == line.format(0) + line.format(1)


def test_failed_assertion(sim):
    text = b"row < rows\0"
    body = f"""
.extern .func __assertfail (.param .b64 message, .param .b64 file, .param .b32 line, .param .b64 function,
                            .param .b64 size) .noreturn;
.global .align 1 .b8 text[{len(text)}] = {{{", ".join(map(str, text))}}};
.visible .entry k() {{
  .reg .b64 %d<2>; .reg .b32 %r<2>; .reg .pred %p<2>;
  mov.u32 %r0, %laneid; setp.ne.u32 %p0, %r0, 5; @%p0 bra GOOD; cvta.global.u64 %d0, text;
  {{ .param .b64 p0; st.param.b64 [p0], %d0; .param .b64 p1; st.param.b64 [p1], %d0; .param .b32 p2;
    st.param.b32 [p2], 7; .param .b64 p3; st.param.b64 [p3], %d0; .param .b64 p4; st.param.b64 [p4], 1;
    call.uni __assertfail, (p0, p1, p2, p3, p4); }}
GOOD: ret; }}"""
    with pytest.raises(SimError, match=r"device assertion failed: row < rows\n.* lane 5 "):
        sim.run(body, block=32)


def test_calls_and_returns(sim):
    function = """.func (.param .b32 r) twice(.param .b32 x) { .reg .b32 %v; .reg .pred %q; ld.param.b32 %v, [x];
    setp.gt.u32 %q, %v, 100; @%q bra BIG; shl.b32 %v, %v, 1; st.param.b32 [r], %v; ret; BIG: st.param.b32 [r], 7; ret; }"""
    body = """{ .param .b32 a; .param .b32 b; st.param.b32 [a], %i0; call.uni (b), twice, (a); ld.param.b32 %o0, [b]; }
    setp.lt.u32 %p0, %t, 5; @!%p0 bra S; { .param .b32 a; .param .b32 b; st.param.b32 [a], %o0; call (b), twice, (a); ld.param.b32 %o0, [b]; } S:"""
    x = words() % 200
    (got,) = warp(sim, body, x, extra=function)
    twice = lambda v: np.where(v > 100, 7, 2 * v)  # noqa: E731
    assert np.array_equal(got, np.where(np.arange(32) < 5, twice(twice(x)), twice(x)))


def test_loops_with_different_trip_counts(sim):
    x = words() % 50
    (got,) = warp(
        sim, "L: setp.eq.u32 %p0, %i0, 0; @%p0 bra E; add.u32 %o0, %o0, %i0; sub.u32 %i0, %i0, 1; bra L; E:", x
    )
    assert np.array_equal(got, x * (x + 1) // 2)


def test_exit_and_trap(sim):
    body = "setp.lt.u32 %p0, %t, 7; @%p0 exit; mov.u32 %o0, 1;"
    assert warp(sim, body)[0].tolist() == [0] * 7 + [1] * 25
    for stop in ("trap", "brkpt"):
        with pytest.raises(SimError, match=r"^trap\n.*lane 3 "):
            warp(sim, f"setp.eq.u32 %p0, %t, 3; @%p0 {stop};")


def test_what_does_nothing_here(sim):
    """Hints, and what concerns launches that overlap: no effect on results."""
    body = """ld.param.u64 %a, [p0]; prefetch.global.L2 [%a]; prefetchu.L1 [%a]; applypriority.global.L2::evict_normal [%a], 128; pmevent 1;
    createpolicy.fractional.L2::evict_last.b64 %w0, 1.0; ld.global.L2::cache_hint.b32 %o0, [%a], %w0; nanosleep.u32 100;
    griddepcontrol.wait; griddepcontrol.launch_dependents;"""
    x = words()
    assert set(warp(sim, body, x)[0]) == {x[0]}


def setmaxnreg(sim, inc: int, dec: int, threads: int = 384) -> None:
    """Three warpgroups of 168 registers a thread: what the first gives up the others take."""
    out = np.zeros(threads, np.uint32)
    text = f""".visible .entry k(.param .u64 p) .maxntid {threads},1,1 {{ .reg .b32 %t; .reg .b64 %d; .reg .pred %p; mov.u32 %t, %tid.x;
    ld.param.u64 %d, [p]; mad.wide.u32 %d, %t, 4, %d; setp.lt.u32 %p, %t, 128; @%p bra A;
    setmaxnreg.inc.sync.aligned.u32 {inc}; bra B; A: setmaxnreg.dec.sync.aligned.u32 {dec}; B: st.global.u32 [%d], %t; ret; }}"""
    sim.run(text, out, block=threads)
    assert np.array_equal(out, np.arange(threads))


def test_setmaxnreg(sim):
    setmaxnreg(sim, 232, 40)  # 2 (232 - 168) = 168 - 40
    for inc, dec, text in (
        (160, 40, r"setmaxnreg\.inc to 160, but the warp has 168"),
        (232, 176, r"setmaxnreg\.dec to 176, but the warp has only 168"),
        (256, 20, r"multiple of 8 in 24\.\.256"),
    ):
        with pytest.raises(SimError, match=text):
            setmaxnreg(sim, inc, dec)
    # No thread has more than 255, in steps of 8: two warpgroups start with what ptxas compiles them for.
    setmaxnreg(sim, 248, 24, threads=256)
    with pytest.raises(SimError, match=r"setmaxnreg\.inc to 240, but the warp has 248"):
        setmaxnreg(sim, 240, 24, threads=256)


# ---- barriers of a CTA


@pytest.mark.parametrize("kind", ["bar", "barrier"])
def test_barrier_reductions(sim, kind):
    x = words(96) & 1
    aligned = ".aligned" if kind == "barrier" else ""
    for values in (x, np.ones(96, np.uint32), np.zeros(96, np.uint32)):
        body = f"""setp.ne.u32 %p0, %i0, 0; {kind}.red.popc{aligned}.u32 %o0, 1, %p0; {kind}.red.and{aligned}.pred %p1, 2, 96, %p0;
        {kind}.red.or{aligned}.pred %p2, 2, !%p0; selp.u32 %o1, 1, 0, %p1; selp.u32 %o2, 1, 0, %p2;"""
        count, every, some = warp(sim, body, values, outputs=3, block=96)
        assert (
            set(count) == {values.sum()} and set(every) == {int(values.all())} and set(some) == {int(not values.all())}
        )


def test_barrier_arrive_and_sync(sim):
    """Warp 0 produces and arrives, warps 1 and 2 wait; bar.warp.sync orders the lanes of one."""
    body = """.shared .align 4 .b8 s[128]; mov.u32 %n0, s; mad.lo.u32 %n1, %t, 4, %n0; setp.ge.u32 %p0, %t, 32; @%p0 bra C;
    add.u32 %n2, %t, 1000; st.shared.u32 [%n1], %n2; bar.warp.sync 0xffffffff; membar.cta; barrier.cta.arrive 3, 96; bra E;
    C: barrier.cta.sync 3, 96; and.b32 %n1, %t, 31; mad.lo.u32 %n1, %n1, 4, %n0; ld.shared.u32 %o0, [%n1]; E:"""
    got = warp(sim, body, block=96)[0]
    assert np.array_equal(got, np.concatenate([np.zeros(32), 1000 + np.arange(32), 1000 + np.arange(32)]))


@pytest.mark.parametrize(
    "fence", ["fence.acq_rel.gpu", "fence.sc.sys", "membar.gl", "membar.sys", "fence.acq_rel.cluster"]
)
def test_fences_make_relaxed_flags_release(sim, fence):
    """Message passing between CTAs: without the fences it is a race."""
    text = """.visible .entry k(.param .u64 out) {{ .reg .b32 %r<4>; .reg .b64 %d; .reg .pred %p; ld.param.u64 %d, [out]; mov.u32 %r0, %ctaid.x;
    setp.ne.u32 %p, %r0, 0; @%p bra W; st.global.u32 [%d], 5; {0} st.relaxed.gpu.global.u32 [%d+4], 1; ret;
    W: ld.relaxed.gpu.global.u32 %r1, [%d+4]; setp.eq.u32 %p, %r1, 0; @%p bra W; {0} ld.global.u32 %r2, [%d]; st.global.u32 [%d+8], %r2; ret; }}"""
    sim.option(eager=1)
    out = np.zeros(3, np.uint32)
    sim.run(HEADER + text.format(fence + ";"), out, grid=2, block=1)
    assert out[2] == 5
    with pytest.raises(SimError, match="race on buffer 0"):
        sim.run(HEADER + text.format(""), np.zeros(3, np.uint32), grid=2, block=1)
