"""Training runs: they learn and balance, go on after a kill with the same bits, and are the same on many ranks."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run

from dsv3_kernels import cli
from dsv3_kernels.commands.train import FIELDS, TOY
from dsv3_kernels.model import Config, DeepSeekV3, corpus, train, trainer
from dsv3_kernels.model.optimizer import AdamW, Schedule
from dsv3_kernels.model.pretrain import as_tokens
from dsv3_kernels.model.trainer import NonFiniteError, Options, Trainer

TINY = TOY | {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "max_position_embeddings": 32,
}
SHORT = Options(steps=6, batch=8, sequence=16, rate=5e-3, warm_up=2, save_every=2, balance_alpha=1e-3, bias_speed=0.01)


def text(count: int = 600) -> torch.Tensor:
    return torch.arange(count) * torch.arange(count) % 31


def short(out=None, **changes) -> Trainer:
    return Trainer(Config(**TINY), text(), dataclasses.replace(SHORT, **changes), out=out)


# -- one run on real text ----------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "bias_speed", "steps"), [("fp8", 0.01, 150), ("bf16", 0.0, 80)])
def test_a_run_learns_and_balances(recipe, bias_speed, steps):
    """150 steps on the King James Bible, in FP8. The busiest expert's load falls where the bias moves, and only there:
    the control is bfloat16 and shorter, for speed (routers are float32 in both)."""
    options = Options(steps=steps, batch=4, sequence=64, rate=4e-3, warm_up=10, balance_alpha=0.0)
    options = dataclasses.replace(options, recipe=recipe, bias_speed=bias_speed)
    records = list(Trainer(Config(**TOY), as_tokens(corpus.split()[0]), options).run())

    def mean(values) -> float:
        values = list(values)
        return sum(values) / len(values)

    last = records[-20:]
    for name in ("main", "mtp"):
        assert records[0][name] > 5.4 and mean(r[name] for r in last) < 2.6
    early, late = (mean(max(r["load"]) for r in some) for some in (records[10:30], last))
    print(
        f"{recipe}, bias speed {bias_speed}: load {early:.2f} -> {late:.2f}, loss {mean(r['main'] for r in last):.3f}"
    )
    if bias_speed:
        assert late < 2.2 and late < 0.7 * early
    else:
        assert late > 3 and late > 0.8 * early


# -- killed and resumed ------------------------------------------------------------------------------------------------
def killed(argv: list[str], at: int) -> None:
    """`dsv3 train`, killed in the middle of a step."""
    torch.set_num_threads(1)
    original = Trainer._clip

    def clip(self):
        if self.step == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self)

    Trainer._clip = clip
    cli.main(argv)


def command(folder: Path, name: str) -> list[str]:
    (folder / "text").write_text("In the beginning was the word, and so on. " * 20)
    (folder / "config.json").write_text(json.dumps(Config(**TINY | {"vocab_size": 256}).to_dict()))
    options = "--steps 6 --batch 4 --micro-batch 2 --sequence 16 --warm-up 2 --rate 5e-3 --save-every 2 --keep 9 --ramp"
    places = ["--config", str(folder / "config.json"), "--out", str(folder / name)]
    return ["train", str(folder / "text"), *options.split(), *places, "--separator", " and"]


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path, capsys):
    assert cli.main(command(tmp_path, "whole")) == 0
    assert "step 6/6  loss" in capsys.readouterr().out
    process = multiprocessing.get_context("forkserver").Process(target=killed, args=(command(tmp_path, "killed"), 5))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    out = tmp_path / "killed"
    assert trainer.last_checkpoint(out).name == "step-000004" and not (out / "training.png").exists()
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 5
    assert cli.main(command(tmp_path, "killed")) == 0
    assert "going on after step 4" in capsys.readouterr().out
    for file in sorted((tmp_path / "whole" / "step-000006").iterdir()):
        assert file.read_bytes() == (out / "step-000006" / file.name).read_bytes(), file.name
    whole, again = (
        [json.loads(line) | {"seconds": 0} for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    )
    assert whole == again and len(whole) == 6
    assert (out / "training.png").stat().st_size > 10_000
    loaded = DeepSeekV3.from_pretrained(out / "step-000006", device="cpu")
    assert loaded.weights == "float32" and loaded(torch.tensor([[1, 2]])).isfinite().all()


# -- many ranks --------------------------------------------------------------------------------------------------------
def on_ranks(rank: int, folder: str, changes: dict) -> tuple[list[dict], int, int]:
    made = short(folder, **changes)
    records = list(made.run())
    inner = [getattr(o, "optim", o) for o in made.optimizers]
    return records, sum(p.numel() for o in inner for p in o.state), sum(p.numel() for p in made.model.parameters())


def weights(folder) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in DeepSeekV3.from_pretrained(folder, device="cpu").named_parameters()}


@pytest.mark.parametrize(("ranks", "experts"), [(4, 2), (2, 1)])
def test_many_ranks_are_one_process(ranks, experts, tmp_path):
    """Experts over two ranks, two copies of those, or data parallel alone: the same losses, loads and weights."""
    changes = {"recipe": "float32", "steps": 4, "save_every": 4}
    wanted = list(short(tmp_path / "one", **changes).run())
    results = run(on_ranks, ranks, str(tmp_path / "many"), changes | {"expert_parallel": experts})
    for records, kept, held in results:
        for got, one in zip(records, wanted, strict=True):
            assert got["load"] == one["load"]
            for name in ("main", "mtp", "balance", "grad_norm"):
                assert math.isclose(got[name], one[name], rel_tol=1e-5), name
        assert kept <= 0.75 * held  # moments: a rank's share
    one, many = weights(tmp_path / "one" / "step-000004"), weights(tmp_path / "many" / "step-000004")
    for name, value in one.items():
        # Adam divides by the gradient's size: where that is nearly nothing its rounding shows
        assert float((many[name] - value).norm()) <= 2e-4 * float(value.norm()), name
    if experts == 2:  # and one process goes on from what many have written
        gone_on = short(tmp_path / "many", **changes | {"expert_parallel": 1})
        assert gone_on.step == 4 and not list(gone_on.run())
        state = gone_on.optimizers[0].state
        assert len(state) == len(list(gone_on.model.parameters()))
        assert all(s["step"] == 4 and s["exp_avg"].any() for s in state.values())


def lost_number(rank: int, folder: str) -> str:
    made = short(folder, recipe="float32", expert_parallel=2)
    original = made._accumulate

    def accumulate(step):
        if step == 3 and rank == 1:
            made.model.model.layers[1].mlp.experts.down.weight.data[1, 3, 5] = math.nan
        return original(step)

    made._accumulate = accumulate
    with pytest.raises(NonFiniteError) as error:
        list(made.run())
    dist.barrier()
    return str(error.value)


def test_a_lost_number_stops_all_ranks(tmp_path):
    words = run(lost_number, 2, str(tmp_path))
    assert words[0] == words[1]
    assert words[0].startswith("train: step 4: main is nan")
    assert "rank 1: layer 1, model.layers.1.mlp.experts.3.down_proj.weight: the weight is not finite" in words[0]
    assert words[0].endswith(f"nothing was updated, the last good checkpoint is {tmp_path}/step-000002")


@pytest.mark.parametrize("recipe", ["bf16", "fp8"])
def test_a_lost_number_is_found(recipe, tmp_path):
    made = short(tmp_path, recipe=recipe)
    attention = made.model.model.layers[1].self_attn
    original = attention.leave

    def leave(out, step):
        return original((-1 - out.square()).sqrt() if made.step == 3 else out, step)

    attention.leave = leave
    before = {}
    with pytest.raises(
        NonFiniteError, match=r"step 4: main is nan.*; layer 1, model.layers.1: the result of sqrt is nan; nothing"
    ):
        for _ in made.run():
            before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    assert all(torch.equal(p, before[name]) for name, p in made.model.named_parameters())
    assert [p.name for p in trainer.checkpoints(tmp_path)] == ["step-000002"]


# -- parts -------------------------------------------------------------------------------------------------------------
def test_the_batch_grows():
    made = short(ramp=True, micro_batch=1, batch=10, steps=100)
    assert [len(made._microbatches(step)) for step in (0, 1, 2, 3, 4, 99)] == [2, 5, 7, 10, 10, 10]


def test_microbatches_add_up():
    whole, cut = (short(recipe="float32", micro_batch=micro) for micro in (None, 2))
    for made in (whole, cut):
        made.losses = made._accumulate(0)
    counts = [[moe.counts.tolist() for moe in train.moe_layers(made.model)] for made in (whole, cut)]
    assert counts[0] == counts[1]
    for name, value in whole.losses.items():
        assert math.isclose(value, cut.losses[name], rel_tol=1e-5)
    for (name, a), b in zip(whole.model.named_parameters(), cut.model.parameters(), strict=True):
        assert float((a.grad - b.grad).norm()) <= 1e-5 * float(a.grad.norm()), name
        assert b.grad.dtype == torch.float32


def test_adamw_against_torch():
    """bfloat16 moments: within their rounding of torch's, over steps; and exactly the formula's first step."""
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 99)) for _ in range(2))
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    mine, reference = AdamW([ours], **options), torch.optim.AdamW([theirs], **options)
    for step in range(20):
        for p, optimizer in ((ours, mine), (theirs, reference)):
            p.grad = torch.sin(torch.arange(99.0) + step)
            optimizer.step()
        moved = (theirs - torch.linspace(-1, 1, 99)).detach().abs().max()
        assert (ours - theirs).abs().max() <= (1e-6 if step == 0 else 2**-7) * moved
    assert {m.dtype for m in (mine.state[ours]["exp_avg"], mine.state[ours]["exp_avg_sq"])} == {torch.bfloat16}


def test_the_published_schedule():
    """2.2e-4 to 10 T tokens, 2.2e-5 at 14.3 T, 7.3e-6 at the end; the batch from 3072 to 15360 at 469 B."""
    s = Schedule(steps=148_000, peak=2.2e-4, warm_up=2000, batch=15360, ramp=True)
    at = {
        0: 2.2e-4 / 2000,
        999: 1.1e-4,
        1999: 2.2e-4,
        99_999: 2.2e-4,
        121_500: 1.21e-4,
        143_000: 2.2e-5,
        146_000: 2.2e-5,
    }
    for step, rate in (at | {147_000: 7.3e-6, 147_999: 7.3e-6}).items():
        assert math.isclose(s.rate(step), rate, rel_tol=1e-3), step
    assert [s.sequences(i, 16) for i in (0, 4690, 4695, 147_999)] == [3072, 15360, 15360, 15360]
    assert abs(s.sequences(2345) - (3072 + 15360) / 2) < 5
    assert (s.mtp_weight(99_999), s.mtp_weight(100_001)) == (0.3, 0.1)
    assert s.balancing(142_999) and not s.balancing(143_001)


def test_bad_options(tmp_path):
    for changes, words in (
        ({"batch": 7, "micro_batch": 2}, "train: batch: got 7, wanted a multiple of 1 ranks times micro_batch = 2"),
        ({"steps": 0}, "train: steps: got 0, wanted at least 1"),
        ({"sequence": 33}, "train: sequence: got 33, wanted at most max_position_embeddings = 32"),
        ({"recipe": "int8"}, "train: recipe: got 'int8'"),
        ({"expert_parallel": 2}, "train: expert_parallel: got 2, wanted a divisor of the 1 ranks"),
        ({"ramp": True}, "train: micro_batch: got None, wanted a number: with ramp"),
        ({"rate": -1.0}, "train: rate: got -1.0, wanted 0 or more"),
    ):
        with pytest.raises(ValueError) as error:
            short(**changes)
        assert str(error.value).startswith(words)
    for tokens, words in (
        (text(16), "tokens: got 16, wanted more than one of 16"),
        (text() + 9, "ids below vocab_size"),
    ):
        with pytest.raises(ValueError, match=words):
            Trainer(Config(**TINY), tokens, SHORT)
    list(short(tmp_path, steps=2, recipe="bf16").run())
    with pytest.raises(ValueError, match=r"train: seed: got 1, wanted 0, as .*step-000002 has it"):
        short(tmp_path, steps=2, recipe="bf16", seed=1)
    with pytest.raises(ValueError, match="train: tokens: got 'another text'"):
        Trainer(Config(**TINY), text(601), dataclasses.replace(SHORT, steps=2, recipe="bf16"), out=tmp_path)


def test_the_command_line_has_the_defaults():
    defaults = {f.name: f.default for f in dataclasses.fields(Options)}
    assert {name: default for name, _, default, _ in FIELDS}.items() <= defaults.items()
    assert set(defaults) - {name for name, *_ in FIELDS} == {"recipe", "ramp"}


def test_wrong_requests(tmp_path, capsys):
    (tmp_path / "empty").write_text("")
    (tmp_path / "some").write_text("text " * 9)
    for argv, words in (
        ([str(tmp_path / "none")], "No such file"),
        ([str(tmp_path / "empty")], "no text in there"),
        ([str(tmp_path / "some")], "tokens: got 45, wanted more than one of 128"),
        ([str(tmp_path / "some"), "--sequence", "1"], "sequence: got 1, wanted at least 2 tokens"),
        ([str(tmp_path / "some"), "--checkpoint", str(tmp_path)], "no config.json"),
    ):
        assert cli.main(["train", *argv, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert words in error and error.startswith("dsv3 train: ") and error.count("\n") == 1
