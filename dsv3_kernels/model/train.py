"""Training: the loss with multi-token prediction, its gradients under released names, expert balancing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dsv3_kernels as dk

from .. import _checks
from .fp8 import Recipe
from .layers import MoE, Step
from .model import split_routing
from .mtp import chain
from .weights import pieces

if TYPE_CHECKING:
    from .model import DeepSeekV3

RECIPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


def loss(
    model: DeepSeekV3,
    tokens: Tensor,
    *,
    mtp_weight: float = 0.3,
    recipe: str = "float32",
    routing: list[Tensor] | None = None,
    balance_alpha: float = 0.0,
    documents: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the next token plus `mtp_weight` times that of the MTP layers (section 2.2, equation 25).

    tokens: int [B, S]. Returns (total, {"main", "mtp"}), float32; each is a mean over its own valid targets, S-1 and
    S-2 per sequence (several MTP depths: the mean of their losses). recipe: compute dtype over the float master
    weights; "fp8" multiplies bfloat16 activations in FP8, forward, dgrad and wgrad (see `dk.model.fp8`), but for
    embedding, router, MTP projection and output head. routing: experts to replay, as in `DeepSeekV3.forward`, the MTP
    layers' optional. balance_alpha adds the sequence-wise balance loss (equation 17) of every MoE layer, reported as
    "balance". documents: int [B, S], one number for the tokens of a document: a token is no target of a row of another
    document (attention, as in the report, does see across).

    ValueError: fewer than two tokens per sequence, FP8 weights, unknown recipe, sizes that FP8 cannot multiply.
    """
    _checks.one_of("loss", "recipe", recipe, *RECIPES)
    _checks.value("loss", "model", model.weights != "fp8", "FP8 weights", "float weights (weights='float32')")
    step = model.step(tokens)
    batch, width = tokens.shape
    _checks.value("loss", "tokens", width > 1, list(tokens.shape), "two tokens or more per sequence")
    step.dtype, step.fp8 = RECIPES[recipe], Recipe(model.config.pow2_scale) if recipe == "fp8" else None
    if documents is not None:
        _checks.dtype("loss", "documents", documents, torch.int64, torch.int32)
        _checks.shape("loss", "documents", documents, tokens.shape)
        _checks.device("loss", documents=documents, tokens=tokens)
    step.routing, own = split_routing(model, routing, tokens)
    normed, residual = (hidden.view(batch, width, -1) for hidden in model.hidden(step))
    parts = losses(model, step, tokens, normed, residual, routing=own, documents=documents)
    total = parts["main"] + mtp_weight * parts["mtp"]
    if balance_alpha:
        parts["balance"] = _balance(model, batch, width, balance_alpha)
        total = total + parts["balance"]
    return total, {name: part.detach() for name, part in parts.items()}


def losses(
    model: DeepSeekV3,
    step: Step,
    tokens: Tensor,
    normed: Tensor,
    residual: Tensor,
    *,
    routing: list[Tensor] | None = None,
    documents: Tensor | None = None,
) -> dict[str, Tensor]:
    """{"main", "mtp"} from what `DeepSeekV3.hidden` gives, both [B, S, H]; options as in `loss`."""
    parts = {"main": _cross_entropy(model, normed, tokens, 1, documents)}
    fed = model.feed(normed, residual)
    depths = [
        _cross_entropy(model, hidden, tokens, k + 1, documents)
        for k, hidden in enumerate(chain(model, tokens, step, fed, routing, depths=tokens.shape[1] - 2), start=1)
    ]
    parts["mtp"] = torch.stack(depths).mean() if depths else torch.zeros_like(parts["main"])
    return parts


def _cross_entropy(model: DeepSeekV3, hidden: Tensor, tokens: Tensor, ahead: int, documents: Any = None) -> Tensor:
    """Row i of `hidden` predicts the token `ahead` after its own position; rows past the end, and rows whose target is
    in another document, predict nothing."""
    rows = tokens.shape[1] - ahead
    logits = model.head(hidden[:, :rows].reshape(-1, hidden.shape[-1]))
    targets = tokens[:, ahead:].long()
    if documents is None:
        return F.cross_entropy(logits, targets.reshape(-1))
    targets = torch.where(documents[:, ahead:] == documents[:, :rows], targets, -100).reshape(-1)
    return F.cross_entropy(logits, targets, reduction="sum") / (targets >= 0).sum().clamp(min=1)


def moe_layers(model: DeepSeekV3) -> list[MoE]:
    """In order of depth, the MTP layers' last."""
    return [layer.mlp for layer in model.model.layers if isinstance(layer.mlp, MoE)]


def _balance(model: DeepSeekV3, batch: int, width: int, alpha: float) -> Tensor:
    total: Any = 0.0
    for moe in moe_layers(model):
        assert moe.load is not None
        logits, experts = moe.load
        rows = len(experts) // batch
        sequences = torch.arange(batch, device=experts.device).repeat_interleave(rows)
        total = total + dk.moe_balance_loss(logits.sigmoid(), experts, seq_ids=sequences, alpha=alpha)
    return total


@torch.no_grad()
def update_bias(model: DeepSeekV3, speed: float, group: Any = None) -> list[Tensor]:
    """Auxiliary-loss-free balancing (section 2.1.2): move every router's bias by its load since the last update.

    Returns the loads, [E] per MoE layer, the MTP layers' last; summed over `group` (default: the experts' group).
    """
    loads = []
    for moe in moe_layers(model):
        counts = moe.counts
        if counts is None:
            continue
        moe.counts = None
        if group is not None or model.group is not None:
            torch.distributed.all_reduce(counts, group=group or model.group)
        dk.moe_update_bias(moe.gate.e_score_correction_bias, counts, speed)
        loads.append(counts)
    return loads


def gradients(model: DeepSeekV3) -> dict[str, Tensor]:
    """{released parameter name: gradient}, experts and stacked matrices taken apart; after a backward pass."""
    out = {}
    for piece in pieces(model):
        grad = getattr(getattr(piece.module, piece.attribute), "grad", None)
        if grad is not None:
            out[piece.name] = piece.view(grad)
    return out
