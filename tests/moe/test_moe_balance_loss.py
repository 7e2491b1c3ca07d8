"""moe_balance_loss against its equations in float64, sequence by sequence; the gradient against autograd."""

from __future__ import annotations

import pytest
import torch
from checks import close, compiles_with_gradients, opcheck, same_bits

import dsv3_kernels as dk

OP = "moe_balance_loss"


def definition(scores, experts, seq_ids, alpha):
    losses = []
    for sequence in sorted({s for s in seq_ids.tolist() if s >= 0}):
        mine = seq_ids == sequence
        tokens, num_experts = int(mine.sum()), scores.shape[1]
        chosen = experts[mine].flatten().tolist()
        f = torch.tensor([chosen.count(e) for e in range(num_experts)]).double()
        f *= num_experts / (experts.shape[1] * tokens)
        s = scores[mine].double()
        losses.append((f * (s / (s.sum(1, keepdim=True) + 1e-20)).mean(0)).sum())
    return alpha * torch.stack(losses).mean() if losses else (scores.double() * 0).sum()


def case(tokens, num_experts, top_k, dtype=torch.float32, dropped=0.1):
    scores = torch.rand(tokens, num_experts, dtype=dtype)
    experts = torch.rand(tokens, num_experts).argsort(1)[:, :top_k]
    return scores, experts.masked_fill(torch.rand(tokens, top_k) < dropped, -1)


SEQUENCES = {
    "one": lambda t: torch.zeros(t, dtype=torch.int64),
    "packed": lambda t: (torch.arange(t) * 4 // max(t, 1)).int(),
    "mixed, with gaps and tokens left out": lambda t: torch.randint(-1, max(t, 1), (t,)).clamp(max=5),
    "each its own": lambda t: torch.arange(t).flip(0),
    "all left out": lambda t: torch.full((t,), -1),
}


@pytest.mark.parametrize("sequences", SEQUENCES)
@pytest.mark.parametrize(("tokens", "num_experts", "top_k"), [(1, 1, 1), (40, 8, 2), (33, 256, 8), (7, 12, 5)])
def test_loss_and_gradient(backend, device, sequences, tokens, num_experts, top_k):
    scores, experts = case(tokens, num_experts, top_k)
    seq_ids = SEQUENCES[sequences](tokens)
    scores[seq_ids < 0] = torch.nan  # not read
    ours = scores.clone().to(device).requires_grad_()
    loss = dk.moe_balance_loss(ours, experts.to(device), seq_ids=seq_ids.to(device), alpha=0.3)
    assert loss.shape == () and loss.dtype == torch.float32
    (loss * 2).backward()
    exact = scores.double().nan_to_num().requires_grad_()
    wanted = definition(exact, experts, seq_ids, 0.3)
    close(loss, wanted, wanted.abs() * 3e-6, "loss")
    (wanted * 2).backward()
    # A difference of f[i] and its weighted mean: both are at most E / K times the token's weight.
    ids = seq_ids.clamp(min=0).long()
    lengths = torch.bincount(ids[seq_ids >= 0], minlength=tokens)[ids].clamp(min=1)[:, None].double()
    size = 2 * 0.3 * num_experts / top_k / lengths / exact.sum(-1, keepdim=True).clamp(min=1e-6)
    close(ours.grad, exact.grad, size.detach() * 2e-6, "grad scores")
    assert (ours.grad[(seq_ids < 0).to(device)] == 0).all()


def test_gradient_in_float64(device):
    scores, experts = case(6, 5, 2, torch.float64)
    seq_ids = torch.tensor([0, 0, 3, -1, 3, 3])
    check = torch.autograd.gradcheck
    assert check(lambda s: dk.moe_balance_loss(s, experts, seq_ids=seq_ids, alpha=1.0), scores.requires_grad_())


def test_perfect_balance_gives_alpha(backend, device):
    scores, experts = torch.ones(12, 4, device=device), (torch.arange(24, device=device) % 4).view(12, 2)
    seq_ids = torch.arange(12, device=device) // 6
    close(dk.moe_balance_loss(scores, experts, seq_ids=seq_ids, alpha=0.125), torch.tensor(0.125), 1e-7)


def test_scores_that_underflow(backend, device):
    experts, seq_ids = (
        torch.zeros(3, 1, dtype=torch.int64, device=device),
        torch.zeros(3, dtype=torch.int64, device=device),
    )
    assert dk.moe_balance_loss(torch.zeros(3, 4, device=device), experts, seq_ids=seq_ids, alpha=1.0) == 0


def test_empty(backend, device):
    none = torch.zeros(0, dtype=torch.int64, device=device)
    scores = torch.zeros(0, 4, device=device, requires_grad=True)
    loss = dk.moe_balance_loss(scores, none.view(0, 2), seq_ids=none, alpha=1.0)
    loss.backward()
    assert loss == 0 and scores.grad.shape == (0, 4)


def test_strided_rows(backend, device):
    scores, experts = (t.to(device) for t in case(9, 8, 2))
    seq_ids = torch.arange(9, device=device) // 3
    store = torch.full((9, 20), torch.nan, device=device)
    store[:, :8] = scores
    wide = torch.full((9, 4), 99, device=device)
    wide[:, ::2] = experts
    got = dk.moe_balance_loss(store[:, :8], wide[:, ::2], seq_ids=seq_ids.repeat_interleave(2)[::2], alpha=1.0)
    assert same_bits(got, dk.moe_balance_loss(scores, experts, seq_ids=seq_ids, alpha=1.0))


def test_twice_the_same_bits(backend, device):
    scores, experts = (t.to(device) for t in case(300, 64, 6))
    seq_ids = torch.randint(0, 7, (300,), device=device)
    scores.requires_grad_()

    def run():
        loss = dk.moe_balance_loss(scores, experts, seq_ids=seq_ids, alpha=1.0)
        return loss.detach(), *torch.autograd.grad(loss, scores)

    assert same_bits(run(), run())


def test_op_contract(device):
    scores, experts = (t.to(device) for t in case(6, 5, 2))
    seq_ids = torch.arange(6, device=device) // 2
    opcheck(torch.ops.dsv3_kernels.moe_balance_loss.default, (scores, experts, seq_ids, 0.5))
    grad = torch.tensor(2.0, device=device)
    opcheck(torch.ops.dsv3_kernels.moe_balance_loss_backward.default, (grad, scores, experts, seq_ids, 0.5))


def test_compiles():
    scores, experts = case(6, 5, 2)
    seq_ids = torch.arange(6) // 2
    loss = lambda s: dk.moe_balance_loss(s * 2, experts, seq_ids=seq_ids, alpha=0.5)  # noqa: E731
    compiles_with_gradients(loss, scores.requires_grad_())


S, E, I = torch.ones(4, 6), torch.zeros(4, 2, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (TypeError, "scores: got list", {"scores": []}),
        (TypeError, "scores: got dtype bfloat16, wanted float32 or float64", {"scores": S.bfloat16()}),
        (TypeError, "experts: got dtype float32, wanted int32 or int64", {"experts": E.float()}),
        (TypeError, "seq_ids: got dtype bool, wanted int32 or int64", {"seq_ids": I.bool()}),
        (TypeError, "alpha: got NoneType, wanted a number", {"alpha": None}),
        (ValueError, r"scores: got shape \[24\], wanted \[T, E\]", {"scores": S.flatten()}),
        (ValueError, "scores: got stride 4 in the last", {"scores": torch.ones(6, 4).t()}),
        (ValueError, r"experts: got shape \[3, 2\], wanted \[4, K\]", {"experts": E[:3]}),
        (ValueError, r"experts: got \[4, 0\], wanted at least one", {"experts": E[:, :0]}),
        (ValueError, r"seq_ids: got shape \[4, 1\], wanted \[4\]", {"seq_ids": I[:, None]}),
        (ValueError, r"seq_ids: got 4, wanted values in \[-1, 4\)", {"seq_ids": I + 4}),
        (ValueError, r"experts: got 6, wanted values in \[-1, 6\)", {"experts": E + 6}),
        (RuntimeError, "seq_ids: got device meta, wanted cpu as scores", {"seq_ids": I.to("meta")}),
    ],
)
def test_rejects(error, words, changes):
    with pytest.raises(error, match=f"^moe_balance_loss: {words}"):
        dk.moe_balance_loss(**{"scores": S, "experts": E, "seq_ids": I, "alpha": 1.0, **changes})
