"""Every row of the simulator's opcode table has a direct test: a named one, that uses it and compares with a model."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

DIRECT = {
    "test_instructions": {
        "test_integer_arithmetic": "add sub mul mad min max sad div rem shl shr popc clz brev bfe bfi bfind and or",
        "test_rare_integer_instructions": "not xor cnot slct szext bmsk dp2a fns abs neg",
        "test_carry_chains": "addc subc madc",
        "test_bit_manipulation": "lop3 prmt shf dp4a",
        "test_float32_arithmetic": "fma",
        "test_approximations": "ex2 lg2 rcp rsqrt sqrt sin cos tanh",
        "test_float_classes_and_signs": "copysign testp",
        "test_float_to_fp8": "cvt",
        "test_comparisons": "setp selp set",
    },
    "test_warp": {
        "test_shfl": "shfl",
        "test_vote": "vote",
        "test_match": "match",
        "test_redux": "redux",
        "test_elect_and_activemask": "elect activemask bra",
        "test_movmatrix": "movmatrix",
        "test_branch_table": "brx",
        "test_calls_and_returns": "call ret",
        "test_exit_and_trap": "exit trap brkpt",
        "test_what_does_nothing_here": "prefetch prefetchu applypriority pmevent createpolicy nanosleep griddepcontrol",
        "setmaxnreg": "setmaxnreg",
        "test_barrier_reductions": "bar barrier",
        "test_fences_make_relaxed_flags_release": "fence membar",
    },
    "test_memory": {
        "test_loads_extend_and_stores_truncate": "ld st",
        "test_vectors_and_qualifiers": "ldu",
        "test_address_spaces": "mov cvta isspacep",
        "test_addresses_in_a_cluster": "mapa getctarank",
        "test_integer_atomics": "atom red",
        "st_async": "st.async",
        "test_red_async": "red.async",
        "edited": "tensormap.replace tensormap.cp_fenceproxy",
    },
    "test_hopper": {
        "test_mbarrier_phases": "mbarrier.arrive mbarrier.test_wait mbarrier.complete_tx mbarrier.inval",
        "test_cp_async": "cp.async",
        "test_bulk_copies": "cp.async.bulk cp.reduce.async.bulk",
        "test_ldmatrix_stmatrix": "ldmatrix stmatrix",
        "wgmma_product": "wgmma.mma_async wgmma.commit_group wgmma.wait_group wgmma.fence",
    },
    "test_mma": {"mma": "mma"},
}  # fmt: skip


def opcodes(sim) -> set[str]:
    return set(sim.text("dsv3SimOpcodes").split())


def test_every_opcode_is_listed(sim):
    named = {name.split(".")[0] for tests in DIRECT.values() for names in tests.values() for name in names.split()}
    assert named == opcodes(sim) | {"tensormap", "mbarrier"}


@pytest.mark.parametrize(("module", "function"), [(m, f) for m, tests in DIRECT.items() for f in tests])
def test_the_test_named_uses_it(module, function):
    source = Path(__file__).with_name(f"{module}.py").read_text()
    (node,) = (n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == function)
    text = ast.get_source_segment(source, node) or ""
    text = "\n".join(ast.unparse(d) for d in node.decorator_list) + text
    for name in DIRECT[module][function].split():
        assert re.search(rf"(?<![\w%.]){re.escape(name)}\b", text), f"{function} has no {name}"
