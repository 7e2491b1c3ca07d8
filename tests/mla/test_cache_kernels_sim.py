"""The row-wise mla kernels through the simulator: which one runs, the bits of eager, and what no caller should pass."""

from __future__ import annotations

import pytest
import torch
from checks import same_bits
from latent_cache import FP8, empty, filled
from simulated import launches, needs_simulator

import dsv3_kernels as dk
from dsv3_kernels.mla import _cuda, _eager

pytestmark = needs_simulator

TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.values())
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("width", [64, 20, 16])  # groups of four pairs; pair by pair; both, by layout
@pytest.mark.parametrize("offset", [0, 1])  # 1: rows that no vector access may touch
def test_rope_has_the_bits_of_eager(dtype, interleaved, width, offset):
    store = torch.full((37, 3, width + 8), torch.nan, dtype=dtype)
    x = store[..., offset : offset + width]
    x.copy_(torch.randn(x.shape) * torch.exp2(torch.randint(-20, 12, x.shape)))
    positions, cos_sin = torch.randint(0, 50, (37,)), torch.randn(50, width)
    for transposed in (False, True):
        out = torch.full(x.shape, torch.nan, dtype=dtype)
        with launches(f"rope_{TYPES[dtype]}"):
            _cuda.rope(x, positions, cos_sin, interleaved, transposed, out)
        assert same_bits(out, _eager.rope(x, positions, cos_sin, interleaved, transposed))


def test_rope_outside_the_table_is_nan():
    x, positions = torch.randn(6, 64), torch.tensor([0, -1, 9, 10, 2**40, -(2**63)])
    out = torch.empty(6, 64)
    with launches("rope_f32"):
        _cuda.rope(x, positions, torch.ones(10, 64), True, False, out)
    assert out.isfinite().all(1).tolist() == [True, False, True, False, False, False] and int(out.isnan().sum()) == 256


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_append_skips_slots_outside_the_cache(dtype):
    cache = empty(3, 16, 576, dtype)
    slots = torch.tensor([48, 2**40, -1, -(2**63), 47])
    latent, k_rope = torch.randn(5, 512).bfloat16(), torch.randn(5, 64).bfloat16()
    wanted = cache.clone()
    _eager.mla_cache_append(wanted, slots[4:], latent[4:], k_rope[4:], False)
    with launches("mla_cache_append_fp8_bf16" if dtype == FP8 else "mla_cache_append_copy"):
        _cuda.mla_cache_append(cache, slots, latent, k_rope, False)
    assert same_bits(cache, wanted)


@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.values())
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("pow2_scale", [False, True])
def test_append_fp8_has_the_bits_of_eager(dtype, offset, pow2_scale):
    """Every exponent that the dtype has, subnormals, zeros, NaN and infinities, from rows aligned or not."""
    tiny, huge = (-24, 15) if dtype == torch.float16 else (-140, 126)
    store = torch.full((9, 700), torch.nan, dtype=dtype)
    latent, k_rope = store[:, offset : offset + 512], store[:, offset + 520 : offset + 584]
    exponents = torch.linspace(tiny, huge, 9).round()[:, None] + torch.randint(-9, 1, (9, 512))
    latent.copy_(torch.randn(9, 512) * torch.exp2(exponents.double()).float())
    k_rope.copy_(torch.randn(9, 64))
    latent[2, :128], latent[3, 130], latent[4, 300] = 0, torch.nan, -torch.inf
    slots = torch.randperm(32)[:9]
    ours, wanted = empty(2, 16, 576, FP8), empty(2, 16, 576, FP8)
    _eager.mla_cache_append(wanted, slots, latent, k_rope, pow2_scale)
    with launches(f"mla_cache_append_fp8_{TYPES[dtype]}"):
        _cuda.mla_cache_append(ours, slots, latent, k_rope, pow2_scale)
    assert same_bits(ours, wanted)


def test_gather_decodes_every_code():
    """All 256 codes under scales that are powers of two, that are not, that are zero and that are subnormal."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(16, 2)
    scales = torch.tensor([1.0, 0.0, 2.0**-140, 3e-3, 7.7e4, 1e36, -1.3, 2.0**-9]).repeat(8).view(16, 4)
    rope = torch.randn(16, 64).bfloat16()
    cache = torch.cat([codes, scales.view(torch.uint8), rope.view(torch.uint8)], 1).view(1, 16, 656)
    args = cache, torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 16], dtype=torch.int32), 16, 512
    latent, k_rope = torch.empty(16, 512).bfloat16(), torch.empty(16, 64).bfloat16()
    with launches("mla_cache_gather_fp8"):
        _cuda.mla_cache_gather(*args, latent, k_rope)
    wanted = _eager.mla_cache_gather(*args)
    assert torch.equal(latent.isnan(), wanted[0].isnan())  # which NaN is nobody's promise
    assert same_bits(latent.nan_to_num(7.0), wanted[0].nan_to_num(7.0)) and same_bits(k_rope, wanted[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_gather_outside_the_cache_is_zero(dtype):
    cache, table, _, keys = filled([40, 20], 16, dtype)
    table[0, 1], table[1, 1] = 2147480000, -1
    bounds = torch.tensor([2, 42, 120], dtype=torch.int32)  # the second request asks for more pages than the table has
    latent, k_rope = (torch.full((130, width), torch.nan).bfloat16() for width in (512, 64))
    with launches("mla_cache_gather_fp8" if dtype == FP8 else "mla_cache_gather_copy"):
        _cuda.mla_cache_gather(cache, table[:, :3], bounds, 130, 512, latent, k_rope)
    wanted = torch.zeros(130, 576).double()
    wanted[2:18], wanted[34:42], wanted[42:58] = keys[0][:16], keys[0][32:], keys[1][:16]
    assert same_bits(torch.cat([latent, k_rope], 1)[:74], wanted.bfloat16()[:74])
    assert (latent[90:] == 0).all() and (k_rope[90:] == 0).all()


@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.values())
@pytest.mark.parametrize("columns", [128, 13])
def test_merge_is_eager_but_for_exp_and_log(dtype, columns):
    """Equal weights need neither: every other step is rounded as eager rounds it."""
    outs = [torch.randn(9, 2, columns).to(dtype) for _ in range(2)]
    lse = torch.randn(9, 2)
    out, merged = torch.empty(9, 2, columns, dtype=dtype), torch.empty(9, 2)
    with launches(f"merge_attention_{TYPES[dtype]}"):
        _cuda.merge_attention(outs[0], lse, outs[1], lse, out, merged)
    assert same_bits((out, merged), _eager.merge_attention(outs[0], lse, outs[1], lse))


def test_float64_and_odd_addresses_are_for_eager():
    with dk.backend("sim:cuda"):
        with pytest.raises(RuntimeError, match="float64: only the eager backend"):
            dk.rope(torch.zeros(1, 8).double(), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 8).double())
        with pytest.raises(RuntimeError, match="float64: only the eager backend"):
            dk.merge_attention(*[torch.zeros(2, 8).double(), torch.zeros(2).double()] * 2)
        store = torch.zeros(16 * 656 + 4, dtype=torch.uint8)[4:].view(1, 16, 656)
        with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
            dk.mla_cache_gather(store, torch.zeros(1, 1).int(), torch.tensor([0, 1]).int(), 1)
