"""moe_permute against a choice-by-choice definition, exactly; its gradient against float64 autograd."""

from __future__ import annotations

import pytest
import torch
from checks import close, compiles, compiles_with_gradients, opcheck, roundoff, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv3_kernels as dk

OP = "moe_permute"
E4M3 = torch.float8_e4m3fn


def definition(experts, num_experts, alignment):
    """(choice of every row up to the last segment's end, -1 for padding; offsets; counts)."""
    source, offsets, counts = [], [0], []
    flat = experts.flatten().tolist()
    for e in range(num_experts):
        mine = [c for c, chosen in enumerate(flat) if chosen == e]
        source += mine + [-1] * (-len(mine) % alignment)
        offsets.append(len(source))
        counts.append(len(mine))
    return source, offsets, counts


def routing(tokens, choices, num_experts, dropped=0.2, dtype=torch.int32):
    """Different experts for each token, some choices dropped."""
    experts = torch.rand(tokens, num_experts).argsort(1)[:, :choices]
    return experts.masked_fill(torch.rand(tokens, choices) < dropped, -1).to(dtype)


def check(device, x, experts, num_experts, alignment=1, scale=None):
    rows, row_scale, offsets, handle = dk.moe_permute(
        x.to(device),
        experts.to(device),
        num_experts,
        scale=None if scale is None else scale.to(device),
        alignment=alignment,
    )
    source, wanted_offsets, counts = definition(experts, num_experts, alignment)
    tokens, choices = experts.shape
    bound = tokens * choices + num_experts * (alignment - 1)
    assert rows.shape == (bound, x.shape[1]) and rows.dtype == x.dtype and rows.is_contiguous()
    assert offsets.dtype == torch.int32 and offsets.tolist() == wanted_offsets
    assert all(t.dtype == torch.int32 for t in handle)
    assert handle.counts.tolist() == counts
    assert handle.source.tolist() == source + [-1] * (bound - len(source))
    row_of = torch.full((tokens * choices,), -1)
    for row, choice in enumerate(source):
        if choice >= 0:
            row_of[choice] = row
    assert handle.row_of.tolist() == row_of.view(tokens, choices).tolist()
    from_ = torch.tensor(source, dtype=torch.int64)
    pairs = [(rows, x)] if scale is None else [(rows, x), (row_scale, scale)]
    for got, sent in pairs:
        if sent.dtype == E4M3:  # torch 2.8 on a CPU cannot index float8
            got, sent = got.view(torch.uint8), sent.view(torch.uint8)
        wanted = torch.zeros(len(source), sent.shape[1], dtype=sent.dtype)
        wanted[from_ >= 0] = sent[from_[from_ >= 0] // choices]
        assert same_bits(got[: len(source)].cpu().contiguous(), wanted)
    assert (row_scale is None) == (scale is None)
    return row_scale


SHAPES = [(1, 1, 1), (1, 8, 256), (40, 8, 256), (33, 2, 3), (7, 3, 4), (0, 2, 5), (5, 1, 2)]


@pytest.mark.parametrize(("tokens", "choices", "num_experts"), SHAPES)
@pytest.mark.parametrize("alignment", [1, 4, 128])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_against_the_definition(backend, device, tokens, choices, num_experts, alignment, dtype):
    x = torch.randn(tokens, 24).bfloat16()
    check(device, x, routing(tokens, choices, num_experts, dtype=dtype), num_experts, alignment)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_other_dtypes(backend, device, dtype):
    check(device, torch.randn(9, 5).to(dtype), routing(9, 2, 4), 4)


@pytest.mark.parametrize("layout", ["mn", "k"])
@pytest.mark.parametrize("columns", [256, 100])
def test_fp8_rows_travel_with_their_scales(backend, device, layout, columns):
    with dk.backend("eager"):  # on the CPU, whatever is tested
        q, scale = dk.quantize_1x128(torch.randn(11, columns), scale_layout=layout)
    row_scale = check(device, q, routing(11, 3, 6), 6, alignment=16, scale=scale)
    if scale.shape[1] > 1:
        assert (row_scale.stride(0) == 1) == (layout == "mn")
        assert layout == "k" or row_scale.stride(1) % 4 == 0


def test_every_code_survives(backend, device):
    q = torch.arange(256, dtype=torch.uint8).view(4, 64).view(E4M3)
    check(device, q, routing(4, 2, 3), 3, alignment=8, scale=torch.randn(4, 1))


@pytest.mark.parametrize("alignment", [1, 16])
def test_one_expert_takes_all_and_all_dropped(backend, device, alignment):
    x = torch.randn(20, 8)
    check(device, x, torch.full((20, 1), 3), 5, alignment)
    check(device, x, torch.full((20, 2), -1), 5, alignment)
    check(device, x, torch.zeros(20, 3, dtype=torch.int32), 1, alignment)  # three times the same expert


def test_strided_inputs_and_nothing_else(backend, device):
    store = torch.full((8, 40), torch.nan)
    store[:6, :30] = torch.randn(6, 30)
    scales = torch.full((5, 9), torch.nan)
    scales[:2, :6] = torch.rand(2, 6)
    experts = torch.full((6, 7), 99)
    experts[:, 1:5:2] = routing(6, 2, 3)
    check(device, store[:6, :30], experts[:, 1:5:2], 3, alignment=4, scale=scales[:2, :6].t())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 12), st.integers(1, 5), st.integers(1, 9), st.sampled_from([1, 2, 16]), st.integers(0, 2**31))
def test_unpermute_inverts(tokens, choices, num_experts, alignment, seed):
    """Each token comes back as often as it was sent, whatever stands in padding and behind the last segment."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-99, 99, (tokens, 3), generator=generator).float()
    experts = torch.randint(-1, num_experts, (tokens, choices), generator=generator)
    rows, _, offsets, handle = dk.moe_permute(x, experts, num_experts, alignment=alignment)
    rows[handle.source < 0] = torch.nan
    sent = (experts >= 0).sum(1, keepdim=True)
    assert torch.equal(dk.moe_unpermute(rows, handle), x * sent)
    assert int(handle.counts.sum()) == int(sent.sum()) and int(offsets[-1]) <= rows.shape[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("alignment", [1, 8])
def test_gradient(backend, device, dtype, alignment):
    x, experts = torch.randn(30, 16).to(dtype), routing(30, 4, 9)
    ours = x.clone().to(device).requires_grad_()
    rows, _, _, handle = dk.moe_permute(ours, experts.to(device), 9, alignment=alignment)
    grad = torch.randn(rows.shape).to(dtype)
    source = handle.source.cpu().long()
    grad[source < 0] = torch.nan  # of padding, and behind the last segment: not read
    rows.backward(grad.to(device))
    wanted = torch.zeros(30, 16).double().index_add_(0, source[source >= 0] // 4, grad[source >= 0].double())
    size = torch.zeros(30, 16).double().index_add_(0, source[source >= 0] // 4, grad[source >= 0].double().abs())
    exact = 2.0**-52 if dtype == torch.float64 else 2.0**-23
    close(ours.grad, wanted, roundoff(dtype) * wanted.abs() + exact * size, "grad x")


def test_nothing_else_is_differentiable(device):
    x = torch.randn(4, 8, device=device, requires_grad=True)
    experts, scale = torch.zeros(4, 2, dtype=torch.int32, device=device), torch.ones(4, 1, device=device)
    rows, row_scale, offsets, handle = dk.moe_permute(x, experts, 3, scale=scale)
    assert rows.requires_grad
    assert not any(t.requires_grad for t in (row_scale, offsets, *handle))


def test_twice_the_same_bits(backend, device):
    x, experts = torch.randn(60, 8, device=device), routing(60, 6, 16).to(device)

    def flat():
        rows, _, offsets, handle = dk.moe_permute(x, experts, 16, alignment=4)
        return rows[: offsets[-1]], offsets, *handle

    assert same_bits(flat(), flat())


def test_op_contract(device):
    op = torch.ops.dsv3_kernels.moe_permute.default
    x, experts = torch.randn(5, 256, device=device), routing(5, 2, 4).to(device)
    opcheck(op, (x, experts, None, 4, 1))
    q, scale = dk.quantize_1x128(x)
    opcheck(op, (q, experts, scale, 4, 16))


def test_compiles():
    experts = routing(6, 2, 4)

    def permute(x):
        rows, _, offsets, handle = dk.moe_permute(x * 2, experts, 4, alignment=4)
        return rows, offsets, *handle

    compiles_with_gradients(permute, torch.randn(6, 8, requires_grad=True))
    compiles(lambda x: dk.moe_permute(x.to(E4M3), experts, 4, scale=torch.ones(6, 1))[1], torch.randn(6, 8))


X, EX, S = torch.zeros(4, 8), torch.zeros(4, 2, dtype=torch.int32), torch.zeros(4, 1)


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (TypeError, "x: got list", {"x": []}),
        (TypeError, "x: got dtype int32", {"x": X.int()}),
        (TypeError, "experts: got dtype float32, wanted int32 or int64", {"experts": EX.float()}),
        (TypeError, "scale: got dtype bfloat16, wanted float32", {"scale": S.bfloat16()}),
        (TypeError, "num_experts: got float, wanted an int", {"num_experts": 3.0}),
        (TypeError, "alignment: got NoneType, wanted an int", {"alignment": None}),
        (ValueError, r"x: got shape \[32\], wanted \[T, H\]", {"x": X.flatten()}),
        (ValueError, "x: got stride 4 in the last dimension", {"x": torch.zeros(8, 4).t()}),
        (ValueError, r"experts: got shape \[3, 2\], wanted \[4, K\]", {"experts": EX[:3]}),
        (ValueError, r"experts: got \[4, 0\], wanted at least one", {"experts": EX[:, :0]}),
        (ValueError, r"scale: got shape \[3, 1\], wanted \[4, G\]", {"scale": S[:3]}),
        (ValueError, "num_experts: got 0, wanted at least 1", {"num_experts": 0}),
        (ValueError, "alignment: got 0, wanted at least 1", {"alignment": 0}),
        (ValueError, r"experts: got 3, wanted values in \[-1, 3\)", {"experts": EX + 3}),
        (ValueError, r"experts: got -2, wanted values in \[-1, 3\)", {"experts": EX - 2}),
        (RuntimeError, "experts: got device meta, wanted cpu as x", {"experts": EX.to("meta")}),
        (RuntimeError, "scale: got device meta, wanted cpu as x", {"scale": S.to("meta")}),
    ],
)
def test_rejects(error, words, changes):
    with pytest.raises(error, match=f"^moe_permute: {words}"):
        dk.moe_permute(**{"x": X, "experts": EX, "num_experts": 3, "scale": S, "alignment": 1, **changes})
