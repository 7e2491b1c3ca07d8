"""The shape of the house: every op of the table has its implementations, test and page; nothing is out of place."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

import dsv3_kernels as dk
from dsv3_kernels import backends
from dsv3_kernels._library import COMPOSITIONS, FAMILIES, OPS, module_of

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = sorted(name for name, row in OPS.items() if not row.internal)


def file_of(op: str) -> str:
    return OPS[op].module or op


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_whole(op):
    row, file = OPS[op], file_of(op)
    assert row.family in FAMILIES
    importlib.import_module(module_of(op))
    packet = getattr(torch.ops.dsv3_kernels, op)
    for key in ("CPU", "CUDA", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(packet.default.name(), key), f"{op} has no {key} kernel"
    if row.out:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dsv3_kernels::{op}_out", "CPU")
    assert callable(getattr(importlib.import_module(f"dsv3_kernels.{row.family}._eager"), op)), (
        "no eager implementation"
    )
    test = ROOT / "tests" / row.family / f"test_{file}.py"
    assert test.exists(), f"{op} has no test file {test.name}"
    assert op in test.read_text(), f"{test.name} does not name {op}"
    headings = [line[3:] for line in (ROOT / "docs" / f"{row.family}.md").read_text().splitlines() if line[:3] == "## "]
    assert file in headings, f"docs/{row.family}.md has no heading for {file}"
    if row.grad:
        assert OPS[row.grad].internal or row.grad in PUBLIC
    if row.cuda:
        assert (ROOT / "csrc" / row.family / f"{file}.cu").exists()
        assert (ROOT / "csrc" / row.family / f"{file}.cpp").exists()
        assert callable(getattr(importlib.import_module(f"dsv3_kernels.{row.family}._cuda"), op))
        assert op in (ROOT / "bench" / f"bench_{row.family}.py").read_text(), f"{op} has no benchmark"
    if row.triton:
        module = importlib.import_module(f"dsv3_kernels.{row.family}._triton_{file}")
        assert callable(getattr(module, op)) and backends._triton_kernels_of(op), f"{op} has no triton_{op} kernel"
        assert op in (ROOT / "tests" / "triton_calls" / f"{row.family}.py").read_text(), f"{op} is not compiled"
        assert op in (ROOT / "bench" / f"bench_{row.family}.py").read_text(), f"{op} has no benchmark"


@pytest.mark.parametrize("op", PUBLIC)
def test_a_public_op_is_documented(op):
    function = getattr(dk, op)
    assert function.__module__ == module_of(op) and function.__name__ == op
    for part in ("Args:", "Returns:", "Raises:"):
        assert part in function.__doc__, f"{op}: docstring lacks {part}"


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_composition_is_whole(name):
    """A public function made of ops has its tests and its page too."""
    family = COMPOSITIONS[name]
    assert name in dk.__all__ and getattr(dk, name).__module__ == f"dsv3_kernels.{family}.{name}"
    for part in ("Args:", "Returns:", "Raises:"):
        assert part in getattr(dk, name).__doc__, f"{name}: docstring lacks {part}"
    test = ROOT / "tests" / family / f"test_{name}.py"
    assert test.exists() and name in test.read_text(), f"{name} has no test file {test.name}"
    assert f"## {name}\n" in (ROOT / "docs" / f"{family}.md").read_text(), f"docs/{family}.md has no heading for {name}"


def test_nothing_is_out_of_place():
    """Every module of a family that is not private defines an op of the table, or a composition, of its name."""
    modules = {module_of(op) for op in OPS} | {f"dsv3_kernels.{f}.{name}" for name, f in COMPOSITIONS.items()}
    for family in FAMILIES:
        for path in (ROOT / "dsv3_kernels" / family).glob("[!_]*.py"):
            assert f"dsv3_kernels.{family}.{path.stem}" in modules, f"{path} defines no op or composition of the tables"


def test_gradients_are_ops():
    for op, row in OPS.items():
        if row.grad:
            assert row.grad in OPS, f"{op}: its gradient {row.grad} is not an op"
