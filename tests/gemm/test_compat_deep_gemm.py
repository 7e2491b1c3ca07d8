"""Code written for DeepGEMM runs on our ops: its pairs, its outputs, its layouts."""

from __future__ import annotations

import pytest
import torch
from checks import close, same_bits

import dsv3_kernels as dk
from dsv3_kernels.compat import deep_gemm

E4M3 = torch.float8_e4m3fn


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.double() @ b.double().T


def near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Quantised operands against unquantised ones: 7e-4 is what FP8 leaves, as DeepGEMM's own tests measure it."""
    got, wanted = got.double(), wanted.double()
    assert 1 - 2 * (got * wanted).sum() / (got.square() + wanted.square()).sum() < 1e-3


def test_dense() -> None:
    x, y = torch.randn(40, 256).bfloat16(), torch.randn(128, 256).bfloat16()
    a, b = deep_gemm.per_token_cast_to_fp8(x, use_ue8m0=False), deep_gemm.per_block_cast_to_fp8(y, use_ue8m0=False)
    d = torch.empty(40, 128, dtype=torch.bfloat16)
    assert deep_gemm.fp8_gemm_nt(a, b, d, recipe=(1, 128, 128), compiled_dims="mn") is None
    near(d, product(x, y))
    assert same_bits(d, dk.fp8_gemm(*a, *b))
    for call, left, right in (
        (deep_gemm.fp8_gemm_nn, a, (b[0].T, b[1].T)),
        (deep_gemm.fp8_gemm_tt, (a[0].T, a[1].T), b),
        (deep_gemm.fp8_gemm_tn, (a[0].T, a[1].T), (b[0].T, b[1].T)),
    ):
        again = torch.empty_like(d)
        call(left, right, again)
        assert same_bits(again, d)


def test_accumulation() -> None:
    a, b = (deep_gemm.per_token_cast_to_fp8(torch.randn(n, 256), True) for n in (24, 32))
    c, d = torch.randn(24, 32), torch.empty(24, 32)
    wanted = dk.dequantize(*a, dtype=torch.float32).double() @ dk.dequantize(*b, dtype=torch.float32).double().T + c
    deep_gemm.fp8_gemm_nt(a, b, d, c, recipe=(1, 1, 128))
    close(d, wanted, 1e-4)
    deep_gemm.fp8_gemm_nt(a, b, c, c)
    assert same_bits(c, d)


@pytest.mark.parametrize("layout", [[0] * 5 + [-1] * 3 + [1] * 8 + [3] * 2 + [-1] * 6, [-1] * 3 + [2] * 4, [-1] * 4])
def test_contiguous_groups(layout: list[int]) -> None:
    x, w = torch.randn(len(layout), 256), torch.randn(4, 64, 256)
    a, b = deep_gemm.per_token_cast_to_fp8(x, False), dk.quantize_128x128(w)
    d = torch.full((len(layout), 64), torch.nan, dtype=torch.bfloat16)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, torch.tensor(layout, dtype=torch.int32))
    again = torch.full_like(d, torch.nan)
    deep_gemm.m_grouped_fp8_gemm_nn_contiguous(a, (b[0].mT, b[1].mT), again, torch.tensor(layout, dtype=torch.int32))
    for row, group in enumerate(layout):
        if group >= 0:
            wanted = dk.fp8_gemm(a[0][row : row + 1], a[1][row : row + 1], b[0][group], b[1][group])
            assert same_bits(d[row : row + 1], wanted) and same_bits(again[row : row + 1], wanted)


def test_masked_groups() -> None:
    x, w, counts = torch.randn(3, 10, 128), torch.randn(3, 32, 128), torch.tensor([4, 0, 10], dtype=torch.int32)
    a, b = dk.quantize_1x128(x), dk.quantize_128x128(w)
    d = torch.full((3, 10, 32), torch.nan, dtype=torch.bfloat16)
    deep_gemm.m_grouped_fp8_gemm_nt_masked(a, b, d, counts, 5)
    assert same_bits(
        d.nan_to_num(7), dk.fp8_masked_gemm(*a, *b, counts, out=torch.full_like(d, torch.nan)).nan_to_num(7)
    )
    assert deep_gemm.fp8_m_grouped_gemm_nt_masked is deep_gemm.m_grouped_fp8_gemm_nt_masked


def test_weight_gradients() -> None:
    """As its users make the operands: cast by channel, each group transposed and flattened."""
    ks, m, n = [128, 0, 256], 16, 24
    x, y = torch.randn(sum(ks), m), torch.randn(sum(ks), n)
    flat = []
    for values in (x, y):
        codes, scales = deep_gemm.per_channel_cast_to_fp8(values, False)
        assert codes.shape == values.shape and scales.shape == (3, values.shape[1])
        parts = [part.T.flatten() for part in codes.view(torch.uint8).split(ks)]
        flat.append((torch.cat(parts).view(E4M3), scales.T))
    c = torch.randn(3, m, n)
    d = c.clone()
    deep_gemm.k_grouped_fp8_gemm_nt_contiguous(*flat, d, ks, torch.tensor(ks, dtype=torch.int32), d)
    for group, (u, v) in enumerate(zip(x.split(ks), y.split(ks), strict=True)):
        if ks[group]:
            near(d[group] - c[group], product(u.T, v.T))
        else:
            assert same_bits(d[group], c[group])
    fresh = torch.full_like(c, torch.nan)
    deep_gemm.k_grouped_fp8_gemm_nt_contiguous(*flat, fresh, ks, torch.tensor(ks, dtype=torch.int32))
    assert not fresh[1].any()
    close(fresh + c, d, 1e-4)


def test_casts_and_layouts() -> None:
    x = torch.randn(130, 300).bfloat16()
    for ue8m0 in (False, True):
        q, scale = deep_gemm.per_token_cast_to_fp8(x, ue8m0)
        assert same_bits((q, scale), dk.quantize_1x128(x, pow2_scale=ue8m0)) and scale.stride() == (1, 132)
        assert same_bits(deep_gemm.per_block_cast_to_fp8(x, ue8m0), dk.quantize_128x128(x, pow2_scale=ue8m0))
    aligned = deep_gemm.get_mn_major_tma_aligned_tensor(scale.contiguous())
    assert torch.equal(aligned, scale) and aligned.stride() == (1, 132)
    assert deep_gemm.get_tma_aligned_size(130, 4) == 132 and deep_gemm.get_mk_alignment_for_contiguous_layout() == 128


def test_number_of_sms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_gemm, "_num_sms", None)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="get_num_sms: nothing was set"):
            deep_gemm.get_num_sms()
    deep_gemm.set_num_sms(20)
    assert deep_gemm.get_num_sms() == 20
    with pytest.raises(ValueError, match="set_num_sms: new_num_sms: got 0"):
        deep_gemm.set_num_sms(0)


A, B, D = dk.quantize_1x128(torch.ones(4, 128)), dk.quantize_128x128(torch.ones(2, 8, 128)), torch.zeros(4, 8)
DENSE = B[0][0], B[1][0]
ROWS = torch.zeros(4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (TypeError, "fp8_gemm_nt: a: got Tensor, wanted a pair", lambda: deep_gemm.fp8_gemm_nt(A[0], DENSE, D)),
        (
            TypeError,
            r"fp8_gemm_nt: b\[1\]: got dtype int32",
            lambda: deep_gemm.fp8_gemm_nt(A, (DENSE[0], DENSE[1].int()), D),
        ),
        (ValueError, "fp8_gemm_nt: recipe: got", lambda: deep_gemm.fp8_gemm_nt(A, DENSE, D, recipe=(1, 1, 32))),
        (ValueError, "fp8_gemm_nt: recipe_b: got", lambda: deep_gemm.fp8_gemm_nt(A, DENSE, D, recipe_b=(1, 32))),
        (ValueError, "fp8_gemm: b: got stride", lambda: deep_gemm.fp8_gemm_nn(A, (DENSE[0].view(128, 8), DENSE[1]), D)),
        (
            ValueError,
            "m_grouped_fp8_gemm_nt_contiguous: grouped_layout: groups fall",
            lambda: deep_gemm.m_grouped_fp8_gemm_nt_contiguous(A, B, D, 1 - torch.arange(4).int() // 2),
        ),
        (
            ValueError,
            "m_grouped_fp8_gemm_nt_contiguous: use_psum_layout: got True",
            lambda: deep_gemm.m_grouped_fp8_gemm_nt_contiguous(A, B, D, ROWS, use_psum_layout=True),
        ),
        (ValueError, "per_token_cast_to_fp8: gran_k: got 32", lambda: deep_gemm.per_token_cast_to_fp8(D, False, 32)),
        (ValueError, "per_channel_cast_to_fp8: x: got 4", lambda: deep_gemm.per_channel_cast_to_fp8(D, False)),
        (
            ValueError,
            "k_grouped_fp8_gemm_nt_contiguous: ks_cpu: got 100",
            lambda: deep_gemm.k_grouped_fp8_gemm_nt_contiguous(A, A, torch.zeros(1, 4, 8), [100], ROWS),
        ),
        (AttributeError, "has no 'bf16_gemm_nt'; it has fp8_gemm_nn", lambda: deep_gemm.bf16_gemm_nt),
    ],
)
def test_refused_in_words(error, words, call) -> None:
    with pytest.raises(error, match=words):
        call()
