"""quantize_1x128 against its definition in float64, bit for bit."""

from __future__ import annotations

import pytest
import torch
from checks import compiles, opcheck, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv3_kernels as dk

OP = "quantize_1x128"
E4M3 = torch.float8_e4m3fn


def definition(x: torch.Tensor, pow2_scale: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Block by block; each division is rounded once from float64 to float32 (that is IEEE division)."""
    rows = x.reshape(-1, x.shape[-1]).double()
    q = torch.empty(rows.shape, dtype=E4M3)
    scale = torch.empty(rows.shape[0], -(-rows.shape[1] // 128), dtype=torch.float32)
    for block, start in enumerate(range(0, rows.shape[1], 128)):
        tile = rows[:, start : start + 128]
        amax = tile.abs().amax(1)
        s = (amax.clamp(min=float(torch.tensor(1e-4))) / 448).float()
        if pow2_scale:
            s = torch.exp2(s.double().log2().ceil()).float()
        s[~amax.isfinite()] = torch.nan
        ratio = (tile / s.double()[:, None]).float()
        ratio[~amax.isfinite()] = torch.nan
        q[:, start : start + 128] = ratio.to(E4M3)
        scale[:, block] = s
    return q.view(x.shape), scale.view(*x.shape[:-1], -1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 128), (3, 7168), (5, 300), (2, 3, 130), (1, 1), (7, 8), (130, 136), (64,)])
@pytest.mark.parametrize("pow2_scale", [False, True])
@pytest.mark.parametrize("layout", ["mn", "k"])
def test_bits(backend, device, dtype, shape, pow2_scale, layout):
    x = (torch.randn(shape) * torch.exp(3 * torch.randn(*shape[:-1], 1))).to(dtype)
    got = dk.quantize_1x128(x.to(device), pow2_scale=pow2_scale, scale_layout=layout)
    wanted = definition(x, pow2_scale)
    assert same_bits([t.cpu().contiguous() for t in got], [t.contiguous() for t in wanted])
    rows = x[..., 0].numel()
    if layout == "mn" and len(shape) > 1:
        assert got[1].stride()[-2:] == (1, -(-rows // 4) * 4)
    else:
        assert got[1].is_contiguous() or len(shape) == 1


def test_codes_round_as_e4m3(backend, device):
    """Ties, subnormals and the largest code, from values a hair's breadth around every code's midpoint."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(E4M3).float()
    ties = (codes[1:] + codes[:-1]) / 2
    x = torch.cat([ties, torch.nextafter(ties, torch.tensor(0.0)), torch.nextafter(ties, torch.tensor(500.0))])
    x = torch.cat([x, -x, torch.zeros(-2 * x.numel() % 127)])
    x = torch.cat([x.view(-1, 127), torch.full((x.numel() // 127, 1), 448.0)], 1)  # scale 1, exactly
    q, scale = dk.quantize_1x128(x.to(device))
    assert torch.equal(scale.cpu(), torch.ones(x.shape[0], 1))
    assert same_bits(q.cpu(), x.to(E4M3))


def test_zeros_stay_zero(backend, device):
    q, scale = dk.quantize_1x128(torch.zeros(2, 256, dtype=torch.bfloat16, device=device))
    assert not q.view(torch.uint8).any()
    assert torch.equal(scale.cpu(), torch.full((2, 2), float(torch.tensor(1e-4) / 448)))


@pytest.mark.parametrize("poison", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("pow2_scale", [False, True])
def test_a_poisoned_block_is_visible_and_alone(backend, device, poison, pow2_scale):
    x = torch.randn(3, 384)
    clean = dk.quantize_1x128(x.to(device), pow2_scale=pow2_scale)
    x[1, 200] = poison
    q, scale = dk.quantize_1x128(x.to(device), pow2_scale=pow2_scale)
    assert scale[1, 1].isnan() and (q.view(torch.uint8)[1, 128:256] == 0x7F).all()
    q[1, 128:256], scale[1, 1] = clean[0][1, 128:256], clean[1][1, 1]
    assert same_bits((q, scale), clean)


def test_rows_with_a_stride_and_nothing_else_read_or_written(backend, device):
    store = torch.full((6, 400), torch.nan, device=device)
    store[:5, :300] = torch.randn(5, 300)
    x = store[:5, :300]
    q_store = torch.full((7, 300), 0x55, dtype=torch.uint8, device=device)
    scale_store = torch.full((3, 8), -1.0, device=device)
    q, scale = q_store[1:6].view(E4M3), scale_store.t()[:5]
    assert dk.quantize_1x128(x, out=(q, scale)) == (q, scale)
    assert same_bits((q.cpu(), scale.cpu()), definition(x.cpu(), False))
    assert (q_store[[0, 6]] == 0x55).all() and (scale_store[:, 5:] == -1).all()


@pytest.mark.parametrize("shape", [(0, 256), (3, 0), (0, 0), (2, 0, 128)])
def test_empty(device, shape):
    q, scale = dk.quantize_1x128(torch.empty(shape, device=device))
    assert q.shape == shape and scale.shape == (*shape[:-1], -(-shape[-1] // 128))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.integers(1, 300), st.floats(-30, 30), st.integers(0, 2**31))
def test_error_bound(rows, columns, exponent, seed):
    """A code is within half a step of E4M3: 2^-4 of the value, or 2^-10 of the scale below the normal range."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    q, scale = dk.quantize_1x128(x)
    real = q.double() * scale.double().repeat_interleave(128, -1)[:, :columns]
    bound = torch.maximum(x.double().abs() * 2**-4, scale.double().repeat_interleave(128, -1)[:, :columns] * 2**-10)
    assert ((real - x.double()).abs() <= bound * (1 + 1e-6)).all()


def test_twice_the_same_bits(backend, device):
    x = torch.randn(33, 513, device=device)
    assert same_bits(dk.quantize_1x128(x), dk.quantize_1x128(x))


def test_op_contract(device):
    x = torch.randn(5, 300, device=device)
    for pow2_scale in (False, True):
        for layout in ("mn", "k"):
            opcheck(torch.ops.dsv3_kernels.quantize_1x128.default, (x, pow2_scale, layout))
    out = dk.quantize_1x128(x)
    opcheck(torch.ops.dsv3_kernels.quantize_1x128_out.default, (x, False, "mn", *out))


def test_compiles():
    compiles(lambda x: dk.quantize_1x128(x * 2, pow2_scale=True), torch.randn(5, 300))

    def with_out(x):
        q, scale = torch.empty(5, 300, dtype=E4M3), torch.empty(5, 3)
        return dk.quantize_1x128(x, out=(q, scale))

    compiles(with_out, torch.randn(5, 300))


X = torch.zeros(4, 256)
Q, S = torch.zeros(4, 256).to(E4M3), torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("error", "words", "args", "kwargs"),
    [
        (TypeError, "x: got list, wanted a Tensor", ([1.0],), {}),
        (TypeError, "x: got dtype int32", (X.int(),), {}),
        (ValueError, "x: got 0 dimensions", (torch.tensor(1.0),), {}),
        (ValueError, "x: got stride 4 in the last dimension", (torch.zeros(128, 4).t(),), {}),
        (ValueError, "scale_layout: got 'km'", (X,), {"scale_layout": "km"}),
        (TypeError, r"out\[0\]: got dtype float32, wanted float8_e4m3fn", (X,), {"out": (X.clone(), S)}),
        (TypeError, r"out\[1\]: got dtype bfloat16", (X,), {"out": (Q, S.bfloat16())}),
        (ValueError, r"out\[0\]: got shape \[3, 256\]", (X,), {"out": (Q[:3], S)}),
        (ValueError, r"out\[1\]: got shape \[4, 1\], wanted \[4, 2\]", (X,), {"out": (Q, S[:, :1])}),
        (ValueError, r"out\[0\]: got strides", (X,), {"out": (torch.zeros(4, 512).to(E4M3)[:, ::2], S)}),
        (ValueError, r"out\[1\]: shares memory with x", (X,), {"out": (Q, X.view(-1)[:8].view(4, 2))}),
        (RuntimeError, "scale: got device meta", (X,), {"out": (Q, S.to("meta"))}),
    ],
)
def test_rejects(error, words, args, kwargs):
    with pytest.raises(error, match=f"^quantize_1x128: {words}"):
        dk.quantize_1x128(*args, **kwargs)
