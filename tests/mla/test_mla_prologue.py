"""mla_prologue: the bits of the four ops that it stands for, each of which is held against float64 by its own test."""

from __future__ import annotations

import pytest
import torch
from checks import close, compiles, opcheck, same_bits
from latent_cache import FP8, empty
from simulated import SCHEDULES, coverage, launches, needs_simulator, schedule

import dsv3_kernels as dk
from dsv3_kernels import _simulator
from dsv3_kernels.mla import _cuda

OP = "mla_prologue"
EPS = 1e-6
RANK = 1536


def inputs(tokens, cache_dtype=torch.bfloat16, dtype=torch.bfloat16, rank=RANK, weights=torch.bfloat16, page=16):
    """Arguments; x lies in a wider tensor of NaN, and rows of the table that no position names are NaN."""
    x = torch.full((tokens, rank + 576 + 16), torch.nan, dtype=dtype)[:, 8 : 8 + rank + 576]
    x.copy_(torch.randn(x.shape) * torch.exp(torch.randn(tokens, 1) * 2))
    q_weight, kv_weight = ((1 + torch.randn(width) / 8).to(weights) for width in (rank, 512))
    positions = torch.randperm(40)[:tokens]
    table = torch.full((40, 64), torch.nan)
    table[positions] = torch.randn(tokens, 64)
    slots = torch.randperm(4 * page)[:tokens]
    slots[1::4] = -1
    return [x, q_weight, kv_weight, positions, table, empty(4, page, 576, cache_dtype), slots]


def composed(x, q_weight, kv_weight, positions, table, cache, slots, pow2_scale=False, cache_pow2_scale=False):
    """The four ops in a row, in eager."""
    with dk.backend("eager"):
        query, key, k_rope = x.split([q_weight.shape[0], 512, 64], -1)
        q, scale = dk.rms_norm_quantize_1x128(query, q_weight, EPS, pow2_scale=pow2_scale)[:2]
        latent, k_rope = dk.rms_norm(key, kv_weight, EPS), dk.rope(k_rope, positions, table)
        cache = cache.clone()
        dk.mla_cache_append(cache, slots, latent, k_rope, pow2_scale=cache_pow2_scale)
    return q, scale, latent, k_rope, cache


def check(device, args, **options):
    wanted = composed(*args, **options)
    ours = [t.to(device) for t in args]
    got = dk.mla_prologue(*ours, eps=EPS, keys=True, **options)
    assert got[1].stride() == wanted[1].stride() and all(t.is_contiguous() for t in (got[0], *got[2:]))
    assert same_bits([t.cpu() for t in (*got, ours[5])], wanted)
    short = [t.to(device) for t in args]
    assert same_bits(dk.mla_prologue(*short, eps=EPS, **options), got[:2]) and same_bits(short[5], ours[5])


@pytest.mark.parametrize("tokens", [1, 5, 33])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8])
def test_the_bits_of_four_ops(backend, device, tokens, cache_dtype):
    check(device, inputs(tokens, cache_dtype))


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("rank", [8, 136, 2048])
@pytest.mark.parametrize("weights", [torch.float32, torch.float16])
def test_widths_weights_and_scales(backend, device, cache_dtype, rank, weights):
    args = inputs(6, cache_dtype, rank=rank, weights=weights, page=64)
    args[3] = args[3].int()
    check(device, args, pow2_scale=rank == 136, cache_pow2_scale=rank == 8)


def test_zeros_nan_and_infinity_stay_in_their_place(backend, device):
    args = inputs(6, FP8)
    args[0][0], args[0][2, 5], args[0][3, RANK + 200], args[0][4, RANK + 512] = 0, torch.inf, torch.inf, torch.inf
    got = [t.to(device) for t in args]
    q, scale = dk.mla_prologue(*got, eps=EPS)
    wanted = composed(*args)
    assert same_bits([q.cpu()[[0, 1, 3, 4, 5]], scale.cpu()], [wanted[0][[0, 1, 3, 4, 5]], wanted[1]])
    rows = [cache.cpu().view(-1, 656)[args[6][[0, 2, 4]]] for cache in (got[5], wanted[4])]
    assert same_bits(rows[0][:, :528], rows[1][:, :528])


PORTABLE = ["eager", "sim:triton"] if _simulator.missing() is None else ["eager"]  # not CUDA: it is bfloat16's


@pytest.mark.parametrize("where", PORTABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(device, dtype, where):
    with dk.backend(where if device.type == "cpu" else None):
        check(device, inputs(5, dtype, dtype))
        check(device, inputs(5, FP8, dtype))


@pytest.mark.parametrize("where", PORTABLE)
def test_toy_widths(device, where):
    with dk.backend(where if device.type == "cpu" else None):
        toy_widths()


def toy_widths():
    x, cache = torch.randn(3, 21 + 14 + 6), torch.full((1, 16, 20), torch.nan)
    weights, table = (torch.randn(21), torch.randn(14)), torch.randn(9, 6)
    at, slots = torch.tensor([8, 0, 2]), torch.tensor([3, -1, 0])
    q, scale, latent, k_rope = dk.mla_prologue(x, *weights, at, table, cache, slots, eps=EPS, keys=True)
    assert same_bits(q, dk.rms_norm_quantize_1x128(x[:, :21], weights[0], EPS)[0]) and scale.shape == (3, 1)
    wide = x[:, 21:35].double()
    close(latent, wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weights[1].double(), 1e-5)
    assert same_bits(cache[0, [3, 0]], torch.cat([latent, k_rope], 1)[[0, 2]]) and int(cache.isnan().sum()) == 14 * 20


def test_no_tokens(device):
    args = [t.to(device) for t in inputs(0)]
    q, scale = dk.mla_prologue(*args, eps=EPS)
    assert q.shape == (0, RANK) and scale.shape == (0, 12) and args[5].isnan().all()


@needs_simulator
@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
def test_triton_under_any_schedule(options):
    """Long rows too, a few columns of a last chunk, and every block of the kernel."""
    with coverage(TRITON) as seen, dk.backend("sim:triton"):
        for rank, cache_dtype in ((2100, torch.bfloat16), (136, FP8)):
            args = inputs(3, cache_dtype, rank=rank)
            before = dk.launch_counts()[TRITON]
            with schedule(**options):
                check(torch.device("cpu"), args)
            assert dk.launch_counts()[TRITON] == before + 2
        no_latent(options)
    never = {"a, b = tl.split(": "the loop over the latent without a turn, and an FP8 cache's is 512 wide"}
    assert seen.unreached(unreachable=never) == []


def no_latent(options):
    """A cache of rotary keys alone: the loop over the latent has no turn."""
    x, weights = torch.randn(2, 3 + 64).bfloat16(), (torch.randn(3), torch.randn(0))
    rest = torch.tensor([4, 0]), torch.randn(5, 64), torch.zeros(1, 16, 64).bfloat16(), torch.tensor([9, -1])
    with schedule(**options):
        got = *dk.mla_prologue(x, *weights, *rest, eps=EPS), rest[2].clone()
    rest[2].zero_()
    with dk.backend("eager"):
        assert same_bits(got, (*dk.mla_prologue(x, *weights, *rest, eps=EPS), rest[2]))


TRITON = "triton_mla_prologue"
CACHES = {torch.bfloat16: "mla_prologue_bf16", FP8: "mla_prologue_fp8"}


def launch(args, keys):
    """The CUDA kernel itself, through the simulator."""
    tokens, rank = len(args[0]), len(args[1])
    q, scale = torch.empty(tokens, rank, dtype=torch.float8_e4m3fn), torch.empty(rank // 128, 8)[:, :tokens].t()
    latent, k_rope = torch.empty(tokens, 512).bfloat16(), torch.empty(tokens, 64).bfloat16()
    with launches(CACHES[args[5].dtype]):
        _cuda.mla_prologue(*args, EPS, False, False, keys, q, scale, latent, k_rope)
    return q, scale, latent, k_rope


def launch_triton(args, keys):
    with dk.backend("sim:triton"):
        return dk.mla_prologue(*args, eps=EPS, keys=keys)


@needs_simulator
@pytest.mark.parametrize("run", [launch, launch_triton])
@pytest.mark.parametrize("cache_dtype", CACHES)
def test_kernels_skip_what_lies_outside(cache_dtype, run):
    """A slot outside the cache is skipped, a position outside the table gives NaN; eager refuses both."""
    args = inputs(5, cache_dtype)
    args[3][2], args[3][3], args[6] = 40, -1, torch.tensor([64, -5, 7, 2**40, 63])
    q, _, latent, k_rope = run(args, True)
    args[3][2:4] = args[3][0]
    wanted = composed(*args[:5], empty(4, 16, 576, cache_dtype), torch.tensor([-1, -1, 7, -1, 63]))
    assert same_bits([q, latent], [wanted[0], wanted[2]])
    assert k_rope.isnan().all(1).tolist() == [False, False, True, True, False]
    ours, theirs = (cache.view(64, -1).view(torch.uint8) for cache in (args[5], wanted[4]))
    rope = 1024 if cache_dtype == torch.bfloat16 else 528
    assert torch.equal(ours[:, :rope], theirs[:, :rope])  # slots 7 and 63, and no others
    assert ours[7, rope:].clone().view(torch.bfloat16).isnan().all() and torch.equal(ours[63], theirs[63])


@needs_simulator
@pytest.mark.parametrize("cache_dtype", CACHES)
def test_kernels_reach_every_block(cache_dtype):
    with coverage(CACHES[cache_dtype]) as seen:
        for weights in (torch.bfloat16, torch.float16, torch.float32):
            args = inputs(6, cache_dtype, weights=weights, rank=2048)
            if weights == torch.bfloat16:
                args[3] = args[3].int()
                args[3][0] = 40
            launch(args, keys=weights == torch.float32)
    assert seen.unreached() == []


def test_op_contract(device):
    for cache_dtype in (torch.bfloat16, FP8):
        args = [t.to(device) for t in inputs(3, cache_dtype)]
        args[0], args[4], args[5] = args[0].contiguous(), args[4].nan_to_num(), torch.zeros_like(args[5])
        opcheck(torch.ops.dsv3_kernels.mla_prologue.default, (*args, EPS, False, True, cache_dtype == FP8))


def test_compiles():
    x, *rest = inputs(3, FP8)

    def prologue(x):
        q_weight, kv_weight, positions, table, _, slots = rest
        cache = torch.zeros(4, 16, 656, dtype=torch.uint8)
        return *dk.mla_prologue(x * 2, q_weight, kv_weight, positions, table, cache, slots, eps=EPS), cache

    compiles(prologue, x)


X, QW, KW, P, CS, C, SLOTS = (t.nan_to_num() for t in inputs(4))
NAMES = ("x", "q_weight", "kv_weight", "positions", "cos_sin", "kv_cache", "slots")


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (TypeError, "x: got list", {"x": []}),
        (TypeError, "x: got dtype float64", {"x": X.double()}),
        (TypeError, "q_weight: got dtype int32", {"q_weight": QW.int()}),
        (TypeError, "kv_weight: got dtype float64", {"kv_weight": KW.double()}),
        (TypeError, "kv_cache: got dtype float32, wanted bfloat16 or uint8", {"kv_cache": C.float()}),
        (TypeError, "positions: got dtype float32, wanted int32 or int64", {"positions": P.float()}),
        (TypeError, "cos_sin: got dtype bfloat16, wanted float32", {"cos_sin": CS.bfloat16()}),
        (TypeError, "slots: got dtype int32, wanted int64", {"slots": SLOTS.int()}),
        (TypeError, "eps: got str, wanted a number", {"eps": "1e-6"}),
        (ValueError, r"x: got shape \[4, 2111\], wanted \[T, 2112\]", {"x": X[:, 1:]}),
        (ValueError, "x: got stride 2 in the last", {"x": torch.zeros(4, 4224).bfloat16()[:, ::2]}),
        (ValueError, r"q_weight: got shape \[1, 1536\], wanted \[Q\]", {"q_weight": QW[None]}),
        (ValueError, "kv_weight: got 511, wanted 512", {"kv_weight": KW[1:], "kv_cache": empty(4, 16, 0, FP8)}),
        (ValueError, "kv_cache: got -1, wanted an even rotary width", {"kv_cache": C[..., :511].contiguous()}),
        (ValueError, r"positions: got shape \[3\], wanted \[4\]", {"positions": P[:3]}),
        (ValueError, r"cos_sin: got shape \[40, 32\], wanted \[P, 64\]", {"cos_sin": CS[:, :32]}),
        (ValueError, r"slots: got shape \[3\], wanted \[4\]", {"slots": SLOTS[:3]}),
        (ValueError, "slots: got 64, wanted values", {"slots": SLOTS.clamp(min=0) * 0 + torch.arange(61, 65)}),
        (ValueError, "positions: got 40, wanted values", {"positions": P * 0 + 40}),
        (ValueError, "kv_cache: shares memory with x", {"x": C.view(-1)[: 4 * 2112].view(4, 2112)}),
        (RuntimeError, "slots: got device meta", {"slots": SLOTS.to("meta")}),
    ],
)
def test_rejects(error, words, changes):
    given = {**dict(zip(NAMES, (X, QW, KW, P, CS, C, SLOTS), strict=True)), "eps": EPS}
    with pytest.raises(error, match=f"(mla_prologue|mla_cache_append|rope): {words}"):
        dk.mla_prologue(**{**given, **changes})
