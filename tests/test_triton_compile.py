"""Every Triton kernel, as the ops launch it, compiled for every chip: no spills, within its shared memory.

Nothing runs: the launchers are led to a driver that compiles for the chip and launches nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dsv3_kernels as dk
from dsv3_kernels import _simulator, _triton
from dsv3_kernels._library import FAMILIES, OPS

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "build"))

from tools import disassembler, needs_disassembler  # noqa: E402

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from dsv3_kernels._triton_simulator import SimulatorDriver  # noqa: E402

pytestmark = pytest.mark.skipif(_simulator.missing() is not None, reason=str(_simulator.missing()))

# Bytes of shared memory a CTA may have (CUDA programming guide, technical specifications per compute capability).
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
# A compute capability with the configurations of the code, or the GPU of a table of measured ones.
CHIPS = {f"sm_{sm}": (sm, "") for sm in SHARED} | {
    path.stem: (table["sm"], table["gpu"])
    for path in sorted(_triton.TUNED.glob("*.json"))
    for table in [json.loads(path.read_text())]
}
CALLS = {
    op: calls
    for family in FAMILIES
    if (ROOT / "tests" / "triton_calls" / f"{family}.py").exists()
    for op, calls in importlib.import_module(f"triton_calls.{family}").CALLS.items()
}


class Compiler(SimulatorDriver):
    """Compiles for a chip; a launch does nothing."""

    def __init__(self, sm: int):
        super().__init__(str(_simulator.library()))
        self.sm, self.launcher_cls = sm, lambda source, metadata: lambda *args: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)

    def get_current_device(self) -> int:
        return 1 << 11 | self.sm


@pytest.fixture
def compiled(monkeypatch, request):
    """{kernel: what it was compiled to} of the calls in the test, for the chip of the parameter."""
    sm, name = CHIPS[request.param]
    found: dict[str, list[Any]] = {}
    launch = _triton.launch

    def kept(kernel, grid, *args, **options):
        made = launch(kernel, grid, *args, **options)
        assert made is not None, f"{kernel.__name__}: empty grid {grid}"
        found.setdefault(kernel.__name__, []).append(made)
        return made

    @contextlib.contextmanager
    def active(kind):
        before = triton.runtime.driver._active
        triton.runtime.driver.set_active(Compiler(sm))
        try:
            yield
        finally:
            triton.runtime.driver._active = before

    monkeypatch.setattr(_triton, "launch", kept)
    monkeypatch.setattr(_triton, "chip", lambda index: (sm, name))
    monkeypatch.setattr(_simulator, "active", active)
    for table in _triton.tables.values():
        monkeypatch.setattr(table, "_chosen", {})
    with dk.backend("sim:triton"):
        yield found


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers, stack and so on of a kernel, from its machine code."""
    (folder / "kernel.cubin").write_bytes(cubin)
    command = [disassembler(), "--dump-resource-usage", folder / "kernel.cubin"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def test_every_op_with_a_triton_kernel_says_how_it_is_called():
    assert set(CALLS) == {op for op, row in OPS.items() if row.triton}


def test_the_table_of_ops_knows_what_their_kernels_need():
    assert {op: min(call.least for call in calls) for op, calls in CALLS.items()} == {
        op: 89 if OPS[op].fp8 else 80 for op in CALLS
    }


@needs_disassembler
@pytest.mark.parametrize(
    ("compiled", "op"),
    [
        pytest.param(chip, op, id=f"{chip}-{op}")
        for op, calls in CALLS.items()
        for chip, (sm, _) in CHIPS.items()
        if any(call.least <= sm for call in calls)
    ],
    indirect=["compiled"],
)
def test_compiles_without_spills(compiled, op, request, tmp_path):
    sm, _ = CHIPS[request.node.callspec.params["compiled"]]
    for call in CALLS[op]:
        if call.least > sm:
            continue
        compiled.clear()
        call.run()
        assert set(compiled) == set(call.kernels)
        for kernel, versions in compiled.items():
            for made in versions:
                assert made.metadata.target.arch == sm and made.metadata.shared <= SHARED[sm]
                used = resources(made.asm["cubin"], tmp_path)
                assert used["STACK"] == used["LOCAL"] == 0, f"{kernel} spills: {used}"
        if sm >= 90:
            ptx = "".join(made.asm["ptx"] for versions in compiled.values() for made in versions)
            for instruction in call.instructions:
                assert re.search(instruction, ptx), f"{op}: no {instruction}"


@triton.jit
def crowded(x, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    values = tl.load(x + at)
    tl.store(x + at, values - tl.max(values, 0))


@needs_disassembler
@pytest.mark.parametrize("compiled", ["sm_90"], indirect=True)
def test_a_spill_is_seen(compiled, tmp_path):
    with _simulator.active("triton"):
        made = _triton.launch(crowded, (1,), torch.empty(4096), 4096, num_warps=1, maxnreg=32)
    assert resources(made.asm["cubin"], tmp_path)["STACK"] > 0
