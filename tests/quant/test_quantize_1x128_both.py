"""quantize_1x128_both is quantize_1x128 of x and of every group's transpose, bit for bit."""

from __future__ import annotations

import pytest
import torch
from checks import compiles, opcheck, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import dsv3_kernels as dk

OP = "quantize_1x128_both"
E4M3 = torch.float8_e4m3fn


def uneven(*shape: int) -> torch.Tensor:
    return torch.randn(shape) * torch.exp(2 * torch.randn(shape[0], 1)) * torch.exp(2 * torch.randn(shape[1]))


def bounds(counts, device="cpu") -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32, device=device)


@dk.backend("eager")
def quantized(x, pow2_scale):
    """The reference, on the device of x whatever is tested."""
    return dk.quantize_1x128(x, pow2_scale=pow2_scale)


def check(got, x, counts, pow2_scale):
    """Everything that belongs to a group; the rest is unspecified."""
    q, scale, q_t, scale_t, offsets_t = got
    used, start, column = sum(counts), 0, 0
    wanted = quantized(x[:used], pow2_scale)
    assert same_bits((q[:used], scale[:used].contiguous()), (wanted[0], wanted[1].contiguous()))
    for group, count in enumerate(counts):
        if offsets_t is not None:
            assert offsets_t[group] == column
        width = -(-count // 128) * 128
        tokens = torch.nn.functional.pad(x[start : start + count], (0, 0, 0, width - count))
        wanted = quantized(tokens.t().contiguous(), pow2_scale)
        theirs = q_t[:, column : column + width], scale_t[:, column // 128 : (column + width) // 128]
        assert same_bits([t.contiguous() for t in theirs], [t.contiguous() for t in wanted])
        start, column = start + count, column + width
    assert offsets_t is None or offsets_t[-1] == column


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(128, 128), (5, 300), (257, 136), (1, 1)])
@pytest.mark.parametrize("pow2_scale", [False, True])
def test_without_groups(backend, device, dtype, shape, pow2_scale):
    x = uneven(*shape).to(dtype).to(device)
    got = dk.quantize_1x128_both(x, pow2_scale=pow2_scale)
    tokens, columns = -(-shape[0] // 128) * 128, shape[1]
    assert got[2].shape == (columns, tokens) and got[3].shape == (columns, tokens // 128) and got[4] is None
    assert got[0].is_contiguous() and got[2].is_contiguous()
    assert got[1].stride() == (1, -(-shape[0] // 4) * 4) and got[3].stride() == (1, -(-columns // 4) * 4)
    check(got, x, [shape[0]], pow2_scale)


@pytest.mark.parametrize("counts", [(128, 256), (0, 1, 0, 130, 7, 0), (5,), (0, 0), (), (127, 129)])
@pytest.mark.parametrize(("spare", "pow2_scale"), [(0, False), (9, True), (9, False)])
def test_groups(backend, device, counts, spare, pow2_scale):
    """Rows past the last group hold NaN, which no group sees."""
    tokens = sum(counts) + spare
    x = uneven(tokens, 136)
    x[sum(counts) :] = torch.nan
    got = dk.quantize_1x128_both(x.to(device), offsets=bounds(counts, device), pow2_scale=pow2_scale)
    width = -(-(tokens + 127 * len(counts)) // 128) * 128
    assert got[2].shape == (136, width) and got[3].shape == (136, width // 128) and got[4].dtype is torch.int32
    check([t.cpu() for t in got], x, counts, pow2_scale)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([0, 1, 2, 100, 127, 128, 129, 300]), max_size=6), st.integers(0, 2**31))
def test_any_groups(counts, seed):
    x = torch.randn(sum(counts) + 3, 17, generator=torch.Generator().manual_seed(seed))
    check(dk.quantize_1x128_both(x, offsets=bounds(counts)), x, counts, False)


def test_padding_is_zero_with_finite_scales(backend, device):
    q_t, scale_t, offsets_t = dk.quantize_1x128_both(uneven(30, 40).to(device), offsets=bounds((10, 20), device))[2:]
    assert offsets_t.tolist() == [0, 128, 256]
    assert not q_t[:, 10:128].float().any() and not q_t[:, 148:256].float().any() and scale_t[:, :2].isfinite().all()


def test_poison_stays_in_its_blocks(backend, device):
    x, offsets = uneven(300, 256).to(device), bounds((150, 150), device)
    clean = dk.quantize_1x128_both(x, offsets=offsets)
    x[140, 7] = torch.nan
    q, scale, q_t, scale_t, _ = got = dk.quantize_1x128_both(x, offsets=offsets)
    assert scale[140, 0].isnan() and scale_t[7, 1].isnan()
    assert (q.view(torch.uint8)[140, :128] == 0x7F).all() and (q_t.view(torch.uint8)[7, 128:150] == 0x7F).all()
    q[140, :128], scale[140, 0] = clean[0][140, :128], clean[1][140, 0]
    q_t[7, 128:256], scale_t[7, 1] = clean[2][7, 128:256], clean[3][7, 1]
    owned = [[t[0], t[1], t[2][:, :512], t[3][:, :4]] for t in (got, clean)]
    assert same_bits(*owned)


@pytest.mark.parametrize("grouped", [False, True])
def test_given_outputs_and_nothing_else_read_or_written(backend, device, grouped):
    store = torch.full((60, 400), torch.nan, device=device)
    store[:50, :300] = uneven(50, 300)
    x, offsets = store[:50, :300], bounds((20, 30), device) if grouped else None
    width = 384 if grouped else 128
    codes = [torch.full((n + 2, m), 0x55, dtype=torch.uint8, device=device) for n, m in ((50, 300), (300, width))]
    scales = [torch.full((m + 1, n + 1), -1.0, device=device) for n, m in ((50, 3), (300, width // 128))]
    offsets_t = torch.full((5,), -1, dtype=torch.int32, device=device)
    out = (
        codes[0][1:-1].view(E4M3),
        scales[0].t()[:50, :3],
        codes[1][1:-1].view(E4M3),
        scales[1].t()[:300, : width // 128],
    )
    out = (*out, offsets_t[1:4] if grouped else None)
    assert dk.quantize_1x128_both(x, offsets=offsets, out=out) is out
    check(out, x, [20, 30] if grouped else [50], False)
    assert all((t[[0, -1]] == 0x55).all() for t in codes) and (offsets_t[[0, 4]] == -1).all()
    assert all((t[-1] == -1).all() and (t[:, -1] == -1).all() for t in scales)


@pytest.mark.parametrize("shape", [(0, 256), (3, 0), (0, 0)])
@pytest.mark.parametrize("counts", [None, (0, 0)])
def test_empty(device, shape, counts):
    offsets = None if counts is None else bounds(counts, device)
    q, scale, q_t, scale_t, _ = dk.quantize_1x128_both(torch.empty(shape, device=device), offsets=offsets)
    assert q.shape == shape and scale.shape == (shape[0], -(-shape[1] // 128))
    assert q_t.shape[0] == scale_t.shape[0] == shape[1] and q_t.shape[1] == 128 * scale_t.shape[1]


def test_the_offsets_stay_on_the_device():
    """On tensors without values, anything that read one would raise."""
    from dsv3_kernels.quant import _eager

    with FakeTensorMode():
        _eager.quantize_1x128_both(torch.randn(40, 64), torch.zeros(3, dtype=torch.int32), False)


def test_twice_the_same_bits(backend, device):
    x, offsets = uneven(300, 130).to(device), bounds((100, 200), device)

    def run():
        q, scale, q_t, scale_t, offsets_t = dk.quantize_1x128_both(x, offsets=offsets)
        return q, scale, q_t[:, :384], scale_t[:, :3].contiguous(), offsets_t

    assert same_bits(run(), run())


def test_op_contract(device):
    x = uneven(40, 130).to(device)
    for offsets in (None, bounds((10, 30), device)):
        opcheck(torch.ops.dsv3_kernels.quantize_1x128_both.default, (x, offsets, False))
        out = torch.ops.dsv3_kernels.quantize_1x128_both(x, offsets, False)
        opcheck(torch.ops.dsv3_kernels.quantize_1x128_both_out.default, (x, offsets, True, *out))


def test_compiles():
    offsets = bounds((10, 30))
    compiles(lambda x: dk.quantize_1x128_both(x * 2, offsets=offsets), uneven(40, 130))


X, OFFSETS = torch.zeros(4, 256), torch.zeros(3, dtype=torch.int32)
Q, S, QT, ST = torch.zeros(4, 256).to(E4M3), torch.zeros(4, 2), torch.zeros(256, 128).to(E4M3), torch.zeros(256, 1)
QG, SG, OG = torch.zeros(256, 384).to(E4M3), torch.zeros(256, 3), torch.zeros(3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "words", "x", "kwargs"),
    [
        (TypeError, "x: got dtype int64", X.long(), {}),
        (ValueError, r"x: got shape \[1, 4, 256\], wanted \[T, K\]", X[None], {}),
        (ValueError, "x: got stride 4 in the last dimension", torch.zeros(256, 4).t(), {}),
        (TypeError, "offsets: got dtype int64, wanted int32", X, {"offsets": OFFSETS.long()}),
        (ValueError, r"offsets: got shape \[1, 3\]", X, {"offsets": OFFSETS[None]}),
        (ValueError, "offsets: got 0, wanted at least one element", X, {"offsets": OFFSETS[:0]}),
        (ValueError, "offsets: got strides", X, {"offsets": torch.zeros(6, dtype=torch.int32)[::2]}),
        (RuntimeError, "offsets: got device meta", X, {"offsets": OFFSETS.to("meta")}),
        (ValueError, "out: got 2, wanted 5 tensors", X, {"out": (Q, S)}),
        (TypeError, r"out\[0\]: got dtype float32", X, {"out": (X.clone(), S, QT, ST, None)}),
        (ValueError, r"out\[1\]: got shape \[4, 1\], wanted \[4, 2\]", X, {"out": (Q, S[:, 1:], QT, ST, None)}),
        (ValueError, r"out\[2\]: got shape \[256, 384\], wanted \[256, 128\]", X, {"out": (Q, S, QG, SG, None)}),
        (TypeError, r"out\[3\]: got dtype bfloat16", X, {"out": (Q, S, QT, ST.bfloat16(), None)}),
        (ValueError, r"out\[4\]: got 'Tensor', wanted None without offsets", X, {"out": (Q, S, QT, ST, OG)}),
        (TypeError, r"out\[4\]: got NoneType", X, {"offsets": OFFSETS, "out": (Q, S, QG, SG, None)}),
        (ValueError, r"out\[4\]: got shape \[2\]", X, {"offsets": OFFSETS, "out": (Q, S, QG, SG, OG[1:])}),
        (ValueError, r"out\[4\]: shares memory with offsets", X, {"offsets": OG, "out": (Q, S, QG, SG, OG)}),
        (ValueError, r"out\[3\]: shares memory with x", X, {"out": (Q, S, QT, X.view(-1)[:256].view(256, 1), None)}),
        (RuntimeError, "q_t: got device meta", X, {"out": (Q, S, QT.to("meta"), ST, None)}),
    ],
)
def test_rejects(error, words, x, kwargs):
    with pytest.raises(error, match=f"^quantize_1x128_both: {words}"):
        dk.quantize_1x128_both(x, **kwargs)
