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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    """The models are tiny: a second thread costs more than it brings, in tests and in the fixtures made for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return (yield)
    finally:
        torch.set_num_threads(before)
