"""mla_prefill and mla_prefill_backward against float64, sequence by sequence, with error bounds for every element."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from checks import close, compiles, compiles_with_gradients, opcheck, roundoff, same_bits

import dsv3_kernels as dk

OP = "mla_prefill"
SCALE = 0.1352338
WIDTHS = (128, 64, 128)  # nope, rope, value


def bounds_of(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def inputs(queries: int, keys: int, heads: int, dtype=torch.float32, widths=WIDTHS, spread: float = 0.5):
    nope, rope, value = widths
    shapes = (queries, heads, nope + rope), (keys, heads, nope), (keys, rope), (keys, heads, value)
    return [(torch.randn(shape) * (spread if i < 3 else 1)).to(dtype) for i, shape in enumerate(shapes)]


def served(backend: str) -> list[torch.dtype]:
    """What a backend computes: kernels take bfloat16 only."""
    return [torch.bfloat16] if backend != "eager" else [torch.bfloat16, torch.float32]


def definition(q, k_nope, k_rope, v, cu_q, cu_k, grad_out, causal, dtype, scale=SCALE, factor=0.0):
    """Results and gradients in float64, and how far an implementation with sums in float32 may be off.

    A sum of n products is off by at most about sqrt(n) half units of the sum of the products' sizes; 16 covers every
    width here. Errors go forward from there: scores, weights, outputs rounded to `dtype`, and so on. `factor` is the
    rounding of weights and their gradients to what tensor cores multiply.
    """
    exact = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    rounding, inner = roundoff(dtype), 16 * exact
    q, k_nope, k_rope, v, grad_out = (t.double() for t in (q, k_nope, k_rope, v, grad_out))
    heads, nope = q.shape[1], k_nope.shape[2]
    k = torch.cat([k_nope, k_rope[:, None].expand(-1, heads, -1)], -1)
    out, lse = torch.zeros(*q.shape[:2], v.shape[2]).double(), torch.full(q.shape[:2], -torch.inf).double()
    results = [out, lse, torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)]
    off = [torch.zeros_like(t) for t in results]
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        if q1 == q0 or k1 == k0:
            continue
        Q, K, V, dO = (t.transpose(0, 1) for t in (q[q0:q1], k[k0:k1], v[k0:k1], grad_out[q0:q1]))
        s = scale * Q @ K.mT
        s_off = inner * scale * Q.abs() @ K.abs().mT
        if causal:
            hidden = torch.arange(k1 - k0) > torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
            s = s.masked_fill(hidden, -torch.inf)
        L = s.logsumexp(-1, keepdim=True)
        p = (s - L.masked_fill(L.isneginf(), 0)).exp()
        p_off = 2 * s_off.amax(-1, keepdim=True) + 2 * inner * (1 + L.abs().nan_to_num(posinf=0))
        L_off = p_off + exact * L.abs().nan_to_num(posinf=0)
        p_off = p_off + factor
        O = p @ V
        O_off = rounding * O.abs() + (p_off + inner) * (p @ V.abs())
        dV = p.mT @ dO
        dV_off = rounding * dV.abs() + (p * (p_off + inner)).mT @ dO.abs()
        dP, row_sum = dO @ V.mT, (dO * O).sum(-1, keepdim=True)
        dS = p * (dP - row_sum)
        dS_off = dS.abs() * p_off + p * (inner * dO.abs() @ V.abs().mT + (dO.abs() * O_off).sum(-1, keepdim=True))
        dS_off += p * inner * (dO * O).abs().sum(-1, keepdim=True)
        dS_off += dS.abs() * factor
        dQ, dK = scale * dS @ K, scale * dS.mT @ Q
        dQ_off = rounding * dQ.abs() + scale * (dS_off + inner * dS.abs()) @ K.abs()
        dK_off = scale * (dS_off + inner * dS.abs()).mT @ Q.abs()
        places = [slice(q0, q1)] * 3 + [slice(k0, k1)] * 2
        values, errors = (O, L[..., 0], dQ, dK, dV), (O_off, L_off[..., 0], dQ_off, dK_off, dV_off)
        for i, rows in enumerate(places):
            results[i][rows], off[i][rows] = values[i].transpose(0, 1), errors[i].transpose(0, 1)
    out, lse, dq, dk_, dv = results
    dk_rope = dk_[..., nope:].sum(1)
    off_rope = off[3][..., nope:].sum(1) + rounding * dk_rope.abs()
    off_nope = off[3][..., :nope] + rounding * dk_[..., :nope].abs()
    floor = max(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, 1e-30)  # below it, weights become 0
    errors = [error + floor for error in (off[0], off[1], off[2], off_nope, off_rope, off[4])]
    return (out, lse, dq, dk_[..., :nope], dk_rope, dv), errors


NAMES = ("out", "lse", "grad q", "grad k_nope", "grad k_rope", "grad v")


def check(device, tensors, cu_q, cu_k, causal, scale=SCALE, factor=0.0):
    """Forward and backward on `device` against the definition."""
    dtype = tensors[0].dtype
    grad_out = torch.randn(*tensors[0].shape[:2], tensors[3].shape[2]).to(dtype)
    ours = [t.detach().clone().to(device).requires_grad_() for t in tensors]
    out, lse = dk.mla_prefill(*ours, cu_q.to(device), cu_k.to(device), softmax_scale=scale, causal=causal)
    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert out.is_contiguous() and lse.is_contiguous() and not lse.requires_grad
    out.backward(grad_out.to(device))
    wanted, off = definition(*tensors, cu_q, cu_k, grad_out, causal, dtype, scale, factor)
    for name, got, want, bound in zip(NAMES, (out, lse, *(t.grad for t in ours)), wanted, off, strict=True):
        close(got, want, bound, name)


RAGGED = [
    ([5], [5]),
    ([1], [1]),
    ([1, 1, 1], [7, 1, 130]),  # decode-like: one query each
    ([3, 3, 5, 5, 0, 4], [3, 3, 9, 9, 2, 0]),  # two batches of two; no queries; no keys
    ([6, 2], [4, 2]),  # more queries than keys: the first see none
    ([130, 257], [130, 300]),  # several blocks of queries
    ([200], [60]),  # whole blocks that see nothing
    ([0, 0], [0, 3]),
]


def rounding(backend: str) -> float:
    """Of weights before they are multiplied."""
    return 0.0 if backend == "eager" else roundoff(torch.bfloat16)


@pytest.mark.parametrize("lengths", RAGGED, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_against_float64(backend, device, lengths, causal):
    cu_q, cu_k = map(bounds_of, lengths)
    for dtype in served(backend):
        tensors = inputs(int(cu_q[-1]), int(cu_k[-1]), 3, dtype)
        check(device, tensors, cu_q, cu_k, causal, factor=rounding(backend))


def test_no_sequences(device):
    check(device, inputs(0, 0, 3), bounds_of([]), bounds_of([]), True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(device, dtype):
    cu_q, cu_k = bounds_of([4, 9]), bounds_of([6, 9])
    in_kernel = device.type == "cuda" and dtype == torch.float16  # a GPU serves it by Triton
    check(device, inputs(13, 15, 2, dtype), cu_q, cu_k, True, factor=roundoff(dtype) if in_kernel else 0.0)


@pytest.mark.parametrize("widths", [(16, 8, 16), (21, 6, 14), (1, 2, 1), (8, 0, 4)], ids=str)
@pytest.mark.parametrize("heads", [1, 5])
def test_toy_widths(device, widths, heads):
    cu = bounds_of([7, 12, 12])
    check(device, inputs(31, 31, heads, torch.float32, widths), cu, cu, True)


@pytest.mark.parametrize("spread", [0.0, 6.0])
def test_constant_and_peaked_weights(backend, device, spread):
    """All scores equal; and scores of several hundred, where one key takes all."""
    cu = bounds_of([40])
    for dtype in served(backend):
        check(device, inputs(40, 40, 2, dtype, spread=spread), cu, cu, True, factor=rounding(backend))


def test_a_row_without_keys_gives_zero_and_minus_infinity(backend, device):
    cu_q, cu_k = bounds_of([3, 2]).to(device), bounds_of([1, 0]).to(device)
    for dtype in served(backend):
        tensors = [t.to(device) for t in inputs(5, 1, 2, dtype)]
        out, lse = dk.mla_prefill(*tensors, cu_q, cu_k, softmax_scale=SCALE)
        empty = torch.tensor([True, True, False, True, True])
        assert (out[empty] == 0).all() and (lse[empty] == -torch.inf).all()
        close(out[2], tensors[3][0], 1e-6)
        assert lse[2].isfinite().all()


def test_strided_rows_and_nothing_else(backend, device):
    """Inputs are parts of wider tensors with NaN around them, and rows beyond the sequences are NaN."""
    for dtype in served(backend):
        strided_rows_and_nothing_else(backend, device, dtype)


def strided_rows_and_nothing_else(backend, device, dtype):
    cu_q, cu_k = torch.tensor([1, 4, 9], dtype=torch.int32), torch.tensor([2, 7, 12], dtype=torch.int32)
    q, k_nope, k_rope, v = inputs(10, 14, 3, dtype)
    wide_q, kv, wide_rope = (torch.full(s, torch.nan, dtype=dtype) for s in ((10, 4, 200), (14, 3, 256), (14, 576)))
    inside_q, inside_k = (torch.zeros(n, dtype=torch.bool) for n in (10, 14))
    inside_q[1:9], inside_k[2:12] = True, True
    wide_q[1:9, :3, 8:] = q[1:9]
    kv[2:12, :, :128], kv[2:12, :, 128:], wide_rope[2:12, 512:] = k_nope[2:12], v[2:12], k_rope[2:12]
    stores = [t.to(device).requires_grad_() for t in (wide_q, kv, wide_rope)]
    views = (stores[0][:, :3, 8:], stores[1][..., :128], stores[2][:, 512:], stores[1][..., 128:])
    out, lse = dk.mla_prefill(*views, cu_q.to(device), cu_k.to(device), softmax_scale=SCALE)
    grad_out = torch.full(out.shape, torch.nan, dtype=dtype)
    grad_out[1:9] = torch.randn(8, 3, 128).to(dtype)
    out.backward(grad_out.to(device))
    zeroed = [t.where(i.view(-1, *[1] * (t.dim() - 1)), 0) for t, i in ((q, inside_q), (k_nope, inside_k))]
    zeroed += [k_rope.where(inside_k[:, None], 0), v.where(inside_k[:, None, None], 0)]
    wanted, off = definition(*zeroed, cu_q, cu_k, grad_out.nan_to_num(), True, dtype, factor=rounding(backend))
    grads = stores[0].grad[:, :3, 8:], stores[1].grad[..., :128], stores[2].grad[:, 512:], stores[1].grad[..., 128:]
    for name, got, want, bound in zip(NAMES, (out, lse, *grads), wanted, off, strict=True):
        close(got, want, bound, name)
    assert (out[[0, 9]] == 0).all() and (lse[[0, 9]] == -torch.inf).all()


def test_keys_after_a_query_do_not_matter(backend, device):
    dtype = served(backend)[-1]
    tensors, cu = [t.to(device) for t in inputs(140, 140, 2, dtype)], bounds_of([140]).to(device)
    before = dk.mla_prefill(*tensors, cu, cu, softmax_scale=SCALE)
    for tensor in tensors[1:]:
        tensor[100:] = -3 * tensor[100:]
    after = dk.mla_prefill(*tensors, cu, cu, softmax_scale=SCALE)
    assert same_bits([t[:100] for t in before], [t[:100] for t in after])
    assert not torch.equal(before[0][100:], after[0][100:])


def test_twice_the_same_bits(backend, device):
    cu = bounds_of([30, 30, 141]).to(device)
    tensors = [t.to(device).requires_grad_() for t in inputs(201, 201, 3, served(backend)[-1])]

    def run():
        out, lse = dk.mla_prefill(*tensors, cu, cu, softmax_scale=SCALE)
        return [out.detach(), lse, *torch.autograd.grad(out, tensors, out.detach())]

    assert same_bits(run(), run())


def test_gradient_for_some_inputs_only(device):
    cu = bounds_of([9])
    tensors = inputs(9, 9, 2)
    tensors[2].requires_grad_()
    dk.mla_prefill(*tensors, cu, cu, softmax_scale=SCALE)[0].sum().backward()
    wanted, off = definition(*[t.detach() for t in tensors], cu, cu, torch.ones(9, 2, 128), True, torch.float32)
    close(tensors[2].grad, wanted[4], off[4])
    assert all(t.grad is None for t in (tensors[0], tensors[1], tensors[3]))


def test_op_contract(device):
    cu_q, cu_k = bounds_of([2, 5]).to(device), bounds_of([4, 5]).to(device)
    args = [t.to(device) for t in inputs(7, 9, 2)]
    opcheck(torch.ops.dsv3_kernels.mla_prefill.default, (*args, cu_q, cu_k, SCALE, True))
    out, lse = dk.mla_prefill(*args, cu_q, cu_k, softmax_scale=SCALE)
    backward = torch.ops.dsv3_kernels.mla_prefill_backward.default
    opcheck(backward, (torch.randn_like(out), *args, out, lse, cu_q, cu_k, SCALE, True))


def test_compiles():
    cu = bounds_of([4, 5])
    tensors = inputs(9, 9, 2)

    def attend(q, k_nope, k_rope, v):
        return dk.mla_prefill(q * 2, k_nope, k_rope, v, cu, cu, softmax_scale=SCALE)

    compiles(attend, *tensors)
    compiles_with_gradients(attend, *[t.requires_grad_() for t in tensors])


Q, KN, KR, V = inputs(6, 7, 2)
CQ, CK = bounds_of([2, 4]), bounds_of([3, 4])


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (TypeError, "q: got list", {"q": []}),
        (TypeError, "q: got dtype int32", {"q": Q.int()}),
        (TypeError, "k_nope: got dtype bfloat16, wanted float32", {"k_nope": KN.bfloat16()}),
        (TypeError, "k_rope: got dtype float64, wanted float32", {"k_rope": KR.double()}),
        (TypeError, "v: got dtype float16, wanted float32", {"v": V.half()}),
        (TypeError, "cu_seqlens_q: got dtype int64, wanted int32", {"cu_seqlens_q": CQ.long()}),
        (TypeError, "cu_seqlens_k: got dtype int64, wanted int32", {"cu_seqlens_k": CK.long()}),
        (TypeError, "softmax_scale: got Tensor, wanted a number", {"softmax_scale": torch.tensor(1.0)}),
        (TypeError, "softmax_scale: got NoneType, wanted a number", {"softmax_scale": None}),
        (ValueError, r"q: got shape \[6, 384\], wanted \[T, H, D\]", {"q": Q.flatten(1)}),
        (ValueError, r"k_rope: got shape \[7, 1, 64\], wanted \[S, R\]", {"k_rope": KR[:, None]}),
        (ValueError, r"k_nope: got shape \[7, 2, 127\], wanted \[7, 2, 128\]", {"k_nope": KN[..., 1:]}),
        (ValueError, r"k_nope: got shape \[7, 1, 128\], wanted \[7, 2, 128\]", {"k_nope": KN[:, :1]}),
        (ValueError, r"v: got shape \[6, 2, 128\], wanted \[7, 2, V\]", {"v": V[:6]}),
        (ValueError, "q: got stride 12 in the last dimension", {"q": torch.zeros(192, 2, 6).permute(2, 1, 0)}),
        (ValueError, "v: got stride 2 in the last dimension", {"v": torch.zeros(7, 2, 256)[..., ::2]}),
        (ValueError, r"cu_seqlens_q: got shape \[3, 1\], wanted \[B \+ 1\]", {"cu_seqlens_q": CQ[:, None]}),
        (ValueError, r"cu_seqlens_q: got \[0\], wanted shape", {"cu_seqlens_q": CQ[:0], "cu_seqlens_k": CK[:0]}),
        (ValueError, r"cu_seqlens_k: got shape \[2\], wanted \[3\]", {"cu_seqlens_k": CK[:2]}),
        (ValueError, "cu_seqlens_k: got strides", {"cu_seqlens_k": CK.repeat_interleave(2)[::2]}),
        (
            ValueError,
            r"cu_seqlens_q: got \[0, 2, 7\], wanted non-decreasing values in \[0, 6\]",
            {"cu_seqlens_q": CQ + (CQ > 2).int()},
        ),
        (
            ValueError,
            r"cu_seqlens_k: got \[0, 8, 7\], wanted non-decr",
            {"cu_seqlens_k": torch.tensor([0, 8, 7]).int()},
        ),
        (
            ValueError,
            r"cu_seqlens_k: got \[-1, 3, 7\], wanted non-decr",
            {"cu_seqlens_k": torch.tensor([-1, 3, 7]).int()},
        ),
        (RuntimeError, "k_rope: got device meta, wanted cpu as q", {"k_rope": KR.to("meta")}),
    ],
)
def test_rejects(error, words, changes):
    given = {"q": Q, "k_nope": KN, "k_rope": KR, "v": V, "cu_seqlens_q": CQ, "cu_seqlens_k": CK, "softmax_scale": SCALE}
    with pytest.raises(error, match=f"^mla_prefill: {words}"):
        dk.mla_prefill(**{**given, **changes})


def test_the_scale_has_no_default():
    with pytest.raises(TypeError, match="softmax_scale"):
        dk.mla_prefill(Q, KN, KR, V, CQ, CK)
