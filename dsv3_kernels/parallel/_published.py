"""Published measurements that the cost model is calibrated on or compared with. None was taken by this project."""

from __future__ import annotations

from dataclasses import dataclass

# One token on the wire, hidden 7168: FP8 with a float32 scale per 128 and its index, or BF16.
FP8_ROW = 7168 + 56 * 4 + 12
BF16_ROW = 7168 * 2


@dataclass(frozen=True)
class LatencyTable:
    """Time of one low-latency exchange by number of ranks; every rank sends ``tokens`` tokens to ``top_k`` experts."""

    name: str
    source: str
    row_bytes: int
    microseconds: dict[int, float]
    tokens: int = 128
    top_k: int = 8


@dataclass(frozen=True)
class BandwidthTable:
    """Bandwidth of a high-throughput exchange by number of ranks, as its project counts it: bytes of a token once for
    every node it goes to, its own included, over the time."""

    name: str
    source: str
    row_bytes: int
    gigabytes_per_second: dict[int, float]
    tokens: int = 4096


_DEEPEP = "DeepEP README (v1), H800, ConnectX-7 400 Gb/s"
_PPLX = "pplx-garden README, H100, ConnectX-7 400 Gb/s"

LOW_LATENCY = (
    LatencyTable(
        "DeepEP low-latency dispatch", _DEEPEP, FP8_ROW, {8: 77, 16: 118, 32: 155, 64: 173, 128: 192, 256: 194}
    ),
    LatencyTable(
        "DeepEP low-latency combine", _DEEPEP, BF16_ROW, {8: 114, 16: 195, 32: 273, 64: 314, 128: 369, 256: 360}
    ),
    LatencyTable("DeepEP dispatch, measured by pplx", _PPLX, FP8_ROW, {8: 42.6, 16: 124, 32: 159, 64: 178}),
    LatencyTable("DeepEP combine, measured by pplx", _PPLX, BF16_ROW, {8: 72.0, 16: 203, 32: 285, 64: 325}),
    LatencyTable("pplx-garden dispatch", _PPLX, FP8_ROW, {8: 50.5, 16: 110, 32: 154, 64: 188}),
    LatencyTable("pplx-garden combine", _PPLX, BF16_ROW, {8: 65.3, 16: 186, 32: 266, 64: 309}),
)

HIGH_THROUGHPUT = (
    BandwidthTable("DeepEP dispatch", _DEEPEP, FP8_ROW, {16: 43, 32: 58, 64: 51}),
    BandwidthTable("DeepEP combine", _DEEPEP, BF16_ROW, {16: 43, 32: 57, 64: 50}),
)

# github.com/deepseek-ai/profile-data, training trace: H800, 64 ranks, 4096 tokens, one forward-backward pair of a chunk
# of 4 MoE layers, communication on 20 of 132 SMs. Milliseconds.
TRACE_LAYERS, TRACE_RANKS, TRACE_TOKENS, TRACE_COMM_SMS = 4, 64, 4096, 20
TRACE_WALL, TRACE_COMPUTE, TRACE_EXCHANGE, TRACE_HIDDEN = 129.0, 124.3, 113.4, 109.3
TRACE_DISPATCH, TRACE_COMBINE = 4.35, 6.18  # mean of one

# DeepSeek-V3 technical report (tables 1 and section 3.1) and "Insights into DeepSeek-V3" (ISCA 2025, table 4).
GFLOP_PER_TOKEN = 250.0
PRETRAINING_GPU_HOURS, OTHER_GPU_HOURS, TRAINING_TOKENS = 2.664e6, 119e3 + 5e3, 14.8e12
TRAINING_GPUS, DOLLARS_PER_GPU_HOUR, TOTAL_DOLLARS = 2048, 2.0, 5.576e6
CAUSAL_MFU, SECONDS_PER_STEP, TOKENS_PER_DAY = 0.3894, 19.926, 272.8e9
SEQUENCES_PER_STEP, SEQUENCE, PIPELINE_RANKS = 15360, 4096, 16
