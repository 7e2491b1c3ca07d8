"""Time lines of simulated schedules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .actions import Kind

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .simulate import Simulation

# Forward, backward, and their parts; the second shade is for the second chunk of a rank (other direction, or way back).
_COLOURS = {
    Kind.FORWARD: ("#f2c14e", "#e08e2b"),
    Kind.BACKWARD: ("#3c7a57", "#6aa884"),
    Kind.INPUT: ("#3f8fb5", "#7fbcd6"),
    Kind.WEIGHT: ("#b65c8f", "#d391b8"),
}
_NAMES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.INPUT: "backward: input",
    Kind.WEIGHT: "backward: weight",
}
_LABELLED_SPANS = 3000


def plot(simulation: Simulation, path: Any = None) -> Figure:
    """See :meth:`dsv3_kernels.pipeline.simulate.Simulation.plot`."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise RuntimeError("plot: needs matplotlib, which is not installed (pip install matplotlib)") from error

    schedule = simulation.schedule
    makespan = simulation.makespan or 1.0
    figure = Figure(
        figsize=(min(24.0, max(6.0, 0.22 * schedule.num_microbatches * 3)), 1.2 + 0.45 * schedule.num_ranks)
    )
    axes = figure.add_subplot()
    labels = sum(map(len, simulation.spans)) <= _LABELLED_SPANS
    used: set[Kind] = set()
    for rank, timeline in enumerate(simulation.spans):
        chunks = schedule.stages_of(rank)
        bars: dict[str, list[tuple[tuple[float, float], float, float]]] = {}
        for span in timeline:
            parts = span.action.parts()
            height = 0.9 / len(parts)  # an overlapped pair shares its row: forward above, backward below
            for i, (kind, stage, microbatch) in enumerate(parts):
                used.add(kind)
                low = rank - 0.45 + i * height
                colour = _COLOURS[kind][chunks.index(stage)]
                bars.setdefault(colour, []).append(((span.start, span.end - span.start), low, height))
                if labels and span.end - span.start > makespan / 250:
                    axes.text(
                        (span.start + span.end) / 2,
                        low + height / 2,
                        str(microbatch),
                        ha="center",
                        va="center",
                        fontsize=6,
                    )
        for colour, boxes in bars.items():
            for x, low, height in boxes:
                axes.broken_barh([x], (low, height), facecolors=colour, edgecolors="black", linewidth=0.3)
    axes.set_xlim(0, makespan)
    axes.set_ylim(schedule.num_ranks - 0.5, -0.5)
    axes.set_yticks(range(schedule.num_ranks), [f"rank {r}" for r in range(schedule.num_ranks)])
    axes.set_xlabel("time (unit of the costs)")
    axes.set_title(str(simulation), fontsize=9)
    axes.legend(
        handles=[Patch(color=_COLOURS[k][0], label=_NAMES[k]) for k in _NAMES if k in used],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.6 / figure.get_figheight()),
        ncols=4,
        fontsize=7,
        frameon=False,
    )
    if path is not None:
        figure.savefig(path, bbox_inches="tight", dpi=120)
    return figure
