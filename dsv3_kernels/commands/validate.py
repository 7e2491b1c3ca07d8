"""`dsv3 validate`: every op on every backend that is here, against float64."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._library import COMPOSITIONS, OPS
from ..backends import NAMES
from . import UserError
from .console import GOOD, Console

if TYPE_CHECKING:
    from ..validation import Result

HELP = "run every op on every backend that is here and compare with float64"
COLUMNS = ("op", "backend", "case", "max error>", "relative>", "of bound>", "ms>", "")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", action="append", choices=[n for n in NAMES if n != "sim"], help="only this backend (repeatable)"
    )
    parser.add_argument("--op", action="append", metavar="OP", help="only this op (repeatable)")
    parser.add_argument(
        "--jsonl", type=Path, metavar="FILE", help="append every result to FILE, with the machine and the date"
    )


def run(options: argparse.Namespace) -> int:
    """Exit code 0 when everything agrees, 1 when something does not, 2 for a request that cannot be served."""
    known = [*OPS, *COMPOSITIONS]
    if unknown := [op for op in options.op or () if op not in known]:
        raise UserError(f"--op {unknown[0]}: no such op; there are {', '.join(known)}")
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise UserError(f"torch is needed and cannot be imported ({error}); see `dsv3 info`") from None
    from .. import validation

    results = list(validation.validate(options.op, options.backend))
    if not results:
        asked = " and ".join(options.backend or ())
        raise UserError(f"nothing to run: no op asked for runs on {asked} here; `dsv3 info` says why")
    if options.jsonl:
        write(results, options.jsonl)
    return report(results, Console())


def report(results: Iterable[Result], console: Console) -> int:
    """Print the table, then what disagrees in full. Returns the exit code."""
    results = list(results)
    console.table(COLUMNS, [_row(result) for result in results])
    failed = [result for result in results if not result.ok]
    agree = len(results) - len(failed)
    backends = sorted({result.backend for result in results})
    ops = {op for result in results for op in result.ops}
    console.line(f"{len(ops)} ops on {', '.join(backends)}: {agree} of {len(results)} cases agree with float64")
    for result in failed:
        console.line(f"FAIL {result.title} on {_place(result)} {result.shape}: {result.error}")
    return 1 if failed else 0


def _row(result: Result) -> list[str]:
    exact = "bits" if result.exact else _figure(result.of_bound)
    state = GOOD if result.ok else "FAIL"
    numbers = [_figure(result.absolute), _figure(result.relative), exact, f"{result.seconds * 1e3:.2f}"]
    return [result.title, _place(result), result.shape, *numbers, state]


def _place(result: Result) -> str:
    return result.backend if result.backend != "eager" or result.device == "cpu" else "eager, GPU"


def _figure(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}" if math.isfinite(value) else str(value)


def write(results: Iterable[Result], path: Path) -> None:
    """Append the results to a JSONL file: what the support matrix reads a GPU's name and date from."""
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    date = datetime.date.today().isoformat()
    with path.open("a") as file:
        for result in results:
            record: dict[str, Any] = {"kind": "validate", "date": date, "gpu": gpu if result.device == "cuda" else None}
            file.write(json.dumps(record | dataclasses.asdict(result) | {"ok": result.ok}) + "\n")
