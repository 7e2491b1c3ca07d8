"""mla_decode against float64, request by request, with an error bound for every element."""

from __future__ import annotations

import pytest
import torch
from checks import close, compiles, opcheck, roundoff, same_bits
from latent_cache import FP8, filled

import dsv3_kernels as dk

OP = "mla_decode"
SCALE = 0.1352338


def definition(q, keys, causal, scale=SCALE, latent=512, weight_roundoff=0.0):
    """Output and log-sum-exp in float64, and how far sums in float32 and the rounding of the output may be off.

    `weight_roundoff`: what the rounding of a weight before its product adds (kernels round them to bfloat16).
    """
    exact = 2.0**-53 if q.dtype == torch.float64 else 2.0**-24
    inner = 32 * exact  # about sqrt(576) half units: the longest sum here
    queries = q.shape[1]
    out, lse = torch.zeros(*q.shape[:3], latent).double(), torch.full(q.shape[:3], -torch.inf).double()
    out_off, lse_off = torch.zeros_like(out), torch.zeros_like(lse)
    for b, rows in enumerate(keys):
        for i in range(queries):
            seen = rows[: max(len(rows) - (queries - 1 - i), 0)] if causal else rows
            if len(seen) == 0:
                continue
            query = q[b, i].double()
            s = scale * query @ seen.T
            s_off = (inner * scale * query.abs() @ seen.abs().T).amax(1, keepdim=True)
            p, values = s.softmax(-1), seen[:, :latent]
            out[b, i], lse[b, i] = p @ values, s.logsumexp(-1)
            p_off = 2 * s_off + 4 * inner
            out_off[b, i] = roundoff(q.dtype) * out[b, i].abs() + (p_off + weight_roundoff) * (p @ values.abs())
            lse_off[b, i] = p_off[:, 0] + exact * lse[b, i].abs()
    return out, lse, out_off + 1e-30, lse_off


def check(device, q, filled_cache, causal=True, scale=SCALE, latent=512, backend=None, **options):
    """`backend`: by default the one that the device takes by itself."""
    cache, table, lengths, keys = filled_cache
    args = (t.to(device) for t in (q, cache, table, lengths))
    options = options if latent == 512 else {**options, "latent": latent}
    out, lse = dk.mla_decode(*args, softmax_scale=scale, causal=causal, **options)
    in_kernel = device.type != "cpu" if backend is None else backend != "eager"
    weight_roundoff = roundoff(q.dtype) if in_kernel and q.dtype.itemsize == 2 else 0.0
    wanted = definition(q, keys, causal, scale, latent, weight_roundoff)
    assert out.dtype == q.dtype and lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert out.is_contiguous() and lse.is_contiguous()
    close(out, wanted[0], wanted[2], "out")
    close(lse, wanted[1], wanted[3], "lse")
    return out, lse


LENGTHS = [0, 1, 2, 63, 64, 65, 129, 200]


# Powers of two, where kernels read: they round a key to bfloat16, which is exact then (test_decode_kernels_sim.py has
# the others).
def cache_for(backend, lengths, page, dtype):
    return filled(lengths, page, dtype, pow2_scale=backend != "eager")


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("page", [16, 32, 64, 128])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_against_float64(backend, device, dtype, page, queries, causal):
    q = torch.randn(len(LENGTHS), queries, 5, 576).bfloat16() * 0.2
    check(device, q, cache_for(backend, LENGTHS, page, dtype), causal, backend=backend)


@pytest.mark.parametrize("heads", [1, 16, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_numbers_of_heads(backend, device, heads, dtype):
    q = torch.randn(2, 1, heads, 576).bfloat16() * 0.2
    check(device, q, cache_for(backend, [70, 33], 64, dtype), backend=backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("causal", [True, False])
def test_other_dtypes(device, dtype, causal):
    q = torch.randn(len(LENGTHS), 3, 3, 576).to(dtype) * 0.2
    check(device, q, filled(LENGTHS, 16, dtype), causal)
    q = q[:2, :2]
    if dtype == torch.float16:
        check(device, q, filled([20, 33], 16, FP8))


@pytest.mark.parametrize("widths", [(16, 8), (21, 6), (1, 0)], ids=str)
def test_toy_widths(device, widths):
    q = torch.randn(3, 2, 5, sum(widths))
    check(device, q, filled([0, 20, 33], 16, torch.float32, sum(widths), widths[0]), latent=widths[0])


@pytest.mark.parametrize("requests", [20, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_numbers_of_requests(backend, device, requests, dtype):
    """CUDA kernels serve few requests by clusters, whose size follows from how many there are."""
    lengths = [(37 * b) % 130 for b in range(requests)]
    q = torch.randn(requests, 1, 2, 576).bfloat16() * 0.2
    before = dk.launch_counts()
    check(device, q, cache_for(backend, lengths, 64, dtype), backend=backend)
    if backend in ("cuda", "sim:cuda"):
        assert dk.launch_counts() - before == {f"mla_decode_{'fp8' if dtype == FP8 else 'bf16'}_cluster": 1}


@pytest.mark.parametrize("spread", [0.0, 8.0])
def test_constant_and_peaked_weights(backend, device, spread):
    check(device, (torch.randn(1, 2, 4, 576) * spread).bfloat16(), filled([100], 64, torch.bfloat16), backend=backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_more_queries_than_keys(backend, device, dtype):
    """Queries before the first key give 0 and -inf; a length of 0 does for all of them."""
    q = torch.randn(3, 4, 2, 576).bfloat16()
    out, lse = check(device, q, cache_for(backend, [2, 0, 4], 16, dtype), backend=backend)
    empty = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    assert (lse.cpu().isneginf().all(-1) == empty).all() and (out.cpu()[empty] == 0).all()


def test_queries_one_by_one(backend, device):
    """A causal call of four queries is four calls of one, each with its own length."""
    cache, table, lengths, _ = (
        t.to(device) if isinstance(t, torch.Tensor) else t for t in filled([66, 9], 32, torch.bfloat16)
    )
    q = (torch.randn(2, 4, 3, 576) * 0.2).bfloat16().to(device)
    plan = dk.mla_decode_plan(lengths, num_queries=4, num_heads=3, policy="fixed")
    together = dk.mla_decode(q, cache, table, lengths, softmax_scale=SCALE, plan=plan)
    for i in range(4):
        shorter = lengths - (3 - i)
        plan = dk.mla_decode_plan(shorter, num_queries=1, num_heads=3, policy="fixed")
        alone = dk.mla_decode(q[:, i : i + 1], cache, table, shorter, softmax_scale=SCALE, plan=plan)
        if backend == "eager":
            close(together[0][:, i : i + 1], alone[0], together[0][:, i : i + 1].abs() * 2**-7 + 1e-5)
            close(together[1][:, i : i + 1], alone[1], 1e-5)
        else:
            assert same_bits([t[:, i : i + 1] for t in together], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_the_order_of_pages_does_not_matter(backend, device, dtype):
    cache, table, lengths, _ = filled([90, 20], 16, dtype)
    order = torch.randperm(len(cache))
    moved = torch.where(table < len(cache), order.argsort()[table.clamp(max=len(cache) - 1)].int(), table)
    q = torch.randn(2, 1, 4, 576).bfloat16().to(device)
    a = dk.mla_decode(q, cache.to(device), table.to(device), lengths.to(device), softmax_scale=SCALE)
    b = dk.mla_decode(q, cache[order].to(device), moved.to(device), lengths.to(device), softmax_scale=SCALE)
    assert same_bits(a, b)


def test_shared_pages(backend, device):
    """Two requests with a common prefix read the same page."""
    cache, table, lengths, keys = filled([40, 40], 32, torch.bfloat16)
    table[1, 0] = table[0, 0]
    keys[1] = torch.cat([keys[0][:32], keys[1][32:]])
    check(device, torch.randn(2, 1, 2, 576).bfloat16() * 0.2, (cache, table, lengths, keys), backend=backend)


def test_agrees_with_the_expanded_form(device):
    """Absorbed against mla_prefill: q_nope W_UK on the cache, W_UV behind; two independent paths to one attention."""
    heads, lengths = 3, [17, 40]
    cache, table, seqlens, keys = filled(lengths, 16, torch.float64)
    w_uk, w_uv = torch.randn(2, heads, 128, 512).double() * 0.05
    q = torch.randn(2, heads, 192).double()
    absorbed = torch.cat([torch.einsum("bhd,hdc->bhc", q[..., :128], w_uk), q[..., 128:]], -1)
    out, lse = dk.mla_decode(absorbed[:, None], cache, table, seqlens, softmax_scale=SCALE)
    out = torch.einsum("bhc,hdc->bhd", out[:, 0], w_uv)
    rows = torch.cat(keys)
    k_nope, v = (torch.einsum("sc,hdc->shd", rows[:, :512], w) for w in (w_uk, w_uv))
    bounds = torch.tensor([0, 17, 57], dtype=torch.int32)
    one_each = torch.arange(3, dtype=torch.int32)
    wanted = dk.mla_prefill(q, k_nope, rows[:, 512:], v, one_each, bounds, softmax_scale=SCALE)
    close(out, wanted[0], 1e-12)
    close(lse[:, 0], wanted[1], 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("pair", [True, False])
def test_out_and_strided_queries(backend, device, dtype, pair):
    """Writes the given memory and nothing around it; q and the cache's pages are parts of wider tensors."""
    cache, table, lengths, _ = filled([30, 0, 70], 32, dtype)
    layers = torch.stack([cache, cache], 1)[:, 1].to(device)
    store = torch.full((3, 2, 6, 600), torch.nan, dtype=torch.bfloat16, device=device)
    q = store[:, :, 1:5, 10:586]
    q.copy_(torch.randn(3, 2, 4, 576) * 0.2)
    wanted = dk.mla_decode(q.contiguous(), cache.to(device), table.to(device), lengths.to(device), softmax_scale=SCALE)
    room = torch.full((3, 2, 5, 520), 7.0, dtype=torch.bfloat16, device=device)
    lse_room = torch.full((4, 2, 4), 7.0, device=device)
    out = (room[:, :, :4, :512], lse_room[:3]) if pair else room[:, :, :4, :512]
    got = dk.mla_decode(q, layers, table.to(device), lengths.to(device), softmax_scale=SCALE, out=out)
    assert got[0] is (out[0] if pair else out) and (not pair or got[1] is out[1])
    assert same_bits([t.contiguous() for t in got], wanted)
    assert (room[:, :, 4] == 7).all() and (room[..., 512:] == 7).all() and (lse_room[3] == 7).all()


@pytest.mark.parametrize("policy", ["balanced", "fixed"])
def test_with_a_plan(backend, device, policy):
    full = filled([700, 0, 64, 1], 64, torch.bfloat16)
    plan = dk.mla_decode_plan(full[2].to(device), num_queries=2, num_heads=4, policy=policy, num_sms=7)
    check(device, torch.randn(4, 2, 4, 576).bfloat16() * 0.2, full, backend=backend, plan=plan)


@pytest.mark.parametrize("shape", [(0, 1, 4), (2, 0, 4), (2, 1, 0)], ids=str)
def test_empty(device, shape):
    cache, table, lengths, _ = (
        t.to(device) if isinstance(t, torch.Tensor) else t for t in filled([20] * shape[0], 16, torch.bfloat16)
    )
    out, lse = dk.mla_decode(torch.empty(*shape, 576).bfloat16().to(device), cache, table, lengths, softmax_scale=SCALE)
    assert out.shape == (*shape, 512) and lse.shape == shape


def test_no_pages_at_all(backend, device):
    cache = torch.zeros(0, 64, 576, device=device, dtype=torch.bfloat16)
    table, lengths = (
        torch.zeros(2, 0, dtype=torch.int32, device=device),
        torch.zeros(2, dtype=torch.int32, device=device),
    )
    q = torch.randn(2, 1, 3, 576, device=device).bfloat16()
    out, lse = dk.mla_decode(q, cache, table, lengths, softmax_scale=SCALE)
    assert (out == 0).all() and lse.isneginf().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_twice_the_same_bits(backend, device, dtype):
    cache, table, lengths, _ = filled([300, 65, 0], 64, dtype)
    args = [t.to(device) for t in (torch.randn(3, 2, 16, 576).bfloat16(), cache, table, lengths)]
    assert same_bits(*(dk.mla_decode(*args, softmax_scale=SCALE) for _ in range(2)))


def test_op_contract(device):
    for dtype in (torch.bfloat16, FP8):
        cache, table, lengths, _ = filled([20, 33], 16, dtype)
        cache = cache if dtype == FP8 else cache.nan_to_num()
        args = [t.to(device) for t in (torch.randn(2, 1, 4, 576).bfloat16(), cache, table, lengths)]
        rest = (None, None, None, SCALE, True, 512)
        opcheck(torch.ops.dsv3_kernels.mla_decode.default, (*args, *rest))
    plan = dk.mla_decode_plan(args[3], num_queries=1, num_heads=4, num_sms=3)
    outs = dk.mla_decode(*args, softmax_scale=SCALE)
    opcheck(torch.ops.dsv3_kernels.mla_decode_out.default, (*args, *plan, SCALE, False, 512, *outs))


def test_compiles():
    cache, table, lengths, _ = filled([20, 33], 16, FP8)
    q = torch.randn(2, 1, 4, 576).bfloat16()

    def step(q):
        plan = dk.mla_decode_plan(lengths, num_queries=1, num_heads=4)
        return dk.mla_decode(q * 2, cache, table, lengths, softmax_scale=SCALE, plan=plan)

    compiles(step, q)

    def with_out(q):
        out = torch.empty(2, 1, 4, 512, dtype=torch.bfloat16), torch.empty(2, 1, 4)
        return dk.mla_decode(q, cache, table, lengths, softmax_scale=SCALE, out=out)

    compiles(with_out, q)


Q, C, C8 = torch.zeros(2, 1, 4, 576), torch.zeros(3, 16, 576), torch.zeros(3, 16, 656, dtype=torch.uint8)
TABLE, LEN = torch.tensor([[0, 1], [2, 9]], dtype=torch.int32), torch.tensor([20, 16], dtype=torch.int32)
OUT, LSE = torch.zeros(2, 1, 4, 512), torch.zeros(2, 1, 4)
PLAN = dk.mla_decode_plan(LEN, num_queries=1, num_heads=4, num_sms=2)


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (TypeError, "q: got list", {"q": []}),
        (TypeError, "q: got dtype int32", {"q": Q.int()}),
        (TypeError, "kv_cache: got dtype bfloat16, wanted float32 or uint8", {"kv_cache": C.bfloat16()}),
        (TypeError, "block_table: got dtype int64, wanted int32", {"block_table": TABLE.long()}),
        (TypeError, "cache_seqlens: got dtype int64, wanted int32", {"cache_seqlens": LEN.long()}),
        (TypeError, "softmax_scale: got NoneType, wanted a number", {"softmax_scale": None}),
        (TypeError, "plan: got tuple, wanted the Plan of mla_decode_plan", {"plan": tuple(PLAN)}),
        (TypeError, "latent: got float, wanted an int", {"latent": 512.0}),
        (TypeError, "out: got dtype bfloat16, wanted float32", {"out": OUT.bfloat16()}),
        (TypeError, r"out\[1\]: got dtype bfloat16, wanted float32", {"out": (OUT, LSE.bfloat16())}),
        (ValueError, r"q: got shape \[2, 4, 576\], wanted \[B, Sq, H, width\]", {"q": Q[:, 0]}),
        (ValueError, "q: got 512, wanted the width of a key", {"q": Q[..., :512]}),
        (ValueError, "q: got 500, wanted the width of a key", {"kv_cache": C8, "q": Q[..., :500]}),
        (ValueError, "q: got stride 2 in the last dimension", {"q": torch.zeros(2, 1, 4, 1152)[..., ::2]}),
        (ValueError, "kv_cache: got 10, wanted a page of 16, 32, 64 or 128", {"kv_cache": C[:, :10]}),
        (
            ValueError,
            "latent: got 512, wanted at most 24, the width",
            {"kv_cache": C[..., :24].contiguous(), "q": Q[..., :24]},
        ),
        (ValueError, "latent: got 16, wanted 512", {"kv_cache": C8, "latent": 16}),
        (ValueError, r"block_table: got shape \[1, 2\], wanted \[2, P\]", {"block_table": TABLE[:1]}),
        (ValueError, r"cache_seqlens: got shape \[1\], wanted \[2\]", {"cache_seqlens": LEN[:1]}),
        (ValueError, "cache_seqlens: got strides", {"cache_seqlens": LEN.repeat_interleave(2)[::2]}),
        (ValueError, r"plan.splits: got shape \[2\], wanted \[3\]", {"plan": PLAN._replace(splits=PLAN.splits[:2])}),
        (ValueError, r"cache_seqlens: got 36, wanted values in \[0, 33\)", {"cache_seqlens": LEN + 16}),
        (ValueError, r"cache_seqlens: got -4, wanted values in \[0, 33\)", {"cache_seqlens": LEN - 20}),
        (ValueError, r"block_table: got 9, wanted values in \[0, 3\)", {"cache_seqlens": LEN + 1}),
        (ValueError, r"block_table: got -1, wanted values in \[0, 3\)", {"block_table": TABLE - 1}),
        (ValueError, r"out: got shape \[1, 1, 4, 512\], wanted \[2, 1, 4, 512\]", {"out": OUT[:1]}),
        (ValueError, r"out\[1\]: got shape \[2, 4\], wanted \[2, 1, 4\]", {"out": (OUT, LSE[:, 0])}),
        (ValueError, "out: got stride 2 in the last", {"out": torch.zeros(2, 1, 4, 1024)[..., ::2]}),
        (ValueError, r"out\[1\]: got strides", {"out": (OUT, torch.zeros(2, 1, 8)[..., ::2])}),
        (ValueError, "out: shares memory with q", {"out": Q[..., :512]}),
        (RuntimeError, "kv_cache: got device meta, wanted cpu as q", {"kv_cache": C.to("meta")}),
        (RuntimeError, "lse: got device meta, wanted cpu as q", {"out": (OUT, LSE.to("meta"))}),
    ],
)
def test_rejects(error, words, changes):
    given = {"q": Q, "kv_cache": C, "block_table": TABLE, "cache_seqlens": LEN, "softmax_scale": SCALE}
    with pytest.raises(error, match=f"^mla_decode: {words}"):
        dk.mla_decode(**{**given, **changes})


def test_the_scale_has_no_default():
    with pytest.raises(TypeError, match="softmax_scale"):
        dk.mla_decode(Q, C, TABLE, LEN)
