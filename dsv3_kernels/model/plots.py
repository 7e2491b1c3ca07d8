"""Pictures of training runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def training(records: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Losses, learning rate and expert load of the records of one run, as `Trainer.run` yields them.

    RuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("plot: needs matplotlib, which is not installed (pip install matplotlib)") from error

    steps = [r["step"] for r in records]
    figure = Figure(figsize=(7, 7), layout="constrained")
    loss, rate, load = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 2))
    loss.plot(steps, [r["main"] for r in records], lw=1, label="next token")
    loss.plot(steps, [r["mtp"] for r in records], lw=1, label="MTP")
    loss.set_ylabel("cross-entropy, nats")
    loss.legend(frameon=False)
    rate.plot(steps, [r["rate"] for r in records], lw=1, color="black")
    rate.set_ylabel("learning rate")
    for i in range(max((len(r["load"]) for r in records), default=0)):
        load.plot(steps, [r["load"][i] for r in records], lw=1, label=f"MoE layer {i}")
    load.axhline(1, lw=0.5, color="black")
    load.set(xlabel="step", ylabel="busiest expert over the mean")
    load.legend(frameon=False, ncols=4)
    figure.savefig(path, dpi=120)
