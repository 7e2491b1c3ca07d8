"""moe_unpermute and moe_unpermute_backward against float64."""

from __future__ import annotations

import pytest
import torch
from checks import close, compiles_with_gradients, opcheck, roundoff, same_bits

import dsv3_kernels as dk

OP = "moe_unpermute"


def case(tokens, choices, num_experts, width, dtype, alignment=1, dropped=0.2):
    """(rows with NaN wherever no choice stands, handle, weights with NaN wherever a choice was dropped)."""
    experts = torch.rand(tokens, num_experts).argsort(1)[:, :choices]
    experts = experts.masked_fill(torch.rand(tokens, choices) < dropped, -1)
    with dk.backend("eager"):  # on the CPU, whatever is tested
        _, _, _, handle = dk.moe_permute(torch.zeros(tokens, 1), experts, num_experts, alignment=alignment)
    rows = torch.randn(handle.source.shape[0], width).to(dtype)
    rows[handle.source < 0] = torch.nan
    weights = torch.rand(tokens, choices, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return rows, handle, weights.masked_fill_(experts < 0, torch.nan)


def definition(rows, handle, weights):
    """The sum in float64, and the sum of the sizes of its terms."""
    row_of = handle.row_of.long()
    kept = (row_of >= 0)[..., None]
    terms = rows.double()[row_of.clamp(min=0)]
    if weights is not None:
        terms = terms * weights.double()[..., None]
    terms = torch.where(kept, terms, 0)
    return terms.sum(1), terms.detach().abs().sum(1)


def on(device, handle):
    return type(handle)(*(t.to(device) for t in handle))


def inner(dtype):
    """Rounding of a product and up to eight additions."""
    return 8 * (2.0**-53 if dtype == torch.float64 else 2.0**-24)


SHAPES = [(1, 1, 1, 8), (40, 8, 256, 24), (33, 2, 3, 7), (5, 1, 2, 130)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("tokens", "choices", "num_experts", "width"), SHAPES)
@pytest.mark.parametrize("alignment", [1, 16])
@pytest.mark.parametrize("weighted", [True, False])
def test_against_float64(backend, device, dtype, tokens, choices, num_experts, width, alignment, weighted):
    rows, handle, weights = case(tokens, choices, num_experts, width, dtype, alignment)
    weights = weights if weighted else None
    got = dk.moe_unpermute(rows.to(device), on(device, handle), weights.to(device) if weighted else None)
    wanted, size = definition(rows, handle, weights)
    assert got.dtype == dtype and got.is_contiguous()
    tiny = 2.0**-25 if dtype == torch.float16 else 0
    close(got, wanted, roundoff(dtype) * wanted.abs() + inner(dtype) * size + tiny)


@pytest.mark.parametrize(("tokens", "width"), [(0, 8), (3, 0)])
@pytest.mark.parametrize("weighted", [True, False])
def test_empty(idle_backend, device, tokens, width, weighted):
    rows, handle, weights = case(tokens, 2, 4, width, torch.bfloat16)
    got = dk.moe_unpermute(rows.to(device), on(device, handle), weights.to(device) if weighted else None)
    assert got.shape == (tokens, width) and got.dtype == torch.bfloat16 and got.device.type == device.type


def test_the_sum_is_taken_in_float32_and_in_order(backend, device):
    """Terms that float32 absorbs one after the other: another order, or a wider sum, gives another result."""
    experts = torch.tensor([[3, 0, 2, 1]])
    with dk.backend("eager"):
        _, _, _, handle = dk.moe_permute(torch.zeros(1, 1), experts, 4)
    values = torch.tensor([2.0**24, 1.0, 1.0, -(2.0**24)])  # in the order of k: 2^24, 2^24, 2^24, 0
    rows = torch.empty(4, 1)
    rows[handle.row_of[0].long()] = values[:, None]
    assert dk.moe_unpermute(rows.to(device), on(device, handle)).item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("weighted", [True, False])
def test_gradients(backend, device, dtype, alignment, weighted):
    rows, handle, weights = case(30, 4, 9, 16, dtype, alignment)
    ours = [t.clone().to(device).requires_grad_() for t in (rows, weights)]
    out = dk.moe_unpermute(ours[0], on(device, handle), ours[1] if weighted else None)
    grad = torch.randn(out.shape).to(dtype)
    out.backward(grad.to(device))
    there, kept = handle.source >= 0, handle.row_of >= 0
    reference = [
        rows.double().where(there[:, None], 0).requires_grad_(),
        weights.double().where(kept, 0).requires_grad_(),
    ]
    definition(reference[0], handle, reference[1] if weighted else None)[0].backward(grad.double())
    wanted = reference[0].grad
    close(ours[0].grad, wanted, (roundoff(dtype) + inner(dtype)) * wanted.abs(), "grad rows")
    assert (ours[0].grad[~there.to(device)] == 0).all()
    if weighted:
        terms = (
            rows.double().where(there[:, None], 0)[handle.row_of.clamp(min=0).long()].abs()
            * grad.double().abs()[:, None]
        )
        close(ours[1].grad, reference[1].grad, 4 * inner(dtype) * terms.sum(-1), "grad weights")
        assert (ours[1].grad[~kept.to(device)] == 0).all()
    else:
        assert ours[1].grad is None


def test_gradient_of_the_weights_alone(device):
    rows, handle, weights = case(6, 2, 4, 8, torch.float32, dropped=0)
    ours = weights.clone().to(device).requires_grad_()
    dk.moe_unpermute(rows.to(device), on(device, handle), ours).sum().backward()
    close(ours.grad, rows.double()[handle.row_of.long()].sum(-1), 1e-5)


def test_rows_with_a_stride(backend, device):
    rows, handle, weights = case(9, 2, 4, 20, torch.float32)
    store = torch.full((rows.shape[0], 50), torch.nan, device=device)
    store[:, 7:27] = rows.to(device)
    tall = torch.full((9, 6), torch.nan, device=device)
    tall[:, 2:4] = weights.to(device)
    got = dk.moe_unpermute(store[:, 7:27], on(device, handle), tall[:, 2:4])
    assert same_bits(got, dk.moe_unpermute(rows.to(device), on(device, handle), weights.to(device)))


def test_all_dropped_gives_zero(backend, device):
    rows, handle, weights = case(5, 3, 4, 8, torch.bfloat16, dropped=1.1)
    assert torch.equal(
        dk.moe_unpermute(rows.to(device), on(device, handle), weights.to(device)).cpu(), torch.zeros(5, 8)
    )


def test_through_experts_and_back(device):
    """permute, one matrix per expert, weighted unpermute: the gradients of the whole path against float64."""
    tokens, choices, num_experts = 12, 3, 5
    x, w = torch.randn(tokens, 6), torch.randn(num_experts, 6, 6)
    experts = torch.rand(tokens, num_experts).argsort(1)[:, :choices]
    weights = torch.rand(tokens, choices)

    def sparse(x, w, weights):
        rows, _, offsets, handle = dk.moe_permute(x, experts, num_experts, alignment=4)
        bounds = offsets.tolist()
        out = [rows[bounds[e] : bounds[e + 1]] @ w[e] for e in range(num_experts)]
        out = torch.cat([*out, rows[bounds[-1] :]])
        return dk.moe_unpermute(out, handle, weights)

    def dense(x, w, weights):
        each = torch.einsum("th,ehf->tef", x, w)
        return (each.gather(1, experts[..., None].expand(-1, -1, 6)) * weights[..., None]).sum(1)

    ours = [t.clone().requires_grad_() for t in (x, w, weights)]
    exact = [t.double().requires_grad_() for t in (x, w, weights)]
    (sparse(*ours) ** 2).sum().backward()
    (dense(*exact) ** 2).sum().backward()
    for got, wanted in zip(ours, exact, strict=True):
        close(got.grad, wanted.grad, 2e-6 * wanted.grad.abs().max())


def test_twice_the_same_bits(backend, device):
    rows, handle, weights = (t for t in case(50, 8, 16, 24, torch.bfloat16))
    rows, weights = (t.to(device).requires_grad_() for t in (rows, weights))

    def run():
        out = dk.moe_unpermute(rows, on(device, handle), weights)
        return [out.detach(), *torch.autograd.grad(out, [rows, weights], out.detach())]

    assert same_bits(run(), run())


def test_op_contract(device):
    rows, handle, weights = case(5, 2, 4, 8, torch.float32, dropped=0)
    rows, handle, weights = rows.nan_to_num().to(device), on(device, handle), weights.to(device)
    for w in (weights, None):
        opcheck(torch.ops.dsv3_kernels.moe_unpermute.default, (rows, handle.row_of, w))
        args = (torch.randn(5, 8, device=device), rows if w is not None else None, handle.row_of, handle.source, w)
        opcheck(torch.ops.dsv3_kernels.moe_unpermute_backward.default, args)


def test_compiles():
    rows, handle, weights = case(5, 2, 4, 8, torch.float32, dropped=0)
    rows = rows.nan_to_num()
    compiles_with_gradients(
        lambda r, w: dk.moe_unpermute(r * 2, handle, w), *(t.requires_grad_() for t in (rows, weights))
    )

    def there_and_back(x):  # the handle stays inside the graph
        rows, _, _, handle = dk.moe_permute(x, torch.tensor([[1, 0], [2, -1], [0, 2]]), 3)
        return dk.moe_unpermute(rows, handle)

    compiles_with_gradients(there_and_back, torch.randn(3, 4, requires_grad=True))


ROWS, HANDLE, W = case(4, 2, 3, 8, torch.float32)


@pytest.mark.parametrize(
    ("error", "words", "args"),
    [
        (TypeError, "rows: got list", ([], HANDLE, W)),
        (TypeError, "rows: got dtype int32", (ROWS.int(), HANDLE, W)),
        (TypeError, "handle: got tuple, wanted the PermuteHandle", (ROWS, tuple(HANDLE), W)),
        (TypeError, "weights: got dtype bfloat16, wanted float32", (ROWS, HANDLE, W.bfloat16())),
        (TypeError, "weights: got dtype float32, wanted float64", (ROWS.double(), HANDLE, W)),
        (ValueError, r"rows: got shape \[7, 8\], wanted \[8, H\]", (ROWS[:7], HANDLE, W)),
        (ValueError, "rows: got stride 8 in the last dimension", (torch.zeros(8, 8).t(), HANDLE, W)),
        (ValueError, r"weights: got shape \[3, 2\], wanted \[4, 2\]", (ROWS, HANDLE, W[:3])),
        (ValueError, "weights: got stride 4 in the last dimension", (ROWS, HANDLE, torch.zeros(2, 4).t())),
        (RuntimeError, "weights: got device meta, wanted cpu as rows", (ROWS, HANDLE, W.to("meta"))),
        (RuntimeError, "handle: got device meta, wanted cpu as rows", (ROWS, on("meta", HANDLE), W)),
    ],
)
def test_rejects(error, words, args):
    with pytest.raises(error, match=f"^moe_unpermute: {words}"):
        dk.moe_unpermute(*args)
