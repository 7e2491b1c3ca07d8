"""What launchers of Triton kernels share: the launch and its count, sizes, and tables of configurations.

Imports neither triton nor torch, so that launches are counted where both may be missing.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TUNED = Path(__file__).with_name("tuned")
launches: Counter[str] = Counter()  # by kernel name, since the process began

Sizes = Mapping[str, int]


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, enable_fp_fusion: int = True, **options: Any) -> Any:
    """Launch a Triton kernel and count it. `args` are all its arguments in order, the constants too; options are
    `num_warps`, `num_stages` and the like. An empty grid launches nothing. Products and sums are fused unless an option
    says otherwise, whatever Triton's version or environment would choose.

    `kernel.run` is what `kernel[grid]` calls: without keywords to bind it takes 5.5 instead of 9.4 microseconds of the
    host (nine arguments, Triton 3.7.1, the driver's launch left out).
    """
    if 0 in grid:
        return None
    compiled = kernel.run(*args, grid=grid, warmup=False, enable_fp_fusion=enable_fp_fusion, **options)
    launches[kernel.__name__] += 1
    return compiled


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n (1 for n <= 1)."""
    return 1 << max(0, n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def sm(tensor: Any) -> int:
    """Compute capability of a tensor's device, 90 for 9.0; a CPU tensor is the simulator's, which is an sm_90."""
    return chip(tensor.get_device())[0]


FAR = 1 << 24  # elements between rows: 128 of them are as far as 32 bits reach


def far(*row_strides: int) -> str | None:
    """Why a kernel whose offsets inside a tile of up to 128 rows are 32-bit does not take tensors of these strides."""
    stride = max(row_strides)
    return f"takes rows less than {FAR} elements apart, got {stride}" if stride >= FAR else None


class Table:
    """An op's launch configurations: the first row whose upper bounds hold, a pure function of chip and sizes.

    A row is (bounds, configuration); bounds name sizes, or `sm`, the compute capability (89 for 8.9). The last row has
    no bounds. `tuned/<GPU>.json`, which `bench/tune_triton.py` writes by trying `candidates`, goes before these rows.
    """

    def __init__(self, op: str, *rows: tuple[Sizes, Sizes], candidates: tuple[Sizes, ...] = ()) -> None:
        if not rows or rows[-1][0]:
            raise ValueError(f"Table: {op}: the last row must have no bounds")
        self.op, self.rows, self.candidates = op, rows, candidates
        self._chosen: dict[tuple[int, ...], dict[str, int]] = {}
        tables[op] = self

    def __call__(self, tensor: Any, **sizes: int) -> dict[str, int]:
        """The configuration for these sizes on the tensor's device."""
        key = (tensor.get_device(), *sizes.values())
        found = self._chosen.get(key)
        if found is None:
            if len(self._chosen) > 4096:  # sizes that never repeat must not fill the memory
                self._chosen.clear()
            found = self._chosen[key] = self._choose(tensor, sizes)
        return found

    def _choose(self, tensor: Any, sizes: Sizes) -> dict[str, int]:
        capability, name = chip(tensor.get_device())
        sizes = {**sizes, "sm": capability}
        rows = (*tuned(name).get(self.op, ()), *self.rows)
        return dict(next(config for bounds, config in rows if all(sizes[k] <= bounds[k] for k in bounds)))


tables: dict[str, Table] = {}


@functools.cache
def chip(index: int) -> tuple[int, str]:
    """Compute capability and name of a device."""
    import torch

    if index < 0:
        return 90, ""

    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor, torch.cuda.get_device_name(index)


@functools.cache
def tuned(name: str) -> dict[str, list[tuple[Sizes, Sizes]]]:
    """What was measured best on the GPU of this name: rows by op; nothing where nobody measured."""
    path = TUNED / f"{slug(name)}.json"
    return json.loads(path.read_text())["ops"] if name and path.is_file() else {}


def slug(name: str) -> str:
    """File name of a GPU: "NVIDIA H100 80GB HBM3" is nvidia_h100_80gb_hbm3."""
    return "_".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
