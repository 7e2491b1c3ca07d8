"""What launches did: basic blocks reached, instructions by class, bank conflicts."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from simulator import HEADER

sys.path.insert(0, str(Path(__file__).parents[1]))
import basic_blocks
from simulated import Block, blocks, coverage

# Line 20 is inlined at line 10, which is inlined at line 5; csrc/ptx is where wrappers live.
BRANCHES = (
    HEADER
    + """
.visible .entry covered(.param .u64 out, .param .u32 choice) {
  .reg .b32 %r<8>; .reg .b64 %d<4>; .reg .pred %p<4>; .shared .b64 bar;
  .loc 1 1 0
  ld.param.u64 %d0, [out]; ld.param.u32 %r0, [choice];
  mbarrier.init.shared.b64 [bar], 1;
  setp.eq.u32 %p0, %r0, 0;
  setp.gt.u32 %p1, %r0, 1;
  .loc 1 2 0
  @%p0 bra ZERO;
  .loc 1 3 0
  st.global.u32 [%d0], %r0;
  bra JOIN;
ZERO:
  .loc 1 5 2
  .loc 1 10 2, function_name $L__info_string0, inlined_at 1 5 2
  .loc 2 20 2, function_name $L__info_string1, inlined_at 1 10 2
  mov.u32 %r1, 77;
  st.global.u32 [%d0], %r1;
JOIN:
  .loc 1 6 0
  mbarrier.arrive.shared.b64 _, [bar];
WAIT:
  mbarrier.test_wait.parity.shared.b64 %p2, [bar], 0;
  @%p2 bra DONE;
  .loc 1 7 0
  nanosleep.u32 20;
  bra WAIT;
DONE:
  .loc 1 8 0
  @%p1 st.global.u32 [%d0+4], %r0;
  setp.gt.u32 %p3, %r0, 9;
  @%p3 bra BAD;
  ret;
BAD:
  .loc 1 9 0
  mov.u32 %r2, 1;
  trap;
}
.file 1 "csrc/some/covered.cu"
.file 2 "csrc/ptx/wrapper.cuh"
.section .debug_str { $L__info_string0: .b8 102,0 $L__info_string1: .b8 103,0 }
"""
)


def run(sim, choice: int) -> np.ndarray:
    out = np.zeros(2, np.uint32)
    sim.load(BRANCHES, "covered").launch(out, choice, block=1)
    return out


def line(text: str) -> int:
    return 1 + BRANCHES[: BRANCHES.index(text)].count("\n")


def test_blocks_add_up_over_launches(sim):
    with coverage("covered") as seen:
        assert run(sim, 1)[0] == 1
    assert seen.unreached() == [f"PTX line {line('mov.u32 %r1, 77')}, csrc/some/covered.cu:10 (code): "]
    (block,) = (b for b in seen.blocks() if b.kind == "code" and not b.count)
    assert block.positions == ("csrc/ptx/wrapper.cuh:20:2", "csrc/some/covered.cu:10:2", "csrc/some/covered.cu:5:2")
    assert [b.position for b in seen.blocks() if b.kind == "trap"] == [("csrc/some/covered.cu", 9)]
    assert [b.ptx_line for b in seen.blocks() if b.kind == "predicated" and not b.count] == [line("@%p1 st")]
    assert seen.unreached(kinds=("spin",)) == [f"PTX line {line('nanosleep')}, csrc/some/covered.cu:7 (spin): "]

    with coverage("covered") as seen:
        run(sim, 0), run(sim, 0), run(sim, 2)
        assert seen.unreached(kinds=("code", "predicated")) == []
        counts = {b.ptx_line: b.count for b in seen.blocks() if b.kind == "code"}
    assert counts[line("st.global.u32 [%d0], %r0")] == 1
    assert counts[line("mov.u32 %r1, 77")] == 2
    assert counts[line("mbarrier.arrive")] == 3
    run(sim, 0)  # outside: not counted
    assert {b.ptx_line: b.count for b in seen.blocks() if b.kind == "code"} == counts


def test_listed_as_unreachable(sim):
    with coverage("covered") as seen:
        run(sim, 1)
    assert seen.unreached(unreachable={"covered.cu:10": "the choice is never zero here"}) == []
    assert seen.unreached(unreachable={"covered.cu:10": "", "covered.cu:3": ""}) == [
        "listed as unreachable: covered.cu:3"
    ]
    with coverage("covered") as seen:
        pass
    with pytest.raises(AssertionError, match="no kernel covered was launched"):
        seen.unreached()


def test_a_failed_launch_counts(sim):
    with coverage("covered") as seen, pytest.raises(RuntimeError, match=r"trap\n.*covered.cu:9"):
        run(sim, 10)
    assert [b.count for b in seen.blocks() if b.kind == "trap"] == [1]


def test_unrolled_copies_are_one_place(sim):
    body = "\n".join(
        f".loc 1 4 7\nsetp.ne.u32 %p0, %r0, {i};\n@%p0 bra S{i};\n.loc 1 5 9\nst.global.u32 [%d0], %r0;\nS{i}:\n"
        for i in range(3)
    )
    ptx = (
        HEADER
        + ".visible .entry unrolled(.param .u64 out, .param .u32 choice) { .reg .b32 %r<2>; .reg .b64 %d<2>; .reg .pred"
        + f" %p<2>;\nld.param.u64 %d0, [out]; ld.param.u32 %r0, [choice];\n{body}\n.loc 1 6 1\nret; }}\n"
        + '.file 1 "u.cu"\n'
    )
    with coverage("unrolled") as seen:
        sim.load(ptx, "unrolled").launch(np.zeros(1, np.uint32), 1, block=1)
    assert seen.unreached() == []
    assert len(seen.unreached(every=True)) == 2
    with coverage("unrolled") as seen:
        sim.load(ptx, "unrolled").launch(np.zeros(1, np.uint32), 7, block=1)
    assert [text.split(", ")[1] for text in seen.unreached()] == ["u.cu:5 (code): "]


def test_versions_of_a_kernel_are_told_apart(sim):
    ptx = ".visible .entry twice(.param .u64 out) {{ .reg .b32 %r<2>; .reg .b64 %d<2>; mov.u32 %r0, {}; ret; }}"
    for value in (1, 2):
        sim.run(HEADER + ptx.format(value), np.zeros(1, np.uint32))
    with coverage("twice") as seen:
        sim.run(HEADER + ptx.format(2), np.zeros(1, np.uint32))
    assert {b.version for b in blocks("twice")} == {0, 1}
    assert [(b.version, b.count) for b in seen.blocks()] == [(1, 1)]


def test_where_blocks_are():
    code = basic_blocks.parse(
        [
            ["mov.u32", "L", "", "1", "a.cu:1:0", "b.cu:9:0"],
            ["add.s32", "", "", "2", "="],  # where the one before is
            ["bra", "G", "5", "3"],  # nowhere
            ["sub.s32", "L", "", "4"],
            ["st.global.u32", "", "", "5", "a.cu:2:0"],
            ["mul.lo.s32", "L", "", "6"],
            ["ret", "", "", "7", "a.cu:3:0"],
            ["mov.u32", "", "", "8"],
            ["exit", "L", "", "9"],
        ]
    )
    assert code[1].positions == code[0].positions == ("a.cu:1:0", "b.cu:9:0")
    rows = basic_blocks.rows_of(code)
    assert [(r.first, r.kind) for r in rows] == [(0, "code"), (3, "code"), (5, "code"), (8, "code")]
    assert [r.positions[0] for r in rows] == ["a.cu:1:0", "a.cu:2:0", "a.cu:3:0", "a.cu:3:0"]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (["ld.acquire.gpu.global.u32"], "spin"),
        (["mbarrier.try_wait.parity.shared.b64", "add.s32"], "spin"),
        (["atom.global.cas.b32"], "spin"),
        (["ld.global.u32"], "code"),  # looks at what nobody may change meanwhile
        (["ld.acquire.gpu.global.u32", "st.global.u32"], "code"),
        (["mbarrier.try_wait.parity.shared.b64", "wgmma.mma_async.sync.aligned"], "code"),
    ],
)
def test_loops_that_only_look(body, kind):
    loop = [[op, "L" if op == body[0] else "", "", "2", "a.cu:2:0"] for op in body]
    rows = basic_blocks.rows_of(
        basic_blocks.parse([["mov.u32", "L", "", "1"], *loop, ["bra", "G", "1", "3"], ["ret", "L", "", "4"]])
    )
    assert [r.kind for r in rows] == ["code", kind, "code"]


def test_source_text():
    here = Block(0, 0, "code", 1, ("csrc/ptx/fence.cuh:1:1", "tests/ptxsim/test_profile.py:1:1"))
    assert here.source == '"""What launches did: basic blocks reached, instructions by class, bank conflicts."""'


CLASSES = {
    "move": "mov.u32 %r1, %r0;",
    "integer": "add.u32 %r1, %r0, 1;",
    "float": "fma.rn.f32 %f1, %f0, %f0, %f0;",
    "special": "ex2.approx.ftz.f32 %f1, %f0;",
    "convert": "cvt.rn.f32.u32 %f1, %r0;",
    "global": "st.global.u32 [%d0], %r0;",
    "shared": "st.shared.u32 [s], %r0;",
    "local": "st.local.u32 [l], %r0;",
    "generic": "st.u32 [%d0], %r0;",
    "async": "cp.async.ca.shared.global [s], [%d0], 16;",
    "warp": "activemask.b32 %r1;",
    "barrier": "bar.sync 0;",
    "mbarrier": "mbarrier.init.shared.b64 [s], 1;",
    "fence": "fence.acq_rel.cta;",
    "control": "bra L;\nL:",
    "other": "nanosleep.u32 1;",
}


@pytest.mark.parametrize("kind", CLASSES)
def test_instructions_by_class(sim, kind):
    frame = (
        ".visible .entry k(.param .u64 out) {{ .reg .b32 %r<2>; .reg .f32 %f<2>; .reg .b64 %d<2>; .local .b32 l;"
        " .shared .align 16 .b8 s[16]; ld.param.u64 %d0, [out]; mov.u32 %r0, 0; mov.f32 %f0, 0f00000000;\n{}\nret; }}"
    )
    counts = []
    for body in ("", CLASSES[kind]):
        sim.run(HEADER + frame.format(body), np.zeros(4, np.uint32), block=1)
        counts.append(basic_blocks.by_class(sim.counters()["instructions"]))
    base, with_it = counts
    assert {k: n - base[k] for k, n in with_it.items() if n != base[k]} == {kind: 1}


def test_bank_conflicts(sim):
    sim.option(banks=1)
    body = (
        ".visible .entry k(.param .u64 out, .param .u32 stride) {{ .reg .b32 %r<4>; .shared .align 128 .b8 s[8192];"
        "mov.u32 %r0, %tid.x; ld.param.u32 %r1, [stride]; mov.u32 %r2, s; mad.lo.u32 %r2, %r0, %r1, %r2; {} ret; }}"
    )
    for stride, wavefronts in ((4, 1), (8, 2), (128, 32)):
        sim.run(HEADER + body.format("st.shared.u32 [%r2], %r0;"), np.zeros(1, np.uint32), stride)
        counts = sim.counters()
        assert (counts["shared_wavefronts"], counts["shared_ideal"]) == (wavefronts, 1), stride
