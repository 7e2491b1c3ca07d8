"""Every shipped PTX is understood whole, so that a kernel's first instruction without a handler shows at once."""

from __future__ import annotations

from pathlib import Path

import pytest

import dsv3_kernels
from dsv3_kernels import _host

IMAGES = Path(dsv3_kernels.__file__).parent / "images"


def check(sim, text: str) -> str | None:
    """What the simulator does not know in a module, `None` when nothing."""
    if sim.lib.dsv3SimCheck(text.encode()) == 0:
        return None
    return sim.lib.dsv3SimLastError().decode()


@pytest.mark.parametrize("path", sorted(IMAGES.glob("*.ptx")), ids=lambda path: path.stem)
def test_every_instruction_has_a_handler(sim, path):
    assert check(sim, path.read_text()) is None


def test_every_kernel_of_the_table_has_its_ptx():
    text = "".join(path.read_text() for path in IMAGES.glob("*.ptx"))
    assert all(f".entry {name}(" in text for name in _host.kernels()) and _host.kernels()


def test_an_unknown_instruction_is_named(sim):
    text = (IMAGES / "quantize_1x128.ptx").read_text()
    assert "shfl.sync.bfly.b32" in text
    assert "shfl.sync.sideways.b32" in check(sim, text.replace("shfl.sync.bfly.b32", "shfl.sync.sideways.b32"))
