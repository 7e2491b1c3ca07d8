"""`dsv3 info`: what this machine has, and which backend every op takes and why. Works without torch."""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

from .. import __version__, _simulator, backends, env
from .._library import NAMESPACE, OPS
from .console import Console

HELP = "what this machine has: versions, driver, GPUs, images, and the backend of every op with its reason"
PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "rich", "transformers", "matplotlib")
REQUIRED = ("torch", "numpy", "safetensors", "tokenizers", "rich")
KERNELS = ("cuda", "triton", "sim:cuda", "sim:triton")
MIN_DRIVER = 580  # the first that loads images of CUDA 13
MIN_CUDA = 13000
IMAGES = Path(__file__).resolve().parent.parent / "images"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Exit code 0, or 1 when something that ought to work here does not: the listed problems."""
    facts = collect()
    if options.json:
        print(json.dumps(facts, indent=1))
    else:
        show(facts, Console())
    return 1 if facts["problems"] else 0


def collect() -> dict[str, Any]:
    """Everything `dsv3 info` says, as plain data. Each probe stands alone: what one lacks, the others still tell."""
    facts: dict[str, Any] = {
        "dsv3_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "torch": _torch(),
        "driver": _driver(),
        "images": _images(),
        "host": _host(),
        "simulator": {"available": (why := _simulator.missing()) is None, "why_not": why},
        "environment": {name: os.environ.get(name) for name in env.VARIABLES},
    }
    facts["ops"] = _ops(facts)
    facts["problems"] = _problems(facts)
    return facts


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> dict[str, Any]:
    try:
        import torch
    except Exception as error:  # a torch that is there but broken raises anything, OSError for one
        return {"available": False, "why_not": _words(error)}
    facts: dict[str, Any] = {"available": True, "version": torch.__version__, "cuda": torch.version.cuda, "gpus": []}
    try:
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            facts["gpus"].append({"name": torch.cuda.get_device_name(index), "capability": f"{major}.{minor}"})
    except Exception as error:
        facts["gpu_error"] = _words(error)
    return facts


def _driver() -> dict[str, Any]:
    """The NVIDIA driver and its GPUs, asked of libcuda itself, so that a CPU build of torch hides nothing."""
    facts: dict[str, Any] = {"available": False, "version": _driver_version(), "cuda": None, "gpus": []}
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return facts | {"why_not": "no libcuda.so.1: no NVIDIA driver"}
    number = ctypes.c_int()
    if status := cuda.cuDriverGetVersion(ctypes.byref(number)):
        return facts | {"why_not": f"cuDriverGetVersion failed ({status})"}
    facts |= {"available": True, "cuda": number.value}
    if status := cuda.cuInit(0):
        return facts | {"why_not": f"cuInit failed ({status}): the driver finds no GPU"}
    cuda.cuDeviceGetCount(ctypes.byref(number))
    for index in range(number.value):
        device, name, size = ctypes.c_int(), ctypes.create_string_buffer(128), ctypes.c_size_t()
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetName(name, len(name), device)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        capability = []
        for attribute in (75, 76):  # compute capability, major and minor
            value = ctypes.c_int()
            cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            capability.append(str(value.value))
        gpu = {
            "name": name.value.decode(),
            "capability": ".".join(capability),
            "memory_gib": round(size.value / 2**30, 1),
        }
        facts["gpus"].append(gpu)
    return facts


def _driver_version() -> str | None:
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split("\n", 1)[0].split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdigit() and "." in word), None)


def _images() -> dict[str, Any]:
    """The built CUDA images: which are here and whole, which are missing and why."""
    try:
        manifest = json.loads((IMAGES / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        return {
            "available": False,
            "why_not": f"no manifest of images ({_words(error)})",
            "images": {},
            "missing": {},
            "damaged": [],
        }
    images = {
        name: {"nvcc": entry["nvcc"], "kernels": sorted(entry["kernels"])} for name, entry in manifest["images"].items()
    }
    damaged = [
        f"{name}.{kind}"
        for name, entry in manifest["images"].items()
        for kind in ("ptx", "cubin")
        if _sha256(IMAGES / f"{name}.{kind}") != entry[f"{kind}_hash"]
    ]
    missing = manifest.get("missing", {})
    why = None if images else next(iter(missing.values()), "no kernels to build")
    return {
        "available": bool(images),
        "why_not": why,
        "arch": manifest.get("arch"),
        "images": images,
        "missing": missing,
        "damaged": damaged,
        "host_note": manifest.get("host", ""),
    }


def _sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _host() -> dict[str, Any]:
    try:
        host = importlib.import_module(f"{NAMESPACE}._host")
        return {"available": True, "why_not": None, "kernels": list(host.kernels())}
    except Exception as error:
        return {"available": False, "why_not": _words(error), "kernels": []}


def _ops(facts: dict[str, Any]) -> dict[str, Any]:
    """{op: {device: {"backend", "reason", "not"}}} for CPU tensors and, where torch sees one, the first GPU's."""
    if not facts["torch"]["available"]:
        return {op: {} for op in OPS}
    import torch

    devices = [torch.device("cpu")] + ([torch.device("cuda", 0)] if facts["torch"]["gpus"] else [])
    return {op: {device.type: _choice(op, device) for device in devices} for op in OPS}


def _choice(op: str, device: Any) -> dict[str, Any]:
    lacking = {name: why for name in KERNELS if (why := backends.missing(op, name, device)) is not None}
    try:
        name, reason, _ = backends._choose(op, (), device)
    except (RuntimeError, ValueError) as error:  # forced, and it cannot serve
        return {"backend": None, "reason": _words(error), "not": lacking}
    return {"backend": name, "reason": reason, "not": lacking}


def _problems(facts: dict[str, Any]) -> list[str]:
    """What ought to work on this machine and does not."""
    found = []
    if not facts["torch"]["available"]:
        found.append(f"torch cannot be imported: {facts['torch']['why_not']}")
    found += [f"{name} is not installed" for name in REQUIRED if name != "torch" and facts["packages"][name] is None]
    found += [f"image {name} is damaged: build it again" for name in facts["images"]["damaged"]]
    if facts["images"]["available"] and not facts["host"]["available"]:
        found.append(f"there are images but no native module: {facts['host']['why_not']}")
    hopper = [gpu["name"] for gpu in facts["driver"]["gpus"] if gpu["capability"] == "9.0"]
    if hopper:
        if facts["driver"]["cuda"] < MIN_CUDA:
            found.append(f"{hopper[0]}: driver {facts['driver']['version']}, the images need {MIN_DRIVER} or newer")
        if not facts["images"]["available"]:
            found.append(f"{hopper[0]}: no CUDA images: {facts['images']['why_not']}")
        if facts["torch"]["available"] and not facts["torch"]["gpus"]:
            found.append(f"{hopper[0]}: this torch does not see it (a CPU build, or CUDA_VISIBLE_DEVICES)")
    for op, devices in facts["ops"].items():
        found += [f"{op} on {device}: {said['reason']}" for device, said in devices.items() if said["backend"] is None]
    return found


def _words(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def show(facts: dict[str, Any], console: Console) -> None:
    """The same facts for a reader."""
    torch, driver, images, host = (facts[name] for name in ("torch", "driver", "images", "host"))
    packages = [f"{name} {version}" for name, version in facts["packages"].items() if version and name != "torch"]
    cuda = f"CUDA {torch.get('cuda')}" if torch.get("cuda") else "CPU build"
    nvcc = ", ".join(sorted({entry["nvcc"] for entry in images["images"].values()}))
    rows = [
        ["dsv3_kernels", facts["dsv3_kernels"]],
        ["python", f"{facts['python']} on {facts['platform']}"],
        ["torch", torch.get("why_not") or f"{torch['version']} ({cuda})"],
        ["packages", ", ".join(packages)],
        ["driver", driver.get("why_not") or f"{driver['version'] or 'NVIDIA'} (CUDA {_dotted(driver['cuda'])})"],
    ]
    for index, gpu in enumerate(driver["gpus"]):
        rows.append([f"GPU {index}", f"{gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['capability']}"])
    rows.append(
        [
            "images",
            images["why_not"] or f"{len(images['images'])} for {images['arch']} (nvcc {nvcc}, driver >= {MIN_DRIVER})",
        ]
    )
    rows += [[f"  not {name}", why] for name, why in images["missing"].items()]
    rows.append(["native module", host["why_not"] or f"{len(host['kernels'])} kernels"])
    rows.append(["simulator", facts["simulator"]["why_not"] or "built"])
    console.table(("what", "found"), rows)
    console.heading("Backend of each op")
    _show_ops(facts["ops"], console)
    console.heading("Environment")
    console.table(
        ("variable", "value", "meaning"), [[n, v or "", env.VARIABLES[n]] for n, v in facts["environment"].items()]
    )
    if facts["problems"]:
        console.heading("Problems")
        for problem in facts["problems"]:
            console.line(f"- {problem}")


def _show_ops(ops: dict[str, Any], console: Console) -> None:
    """A row per op and device; the reasons why backends are out of reach, numbered and said once."""
    reasons: dict[str, int] = {}
    rows = []
    for op, said in ops.items():
        for device, choice in said.items():
            able = [name for name in KERNELS if name not in choice["not"] and name != choice["backend"]]
            marks = [f"{name} [{reasons.setdefault(why, len(reasons) + 1)}]" for name, why in choice["not"].items()]
            rows.append([op, device, choice["backend"] or "FAIL", choice["reason"], ", ".join(able), ", ".join(marks)])
    if not rows:
        console.line(f"{len(ops)} ops; none can run without torch")
        return
    console.table(("op", "tensors", "backend", "why", "also here", "not here"), rows)
    for why, number in reasons.items():
        console.line(f"[{number}] {why}")


def _dotted(version: int | None) -> str:
    return f"{version // 1000}.{version % 1000 // 10}" if version else "unknown"
