"""Runs a function on several ranks: processes of their own, joined by gloo."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def _main(
    rank: int, num_ranks: int, store: str, seconds: float, pipe: Connection, function: Callable, arguments
) -> None:
    torch.set_num_threads(1)
    try:
        shared = dist.FileStore(store, num_ranks)
        timeout = datetime.timedelta(seconds=seconds)
        dist.init_process_group("gloo", store=shared, rank=rank, world_size=num_ranks, timeout=timeout)
        # A rank that dies at once must not do so while others still connect.
        shared.set(f"connected {rank}", "")
        shared.wait([f"connected {other}" for other in range(num_ranks)], timeout)
        answer = (True, function(rank, *arguments))
    except BaseException:
        answer = (False, traceback.format_exc())
    # Not pipe.send: torch would pass tensors through shared memory that dies with this process.
    pipe.send_bytes(pickle.dumps(answer))
    # Leave together: a rank that goes first would look lost to one that is still busy.
    pipe.recv_bytes()


def run(
    function: Callable, num_ranks: int, *arguments: Any, seconds: float = 180, lost: tuple[int, ...] = ()
) -> list[Any]:
    """``function(rank, *arguments)`` on every rank; the results in order of rank (None for ``lost`` ranks, which may
    die, or hang: nobody waits for them).

    Processes come from a fork server that has torch loaded. ``function`` must be importable. An exception on a rank, a
    rank that dies, or ranks that are not done after ``seconds`` fail the test, and no process stays behind.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "torch",
            "torch.distributed",
            "numpy",
            "dsv3_kernels.pipeline.executor",
            "dsv3_kernels.parallel.expert_parallel",
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes, pipes = [], []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_main, args=(rank, num_ranks, store, seconds, theirs, function, arguments))
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        results: list[Any] = [None] * num_ranks
        failures = []
        waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
        end = time.monotonic() + seconds
        try:
            while set(waiting.values()) - set(lost) and (left := end - time.monotonic()) > 0:
                for pipe in wait(list(waiting), timeout=left):
                    rank = waiting.pop(pipe)  # type: ignore[call-overload]
                    try:
                        good, results[rank] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                    except EOFError:
                        good, results[rank] = rank in lost, None
                    if not good:
                        failures.append(f"rank {rank}: {results[rank] or 'died'}")
            failures += [f"rank {rank}: not done after {seconds} s" for rank in waiting.values() if rank not in lost]
        finally:
            for rank in set(waiting.values()) & set(lost):
                processes[rank].kill()
            for pipe in pipes:
                with contextlib.suppress(OSError):
                    pipe.send_bytes(b"")
            for process in processes:
                process.join(2)
                if process.is_alive():
                    process.kill()
                    process.join()
        assert not failures, "\n".join(failures)
        return results
