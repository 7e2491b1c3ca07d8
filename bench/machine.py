"""The machine: what it is, what its clocks do, and the ceilings that it reaches today."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from .timing import measure

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "deep_gemm", "flash_mla", "flashinfer-python", "numpy")
CLOCKS = (
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "clocks_event_reasons.active",
)


def facts(device: torch.device) -> dict[str, Any]:
    """Name, versions and clocks, for the head of a results file."""
    found: dict[str, Any] = {
        "name": name(device),
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "versions": {package: _version(package) for package in PACKAGES},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "sms": properties.multi_processor_count,
            "l2_mib": round(properties.L2_cache_size / 2**20, 1),
            "cuda": torch.version.cuda,
            "driver": next(iter(_nvidia_smi("driver_version").values()), None),
            "clocks": clocks(),
        }
    return found


def name(device: torch.device) -> str:
    """What results are compared within: the GPU's name, or the CPU's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu()


def cpu() -> str:
    """The CPU's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def clocks() -> dict[str, str]:
    """Clocks, power, temperature and the reasons for throttling, as nvidia-smi says them; empty without it."""
    return _nvidia_smi(*CLOCKS)


def _nvidia_smi(*fields: str) -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=True)) if done.returncode == 0 and len(values) == len(fields) else {}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit(root: Path = ROOT) -> str | None:
    """The commit checked out, with "+" when files differ from it; None outside a repository."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True)
        status = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True)
    except OSError:
        return None
    return None if head.returncode else head.stdout.strip() + ("+" if status.stdout.strip() else "")


def source(root: Path = ROOT) -> str:
    """A hash of what is measured and of what measures it: results of the same source need not be measured again."""
    digest = hashlib.sha256()
    for folder in ("dsv3_kernels", "csrc", "bench"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".cpp", ".h") and path.is_file():
                digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def ceilings(device: torch.device, budget: float = 0.3) -> dict[str, float]:
    """What this machine reaches now: GB/s of a copy (read + written), TFLOP/s of torch's matrix products.

    Random data: zeros draw less power and run faster. A unit that is missing (FP8 on an old GPU) is left out.
    """
    gpu = device.type == "cuda"
    size = 2**30 if gpu else 2**26
    found = {"copy_gbs": 2 * size / measure({"copy": _copy(size, device)}, device, budget)["copy"].median / 1e3}
    n = 8192 if gpu else 512
    for unit in ("fp8", "bf16", "float32") if gpu else ("float32",):
        try:
            seconds = measure({unit: _product(unit, n, device)}, device, budget)[unit].median * 1e-6
        except RuntimeError:
            continue
        found[f"{unit}_tflops"] = 2 * n**3 / seconds / 1e12
    return found


def _copy(size: int, device: torch.device) -> Any:
    a, b = torch.ones(size, dtype=torch.uint8, device=device), torch.empty(size, dtype=torch.uint8, device=device)
    return lambda: b.copy_(a)


def _product(unit: str, n: int, device: torch.device) -> Any:
    x, y = (torch.randn(n, n, device=device) for _ in range(2))
    if unit == "fp8":
        one = torch.ones((), device=device)
        q, w = x.to(torch.float8_e4m3fn), y.to(torch.float8_e4m3fn).t()
        return lambda: torch._scaled_mm(q, w, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    if unit == "bf16":
        x, y = x.bfloat16(), y.bfloat16()
    return lambda: x @ y
