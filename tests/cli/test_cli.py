"""The command line: what it prints, its exit codes, and that it works where something is missing."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest

from dsv3_kernels import __version__, _simulator, backends, cli, env
from dsv3_kernels._library import OPS
from dsv3_kernels.commands import console, info

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""
MAIN = "from dsv3_kernels.cli import main\nsys.exit(main({argv!r}))"
EAGER = """
import torch
import dsv3_kernels as dk
q, scale = dk.quantize_1x128(torch.full((2, 128), 2.0))
print(dk.dequantize(q, scale).unique().tolist(), "triton" in sys.modules)
from dsv3_kernels import backends
print(backends._triton_missing())
"""


def without(names, *argv, code=MAIN):
    """Run the command line, or other code, in a process that cannot import `names`."""
    code = BLOCK.format(names=list(names)) + code.format(argv=list(argv))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_info_as_json(capsys):
    code = cli.main(["info", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert code == (1 if facts["problems"] else 0)
    assert facts["dsv3_kernels"] == __version__ and set(facts["ops"]) == set(OPS)
    assert set(facts["environment"]) == set(env.VARIABLES)
    for name in ("python", "torch", "driver", "images", "host", "simulator"):
        assert facts[name], name
    for said in facts["ops"].values():
        assert said["cpu"]["backend"] and said["cpu"]["reason"]


def test_info_for_a_reader(capsys):
    cli.main(["info"])
    text = capsys.readouterr().out
    for words in ("dsv3_kernels", "simulator", "Backend of each op", *OPS, *env.VARIABLES):
        assert words in text
    assert "\x1b" not in text, "colours where there is no terminal"


def test_info_without_torch():
    done = without({"torch"}, "info", "--json")
    assert done.returncode == 1 and not done.stderr
    facts = json.loads(done.stdout)
    assert facts["torch"] == {"available": False, "why_not": "No module named 'torch'"}
    assert facts["problems"][0] == "torch cannot be imported: No module named 'torch'"
    assert facts["images"] and set(facts["ops"]) == set(OPS)
    assert f"{len(OPS)} ops; none can run without torch" in without({"torch"}, "info").stdout


def test_without_triton():
    done = without({"triton"}, "info", "--json")
    assert not done.stderr
    facts = json.loads(done.stdout)
    assert all(said["cpu"]["backend"] == "eager" for said in facts["ops"].values())
    done = without({"triton"}, code=EAGER)
    assert done.returncode == 0 and done.stdout == "[2.0] False\ntriton is not installed\n", done.stderr


def test_info_without_rich():
    done = without({"rich"}, "info")
    assert "Backend of each op" in done.stdout and not done.stderr


def test_validate_and_demo_without_torch():
    for command in ("validate", "demo"):
        done = without({"torch"}, command)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert f"dsv3 {command}: torch is needed and cannot be imported (No module named 'torch')" in done.stderr


def test_info_names_the_backend_that_is_forced(capsys, monkeypatch):
    backends._process_wide.cache_clear()
    monkeypatch.setenv("DSV3_KERNELS_BACKEND", "cuda")
    try:
        assert cli.main(["info", "--json"]) == 1  # no GPU serves CPU tensors
        facts = json.loads(capsys.readouterr().out)
    finally:
        backends._process_wide.cache_clear()
    assert facts["ops"]["quantize_1x128"]["cpu"]["backend"] is None
    assert any(p.startswith("quantize_1x128 on cpu: ") and "cuda" in p for p in facts["problems"])


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A folder of one image."""
    monkeypatch.setattr(info, "IMAGES", tmp_path)
    entry = {"nvcc": "13.5", "kernels": {"some_kernel": {}}}
    for kind in ("ptx", "cubin"):
        (tmp_path / f"some.{kind}").write_bytes(b"image " + kind.encode())
        entry[f"{kind}_hash"] = hashlib.sha256(b"image " + kind.encode()).hexdigest()
    manifest = {"format": 1, "arch": "sm_90a", "images": {"some": entry}, "missing": {"other": "no nvcc"}, "host": ""}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def test_info_reads_the_images(images, capsys):
    facts = info.collect()
    assert facts["images"]["images"] == {"some": {"nvcc": "13.5", "kernels": ["some_kernel"]}}
    assert facts["images"]["missing"] == {"other": "no nvcc"} and not facts["images"]["damaged"]
    info.show(facts, console.Console())
    text = capsys.readouterr().out
    assert "1 for sm_90a (nvcc 13.5, driver >= 580)" in text and "not other" in text


def test_info_finds_a_damaged_image(images):
    (images / "some.cubin").write_bytes(b"imaga cubin")
    (images / "some.ptx").unlink()
    facts = info.collect()
    assert facts["images"]["damaged"] == ["some.ptx", "some.cubin"]
    assert [p for p in facts["problems"] if "damaged" in p] == [
        f"image some.{k} is damaged: build it again" for k in ("ptx", "cubin")
    ]


def test_info_without_images(images):
    (images / "manifest.json").unlink()
    assert info.collect()["images"]["why_not"].startswith("no manifest of images")


def problems(**parts):
    """The problems of a machine that is well but for `parts`."""
    facts = {
        "torch": {"available": True, "gpus": [{"name": "H100"}]},
        "packages": dict.fromkeys(info.PACKAGES, "1"),
        "images": {"available": True, "why_not": None, "damaged": []},
        "host": {"available": True, "why_not": None},
        "driver": {"cuda": 13000, "version": "580.1", "gpus": [{"name": "H100", "capability": "9.0"}]},
        "ops": {"x": {"cuda": {"backend": "cuda", "reason": ""}}},
    }
    return info._problems(facts | parts)


def test_problems():
    hopper = [{"name": "H100", "capability": "9.0"}]
    ampere = [{"name": "A100", "capability": "8.0"}]
    assert problems() == []
    assert problems(driver={"cuda": 12080, "version": "570.2", "gpus": hopper}) == [
        "H100: driver 570.2, the images need 580 or newer"
    ]
    assert problems(driver={"cuda": 12080, "version": "570.2", "gpus": ampere}) == []
    assert problems(images={"available": False, "why_not": "no nvcc", "damaged": []}) == [
        "H100: no CUDA images: no nvcc"
    ]
    assert problems(torch={"available": True, "gpus": []})[0].startswith("H100: this torch does not see it")
    assert problems(host={"available": False, "why_not": "gone"}) == ["there are images but no native module: gone"]
    assert problems(packages=dict.fromkeys(info.PACKAGES, None)) == [f"{n} is not installed" for n in info.REQUIRED[1:]]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["validate", "--op", "fp9_gemm"], "dsv3 validate: --op fp9_gemm: no such op; there are quantize_1x128"),
        (["validate", "--backend", "cuda"], "dsv3 validate: nothing to run: no op asked for runs on cuda here"),
    ],
)
def test_wrong_requests(argv, words, capsys):
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(words) and error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "dsv3: the following arguments are required: COMMAND; see dsv3 --help\n"),
        (["explode"], "dsv3: argument COMMAND: invalid choice: 'explode'"),
        (["validate", "--backend", "opencl"], "dsv3 validate: argument --backend: invalid choice: 'opencl'"),
        (["info", "--yaml"], "dsv3: unrecognized arguments: --yaml"),
    ],
)
def test_wrong_arguments_are_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith(words) and error.count("\n") == 1


def test_python_m():
    done = subprocess.run([sys.executable, "-m", "dsv3_kernels", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"dsv3_kernels {__version__}\n"


def test_a_reader_that_leaves_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "dsv3_kernels", "info", "--json"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 0 and not done.stderr


def test_a_table_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = console.Console()
    shown.heading("Heading")
    shown.table(("op", "ms>"), [["[not] markup", "FAIL"], ["b", "ok"]])
    text = capsys.readouterr().out
    assert "\x1b[" in text and "[not] markup" in text and "Heading" in text


def test_a_plain_table():
    text = console.plain_table(["op", "ms"], [False, True], [["a", "1"], ["long", "10"]])
    assert text.splitlines() == ["op    ms", "----  --", "a      1", "long  10"]


def test_simulator_is_said_to_be_missing(monkeypatch):
    monkeypatch.setattr(_simulator, "library", lambda: None)
    assert info.collect()["simulator"] == {
        "available": False,
        "why_not": "the simulator is not built: run `make venv` in a source checkout, or set DSV3_KERNELS_DRIVER",
    }
