"""fp8_linear and Fp8Linear: each product against float64 of what the recipe quantises, and against no quantisation."""

from __future__ import annotations

import itertools

import exact
import pytest
import torch
from checks import close, compiles_with_gradients, same_bits

import dsv3_kernels as dk


def tensors(dtype, *shape, n, weight_dtype=torch.float32):
    """x, weight and the gradient of the output, with uneven magnitudes."""
    x = exact.uneven(*shape).to(dtype)
    weight = (exact.uneven(n, shape[-1]) * shape[-1] ** -0.5).to(weight_dtype)
    return x, weight, exact.uneven(*shape[:-1], n).to(dtype)


def run(x, weight, bias, grad, **options):
    inputs = [None if t is None else t.clone().requires_grad_() for t in (x, weight, bias)]
    y = dk.fp8_linear(inputs[0], inputs[1], bias=inputs[2], **options)
    y.backward(grad.to(y.dtype))
    return y.detach(), *(None if t is None else t.grad for t in inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(130, 256), (2, 3, 144), (1, 128), (128, 16)])
@pytest.mark.parametrize(("n", "pow2_scale"), [(272, False), (16, True)])
def test_the_recipe(device, dtype, shape, n, pow2_scale):
    x, weight, grad = (t.to(device) for t in tensors(dtype, *shape, n=n))
    bias = torch.randn(n, device=device)
    y, grad_x, grad_weight, grad_bias = run(x, weight, bias, grad, pow2_scale=pow2_scale)
    assert (y.dtype, grad_x.dtype, grad_weight.dtype) == (dtype, dtype, torch.float32)

    rows, grads = x.view(-1, shape[-1]), grad.view(-1, n)
    x_q, x_t = pairs(dk.quantize_1x128_both(rows, pow2_scale=pow2_scale))
    grad_q, grad_t = pairs(dk.quantize_1x128_both(grads, pow2_scale=pow2_scale))
    w = exact.values(*dk.quantize_128x128(weight, pow2_scale=pow2_scale))
    exact.product(y.view(-1, n), x_q, w, None, bias.cpu())
    exact.product(grad_x.view(-1, shape[-1]), grad_q, w.T)
    exact.product(grad_weight, grad_t, x_t)
    close(grad_bias, grads.double().cpu().sum(0), 1e-5 * grads.double().cpu().abs().sum(0))


def pairs(both):
    q, scale, q_t, scale_t, _ = both
    return exact.values(q, scale), exact.values(q_t, scale_t)


def test_close_to_no_quantisation(device):
    """Each factor is off by at most 2^-4 of itself, or of its tile's largest over 448 * 2: so are the products."""
    x, weight, grad = (torch.randn(s, device=device) for s in ((300, 512), (256, 512), (300, 256)))
    y, grad_x, grad_weight, _ = run(x, weight, None, grad)
    for got, wanted in ((y, x @ weight.T), (grad_x, grad @ weight), (grad_weight, grad.T @ x)):
        error = ((got - wanted).norm() / wanted.norm()).item()
        assert 0.01 < error < 0.05  # E4M3 on both sides: about 2.6 % each


def test_without_gradients_the_same_bits(device):
    x, weight, grad = (t.to(device) for t in tensors(torch.bfloat16, 70, 256, n=144))
    with torch.no_grad():
        y = dk.fp8_linear(x, weight.requires_grad_())
    assert y.grad_fn is None and same_bits(y, run(x, weight.detach(), None, grad)[0])


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3)))
def test_gradients_of_any_subset(device, needed):
    x, weight, grad = (t.to(device) for t in tensors(torch.float32, 20, 64, n=32))
    bias = torch.zeros(32, device=device)
    inputs = [t.clone().requires_grad_(need) for t, need in zip((x, weight, bias), needed, strict=True)]
    y = dk.fp8_linear(inputs[0], inputs[1], bias=inputs[2])
    if not any(needed):
        assert y.grad_fn is None
        return
    y.backward(grad)
    wanted = run(x, weight, bias, grad)[1:]
    for tensor, need, full in zip(inputs, needed, wanted, strict=True):
        assert (tensor.grad is not None) == need and (not need or same_bits(tensor.grad, full))


def test_a_bfloat16_weight_and_another_output_dtype(device):
    x, weight, grad = (t.to(device) for t in tensors(torch.bfloat16, 20, 64, n=32, weight_dtype=torch.bfloat16))
    y, grad_x, grad_weight, _ = run(x, weight, None, grad, out_dtype=torch.float32)
    assert (y.dtype, grad_x.dtype, grad_weight.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    wide = run(x, weight.float(), None, grad, out_dtype=torch.float32)
    assert same_bits(y, wide[0]) and same_bits(grad_weight, wide[2].bfloat16())


def test_an_expanded_gradient_and_strided_rows(device):
    store = torch.full((20, 100), torch.nan, device=device)
    store[:, :64] = torch.randn(20, 64)
    x = store[:, :64].requires_grad_()
    weight = torch.randn(32, 64, device=device, requires_grad=True)
    dk.fp8_linear(x, weight).sum().backward()
    wanted = run(x.detach().contiguous(), weight.detach(), None, torch.ones(20, 32, device=device))
    assert same_bits(x.grad, wanted[1]) and same_bits(weight.grad, wanted[2])


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_empty(device, shape):
    x, weight = (
        torch.empty(shape, device=device, requires_grad=True),
        torch.randn(32, 64, device=device, requires_grad=True),
    )
    y = dk.fp8_linear(x, weight)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 32) and x.grad.shape == shape and not weight.grad.any()


def test_what_is_kept_for_backward_is_fp8(device):
    x, weight = (
        torch.randn(256, 128, device=device, requires_grad=True),
        torch.randn(128, 128, device=device, requires_grad=True),
    )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dk.fp8_linear(x, weight)
    codes = [t for t in kept if t.dtype is torch.float8_e4m3fn]
    assert {t.shape for t in codes} == {(128, 256), (128, 128)}
    assert sum(t.nbytes for t in kept) < 1.05 * sum(t.nbytes for t in codes)


def test_backward_runs_on_the_backend_of_forward(device):
    x = torch.randn(8, 64, device=device, requires_grad=True)
    with dk.backend("eager"):
        y = dk.fp8_linear(x, torch.randn(32, 64, device=device))
    with dk.backend("cuda" if device.type == "cpu" else "sim"):  # which cannot serve these tensors
        y.sum().backward()
    assert x.grad.isfinite().all()


def test_no_second_derivative(device):
    x = torch.randn(4, 64, device=device, requires_grad=True)
    y = dk.fp8_linear(x, torch.randn(32, 64, device=device))
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_compiles():
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((20, 64), (32, 64), (32,)))
    compiles_with_gradients(lambda x, weight, bias: dk.fp8_linear(x * 2, weight, bias=bias), x, weight, bias)
    compiles_with_gradients(lambda x: dk.fp8_linear(x, weight.detach()), x)


def test_module(device):
    layer = dk.Fp8Linear(64, 32, device=device)
    assert layer.bias is None and layer.weight.dtype is torch.float32 and layer.weight.shape == (32, 64)
    assert set(layer.state_dict()) == {"weight"} and layer.weight.abs().max() <= 64**-0.5
    x = torch.randn(3, 5, 64, dtype=torch.bfloat16, device=device)
    y = layer(x)
    y.sum().backward()
    assert y.dtype is torch.bfloat16 and same_bits(y.detach(), dk.fp8_linear(x, layer.weight.detach()))
    assert layer.weight.grad.dtype is torch.float32
    biased = dk.Fp8Linear(64, 32, True, device=device, dtype=torch.bfloat16, pow2_scale=True)
    wanted = dk.fp8_linear(x, biased.weight, bias=biased.bias, pow2_scale=True)
    assert same_bits(biased(x).detach(), wanted.detach()) and biased.weight.dtype is torch.bfloat16


def test_a_layer_learns():
    """A regression that float32 solves is solved to FP8's noise."""
    target, x = torch.randn(16, 64), torch.randn(192, 64)
    layer = dk.Fp8Linear(64, 16)
    optimiser = torch.optim.SGD(layer.parameters(), lr=5.0)
    for _ in range(30):
        optimiser.zero_grad()
        loss = (layer(x) - x @ target.T).square().mean()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.005 * (x @ target.T).square().mean().item()


X, WEIGHT, BIAS = torch.zeros(4, 64), torch.zeros(32, 64), torch.zeros(32)


@pytest.mark.parametrize(
    ("error", "words", "args", "kwargs"),
    [
        (TypeError, "x: got dtype float16", (X.half(), WEIGHT), {}),
        (TypeError, "weight: got dtype float64", (X, WEIGHT.double()), {}),
        (ValueError, "x: got 0 dimensions", (X[0, 0], WEIGHT), {}),
        (ValueError, r"x: got shape \[4, 32\], wanted \[..., 64\]", (X[:, :32], WEIGHT), {}),
        (ValueError, "x: got stride 4 in the last dimension", (torch.zeros(64, 4).t(), WEIGHT), {}),
        (ValueError, r"weight: got shape \[64\], wanted \[N, K\]", (X, WEIGHT[0]), {}),
        (ValueError, r"weight: got \[24, 64\], wanted multiples of 16", (X, WEIGHT[:24]), {}),
        (ValueError, r"weight: got \[32, 56\], wanted multiples of 16", (X[:, :56], WEIGHT[:, :56]), {}),
        (ValueError, "weight: got stride 32", (X, torch.zeros(64, 32).t()), {}),
        (TypeError, "bias: got dtype float16", (X, WEIGHT), {"bias": BIAS.half()}),
        (ValueError, r"bias: got shape \[16\], wanted \[32\]", (X, WEIGHT), {"bias": BIAS[:16]}),
        (ValueError, "bias: got strides", (X, WEIGHT), {"bias": torch.zeros(64)[::2]}),
        (TypeError, "out_dtype: got float16", (X, WEIGHT), {"out_dtype": torch.float16}),
        (RuntimeError, "weight: got device meta", (X, WEIGHT.to("meta")), {}),
        (RuntimeError, "bias: got device meta", (X, WEIGHT), {"bias": BIAS.to("meta")}),
    ],
)
def test_rejects(error, words, args, kwargs):
    with pytest.raises(error, match=f"^fp8_linear: {words}"):
        dk.fp8_linear(*args, **kwargs)


@pytest.mark.parametrize(("sizes", "words"), [((60, 32), "in_features: got 60"), ((64, 0), "out_features: got 0")])
def test_module_rejects(sizes, words):
    with pytest.raises(ValueError, match=f"^Fp8Linear: {words}, wanted a multiple of 16"):
        dk.Fp8Linear(*sizes)
