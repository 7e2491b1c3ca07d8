"""`python -m bench.tune_triton`: the fastest launch configuration of every Triton kernel that has a table, on this GPU.

Every candidate of a table, and what the table would choose, is timed in the benchmarks that ask it, the op as a whole.
Winners whose outputs pass the benchmark's check go to dsv3_kernels/tuned/<GPU>.json, which the package reads: a pure
function of the sizes, so that two runs of a program launch the same kernels. Run the tests on `triton` afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import dsv3_kernels as dk
from dsv3_kernels import _triton, backends

from . import machine
from .cases import Case, collect
from .timing import measure

Config = dict[str, int]
Row = tuple[dict[str, int], Config]  # upper bounds of the sizes, configuration
Time = Callable[[Callable[[], Any]], float]
WORTH = 0.97  # of the time of the choice so far: what wins by less than the noise is not written down


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune_triton", description=__doc__)
    parser.add_argument("--op", action="append", help="only this op's benchmarks (repeatable)")
    parser.add_argument("--budget", type=float, default=0.05, help="seconds per candidate and benchmark")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.tune_triton: torch sees no GPU", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    torch.set_grad_enabled(False)

    def microseconds(call: Callable[[], Any]) -> float:
        return measure({"call": call}, device, options.budget)["call"].median

    found: dict[str, list[Row]] = {}
    for case in collect():
        if (not options.op or case.op in options.op) and backends.missing(case.op, "triton", device) is None:
            for op, row in tune(case, device, microseconds).items():
                print(f"{case.key}: {op} {row[1]}", flush=True)
                found.setdefault(op, []).append(row)
    print(f"wrote {write(found, device)}")
    return 0


def tune(case: Case, device: torch.device, time: Time, backend: str = "triton") -> dict[str, Row]:
    """{table: its sizes in this benchmark, and the best configuration}, where that beats the table's own choice."""
    inputs = case.make(device)
    best: dict[str, Row] = {}
    with dk.backend(backend):
        case.run(*inputs)  # imports the launcher, and so its tables
        with asked() as sizes:
            case.run(*inputs)
        usual = time(lambda: case.run(*inputs))
        for op, these in sizes.items():
            times = [(_time_of(case, inputs, time, op, config), config) for config in _triton.tables[op].candidates]
            for seconds, config in sorted(times, key=lambda pair: pair[0]):
                if seconds > WORTH * usual:
                    break
                with forced(op, dict(config)):
                    if case.check(inputs, case.run(*inputs)) is None:
                        best[op] = these, dict(config)
                        break
    return best


def _time_of(case: Case, inputs: tuple[Any, ...], time: Time, op: str, config: Any) -> float:
    """Infinite for a configuration that does not fit the GPU."""
    try:
        with forced(op, dict(config)):
            case.run(*inputs)
            return time(lambda: case.run(*inputs))
    except Exception as error:  # Triton's OutOfResources has no common place in its versions
        print(f"{case.key}: {op} {dict(config)}: {type(error).__name__}", file=sys.stderr)
        return float("inf")


@contextlib.contextmanager
def asked() -> Iterator[dict[str, dict[str, int]]]:
    """The sizes that tables are asked for inside the block."""
    seen: dict[str, dict[str, int]] = {}
    with contextlib.ExitStack() as stack:
        for op, table in _triton.tables.items():
            stack.enter_context(
                _replaced(table, lambda choose, op: lambda t, s: seen.update({op: s}) or choose(t, s), op)
            )
        yield seen


def forced(op: str, config: Config) -> contextlib.AbstractContextManager[None]:
    """The table of `op` chooses `config` inside the block, whatever the sizes."""
    return _replaced(_triton.tables[op], lambda choose, op: lambda tensor, sizes: dict(config), op)


@contextlib.contextmanager
def _replaced(table: Any, make: Callable[[Any, str], Any], op: str) -> Iterator[None]:
    table._chosen.clear()
    table._choose = make(table._choose, op)
    try:
        yield
    finally:
        del table._choose  # the class's again
        table._chosen.clear()


def ordered(rows: list[Row]) -> list[Row]:
    """Smaller bounds first; of several rows with the same bounds, the last."""
    by_bounds = {tuple(sorted(bounds.items())): (bounds, config) for bounds, config in rows}
    return [by_bounds[key] for key in sorted(by_bounds, key=lambda key: [size for _, size in key])]


def write(found: dict[str, list[Row]], device: torch.device, folder: Path = _triton.TUNED) -> Path:
    """The GPU's file, with the rows of ops that were not tuned now kept as they were."""
    sm, name = _triton.chip(device.index or 0)
    path = folder / f"{_triton.slug(name)}.json"
    before = json.loads(path.read_text())["ops"] if path.is_file() else {}
    record = {
        "gpu": name,
        "sm": sm,
        "date": datetime.date.today().isoformat(),
        "source": machine.source(),
        "ops": before | {op: ordered(rows) for op, rows in found.items()},
    }
    folder.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
