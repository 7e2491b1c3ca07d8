"""nvcc's code for the toolkit's own headers, against numpy."""

from __future__ import annotations

import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from simulator import SimError

from build_backend import toolchain

RNG = np.random.default_rng(4)


@pytest.fixture(scope="session")
def ptx(tmp_path_factory) -> str:
    nvcc = toolchain.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    out = tmp_path_factory.mktemp("ptx") / "toolkit.ptx"
    flags = ["-std=c++17", "-O3", "-gencode=arch=compute_90a,code=compute_90a", "-ptx", "-o", out]
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    subprocess.run([nvcc.nvcc, *flags, Path(__file__).with_name("toolkit.cu")], check=True, env=env)
    return out.read_text()


@pytest.fixture(params=["early", "late"])
def timed(sim, request):
    sim.option(timing=request.param)
    return sim


def test_barrier_copy(timed, ptx):
    x, out = RNG.integers(-99, 99, 640, dtype=np.int32), np.zeros(640, np.int32)
    timed.load(ptx, "barrier_copy").launch(x, out, 5, block=128)
    assert np.array_equal(out, 2 * x + 1)


def test_pipeline_copy(timed, ptx):
    x, out = RNG.standard_normal(5 * 256).astype(np.float32), np.zeros(640, np.float32)
    timed.load(ptx, "pipeline_copy").launch(x, out, 5, 0, block=128)
    tiles = x.reshape(5, 256)
    assert np.array_equal(out.reshape(5, 128), tiles[:, :128] + tiles[:, :127:-1])
    with pytest.raises(SimError, match="race on shared memory"):
        timed.load(ptx, "pipeline_copy").launch(x, out, 5, 1, block=128)


@pytest.mark.parametrize("seed", [0, 9])
def test_cluster_sum(sim, ptx, seed):
    sim.option(seed=seed)
    x, neighbour, total = RNG.integers(0, 99, 512, dtype=np.int32), np.zeros(512, np.int32), np.zeros(8, np.int32)
    sim.load(ptx, "cluster_sum").launch(x, neighbour, total, grid=8, block=64)
    tiles = x.reshape(2, 4, 64)
    assert np.array_equal(neighbour.reshape(2, 4, 64), np.roll(tiles, 1, axis=1))
    assert np.array_equal(total, np.repeat(tiles.sum((1, 2)), 4))


def test_warp_tools(sim, ptx):
    x, out = RNG.integers(-50, 50, 128, dtype=np.int32), np.zeros(640, np.int32)
    sim.load(ptx, "warp_tools").launch(x, out, block=128)
    warps = x.reshape(4, 32)
    assert np.array_equal(out[:128].reshape(4, 32), np.repeat(warps.sum(1)[:, None], 32, 1))
    eights = x.reshape(16, 8)
    assert np.array_equal(out[128:256].reshape(16, 8), np.cumsum(eights, 1) - eights)
    same = np.stack([[(w & 3 == v & 3).sum() for v in w] for w in warps]) + (warps[:, 31:] > 0)
    assert np.array_equal(out[256:384].reshape(4, 32), same)
    odd = warps & 1
    rank = np.cumsum(odd, 1) - odd
    assert np.array_equal(out[384:512].reshape(4, 32), np.where(odd == 1, rank + 100 * odd.sum(1)[:, None], 0))
    d = np.cumsum(1.0 / (1 + x.astype(np.float64) ** 2))
    want = (1e6 * d).astype(np.int32) + [round(1000 * math.sin(v) + 10 * math.exp(v * 1e-3)) for v in x]
    assert np.abs(out[512:] - want).max() <= 1  # sinf and expf may be an ulp off where the rounding to int turns


def test_calls_local_memory_and_switch(sim, ptx):
    x, out = RNG.integers(0, 2**20, 64, dtype=np.uint32), np.zeros(64, np.uint32)
    sim.load(ptx, "calls").launch(x, out, block=64)
    mask = (1 << 32) - 1
    for t in range(64):
        local = [0] * 8
        for i in range(8):
            local[int(x[t]) + i & 7] = math.gcd(int(x[t]) + 1, int(x[t ^ i]) + 1)
        s = 0
        for i in range(8):
            s = s * 31 + local[i * 5 + int(x[0]) & 7] & mask
        kind = int(x[t]) % 6
        s = [s + 1, s ^ 0x5555, s * 7, ~s, int(f"{s:032b}"[::-1], 2), s << 3 | s >> 29][kind] & mask
        assert out[t] == s, (t, kind)


@pytest.mark.parametrize("order", ["forward", "random"])
def test_last_block(sim, ptx, order):
    sim.option(order=order, eager=1)
    x, partial, total = RNG.integers(0, 99, 640, dtype=np.int32), np.zeros(10, np.int32), np.zeros(1, np.int32)
    sim.load(ptx, "last_block").launch(x, partial, total, grid=10, block=64)
    assert total[0] == x.sum()
