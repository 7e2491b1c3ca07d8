"""Benchmarks of the mla family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dsv3_kernels as dk

from . import bench_mla_prefill  # mla_prefill, mla_cache_append, mla_cache_gather, merge_attention, rope
from .cases import Case


def lengths(device: torch.device, requests: int, keys: int) -> Tensor:
    """Between a half and all of `keys`, the longest first in no order."""
    spread = torch.linspace(0.5, 1, requests, dtype=torch.float64)[torch.arange(requests) * 7 % requests]
    return (spread * keys).round().clamp(min=1).int().to(device)


def mla_decode_plan(requests: int, keys: int, heads: int, *, quick: bool = False, cpu: bool = False) -> Case:
    def run(seqlens: Tensor) -> Any:
        return dk.mla_decode_plan(seqlens, num_queries=1, num_heads=heads)

    def check(inputs: tuple[Any, ...], plan: Any) -> str | None:
        with dk.backend("eager"):
            wanted = run(*inputs)
        same = all(torch.equal(a, b) for a, b in zip(plan, wanted, strict=True))
        return None if same else "mla_decode_plan: differs from eager's"

    return Case(
        op="mla_decode_plan",
        shape={"B": requests, "keys": keys, "H": heads},
        make=lambda device: (lengths(device, requests, keys),),
        run=run,
        check=check,
        bytes=4 * requests + 16 * (requests + 132) + 4 * (requests + 132),
        devices=("cuda", "cpu") if cpu else ("cuda",),
        quick=quick,
    )


CASES = [
    *bench_mla_prefill.CASES,
    mla_decode_plan(2, 1024, 16, cpu=True),
    mla_decode_plan(128, 4096, 128, quick=True),
    mla_decode_plan(4096, 1024, 16),
]
