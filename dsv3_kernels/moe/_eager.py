"""The moe family in plain PyTorch: the definition of what is right."""

from __future__ import annotations

import torch
from torch import Tensor

from .._eager import wide
from .moe_permute import empty_scale

SUM_FLOOR = 1e-20  # keeps weights finite where every chosen score has underflowed


def _exp(x: Tensor) -> Tensor:
    """exp(x) within 2 units of the last place, in operations that IEEE 754 rounds: the same bits on every backend.

    x = n ln 2 + r; a polynomial in r with the coefficients of Cephes' expf; times 2^n in two factors, so that subnormal
    results are rounded once. A gate compares scores, so equal logits must have equal ones wherever they stand, which
    vectorised library functions do not promise. float64 is the tests': there it is PyTorch's.
    """
    if x.dtype == torch.float64:
        return x.exp()
    within = x.clamp(-104.0, 89.0)
    n = (within * 1.44269504088896341).round()
    r = within - n * 0.693359375 - n * -2.12194440e-4
    p = torch.full_like(r, 1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + coefficient
    y = p * (r * r) + r + 1.0
    power = n.nan_to_num().int()
    half = power >> 1
    low, high = (((part + 127) << 23).view(torch.float32) for part in (half, power - half))
    return y * low * high


def _lane_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension (kept, of size 1) in the order of a warp: 32 lanes in turn, then halves of them."""
    count = values.shape[-1]
    total = values.new_zeros(*values.shape[:-1], 32)
    for start in range(0, count, 32):
        part = values[..., start : start + 32]
        total[..., : part.shape[-1]] += part
    for half in (16, 8, 4, 2, 1):
        total = total[..., :half] + total[..., half:]
    return total


def _in_order(values: Tensor) -> Tensor:
    """Sum over the last dimension (kept, of size 1), one value after the other."""
    total = torch.zeros_like(values[..., :1])
    for k in range(values.shape[-1]):
        total = total + values[..., k : k + 1]
    return total


def _scores(logits: Tensor, score: str) -> Tensor:
    if score == "softmax":
        powers = _exp(logits - logits.amax(-1, keepdim=True))
        return powers / _lane_sum(powers)
    return (1 + _exp(-logits)).reciprocal()


def _ranked(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of each row, in descending order; at equal values the lower index first."""
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[..., :count]


def moe_gate(
    logits: Tensor,
    bias: Tensor | None,
    num_groups: int,
    topk_groups: int,
    top_k: int,
    scaling: float,
    normalize: bool,
    score: str,
) -> tuple[Tensor, Tensor]:
    scores = _scores(logits, score)
    biased = scores if bias is None else scores + bias
    if topk_groups < num_groups:
        groups = biased.unflatten(-1, (num_groups, biased.shape[-1] // num_groups))
        best = _ranked(groups.topk(2).values.sum(-1), topk_groups)
        closed = torch.ones(groups.shape[:2], dtype=torch.bool, device=groups.device).scatter_(1, best, False)
        biased = groups.masked_fill(closed[..., None], -torch.inf).flatten(-2)
    experts = _ranked(biased, top_k)
    weights = scores.gather(-1, experts)
    if normalize:
        weights = weights / (_in_order(weights) + SUM_FLOOR)
    return weights * scaling, experts.int()


def moe_gate_backward(
    grad_weights: Tensor, logits: Tensor, experts: Tensor, scaling: float, normalize: bool, score: str
) -> Tensor:
    scores = _scores(logits, score)
    chosen = experts.long()
    grad = grad_weights * scaling
    if normalize:  # w = s / D, D = sum(s) + floor: ds = (g - sum(g w)) / D
        s = scores.gather(-1, chosen)
        total = _in_order(s) + SUM_FLOOR
        grad = (grad - _in_order(grad * (s / total))) / total
    grad = torch.zeros_like(scores).scatter_(-1, chosen, grad)
    if score == "sigmoid":
        return grad * scores * (1 - scores)
    return scores * (grad - _lane_sum(grad * scores))


def moe_permute(
    x: Tensor, experts: Tensor, scale: Tensor | None, num_experts: int, alignment: int
) -> tuple[Tensor, ...]:
    choices = experts.shape[1]
    bound = experts.numel() + num_experts * (alignment - 1)
    # Dropped choices count as expert E: they sort behind all others, and their row is the one past the end.
    expert = torch.where(experts < 0, num_experts, experts).flatten().long()
    counts = expert.new_zeros(num_experts + 1).scatter_add_(0, expert, torch.ones_like(expert))
    segments = (counts[:-1] + alignment - 1) // alignment * alignment
    offsets = torch.cat([segments.new_zeros(1), segments.cumsum(0)])
    order = expert.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    rank = place - (counts.cumsum(0) - counts)[expert]
    row = torch.where(expert < num_experts, offsets[expert] + rank, bound)
    source = row.new_full((bound + 1,), -1).scatter_(0, row, torch.arange(row.numel(), device=row.device))[:-1]
    row_of = torch.where(row < bound, row, -1).view(experts.shape)
    integers = tuple(t.int() for t in (offsets, counts[:-1], row_of, source))
    return _gather(x, source, choices), _gather_scale(scale, x, source, choices), *integers


def _gather(x: Tensor, source: Tensor, choices: int) -> Tensor:
    """Row of x for every choice; zeros where there is none."""
    if x.shape[0] == 0:
        return x.new_zeros(source.shape[0], x.shape[1])
    if x.dtype == torch.float8_e4m3fn:
        return _gather(x.view(torch.uint8), source, choices).view(x.dtype)
    return x[(source // choices).clamp(min=0)].masked_fill_((source < 0)[:, None], 0)


def _gather_scale(scale: Tensor | None, x: Tensor, source: Tensor, choices: int) -> Tensor:
    out = empty_scale(scale, x, source.shape[0])
    return out if scale is None else out.copy_(_gather(scale, source, choices))


def moe_unpermute(rows: Tensor, row_of: Tensor, weights: Tensor | None) -> Tensor:
    total = rows.new_zeros(row_of.shape[0], rows.shape[1], dtype=wide(rows.dtype))
    for k, row in enumerate(row_of.unbind(1)):
        part = rows[row.clamp(min=0)].to(total.dtype)
        if weights is not None:
            part = part * weights[:, k, None]
        total += part.masked_fill_((row < 0)[:, None], 0)
    return total.to(rows.dtype)


def moe_unpermute_backward(
    grad: Tensor, rows: Tensor | None, row_of: Tensor, source: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    choices = row_of.shape[1]
    real = grad.to(wide(grad.dtype))
    grad_rows = _gather(real, source, choices)
    if rows is None or weights is None:
        return grad_rows.to(grad.dtype), grad.new_empty(0)
    grad_weights = torch.zeros_like(weights)
    for k, row in enumerate(row_of.unbind(1)):
        products = (rows[row.clamp(min=0)].to(real.dtype) * real).sum(-1)
        grad_weights[:, k] = products.masked_fill_(row < 0, 0)
    # Padding has gradient 0, whatever the weight it borrows here.
    factor = _gather(weights.reshape(-1, 1), source, 1)
    return (grad_rows * factor).to(grad.dtype), grad_weights


def moe_update_bias(bias: Tensor, counts: Tensor, speed: float) -> None:
    counts = counts.long()
    bias += (counts.sum() - counts.numel() * counts).sign().to(bias.dtype) * speed


def _loads(scores: Tensor, experts: Tensor, seq_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per token: its sequence; per sequence (as many as tokens, at most): f / T [T, E]; 1 / number of sequences.

    Tokens that are left out belong to a sequence past the last, whose f is 0.
    """
    tokens, num_experts = scores.shape
    sequence = torch.where(seq_ids < 0, tokens, seq_ids).long()
    lengths = sequence.new_zeros(tokens + 1).scatter_add_(0, sequence, torch.ones_like(sequence))
    lengths[-1] = 0
    expert = torch.where(experts < 0, num_experts, experts).long()
    place = (sequence[:, None] * (num_experts + 1) + expert).flatten()
    counts = place.new_zeros((tokens + 1) * (num_experts + 1)).scatter_add_(0, place, torch.ones_like(place))
    counts = counts.view(tokens + 1, num_experts + 1)[:, :-1]
    # f / T = E / (K T^2) * count, the second T from the mean P
    factor = num_experts / experts.shape[1] / lengths.to(scores.dtype).square().clamp(min=1)
    factor = torch.where(lengths > 0, factor, 0)
    return sequence, counts * factor[:, None], 1 / (lengths > 0).sum().clamp(min=1).to(scores.dtype)


def moe_balance_loss(scores: Tensor, experts: Tensor, seq_ids: Tensor, alpha: float) -> Tensor:
    sequence, load, weight = _loads(scores, experts, seq_ids)
    shares = scores / (scores.sum(-1, keepdim=True) + SUM_FLOOR)
    terms = torch.where((seq_ids < 0)[:, None], 0, load[sequence] * shares)
    return terms.sum() * (alpha * weight)


def moe_balance_loss_backward(grad: Tensor, scores: Tensor, experts: Tensor, seq_ids: Tensor, alpha: float) -> Tensor:
    sequence, load, weight = _loads(scores, experts, seq_ids)
    total = scores.sum(-1, keepdim=True) + SUM_FLOOR
    load = load[sequence]
    grads = (load - (load * (scores / total)).sum(-1, keepdim=True)) / total * (grad * alpha * weight)
    return torch.where((seq_ids < 0)[:, None], 0, grads)
