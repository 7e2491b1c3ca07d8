"""Experts shared out over the ranks of a group: each rank's own sequences, the results of one process."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.distributed as dist
from oracle import relative
from ranks import run
from test_forward import BOUND

from dsv3_kernels.model import DeepSeekV3, PagedLatentCache
from dsv3_kernels.model.weights import pieces
from dsv3_kernels.parallel import Trace, two_microbatch

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


def overlapped(rank: int, folder: str) -> dict:
    """Two microbatches at once: prompts, then a token each from the cache; and gradients."""
    options = {"device": "cpu", "weights": "float32", "dtype": torch.float32}
    model = DeepSeekV3.from_pretrained(folder, group=dist.group.WORLD, **options)
    prompts = [torch.tensor(rows[:1]) for rows in (PROMPTS[rank], PROMPTS[rank + 1])]
    trace, equal = Trace(), []
    for tokens in (prompts, [p[:, :1] for p in prompts]):
        ours, theirs = ([PagedLatentCache(model.config, [64], dtype=torch.float32) for _ in "ab"] for _ in "ab")
        batches = list(zip(tokens, ours, strict=True))
        got = two_microbatch(lambda m: model.program(m[0], cache=m[1]), *batches, trace=trace)
        wanted = [model(t, cache=c) for t, c in zip(tokens, theirs, strict=True)]
        equal += [torch.equal(a, b) for a, b in zip(got, wanted, strict=True)]
        equal += [a.lengths == b.lengths and not g.requires_grad for a, b, g in zip(ours, theirs, got, strict=True)]

    def gradients(results):
        model.zero_grad()
        sum(r.square().sum() for r in results).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    a, b = gradients(two_microbatch(model.program, *prompts)), gradients([model(p) for p in prompts])
    equal.append(a.keys() == b.keys() and len(a) > 10 and all(torch.equal(a[name], b[name]) for name in a))
    return {"equal": equal, "exchanges": {span.name for span in trace.spans if span.kind == "exchange"}}


def test_two_microbatches_at_once(tmp_path):
    oracle.write(tmp_path, oracle.BASE, oracle.tensors(oracle.BASE, 0))
    for result in run(overlapped, 2, str(tmp_path)):
        assert result == {"equal": [True] * 9, "exchanges": {"dispatch", "combine"}}


def too_many(rank: int, folder: str) -> None:
    with pytest.raises(ValueError, match="group: got '3 ranks', wanted at most one for each of 2 experts"):
        DeepSeekV3.from_pretrained(folder, device="cpu", weights="float32", group=dist.group.WORLD)


def test_more_ranks_than_experts(tmp_path):
    config = oracle.BASE | {"n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}
    oracle.write(tmp_path, config, oracle.tensors(config, 0))
    run(too_many, 3, str(tmp_path))
