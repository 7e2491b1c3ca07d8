"""The model in float32 against transformers: logits, greedy tokens, latent cache, MTP, batches and chunks."""

from __future__ import annotations

import pytest
import torch
from checks import same_bits
from oracle import NEW, relative

from dsv3_kernels.model import PagedLatentCache, layers

BOUND = 8e-6
MTP_BOUND = 3e-5


def pad(rows: list[list[int]], fill: int = 0) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


def cached(case, count: int, capacity: int = 128) -> PagedLatentCache:
    return PagedLatentCache(case.model.config, [capacity] * count, dtype=torch.float32)


def test_the_oracle_is_sharp(case):
    """Otherwise the comparisons below could not fail."""
    for prompt in case.prompts:
        assert prompt.answer.logits.std() >= 1
    state = case.oracle.model.state_dict()
    biases = [value for name, value in state.items() if name.endswith("e_score_correction_bias")]
    assert biases and all((bias != 0).all() and (bias < -0.5).any() for bias in biases)
    seen: list = []
    with case.oracle._routers(seen), torch.no_grad():
        case.oracle.model(torch.tensor([case.prompts[-1].whole]), use_cache=False)
    assert any(bool((z.sigmoid() + r.e_score_correction_bias < 0).any()) for r, z, _ in seen)
    assert max(len(prompt.whole) for prompt in case.prompts) > 64  # past the original length of YaRN, and one page


def test_logits_and_routing(case):
    for prompt in case.prompts:
        logits, routing = case.model(torch.tensor([prompt.whole]), return_routing=True)
        assert logits.dtype == torch.float32 and logits.shape == (1, len(prompt.whole), case.model.config.vocab_size)
        assert relative(logits[0], prompt.answer.logits) <= BOUND
        assert len(routing) == len(prompt.answer.experts)
        for got, wanted in zip(routing, prompt.answer.experts, strict=True):
            assert torch.equal(got.long().sort(-1).values, wanted.sort(-1).values)


def test_greedy_tokens(case):
    for prompt in case.prompts:
        assert case.model.generate([prompt.tokens], NEW) == [prompt.whole]


def test_latent_cache(case):
    for prompt in case.prompts:
        cache = cached(case, 1)
        case.model(torch.tensor([prompt.whole]), cache=cache)
        assert cache.lengths == cache.seqlens.tolist() == [len(prompt.whole)]
        theirs = case.oracle.latents(prompt.whole)
        assert len(theirs) == case.model.config.num_hidden_layers <= len(cache.pages)
        for got, wanted in zip(cache.pages, theirs, strict=False):  # a page of the MTP layer may follow
            rows = got[cache.block_table[0].long()].flatten(0, 1)[: len(prompt.whole)]
            assert relative(rows, wanted) <= BOUND


@pytest.mark.parametrize("feed", ["post_norm", "pre_norm"])
def test_mtp_logits(case, feed, monkeypatch):
    monkeypatch.setattr(case.model, "mtp_feed", feed)
    for prompt in case.prompts:
        tokens = torch.tensor([prompt.whole])
        wanted, _ = case.oracle.mtp(prompt.whole, pre_norm=feed == "pre_norm")
        logits = case.model.mtp_logits(tokens)
        assert logits.shape == (1, len(prompt.whole) - 1, case.model.config.vocab_size)
        assert relative(logits[0], wanted) <= MTP_BOUND


def test_unequal_lengths_in_a_batch(case):
    """Padding is never read: it may be any token, and its logits and routing say that it is padding."""
    rows = [prompt.whole for prompt in case.prompts]
    lengths = [len(row) for row in rows]
    logits, routing = case.model(pad(rows), seq_lens=lengths, return_routing=True)
    for b, prompt in enumerate(case.prompts):
        assert relative(logits[b, : lengths[b]], prompt.answer.logits) <= BOUND
        assert not logits[b, lengths[b] :].any()
    for experts in routing:
        table = experts.view(len(rows), -1, experts.shape[-1])
        for b, n in enumerate(lengths):
            assert (table[b, n:] == -1).all() and (table[b, :n] >= 0).all()
    other = case.model(pad(rows, fill=1), seq_lens=torch.tensor(lengths))
    assert same_bits(logits, other)
    replayed = case.model(pad(rows), seq_lens=lengths, routing=routing)
    assert relative(replayed, logits) <= BOUND
    assert same_bits(case.model(pad(rows), seq_lens=lengths, routing=torch.stack(routing)), replayed)


def test_decoding_step_by_step(case):
    """One token at a time in latent space, whole batch, unequal lengths: the logits of the whole pass."""
    rows = [prompt.whole for prompt in case.prompts]
    starts = [len(prompt.tokens) for prompt in case.prompts]
    cache = cached(case, len(rows))
    case.model(pad([row[:n] for row, n in zip(rows, starts, strict=True)]), seq_lens=starts, cache=cache)
    got = []
    for i in range(NEW):
        step = torch.tensor([[row[n + i]] for row, n in zip(rows, starts, strict=True)])
        got.append(case.model(step, cache=cache)[:, 0])
    for b, prompt in enumerate(case.prompts):
        wanted = prompt.answer.logits[starts[b] :]
        assert relative(torch.stack(got, 1)[b], wanted) <= BOUND


@pytest.mark.parametrize("size", [1, 5, 64])
def test_prefill_in_chunks(case, size, monkeypatch):
    """Any size of chunk, cached prefixes expanded page by page, gives the logits of the whole pass."""
    monkeypatch.setattr(layers, "PREFIX_CHUNK", 64)
    prompt = case.prompts[2 if size == 1 else 3]
    cache = cached(case, 1)
    parts = [
        case.model(torch.tensor([prompt.whole[i : i + size]]), cache=cache)[0]
        for i in range(0, len(prompt.whole), size)
    ]
    assert relative(torch.cat(parts), prompt.answer.logits) <= BOUND
    if size > 1:
        rows = [p.tokens for p in case.prompts]
        assert case.model.generate(rows, NEW, prefill_chunk=size) == [p.whole for p in case.prompts]


def test_a_batch_of_unequal_chunks(base):
    """Sequences that have nothing new in a pass keep their place."""
    rows = [prompt.whole for prompt in base.prompts]
    cache = cached(base, len(rows))
    for start in range(0, max(map(len, rows)), 20):
        counts = [min(max(len(row) - start, 0), 20) for row in rows]
        part = pad([row[start : start + 20] or [0] for row in rows])
        logits = base.model(part, seq_lens=counts, cache=cache)
        for b, prompt in enumerate(base.prompts):
            if counts[b]:
                wanted = prompt.answer.logits[start : start + counts[b]]
                assert relative(logits[b, : counts[b]], wanted) <= BOUND
    assert cache.lengths == [len(row) for row in rows]


def test_pages_in_any_order_and_poison(base):
    """The block table decides where a token lies; slots that nobody wrote hold NaN here."""
    prompt = base.prompts[-1]
    cache = cached(base, 3)
    shuffled = torch.randperm(cache.pages.shape[1], generator=torch.Generator().manual_seed(0)).int()
    cache.block_table.copy_(shuffled.view_as(cache.block_table))
    cache.pages.fill_(torch.nan)
    tokens = torch.tensor([prompt.tokens] * 3)
    case_logits = base.model(tokens, cache=cache)
    for i in range(NEW):
        step = torch.tensor([prompt.whole[len(prompt.tokens) + i : len(prompt.tokens) + i + 1]] * 3)
        logits = base.model(step, cache=cache)[:, 0]
        assert relative(logits, prompt.answer.logits[len(prompt.tokens) + i].expand(3, -1)) <= BOUND
    assert relative(case_logits[2], prompt.answer.logits[: len(prompt.tokens)]) <= BOUND


def test_positions(base):
    """Rotary positions may be given; attention sees only differences, so that a shift changes next to nothing."""
    prompt = base.prompts[2]
    tokens = torch.tensor([prompt.whole])
    places = torch.arange(len(prompt.whole))[None]
    assert same_bits(base.model(tokens), base.model(tokens, positions=places))
    assert relative(base.model(tokens, positions=places + 5)[0], prompt.answer.logits) <= 4 * BOUND
    assert relative(base.model(tokens, positions=places * 2)[0], prompt.answer.logits) > 0.01


def test_same_bits_twice_and_in_any_layout(base):
    tokens = torch.tensor([prompt.whole[:30] for prompt in base.prompts[2:]])
    first = base.model(tokens)
    assert same_bits(first, base.model(tokens))
    wide = torch.cat([tokens, tokens], dim=1)[:, :30]  # rows with a stride
    assert same_bits(first, base.model(wide))
    assert same_bits(first, base.model(tokens.int()))


def test_routing_replay_changes_what_is_asked(base):
    tokens = torch.tensor([base.prompts[2].whole])
    logits, routing = base.model(tokens, return_routing=True)
    assert relative(base.model(tokens, routing=routing), logits) <= BOUND
    other = [(experts + 1) % base.model.config.n_routed_experts for experts in routing]
    changed, seen = base.model(tokens, routing=other, return_routing=True)
    assert relative(changed, logits) > 0.01
    assert all(torch.equal(a, b) for a, b in zip(seen, other, strict=True))
    wanted = base.oracle.answer(base.prompts[2].whole, replay=other)
    assert relative(changed[0], wanted.logits) <= BOUND
