"""fp8_masked_gemm against the float64 products of the quantised operands, expert by expert."""

from __future__ import annotations

import exact
import pytest
import torch
from checks import compiles, opcheck, roundoff, same_bits

import dsv3_kernels as dk

OP = "fp8_masked_gemm"
E4M3 = torch.float8_e4m3fn


def slabs(device, counts, most, k):
    """Operand A; rows past the counts are NaN, codes and scales."""
    q, scale = exact.rows(device, len(counts), most, k)
    for group, count in enumerate(counts):
        exact.poison(q[group, count:], scale[group, count:])
    return q, scale


def ints(counts, device="cpu"):
    return torch.tensor(counts, dtype=torch.int32, device=device)


@pytest.mark.parametrize("counts", [(64, 0, 1, 63), (0, 0), (5,), (17, 64)])
@pytest.mark.parametrize("nk", [(136, 160), (256, 128), (8, 576)])
@pytest.mark.parametrize(("recipe", "out_dtype"), [("128x128", torch.bfloat16), ("1x128", torch.float32)])
def test_product(backend, device, counts, nk, recipe, out_dtype):
    a = slabs(device, counts, 64, nk[1])
    b = (exact.rows if recipe == "1x128" else exact.blocks)(device, len(counts), *nk)
    out = torch.full((len(counts), 64, nk[0]), -7.0, dtype=out_dtype, device=device)
    assert dk.fp8_masked_gemm(*a, *b, ints(counts, device), out=out) is out
    a_real, b_real = exact.values(*a), exact.values(*b)
    for group, count in enumerate(counts):
        exact.product(out[group, :count], a_real[group, :count], b_real[group], backend)
        assert (out[group, count:] == -7.0).all()


def test_a_fresh_output_is_bfloat16_and_zero_past_the_counts(backend, device):
    a, b, counts = slabs(device, (3, 0), 8, 256), exact.blocks(device, 2, 136, 256), ints((3, 0), device)
    got = dk.fp8_masked_gemm(*a, *b, counts)
    assert got.dtype is torch.bfloat16 and not got[0, 3:].any() and not got[1].any()
    out = torch.empty_like(got, dtype=torch.float32)
    wide = dk.fp8_masked_gemm(*a, *b, counts, out=out)[0, :3]
    assert ((got[0, :3].float() - wide).abs() <= roundoff(torch.bfloat16) * wide.abs()).all()


def test_an_output_with_strides(backend, device):
    a, b, counts = slabs(device, (3, 9), 9, 256), exact.blocks(device, 2, 136, 256), ints((3, 9), device)
    store = torch.full((4, 11, 152), -7.0, device=device)
    dk.fp8_masked_gemm(*a, *b, counts, out=store[1:3, 1:10, 8:144])
    wanted = dk.fp8_masked_gemm(*a, *b, counts, out=torch.full((2, 9, 136), -7.0, device=device))
    assert same_bits(store[1:3, 1:10, 8:144], wanted)
    store[1:3, 1:10, 8:144] = -7.0
    assert (store == -7.0).all()


def test_an_expert_is_one_gemm(backend, device):
    a, b, counts = slabs(device, (20, 7), 32, 384), exact.blocks(device, 2, 264, 384), ints((20, 7), device)
    got = dk.fp8_masked_gemm(*a, *b, counts)
    if backend == "eager":
        assert same_bits(got[1, :7], dk.fp8_gemm(a[0][1, :7], a[1][1, :7], b[0][1], b[1][1]))


def test_hints_and_strides_of_scales_change_no_bits(backend, device):
    a, b, counts = slabs(device, (20, 7), 32, 384), exact.blocks(device, 2, 264, 384), ints((20, 7), device)
    wanted = dk.fp8_masked_gemm(*a, *b, counts)
    a_scale, b_scale = a[1].contiguous(), b[1].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    got = dk.fp8_masked_gemm(a[0], a_scale, b[0], b_scale, counts, expected_m=12, num_sms=8)
    assert same_bits(got, wanted) and same_bits(dk.fp8_masked_gemm(*a, *b, counts), wanted)


@pytest.mark.parametrize(("groups", "most", "n", "k"), [(0, 4, 16, 32), (2, 0, 16, 32), (2, 4, 0, 32), (2, 4, 16, 0)])
def test_empty(device, groups, most, n, k):
    a, b = exact.rows(device, groups, most, k), exact.blocks(device, groups, n, k)
    got = dk.fp8_masked_gemm(*a, *b, ints([most] * groups, device))
    assert got.shape == (groups, most, n) and not got.any()


def test_op_contract(device):
    a, b = exact.rows(device, 2, 9, 160), exact.blocks(device, 2, 136, 160)
    out = torch.zeros(2, 9, 136, device=device)
    opcheck(torch.ops.dsv3_kernels.fp8_masked_gemm.default, (*a, *b, ints((3, 4), device), 4, None, out))


def test_compiles():
    a, b, counts = exact.rows("cpu", 2, 9, 160), exact.blocks("cpu", 2, 136, 160), ints((3, 4))
    compiles(lambda scale: dk.fp8_masked_gemm(a[0], scale * 2, *b, counts), a[1])
    compiles(lambda out: dk.fp8_masked_gemm(*a, *b, counts, out=out * 2), torch.randn(2, 9, 136))


A, AS = torch.zeros(3, 4, 256).to(E4M3), torch.zeros(3, 4, 2)
B, BS = torch.zeros(3, 136, 256).to(E4M3), torch.zeros(3, 2, 2)
COUNTS, OUT = torch.zeros(3, dtype=torch.int32), torch.zeros(3, 4, 136)


@pytest.mark.parametrize(
    ("error", "words", "kwargs"),
    [
        (TypeError, "a: got dtype bfloat16", {"a": A.bfloat16()}),
        (TypeError, "counts: got dtype int64, wanted int32", {"counts": COUNTS.long()}),
        (ValueError, r"counts: got shape \[2\], wanted \[3\]", {"counts": COUNTS[1:]}),
        (ValueError, "counts: got strides", {"counts": torch.zeros(6, dtype=torch.int32)[::2]}),
        (ValueError, r"a: got shape \[4, 256\], wanted \[G, Tmax, K\]", {"a": A[0]}),
        (ValueError, r"b: got shape \[2, 136, 256\], wanted \[3, N, 256\]", {"b": B[1:]}),
        (ValueError, "b: got 132, wanted a multiple of 8 rows", {"b": B[:, :132]}),
        (ValueError, "a: got a row stride of 264 bytes", {"a": torch.zeros(3, 4, 264).to(E4M3)[..., :256]}),
        (ValueError, "b: got a row stride of 264 bytes", {"b": torch.zeros(3, 136, 264).to(E4M3)[..., :256]}),
        (ValueError, r"a_scale: got shape \[4, 2\], wanted \[3, 4, 2\]", {"a_scale": AS[0]}),
        (ValueError, r"b_scale: got shape \[2, 2\]", {"b_scale": BS[0]}),
        (TypeError, "out: got dtype float16", {"out": OUT.half()}),
        (ValueError, r"out: got shape \[3, 4, 128\], wanted \[3, 4, 136\]", {"out": OUT[..., :128]}),
        (ValueError, "out: got stride 4 in the last", {"out": torch.zeros(3, 136, 4).mT}),
        (ValueError, "out: shares memory with b", {"out": B.view(torch.float32).view(-1)[: 12 * 136].view(3, 4, 136)}),
        (RuntimeError, "counts: got device meta", {"counts": COUNTS.to("meta")}),
        (RuntimeError, "out: got device meta", {"out": OUT.to("meta")}),
    ],
)
def test_rejects(error, words, kwargs):
    arguments = {"a": A, "a_scale": AS, "b": B, "b_scale": BS, "counts": COUNTS} | kwargs
    with pytest.raises(error, match=f"^fp8_masked_gemm: {words}"):
        dk.fp8_masked_gemm(**arguments)
