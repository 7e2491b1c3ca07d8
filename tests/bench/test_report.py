"""Tables, the comparison of two runs, and the picture."""

from __future__ import annotations

import json

import pytest

from bench import report
from dsv3_kernels.commands.console import Console


def case(key="fp8_gemm[M=1]", us=10.0, machine="H100", backend="cuda", flops=0, unit=""):
    side = {"us": us, "p20": us - 1, "p80": us + 1, "count": 50, "method": "events", "gbs": 100.0, "roof": 0.5}
    if flops:
        side["tflops"] = flops / us / 1e6
    return {
        "kind": "case",
        "key": key,
        "op": key.partition("[")[0],
        "shape": {"M": 1},
        "bytes": 1000,
        "flops": flops,
        "unit": unit,
        "backend": backend,
        "sides": {backend: side, "torch": side | {"us": 2 * us}, "flash": {"error": "RuntimeError: no"}},
        "ceilings": {"copy_gbs": 3000.0, "fp8_tflops": 1500.0},
        "machine": machine,
        "date": "2026-01-01",
        "source": "abc",
    }


def test_rows():
    first, second = report.rows([case(flops=10**9, unit="fp8"), {"kind": "run"}])
    assert first == ["fp8_gemm", "M=1", "cuda", "10.0", "9.0-11.0", "100.0", "100.0", "50%", "", ""]
    assert second[2:4] == ["torch", "20.0"] and second[-2:] == ["2.00", ""]
    alone = case() | {"backend": None}
    alone["sides"]["cuda"] = {"error": "wrong"}
    assert [(row[2], row[-2]) for row in report.rows([alone])] == [("torch", "")]
    steady = case()
    steady["sides"]["cuda"]["steady_us"] = 12.34
    assert report.rows([steady])[0][-1] == "12.3"
    assert report.markdown([case()]).splitlines()[0].startswith("| op | shape | side | us |")


def test_show(capsys):
    host = {"kind": "host", "key": "import", "import_s": 0.1, "rounds": 7}
    report.show([{"kind": "run", "ceilings": {"copy_gbs": 3000.0}}, case(), host], Console())
    text = capsys.readouterr().out
    assert "copy gbs 3e+03" in text and "fp8_gemm" in text and "0.100" in text


@pytest.mark.parametrize(("us", "code"), [(8.0, 0), (11.4, 0), (11.6, 1)])
def test_compare(us, code, capsys):
    assert report.compare([case(us=us)], [case(us=10.0)], Console()) == code
    assert ("FAIL slower" in capsys.readouterr().out) == bool(code)


@pytest.mark.parametrize("other", [{"machine": "H200"}, {"key": "fp8_gemm[M=2]"}, {"backend": "triton"}])
def test_compare_holds_like_against_like(other, capsys):
    assert report.compare([case()], [case(**other)], Console()) == 2
    assert "nothing to compare" in capsys.readouterr().out


def test_a_line_cut_off_is_left_out(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert report.read(file) == [{"a": 1}, {"a": 2}]
    file.write_text('{"a": 1}\n{"a"\n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"results.jsonl:2: not JSON"):
        report.read(file)


def test_main(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "results.jsonl", tmp_path / "roof.png"
    records = [case(flops=10**9, unit="fp8"), case("quantize_1x128[T=1]")]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert report.main([str(file), "--markdown", "--png", str(picture), "--compare", str(file)]) == 0
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 10_000
    assert "| fp8_gemm | M=1 | cuda |" in capsys.readouterr().out


def test_main_in_words(tmp_path, capsys):
    assert report.main([str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").write_text("")
    assert report.main([str(tmp_path / "empty.jsonl"), "--png", str(tmp_path / "x.png")]) == 2
