# ruff: noqa: E501 - PTX reads better unbroken
"""Partial results joined over the shared memory of a cluster of eight: what must be waited for, and what is reported when
it is not."""

from __future__ import annotations

import numpy as np
import pytest
from simulator import HEADER, SimError

SIZE = 8
SYNC = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
RELAXED = "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;"
INIT = "fence.mbarrier_init.release.cluster;"
SCHEDULES = [{}, {"timing": "late"}, {"seed": 5, "timing": "random"}]


def kernel(body: str) -> str:
    """%r2 rank, %r3 the lane's word of the CTA's partial result, %r4 of what the others send; %d0 the lane's output."""
    return (
        HEADER
        + f""".visible .entry k(.param .u64 out) {{ .reg .b32 %r<24>; .reg .b64 %d<8>; .reg .pred %p<6>; .shared .align 16 .b8 own[128]; .shared .align 16 .b8 sent[{128 * SIZE}]; .shared .align 8 .b64 bar;
    mov.u32 %r0, %tid.x; mov.u32 %r2, %cluster_ctarank; mov.u32 %r3, own; mad.lo.u32 %r3, %r0, 4, %r3; mov.u32 %r4, sent; mad.lo.u32 %r4, %r0, 4, %r4;
    ld.param.u64 %d0, [out]; mad.wide.u32 %d0, %r2, 128, %d0; mad.wide.u32 %d0, %r0, 4, %d0; mad.lo.u32 %r5, %r2, 100, %r0; setp.ne.u32 %p0, %r2, 0; setp.ne.u32 %p1, %r0, 0;
    {body}
    ret; }}"""
    )


def run(sim, body: str) -> np.ndarray:
    out = np.zeros((SIZE, 32), np.uint32)
    sim.run(kernel(body), out, grid=SIZE, block=32, cluster=SIZE)
    return out


def refused(sim, text: str, body: str) -> None:
    with pytest.raises(SimError, match=f"(?s){text}"):
        run(sim, body)


JOINED = sum(100 * rank + np.arange(32) for rank in range(SIZE))


def pull(start=RELAXED, ready=SYNC, read=SYNC, generic=False) -> str:
    """Every CTA reads the partial results of all, and then uses its own words for something else."""
    load = "mapa.shared::cluster.u32 %r8, %r3, %r7; ld.shared::cluster.u32 %r9, [%r8];"
    if generic:  # as cluster.map_shared_rank gives it
        load = "cvt.u64.u32 %d1, %r3; cvta.shared.u64 %d1, %d1; mapa.u64 %d2, %d1, %r7; ld.u32 %r9, [%d2];"
    return f"""st.shared.u32 [%r3], %r5; {start} {ready} mov.u32 %r6, 0; mov.u32 %r7, 0;
    L: {load} add.u32 %r6, %r6, %r9; add.u32 %r7, %r7, 1; setp.lt.u32 %p2, %r7, {SIZE}; @%p2 bra L;
    {read} st.shared.u32 [%r3], 77; st.global.u32 [%d0], %r6;"""


@pytest.mark.parametrize("generic", [False, True], ids=["shared::cluster", "generic"])
@pytest.mark.parametrize("order", SCHEDULES, ids=str)
def test_reading_the_others(sim, order, generic):
    sim.option(**order)
    assert (run(sim, pull(generic=generic)) == JOINED).all()
    assert (run(sim, pull(start="", generic=generic)) == JOINED).all()
    # Written, but not released; overwritten, or gone, while a neighbour still reads.
    refused(sim, "race on shared memory of CTA .*nothing orders|uninitialised", pull(ready=RELAXED, generic=generic))
    gone = "CTA . may exit before .* accesses its shared memory|whose threads have all exited"
    refused(
        sim, f"this write and the read .*nothing orders|{gone}|race on shared memory", pull(read="", generic=generic)
    )
    refused(sim, "before that CTA is known to have started|race on shared", pull(start="", ready="", generic=generic))


def push(start=RELAXED, ready=SYNC, store="st.shared::cluster.u32 [%r8], %r5;") -> str:
    """Every CTA writes its partial result into rank 0, which adds them up."""
    return f"""mad.lo.u32 %r7, %r2, 128, %r4; mapa.shared::cluster.u32 %r8, %r7, 0; {start} {store} {ready} @%p0 bra E; mov.u32 %r6, 0; mov.u32 %r7, 0;
    L: mad.lo.u32 %r8, %r7, 128, %r4; ld.shared.u32 %r9, [%r8]; add.u32 %r6, %r6, %r9; add.u32 %r7, %r7, 1; setp.lt.u32 %p2, %r7, {SIZE}; @%p2 bra L;
    st.global.u32 [%d0], %r6; E:"""


@pytest.mark.parametrize("order", SCHEDULES, ids=str)
def test_writing_into_another(sim, order):
    sim.option(**order)
    assert (run(sim, push())[0] == JOINED).all()
    refused(sim, "before that CTA is known to have started|race on shared|uninitialised", push(start=""))
    refused(sim, "race on shared memory of CTA 0.*nothing orders|uninitialised", push(ready=RELAXED))
    refused(sim, "race on shared memory of CTA 0|uninitialised|exit", push(ready=""))


def push_async(start=SYNC, bytes=128 * SIZE, wait=True, again="") -> str:
    """The same with st.async: rank 0 waits for the bytes and nobody for anybody else."""
    wait_ = "W: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p3, [bar], 0; @!%p3 bra W;" if wait else ""
    return f"""or.pred %p4, %p0, %p1; @%p4 bra J; mbarrier.init.shared::cta.b64 [bar], 1; {INIT} mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {bytes}; J: {start}
    mad.lo.u32 %r7, %r2, 128, %r4; mapa.shared::cluster.u32 %r8, %r7, 0; mov.u32 %r10, bar; mapa.shared::cluster.u32 %r11, %r10, 0;
    st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r8], %r5, [%r11]; {again} @%p0 bra E; {wait_} mov.u32 %r6, 0; mov.u32 %r7, 0;
    L: mad.lo.u32 %r8, %r7, 128, %r4; ld.shared.u32 %r9, [%r8]; add.u32 %r6, %r6, %r9; add.u32 %r7, %r7, 1; setp.lt.u32 %p2, %r7, {SIZE}; @%p2 bra L;
    st.global.u32 [%d0], %r6; E:"""


@pytest.mark.parametrize("order", SCHEDULES, ids=str)
def test_sending_to_another(sim, order):
    sim.option(**order)
    assert (run(sim, push_async())[0] == JOINED).all()
    refused(
        sim, "before that CTA is known to have started|no mbarrier has been|race on an mbarrier", push_async(start="")
    )
    refused(sim, "race on shared memory of CTA 0|uninitialised|may exit before", push_async(wait=False))
    # Half of what is sent lands after rank 0 has gone on: it reads what may not be there, and exits.
    refused(
        sim,
        "race on shared memory of CTA 0|may exit before|uninitialised|mbarrier still expects",
        push_async(bytes=64 * SIZE),
    )
    refused(sim, "deadlock.*1024 bytes came, 4 outstanding", push_async(bytes=128 * SIZE + 4))
    # A word that is sent twice, the second time over what rank 0 may be reading.
    again = "add.u32 %r5, %r5, 1; st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r8], %r5, [%r11];"
    refused(sim, "race on shared memory of CTA 0|may exit before|mbarrier still expects", push_async(again=again))
