"""Host figures on the CPU: a training step of a toy in each recipe, and drafts that the demo checkpoint accepts."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any


def probes(quick: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """{name: measurement}; each returns figures with their units in their names."""
    steps, recipes, depths = (2, ("fp8",), (2,)) if quick else (5, ("float32", "bf16", "fp8"), (1, 2, 3))
    found: dict[str, Callable[[], dict[str, Any]]] = {
        f"training step, toy, 256 tokens, {recipe}": functools.partial(step, recipe, steps) for recipe in recipes
    }
    return found | {f"speculation, demo checkpoint, {n} drafts": functools.partial(drafts, n) for n in depths}


def step(recipe: str, steps: int) -> dict[str, Any]:
    """The fastest step of a few, after one that warms up: gradients, clipping, AdamW, bias."""
    import torch

    from dsv3_kernels.commands.train import TOY
    from dsv3_kernels.model import Config, Options, Trainer

    torch.set_num_threads(1)
    options = Options(steps=steps + 1, batch=4, sequence=64, recipe=recipe)
    tokens = torch.arange(10_000) % 251
    return {"step_s": min(record["seconds"] for record in [*Trainer(Config(**TOY), tokens, options).run()][1:])}


def drafts(count: int) -> dict[str, Any]:
    """Greedy text of the demo checkpoint: the share of drafts accepted, and tokens per pass of the main model."""
    import torch

    from dsv3_kernels.commands.demo import PACKAGED
    from dsv3_kernels.model import DeepSeekV3, generate

    torch.set_num_threads(1)
    model = DeepSeekV3.from_pretrained(PACKAGED, device="cpu", weights="float32")
    statistics, new = generate.Statistics(), 96
    started = time.perf_counter()
    prompts = [list(b"In the beginning "), list(b"And God said, "), list(b"The kings of Judah ")]
    model.generate(prompts, new, speculative=True, drafts=count, statistics=statistics)
    return {
        "tokens_per_second": round(len(prompts) * new / (time.perf_counter() - started), 1),
        "accepted": round(statistics.acceptance, 3),
        "tokens_per_pass": round((new - 1) / statistics.steps, 2),
    }
