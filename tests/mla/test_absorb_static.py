"""Static gates: what must be true of mla_absorb's machine code, wherever it runs."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path

import pytest
import sass

from dsv3_kernels import _host

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "mla_absorb"
KERNELS = {name: row for name, row in _host.kernels().items() if row["image"] == IMAGE}


def test_budgets_are_the_documented_ones() -> None:
    rows = re.findall(r"^\| (mla_absorb_\w+) \| (\d+) \| (\d+) \| (\d+) \|", (ROOT / "docs/mla.md").read_text(), re.M)
    documented = {name: tuple(int(number) for number in numbers) for name, *numbers in rows}
    registers = {name: row["registers"] for name, row in sass.manifest()[IMAGE]["kernels"].items()}
    built = {name: (row["threads"], registers[name], row["shared_bytes"]) for name, row in KERNELS.items()}
    assert len(built) == 6 and built == documented


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_local_memory_and_no_gpu_wide_fence(kernel: str) -> None:
    row = sass.manifest()[IMAGE]["kernels"][kernel]
    assert (row["stack"], row["spill_stores"], row["spill_loads"]) == (0, 0, 0)
    names = sass.opcodes(IMAGE, kernel)
    assert not [name for name in names if name.startswith(("LDL", "STL", "ERRBAR", "CCTL", "MEMBAR.ALL.GPU"))]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_stage_s_products_are_waited_for_together(kernel: str) -> None:
    """One loop: a fence, four products of the tile's width, a wait that leaves the newest under way; one after it."""
    names = sass.opcodes(IMAGE, kernel)
    steps = [name.split(".")[1] for name in names if name.startswith(("HGMMA", "WARPGROUP"))]
    runs = [(step, len(list(group))) for step, group in groupby(steps)]
    columns = kernel.split("_")[2].split("x")[1]
    assert runs == [("ARRIVE", 1), (f"64x{columns}x16", 4), ("DEPBAR", 2)]
    waits = [line for line in sass.instructions(IMAGE, kernel) if "WARPGROUP.DEPBAR" in line]
    assert [re.search(r"gsb0, (0x\d)", line)[1] for line in waits] == ["0x1", "0x0"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_copies_and_launch_dependencies(kernel: str) -> None:
    """Tensor copies without a loop over lanes: x, the weight's panels, a warp's slabs of the output."""
    names = sass.opcodes(IMAGE, kernel)
    panels = int(kernel.split("_")[2].split("x")[1]) // 64
    assert [n for n in names if n.startswith("UTMALDG")] == ["UTMALDG.3D"] * (1 + (panels if kernel[-1] == "n" else 1))
    assert [n for n in names if n.startswith("UTMASTG")] == ["UTMASTG.3D"] * panels
    assert KERNELS[kernel]["waits"] and names.count("ACQBULK") == names.count("PREEXIT") == 1
