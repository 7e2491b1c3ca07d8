"""The cases of `dsv3 validate`: whole, honest about what they run, and able to fail."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dsv3_kernels as dk
from dsv3_kernels import backends, cli, validation
from dsv3_kernels._library import COMPOSITIONS, OPS
from dsv3_kernels.quant import _eager
from dsv3_kernels.validation import Bits, Case, Inputs, Near, Problem

CPU = torch.device("cpu")
CASES = validation.cases()


class Called(TorchDispatchMode):
    """Notes which of our ops run."""

    def __init__(self):
        super().__init__()
        self.ops = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "dsv3_kernels":
            name = function.__name__.partition(".")[0]
            self.ops.add(name if name in OPS else name.removesuffix("_out"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case):
    """It agrees with float64 on eager, and runs just the ops that it says."""
    result = validation.check(case, "eager", CPU)
    assert result.ok, result.error
    assert result.ops == case.ops and result.shape and result.seconds > 0
    problem = case.make(Inputs(CPU, "eager", torch.Generator().manual_seed(0)))
    with dk.backend("eager"), Called() as called:
        problem.run()
    assert called.ops == set(case.ops)


def test_every_op_has_a_case():
    assert set(OPS) <= {op for case in CASES for op in case.ops}
    assert set(COMPOSITIONS) <= {case.title.partition(",")[0] for case in CASES}
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))


def test_an_op_without_a_case_is_an_error(monkeypatch):
    kept = [case for case in CASES if case.name != "dequantize" and case.name != "dequantize_1x128"]
    monkeypatch.setattr(validation, "CASES", kept)
    (result,) = validation.validate(["dequantize"], ["eager"])
    assert not result.ok and result.error == "no validation case"


@pytest.fixture
def broken(monkeypatch):
    """Replace an eager implementation for one test."""

    def replace(name, function):
        monkeypatch.setattr(_eager, name, function)
        backends._function.cache_clear()

    yield replace
    monkeypatch.undo()
    backends._function.cache_clear()


def test_one_wrong_bit_is_found(broken, capsys):
    right = _eager.dequantize

    def wrong(*args):
        out = right(*args)
        out.view(-1)[7].view(torch.int16).bitwise_xor_(1) if out.dtype == torch.bfloat16 else None
        return out

    broken("dequantize", wrong)
    assert cli.main(["validate", "--op", "dequantize", "--backend", "eager"]) == 1
    text = capsys.readouterr().out
    assert "1 of 60000 elements differ" in text and "1 of 2 cases agree" in text


def test_an_error_beyond_the_bound_is_found(broken):
    right = _eager.rms_norm
    broken("rms_norm", lambda *args: tuple(t * (1 + 2**-7) if i == 0 else t for i, t in enumerate(right(*args))))
    results = list(validation.validate(["rms_norm"], ["eager"]))
    assert results and not any(result.ok for result in results if result.case == "rms_norm")


def test_an_exception_is_a_failed_case(broken):
    def wrong(*args):
        raise RuntimeError("no such\nluck")

    broken("dequantize", wrong)
    results = list(validation.validate(["dequantize"], ["eager"]))
    assert [result.error for result in results] == ["RuntimeError: no such luck"] * 2


def test_a_run_that_differs_from_the_first_is_found():
    outputs = iter((torch.zeros(3), torch.tensor([0.0, 0.0, -0.0])))
    problem = Problem("", lambda: {"x": next(outputs)}, {"x": Near(torch.zeros(3).double(), torch.tensor(1.0))})
    result = validation.check(Case("", ("dequantize",), lambda inputs: problem), "eager", CPU)
    assert result.error == "x: a second run gave other bits"


NAN = float("nan")


@pytest.mark.parametrize(
    ("got", "wanted", "words"),
    [
        ([1.0, 2.0], Bits(torch.tensor([1.0, 2.0])), None),
        ([1.0, -0.0], Bits(torch.tensor([1.0, 0.0])), "1 of 2 elements differ"),
        ([1.0, NAN], Bits(torch.tensor([1.0, NAN])), None),
        ([1.0], Bits(torch.tensor([1.0, 2.0])), r"shape \[1\], wanted \[2\]"),
        ([1.0], Bits(torch.tensor([1.0]).double()), "dtype torch.float32"),
        ([1.0, 2.0], Near(torch.tensor([1.0, 2.5]).double(), torch.tensor(0.5)), None),
        (
            [1.0, 2.0],
            Near(torch.tensor([1.0, 2.5]).double(), torch.tensor([0.5, 0.4])),
            r"1 of 2 .*\(1,\): got 2, wanted 2.5",
        ),
        ([1.0, 2.0], Near(torch.tensor([1.0, 2.5]).double(), torch.tensor(0.0)), "1 of 2"),
        ([NAN, 2.0], Near(torch.tensor([1.0, 2.0]).double(), torch.tensor(9.0)), "1 of 2"),
        ([1.0, 2.0], Near(torch.tensor([NAN, 2.0]).double(), torch.tensor(9.0)), "other infinities or NaNs"),
        ([float("inf")], Near(torch.tensor([float("-inf")]).double(), torch.tensor(9.0)), "other infinities"),
        ([float("-inf")], Near(torch.tensor([float("-inf")]).double(), torch.tensor(9.0)), None),
        ([], Near(torch.tensor([]).double(), torch.tensor(0.0)), None),
    ],
)
def test_compare(got, wanted, words):
    _, error = validation.compare({"x": torch.tensor(got)}, {"x": wanted})
    if words is None:
        assert error is None
    else:
        with pytest.raises(AssertionError, match=words):
            raise AssertionError(error)


def test_compare_demands_all_outputs():
    assert validation.compare({"x": torch.ones(1)}, {"y": Bits(torch.ones(1))})[1] == "outputs ['x'], wanted ['y']"


def test_results_are_written(tmp_path, capsys):
    file = tmp_path / "results.jsonl"
    assert cli.main(["validate", "--op", "dequantize", "--backend", "eager", "--jsonl", str(file)]) == 0
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(records) == 2
    for record in records:
        assert (
            record["kind"] == "validate" and record["ok"] and record["gpu"] is None and record["ops"] == ["dequantize"]
        )
    assert "2 of 2 cases agree" in capsys.readouterr().out
