"""Experts shared out over the ranks of a group: each rank's own sequences, the results of one process."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.distributed as dist
from oracle import relative
from ranks import run
from test_forward import BOUND

from dsv3_kernels.model import DeepSeekV3
from dsv3_kernels.model.weights import pieces

PROMPTS = [[[3, 1, 4], [1, 5, 9, 2, 6, 5]], [[35, 8]], [[9, 7, 9, 3, 2, 3, 8, 4], [6, 2, 6, 4]]]
NEW = [7, 3, 5]


def rank_main(rank: int, folder: str, options: dict, routing: list) -> dict:
    model = DeepSeekV3.from_pretrained(folder, device="cpu", group=dist.group.WORLD, **options)
    model.requires_grad_(False)
    tokens = torch.tensor(PROMPTS[rank][:1])
    out = {"logits": model(tokens, routing=routing[rank]), "names": {piece.name for piece in pieces(model)}}
    for speculative in (False, True):
        out[speculative] = model.generate(PROMPTS[rank], NEW[rank], speculative=speculative)
    for call in (lambda: model.save_pretrained(folder), lambda: model.generate([[1]], 1, prefill_chunk=1)):
        with pytest.raises(ValueError, match=r"all experts|prefill_chunk"):
            call()
    return out


@pytest.mark.parametrize("kind", ["float32", "fp8"])
def test_sharded_experts(kind, tmp_path):
    config = oracle.BASE if kind == "float32" else oracle.FP8
    state = oracle.tensors(config, 0)
    oracle.write(tmp_path, config, state if kind == "float32" else oracle.quantized(state)[0])
    options = {"weights": kind, "dtype": torch.float32}
    whole = DeepSeekV3.from_pretrained(tmp_path, device="cpu", **options).requires_grad_(False)
    ranks = 3 if kind == "float32" else 2  # 16 experts on 3 ranks: 6, 5, 5
    wanted = [whole(torch.tensor(rows[:1]), return_routing=True) for rows in PROMPTS]
    results = run(rank_main, ranks, str(tmp_path), options, [routing for _, routing in wanted])
    for rank, result in enumerate(results):
        # FP8 codes may go to their neighbours where another number of rows sums in another order
        assert relative(result["logits"], wanted[rank][0]) <= (BOUND if kind == "float32" else 0.02)
        for speculative in (False, True):
            plain = whole.generate(PROMPTS[rank], NEW[rank])
            assert result[speculative] == plain or kind == "fp8"
            assert list(map(len, result[speculative])) == list(map(len, plain))
    shares = [{name for name in result["names"] if ".experts." in name} for result in results]
    assert set.union(*shares) == {piece.name for piece in pieces(whole) if ".mlp.experts." in piece.name}
    assert sum(map(len, shares)) == len(set.union(*shares)) and all(shares)


def too_many(rank: int, folder: str) -> None:
    with pytest.raises(ValueError, match="group: got '3 ranks', wanted at most one for each of 2 experts"):
        DeepSeekV3.from_pretrained(folder, device="cpu", weights="float32", group=dist.group.WORLD)


def test_more_ranks_than_experts(tmp_path):
    config = oracle.BASE | {"n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}
    oracle.write(tmp_path, config, oracle.tensors(config, 0))
    run(too_many, 3, str(tmp_path))
