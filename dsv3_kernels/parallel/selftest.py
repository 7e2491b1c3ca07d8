"""Checks expert parallelism on the ranks at hand: ``torchrun --nproc-per-node 4 -m dsv3_kernels.parallel.selftest``.

Every rank dispatches its tokens, multiplies each row by its expert's number plus one, combines, and compares the result
and the gradients with what they must be. The times are host times of this run.
"""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist

from .expert_parallel import ExpertParallel

CASES = (("one choice", 1, 1.0), ("eight choices", 8, 1.0), ("a third dropped", 8, 0.67))


def check(tokens: int, hidden: int, num_experts: int, top_k: int, kept: float) -> tuple[float, float, float]:
    """(worst relative error of result and gradients, milliseconds of dispatch, of combine)."""
    rank = dist.get_rank()
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    generator = torch.Generator().manual_seed(rank)
    experts = torch.rand(tokens, num_experts, generator=generator).argsort(-1)[:, :top_k]
    experts = torch.where(torch.rand(tokens, top_k, generator=generator) < kept, experts, -1).to(device)
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    ep = ExpertParallel(None, num_experts, hidden, tokens)
    start = time.perf_counter()
    rows, _, _, offsets, handle = ep.dispatch(x, experts, weights)
    middle = time.perf_counter()
    here = torch.tensor(ep.local_experts(rank), device=device) + 1
    factor = here.repeat_interleave(offsets.diff()).unsqueeze(-1).double()
    out = ep.combine(rows * factor, handle)
    end = time.perf_counter()
    gate = torch.where(experts >= 0, experts + 1, 0) * weights
    wanted = x * gate.sum(-1, keepdim=True)
    pairs = [(out, wanted)]
    got_grads, wanted_grads = (torch.autograd.grad(o.sin().sum(), (x, weights)) for o in (out, wanted))
    pairs += list(zip(got_grads, wanted_grads, strict=True))
    worst = max(float(((a - b).abs().max() / b.abs().max().clamp(min=1e-9)).detach()) for a, b in pairs)
    return worst, 1e3 * (middle - start), 1e3 * (end - middle)


def main() -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend)
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    ranks = dist.get_world_size()
    if dist.get_rank() == 0:
        print(
            f"expert parallelism over {backend}, {ranks} ranks, 512 tokens a rank, hidden 256, {8 * ranks + 1} experts"
        )
        print(f"{'case':18} {'worst error':>12} {'dispatch ms':>12} {'combine ms':>12}")
    good = True
    for name, top_k, kept in CASES:
        figures = torch.tensor(check(512, 256, 8 * ranks + 1, top_k, kept), dtype=torch.float64)
        figures = figures.cuda() if backend == "nccl" else figures
        dist.all_reduce(figures, dist.ReduceOp.MAX)
        worst, dispatch, combine = figures.tolist()
        good &= worst < 1e-10
        if dist.get_rank() == 0:
            print(f"{name:18} {worst:12.1e} {dispatch:12.2f} {combine:12.2f}   {'ok' if worst < 1e-10 else 'WRONG'}")
    dist.destroy_process_group()
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
