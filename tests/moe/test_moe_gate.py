"""moe_gate against a token-by-token definition in float64; gradients against float64 autograd."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from checks import close, compiles, compiles_with_gradients, opcheck, same_bits

import dsv3_kernels as dk

OP = "moe_gate"
V3 = {"num_groups": 8, "topk_groups": 4, "top_k": 8, "scaling": 2.5}
GATES = [
    (256, V3),
    (12, {"num_groups": 3, "topk_groups": 2, "top_k": 4, "scaling": 1.0}),
    (16, {"num_groups": 4, "topk_groups": 1, "top_k": 4, "scaling": 2.5}),
    (8, {"num_groups": 1, "topk_groups": 1, "top_k": 2, "scaling": 1.5}),
    (5, {"num_groups": 1, "topk_groups": 1, "top_k": 5, "scaling": 1.0}),
    (1, {"num_groups": 1, "topk_groups": 1, "top_k": 1, "scaling": 1.0}),
    (64, {"num_groups": 4, "topk_groups": 4, "top_k": 6, "scaling": 16.0}),
]


def definition(logits, bias, *, num_groups, topk_groups, top_k, scaling, normalize=True, score="sigmoid"):
    """(weights, experts, margin): the smallest gap between different values that decided something, per token."""
    scores = logits.double().sigmoid() if score == "sigmoid" else logits.double().softmax(-1)
    experts, margins = [], []
    for row in scores if bias is None else scores + bias.double():
        values, size = row.tolist(), len(row) // num_groups
        pairs = [sorted(values[g * size : (g + 1) * size], reverse=True)[:2] for g in range(num_groups)]
        rank = sorted(range(num_groups), key=lambda g: (-sum(pairs[g]), g))
        open_ = [e for g in rank[:topk_groups] for e in range(g * size, (g + 1) * size)]
        best = sorted(open_, key=lambda e: (-values[e], e))
        experts.append(best[:top_k])
        ordered = [values[e] for e in best[: top_k + 1]]
        sums = [sum(pairs[g]) for g in rank[topk_groups - 1 : topk_groups + 1]]
        gaps = [a - b for line in (ordered, sums) for a, b in pairwise(line) if a != b]
        margins.append(min(gaps, default=1.0))
    chosen = torch.tensor(experts).view(len(experts), top_k)
    weights = scores.gather(-1, chosen)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scaling, chosen, torch.tensor(margins)


@pytest.mark.parametrize(("num_experts", "gate"), GATES, ids=lambda g: str(g) if isinstance(g, int) else "")
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_against_the_definition(backend, device, num_experts, gate, score, normalize, biased):
    logits = torch.randn(60, num_experts) * 2
    bias = torch.randn(num_experts) * (0.5 if score == "sigmoid" else 1 / num_experts) if biased else None
    options = {**gate, "normalize": normalize, "score": score}
    wanted, chosen, margin = definition(logits, bias, **options)
    clear = margin > 1e-6
    assert clear.sum() >= 40
    weights, experts = dk.moe_gate(logits.to(device), bias.to(device) if biased else None, **options)
    assert weights.dtype == torch.float32 and experts.dtype == torch.int32
    assert torch.equal(experts.cpu()[clear].long(), chosen[clear])
    close(weights[clear.to(device)], wanted[clear], wanted[clear] * 2e-6 + 1e-30)


@pytest.mark.parametrize(("num_experts", "gate"), GATES[:4], ids=lambda g: str(g) if isinstance(g, int) else "")
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_ties_go_to_the_lower_index(backend, device, num_experts, gate, score):
    """Few different logits and biases: most tokens have ties, between experts and between groups."""
    logits = torch.tensor([-0.7, 0.0, 1.1])[torch.randint(0, 3, (80, num_experts))]
    bias = torch.randint(0, 2, (num_experts,)).float() * (0.3 if score == "sigmoid" else 0.037)
    logits[:4] = 0
    options = {**gate, "score": score}
    _, chosen, margin = definition(logits, bias, **options)
    assert (margin > 1e-6).all()
    assert torch.equal(dk.moe_gate(logits.to(device), bias.to(device), **options)[1].cpu().long(), chosen)


def test_equal_scores_choose_the_first_experts(backend, device):
    _, experts = dk.moe_gate(torch.zeros(3, 256, device=device), None, **V3)
    assert experts.tolist() == [list(range(8))] * 3


@pytest.mark.parametrize("num_experts", [3, 7, 33])
def test_equal_logits_have_equal_scores_wherever_they_stand(backend, device, num_experts):
    """Sizes that leave elements over in any vector width; a score one rounding off would break the tie."""
    gate = {"num_groups": 1, "topk_groups": 1, "top_k": 3, "scaling": 1.0}
    for tokens in (1, 2, 5, 40):
        logits = torch.randn(tokens, 1).expand(tokens, num_experts).contiguous()
        _, experts = dk.moe_gate(logits.to(device), None, **gate)
        assert experts.tolist() == [[0, 1, 2]] * tokens


def test_groups_left_out_count_as_minus_infinity(backend, device):
    """All biased scores are negative: experts filled in with 0 would win over those of the open groups."""
    logits, bias = torch.randn(50, 16), torch.full((16,), -3.0)
    gate = {"num_groups": 4, "topk_groups": 2, "top_k": 6, "scaling": 1.0}
    _, chosen, margin = definition(logits, bias, **gate)
    clear = margin > 1e-6
    experts = dk.moe_gate(logits.to(device), bias.to(device), **gate)[1].cpu().long()
    assert torch.equal(experts[clear], chosen[clear])
    assert all(len({int(e) // 4 for e in row}) <= 2 for row in experts)


def test_the_bias_ranks_and_does_not_weigh(backend, device):
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]], device=device)
    bias = torch.tensor([0.0, 0.0, 5.0, 4.0], device=device)
    gate = {"num_groups": 1, "topk_groups": 1, "top_k": 2, "scaling": 1.0}
    weights, experts = dk.moe_gate(logits, bias, **gate, normalize=False)
    assert experts.tolist() == [[2, 3]]
    close(weights, torch.tensor([[1.0, 0.0]]).double().sigmoid(), 1e-6)


def test_large_logits(backend, device):
    logits = torch.tensor([[200.0, -200.0, 50.0, -300.0], [-200.0, -300.0, -250.0, -220.0]], device=device)
    gate = {"num_groups": 1, "topk_groups": 1, "top_k": 2, "scaling": 1.0}
    weights, experts = dk.moe_gate(logits, None, **gate)
    assert experts.tolist() == [[0, 2], [0, 1]]  # the second row's scores all underflow to 0: a tie
    close(weights, torch.tensor([[0.5, 0.5], [0.0, 0.0]]), 1e-6)


def test_not_a_number_is_visible(backend, device):
    logits = torch.randn(3, 256)
    clean = dk.moe_gate(logits.to(device), None, **V3)
    logits[1, 7] = torch.nan
    weights, experts = dk.moe_gate(logits.to(device), None, **V3)
    assert weights[1].isnan().all()
    assert ((experts >= 0) & (experts < 256)).all()
    assert same_bits([t[::2] for t in (weights, experts)], [t[::2] for t in clean])


@pytest.mark.parametrize(("num_experts", "gate"), GATES, ids=lambda g: str(g) if isinstance(g, int) else "")
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradient(backend, device, num_experts, gate, score, normalize):
    logits, bias = torch.randn(30, num_experts), torch.randn(num_experts) * 0.1
    ours = logits.clone().to(device).requires_grad_()
    weights, experts = dk.moe_gate(ours, bias.to(device), **gate, normalize=normalize, score=score)
    assert not experts.requires_grad
    grad = torch.randn(weights.shape)
    weights.backward(grad.to(device))
    reference = logits.double().requires_grad_()
    scores = reference.sigmoid() if score == "sigmoid" else reference.softmax(-1)
    chosen = scores.gather(-1, experts.cpu().long())
    if normalize:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
    (chosen * gate["scaling"]).backward(grad.double())
    # The gradient is a difference of terms no larger than these.
    size = gate["scaling"] * grad.double().abs().sum(-1, keepdim=True)
    close(ours.grad, reference.grad, size * 2**-22, "grad logits")


def test_gradient_in_float64(device):
    logits = torch.randn(3, 12, dtype=torch.float64, device=device, requires_grad=True)
    gate = {**GATES[1][1], "score": "softmax"}
    assert torch.autograd.gradcheck(lambda x: dk.moe_gate(x, None, **gate)[0], logits)


def test_rows_with_a_stride(backend, device):
    store = torch.full((5, 300), torch.nan, device=device)
    store[:, :256] = torch.randn(5, 256)
    assert same_bits(dk.moe_gate(store[:, :256], None, **V3), dk.moe_gate(store[:, :256].contiguous(), None, **V3))


def test_empty(device):
    weights, experts = dk.moe_gate(torch.empty(0, 256, device=device), None, **V3)
    assert weights.shape == experts.shape == (0, 8)


def test_twice_the_same_bits(backend, device):
    logits, bias = torch.randn(70, 256, device=device), torch.randn(256, device=device)
    assert same_bits(dk.moe_gate(logits, bias, **V3), dk.moe_gate(logits, bias, **V3))


def test_op_contract(device):
    logits, bias = torch.randn(5, 12, device=device), torch.randn(12, device=device)
    for score in ("sigmoid", "softmax"):
        for b in (bias, None):
            opcheck(torch.ops.dsv3_kernels.moe_gate.default, (logits, b, 3, 2, 4, 2.5, True, score))
    experts = dk.moe_gate(logits, None, **GATES[1][1])[1]
    for normalize in (True, False):
        args = (torch.randn(5, 4, device=device), logits, experts, 2.5, normalize, "sigmoid")
        opcheck(torch.ops.dsv3_kernels.moe_gate_backward.default, args)


def test_compiles():
    logits, bias = torch.randn(5, 256), torch.randn(256)
    compiles(lambda x: dk.moe_gate(x * 2, bias, **V3), logits)
    compiles_with_gradients(lambda x: dk.moe_gate(x * 2, bias, **V3), logits.requires_grad_())


X, B = torch.zeros(4, 16), torch.zeros(16)


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (TypeError, "logits: got list", {"logits": []}),
        (TypeError, "logits: got dtype bfloat16, wanted float32 or float64", {"logits": X.bfloat16()}),
        (TypeError, "bias: got dtype float64, wanted float32", {"bias": B.double()}),
        (TypeError, "num_groups: got float, wanted an int", {"num_groups": 4.0}),
        (TypeError, "topk_groups: got NoneType, wanted an int", {"topk_groups": None}),
        (TypeError, "top_k: got bool, wanted an int", {"top_k": True}),
        (TypeError, "scaling: got str, wanted a number", {"scaling": "2.5"}),
        (ValueError, r"logits: got shape \[16\], wanted \[T, E\]", {"logits": B}),
        (ValueError, "logits: got stride 4 in the last", {"logits": torch.zeros(16, 4).t()}),
        (ValueError, r"bias: got shape \[15\], wanted \[16\]", {"bias": B[:15]}),
        (ValueError, "num_groups: got 0, wanted at least 1", {"num_groups": 0}),
        (ValueError, "num_groups: got 3, wanted a divisor of 16", {"num_groups": 3}),
        (ValueError, "num_groups: got 16, wanted a divisor of 16 that leaves two", {"num_groups": 16}),
        (ValueError, "topk_groups: got 5, wanted at most num_groups, 4", {"topk_groups": 5}),
        (ValueError, "topk_groups: got 0, wanted at least 1", {"topk_groups": 0}),
        (ValueError, "top_k: got 9, wanted at most 8, the experts left", {"top_k": 9}),
        (ValueError, "top_k: got 0, wanted at least 1", {"top_k": 0}),
        (ValueError, "score: got 'tanh', wanted 'sigmoid' or 'softmax'", {"score": "tanh"}),
        (RuntimeError, "bias: got device meta, wanted cpu as logits", {"bias": B.to("meta")}),
    ],
)
def test_rejects(error, words, changes):
    given = {"logits": X, "bias": B, "num_groups": 4, "topk_groups": 2, "top_k": 4, "scaling": 2.5}
    with pytest.raises(error, match=f"^moe_gate: {words}"):
        dk.moe_gate(**{**given, **changes})
