"""fp8_grouped_gemm_swiglu_quantize against products and SwiGLU in float64."""

from __future__ import annotations

import exact
import pytest
import torch
from checks import close, compiles, opcheck, same_bits

import dsv3_kernels as dk

OP = "fp8_grouped_gemm_swiglu_quantize"
E4M3 = torch.float8_e4m3fn


def hidden(a, b, weights, backend):
    """SwiGLU of the exact products, and how far float32 products may carry it off."""
    half = b.shape[0] // 2
    gate, up = (a @ b.T).split(half, 1)
    gate_off, up_off = ((a.abs() @ b.abs().T) * exact.FLOAT32[backend]).split(half, 1)
    scaled = weights.double()[:, None] if weights is not None else torch.ones(1, 1, dtype=torch.float64)
    silu = gate / (1 + torch.exp(-gate))
    # |silu'| <= 1.1 everywhere
    off = (1.1 * gate_off * (up.abs() + up_off) + silu.abs() * up_off) * scaled.abs()
    return silu * up * scaled, off


def check(q, scale, wanted, off, pow2_scale):
    columns = wanted.shape[1]
    spread = torch.nn.functional.pad(wanted, (0, -columns % 128)).unflatten(1, (-1, 128))
    slack = torch.nn.functional.pad(off, (0, -columns % 128)).unflatten(1, (-1, 128)).amax(-1)
    low, high = (((spread.abs().amax(-1) + d).clamp(min=1e-4) / 448) for d in (-slack, slack))
    if pow2_scale:
        low, high = (torch.exp2((s * (1 + d)).log2().ceil()) for s, d in ((low, -1e-6), (high, 1e-6)))
    scale = scale.cpu().double()
    assert ((scale >= low * (1 - 1e-6)) & (scale <= high * (1 + 1e-6))).all()
    wide = scale.repeat_interleave(128, 1)[:, :columns]
    half_step = torch.maximum(wanted.abs() * 2**-4, wide * 2**-10)
    close(q.cpu().float().double() * wide, wanted, (half_step + off) * 1.001, "q * scale")


@pytest.mark.parametrize("counts", [(40, 70), (0, 1, 0, 30, 7, 0), (0, 0)])
@pytest.mark.parametrize("fk", [(128, 160), (300, 128), (4, 576)])
@pytest.mark.parametrize(
    ("recipe", "pow2_scale", "weighted"), [("128x128", False, True), ("1x128", True, True), ("128x128", False, False)]
)
def test_values(backend, device, counts, fk, recipe, pow2_scale, weighted):
    """Rows that no group owns hold NaN, and come out zero."""
    used, shape = sum(counts), (len(counts), 2 * fk[0], fk[1])
    a, b = exact.rows(device, used + 20, fk[1]), (exact.rows if recipe == "1x128" else exact.blocks)(device, *shape)
    exact.poison(a[0][used:], a[1][used:])
    b[1].mul_(b[0].shape[2] ** -0.5 / 8)
    weights = torch.randn(used + 20, 2, device=device)[:, 0] if weighted else None
    if weighted:
        weights[used:] = torch.nan
    bounds = exact.offsets(counts, device)
    q, scale = dk.fp8_grouped_gemm_swiglu_quantize(*a, *b, bounds, weights=weights, pow2_scale=pow2_scale)
    assert q.is_contiguous() and q.shape == (used + 20, fk[0]) and scale.stride() == (1, -(-(used + 20) // 4) * 4)
    assert not q.view(torch.uint8)[used:].any() and not scale[used:].any()
    a_real, b_real = exact.values(*a), exact.values(*b)
    for group, (start, end) in enumerate(zip(bounds.tolist(), bounds[1:].tolist(), strict=False)):
        wanted, off = hidden(a_real[start:end], b_real[group], weights[start:end].cpu() if weighted else None, backend)
        check(q[start:end], scale[start:end], wanted, off, pow2_scale)


def test_it_is_the_two_ops_in_float32(backend, device):
    a, b, bounds = exact.rows(device, 30, 256), exact.blocks(device, 2, 272, 256), exact.offsets((10, 20), device)
    weights = torch.randn(30, device=device)
    got = dk.fp8_grouped_gemm_swiglu_quantize(*a, *b, bounds, weights=weights)
    gate_up = dk.fp8_grouped_gemm(*a, *b, bounds, out_dtype=torch.float32)
    if "triton" not in backend:
        assert same_bits(got, dk.silu_mul_quantize_1x128(gate_up, weights=weights))
    assert same_bits(dk.fp8_grouped_gemm_swiglu_quantize(*a, *b, bounds, weights=weights, num_sms=8), got)


@pytest.mark.parametrize(("rows", "groups", "f", "k"), [(0, 3, 8, 32), (4, 0, 8, 32), (4, 2, 0, 32), (4, 2, 8, 0)])
def test_empty(device, rows, groups, f, k):
    a, b = exact.rows(device, rows, k), exact.blocks(device, groups, 2 * f, k)
    bounds = torch.tensor([0] + [rows] * groups, dtype=torch.int32, device=device)
    q, scale = dk.fp8_grouped_gemm_swiglu_quantize(*a, *b, bounds)
    assert q.shape == (rows, f) and scale.shape == (rows, -(-f // 128)) and not q.float().any()


def test_op_contract(device):
    a, b, bounds = exact.rows(device, 9, 160), exact.blocks(device, 2, 136, 160), exact.offsets((3, 4), device)
    op = torch.ops.dsv3_kernels.fp8_grouped_gemm_swiglu_quantize.default
    opcheck(op, (*a, *b, bounds, None, False, None))
    opcheck(op, (*a, *b, bounds, torch.randn(9, device=device), True, 8))


def test_compiles():
    a, b, bounds = exact.rows("cpu", 9, 160), exact.blocks("cpu", 2, 136, 160), exact.offsets((3, 4), "cpu")
    compiles(lambda w: dk.fp8_grouped_gemm_swiglu_quantize(*a, *b, bounds, weights=w * 2), torch.randn(9))


A, AS = torch.zeros(4, 256).to(E4M3), torch.zeros(4, 2)
B, BS = torch.zeros(3, 136, 256).to(E4M3), torch.zeros(3, 2, 2)
BOUNDS, WEIGHTS = torch.zeros(4, dtype=torch.int32), torch.zeros(4)


@pytest.mark.parametrize(
    ("error", "words", "kwargs"),
    [
        (TypeError, "b: got dtype bfloat16", {"b": B.bfloat16()}),
        (TypeError, "offsets: got dtype int64, wanted int32", {"offsets": BOUNDS.long()}),
        (ValueError, r"offsets: got shape \[3\], wanted \[4\]", {"offsets": BOUNDS[1:]}),
        (ValueError, r"b: got shape \[136, 256\], wanted \[G, N, 256\]", {"b": B[0]}),
        (ValueError, "b: got 132, wanted a multiple of 8 rows", {"b": B[:, :132]}),
        (ValueError, "a: got a row stride of 264 bytes", {"a": torch.zeros(4, 264).to(E4M3)[:, :256]}),
        (ValueError, r"a_scale: got shape \[4\]", {"a_scale": AS[:, 0]}),
        (ValueError, r"b_scale: got shape \[2, 2\]", {"b_scale": BS[0]}),
        (TypeError, "weights: got dtype bfloat16, wanted float32", {"weights": WEIGHTS.bfloat16()}),
        (ValueError, r"weights: got shape \[3\], wanted \[4\]", {"weights": WEIGHTS[1:]}),
        (RuntimeError, "weights: got device meta", {"weights": WEIGHTS.to("meta")}),
        (RuntimeError, "offsets: got device meta", {"offsets": BOUNDS.to("meta")}),
    ],
)
def test_rejects(error, words, kwargs):
    arguments = {"a": A, "a_scale": AS, "b": B, "b_scale": BS, "offsets": BOUNDS} | kwargs
    with pytest.raises(error, match=f"^fp8_grouped_gemm_swiglu_quantize: {words}"):
        dk.fp8_grouped_gemm_swiglu_quantize(**arguments)
