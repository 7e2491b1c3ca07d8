"""fp8_gemm (and fp8_gemm_accumulate) against the float64 product of the quantised operands."""

from __future__ import annotations

import exact
import pytest
import torch
from checks import compiles, opcheck, same_bits

import dsv3_kernels as dk

OP = "fp8_gemm"
E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    "mnk", [(128, 128, 128), (1, 256, 512), (65, 200, 160), (7, 8, 576), (130, 264, 100), (3, 24, 1)]
)
@pytest.mark.parametrize(("recipe", "out_dtype"), [("128x128", torch.bfloat16), ("1x128", torch.float32)])
def test_product(backend, device, mnk, recipe, out_dtype):
    m, n, k = mnk
    a, b = exact.rows(device, m, k), (exact.rows if recipe == "1x128" else exact.blocks)(device, n, k)
    got = dk.fp8_gemm(*a, *b, out_dtype=out_dtype)
    assert got.dtype is out_dtype and got.is_contiguous()
    exact.product(got, exact.values(*a), exact.values(*b), backend)


def test_deep(backend, device):
    """K of the released model's widest layer."""
    a, b = exact.rows(device, 5, 7168), exact.blocks(device, 264, 7168)
    exact.product(dk.fp8_gemm(*a, *b, out_dtype=torch.float32), exact.values(*a), exact.values(*b), backend)


def test_default_output_is_bfloat16(device):
    assert dk.fp8_gemm(*exact.rows(device, 2, 16), *exact.rows(device, 8, 16)).dtype is torch.bfloat16


@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("accumulate", [False, True])
def test_bias_and_accumulate(backend, device, bias_dtype, out_dtype, accumulate):
    """Both are added in float32, before the one rounding; what surrounds the output stays."""
    a, b = exact.rows(device, 70, 300), exact.blocks(device, 136, 300)
    bias = (100 * torch.randn(136)).to(bias_dtype)
    store = torch.full((72, 160), torch.nan, dtype=out_dtype, device=device)
    out = store[1:71, 8:144]
    before = (100 * torch.randn(70, 136)).to(out_dtype)
    if accumulate:
        out.copy_(before)
    assert dk.fp8_gemm(*a, *b, bias=bias.to(device), out=out, accumulate=accumulate) is out
    plus = (bias, before) if accumulate else (bias,)
    exact.product(out, exact.values(*a), exact.values(*b), backend, *plus)
    store[1:71, 8:144] = torch.nan
    assert store.isnan().all()


def test_accumulate_twice(backend, device):
    a, b = exact.rows(device, 9, 256), exact.blocks(device, 128, 256)
    out = dk.fp8_gemm(*a, *b, out_dtype=torch.float32)
    once = out.clone()
    dk.fp8_gemm(*a, *b, out=out, accumulate=True)
    assert same_bits(out, once * 2)


@pytest.mark.parametrize("recipe", ["128x128", "1x128"])
def test_scales_in_any_strides(backend, device, recipe):
    a, b = exact.rows(device, 70, 384), (exact.rows if recipe == "1x128" else exact.blocks)(device, 264, 384)
    wanted = dk.fp8_gemm(*a, *b)
    for stored in ("row-major", "column-major", "spaced", "expanded"):
        scales = [arranged(s, stored) for s in (a[1], b[1])]
        if stored == "expanded":
            wanted = dk.fp8_gemm(a[0], scales[0].contiguous(), b[0], scales[1].contiguous())
        assert same_bits(dk.fp8_gemm(a[0], scales[0], b[0], scales[1]), wanted), stored


def arranged(scale: torch.Tensor, stored: str) -> torch.Tensor:
    if stored == "row-major":
        return scale.contiguous()
    if stored == "column-major":
        return scale.t().contiguous().t()
    if stored == "expanded":
        return scale[:, :1].contiguous().expand(scale.shape)
    store = torch.full((2 * scale.shape[0], 3 * scale.shape[1]), torch.nan, device=scale.device)
    store[::2, 1::3] = scale
    return store[::2, 1::3]


def test_a_poisoned_row_is_visible_and_alone(backend, device):
    a, b = exact.rows(device, 9, 256), exact.blocks(device, 264, 256)
    clean = dk.fp8_gemm(*a, *b)
    a[0].view(torch.uint8)[4, 200] = 0x7F
    a[1][6, 1] = torch.inf
    b[1][1, 0] = torch.nan
    got = dk.fp8_gemm(*a, *b)
    bad = torch.zeros(9, 264, dtype=torch.bool, device=device)
    bad[[4, 6]], bad[:, 128:256] = True, True
    assert not got[bad].isfinite().any() and same_bits(got[~bad], clean[~bad])


@pytest.mark.parametrize("k", [160, 512])
def test_fixed_policy_is_independent_of_the_batch(backend, device, k):
    a, b = exact.rows(device, 150, k), exact.blocks(device, 264, k)
    whole = dk.fp8_gemm(*a, *b, policy="fixed", out_dtype=torch.float32)
    for part in (slice(0, 1), slice(17, 18), slice(3, 70), slice(100, 150)):
        got = dk.fp8_gemm(a[0][part], a[1][part], *b, policy="fixed", out_dtype=torch.float32)
        assert same_bits(got, whole[part])


def test_num_sms_changes_no_bits(backend, device):
    a, b = exact.rows(device, 150, 256), exact.blocks(device, 264, 256)
    assert same_bits(dk.fp8_gemm(*a, *b, num_sms=4), dk.fp8_gemm(*a, *b))


def test_twice_the_same_bits(backend, device):
    a, b = exact.rows(device, 65, 576), exact.blocks(device, 264, 576)
    assert same_bits(dk.fp8_gemm(*a, *b), dk.fp8_gemm(*a, *b))


@pytest.mark.parametrize("mnk", [(0, 128, 128), (3, 0, 128), (5, 16, 0), (0, 0, 0)])
def test_empty(device, mnk):
    m, n, k = mnk
    a, b = exact.rows(device, m, k), exact.blocks(device, n, k)
    bias = torch.randn(n, device=device)
    got = dk.fp8_gemm(*a, *b, bias=bias, out_dtype=torch.float32)
    assert got.shape == (m, n) and same_bits(got, bias.expand(m, n))
    assert same_bits(dk.fp8_gemm(*a, *b, out=got.clone(), accumulate=True), got)


def test_op_contract(device):
    a, b = exact.rows(device, 5, 160), exact.blocks(device, 136, 160)
    bias = torch.randn(136, device=device)
    opcheck(torch.ops.dsv3_kernels.fp8_gemm.default, (*a, *b, None, torch.bfloat16, "auto", None))
    opcheck(torch.ops.dsv3_kernels.fp8_gemm.default, (*a, *b, bias, torch.float32, "fixed", 8))
    out = torch.zeros(5, 136, device=device)
    opcheck(torch.ops.dsv3_kernels.fp8_gemm_out.default, (*a, *b, bias, torch.float32, "auto", None, out))
    opcheck(torch.ops.dsv3_kernels.fp8_gemm_accumulate.default, (*a, *b, bias, "auto", None, out))


def test_compiles():
    a, b = exact.rows("cpu", 5, 160), exact.blocks("cpu", 136, 160)
    compiles(lambda bias: dk.fp8_gemm(*a, *b, bias=bias * 2), torch.randn(136))

    def accumulates(c):
        return dk.fp8_gemm(*a, *b, out=c * 2, accumulate=True)

    compiles(accumulates, torch.randn(5, 136))


A, AS = torch.zeros(4, 256).to(E4M3), torch.zeros(4, 2)
B, BS = torch.zeros(136, 256).to(E4M3), torch.zeros(2, 2)
OUT = torch.zeros(4, 136)


@pytest.mark.parametrize(
    ("error", "words", "kwargs"),
    [
        (TypeError, "a: got dtype float32, wanted float8_e4m3fn", {"a": A.float()}),
        (TypeError, "b: got dtype uint8, wanted float8_e4m3fn", {"b": B.view(torch.uint8)}),
        (TypeError, "a_scale: got dtype bfloat16, wanted float32", {"a_scale": AS.bfloat16()}),
        (TypeError, "b_scale: got NoneType, wanted a Tensor", {"b_scale": None}),
        (ValueError, r"a: got shape \[1, 4, 256\], wanted \[M, K\]", {"a": A[None]}),
        (ValueError, r"b: got shape \[136, 128\], wanted \[N, 256\]", {"b": B[:, :128]}),
        (ValueError, "a: got stride 4 in the last dimension", {"a": torch.zeros(256, 4).to(E4M3).t()}),
        (
            ValueError,
            "a: got a row stride of 260 bytes, wanted a multiple of 16",
            {"a": torch.zeros(4, 260).to(E4M3)[:, :256]},
        ),
        (ValueError, "b: got a row stride of 264 bytes", {"b": torch.zeros(136, 264).to(E4M3)[:, :256]}),
        (ValueError, "b: got 132, wanted a multiple of 8 rows", {"b": B[:132]}),
        (ValueError, r"a_scale: got shape \[4, 1\], wanted \[4, 2\]", {"a_scale": AS[:, :1]}),
        (
            ValueError,
            r"b_scale: got shape \[1, 2\], wanted \[2, 2\] \(128x128\) or \[136, 2\] \(1x128\)",
            {"b_scale": BS[:1]},
        ),
        (TypeError, "bias: got dtype float16", {"bias": OUT[0].half()}),
        (ValueError, r"bias: got shape \[4, 136\]", {"bias": OUT}),
        (ValueError, "bias: got strides", {"bias": torch.zeros(136, 2)[:, 0]}),
        (ValueError, "policy: got 'best', wanted 'auto' or 'fixed'", {"policy": "best"}),
        (ValueError, "accumulate: got True, wanted an out to add to", {"accumulate": True}),
        (TypeError, "out_dtype: got float16", {"out_dtype": torch.float16}),
        (TypeError, "out: got dtype float16", {"out": OUT.half()}),
        (ValueError, r"out: got shape \[136\], wanted \[4, 136\]", {"out": OUT[0]}),
        (ValueError, "out: got stride 4 in the last", {"out": torch.zeros(136, 4).t()}),
        (ValueError, "out: shares memory with b", {"out": B.view(torch.float32).view(-1)[: 4 * 136].view(4, 136)}),
        (RuntimeError, "a_scale: got device meta", {"a_scale": AS.to("meta")}),
        (RuntimeError, "out: got device meta", {"out": OUT.to("meta")}),
    ],
)
def test_rejects(error, words, kwargs):
    with pytest.raises(error, match=f"^fp8_gemm: {words}"):
        dk.fp8_gemm(**({"a": A, "a_scale": AS, "b": B, "b_scale": BS} | kwargs))
