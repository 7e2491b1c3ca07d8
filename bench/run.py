"""`python -m bench.run`: times the ops, each beside its rivals, and appends every result to a JSONL file at once.

A run that was cut off goes on where it stopped: what the file already has of the same source on the same machine is not
measured again. Exit code 1 when an output is wrong or, with --compare, when something became slower.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import dsv3_kernels as dk
from dsv3_kernels import backends
from dsv3_kernels.commands.console import Console

from . import machine, peers, report
from .cases import Call, Case, collect, families
from .timing import Timing, measure, steady

OURS = ("cuda", "triton", "eager")  # in the order of preference
BUDGET, QUICK_BUDGET = 1.0, 0.25  # seconds of a case, all sides together


def main(argv: Sequence[str] | None = None) -> int:
    options = _arguments(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu")
    if options.gpu and device.type != "cuda":
        print("bench.run: --gpu: torch sees no GPU", file=sys.stderr)
        return 2
    torch.set_grad_enabled(False)
    run = Run(options.out, device, options.quick, options.steady)
    console = Console()
    console.line(f"{run.machine}: source {run.source}, results in {options.out}")
    cases = [case for case in collect(options.family) if _wanted(case, options, device)]
    code = run.cases(cases, console)
    if device.type == "cpu" and not options.op and not options.family:
        code |= run.host(console)
    if device.type == "cuda" and not options.op and not options.family:
        code |= run.micro(console)
    report.show(run.results(), console)
    if options.compare:
        code |= report.compare(run.results(), report.read(options.compare), console)
    return code


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    folder = Path(os.environ.get("BENCH_OUT") or machine.ROOT / "build")
    parser.add_argument("--family", action="append", choices=families(), help="only this family (repeatable)")
    parser.add_argument("--op", action="append", help="only this op (repeatable)")
    parser.add_argument("--quick", action="store_true", help="few shapes, little time each")
    parser.add_argument(
        "--steady", type=float, default=0.0, metavar="SECONDS", help="also time products back to back, so long each"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--gpu", action="store_true", help="a GPU that is missing is an error")
    where.add_argument("--cpu", action="store_true", help="the CPU, even where there is a GPU")
    parser.add_argument("--out", type=Path, default=folder / "bench.jsonl", help="results file (default: %(default)s)")
    parser.add_argument(
        "--compare", type=Path, metavar="BASE", help="results to hold these against: more than 15%% slower fails"
    )
    options = parser.parse_args(argv)
    if options.compare and not options.compare.exists():
        parser.error(f"--compare: no file {options.compare}")
    return options


def _wanted(case: Case, options: argparse.Namespace, device: torch.device) -> bool:
    return (
        device.type in case.devices and (case.quick or not options.quick) and (not options.op or case.op in options.op)
    )


class Run:
    """One run: where its results go, and what they have in common."""

    def __init__(self, out: Path, device: torch.device, quick: bool, steady: float = 0.0) -> None:
        self.out, self.device, self.quick, self.steady = out, device, quick, steady
        self.machine, self.source = machine.name(device), machine.source()
        self.date, self.ceilings = datetime.date.today().isoformat(), {}
        out.parent.mkdir(parents=True, exist_ok=True)
        self.done = {record["key"] for record in self.results()}

    def results(self) -> list[dict[str, Any]]:
        """The file's results of this source on this machine."""
        known = report.read(self.out) if self.out.exists() else []
        return [r for r in known if (r["source"], r["machine"], r["quick"]) == (self.source, self.machine, self.quick)]

    def write(self, record: dict[str, Any]) -> None:
        """Append one record, flushed, so that nothing is lost when the run is cut off."""
        common = {"date": self.date, "source": self.source, "machine": self.machine, "quick": self.quick}
        with self.out.open("a") as file:
            file.write(json.dumps(record | common) + "\n")

    def cases(self, cases: Iterable[Case], console: Console) -> int:
        """Measure what is not in the file. Returns 1 when an output was wrong."""
        todo = [case for case in cases if case.key not in self.done]
        if not todo:
            return 0
        self.ceilings = machine.ceilings(self.device)
        head = {"kind": "run", "key": "", "commit": machine.commit(), "ceilings": self.ceilings}
        try:
            images: dict[str, Any] = peers.versions()
        except ValueError as error:  # as with any rival: a note
            images = {"error": str(error)}
            console.line(f"peer images: {error}")
        self.write(head | {"facts": machine.facts(self.device), "peer_images": images})
        code = 0
        for case in todo:
            record = self.measure(case)
            self.write(record)
            wrong = {name: side["error"] for name, side in record["sides"].items() if "error" in side}
            ours = [name for name in wrong if name in OURS]
            code |= 1 if ours else 0
            for name, error in wrong.items():
                console.line(f"{'FAIL' if name in OURS else 'peer'} {case.key} {name}: {error}")
        return code

    def measure(self, case: Case) -> dict[str, Any]:
        """Check every side of ours, then time all of them in turn."""
        inputs = case.make(self.device)
        sides: dict[str, dict[str, Any]] = {}
        calls: dict[str, Call] = {}
        for name in self.ours(case.op):
            call = _forced(case, name, inputs)
            try:
                error = case.check(inputs, call())
            except (RuntimeError, ValueError) as failure:
                error = f"{type(failure).__name__}: {' '.join(str(failure).split())[:400]}"
            if error is None:
                calls[name] = call
            else:
                sides[name] = {"error": error}
        if self.device.type == "cuda":
            rivals, notes = self.rivals(case, inputs)
            calls |= rivals
            sides |= notes
        timings = self.time(calls)
        sides |= {name: self._figures(case, timing) for name, timing in timings.items()}
        if self.steady and case.flops:
            for name, us in steady({name: calls[name] for name in timings}, self.device, self.steady).items():
                sides[name] |= {"steady_us": us, "steady_tflops": case.flops / us * 1e-6}
        mine = next((name for name in OURS if name in timings), None)
        ratios = {n: t.median / timings[mine].median for n, t in timings.items() if n not in OURS} if mine else {}
        return {
            "kind": "case",
            "key": case.key,
            "op": case.op,
            "shape": case.shape,
            "bytes": case.bytes,
            "flops": case.flops,
            "unit": case.unit,
            "backend": mine,
            "sides": sides,
            "ratios": ratios,
            "ceilings": self.ceilings,
            "clocks": machine.clocks() if self.device.type == "cuda" else {},
        }

    def rivals(self, case: Case, inputs: tuple[Any, ...]) -> tuple[dict[str, Call], dict[str, dict[str, Any]]]:
        """The peers that are at hand and right, and what is wrong with others: a note, not our failure."""
        calls: dict[str, Call] = {}
        notes: dict[str, dict[str, Any]] = {}
        for name, make in case.peers.items():
            try:
                call = make(*inputs)
                output = call()
                error = case.check(inputs, output) if name in case.checked else None
            except ImportError:
                continue
            except Exception as failure:
                error = f"{type(failure).__name__}: {' '.join(str(failure).split())[:400]}"
            if error is None:
                calls[name] = call
            else:
                notes[name] = {"error": error}
        return calls, notes

    def ours(self, op: str) -> list[str]:
        """Our backends that serve the op here; a quick run leaves out eager where a kernel does."""
        names = [name for name in OURS if backends.missing(op, name, self.device) is None]
        return names[:-1] if self.quick and len(names) > 1 else names

    def time(self, calls: dict[str, Call]) -> dict[str, Timing]:
        """All sides in turn; without eager where memory does not hold its temporaries beside the others."""
        if not calls:
            return {}
        budget = QUICK_BUDGET if self.quick else BUDGET
        try:
            return measure(calls, self.device, budget)
        except torch.OutOfMemoryError:
            rest = {name: call for name, call in calls.items() if name != "eager"}
            if len(rest) == len(calls):
                raise
        torch.cuda.empty_cache()
        return self.time(rest)

    def _figures(self, case: Case, timing: Timing) -> dict[str, Any]:
        """Times and what they make of the ceilings: `roof` is the least time by them, as a share of the median."""
        seconds = timing.median * 1e-6
        least = case.bytes / (self.ceilings["copy_gbs"] * 1e9)
        figures = {
            "us": timing.median,
            "p20": timing.p20,
            "p80": timing.p80,
            "count": timing.count,
            "method": timing.method,
        }
        figures["gbs"] = case.bytes / seconds / 1e9
        if case.flops:
            figures["tflops"] = case.flops / seconds / 1e12
            if peak := self.ceilings.get(f"{case.unit}_tflops"):
                least = max(least, case.flops / (peak * 1e12))
        return figures | {"roof": least / seconds}

    def host(self, console: Console) -> int:
        """Times of the host alone: import, launch, a whole op, the build; and of many ranks on the CPU."""
        from . import overhead, parallel, training

        quick = self.quick
        return self.probes("host", overhead.probes(quick) | parallel.probes(quick) | training.probes(quick), console)

    def micro(self, console: Console) -> int:
        """What the GPU's parts do by themselves. Returns 1 when a program computed something wrong."""
        from . import micro

        return self.probes("micro", micro.probes(self.device), console)

    def probes(self, kind: str, probes: dict[str, Callable[[], dict[str, Any]]], console: Console) -> int:
        """Measure what is not in the file."""
        from .overhead import Unavailable

        code = 0
        for name, probe in probes.items():
            if name in self.done:
                continue
            try:
                self.write({"kind": kind, "key": name, **probe()})
            except Unavailable as why:
                console.line(f"{name}: not measured ({why})")
            except RuntimeError as failure:
                console.line(f"FAIL {name}: {failure}")
                code = 1
        return code


def _forced(case: Case, name: str, inputs: tuple[Any, ...]) -> Call:
    def call() -> Any:
        with dk.backend(name):
            return case.run(*inputs)

    return call


if __name__ == "__main__":
    sys.exit(main())
