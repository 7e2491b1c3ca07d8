"""Decoding in latent space: what it fuses gives the bits of separate ops, and the kernels give what eager does."""

from __future__ import annotations

import oracle
import pytest
import torch
from checks import same_bits
from simulated import needs_simulator

import dsv3_kernels as dk
from dsv3_kernels.model.layers import Attention

TOKENS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]])


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load(weights, changes of the FP8 configuration) -> a model; in FP8 it computes W8A8 with results in bfloat16."""

    def made(weights="fp8", **changes):
        folder, config = tmp_path_factory.mktemp("absorbed"), oracle.FP8 | changes
        released, _ = oracle.quantized(oracle.tensors(config, seed=2))
        oracle.write(folder, config, released)
        return dk.model.DeepSeekV3.from_pretrained(folder, device="cpu", dtype=torch.bfloat16, weights=weights)

    return made


def prefilled(model, dtype):
    cache = dk.model.PagedLatentCache(model.config, [16, 16], dtype=dtype, page_size=16)
    cache.pages.fill_(255 if dtype == torch.uint8 else torch.nan)
    model(TOKENS, seq_lens=[5, 3], cache=cache)
    return cache


def separate(self, entered, step):
    """What `_prologue` stands for: two norms, codes, a rotation, the cache."""
    rank = self.config.kv_lora_rank
    q, kv = self.qkv_a.split(entered)
    latent, k_rope = self.kv_a_layernorm(kv[:, :rank]), dk.rope(kv[:, rank:], step.positions, step.cos_sin)
    dk.mla_cache_append(step.cache.pages[self.layer], step.slots, latent, k_rope)
    return self.q_b_proj(self.q_a_layernorm(q, quantize=True))


@pytest.mark.parametrize("rank", [128, 160])  # 160: zero columns lie between the parts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("scales", ["float", "ue8m0"])
def test_the_prologue_has_the_bits_of_separate_ops(load, monkeypatch, rank, dtype, scales):
    changes = (
        {} if scales == "float" else {"quantization_config": {**oracle.FP8["quantization_config"], "scale_fmt": scales}}
    )
    model = load(q_lora_rank=rank, **changes)
    assert model.config.pow2_scale == (scales == "ue8m0")
    calls, prologue = [], dk.mla_prologue
    monkeypatch.setattr(
        dk, "mla_prologue", lambda *args, **options: calls.append(options) or prologue(*args, **options)
    )
    results = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(Attention, "_prologue", separate)
        cache = prefilled(model, dtype)
        assert not calls or not fused, "prefill has no use for it"
        logits = model(torch.tensor([[10, 11], [12, 13]]), cache=cache)
        results.append((logits, model(torch.tensor([[14], [15]]), cache=cache), cache.pages))
    assert len(calls) == 2 * model.config.num_hidden_layers
    assert all(call["pow2_scale"] == model.config.pow2_scale for call in calls)
    assert results[0][0].isfinite().all() and same_bits(*results)


@pytest.mark.parametrize(("rank", "weights"), [(None, "fp8"), (160, "bf16")])
def test_others_take_separate_ops(load, monkeypatch, rank, weights):
    """Queries that are not of low rank, or not quantised."""
    monkeypatch.setattr(dk, "mla_prologue", None)
    model = load(weights, q_lora_rank=rank)
    cache = prefilled(model, torch.bfloat16)
    assert model(torch.tensor([[10], [12]]), cache=cache).isfinite().all()


@needs_simulator
@pytest.mark.parametrize("rank", [128, 160])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_kernels_of_a_decoding_step(load, rank, dtype):
    """A layer's attention at the released widths, from its projections on, in the simulator."""
    model = load(q_lora_rank=rank)
    attention, results = model.model.layers[0].self_attn, {}
    tokens = torch.tensor([[10], [12]])
    h = torch.randn(2, model.config.hidden_size).bfloat16()
    for backend in ("eager", "sim:cuda"):
        cache = prefilled(model, dtype)
        step = model.step(tokens, cache=cache)
        assert step.absorbed
        entered, before = attention.enter(h, step), dk.launch_counts()
        with dk.backend(backend), torch.no_grad():
            results[backend] = attention.attend(entered, step).float(), cache.pages[0]
        launched = {name for name, count in (dk.launch_counts() - before).items() if count}
    kind = "fp8" if dtype == torch.uint8 else "bf16"
    wanted = {f"mla_prologue_{kind}", "mla_absorb_64x64_n", "mla_absorb_64x64_k", "rope_bf16", f"mla_decode_{kind}"}
    assert wanted <= launched and all(
        name in wanted or name.startswith(("fp8_gemm", "mla_decode")) for name in launched
    )
    (got, pages), (right, pages_right) = results["sim:cuda"], results["eager"]
    assert same_bits(pages, pages_right)
    assert (got - right).norm() <= 2**-7 * right.norm()
