"""One oracle, its prompts and our model of each configuration, made once per run."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import oracle
import pytest
import torch

import dsv3_kernels as dk


@dataclass
class Case:
    name: str
    folder: Path
    oracle: oracle.Oracle
    prompts: list[oracle.Prompt]
    model: dk.model.DeepSeekV3

    def load(self, **options) -> dk.model.DeepSeekV3:
        return dk.model.DeepSeekV3.from_pretrained(self.folder, device="cpu", **options)


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    """cases(name) -> Case"""
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            config = oracle.CASES[name]
            folder = tmp_path_factory.mktemp(name)
            oracle.write(folder, config, oracle.tensors(config, seed=0), shards=3 if name == "base" else 1)
            reference = oracle.Oracle(folder)
            model = dk.model.DeepSeekV3.from_pretrained(folder, device="cpu", weights="float32")
            model.requires_grad_(False)
            made[name] = Case(name, folder, reference, oracle.prompts(reference), model)
        return made[name]

    return get


@pytest.fixture(scope="session")
def bf16(cases):
    """bf16(name) -> transformers' own bfloat16 model of a case."""
    return functools.cache(lambda name: oracle.Oracle(cases(name).folder, dtype=torch.bfloat16))


@pytest.fixture(scope="session")
def fp8(tmp_path_factory):
    """A checkpoint in the released FP8 layout (with partial blocks), and transformers' model of its exact values."""
    released, floats = oracle.quantized(oracle.tensors(oracle.FP8, seed=1))
    folder, plain = tmp_path_factory.mktemp("fp8"), tmp_path_factory.mktemp("fp8_dequantised")
    # Sorted and dealt in turn: scales lie in other shards than their weights.
    oracle.write(folder, oracle.FP8, released, shards=4)
    oracle.write(plain, {k: v for k, v in oracle.FP8.items() if k != "quantization_config"}, floats)
    reference = oracle.Oracle(plain)
    model = dk.model.DeepSeekV3.from_pretrained(folder, device="cpu", weights="float32")
    model.requires_grad_(False)
    prompts = oracle.prompts(reference, lengths=(5, 40), new=6)
    return Case("fp8", folder, reference, prompts, model)


@pytest.fixture(params=sorted(oracle.CASES))
def case(request, cases) -> Case:
    return cases(request.param)


@pytest.fixture
def base(cases) -> Case:
    return cases("base")


@pytest.fixture(scope="session")
def trained():
    """A toy with blocks of 128 that has learnt a periodic language: (model, text), after 50 steps in bfloat16."""
    torch.manual_seed(0)
    config = dk.model.Config(
        vocab_size=32,
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        num_nextn_predict_layers=1,
    )
    generator = torch.Generator().manual_seed(0)
    model = dk.model.DeepSeekV3(config, generator=generator)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    word = torch.randint(32, (23,), generator=generator)

    def text(rows: int) -> torch.Tensor:
        starts = torch.randint(23, (rows, 1), generator=generator)
        tokens = word[(starts + torch.arange(40)) % 23]
        noise = torch.rand(tokens.shape, generator=generator) < 0.05
        return torch.where(noise, torch.randint(32, tokens.shape, generator=generator), tokens)

    history = []
    for _ in range(50):
        optimizer.zero_grad()
        total, parts = dk.model.train.loss(model, text(8), recipe="bf16", balance_alpha=1e-4)
        total.backward()
        optimizer.step()
        dk.model.train.update_bias(model, 1e-3)
        history.append((parts["main"].item(), parts["mtp"].item()))
    return model, text, history


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    """The models are tiny: a second thread costs more than it brings, in tests and in the fixtures made for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return (yield)
    finally:
        torch.set_num_threads(before)
