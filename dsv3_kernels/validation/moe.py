"""Cases of the moe family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dsv3_kernels as dk

from . import Bits, Inputs, Near, Problem, case, summing

GATE = {"num_groups": 4, "topk_groups": 2, "top_k": 4, "scaling": 2.5}


def gate(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(weights, experts) in float64, differentiable in the logits: DeepSeek-V3 report, equations 13 to 16."""
    scores = torch.sigmoid(logits)
    biased = (scores + bias).detach()
    groups = biased.unflatten(-1, (GATE["num_groups"], -1))
    best = groups.topk(2, -1).values.sum(-1)
    # a stable sort in descending order: ties go to the lower index
    kept = best.sort(dim=-1, descending=True, stable=True).indices[:, : GATE["topk_groups"]]
    allowed = torch.zeros_like(best, dtype=torch.bool).scatter_(1, kept, True)
    masked = groups.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)
    experts = masked.sort(dim=-1, descending=True, stable=True).indices[:, : GATE["top_k"]]
    chosen = scores.gather(1, experts)
    return chosen / chosen.sum(-1, keepdim=True) * GATE["scaling"], experts.int()


def gate_inputs(r: Inputs) -> tuple[Tensor, Tensor]:
    """Logits with two equal groups and two equal experts, and biases that make some biased scores negative."""
    logits, bias = r.randn(9, 32), r.randn(32) * 0.5
    logits[:, 8:16], bias[8:16] = logits[:, 0:8], bias[0:8]
    logits[:, 20], bias[20] = logits[:, 18], bias[18]
    return logits, bias


@case("moe_gate")
def moe_gate(r: Inputs) -> Problem:
    logits, bias = gate_inputs(r)
    weights, experts = gate(logits.cpu().double(), bias.cpu().double())

    def run() -> dict[str, Tensor]:
        return dict(zip(("weights", "experts"), dk.moe_gate(logits, bias, **GATE), strict=True))

    return Problem("[9, 32], ties", run, {"weights": Near(weights, weights * summing(4) * 2), "experts": Bits(experts)})


@case("moe_gate", "moe_gate_backward")
def moe_gate_gradient(r: Inputs) -> Problem:
    logits, bias = gate_inputs(r)
    seed = r.randn(9, 4)
    leaf = logits.cpu().double().requires_grad_()
    (wanted,) = torch.autograd.grad(gate(leaf, bias.cpu().double())[0], leaf, seed.cpu().double())

    def run() -> dict[str, Tensor]:
        ours = logits.clone().requires_grad_()
        return {"logits": torch.autograd.grad(dk.moe_gate(ours, bias, **GATE)[0], ours, seed)[0]}

    bound = summing(4) * 4 * GATE["scaling"] * seed.cpu().double().abs().amax(-1, keepdim=True)
    return Problem("[9, 32], gradient", run, {"logits": Near(wanted, bound)})


EXPERTS, ALIGNMENT = 5, 4


def routed(r: Inputs, tokens: int = 9, top_k: int = 3) -> tuple[Tensor, list[list[int]], list[int]]:
    """(experts, each expert's flat indices token * K + k in order, offsets); expert 2 gets nothing, some are -1."""
    choice = torch.stack([torch.randperm(EXPERTS, generator=r.generator)[:top_k] for _ in range(tokens)])
    choice[choice == 2] = -1
    members = [(choice.flatten() == expert).nonzero().flatten().tolist() for expert in range(EXPERTS)]
    offsets = [0]
    for flat in members:
        offsets.append(offsets[-1] + -(-len(flat) // ALIGNMENT) * ALIGNMENT)
    return choice.int().to(r.device), members, offsets


@case("moe_permute")
def moe_permute(r: Inputs) -> Problem:
    """Rows of an expert in token order, padded with zeros to a multiple of 4; scales go along."""
    x, scale = r.randn(9, 64, dtype=torch.bfloat16), r.randn(9, 2)
    experts, members, offsets = routed(r)
    rows, row_scale = torch.zeros(offsets[-1], 64, dtype=torch.bfloat16), torch.zeros(offsets[-1], 2)
    for start, flat in zip(offsets, members, strict=False):
        for place, index in enumerate(flat, start):
            rows[place], row_scale[place] = x[index // 3].cpu(), scale[index // 3].cpu()
    used = torch.tensor([start + i for start, flat in zip(offsets, members, strict=False) for i in range(len(flat))])

    def run() -> dict[str, Tensor]:
        got, got_scale, got_offsets, handle = dk.moe_permute(x, experts, EXPERTS, scale=scale, alignment=ALIGNMENT)
        scales = got_scale.cpu()[used]
        return {"rows": got[: offsets[-1]], "row_scale": scales, "offsets": got_offsets, "counts": handle.counts}

    wanted = {
        "rows": Bits(rows),
        "row_scale": Bits(row_scale[used]),
        "offsets": Bits(torch.tensor(offsets, dtype=torch.int32)),
        "counts": Bits(torch.tensor([len(flat) for flat in members], dtype=torch.int32)),
    }
    return Problem("[9, 64], 3 of 5 experts", run, wanted)


def weighted(
    rows: Tensor, weights: Tensor, members: list[list[int]], offsets: list[int], top_k: int
) -> tuple[Tensor, Tensor]:
    """(sum over k of weight * row, the same of magnitudes)."""
    out = torch.zeros(weights.shape[0], rows.shape[1], dtype=torch.float64)
    magnitude = torch.zeros_like(out)
    for start, flat in zip(offsets, members, strict=False):
        for place, index in enumerate(flat, start):
            token, k = divmod(index, top_k)
            term = rows[place] * weights[token, k]
            out = out.index_add(0, torch.tensor([token]), term[None])
            magnitude[token] += term.detach().abs()
    return out, magnitude


ROWS = 9 * 3 + EXPERTS * (ALIGNMENT - 1)  # the bound on rows for 9 tokens, 3 choices


def handle_of(r: Inputs, experts: Tensor) -> Any:
    """The handle of a permutation, made by eager: what is under test is the way back."""
    with dk.backend("eager"):
        return dk.moe_permute(r.randn(9, 8), experts, EXPERTS, alignment=ALIGNMENT)[3]


@case("moe_unpermute")
def moe_unpermute(r: Inputs) -> Problem:
    """Padding rows hold NaN: they are not read."""
    experts, members, offsets = routed(r)
    rows, weights, handle = r.randn(ROWS, 64), r.randn(9, 3), handle_of(r, experts)
    value, magnitude = weighted(rows.cpu().double(), weights.cpu().double(), members, offsets, 3)
    used = {start + i for start, flat in zip(offsets, members, strict=False) for i in range(len(flat))}
    rows[[row for row in range(ROWS) if row not in used]] = torch.nan
    wanted = Near(value, magnitude * summing(3))
    return Problem("[9, 64], weighted", lambda: {"out": dk.moe_unpermute(rows, handle, weights)}, {"out": wanted})


@case("moe_unpermute", "moe_unpermute_backward")
def moe_unpermute_gradient(r: Inputs) -> Problem:
    experts, members, offsets = routed(r)
    rows, weights, seed, handle = r.randn(ROWS, 64), r.randn(9, 3), r.randn(9, 64), handle_of(r, experts)
    leaves = [t.cpu().double().requires_grad_() for t in (rows, weights)]
    out, _ = weighted(leaves[0], leaves[1], members, offsets, 3)
    grads = torch.autograd.grad(out, leaves, seed.cpu().double())
    magnitude = seed.cpu().double().norm(dim=-1, keepdim=True) * rows.cpu().double().norm(dim=-1).max()

    def run() -> dict[str, Tensor]:
        ours = [t.clone().requires_grad_() for t in (rows, weights)]
        out = dk.moe_unpermute(ours[0], handle, ours[1])
        return dict(zip(("rows", "weights"), torch.autograd.grad(out, ours, seed), strict=True))

    wanted = {"rows": Near(grads[0], grads[0].abs() * summing(1)), "weights": Near(grads[1], magnitude * summing(64))}
    return Problem("[9, 64], gradients", run, wanted)


@case("moe_permute", "moe_unpermute")
def moe_permute_gradient(r: Inputs) -> Problem:
    """Each token's gradient is the sum over its rows."""
    experts, members, offsets = routed(r)
    x, seed = r.randn(9, 64), r.randn(ROWS, 64)
    value, magnitude = weighted(seed.cpu().double(), torch.ones(9, 3, dtype=torch.float64), members, offsets, 3)

    def run() -> dict[str, Tensor]:
        ours = x.clone().requires_grad_()
        rows = dk.moe_permute(ours, experts, EXPERTS, alignment=ALIGNMENT)[0]
        return {"x": torch.autograd.grad(rows, ours, seed)[0]}

    return Problem("[9, 64], gradient", run, {"x": Near(value, magnitude * summing(3))})


@case("moe_update_bias")
def moe_update_bias(r: Inputs) -> Problem:
    """Counts above, below and at their mean, which is no integer's float: the sign is exact."""
    start, counts = r.randn(6), r.ints(2**30, 0, 2**30 - 1, 2**30 + 1, 2**31 - 1, 1)
    totals = counts.cpu().long()
    sign = torch.sign(totals.sum() - 6 * totals).double()
    wanted = (start.cpu().double() + float(torch.tensor(0.001)) * sign).float()

    def run() -> dict[str, Tensor]:
        bias = start.clone()
        dk.moe_update_bias(bias, counts, 0.001)
        return {"bias": bias}

    return Problem("[6]", run, {"bias": Bits(wanted)})


def balance_loss(scores: Tensor, experts: Tensor, seq_ids: Tensor, alpha: float) -> Tensor:
    """Equations 17 to 20 of the report, sequence by sequence, averaged over the sequences."""
    losses = []
    for sequence in seq_ids[seq_ids >= 0].unique():
        mine = (seq_ids == sequence).nonzero().flatten()
        chosen = experts[mine]
        share = torch.stack([(chosen == e).sum() for e in range(scores.shape[1])]).double()
        f = share * scores.shape[1] / (chosen.shape[1] * len(mine))
        p = (scores[mine] / scores[mine].sum(-1, keepdim=True)).mean(0)
        losses.append(alpha * (f * p).sum())
    return torch.stack(losses).mean()


def balance_inputs(r: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, choices with some dropped, and two sequences mixed with tokens that belong to none."""
    ids = torch.tensor([0, 3, 3, -1, 0, 3, 3, -1, 3], device=r.device)
    return torch.sigmoid(r.randn(9, EXPERTS)), routed(r)[0], ids


@case("moe_balance_loss")
def moe_balance_loss(r: Inputs) -> Problem:
    scores, experts, ids = balance_inputs(r)
    wanted = balance_loss(scores.cpu().double(), experts.cpu(), ids.cpu(), 0.01)

    def run() -> dict[str, Tensor]:
        return {"loss": dk.moe_balance_loss(scores, experts, seq_ids=ids, alpha=0.01)}

    return Problem("[9, 5], 2 sequences", run, {"loss": Near(wanted, wanted * summing(64))})


@case("moe_balance_loss", "moe_balance_loss_backward")
def moe_balance_loss_gradient(r: Inputs) -> Problem:
    scores, experts, ids = balance_inputs(r)
    leaf = scores.cpu().double().requires_grad_()
    (wanted,) = torch.autograd.grad(balance_loss(leaf, experts.cpu(), ids.cpu(), 0.01), leaf)

    def run() -> dict[str, Tensor]:
        ours = scores.clone().requires_grad_()
        loss = dk.moe_balance_loss(ours, experts, seq_ids=ids, alpha=0.01)
        return {"scores": torch.autograd.grad(loss, ours)[0]}

    return Problem("[9, 5], gradient", run, {"scores": Near(wanted, wanted.abs().max() * summing(64))})
