"""The packaged checkpoint: real text, learned better than by counting, drafts that hold, a recipe that replays."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import dsv3_kernels as dk
from dsv3_kernels.model import corpus, pretrain

FOLDER = Path(pretrain.__file__).parent / "demo"
WIDTH = 512


@pytest.fixture(scope="module")
def model():
    return dk.model.DeepSeekV3.from_pretrained(FOLDER, device="cpu")


def ngram_bits(train: bytes, text: bytes, order: int) -> float:
    """Bits per byte of an n-gram model (Witten-Bell interpolation down to uniform) with `order` bytes of context."""
    seen, told = (np.frombuffer(t, np.uint8).astype(np.int64) for t in (train, text))
    probability = np.full(len(told) - order, 1 / 256)
    for n in range(order + 1):
        context, ahead = np.zeros(len(seen) - n, np.int64), np.zeros(len(told) - order, np.int64)
        for k in range(n):
            context = context * 256 + seen[k : len(seen) - n + k]
            ahead = ahead * 256 + told[order - n + k : len(told) - n + k]
        pairs, counts = np.unique(context * 256 + seen[n:], return_counts=True)
        contexts, first, kinds = np.unique(pairs // 256, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first)
        at = np.minimum(np.searchsorted(contexts, ahead), len(contexts) - 1)
        known = contexts[at] == ahead
        pair = ahead * 256 + told[order:]
        where = np.minimum(np.searchsorted(pairs, pair), len(pairs) - 1)
        count = np.where(pairs[where] == pair, counts[where], 0)
        mixed = (count + kinds[at] * probability) / (totals[at] + kinds[at])
        probability = np.where(known, mixed, probability)
    return float(-np.log2(probability).mean())


def test_ngram_baseline_counts_right():
    """A text of one letter costs what its counts say; a period of two is certain with one byte of context."""
    assert ngram_bits(b"a" * 99, b"a" * 10, 0) == pytest.approx(-math.log2((99 + 1 / 256) / 100))
    assert ngram_bits(b"ab" * 4000, b"ab" * 50, 1) < 0.01 < ngram_bits(b"ab" * 4000, b"ab" * 50, 0)


def test_text_is_the_one_trained_on():
    text = corpus.text()
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "799c6080f2fbbf290f30c9f6714a6e2c710dca7958c1f0c34d2897cabb06723c"
    )
    train, held_out = corpus.split()
    assert held_out[:600] not in train and len(train) + len(held_out) + 1 == len(text)
    printed = "Hit '?' for help.\nGe1:1 In the\nGe1:2 And\nGe2:1 Thus\n1Jn1:1 That\nbible(KJV) [Gen1:1]> "
    assert corpus.from_reader(printed) == "In the\nAnd\n\nThus\n\nThat\n"


def test_checkpoint_is_in_the_released_layout():
    from safetensors import safe_open

    files = sorted(FOLDER.glob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) + (FOLDER / "config.json").stat().st_size <= 8_000_000
    names = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            names |= {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    assert names["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"] == "F8_E4M3"
    assert names["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"] == "F32"
    assert names["model.layers.3.mlp.experts.7.down_proj.weight"] == "F8_E4M3"
    assert "model.layers.3.eh_proj.weight" in names and names["model.norm.weight"] != "F8_E4M3"
    config = json.loads((FOLDER / "config.json").read_text())
    geometry = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    assert [config[k] for k in geometry] == [512, 64, 128, 128]


def test_held_out_bits_per_byte(model):
    """FP8 weights and activations, on text never trained on: at most 2.2 bits, and fewer than a trigram model's."""
    train, held_out = corpus.split()
    sample = held_out[: 24 * WIDTH]
    bits = pretrain.bits_per_byte(model, sample, WIDTH)
    trigram = ngram_bits(train, sample, 2)
    print(f"held out: {bits:.3f} bits per byte, trigram {trigram:.3f}")
    assert bits <= 2.2 and bits < trigram


def test_mtp_acceptance(model):
    """Drafts are accepted at least every other time, and speculation does not change the text."""
    _, held_out = corpus.split()
    prompts = [list(held_out[start : start + 64]) for start in range(0, 32000, 4000)]
    statistics = dk.model.generate.Statistics()
    drafted = dk.model.generate.generate(model, prompts, 48, speculative=True, statistics=statistics)
    plain = dk.model.generate.generate(model, prompts, 48)
    print(f"acceptance {statistics.acceptance:.3f}")
    assert statistics.drafted > 8 * 20 and statistics.acceptance >= 0.5
    assert drafted == plain


def test_training_replays_its_log():
    """The script's first step gives the losses that its log recorded: same draws, same batch, same mathematics."""
    first = json.loads((FOLDER / "train.jsonl").read_text().splitlines()[0])
    model = dk.model.DeepSeekV3(pretrain.config())
    pretrain.initialise(model, 0)
    before = model.lm_head.weight.detach().clone()
    record = next(pretrain.run(model, corpus.split()[0], stop=1))
    assert first["step"] == record["step"] == 0
    assert record["main"] == pytest.approx(first["main"], rel=1e-3)
    assert record["mtp"] == pytest.approx(first["mtp"], rel=1e-3)
    assert record["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-2)
    assert record["lr"] == pytest.approx(first["lr"])
    assert not torch.equal(model.lm_head.weight, before)


def test_log_shows_learning():
    records = [json.loads(line) for line in (FOLDER / "train.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == pretrain.STEPS - 1
    assert records[-1]["main"] < 0.5 * records[0]["main"] and records[-1]["mtp"] < 0.5 * records[0]["mtp"]
    assert (FOLDER / "curve.png").read_bytes()[:4] == b"\x89PNG"
