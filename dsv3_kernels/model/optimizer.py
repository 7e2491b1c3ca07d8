"""What turns gradients into weights: AdamW with bfloat16 moments, and the published schedule's shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class AdamW(torch.optim.Optimizer):
    """AdamW on float32 weights and gradients whose two moments are kept in bfloat16 (arXiv:2412.19437, section 3.3.3).

    Arithmetic is float32; a moment is rounded when it is put away. The second moment survives that because it moves by
    (1 - 0.95) of itself a step, well above bfloat16's 2^-9. Decay is on the weights, as published (section 4.2).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2.2e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= fresh_state(p)
                state["step"] += 1
                first = state["exp_avg"].float().lerp_(p.grad, 1 - beta1)
                second = state["exp_avg_sq"].float().mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                state["exp_avg"].copy_(first)
                state["exp_avg_sq"].copy_(second)
                size = second.div_(1 - beta2 ** state["step"]).sqrt_().add_(group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(first, size, value=-group["lr"] / (1 - beta1 ** state["step"]))


def fresh_state(parameter: Tensor) -> dict[str, Any]:
    moments = {name: torch.zeros_like(parameter, dtype=torch.bfloat16) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": 0, **moments}


@dataclass(frozen=True)
class Schedule:
    """The published run (section 4.2) in shares of its 14.8 T tokens, laid over `steps`.

    A linear warm-up; the peak rate for 10 T; a cosine to a tenth of it over 4.3 T; a tenth for 333 B and a thirtieth
    for the last 167 B. Where `ramp` is set the batch grows from a fifth to all of it over the first 469 B. The MTP
    loss weighs 0.3 for the first 10 T, then 0.1; the routers' bias moves until 500 B before the end.
    """

    steps: int
    peak: float
    warm_up: int
    batch: int
    ramp: bool = False

    def rate(self, step: int) -> float:
        done = step / self.steps
        steady, cosine, tenth = 10 / 14.8, 14.3 / 14.8, 14.633 / 14.8
        if done < steady:
            share = 1.0
        elif done < cosine:
            share = 0.1 + 0.45 * (1 + math.cos(math.pi * (done - steady) / (cosine - steady)))
        else:
            share = 0.1 if done < tenth else 7.3e-6 / 2.2e-4
        return self.peak * min(share, (step + 1) / max(self.warm_up, 1))

    def sequences(self, step: int, multiple: int = 1) -> int:
        """The batch of a step, in sequences; while it grows, a multiple of `multiple`."""
        if not self.ramp:
            return self.batch
        grown = min(1.0, 0.2 + 0.8 * step / self.steps / (0.469 / 14.8))
        return min(self.batch, max(1, round(grown * self.batch / multiple)) * multiple)

    def mtp_weight(self, step: int) -> float:
        return 0.3 if step / self.steps < 10 / 14.8 else 0.1

    def balancing(self, step: int) -> bool:
        """Whether the routers' bias still moves."""
        return step / self.steps < 14.3 / 14.8
