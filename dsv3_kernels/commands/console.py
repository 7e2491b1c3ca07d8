"""Output of the commands: rich on a terminal, plain text elsewhere or without rich."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

GOOD, BAD = "ok", "FAIL"


class Console:
    """Text, headings and tables on stdout. A column whose name ends in ">" is aligned right, the mark left out."""

    def __init__(self) -> None:
        self._rich: Any = _rich_console() if sys.stdout.isatty() else None

    def line(self, text: str = "") -> None:
        """One line of plain text."""
        if self._rich is None:
            print(text)
        else:
            self._rich.print(text, markup=False, highlight=False, soft_wrap=True)

    def heading(self, text: str) -> None:
        """A blank line and a heading."""
        if self._rich is None:
            print(f"\n{text}\n{'-' * len(text)}")
        else:
            self._rich.print(f"\n{text}", style="bold", markup=False, highlight=False)

    def piece(self, text: str) -> None:
        """Text as it comes: no newline, shown at once."""
        sys.stdout.write(text)
        sys.stdout.flush()

    @contextlib.contextmanager
    def progress(self, total: int, done: int) -> Iterator[Callable[[int, str], None]]:
        """`advance(step, words)`: a bar on a terminal, else a line each twentieth of the way."""
        if self._rich is None:
            every = max(1, total // 20)

            def advance(step: int, words: str) -> None:
                if step % every == 0 or step == total:
                    print(f"step {step}/{total}  {words}", flush=True)

            yield advance
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=self._rich) as bar:
            task = bar.add_task("", total=total, completed=done)
            yield lambda step, words: bar.update(task, completed=step, description=words)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; the cells "ok" and those that start with "FAIL" are coloured on a terminal."""
        names = [name.removesuffix(">") for name in columns]
        right = [name.endswith(">") for name in columns]
        if self._rich is None:
            print(plain_table(names, right, rows))
            return
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name, to_right in zip(names, right, strict=True):
            table.add_column(name, justify="right" if to_right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell, style=_style(cell)) for cell in row))
        self._rich.print(table)


def plain_table(names: Sequence[str], right: Sequence[bool], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces, a rule under the names."""
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    lines = (
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in (names, rule, *rows)
    )
    return "\n".join(lines)


def _rich_console() -> Any:
    try:
        from rich.console import Console as RichConsole
    except ImportError:
        return None
    return RichConsole()


def _style(cell: str) -> str:
    return "green" if cell == GOOD else "bold red" if cell.startswith(BAD) else ""
