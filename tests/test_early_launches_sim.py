"""`dk.early_launches()` in the simulator, which reports what a kernel touches before it waits for the one before."""

from __future__ import annotations

import pytest
import torch
from simulated import SCHEDULES, needs_simulator, schedule

import dsv3_kernels as dk
from dsv3_kernels import _host, _simulator
from dsv3_kernels.gemm import _cuda

pytestmark = needs_simulator


TILES = ["8x128", "32x128", "64x128", "128x128", "256x128", "128x192", "128x256", "256x256"]


def dense(normal) -> list[torch.Tensor]:
    """Every product reads what the launch before it wrote, or writes where that one does."""
    w = dk.quantize_128x128(normal(256, 256))
    results = []
    for tile in TILES:
        x = dk.quantize_1x128(normal(200, 256))
        y, z = (torch.zeros(200, 256, dtype=torch.bfloat16) for _ in range(2))
        for a, out in ((x, y), (x, y), (dk.quantize_1x128(y), z)):
            _cuda.fp8_gemm(*a, *w, None, out.dtype, f"{tile}/1", None, out)
        results += [y, z]
    return results


def grouped(normal) -> list[torch.Tensor]:
    offsets, counts = torch.tensor([0, 40, 40, 168], dtype=torch.int32), torch.tensor([2, 0, 70], dtype=torch.int32)
    w, v = dk.quantize_128x128(normal(3, 256, 256)), dk.quantize_128x128(normal(3, 256, 128))
    hidden = dk.fp8_grouped_gemm_swiglu_quantize(*dk.quantize_1x128(normal(168, 256)), *w, offsets)
    y = dk.fp8_grouped_gemm(*hidden[:2], *v, offsets)
    masked = dk.fp8_masked_gemm(*dk.quantize_1x128(normal(3, 72, 256)), *w, counts)
    return [y[:168], masked]


def weight_gradient(normal) -> list[torch.Tensor]:
    """The second launch adds to what the first wrote."""
    offsets = torch.tensor([0, 100, 256], dtype=torch.int32)
    _, _, x, x_scale, columns = dk.quantize_1x128_both(normal(256, 256), offsets=offsets)
    _, _, y, y_scale, _ = dk.quantize_1x128_both(normal(256, 128), offsets=offsets)
    gradient = dk.fp8_grouped_wgrad(x, x_scale, y, y_scale, columns)
    return [dk.fp8_grouped_wgrad(x, x_scale, y, y_scale, columns, out=gradient, accumulate=True)]


def decode(normal) -> list[torch.Tensor]:
    """Absorption, attention (with a plan: and its combination; without: a cluster's), absorption."""
    lengths, table = torch.tensor([380, 200], dtype=torch.int32), torch.arange(12, dtype=torch.int32).view(2, 6)
    kv_b, cache = normal(16, 256, 512), normal(12, 64, 576)
    packed = torch.zeros(12, 64, 656, dtype=torch.uint8)
    dk.mla_cache_append(packed, torch.arange(768), *cache.view(768, 576).split([512, 64], 1))
    results = []
    for keys in (cache, packed):
        for plan in (None, dk.mla_decode_plan(lengths, num_queries=1, num_heads=16, kv_dtype=keys.dtype)):
            q = normal(2, 1, 16, 576)
            dk.mla_absorb(normal(2, 16, 128), kv_b[:, :128].mT, out=q[:, 0, :, :512])
            out, lse = dk.mla_decode(q, keys, table, lengths, softmax_scale=0.05, plan=plan)
            results += [out, lse, dk.mla_absorb(out[:, 0], kv_b[:, 128:])]
    return results


CHAINS = {
    dense: [f"fp8_gemm_{tile}" + "_block" * tile.startswith(("128", "256")) for tile in TILES],
    grouped: ["fp8_grouped_gemm_swiglu_quantize_block"],
    weight_gradient: ["fp8_grouped_wgrad_128x128"],
    decode: [
        *("mla_decode_bf16", "mla_decode_fp8", "mla_decode_bf16_cluster", "mla_decode_fp8_cluster"),
        "mla_decode_combine",
    ],
}


@pytest.mark.parametrize("options", [{}, SCHEDULES["late"]], ids=["early", "late"])
@pytest.mark.parametrize("chain", CHAINS)
def test_kernels_wait_for_what_they_touch(chain, options):
    def run() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(7)
        return chain(lambda *shape: torch.randn(*shape, generator=generator).bfloat16())

    with dk.backend("sim"), _simulator.active("cuda"), schedule(**options):
        want = run()
        before = dk.launch_counts()
        with dk.early_launches():
            got = run()
    ran = [k for k, n in dk.launch_counts().items() if n > before[k]]
    assert set(CHAINS[chain]) <= set(ran) and all(_host.kernels()[k]["waits"] for k in CHAINS[chain])
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
