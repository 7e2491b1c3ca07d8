"""The GPU probes on the simulator, through device memory as on a GPU; and the real assembler takes their PTX."""

from __future__ import annotations

import json
import re
import subprocess

import numpy as np
import probes
import pytest
from simulator import HEADER, LIBRARY, SimError

from build_backend import toolchain


@pytest.fixture(scope="module")
def device(_simulator) -> probes.Device:
    return probes.Device(str(LIBRARY))


@pytest.fixture(scope="module")
def results(device) -> dict:
    return dict(probes.run(device, json.loads(probes.ANSWERS.read_text())))


def test_the_answers_are_those_committed(results):
    assert {n: r["model"] for n, r in results.items() if r["model"] != "agrees"} == {}
    assert [n for n, r in results.items() if r["bits"] is False] == []
    assert list(results) == list(json.loads(probes.ANSWERS.read_text()))
    # Another numpy may draw other numbers for some: most are drawn from bits that never change.
    assert sum(r["bits"] is True for r in results.values()) > len(results) / 2


def test_a_disagreement_is_told(device, monkeypatch):
    def wrong(device):
        raise AssertionError("3 elements differ")

    def fails(device):
        raise SimError(700, "cuCtxSynchronize: an illegal address")

    monkeypatch.setattr(probes, "probes", lambda: {"a": (wrong, True), "b": (fails, False), "c": (id, True)})
    results = dict(probes.run(device, {"c": {"inputs": probes.hashlib.sha256().hexdigest()[:16], "answer": "other"}}))
    assert [r["model"] for r in results.values()] == [
        "3 elements differ",
        "cuCtxSynchronize: an illegal address",
        "agrees",
    ]
    assert all(map(probes.disagrees, results.values()))


# ---- answers of hardware become fixtures


def test_hardware_answered_the_same(results):
    for path in sorted(probes.HARDWARE.glob("*.json")):
        assert "simulator" not in json.loads(path.read_text())["machine"]["gpu"].lower()
        wrong, compared = probes.contradictions(path, results)
        assert wrong == {}, path
        assert compared > len(results) / 2, path


@pytest.fixture
def recorded(device, results, tmp_path):
    """The fixture that comes of lines as a GPU leaves them: here the simulator's answers, some of them changed."""

    def make(**changes):
        changed = [{"probe": n, **r, **changes.get(n.replace(" ", "_"), {})} for n, r in results.items()]
        lines = tmp_path / "probes.jsonl"
        lines.write_text("".join(json.dumps(row) + "\n" for row in [device.machine(), *changed]))
        return probes.fixture(lines, tmp_path / "hardware")

    return make


def test_a_fixture_of_the_same_answers(recorded, results):
    path = recorded()
    machine = json.loads(path.read_text())["machine"]
    assert machine["gpu"] == "PTX simulator (sm_90a)" and machine["driver"].startswith("CUDA 13") and machine["date"]
    assert path.name == "ptx_simulator_sm_90a.json"
    assert probes.contradictions(path, results) == ({}, len(results))
    with pytest.raises(ValueError, match="the simulator's answers, not a GPU's"):
        probes.fixture(path.parents[1] / "probes.jsonl")


def other_values(result: dict, factor: float) -> dict:
    """The answer of a float32 product, off by a factor."""
    *unchanged, values = result["values"]
    assert unchanged == [None, None]
    changed = np.frombuffer(probes.unpacked(values), np.float32) * np.float32(factor)
    return {"answer": "other", "values": [*unchanged, probes.packed(changed.tobytes())]}


def test_a_contradiction_is_told(recorded, results):
    name = "wgmma bf16, A in registers"
    assert not results[name]["exact"] and results["redux"]["exact"]
    path = recorded(redux={"answer": "other"})
    assert probes.contradictions(path, results)[0] == {
        "redux": f"hardware answered other, the simulator {results['redux']['answer']}"
    }
    rounding = other_values(results[name], 1 + 2.0**-23)
    assert probes.contradictions(recorded(**{name.replace(" ", "_"): rounding}), results) == ({}, len(results))
    wrong = other_values(results[name], 1 + 2.0**-9)
    assert list(probes.contradictions(recorded(**{name.replace(" ", "_"): wrong}), results)[0]) == [name]
    model = recorded(vote={"model": "12 lanes differ"})
    assert probes.contradictions(model, results)[0] == {"vote": "the hardware's answer: 12 lanes differ"}
    assert probes.contradictions(path, {n: r for n, r in results.items() if n != "elect, activemask"})[0][
        "elect, activemask"
    ] == ("there is no such probe any more")


def test_the_assembler_takes_them(device, results, tmp_path):
    nvcc = toolchain.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    kernels = []
    for i, text in enumerate(sorted(device.texts)):
        body = re.sub(r"\.entry k\(", f".entry k{i}(", text.removeprefix(HEADER))
        kernels.append(re.sub(r"\b(twice|TABLE)\b", rf"\g<1>{i}", body))
    ptx = tmp_path / "probes.ptx"
    ptx.write_text(HEADER + "\n".join(kernels))
    command = [nvcc.ptxas, "-arch=sm_90a", "-O0", ptx, "-o", tmp_path / "probes.cubin"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]
