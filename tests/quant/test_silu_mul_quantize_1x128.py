"""silu_mul_quantize_1x128 against SwiGLU in float64: scales to float32's error, codes to half a step of E4M3."""

from __future__ import annotations

import pytest
import torch
from checks import close, compiles, opcheck, same_bits

import dsv3_kernels as dk

OP = "silu_mul_quantize_1x128"
E4M3 = torch.float8_e4m3fn
FLOAT32 = 2e-6  # relative error of silu, two products and a division in float32, with room for a kernel's exp2


def hidden(gate_up: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    gate, up = gate_up.double().cpu().chunk(2, -1)
    value = gate / (1 + torch.exp(-gate)) * up
    return value if weights is None else value * weights.double().cpu()[..., None]


def uneven(*shape: int) -> torch.Tensor:
    return torch.randn(shape) * torch.exp(2 * torch.randn(*shape[:-1], 1))


def check(q: torch.Tensor, scale: torch.Tensor, wanted: torch.Tensor, pow2_scale: bool) -> None:
    columns = wanted.shape[-1]
    blocks = torch.nn.functional.pad(wanted, (0, -columns % 128)).unflatten(-1, (-1, 128))
    exact = blocks.abs().amax(-1).clamp(min=1e-4) / 448
    if pow2_scale:
        exact = torch.exp2(exact.log2().ceil())
        assert (scale.cpu().double() == exact).all()
    close(scale, exact, exact * FLOAT32, "scale")
    wide = scale.cpu().double().repeat_interleave(128, -1)[..., :columns]
    bound = torch.maximum(wanted.abs() * 2**-4, wide * 2**-10) * (1 + 1e-4)
    close(q.cpu().float().double() * wide, wanted, bound, "q * scale")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(5, 4096), (3, 2, 600), (1, 2), (70, 272), (256,)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pow2_scale", [False, True])
def test_values(backend, device, dtype, shape, weighted, pow2_scale):
    gate_up = uneven(*shape).to(dtype).to(device)
    weights = torch.randn(shape[:-1], device=device) if weighted else None
    q, scale = dk.silu_mul_quantize_1x128(gate_up, weights=weights, pow2_scale=pow2_scale)
    assert q.is_contiguous() and q.dtype is E4M3
    if len(shape) > 1:
        rows = gate_up[..., 0].numel()
        assert scale.stride()[-2:] == (1, -(-rows // 4) * 4)
    check(q, scale, hidden(gate_up, weights), pow2_scale)


def test_extreme_gates(backend, device):
    """silu neither overflows nor loses its tails; an infinite gate is visible in its block alone."""
    gate = torch.tensor([-3e38, -200.0, -90.0, -30.0, -1e-3, 0.0, 1e-3, 30.0, 300.0])
    gate_up = torch.cat([torch.nn.functional.pad(gate, (0, 119)), torch.ones(128)])[None].to(device)
    check(*dk.silu_mul_quantize_1x128(gate_up), hidden(gate_up, None), False)
    many = torch.randn(3, 512, device=device)
    clean = dk.silu_mul_quantize_1x128(many)
    for place, poison in ((200, torch.inf), (200, torch.nan), (456, torch.nan), (456, -torch.inf)):
        bad = many.clone()
        bad[1, place] = poison
        q, scale = dk.silu_mul_quantize_1x128(bad)
        assert scale[1, 1].isnan() and (q.view(torch.uint8)[1, 128:] == 0x7F).all()
        q[1, 128:], scale[1, 1] = clean[0][1, 128:], clean[1][1, 1]
        assert same_bits((q, scale), clean)


def test_zeros_stay_zero(backend, device):
    q, scale = dk.silu_mul_quantize_1x128(torch.zeros(2, 512, device=device), weights=torch.ones(2, device=device))
    assert not (q.view(torch.uint8) & 0x7F).any()
    assert torch.equal(scale.cpu(), torch.full((2, 2), float(torch.tensor(1e-4) / 448)))


def test_strides_and_nothing_else_read_or_written(backend, device):
    store = torch.full((6, 700), torch.nan, device=device)
    store[:5, :600] = torch.randn(5, 600)
    weights = torch.randn(5, 3, device=device)[:, 1]
    q_store = torch.full((7, 300), 0x55, dtype=torch.uint8, device=device)
    scale_store = torch.full((3, 8), -1.0, device=device)
    q, scale = q_store[1:6].view(E4M3), scale_store.t()[:5]
    gate_up = store[:5, :600]
    assert dk.silu_mul_quantize_1x128(gate_up, weights=weights, out=(q, scale)) == (q, scale)
    wanted = dk.silu_mul_quantize_1x128(gate_up.clone(), weights=weights.clone())
    assert same_bits((q.contiguous(), scale.contiguous()), [t.contiguous() for t in wanted])
    assert (q_store[[0, 6]] == 0x55).all() and (scale_store[:, 5:] == -1).all()


@pytest.mark.parametrize("shape", [(0, 256), (3, 0), (2, 0, 128)])
def test_empty(device, shape):
    q, scale = dk.silu_mul_quantize_1x128(torch.empty(shape, device=device))
    half = shape[-1] // 2
    assert q.shape == (*shape[:-1], half) and scale.shape == (*shape[:-1], -(-half // 128))


def test_twice_the_same_bits(backend, device):
    gate_up, weights = torch.randn(33, 514, device=device), torch.randn(33, device=device)
    run = [dk.silu_mul_quantize_1x128(gate_up, weights=weights) for _ in range(2)]
    assert same_bits(*run)


def test_op_contract(device):
    gate_up, weights = torch.randn(5, 600, device=device), torch.randn(5, device=device)
    opcheck(torch.ops.dsv3_kernels.silu_mul_quantize_1x128.default, (gate_up, None, True))
    opcheck(torch.ops.dsv3_kernels.silu_mul_quantize_1x128.default, (gate_up, weights, False))
    out = dk.silu_mul_quantize_1x128(gate_up)
    opcheck(torch.ops.dsv3_kernels.silu_mul_quantize_1x128_out.default, (gate_up, weights, False, *out))


def test_compiles():
    weights = torch.randn(5)
    compiles(lambda x: dk.silu_mul_quantize_1x128(x * 2, weights=weights), torch.randn(5, 600))


X, WEIGHTS = torch.zeros(4, 512), torch.zeros(4)
Q, S = torch.zeros(4, 256).to(E4M3), torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("error", "words", "args", "kwargs"),
    [
        (TypeError, "gate_up: got NoneType, wanted a Tensor", (None,), {}),
        (TypeError, "gate_up: got dtype float64", (X.double(),), {}),
        (ValueError, "gate_up: got 0 dimensions", (X[0, 0],), {}),
        (ValueError, "gate_up: got stride 4 in the last dimension", (torch.zeros(512, 4).t(),), {}),
        (ValueError, "gate_up: got 511, wanted an even number of columns", (X[:, 1:],), {}),
        (TypeError, "weights: got dtype bfloat16, wanted float32", (X,), {"weights": WEIGHTS.bfloat16()}),
        (ValueError, r"weights: got shape \[4, 1\], wanted \[4\]", (X,), {"weights": WEIGHTS[:, None]}),
        (TypeError, r"out\[0\]: got dtype float32", (X,), {"out": (Q.float(), S)}),
        (TypeError, r"out\[1\]: got dtype float64", (X,), {"out": (Q, S.double())}),
        (ValueError, r"out\[0\]: got shape \[3, 256\], wanted \[4, 256\]", (X,), {"out": (Q[1:], S)}),
        (ValueError, r"out\[1\]: got shape \[4, 1\], wanted \[4, 2\]", (X,), {"out": (Q, S[:, 1:])}),
        (ValueError, r"out\[0\]: got strides", (X,), {"out": (torch.zeros(4, 512).to(E4M3)[:, ::2], S)}),
        (ValueError, r"out\[1\]: shares memory with gate_up", (X,), {"out": (Q, X.view(-1)[:8].view(4, 2))}),
        (RuntimeError, "weights: got device meta", (X,), {"weights": WEIGHTS.to("meta")}),
        (RuntimeError, "scale: got device meta", (X,), {"out": (Q, S.to("meta"))}),
    ],
)
def test_rejects(error, words, args, kwargs):
    with pytest.raises(error, match=f"^silu_mul_quantize_1x128: {words}"):
        dk.silu_mul_quantize_1x128(*args, **kwargs)
