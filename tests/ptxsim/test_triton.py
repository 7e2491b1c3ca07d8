"""Triton's code generator is of independent origin: its kernels must run right, and without any report."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton_kernels as kernels
from simulator import SimError
from triton_kernels import compile_kernel

RNG = np.random.default_rng(0)
NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.int8: "i8",
    torch.int32: "i32",
}


def raw(t: torch.Tensor) -> np.ndarray:
    """The tensor's memory as numpy (no copy)."""
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]).numpy()


def randn(*shape, dtype=torch.float32) -> torch.Tensor:
    return torch.from_numpy(RNG.standard_normal(shape, dtype=np.float32)).to(dtype)


def test_add_ragged(sim):
    k = compile_kernel(kernels.add, {"x": "*fp32", "y": "*fp32", "out": "*fp32", "n": "i32"}, {"BLOCK": 256})
    n = 1000
    x, y, out = randn(n), randn(n), torch.full((n,), float("nan"))
    k.launch(sim, raw(x), raw(y), raw(out), n, grid=4)
    assert torch.equal(out, x + y)


FUNCTIONS = {
    "exp": torch.exp,
    "log": lambda x: torch.log(x),
    "sin": torch.sin,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "floor": torch.floor,
}


@pytest.mark.parametrize("op", FUNCTIONS)
def test_functions(sim, op):
    k = compile_kernel(kernels.elementwise, {"x": "*fp32", "out": "*fp32", "n": "i32"}, {"OP": op, "BLOCK": 512})
    x, out = (randn(500).abs() + 0.01 if op == "log" else randn(500) * 3), torch.full((500,), float("nan"))
    k.launch(sim, raw(x), raw(out), 500)
    torch.testing.assert_close(out, FUNCTIONS[op](x.double()).float(), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("op", ["sqrt", "divide"])
def test_correctly_rounded(sim, op):
    k = compile_kernel(kernels.elementwise, {"x": "*fp32", "out": "*fp32", "n": "i32"}, {"OP": op, "BLOCK": 512})
    x, out = randn(512).abs(), torch.full((512,), float("nan"))
    k.launch(sim, raw(x), raw(out), 512)
    want = torch.sqrt(x.double()) if op == "sqrt" else 1 / x.double()  # torch's float32 sqrt is not correctly rounded
    assert torch.equal(out, want.float())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16])
def test_casts_bit_for_bit(sim, dtype):
    k = compile_kernel(kernels.cast, {"x": "*fp32", "out": "*" + NAMES[dtype], "n": "i32"}, {"BLOCK": 1024})
    limit = 400.0 if dtype == torch.float8_e4m3fn else 5e4
    x = torch.cat([randn(3000), randn(1000) * 1e-3, randn(96) * 100]).clamp(-limit, limit)
    out = torch.zeros(4096, dtype=dtype)
    k.launch(sim, raw(x), raw(out), 4096, grid=4)
    assert np.array_equal(raw(out), raw(x.to(dtype)))


@pytest.mark.parametrize("warps", [1, 4])
def test_softmax(sim, warps):
    k = compile_kernel(kernels.softmax, {"x": "*fp32", "out": "*fp32", "columns": "i32"}, {"BLOCK": 512}, warps=warps)
    x, out = randn(3, 500), torch.full((3, 500), float("nan"))
    k.launch(sim, raw(x), raw(out), 500, grid=3)
    torch.testing.assert_close(out, torch.softmax(x.double(), 1).float(), rtol=3e-6, atol=1e-8)


def test_layer_norm(sim):
    k = compile_kernel(
        kernels.layer_norm,
        {"x": "*fp32", "w": "*fp32", "b": "*fp32", "out": "*fp32", "columns": "i32", "eps": "fp32"},
        {"BLOCK": 1024},
    )
    x, w, b, out = randn(2, 777), randn(777), randn(777), torch.full((2, 777), float("nan"))
    k.launch(sim, raw(x), raw(w), raw(b), raw(out), 777, 1e-5, grid=2)
    want = torch.nn.functional.layer_norm(x.double(), (777,), w.double(), b.double(), 1e-5)
    torch.testing.assert_close(out, want.float(), rtol=1e-4, atol=1e-5)


def test_scan_and_sort(sim):
    x, out = torch.from_numpy(RNG.integers(-1000, 1000, 512, dtype=np.int32)), torch.zeros(512, dtype=torch.int32)
    for fn, want in ((kernels.cumsum, torch.cumsum(x, 0).int()), (kernels.sort, torch.sort(x).values)):
        compile_kernel(fn, {"x": "*i32", "out": "*i32"}, {"BLOCK": 512}).launch(sim, raw(x), raw(out))
        assert torch.equal(out, want)


def test_argmax(sim):
    x, out = randn(4, 256), torch.zeros(4, dtype=torch.int32)
    compile_kernel(kernels.argmax, {"x": "*fp32", "out": "*i32"}, {"BLOCK": 256}).launch(sim, raw(x), raw(out), grid=4)
    assert torch.equal(out.long(), x.argmax(1))


def test_histogram_and_scatter(sim):
    x, out = torch.from_numpy(RNG.integers(0, 32, 1024, dtype=np.int32)), torch.zeros(32, dtype=torch.int32)
    compile_kernel(kernels.histogram, {"x": "*i32", "out": "*i32"}, {"BLOCK": 256, "BINS": 32}).launch(
        sim, raw(x), raw(out), grid=4
    )
    assert torch.equal(out.long(), torch.bincount(x, minlength=32))
    v, sums = randn(1024), torch.zeros(32)
    compile_kernel(kernels.scatter_add, {"x": "*fp32", "index": "*i32", "out": "*fp32"}, {"BLOCK": 256}).launch(
        sim, raw(v), raw(x), raw(sums), grid=4
    )
    torch.testing.assert_close(
        sums.double(), torch.zeros(32).double().index_add(0, x.long(), v.double()), rtol=1e-4, atol=1e-4
    )


def test_transpose(sim):
    x, out = randn(32, 64, dtype=torch.bfloat16), torch.zeros(64, 32, dtype=torch.bfloat16)
    compile_kernel(kernels.transpose, {"x": "*bf16", "out": "*bf16"}, {"R": 32, "C": 64}).launch(sim, raw(x), raw(out))
    assert torch.equal(out, x.T)


def test_integer_division(sim):
    x = torch.from_numpy(RNG.integers(-(2**62), 2**62, 128))
    y = torch.from_numpy(RNG.integers(1, 2**40, 128)) * torch.tensor([1, -1]).repeat(64)
    q, r = torch.zeros_like(x), torch.zeros_like(x)
    compile_kernel(kernels.divide_int, {"x": "*i64", "y": "*i64", "q": "*i64", "r": "*i64"}, {"BLOCK": 128}).launch(
        sim, raw(x), raw(y), raw(q), raw(r)
    )
    want = torch.div(x, y, rounding_mode="trunc")  # Triton divides as C does
    assert torch.equal(q, want) and torch.equal(r, x - want * y)


def test_programs_that_wait_for_each_other(sim):
    k = compile_kernel(kernels.ticket, {"counter": "*i32", "lock": "*i32", "total": "*i32"}, {"BLOCK": 128})
    for order in ("forward", "reverse", "random"):
        sim.option(order=order, eager=1)
        counter, lock, total = (
            torch.zeros(1, dtype=torch.int32),
            torch.zeros(1, dtype=torch.int32),
            torch.zeros(128, dtype=torch.int32),
        )
        k.launch(sim, raw(counter), raw(lock), raw(total), grid=12)
        assert counter.item() == 12 and lock.item() == 0 and torch.all(total == 66)


# BM, BN, BK, warps, expected instruction
SHAPES = [
    (64, 64, 64, 4, "wgmma"),
    (64, 128, 64, 4, "wgmma"),
    (64, 256, 64, 8, "wgmma"),
    (128, 64, 64, 8, "wgmma"),
    (128, 128, 64, 8, "wgmma"),
    (128, 256, 64, 8, "wgmma"),
    (16, 64, 64, 4, "mma.sync"),
]


def tf32(x: torch.Tensor, kernel) -> torch.Tensor:
    """What the tensor core sees of a float32: its upper 19 bits, rounded first where the kernel says so."""
    bits = x.view(torch.int32) + (0x1000 if "cvt.rna.tf32" in kernel.ptx else 0)
    return (bits & ~0x1FFF).view(torch.float32)


def matmul(sim, kernel, dtype, M, N, K, BM, BN, out=torch.float32, b_nk=False):
    if dtype == torch.int8:
        a, b = (torch.from_numpy(RNG.integers(-128, 128, s, dtype=np.int8)) for s in ((M, K), (N, K)))
        c, want = torch.zeros(M, N, dtype=torch.int32), a.double() @ b.double().T
    else:
        a, b = randn(M, K).to(dtype), randn(*((K, N) if b_nk else (N, K))).to(dtype)
        x, y = (tf32(a, kernel), tf32(b, kernel)) if dtype == torch.float32 else (a, b)
        c, want = torch.full((M, N), float("nan"), dtype=out), x.double() @ (y.double() if b_nk else y.double().T)
    kernel.launch(sim, raw(a), raw(b), raw(c), M, N, K, grid=(-(-M // BM), -(-N // BN)))
    tolerance = 0 if dtype == torch.int8 else 2**-8 * want.abs().max() if out == torch.bfloat16 else 1e-5 * K**0.5
    assert (c.double() - want).abs().max() <= tolerance


@pytest.mark.parametrize("timing", ["early", "late"])
@pytest.mark.parametrize(("BM", "BN", "BK", "warps", "instruction"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_matmul(sim, dtype, BM, BN, BK, warps, instruction, timing):
    constants = {"BM": BM, "BN": BN, "BK": BK, "PRECISION": "tf32"}
    pointer = "*" + NAMES[dtype]
    k = compile_kernel(
        kernels.matmul, {"a": pointer, "b": pointer, "c": "*fp32", "M": "i32", "N": "i32", "K": "i32"}, constants, warps
    )
    assert instruction in k.ptx
    sim.option(timing=timing)
    matmul(sim, k, dtype, BM + 7, BN, 192, BM, BN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("BM", [16, 64])
def test_matmul_types(sim, dtype, BM):
    constants = {"BM": BM, "BN": 64, "BK": 32, "PRECISION": "tf32"}
    pointer = "*" + NAMES[dtype]
    out = "*i32" if dtype == torch.int8 else "*fp32"
    fn = kernels.matmul_int8 if dtype == torch.int8 else kernels.matmul
    k = compile_kernel(fn, {"a": pointer, "b": pointer, "c": out, "M": "i32", "N": "i32", "K": "i32"}, constants)
    matmul(sim, k, dtype, 64, 64, 96, BM, 64)


def test_matmul_transposed_operand(sim):
    k = compile_kernel(
        kernels.matmul_nk,
        {"a": "*bf16", "b": "*bf16", "c": "*fp32", "M": "i32", "N": "i32", "K": "i32"},
        {"BM": 64, "BN": 128, "BK": 64},
    )
    assert "wgmma" in k.ptx
    matmul(sim, k, torch.bfloat16, 64, 128, 192, 64, 128, b_nk=True)


@pytest.mark.parametrize("timing", ["early", "late", "random"])
def test_matmul_tensor_descriptors(sim, timing):
    k = compile_kernel(
        kernels.matmul_tma,
        {"a": "*bf16", "b": "*bf16", "c": "*bf16", "M": "i32", "N": "i32", "K": "i32"},
        {"BM": 64, "BN": 64, "BK": 64},
    )
    assert "cp.async.bulk.tensor" in k.ptx and "tensormap.replace" in k.ptx
    sim.option(timing=timing)
    matmul(sim, k, torch.bfloat16, 100, 72, 192, 64, 64, out=torch.bfloat16)


def attention(sim, dtype, change=lambda ptx: ptx):
    pointer = "*" + NAMES[dtype]
    k = compile_kernel(
        kernels.attention,
        {"q": pointer, "k": pointer, "v": pointer, "out": "*fp32", "S": "i32", "scale": "fp32"},
        {"BM": 64, "BN": 64, "D": 64},
    )
    k = replace(k, ptx=change(k.ptx))
    S, D = 150, 64
    q, kk, v = (randn(S, D, dtype=dtype) for _ in range(3))
    out = torch.full((S, D), float("nan"))
    k.launch(sim, raw(q), raw(kk), raw(v), raw(out), S, 0.125, grid=3)
    want = torch.softmax(q.double() @ kk.double().T * 0.125, 1) @ v.double()
    assert (out.double() - want).abs().max() < 0.01


@pytest.mark.parametrize("timing", ["early", "late"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention(sim, dtype, timing):
    sim.option(timing=timing)
    attention(sim, dtype)


@pytest.mark.parametrize("timing", ["early", "late"])
def test_attention_without_its_proxy_fences(sim, timing):
    """What Triton before 3.7.1 emitted: wgmma reads what cp.async brought without fence.proxy.async."""

    def without(ptx: str) -> str:
        head, wait, tail = ptx.partition("cp.async.wait_group")
        assert "fence.proxy.async" in tail
        return head + wait + re.sub(r"fence\.proxy\.async\S*;", "", tail)

    sim.option(timing=timing)
    with pytest.raises(SimError, match=r"race on shared memory.*cp\.async.*no proxy fence \(fence\.proxy\.async\)"):
        attention(sim, torch.bfloat16, without)
