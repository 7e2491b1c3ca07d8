"""fp8_grouped_wgrad (and fp8_grouped_wgrad_accumulate) against float64 products over each group's tokens."""

from __future__ import annotations

import exact
import pytest
import torch
from checks import compiles, opcheck, same_bits

import dsv3_kernels as dk

OP = "fp8_grouped_wgrad"
E4M3 = torch.float8_e4m3fn


def gradient_operands(device, counts, m, n):
    """Both operands as a backward pass makes them, NaN past the last group; the offsets; the exact gradients."""
    tokens = sum(counts)
    bounds = exact.offsets(counts, device)
    operands, reals = [], []
    for columns in (m, n):
        x = exact.uneven(tokens, columns).to(device)
        with dk.backend("eager"):  # the op under test is another one
            q_t, scale_t, bounds_t = dk.quantize_1x128_both(x, offsets=bounds)[2:]
        used = int(bounds_t[-1])
        exact.poison(q_t[:, used:], scale_t[:, used // 128 :])
        operands += [q_t, scale_t]
        reals.append(exact.values(q_t, scale_t))
    return operands, bounds_t, reals


def check(got, bounds, reals, backend):
    for group, (start, end) in enumerate(zip(bounds.tolist(), bounds[1:].tolist(), strict=False)):
        exact.product(got[group], reals[0][:, start:end], reals[1][:, start:end], backend)


@pytest.mark.parametrize("counts", [(128, 256), (0, 1, 0, 130, 7, 0), (5,), (0, 0)])
@pytest.mark.parametrize("mn", [(136, 160), (1, 8), (300, 128)])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_gradients(backend, device, counts, mn, out_dtype):
    operands, bounds, reals = gradient_operands(device, counts, *mn)
    got = dk.fp8_grouped_wgrad(*operands, bounds, out_dtype=out_dtype)
    assert got.dtype is out_dtype and got.is_contiguous() and got.shape == (len(counts), *mn)
    check(got, bounds, reals, backend)
    for group, count in enumerate(counts):
        assert count or not got[group].any()


def test_default_output_is_float32(device):
    operands, bounds, _ = gradient_operands(device, (3,), 8, 8)
    assert dk.fp8_grouped_wgrad(*operands, bounds).dtype is torch.float32


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_accumulate(backend, device, out_dtype):
    """Added in float32; an empty group's slab is not touched, not even NaN in it; nor is what lies around."""
    counts = (130, 0, 7)
    operands, bounds, reals = gradient_operands(device, counts, 70, 136)
    store = torch.full((5, 72, 152), torch.nan, dtype=out_dtype, device=device)
    out = store[1:4, 1:71, 8:144]
    before = (100 * torch.randn(3, 70, 136)).to(out_dtype)
    before[1] = torch.nan
    out.copy_(before)
    assert dk.fp8_grouped_wgrad(*operands, bounds, out=out, accumulate=True) is out
    assert out[1].isnan().all()
    for group, tokens in ((0, slice(0, 256)), (2, slice(256, 384))):
        exact.product(out[group], reals[0][:, tokens], reals[1][:, tokens], backend, before[group])
    out.fill_(torch.nan)
    assert store.isnan().all()


def test_a_given_output_is_overwritten(backend, device):
    operands, bounds, _ = gradient_operands(device, (130, 0, 7), 70, 136)
    store = torch.full((5, 72, 152), torch.nan, device=device)
    out = store[1:4, 1:71, 8:144]
    assert dk.fp8_grouped_wgrad(*operands, bounds, out=out) is out
    assert same_bits(out, dk.fp8_grouped_wgrad(*operands, bounds))
    out.fill_(torch.nan)
    assert store.isnan().all()


def test_poison_stays_in_its_group(backend, device):
    operands, bounds, _ = gradient_operands(device, (100, 128, 50), 70, 136)
    clean = dk.fp8_grouped_wgrad(*operands, bounds)
    operands[1][3, 1] = torch.nan
    got = dk.fp8_grouped_wgrad(*operands, bounds)
    assert got[1, 3].isnan().all()
    got[1, 3] = clean[1, 3]
    assert same_bits(got, clean)


def test_scales_in_any_strides_and_num_sms(backend, device):
    (a_t, a_scale, b_t, b_scale), bounds, _ = gradient_operands(device, (100, 200), 70, 136)
    wanted = dk.fp8_grouped_wgrad(a_t, a_scale, b_t, b_scale, bounds)
    got = dk.fp8_grouped_wgrad(a_t, a_scale.contiguous(), b_t, b_scale.contiguous(), bounds, num_sms=8)
    assert same_bits(got, wanted)


@pytest.mark.parametrize("mns", [(0, 8, 128), (8, 0, 128), (8, 8, 0)])
@pytest.mark.parametrize("groups", [0, 2])
def test_empty(device, mns, groups):
    m, n, s = mns
    a, b = exact.rows(device, m, s), exact.rows(device, n, s)
    got = dk.fp8_grouped_wgrad(*a, *b, torch.zeros(groups + 1, dtype=torch.int32, device=device))
    assert got.shape == (groups, m, n) and not got.any()


def test_op_contract(device):
    operands, bounds, _ = gradient_operands(device, (3, 130), 20, 40)
    out = torch.zeros(2, 20, 40, device=device)
    for array in operands[:2]:
        array[:, 384 // (1 if array.dtype is E4M3 else 128) :] = 0
    opcheck(torch.ops.dsv3_kernels.fp8_grouped_wgrad.default, (*operands, bounds, torch.bfloat16, None))
    opcheck(torch.ops.dsv3_kernels.fp8_grouped_wgrad_out.default, (*operands, bounds, torch.float32, None, out))
    opcheck(torch.ops.dsv3_kernels.fp8_grouped_wgrad_accumulate.default, (*operands, bounds, None, out))


def test_compiles():
    (a_t, a_scale, b_t, b_scale), bounds, _ = gradient_operands("cpu", (3, 130), 20, 40)
    compiles(lambda scale: dk.fp8_grouped_wgrad(a_t, scale * 2, b_t, b_scale, bounds), a_scale)

    def accumulates(out):
        return dk.fp8_grouped_wgrad(a_t, a_scale, b_t, b_scale, bounds, out=out * 2, accumulate=True)

    compiles(accumulates, torch.randn(2, 20, 40))


A, AS, B, BS = torch.zeros(20, 256).to(E4M3), torch.zeros(20, 2), torch.zeros(40, 256).to(E4M3), torch.zeros(40, 2)
BOUNDS, OUT = torch.zeros(4, dtype=torch.int32), torch.zeros(3, 20, 40)
OFF = torch.tensor([0, 100, 228, 228], dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "words", "kwargs"),
    [
        (TypeError, "a_t: got dtype float32", {"a_t": A.float()}),
        (TypeError, "b_scale: got dtype float64", {"b_scale": BS.double()}),
        (TypeError, "offsets: got dtype int64, wanted int32", {"offsets": BOUNDS.long()}),
        (ValueError, r"offsets: got shape \[1, 4\]", {"offsets": BOUNDS[None]}),
        (ValueError, "offsets: got 0, wanted at least one element", {"offsets": BOUNDS[:0]}),
        (ValueError, "offsets: got strides", {"offsets": torch.zeros(8, dtype=torch.int32)[::2]}),
        (ValueError, r"offsets: got \[0, 100, 228, 228\], wanted multiples of 128", {"offsets": OFF}),
        (ValueError, r"b_t: got shape \[40, 128\], wanted \[N, 256\]", {"b_t": B[:, :128]}),
        (ValueError, "b_t: got 36, wanted a multiple of 8 rows", {"b_t": B[:36]}),
        (ValueError, "a_t: got stride 20 in the last", {"a_t": torch.zeros(256, 20).to(E4M3).t()}),
        (ValueError, "a_t: got a row stride of 264 bytes", {"a_t": torch.zeros(20, 264).to(E4M3)[:, :256]}),
        (ValueError, r"a_scale: got shape \[20, 1\], wanted \[20, 2\]", {"a_scale": AS[:, :1]}),
        (ValueError, r"b_scale: got shape \[1, 2\], wanted \[40, 2\]", {"b_scale": BS[:1]}),
        (ValueError, "accumulate: got True, wanted an out to add to", {"accumulate": True}),
        (TypeError, "out_dtype: got float16", {"out_dtype": torch.float16}),
        (TypeError, "out: got dtype float64", {"out": OUT.double()}),
        (ValueError, r"out: got shape \[2, 20, 40\], wanted \[3, 20, 40\]", {"out": OUT[1:]}),
        (ValueError, "out: got stride 20 in the last", {"out": torch.zeros(3, 40, 20).mT}),
        (ValueError, "out: shares memory with b_t", {"out": B.view(torch.float32).view(-1)[:2400].view(3, 20, 40)}),
        (RuntimeError, "offsets: got device meta", {"offsets": BOUNDS.to("meta")}),
        (RuntimeError, "out: got device meta", {"out": OUT.to("meta")}),
    ],
)
def test_rejects(error, words, kwargs):
    with pytest.raises(error, match=f"^fp8_grouped_wgrad: {words}"):
        dk.fp8_grouped_wgrad(**({"a_t": A, "a_scale": AS, "b_t": B, "b_scale": BS, "offsets": BOUNDS} | kwargs))
