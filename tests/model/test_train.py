"""The training loss and its gradients against transformers under torch autograd; balancing; FP8 gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import cosines, relative

import dsv3_kernels as dk
from dsv3_kernels.model import DeepSeekV3, train

TOLERANCE = 1e-4


def batch(case, rows: int = 2, width: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(case.model.config.vocab_size, (rows, width), generator=generator)


def step(model, tokens, **options):
    model.zero_grad()
    total, parts = train.loss(model, tokens, **options)
    total.backward()
    return total, parts, train.gradients(model)


def disagreement(got: dict, wanted: dict) -> dict[str, float]:
    """{name: relative error} of those over the tolerance; gradients of experts that nothing reached are zero."""
    assert set(got) == set(wanted)
    scale = max(float(g.abs().max()) for g in wanted.values())
    out = {}
    for name, reference in wanted.items():
        size = float(reference.norm())
        error = float((got[name] - reference).norm()) / (size or scale)
        if error > TOLERANCE and float((got[name] - reference).abs().max()) > 1e-7 * scale:
            out[name] = error
    return out


def test_losses_and_gradients(case):
    """float32: every parameter of every layer, the shared embedding and head through both losses."""
    tokens = batch(case)
    main, mtp, wanted = case.oracle.gradients(tokens, 0.3)
    model = case.load(weights="float32")
    total, parts, got = step(model, tokens, recipe="float32")
    assert set(parts) == {"main", "mtp"}
    assert abs(parts["main"] - main) <= 1e-5 * main and abs(parts["mtp"] - mtp) <= 1e-5 * mtp
    assert abs(total.item() - main - 0.3 * mtp) <= 1e-5 * total.item()
    assert not disagreement(got, wanted)
    assert all(grad.dtype == torch.float32 for grad in got.values())
    # other weights of the MTP loss are seen
    _, _, other = step(model, tokens, recipe="float32", mtp_weight=0.1)
    assert disagreement(other, wanted)


def test_a_label_shifted_by_one_is_seen(base, monkeypatch):
    main, mtp, wanted = base.oracle.gradients(batch(base), 0.3)
    original = train._cross_entropy
    monkeypatch.setattr(train, "_cross_entropy", lambda m, h, t, ahead, docs: original(m, h, t, min(ahead, 1)))
    _, parts, got = step(base.load(weights="float32"), batch(base), recipe="float32")
    assert abs(parts["main"] - main) <= 1e-5 * main and abs(parts["mtp"] - mtp) > 1e-3
    assert disagreement(got, wanted)


def test_a_stopped_gradient_is_seen(base, monkeypatch):
    """The MTP loss reaches the main model through the hidden state it is fed."""
    _, _, wanted = base.oracle.gradients(batch(base), 0.3)
    monkeypatch.setattr(DeepSeekV3, "feed", lambda self, normed, residual: normed.detach())
    _, _, got = step(base.load(weights="float32"), batch(base), recipe="float32")
    assert "model.layers.0.self_attn.kv_b_proj.weight" in disagreement(got, wanted)


def test_replayed_routing(base):
    """The routing of a pass, replayed, is the same step; with the MTP layer's as well."""
    tokens = batch(base)
    model = base.load(weights="float32")
    _, whole = model.mtp_logits(tokens, return_routing=True)
    assert len(whole) == 4 and whole[-1].shape == (2 * 23, 4)
    total, _, wanted = step(model, tokens, recipe="float32")
    for routing in (whole, whole[:3]):
        again, _, got = step(model, tokens, recipe="float32", routing=routing)
        assert abs(again.item() - total.item()) <= 1e-6 * total.item()
        assert not disagreement(got, wanted)
    with pytest.raises(ValueError, match="routing: got 2 tensors, wanted 3"):
        train.loss(model, tokens, routing=whole[:2])


def test_bf16_gradients(base, bf16):
    """Routing replayed: as far from float32 as transformers' own bfloat16 gradients, within 2.5 times."""
    tokens = batch(base)
    model = base.load(weights="float32")
    _, routing = model.mtp_logits(tokens, return_routing=True)
    _, exact, wanted = step(model, tokens, recipe="float32", routing=routing)
    _, parts, got = step(model, tokens, recipe="bf16", routing=routing)
    _, _, theirs = bf16("base").gradients(tokens, 0.3, replay=routing)
    assert abs(parts["main"] - exact["main"]) <= 0.02 * exact["main"]
    for ours, noise in zip(cosines(got, wanted), cosines(theirs, wanted), strict=True):
        assert 1 - ours <= 2.5**2 * (1 - noise)  # the distance goes with the square root
        assert noise > 0.95
    assert all(grad.dtype == torch.float32 for grad in got.values())


def test_training_learns(trained):
    model, _, history = trained
    for first, last in zip(history[0], history[-1], strict=True):
        assert first > 3.3 and last < 0.7 * first
    assert all(bool(moe.gate.e_score_correction_bias.any()) for moe in train.moe_layers(model))


def test_speculation_with_a_trained_model(trained):
    """Drafts that are mostly right, batched, unequal lengths: the tokens of plain decoding, in fewer passes."""
    model, text, _ = trained
    model.eval()
    rows = text(4)
    prompts = [rows[0, :12].tolist(), rows[1, :30].tolist(), rows[2, :3].tolist(), rows[3, :20].tolist()]
    plain = model.generate(prompts, 30)
    statistics = dk.model.generate.Statistics()
    assert model.generate(prompts, 30, speculative=True, statistics=statistics) == plain
    assert statistics.acceptance >= 0.5
    assert statistics.steps < 29


def test_balance_loss(base):
    """Equation 17 of the report, per sequence, over all MoE layers."""
    tokens = batch(base)
    model = base.load(weights="float32").train()
    _, parts = train.loss(model, tokens, recipe="float32", balance_alpha=0.01)
    wanted = 0.0
    for moe in train.moe_layers(model):
        logits, experts = moe.load
        scores = logits.detach().sigmoid().double()
        scores = (scores / scores.sum(-1, keepdim=True)).view(2, -1, 16)
        chosen = F.one_hot(experts.long().view(2, -1, 4), 16).sum(2).double()
        wanted += 0.01 * float((chosen.mean(1) * 16 / 4 * scores.mean(1)).sum(-1).mean())
    assert abs(parts["balance"].item() - wanted) <= 1e-5 * wanted
    model.zero_grad()
    plain, _ = train.loss(model, tokens, recipe="float32")
    with_balance, _ = train.loss(model, tokens, recipe="float32", balance_alpha=0.01)
    assert abs(with_balance.item() - plain.item() - wanted) <= 1e-4
    grads = torch.autograd.grad(with_balance - plain, model.model.layers[1].mlp.gate.weight)
    assert float(grads[0].abs().max()) > 0


def test_bias_update_moves_every_router(base):
    """Also the MTP layer's: the busiest expert goes down, the idlest up, by the same step."""
    model = base.load(weights="float32").train()
    layers = train.moe_layers(model)
    before = [moe.gate.e_score_correction_bias.clone() for moe in layers]
    train.loss(model, batch(base), recipe="float32")
    train.loss(model, batch(base).flip(1), recipe="float32")  # of a second microbatch, added to the first one's
    loads = train.update_bias(model, 0.125)
    assert len(layers) == 4 and not train.update_bias(model, 0.125)
    for moe, old, counts in zip(layers, before, loads, strict=True):
        assert counts.sum() == 2 * len(moe.load[1]) * 4
        moved = moe.gate.e_score_correction_bias - old
        assert torch.allclose(moved, 0.125 * torch.sign(counts.float().mean() - counts), atol=1e-6)
        assert moved[counts.argmax()] < 0 < moved[counts.argmin()]


def test_deterministic(base):
    model = base.load(weights="float32")
    first = step(model, batch(base), recipe="bf16")
    second = step(model, batch(base), recipe="bf16")
    assert first[0].item() == second[0].item()
    assert all(torch.equal(first[2][name], second[2][name]) for name in first[2])


def test_single_losses(base):
    model = base.load(weights="float32")
    _, parts = train.loss(model, torch.tensor([[1, 2]]), recipe="float32")  # nothing for the MTP layer to predict
    assert parts["mtp"] == 0 and parts["main"] > 0
    logits = model(torch.tensor([[1, 2]]))
    assert relative(parts["main"], F.cross_entropy(logits[0, :1], torch.tensor([2]))) <= 1e-5


@pytest.mark.parametrize(
    ("options", "words"),
    [({"recipe": "fp16"}, "recipe: got 'fp16'"), ({"recipe": None}, "recipe")],
)
def test_bad_recipe(base, options, words):
    with pytest.raises(ValueError, match=f"loss: {words}"):
        train.loss(base.model, batch(base), **options)


def test_bad_input(base):
    with pytest.raises(ValueError, match=r"loss: tokens.*two tokens"):
        train.loss(base.model, torch.tensor([[1]]))
    with pytest.raises(TypeError, match="tokens: got dtype float32"):
        train.loss(base.model, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="FP8 weights"):
        train.loss(base.load(weights="fp8"), batch(base))
