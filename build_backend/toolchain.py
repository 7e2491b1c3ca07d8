"""Where the compilers and headers come from, and how many jobs run at once."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PYBIND11 = "pybind11>=2.12"
# Pinned together: pip would mix versions that reject each other. ptxas 12.9 and 13.0 miscompile some Hopper code
# (triton#11781, flash-linear-attention#1262).
NVCC_PARTS = (
    "nvidia-cuda-nvcc==13.5.37",
    "nvidia-nvvm==13.5.37",
    "nvidia-cuda-crt==13.5.37",
    "nvidia-cuda-runtime==13.5.37",
    "nvidia-cuda-cccl==13.3.5.0.6",
)
OLDEST_NVCC = (13, 0)


class BuildError(RuntimeError):
    """A native part did not build, or what came out must not be shipped."""


@dataclass(frozen=True)
class Nvcc:
    """One CUDA compiler: nvcc, the ptxas beside it, its version as nvcc states it and where it was found."""

    nvcc: Path
    ptxas: Path
    version: str
    origin: str


def build_mode() -> str:
    """`DSV3_KERNELS_BUILD`: "auto" (the default) or "python" (no compiler is run)."""
    mode = os.environ.get("DSV3_KERNELS_BUILD", "").strip() or "auto"
    if mode not in ("auto", "python"):
        raise BuildError(f"DSV3_KERNELS_BUILD is {mode!r}; it takes 'auto' or 'python'")
    return mode


def named_nvcc() -> str:
    """The compiler that `DSV3_KERNELS_NVCC` names, or an empty string."""
    return os.environ.get("DSV3_KERNELS_NVCC", "").strip()


def run(command: Sequence[str | Path], *, cwd: Path = ROOT) -> tuple[int, str]:
    """Exit status and combined output of a command."""
    result = subprocess.run([str(part) for part in command], cwd=cwd, text=True, capture_output=True, check=False)
    return result.returncode, result.stdout + result.stderr


def _inspect(nvcc: Path, origin: str) -> Nvcc:
    """Reads the compiler's version; a compiler that is there but does not serve is an error, not a reason to go on."""
    if not nvcc.is_file():
        raise BuildError(f"{origin}: {nvcc} is not a file")
    status, output = run([nvcc, "--version"])
    found = re.search(r"release (\d+)\.(\d+), V([\d.]+)", output)
    if status or not found:
        raise BuildError(f"{origin}: {nvcc} --version failed:\n{output}")
    if (int(found[1]), int(found[2])) < OLDEST_NVCC:
        raise BuildError(f"{origin}: {nvcc} is nvcc {found[3]}; these kernels need {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]}")
    # nvcc may be a script or a link that leads elsewhere: `-dryrun` says which folder it really works from.
    top = re.search(r"^#\$ _HERE_=(.+)$", run([nvcc, "-dryrun", "-ptx", "none.cu"])[1], re.M)
    for folder in ([Path(top[1].strip())] if top else []) + [nvcc.parent, nvcc.resolve().parent]:
        if (folder / "ptxas").is_file():
            return Nvcc(nvcc, folder / "ptxas", found[3], origin)
    raise BuildError(f"{origin}: no ptxas beside {nvcc}")


def _package_index_nvcc() -> Path | None:
    try:
        spec = importlib.util.find_spec("nvidia.cu13")
    except ModuleNotFoundError:
        spec = None
    # `make venv` keeps the parts in a folder of their own, where torch's requirements do not mix with them.
    apart = Path(sys.prefix) / "nvcc" / "nvidia" / "cu13"
    for folder in [apart, *(Path(f) for f in (spec.submodule_search_locations or []) if spec)]:
        if (nvcc := folder / "bin" / "nvcc").is_file() and (folder / "nvvm").is_dir():
            return nvcc
    return None


@cache
def find_nvcc() -> Nvcc | None:
    """`DSV3_KERNELS_NVCC`, else the package index's parts, else `CUDA_HOME`, else `PATH`; None where there is none.

    Raises BuildError for a compiler that was named or found and cannot be used.
    """
    if named := named_nvcc():
        return _inspect(Path(shutil.which(named) or named), "DSV3_KERNELS_NVCC")
    if packaged := _package_index_nvcc():
        return _inspect(packaged, "package index")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (nvcc := Path(home) / "bin" / "nvcc").is_file():
        return _inspect(nvcc, "CUDA_HOME")
    if on_path := shutil.which("nvcc"):
        return _inspect(Path(on_path), "PATH")
    return None


def find_cxx() -> str | None:
    """`CXX`, else g++, else c++."""
    return next((path for name in (os.environ.get("CXX"), "g++", "c++") if name and (path := shutil.which(name))), None)


def pybind11_include() -> Path | None:
    """Headers of the pybind11 package, else those that torch ships. Imports neither."""
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (Path(folder) / "include" / "pybind11" / "pybind11.h").is_file():
                return Path(folder) / "include"
    return None


def jobs(memory_each: float) -> int:
    """Parallel jobs: `MAX_JOBS`, else as many as cores and free memory allow, `memory_each` GiB a job."""
    if limit := os.environ.get("MAX_JOBS", "").strip():
        return max(1, int(limit))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        available = int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) / 2**20
    except (OSError, TypeError):
        available = 4.0
    return max(1, min(cores, int(available / memory_each)))


def in_parallel(tasks: Sequence, work, memory_each: float) -> list:
    """`work(task)` for each task, a thread each; results in order, a BuildError as a result and not raised."""

    def guarded(task):
        try:
            return work(task)
        except BuildError as error:
            return error

    with ThreadPoolExecutor(jobs(memory_each)) as pool:
        return list(pool.map(guarded, tasks))


def note(text: str) -> None:
    """Progress of the build; standard error, since a hook's standard output belongs to the frontend."""
    print(f"dsv3_kernels: {text}", file=sys.stderr, flush=True)
