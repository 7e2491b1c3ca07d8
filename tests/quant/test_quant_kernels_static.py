"""Static gates: what must be true of the quant family's machine code, wherever it runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import sass

from dsv3_kernels import _host

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {
    name: row for name, row in _host.kernels().items() if (ROOT / "csrc" / "quant" / f"{row['image']}.cu").exists()
}
SMS_REGISTERS, CTAS = 65536, 2  # at least so many CTAs share an SM, which hides one's latencies behind another's work
ALONE = {"rms_norm_backward_f32", "rms_norm_warp_f32", "rms_norm_quantize_1x128_warp_f32"}  # float32 rows in registers


def built(kernel: str) -> dict[str, int]:
    return sass.manifest()[KERNELS[kernel]["image"]]["kernels"][kernel]


def test_budgets_are_the_documented_ones() -> None:
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \|", (ROOT / "docs/quant.md").read_text(), re.M)
    documented = {name: tuple(int(f) for f in figures) for name, *figures in rows}
    figures = {k: (row["threads"], built(k)["registers"], built(k)["shared"]) for k, row in KERNELS.items()}
    assert figures == documented


@pytest.mark.parametrize("kernel", KERNELS)
def test_registers_and_local_memory(kernel: str) -> None:
    row, threads = built(kernel), KERNELS[kernel]["threads"]
    assert (row["stack"], row["spill_stores"], row["spill_loads"]) == (0, 0, 0)
    allocated = -(-row["registers"] // 8) * 8 * threads
    assert SMS_REGISTERS // allocated >= (1 if kernel in ALONE else CTAS)
    names = sass.opcodes(KERNELS[kernel]["image"], kernel)
    assert not [name for name in names if name.startswith(("LDL", "STL", "MEMBAR", "ERRBAR", "CCTL"))]


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "rms_norm_backward_weight"])
def test_loads_of_sixteen_bytes(kernel: str) -> None:
    names = sass.opcodes(KERNELS[kernel]["image"], kernel)
    widest = "LDG.E.128" if "dequantize" not in kernel else "LDG.E.64" if "f32" not in kernel else "LDG.E"
    assert any(name.startswith(widest) for name in names)
    assert any(name.startswith(("STG.E.128", "STG.E.64") if "f32" not in kernel else "STG.E") for name in names)
