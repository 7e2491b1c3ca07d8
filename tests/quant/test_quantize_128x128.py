"""quantize_128x128 against its definition in float64, bit for bit."""

from __future__ import annotations

import pytest
import torch
from checks import compiles, opcheck, same_bits

import dsv3_kernels as dk

OP = "quantize_128x128"
E4M3 = torch.float8_e4m3fn


def definition(w: torch.Tensor, pow2_scale: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Block by block; each division is rounded once from float64 to float32 (that is IEEE division)."""
    stack = w.reshape(-1, *w.shape[-2:]).double()
    count, rows, columns = stack.shape
    q = torch.empty(stack.shape, dtype=E4M3)
    scale = torch.empty(count, -(-rows // 128), -(-columns // 128))
    for matrix in range(count):
        for top in range(0, rows, 128):
            for left in range(0, columns, 128):
                tile = stack[matrix, top : top + 128, left : left + 128]
                amax = tile.abs().amax()
                s = (amax.clamp(min=float(torch.tensor(1e-4))) / 448).float()
                if pow2_scale:
                    s = torch.exp2(s.double().log2().ceil()).float()
                s = s if amax.isfinite() else torch.tensor(torch.nan)
                ratio = (tile / s.double()).float() if amax.isfinite() else torch.full(tile.shape, torch.nan)
                q[matrix, top : top + 128, left : left + 128] = ratio.to(E4M3)
                scale[matrix, top // 128, left // 128] = s
    return q.view(w.shape), scale.view(*w.shape[:-2], *scale.shape[1:])


def uneven(*shape: int) -> torch.Tensor:
    """Values whose blocks differ in magnitude, so that a misplaced scale shows."""
    return (
        torch.randn(shape) * torch.exp(3 * torch.randn(*shape[:-2], shape[-2], 1)) * torch.exp(torch.randn(shape[-1]))
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(128, 128), (320, 256), (300, 130), (3, 136, 160), (2, 2, 5, 7), (1, 1), (129, 1)])
@pytest.mark.parametrize("pow2_scale", [False, True])
def test_bits(backend, device, dtype, shape, pow2_scale):
    w = uneven(*shape).to(dtype)
    got = dk.quantize_128x128(w.to(device), pow2_scale=pow2_scale)
    assert same_bits([t.cpu() for t in got], definition(w, pow2_scale))
    assert got[0].is_contiguous() and got[1].is_contiguous()


def test_zeros_stay_zero(backend, device):
    q, scale = dk.quantize_128x128(torch.zeros(130, 256, dtype=torch.bfloat16, device=device))
    assert not q.view(torch.uint8).any()
    assert torch.equal(scale.cpu(), torch.full((2, 2), float(torch.tensor(1e-4) / 448)))


@pytest.mark.parametrize("poison", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("pow2_scale", [False, True])
def test_a_poisoned_block_is_visible_and_alone(backend, device, poison, pow2_scale):
    w = uneven(300, 384)
    clean = dk.quantize_128x128(w.to(device), pow2_scale=pow2_scale)
    w[270, 200] = poison
    q, scale = dk.quantize_128x128(w.to(device), pow2_scale=pow2_scale)
    assert scale[2, 1].isnan() and (q.view(torch.uint8)[256:, 128:256] == 0x7F).all()
    q[256:, 128:256], scale[2, 1] = clean[0][256:, 128:256], clean[1][2, 1]
    assert same_bits((q, scale), clean)


def test_rows_with_a_stride_and_nothing_else_read_or_written(backend, device):
    store = torch.full((140, 400), torch.nan, device=device)
    store[:135, :300] = uneven(135, 300)
    w = store[:135, :300]
    q_store = torch.full((137, 300), 0x55, dtype=torch.uint8, device=device)
    scale_store = torch.full((3, 8), -1.0, device=device)
    q, scale = q_store[1:136].view(E4M3), scale_store.t()[:2]
    assert dk.quantize_128x128(w, out=(q, scale)) == (q, scale)
    assert same_bits((q.cpu(), scale.cpu()), definition(w.cpu(), False))
    assert (q_store[[0, 136]] == 0x55).all() and (scale_store[:, 2:] == -1).all()


@pytest.mark.parametrize("shape", [(0, 256), (3, 0), (0, 0), (0, 128, 128), (2, 0, 128)])
def test_empty(device, shape):
    q, scale = dk.quantize_128x128(torch.empty(shape, device=device))
    assert q.shape == shape and scale.shape == (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))


def test_twice_the_same_bits(backend, device):
    w = torch.randn(2, 133, 513, device=device)
    assert same_bits(dk.quantize_128x128(w), dk.quantize_128x128(w))


def test_op_contract(device):
    w = torch.randn(2, 130, 300, device=device)
    for pow2_scale in (False, True):
        opcheck(torch.ops.dsv3_kernels.quantize_128x128.default, (w, pow2_scale))
    opcheck(torch.ops.dsv3_kernels.quantize_128x128_out.default, (w, False, *dk.quantize_128x128(w)))


def test_compiles():
    compiles(lambda w: dk.quantize_128x128(w * 2, pow2_scale=True), torch.randn(130, 300))

    def with_out(w):
        return dk.quantize_128x128(w, out=(torch.empty(130, 300, dtype=E4M3), torch.empty(2, 3)))

    compiles(with_out, torch.randn(130, 300))


W = torch.zeros(130, 256)
Q, S = torch.zeros(130, 256).to(E4M3), torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("error", "words", "args", "kwargs"),
    [
        (TypeError, "w: got list, wanted a Tensor", ([1.0],), {}),
        (TypeError, "w: got dtype float64", (W.double(),), {}),
        (ValueError, "w: got 1 dimensions, wanted at least 2", (torch.zeros(128),), {}),
        (ValueError, "w: got stride 256 in the last dimension", (W.t(),), {}),
        (TypeError, r"out\[0\]: got dtype float32, wanted float8_e4m3fn", (W,), {"out": (W.clone(), S)}),
        (TypeError, r"out\[1\]: got dtype bfloat16", (W,), {"out": (Q, S.bfloat16())}),
        (ValueError, r"out\[0\]: got shape \[128, 256\]", (W,), {"out": (Q[:128], S)}),
        (ValueError, r"out\[1\]: got shape \[1, 2\], wanted \[2, 2\]", (W,), {"out": (Q, S[:1])}),
        (ValueError, r"out\[0\]: got strides", (W,), {"out": (torch.zeros(130, 512).to(E4M3)[:, ::2], S)}),
        (
            ValueError,
            r"out\[0\]: shares memory with w",
            (W,),
            {"out": (W.view(E4M3).view(-1)[: Q.numel()].view(Q.shape), S)},
        ),
        (ValueError, r"out\[1\]: shares memory with w", (W,), {"out": (Q, W.view(-1)[:4].view(2, 2))}),
        (RuntimeError, "scale: got device meta", (W,), {"out": (Q, S.to("meta"))}),
    ],
)
def test_rejects(error, words, args, kwargs):
    with pytest.raises(error, match=f"^quantize_128x128: {words}"):
        dk.quantize_128x128(*args, **kwargs)
