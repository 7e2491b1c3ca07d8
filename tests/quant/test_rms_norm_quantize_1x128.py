"""rms_norm_quantize_1x128 is rms_norm, then quantize_1x128, bit for bit; both are tested against float64."""

from __future__ import annotations

import pytest
import torch
from checks import compiles, opcheck, same_bits

import dsv3_kernels as dk

OP = "rms_norm_quantize_1x128"
EPS = 1e-6
E4M3 = torch.float8_e4m3fn


def in_two_steps(x, weight, residual, pow2_scale):
    normed, total = dk.rms_norm(x, weight, EPS, residual=residual), None
    if residual is not None:
        normed, total = normed
    return *dk.quantize_1x128(normed, pow2_scale=pow2_scale), normed, total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(4, 7168), (3, 5, 300), (1, 1), (64,)])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("pow2_scale", [False, True])
def test_bits(backend, device, dtype, shape, with_residual, pow2_scale):
    x, residual = (torch.randn(shape).to(dtype).to(device) for _ in range(2))
    residual = residual if with_residual else None
    weight = torch.randn(shape[-1], device=device)
    got = dk.rms_norm_quantize_1x128(x, weight, EPS, residual=residual, pow2_scale=pow2_scale)
    wanted = in_two_steps(x, weight, residual, pow2_scale)
    assert same_bits(got[:3], wanted[:3])
    assert same_bits(got[3], wanted[3]) if with_residual else got[3] is None
    assert got[0].is_contiguous() and got[2].is_contiguous()
    assert len(shape) == 1 or got[1].stride()[-2:] == (1, -(-x[..., 0].numel() // 4) * 4)


@pytest.mark.parametrize("with_residual", [False, True])
def test_given_outputs_and_nothing_else_read_or_written(backend, device, with_residual):
    store = torch.full((2, 5, 400), torch.nan, device=device)
    store[:, :, :300] = torch.randn(2, 5, 300)
    x, residual = store[0, :, :300], store[1, :, :300] if with_residual else None
    weight = torch.randn(300, device=device)
    q_store = torch.full((7, 300), 0x55, dtype=torch.uint8, device=device)
    scale_store = torch.full((3, 8), -1.0, device=device)
    rows = torch.full((2, 7, 300), -1.0, device=device)
    out = q_store[1:6].view(E4M3), scale_store.t()[:5], rows[0, 1:6], rows[1, 1:6] if with_residual else None
    assert dk.rms_norm_quantize_1x128(x, weight, EPS, residual=residual, out=out) is out
    wanted = in_two_steps(x, weight, residual, False)
    assert all(same_bits(a, b) for a, b in zip(out, wanted, strict=True) if b is not None)
    assert (q_store[[0, 6]] == 0x55).all() and (scale_store[:, 5:] == -1).all() and (rows[:, [0, 6]] == -1).all()
    assert with_residual or (rows[1] == -1).all()


def test_a_poisoned_row_is_visible_and_alone(backend, device):
    x, weight = torch.randn(4, 300, device=device), torch.randn(300, device=device)
    clean = dk.rms_norm_quantize_1x128(x, weight, EPS)
    x[2, 7] = torch.nan
    got = dk.rms_norm_quantize_1x128(x, weight, EPS)
    assert (got[0].view(torch.uint8)[2] == 0x7F).all() and got[1][2].isnan().all() and got[2][2].isnan().all()
    for ours, theirs in zip(got[:3], clean[:3], strict=True):
        ours[2] = theirs[2]
    assert same_bits(got[:3], clean[:3])


@pytest.mark.parametrize("shape", [(0, 256), (2, 0, 64)])
def test_empty(device, shape):
    x = torch.empty(shape, device=device)
    q, scale, normed, total = dk.rms_norm_quantize_1x128(x, torch.ones(shape[-1], device=device), EPS, residual=x)
    assert q.shape == normed.shape == total.shape == shape and scale.shape == (*shape[:-1], -(-shape[-1] // 128))


def test_op_contract(device):
    x, weight = torch.randn(5, 300, device=device), torch.randn(300, device=device)
    for residual in (None, torch.randn(5, 300, device=device)):
        arguments = (x, weight, EPS, residual, True)
        opcheck(torch.ops.dsv3_kernels.rms_norm_quantize_1x128.default, arguments)
        out = torch.ops.dsv3_kernels.rms_norm_quantize_1x128(*arguments)
        opcheck(torch.ops.dsv3_kernels.rms_norm_quantize_1x128_out.default, (*arguments, *out))


def test_compiles():
    weight = torch.randn(300)
    compiles(lambda x: dk.rms_norm_quantize_1x128(x * 2, weight, EPS, residual=x), torch.randn(5, 300))


X, WEIGHT = torch.zeros(4, 256), torch.zeros(256)
Q, S, N, R = torch.zeros(4, 256).to(E4M3), torch.zeros(4, 2), torch.zeros(4, 256), torch.zeros(4, 256)


@pytest.mark.parametrize(
    ("error", "words", "args", "kwargs"),
    [
        (TypeError, "x: got dtype float64", (X.double(), WEIGHT, EPS), {}),
        (TypeError, "weight: got dtype int64", (X, WEIGHT.long(), EPS), {}),
        (ValueError, "x: got 0 dimensions", (X[0, 0], WEIGHT, EPS), {}),
        (ValueError, "x: got stride 4 in the last dimension", (torch.zeros(256, 4).t(), WEIGHT, EPS), {}),
        (ValueError, r"weight: got shape \[255\], wanted \[256\]", (X, WEIGHT[1:], EPS), {}),
        (TypeError, "residual: got dtype bfloat16, wanted float32", (X, WEIGHT, EPS), {"residual": X.bfloat16()}),
        (ValueError, r"residual: got shape \[3, 256\]", (X, WEIGHT, EPS), {"residual": X[1:]}),
        (RuntimeError, "weight: got device meta", (X, WEIGHT.to("meta"), EPS), {}),
        (ValueError, "out: got 2, wanted 4 tensors", (X, WEIGHT, EPS), {"out": (Q, S)}),
        (TypeError, r"out\[0\]: got dtype float32", (X, WEIGHT, EPS), {"out": (R, S, N, None)}),
        (ValueError, r"out\[1\]: got shape \[4, 1\]", (X, WEIGHT, EPS), {"out": (Q, S[:, :1], N, None)}),
        (TypeError, r"out\[2\]: got dtype bfloat16", (X, WEIGHT, EPS), {"out": (Q, S, N.bfloat16(), None)}),
        (ValueError, r"out\[2\]: got shape \[3, 256\]", (X, WEIGHT, EPS), {"out": (Q, S, N[1:], None)}),
        (ValueError, r"out\[2\]: got strides", (X, WEIGHT, EPS), {"out": (Q, S, torch.zeros(256, 4).t(), None)}),
        (ValueError, r"out\[3\]: got 'Tensor', wanted None", (X, WEIGHT, EPS), {"out": (Q, S, N, R)}),
        (TypeError, r"out\[3\]: got NoneType", (X, WEIGHT, EPS), {"out": (Q, S, N, None), "residual": X}),
        (ValueError, r"out\[3\]: got shape \[3, 256\]", (X, WEIGHT, EPS), {"out": (Q, S, N, R[1:]), "residual": X}),
        (ValueError, r"out\[3\]: shares memory with normed", (X, WEIGHT, EPS), {"out": (Q, S, N, N), "residual": X}),
        (ValueError, r"out\[2\]: shares memory with x", (X, WEIGHT, EPS), {"out": (Q, S, X, None)}),
        (RuntimeError, "normed: got device meta", (X, WEIGHT, EPS), {"out": (Q, S, N.to("meta"), None)}),
    ],
)
def test_rejects(error, words, args, kwargs):
    with pytest.raises(error, match=f"^rms_norm_quantize_1x128: {words}"):
        dk.rms_norm_quantize_1x128(*args, **kwargs)
