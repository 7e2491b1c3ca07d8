"""Loss curves of one small model in float32, bfloat16 and FP8, three seeds each, on the text of the demo checkpoint.

    python -m bench.training_precision

Writes bench/results/training_precision.json and .png. What two precisions make of one seed differs by chance as well as
by rounding: the gap of FP8 to bfloat16 is to be read beside that of bfloat16 to float32, its control. A curve proves no
recipe; the gradients in tests/model/test_recipe.py do.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from bench import machine
from dsv3_kernels.commands.train import TOY
from dsv3_kernels.model import Config, corpus
from dsv3_kernels.model.pretrain import as_tokens
from dsv3_kernels.model.trainer import Options, Trainer

RESULT = Path(__file__).parent / "results" / "training_precision.json"
RECIPES = ("float32", "bf16", "fp8")
GAPS = (("fp8", "bf16"), ("bf16", "float32"))
STEPS, SEEDS, TAIL = 150, 3, 0.25  # of the steps, for the mean loss at the end


def train(recipe: str, seed: int, steps: int) -> dict[str, Any]:
    options = Options(
        steps=steps, batch=4, sequence=64, rate=4e-3, warm_up=10, bias_speed=0.01, recipe=recipe, seed=seed
    )
    began = time.process_time()
    records = list(Trainer(Config(**TOY), as_tokens(corpus.split()[0]), options).run())
    curves = {name: [round(r[name], 4) for r in records] for name in ("main", "mtp")}
    load = [max(r["load"]) for r in records]
    return {
        "recipe": recipe,
        "seed": seed,
        "cpu_seconds": round(time.process_time() - began, 1),
        **curves,
        "load": load,
    }


def gaps(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per seed and pair of recipes: the relative difference of the main loss's mean over the tail, in percent."""
    tails = {(r["recipe"], r["seed"]): fmean(r["main"][-int(TAIL * len(r["main"])) :]) for r in runs}
    return [
        {"of": a, "to": b, "seed": seed, "percent": round(100 * (tails[a, seed] / tails[b, seed] - 1), 3)}
        for a, b in GAPS
        for seed in sorted({r["seed"] for r in runs})
    ]


def plot(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for recipe, colour in zip(RECIPES, ("black", "tab:blue", "tab:red"), strict=True):
        for run in (r for r in result["runs"] if r["recipe"] == recipe):
            smooth = [fmean(run["main"][max(0, i - 7) : i + 8]) for i in range(len(run["main"]))]
            left.plot(smooth, color=colour, lw=0.8, label=recipe if run["seed"] == 0 else None)
    left.set(xlabel="step", ylabel="cross-entropy, nats (mean of 15 steps)", ylim=(2, 3.5))
    left.legend(frameon=False)
    for i, (a, b) in enumerate(GAPS):
        values = [g["percent"] for g in result["gaps"] if (g["of"], g["to"]) == (a, b)]
        right.plot([i] * len(values), values, "o", color=("tab:red", "tab:blue")[i])
    right.axhline(0, lw=0.5, color="black")
    right.set(xticks=range(len(GAPS)), xticklabels=[f"{a} to {b}" for a, b in GAPS], xlim=(-0.5, 1.5))
    right.set_ylabel("difference of the last quarter's loss, %")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    for seed in range(SEEDS):
        for recipe in RECIPES:
            runs.append(train(recipe, seed, options.steps))
            print(recipe, seed, runs[-1]["main"][-1], runs[-1]["cpu_seconds"], flush=True)
    result = {
        "what": "main and MTP loss per step",
        "machine": machine.facts(torch.device("cpu")),
        "runs": runs,
        "gaps": gaps(runs),
    }
    options.out.write_text(json.dumps(result) + "\n")
    plot(result, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
