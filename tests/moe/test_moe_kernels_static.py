"""Static gates: what must be true of the moe family's machine code, wherever it runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import sass

from dsv3_kernels import _host

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {
    name: row for name, row in _host.kernels().items() if (ROOT / "csrc" / "moe" / f"{row['image']}.cu").exists()
}


def built(kernel: str) -> dict[str, int]:
    return sass.manifest()[KERNELS[kernel]["image"]]["kernels"][kernel]


def test_budgets_are_the_documented_ones() -> None:
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \|", (ROOT / "docs/moe.md").read_text(), re.M)
    documented = {name: tuple(int(f) for f in figures) for name, *figures in rows}
    figures = {k: (row["threads"], built(k)["registers"], built(k)["shared"]) for k, row in KERNELS.items()}
    assert figures == documented


@pytest.mark.parametrize("kernel", KERNELS)
def test_registers_and_local_memory(kernel: str) -> None:
    """A thousand threads or more share an SM, and nothing waits for other CTAs."""
    row, threads = built(kernel), KERNELS[kernel]["threads"]
    assert (row["stack"], row["spill_stores"], row["spill_loads"]) == (0, 0, 0)
    assert 65536 // (-(-row["registers"] // 8) * 8 * threads) * threads >= (1024 if "512" not in kernel else 768)
    names = sass.opcodes(KERNELS[kernel]["image"], kernel)
    assert not [name for name in names if name.startswith(("LDL", "STL", "MEMBAR", "ERRBAR", "CCTL"))]


@pytest.mark.parametrize("kernel", [name for name in KERNELS if "unpermute" in name or "vectors" in name])
def test_accesses_of_sixteen_bytes(kernel: str) -> None:
    names = sass.opcodes(KERNELS[kernel]["image"], kernel)
    assert any(name.startswith("LDG.E.128") for name in names)
    assert any(name.startswith("STG.E.128") for name in names)
