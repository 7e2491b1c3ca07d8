"""Multi-token prediction (arXiv:2412.19437, section 2.2): one more block that sees h_i and token i+1, predicts i+2."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .config import Config
from .layers import DecoderLayer, Linear, Norm, Step

if TYPE_CHECKING:
    from .model import DeepSeekV3

FEEDS = ("post_norm", "pre_norm")


class MTPLayer(DecoderLayer):
    """Depth k lies at layer index num_hidden_layers + k - 1; embedding and output head are the main model's."""

    def __init__(self, config: Config, layer: int, experts: range) -> None:
        super().__init__(config, layer, experts)
        self.enorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, ("eh_proj", config.hidden_size))
        self.shared_head = nn.ModuleDict({"norm": Norm(config.hidden_size, config.rms_norm_eps)})

    def predict(self, hidden: Tensor, embedding: Tensor, step: Step) -> Tensor:
        """hidden [T, H] of position i, embedding [T, H] of token i+1 -> normed hidden [T, H] for the head."""
        # The weights expect the embedding first; equation 21 of the paper writes the pair the other way round.
        x = self.eh_proj(torch.cat([self.enorm(embedding), self.hnorm(hidden)], dim=-1))
        update, residual = self(x, None, step)
        return self.shared_head["norm"](update, residual)[0]


def layers(model: DeepSeekV3) -> list[MTPLayer]:
    return list(model.model.layers)[model.config.num_hidden_layers :]  # type: ignore[return-value]


def need(model: DeepSeekV3, who: str) -> list[MTPLayer]:
    """The MTP layers, or ValueError where the model has none."""
    found = layers(model)
    if not found:
        raise ValueError(
            f"{who}: the model has no MTP layer (num_nextn_predict_layers is 0 or the checkpoint has none)"
        )
    return found


def chain(
    model: DeepSeekV3, tokens: Tensor, step: Step, fed: Tensor, routing: list[Tensor] | None = None, depths: int = 1
) -> list[Tensor]:
    """Normed hidden states of depths k = 1 to `depths`: [B, S-k, H], row i sees token i+k and predicts i+k+1.

    `fed` [B, S, H] is the main model's hidden state; every depth feeds the next with its normed state. `step` is the
    main pass over tokens [B, S], for its recipe; `routing` has experts [B * (S-k), K] per depth to replay.
    """
    out = []
    for k, layer in enumerate(layers(model)[:depths], start=1):
        batch, rows = tokens.shape[0], tokens.shape[1] - k
        if rows < 1:
            break
        inner = model.step(tokens[:, :rows])
        inner.dtype, inner.fp8, inner.chosen = step.dtype, step.fp8, step.chosen
        inner.routing = None if routing is None else [routing[k - 1]]
        embedding = model.embed(tokens[:, k:].reshape(-1), step.dtype)
        fed = layer.predict(fed[:, :rows].reshape(batch * rows, -1), embedding, inner).view(batch, rows, -1)
        out.append(fed)
    return out
