"""dequantize against the product in float64, bit for bit."""

from __future__ import annotations

import pytest
import torch
from checks import compiles, opcheck, same_bits

import dsv3_kernels as dk

OP = "dequantize"
E4M3 = torch.float8_e4m3fn


def codes(*shape: int) -> torch.Tensor:
    """Every code that is a number, in any order."""
    q = torch.randint(0, 256, shape, dtype=torch.uint8)
    return torch.where(q & 0x7F == 0x7F, 0x40, q).view(E4M3)


def definition(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, rows: int) -> torch.Tensor:
    """Element by element; a product of 4 and 24 bits is exact in float64, so `.float()` rounds it once."""
    out = torch.empty(q.shape, dtype=dtype)
    for i in range(q.shape[-2]):
        for j in range(0, q.shape[-1], 128):
            product = q[..., i, j : j + 128].double() * scale[..., i // rows, j // 128, None].double()
            out[..., i, j : j + 128] = product.float().to(dtype)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(128, 128), (300, 160), (3, 136, 576), (2, 2, 5, 7), (1, 130), (129, 1)])
@pytest.mark.parametrize("rows", [1, 128])
def test_bits(backend, device, dtype, shape, rows):
    q = codes(*shape)
    scale = torch.exp(torch.randn(*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // 128)))
    got = dk.dequantize(q.to(device), scale.to(device), dtype=dtype)
    assert same_bits(got.cpu(), definition(q, scale, dtype, rows)) and got.is_contiguous()


def test_every_code(backend, device):
    every = torch.arange(256, dtype=torch.uint8).view(2, 128)
    got = dk.dequantize(every.view(E4M3).to(device), torch.ones(2, 1, device=device), dtype=torch.float32).cpu()
    sign = 1 - 2 * (every >> 7).double()
    exponent, mantissa = (every >> 3 & 15).double(), (every & 7).double()
    wanted = torch.where(exponent == 0, mantissa * 2**-9, (8 + mantissa) * torch.exp2(exponent - 10)) * sign
    wanted[every & 0x7F == 0x7F] = torch.nan
    assert torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.nan_to_num(), wanted.nan_to_num().float())


def test_one_dimension(backend, device):
    q, scale = codes(300), torch.rand(3)
    got = dk.dequantize(q.to(device), scale.to(device), dtype=torch.float32)
    assert same_bits(got.cpu(), definition(q[None], scale[None], torch.float32, 1)[0])


def test_default_is_bfloat16(device):
    assert dk.dequantize(codes(2, 8).to(device), torch.ones(2, 1, device=device)).dtype is torch.bfloat16


@pytest.mark.parametrize("rows", [1, 128])
def test_round_trip_and_strides(backend, device, rows):
    """What the quantisers wrote comes back within half a step of E4M3, from scales and rows with strides too."""
    x = torch.randn(200, 300, device=device) * torch.exp(2 * torch.randn(200, 1, device=device))
    quantize = dk.quantize_1x128 if rows == 1 else dk.quantize_128x128
    q, scale = quantize(x)
    store = torch.full((200, 512), 0x7F, dtype=torch.uint8, device=device).view(E4M3)
    store.view(torch.uint8)[:, :300] = q.view(torch.uint8)
    got = dk.dequantize(store[:, :300], scale.t().contiguous().t(), dtype=torch.float32).double()
    step = scale.double().repeat_interleave(rows, 0)[:200].repeat_interleave(128, 1)[:, :300] * 2**-10
    assert ((got - x.double()).abs() <= torch.maximum(x.double().abs() * 2**-4, step) * (1 + 1e-6)).all()


def test_a_bad_scale_stays_in_its_block(backend, device):
    scale = torch.ones(2, 3, device=device)
    scale[1, 1] = torch.nan
    got = dk.dequantize(codes(200, 384).to(device), scale)
    assert got[128:, 128:256].isnan().all()
    got[128:, 128:256] = 0
    assert got.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 256), (3, 0), (0, 0), (2, 0, 128), (0,)])
def test_empty(device, shape):
    scale = torch.empty(*shape[:-1], -(-shape[-1] // 128), device=device)
    assert dk.dequantize(torch.empty(shape, device=device).to(E4M3), scale).shape == shape


def test_op_contract(device):
    q, scale = dk.quantize_128x128(torch.randn(130, 300, device=device))
    opcheck(torch.ops.dsv3_kernels.dequantize.default, (q, scale, torch.float16))


def test_compiles():
    q, scale = dk.quantize_1x128(torch.randn(5, 300))
    compiles(lambda scale: dk.dequantize(q, scale * 2), scale)


Q, S = torch.zeros(130, 256).to(E4M3), torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("error", "words", "args", "kwargs"),
    [
        (TypeError, "q: got int, wanted a Tensor", (1, S), {}),
        (TypeError, "q: got dtype float8_e5m2, wanted float8_e4m3fn", (Q.view(torch.float8_e5m2), S), {}),
        (TypeError, "scale: got dtype float64, wanted float32", (Q, S.double()), {}),
        (TypeError, "dtype: got int8", (Q, S), {"dtype": torch.int8}),
        (ValueError, "q: got 0 dimensions", (Q[0, 0], S), {}),
        (ValueError, "q: got stride 256 in the last dimension", (Q.t(), S), {}),
        (ValueError, r"scale: got shape \[1, 2\], wanted \[130, 2\] \(1x128\) or \[2, 2\] \(128x128\)", (Q, S[:1]), {}),
        (ValueError, r"scale: got shape \[2\]", (Q, S[0]), {}),
        (ValueError, r"scale: got shape \[3, 2, 2\]", (Q, S.expand(3, 2, 2)), {}),
        (RuntimeError, "scale: got device meta", (Q, S.to("meta")), {}),
    ],
)
def test_rejects(error, words, args, kwargs):
    with pytest.raises(error, match=f"^dequantize: {words}"):
        dk.dequantize(*args, **kwargs)
