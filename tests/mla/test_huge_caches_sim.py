"""Caches beyond 2^31 and 2^32 bytes under the CUDA kernels: pages that lie there are read and written there.

Memory that nobody touches costs nothing, here and in the simulator: the tensors are as large as they say, and all but a
few of their pages are never committed.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest
import torch
from checks import same_bits
from decode_cases import SCALE, as_read, check, queries
from latent_cache import FP8, filled
from simulated import launches, needs_simulator
from torch import Tensor

import dsv3_kernels as dk
from dsv3_kernels import _host
from dsv3_kernels._arguments import target
from dsv3_kernels.mla import _cuda, _cuda_decode, _eager

pytestmark = [needs_simulator, pytest.mark.slow]

BF16 = torch.bfloat16
PAGE = 64
ROW_BYTES = {BF16: 1152, FP8: 656}
LIMIT_KIB = 1 << 20


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """What a test adds to the most that this process ever had."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < LIMIT_KIB


def far_pages(dtype: torch.dtype) -> list[int]:
    """Two pages just beyond 2^31 bytes and two beyond 2^32."""
    first = [bound // (PAGE * ROW_BYTES[dtype]) + 1 for bound in (2**31, 2**32)]
    return [first[0], first[0] + 1, first[1], first[1] + 1]


def huge(dtype: torch.dtype) -> Tensor:
    """A cache that has them, untouched."""
    cache = torch.empty(far_pages(dtype)[-1] + 1, PAGE, 656 if dtype == FP8 else 576, dtype=dtype)
    assert cache.nbytes > 2**32
    return cache


def spread(small: Tensor, table: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A small cache's pages put far out, and the table that says so. Neighbours within 32 bits stay zero."""
    cache, far = huge(dtype), far_pages(dtype)
    used = sorted({int(page) for page in table.flatten() if page < len(small)})
    assert len(used) == len(far)
    moved = table.clone()
    for to, page in zip((far[0], far[3], far[1], far[2]), used, strict=True):
        cache[to] = small[page]
        moved[table == page] = to
    return cache, moved


@pytest.mark.parametrize("kernel", ["bf16", "bf16_pair", "fp8", "bf16_cluster", "fp8_cluster"])
def test_decode(kernel: str) -> None:
    dtype = FP8 if kernel.startswith("fp8") else BF16
    small, table, seqlens, keys = filled([70, 128], PAGE, dtype)
    cache, moved = spread(small, table, dtype)
    q = queries(2, 1, 70 if kernel == "bf16_pair" else 4)
    out, lse = torch.full((*q.shape[:3], 512), torch.nan).bfloat16(), torch.full(q.shape[:3], torch.nan)
    with launches(f"mla_decode_{kernel}"):
        if kernel.endswith("cluster"):
            _host.mla_decode_cluster(q, cache, moved, seqlens, SCALE, True, out, lse, 2, *target(q))
        else:
            with dk.backend("eager"):
                plan = dk.mla_decode_plan(seqlens, num_queries=1, num_heads=q.shape[2], num_sms=4)
            _cuda_decode.mla_decode(q, cache, moved, seqlens, *plan, SCALE, True, 512, out, lse)
    check((out, lse), q, as_read(keys, small, table, seqlens) if dtype == FP8 else keys)


@pytest.mark.parametrize("dtype", [BF16, FP8])
def test_gather(dtype: torch.dtype) -> None:
    small, table, _, keys = filled([70, 128], PAGE, dtype, pow2_scale=True)
    cache, moved = spread(small, table, dtype)
    bounds, latent, k_rope = torch.tensor([0, 70, 198]).int(), torch.empty(198, 512, dtype=BF16), torch.empty(198, 64)
    k_rope = k_rope.bfloat16()
    with launches("mla_cache_gather_fp8" if dtype == FP8 else "mla_cache_gather_copy"):
        _cuda.mla_cache_gather(cache, moved, bounds, 198, 512, latent, k_rope)
    assert torch.equal(torch.cat([latent, k_rope], 1).double(), torch.cat(keys))


def far_slots(dtype: torch.dtype) -> Tensor:
    """First and last row of each far page, and two that are skipped."""
    slots = [page * PAGE + row for page in far_pages(dtype) for row in (0, PAGE - 1)]
    return torch.tensor([-1, *slots, 2**62])


def written(cache: Tensor, slots: Tensor, wanted: Tensor) -> None:
    """The slots hold the rows wanted, the pages around them and those that 32 bits would make of them nothing."""
    rows = cache.view(-1, cache.shape[2])
    assert same_bits(rows[slots], wanted)
    rows[slots] = 0
    row_bytes = cache.shape[2] * cache.element_size()
    for slot in slots.tolist():
        for alias in (slot * row_bytes % 2**32, slot * row_bytes % 2**31):
            around = rows[max(alias // row_bytes - PAGE, 0) :][: 2 * PAGE]
            assert not around.view(torch.uint8).any()
    assert not cache[far_pages(cache.dtype)[0] - 1 :][:4].view(torch.uint8).any()
    assert not cache[far_pages(cache.dtype)[2] - 1 :].view(torch.uint8).any()


@pytest.mark.parametrize("dtype", [BF16, FP8])
def test_append(dtype: torch.dtype) -> None:
    cache, slots = huge(dtype), far_slots(dtype)
    latent, k_rope = torch.randn(10, 512).bfloat16(), torch.randn(10, 64).bfloat16()
    small = torch.zeros(1, 16, cache.shape[2], dtype=dtype)
    _eager.mla_cache_append(small, torch.arange(8), latent[1:9], k_rope[1:9], False)
    with launches("mla_cache_append_fp8_bf16" if dtype == FP8 else "mla_cache_append_copy"):
        _cuda.mla_cache_append(cache, slots, latent, k_rope, False)
    written(cache, slots[1:9], small[0, :8])


@pytest.mark.parametrize("dtype", [BF16, FP8])
def test_prologue(dtype: torch.dtype) -> None:
    cache, slots = huge(dtype), far_slots(dtype)
    x, weights = torch.randn(10, 8 + 576).bfloat16(), (torch.ones(8).bfloat16(), torch.ones(512).bfloat16())
    rest = weights, torch.arange(10), torch.randn(10, 64)
    small, near = torch.zeros(1, 16, cache.shape[2], dtype=dtype), torch.tensor([-1, *range(8), -1])
    results = []
    for kv_cache, places in ((cache, slots), (small, near)):
        with launches("mla_prologue_fp8" if dtype == FP8 else "mla_prologue_bf16"), dk.backend("sim:cuda"):
            results.append(dk.mla_prologue(x, *rest[0], *rest[1:], kv_cache, places, eps=1e-6))
    assert same_bits(*results)
    written(cache, slots[1:9], small[0, :8])
