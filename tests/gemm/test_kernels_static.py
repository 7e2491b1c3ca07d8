"""Static gates: what must be true of the FP8 GEMM kernels' machine code, wherever it runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import sass

from dsv3_kernels import _host

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {name: row for name, row in _host.kernels().items() if row["image"].startswith("fp8_")}
MIB = 2**20


def documented() -> dict[str, tuple[int, int, int]]:
    """{kernel: threads, registers at entry, shared bytes} as docs/gemm.md has them."""
    rows = re.findall(r"^\| (fp8_\w+) \| \w+ \| (\d+) \| (\d+) \| (\d+) \|", (ROOT / "docs/gemm.md").read_text(), re.M)
    return {name: (int(threads), int(registers), int(shared)) for name, threads, registers, shared in rows}


def test_budgets_are_the_documented_ones() -> None:
    built = {
        name: (row["threads"], sass.manifest()[row["image"]]["kernels"][name]["registers"], row["shared_bytes"])
        for name, row in KERNELS.items()
    }
    assert built == documented()


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_local_memory_and_no_gpu_wide_fence(kernel: str) -> None:
    row = sass.manifest()[KERNELS[kernel]["image"]]["kernels"][kernel]
    assert (row["stack"], row["spill_stores"], row["spill_loads"]) == (0, 0, 0)
    names = sass.opcodes(KERNELS[kernel]["image"], kernel)
    assert not [name for name in names if name.startswith(("LDL", "STL"))]
    assert not [name for name in names if name.startswith(("MEMBAR", "ERRBAR"))]
    products = [index for index, name in enumerate(names) if name.startswith("QGMMA")]
    caches = [index for index, name in enumerate(names) if name.startswith("CCTL")]
    if KERNELS[kernel]["cluster"] == 2:  # the wait for the other CTA, once, at the start
        assert len(caches) == 1 and caches[0] < products[0]
    else:
        assert not caches or (kernel.startswith("fp8_gemm_") and len(caches) == 2)  # a wait for sums of other CTAs
        assert all(index > products[-1] for index in caches)


@pytest.mark.parametrize("kernel", KERNELS)
def test_tensor_cores_and_copies(kernel: str) -> None:
    names = sass.opcodes(KERNELS[kernel]["image"], kernel)
    count = {name: names.count(name) for name in set(names)}
    # A, and B or B's gate and up, in straight-line code: no loop over lanes. A pair of CTAs shares A.
    copies = {name: count[name] for name in count if name.startswith("UTMALDG")}
    if KERNELS[kernel]["cluster"] == 2:
        assert copies == {"UTMALDG.3D": 1, "UTMALDG.3D.MULTICAST": 1}
    else:
        assert copies == {"UTMALDG.3D": 3 if "swiglu" in kernel else 2}
    assert {name for name in count if name.startswith("USETMAXREG")} == {
        "USETMAXREG.DEALLOC.CTAPOOL",
        "USETMAXREG.TRY_ALLOC.CTAPOOL",
    }
    assert any(name.startswith("LDGSTS") for name in names)
    assert any(name.startswith("ARRIVES") for name in names)  # of the scales' copies


@pytest.mark.parametrize("kernel", KERNELS)
def test_products_overlap_promotion(kernel: str) -> None:
    """One fence and four products per 64 rows and k-block; up to 128 x 128 one starts before the last is done."""
    shorten = {"QGMMA": "product", "WARPGROUP.ARRIVE": "fence", "WARPGROUP.DEPBAR": "wait"}
    names = [
        ".".join(name.split(".")[: 2 if name.startswith("WARPGROUP") else 1])
        for name in sass.opcodes(KERNELS[kernel]["image"], kernel)
    ]
    sequence = [shorten[name] for name in names if name in shorten]
    block = ["fence"] + 4 * ["product"]
    single = [*block, "wait"]
    two_waves = "256x128" in kernel or "256x256" in kernel or "swiglu" in kernel
    if not two_waves and "128x192" not in kernel:
        main = [*block, *single, *single, *single, "wait"]
        assert sequence in (main + single, single + main)
    else:
        assert sequence == single * (2 if two_waves else 1)


def test_image_sizes() -> None:
    """All images of this family together stay small."""
    total = sum((sass.IMAGES / f"{image}.cubin").stat().st_size for image in {row["image"] for row in KERNELS.values()})
    assert total <= 4 * MIB


@pytest.mark.parametrize("kernel", KERNELS)
def test_waits_for_its_predecessor_before_it_touches_memory(kernel: str) -> None:
    """What early_launches needs: one wait, before every access of global memory; one signal, after the last copy."""
    names = sass.opcodes(KERNELS[kernel]["image"], kernel)
    assert KERNELS[kernel]["waits"] and names.count("ACQBULK") == 1 and names.count("PREEXIT") == 1
    accesses = ("LDG", "STG", "LDGSTS", "ATOM", "RED", "UTMALDG", "LD.", "ST.")
    touches = [index for index, name in enumerate(names) if name.startswith(accesses)]
    assert names.index("ACQBULK") < min(touches)
    assert names.index("PREEXIT") > max(index for index, name in enumerate(names) if name.startswith("UTMALDG"))
