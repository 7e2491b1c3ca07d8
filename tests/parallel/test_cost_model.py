"""The cost model: operations against a count by hand, its fits against the published tables, and the published run."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from dsv3_kernels.parallel import simulate
from dsv3_kernels.parallel.architecture import Architecture, routing
from dsv3_kernels.parallel.calibration import calibrate, fit_link, leaves_node

V3 = Architecture()


def test_published_run():
    """250 GFLOP per token, 2.664 M GPU-hours, 38.9% MFU, 5.576 M dollars: each within 2%, from the config alone and one
    of hours and MFU."""
    from_mfu = simulate.training_run(mfu=0.389)
    assert from_mfu.flops_per_token == pytest.approx(250e9, rel=0.02)
    assert from_mfu.gpu_hours == pytest.approx(2.664e6, rel=0.02)
    assert from_mfu.total_dollars == pytest.approx(5.576e6, rel=0.02)
    assert from_mfu.days == pytest.approx(54.2, rel=0.02)
    from_hours = simulate.training_run(gpu_hours=2.664e6)
    assert from_hours.mfu == pytest.approx(0.389, rel=0.02)
    assert from_hours.tflops_per_gpu == pytest.approx(385, rel=0.02)
    assert from_hours.total_dollars == pytest.approx(5.576e6, rel=1e-3)
    assert simulate.training_run(mfu=0.389, gpus=4096).days == pytest.approx(from_mfu.days / 2)
    assert "simulated" in str(from_mfu)


def test_weights_by_hand():
    attention = 1536 * 7168 + 24576 * 1536 + 576 * 7168 + 32768 * 512 + 7168 * 16384
    assert V3.attention_weights == attention
    expert = 3 * 7168 * 2048
    moe = 9 * expert + 256 * 7168
    assert V3.moe_weights == moe
    assert V3.active_weights == 61 * attention + 3 * 3 * 7168 * 18432 + 58 * moe + 129280 * 7168
    assert V3.active_weights == pytest.approx(36.6e9, rel=0.005)
    # DeepSeek-V2's 155 GFLOP per token, as its authors and the paper of ISCA 2025 give it.
    v2 = Architecture(
        hidden_size=5120, num_hidden_layers=60, first_k_dense_replace=1, intermediate_size=12288,
        moe_intermediate_size=1536, n_routed_experts=160, n_shared_experts=2, num_experts_per_tok=6, topk_group=3,
        vocab_size=102400,
    )  # fmt: skip
    assert v2.training_flops(4096) == pytest.approx(155e9, rel=0.02)


def test_config_forms():
    small = {"hidden_size": 64, "q_lora_rank": None, "num_attention_heads": 2, "unrelated": "yes"}
    a = Architecture.of(small)
    assert a == Architecture.of(SimpleNamespace(**small)) == Architecture.of(a)
    assert (a.hidden_size, a.q_lora_rank, a.n_routed_experts) == (64, None, 256)
    assert a.attention_weights == 64 * 2 * 192 + 64 * 576 + 512 * 2 * 256 + 2 * 128 * 64
    assert Architecture.of(None) == V3


def test_causal_attention_by_counting():
    """Query i of a short sequence meets i + 1 keys; the model's average, half the sequence, is right for long ones."""
    pairs = sum(i + 1 for i in range(4096))
    counted = 2 * 128 * (192 + 128) * pairs / 4096
    assert V3.attention_flops(4096) == pytest.approx(counted, rel=1e-3)


@pytest.mark.parametrize(
    ("ranks", "by_rank", "by_node"),
    [(4, 3.12, 1), (8, 3.95, 1), (16, 5.73, 1.97), (32, 6.84, 3.12), (64, 7.48, 3.95), (128, 7.82, 5.73)],
)
def test_traffic_of_the_gate(ranks, by_rank, by_node):
    """Against an independent Monte Carlo of the gate, one token at a time in torch."""
    where = routing(ranks)
    assert where.ranks_per_token == pytest.approx(by_rank, rel=0.005)
    assert where.nodes_per_token == pytest.approx(by_node, rel=0.005)
    if ranks != 16:
        return
    generator = torch.Generator().manual_seed(5)
    total = 0
    for _ in range(2000):
        score = torch.rand(8, 32, generator=generator)
        groups = score.topk(2).values.sum(-1).topk(4).indices
        masked = torch.full_like(score, -1)
        masked[groups] = score[groups]
        total += len(set((masked.flatten().topk(8).indices // 16).tolist()))
    assert total / 2000 == pytest.approx(where.ranks_per_token, rel=0.015)


@pytest.mark.parametrize("ranks", [4, 8, 16, 64])
def test_traffic_without_groups(ranks):
    """The closed form against drawing 8 of 256 experts."""
    generator = torch.Generator().manual_seed(ranks)
    chosen = torch.rand(4000, 256, generator=generator).argsort(-1)[:, :8] * ranks // 256
    distinct = (chosen.sort(-1).values.diff(dim=-1) > 0).sum(-1).double().mean() + 1
    assert routing(ranks, group_limited=False).ranks_per_token == pytest.approx(float(distinct), rel=0.01)


def test_fit_recovers_a_link():
    nbytes = [1e5, 4e5, 9e5, 3e6]
    link = fit_link(nbytes, [12 + x / 40e3 for x in nbytes])
    assert link.alpha_us == pytest.approx(12, rel=1e-3) and link.beta_gbps == pytest.approx(40, rel=1e-3)
    # Times that would need a negative latency.
    through = fit_link([1e5, 2e5], [1.0, 4.0])
    assert through.alpha_us == 0
    errors = [through.time_us(x) / t - 1 for x, t in ((1e5, 1.0), (2e5, 4.0))]
    assert errors[0] == pytest.approx(-errors[1])
    with pytest.raises(ValueError, match="nbytes, microseconds: got 1 and 1"):
        fit_link([1e5], [1.0])
    with pytest.raises(ValueError, match="positive"):
        fit_link([1e5, 2e5], [1.0, 0.0])


def test_fit_is_minimax():
    """No link near it has a smaller worst error."""
    nbytes, times = [1e6, 2e6, 4e6, 8e6], [50.0, 60, 130, 190]
    link = fit_link(nbytes, times)

    def worst(alpha, beta):
        return max(abs((alpha + x / beta / 1e3) / t - 1) for x, t in zip(nbytes, times, strict=True))

    best = worst(link.alpha_us, link.beta_gbps)
    steps = range(-40, 41, 4)
    around = [worst(link.alpha_us + i / 2, link.beta_gbps * (1 + j / 133)) for i in steps for j in steps]
    assert best <= min(around) * 1.005


def test_residuals():
    """Low latency within 5%, high throughput within 15%, and nothing left out."""
    rows = simulate.residuals()
    low = [r for r in rows if r.unit == "us"]
    high = [r for r in rows if r.unit == "GB/s"]
    assert len(low) == 22 and max(abs(r.error) for r in low) < 0.05
    assert len(high) == 6 and max(abs(r.error) for r in high) < 0.15
    arithmetic = {r.what: r for r in rows if r.unit in ("GFLOP", "%", "M", "M$", "G")}
    assert len(arithmetic) == 5 and max(abs(r.error) for r in arithmetic.values()) < 0.02
    chunk = next(r for r in rows if r.unit == "ms" and r.fitted)
    assert abs(chunk.error) < 0.03
    # What the model does not explain stays in the table: exchanges inside an overlapped step, and a whole step.
    unexplained = [r for r in rows if not r.fitted and abs(r.error) > 0.1]
    assert [r.unit for r in unexplained] == ["ms", "ms", "s"]
    text = simulate.report()
    assert text.startswith("simulated") and len(text.splitlines()) == 4 + len(rows)


def test_layer():
    m = calibrate()
    layer = simulate.expert_layer(4096, 64)
    ops = 4096 * (2 * (V3.attention_weights + V3.moe_weights) + V3.attention_flops(4096))
    assert layer.attention_us + layer.experts_us == pytest.approx(ops / m.compute_tflops / 1e6)
    assert layer.forward_us + layer.backward_us > layer.overlapped_us > layer.backward_us
    # Twice the tokens take twice as long; a rank with half more load takes half longer where it is loaded.
    double = simulate.expert_layer(8192, 64)
    assert double.dispatch_us == pytest.approx(2 * layer.dispatch_us)
    hot = simulate.expert_layer(4096, 64, imbalance=1.5)
    assert hot.experts_us == pytest.approx(1.5 * layer.experts_us) and hot.attention_us == layer.attention_us
    assert hot.combine_us == pytest.approx(1.5 * layer.combine_us)
    # One rank exchanges nothing; low latency has the published times.
    assert simulate.expert_layer(4096, 1).dispatch_us == 0
    assert simulate.expert_layer(0, 64).forward_us == 0
    assert simulate.expert_layer(128, 64, low_latency=True).dispatch_us == pytest.approx(173, rel=0.03)
    assert leaves_node(4) == 0 and leaves_node(64) == 0.875
    assert "simulated" in str(layer)


def test_step():
    """DualPipe's step is shorter than 1F1B's and ZB1P's at the sizes of the published run, and each is bubble plus
    work."""
    steps = {name: simulate.pipeline_step(schedule=name) for name in ("1f1b", "zb1p", "dualpipe")}
    assert steps["dualpipe"].seconds < steps["zb1p"].seconds < steps["1f1b"].seconds
    step = steps["dualpipe"]
    assert step.tokens == 15360 * 4096
    assert step.mfu == pytest.approx(step.tokens * 250.4e9 / step.seconds / 2048 / 989.5e12, rel=1e-3)
    assert step.simulation.schedule.num_microbatches == 120
    assert "simulated step" in str(step)
    half = simulate.pipeline_step(sequences=7680)
    assert 0.5 < half.seconds / step.seconds < 0.56  # the bubble does not shrink with the batch


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: simulate.training_run(), "mfu, gpu_hours: wanted one of the two"),
        (lambda: simulate.training_run(mfu=0.4, gpu_hours=1.0), "mfu, gpu_hours: wanted one of the two"),
        (lambda: simulate.training_run(mfu=0.0), "mfu: got 0.0, wanted more than 0"),
        (lambda: simulate.training_run(mfu=0.4, tokens=math.nan), "tokens: got nan"),
        (lambda: simulate.training_run(mfu=0.4, gpus=-1), "gpus: got -1"),
        (lambda: routing(3), "ranks: got 3, wanted a divisor of the 256 experts"),
        (lambda: routing(0), "ranks: got 0"),
        (lambda: simulate.expert_layer(-1, 8), "tokens: got -1"),
        (lambda: simulate.expert_layer(1, 8, imbalance=0.5), "imbalance: got 0.5"),
        (lambda: simulate.pipeline_step(gpus=2049), "gpus, sequences: got 2049 and 15360"),
        (lambda: simulate.pipeline_step(sequences=100), "gpus, sequences: got 2048 and 100"),
        (lambda: simulate.pipeline_step(sequences=128 * 8), "num_microbatches >= 2"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    figure = simulate.plot(tmp_path / "model.png")
    assert [("simulated" in axes.get_title()) for axes in figure.axes] == [True] * 3
    # The published points are drawn as they are published.
    assert list(figure.axes[0].lines[0].get_ydata()) == [118, 155, 173, 192, 194]
    assert (tmp_path / "model.png").stat().st_size > 10_000
