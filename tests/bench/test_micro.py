"""The microbenchmarks: in the simulator they compute what they should, at both extremes of its timing."""

from __future__ import annotations

import json

import pytest
import torch
from simulated import needs_simulator, schedule

from bench import micro, overhead, report, run
from build_backend import images, toolchain
from dsv3_kernels.commands.console import Console

CPU = torch.device("cpu")
TIMINGS = pytest.mark.parametrize("timing", ["early", "late"])


@needs_simulator
@TIMINGS
@pytest.mark.parametrize("fill", ["idle", "fill"])
@pytest.mark.parametrize("operand", ["ss", "rs"])
def test_wgmma_operands(operand, fill, timing):
    with schedule(timing=timing):
        figures = micro.wgmma_operands(CPU, operand, fill, turns=3, ctas=2)
    assert set(figures) == {"wgmma_cycles", "all_tflops"} | ({"fill_gbs"} if fill == "fill" else set())
    assert all(value > 0 for value in figures.values())


@needs_simulator
@pytest.mark.parametrize("path", ["shipped", "bits", "intrinsics", "nothing"])
def test_e4m3_to_bf16(path):
    assert micro.e4m3_to_bf16(CPU, path, turns=11, ctas=1)["per_512_cycles"] > 0
    with pytest.raises(ValueError, match="3 more than a multiple of 8, got 12"):
        micro.e4m3_to_bf16(CPU, path, turns=12, ctas=1)


@needs_simulator
@TIMINGS
@pytest.mark.parametrize("turns", [2, 5, 6])
@pytest.mark.parametrize("ctas", ["alone", "pair"])
def test_l2_tiles(ctas, turns, timing):
    with schedule(timing=timing):
        figures = micro.l2_tiles(CPU, ctas, turns=turns, tiles=3, grid=4)
    assert set(figures) == {"received_gbs", "each_sm_bpc"} and all(value > 0 for value in figures.values())
    with pytest.raises(ValueError, match="3 CTAs are no pairs"):
        micro.l2_tiles(CPU, "pair", turns=2, tiles=3, grid=3)


@needs_simulator
@pytest.mark.parametrize("name", ["wgmma_operands", "e4m3_to_bf16", "l2_tiles"])
def test_a_wrong_result_gives_no_figures(name, monkeypatch):
    """The kernel's results with one bit changed."""
    launch = micro.Kernel.launch

    def spoiled(self, grid, threads, parameters, buffers, **options):
        launch(self, grid, threads, parameters, buffers, **options)
        buffers[-2][0].view(torch.int32).flatten()[-1] ^= 1

    monkeypatch.setattr(micro.Kernel, "launch", spoiled)
    calls = {
        "wgmma_operands": lambda: micro.wgmma_operands(CPU, "ss", "fill", turns=1, ctas=1),
        "e4m3_to_bf16": lambda: micro.e4m3_to_bf16(CPU, "bits", turns=3, ctas=1),
        "l2_tiles": lambda: micro.l2_tiles(CPU, "alone", turns=2, tiles=2, grid=1),
    }
    with pytest.raises(micro.Wrong, match=r"1 of \d+ results are wrong"):
        calls[name]()


def test_images_are_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setattr(micro, "OUT", tmp_path / "micro")
    compiled = []
    monkeypatch.setattr(images, "compile_image", lambda name, *rest: compiled.append(name) or entry(name, tmp_path))
    assert micro.compiled("l2_tiles") == micro.compiled("l2_tiles") == tmp_path / "micro" / "l2_tiles"
    assert compiled == ["l2_tiles"]
    record = tmp_path / "micro" / "l2_tiles.json"
    record.write_text(json.dumps({"source_hash": "older"}))
    micro.compiled("l2_tiles")
    assert compiled == ["l2_tiles"] * 2
    (tmp_path / "micro" / "l2_tiles.cubin").unlink()
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: None)
    with pytest.raises(overhead.Unavailable, match="no nvcc, and build/micro has no image of this source"):
        micro.compiled("l2_tiles")

    def old():
        raise toolchain.BuildError("PATH: nvcc is nvcc 12.9; these kernels need 13.0")

    monkeypatch.setattr(toolchain, "find_nvcc", old)
    with pytest.raises(overhead.Unavailable, match="these kernels need"):
        micro.compiled("l2_tiles")


def entry(name, folder):
    for ending in (".ptx", ".cubin"):
        (folder / "micro" / f"{name}{ending}").touch()
    return {"source_hash": images.source_hash(micro.HERE / f"{name}.cu")}


def test_the_runner_writes_figures_and_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    def missing():
        raise overhead.Unavailable("no nvcc")

    def wrong():
        raise micro.Wrong("3 results are wrong")

    found = {"micro good": lambda: {"received_gbs": 5.0}, "micro missing": missing, "micro wrong": wrong}
    monkeypatch.setattr(micro, "probes", lambda device: found)
    runner = run.Run(tmp_path / "bench.jsonl", CPU, quick=True)
    assert runner.micro(Console()) == 1
    (record,) = runner.results()
    assert record["kind"] == "micro" and record["key"] == "micro good" and record["received_gbs"] == 5.0
    text = capsys.readouterr().out
    assert "micro missing: not measured (no nvcc)" in text and "FAIL micro wrong: 3 results are wrong" in text
    assert report.host_rows([record]) == [["micro good", "received", "5.000", "GB/s"]]


def test_every_program_is_probed():
    names = micro.probes(CPU)
    assert len(names) == 10 and all(name.startswith("micro ") for name in names)
