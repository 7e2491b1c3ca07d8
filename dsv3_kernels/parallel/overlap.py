"""Two microbatches at once: one computes while the rows of the other are under way.

DeepSeek-V3 hides its exchanges this way in serving (technical report, section 3.4.1: attention of one microbatch beside
dispatch, experts and combine of the other) as in training. What a microbatch does is written once, as a generator that
pauses where it would wait; pausing changes no operand and no order within a microbatch, so results are the bits of one
microbatch after the other.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch.profiler import record_function

M = TypeVar("M")
T = TypeVar("T")
Program = Generator[str, None, T]


@dataclass(frozen=True)
class Span:
    """``kind`` "compute": the host ran the microbatch's program up to ``name``, the exchange it started (or "end").
    ``kind`` "exchange": from its start until the program went on to wait for it. Seconds since the trace began."""

    microbatch: int
    kind: str
    name: str
    start: float
    end: float


class Trace:
    """Records who ran when, in host time. On a GPU kernels run later than the host: there, take a ``torch.profiler``
    trace, in which every computation carries the same name."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._begin = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._begin

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes Chrome's trace format (open it at ui.perfetto.dev), a row per microbatch and kind."""
        rank = _rank()
        events: list[dict[str, Any]] = [
            {"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}}
        ]
        for microbatch in sorted({span.microbatch for span in self.spans}):
            for row, kind in enumerate(("compute", "exchange")):
                label = {"name": f"microbatch {microbatch}: {kind}"}
                tid = 2 * microbatch + row
                events.append({"ph": "M", "pid": rank, "tid": tid, "name": "thread_name", "args": label})
        events += [
            {
                "ph": "X",
                "pid": rank,
                "tid": 2 * span.microbatch + (span.kind == "exchange"),
                "name": span.name,
                "cat": span.kind,
                "ts": 1e6 * span.start,
                "dur": 1e6 * (span.end - span.start),
            }
            for span in self.spans
        ]
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _Running:
    """One microbatch on its way through its program."""

    def __init__(self, number: int, program: Program[Any], trace: Trace | None) -> None:
        self.number, self.program, self.trace = number, program, trace
        self.result: Any = None
        self.done = False
        self._waiting = ("", 0.0)

    def advance(self) -> None:
        """Runs to the next exchange, or to the end."""
        if self.trace is None:
            self._next()
            return
        start = self.trace.now()
        name, since = self._waiting
        if name:
            self.trace.spans.append(Span(self.number, "exchange", name, since, start))
        with record_function(f"microbatch {self.number} after {name or 'start'}"):
            reached = self._next()
        end = self.trace.now()
        self.trace.spans.append(Span(self.number, "compute", reached, start, end))
        self._waiting = (reached, end)

    def _next(self) -> str:
        try:
            name = next(self.program)
        except StopIteration as stop:
            self.done, self.result = True, stop.value
            return "end"
        if not isinstance(name, str):
            raise TypeError(
                f"two_microbatch: program: yielded {type(name).__name__}, wanted the exchange's name, a str"
            )
        return name


def two_microbatch(
    program: Callable[[M], Program[T]], first: M, second: M, *, trace: Trace | None = None
) -> tuple[T, T]:
    """Runs ``program(first)`` and ``program(second)``, each computing while the other's rows are under way.

    Args:
        program: a generator function. It sends (``dispatch_send``, ``combine_send``), yields the exchange's name, and
            receives when it goes on (``dispatch_recv``, ``combine_recv``); it returns its result::

                def layer(x):
                    x = x + attention(x)
                    pending = ep.dispatch_send(x, *gate(x))
                    yield "dispatch"
                    rows, _, _, offsets, handle = ep.dispatch_recv(pending)
                    pending = ep.combine_send(experts(rows, offsets), handle)
                    yield "combine"
                    return x + ep.combine_recv(pending)

            Layers follow each other with ``x = yield from layer(x)``.
        first, second: the microbatches: what ``program`` takes. They may differ in tokens and in number of exchanges.
        trace: records the spans; ``trace.save(path)`` writes them for Chrome.

    Returns:
        Both results. They, and their gradients, have the bits of ``program`` run on one after the other.

    Raises:
        TypeError: ``program`` is no generator function, or yields something else than a name.

    All ranks of a group must call it alike: the exchanges of the two microbatches alternate in a fixed order. The
    backward pass runs its exchanges one after the other; :class:`dsv3_kernels.pipeline.Pipeline` overlaps those.

    Source: DeepSeek-V3 technical report (arXiv:2412.19437), sections 3.2.1 and 3.4.
    """
    both = [_Running(i, _started(program, m), trace) for i, m in enumerate((first, second))]
    try:
        while not all(running.done for running in both):
            for running in both:
                if not running.done:
                    running.advance()
    finally:
        for running in both:
            running.program.close()  # after an error in one, the other's `finally` blocks run now
    return both[0].result, both[1].result


def _started(program: Callable[[M], Program[T]], microbatch: M) -> Program[T]:
    generator = program(microbatch)
    if not isinstance(generator, Generator):
        raise TypeError(
            f"two_microbatch: program: returned {type(generator).__name__}, wanted a generator: yield after each send"
        )
    return generator


__all__ = ["Span", "Trace", "two_microbatch"]
