"""The host module `dsv3_kernels/_host.*.so` (by g++ and pybind11 alone) and the null driver of the tests."""

import hashlib
import json
import os
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import images, toolchain
from .toolchain import ROOT, BuildError, note

FLAGS = ("-std=c++17", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
GIB_PER_JOB = 1.0


def module_path(root: Path = ROOT) -> Path:
    return root / "dsv3_kernels" / f"_host{sysconfig.get_config_var('EXT_SUFFIX')}"


def sources(root: Path = ROOT) -> list[Path]:
    """Host code of the module: `csrc/host` and the launchers beside the kernels."""
    folders = [folder for folder in sorted((root / "csrc").iterdir()) if folder.is_dir() and folder.name != "ptxsim"]
    return [path for folder in folders for path in sorted(folder.glob("*.cpp")) if path.name != "null_driver.cpp"]


def missing() -> str:
    """Why this machine cannot build the module, or an empty string."""
    if not toolchain.find_cxx():
        return "no C++ compiler: install g++"
    if not toolchain.pybind11_include():
        return "no pybind11 headers: install pybind11 (torch brings them, too)"
    return ""


def _includes() -> list[str]:
    paths = sysconfig.get_paths()
    python = dict.fromkeys((paths["include"], paths["platinclude"]))
    return ["-Icsrc", f"-isystem{toolchain.pybind11_include()}", *(f"-isystem{path}" for path in python)]


def _run(command: Sequence[str | Path], what: str, root: Path) -> str:
    status, log = toolchain.run(command, cwd=root)
    if status:
        raise BuildError(f"{what} failed:\n{log}")
    return log


def build(root: Path = ROOT) -> Path:
    """Compiles what changed, links, returns the module's path; BuildError when the compiler refuses."""
    if reason := missing():
        raise BuildError(f"host module: {reason}")
    cxx, includes, target = toolchain.find_cxx(), _includes(), module_path(root)
    cache = root / "build" / "host" / str(sysconfig.get_config_var("SOABI"))
    cache.mkdir(parents=True, exist_ok=True)
    recipe = (str(cxx), *FLAGS, *includes)

    def object_of(path: Path) -> Path:
        return cache / f"{images.source_hash(path, root, recipe=recipe)[:32]}.o"

    objects = {path: object_of(path) for path in sources(root)}
    linked = hashlib.sha256(json.dumps(sorted(o.name for o in objects.values())).encode()).hexdigest()
    stamp = cache / "linked"
    if target.is_file() and stamp.is_file() and stamp.read_text() == f"{linked} {target.stat().st_mtime_ns}":
        return target

    def compile_object(path: Path) -> None:
        if not objects[path].is_file():
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                made = Path(folder) / "made.o"
                _run(
                    [cxx, *FLAGS, *includes, "-c", path.relative_to(root), "-o", made],
                    f"compiling {path.relative_to(root)}",
                    root,
                )
                if object_of(path) != objects[path]:
                    raise BuildError(f"{path.relative_to(root)} changed while it was compiled: build again")
                os.replace(made, objects[path])

    todo = [path for path in objects if not objects[path].is_file()]
    note(f"host module: compiling {', '.join(str(path.relative_to(root)) for path in todo) or 'nothing'}, linking")
    results = toolchain.in_parallel(todo, compile_object, GIB_PER_JOB)
    if errors := [str(result) for result in results if isinstance(result, BuildError)]:
        raise BuildError("\n\n".join(errors))
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made = Path(folder) / target.name
        _run(
            [cxx, "-shared", "-s", *objects.values(), "-ldl", "-lpthread", "-o", made], "linking the host module", root
        )
        os.replace(made, target)
    for old in set(cache.glob("*.o")) - set(objects.values()):
        old.unlink(missing_ok=True)
    stamp.write_text(f"{linked} {target.stat().st_mtime_ns}")
    return target


def build_null_driver(root: Path = ROOT) -> Path:
    """`build/null_driver.so`: the driver's functions, doing nothing and writing down what they were asked."""
    source, target = root / "csrc" / "host" / "null_driver.cpp", root / "build" / "null_driver.so"
    stamp, recipe = target.with_suffix(".stamp"), (str(toolchain.find_cxx()), *FLAGS)
    wanted = images.source_hash(source, root, recipe=recipe)
    if not (target.is_file() and stamp.is_file() and stamp.read_text() == wanted):
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            _run([*recipe, "-Icsrc", "-shared", source.relative_to(root), "-o", made], "null driver", root)
            os.replace(made, target)
        stamp.write_text(wanted)
    return target
