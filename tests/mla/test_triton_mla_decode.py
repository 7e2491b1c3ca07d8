"""mla_decode in Triton through the simulator: every block size, dtype and way of splitting, any schedule."""

from __future__ import annotations

import pytest
import torch
from checks import close, roundoff, same_bits
from latent_cache import FP8, filled
from simulated import SCHEDULES, coverage, needs_simulator, schedule
from test_mla_decode import SCALE, definition

import dsv3_kernels as dk

pytestmark = needs_simulator

KERNEL = "triton_mla_decode"


def decode(q, cache, table, lengths, **options):
    """Runs both kernels, and nothing else."""
    before = dk.launch_counts()
    with dk.backend("sim:triton"):
        got = dk.mla_decode(q, cache, table, lengths, softmax_scale=SCALE, **options)
    assert dk.launch_counts() - before == {KERNEL: 1, f"{KERNEL}_join": 1}
    return got


def check(got, q, keys, causal=True, latent=512):
    """Scores are exact sums in float32; weights are rounded to q's 16 bits before they meet the values."""
    rounding = 0.0 if q.dtype == torch.float32 else roundoff(q.dtype)
    wanted = definition(q, keys, causal, latent=latent, weight_roundoff=rounding)
    close(got[0], wanted[0], wanted[2], "out")
    close(got[1], wanted[1], wanted[3], "lse")


@pytest.mark.parametrize(
    ("dtype", "heads"),
    [
        (torch.bfloat16, 12),
        (torch.bfloat16, 20),
        (torch.bfloat16, 70),  # two blocks of 64 rows
        (FP8, 12),
        (FP8, 20),
        (FP8, 70),
        (torch.float16, 20),
        (torch.float32, 5),
    ],
)
def test_every_block_size(dtype, heads) -> None:
    """Scales of the FP8 cache are any float32, slots and table entries past a length poisoned."""
    q = torch.randn(4, 1, heads, 576).to(torch.bfloat16 if dtype == FP8 else dtype) * 0.2
    *args, keys = filled([70, 0, 1, 64], 16, dtype)
    got = decode(q, *args)
    check(got, q, keys)
    assert same_bits(got, decode(q, *args))


@pytest.mark.parametrize(
    ("dtype", "latent", "rope"),
    [
        (torch.bfloat16, 256, 32),
        (torch.bfloat16, 200, 20),  # the last block of 128 columns is cut short, rows begin at multiples of 8 bytes
        (torch.float16, 21, 6),
        (torch.float32, 128, 64),
        (torch.float32, 1, 0),
    ],
)
def test_other_widths(dtype, latent, rope) -> None:
    """Columns past a width are neither read nor written: beside the queries and the output there is poison."""
    wide = torch.full((3, 2, 5, latent + rope + 3), torch.nan, dtype=dtype)
    q = wide[..., : latent + rope].copy_(torch.randn(3, 2, 5, latent + rope) * 0.2)
    cache, table, lengths, keys = filled([530, 0, 33], 32, dtype, latent + rope, latent)
    out = torch.full((3, 2, 5, latent + 3), 7.0, dtype=dtype)

    def run():
        return [t.clone() for t in decode(q, cache, table, lengths, latent=latent, out=out[..., :latent])]

    with coverage(KERNEL) as seen, coverage(f"{KERNEL}_join") as joined:
        got = run()
        with schedule(**SCHEDULES["late"]):
            again = run()
        check(got, q, keys, latent=latent)
        q[2, 1, 2, 0] = torch.nan
        poisoned = run()
    assert same_bits(got, again) and (out[..., latent:] == 7).all()
    assert all(t[2, 1, 2].isnan().all() and int(t.isnan().sum()) == t[2, 1, 2].numel() for t in poisoned)
    # One version sets up the store where the joining loop does not run.
    loopless = {"tl.store(out + d": "a request has one split at least"} if latent == 128 else {}
    assert seen.unreached() == [] and joined.unreached(unreachable=loopless) == []


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_splits_without_a_plan(dtype, causal) -> None:
    """A table of more than 1024 tokens: three splits, or one for short requests. A NaN stays in its row."""
    clean = torch.randn(4, 3, 4, 576).bfloat16() * 0.2
    q = clean.clone()
    *args, keys = filled([1030, 0, 2, 449], 64, dtype)
    with coverage(KERNEL) as seen, coverage(f"{KERNEL}_join") as joined:
        got = decode(q, *args, causal=causal)
        q[3, 1, 2, 5] = torch.nan
        poisoned = decode(q, *args, causal=causal)
    assert all(t[3, 1, 2].isnan().all() and int(t.isnan().sum()) == t[3, 1, 2].numel() for t in poisoned)
    check(got, clean, keys, causal)
    assert seen.unreached() == [] and joined.unreached() == []


@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize(("dtype", "heads"), [(torch.bfloat16, 70), (FP8, 33), (torch.bfloat16, 3)])
def test_any_schedule(dtype, heads, options) -> None:
    q = torch.randn(2, 1, heads, 576).bfloat16() * 0.2
    *args, keys = filled([200, 70], 32, dtype)
    plan = dk.mla_decode_plan(args[2], num_queries=1, num_heads=heads, num_sms=6)
    with coverage(KERNEL) as seen:
        got = decode(q, *args, plan=plan)
        with schedule(**options):
            again = decode(q, *args, plan=plan)
    check(got, q, keys)
    assert same_bits(got, again) and seen.unreached() == []


def test_many_splits() -> None:
    """More than the joining kernel takes at a time, the largest scores among the last."""
    q = torch.randn(1, 2, 2, 576).bfloat16() * 0.2
    cache, table, lengths, keys = filled([800], 128, torch.bfloat16)
    cache[table[0, 6], 20] = 12 * q[0, 0, 0]
    keys[0][788] = cache[table[0, 6], 20].double()
    plan = dk.mla_decode_plan(lengths, num_queries=2, num_heads=2, num_sms=18)
    assert int(plan.splits[1]) > 8
    check(decode(q, cache, table, lengths, plan=plan), q, keys)


def test_fixed_splits_do_not_depend_on_the_batch() -> None:
    q = torch.randn(3, 1, 4, 576).bfloat16()
    cache, table, lengths, _ = filled([600, 1100, 0], 64, torch.bfloat16)
    plan = dk.mla_decode_plan(lengths, num_queries=1, num_heads=4, policy="fixed")
    together = decode(q, cache, table, lengths, plan=plan)
    plan = dk.mla_decode_plan(lengths[1:2], num_queries=1, num_heads=4, policy="fixed", num_sms=3)
    alone = decode(q[1:2], cache, table[1:2], lengths[1:2], plan=plan)
    assert same_bits([t[1:2] for t in together], alone)


@pytest.mark.parametrize("shape", [(0, 1, 4), (2, 0, 4), (2, 1, 0)], ids=str)
def test_empty(shape) -> None:
    *args, _ = filled([20] * shape[0], 16, torch.bfloat16)
    with dk.backend("sim:triton"):
        out, lse = dk.mla_decode(torch.empty(*shape, 576).bfloat16(), *args, softmax_scale=SCALE)
    assert out.shape == (*shape, 512) and lse.shape == shape


F32, OTHER = torch.float32, torch.zeros(1, 1, 2, 576)


@pytest.mark.parametrize(
    ("words", "q", "dtype", "latent"),
    [
        ("takes no float64", torch.zeros(1, 1, 2, 576).double(), torch.float64, 512),
        ("takes a latent of up to 512 and a rotary part of up to 64, got 513 and 8", OTHER[..., :521], F32, 513),
        ("takes a latent of up to 512 and a rotary part of up to 64, got 16 and 66", OTHER[..., :82], F32, 16),
        ("takes no float16 queries on an FP8 cache", torch.zeros(1, 1, 2, 576).half(), FP8, 512),
    ],
)
def test_what_it_does_not_take(words, q, dtype, latent) -> None:
    *args, _ = filled([20], 16, dtype, q.shape[3], latent)
    with dk.backend("sim:triton"), pytest.raises(RuntimeError, match=words):
        dk.mla_decode(q, *args, softmax_scale=SCALE, latent=latent)


def test_pages_off_a_multiple_of_16_bytes() -> None:
    """Floats are read in smaller pieces; an FP8 cache's scales would not lie at multiples of their size."""
    q = torch.randn(2, 1, 3, 576).bfloat16() * 0.2
    cache, *rest, keys = filled([20, 33], 16, torch.bfloat16)
    apart = torch.full((len(cache), 16 * 576 + 2), torch.nan).bfloat16()[:, : 16 * 576].unflatten(1, (16, 576))
    check(decode(q, apart.copy_(cache), *rest), q, keys)
    table, lengths = torch.zeros(1, 1).int(), torch.ones(1).int()
    cache = torch.zeros(16 * 656 + 8, dtype=torch.uint8)[8:].view(1, 16, 656)
    with dk.backend("sim:triton"), pytest.raises(RuntimeError, match="does not start at a multiple of 16 bytes"):
        dk.mla_decode(q[:1], cache, table, lengths, softmax_scale=SCALE)


@pytest.mark.slow
def test_pages_beyond_32_bits() -> None:
    """The second page lies 2^31 bytes on."""
    cache = torch.empty((1 << 31) + 16 * 656, dtype=torch.uint8).as_strided((2, 16, 656), (1 << 31, 656, 1))
    filled_cache, _, lengths, keys = filled([16], 16, FP8)
    cache[1] = filled_cache[(filled_cache != 0xFF).flatten(1).any(1)][0]
    table = torch.tensor([[1]], dtype=torch.int32)
    q = torch.randn(1, 1, 2, 576).bfloat16() * 0.2
    check(decode(q, cache, table, lengths), q, keys)
