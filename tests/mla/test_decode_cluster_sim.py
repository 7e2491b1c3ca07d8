"""Decode on a cluster per request through the simulator: the kernels, their launcher, and when they are taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from checks import same_bits
from decode_cases import LENGTHS, SCALE, as_read, cache_of, check, hostile, pairwise, queries
from latent_cache import FP8, filled
from simulated import SCHEDULES, counters, coverage, launches, needs_simulator, schedule
from torch import Tensor

import dsv3_kernels as dk
from dsv3_kernels import _host
from dsv3_kernels._arguments import target
from dsv3_kernels.mla import _cuda_decode
from dsv3_kernels.mla.mla_decode_plan import cluster_size

pytestmark = needs_simulator

BF16 = torch.bfloat16
KERNELS = {BF16: "mla_decode_bf16_cluster", FP8: "mla_decode_fp8_cluster"}
SIZES = (2, 4, 8)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Fresh memory is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def fresh(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_full((*q.shape[:3], 512), torch.nan), q.new_full(q.shape[:3], torch.nan, dtype=torch.float32)


def run(
    q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, *, cluster: int = 8, causal: bool = True,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs of one launch, and of nothing else."""
    out, lse = fresh(q) if into is None else into
    before = dk.launch_counts().total()
    with launches(KERNELS[cache.dtype]):
        _host.mla_decode_cluster(q, cache, table, lengths, SCALE, causal, out, lse, cluster, *target(q))
    assert dk.launch_counts().total() == before + 1
    return out, lse


def exact(keys: list[Tensor], cache: Tensor, table: Tensor, lengths: Tensor) -> list[Tensor]:
    return as_read(keys, cache, table, lengths) if cache.dtype == FP8 else keys


@dataclass(frozen=True)
class Case:
    heads: int
    queries: int
    page: int
    lengths: str
    causal: bool
    cluster: int
    dtype: torch.dtype

    def __str__(self) -> str:
        causal = "causal" if self.causal else "all"
        cache = "fp8" if self.dtype == FP8 else "bf16"
        return f"h{self.heads}-q{self.queries}-p{self.page}-n{self.lengths}-{causal}-c{self.cluster}-{cache}"


def cost(case: list[Any]) -> float:
    """Of a simulated case, about: tiles, and a start for each CTA."""
    row_blocks = -(-case[0] * case[1] // 64)
    return row_blocks * sum(-(-n // 64) + case[5] for n in LENGTHS[case[3]])


AXES = [(1, 5, 16, 64, 128), (1, 2, 3), (16, 32, 64, 128), tuple(LENGTHS), (True, False), SIZES, (BF16, FP8)]
CASES = [Case(*values) for values in pairwise(AXES, cost)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case) -> None:
    lengths = LENGTHS[case.lengths]
    cache, table, seqlens, keys = filled(lengths, case.page, case.dtype)
    q = queries(len(lengths), case.queries, case.heads)
    got = run(q, cache, table, seqlens, cluster=case.cluster, causal=case.causal)
    check(got, q, exact(keys, cache, table, seqlens), case.causal)


@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize(("lengths", "rows", "cluster"), [([600, 70], 20, 8), ([330, 0, 64], 70, 2)], ids=["8", "2"])
@pytest.mark.parametrize("dtype", [BF16, FP8])
def test_under_any_schedule(
    dtype: torch.dtype, lengths: list[int], rows: int, cluster: int, options: dict[str, str]
) -> None:
    """Ranks with two tiles, with one and with none; odd and even numbers; a request without keys; two row blocks. What
    they are held against ran with the other extreme timing."""
    cache, table, seqlens, _ = filled(lengths, 16, dtype)
    q = queries(len(lengths), 2, rows // 2)
    plain = run(q, cache, table, seqlens, cluster=cluster)
    with schedule(**options):
        assert same_bits(plain, run(q, cache, table, seqlens, cluster=cluster))


@pytest.mark.parametrize("cluster", SIZES)
@pytest.mark.parametrize("dtype", [BF16, FP8])
def test_bits_do_not_depend_on_where_things_lie(dtype: torch.dtype, cluster: int) -> None:
    """Pages moved about, other requests beside; twice the same."""
    cache, table, seqlens, _ = filled([600, 70, 0], 32, dtype)
    q = queries(3, 2, 3)
    once = run(q, cache, table, seqlens, cluster=cluster)
    assert same_bits(once, run(q, cache, table, seqlens, cluster=cluster))
    order = torch.randperm(len(cache))
    moved = torch.where(table < len(cache), order.argsort()[table.clamp(max=len(cache) - 1)].int(), table)
    assert same_bits(once, run(q, cache[order], moved, seqlens, cluster=cluster))
    for b in range(3):
        alone = run(q[b : b + 1], cache, table[b : b + 1], seqlens[b : b + 1], cluster=cluster)
        assert same_bits([t[b : b + 1] for t in once], alone)


@pytest.mark.parametrize("dtype", [BF16, FP8])
def test_queries_one_by_one(dtype: torch.dtype) -> None:
    """Three causal queries are three steps of one where these have as many tiles: cuts follow from the length."""
    cache, table, seqlens, _ = filled([514, 300, 67, 3], 64, dtype)
    seqlens[0] = 512
    q = queries(4, 3, 2)
    together = run(q, cache, table, seqlens)
    for i in range(3):
        alone = run(q[:, i : i + 1], cache, table, seqlens - (2 - i))
        assert same_bits([t[:, i : i + 1] for t in together], alone)


@pytest.mark.parametrize("cluster", [2, 8])
@pytest.mark.parametrize("kind", ["large", "dominating", "late", "equal", "same"])
def test_hostile(kind: str, cluster: int) -> None:
    q, rows = hostile(kind)
    check(run(q, *cache_of(rows), cluster=cluster), q, [rows.double()])


@pytest.mark.parametrize("key", [False, True])
def test_nan_stays_where_it_belongs(key: bool) -> None:
    """In its query's row; or, in a key that every query sees, in every row of that request and in no other's."""
    q, rows = hostile("plain")
    cache, table, seqlens = cache_of(rows)
    q, table, seqlens = q.repeat(2, 1, 1, 1), table.repeat(2, 1), seqlens.repeat(2)
    if key:
        seqlens[0], cache[table[0, 2], 7, 100] = 128, torch.nan
    else:
        q[1, 1, 2, 100] = torch.nan
    out, lse = run(q, cache, table, seqlens)
    spoilt = (1,) if key else (1, 1, 2)
    assert out[spoilt].isnan().all() and lse[spoilt].isnan().all()
    out[spoilt], lse[spoilt] = 0, 0
    assert out.isfinite().all() and lse.isfinite().all()


def test_lengths_out_of_range_are_cut() -> None:
    cache, table, seqlens, keys = filled([128, 64], 64, BF16)
    q = queries(2, 1, 4)
    seqlens += torch.tensor([1000, -70], dtype=torch.int32)
    check(run(q, cache, table[:, :2].contiguous(), seqlens, causal=False), q, [keys[0], keys[1][:0]], causal=False)


def test_without_pages() -> None:
    q = queries(2, 1, 3)
    none = torch.zeros(0, 64, 576).bfloat16(), torch.zeros(2, 0).int(), torch.tensor([0, 5]).int()
    out, lse = run(q, *none)
    assert (out == 0).all() and lse.isneginf().all()


@pytest.mark.parametrize(("heads", "cluster"), [(16, 8), (5, 8), (64, 4), (16, 2)])
def test_budget(heads: int, cluster: int) -> None:
    """Tiles, bytes from memory, stores into other CTAs and passes over the banks as docs/mla.md has them."""
    tiles = 12
    for dtype in (BF16, FP8):
        cache, table, seqlens, _ = filled([64 * tiles], 64, dtype)
        with schedule(banks="1"):
            run(queries(1, 1, heads), cache, table, seqlens, cluster=cluster)
        spent = counters()
        assert spent["wgmma_cycles"] == tiles * 2176
        assert spent["tma_read"] == (0 if dtype == FP8 else tiles * 64 * 1152)
        assert spent["global_write"] == heads * (1024 + 4)
        assert spent["shared_wavefronts"] == spent["shared_ideal"] > 0
        # Two of 4 bytes a lane for the log-sum-exps (8 warps); 32 of 16 bytes a lane for 16 rows and 256 columns: what
        # the barriers expect, which the simulator holds against what came, is 1792 and 2048 a row.
        copies = 0 if dtype == FP8 else tiles * 9
        sends = 2 * (8 if cluster == 8 else 4) + 32 * 2 * -(-heads // 16)
        assert spent["instructions"]["async"] == copies + cluster * sends


# Source lines whose blocks no launch enters, and why.
UNREACHED: dict[str, str] = {}


@pytest.mark.parametrize("dtype", [BF16, FP8])
def test_every_basic_block_is_reached(dtype: torch.dtype) -> None:
    with coverage(KERNELS[dtype]) as seen:
        shapes = (16, [5000, 0, 65], 1, 3, 2), (16, [1100], 1, 64, 8), (128, [129, 1], 2, 3, 4)
        for page, lengths, count, heads, cluster in shapes:
            cache, table, seqlens, _ = filled(lengths, page, dtype)
            q = queries(len(lengths), count, heads)
            run(q, cache, table, seqlens, cluster=cluster)
        if dtype == FP8:
            cache.view(-1, 656)[table[0, 0] * 128, :512] = torch.arange(512).to(torch.uint8)
            run(q, cache, table, seqlens)
        # Rows that no vector may touch.
        odd, wide = (torch.full((*q.shape[:3], n), torch.nan, dtype=BF16) for n in (600, 601))
        odd[..., 1:577] = q
        lse = fresh(q)[1]
        run(odd[..., 1:577], cache, table, seqlens, into=(wide[..., 3:515], lse))
        assert same_bits((wide[..., 3:515].contiguous(), lse), run(q, cache, table, seqlens))
        assert wide[..., :3].isnan().all() and wide[..., 515:].isnan().all()
    assert seen.unreached(unreachable=UNREACHED) == []


@pytest.mark.parametrize("cluster", [0, 1, 3, 16])
def test_other_sizes_are_refused(cluster: int) -> None:
    cache, table, seqlens, _ = filled([20], 16, BF16)
    q = queries(1, 1, 2)
    with pytest.raises(RuntimeError, match=f"mla_decode: cluster: got {cluster}, wanted 2, 4 or 8"):
        _host.mla_decode_cluster(q, cache, table, seqlens, SCALE, True, *fresh(q), cluster, *target(q))


# Which calls take them.


@pytest.mark.parametrize(
    ("requests", "rows", "longest", "sms", "size"),
    [
        (1, 16, 1024, 132, 8),
        (2, 16, 1024, 132, 8),
        (16, 64, 1024, 132, 8),  # as many clusters of 8 as eight GPCs hold
        (17, 64, 1024, 132, 4),
        (32, 64, 1024, 132, 4),
        (33, 64, 768, 132, 2),
        (64, 64, 768, 132, 2),
        (65, 64, 64, 132, 0),
        (8, 128, 1024, 132, 8),  # blocks of rows count like requests
        (9, 128, 1024, 132, 4),
        (2, 65, 1024, 132, 8),
        (1, 16, 2560, 132, 8),  # where a plan would give one request all SMs, and this is no slower
        (1, 16, 2624, 132, 0),
        (1, 16, 65536, 132, 0),
        (33, 16, 1024, 132, 0),
        (1, 16, 0, 132, 8),
        (14, 16, 1024, 114, 8),
        (15, 16, 1024, 114, 4),
        (1, 16, 1024, 15, 0),  # no GPC at all
    ],
)
def test_selection(requests: int, rows: int, longest: int, sms: int, size: int) -> None:
    assert cluster_size(requests, rows, longest, sms) == size


@pytest.mark.parametrize("dtype", [BF16, FP8])
def test_who_is_taken(dtype: torch.dtype) -> None:
    """The cluster without a plan and with few keys; with a plan, the plan; a plan too where the table has more room."""
    cache, table, seqlens, keys = filled([300, 20], 64, dtype)
    q = queries(2, 1, 16)
    args = q, cache, table, seqlens
    plain = "mla_decode_fp8" if dtype == FP8 else "mla_decode_bf16"
    plan = dk.mla_decode_plan(seqlens, num_queries=1, num_heads=16, kv_dtype=dtype, policy="fixed")
    wide = torch.cat([table, table.new_full((2, 50), 2147480000)], 1)

    def decode(table: Tensor, plan: Any = None) -> tuple[set[str], tuple[Tensor, Tensor]]:
        before = dk.launch_counts()
        with dk.backend("sim:cuda"):
            result = dk.mla_decode(q, cache, table, seqlens, softmax_scale=SCALE, plan=plan)
            said = dk.explain("mla_decode", q, cache, table, seqlens, *(plan or (None,) * 3), SCALE, True, 512)
        ran = dk.launch_counts() - before
        assert all(count == 1 for count in ran.values()) and set(ran) == set(said.kernels)
        return set(ran), result

    ran, result = decode(table)
    assert ran == {KERNELS[dtype]} and same_bits(result, run(*args))
    assert decode(table, plan)[0] == {plain, "mla_decode_combine"}
    ran, result = decode(wide)
    assert ran == {plain, "mla_decode_plan", "mla_decode_combine"}
    check(result, q, exact(keys, *args[1:]))


def test_explain_says_so() -> None:
    cache, table, seqlens, _ = filled([20, 20], 16, BF16)
    args = queries(2, 3, 50), cache, table, seqlens
    text = str(dk.explain("mla_decode", *args))
    assert "on Hopper: mla_decode_bf16_cluster: 6 clusters of 8, one launch without a plan (unmeasured model)" in text
    plan = dk.mla_decode_plan(seqlens, num_queries=3, num_heads=50, num_sms=2)
    found = dk.explain("mla_decode", *args, *plan).plan
    assert found["kernels"] == ("mla_decode_bf16",) and found["words"] == "by the given plan, 3 blocks of 64 rows"
    assert dk.explain("mla_decode", args[0].float(), cache.float(), table, seqlens).plan == {}
    assert dk.explain("mla_decode", args[0][:0], cache, table[:0], seqlens[:0]).plan == {}
    assert _cuda_decode.mla_decode_choice(*args)["kernel"] == KERNELS[BF16]
