"""Static gates: what must be true of the decode kernels' machine code, wherever it runs."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import sass

from dsv3_kernels import _host

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {name: row["image"] for name, row in _host.kernels().items() if name.startswith("mla_decode")}
CLUSTER = ("mla_decode_bf16_cluster", "mla_decode_fp8_cluster")
ATTENTION = ("mla_decode_bf16", "mla_decode_bf16_pair", "mla_decode_fp8", "mla_decode_simple", *CLUSTER)
MIB = 2**20


def count(kernel: str) -> Counter[str]:
    """Instructions by name, without the modifiers that do not matter here."""
    return Counter(re.match(r"WARPGROUP\.\w+|\w+", name)[0] for name in sass.opcodes(KERNELS[kernel], kernel))


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_local_memory_and_no_gpu_wide_fence(kernel: str) -> None:
    row = sass.manifest()[KERNELS[kernel]]["kernels"][kernel]
    assert (row["stack"], row["spill_stores"], row["spill_loads"]) == (0, 0, 0)
    names = sass.opcodes(KERNELS[kernel], kernel)
    assert not [name for name in names if name.startswith(("LDL", "STL", "ERRBAR", "MEMBAR.ALL.GPU", "MEMBAR.ALL.SYS"))]


@pytest.mark.parametrize("kernel", [*ATTENTION, "mla_decode_combine"])
def test_waits_for_its_predecessor(kernel: str) -> None:
    names = sass.opcodes(KERNELS[kernel], kernel)
    assert _host.kernels()[kernel]["waits"] and names.count("ACQBULK") == 1
    assert names.count("PREEXIT") == (kernel in ATTENTION)


@pytest.mark.parametrize(
    ("kernel", "products", "waits"),
    [
        # A first tile (36 for the scores, 4 for the output), any other (4 more for the other warpgroup's weights), and
        # the last one's weights for the warpgroup that did not form them.
        ("mla_decode_bf16", 40 + 44 + 4, 2 + 3 + 1),
        ("mla_decode_bf16_pair", 40 + 44 + 4, 2 + 3 + 1),
        ("mla_decode_fp8", 40 + 44 + 4, 2 + 3 + 1),
        ("mla_decode_bf16_cluster", 40 + 44 + 4, 2 + 3 + 1),
        ("mla_decode_fp8_cluster", 40 + 44 + 4, 2 + 3 + 1),
        ("mla_decode_simple", 40, 2),
    ],
)
def test_products_are_waited_for_in_groups(kernel: str, products: int, waits: int) -> None:
    """One wait per group of products: a serialised pipeline has one per product."""
    found = count(kernel)
    assert found["HGMMA"] == products and found["WARPGROUP.DEPBAR"] == waits


@pytest.mark.parametrize("kernel", ATTENTION)
def test_copies_conversions_and_registers(kernel: str) -> None:
    found = count(kernel)
    assert found["USETMAXREG"] == 2
    assert found["UTMALDG"] == (0 if "fp8" in kernel else 2)  # either half of a tile, no loop over lanes
    # Two codes at a time and two multiplications each; nothing goes through float32.
    assert found["HMUL2"] == (4 * 16 if "fp8" in kernel else 0)
    assert not [name for name in sass.opcodes(KERNELS[kernel], kernel) if "E4M3" in name]


@pytest.mark.parametrize("kernel", CLUSTER)
def test_one_barrier_of_the_cluster_and_stores_of_16_bytes(kernel: str) -> None:
    """Arrival and wait are all there is of it; 4 x 8 stores for a thread's output, and two for its log-sum-exps."""
    names = sass.opcodes(KERNELS[kernel], kernel)
    assert names.count("UCGABAR_ARV") == names.count("UCGABAR_WAIT") == 1
    assert (names.count("STAS.128"), names.count("STAS")) == (32, 2)


def test_budgets_are_the_documented_ones() -> None:
    rows = re.findall(r"^\| (mla_decode\w*) \| (\d+) \| (\d+) \| (\d+) \|", (ROOT / "docs/mla.md").read_text(), re.M)
    documented = {name: tuple(int(number) for number in numbers) for name, *numbers in rows}
    table = _host.kernels()
    built = {
        name: (
            table[name]["threads"],
            sass.manifest()[image]["kernels"][name]["registers"],
            table[name]["shared_bytes"],
        )
        for name, image in KERNELS.items()
    }
    assert built == documented


def test_image_sizes() -> None:
    assert sum((sass.IMAGES / f"{image}.cubin").stat().st_size for image in set(KERNELS.values())) <= MIB
