"""bfloat16 against transformers' own bfloat16 noise, routing replayed.

A free router turns rounding into other experts: one token in five takes another one on these nets, and logits then
differ by percents whoever computes them. With the float32 routing replayed, what is left is rounding.
"""

from __future__ import annotations

import pytest
import torch
from oracle import CASES, relative

import dsv3_kernels as dk
from dsv3_kernels.model import layers

FACTOR = 2.5


def noise(case, bf16, run) -> list[tuple[float, float]]:
    """Per prompt: (our distance from transformers' float32 logits, that of transformers' bfloat16)."""
    out = []
    for prompt in case.prompts[1:]:
        theirs = bf16(case.name).answer(prompt.whole, replay=prompt.answer.experts)
        routing = [experts.int() for experts in prompt.answer.experts]
        ours = run(torch.tensor([prompt.whole]), routing)
        out.append((relative(ours[0], prompt.answer.logits), relative(theirs.logits, prompt.answer.logits)))
    return out


@pytest.mark.parametrize("name", sorted(CASES))
def test_logits(name, cases, bf16):
    case = cases(name)
    model = case.load(weights="bf16").requires_grad_(False)
    assert model.dtype == torch.bfloat16
    for ours, theirs in noise(case, bf16, lambda tokens, routing: model(tokens, routing=routing)):
        assert 0.001 < theirs < 0.05
        assert ours <= FACTOR * theirs

    def decoded(tokens, routing):
        """The last tokens one by one in latent space."""
        cache = dk.model.PagedLatentCache(model.config, [128])
        cut = tokens.shape[1] - 4
        parts = [model(tokens[:, :cut], cache=cache, routing=[r[:cut] for r in routing])]
        for i in range(cut, tokens.shape[1]):
            parts.append(model(tokens[:, i : i + 1], cache=cache, routing=[r[i : i + 1] for r in routing]))
        return torch.cat(parts, 1)

    for ours, theirs in noise(case, bf16, decoded):
        assert ours <= FACTOR * theirs


def test_a_free_router_is_not_comparable(base, bf16):
    """Why routing is replayed: without it the same model is more than twice as far off on some prompt."""
    model = base.load(weights="bf16").requires_grad_(False)
    free = noise(base, bf16, lambda tokens, routing: model(tokens))
    replayed = noise(base, bf16, lambda tokens, routing: model(tokens, routing=routing))
    assert max(f / r for (f, _), (r, _) in zip(free, replayed, strict=True)) > 2


def test_coarser_arithmetic_is_seen(base, bf16, monkeypatch):
    """The bound separates bfloat16's rounding from a residual stream that loses more bits."""
    norm = layers.Norm.forward

    def forward(self, x, residual=None, *, quantize=False):
        if residual is not None:
            residual = residual.to(torch.float8_e4m3fn).to(x.dtype)
        return norm(self, x, residual, quantize=quantize)

    model = base.load(weights="bf16").requires_grad_(False)
    monkeypatch.setattr(layers.Norm, "forward", forward)
    pairs = noise(base, bf16, lambda tokens, routing: model(tokens, routing=routing))
    assert all(ours > FACTOR * theirs for ours, theirs in pairs)
