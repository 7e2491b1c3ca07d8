"""Every op against float64, on every backend that is here: what `dsv3 validate` runs.

A case makes inputs, runs a public function and says in float64 what must come out: the very bits where the op is
exact, else a bound for each element that follows from the number formats and the length of the sums. The
references share no code with the implementations. Shapes are small enough for the simulator.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _simulator, backends
from .._library import OPS

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float8_e4m3fn: 2.0**-4}
E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Bits:
    """An output that must come out bit for bit."""

    value: Tensor


@dataclass(frozen=True)
class Near:
    """An output that must be within `bound` (an element each, or one for all) of the float64 `value`."""

    value: Tensor
    bound: Tensor


@dataclass(frozen=True)
class Problem:
    """One run of an op: `run` gives named outputs, `wanted` says what each must be."""

    shape: str
    run: Callable[[], dict[str, Tensor]]
    wanted: Mapping[str, Bits | Near]


@dataclass(frozen=True)
class Inputs:
    """Where a case's tensors live and which backend runs it; random numbers are the same on every device."""

    device: torch.device
    backend: str
    generator: torch.Generator

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal values, rounded to `dtype`."""
        return torch.randn(shape, generator=self.generator).to(dtype).to(self.device)

    def spread(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal values whose rows differ in size by orders of magnitude."""
        size = torch.exp(2 * torch.randn((*shape[:-1], 1), generator=self.generator))
        return (torch.randn(shape, generator=self.generator) * size).to(dtype).to(self.device)

    def randint(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)

    def ints(self, *values: int) -> Tensor:
        """int32 values on the device."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def dot(self, magnitudes: Tensor, terms: int, *, fp8: bool = False) -> Tensor:
        """Error bound of sums of `terms` products whose magnitudes add up to `magnitudes`, accumulated in float32.

        A GPU's FP8 tensor cores keep 13 fraction bits below an instruction's largest addend; kernels promote every 128
        terms.
        """
        on_tensor_cores = self.device.type == "cuda" or _simulator.adds_as_hardware()
        truncated = fp8 and self.backend != "eager" and on_tensor_cores
        return magnitudes * (summing(terms) + (2.0**-12 if truncated else 0.0))


def summing(terms: int) -> float:
    """Relative error of a float32 sum of so many terms, in any order: errors add up like a random walk, four sigmas."""
    return (8 + 4 * terms**0.5) * UNIT[torch.float32]


Make = Callable[[Inputs], Problem]


@dataclass(frozen=True)
class Case:
    """Makes a problem whose run calls all of `ops`; `title` is what a reader knows it by."""

    title: str
    ops: tuple[str, ...]
    make: Make

    @property
    def name(self) -> str:
        return self.make.__name__


@dataclass(frozen=True)
class Result:
    """What one case gave on one backend."""

    title: str
    ops: tuple[str, ...]
    case: str
    backend: str
    device: str
    shape: str
    absolute: float  # largest |got - wanted|
    relative: float  # |got - wanted| / |wanted| in the Euclidean norm, the worst output
    of_bound: float  # largest |got - wanted| / bound; 0 where bits were compared
    exact: bool  # all outputs were compared bit for bit
    seconds: float
    error: str | None

    @property
    def ok(self) -> bool:
        return self.error is None


def failure(title: str, ops: tuple[str, ...], backend: str, device: str, error: str) -> Result:
    """What could not even be run."""
    return Result(title, ops, "", backend, device, "", 0.0, 0.0, 0.0, False, 0.0, error)


CASES: list[Case] = []


def case(*ops: str, title: str = "") -> Callable[[Callable[[Inputs], Problem]], Callable[[Inputs], Problem]]:
    """Enter a function in the table of cases, with every op of the library that its run calls."""

    def enter(make: Make) -> Make:
        CASES.append(Case(title or " + ".join(ops), ops, make))
        return make

    return enter


def cases() -> list[Case]:
    """All cases, of all families."""
    from . import gemm, mla, moe, quant  # noqa: F401  (each enters its cases)

    return CASES


def places(ops: Iterable[str], wanted: Iterable[str] | None = None) -> Iterator[tuple[str, torch.device]]:
    """(backend, device) pairs that can run all of `ops` here; `wanted` limits the backends.

    Raises:
        RuntimeError: a backend in `wanted` that exists for these ops and cannot run here.
    """
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    pairs = [("eager", cpu), ("sim:cuda", cpu), ("sim:triton", cpu)]
    if torch.cuda.is_available():
        pairs += [("eager", gpu), ("triton", gpu), ("cuda", gpu)]
    for name, device in pairs:
        if wanted is not None and name not in wanted:
            continue
        if all(backends.missing(op, name, device) is None for op in ops):
            yield name, device


def validate(ops: Iterable[str] | None = None, names: Iterable[str] | None = None) -> Iterator[Result]:
    """Run the cases that touch one of `ops` (default: all), on the backends `names` (default: all that are here).

    An op without a case on a backend where it could run gives a failed result of its own.
    """
    wanted = set(OPS if ops is None else ops)
    names = None if names is None else list(names)
    covered: set[tuple[str, str, str]] = set()
    for entry in cases():
        if not wanted & {entry.title.partition(",")[0], *entry.ops}:
            continue
        if unknown := set(entry.ops) - set(OPS):
            words = f"not in _library.OPS: {', '.join(sorted(unknown))}"
            yield failure(entry.title, entry.ops, "", "", words)
            continue
        for name, device in places(entry.ops, names):
            covered |= {(op, name, device.type) for op in entry.ops}
            yield check(entry, name, device)
    for op in OPS:
        for name, device in places([op], names):
            if op in wanted and (op, name, device.type) not in covered:
                yield failure(op, (op,), name, device.type, "no validation case")


def check(entry: Case, name: str, device: torch.device) -> Result:
    """One case on one backend, run twice: right, the same bits again, and by a kernel where a kernel was asked for."""
    inputs = Inputs(device, name, torch.Generator().manual_seed(0))
    shape, seconds = "", 0.0
    worst: tuple[float, float, float] = (0.0, 0.0, 0.0)
    exact = False
    try:
        problem = entry.make(inputs)
        shape = problem.shape
        exact = all(isinstance(wanted, Bits) for wanted in problem.wanted.values())
        before = _launches(name)
        with backends.backend(name):
            first = _snapshot(problem.run())
            _synchronize(device)
            started = time.perf_counter()
            second = problem.run()
            _synchronize(device)
            seconds = time.perf_counter() - started
        worst, error = compare(first, problem.wanted)
        if error is None and (changed := [k for k in first if not _same_bits(first[k], second[k].cpu())]):
            error = f"{changed[0]}: a second run gave other bits"
        if error is None and name.endswith("cuda") and _launches(name) == before:
            error = "no kernel was launched"
    except Exception as raised:  # a case that raises has failed; the others still run
        error = f"{type(raised).__name__}: {' '.join(str(raised).split())}"
    return Result(entry.title, entry.ops, entry.name, name, device.type, shape, *worst, exact, seconds, error)


def compare(got: dict[str, Tensor], wanted: Mapping[str, Bits | Near]) -> tuple[tuple[float, float, float], str | None]:
    """((largest absolute error, largest relative error, largest share of the bound), what is wrong or None)."""
    if got.keys() != wanted.keys():
        return (0.0, 0.0, 0.0), f"outputs {sorted(got)}, wanted {sorted(wanted)}"
    worst, error = [0.0, 0.0, 0.0], None
    for name, target in wanted.items():
        figures, wrong = _compare_one(got[name], target)
        worst = [max(pair) for pair in zip(worst, figures, strict=True)]
        if wrong is not None and error is None:
            error = f"{name}: {wrong}"
    return (worst[0], worst[1], worst[2]), error


def _compare_one(got: Tensor, target: Bits | Near) -> tuple[tuple[float, float, float], str | None]:
    value = target.value.cpu()
    if got.shape != value.shape:
        return (0.0, 0.0, 0.0), f"shape {list(got.shape)}, wanted {list(value.shape)}"
    if isinstance(target, Bits) and got.dtype != value.dtype:
        return (0.0, 0.0, 0.0), f"dtype {got.dtype}, wanted {value.dtype}"
    a, b = got.double(), value.double()
    finite = b.isfinite()
    difference = torch.where(finite, (a - b).abs(), 0.0)  # NaN in `a` stays NaN, and fails below
    norm = b[finite].norm().item()
    absolute = difference.max().item() if difference.numel() else 0.0
    relative = difference.norm().item() / norm if norm else absolute
    if not torch.equal(a[~finite].nan_to_num(nan=7.0), b[~finite].nan_to_num(nan=7.0)):
        return (absolute, relative, float("inf")), "other infinities or NaNs than wanted"
    if isinstance(target, Bits):
        same = _same_bits(got, value)
        return (
            absolute,
            relative,
            0.0,
        ), None if same else f"{_different_bits(got, value)} of {value.numel()} elements differ"
    bound = target.bound.cpu().double().expand(b.shape)
    excess = ~(difference <= bound) & finite
    share = torch.where(difference > 0, difference / bound, 0.0)
    worst = share.max().item() if share.numel() else 0.0
    if excess.any():
        where = tuple(int(i) for i in torch.unravel_index(share.nan_to_num(nan=torch.inf).argmax(), share.shape))
        words = f"{int(excess.sum())} of {b.numel()} elements off; worst at {where}: got {a[where]:.6g}, "
        return (absolute, relative, worst), words + f"wanted {b[where]:.6g} within {bound[where]:.2g}"
    return (absolute, relative, worst), None


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8).view(-1, tensor.element_size())


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _different_bits(a: Tensor, b: Tensor) -> int:
    return int((_bytes(a) != _bytes(b)).any(1).sum())


def _snapshot(outputs: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in outputs.items()}


def _launches(name: str) -> int:
    return sum(backends.launch_counts().values()) if name.endswith("cuda") else 0


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rounded(value: Tensor, error: Tensor | float, dtype: torch.dtype) -> Near:
    """A float64 value with an error bound, then stored as `dtype`: the rounding of the store comes on top."""
    magnitude = value.abs() + error
    tiny = torch.finfo(dtype).tiny
    return Near(value, error + magnitude * UNIT[dtype] + tiny * UNIT[dtype])
