"""mla_cache_gather against the keys that were stored, exactly."""

from __future__ import annotations

import pytest
import torch
from checks import compiles, opcheck, same_bits
from latent_cache import FP8, empty, filled

import dsv3_kernels as dk

OP = "mla_cache_gather"


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, FP8])
@pytest.mark.parametrize("page", [16, 32, 64, 128])
@pytest.mark.parametrize("spare", [0, 5])
def test_whole_requests(backend, device, dtype, page, spare):
    lengths = [1, 0, page, 2 * page + 3, 0, 0, 15, 0]
    cache, table, _, keys = filled(lengths, page, dtype)
    total = sum(lengths) + spare
    got = dk.mla_cache_gather(cache.to(device), table.to(device), bounds(lengths).to(device), total)
    real = torch.bfloat16 if dtype == FP8 else dtype
    # A code times its scale is exact in float64: bfloat16 rounds it once (twice through float32, with the same result).
    wanted = torch.cat([*keys, torch.zeros(spare, 576).double()]).float().to(real)
    assert got[0].is_contiguous() and got[1].is_contiguous()
    assert same_bits([t.cpu() for t in got], [wanted[:, :512].contiguous(), wanted[:, 512:].contiguous()])


def test_the_first_tokens_of_longer_requests(backend, device):
    cache, table, _, keys = filled([40, 70], 32, torch.bfloat16)
    table[0, 1], table[1, 1:] = 2147480000, -7  # not asked for
    latent, k_rope = dk.mla_cache_gather(cache.to(device), table.to(device), bounds([32, 9]).to(device), 41)
    wanted = torch.cat([keys[0][:32], keys[1][:9]]).bfloat16()
    assert same_bits(torch.cat([latent, k_rope], 1).cpu(), wanted)


@pytest.mark.parametrize("widths", [(16, 8), (21, 6), (5, 0)], ids=str)
def test_toy_widths(device, widths):
    cache, table, _, keys = filled([17, 3], 16, torch.float32, sum(widths), widths[0])
    latent, k_rope = dk.mla_cache_gather(cache, table, bounds([17, 3]), 20, latent=widths[0])
    assert latent.shape == (20, widths[0]) and k_rope.shape == (20, widths[1])
    assert same_bits(torch.cat([latent, k_rope], 1), torch.cat(keys).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_what_was_appended_comes_back(backend, device, dtype):
    cache = empty(4, 16, 576, dtype).to(device)
    latent, k_rope = torch.randint(-8, 9, (20, 512)).bfloat16() * 64, torch.randn(20, 64).bfloat16()
    latent[:, ::128] = 448  # a scale of 1 for the FP8 format, and codes that hold these values
    latent, k_rope = latent.clamp(-448, 448), k_rope
    table = torch.tensor([[2, 0]], dtype=torch.int32)
    slots = torch.cat([torch.arange(32, 48), torch.arange(4)])
    dk.mla_cache_append(cache, slots.to(device), latent.to(device), k_rope.to(device))
    got = dk.mla_cache_gather(cache, table.to(device), bounds([20]).to(device), 20)
    assert same_bits([t.cpu() for t in got], [latent, k_rope])


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_empty(backend, device, dtype):
    cache = empty(2, 16, 576, dtype).to(device)
    none = torch.zeros(0, 3, dtype=torch.int32, device=device)
    start = torch.zeros(1, dtype=torch.int32, device=device)
    latent, k_rope = dk.mla_cache_gather(cache, none, start, 0)
    assert latent.shape == (0, 512) and k_rope.shape == (0, 64)
    latent, _ = dk.mla_cache_gather(cache, none, start, 4)
    assert torch.equal(latent, torch.zeros_like(latent)) and latent.shape == (4, 512)
    latent, _ = dk.mla_cache_gather(cache[:0], none.new_zeros(2, 0), start.repeat(3), 1)
    assert torch.equal(latent, torch.zeros_like(latent))


def test_op_contract(device):
    for dtype in (torch.bfloat16, FP8):
        cache, table, _, _ = filled([5, 20], 16, dtype)
        cache = cache if dtype == FP8 else cache.nan_to_num()
        tensors = (t.to(device) for t in (cache, table, bounds([5, 20])))
        opcheck(torch.ops.dsv3_kernels.mla_cache_gather.default, (*tensors, 27, 512))


def test_compiles():
    cache, table, _, _ = filled([5, 20], 16, FP8)
    compiles(lambda c: dk.mla_cache_gather(c, table, bounds([5, 20]), 25), cache)


C, C8 = torch.zeros(4, 16, 576), torch.zeros(4, 16, 656, dtype=torch.uint8)
TABLE, CU = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32), bounds([5, 20])


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (TypeError, "kv_cache: got dtype int8", {"kv_cache": C8.view(torch.int8)}),
        (TypeError, "block_table: got dtype int64, wanted int32", {"block_table": TABLE.long()}),
        (TypeError, "cu_seqlens: got dtype int64, wanted int32", {"cu_seqlens": CU.long()}),
        (TypeError, "total: got Tensor, wanted an int", {"total": CU[-1]}),
        (TypeError, "latent: got str, wanted an int", {"latent": "512"}),
        (ValueError, "kv_cache: got 8, wanted a page", {"kv_cache": C[:, :8]}),
        (ValueError, r"block_table: got shape \[1, 2\], wanted \[2, P\]", {"block_table": TABLE[:1]}),
        (ValueError, "block_table: got stride 2 in the last", {"block_table": TABLE.t().contiguous().t()}),
        (ValueError, r"cu_seqlens: got shape \[1, 3\]", {"cu_seqlens": CU[None]}),
        (ValueError, r"cu_seqlens: got \[0\], wanted shape \[B \+ 1\]", {"cu_seqlens": CU[:0]}),
        (ValueError, "cu_seqlens: got strides", {"cu_seqlens": CU.repeat_interleave(2)[::2]}),
        (ValueError, "total: got -1, wanted at least 0", {"total": -1}),
        (ValueError, r"cu_seqlens: got 25, wanted values in \[0, 25\)", {"total": 24}),
        (ValueError, r"cu_seqlens, differences: got -3, wanted", {"cu_seqlens": torch.tensor([0, 5, 2]).int()}),
        (
            ValueError,
            r"cu_seqlens, differences: got 33, wanted values in \[0, 33\)",
            {"cu_seqlens": bounds([33, 0]), "total": 99},
        ),
        (ValueError, r"block_table: got 4, wanted values in \[0, 4\)", {"block_table": TABLE + 1}),
        (ValueError, "latent: got 0, wanted at least 1", {"latent": 0}),
        (ValueError, "latent: got 577, wanted at most 576", {"latent": 577}),
        (ValueError, "latent: got 500, wanted 512, what the FP8 format holds", {"kv_cache": C8, "latent": 500}),
        (RuntimeError, "block_table: got device meta, wanted cpu as kv_cache", {"block_table": TABLE.to("meta")}),
    ],
)
def test_rejects(error, words, changes):
    with pytest.raises(error, match=f"^mla_cache_gather: {words}"):
        dk.mla_cache_gather(**{"kv_cache": C, "block_table": TABLE, "cu_seqlens": CU, "total": 25, **changes})
