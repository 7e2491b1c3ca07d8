"""`python -m bench.support`: the support matrix of the README, from the table of ops and the results of GPU runs.

`--write` puts it between the README's markers. A cell says how that implementation is proven.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dsv3_kernels._library import OPS

from .machine import ROOT
from .report import read

BEGIN, END = "<!-- support:begin -->", "<!-- support:end -->"
KERNELS = ("cuda", "triton")
LEGEND = """\
"float64": `dsv3 validate` and the op's test compare it with float64. "simulator": the op's test runs the kernel's PTX
there. A GPU's name and a date: it ran there, and agreed, on that day. Ops in italics are called by others."""


def matrix(root: Path = ROOT) -> str:
    """The table in Markdown, a row per op."""
    from dsv3_kernels import validation

    covered = {op for case in validation.cases() for op in case.ops}
    runs = gpu_runs(records(root / "bench" / "results"))
    lines = ["| family | op | eager | cuda | triton |", "|---|---|---|---|---|"]
    for op, row in OPS.items():
        cells = ["float64" if op in covered else "not proven"]
        cells += [_kernel(op, name, runs, root) if getattr(row, name) else "" for name in KERNELS]
        title = f"*{op}*" if row.internal else f"`{op}`"
        lines.append(f"| {row.family} | {title} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", LEGEND])


def _kernel(op: str, name: str, runs: dict[tuple[str, str], str], root: Path) -> str:
    row = OPS[op]
    test = root / "tests" / row.family / f"test_{row.module or op}.py"
    simulated = (root / "csrc" / "ptxsim" / "Makefile").exists() and "(backend" in test.read_text()
    proofs = ["simulator"] if simulated else []
    proofs += [runs[op, name]] if (op, name) in runs else []
    return ", ".join(proofs) or "not run yet"


def records(folder: Path) -> list[dict[str, Any]]:
    """All records of all results files, in the order of their names."""
    return [record for path in sorted(folder.glob("*.json*")) for record in read(path)]


def gpu_runs(found: Iterable[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """{(op, backend): "GPU date"} of the last day on which it ran on a GPU; left out when anything disagreed then."""
    days: dict[tuple[str, str], dict[str, list[tuple[bool, str]]]] = {}
    for record in found:
        if record["kind"] == "validate" and record["gpu"]:
            entries = [(op, record["backend"], record["ok"], record["gpu"]) for op in record["ops"]]
        elif record["kind"] == "case":
            sides = record["sides"].items()
            entries = [(record["op"], name, "error" not in side, record["machine"]) for name, side in sides]
        else:
            continue
        for op, name, ok, gpu in entries:
            if name in KERNELS:
                days.setdefault((op, name), {}).setdefault(record["date"], []).append((ok, gpu))
    last = {key: max(by_day.items()) for key, by_day in days.items()}
    return {
        key: f"{runs[-1][1].removeprefix('NVIDIA ')} {date}"
        for key, (date, runs) in last.items()
        if all(ok for ok, _ in runs)
    }


def update(text: str, table: str) -> str:
    """The page with the table between its markers. ValueError when it has none."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} ... {END} in the page")
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.support", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    options = parser.parse_args(argv)
    if options.write:
        page = ROOT / "README.md"
        page.write_text(update(page.read_text(), matrix()))
    else:
        print(matrix())
    return 0


if __name__ == "__main__":
    sys.exit(main())
