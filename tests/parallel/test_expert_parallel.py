"""Dispatch and combine against a dense mixture of experts in one process: virtual ranks, and gloo processes."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from ranks import run

import dsv3_kernels as dk
from dsv3_kernels.parallel import EPCapacityError, EPTimeoutError, ExpertParallel

HIDDEN = 6
E4M3 = torch.float8_e4m3fn


def routed(kind: str, ranks: int, num_experts: int, top_k: int, dtype=torch.float64, seed: int = 0):
    """Per rank (x, experts, weights); different numbers of tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [5 + 3 * ((r * 7) % 4) for r in range(ranks)]
    if kind == "empty rank":
        tokens[ranks // 2] = 0
    if kind == "no tokens":
        tokens = [0] * ranks
    data = []
    for t in tokens:
        experts = torch.rand(t, num_experts, generator=generator).argsort(-1)[:, :top_k]
        if kind == "hot expert":
            hot = num_experts - 1
            experts = torch.where(
                (experts == hot).any(-1, keepdim=True), experts, experts.index_fill(1, torch.tensor([0]), hot)
            )
        if kind == "dropped":
            experts = torch.where(torch.rand(t, top_k, generator=generator) < 0.4, -1, experts)
        if kind == "all dropped":
            experts = torch.full_like(experts, -1)
        x = torch.randn(t, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
        weights = torch.rand(t, top_k, generator=generator, dtype=torch.float64)
        data.append((x, experts.int(), weights if dtype == torch.float64 else weights.float()))
    return data


def expert_matrices(num_experts: int, dtype=torch.float64):
    """Another transform for every expert: an identity would hide rows that went to a wrong one."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_experts, HIDDEN, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)


def dense(x, experts, weights, matrices):
    out = torch.zeros(x.shape, dtype=torch.float64)
    for k in range(experts.shape[1]):
        chosen = experts[:, k].long()
        y = torch.einsum("th,thj->tj", x.double(), matrices.double()[chosen.clamp(min=0)])
        out = out + y * (weights[:, k].double() * (chosen >= 0)).unsqueeze(-1)
    return out


def compute(ep, rank, rows, offsets, matrices):
    """The rank's experts on its rows; past the last row NaN."""
    bounds = offsets.tolist()
    assert bounds[0] == 0 and len(bounds) == len(ep.local_experts(rank)) + 1 and offsets.dtype == torch.int32
    parts = [rows[a:b] @ matrices[e] for e, a, b in zip(ep.local_experts(rank), bounds, bounds[1:], strict=False)]
    return torch.cat([*parts, torch.full_like(rows[bounds[-1] :], torch.nan)])


KINDS = ("random", "hot expert", "empty rank", "dropped", "all dropped", "no tokens")
SIZES = [(kind, *size) for size in ((2, 8, 2), (4, 6, 1), (4, 3, 2)) for kind in KINDS]
SIZES += [("random", 5, 40, 32), ("dropped", 5, 40, 32)]


def bounds(tokens: int, top_k: int) -> int:
    return max(1, tokens * top_k)


@pytest.mark.parametrize(("kind", "ranks", "num_experts", "top_k"), SIZES)
@pytest.mark.parametrize("static", [False, True])
def test_virtual_ranks(kind, ranks, num_experts, top_k, static):
    data = routed(kind, ranks, num_experts, top_k)
    matrices = expert_matrices(num_experts).requires_grad_()
    x, experts, weights = map(list, zip(*data, strict=True))
    for tensor in (*x, *weights):
        tensor.requires_grad_()
    total = sum(len(t) for t in x)
    ep = ExpertParallel(virtual_ranks=ranks, num_experts=num_experts, hidden=HIDDEN, max_tokens=20)
    capacity = bounds(total, top_k) + 3 if static else None
    rows, scale, row_weights, offsets, handle = ep.dispatch(x, experts, weights, capacity=capacity)
    assert scale is None
    # Each row is the token that was routed, experts in order, tokens of an expert by rank, token and choice.
    for rank in range(ranks):
        wanted = [
            (x[r][t], weights[r][t, k])
            for e in ep.local_experts(rank)
            for r in range(ranks)
            for t, k in (experts[r] == e).nonzero().tolist()
        ]
        n = int(offsets[rank][-1])
        assert n == len(wanted) and len(rows[rank]) == (capacity or n)
        assert handle.counts[rank].tolist() == offsets[rank].diff().tolist()
        for i, (row, weight) in enumerate(wanted):
            assert torch.equal(rows[rank][i], row) and row_weights[rank][i] == weight
        assert not rows[rank][n:].any() and not row_weights[rank][n:].any()
    results = ep.combine([compute(ep, r, rows[r], offsets[r], matrices) for r in range(ranks)], handle)
    wanted = [dense(x[r], experts[r], weights[r], matrices) for r in range(ranks)]
    for got, exact in zip(results, wanted, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    if total:
        seeds = [torch.randn_like(r) for r in results]
        leaves = [*x, *weights, matrices]
        grads, exact_grads = (
            torch.autograd.grad(sum((o * s).sum() for o, s in zip(outputs, seeds, strict=True)), leaves)
            for outputs in (results, wanted)
        )
        for got, exact in zip(grads, exact_grads, strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-11)
    ep.check()


def test_gradcheck():
    data = routed("dropped", 2, 5, 2)
    ep = ExpertParallel(virtual_ranks=2, num_experts=5, hidden=HIDDEN, max_tokens=20)
    experts = [d[1] for d in data]

    def layer(weighted, *tensors):
        rows, _, row_weights, _, handle = ep.dispatch(list(tensors[:2]), experts, list(tensors[2:]))
        if not weighted:
            rows = [r * w.unsqueeze(-1) for r, w in zip(rows, row_weights, strict=True)]
        return tuple(ep.combine([r.sin() for r in rows], handle, weighted=weighted))

    tensors = [t[:4].clone().requires_grad_() for t in (data[0][0], data[1][0], data[0][2], data[1][2])]
    experts = [e[:4] for e in experts]
    for weighted in (True, False):
        assert torch.autograd.gradcheck(lambda *t, w=weighted: layer(w, *t), tensors)


def test_bfloat16_sums_in_float32():
    data = routed("random", 4, 16, 8, torch.bfloat16)
    x, experts, weights = map(list, zip(*data, strict=True))
    ep = ExpertParallel(virtual_ranks=4, num_experts=16, hidden=HIDDEN, max_tokens=20)
    rows, _, _, _, handle = ep.dispatch(x, experts, weights)
    results = ep.combine(rows, handle)
    for got, xs, ws in zip(results, x, weights, strict=True):
        exact = xs.double() * ws.double().sum(-1, keepdim=True)
        # At most 4 partial sums and the total are rounded to bfloat16 (8 bits).
        assert got.dtype == torch.bfloat16
        assert ((got.double() - exact).abs() <= 2.0**-8 * exact.abs() + 2.0**-8 * xs.double().abs() * 8 / 2).all()
    # One expert's rank per token, weight one: the very same bits come back.
    one = [e[:, :1].contiguous() for e in experts]
    rows, _, _, _, handle = ep.dispatch(x, one, [torch.ones(e.shape) for e in one])
    assert all(torch.equal(a, b) for a, b in zip(ep.combine(rows, handle), x, strict=True))


def test_float8_with_scales():
    generator = torch.Generator().manual_seed(3)
    x = [torch.randn(5, HIDDEN, generator=generator).to(E4M3), torch.randn(2, HIDDEN, generator=generator).to(E4M3)]
    scale = [torch.rand(2, 5, generator=generator).T, torch.rand(2, 2, generator=generator)]  # any strides
    experts = [torch.randint(0, 4, (5, 1), generator=generator), torch.randint(0, 4, (2, 1), generator=generator)]
    weights = [
        torch.rand(5, 1, generator=generator).requires_grad_(),
        torch.rand(2, 1, generator=generator).requires_grad_(),
    ]
    ep = ExpertParallel(virtual_ranks=2, num_experts=4, hidden=HIDDEN, max_tokens=5)
    for capacity in (None, 7):
        rows, row_scale, _, offsets, handle = ep.dispatch(x, experts, weights, scale=scale, capacity=capacity)
        for rank in range(2):
            at = 0
            for e in ep.local_experts(rank):
                for r in range(2):
                    for t, _ in (experts[r] == e).nonzero().tolist():
                        assert torch.equal(rows[rank][at].float(), x[r][t].float())
                        assert torch.equal(row_scale[rank][at], scale[r][t])
                        at += 1
            assert rows[rank].dtype == E4M3 and at == int(offsets[rank][-1])
        bf16 = [r.float() * s.mean(-1, keepdim=True) for r, s in zip(rows, row_scale, strict=True)]
        results = ep.combine(bf16, handle)
        for got, xs, ss, ws in zip(results, x, scale, weights, strict=True):
            torch.testing.assert_close(got, xs.float() * ss.mean(-1, keepdim=True) * ws)
        grads = torch.autograd.grad(sum(r.sum() for r in results), weights)
        for got, xs, ss in zip(grads, x, scale, strict=True):
            torch.testing.assert_close(got, (xs.float() * ss.mean(-1, keepdim=True)).sum(-1, keepdim=True))
        with pytest.raises(TypeError, match=r"rows: got torch\.float8_e4m3fn"):
            ep.combine(rows, handle)


def test_capacity_overflow():
    data = routed("random", 2, 4, 2)
    x, experts, weights = map(list, zip(*data, strict=True))
    ep = ExpertParallel(virtual_ranks=2, num_experts=4, hidden=HIDDEN, max_tokens=20)
    _, _, _, offsets, _ = ep.dispatch(x, experts, weights)
    needed = max(int(o[-1]) for o in offsets)
    ep.dispatch(x, experts, weights, capacity=needed)
    ep.check()
    rows, _, _, offsets, handle = ep.dispatch(x, experts, weights, capacity=needed - 1)
    assert all(len(r) == needed - 1 and int(o[-1]) <= needed - 1 for r, o in zip(rows, offsets, strict=True))
    assert all(o.isfinite().all() for o in ep.combine(rows, handle))
    with pytest.raises(EPCapacityError, match=f"capacity: got {needed - 1}, but {needed} rows"):
        ep.check()
    ep.check()  # said once
    ep.dispatch(x, experts, weights, capacity=1)
    with pytest.raises(EPCapacityError, match="got 1, but"):
        ep.dispatch(x, experts, weights)


def test_halves_and_out_and_no_grad():
    """Two microbatches in flight at once give the bits of one after the other."""
    ep = ExpertParallel(virtual_ranks=3, num_experts=7, hidden=HIDDEN, max_tokens=20)
    batches = [list(map(list, zip(*routed("random", 3, 7, 2, seed=s), strict=True))) for s in (1, 2)]
    apart = []
    for x, experts, weights in batches:
        rows, _, _, _, handle = ep.dispatch(x, experts, weights)
        apart.append(ep.combine([r.cos() for r in rows], handle))
    sent = [ep.dispatch_send(*b) for b in batches]
    received = [ep.dispatch_recv(s) for s in sent]
    back = [ep.combine_send([r.cos() for r in got[0]], got[4]) for got in received]
    for pending, wanted in zip(back, apart, strict=True):
        out = [torch.full_like(w, torch.nan) for w in wanted]
        assert ep.combine_recv(pending, out=out) is out
        assert all(torch.equal(a, b) for a, b in zip(out, wanted, strict=True))
        assert not any(o.requires_grad for o in out)
    x = [t.requires_grad_() for t in batches[0][0]]
    rows, _, _, _, handle = ep.dispatch(x, *batches[0][1:])
    with pytest.raises(ValueError, match="out: got a tensor, wanted None where gradients"):
        ep.combine(rows, handle, out=out)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"out: got torch\.float64"):
            ep.combine(rows, handle, out=[o[:1] for o in out])
        assert not ep.combine(rows, handle)[0].requires_grad


def test_replicas():
    """Replicated experts: tokens are spread over the copies, the result is that of the original experts."""
    load = torch.tensor([[50.0, 1, 1, 1, 30, 1]])
    phy2log, log2phy, logcnt = dk.parallel.eplb.rebalance_experts(load, 8, 1, 1, 4)
    data = routed("hot expert", 4, 6, 2)
    x, experts, weights = map(list, zip(*data, strict=True))
    physical = [dk.parallel.eplb.choose_replicas(e, log2phy[0], logcnt[0], start=r) for r, e in enumerate(experts)]
    ep = ExpertParallel(virtual_ranks=4, num_experts=8, hidden=HIDDEN, max_tokens=20)
    matrices = expert_matrices(6)
    rows, _, _, offsets, handle = ep.dispatch(x, physical, weights)
    ys = [compute(ep, r, rows[r], offsets[r], matrices[phy2log[0]]) for r in range(4)]
    for got, d in zip(ep.combine(ys, handle), data, strict=True):
        torch.testing.assert_close(got, dense(*d, matrices), rtol=1e-12, atol=1e-12)


# Processes -----------------------------------------------------------------------------------------------------------


def layer(ep, ranks, x, experts, weights, matrices, capacity):
    """One MoE layer and its gradients, on this process's ranks; returns tensors in a fixed order."""
    rows, _, _, offsets, handle = ep.dispatch(x, experts, weights, capacity=capacity)
    several = isinstance(rows, list)
    if several:
        ys = [compute(ep, r, rows[r], offsets[r], matrices) for r in ranks]
    else:
        ys = compute(ep, ranks[0], rows, offsets, matrices)
    out = ep.combine(ys, handle)
    outs, xs, ws = (out, x, weights) if several else ([out], [x], [weights])
    grads = torch.autograd.grad(sum((o * o.detach().cos()).sum() for o in outs), [*xs, *ws], retain_graph=True)
    n = len(outs)
    return [(outs[i].detach(), grads[i], grads[n + i]) for i in range(n)]


def cases(ranks):
    for kind in KINDS:
        for dtype in (torch.float64, torch.bfloat16):
            yield kind, 2 * ranks + 1, min(3, ranks), dtype, None if dtype == torch.float64 else 100


def same_as_virtual(rank):
    ranks = dist.get_world_size()
    for kind, num_experts, top_k, dtype, capacity in cases(ranks):
        data = routed(kind, ranks, num_experts, top_k, dtype)
        matrices = expert_matrices(num_experts, dtype)
        for x, _, weights in data:
            x.requires_grad_(), weights.requires_grad_()
        sizes = {"num_experts": num_experts, "hidden": HIDDEN, "max_tokens": 20}
        virtual = ExpertParallel(virtual_ranks=ranks, **sizes)
        wanted = layer(virtual, range(ranks), *map(list, zip(*data, strict=True)), matrices, capacity)[rank]
        ep = ExpertParallel(dist.group.WORLD, timeout=20, **sizes)
        for _ in range(2):
            got = layer(ep, [rank], *data[rank], matrices, capacity)[0]
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, wanted, strict=True)), kind


@pytest.mark.parametrize(
    "ranks", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_processes_give_the_bits_of_virtual_ranks(ranks):
    run(same_as_virtual, ranks)


def lost(rank, victim, phase, how, store):
    """``victim`` dies, or stalls, instead of entering ``phase``; then the others go on without it."""
    ranks = dist.get_world_size()
    x, experts, weights = routed("random", ranks, 6, 2)[rank]
    ep = ExpertParallel(None, 6, HIDDEN, 20, timeout=1.0)
    x.requires_grad_()
    start = ep._transport.start

    def trap(send, send_counts, recv_counts, name):
        if name == phase and rank == victim:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(6)
            raise SystemExit
        return start(send, send_counts, recv_counts, name)

    ep._transport.start = trap
    begin = time.monotonic()
    try:
        rows, _, _, _, handle = ep.dispatch(x, experts, weights)
        ep.combine(rows, handle).sum().backward()
    except EPTimeoutError as error:
        assert f"rank {rank}, {error.phase}: rank {victim} is" in str(error)
        seconds = time.monotonic() - begin
        dist.destroy_process_group()
        number = rank - (rank > victim)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=ranks - 1)
        again = ExpertParallel(None, 6, HIDDEN, 20, timeout=20)
        rows, _, _, _, handle = again.dispatch(x.detach(), experts, weights)
        total = again.combine(rows, handle) - x.detach() * weights.sum(-1, keepdim=True)
        assert total.abs().max() < 1e-12
        return error.peer, error.phase, seconds
    except SystemExit:
        return None
    raise AssertionError("nothing was noticed")


@pytest.mark.parametrize(
    ("phase", "victim", "how"),
    [
        ("dispatch/counts", 0, "killed"),
        ("combine/payload", 2, "killed"),
        ("dispatch backward", 1, "killed"),
        ("dispatch/payload", 1, "stalled"),
        ("combine backward", 2, "stalled"),
    ],
)
def test_a_lost_peer_is_named(phase, victim, how, tmp_path):
    results = run(lost, 3, victim, phase, how, str(tmp_path / "store"), lost=(victim,))
    for rank, result in enumerate(results):
        if rank != victim:
            peer, where, seconds = result
            assert peer == victim
            # A death may be seen one phase later by a rank that already had the victim's message.
            assert where == phase or how == "killed"
            assert seconds < 10


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": [torch.ones(2, 4)]}, TypeError, "x: got list, wanted a list of 2 tensors"),
        ({"x": torch.ones(2, 4)}, TypeError, "x: got Tensor, wanted a list of 2 tensors"),
        ({"x": [torch.ones(2, 4, dtype=torch.int32)] * 2}, TypeError, "x: got torch.int32"),
        ({"x": [torch.ones(2, 5)] * 2}, ValueError, r"x: got shape \(2, 5\), wanted \[tokens, 4\]"),
        ({"x": [torch.ones(9, 4)] * 2}, ValueError, "x: got 9 tokens, wanted at most max_tokens = 3"),
        ({"experts": [torch.ones(2, 2)] * 2}, TypeError, "experts: got torch.float32"),
        ({"experts": [torch.zeros(3, 2, dtype=torch.int32)] * 2}, ValueError, r"experts: got shape \(3, 2\)"),
        ({"experts": [torch.full((2, 2), 6)] * 2}, ValueError, "experts: got 6, wanted -1 to 5"),
        ({"experts": [torch.full((2, 2), -2)] * 2}, ValueError, "experts: got -2, wanted -1 to 5"),
        ({"weights": [torch.ones(2, 2, dtype=torch.bfloat16)] * 2}, TypeError, "weights: got torch.bfloat16"),
        ({"weights": [torch.ones(2, 1)] * 2}, ValueError, r"weights: got shape \(2, 1\), wanted \(2, 2\)"),
        ({"scale": [torch.ones(2, 1, dtype=torch.float64)] * 2}, TypeError, "scale: got torch.float64"),
        ({"scale": [torch.ones(3, 1)] * 2}, ValueError, r"scale: got shape \(3, 1\)"),
        ({"capacity": 0}, ValueError, "capacity: got 0"),
        ({"capacity": 1.5}, TypeError, "capacity: got float"),
    ],
)
def test_bad_arguments(change, error, words):
    ep = ExpertParallel(virtual_ranks=2, num_experts=6, hidden=4, max_tokens=3)
    good = {
        "x": [torch.ones(2, 4)] * 2,
        "experts": [torch.zeros(2, 2, dtype=torch.int32)] * 2,
        "weights": [torch.ones(2, 2)] * 2,
    }
    with pytest.raises(error, match=words):
        ep.dispatch(**good | change)
    rows, _, _, _, handle = ep.dispatch(**good)
    with pytest.raises(ValueError, match=r"rows: got shape \(1, 4\)"):
        ep.combine([r[:1] for r in rows], handle)


SIZED = {"num_experts": 4, "hidden": 1, "max_tokens": 1}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, TypeError, "num_experts: got NoneType"),
        (SIZED | {"hidden": 0, "virtual_ranks": 2}, ValueError, "hidden: got 0"),
        (SIZED | {"virtual_ranks": 0}, ValueError, "virtual_ranks: got 0"),
        (SIZED, RuntimeError, "not initialised; give virtual_ranks"),
        (SIZED | {"virtual_ranks": 2, "transport": "ring"}, ValueError, "transport: got 'ring'"),
        (SIZED | {"virtual_ranks": 2, "transport": "p2p"}, RuntimeError, "p2p needs"),
        (SIZED | {"virtual_ranks": 2, "timeout": 0}, ValueError, "timeout: got 0"),
    ],
)
def test_bad_construction(arguments, error, words):
    with pytest.raises(error, match=words):
        ExpertParallel(**arguments)
