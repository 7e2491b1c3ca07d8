"""A cost model of expert parallelism, of a pipeline step and of a training run, calibrated on published measurements.

Everything here is arithmetic: no figure was measured by this project, and every printed result says "simulated". What
the model is fitted to, and how far it is off, is in :func:`residuals`; ``python -m dsv3_kernels.parallel.simulate``
prints it.

Two regimes of an exchange are modelled, with the DeepSeek-V3 gate's traffic (:func:`routing`):

* low latency: ``t = alpha + bytes that leave the node / beta``, every row sent to each of its experts;
* high throughput: ``t = max(bytes that leave the node / network, bytes to ranks / NVLink)``, a row sent once to each
  node and from there once to each rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..pipeline.schedule import schedule as make_schedule
from ..pipeline.simulate import Simulation
from . import _published as published
from .architecture import RANKS_PER_NODE, Architecture, Routing, routing
from .calibration import H800_PEAK_TFLOPS, Link, Machine, calibrate, fit_link, leaves_node, throughput_us

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LayerCost:
    """One MoE layer, attention included, on one rank. Microseconds; computation on all SMs, nothing overlapped."""

    attention_us: float
    experts_us: float
    dispatch_us: float
    combine_us: float
    machine: Machine

    @property
    def forward_us(self) -> float:
        return self.attention_us + self.experts_us + self.dispatch_us + self.combine_us

    @property
    def backward_us(self) -> float:
        """Input and weight gradients; the exchanges again, the other way round."""
        return 2 * (self.attention_us + self.experts_us) + self.dispatch_us + self.combine_us

    @property
    def weight_us(self) -> float:
        """The weight-gradient part of the backward: as long as the forward's computation."""
        return self.attention_us + self.experts_us

    @property
    def overlapped_us(self) -> float:
        """A forward and a backward of two microbatches, one computing on the SMs that the other's exchanges leave."""
        m = self.machine
        compute = 3 * (self.attention_us + self.experts_us) * m.sms / (m.sms - m.comm_sms)
        exchange = 2 * (self.dispatch_us + self.combine_us)
        return max(compute, exchange) + (1 - m.hidden) * min(compute, exchange)

    def __str__(self) -> str:
        return (
            f"simulated MoE layer: attention {self.attention_us:.0f}, experts {self.experts_us:.0f}, "
            f"dispatch {self.dispatch_us:.0f}, combine {self.combine_us:.0f} us"
        )


def expert_layer(
    tokens: int,
    ranks: int,
    config: Any = None,
    *,
    sequence: int = published.SEQUENCE,
    imbalance: float = 1.0,
    low_latency: bool = False,
    machine: Machine | None = None,
) -> LayerCost:
    """The cost of one MoE layer.

    Args:
        tokens: tokens per rank. ranks: expert-parallel ranks, 8 to a node; a divisor of the experts.
        config: anything :meth:`Architecture.of` takes.
        imbalance: load of the busiest rank over the mean (see :func:`dsv3_kernels.parallel.eplb.imbalance`); it
            stretches the experts and the exchanges.
        low_latency: which exchange.

    Raises:
        ValueError: impossible sizes.
    """
    if tokens < 0:
        raise ValueError(f"expert_layer: tokens: got {tokens}, wanted 0 or more")
    if imbalance < 1:
        raise ValueError(f"expert_layer: imbalance: got {imbalance}, wanted 1 or more")
    a, m = Architecture.of(config), machine or calibrate()
    where = routing(ranks, a)
    attention = tokens * (2 * a.attention_weights + a.attention_flops(sequence))
    experts = tokens * 2 * a.moe_weights * imbalance
    scale = a.hidden_size / 7168
    times = []
    for row, link in ((published.FP8_ROW, m.dispatch), (published.BF16_ROW, m.combine)):
        if low_latency:
            sent = tokens * a.num_experts_per_tok * row * scale * imbalance
            times.append(link.time_us(sent * leaves_node(ranks)) if ranks > 1 else 0.0)
        else:
            time = throughput_us(tokens, row, where, ranks, m.network_gbps, m.nvlink_gbps) * scale * imbalance
            times.append(time if ranks > 1 else 0.0)
    rate = m.compute_tflops * 1e6
    return LayerCost(attention / rate, experts / rate, times[0], times[1], m)


@dataclass(frozen=True)
class StepCost:
    """One training step of a pipeline."""

    simulation: Simulation
    tokens: int
    gpus: int
    flops_per_token: float
    peak_tflops: float

    @property
    def seconds(self) -> float:
        return self.simulation.makespan / 1e6

    @property
    def mfu(self) -> float:
        return self.tokens * self.flops_per_token / self.seconds / self.gpus / self.peak_tflops / 1e12

    def __str__(self) -> str:
        bubble = self.simulation.bubble / self.simulation.makespan
        return (
            f"simulated step: {self.seconds:.2f} s, {self.tokens / self.seconds / self.gpus:.0f} tokens/s per GPU, "
            f"MFU {100 * self.mfu:.1f}%, bubble {100 * bubble:.1f}% ({self.simulation.schedule.name})"
        )


def pipeline_step(
    config: Any = None,
    *,
    schedule: str = "dualpipe",
    pipeline_ranks: int = published.PIPELINE_RANKS,
    expert_ranks: int = published.TRACE_RANKS,
    gpus: int = published.TRAINING_GPUS,
    sequences: int = published.SEQUENCES_PER_STEP,
    sequence: int = published.SEQUENCE,
    imbalance: float = 1.0,
    machine: Machine | None = None,
) -> StepCost:
    """A training step: microbatches of one sequence through a simulated schedule; the defaults are DeepSeek-V3's run.

    Stages are equally long: layers, and the output head by its operations, are shared out evenly. Not modelled: the
    optimizer, gradient all-reduce, recomputation, the MTP layer, pipeline messages.

    Raises:
        ValueError: sizes that do not divide, or a schedule that cannot run them.
    """
    a, m = Architecture.of(config), machine or calibrate()
    if gpus % pipeline_ranks or sequences % (gpus // pipeline_ranks):
        raise ValueError(
            f"pipeline_step: gpus, sequences: got {gpus} and {sequences}, wanted a multiple of pipeline_ranks = "
            f"{pipeline_ranks}, and of the pipelines"
        )
    layer = expert_layer(sequence, expert_ranks, a, sequence=sequence, imbalance=imbalance, machine=m)
    lists = make_schedule(schedule, pipeline_ranks, sequences // (gpus // pipeline_ranks))
    per_layer = 2 * (a.attention_weights + a.moe_weights) + a.attention_flops(sequence)
    layers = a.forward_flops(sequence) / per_layer / lists.num_stages  # in units of an MoE layer
    costs = {
        "forward": layers * layer.forward_us,
        "backward": layers * layer.backward_us,
        "weight": layers * layer.weight_us,
        "overlapped": layers * layer.overlapped_us,
    }
    return StepCost(lists.simulate(costs), sequences * sequence, gpus, a.training_flops(sequence), m.peak_tflops)


@dataclass(frozen=True)
class TrainingRun:
    """Arithmetic of a training run."""

    flops_per_token: float
    tokens: float
    gpus: int
    gpu_hours: float
    mfu: float
    dollars: float
    total_dollars: float

    @property
    def days(self) -> float:
        return self.gpu_hours / self.gpus / 24

    @property
    def tflops_per_gpu(self) -> float:
        return self.tokens * self.flops_per_token / self.gpu_hours / 3600 / 1e12

    def __str__(self) -> str:
        return (
            f"simulated run: {self.flops_per_token / 1e9:.1f} GFLOP/token, {self.gpu_hours / 1e6:.3f} M GPU-hours, "
            f"{self.days:.1f} days on {self.gpus} GPUs, {self.tflops_per_gpu:.0f} TFLOPS/GPU, "
            f"MFU {100 * self.mfu:.1f}%, ${self.dollars / 1e6:.3f} M (all phases ${self.total_dollars / 1e6:.3f} M)"
        )


def training_run(
    config: Any = None,
    *,
    mfu: float | None = None,
    gpu_hours: float | None = None,
    tokens: float = published.TRAINING_TOKENS,
    gpus: int = published.TRAINING_GPUS,
    sequence: int = published.SEQUENCE,
    peak_tflops: float = H800_PEAK_TFLOPS,
    dollars_per_hour: float = published.DOLLARS_PER_GPU_HOUR,
    other_gpu_hours: float = published.OTHER_GPU_HOURS,
) -> TrainingRun:
    """Hours and cost of a training run from its MFU, or its MFU from its hours; the defaults are DeepSeek-V3's run.

    Args:
        mfu: model-operations utilisation, causal attention counted once, of ``peak_tflops``. gpu_hours: of the
            pre-training. Give one of the two.
        other_gpu_hours: of later phases (context extension, post-training), for the total cost.

    Raises:
        ValueError: both or neither of ``mfu`` and ``gpu_hours``, or sizes that are not positive.
    """
    if (mfu is None) == (gpu_hours is None):
        raise ValueError("training_run: mfu, gpu_hours: wanted one of the two")
    for name, value in (("mfu", mfu), ("gpu_hours", gpu_hours), ("tokens", tokens), ("gpus", gpus)):
        if value is not None and not value > 0:
            raise ValueError(f"training_run: {name}: got {value}, wanted more than 0")
    flops = Architecture.of(config).training_flops(sequence)
    at_peak = tokens * flops / (peak_tflops * 1e12) / 3600
    hours = gpu_hours if gpu_hours is not None else at_peak / (mfu or 1.0)
    return TrainingRun(
        flops,
        tokens,
        gpus,
        hours,
        at_peak / hours,
        hours * dollars_per_hour,
        (hours + other_gpu_hours) * dollars_per_hour,
    )


@dataclass(frozen=True)
class Residual:
    """One published figure beside the model's."""

    what: str
    source: str
    unit: str
    published: float
    simulated: float
    fitted: bool

    @property
    def error(self) -> float:
        return self.simulated / self.published - 1


def residuals(machine: Machine | None = None) -> list[Residual]:
    """Every published figure that the model knows beside what it gives; ``fitted`` says whether it was calibrated on
    it."""
    m = machine or calibrate()
    rows = []
    for i, table in enumerate(published.LOW_LATENCY):
        points = {r: t for r, t in table.microseconds.items() if r > RANKS_PER_NODE}
        sent = table.tokens * table.top_k * table.row_bytes
        link = (
            (m.dispatch, m.combine)[i]
            if i < 2
            else fit_link([sent * leaves_node(r) for r in points], list(points.values()))
        )
        for ranks, time in points.items():
            what = f"{table.name}, {ranks} ranks"
            rows.append(Residual(what, table.source, "us", time, link.time_us(sent * leaves_node(ranks)), True))
    for table_ht in published.HIGH_THROUGHPUT:
        for ranks, gbps in table_ht.gigabytes_per_second.items():
            where = routing(ranks)
            time = throughput_us(table_ht.tokens, table_ht.row_bytes, where, ranks, m.network_gbps, m.nvlink_gbps)
            counted = table_ht.tokens * table_ht.row_bytes * where.nodes_per_token
            what = f"{table_ht.name}, {ranks} ranks"
            rows.append(Residual(what, table_ht.source, "GB/s", gbps, counted / time / 1e3, True))

    trace = "profile-data, training trace"
    layer = expert_layer(published.TRACE_TOKENS, published.TRACE_RANKS, machine=m)
    pair = layer.overlapped_us * published.TRACE_LAYERS / 1e3
    rows += [
        Residual("chunk of 4 layers, forward and backward", trace, "ms", published.TRACE_WALL, pair, True),
        Residual("one dispatch inside it", trace, "ms", published.TRACE_DISPATCH, layer.dispatch_us / 1e3, False),
        Residual("one combine inside it", trace, "ms", published.TRACE_COMBINE, layer.combine_us / 1e3, False),
    ]
    run = training_run(gpu_hours=published.PRETRAINING_GPU_HOURS)
    again = training_run(mfu=published.CAUSAL_MFU)
    step = pipeline_step(machine=m)
    report, isca = "DeepSeek-V3 report", "ISCA 2025 paper"
    rows += [
        Residual("operations per token", isca, "GFLOP", published.GFLOP_PER_TOKEN, run.flops_per_token / 1e9, False),
        Residual("MFU from the GPU-hours", isca, "%", 100 * published.CAUSAL_MFU, 100 * run.mfu, False),
        Residual(
            "GPU-hours from the MFU", report, "M", published.PRETRAINING_GPU_HOURS / 1e6, again.gpu_hours / 1e6, False
        ),
        Residual("tokens per day", isca, "G", published.TOKENS_PER_DAY / 1e9, again.tokens / again.days / 1e9, False),
        Residual("cost of all phases", report, "M$", published.TOTAL_DOLLARS / 1e6, again.total_dollars / 1e6, False),
        Residual("step of 15360 sequences", isca, "s", published.SECONDS_PER_STEP, step.seconds, False),
    ]
    return rows


def report(machine: Machine | None = None) -> str:
    """The residuals as a table."""
    m = machine or calibrate()
    lines = [
        "simulated: calibrated on published tables, nothing here was measured by this project",
        f"low latency: dispatch {m.dispatch.alpha_us:.1f} us + bytes / {m.dispatch.beta_gbps:.1f} GB/s, "
        f"combine {m.combine.alpha_us:.1f} us + bytes / {m.combine.beta_gbps:.1f} GB/s",
        f"high throughput: network {m.network_gbps:.1f} GB/s, NVLink {m.nvlink_gbps:.0f} GB/s; "
        f"computation {m.compute_tflops:.0f} TFLOPS, {100 * m.hidden:.1f}% hidden",
        f"{'':42} {'published':>10} {'simulated':>10} {'error':>7}   fitted",
    ]
    for r in residuals(m):
        figures = f"{r.published:10.4g} {r.simulated:10.4g} {100 * r.error:+6.1f}%"
        lines.append(f"{r.what:42} {figures}   {'yes' if r.fitted else 'no '} {r.unit:6} {r.source}")
    return "\n".join(lines)


def plot(path: Any = None, machine: Machine | None = None) -> Figure:
    """Published points and the model's curves: low latency, high throughput, and a layer by number of ranks.

    Needs matplotlib (RuntimeError without it).
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("plot: needs matplotlib, which is not installed (pip install matplotlib)") from error
    m = machine or calibrate()
    ranks = [2**i for i in range(4, 9)]
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    latency, bandwidth, layer = figure.subplots(1, 3)
    for table, link, colour in zip(
        published.LOW_LATENCY, (m.dispatch, m.combine), ("#3c7a57", "#b65c8f"), strict=False
    ):
        sent = table.tokens * table.top_k * table.row_bytes
        points = {r: t for r, t in table.microseconds.items() if r > RANKS_PER_NODE}
        latency.plot(points.keys(), points.values(), "o", color=colour, label=f"{table.name}, published")
        latency.plot(ranks, [link.time_us(sent * leaves_node(r)) for r in ranks], color=colour, label="simulated")
    latency.set(xscale="log", xlabel="ranks", ylabel="us", title="low latency, 128 tokens: simulated")
    for table_ht, colour in zip(published.HIGH_THROUGHPUT, ("#3c7a57", "#b65c8f"), strict=True):
        known = table_ht.gigabytes_per_second
        bandwidth.plot(known.keys(), known.values(), "o", color=colour, label=f"{table_ht.name}, published")
        curve = []
        for r in ranks:
            where = routing(r)
            time = throughput_us(1, 1, where, r, m.network_gbps, m.nvlink_gbps)
            curve.append(where.nodes_per_token / time / 1e3)
        bandwidth.plot(ranks, curve, color=colour, label="simulated")
    bandwidth.set(xscale="log", xlabel="ranks", ylabel="GB/s", title="high throughput: simulated", ylim=(0, None))
    layers = [expert_layer(published.TRACE_TOKENS, r, machine=m) for r in ranks]
    bottom = np.zeros(len(ranks))
    for name, colour in zip(
        ("attention", "experts", "dispatch", "combine"), ("#3f8fb5", "#f2c14e", "#3c7a57", "#b65c8f"), strict=True
    ):
        values = np.array([getattr(cost, f"{name}_us") for cost in layers]) / 1e3
        layer.bar([str(r) for r in ranks], values, bottom=bottom, color=colour, label=name)
        bottom += values
    layer.set(xlabel="ranks", ylabel="ms", title="MoE layer forward, 4096 tokens: simulated")
    for axes in (latency, bandwidth):
        axes.set_xticks(ranks, [str(r) for r in ranks])
        axes.minorticks_off()
    for axes in (latency, bandwidth, layer):
        axes.legend(fontsize=7)
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


__all__ = [
    "Architecture",
    "LayerCost",
    "Link",
    "Machine",
    "Residual",
    "Routing",
    "StepCost",
    "TrainingRun",
    "calibrate",
    "expert_layer",
    "fit_link",
    "pipeline_step",
    "plot",
    "report",
    "residuals",
    "routing",
    "training_run",
]

if __name__ == "__main__":
    print(report())
    for line in (training_run(mfu=published.CAUSAL_MFU), pipeline_step(), expert_layer(4096, 64)):
        print(line)
