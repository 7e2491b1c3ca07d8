"""mla_decode_plan: every key is someone's, once; the work is even; and following the plan gives the right attention."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from checks import close, compiles, opcheck, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_cache import filled

import dsv3_kernels as dk

OP = "mla_decode_plan"
POLICIES = ("balanced", "fixed")


def make(lengths, device="cpu", queries=1, heads=16, **options):
    lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    return dk.mla_decode_plan(lengths, num_queries=queries, num_heads=heads, **options)


def check(plan, lengths, parts, policy):
    """The invariants that kernels rely on; returns the items of every request."""
    work, splits, bounds = (t.tolist() for t in plan)
    assert all(t.dtype == torch.int32 for t in plan)
    assert len(splits) == len(lengths) + 1 and len(bounds) == parts + 1
    assert len(work) == (16 * len(lengths) if policy == "fixed" else len(lengths) + parts - 1)
    assert splits[0] == 0 and all(a < b for a, b in pairwise(splits))
    assert bounds[0] == 0 and bounds[-1] == splits[-1] and bounds == sorted(bounds)
    assert all(row == [-1] * 4 for row in work[splits[-1] :])
    pieces = []
    for b, n in enumerate(lengths):
        mine = work[splits[b] : splits[b + 1]]
        assert [row[0] for row in mine] == [b] * len(mine)
        assert [row[3] for row in mine] == list(range(len(mine)))
        assert mine[0][1] == 0 and mine[-1][2] == n
        assert all(a[2] == b[1] for a, b in pairwise(mine)), "a gap or an overlap"
        assert all(row[1] % 64 == 0 for row in mine)
        assert n == 0 or all(row[1] < row[2] for row in mine), "an item without keys"
        pieces.append([(low, high) for _, low, high, _ in mine])
    return pieces


LENGTHS = [[1], [0], [5000], [64, 65, 0, 4096, 1, 300], [17] * 40, [0, 0, 0], [100000, 1, 1, 1]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: str(x)[:20])
@pytest.mark.parametrize("parts", [1, 2, 7, 132])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_key_once(backend, device, lengths, parts, policy):
    check(make(lengths, device, policy=policy, num_sms=parts), lengths, parts, policy)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("parts", [1, 5, 40])
def test_the_plan_is_the_same_everywhere(backend, device, parts, policy):
    """To the bit: over more requests than a CTA has threads, lengths that no cache holds, and negative ones."""
    many = torch.randint(-50, 700, (300,)).clamp(min=-1).tolist()
    for lengths in (many, [0] * 257 + [129], [2**31 - 1, 0, 2**31 - 1], [64] * parts, [300]):
        got = make(lengths, device, policy=policy, num_sms=parts)
        with dk.backend("eager"):
            wanted = make(lengths, policy=policy, num_sms=parts)
        assert same_bits([t.cpu() for t in got], wanted)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3000), max_size=20), st.integers(1, 40), st.sampled_from(POLICIES))
def test_every_key_once_for_any_lengths(lengths, parts, policy):
    check(make(lengths, policy=policy, num_sms=parts), lengths, parts, policy)


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: str(x)[:20])
@pytest.mark.parametrize(("kv_dtype", "cost"), [(torch.bfloat16, 5), (torch.uint8, 9), (torch.float32, 3)])
def test_balanced_parts_are_even(backend, device, lengths, kv_dtype, cost):
    """No part has more blocks of keys, and starts of requests, than the sum of all divided by the parts."""
    parts = 13
    plan = make(lengths, device, kv_dtype=kv_dtype, num_sms=parts)
    share = -(-sum(-(-n // 64) + cost for n in lengths) // parts)
    work, bounds = plan.work.tolist(), plan.parts.tolist()
    for low, high in pairwise(bounds):
        assert sum(-(-(row[2] - row[1]) // 64) for row in work[low:high]) <= share


def test_fixed_does_not_depend_on_the_batch(backend, device):
    lengths = [5000, 3, 513, 0, 20000, 512]
    together = check(make(lengths, device, policy="fixed", num_sms=9), lengths, 9, "fixed")
    for n, pieces in zip(lengths, together, strict=True):
        alone = check(make([n], device, policy="fixed", num_sms=132), [n], 132, "fixed")
        assert alone == [pieces]
    assert [len(pieces) for pieces in together] == [10, 1, 2, 1, 16, 1]


def test_heads_and_queries_share_the_multiprocessors(backend, device):
    """Each block of 64 rows (queries x heads) has the whole plan to itself."""
    for queries, heads, parts in ((1, 16, 132), (1, 64, 132), (1, 128, 66), (2, 128, 33), (1, 65, 66), (200, 128, 1)):
        assert make([1000], device, queries, heads, num_sms=132).parts.shape == (parts + 1,)
    if device.type == "cpu":
        assert make([1000], device).parts.shape == (133,)


@pytest.mark.parametrize("policy", POLICIES)
def test_following_the_plan(device, policy):
    """Each item attends to its keys alone; merged in the order of splits, they are the attention over all."""
    lengths = [1500, 0, 64, 700]
    cache, table, seqlens, _ = filled(lengths, 64, torch.float64)
    q = torch.randn(4, 1, 3, 576).double() * 0.2
    plan = dk.mla_decode_plan(seqlens, num_queries=1, num_heads=3, policy=policy, num_sms=6)
    wanted = dk.mla_decode(q, cache, table, seqlens, softmax_scale=0.1, plan=plan)
    for b in range(4):
        merged = None
        for _, low, high, _ in plan.work[plan.splits[b] : plan.splits[b + 1]].tolist():
            piece = table[b : b + 1, low // 64 :].contiguous(), torch.tensor([high - low], dtype=torch.int32)
            part = dk.mla_decode(q[b : b + 1], cache, *piece, softmax_scale=0.1)
            merged = part if merged is None else dk.merge_attention(*merged, *part)
        close(merged[0], wanted[0][b : b + 1], 1e-11)
        close(merged[1], wanted[1][b : b + 1], 1e-11)


def test_empty(backend, device):
    for policy in POLICIES:
        work, splits, parts = make([], device, policy=policy, num_sms=4)
        assert (work == -1).all() and splits.tolist() == [0] and parts.tolist() == [0] * 5


def test_twice_the_same_bits(backend, device):
    for policy in POLICIES:
        assert same_bits(*(make([77, 3000, 5], device, policy=policy) for _ in range(2)))


def test_op_contract(device):
    op = torch.ops.dsv3_kernels.mla_decode_plan.default
    lengths = torch.tensor([77, 0, 3000], dtype=torch.int32, device=device)
    for fixed in (False, True):
        opcheck(op, (lengths, 6, 5, fixed))


def test_compiles():
    for policy in POLICIES:
        compiles(
            lambda x, p=policy: tuple(dk.mla_decode_plan(x + 1, num_queries=1, num_heads=8, policy=p)),
            torch.arange(5).int(),
        )


X = torch.zeros(3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (TypeError, "cache_seqlens: got list", {"cache_seqlens": [1]}),
        (TypeError, "cache_seqlens: got dtype int64, wanted int32", {"cache_seqlens": X.long()}),
        (TypeError, "num_queries: got float, wanted an int", {"num_queries": 1.0}),
        (TypeError, "num_heads: got NoneType, wanted an int", {"num_heads": None}),
        (TypeError, "num_sms: got str, wanted an int", {"num_sms": "132"}),
        (TypeError, "kv_dtype: got torch.int8, wanted a float dtype or torch.uint8", {"kv_dtype": torch.int8}),
        (ValueError, r"cache_seqlens: got shape \[1, 3\], wanted \[B\]", {"cache_seqlens": X[None]}),
        (ValueError, "cache_seqlens: got strides", {"cache_seqlens": X.repeat(2)[::2]}),
        (ValueError, "num_queries: got 0, wanted at least 1", {"num_queries": 0}),
        (ValueError, "num_heads: got 0, wanted at least 1", {"num_heads": 0}),
        (ValueError, "num_sms: got 0, wanted at least 1", {"num_sms": 0}),
        (ValueError, "policy: got 'greedy', wanted 'balanced' or 'fixed'", {"policy": "greedy"}),
    ],
)
def test_rejects(error, words, changes):
    with pytest.raises(error, match=f"^mla_decode_plan: {words}"):
        dk.mla_decode_plan(**{"cache_seqlens": X, "num_queries": 1, "num_heads": 16, **changes})
