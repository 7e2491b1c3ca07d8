"""mla_cache_append, bit for bit."""

from __future__ import annotations

import pytest
import torch
from checks import compiles, opcheck, same_bits
from latent_cache import empty, encode

import dsv3_kernels as dk

OP = "mla_cache_append"


def tokens(count, dtype, latent=512, rope=64):
    return (torch.randn(count, latent) * torch.exp(torch.randn(count, 1) * 3)).to(dtype), torch.randn(count, rope).to(
        dtype
    )


@pytest.mark.parametrize("page", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("widths", [(512, 64), (16, 8), (21, 6)], ids=str)
def test_float_caches(backend, device, page, dtype, widths):
    cache = empty(3, page, sum(widths), dtype)
    latent, k_rope = tokens(9, dtype, *widths)
    slots = torch.randperm(3 * page)[:9]
    slots[[2, 5]] = -1
    wanted = cache.clone()
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            wanted[slot // page, slot % page] = torch.cat([latent[t], k_rope[t]])
    ours = cache.to(device)
    assert dk.mla_cache_append(ours, slots.to(device), latent.to(device), k_rope.to(device)) is None
    assert same_bits(ours.cpu(), wanted)


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("pow2_scale", [False, True])
def test_the_fp8_format(backend, device, page, dtype, pow2_scale):
    cache = empty(4, page, 0, torch.uint8)
    latent, k_rope = tokens(11, dtype)
    latent[3] = 0
    latent[4, 130] = torch.nan  # one block of one token, and no other
    slots = torch.randperm(4 * page)[:11]
    slots[7] = -1
    rows = encode(latent, k_rope, pow2_scale)
    wanted = cache.clone()
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            wanted[slot // page, slot % page] = rows[t]
    ours = cache.to(device)
    dk.mla_cache_append(ours, slots.to(device), latent.to(device), k_rope.to(device), pow2_scale=pow2_scale)
    assert torch.equal(ours.cpu(), wanted)
    nans = wanted[slots[4] // page, slots[4] % page]
    assert (nans[128:256] == 0x7F).all() and nans[516:520].clone().view(torch.float32).isnan().all()


def test_codes_are_those_of_quantize_1x128(backend, device):
    latent, k_rope = (t.to(device) for t in tokens(5, torch.bfloat16))
    cache = empty(1, 16, 0, torch.uint8).to(device)
    dk.mla_cache_append(cache, torch.arange(5, device=device), latent, k_rope)
    q, scale = dk.quantize_1x128(latent, scale_layout="k")
    assert same_bits(cache[0, :5, :512].contiguous(), q.view(torch.uint8))
    assert same_bits(cache[0, :5, 512:528].contiguous(), scale.view(torch.uint8))


def test_strided_inputs_and_pages_apart(backend, device):
    """The latent and the rotary key are parts of one wide row, the pages those of one layer of many."""
    wide = torch.full((5, 700), torch.nan, dtype=torch.bfloat16, device=device)
    wide[:, :512], wide[:, 600:664] = (t.to(device) for t in tokens(5, torch.bfloat16))
    store = empty(4, 16, 576, torch.bfloat16).view(2, 2, 16, 576).transpose(0, 1).to(device)[1]
    assert not store.is_contiguous()
    slots = torch.tensor([31, 0, 16, -1, 5], device=device)
    dk.mla_cache_append(store, slots, wide[:, :512], wide[:, 600:664])
    flat = store.reshape(32, 576)
    assert same_bits(flat[slots[slots >= 0]], torch.cat([wide[:, :512], wide[:, 600:664]], 1)[slots >= 0])
    assert int(flat.isnan().all(1).sum()) == 28


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_empty_and_all_skipped(backend, device, dtype):
    cache = empty(1, 16, 576, dtype).to(device)
    before = cache.clone()
    for count in (0, 3):
        latent, k_rope = (t.to(device) for t in tokens(count, torch.bfloat16))
        dk.mla_cache_append(cache, torch.full((count,), -1, device=device), latent, k_rope)
    assert same_bits(cache, before)


def test_op_contract(device):
    op = torch.ops.dsv3_kernels.mla_cache_append.default
    for dtype in (torch.bfloat16, torch.uint8):
        cache = torch.zeros_like(empty(2, 16, 576, dtype)).to(device)
        latent, k_rope = (t.to(device) for t in tokens(3, torch.bfloat16))
        opcheck(op, (cache, torch.tensor([3, -1, 20], device=device), latent, k_rope, False))


def test_compiles():
    latent, k_rope = tokens(3, torch.bfloat16)

    def append(latent, k_rope):
        cache = torch.zeros(2, 16, 656, dtype=torch.uint8)
        dk.mla_cache_append(cache, torch.tensor([3, -1, 20]), latent * 2, k_rope)
        return cache

    compiles(append, latent, k_rope)


C, C8 = torch.zeros(2, 16, 576), torch.zeros(2, 16, 656, dtype=torch.uint8)
SLOTS, L, R = torch.arange(3), torch.zeros(3, 512), torch.zeros(3, 64)


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (TypeError, "kv_cache: got list", {"kv_cache": []}),
        (TypeError, "kv_cache: got dtype int32", {"kv_cache": C.int()}),
        (TypeError, "slots: got dtype int32, wanted int64", {"slots": SLOTS.int()}),
        (TypeError, "latent: got dtype bfloat16, wanted float32", {"latent": L.bfloat16()}),
        (TypeError, "latent: got dtype float64, wanted bfloat16 or", {"kv_cache": C8, "latent": L.double()}),
        (TypeError, "k_rope: got dtype bfloat16, wanted float32", {"k_rope": R.bfloat16()}),
        (ValueError, r"kv_cache: got shape \[2, 576\], wanted \[pages, page, width\]", {"kv_cache": C[:, 0]}),
        (ValueError, r"kv_cache: got shape \[2, 16, 655\], wanted \[pages, page, 656\]", {"kv_cache": C8[..., 1:]}),
        (ValueError, "kv_cache: got 15, wanted a page of 16, 32, 64 or 128 rows", {"kv_cache": C[:, 1:]}),
        (
            ValueError,
            r"kv_cache: got \[18432, 1152, 1\], wanted strides",
            {"kv_cache": torch.zeros(2, 16, 1152)[..., :576]},
        ),
        (ValueError, r"slots: got shape \[3, 1\], wanted \[T\]", {"slots": SLOTS[:, None]}),
        (ValueError, r"latent: got shape \[2, 512\], wanted \[3, latent\]", {"latent": L[:2]}),
        (ValueError, r"latent: got shape \[3, 256\], wanted \[3, 512\]", {"kv_cache": C8, "latent": L[:, :256]}),
        (ValueError, r"k_rope: got shape \[3, 32\], wanted \[3, 64\]", {"k_rope": R[:, :32]}),
        (ValueError, "latent: got stride 3 in the last", {"latent": torch.zeros(512, 3).t()}),
        (ValueError, "k_rope: got stride 2 in the last", {"k_rope": torch.zeros(3, 128)[:, ::2]}),
        (ValueError, r"slots: got 32, wanted values in \[-1, 32\)", {"slots": SLOTS + 30}),
        (ValueError, r"slots: got -2, wanted values in \[-1, 32\)", {"slots": SLOTS - 2}),
        (ValueError, "kv_cache: shares memory with latent", {"latent": C.view(-1)[:1536].view(3, 512)}),
        (RuntimeError, "slots: got device meta, wanted cpu as kv_cache", {"slots": SLOTS.to("meta")}),
    ],
)
def test_rejects(error, words, changes):
    before = C.clone()
    with pytest.raises(error, match=f"^mla_cache_append: {words}"):
        dk.mla_cache_append(**{"kv_cache": C, "slots": SLOTS, "latent": L, "k_rope": R, **changes})
    assert torch.equal(C, before)
