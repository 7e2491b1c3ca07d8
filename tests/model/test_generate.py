"""Generation: speculation is exact, sampling follows its distribution, text streams, and the step waits for nobody."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from oracle import NEW, relative

import dsv3_kernels as dk
from dsv3_kernels.model import ByteTokenizer, PagedLatentCache, generate, load_tokenizer
from dsv3_kernels.model.generate import Sampler, Statistics, TextStream


def helped(monkeypatch, wholes: list[list[int]], right, seen: list | None = None) -> None:
    """Replace the drafts: `right(b, position)` says whether sequence b's draft of that position is the true token."""
    verify = generate._Run._verify

    def step(run):
        if seen is not None:
            seen.append((list(run.cache.lengths), run.draft.clone(), [bool(n) for n in run.left]))
        for b, whole in enumerate(wholes):
            for k in range(run.drafts):
                at = run.cache.lengths[b] + 1 + k  # the last token shown is not in the cache yet
                true = whole[at] if at < len(whole) else 0
                run.draft[b, k] = true if right(b, at) else (true + 1) % run.model.config.vocab_size
        return verify(run)

    monkeypatch.setattr(generate._Run, "_verify", step)


@pytest.mark.parametrize("name", ["base", "plain", "odd"])
def test_speculation_is_exact(name, cases):
    case = cases(name)
    wholes = [prompt.whole for prompt in case.prompts]
    for chunk in (None, 20):
        statistics = Statistics()
        tokens = [prompt.tokens for prompt in case.prompts]
        out = case.model.generate(tokens, NEW, speculative=True, prefill_chunk=chunk, statistics=statistics)
        assert out == wholes
        assert 0 < statistics.drafted <= len(wholes) * statistics.steps


PATTERNS = {
    "all right": lambda b, at: True,
    "all wrong": lambda b, at: False,
    "by turns": lambda b, at: (at + b) % 2 == 0,
    "some sequences": lambda b, at: b % 2 == 0,
}


def chained(model, whole: list[int], n: int, drafts: int) -> list[torch.Tensor]:
    """Logits of each draft after n cached tokens: the MTP layer over everything, then fed with its own states."""
    tokens = torch.tensor(whole)
    step = model.step(tokens[None, :n])
    fed, follow, out = model.feed(*model.hidden(step)), tokens[1 : n + 1], []
    for _ in range(drafts):
        inner = model.step(torch.zeros(1, len(fed), dtype=torch.int64))
        hidden = dk.model.mtp.layers(model)[0].predict(fed, model.embed(follow, fed.dtype), inner)
        out.append(model.head(hidden[-1]))
        fed, follow = torch.cat([fed, hidden[-1:]]), torch.cat([follow, out[-1].argmax()[None]])
    return out


@pytest.mark.parametrize(
    ("pattern", "drafts"), [*((pattern, 1) for pattern in PATTERNS), ("by turns", 3), ("all right", 4)]
)
def test_accepted_and_rejected_drafts(pattern, drafts, base, monkeypatch):
    """Whatever is accepted, the tokens are the greedy ones, and every own draft is the MTP module's for its place."""
    wholes = [prompt.whole for prompt in base.prompts]
    seen: list = []
    helped(monkeypatch, wholes, PATTERNS[pattern], seen)
    statistics = Statistics()
    prompts = [p.tokens for p in base.prompts]
    out = base.model.generate(prompts, NEW, speculative=True, drafts=drafts, statistics=statistics)
    assert out == wholes
    if pattern == "all right":
        assert statistics.steps == -(-(NEW - 1) // (drafts + 1))
        assert statistics.acceptance == 1 or drafts > 1  # of the last drafts some lie past the end
    elif pattern == "all wrong":
        assert statistics.acceptance == 0 and statistics.steps == NEW - 1
    else:
        assert 0 < statistics.acceptance < 1
    logits = [base.model.mtp_logits(torch.tensor([whole]))[0] for whole in wholes]
    checked = 0
    for lengths, draft, active in seen:
        for b, n in enumerate(lengths):
            if active[b] and n < len(wholes[b]):
                row = logits[b][n - 1]  # sees the token at n, drafts the one at n + 1
                assert row[draft[b, 0]] >= row.max() - 1e-3
                checked += 1
                if drafts > 1:
                    for own, row in zip(draft[b].tolist(), chained(base.model, wholes[b], n, drafts), strict=True):
                        assert row[own] >= row.max() - 1e-3
    assert checked >= len(wholes) * NEW // 2 or drafts > 1


def test_two_mtp_layers_draft_two_tokens(base):
    """The second layer's drafts, and a third by chaining it, leave greedy tokens as they are, at the very last place
    too; the second draft is the second layer's of the whole text where nothing was rejected."""
    config = dataclasses.replace(base.model.config, num_nextn_predict_layers=2, max_position_embeddings=45)
    torch.manual_seed(0)
    model = dk.model.DeepSeekV3(config).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False).mul_(4 if parameter.dim() > 1 else 1)
    prompts = [p.tokens for p in base.prompts[:3]]
    plain = model.generate(prompts, NEW)
    for drafts in (2, 3):
        for chunk in (None, 20):
            assert model.generate(prompts, NEW, speculative=True, drafts=drafts, prefill_chunk=chunk) == plain
    run = generate._Run(model, prompts, NEW, None, Sampler(0, 1, None), 2, None, Statistics())
    with torch.no_grad():
        run._prefill(100)
    for b, prompt in enumerate(prompts):
        tokens = torch.tensor([[*prompt, plain[b][len(prompt)], int(run.draft[b, 0])]])
        step = model.step(tokens)
        fed = model.feed(*model.hidden(step)).view(1, tokens.shape[1], -1)
        first, second = (model.head(h)[0] for h in dk.model.mtp.chain(model, tokens, step, fed, depths=2))
        assert first[len(prompt) - 1].argmax() == run.draft[b, 0]
        assert second[-1].argmax() == run.draft[b, 1]


def test_a_stale_mtp_cache_is_seen(base, monkeypatch):
    """Without the MTP pass over accepted tokens drafts are still verified, so tokens stay right; the drafts do not."""
    wholes = [prompt.whole for prompt in base.prompts]
    seen: list = []
    helped(monkeypatch, wholes, PATTERNS["by turns"], seen)
    predict = generate._Run._predict

    def zeroed(run, k, hidden, follow, step):
        return predict(run, k, hidden, torch.zeros_like(follow), step)

    monkeypatch.setattr(generate._Run, "_predict", zeroed)
    assert base.model.generate([p.tokens for p in base.prompts], NEW, speculative=True) == wholes
    logits = [base.model.mtp_logits(torch.tensor([whole]))[0] for whole in wholes]
    wrong = sum(
        float(logits[b][n - 1][draft[b, 0]]) < float(logits[b][n - 1].max()) - 1e-3
        for lengths, draft, active in seen
        for b, n in enumerate(lengths)
        if active[b] and n < len(wholes[b])
    )
    assert wrong > 3


def test_end_of_sequence(base):
    """A sequence ends with its eos; others go on; a tensor is filled up with eos."""
    prompt = base.prompts[1]
    eos = prompt.whole[len(prompt.tokens) + 4]
    end = prompt.whole.index(eos, len(prompt.tokens)) + 1
    for speculative in (False, True):
        options = {"eos_id": eos, "speculative": speculative}
        assert base.model.generate([prompt.tokens], NEW, **options) == [prompt.whole[:end]]
        other = torch.tensor([prompt.tokens, base.prompts[2].whole[: len(prompt.tokens)]])
        alone = base.model.generate(other[1:], NEW, **options)
        both = base.model.generate(other, NEW, **options)
        assert both.dtype == other.dtype and both.shape[0] == 2
        assert both[0].tolist() == prompt.whole[:end] + [eos] * (both.shape[1] - end)
        assert both[1, : alone.shape[1]].tolist() == alone[0].tolist()


def test_streaming(base):
    """New tokens arrive step by step, each sequence's together."""
    tokens = [prompt.tokens for prompt in base.prompts]
    steps = list(generate.stream(base.model, tokens, NEW))
    assert len(steps) == NEW and all(len(new) == 1 for step in steps for new in step)
    assert [p.tokens + [s[b][0] for s in steps] for b, p in enumerate(base.prompts)] == [p.whole for p in base.prompts]
    seen: list = []
    base.model.generate(tokens, NEW, on_tokens=seen.append)
    assert seen == steps
    first = next(generate.stream(base.model, tokens, 10**6 // 10**5))
    assert first == steps[0]
    assert base.model.generate(tokens, 0) == tokens
    assert not list(generate.stream(base.model, tokens, 0))


def test_up_to_the_last_position(base):
    """A prompt and its continuation may fill max_position_embeddings exactly, speculation included."""
    limit = base.model.config.max_position_embeddings
    prompt = (base.prompts[-1].whole * 4)[: limit - 6]
    plain = base.model.generate([prompt, prompt[:9]], 6)
    assert [len(row) for row in plain] == [limit, 15]
    assert base.model.generate([prompt, prompt[:9]], 6, speculative=True) == plain
    with pytest.raises(ValueError, match=f"max_position_embeddings = {limit}"):
        base.model.generate([prompt], 7)


# -- sampling --------------------------------------------------------------------------------------------------------
def test_sampling_is_reproducible(base):
    tokens = [prompt.tokens for prompt in base.prompts]

    def run(seed, **options):
        return base.model.generate(tokens, NEW, generator=torch.Generator().manual_seed(seed), **options)

    for speculative in (False, True):
        options = {"temperature": 0.8, "top_p": 0.9, "speculative": speculative}
        assert run(1, **options) == run(1, **options)
        assert run(1, **options) != run(2, **options)
        assert run(1, temperature=1e-4, speculative=speculative) == [p.whole for p in base.prompts]


def frequencies(tokens: torch.Tensor, size: int) -> torch.Tensor:
    return torch.bincount(tokens, minlength=size).double() / len(tokens)


def five_sigma(got: torch.Tensor, p: torch.Tensor, count: int) -> bool:
    return bool(((got - p).abs() <= 5 * (p * (1 - p) / count).sqrt() + 1e-9).all())


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_samples_follow_the_distribution(top_p):
    """Of plain draws, and of drafts accepted or redrawn, whatever the draft."""
    count, logits = 40000, torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    sampler = Sampler(0.7, top_p, torch.Generator().manual_seed(0))
    p = torch.softmax(logits.double() / 0.7, -1)
    kept = int((p.cumsum(0) - p < top_p).sum())
    wanted = torch.where(torch.arange(6) < kept, p, 0.0)
    wanted = wanted / wanted.sum()
    assert kept == (6 if top_p == 1 else 2)
    assert five_sigma(frequencies(sampler(logits.expand(count, -1)), 6), wanted, count)
    other = torch.tensor([-3.0, 0.0, 1.0, 0.0, 2.0, 0.0])
    pair = torch.stack([logits, other]).expand(count, -1, -1)
    for draft in range(6):
        accepted, tokens = sampler.verify(pair, torch.full((count, 1), draft))
        accepted = accepted.bool()
        assert five_sigma(frequencies(tokens[:, 0], 6), wanted, count), draft
        assert torch.equal(tokens[accepted, 0], torch.full((int(accepted.sum()),), draft))
        share = accepted.double().mean()
        assert abs(share - wanted[draft]) <= 5 * (0.25 / count) ** 0.5
    accepted, tokens = sampler.verify(torch.tensor([[[99.0, 0.0], [0.0, 99.0]]]), torch.tensor([[0]]))
    assert accepted.tolist() == [1] and tokens.tolist() == [[0, 1]]  # nothing is left to redraw from


def test_several_drafts_follow_the_distribution():
    """The second token, given the first, whatever was drafted: also where only the first draft was accepted."""
    count, sampler = 40000, Sampler(1.0, 1.0, torch.Generator().manual_seed(0))
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])
    accepted, tokens = sampler.verify(p.log().expand(count, -1, -1), torch.tensor([[1, 2]]).expand(count, -1))
    assert set(accepted.tolist()) == {0, 1, 2}
    assert five_sigma(frequencies(tokens[:, 0], 3), p[0].double(), count)
    for place, some in ((1, accepted >= 1), (2, accepted == 2)):
        assert five_sigma(frequencies(tokens[some, place], 3), p[place].double(), int(some.sum()))
    for n, share in ((1, 0.3), (2, 0.3 * 0.3)):
        assert abs((accepted >= n).double().mean() - share) <= 5 * (0.25 / count) ** 0.5


# -- no host synchronisation -----------------------------------------------------------------------------------------
READS = ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy")
PACKAGE = Path(generate.__file__).parent


def host_reads(monkeypatch, run) -> list[str]:
    """Where the model's own files read a tensor's values while `run` goes."""
    found: list[str] = []
    for name in READS:
        original = getattr(torch.Tensor, name)

        def watched(self, *args, _original=original, **kwargs):
            caller = sys._getframe(1)
            if Path(caller.f_code.co_filename).parent == PACKAGE:
                found.append(f"{Path(caller.f_code.co_filename).name}:{caller.f_code.co_name}")
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, watched)
    run()
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("width", [1, 2])
def test_a_decoding_step_reads_no_tensor(width, fp8, monkeypatch):
    """FP8 weights and activations; the checks that only run on CPU tensors are switched off as on a GPU."""
    model = fp8.load()
    cache = PagedLatentCache(model.config, [64, 64])
    model(torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]]), seq_lens=[5, 3], cache=cache)
    from dsv3_kernels.model import model as module

    monkeypatch.setattr(module, "_inside", lambda *_: None)
    tokens = torch.ones(2, width, dtype=torch.int64)
    lengths = list(cache.lengths)

    def step():
        with torch.no_grad():
            assert model.step(tokens, cache=cache).absorbed
            model(tokens, cache=cache)

    assert host_reads(monkeypatch, step) == []
    assert cache.lengths == [n + width for n in lengths] == cache.seqlens.tolist()


def test_a_host_read_would_be_seen(fp8, monkeypatch):
    model = fp8.load()
    cache = PagedLatentCache(model.config, [64])
    tokens = torch.tensor([[1, 2, 3]])
    found = host_reads(monkeypatch, lambda: model(tokens, seq_lens=torch.tensor([3]), cache=cache))
    assert "model.py:_check_lengths" in found


# -- text ------------------------------------------------------------------------------------------------------------
TEXT = "Ünïcode: 漢字, emoji 🙂 and plain words, plain words."


def test_bytes():
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(TEXT)
    assert tokens == list(TEXT.encode()) and tokenizer.decode(tokens) == TEXT
    assert load_tokenizer("/nowhere", 256) is not None and load_tokenizer("/nowhere", 255) is None


@pytest.fixture
def trained_tokenizer(tmp_path):
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return load_tokenizer(tmp_path, 97)


def test_tokenizer_file(trained_tokenizer, base, tmp_path):
    """tokenizer.json in the folder is used, and goes along when the model is saved."""
    tokens = trained_tokenizer.encode(TEXT)
    assert trained_tokenizer.decode(tokens) == TEXT and len(tokens) < len(TEXT.encode())
    assert base.model.tokenizer is None  # 97 tokens are too few for bytes
    model = base.load(weights="float32")
    model.tokenizer = trained_tokenizer
    model.save_pretrained(tmp_path / "saved")
    again = dk.model.DeepSeekV3.from_pretrained(tmp_path / "saved", device="cpu", weights="float32")
    assert again.tokenizer.encode(TEXT) == tokens


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_text_streams_whole_characters(kind, trained_tokenizer):
    tokenizer = ByteTokenizer() if kind == "bytes" else trained_tokenizer
    stream, shown = TextStream(tokenizer), ""
    for token in tokenizer.encode(TEXT):
        piece = stream.push([token])
        assert "\ufffd" not in piece
        shown += piece
    assert shown + stream.finish() == TEXT
    cut = TextStream(tokenizer)
    assert cut.push(tokenizer.encode("🙂")[:1]) == "" and "\ufffd" in cut.finish()


# -- bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tokens", "options", "kind", "words"),
    [
        ([], {}, ValueError, "tokens: got an empty batch"),
        ([[1], []], {}, ValueError, "tokens: got an empty batch or prompt"),
        (torch.zeros(0, 3, dtype=torch.int64), {}, ValueError, "empty batch"),
        (torch.zeros(3, dtype=torch.int64), {}, ValueError, r"tokens: got shape \[3\]"),
        (torch.zeros(1, 3), {}, TypeError, "tokens: got dtype float32"),
        ([[1, 97]], {}, ValueError, "tokens: got id 97, wanted 0 to 96"),
        ([[-1]], {}, ValueError, "tokens: got id -1"),
        ([[1.5]], {}, TypeError, "tokens: got float"),
        ([[1] * 260], {}, ValueError, "max_position_embeddings = 256"),
        (torch.zeros(1, 3, dtype=torch.int64, device="meta"), {}, RuntimeError, "generate: tokens: got device meta"),
        ([[1]], {"max_new_tokens": -1}, ValueError, "max_new_tokens: got -1"),
        ([[1]], {"max_new_tokens": 2.5}, TypeError, "generate: max_new_tokens: got float, wanted an int"),
        ([[1]], {"max_new_tokens": "3"}, TypeError, "generate: max_new_tokens: got str, wanted an int"),
        ([[1]], {"max_new_tokens": None}, TypeError, "generate: max_new_tokens: got NoneType, wanted an int"),
        ([[1]], {"eos_id": "x"}, TypeError, "generate: eos_id: got str, wanted an int"),
        ([[1]], {"eos_id": -1}, ValueError, "generate: eos_id: got -1, wanted at least 0"),
        ([[1]], {"temperature": "hot"}, TypeError, "generate: temperature: got str, wanted a number"),
        ([[1]], {"top_p": None}, TypeError, "generate: top_p: got NoneType, wanted a number"),
        ([[1]], {"prefill_chunk": 1.0}, TypeError, "generate: prefill_chunk: got float, wanted an int"),
        ([[1]], {"temperature": -0.5}, ValueError, "temperature: got -0.5"),
        ([[1]], {"top_p": 0.0}, ValueError, "top_p: got 0.0"),
        ([[1]], {"top_p": 1.5}, ValueError, "top_p: got 1.5"),
        ([[1]], {"prefill_chunk": 0}, ValueError, "prefill_chunk: got 0"),
        ([[1]], {"cache_dtype": torch.uint8}, ValueError, "uint8 takes latents of 512"),
    ],
)
def test_bad_input(tokens, options, kind, words, base):
    with pytest.raises(kind, match=words):
        base.model.generate(tokens, **({"max_new_tokens": 4} | options))


FORWARD = {
    "id too large": (
        lambda m: m(torch.tensor([[1, 97]])),
        ValueError,
        "tokens: got values from 1 to 97, wanted 0 to 96",
    ),
    "negative id": (lambda m: m(torch.tensor([[-1, 3]])), ValueError, "tokens: got values from -1"),
    "float tokens": (lambda m: m(torch.zeros(1, 2)), TypeError, "tokens: got dtype float32"),
    "a list": (lambda m: m([[1, 2]]), TypeError, "tokens: got list"),
    "one dimension": (lambda m: m(torch.tensor([1, 2])), ValueError, r"tokens: got shape \[2\]"),
    "empty batch": (lambda m: m(torch.zeros(0, 4, dtype=torch.int64)), ValueError, r"tokens: got \[0, 4\]"),
    "no tokens": (lambda m: m(torch.zeros(2, 0, dtype=torch.int64)), ValueError, r"tokens: got \[2, 0\]"),
    "transposed": (lambda m: m(torch.ones(3, 2, dtype=torch.int64).T), ValueError, "tokens: got stride 2"),
    "another device": (
        lambda m: m(torch.ones(1, 2, dtype=torch.int64, device="meta")),
        RuntimeError,
        "got device .*wanted",
    ),
    "too long": (lambda m: m(torch.ones(1, 257, dtype=torch.int64)), ValueError, "max_position_embeddings = 256"),
    "seq_lens too many": (lambda m: m(torch.ones(1, 2, dtype=torch.int64), seq_lens=[2, 2]), ValueError, "seq_lens"),
    "seq_lens too long": (lambda m: m(torch.ones(1, 2, dtype=torch.int64), seq_lens=[3]), ValueError, "seq_lens"),
    "all empty": (lambda m: m(torch.ones(1, 2, dtype=torch.int64), seq_lens=[0]), ValueError, "seq_lens"),
    "seq_lens is a number": (
        lambda m: m(torch.ones(1, 2, dtype=torch.int64), seq_lens=5),
        TypeError,
        "model: seq_lens: got int, wanted a list or a Tensor of ints",
    ),
    "seq_lens without a dimension": (
        lambda m: m(torch.ones(1, 2, dtype=torch.int64), seq_lens=torch.tensor(2)),
        ValueError,
        r"model: seq_lens: got shape \[\], wanted \[1\]",
    ),
    "routing is a number": (
        lambda m: m(torch.ones(1, 2, dtype=torch.int64), routing=5),
        TypeError,
        "model: routing: got int, wanted a list of Tensors",
    ),
    "positions of another shape": (
        lambda m: m(torch.ones(1, 2, dtype=torch.int64), positions=torch.zeros(1, 3, dtype=torch.int64)),
        ValueError,
        "positions: got shape",
    ),
    "positions out of range": (
        lambda m: m(torch.ones(1, 2, dtype=torch.int64), positions=torch.tensor([[0, 256]])),
        ValueError,
        "positions: got values from 0 to 256",
    ),
    "routing of too few layers": (
        lambda m: m(torch.ones(1, 2, dtype=torch.int64), routing=[torch.zeros(2, 4, dtype=torch.int32)]),
        ValueError,
        "routing: got 1 tensors, wanted 3",
    ),
    "routing of another shape": (
        lambda m: m(torch.ones(1, 2, dtype=torch.int64), routing=[torch.zeros(3, 4, dtype=torch.int32)] * 3),
        ValueError,
        r"routing: got shape \[3, 4\]",
    ),
    "routing of floats": (
        lambda m: m(torch.ones(1, 2, dtype=torch.int64), routing=[torch.zeros(2, 4)] * 3),
        TypeError,
        "routing: got dtype float32",
    ),
    "routing that drops a token": (
        lambda m: m(torch.ones(1, 2, dtype=torch.int64), routing=[torch.tensor([[0, 1, 2, -1]] * 2)] * 3),
        ValueError,
        "routing: got values from -1 to 2, wanted 0 to 15",
    ),
    "one token for MTP": (lambda m: m.mtp_logits(torch.tensor([[1]])), ValueError, "mtp_logits: tokens"),
}


@pytest.mark.parametrize("name", FORWARD)
def test_bad_forward(name, base):
    call, kind, words = FORWARD[name]
    with pytest.raises(kind, match=words):
        call(base.model)


def test_bad_cache(base):
    """The cache is what it was before."""
    model, config = base.model, base.model.config
    cache = PagedLatentCache(config, [64, 128], dtype=torch.float32)
    tokens = torch.ones(2, 60, dtype=torch.int64)
    model(tokens, cache=cache)
    before, seqlens = cache.pages.clone(), cache.seqlens.clone()

    def refuses(kind, words, given=None, tokens=tokens[:, :5], **options):
        with pytest.raises(kind, match=words):
            model(tokens, cache=given if given is not None else cache, **options)
        assert torch.equal(cache.pages, before) and cache.lengths == [60, 60]
        assert torch.equal(cache.seqlens, seqlens)

    refuses(ValueError, "sequence 0 grows to 65 tokens, the cache is made for 64")
    table = cache.block_table
    cache.block_table = table[:, :1]
    cache.capacities = [128, 128]
    refuses(ValueError, "sequence 0 grows to 65 tokens, the cache has a block_table for 64")
    cache.block_table, cache.capacities = table, [64, 128]
    refuses(ValueError, "tokens: got values", tokens=torch.tensor([[1], [97]]))
    refuses(ValueError, "cache: got 2, wanted 1 sequences", tokens=tokens[:1, :2])
    refuses(TypeError, "cache: got dict", given={})
    refuses(TypeError, "cache: got dtype bfloat16", given=PagedLatentCache(config, [64, 64]))
    refuses(RuntimeError, "device", given=PagedLatentCache(config, [64, 64], dtype=torch.float32, device="meta"))
    other = dk.model.Config(**{**vars(config), "kv_lora_rank": 24})
    refuses(ValueError, "made for this configuration", given=PagedLatentCache(other, [64, 64], dtype=torch.float32))
    for lengths in ([61, 129], [-1, 0]):
        with pytest.raises(ValueError, match="PagedLatentCache: sequence"):
            cache.set_lengths(lengths)
    for capacities in ([], [0], [64, -1]):
        with pytest.raises(ValueError, match="capacities"):
            PagedLatentCache(config, capacities)
    with pytest.raises(ValueError, match="PagedLatentCache: page_size: got 0, wanted at least 1"):
        PagedLatentCache(config, [64], page_size=0)
    with pytest.raises(TypeError, match=r"PagedLatentCache: page_size: got float, wanted an int"):
        PagedLatentCache(config, [64], page_size=64.0)
    with pytest.raises(ValueError, match="uint8 takes latents of 512"):
        PagedLatentCache(config, [64], dtype=torch.uint8)
    assert relative(cache.pages, before) == 0
