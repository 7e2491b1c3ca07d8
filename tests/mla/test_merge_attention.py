"""merge_attention against float64, and against attention over all keys at once."""

from __future__ import annotations

import pytest
import torch
from checks import close, compiles, opcheck, roundoff, same_bits

import dsv3_kernels as dk

OP = "merge_attention"


def definition(out_a, lse_a, out_b, lse_b):
    lse = torch.logaddexp(lse_a.double(), lse_b.double())
    weights = [(part.double() - lse).exp().nan_to_num(nan=0.0)[..., None] for part in (lse_a, lse_b)]
    parts = [torch.where(w == 0, 0, out.double() * w) for out, w in zip((out_a, out_b), weights, strict=True)]
    return parts[0] + parts[1], lse, parts[0].abs() + parts[1].abs()


def check(device, *args):
    out, lse = dk.merge_attention(*(t.to(device) for t in args))
    wanted, wanted_lse, size = definition(*args)
    assert out.dtype == args[0].dtype and lse.dtype == args[1].dtype and out.is_contiguous()
    exact = 2.0**-53 if lse.dtype == torch.float64 else 2.0**-24
    spread = 1 + args[1].double().abs().nan_to_num(posinf=0) + args[3].double().abs().nan_to_num(posinf=0)
    close(lse, wanted_lse, 4 * exact * spread, "lse")
    # Weights are off by the rounding of the difference of the log-sum-exps.
    close(
        out,
        wanted,
        roundoff(out.dtype) * wanted.abs() + 8 * exact * spread[..., None] * size + 1e-7 * (out.dtype == torch.float16),
        "out",
    )
    return out, lse


def random_parts(dtype, shape):
    real = torch.float64 if dtype == torch.float64 else torch.float32
    outs = [torch.randn(shape).to(dtype) for _ in range(2)]
    lses = [(torch.randn(shape[:-1]) * 5).to(real) for _ in range(2)]
    return outs[0], lses[0], outs[1], lses[1]


SHAPES = [(1, 1, 128), (7, 3, 128), (2, 4, 5, 512), (3, 6), (1,), (5, 0)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(backend, device, dtype, shape):
    check(device, *random_parts(dtype, shape))


@pytest.mark.parametrize("shape", [*SHAPES, (0, 2, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64])
def test_float64_and_no_rows(device, dtype, shape):
    check(device, *random_parts(dtype, shape))


def test_rows_without_keys(backend, device):
    """-inf has no weight, and what stands there as output is not read; twice -inf gives 0 and -inf."""
    lse_a = torch.tensor([-torch.inf, 1.0, -torch.inf, -torch.inf, 2.0])
    lse_b = torch.tensor([0.5, -torch.inf, -torch.inf, -torch.inf, 3.0])
    out_a, out_b = torch.randn(2, 5, 16)
    out_a[[0, 2]], out_b[[1, 2]] = torch.nan, torch.inf
    out_a[3] = out_b[3] = 0
    out, lse = check(device, out_a, lse_a, out_b, lse_b)
    assert same_bits(out[0].cpu(), out_b[0]) and same_bits(out[1].cpu(), out_a[1])
    assert (out[2:4] == 0).all() and lse[2:4].isneginf().all()


def test_far_apart_log_sum_exps(backend, device):
    lse_a, lse_b = torch.tensor([1e4, -1e4, 300.0]), torch.tensor([-1e4, 1e4, 300.0])
    out, lse = check(device, *(t for lse in (lse_a, lse_b) for t in (torch.randn(3, 8), lse)))
    assert lse.isfinite().all() and out.isfinite().all()


def test_not_a_number_stays_visible(backend, device):
    out_a, out_b, lse_a, lse_b = torch.randn(3, 4), torch.randn(3, 4), torch.zeros(3), torch.zeros(3)
    lse_a[0], out_b[1, 2] = torch.nan, torch.nan
    out, lse = dk.merge_attention(*(t.to(device) for t in (out_a, lse_a, out_b, lse_b)))
    assert out[0].isnan().all() and lse[0].isnan() and out[1, 2].isnan() and int(out.isnan().sum()) == 5


def test_joins_a_prefix_and_a_chunk(device):
    """Chunked prefill: earlier keys without a mask, own keys with one, together the attention over all."""
    chunk, prefix, heads = 5, 9, 2
    q, k_rope = torch.randn(chunk, heads, 24), torch.randn(prefix + chunk, 8)
    k_nope, v = torch.randn(2, prefix + chunk, heads, 16)
    bounds = [torch.tensor([0, n], dtype=torch.int32) for n in (chunk, prefix, prefix + chunk)]

    def attend(keys, cu_k, causal):
        args = q, k_nope[keys], k_rope[keys], v[keys], bounds[0], cu_k
        return dk.mla_prefill(*args, softmax_scale=0.3, causal=causal)

    before = attend(slice(0, prefix), bounds[1], False)
    own = attend(slice(prefix, None), bounds[0], True)
    whole = attend(slice(None), bounds[2], True)
    for got, wanted in zip(dk.merge_attention(*before, *own), whole, strict=True):
        close(got, wanted, 2e-6)


def test_rows_with_a_stride(backend, device):
    store = torch.randn(2, 4, 3, 40, device=device)
    lses = torch.randn(2, 3, 4, device=device).transpose(1, 2)
    outs = store[..., :16]
    got = dk.merge_attention(outs[0], lses[0], outs[1], lses[1])
    assert same_bits(got, dk.merge_attention(*(t.contiguous() for t in (outs[0], lses[0], outs[1], lses[1]))))


def test_twice_the_same_bits(backend, device):
    args = [torch.randn(30, 4, 64, device=device), torch.randn(30, 4, device=device)] * 2
    assert same_bits(dk.merge_attention(*args), dk.merge_attention(*args))


def test_op_contract(device):
    args = [t.to(device) for _ in range(2) for t in (torch.randn(3, 2, 8).bfloat16(), torch.randn(3, 2))]
    opcheck(torch.ops.dsv3_kernels.merge_attention.default, args)


def test_compiles():
    args = [t for _ in range(2) for t in (torch.randn(3, 2, 8), torch.randn(3, 2))]
    compiles(lambda a, x, b, y: dk.merge_attention(a * 2, x, b, y), *args)


O, L = torch.zeros(4, 2, 8), torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("error", "words", "args"),
    [
        (TypeError, "out_a: got list", ([], L, O, L)),
        (TypeError, "out_a: got dtype int32", (O.int(), L, O, L)),
        (TypeError, "out_b: got dtype bfloat16, wanted float32", (O, L, O.bfloat16(), L)),
        (TypeError, "lse_a: got dtype bfloat16, wanted float32", (O, L.bfloat16(), O, L)),
        (TypeError, "lse_b: got dtype float32, wanted float64", (O.double(), L.double(), O.double(), L)),
        (ValueError, "out_a: got 0 dimensions", (O[0, 0, 0], L, O, L)),
        (ValueError, r"out_b: got shape \[3, 2, 8\], wanted \[4, 2, 8\]", (O, L, O[:3], L)),
        (ValueError, r"lse_a: got shape \[2, 4\], wanted \[4, 2\]", (O, L.t(), O, L)),
        (ValueError, r"lse_b: got shape \[4, 2, 1\], wanted \[4, 2\]", (O, L, O, L[..., None])),
        (ValueError, "out_a: got stride 2 in the last", (torch.zeros(4, 2, 16)[..., ::2], L, O, L)),
        (ValueError, "out_b: got stride 2 in the last", (O, L, torch.zeros(4, 2, 16)[..., ::2], L)),
        (RuntimeError, "lse_b: got device meta, wanted cpu as out_a", (O, L, O, L.to("meta"))),
    ],
)
def test_rejects(error, words, args):
    with pytest.raises(error, match=f"^merge_attention: {words}"):
        dk.merge_attention(*args)
