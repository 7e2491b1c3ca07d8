"""Tests of the tests: each classic mistake is planted, and the comparison with transformers must see it.

A mistake that slips under the bound of the other files would show here as a failure.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from oracle import relative
from test_forward import BOUND, MTP_BOUND

import dsv3_kernels as dk
from dsv3_kernels.model import layers, mtp


def error(case, prompt: int = 3) -> float:
    given = case.prompts[prompt]
    return relative(case.model(torch.tensor([given.whole]))[0], given.answer.logits)


def gate(*, fill=-math.inf, by="top2", weigh_biased=False, score="sigmoid", **wrong):
    """The router from its equations, with one of them wrong where asked."""

    def route(logits, bias, *, num_groups, topk_groups, top_k, scaling, normalize=True):
        num_groups, topk_groups = wrong.get("num_groups", num_groups), wrong.get("topk_groups", topk_groups)
        scaling, normalize = wrong.get("scaling", scaling), wrong.get("normalize", normalize)
        scores = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
        biased = scores + (0 if wrong.get("no_bias") else bias)
        groups = biased.unflatten(1, (num_groups, -1))
        best = groups.topk(2, -1).values.sum(-1) if by == "top2" else groups.amax(-1)
        kept = torch.zeros_like(best).scatter(1, best.topk(topk_groups, -1).indices, 1.0).bool()
        experts = groups.masked_fill(~kept[..., None], fill).flatten(1).topk(top_k, -1).indices
        weights = (biased if weigh_biased else scores).gather(1, experts)
        if normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * scaling, experts.int()

    return route


GATES = {
    "no bias": {"no_bias": True},
    "bias in the weights": {"weigh_biased": True},
    "group score is the maximum": {"by": "max"},
    "no groups": {"num_groups": 1, "topk_groups": 1},
    "other groups are 0, not -inf": {"fill": 0.0},
    "softmax": {"score": "softmax"},
    "not normalised": {"normalize": False},
    "not scaled": {"scaling": 1.0},
}


def test_the_gate_of_these_tests_is_right(base, monkeypatch):
    monkeypatch.setattr(dk, "moe_gate", gate())
    assert error(base) <= BOUND


@pytest.mark.parametrize("name", GATES)
def test_router(name, base, monkeypatch):
    monkeypatch.setattr(dk, "moe_gate", gate(**GATES[name]))
    assert error(base) > 0.05


def test_router_in_low_precision(base, monkeypatch):
    def logits(gate, x):
        return F.linear(x.bfloat16(), gate.weight.bfloat16()).float()

    monkeypatch.setattr(layers.Gate, "logits", logits)
    assert error(base) > 10 * BOUND


def test_router_bias_in_bfloat16(cases, monkeypatch):
    """It changes nothing but close decisions: one of these falls on the longest prompt of this configuration."""
    case = cases("plain")
    assert error(case) <= BOUND
    for layer in case.model.model.layers[2:]:
        buffers = layer.mlp.gate._buffers
        rounded = buffers["e_score_correction_bias"].bfloat16().float()
        monkeypatch.setitem(buffers, "e_score_correction_bias", rounded)
    assert error(case) > 0.01


def test_combine_in_low_precision(base, monkeypatch):
    combine = dk.moe_unpermute
    monkeypatch.setattr(
        dk, "moe_unpermute", lambda rows, *rest: combine(rows.bfloat16(), *rest).to(rows.dtype), raising=False
    )
    assert error(base) > 10 * BOUND


def test_no_shared_expert(base, monkeypatch):
    for layer in base.model.model.layers[1:]:
        monkeypatch.setitem(layer.mlp._modules, "shared_experts", None)
    assert error(base) > 0.05


def test_half_split_rotary_embedding(base, monkeypatch):
    rope = dk.rope
    monkeypatch.setattr(dk, "rope", lambda x, places, table: rope(x, places, table, interleaved=False))
    assert error(base) > 0.05


def test_latent_cache_in_the_other_order(base, monkeypatch):
    """Rotary keys stored half-split: scores do not change, the cache does, and other readers of it would."""
    append = dk.mla_cache_append

    def split(pages, slots, latent, k_rope):
        append(pages, slots, latent, torch.cat([k_rope[:, 0::2], k_rope[:, 1::2]], -1))

    monkeypatch.setattr(dk, "mla_cache_append", split)
    prompt = base.prompts[3]
    cache = dk.model.PagedLatentCache(base.model.config, [128], dtype=torch.float32)
    base.model(torch.tensor([prompt.whole]), cache=cache)
    wanted = base.oracle.latents(prompt.whole)[-1]
    assert relative(cache.pages[3].flatten(0, 1)[: len(wanted)], wanted) > 0.05


def plain_table(config):
    ones = {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.0, "device": None}
    size = config.max_position_embeddings
    return dk.yarn_cos_sin(config.qk_rope_head_dim, size, base=1e4, factor=1.0, original_max=size, **ones)


def test_no_yarn(base, monkeypatch):
    monkeypatch.setattr(base.model, "cos_sin", plain_table(base.model.config))
    assert error(base) > 0.05


def test_yarn_only_past_the_original_length(base, monkeypatch):
    """YaRN belongs to the configuration, not to the length of a sequence."""
    monkeypatch.setattr(base.model, "cos_sin", plain_table(base.model.config))
    assert len(base.prompts[1].whole) < base.model.config.yarn.original_max
    assert error(base, prompt=1) > 0.01


@pytest.mark.parametrize("power", [0, 1, 4])
def test_softmax_scale_takes_mscale_squared_once(power, cases, monkeypatch):
    for name in ("base", "odd"):
        case = cases(name)
        config = case.model.config
        mscale = math.sqrt(config.softmax_scale * math.sqrt(config.qk_head_dim))
        wrong = config.qk_head_dim**-0.5 * mscale**power
        monkeypatch.setattr(type(config), "softmax_scale", wrong)
        assert error(case) > 0.01
        monkeypatch.undo()


def test_mscale_on_the_angles_too(base, monkeypatch):
    monkeypatch.setattr(base.model, "cos_sin", base.model.cos_sin * (0.1 * math.log(8) + 1))
    assert error(base) > 0.01


def test_latent_norm_over_the_rotary_key_too(base, monkeypatch):
    """The norm takes the latent alone: its mean square must not see the rotary key."""
    norm = layers.Norm.forward

    def forward(self, x, residual=None, *, quantize=False):
        if x._base is not None and x.shape[-1] == base.model.config.kv_lora_rank:
            whole = x._base
            mean = whole.square().mean(-1, keepdim=True)
            return x * torch.rsqrt(mean + self.eps) * self.weight
        return norm(self, x, residual, quantize=quantize)

    monkeypatch.setattr(layers.Norm, "forward", forward)
    assert error(base) > 0.01


def test_rotary_key_normed(base, monkeypatch):
    """The norm takes the latent alone: the rotary key stays as it was projected."""
    rope = dk.rope

    def normed(x, *rest):
        return rope(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) if x.dim() == 2 else x, *rest)

    monkeypatch.setattr(dk, "rope", normed)
    assert error(base) > 0.01


def test_no_latent_norm(base, monkeypatch):
    for layer in base.model.model.layers:
        monkeypatch.setitem(layer.self_attn._modules, "kv_a_layernorm", torch.nn.Identity())
    assert error(base) > 0.05


def test_norms_with_another_epsilon(base, monkeypatch):
    for module in base.model.modules():
        if isinstance(module, layers.Norm):
            monkeypatch.setattr(module, "eps", 1e-5)
    assert error(base) > BOUND


def test_no_causal_mask(base, monkeypatch):
    attend = dk.mla_prefill
    monkeypatch.setattr(dk, "mla_prefill", lambda *args, causal, **rest: attend(*args, causal=False, **rest))
    assert error(base) > 0.05


def test_a_cache_slot_off_by_one(base, monkeypatch):
    """Decoding reads what prefill wrote: one row wrong and the next logits are."""
    prompt = base.prompts[2]
    slots = dk.model.PagedLatentCache.slots
    monkeypatch.setattr(dk.model.PagedLatentCache, "slots", lambda cache, places: slots(cache, places) + 1)
    cache = dk.model.PagedLatentCache(base.model.config, [128], dtype=torch.float32)
    base.model(torch.tensor([prompt.tokens]), cache=cache)
    monkeypatch.undo()
    logits = base.model(torch.tensor([prompt.whole[len(prompt.tokens) :][:1]]), cache=cache)
    assert relative(logits[0, 0], prompt.answer.logits[len(prompt.tokens)]) > 100 * BOUND


# -- multi-token prediction ------------------------------------------------------------------------------------------
def mtp_error(case) -> float:
    prompt = case.prompts[3]
    return relative(case.model.mtp_logits(torch.tensor([prompt.whole]))[0], case.oracle.mtp(prompt.whole)[0])


def predict(self, hidden, embedding, step, *, swap=False, head=None):
    pair = [self.enorm(embedding), self.hnorm(hidden)]
    update, residual = self(self.eh_proj(torch.cat(pair[::-1] if swap else pair, -1)), None, step)
    return (head or self.shared_head["norm"])(update, residual)[0]


def test_mtp_hidden_state_first(base, monkeypatch):
    assert mtp_error(base) <= MTP_BOUND
    monkeypatch.setattr(mtp.MTPLayer, "predict", lambda *args: predict(*args, swap=True))
    assert mtp_error(base) > 0.05


def test_mtp_fed_before_the_norm(base, monkeypatch):
    monkeypatch.setattr(base.model, "mtp_feed", "pre_norm")
    assert mtp_error(base) > 0.05


def test_mtp_with_the_main_norm(base, monkeypatch):
    head = base.model.model.norm
    monkeypatch.setattr(mtp.MTPLayer, "predict", lambda *args: predict(*args, head=head))
    assert mtp_error(base) > 0.05


def test_mtp_embeds_the_same_token(base, monkeypatch):
    """Row i takes the embedding of token i+1; of token i it would be the main model's question again."""
    prompt = base.prompts[3]
    original, tokens = mtp.MTPLayer.predict, torch.tensor(prompt.whole)

    def same(self, hidden, embedding, step):
        return original(self, hidden, base.model.embed(tokens[:-1], torch.float32), step)

    monkeypatch.setattr(mtp.MTPLayer, "predict", same)
    assert mtp_error(base) > 0.05


def test_mtp_first_embedding_zeroed(base, monkeypatch):
    original = mtp.MTPLayer.predict

    def zeroed(self, hidden, embedding, step):
        return original(self, hidden, torch.cat([torch.zeros_like(embedding[:1]), embedding[1:]]), step)

    monkeypatch.setattr(mtp.MTPLayer, "predict", zeroed)
    assert mtp_error(base) > 0.01


def test_mtp_with_an_embedding_of_its_own(base, monkeypatch):
    original, table = mtp.MTPLayer.predict, base.model.model.embed_tokens.weight
    other = torch.randn(table.shape, generator=torch.Generator().manual_seed(0))[base.prompts[3].whole[1:]]
    monkeypatch.setattr(mtp.MTPLayer, "predict", lambda self, hidden, _, step: original(self, hidden, other, step))
    assert mtp_error(base) > 0.05


def test_mtp_with_a_head_of_its_own(base, monkeypatch):
    head = copy.deepcopy(base.model.lm_head)
    head.weight.normal_(0.0, float(head.weight.std()), generator=torch.Generator().manual_seed(0))
    monkeypatch.setitem(base.model._modules, "lm_head", head)
    assert mtp_error(base) > 0.05


def test_mtp_block_from_the_last_main_layer(base, monkeypatch):
    """It lies at index num_hidden_layers; one too low its norms and projection would work on another block."""
    last, block = base.model.model.layers[3], base.model.model.layers[4]
    assert base.model.config.num_hidden_layers == 4
    for name, module in last.named_children():
        monkeypatch.setitem(block._modules, name, module)
    assert mtp_error(base) > 0.05
