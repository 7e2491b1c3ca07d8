"""`dsv3 demo` on a tiny random checkpoint in the released FP8 layout, and everything a user may get wrong."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from dsv3_kernels import backends, cli
from dsv3_kernels.commands import demo
from dsv3_kernels.commands.console import Console
from dsv3_kernels.model import Config, DeepSeekV3, generate
from dsv3_kernels.quant import _eager

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "max_position_embeddings": 256,
}


def save(folder, **changes):
    """A checkpoint with weights wide enough that its text is no constant."""
    config = Config(**SIZES | {"num_nextn_predict_layers": 1} | changes, other={"initializer_range": 0.2})
    model = DeepSeekV3(config, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder, weights="fp8")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = save(tmp_path_factory.mktemp("checkpoint"))
    (folder / "held_out.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    return DeepSeekV3.from_pretrained(checkpoint, device="cpu", weights="float32")


def run(folder, *argv):
    return cli.main(["demo", "--checkpoint", str(folder), "--device", "cpu", "--no-validate", *argv])


def test_demo(checkpoint, model, capsys):
    assert run(checkpoint, "--prompt", "Hello, ", "--max-new-tokens", "12", "--temperature", "0") == 0
    text = capsys.readouterr().out
    tokens = model.generate([list(b"Hello, ")], 12)[0]
    assert model.tokenizer.decode(tokens) in text
    for words in ("2 layers (1 dense) + MTP, 2 heads, 4 experts", "loaded as float32 on cpu", "prefill: 7 tokens in"):
        assert words in text
    for words in ("decode: ", "speculative decode: ", "MTP acceptance: ", "tokens: the same ok", "bits per byte over"):
        assert words in text
    # 3 layers with the MTP layer's: (512 + 64) float32 each, against 2 heads of 192 + 128
    assert f"{3 * 576 * 4} bytes per token" in text and f"keys and values: {3 * 2 * 320 * 4}, 1.11 times" in text


def test_the_text_is_drawn_and_the_same_every_time(checkpoint, model, capsys):
    greedy = model.generate([list(b"Hello, ")], 12)[0]
    drawn = demo._generate(model, list(b"Hello, "), 12, True, temperature=0.7).tokens
    assert len(drawn) == 12 and drawn != greedy[7:]
    assert run(checkpoint, "--prompt", "Hello, ", "--max-new-tokens", "12") == 0
    assert model.tokenizer.decode([*b"Hello, ", *drawn]) in capsys.readouterr().out


def test_demo_ends_with_the_table_of_ops(checkpoint, capsys):
    arguments = ["demo", "--checkpoint", str(checkpoint), "--device", "cpu", "--max-new-tokens", "2"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "Every op against float64" in text and "quantize_1x128" in text and "cases agree with float64" in text


def test_a_wrong_op_is_an_error(checkpoint, monkeypatch, capsys):
    """Off by a bit or two wherever it runs: the demo's text may well be the same, the table of ops must not be."""
    right = _eager.silu_mul_quantize_1x128

    def wrong(*args):
        q, scale = right(*args)
        return q, scale * (1 + 2**-7)

    monkeypatch.setattr(_eager, "silu_mul_quantize_1x128", wrong)
    backends._function.cache_clear()
    try:
        arguments = ["demo", "--checkpoint", str(checkpoint), "--device", "cpu", "--max-new-tokens", "2"]
        assert cli.main(arguments) == 1
    finally:
        monkeypatch.undo()
        backends._function.cache_clear()
    text = capsys.readouterr().out
    assert "FAIL silu_mul_quantize_1x128" in text and "tokens: the same ok" in text


def test_the_packaged_checkpoint(monkeypatch, capsys):
    monkeypatch.setattr(demo, "HELD_OUT_TOKENS", 1024)
    assert cli.main(["demo", "--device", "cpu", "--no-validate", "--max-new-tokens", "8"]) == 0
    text = capsys.readouterr().out
    assert "In the beginning " in text and "bits per byte over 1022 bytes" in text and "tokens: the same ok" in text
    acceptance, accepted, drafted = re.search(r"MTP acceptance: ([01]\.\d{3}) \((\d+) of (\d+) drafts", text).groups()
    assert 0 < int(accepted) <= int(drafted) and float(acceptance) == round(int(accepted) / int(drafted), 3)


def test_fp8_weights(checkpoint, capsys):
    assert run(checkpoint, "--weights", "fp8", "--max-new-tokens", "4") == 0
    assert "loaded as fp8 on cpu" in capsys.readouterr().out


def test_without_an_mtp_layer(tmp_path, capsys):
    assert run(save(tmp_path, num_nextn_predict_layers=0), "--max-new-tokens", "3") == 0
    text = capsys.readouterr().out
    assert "nothing to speculate with" in text and "acceptance" not in text and "Held-out" not in text


def test_a_file_as_prompt(checkpoint, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("über allen")
    assert run(checkpoint, "--file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "1") == 0
    assert "prefill: 11 tokens" in capsys.readouterr().out


def broken_config(folder, **changes):
    """A folder whose config.json is changed."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prompt", ""], "--prompt: got an empty text"),
        (["--max-new-tokens", "0"], "--max-new-tokens: got 0, wanted 1 or more"),
        (["--temperature", "-1"], "--temperature: got -1.0, wanted 0 or more"),
        (["--temperature", "nan"], "--temperature: got nan, wanted 0 or more"),
        (["--prompt", "x" * 250], "a prompt of 250 and 256 new tokens pass max_position_embeddings = 256"),
        (["--file", "/nowhere/at/all"], "--file /nowhere/at/all: "),
        (["--device", "cuda:77"], "--checkpoint "),
        (["--checkpoint", "/nowhere/at/all"], "--checkpoint /nowhere/at/all: no such folder, or no config.json"),
    ],
)
def test_wrong_requests(checkpoint, argv, words, capsys):
    assert run(checkpoint, *argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("dsv3 demo: ") and words in error and error.count("\n") == 1


def test_a_prompt_that_is_no_text(checkpoint, tmp_path, capsys):
    for name, content, words in (("empty", b"", "--file: got an empty text"), ("binary", b"\xff\xfe", "can't decode")):
        (tmp_path / name).write_bytes(content)
        assert run(checkpoint, "--file", str(tmp_path / name)) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_prompt_and_file_exclude_each_other(checkpoint, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(checkpoint, "--prompt", "a", "--file", "b")
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_broken_checkpoints(tmp_path, capsys):
    def fails(folder, words):
        assert run(folder) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error

    fails(broken_config(save(tmp_path / "other"), model_type="llama"), "architecture")
    fails(save(tmp_path / "small", vocab_size=100), "no tokenizer.json, and a vocabulary of 100 is too small for bytes")
    folder = save(tmp_path / "cut")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    fails(folder, "truncated")
    file.unlink()
    fails(folder, "neither model.safetensors nor")
    (folder / "config.json").write_text("{")
    fails(folder, "not JSON")
    folder = save(tmp_path / "tokenizer")
    (folder / "tokenizer.json").write_text("{}")
    fails(folder, "--checkpoint")


def test_speculation_that_disagrees_is_an_error(checkpoint, monkeypatch, capsys):
    """A verification that accepts every draft gives other tokens, and the demo must say so."""
    right = generate.Sampler.verify

    def accept_all(self, logits, draft):
        _, tokens = right(self, logits, draft)
        return torch.full((len(draft),), draft.shape[1]), torch.cat([draft, tokens[:, -1:]], 1)

    monkeypatch.setattr(generate.Sampler, "verify", accept_all)
    assert run(checkpoint, "--max-new-tokens", "12") == 1
    assert "speculative and plain tokens: FAIL: other ones from token" in capsys.readouterr().out


def test_where_runs_part(model):
    prompt = list(b"Hello, ")
    plain = model.generate([prompt], 6)[0][7:]
    assert demo.disagreement(model, prompt, plain, list(plain)) is None
    assert demo.disagreement(model, prompt, plain, plain[:5]) == "FAIL: 6 and 5 of them"
    other = [*plain[:3], (plain[3] + 1) % 256, *plain[4:]]
    assert demo.disagreement(model, prompt, plain, other).startswith("FAIL: other ones from token 3 on")


def test_a_tie_is_no_disagreement(model):
    class Tied:
        dtype, device = model.dtype, model.device

        def __call__(self, tokens):
            logits = torch.zeros(1, tokens.shape[1], 256)
            logits[..., 5], logits[..., 9] = 4.0, 4.0 * (1 - 2**-20)
            return logits

    assert demo.disagreement(Tied(), [1], [5, 5], [5, 9]).startswith("a tie from token 1 on")
    assert demo.disagreement(Tied(), [1], [5, 5], [5, 8]).startswith("FAIL")


def test_held_out_bits(model):
    """Against the definition, window by window."""
    tokens = list(b"some text that is longer than one window" * 9)
    wanted, count = 0.0, 0
    for start in range(0, len(tokens), 256):
        window = torch.tensor([tokens[start : start + 256]])
        with torch.no_grad():
            p = torch.log_softmax(model(window)[0].double(), -1)
        wanted -= sum(float(p[i, window[0, i + 1]]) for i in range(window.shape[1] - 1)) / math.log(2)
        count += window.shape[1] - 1
    bits, predicted = demo.held_out_bits(model, tokens)
    assert predicted == count and bits == pytest.approx(wanted / count, rel=1e-5)


def test_the_stream_is_printed_as_it_comes(model, monkeypatch):
    pieces = []
    monkeypatch.setattr(Console, "piece", lambda self, text: pieces.append(text))
    result = demo._generate(model, list(b"Hello, "), 8, True, Console())
    assert len(result.tokens) == 8 and 0 < result.first <= result.seconds
    assert len(pieces) == 1 + result.statistics.steps + 1  # a piece per step: the prefill's, the rest, and the end
