"""Host figures of what runs on many ranks: plans, schedules, and rows moved by a torch.distributed group on the CPU.

`python -m bench.parallel RANK RANKS STORE` is one process of the group.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .machine import ROOT

TOKENS, HIDDEN, EXPERTS, TOP_K = 128, 7168, 256, 8  # a decode step of DeepSeek-V3


def probes(quick: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """{name: measurement}; each returns figures with their units in their names."""
    found: dict[str, Callable[[], dict[str, Any]]] = {
        "rebalance_experts": rebalance,
        "DualPipe, simulated": schedules,
        "expert parallel, 8 virtual ranks": virtual,
    }
    ranks = (2,) if quick else (2, 4)
    return found | {f"expert parallel, gloo, {n} processes": functools.partial(processes, n) for n in ranks}


def least(call: Callable[[], Any], rounds: int = 5) -> float:
    """Seconds of the fastest of some rounds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def rebalance() -> dict[str, Any]:
    """A plan for the released model on 144 GPUs: 58 layers, 256 experts, 288 replicas."""
    import torch

    from dsv3_kernels.parallel import eplb

    load = torch.rand(58, 256, generator=torch.Generator().manual_seed(0)) ** 4
    return {"plan_s": least(lambda: eplb.rebalance_experts(load, 288, 8, 18, 144))}


def schedules() -> dict[str, Any]:
    """A simulated step of DualPipe on 16 ranks with 64 microbatches."""
    import dsv3_kernels as dk

    made = dk.pipeline.schedule("dualpipe", 16, 64)
    return {"simulate_s": least(lambda: made.simulate({"forward": 1, "backward": 2, "weight": 1, "overlapped": 2.5}))}


def _inputs(rank: int) -> tuple[Any, Any, Any]:
    import torch

    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    experts = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(-1)[:, :TOP_K].int()
    return x, experts, torch.rand(TOKENS, TOP_K, generator=generator)


def _times(ep: Any, x: Any, experts: Any, weights: Any) -> dict[str, Any]:
    rows, _, _, _, handle = ep.dispatch(x, experts, weights)
    return {
        "dispatch_s": least(lambda: ep.dispatch(x, experts, weights)),
        "combine_s": least(lambda: ep.combine(rows, handle)),
    }


def virtual() -> dict[str, Any]:
    """All ranks in this process."""
    import torch

    from dsv3_kernels.parallel import ExpertParallel

    torch.set_num_threads(1)
    ep = ExpertParallel(virtual_ranks=8, num_experts=EXPERTS, hidden=HIDDEN, max_tokens=TOKENS)
    return _times(ep, *map(list, zip(*map(_inputs, range(8)), strict=True)))


def processes(ranks: int) -> dict[str, Any]:
    """One process per rank, rows over gloo; the times of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        command = [sys.executable, "-m", "bench.parallel"]
        started = [
            subprocess.Popen([*command, str(rank), str(ranks), store], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            for rank in range(ranks)
        ]
        outputs = [process.communicate(timeout=120)[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"bench.parallel: a process of {ranks} failed")
    figures: dict[str, Any] = json.loads(outputs[0])
    return figures


def _process(rank: int, ranks: int, store: str) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from dsv3_kernels.parallel import ExpertParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    figures = _times(ExpertParallel(None, EXPERTS, HIDDEN, TOKENS), *_inputs(rank))
    dist.barrier()
    dist.destroy_process_group()
    return figures


if __name__ == "__main__":
    print(json.dumps(_process(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
