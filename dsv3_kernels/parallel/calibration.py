"""Fits the cost model of exchanges and of a layer to published tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from . import _published as published
from .architecture import RANKS_PER_NODE, Architecture, Routing, routing

H800_PEAK_TFLOPS = 989.5  # BF16, dense: the peak that the published MFU refers to
H800_SMS = 132


@dataclass(frozen=True)
class Link:
    """``t = alpha + bytes / beta``."""

    alpha_us: float
    beta_gbps: float

    def time_us(self, nbytes: float) -> float:
        return self.alpha_us + nbytes / (self.beta_gbps * 1e3)


def fit_link(nbytes: Sequence[float], microseconds: Sequence[float]) -> Link:
    """The link whose worst relative error is least, alpha not negative."""
    x, t = np.asarray(nbytes, dtype=np.float64), np.asarray(microseconds, dtype=np.float64)
    if len(x) < 2 or len(x) != len(t) or not (t > 0).all():
        raise ValueError(
            f"fit_link: nbytes, microseconds: got {len(x)} and {len(t)}, wanted two or more positive pairs"
        )
    design = np.stack([1 / t, x / t], axis=1)
    weight = np.full(len(x), 1 / len(x))
    for _ in range(500):  # Lawson's iteration: weighted least squares tends to the minimax fit
        root = np.sqrt(weight)
        alpha, slope = np.linalg.lstsq(design * root[:, None], root, rcond=None)[0]
        weight = weight * (np.abs(design @ (alpha, slope) - 1) + 1e-12)
        weight /= weight.sum()
    if alpha < 0:
        alpha, slope = 0.0, 2 / (design[:, 1].min() + design[:, 1].max())
    return Link(float(alpha), float(1e-3 / slope))


def leaves_node(ranks: int) -> float:
    """Share of equally spread rows that goes to another node."""
    return max(0, ranks - RANKS_PER_NODE) / ranks


def throughput_us(tokens: int, row_bytes: int, where: Routing, ranks: int, network: float, nvlink: float) -> float:
    off_node = tokens * row_bytes * where.nodes_per_token * leaves_node(ranks)
    return max(off_node / network, tokens * row_bytes * where.ranks_per_token / nvlink) / 1e3


@dataclass(frozen=True)
class Machine:
    """What the model knows of a cluster: H800 nodes of 8 with one 400 Gb/s NIC per GPU, from published tables.

    ``compute_tflops``: what all SMs reach on a training layer. ``hidden``: the share of the shorter of computation and
    communication that an overlapped pair hides.
    """

    dispatch: Link
    combine: Link
    network_gbps: float
    nvlink_gbps: float
    compute_tflops: float
    hidden: float
    comm_sms: int = published.TRACE_COMM_SMS
    sms: int = H800_SMS
    peak_tflops: float = H800_PEAK_TFLOPS


@lru_cache(maxsize=1)
def calibrate() -> Machine:
    """Fits the machine to the published tables (DeepEP's and the training trace)."""
    links = []
    for table in published.LOW_LATENCY[:2]:
        points = {r: t for r, t in table.microseconds.items() if r > RANKS_PER_NODE}
        rows = table.tokens * table.top_k * table.row_bytes
        links.append(fit_link([rows * leaves_node(r) for r in points], list(points.values())))

    # Two rates, six points: a point is bound by one of them, and each rate is the geometric middle of its points.
    points_ht = []
    for table_ht in published.HIGH_THROUGHPUT:
        for ranks, gbps in table_ht.gigabytes_per_second.items():
            where = routing(ranks)
            time = where.nodes_per_token / gbps
            points_ht.append(
                (math.log(where.nodes_per_token * leaves_node(ranks) / time), math.log(where.ranks_per_token / time))
            )
    best = (math.inf, 0.0, 0.0)
    for mask in range(1, 2 ** len(points_ht) - 1):
        net = [p[0] for i, p in enumerate(points_ht) if mask >> i & 1]
        nvl = [p[1] for i, p in enumerate(points_ht) if not mask >> i & 1]
        rates = (min(net) + max(net)) / 2, (min(nvl) + max(nvl)) / 2
        worst = max(abs(max(p[0] - rates[0], p[1] - rates[1])) for p in points_ht)
        best = min(best, (worst, *rates))

    a = Architecture()
    layer = 3 * (2 * (a.attention_weights + a.moe_weights) + a.attention_flops(published.SEQUENCE))
    flops = layer * published.TRACE_LAYERS * published.TRACE_TOKENS
    share = (H800_SMS - published.TRACE_COMM_SMS) / H800_SMS
    return Machine(
        dispatch=links[0],
        combine=links[1],
        network_gbps=math.exp(best[1]),
        nvlink_gbps=math.exp(best[2]),
        compute_tflops=flops / published.TRACE_COMPUTE / 1e9 / share,
        hidden=published.TRACE_HIDDEN / published.TRACE_EXCHANGE,
    )
