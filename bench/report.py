"""`python -m bench.report FILE`: tables and a roofline picture from results, and the comparison of two files."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dsv3_kernels.commands.console import Console

SLOWER = 1.15  # beyond this share of the base's median a comparison fails
UNITS = {"us": "us", "s": "s", "cycles": "cycles", "gbs": "GB/s", "tflops": "TFLOP/s", "bpc": "B/cycle"}
COLUMNS = ("op", "shape", "side", "us>", "p20-p80>", "GB/s>", "TFLOP/s>", "of roof>", "vs ours>", "steady us>")


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file; a last line that was cut off is left out."""
    records = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number != len(lines):
                raise ValueError(f"{path}:{number}: not JSON") from None
    return records


def rows(records: Iterable[dict[str, Any]]) -> list[list[str]]:
    """A row per case and side, ours first; `of roof` is the least time that the ceilings allow over the time taken,
    `steady` the time of a call in a loop without gaps."""
    table = []
    for record in records:
        if record["kind"] != "case":
            continue
        shape = " ".join(f"{name}={size}" for name, size in record["shape"].items())
        for name, side in record["sides"].items():
            if "error" in side:
                continue
            ours = record["sides"].get(record["backend"])  # None where no side of ours was right
            ratio = f"{side['us'] / ours['us']:.2f}" if ours and name != record["backend"] else ""
            flops = f"{side['tflops']:.1f}" if "tflops" in side else ""
            spread = f"{side['p20']:.1f}-{side['p80']:.1f}"
            times = [f"{side['us']:.1f}", spread, f"{side['gbs']:.1f}", flops, f"{side['roof']:.0%}", ratio]
            times.append(f"{side['steady_us']:.1f}" if "steady_us" in side else "")
            table.append([record["op"], shape, name, *times])
    return table


def host_rows(records: Iterable[dict[str, Any]]) -> list[list[str]]:
    """A row per figure of the host, and of the microbenchmarks."""
    return [
        [record["key"], name.rpartition("_")[0].replace("_", " "), f"{value:.3f}", UNITS[name.rpartition("_")[2]]]
        for record in records
        if record["kind"] in ("host", "micro")
        for name, value in record.items()
        if name.rpartition("_")[2] in UNITS and isinstance(value, float)
    ]


def show(records: Sequence[dict[str, Any]], console: Console) -> None:
    """Print ceilings, cases and host figures."""
    heads = [record for record in records if record["kind"] == "run"]
    if heads:
        ceilings = heads[-1]["ceilings"]
        words = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in ceilings.items())
        console.line(f"ceilings, measured in the same run: {words}")
    if table := rows(records):
        console.table(COLUMNS, table)
    if table := host_rows(records):
        console.table(("host, microbenchmark", "what", "measured>", ""), table)


def markdown(records: Iterable[dict[str, Any]]) -> str:
    """The table of cases in Markdown."""
    names = [name.removesuffix(">") for name in COLUMNS]
    rule = ["---:" if name.endswith(">") else "---" for name in COLUMNS]
    return "\n".join(f"| {' | '.join(row)} |" for row in (names, rule, *rows(records)))


def compare(new: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]], console: Console) -> int:
    """Hold our medians against an older run on the same machine: 1 when one is over 15% slower, 2 without a pair."""

    def ours(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, Any]]:
        cases = [record for record in records if record["kind"] == "case" and record["backend"]]
        return {(r["machine"], r["key"], r["backend"]): r["sides"][r["backend"]] for r in cases}

    mine, old = ours(new), ours(base)
    shared = [key for key in mine if key in old]
    if not shared:
        console.line("nothing to compare: no case of the same backend on the same machine in both")
        return 2
    table, code = [], 0
    for key in shared:
        ratio = mine[key]["us"] / old[key]["us"]
        slow = ratio > SLOWER
        code |= slow
        cells = [f"{old[key]['us']:.1f}", f"{mine[key]['us']:.1f}", f"{ratio:.2f}"]
        table.append([key[1], key[2], *cells, "FAIL slower" if slow else "ok"])
    console.table(("case", "backend", "base us>", "now us>", "ratio>", ""), table)
    return code


def roofline(records: Sequence[dict[str, Any]], path: Path) -> None:
    """A picture: products under the measured roof on the left, movers of bytes against the copy on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = [record for record in records if record["kind"] == "case" and record["backend"]]
    if not cases:
        raise ValueError("no measured case in the results")
    products, movers = [c for c in cases if c["flops"]], [c for c in cases if not c["flops"]]
    panels = [panel for panel in ((products, _products), (movers, _movers)) if panel[0]]
    figure, axes = plt.subplots(1, len(panels), figsize=(8 * len(panels), 6), squeeze=False, layout="constrained")
    for axis, (group, draw) in zip(axes[0], panels, strict=True):
        draw(axis, group)
    figure.suptitle(f"{cases[-1]['machine']}, {cases[-1]['date']}, source {cases[-1]['source']}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _products(axis: Any, cases: Sequence[dict[str, Any]]) -> None:
    ceilings = cases[-1]["ceilings"]
    bandwidth = ceilings["copy_gbs"] / 1e3  # TB/s
    intensities = [c["flops"] / c["bytes"] for c in cases]
    span = [min(intensities) / 4, max(intensities) * 4]
    for unit in sorted({c["unit"] for c in cases if f"{c['unit']}_tflops" in ceilings}):
        peak = ceilings[f"{unit}_tflops"]
        bends = sorted([*span, min(max(peak / bandwidth, span[0]), span[1])])
        axis.plot(bends, [min(peak, x * bandwidth) for x in bends], label=f"roof: {unit} {peak:.0f} TFLOP/s")
    for op in sorted({c["op"] for c in cases}):
        mine = [c for c in cases if c["op"] == op]
        points = [c["sides"][c["backend"]]["tflops"] for c in mine]
        axis.scatter([c["flops"] / c["bytes"] for c in mine], points, label=op)
    axis.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s", title="matrix products")
    axis.grid(True, which="both", alpha=0.3)
    axis.legend(fontsize=8)


def _movers(axis: Any, cases: Sequence[dict[str, Any]]) -> None:
    names = [c["key"] for c in cases]
    axis.barh(names, [c["sides"][c["backend"]]["gbs"] for c in cases])
    copy = cases[-1]["ceilings"]["copy_gbs"]
    axis.axvline(copy, color="black", linestyle="--", label=f"copy: {copy:.0f} GB/s")
    axis.invert_yaxis()
    axis.set(xlabel="GB/s", title="movers of bytes")
    axis.tick_params(axis="y", labelsize=7)
    axis.legend()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("file", type=Path, help="results of bench.run")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    parser.add_argument("--png", type=Path, metavar="PICTURE", help="write a roofline picture (needs matplotlib)")
    parser.add_argument("--compare", type=Path, metavar="BASE", help="older results: more than 15%% slower fails")
    options = parser.parse_args(argv)
    console = Console()
    try:
        records = read(options.file)
        base = read(options.compare) if options.compare else None
        if options.png:
            roofline(records, options.png)
    except (OSError, ValueError, ImportError) as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 2
    if options.markdown:
        print(markdown(records))
    else:
        show(records, console)
    return compare(records, base, console) if base is not None else 0


if __name__ == "__main__":
    sys.exit(main())
