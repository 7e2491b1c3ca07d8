"""The runner: checks before it times, writes as it goes, goes on where it stopped."""

from __future__ import annotations

import json

import pytest
import torch

import dsv3_kernels as dk
from bench import bench_quant, cases, machine, run, timing
from dsv3_kernels._library import OPS


def toy(check=None, op="dequantize", shape=4, **options):
    """A case that costs nothing."""
    return cases.Case(
        op=op,
        shape={"n": shape},
        make=lambda device: (torch.ones(shape, device=device),),
        run=lambda x: x + 1,
        check=check or (lambda inputs, outputs: None if torch.equal(outputs, inputs[0] + 1) else "wrong"),
        bytes=8 * shape,
        devices=("cpu",),
        quick=True,
        **options,
    )


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Run the command on given cases; returns (exit code, records)."""
    out = tmp_path / "sub" / "bench.jsonl"
    monkeypatch.setattr(machine, "ceilings", lambda device, budget=0.3: {"copy_gbs": 10.0, "float32_tflops": 0.1})
    grad, runner = torch.is_grad_enabled(), run.Run
    monkeypatch.setattr(runner, "host", lambda self, console: 0)

    def call(found, *argv):
        monkeypatch.setattr(run, "collect", lambda families: found)
        code = run.main(["--cpu", "--quick", "--out", str(out), *argv])
        return code, [json.loads(line) for line in out.read_text().splitlines()]

    yield call
    torch.set_grad_enabled(grad)


def test_records(bench, capsys):
    code, (head, record) = bench([toy(flops=100, unit="float32")])
    assert code == 0
    assert head["kind"] == "run" and head["facts"]["versions"]["torch"] and head["ceilings"]["copy_gbs"] == 10.0
    assert record["key"] == "dequantize[n=4]" and record["backend"] == "eager" and record["machine"] == machine.cpu()
    side = record["sides"]["eager"]
    assert (
        0 < side["p20"] <= side["us"] <= side["p80"]
        and side["count"] >= timing.LEAST
        and "perf_counter" in side["method"]
    )
    assert side["gbs"] == pytest.approx(32 / side["us"] / 1e3) and side["tflops"] == pytest.approx(
        100 / side["us"] / 1e6
    )
    assert side["roof"] == pytest.approx(max(32 / 10e9, 100 / 0.1e12) / side["us"] * 1e6)
    assert "dequantize" in capsys.readouterr().out


def test_steady_times_of_products(bench):
    code, records = bench([toy(flops=100, unit="float32"), toy(shape=5)], "--steady", "0.02")
    product, mover = (record["sides"]["eager"] for record in records[1:])
    assert code == 0 and product["steady_us"] > 0
    assert product["steady_tflops"] == pytest.approx(100 / product["steady_us"] / 1e6)
    assert "steady_us" not in mover


def test_a_run_goes_on_where_it_stopped(bench):
    calls = []

    def check(inputs, outputs):
        calls.append(len(inputs[0]))

    first, second = toy(check, shape=4), toy(check, shape=5)
    bench([first])
    _, records = bench([first, second])
    assert calls == [4, 5] and [r["kind"] for r in records] == ["run", "case", "run", "case"]
    _, records = bench([first, second])
    assert calls == [4, 5] and len(records) == 4


def test_other_sources_are_measured_again(bench, monkeypatch):
    bench([toy()])
    monkeypatch.setattr(machine, "source", lambda: "another")
    _, records = bench([toy()])
    assert [r["source"] for r in records if r["kind"] == "case"][1] == "another"


def test_a_wrong_output_is_not_timed_and_fails(bench, capsys):
    code, records = bench([toy(lambda inputs, outputs: "all of it is wrong")])
    assert (
        code == 1
        and records[1]["sides"] == {"eager": {"error": "all of it is wrong"}}
        and records[1]["backend"] is None
    )
    assert "FAIL dequantize[n=4] eager: all of it is wrong" in capsys.readouterr().out


def test_compare_with_a_base(bench, tmp_path):
    _, records = bench([toy()])
    record = records[1]
    record["sides"]["eager"]["us"] /= 2
    base = tmp_path / "base.jsonl"
    base.write_text(json.dumps(record))
    assert bench([toy()], "--compare", str(base))[0] == 1
    record["sides"]["eager"]["us"] *= 4
    base.write_text(json.dumps(record))
    assert bench([toy()], "--compare", str(base))[0] == 0


@pytest.mark.parametrize("quick", [False, True])
def test_a_quick_run_leaves_out_eager_where_a_kernel_serves(tmp_path, monkeypatch, quick):
    ready = run.Run(tmp_path / "bench.jsonl", torch.device("cpu"), quick)
    assert ready.ours("dequantize") == ["eager"]
    monkeypatch.setattr(run.backends, "missing", lambda op, name, device: None if name != "triton" else "not yet")
    assert ready.ours("dequantize") == (["cuda"] if quick else ["cuda", "eager"])


def test_wrong_requests(capsys):
    for argv, words in (
        (["--compare", "nowhere.jsonl"], "no file nowhere.jsonl"),
        (["--family", "fft"], "invalid choice"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run.main(argv)
        assert stopped.value.code == 2 and words in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert run.main(["--gpu"]) == 2 and "sees no GPU" in capsys.readouterr().err


def test_declared_cases():
    """Cases have names of their own, belong to ops of the table, and `--quick` has some of each family."""
    for family in cases.families():
        found = cases.collect([family])
        assert all(OPS[case.op].family == family and case.bytes > 0 for case in found)
        assert any(case.quick for case in found)
        assert all(case.unit in ("fp8", "bf16", "float32") for case in found if case.flops)
    everything = cases.collect()
    assert len({case.key for case in everything}) == len(everything)


@pytest.mark.parametrize("case", [c for c in cases.collect() if "cpu" in c.devices and c.quick], ids=lambda c: c.key)
def test_a_check_finds_a_wrong_output(case):
    """On the CPU's cases: what eager gives passes, and a flipped bit anywhere does not."""
    inputs = case.make(torch.device("cpu"))
    with torch.no_grad(), dk.backend("eager"):
        outputs = case.run(*inputs)
        assert case.check(inputs, outputs) is None
        for output in outputs if isinstance(outputs, tuple) else (outputs,):
            flip_last(output)
            assert case.check(inputs, outputs)
            flip_last(output)


def flip_last(tensor):
    """Flip a high bit of the last element."""
    cell = tensor[(-1,) * tensor.dim()]
    bits = cell.reshape(1).clone().view(torch.uint8)
    bits[-1] ^= 0x40
    cell.copy_(bits.view(tensor.dtype)[0])


def test_bytes_of_quantize():
    case = bench_quant.quantize_1x128(3, 300)
    x, (q, scale) = case.make(torch.device("cpu"))
    assert case.bytes == sum(t.numel() * t.element_size() for t in (x, q, scale))


def test_quantiles():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [timing.quantile(values, share) for share in (0, 0.2, 0.5, 0.8, 1)] == [1.0, 1.8, 3.0, 4.2, 5.0]
    assert timing.quantile([7.0], 0.2) == 7.0


def test_repetitions():
    assert timing.repetitions(1.0, 0.5) == timing.LEAST and timing.repetitions(1e-9, 0.5) == timing.MOST
    assert timing.repetitions(0.01, 0.5) == 50


def test_sides_take_turns():
    order = []
    timing.measure({name: lambda name=name: order.append(name) for name in "ab"}, torch.device("cpu"), 0.01)
    turns = order[4:]  # behind the warm-up
    assert turns[:4] == ["a", "b", "b", "a"] and turns.count("a") == turns.count("b") >= timing.LEAST


def test_ceilings_of_this_machine():
    found = machine.ceilings(torch.device("cpu"), budget=0.05)
    assert found["copy_gbs"] > 0.1 and found["float32_tflops"] > 1e-4


def test_source_follows_content(tmp_path):
    (tmp_path / "csrc").mkdir()
    file = tmp_path / "csrc" / "a.cu"
    file.write_text("one")
    first = machine.source(tmp_path)
    file.write_text("two")
    second = machine.source(tmp_path)
    (tmp_path / "csrc" / "notes.txt").write_text("not code")
    assert first != second == machine.source(tmp_path) and len(first) == 12
