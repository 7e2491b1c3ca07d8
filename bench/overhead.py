"""What the host costs: import, a launch, a whole op, the build. No GPU: launches go to a driver that does nothing.

`python -m bench.overhead OP` prints the launch figures of one op as JSON; it must run in a process of its own, with
DSV3_KERNELS_DRIVER naming the null driver from the start.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv3_kernels import backends
from dsv3_kernels._library import NAMESPACE, OPS

from .machine import ROOT

NULL_DRIVER = ROOT / "build" / "null_driver.so"


class Unavailable(Exception):
    """What a probe lacks on this machine."""


def probes(quick: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """{name: measurement}; each returns figures with their units in their names."""
    found: dict[str, Callable[[], dict[str, Any]]] = {"import": import_time}
    found |= {f"launch {op}": functools.partial(launch_time, op) for op, row in OPS.items() if row.cuda and row.out}
    return found if quick else found | {"build": build_time}


def import_time(rounds: int = 7) -> dict[str, Any]:
    """Processor seconds that `import dsv3_kernels` adds to a bare Python; the least of several."""

    def processor() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def once(code: str) -> float:
        before = processor()
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
        return processor() - before

    def least(code: str) -> float:
        return min(once(code) for _ in range(rounds))

    bare = least("pass")
    return {"import_s": max(0.0, least("import dsv3_kernels") - bare), "bare_python_s": bare}


def launch_time(op: str) -> dict[str, Any]:
    """Microseconds of the C++ launcher alone and of the whole op with given outputs, in a process of its own."""
    if not NULL_DRIVER.exists():
        raise Unavailable("no build/null_driver.so: python -m build_backend --null-driver")
    environment = os.environ | {"DSV3_KERNELS_DRIVER": str(NULL_DRIVER)}
    command = [sys.executable, "-m", "bench.overhead", op]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"bench.overhead {op} failed: {done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def measure_launch(op: str) -> dict[str, Any]:
    """Times of the op's smallest benchmark on CPU tensors, by the way of CUDA tensors, into a driver that does nothing.

    "launcher": the C++ launcher, called from Python. "op": the out variant as torch calls it, the choice of the backend
    included. "public": the public function, which checks its arguments first.
    """
    import torch

    import dsv3_kernels as dk

    from .cases import collect
    from .timing import host_time

    cases = [case for case in collect([OPS[op].family]) if case.op == op and "cpu" in case.devices]
    if not cases:
        raise SystemExit(f"{op} has no benchmark that runs on a CPU")
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    with dk.backend("eager"):
        inputs = cases[0].make(torch.device("cpu"))
    take_cpu_for_hopper()
    with dk.backend("cuda"):
        launcher, operator = captured(op, lambda: cases[0].run(*inputs))
        found: dict[str, Any] = {"op": op, "shape": cases[0].shape}
        calls = {"launcher": launcher, "op": operator, "public": lambda: cases[0].run(*inputs)}
        for name, call in calls.items():
            taken = host_time(call)
            found |= {f"{name}_us": taken.us, f"{name}_empty_calls": taken.empty_calls}
        return found


def take_cpu_for_hopper() -> None:
    """Let the choice of a backend look at a CPU tensor as it looks at one on a Hopper GPU, question by question."""

    @functools.cache
    def capability(device: Any) -> tuple[int, int]:
        return (9, 0)

    def missing(device: Any) -> str | None:
        return backends._host_missing() or (None if capability(device) == (9, 0) else str(device))

    backends._cuda_missing = missing


def captured(op: str, call: Callable[[], Any]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The calls of the C++ launcher and of torch's out variant that `call()` comes down to, each by itself."""
    from torch.utils._python_dispatch import TorchDispatchMode

    host = importlib.import_module(f"{NAMESPACE}._host")
    launcher, launches, operators = getattr(host, op), [], []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.namespace == NAMESPACE:
                operators.append(functools.partial(function, *args))
            return function(*args, **(kwargs or {}))

    def record(*args: Any) -> None:
        launches.append(functools.partial(launcher, *args))
        launcher(*args)

    setattr(host, op, record)
    try:
        with Record():
            call()
    finally:
        setattr(host, op, launcher)
    return launches[0], operators[0]


def build_time() -> dict[str, Any]:
    """Seconds to build everything native from nothing, in a copy of the source."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("csrc", "build_backend"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "ptxsim"))
        (copy / NAMESPACE).mkdir()
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "build_backend"], cwd=copy, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        if done.returncode:
            raise RuntimeError(f"python -m build_backend failed: {done.stderr[-2000:]}")
        images = json.loads((copy / NAMESPACE / "images" / "manifest.json").read_text())["images"]
        return {"build_s": seconds, "images": len(images), "host_module": any((copy / NAMESPACE).glob("_host*.so"))}


if __name__ == "__main__":
    print(json.dumps(measure_launch(sys.argv[1])))
