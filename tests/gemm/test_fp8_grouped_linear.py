"""fp8_grouped_linear: every group, forward and backward, is fp8_linear; rows that no group owns are read by nothing."""

from __future__ import annotations

import exact
import pytest
import torch
from checks import compiles_with_gradients, same_bits

import dsv3_kernels as dk

COUNTS = [(130, 20), (0, 1, 0, 30, 7, 0), (5,), (0, 0)]


def run(x, weight, bounds, grad, **options):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = dk.fp8_grouped_linear(x, weight, bounds, **options)
    y.backward(grad.to(y.dtype))
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(
    ("dtype", "nk", "pow2_scale"), [(torch.bfloat16, (144, 272), False), (torch.float32, (16, 64), True)]
)
def test_the_recipe(device, counts, dtype, nk, pow2_scale):
    """Against float64 of what the recipe quantises; rows past the groups hold NaN, in x and in the gradient."""
    (n, k), used, groups = nk, sum(counts), len(counts)
    x, grad = (exact.uneven(used + 9, columns).to(dtype) for columns in (k, n))
    x[used:], grad[used:] = torch.nan, torch.nan
    weight = exact.uneven(groups, n, k) * k**-0.5
    x, grad, weight, bounds = (t.to(device) for t in (x, grad, weight, exact.offsets(counts, device)))
    y, grad_x, grad_weight = run(x, weight, bounds, grad, pow2_scale=pow2_scale)
    assert (y.dtype, grad_x.dtype, grad_weight.dtype) == (dtype, dtype, torch.float32)
    assert not y[used:].any() and not grad_x[used:].any()

    x_q, grad_q = (exact.values(*dk.quantize_1x128(t, pow2_scale=pow2_scale)) for t in (x, grad))
    w = exact.values(*dk.quantize_128x128(weight, pow2_scale=pow2_scale))
    for group, (start, end) in enumerate(zip(bounds.tolist(), bounds[1:].tolist(), strict=False)):
        exact.product(y[start:end], x_q[start:end], w[group])
        exact.product(grad_x[start:end], grad_q[start:end], w[group].T)
        factors = (dk.quantize_1x128_both(t[start:end], pow2_scale=pow2_scale)[2:4] for t in (grad, x))
        exact.product(grad_weight[group], *(exact.values(*pair) for pair in factors))
        assert end > start or not grad_weight[group].any()


def test_a_group_is_a_linear_layer(device):
    x, grad = torch.randn(50, 64, device=device), torch.randn(50, 32, device=device)
    weight = torch.randn(2, 32, 64, device=device)
    y, grad_x, grad_weight = run(x, weight, exact.offsets((20, 30), device), grad)
    for group, part in ((0, slice(0, 20)), (1, slice(20, 50))):
        inputs = x[part].clone().requires_grad_(), weight[group].clone().requires_grad_()
        alone = dk.fp8_linear(*inputs)
        alone.backward(grad[part])
        if device.type == "cpu":
            assert same_bits(y[part], alone.detach()) and same_bits(grad_x[part], inputs[0].grad)
            assert same_bits(grad_weight[group], inputs[1].grad)


@pytest.mark.parametrize("needed", [(False, True), (True, False), (False, False)])
def test_gradients_of_any_subset(device, needed):
    x, grad, weight = (torch.randn(s, device=device) for s in ((50, 64), (50, 32), (2, 32, 64)))
    bounds = exact.offsets((20, 30), device)
    wanted = run(x, weight, bounds, grad)
    inputs = [t.requires_grad_(need) for t, need in zip((x, weight), needed, strict=True)]
    y = dk.fp8_grouped_linear(*inputs, bounds)
    assert same_bits(y.detach(), wanted[0])
    if not any(needed):
        assert y.grad_fn is None
        return
    y.backward(grad)
    for tensor, need, full in zip(inputs, needed, wanted[1:], strict=True):
        assert (tensor.grad is not None) == need and (not need or same_bits(tensor.grad, full))


def test_an_expanded_gradient_and_another_output_dtype(device):
    x, weight = torch.randn(50, 64, device=device).bfloat16(), torch.randn(2, 32, 64, device=device).bfloat16()
    bounds = exact.offsets((20, 30), device)
    inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = dk.fp8_grouped_linear(*inputs, bounds, out_dtype=torch.float32)
    y.sum().backward()
    wanted = run(x, weight, bounds, torch.ones(50, 32, device=device), out_dtype=torch.float32)
    assert y.dtype is torch.float32 and same_bits([t.grad for t in inputs], wanted[1:])
    assert inputs[1].grad.dtype is torch.bfloat16


@pytest.mark.parametrize(("rows", "groups"), [(0, 2), (4, 0), (0, 0)])
def test_empty(device, rows, groups):
    x, weight = torch.randn(rows, 64, device=device), torch.randn(groups, 32, 64, device=device)
    bounds = torch.zeros(groups + 1, dtype=torch.int32, device=device)
    y, grad_x, grad_weight = run(x, weight, bounds, torch.ones(rows, 32, device=device))
    assert y.shape == (rows, 32) and not y.any() and not grad_x.any() and not grad_weight.any()


def test_compiles():
    x, weight = torch.randn(50, 64, requires_grad=True), torch.randn(2, 32, 64, requires_grad=True)
    bounds = exact.offsets((20, 30), "cpu")
    compiles_with_gradients(lambda x, weight: dk.fp8_grouped_linear(x * 2, weight, bounds), x, weight)


X, WEIGHT, BOUNDS = torch.zeros(4, 64), torch.zeros(2, 32, 64), torch.zeros(3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "words", "args", "kwargs"),
    [
        (TypeError, "x: got dtype float16", (X.half(), WEIGHT, BOUNDS), {}),
        (TypeError, "weight: got dtype float64", (X, WEIGHT.double(), BOUNDS), {}),
        (TypeError, "offsets: got dtype int64, wanted int32", (X, WEIGHT, BOUNDS.long()), {}),
        (ValueError, r"offsets: got shape \[2\], wanted \[3\]", (X, WEIGHT, BOUNDS[1:]), {}),
        (ValueError, r"x: got shape \[1, 4, 64\], wanted \[S, 64\]", (X[None], WEIGHT, BOUNDS), {}),
        (ValueError, "x: got stride 4 in the last dimension", (torch.zeros(64, 4).t(), WEIGHT, BOUNDS), {}),
        (ValueError, r"weight: got shape \[32, 64\], wanted \[G, N, K\]", (X, WEIGHT[0], BOUNDS), {}),
        (ValueError, r"weight: got \[24, 64\], wanted multiples of 16", (X, WEIGHT[:, :24], BOUNDS), {}),
        (ValueError, "weight: got stride 32", (X, torch.zeros(2, 64, 32).mT, BOUNDS), {}),
        (TypeError, "out_dtype: got float16", (X, WEIGHT, BOUNDS), {"out_dtype": torch.float16}),
        (RuntimeError, "offsets: got device meta", (X, WEIGHT, BOUNDS.to("meta")), {}),
    ],
)
def test_rejects(error, words, args, kwargs):
    with pytest.raises(error, match=f"^fp8_grouped_linear: {words}"):
        dk.fp8_grouped_linear(*args, **kwargs)
