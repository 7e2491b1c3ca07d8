"""How the tests themselves are run: what `--gpu` demands, and what it collects."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
COLLECT = """
import sys, pytest, torch
torch.cuda.is_available = lambda: {gpu}
sys.exit(pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def collect(gpu: bool, *arguments: str) -> tuple[int, str]:
    """Exit code and text of a collection where torch says that it has a GPU, or not."""
    command = [sys.executable, "-c", COLLECT.format(gpu=gpu), *arguments]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_missing_gpu_is_a_failure():
    code, text = collect(False, "--gpu", "tests/test_gpu.py")
    assert code == 1 and f"--gpu: torch {torch.__version__} sees no GPU" in text


def test_gpu_tests_are_collected_with_a_gpu_alone():
    code, text = collect(True, "--gpu", "tests/test_gpu.py")
    assert code == 0 and "test_a_captured_graph_replays_with_the_bits_of_the_plain_call[fp8_gemm]" in text
    code, text = collect(False, "tests/test_gpu.py")
    assert code == 5 and "deselected" in text and " error" not in text


def test_the_makefile_names_tests_that_exist():
    (line,) = re.findall(r"^GPU_TESTS \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert line.split() and all((ROOT / name).exists() for name in line.split())


SKIPPED = {
    "module": "import pytest\npytest.importorskip('no_such_module')\ndef test(): pass\n",
    "mark": "import pytest\n@pytest.mark.skipif(True, reason='no tool')\ndef test(): pass\n",
    "call": "import pytest\ndef test(): pytest.skip('no tool')\n",
    "xfail": "import pytest\n@pytest.mark.xfail\ndef test(): assert False\n",
}


def test_a_skipped_test_is_a_failure_in_ci(tmp_path):
    for name, text in SKIPPED.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", "--tb=short", "."]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}", "PYTEST_ADDOPTS": "--continue-on-collection-errors"}
    for ci, code, counts in (("1", 1, "1 failed, 1 xfailed, 2 errors"), ("", 0, "3 skipped, 1 xfailed")):
        done = subprocess.run(command, cwd=tmp_path, env=environment | {"CI": ci}, capture_output=True, text=True)
        assert done.returncode == code and counts in done.stdout, done.stdout + done.stderr
        assert done.stdout.count("CI is set, and this was not run: ") >= 3 * code
