"""Small programs whose answers the simulator and a GPU must share, bit for bit, or within the tensor core's rounding.

    python tests/ptxsim/probes.py [--driver libcuda.so.1] [--out FILE.jsonl] [--write]

runs each probe through the CUDA driver functions of that library (a GPU's, or build/ptxsim/libptxsim.so), compares it
with its model in numpy (the direct tests of the simulator are the probes) and its bits with `probes.json`, the
simulator's answers, which `--write` renews. One JSON line per probe; exit status 1 if one disagrees.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import sys
import time
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


class Device:
    """A CUDA driver library with the interface of `simulator.Simulator`. Arrays go to device memory and back."""

    def __init__(self, path: str):
        self.lib = ctypes.CDLL(path)
        self.inputs, self.outputs = hashlib.sha256(), hashlib.sha256()
        self.texts: set[str] = set()
        context = ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self.call("cuCtxSetCurrent", context)

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
                self._copy("cuMemcpyDtoH_v2", ctypes.c_void_p(a.ctypes.data), ctypes.c_uint64(at[a.ctypes.data]), a)
                device.outputs.update(np.ascontiguousarray(a).tobytes())
        finally:
            for pointer in at.values():
                device.call("cuMemFree_v2", ctypes.c_uint64(pointer))

    def _copy(self, name: str, to: object, start: object, a: np.ndarray) -> None:
        if a.nbytes:
            self.sim.call(name, to, start, ctypes.c_size_t(simulator._span(a)))


# The fp8 tensor core of sm_90 is reported to align the 33 addends of a k-step to the largest and to keep 14 bits.
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


def run(device: Device, answers: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each probe gave: agreement with its model, digests, and whether the bits are those of `answers`."""
    for name, (probe, exact) in probes().items():
        for module in (test_hopper, test_instructions, test_memory, test_mma, test_warp):
            module.RNG = np.random.default_rng(11)
        device.inputs, device.outputs = hashlib.sha256(), hashlib.sha256()
        started, model = time.perf_counter(), "agrees"
        try:
            probe(device)
        except (AssertionError, SimError) as error:
            model = (str(error).splitlines() or ["disagrees"])[0]
        result = {"model": model, "exact": exact, "seconds": round(time.perf_counter() - started, 3)}
        result |= {"inputs": device.inputs.hexdigest()[:16], "answer": device.outputs.hexdigest()[:16]}
        known = answers.get(name)
        # Another numpy may draw other inputs; then the model alone speaks.
        result["bits"] = known["answer"] == result["answer"] if known and known["inputs"] == result["inputs"] else None
        yield name, result


def disagrees(result: dict[str, Any]) -> bool:
    return result["model"] != "agrees" or (result["exact"] and result["bits"] is False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--driver", default="libcuda.so.1")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    answers = json.loads(ANSWERS.read_text()) if ANSWERS.exists() else {}
    results = {}
    for name, result in run(Device(options.driver), answers):
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
