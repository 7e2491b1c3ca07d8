"""fp8_grouped_gemm against the float64 products of the quantised operands, group by group."""

from __future__ import annotations

import exact
import pytest
import torch
from checks import compiles, opcheck, same_bits

import dsv3_kernels as dk

OP = "fp8_grouped_gemm"
E4M3 = torch.float8_e4m3fn
COUNTS = [(128, 64), (0, 1, 0, 130, 7, 0), (0, 0), (5,)]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("nk", [(136, 160), (256, 128), (8, 576)])
@pytest.mark.parametrize(("recipe", "out_dtype"), [("128x128", torch.bfloat16), ("1x128", torch.float32)])
def test_product(backend, device, counts, nk, recipe, out_dtype):
    used, groups = sum(counts), len(counts)
    a = exact.rows(device, used + 20, nk[1])
    b = (exact.rows if recipe == "1x128" else exact.blocks)(device, groups, *nk)
    exact.poison(a[0][used:], a[1][used:])
    got = dk.fp8_grouped_gemm(*a, *b, exact.offsets(counts, device), out_dtype=out_dtype)
    assert got.dtype is out_dtype and got.is_contiguous() and not got[used:].any()
    a_real, b_real, start = exact.values(*a), exact.values(*b), 0
    for group, count in enumerate(counts):
        part = slice(start, start + count)
        exact.product(got[part], a_real[part], b_real[group], backend)
        start += count


def test_a_given_output_keeps_the_rows_that_no_group_owns(backend, device):
    a, b = exact.rows(device, 40, 256), exact.blocks(device, 3, 136, 256)
    bounds = exact.offsets((10, 0, 13), device)
    exact.poison(a[0][23:], a[1][23:])
    store = torch.full((42, 152), -7.0, device=device)
    out = store[1:41, 8:144]
    out[:23] = torch.nan
    assert dk.fp8_grouped_gemm(*a, *b, bounds, out=out) is out
    assert same_bits(out[:23], dk.fp8_grouped_gemm(*a, *b, bounds, out_dtype=torch.float32)[:23])
    store[1:24, 8:144] = -7.0
    assert (store == -7.0).all()


def test_a_group_is_one_gemm(backend, device):
    """The fixed policy of fp8_gemm and the grouped op agree to rounding; on eager, to the bit."""
    a, b = exact.rows(device, 60, 384), exact.blocks(device, 2, 264, 384)
    got = dk.fp8_grouped_gemm(*a, *b, exact.offsets((23, 37), device))
    if backend == "eager":
        assert same_bits(got[:23], dk.fp8_gemm(a[0][:23], a[1][:23], b[0][0], b[1][0]))
        assert same_bits(got[23:], dk.fp8_gemm(a[0][23:], a[1][23:], b[0][1], b[1][1]))


def test_poison_stays_in_its_group(backend, device):
    a, b = exact.rows(device, 60, 256), exact.blocks(device, 3, 136, 256)
    bounds = exact.offsets((20, 20, 20), device)
    clean = dk.fp8_grouped_gemm(*a, *b, bounds)
    b[1][1] = torch.nan
    got = dk.fp8_grouped_gemm(*a, *b, bounds)
    assert got[20:40].isnan().all()
    got[20:40] = clean[20:40]
    assert same_bits(got, clean)


def test_scales_in_any_strides_and_num_sms(backend, device):
    a, b = exact.rows(device, 60, 384), exact.blocks(device, 2, 264, 384)
    bounds = exact.offsets((23, 37), device)
    wanted = dk.fp8_grouped_gemm(*a, *b, bounds)
    a_scale, b_scale = a[1].contiguous(), b[1].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert same_bits(dk.fp8_grouped_gemm(a[0], a_scale, b[0], b_scale, bounds, num_sms=8), wanted)


def test_twice_the_same_bits(backend, device):
    a, b = exact.rows(device, 60, 576), exact.blocks(device, 2, 264, 576)
    bounds = exact.offsets((23, 37), device)
    assert same_bits(dk.fp8_grouped_gemm(*a, *b, bounds), dk.fp8_grouped_gemm(*a, *b, bounds))


@pytest.mark.parametrize(("rows", "groups", "n", "k"), [(0, 3, 16, 32), (4, 0, 16, 32), (4, 2, 0, 32), (4, 2, 16, 0)])
def test_empty(device, rows, groups, n, k):
    a, b = exact.rows(device, rows, k), exact.blocks(device, groups, n, k)
    bounds = torch.tensor([0] + [rows] * groups, dtype=torch.int32, device=device)
    got = dk.fp8_grouped_gemm(*a, *b, bounds)
    assert got.shape == (rows, n) and not got.any()


def test_op_contract(device):
    a, b = exact.rows(device, 9, 160), exact.blocks(device, 2, 136, 160)
    out = torch.zeros(9, 136, device=device)
    opcheck(torch.ops.dsv3_kernels.fp8_grouped_gemm.default, (*a, *b, exact.offsets((3, 4), device), None, out))


def test_compiles():
    a, b = exact.rows("cpu", 9, 160), exact.blocks("cpu", 2, 136, 160)
    bounds = exact.offsets((3, 4), "cpu")
    compiles(lambda scale: dk.fp8_grouped_gemm(a[0], scale * 2, *b, bounds), a[1])
    compiles(lambda out: dk.fp8_grouped_gemm(*a, *b, bounds, out=out * 2), torch.randn(9, 136))


A, AS = torch.zeros(4, 256).to(E4M3), torch.zeros(4, 2)
B, BS = torch.zeros(3, 136, 256).to(E4M3), torch.zeros(3, 2, 2)
BOUNDS, OUT = torch.zeros(4, dtype=torch.int32), torch.zeros(4, 136)


@pytest.mark.parametrize(
    ("error", "words", "kwargs"),
    [
        (TypeError, "a: got dtype bfloat16", {"a": A.bfloat16()}),
        (TypeError, "offsets: got list, wanted a Tensor", {"offsets": [0, 1, 2, 3]}),
        (TypeError, "offsets: got dtype int64, wanted int32", {"offsets": BOUNDS.long()}),
        (ValueError, r"offsets: got shape \[3\], wanted \[4\]", {"offsets": BOUNDS[1:]}),
        (ValueError, "offsets: got strides", {"offsets": torch.zeros(8, dtype=torch.int32)[::2]}),
        (ValueError, r"b: got shape \[136, 256\], wanted \[G, N, 256\]", {"b": B[0]}),
        (ValueError, "b: got 132, wanted a multiple of 8 rows", {"b": B[:, :132]}),
        (ValueError, "a: got a row stride of 264 bytes", {"a": torch.zeros(4, 264).to(E4M3)[:, :256]}),
        (ValueError, "b: got a row stride of 264 bytes", {"b": torch.zeros(3, 136, 264).to(E4M3)[..., :256]}),
        (ValueError, r"a_scale: got shape \[4\], wanted \[4, 2\]", {"a_scale": AS[:, 0]}),
        (
            ValueError,
            r"b_scale: got shape \[2, 2\], wanted \[3, 2, 2\] \(128x128\) or \[3, 136, 2\]",
            {"b_scale": BS[0]},
        ),
        (TypeError, "out_dtype: got int8", {"out_dtype": torch.int8}),
        (TypeError, "out: got dtype float64", {"out": OUT.double()}),
        (ValueError, r"out: got shape \[4, 128\], wanted \[4, 136\]", {"out": OUT[:, :128]}),
        (ValueError, "out: got stride 4 in the last", {"out": torch.zeros(136, 4).t()}),
        (ValueError, "out: shares memory with b", {"out": B.view(torch.float32).view(-1)[: 4 * 136].view(4, 136)}),
        (RuntimeError, "offsets: got device meta", {"offsets": BOUNDS.to("meta")}),
        (RuntimeError, "out: got device meta", {"out": OUT.to("meta")}),
    ],
)
def test_rejects(error, words, kwargs):
    arguments = {"a": A, "a_scale": AS, "b": B, "b_scale": BS, "offsets": BOUNDS} | kwargs
    with pytest.raises(error, match=f"^fp8_grouped_gemm: {words}"):
        dk.fp8_grouped_gemm(**arguments)
