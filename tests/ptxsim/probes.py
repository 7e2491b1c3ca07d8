"""Small programs whose answers the simulator and a GPU must share, bit for bit, or within the tensor core's rounding.

    python tests/ptxsim/probes.py [--driver libcuda.so.1] [--out FILE.jsonl] [--write]

runs each probe through the CUDA driver functions of that library (a GPU's, or build/ptxsim/libptxsim.so), compares it
with its model in numpy (the direct tests of the simulator are the probes) and its bits with `probes.json`, the
simulator's answers, which `--write` renews. One JSON line per probe; exit status 1 if one disagrees.

    python tests/ptxsim/probes.py --fixture FILE.jsonl

makes `hardware/<gpu>.json` of what a GPU answered: a fixture that the tests compare the simulator with from then on.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import datetime
import hashlib
import json
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import simulator
import test_hopper
import test_instructions
import test_memory
import test_mma
import test_warp
import torch
from simulator import HEADER, SimError

ANSWERS = Path(__file__).with_name("probes.json")
HARDWARE = Path(__file__).with_name("hardware")
# Where the ISA leaves bits open, answers up to this size are kept whole, to be put through the model again.
KEPT_BYTES = 1 << 14


class Device:
    """A CUDA driver library with the interface of `simulator.Simulator`. Arrays go to device memory and back."""

    def __init__(self, path: str):
        self.lib = ctypes.CDLL(path)
        self.texts: set[str] = set()
        self.start()
        context = ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self.call("cuCtxSetCurrent", context)

    def start(self) -> None:
        """Before a probe: nothing has gone in or come out. A simulator is to add as a GPU does."""
        if hasattr(self.lib, "dsv3SimSetOption"):
            self.call("dsv3SimSetOption", b"rounding", b"hardware")
        self.inputs, self.outputs = hashlib.sha256(), hashlib.sha256()
        self.written: list[bytes | None] = []  # arrays after each launch; None: as they were before

    def machine(self) -> dict[str, str]:
        name, version = ctypes.create_string_buffer(256), ctypes.c_int()
        self.call("cuDeviceGetName", name, 256, 0)
        self.call("cuDriverGetVersion", ctypes.byref(version))
        loaded = Path("/proc/driver/nvidia/version")
        driver = loaded.read_text().splitlines()[0] if loaded.exists() else ""
        cuda = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
        return {"gpu": name.value.decode(), "driver": f"{cuda} {driver}".strip(), "date": str(datetime.date.today())}

    def call(self, name: str, *args: Any) -> None:
        code = getattr(self.lib, name)(*args)
        if code:
            text = ctypes.c_char_p()
            self.lib.cuGetErrorString(code, ctypes.byref(text))
            raise SimError(code, f"{name}: {(text.value or b'').decode()}")

    def option(self, **values: object) -> None:
        """A GPU has no schedules to choose from."""

    def run(self, body: str, *args: Any, **launch: Any) -> None:
        self.load(body if ".version" in body else HEADER + body).launch(*args, **launch)

    def load(self, ptx: str, name: str | None = None) -> simulator.Kernel:
        self.texts.add(ptx)
        return Kernel(self, ptx, name)


class Kernel(simulator.Kernel):
    def launch(self, *args, grid=1, block=32, shared=0, cluster=None, buffers=(), declare=True) -> None:
        device = self.sim
        arrays = {a.ctypes.data: a for a in args if isinstance(a, np.ndarray)} | {a.ctypes.data: a for a, _ in buffers}
        written = [a for a in args if isinstance(a, np.ndarray)] + [a for a, access in buffers if access & 2]
        at: dict[int, int] = {}
        for address, a in arrays.items():
            pointer = ctypes.c_uint64()
            device.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(16, simulator._span(a))))
            self._copy("cuMemcpyHtoD_v2", pointer, ctypes.c_void_p(address), a)
            at[address] = pointer.value
            device.inputs.update(np.ascontiguousarray(a).tobytes())
        moved = []
        for a in args:
            if isinstance(a, np.ndarray):
                a = np.uint64(at[a.ctypes.data])
            elif isinstance(a, simulator.TensorMap):
                a = a.over(device, at[a.address])
            moved.append(a)
        try:
            super().launch(*moved, grid=grid, block=block, shared=shared, cluster=cluster, declare=False)
            device.call("cuCtxSynchronize")
            for a in written:
                before = np.ascontiguousarray(a).tobytes()
                self._copy("cuMemcpyDtoH_v2", ctypes.c_void_p(a.ctypes.data), ctypes.c_uint64(at[a.ctypes.data]), a)
                after = np.ascontiguousarray(a).tobytes()
                device.outputs.update(after)
                device.written.append(after if after != before else None)
        finally:
            for pointer in at.values():
                device.call("cuMemFree_v2", ctypes.c_uint64(pointer))

    def _copy(self, name: str, to: object, start: object, a: np.ndarray) -> None:
        if a.nbytes:
            self.sim.call(name, to, start, ctypes.c_size_t(simulator._span(a)))


def packed(answer: bytes) -> str:
    return base64.b64encode(zlib.compress(answer, 9)).decode()


def unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


class Replay(Device):
    """Answers that were recorded, instead of a run: what a probe's model says of them."""

    def __init__(self, path: str, values: list[str | None]):
        super().__init__(path)
        self.values = iter(values)

    def load(self, ptx: str, name: str | None = None) -> Any:
        return self

    def launch(self, *args: Any, buffers: Any = (), **launch: Any) -> None:
        for a in [a for a in args if isinstance(a, np.ndarray)] + [a for a, access in buffers if access & 2]:
            if (value := next(self.values)) is not None:
                a[...] = np.frombuffer(unpacked(value), a.dtype).reshape(a.shape)


# The fp8 tensor core of sm_90 aligns the 33 addends of a k-step to the largest and keeps 14 bits.
FP8 = 33 * 2.0**-13


def wgmma_precision(device) -> None:
    """How e4m3 products are added up: one large addend, and small ones that an aligned sum of few bits would drop."""
    for exponent in range(0, 15, 2):
        a, b = torch.full((64, 32), 2.0**-6), torch.ones(8, 32)
        a[:, 0], b[:, 0] = 2.0 ** (exponent // 2), 2.0 ** (exponent - exponent // 2)
        fp8 = torch.float8_e4m3fn
        test_hopper.wgmma(device, "e4m3", 8, operands=(a.to(fp8), b.to(fp8)), loose=FP8)


def approximations(device) -> None:
    """Every approximation within the error that the PTX ISA allows it."""
    x = np.concatenate([test_instructions.RNG.uniform(0.01, 100, 500), test_instructions.RNG.uniform(0.5, 2, 500)])
    x = x.astype(np.float32)
    for op, exact, bound in (
        ("ex2.approx.ftz", np.exp2(x.astype(np.float64) - 50), 2**-22),
        ("rcp.approx.ftz", 1 / x.astype(np.float64), 2**-23),
        ("rsqrt.approx", 1 / np.sqrt(x.astype(np.float64)), 2**-22.9),
        ("sqrt.approx", np.sqrt(x.astype(np.float64)), 2**-22),
        ("tanh.approx", np.tanh(x.astype(np.float64)), 2**-11),
    ):
        inputs = (x.astype(np.float64) - 50).astype(np.float32) if op.startswith("ex2") else x
        exact = np.exp2(inputs.astype(np.float64)) if op.startswith("ex2") else exact
        got = test_instructions.run(device, f"{op}.f32 {{d}}, {{a}};", inputs, out=np.float32)
        assert np.abs(got / exact - 1).max() <= bound * 1.01, op


def probes() -> dict[str, tuple[Callable[[Any], None], bool]]:
    """Name -> what runs it on a device and compares it with its model, and whether its bits are defined."""
    found: dict[str, tuple[Callable[[Any], None], bool]] = {}

    def add(name: str, f: Callable[..., Any], *args: Any, exact: bool = True, **named: Any) -> None:
        found[name] = (lambda device: f(device, *args, **named), exact)

    hopper, lanes, warp, memory = test_hopper, test_instructions, test_warp, test_memory
    for mode in (0, 32, 64, 128):
        for kind in hopper.ELEMENT:
            add(f"TMA load, edges, swizzle {mode}, {kind}", hopper.test_tensor_load_swizzled, kind, mode, "early")
    for rank in range(1, 6):
        add(f"TMA load, rank {rank}", hopper.test_tensor_load_ranks_and_edges, rank)
    add("TMA load, NaN fill and element strides", hopper.test_tensor_load_nan_fill_and_element_strides)
    add("TMA multicast", hopper.test_multicast, "early")
    for kind in hopper.TYPES:
        exact, loose = kind == "s8", FP8 if kind in ("e4m3", "e5m2") else 0.0
        for mode in hopper.MODES:
            add(f"wgmma {kind}, K-major, swizzle {mode}", hopper.wgmma, kind, 32, mode, exact=exact, loose=loose)
        add(f"wgmma {kind}, A in registers", hopper.wgmma, kind, 64, registers=True, exact=exact, loose=loose)
    for kind in ("bf16", "f16"):
        for mode in hopper.MODES:
            for trans in ((True, False), (False, True), (True, True)):
                names = "A" * trans[0] + "B" * trans[1]
                add(
                    f"wgmma {kind}, {names} MN-major, swizzle {mode}", hopper.wgmma, kind, 128, mode, trans, exact=False
                )
    add("wgmma e4m3, n 256", hopper.wgmma, "e4m3", 256, exact=False, loose=FP8)
    add("wgmma bf16, negated and accumulated", hopper.wgmma, "bf16", 16, scale=(-1, 1), accumulate=True, exact=False)
    add("wgmma f16 accumulators", hopper.wgmma, "f16", 24, half=True, accumulate=True, exact=False)
    add("wgmma e4m3, small addends beside a large one", wgmma_precision, exact=False)
    for case in test_mma.CASES:
        loose = FP8 if case[2] in ("e4m3", "e5m2") else 0.0
        add("mma.sync " + " ".join(map(str, case)), test_mma.check_mma, *case, exact=case[0] == "s32", loose=loose)
    for trans in (False, True):
        add(f"ldmatrix, stmatrix{', transposed' * trans}", hopper.test_ldmatrix_stmatrix, trans)
    add("movmatrix", warp.test_movmatrix)
    add("mbarrier phases", hopper.test_mbarrier_phases)
    add("setmaxnreg", warp.setmaxnreg, 232, 40)
    for kind, dtype, largest in (("e4m3", torch.float8_e4m3fn, 0x7E), ("e5m2", torch.float8_e5m2, 0x7B)):
        for source in ("f32", "f16x2"):
            add(f"{source} to {kind}, saturating", lanes.test_float_to_fp8, kind, dtype, largest, source)
        add(f"{kind} to f16, every code", lanes.test_fp8_to_half_all_codes, kind, dtype)
    for kind in lanes.HALF:
        add(f"f32 to {kind}", lanes.test_float_to_half, kind, False)
        add(f"{kind} to f32, every code", lanes.test_half_to_float_all_codes, kind)
    add("f32 to tf32", lanes.test_tf32)
    add("float to integer", lanes.test_float_to_int)
    for dtype in (np.float32, np.float64):
        add(f"classes and signs of {dtype.__name__}", lanes.test_float_classes_and_signs, dtype)
    add("rare integer instructions", lanes.test_rare_integer_instructions)
    add("bit manipulation", lanes.test_bit_manipulation)
    add("approximations", approximations, exact=False)
    add("redux", warp.test_redux)
    add("elect, activemask", warp.test_elect_and_activemask)
    for bits in (32, 64):
        add(f"match, {bits} bits", warp.test_match, bits)
    for mode in ("up", "down", "bfly", "idx"):
        add(f"shfl {mode}, segments of 8", warp.test_shfl, mode, 8)
    add("vote", warp.test_vote, True)
    for kind in ("bar", "barrier"):
        add(f"{kind}.red", warp.test_barrier_reductions, kind)
    for form in memory.STORES:
        add(f"st.async.{form.split()[0]}", memory.st_async, form)
    for op in ("add.u32", "min.u32", "max.s32", "inc.u32", "dec.u32", "xor.b32"):
        add(f"red.async.{op}", memory.test_red_async, op, "early")
    add("mapa, getctarank, isspacep", memory.test_addresses_in_a_cluster)
    for op in ("add.noftz.f16x2", "add.noftz.v4.f16x2", "add.v4.f32"):
        add(f"red.{op}", memory.test_float_atomics, op, exact=False)  # lanes come in any order
    return found


def verdict(probe: Callable[[Any], None], device: Device) -> str:
    """ "agrees", or how the answers differ from the model's."""
    for module in (test_hopper, test_instructions, test_memory, test_mma, test_warp):
        module.RNG = np.random.default_rng(11)
    device.start()
    try:
        probe(device)
    except (AssertionError, SimError) as error:
        return (str(error).splitlines() or ["disagrees"])[0]
    return "agrees"


def run(device: Device, answers: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each probe gave: agreement with its model, digests, and whether the bits are those of `answers`."""
    for name, (probe, exact) in probes().items():
        started = time.perf_counter()
        result = {"model": verdict(probe, device), "exact": exact, "seconds": round(time.perf_counter() - started, 3)}
        result |= {
            "inputs": device.inputs.hexdigest()[:16],
            "answer": device.outputs.hexdigest()[:16],
        }
        if not exact and sum(len(w or b"") for w in device.written) <= KEPT_BYTES:
            result["values"] = [packed(w) if w is not None else None for w in device.written]
        known = answers.get(name)
        # Another numpy may draw other inputs; then the model alone speaks.
        result["bits"] = known["answer"] == result["answer"] if known and known["inputs"] == result["inputs"] else None
        yield name, result


# ---- answers of hardware


def fixture(lines: Path, folder: Path = HARDWARE) -> Path:
    """Writes what a GPU answered, one JSON line per probe with the machine's before them, as a file of `folder`."""
    machine, cases = None, {}
    for row in map(json.loads, lines.read_text().splitlines()):
        machine = row if "gpu" in row else machine
        if "probe" in row:
            cases[row["probe"]] = {k: row[k] for k in ("model", "exact", "inputs", "answer", "values") if k in row}
    if machine is None or not cases:
        raise ValueError(f"{lines} does not say which machine answered what")
    if "simulator" in machine["gpu"].lower() and folder == HARDWARE:
        raise ValueError("these are the simulator's answers, not a GPU's")
    folder.mkdir(exist_ok=True)
    path = folder / (re.sub(r"\W+", "_", machine["gpu"].lower()).strip("_") + ".json")
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
    path.write_text(f'{{"machine": {json.dumps(machine)},\n"cases": {{\n{rows}\n}}}}\n')
    return path


def contradictions(path: Path, results: dict[str, Any]) -> tuple[dict[str, str], int]:
    """Where a fixture contradicts what the simulator answers now, and how many of its cases could be compared: bit for
    bit where the ISA defines the bits, by the probe's own bound elsewhere."""
    wrong, compared, known = {}, 0, probes()
    for name, hardware in json.loads(path.read_text())["cases"].items():
        now = results.get(name)
        if now is None:
            wrong[name] = "there is no such probe any more"
        elif hardware["model"] != "agrees":
            wrong[name] = f"the hardware's answer: {hardware['model']}"
        elif now["inputs"] == hardware["inputs"]:  # another numpy may draw others
            compared += 1
            if now["answer"] == hardware["answer"]:
                continue
            if hardware["exact"]:
                wrong[name] = f"hardware answered {hardware['answer']}, the simulator {now['answer']}"
            elif "values" in hardware:
                said = verdict(known[name][0], Replay(str(simulator.LIBRARY), hardware["values"]))
                if said != "agrees":
                    wrong[name] = f"the hardware's answer: {said}"
    return wrong, compared


def disagrees(result: dict[str, Any]) -> bool:
    return result["model"] != "agrees" or (result["exact"] and result["bits"] is False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--driver", default="libcuda.so.1")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--fixture", type=Path)
    options = parser.parse_args()
    if options.fixture:
        print(fixture(options.fixture))
        return 0
    device = Device(options.driver)
    if options.out:
        with options.out.open("a") as file:
            file.write(json.dumps(device.machine()) + "\n")
    answers = json.loads(ANSWERS.read_text()) if ANSWERS.exists() else {}
    results = {}
    for name, result in run(device, answers):
        results[name] = result
        if options.out:
            with options.out.open("a") as file:  # at once: a probe may hang
                file.write(json.dumps({"probe": name, **result}) + "\n")
        if disagrees(result):
            print(f"{name}: {result['model'] if result['model'] != 'agrees' else 'other bits than the simulator'}")
    if options.write:
        lines = (f"{json.dumps(n)}: {json.dumps({k: r[k] for k in ('inputs', 'answer')})}" for n, r in results.items())
        ANSWERS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    wrong = sum(map(disagrees, results.values()))
    inexact = [r["bits"] for r in results.values() if not r["exact"]]
    print(
        f"{len(results) - wrong} of {len(results)} probes agree; of {len(inexact)} whose bits the ISA leaves open, ",
        end="",
    )
    print(f"{sum(map(bool, inexact))} have the simulator's")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
