# ruff: noqa: E501 - PTX reads better unbroken
"""Lanes of one warp run one instruction together and are still not ordered by it: what one touches after another without
bar.warp.sync, a barrier or an acquire is reported, in shared and global memory, for bytes and for what copies brought."""

from __future__ import annotations

import numpy as np
import pytest
from simulator import HEADER, SimError

SYNC = "bar.warp.sync 0xffffffff;"
# Two halves of the warp, each in step with itself alone.
HALVES = "setp.lt.u32 %p0, %r0, 16; selp.b32 %r9, 0xffff, 0xffff0000, %p0; bar.warp.sync %r9;"
READ = r"this read and the write by lane 1 .*nothing orders them \(bar.warp.sync is missing\)"


def kernel(body: str) -> str:
    return (
        HEADER
        + ".visible .entry k(.param .u64 out, .param .u64 work) { .reg .b32 %r<16>; .reg .b16 %h<8>; .reg .b64 %d<8>; .reg .pred %p<4>;"
        + " .shared .align 128 .b8 s[1024]; .shared .align 8 .b64 bar;\n"
        + "mov.u32 %r0, %tid.x; mov.u32 %r1, s; ld.param.u64 %d0, [out]; ld.param.u64 %d1, [work]; mad.wide.u32 %d0, %r0, 4, %d0;\n"
        + f"{body}\nret; }}"
    )


def run(sim, body: str, **launch) -> tuple[np.ndarray, np.ndarray]:
    out, work = np.zeros(32, np.uint32), np.full(64, 0x7F7F7F7F, np.uint32)
    sim.run(kernel(body), out, work, **launch)
    return out, work


def refused(sim, text: str, body: str, **launch) -> None:
    with pytest.raises(SimError, match=f"(?s){text}"):
        run(sim, body, **launch)


# %r2 or %d2: the lane's own word; %r3 or %d3: its neighbour's
PLACES = {
    "shared": "mad.lo.u32 %r2, %r0, 4, %r1; xor.b32 %r3, %r0, 1; mad.lo.u32 %r3, %r3, 4, %r1;",
    "global": "mad.wide.u32 %d2, %r0, 4, %d1; xor.b32 %r3, %r0, 1; mad.wide.u32 %d3, %r3, 4, %d1;",
}
PLACES["generic"] = (
    PLACES["shared"] + "cvt.u64.u32 %d2, %r2; cvt.u64.u32 %d3, %r3; cvta.shared.u64 %d2, %d2; cvta.shared.u64 %d3, %d3;"
)
NAMES = {"shared": "shared memory of CTA 0", "global": "buffer .", "generic": "shared memory of CTA 0"}


def exchange(where: str, sync: str, again: str) -> str:
    """Each lane stores, reads its neighbour's word and stores what it read."""
    space, own, other = ("shared", "%r2", "%r3") if where == "shared" else (where, "%d2", "%d3")
    dot = "" if where == "generic" else f".{space}"
    return f"{PLACES[where]} st{dot}.u32 [{own}], %r0; {sync} ld{dot}.u32 %r4, [{other}]; {again} st{dot}.u32 [{own}], %r4; st.global.u32 [%d0], %r4;"


@pytest.mark.parametrize("where", PLACES)
def test_neighbours(sim, where):
    for good in (SYNC, "bar.sync 0;", "fence.acq_rel.cta;", HALVES):
        out, _ = run(sim, exchange(where, good, SYNC if good != HALVES else HALVES))
        assert np.array_equal(out, np.arange(32) ^ 1)
    refused(sim, f"race on {NAMES[where]} .*{READ}", exchange(where, "", SYNC))
    refused(sim, "this write and the read by lane 1 ", exchange(where, SYNC, ""))
    # A shuffle, a vote or a proxy fence is no order of memory.
    for other in ("shfl.sync.idx.b32 %r5, %r0, 0, 31, -1;", "vote.sync.ballot.b32 %r5, 1, -1;", "fence.proxy.async;"):
        refused(sim, "between lanes of a warp: this read and the write", exchange(where, other, SYNC))


@pytest.mark.parametrize("place", ["s", "%d1"])
def test_one_place_for_all(sim, place):
    space = "shared" if place == "s" else "global"
    refused(sim, "this write and the write by lane 0", f"st.{space}.u32 [{place}], %r0;")
    same = f"st.{space}.u32 [{place}], 7;"
    run(sim, same)
    # Whoever wrote the same value may read it; who did not may not, and nobody may then write another.
    out, _ = run(sim, same + f"ld.{space}.u32 %r2, [{place}]; st.global.u32 [%d0], %r2;")
    assert (out == 7).all()
    one = "setp.eq.u32 %p0, %r0, 0;"
    refused(sim, "this read and the write by lane 0", f"{one} @%p0 {same} ld.{space}.u32 %r2, [{place}];")
    refused(sim, "this write and the write by lane 1", f"{same} {one} @%p0 st.{space}.u32 [{place}], 8;")
    run(sim, f"{one} @%p0 {same} {SYNC} ld.{space}.u32 %r2, [{place}];")
    # Atomics of all lanes, and a poll by all lanes, are what they are made for.
    run(sim, f"{same} {SYNC} atom.{space}.add.u32 %r2, [{place}], 1; ld.volatile.{space}.u32 %r2, [{place}];")


@pytest.mark.parametrize(("kind", "bytes"), [("u8", 1), ("u16", 2)])
@pytest.mark.parametrize("place", ["shared", "global"])
def test_parts_of_a_word(sim, kind, bytes, place):
    own = f"mad.lo.u32 %r2, %r0, {bytes}, %r1; xor.b32 %r3, %r0, 1; mad.lo.u32 %r3, %r3, {bytes}, %r1;"
    if place == "global":
        own = (
            own.replace("mad.lo.u32", "mad.wide.u32")
            .replace("%r1", "%d1")
            .replace("%r2", "%d2")
            .replace("wide.u32 %r3", "wide.u32 %d3")
        )
    a, b = ("%r2", "%r3") if place == "shared" else ("%d2", "%d3")
    own += f"cvt.u16.u32 %h0, %r0; st.{place}.{kind} [{a}], %h0;"
    base, result = ("[s]", "st.global.u32 [%d0], %r4;") if place == "shared" else ("[%d1]", "st.global.u32 [%d0], %r4;")
    out, _ = run(sim, f"{own} ld.{place}.{kind} %h1, [{a}]; cvt.u32.u16 %r4, %h1; {result}")
    assert np.array_equal(out, np.arange(32))
    out, _ = run(sim, f"{own} {SYNC} ld.{place}.{kind} %h1, [{b}]; cvt.u32.u16 %r4, %h1; {result}")
    assert np.array_equal(out, np.arange(32) ^ 1)
    refused(sim, READ, f"{own} ld.{place}.{kind} %h1, [{b}];")
    # The whole word holds bytes of other lanes, also when the units of 16 bytes had been enough so far.
    refused(sim, "this read and the write by lane [1-3] ", f"{own} ld.{place}.u32 %r4, {base};")
    wide = f"ld.{place}.v4.u32 {{%r4, %r5, %r6, %r7}}, {base};"
    if place == "global":
        refused(sim, "this write and the read by lane 1 ", wide + own)
    run(sim, f"{own} {SYNC} {wide} {SYNC} {own}")


def test_warps_do_not_disturb_each_other(sim):
    """Warps take turns at the same words: only lanes of one warp are compared."""
    body = f"{PLACES['shared'].replace('%r0', '%r8')} st.shared.u32 [%r2], %r0; bar.sync 0; ld.shared.u32 %r4, [%r3]; bar.sync 0;"
    run(
        sim,
        "and.b32 %r8, %r0, 31; setp.lt.u32 %p1, %r0, 32; @!%p1 bra B; "
        + f"{body.replace('bar.sync 0', 'bar.warp.sync -1')} bar.sync 1; bra E; B: bar.sync 1; {body.replace('bar.sync 0', 'bar.warp.sync -1')} E:",
        block=64,
    )


# ---- asynchronous operations belong to the lane that issued them

COPY = "mad.lo.u32 %r2, %r0, 4, %r1; xor.b32 %r3, %r0, 1; mad.lo.u32 %r3, %r3, 4, %r1; mad.wide.u32 %d2, %r0, 4, %d1; cp.async.ca.shared.global [%r2], [%d2], 4; cp.async.commit_group; {before} cp.async.wait_group 0; {after} ld.shared.u32 %r4, [%r3]; st.global.u32 [%d0], %r4;"


@pytest.mark.parametrize("timing", ["early", "late"])
def test_copy_of_another_lane(sim, timing):
    sim.option(timing=timing)
    out, _ = run(sim, COPY.format(before="", after=SYNC))
    assert (out == 0x7F7F7F7F).all()
    refused(sim, READ, COPY.format(before="", after=""))
    refused(sim, READ, COPY.format(before=SYNC, after=""))
    # The copy must not overwrite what a neighbour has yet to read.
    old = (
        "mad.lo.u32 %r5, %r0, 4, %r1; st.shared.u32 [%r5], %r0; "
        + SYNC
        + "xor.b32 %r6, %r0, 1; mad.lo.u32 %r6, %r6, 4, %r1; ld.shared.u32 %r7, [%r6]; {}"
    )
    run(sim, old.format(SYNC) + COPY.format(before="", after=SYNC))
    refused(sim, "this write and the read by lane 1 ", old.format("") + COPY.format(before="", after=SYNC))


STORE = """mad.lo.u32 %r2, %r0, 4, %r1; st.shared.u32 [%r2], %r0; fence.proxy.async.shared::cta; {before} setp.ne.u32 %p0, %r0, 0; @%p0 bra J;
    cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r1], 128; cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;
    J: {after} st.shared.u32 [%r2], 77; @!%p0 cp.async.bulk.wait_group 0;"""


@pytest.mark.parametrize("timing", ["early", "late"])
def test_bulk_store_of_what_the_lanes_wrote(sim, timing):
    sim.option(timing=timing)
    _, work = run(sim, STORE.format(before=SYNC, after=SYNC))
    assert np.array_equal(work[:32], np.arange(32))
    refused(
        sim,
        r"between lanes of a warp: this read and the write by lane 1 .*st.shared.*cp.async.bulk",
        STORE.format(before="", after=SYNC),
    )
    refused(
        sim,
        r"between lanes of a warp: this write and the read by lane 0 .*cp.async.bulk.global",
        STORE.format(before=SYNC, after=""),
    )


@pytest.mark.parametrize("timing", ["early", "late"])
def test_bulk_load_over_what_the_lanes_read(sim, timing):
    sim.option(timing=timing)
    body = f"""mad.lo.u32 %r2, %r0, 4, %r1; st.shared.u32 [%r2], %r0; setp.ne.u32 %p0, %r0, 0; @!%p0 mbarrier.init.shared::cta.b64 [bar], 1; {SYNC} xor.b32 %r3, %r0, 1; mad.lo.u32 %r3, %r3, 4, %r1;
    ld.shared.u32 %r4, [%r3]; fence.proxy.async.shared::cta; {{}} @%p0 bra J; mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 128;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%d1], 128, [bar];
    J: mbarrier.try_wait.parity.shared::cta.b64 %p1, [bar], 0; @!%p1 bra J; ld.shared.u32 %r4, [%r3]; st.global.u32 [%d0], %r4;"""
    out, _ = run(sim, body.format(SYNC))
    assert (out == 0x7F7F7F7F).all()
    refused(sim, r"between lanes of a warp: this write and the read by lane 1 .*ld.shared", body.format(""))


def test_mbarrier_of_another_lane(sim):
    body = "setp.ne.u32 %p0, %r0, 0; @!%p0 mbarrier.init.shared::cta.b64 [bar], 32; {} mbarrier.arrive.shared::cta.b64 _, [bar];"
    run(sim, body.format(SYNC))
    refused(sim, r"nothing orders this operation after its mbarrier.init by lane 0 of the same warp", body.format(""))


@pytest.mark.parametrize("timing", ["early", "late"])
def test_bulk_load_of_what_a_lane_wrote_to_global_memory(sim, timing):
    """The proxy fence must be one of the memory in question."""
    sim.option(timing=timing)
    body = """setp.ne.u32 %p0, %r0, 0; @%p0 bra E; mbarrier.init.shared::cta.b64 [bar], 1; st.global.u32 [%d1], 5; {} mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 128;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%d1], 128, [bar];
    J: mbarrier.try_wait.parity.shared::cta.b64 %p1, [bar], 0; @!%p1 bra J; ld.shared.u32 %r4, [%r1]; st.global.u32 [%d0], %r4; E:"""
    for space in ("", ".global"):
        assert run(sim, body.format(f"fence.proxy.async{space};"))[0][0] == 5
    for fence in ("", "fence.proxy.async.shared::cta;"):
        refused(sim, "race on buffer .*asynchronous read.*st.global.*no proxy fence", body.format(fence))
