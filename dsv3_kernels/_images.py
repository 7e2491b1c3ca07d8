"""The CUDA images that this installation holds, as the build recorded them. Standard library only."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).resolve().parent / "images"


@dataclass(frozen=True)
class Image:
    """One `.cu` and what became of it: `<name>.ptx` and, from that very file, `<name>.cubin`."""

    name: str
    source: str
    nvcc: str
    ptx_hash: str
    cubin_hash: str
    kernels: dict[str, dict[str, int]] = field(repr=False)  # kernel: registers, shared, stack, spills, barriers

    @property
    def ptx(self) -> Path:
        return DIRECTORY / f"{self.name}.ptx"

    @property
    def cubin(self) -> Path:
        return DIRECTORY / f"{self.name}.cubin"


def images() -> dict[str, Image]:
    """Every image that was built, by name."""
    return {
        name: Image(name, *(entry[key] for key in ("source", "nvcc", "ptx_hash", "cubin_hash", "kernels")))
        for name, entry in _manifest().get("images", {}).items()
    }


def missing() -> dict[str, str]:
    """What the build left out and why: images by name, and the host module as `_host`."""
    manifest = _manifest()
    if not manifest:
        return {"_host": "nothing was built: run `make venv`, or `python -m build_backend` in a source checkout"}
    host = {"_host": manifest["host"]} if manifest.get("host") else {}
    return {**host, **manifest.get("missing", {})}


def _manifest() -> dict[str, Any]:
    try:
        manifest = json.loads((DIRECTORY / "manifest.json").read_text())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}
