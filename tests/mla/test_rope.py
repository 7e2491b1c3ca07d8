"""rope against complex multiplication in float64, and YaRN's table against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from checks import close, compiles, compiles_with_gradients, opcheck, same_bits

import dsv3_kernels as dk

OP = "rope"
V3 = {"base": 10000.0, "factor": 40.0, "original_max": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
V3 |= {"mscale": 1.0, "mscale_all_dim": 1.0}


def table(dim: int, rows: int = 300, **changes) -> torch.Tensor:
    return dk.yarn_cos_sin(dim, rows, **{**V3, "device": None, **changes})


def definition(x, positions, cos_sin, interleaved):
    """Pairs as complex numbers times cos + i sin, in float64."""
    real = x.double()
    half = x.shape[-1] // 2
    turn = torch.complex(*(t.double() for t in cos_sin[positions.long()].split(half, -1)))
    turn = turn.reshape(*positions.shape, *[1] * (x.dim() - 1 - positions.dim()), half)
    pairs = real.unflatten(-1, (-1, 2)) if interleaved else real.unflatten(-1, (2, -1)).transpose(-1, -2)
    out = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    return out.flatten(-2) if interleaved else out.transpose(-1, -2).flatten(-2)


def ulp(dtype):
    return {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-22, torch.float64: 2**-51}[dtype]


def bound(x, wanted):
    """Half a unit of the result, plus float32 rounding of the two products, which may cancel."""
    size = x.double().abs().amax(-1, keepdim=True) * 1.5
    inner = 2**-22 if x.dtype != torch.float64 else 2**-51
    return wanted.abs() * ulp(x.dtype) + size * inner + 1e-7 * (x.dtype == torch.float16)


SHAPES = [((5, 64), (5,)), ((7, 3, 64), (7,)), ((2, 4, 3, 8), (2, 4)), ((1, 6), (1,)), ((64,), ()), ((2, 5, 64), (2,))]


def against_complex_numbers(device, dtype, shape, leading, interleaved):
    x = torch.randn(shape).to(dtype)
    positions = torch.randint(0, 300, leading, dtype=torch.int32 if len(shape) % 2 else torch.int64)
    cos_sin = table(shape[-1]).to(torch.float64 if dtype == torch.float64 else torch.float32)
    got = dk.rope(x.to(device), positions.to(device), cos_sin.to(device), interleaved=interleaved)
    wanted = definition(x, positions, cos_sin, interleaved)
    assert got.dtype == dtype and got.is_contiguous()
    close(got, wanted, bound(x, wanted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("shape", "leading"), SHAPES)
@pytest.mark.parametrize("interleaved", [True, False])
def test_against_complex_numbers(backend, device, dtype, shape, leading, interleaved):
    against_complex_numbers(device, dtype, shape, leading, interleaved)


@pytest.mark.parametrize(("shape", "leading"), SHAPES)
@pytest.mark.parametrize("interleaved", [True, False])
def test_float64(device, shape, leading, interleaved):
    against_complex_numbers(device, torch.float64, shape, leading, interleaved)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradient(backend, device, interleaved, dtype):
    x = torch.randn(9, 3, 64).to(dtype)
    grad = torch.randn(9, 3, 64).to(dtype)
    positions, cos_sin = torch.randint(0, 300, (9,)), table(64, mscale_all_dim=0.5)  # not a pure rotation
    ours = x.clone().to(device).requires_grad_()
    dk.rope(ours, positions.to(device), cos_sin.to(device), interleaved=interleaved).backward(grad.to(device))
    reference = x.double().requires_grad_()
    definition(reference, positions, cos_sin, interleaved).backward(grad.double())
    assert ours.grad.dtype == dtype
    close(ours.grad, reference.grad, bound(grad, reference.grad) * 1.5, "grad x")


def test_gradient_is_taken_once(device):
    x = torch.randn(3, 8, device=device, requires_grad=True)
    out = dk.rope(x, torch.arange(3, device=device), table(8).to(device))
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_position_zero_changes_nothing(backend, device):
    x = torch.randn(4, 2, 64, device=device)
    assert torch.equal(dk.rope(x, torch.zeros(4, dtype=torch.int64, device=device), table(64).to(device)), x)


def test_scores_depend_on_the_distance_alone(backend, device):
    cos_sin = table(64, 1000).to(device)
    q, k = torch.randn(2, 1, 64, device=device).expand(2, 50, 64).contiguous()
    at = torch.arange(50, device=device)
    score = (dk.rope(q, at + 7, cos_sin) * dk.rope(k, at, cos_sin)).sum(-1)
    assert (score - score[0]).abs().max() < 2e-4 and score[0].abs() > 0.1


def test_slices_and_nothing_else(backend, device):
    """x is the rotary part of a wider row; NaN elsewhere, and in rows of the table that no position names."""
    store = torch.full((6, 3, 192), torch.nan, device=device)
    store[:, :, 128:] = torch.randn(6, 3, 64)
    cos_sin = torch.full((40, 80), torch.nan)
    cos_sin[10:16, :64] = table(64)[10:16]
    positions = torch.arange(10, 16)
    got = dk.rope(store[:, :, 128:], positions.to(device), cos_sin[:, :64].to(device))
    wanted = definition(store[:, :, 128:].cpu(), positions, table(64), True)
    close(got, wanted, bound(store[:, :, 128:].cpu(), wanted))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("dtype", "start"), [(torch.bfloat16, 0), (torch.bfloat16, 3), (torch.float32, 8)])
def test_into_part_of_wider_rows(backend, device, dtype, start, interleaved):
    """The bits of a fresh result at any address, heads in one dimension, two and none; nothing beside is touched."""
    cos_sin = table(64).to(device)
    for shape, leading in (((5, 3, 64), (5,)), ((2, 3, 4, 64), (2, 3)), ((3, 2, 2, 64), (3,)), ((7, 64), (7,))):
        x, positions = torch.randn(shape, device=device).to(dtype), torch.randint(0, 300, leading, device=device)
        around = torch.full((shape[0] + 1, *shape[1:-1], 64 + 16), torch.nan, dtype=dtype, device=device)
        out = around[1:, ..., start : start + 64]
        assert dk.rope(x, positions, cos_sin, interleaved=interleaved, out=out) is out
        assert same_bits(out.contiguous(), dk.rope(x, positions, cos_sin, interleaved=interleaved))
        out.fill_(torch.nan)
        assert around.isnan().all()


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64), (2, 0), (0, 0)])
def test_empty(device, shape):
    x = torch.randn(shape, device=device)
    out = dk.rope(x, torch.zeros(shape[0], dtype=torch.int32, device=device), table(shape[-1]).to(device))
    assert out.shape == shape
    assert (
        dk.rope(x, torch.zeros(shape[0], dtype=torch.int32, device=device), table(shape[-1]).to(device), out=out) is out
    )


def test_twice_the_same_bits(backend, device):
    args = torch.randn(33, 5, 64, device=device), torch.arange(33, device=device), table(64).to(device)
    assert same_bits(dk.rope(*args), dk.rope(*args))


def test_op_contract(device):
    positions, cos_sin = torch.arange(5, device=device), table(64).to(device)
    x = torch.randn(5, 2, 64, device=device)
    for interleaved in (True, False):
        for transposed in (True, False):
            opcheck(torch.ops.dsv3_kernels.rope.default, (x, positions, cos_sin, interleaved, transposed))
    out = torch.zeros(5, 2, 80, device=device)[..., 16:]
    opcheck(torch.ops.dsv3_kernels.rope_out.default, (x, positions, cos_sin, True, False, out))


def test_compiles():
    positions, cos_sin = torch.arange(5), table(64)
    compiles(lambda x: dk.rope(x[..., 128:], positions, cos_sin), torch.randn(5, 2, 192))

    def into(x):
        q = x.new_zeros(5, 2, 80)
        dk.rope(x, positions, cos_sin, out=q[..., 16:])
        return q

    compiles(into, torch.randn(5, 2, 64))
    x = torch.randn(5, 2, 64, requires_grad=True)
    compiles_with_gradients(lambda x: dk.rope(x * 2, positions, cos_sin), x)


X, P, CS = torch.zeros(4, 2, 64), torch.arange(4), table(64)


@pytest.mark.parametrize(
    ("error", "words", "args"),
    [
        (TypeError, "x: got list", ([1.0], P, CS)),
        (TypeError, "x: got dtype int64", (X.long(), P, CS)),
        (TypeError, "positions: got dtype float32, wanted int32 or int64", (X, P.float(), CS)),
        (TypeError, "cos_sin: got dtype bfloat16, wanted float32", (X, P, CS.bfloat16())),
        (TypeError, "cos_sin: got dtype float32, wanted float64", (X.double(), P, CS)),
        (ValueError, "x: got 0 dimensions", (torch.tensor(1.0), P, CS)),
        (ValueError, "x: got stride 2 in the last dimension", (torch.zeros(4, 2, 128)[..., ::2], P, CS)),
        (ValueError, "x: got 63, wanted an even last dimension", (X[..., :63], P, CS)),
        (ValueError, r"positions: got \[3\], wanted the shape of x's first dimensions, \[4, 2\]", (X, P[:3], CS)),
        (ValueError, r"cos_sin: got shape \[300, 64\], wanted \[P, 32\]", (X[..., :32], P, CS)),
        (ValueError, "cos_sin: got stride 2 in the last", (X[..., :32], P, CS[:, ::2])),
        (ValueError, r"positions: got 300, wanted values in \[0, 300\)", (X, P + 297, CS)),
        (ValueError, r"positions: got -1, wanted values in \[0, 300\)", (X, P - 1, CS)),
        (RuntimeError, "positions: got device meta, wanted cpu as x", (X, P.to("meta"), CS)),
    ],
)
def test_rejects(error, words, args):
    with pytest.raises(error, match=f"^rope: {words}"):
        dk.rope(*args)


@pytest.mark.parametrize(
    ("error", "words", "x", "out"),
    [
        (TypeError, "out: got dtype float64, wanted float32", X, X.double()),
        (ValueError, r"out: got shape \[4, 2, 32\], wanted \[4, 2, 64\]", X, X[..., :32]),
        (ValueError, "out: got stride 2 in the last dimension", X, torch.zeros(4, 2, 128)[..., ::2]),
        (ValueError, "out: shares memory with x", X, X),
        (ValueError, "out: got 'an x that requires grad', wanted none", X.clone().requires_grad_(), X.clone()),
        (
            ValueError,
            r"out: got strides \[1024, 128, 512, 1\], wanted strides that make it \[tokens, heads, D\]",
            torch.zeros(4, 3, 2, 64),
            torch.zeros(4, 2, 4, 128)[..., :3, :64].transpose(1, 2),
        ),
        (RuntimeError, "out: got device meta, wanted cpu as x", X, X.to("meta")),
    ],
)
def test_rejects_out(error, words, x, out):
    with pytest.raises(error, match=f"^rope: {words}"):
        dk.rope(x, P, CS, out=out)


def test_yarn_of_deepseek_v3():
    """Frequencies 0..10 stay, 23..31 are divided by 40, a ramp lies between (report, section 4.3)."""
    got = table(64, 200).double()
    plain = 10000.0 ** -(torch.arange(32).double() / 32)
    ramp = ((torch.arange(32).double() - 10) / 13).clamp(0, 1)
    angles = torch.outer(torch.arange(200).double(), plain / 40 * ramp + plain * (1 - ramp))
    assert ramp[10] == 0 and ramp[11] > 0 and ramp[22] < 1 and ramp[23] == 1
    close(got, torch.cat([angles.cos(), angles.sin()], 1), torch.cat([angles, angles], 1) * 2.5e-7 + 1e-7)
    assert torch.equal(got[0].float(), torch.cat([torch.ones(32), torch.zeros(32)]))


def test_factor_one_is_plain_rope():
    got = table(8, 50, factor=1.0)
    angles = torch.outer(torch.arange(50).double(), 10000.0 ** -(torch.arange(4).double() / 4))
    close(got, torch.cat([angles.cos(), angles.sin()], 1), torch.cat([angles, angles], 1) * 2.5e-7 + 1e-7)


def test_yarn_magnitude():
    ratio = (0.1 * 0.707 * math.log(40) + 1) / (0.1 * math.log(40) + 1)
    close(table(64, mscale=0.707), table(64).double() * ratio, 1e-6)
    assert same_bits(table(64, mscale=0.707, mscale_all_dim=0.707), table(64))


def test_yarn_of_narrow_heads_and_empty_tables():
    assert table(6, 10, original_max=32, factor=8.0).shape == (10, 6)  # the ramp is clipped at the ends
    assert table(2, 10, original_max=2, factor=8.0).isfinite().all()  # no frequency between: a step
    assert table(64, 0).shape == (0, 64) and table(0, 5).shape == (5, 0)


@pytest.mark.parametrize(
    ("error", "words", "args", "kwargs"),
    [
        (TypeError, "head_dim: got float, wanted an int", (64.0, 10), {}),
        (TypeError, "max_positions: got bool, wanted an int", (64, True), {}),
        (ValueError, "head_dim: got 63, wanted an even number", (63, 10), {}),
        (ValueError, "max_positions: got -1, wanted at least 0", (64, -1), {}),
        (ValueError, "original_max: got 0, wanted at least 1", (64, 10), {"original_max": 0}),
        (ValueError, "factor: got 0.5, wanted at least 1", (64, 10), {"factor": 0.5}),
        (ValueError, "base: got 1.0, wanted a number above 1", (64, 10), {"base": 1.0}),
    ],
)
def test_yarn_rejects(error, words, args, kwargs):
    with pytest.raises(error, match=f"^yarn_cos_sin: {words}"):
        dk.yarn_cos_sin(*args, **{**V3, "device": None, **kwargs})
