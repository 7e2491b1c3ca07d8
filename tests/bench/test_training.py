"""The figures of training and speculation: the probes run."""

from __future__ import annotations

import json

from bench import training, training_precision


def test_probes():
    assert (len(training.probes(quick=True)), len(training.probes(quick=False))) == (2, 6)
    assert training.step("bf16", 1)["step_s"] > 0
    figures = training.drafts(2)
    assert 0.3 < figures["accepted"] < 1 and 1.5 < figures["tokens_per_pass"] <= 3


def test_the_committed_curves(tmp_path):
    """Three seeds in three precisions; the gaps are those of the curves; FP8's lies within its control's size."""
    result = json.loads(training_precision.RESULT.read_text())
    assert len(result["runs"]) == 9 and all(len(run["main"]) == 150 for run in result["runs"])
    assert result["gaps"] == training_precision.gaps(result["runs"])
    for pair in training_precision.GAPS:
        some = [gap["percent"] for gap in result["gaps"] if (gap["of"], gap["to"]) == pair]
        assert len(some) == 3 and abs(sum(some) / 3) <= 0.75 and max(map(abs, some)) <= 1.5
    training_precision.plot(result, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
