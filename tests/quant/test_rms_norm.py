"""rms_norm and its gradient (the op rms_norm_backward) against autograd through the formula in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from checks import close, compiles, compiles_with_gradients, opcheck, roundoff, same_bits

import dsv3_kernels as dk

OP = "rms_norm"
EPS = 1e-6
FLOAT32 = 1e-6  # relative error of the float32 arithmetic inside, for rows of up to 8192: sums are pairwise


def definition(x, weight, eps=EPS):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(4, 7168), (3, 5, 512), (1, 1), (64,), (33, 257)])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_forward(backend, device, dtype, shape, weight_dtype):
    x = (torch.randn(shape) * torch.exp(torch.randn(*shape[:-1], 1))).to(dtype)
    weight = torch.randn(shape[-1]).to(weight_dtype)
    got = dk.rms_norm(x.to(device), weight.to(device), EPS)
    assert got.dtype is dtype and got.is_contiguous()
    wanted = definition(x.double(), weight.double())
    close(got, wanted, wanted.abs() * (roundoff(dtype) + FLOAT32) + torch.finfo(dtype).smallest_normal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_residual_is_the_sum_rounded_then_normed(backend, device, dtype):
    x, residual = torch.randn(7, 300).to(dtype).to(device), (3 * torch.randn(7, 300)).to(dtype).to(device)
    weight = torch.randn(300, device=device)
    normed, total = dk.rms_norm(x, weight, EPS, residual=residual)
    assert same_bits(total, (x.float() + residual.float()).to(dtype))
    assert same_bits(normed, dk.rms_norm(total, weight, EPS))


def test_eps_is_inside_the_root(backend, device):
    x = torch.full((1, 8), 1e-4, device=device)
    got = dk.rms_norm(x, torch.ones(8, device=device), 1e-2)
    close(got, definition(x.cpu().double(), torch.ones(8), 1e-2), 1e-9)
    assert not dk.rms_norm(torch.zeros(2, 8, device=device), torch.ones(8, device=device), EPS).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(6, 512), (2, 3, 130), (1, 1), (64,)])
def test_backward(backend, device, dtype, with_residual, shape):
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight, grad, grad_total = torch.randn(shape[-1]), torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    total = (x.float() + residual.float()).to(dtype) if with_residual else x

    reference = [t.double().requires_grad_() for t in (total, weight)]
    outputs, grads = [definition(*reference)], [grad.double()]
    if with_residual:
        outputs, grads = [*outputs, reference[0] * 1.0], [*grads, grad_total.double()]
    wanted_x, wanted_weight = torch.autograd.grad(outputs, reference, grads)

    ours = [t.to(device).requires_grad_() for t in (x, weight, residual)[: 3 if with_residual else 2]]
    got = dk.rms_norm(ours[0], ours[1], EPS, residual=ours[2] if with_residual else None)
    got_grads = torch.autograd.grad(
        got, ours, [g.to(device) for g in (grad, grad_total)] if with_residual else grad.to(device)
    )
    rms = torch.rsqrt(total.double().square().mean(-1, keepdim=True) + EPS)
    unit, pull = total.double() * rms, grad.double() * weight.double()
    terms = rms * (pull.abs() + unit.abs() * (pull * unit).abs().mean(-1, keepdim=True))
    terms = terms + grad_total.double().abs() if with_residual else terms
    close(got_grads[0], wanted_x, 2 * FLOAT32 * terms + roundoff(dtype) * wanted_x.abs(), "grad x")
    sums = (grad.double() * unit).abs().reshape(-1, shape[-1]).sum(0)
    close(got_grads[1], wanted_weight, 2 * FLOAT32 * sums, "grad weight")
    assert [g.dtype for g in got_grads] == [t.dtype for t in ours]
    if with_residual:
        assert same_bits(got_grads[2], got_grads[0])


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3)))
def test_gradients_of_any_subset(device, needed):
    tensors = [torch.randn(4, 130), torch.randn(130), torch.randn(4, 130)]
    tensors = [t.to(device).requires_grad_(need) for t, need in zip(tensors, needed, strict=True)]
    normed, total = dk.rms_norm(tensors[0], tensors[1], EPS, residual=tensors[2])
    if not any(needed):
        assert normed.grad_fn is None and total.grad_fn is None
        return
    (normed.sum() + total.square().sum()).backward()  # .sum() sends an expanded gradient, of stride 0
    assert [t.grad is not None for t in tensors] == list(needed)


def test_only_the_sum_is_used(device):
    """Then the gradient passes straight through, and the weight gets none."""
    x, weight, residual = (torch.randn(s, device=device, requires_grad=True) for s in ((4, 130), (130,), (4, 130)))
    total = dk.rms_norm(x, weight, EPS, residual=residual)[1]
    total.backward(torch.full_like(total, 3))
    assert weight.grad is None and (x.grad == 3).all() and (residual.grad == 3).all()


def test_no_second_derivative(device):
    x = torch.randn(4, 130, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(
        dk.rms_norm(x, torch.ones(130, device=device), EPS).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_rows_with_a_stride_and_nothing_else_read(backend, device):
    store = torch.full((2, 5, 400), torch.nan, device=device)
    store[:, :, :300] = torch.randn(2, 5, 300)
    x, residual = store[0, :, :300], store[1, :, :300]
    got = dk.rms_norm(x, torch.ones(300, device=device), EPS, residual=residual)
    assert same_bits(got, dk.rms_norm(x.clone(), torch.ones(300, device=device), EPS, residual=residual.clone()))
    assert all(t.isfinite().all() for t in got)


def test_a_poisoned_row_is_visible_and_alone(backend, device):
    x, weight = torch.randn(4, 300, device=device), torch.randn(300, device=device)
    clean = dk.rms_norm(x, weight, EPS)
    x[2, 7] = torch.nan
    got = dk.rms_norm(x, weight, EPS)
    assert got[2].isnan().all()
    got[2] = clean[2]
    assert same_bits(got, clean)


@pytest.mark.parametrize("shape", [(0, 256), (2, 0, 64)])
def test_empty(device, shape):
    x, weight = (
        torch.empty(shape, device=device, requires_grad=True),
        torch.ones(shape[-1], device=device, requires_grad=True),
    )
    normed, total = dk.rms_norm(x, weight, EPS, residual=x.detach())
    assert normed.shape == total.shape == shape
    normed.sum().backward()
    assert x.grad.shape == shape and not weight.grad.any()


def test_twice_the_same_bits(backend, device):
    x, grad = torch.randn(333, 520, device=device), torch.randn(333, 520, device=device)
    weight = torch.randn(520, device=device)

    def run():
        ours = x.clone().requires_grad_(), weight.clone().requires_grad_()
        normed = dk.rms_norm(*ours, EPS)
        return normed.detach(), *torch.autograd.grad(normed, ours, grad)

    assert same_bits(run(), run())


def test_op_contract(device):
    x, weight = torch.randn(5, 300, device=device), torch.randn(300, device=device)
    for residual in (None, torch.randn(5, 300, device=device)):
        opcheck(torch.ops.dsv3_kernels.rms_norm.default, (x, weight, EPS, residual))
        opcheck(torch.ops.dsv3_kernels.rms_norm_backward.default, (x * 2, x, weight, EPS, residual))


def test_compiles():
    x, weight = torch.randn(5, 300), torch.randn(300)
    compiles(lambda x: dk.rms_norm(x * 2, weight, EPS, residual=x), x)
    inputs = [t.clone().requires_grad_() for t in (x, weight)]
    compiles_with_gradients(lambda x, weight: dk.rms_norm(x * 2, weight, EPS, residual=x), *inputs)


X, WEIGHT = torch.zeros(4, 256), torch.zeros(256)


@pytest.mark.parametrize(
    ("error", "words", "args", "kwargs"),
    [
        (TypeError, "x: got float, wanted a Tensor", (1.0, WEIGHT, EPS), {}),
        (TypeError, "x: got dtype float64", (X.double(), WEIGHT, EPS), {}),
        (TypeError, "weight: got dtype int64", (X, WEIGHT.long(), EPS), {}),
        (ValueError, "x: got 0 dimensions", (X[0, 0], WEIGHT, EPS), {}),
        (ValueError, "x: got stride 4 in the last dimension", (torch.zeros(256, 4).t(), WEIGHT, EPS), {}),
        (ValueError, r"weight: got shape \[255\], wanted \[256\]", (X, WEIGHT[1:], EPS), {}),
        (TypeError, "residual: got dtype bfloat16, wanted float32", (X, WEIGHT, EPS), {"residual": X.bfloat16()}),
        (ValueError, r"residual: got shape \[3, 256\], wanted \[4, 256\]", (X, WEIGHT, EPS), {"residual": X[1:]}),
        (ValueError, "residual: got stride 4", (X, WEIGHT, EPS), {"residual": torch.zeros(256, 4).t()}),
        (RuntimeError, "weight: got device meta", (X, WEIGHT.to("meta"), EPS), {}),
        (RuntimeError, "residual: got device meta", (X, WEIGHT, EPS), {"residual": X.to("meta")}),
    ],
)
def test_rejects(error, words, args, kwargs):
    with pytest.raises(error, match=f"^rms_norm: {words}"):
        dk.rms_norm(*args, **kwargs)
