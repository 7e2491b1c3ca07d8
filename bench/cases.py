"""What a benchmark is: one op at one shape, with its bytes, its arithmetic, its check and its rivals.

`bench/bench_<family>.py` exports a list `CASES` of these.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsv3_kernels._library import FAMILIES

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    `make(device)` gives the inputs; `run(*inputs)` is what a user would call, and is timed on every backend that serves
    the device; `check(inputs, outputs)` says what is wrong with the outputs of a run, or nothing. A peer is made from
    the inputs: `make_peer(*inputs)` returns what to call, with all preparation done, or raises ImportError. One whose
    name is in `checked` solves the very same problem: its outputs must pass the check, too.
    """

    op: str
    shape: dict[str, int | str]
    make: Callable[[torch.device], tuple[Any, ...]]
    run: Callable[..., Any]
    check: Callable[[tuple[Any, ...], Any], str | None]
    bytes: int  # that must move: operands read once, results written once
    flops: int = 0  # multiplications and additions of matrix products, 0 where moving bytes is all
    unit: str = ""  # the ceiling those are held against: "fp8", "bf16" or "float32"
    peers: dict[str, Callable[..., Call]] = field(default_factory=dict)
    checked: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cuda",)
    quick: bool = False  # also part of `--quick`

    @property
    def key(self) -> str:
        """The case's name in results: stable, unique."""
        return f"{self.op}[{','.join(f'{k}={v}' for k, v in self.shape.items())}]"


def families() -> list[str]:
    """Families that have a benchmark file."""
    here = Path(__file__).parent
    return [name for name in FAMILIES if (here / f"bench_{name}.py").exists()]


def collect(wanted: Iterable[str] | None = None) -> list[Case]:
    """The cases of the families, in order. ValueError when two share a key."""
    found: list[Case] = []
    for family in families() if wanted is None else wanted:
        found += importlib.import_module(f"bench.bench_{family}").CASES
    keys = [case.key for case in found]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"two benchmarks are called {sorted(twice)[0]}")
    return found
