"""Code written for FlashMLA's decode runs on ours: signatures, masks, log-sum-exps, the metadata object."""

from __future__ import annotations

import pytest
import torch
from checks import close, same_bits
from latent_cache import FP8, filled

from dsv3_kernels.compat.flash_mla import FlashMLASchedMeta, flash_mla_with_kvcache, get_mla_metadata

LENGTHS = [0, 1, 130, 64]


def definition(q, keys, scale, causal):
    """Output and log-sum-exp in float64, in FlashMLA's layout and with its +inf."""
    requests, queries, heads, _ = q.shape
    out = torch.zeros(requests, queries, heads, 512).double()
    lse = torch.full((requests, heads, queries), torch.inf).double()
    for b, rows in enumerate(keys):
        for i in range(queries):
            seen = rows[: max(len(rows) - (queries - 1 - i), 0)] if causal else rows
            if len(seen):
                s = scale * q[b, i].double() @ seen.T
                out[b, i], lse[b, :, i] = s.softmax(-1) @ seen[:, :512], s.logsumexp(-1)
    return out, lse


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8, torch.float8_e4m3fn])
def test_dense_decode(causal, dtype):
    cache, table, lengths, keys = filled(LENGTHS, 64, torch.bfloat16 if dtype == torch.bfloat16 else FP8)
    q = torch.randn(4, 2, 3, 576).bfloat16() * 0.2
    metadata, splits = get_mla_metadata(lengths, 2 * 3, 1)
    assert isinstance(metadata, FlashMLASchedMeta) and splits is None
    fp8 = dtype != torch.bfloat16
    args = (cache.view(dtype)[:, :, None] if fp8 else cache[:, :, None], table, lengths, 512, metadata, splits)
    out, lse = flash_mla_with_kvcache(q, *args, softmax_scale=0.1, causal=causal, is_fp8_kvcache=fp8)
    wanted = definition(q, keys, 0.1, causal)
    close(out, wanted[0], wanted[0].abs() * 2**-8 + 1e-4)
    close(lse, wanted[1], 1e-4)
    again = flash_mla_with_kvcache(q, *args, softmax_scale=0.1, causal=causal, is_fp8_kvcache=fp8)
    assert same_bits((out, lse.contiguous()), (again[0], again[1].contiguous()))


def test_defaults_are_theirs():
    """The scale of the key's width, and no mask; metadata without arguments."""
    cache, table, lengths, keys = filled([70], 16, torch.float32)
    q = torch.randn(1, 3, 2, 576)
    out, lse = flash_mla_with_kvcache(q, cache[:, :, None], table, lengths, 512, get_mla_metadata()[0])
    wanted = definition(q, keys, 576**-0.5, False)
    close(out, wanted[0], 1e-4)
    close(lse, wanted[1], 1e-4)


def test_one_plan_for_all_layers():
    cache, table, lengths, _ = filled([70, 9], 16, torch.float32)
    q = torch.randn(2, 1, 2, 576)
    metadata, _ = get_mla_metadata()
    for _ in range(2):
        flash_mla_with_kvcache(q, cache[:, :, None], table, lengths, 512, metadata)
        plan = metadata.plan
    assert metadata.plan is plan is not None
    with pytest.raises(ValueError, match="its first call had queries 1, this one 2"):
        flash_mla_with_kvcache(q.expand(2, 2, 2, 576), cache[:, :, None], table, lengths, 512, metadata)


C, TABLE, LEN = torch.zeros(3, 16, 1, 576), torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([20]).int()
Q = torch.zeros(1, 1, 4, 576)


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (NotImplementedError, "indices: sparse attention is not there", {"indices": LEN}),
        (NotImplementedError, "attn_sink: sparse attention is not there", {"attn_sink": LEN}),
        (NotImplementedError, "k_cache: got 2 key heads, wanted 1", {"k_cache": torch.zeros(3, 16, 2, 576)}),
        (TypeError, "block_table and cache_seqlens: got None", {"block_table": None}),
        (TypeError, "tile_scheduler_metadata: got Tensor", {"tile_scheduler_metadata": LEN}),
        (TypeError, "num_splits: got Tensor, wanted None", {"num_splits": LEN}),
        (TypeError, "is_fp8_kvcache: got True with a cache of torch.float32", {"is_fp8_kvcache": True}),
        (ValueError, "head_dim_v: got 576, wanted 512", {"head_dim_v": 576}),
        (ValueError, "wanted four dimensions each", {"k_cache": C[:, :, 0]}),
        (ValueError, "mla_decode: kv_cache: got 10, wanted a page", {"k_cache": torch.zeros(3, 10, 1, 576)}),
    ],
)
def test_rejects(error, words, changes):
    given = {"q": Q, "k_cache": C, "block_table": TABLE, "cache_seqlens": LEN, "head_dim_v": 512}
    given |= {"tile_scheduler_metadata": get_mla_metadata()[0]}
    with pytest.raises(error, match=words):
        flash_mla_with_kvcache(**{**given, **changes})
