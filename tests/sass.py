"""Machine code of a shipped image, as text."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import dsv3_kernels

IMAGES = Path(dsv3_kernels.__file__).parent / "images"


def manifest() -> dict:
    return json.loads((IMAGES / "manifest.json").read_text())["images"]


@functools.cache
def cuobjdump() -> str:
    """The disassembler: the package index's part, else Triton's, else the toolkit's."""
    for package, path in (("nvidia.cu13", "bin/cuobjdump"), ("triton", "backends/nvidia/bin/cuobjdump")):
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            continue
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (Path(folder) / path).is_file():
                return str(Path(folder) / path)
    found = shutil.which("cuobjdump")
    assert found, "no cuobjdump: install nvidia-cuda-cuobjdump or triton"
    return found


@functools.cache
def instructions(image: str, kernel: str) -> tuple[str, ...]:
    """The kernel's instructions in order, predicates included, without addresses and encodings."""
    text = subprocess.run(
        [cuobjdump(), "-sass", "-fun", kernel, str(IMAGES / f"{image}.cubin")],
        text=True,
        capture_output=True,
        check=True,
    ).stdout
    return tuple(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", text, re.M))


def opcodes(image: str, kernel: str) -> list[str]:
    """Instruction names with their modifiers, without predicates."""
    return [re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for line in instructions(image, kernel)]
