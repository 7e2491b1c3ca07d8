"""What is distributed: wheels made of a copy of the tree, with the images that are there, opened and used."""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from tools import ROOT, NullDriver

from build_backend import images

pytest.importorskip("setuptools")


def run(*command: object, cwd: Path, **env: str) -> str:
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def copy_of_the_tree(target: Path) -> Path:
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("build_backend", "csrc", "dsv3_kernels", "build/host"):
        shutil.copytree(ROOT / name, target / name, ignore=skip)
    for name in ("LICENSE", "MANIFEST.in", "Makefile", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy2(ROOT / name, target / name)
    return target


def build(folder: Path, **env: str) -> tuple[Path, str]:
    """Builds a wheel as pip does for `--no-build-isolation`: through the backend's hook."""
    tree, out = copy_of_the_tree(folder / "tree"), folder / "out"
    out.mkdir()
    script = f"from build_backend import hooks; hooks.build_wheel({str(out)!r})"
    log = run(sys.executable, "-c", script, cwd=tree, **env)
    (wheel,) = out.glob("*.whl")
    return wheel, log


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> tuple[Path, str]:
    return build(tmp_path_factory.mktemp("native"), DSV3_KERNELS_BUILD="")


@pytest.fixture(scope="module")
def python_only(tmp_path_factory) -> tuple[Path, str]:
    return build(tmp_path_factory.mktemp("python"), DSV3_KERNELS_BUILD="python")


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def python_part() -> set[str]:
    """Modules, stubs, the demo's checkpoint and the manifest: what every wheel holds."""
    package = ROOT / "dsv3_kernels"
    files = [path for path in package.rglob("*.py*") if path.suffix in (".py", ".pyi")]
    files += [path for path in (package / "model" / "demo").glob("*") if path.is_file()]
    files += (package / "tuned").glob("*.json")
    return {str(path.relative_to(ROOT)) for path in files} | {
        "dsv3_kernels/py.typed",
        "dsv3_kernels/images/manifest.json",
    }


def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


# Unpacked wheels are used by a Python without site-packages (-S): no torch, and no editable install behind them.
def unpack(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_contents(native):
    wheel, _ = native
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"dsv3_kernels-0.1.0-{tag}-{tag}-{platform}.whl"
    expected = python_part() | {f"dsv3_kernels/_host{sysconfig.get_config_var('EXT_SUFFIX')}"}
    expected |= {f"dsv3_kernels/images/{name}.{kind}" for name in images.sources() for kind in ("ptx", "cubin")}
    assert names(wheel) == expected


def test_images_and_objects_are_taken_as_they_are(native):
    _, log = native
    assert not [line for line in log.splitlines() if line.startswith("dsv3_kernels: ")], log


def test_metadata(native):
    wheel, _ = native
    data = metadata(wheel)
    needed = {r for r in data.get_all("Requires-Dist") if "extra ==" not in r}
    assert "torch>=2.8" in needed
    assert not [r for r in needed if r.startswith(("triton", "nvidia", "pybind11", "setuptools"))]
    assert data["License-Expression"] == "MIT" and data["Requires-Python"] == ">=3.11"
    with zipfile.ZipFile(wheel) as archive:
        (points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert b"dsv3 = dsv3_kernels.cli:main" in archive.read(points)


def test_an_unpacked_wheel_works_without_torch_and_launches_its_own_images(native, tmp_path):
    folder = unpack(native[0], tmp_path / "site")
    script = f"""
import sys
sys.path.insert(0, {str(folder)!r})
import dsv3_kernels
from dsv3_kernels import _host, _images
assert dsv3_kernels.__file__.startswith({str(folder)!r}) and _host.__file__.startswith({str(folder)!r})
assert _images.missing() == {{}} and all(i.cubin.is_file() and i.ptx.is_file() for i in _images.images().values())
with _host.use_driver({NullDriver().path!r}):
    _host.preload(-1)
    _host.quantize_1x128(0, 0, 0, 8, 128, 128, 1, 8, False, 1, -1, 0)
print(_host.launch_counts()["quantize_1x128_bf16"])
(_images.DIRECTORY / "quantize_1x128.ptx").unlink()
"""
    assert run(sys.executable, "-S", "-c", script, cwd=tmp_path).strip() == "1"


def test_an_installed_wheel_works_in_an_empty_environment(native, tmp_path):
    """pip installs it with nothing else; the package, its command and its images are there, and torch is not."""
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    options = ("--disable-pip-version-check", "--quiet", "--no-deps", "--no-index")
    run(sys.executable, "-m", "pip", "--python", venv, "install", *options, native[0], cwd=tmp_path)
    python, clean = venv / "bin" / "python", {"PYTHONPATH": "", "PYTHONHOME": ""}
    script = "import dsv3_kernels, sys; print(dsv3_kernels.__file__, dsv3_kernels.__version__, 'torch' in sys.modules)"
    file, version, torch = run(python, "-c", script, cwd=tmp_path, **clean).split()
    assert Path(file).is_relative_to(venv) and (version, torch) == ("0.1.0", "False")
    done = subprocess.run(
        [venv / "bin" / "dsv3", "info", "--json"], cwd=tmp_path, env=os.environ | clean, capture_output=True, text=True
    )
    facts = json.loads(done.stdout)
    assert done.returncode == 1 and not done.stderr  # there is no torch, and it says so
    assert facts["problems"][0] == "torch cannot be imported: No module named 'torch'"
    assert set(facts["images"]["images"]) == set(images.sources()) and not facts["images"]["damaged"]
    assert facts["host"]["available"] and facts["host"]["kernels"]


def test_a_lost_image_is_named(native, tmp_path):
    folder = unpack(native[0], tmp_path / "site")
    (folder / "dsv3_kernels" / "images" / "quantize_1x128.ptx").unlink()
    script = f"""
import sys
sys.path.insert(0, {str(folder)!r})
from dsv3_kernels import _host
with _host.use_driver({NullDriver().path!r}):
    try:
        _host.quantize_1x128(0, 0, 0, 8, 128, 128, 1, 8, False, 1, -1, 0)
    except RuntimeError as error:
        print(error)
"""
    text = run(sys.executable, "-S", "-c", script, cwd=tmp_path).strip()
    assert text.startswith("quantize_1x128: the image ") and text.endswith(
        "quantize_1x128.ptx is missing; `dsv3 info` says why"
    )


def test_python_only(python_only, tmp_path):
    wheel, log = python_only
    assert wheel.name == "dsv3_kernels-0.1.0-py3-none-any.whl" and "Python-only: DSV3_KERNELS_BUILD=python" in log
    assert names(wheel) == python_part()
    folder = unpack(wheel, tmp_path / "site")
    script = f"""
import sys
sys.path.insert(0, {str(folder)!r})
from dsv3_kernels import _images
print(_images.missing()["_host"], "|", _images.missing()["quantize_1x128"])
import dsv3_kernels._host
"""
    result = subprocess.run(
        [sys.executable, "-S", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == "not built: DSV3_KERNELS_BUILD=python | not built: DSV3_KERNELS_BUILD=python"
    assert "ModuleNotFoundError: No module named 'dsv3_kernels._host'" in result.stderr


def test_source_distribution(tmp_path):
    tree = copy_of_the_tree(tmp_path / "tree")
    script = f"from build_backend import hooks; hooks.build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", script, cwd=tree)
    shutil.unpack_archive(tmp_path / "dsv3_kernels-0.1.0.tar.gz", tmp_path / "unpacked")
    (top,) = (tmp_path / "unpacked").iterdir()
    inside = {str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()}
    sources = {
        str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cu", ".cuh", ".h", ".cpp")
    }
    assert sources <= inside
    assert {"setup.py", "pyproject.toml", "build_backend/hooks.py", "LICENSE", "README.md"} <= inside
    assert not [name for name in inside if name.endswith(".so")]
