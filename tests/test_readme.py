"""The README: its support matrix is the one of the table of ops, and its snippets run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import support

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)


def test_support_matrix_is_current():
    """`python -m bench.support --write` puts it right."""
    assert support.update(README, support.matrix()) == README


def test_there_are_snippets():
    assert len(SNIPPETS) >= 3


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet(snippet, tmp_path):
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def validated(ok=True, date="2026-12-01", backend="cuda", gpu="NVIDIA H200", ops=("x", "x_backward")):
    return {"kind": "validate", "ops": list(ops), "backend": backend, "gpu": gpu, "date": date, "ok": ok}


def timed(date, side):
    return {
        "kind": "case",
        "op": "x",
        "machine": "NVIDIA H100",
        "date": date,
        "sides": {"cuda": side, "torch": {"us": 1.0}},
    }


@pytest.mark.parametrize(
    ("records", "wanted"),
    [
        ([], {}),
        ([{"kind": "run"}, validated(gpu=None), validated(backend="eager")], {}),
        ([validated()], {("x", "cuda"): "H200 2026-12-01", ("x_backward", "cuda"): "H200 2026-12-01"}),
        ([validated(ops=["x"]), timed("2026-12-03", {"us": 1.0})], {("x", "cuda"): "H100 2026-12-03"}),
        ([timed("2026-12-03", {"us": 1.0}), validated(ops=["x"])], {("x", "cuda"): "H100 2026-12-03"}),
        ([validated(ops=["x"]), validated(ok=False, ops=["x"])], {}),
        ([validated(ops=["x"]), validated(ok=False, ops=["x"], date="2026-12-02")], {}),
        ([validated(ok=False, ops=["x"]), validated(ops=["x"], date="2026-12-02")], {("x", "cuda"): "H200 2026-12-02"}),
        ([timed("2026-12-03", {"error": "wrong"})], {}),
    ],
)
def test_gpu_runs(records, wanted):
    assert support.gpu_runs(records) == wanted


def test_update():
    page = f"a\n{support.BEGIN}\nold\n{support.END}\nb\n"
    assert support.update(page, "new") == f"a\n{support.BEGIN}\nnew\n{support.END}\nb\n"
    for broken in ("a", f"a {support.BEGIN} b", f"{support.END} a"):
        with pytest.raises(ValueError, match="support:begin"):
            support.update(broken, "new")
