"""Static gates: what must be true of the prefill kernels' machine code, wherever it runs."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path

import pytest
import sass

from dsv3_kernels import _host

ROOT = Path(__file__).resolve().parents[2]
FORWARD, KEYS, QUERIES = "mla_prefill_128x128", "mla_prefill_backward_keys", "mla_prefill_backward_queries"
ROWS = {name: row for name, row in _host.kernels().items() if row["image"].startswith("mla_prefill")}

# Fences, products and waits in the order of the code: a group of products behind one fence, and no wait between them.
SEQUENCE = {
    # The first block; a block's scores and the outputs of the one before; the last outputs.
    FORWARD: "fence 12x64x128 wait  fence 12x64x128 fence 8x64x128 wait wait  fence 8x64x128 wait",
    # S; dP and dV; dK.
    KEYS: "fence 12x64x64 wait  fence 8x64x64 fence 4x64x128 wait  fence 4x64x192 wait",
    # S and dP; dQ.
    QUERIES: "fence 12x64x64 fence 8x64x64 wait wait  fence 4x64x192 wait",
}


def documented() -> dict[str, tuple[int, int]]:
    """{kernel: threads, shared bytes} as docs/mla.md has them."""
    rows = re.findall(r"^\| `(mla_prefill_\w+)` \| (\d+) \| (\d+) \|", (ROOT / "docs/mla.md").read_text(), re.M)
    return {name: (int(threads), int(shared)) for name, threads, shared in rows}


def test_budgets_are_the_documented_ones() -> None:
    assert {name: (row["threads"], row["shared_bytes"]) for name, row in ROWS.items()} == documented()


@pytest.mark.parametrize("kernel", ROWS)
def test_no_local_memory_and_no_gpu_wide_fence(kernel: str) -> None:
    row = sass.manifest()[ROWS[kernel]["image"]]["kernels"][kernel]
    assert (row["stack"], row["spill_stores"], row["spill_loads"]) == (0, 0, 0)
    names = sass.opcodes(ROWS[kernel]["image"], kernel)
    assert not [name for name in names if name.startswith(("LDL", "STL", "ERRBAR", "CCTL", "MEMBAR.ALL.GPU"))]


@pytest.mark.parametrize("kernel", SEQUENCE)
def test_products_overlap_and_nothing_is_serialised(kernel: str) -> None:
    names = sass.opcodes(ROWS[kernel]["image"], kernel)
    steps = []
    for name in names:
        if name.startswith("HGMMA"):
            steps.append("x".join(name.split(".")[1].split("x")[:2]))
        elif name.startswith("WARPGROUP"):
            steps.append("fence" if "ARRIVE" in name else "wait")
    runs = [(step, len(list(group))) for step, group in groupby(steps)]
    text = " ".join(f"{count}x{step}" if "x" in step else " ".join([step] * count) for step, count in runs)
    assert text == " ".join(SEQUENCE[kernel].split())
    assert {name for name in names if name.startswith("USETMAXREG")} == {
        "USETMAXREG.DEALLOC.CTAPOOL",
        "USETMAXREG.TRY_ALLOC.CTAPOOL",
    }
    assert {name for name in names if name.startswith("UTMALDG")} == {"UTMALDG.2D", "UTMALDG.3D"}
