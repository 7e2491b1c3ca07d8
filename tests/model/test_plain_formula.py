"""Losses and gradients against the report's formulas, written out in float64 under torch autograd: MTP of two depths,
documents, the balance loss and replayed routing at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_trainer import TINY
from torch import Tensor

from dsv3_kernels.model import Config, DeepSeekV3, train
from dsv3_kernels.model.weights import initialise, pieces

CONFIG = Config(**TINY | {"num_nextn_predict_layers": 2})
ALPHA, MTP_WEIGHT = 0.02, 0.3


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def rotate(x: Tensor) -> Tensor:
    """x [B, S, heads, D]: pairs (0, 1), (2, 3), ... turned by position times 10000^(-2 j / D)"""
    frequencies = 10000.0 ** -(torch.arange(0, x.shape[-1], 2).double() / x.shape[-1])
    angle = (torch.arange(x.shape[1]).double()[:, None] * frequencies)[:, None]
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(-2)


class Plain:
    """The model from its released weights `w`, with given experts."""

    def __init__(self, w: dict[str, Tensor], routing: list[Tensor]) -> None:
        self.w, self.routing, self.balance = w, iter(routing), torch.zeros((), dtype=torch.float64)

    def attention(self, x: Tensor, at: str) -> Tensor:
        c, w = CONFIG, {n: self.w[f"{at}.{n}.weight"] for n in ("q_a_proj", "q_a_layernorm", "q_b_proj", "o_proj",
             "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj")}  # fmt: skip
        q = norm(x @ w["q_a_proj"].mT, w["q_a_layernorm"]) @ w["q_b_proj"].mT
        q = q.unflatten(-1, (c.num_attention_heads, -1))
        latent, k_rope = (x @ w["kv_a_proj_with_mqa"].mT).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        kv = (norm(latent, w["kv_a_layernorm"]) @ w["kv_b_proj"].mT).unflatten(-1, (c.num_attention_heads, -1))
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        q = torch.cat([q[..., : c.qk_nope_head_dim], rotate(q[..., c.qk_nope_head_dim :])], -1)
        k = torch.cat([k_nope, rotate(k_rope[:, :, None]).expand(*k_nope.shape[:3], -1)], -1)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * c.qk_head_dim**-0.5
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        p = scores.masked_fill(ahead, -torch.inf).softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", p, v).flatten(-2) @ w["o_proj"].mT

    def mlp(self, x: Tensor, at: str) -> Tensor:
        gate, up, down = (self.w[f"{at}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return (F.silu(x @ gate.mT) * (x @ up.mT)) @ down.mT

    def moe(self, x: Tensor, at: str) -> Tensor:
        count, k = CONFIG.n_routed_experts, CONFIG.num_experts_per_tok
        scores = (x @ self.w[f"{at}.gate.weight"].mT).sigmoid()
        experts = next(self.routing).long().view(*x.shape[:2], k)
        weights = scores.gather(-1, experts)
        weights = weights / weights.sum(-1, keepdim=True) * CONFIG.routed_scaling_factor
        out = self.mlp(x, f"{at}.shared_experts")
        for e in range(count):
            share = (weights * (experts == e)).sum(-1, keepdim=True)
            out = out + share * self.mlp(x, f"{at}.experts.{e}")
        chosen = F.one_hot(experts, count).sum(2).double().mean(1) * count / k  # [B, E]
        self.balance = self.balance + ALPHA * (chosen * (scores / scores.sum(-1, keepdim=True)).mean(1)).sum(-1).mean()
        return out

    def block(self, x: Tensor, i: int) -> Tensor:
        at = f"model.layers.{i}"
        x = x + self.attention(norm(x, self.w[f"{at}.input_layernorm.weight"]), f"{at}.self_attn")
        h = norm(x, self.w[f"{at}.post_attention_layernorm.weight"])
        return x + (self.mlp if i < CONFIG.first_k_dense_replace else self.moe)(h, f"{at}.mlp")

    def predict(self, hidden: Tensor, tokens: Tensor, documents: Tensor, ahead: int) -> Tensor:
        """Mean of -log p of the token `ahead`, where it is in the same document."""
        logp = (hidden @ self.w["lm_head.weight"].mT).log_softmax(-1)
        total, count = torch.zeros((), dtype=torch.float64), 0
        for b in range(len(tokens)):
            for i in range(tokens.shape[1] - ahead):
                if documents[b, i] == documents[b, i + ahead]:
                    total, count = total - logp[b, i, tokens[b, i + ahead]], count + 1
        return total / max(count, 1)

    def losses(self, tokens: Tensor, documents: Tensor) -> dict[str, Tensor]:
        embedding = self.w["model.embed_tokens.weight"]
        x, layers, mtp = embedding[tokens], CONFIG.num_hidden_layers, []
        for i in range(layers):
            x = self.block(x, i)
        hidden = norm(x, self.w["model.norm.weight"])
        main = self.predict(hidden, tokens, documents, 1)
        for k in range(1, CONFIG.num_nextn_predict_layers + 1):
            at = f"model.layers.{layers + k - 1}"
            seen = norm(embedding[tokens[:, k:]], self.w[f"{at}.enorm.weight"])
            before = norm(hidden[:, : tokens.shape[1] - k], self.w[f"{at}.hnorm.weight"])
            x = self.block(torch.cat([seen, before], -1) @ self.w[f"{at}.eh_proj.weight"].mT, layers + k - 1)
            hidden = norm(x, self.w[f"{at}.shared_head.norm.weight"])
            mtp.append(self.predict(hidden, tokens, documents, k + 1))
        return {"main": main, "mtp": torch.stack(mtp).mean(), "balance": self.balance}


@pytest.mark.parametrize("boundaries", [(), (4, 5, 9)])
def test_against_the_formulas(boundaries):
    model = DeepSeekV3.sharded(CONFIG, None).allocate("cpu").train()
    initialise(model, 3)
    with torch.no_grad():
        for parameter in model.parameters():  # scores and logits that differ
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    tokens = torch.randint(32, (2, 12), generator=torch.Generator().manual_seed(1))
    documents = torch.zeros(2, 12, dtype=torch.int64)
    for place in boundaries:
        documents[0, place:] += 1
    train.loss(model, tokens)
    routing = [moe.load[1] for moe in train.moe_layers(model)]
    total, parts = train.loss(
        model, tokens, routing=routing, balance_alpha=ALPHA, mtp_weight=MTP_WEIGHT,
        documents=documents if boundaries else None,
    )  # fmt: skip
    total.backward()
    got = train.gradients(model)

    w = {p.name: p.view(getattr(p.module, p.attribute)).detach().double().requires_grad_() for p in pieces(model)}
    wanted = Plain(w, routing).losses(tokens, documents)
    (wanted["main"] + MTP_WEIGHT * wanted["mtp"] + wanted["balance"]).backward()
    for name, value in wanted.items():
        assert abs(parts[name].item() - value.item()) <= 1e-5 * value.item(), name
    assert set(got) == {name for name, value in w.items() if value.grad is not None or "bias" not in name}
    for name, grad in got.items():
        reference = torch.zeros_like(grad) if w[name].grad is None else w[name].grad
        assert float((grad - reference).norm()) <= 1e-4 * float(reference.norm()), name


def test_documents_of_one_token_each():
    """Nothing is left to predict: no loss, no gradient, no NaN."""
    model = DeepSeekV3.sharded(CONFIG, None).allocate("cpu").train()
    initialise(model, 3)
    total, parts = train.loss(model, torch.ones(1, 6, dtype=torch.int64), documents=torch.arange(6)[None])
    total.backward()
    assert parts["main"] == 0 and parts["mtp"] == 0
    assert all(not grad.any() for grad in train.gradients(model).values())
    with pytest.raises(ValueError, match="loss: documents: got shape"):
        train.loss(model, torch.ones(1, 6, dtype=torch.int64), documents=torch.zeros(1, 5, dtype=torch.int64))
