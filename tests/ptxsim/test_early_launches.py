# ruff: noqa: E501 - PTX reads better unbroken
"""A kernel launched early (programmatic stream serialization), beside one that has signalled, must not touch what that
one may still use until griddepcontrol.wait, in whatever way it touches it."""

from __future__ import annotations

import re

import numpy as np
import pytest
from simulator import HEADER, SimError, TensorMap

WAIT, SIGNAL = "griddepcontrol.wait;", "griddepcontrol.launch_dependents;"
ERROR = "race between launches on buffer .*launched early.*griddepcontrol.wait"
COPY = "ld.global.u32 %r2, [%d1]; st.global.u32 [%d0], %r2;"
ASYNC = "mbarrier.init.shared.b64 [bar], 1; mbarrier.arrive.expect_tx.shared.b64 _, [bar], 128; {} W: mbarrier.try_wait.parity.shared.b64 %p1, [bar], 0; @!%p1 bra W;"


def kernel(body: str) -> str:
    return (
        HEADER
        + ".visible .entry k(.param .u64 out, .param .u64 in, .param .align 64 .b8 map[128]) { .reg .b32 %r<16>; .reg .b64 %d<8>; .reg .pred %p<4>;"
        + " .shared .align 128 .b8 s[1024]; .shared .align 8 .b64 bar;\n"
        + "mov.u32 %r0, %tid.x; mov.u32 %r1, s; ld.param.u64 %d0, [out]; ld.param.u64 %d1, [in]; mov.b64 %d2, map;\n"
        + f"{body}\nret; }}"
    )


def array(readonly: bool = False) -> np.ndarray:
    a = np.full(64, 5, np.uint32)
    a.flags.writeable = not readonly
    return a


def launch(sim, body: str, out: np.ndarray, source: np.ndarray, early: bool = True, block: int = 1, grid: int = 1):
    tensor = TensorMap(sim, "u32", source.ctypes.data, [64], [], [32])
    sim.run(kernel(body), out, source, tensor, early=early, block=block, grid=grid)


ACCESSES = {
    "load": COPY,
    "atomic": "atom.global.add.u32 %r2, [%d1], 0; st.global.u32 [%d0], %r2;",
    "cp.async": "cp.async.ca.shared.global [%r1], [%d1], 16; cp.async.wait_all;",
    "bulk copy": ASYNC.format(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%d1], 128, [bar];"
    ),
    "tensor copy": ASYNC.format(
        "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%d2, {0}], [bar];".replace(
            "{0}", "{{0}}"
        )
    ).replace("{{0}}", "{%r0}"),
    "store": "st.global.u32 [%d1], 3;",
    "bulk store": "st.shared.u32 [%r1], 3; st.shared.u32 [%r1+4], 3; st.shared.u32 [%r1+8], 3; st.shared.u32 [%r1+12], 3; fence.proxy.async; cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r1], 16; cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;",
}


@pytest.mark.parametrize("timing", ["early", "late"])
@pytest.mark.parametrize("access", ACCESSES)
def test_what_the_launch_before_wrote(sim, access, timing):
    sim.option(timing=timing)
    first, second, unrelated = array(), array(), array()
    launch(sim, SIGNAL + COPY, first, unrelated, early=False)
    launch(sim, WAIT + ACCESSES[access], second, first)
    launch(sim, SIGNAL + COPY, first, unrelated, early=False)
    with pytest.raises(SimError, match=re.compile(ERROR, re.S)):
        launch(sim, ACCESSES[access] + WAIT, second, first)
    launch(sim, ACCESSES[access] + WAIT, second, first, early=False)


def test_what_the_launch_before_reads_may_be_read_but_not_written(sim):
    weights, scratch, a, b, c = array(readonly=True), array(), array(), array(), array()
    launch(sim, SIGNAL + COPY, a, weights, early=False)
    launch(sim, COPY + WAIT, b, weights)
    launch(sim, SIGNAL + COPY, a, scratch, early=False)
    with pytest.raises(SimError, match=ERROR):
        launch(sim, COPY + WAIT, scratch, c)


def test_the_wait_of_one_thread_counts_for_those_it_tells(sim):
    one = "setp.eq.u32 %p0, %r0, 64; @%p0 griddepcontrol.wait; "
    sync = "bar.sync 0; "
    rest = "mad.wide.u32 %d1, %r0, 4, %d1; mad.wide.u32 %d0, %r0, 4, %d0; setp.ge.u32 %p1, %r0, 64; @%p1 bra E;" + COPY
    first, out = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    launch(sim, SIGNAL, first, array(), early=False)
    launch(sim, one + sync + rest + "E:", out, first, block=96)
    assert np.array_equal(out[:64], np.arange(64))
    launch(sim, SIGNAL, first, array(), early=False)
    with pytest.raises(SimError, match=ERROR):
        launch(sim, one + rest + "E:", out, first, block=96)


def test_a_flag_tells_another_cta(sim):
    first, out = array(), array()
    body = """mov.u32 %r5, %ctaid.x; setp.ne.u32 %p0, %r5, 0; @%p0 bra OTHER;
    griddepcontrol.wait; st.release.gpu.global.u32 [%d0], 1; bra END;
    OTHER: ld.acquire.gpu.global.u32 %r6, [%d0]; setp.ne.u32 %p1, %r6, 1; @%p1 bra OTHER; ld.global.u32 %r2, [%d1]; st.global.u32 [%d0+4], %r2; END:"""
    sim.option(eager=1)
    for sem, good in (("acquire", True), ("relaxed", False)):
        launch(sim, SIGNAL + "st.global.u32 [%d0], 7;", first, array(), early=False)
        out[:] = 0
        if good:
            launch(sim, body, out, first, grid=2)
            assert out[1] == 7
        else:
            with pytest.raises(SimError, match=ERROR):
                launch(sim, body.replace("acquire", sem), out, first, grid=2)


def test_a_launch_that_waits_for_nobody_does_not_end_its_predecessor(sim):
    first, second, third, a, b = array(), array(), array(), array(), array()
    launch(sim, SIGNAL + COPY, first, a, early=False)
    launch(sim, COPY, second, b)
    with pytest.raises(SimError, match=ERROR):
        launch(sim, COPY + WAIT, third, first)
    launch(sim, SIGNAL + COPY, first, a, early=False)
    launch(sim, WAIT + COPY, second, b)
    launch(sim, COPY + WAIT, third, first)


def test_a_synchronisation_ends_all(sim):
    first, second, a = array(), array(), array()
    launch(sim, SIGNAL + COPY, first, a, early=False)
    sim.call("cuStreamSynchronize", None)
    launch(sim, COPY + WAIT, second, first)


def test_a_launch_that_does_not_signal_is_over(sim):
    first, second, a = array(), array(), array()
    launch(sim, COPY, first, a, early=False)
    launch(sim, COPY, second, first)
