"""The decode kernels through the simulator: their PTX and their launcher, over heads, queries, pages and lengths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from checks import same_bits
from decode_cases import LENGTHS, SCALE, as_read, cache_of, check, hostile, pairwise, queries
from latent_cache import FP8, encode, filled
from simulated import SCHEDULES, counters, coverage, launches, needs_simulator, schedule
from torch import Tensor

import dsv3_kernels as dk
from dsv3_kernels import _simulator
from dsv3_kernels.mla import _cuda_decode

pytestmark = needs_simulator

FAST, PAIR, SIMPLE = "mla_decode_bf16", "mla_decode_bf16_pair", "mla_decode_simple"
FP8_KERNEL, COMBINE = "mla_decode_fp8", "mla_decode_combine"


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Fresh memory, the workspace among it, is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def plan_of(lengths: Tensor, q: Tensor, policy: str, sms: int) -> Any:
    with dk.backend("eager"):
        return dk.mla_decode_plan(lengths, num_queries=q.shape[1], num_heads=q.shape[2], policy=policy, num_sms=sms)


def run(
    q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, *, plan: Any = None, policy: str = "balanced",
    sms: int = 1, causal: bool = True, simple: bool = False, scale: float = SCALE,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs of one launch; `sms` bounds the parts of the plan."""
    plan = plan_of(lengths, q, policy, sms) if plan is None else plan
    out, lse = q.new_full((*q.shape[:3], 512), torch.nan), q.new_full(q.shape[:3], torch.nan, dtype=torch.float32)
    pairs = -(-q.shape[1] * q.shape[2] // 64) % 2 == 0
    kernel = FP8_KERNEL if cache.dtype == FP8 else SIMPLE if simple else PAIR if pairs else FAST
    with launches(kernel):
        _cuda_decode.mla_decode(q, cache, table, lengths, *plan, scale, causal, 512, out, lse, simple=simple)
    return out, lse


@dataclass(frozen=True)
class Case:
    heads: int
    queries: int
    page: int
    lengths: str
    policy: str
    causal: bool
    sms: int
    dtype: torch.dtype

    def __str__(self) -> str:
        causal = "causal" if self.causal else "all"
        cache = "fp8" if self.dtype == FP8 else "bf16"
        return f"h{self.heads}-q{self.queries}-p{self.page}-n{self.lengths}-{self.policy}-{causal}-s{self.sms}-{cache}"


def blocks(case: list[Any]) -> int:
    """Tiles of 64 rows and 64 keys, about: what a simulated case costs."""
    return -(-case[0] * case[1] // 64) * sum(-(-n // 64) + 1 for n in LENGTHS[case[3]])


AXES = [(1, 5, 16, 64, 128), (1, 2, 3, 5), (16, 32, 64, 128), tuple(LENGTHS), ("balanced", "fixed"), (True, False),
        (1, 4), (torch.bfloat16, FP8)]  # fmt: skip
CASES = [Case(*values) for values in pairwise(AXES, blocks)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case) -> None:
    lengths = LENGTHS[case.lengths]
    cache, table, seqlens, keys = filled(lengths, case.page, case.dtype)
    q = queries(len(lengths), case.queries, case.heads)
    got = run(q, cache, table, seqlens, policy=case.policy, sms=case.sms * -(-case.heads * case.queries // 64),
              causal=case.causal)  # fmt: skip
    check(got, q, as_read(keys, cache, table, seqlens) if case.dtype == FP8 else keys, case.causal)


@pytest.mark.parametrize(("lengths", "heads", "sms"), [([300, 0, 64], 5, 1), ([1, 330], 40, 6)], ids=str)
def test_the_simple_kernel_has_the_same_bits(lengths: list[int], heads: int, sms: int) -> None:
    cache, table, seqlens, keys = filled(lengths, 32, torch.bfloat16)
    q = queries(len(lengths), 2, heads)
    fast, simple = (run(q, cache, table, seqlens, sms=sms, simple=simple) for simple in (False, True))
    check(simple, q, keys)
    assert same_bits(fast, simple)


@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("kernel", [FAST, PAIR, SIMPLE, FP8_KERNEL])
def test_under_any_schedule(kernel: str, options: dict[str, str]) -> None:
    """Several items on one CTA, odd and even numbers of tiles, a request in three items."""
    cache, table, seqlens, _ = filled([330, 70, 0, 128], 16, FP8 if kernel == FP8_KERNEL else torch.bfloat16)
    q = queries(4, 1, 70 if kernel == PAIR else 20)
    sms = 6 if kernel == PAIR else 3
    plain = run(q, cache, table, seqlens, sms=sms, simple=kernel == SIMPLE)
    with schedule(**options):
        assert same_bits(plain, run(q, cache, table, seqlens, sms=sms, simple=kernel == SIMPLE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_bits_do_not_depend_on_where_things_lie(dtype: torch.dtype) -> None:
    """Pages moved about, and, with "fixed", other requests beside; twice the same."""
    cache, table, seqlens, _ = filled([600, 70, 0], 32, dtype)
    q = queries(3, 2, 3)
    once = run(q, cache, table, seqlens, policy="fixed", sms=3)
    assert same_bits(once, run(q, cache, table, seqlens, policy="fixed", sms=3))
    order = torch.randperm(len(cache))
    moved = torch.where(table < len(cache), order.argsort()[table.clamp(max=len(cache) - 1)].int(), table)
    assert same_bits(once, run(q, cache[order], moved, seqlens, policy="fixed", sms=3))
    for b in range(3):
        alone = run(q[b : b + 1], cache, table[b : b + 1], seqlens[b : b + 1], policy="fixed", sms=7)
        assert same_bits([t[b : b + 1] for t in once], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_queries_one_by_one_across_cuts(dtype: torch.dtype) -> None:
    """Three causal queries are three steps of one, also where the last of them opens a new tile or a new item."""
    cache, table, seqlens, _ = filled([514, 66, 2], 64, dtype)
    q = queries(3, 3, 2)
    together = run(q, cache, table, seqlens, policy="fixed", sms=2)
    for i in range(3):
        alone = run(q[:, i : i + 1], cache, table, seqlens - (2 - i), policy="fixed", sms=2)
        assert same_bits([t[:, i : i + 1] for t in together], alone)


@pytest.mark.parametrize("sms", [1, 3])
@pytest.mark.parametrize("kind", ["large", "dominating", "late", "equal", "same"])
def test_hostile(kind: str, sms: int) -> None:
    q, rows = hostile(kind)
    check(run(q, *cache_of(rows), sms=sms), q, [rows.double()])


def test_nan_stays_in_its_row() -> None:
    q, rows = hostile("plain")
    q[0, 1, 2, 100] = torch.nan
    out, lse = run(q, *cache_of(rows), sms=2)
    assert out[0, 1, 2].isnan().all() and lse[0, 1, 2].isnan()
    out[0, 1, 2], lse[0, 1, 2] = 0, 0
    assert out.isfinite().all() and lse.isfinite().all()


def test_every_code() -> None:
    """All 256 codes in every place of a lane's sixteen, subnormals among them, under scales of every kind; NaN."""
    codes = (torch.arange(512)[None] * 5 + torch.arange(256)[:, None]).to(torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x38
    scales = torch.tensor([1.0, 2.0**-20, 0.3, 1000.0]).repeat(256, 1)
    rope = torch.zeros(256, 64, dtype=torch.bfloat16)
    rows = torch.cat([codes, scales.view(torch.uint8), rope.view(torch.uint8)], 1)
    wanted = codes.view(torch.float8_e4m3fn).float() * scales.bfloat16().float().repeat_interleave(128, 1)
    q = torch.zeros(1, 1, 1, 576, dtype=torch.bfloat16)
    for n in range(0, 256, 16):  # one key: its weight is 1
        out, _ = run(q, *cache_of(rows[n : n + 1], 16))
        assert torch.equal(out[0, 0, 0], wanted[n].bfloat16())
    for place in (0, 5, 255, 511):
        rows[0, place] = 0xFF if place == 5 else 0x7F
        assert all(t.isnan().all() for t in run(q, *cache_of(rows[:2])))
        rows[0, place] = 0x38


@pytest.mark.parametrize("scale", [0.0, torch.nan, torch.inf, 2.0**-130, 2.0**100])
def test_odd_scales(scale: float) -> None:
    rows = encode(torch.randn(3, 512), torch.randn(3, 64))
    rows[1, 512:516] = torch.tensor([scale]).view(torch.uint8)
    args = torch.zeros(1, 1, 1, 576, dtype=torch.bfloat16), *cache_of(rows)
    with dk.backend("eager"):
        wanted = dk.mla_decode(*args, softmax_scale=SCALE)[0]
    out = run(*args)[0]
    assert torch.equal(out.isfinite(), wanted.isfinite())
    assert ((out - wanted).abs() <= 2**-6 * wanted.abs() + 2**-6)[wanted.isfinite()].all()


def test_an_older_plan_reads_nothing_out_of_bounds() -> None:
    """Lengths that shrank since: right results. Lengths that grew: the new keys are not seen, and nothing breaks."""
    cache, table, seqlens, keys = filled([300, 200], 64, torch.bfloat16)
    q = queries(2, 1, 4)
    shorter = torch.tensor([130, 0], dtype=torch.int32)
    plan = plan_of(seqlens, q, "balanced", 4)
    check(run(q, cache, table, shorter, plan=plan), q, [keys[0][:130], keys[1][:0]])
    out, _ = run(q, cache, table, seqlens, plan=plan_of(shorter, q, "balanced", 4), causal=False)
    assert out.isfinite().all()


def test_lengths_beyond_the_table_are_cut_to_it() -> None:
    cache, table, seqlens, keys = filled([128], 64, torch.bfloat16)
    q = queries(1, 1, 4)
    out = run(q, cache, table[:, :2].contiguous(), seqlens + 1000, causal=False)
    check(out, q, keys, causal=False)


@pytest.mark.parametrize("name", [FAST, PAIR, SIMPLE, FP8_KERNEL])
def test_budget(name: str) -> None:
    """Bytes and cycles per tile as docs/mla.md has them; every output byte once; no bank met twice."""
    tiles, heads, dtype = 4, 128 if name == PAIR else 64, FP8 if name == FP8_KERNEL else torch.bfloat16
    cache, table, seqlens, _ = filled([64 * tiles], 64, dtype)
    q = queries(1, 1, heads)
    with schedule(banks="1"):
        plan = plan_of(seqlens, q, "balanced", 1)
        run(q, cache, table, seqlens, plan=plan, simple=name == SIMPLE)
    spent = counters()
    assert spent["wgmma_cycles"] == tiles * (3328 if name == SIMPLE else 2176) * (heads // 64)
    assert spent["tma_read"] == (0 if dtype == FP8 else tiles * 64 * 1152)
    assert spent["global_write"] == heads * (1024 + 4)
    assert spent["shared_wavefronts"] == spent["shared_ideal"] > 0


# Source lines whose blocks no launch enters, and why.
UNREACHED: dict[str, str] = {}


@pytest.mark.parametrize("kernel", [FAST, PAIR, SIMPLE, FP8_KERNEL, COMBINE])
def test_every_basic_block_is_reached(kernel: str) -> None:
    dtype = FP8 if kernel == FP8_KERNEL else torch.bfloat16
    with coverage(kernel) as seen:
        # More than 32 splits; more pages than two times 32; unaligned rows, whole and in splits (below).
        shapes = (16, [2300, 0, 65], 1, 3, 40), (16, [1100], 1, 3, 1), (128, [129, 1], 2, 3, 2)
        for page, lengths, count, heads, sms in shapes:
            cache, table, seqlens, _ = filled(lengths, page, dtype)
            q = queries(len(lengths), count, heads + (64 // count if kernel == PAIR else 0))
            run(q, cache, table, seqlens, sms=sms, simple=kernel == SIMPLE)
        if dtype == FP8:
            cache.view(-1, 656)[table[0, 0] * 128, :512] = torch.arange(512).to(torch.uint8)
            run(q, cache, table, seqlens)
        odd, wide = (torch.full((*q.shape[:3], n), torch.nan, dtype=torch.bfloat16) for n in (600, 601))
        odd[..., 1:577] = q
        for sms in (1, 12):
            plan = plan_of(seqlens, q, "balanced", sms)
            lse = torch.full(q.shape[:3], torch.nan)
            args = odd[..., 1:577], cache, table, seqlens, *plan, SCALE, True, 512, wide[..., 3:515], lse
            with _simulator.active("cuda"):
                _cuda_decode.mla_decode(*args, simple=kernel == SIMPLE)
            assert same_bits((wide[..., 3:515].contiguous(), lse), run(q, cache, table, seqlens, plan=plan))
            assert wide[..., :3].isnan().all() and wide[..., 515:].isnan().all()
    assert seen.unreached(unreachable=UNREACHED) == []


def test_what_the_kernels_do_not_serve_is_said_in_words() -> None:
    cache, table, seqlens, _ = filled([20], 16, torch.bfloat16)
    q = queries(1, 1, 2)
    moved = torch.zeros(cache.numel() + 1, dtype=torch.bfloat16)[1:].view(cache.shape)
    for words, args, scale in (
        ("q: torch.float16: the kernels take bfloat16", (q.half(), cache.half()), SCALE),
        ("a page does not start at a multiple of 16 bytes", (q, moved), SCALE),
        ("softmax_scale: -1.0: the kernels take a positive one", (q, cache), -1.0),
        ("q: a width of 24: the kernels take 576", (q[..., :24], cache[..., :24].contiguous()), SCALE),
    ):
        latent = {} if args[0].shape[3] == 576 else {"latent": 16}
        with dk.backend("sim:cuda"), pytest.raises(RuntimeError, match=words):
            dk.mla_decode(*args, table, seqlens, softmax_scale=scale, **latent)


@pytest.mark.parametrize("shape", [(0, 1, 4), (2, 0, 4), (2, 1, 0)], ids=str)
def test_without_rows_nothing_is_launched(shape: tuple[int, int, int]) -> None:
    cache, table, seqlens, _ = filled([20] * shape[0], 16, torch.bfloat16)
    before = dk.launch_counts()
    with dk.backend("sim:cuda"):
        out, lse = dk.mla_decode(torch.empty(*shape, 576).bfloat16(), cache, table, seqlens, softmax_scale=SCALE)
    assert dk.launch_counts() == before and out.shape == (*shape, 512) and lse.shape == shape
