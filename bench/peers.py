"""Rivals whose package is not installed, as prebuilt images: a folder of cubins, each with a manifest (docs/bench.md).

A rival's kernels are compiled elsewhere, by hand, and never part of this repository. `bench/peer_<rival>.py` knows what
is public about them: which parameters a kernel takes, in which order it is launched, and what its library does before.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .launch import Kernel
from .machine import ROOT

FIELDS: dict[str, type] = {
    "peer": str,
    "version": str,
    "kernel": str,
    "symbol": str,
    "threads": int,
    "shared_bytes": int,
    "cluster": int,
    "block": list,
    "early": bool,
    "sizes": dict,
}
OPTIONAL: dict[str, Any] = {"cluster": 1, "block": [], "early": False, "sizes": {}}


class NoImage(ImportError):
    """No image of the folder serves a call: as if the rival were not installed."""


@dataclass(frozen=True)
class Image:
    """`<path>.cubin` (and `.ptx` for the simulator) with what `<path>.json` says of it."""

    path: Path
    peer: str
    version: str  # of the rival's source: release or commit
    kernel: str  # the rival's name for it: which parameters it takes
    symbol: str
    threads: int
    shared_bytes: int  # dynamic, the most that a launch takes
    cluster: int
    block: tuple[int, ...]  # the tile
    early: bool  # whether its library lets it start before its predecessor ends
    sizes: dict[str, int | list[int]]  # compiled in, or what its library chooses it for: a value, or several

    def mismatch(self, **sizes: int) -> str | None:
        """The first size of a call for which this image is not, in words."""
        for name, wanted in self.sizes.items():
            values = wanted if isinstance(wanted, list) else [wanted]
            if name in sizes and sizes[name] not in values:
                return f"image {self.path.name} is for {name} = {', '.join(map(str, values))}, got {sizes[name]}"
        return None

    def check(self, **sizes: int) -> None:
        """ValueError when the image is not for these sizes."""
        if why := self.mismatch(**sizes):
            raise ValueError(f"bench: {why}")

    def load(self, device: torch.device) -> Kernel:
        return _loaded(self.path, self.symbol, device, self.shared_bytes, self.cluster)


@functools.cache
def _loaded(path: Path, symbol: str, device: torch.device, shared_bytes: int, cluster: int) -> Kernel:
    return Kernel(path, symbol, device, shared_bytes=shared_bytes, cluster=cluster)


def folder() -> Path:
    """BENCH_PEERS, else build/peers."""
    return Path(os.environ.get("BENCH_PEERS") or ROOT / "build" / "peers")


def read(path: Path) -> Image:
    """An image's manifest. ValueError names what is missing or of the wrong type."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"bench: {path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"bench: {path} holds no object")
    values = {}
    for name, kind in FIELDS.items():
        value = found.get(name, OPTIONAL.get(name))
        if type(value) is not kind:
            what = f"is {value!r}" if name in found else "is missing"
            raise ValueError(f"bench: {path}: {name} {what}, wanted {kind.__name__}")
        values[name] = value
    if unknown := sorted(found.keys() - FIELDS.keys()):
        raise ValueError(f"bench: {path}: {unknown[0]} is no field of an image")
    return Image(path.with_suffix(""), **values | {"block": tuple(values["block"])})


def images(peer: str | None = None) -> list[Image]:
    """Every image in the folder, by name."""
    found = [read(path) for path in sorted(folder().glob("*.json"))]
    return [image for image in found if peer in (None, image.peer)]


def find(peer: str, kernel: str, **sizes: int) -> Image:
    """The first image that is for these sizes. NoImage (an ImportError) where there is none."""
    mine = [image for image in images(peer) if image.kernel == kernel]
    for image in mine:
        if image.mismatch(**sizes) is None:
            return image
    of = ", ".join(f"{name} = {value}" for name, value in sizes.items())
    raise NoImage(f"{peer} is not installed, and none of its {len(mine)} images of {kernel} in {folder()} is for {of}")


def versions(found: Iterable[Image] | None = None) -> dict[str, list[str]]:
    """{rival: versions of its images}, for the head of a results file."""
    known: dict[str, set[str]] = {}
    for image in images() if found is None else found:
        known.setdefault(image.peer, set()).add(image.version)
    return {peer: sorted(each) for peer, each in sorted(known.items())}
