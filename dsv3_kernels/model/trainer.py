"""Training from a file of tokens: one process, or torchrun with experts shared out and everything else data parallel.

Read `Trainer.run` first: it is the whole loop. Every step is a function of options, tokens, step, weights and moments,
so a run that is killed and goes on from its last checkpoint gives the bits of one that was not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import _checks
from . import train
from .config import Config
from .diagnosis import bad_result, bad_weight
from .model import DeepSeekV3
from .optimizer import AdamW, Schedule, fresh_state
from .weights import Checkpoint, Piece, fill, for_file, initialise, pieces

OP = "train"
BUCKET = 1 << 24  # gradients that one all-reduce takes, in elements; unmeasured
MOMENTS = ("exp_avg", "exp_avg_sq")


class NonFiniteError(RuntimeError):
    """A loss or gradient that is no finite number; the message names step, layer and tensor."""


@dataclass(frozen=True)
class Options:
    """What a run is; a checkpoint goes on under the same ones (but for `save_every` and `keep`)."""

    steps: int = 300
    batch: int = 16  # sequences a step, over all ranks
    micro_batch: int | None = None  # sequences that a rank takes at once; None: its whole share
    sequence: int = 128  # tokens
    recipe: str = "fp8"  # or "bf16", "float32"
    rate: float = 2.2e-4
    warm_up: int = 20  # steps
    ramp: bool = False  # the batch grows from a fifth, as published
    weight_decay: float = 0.1
    clip: float = 1.0
    balance_alpha: float = 1e-4
    bias_speed: float = 1e-3
    seed: int = 0
    expert_parallel: int = 1  # ranks that share the experts out
    save_every: int = 100  # steps
    keep: int = 2  # checkpoints

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "sequence", "expert_parallel", "save_every", "keep"):
            _checks.integer(OP, name, getattr(self, name), 1)
        for name in ("warm_up", "seed"):
            _checks.integer(OP, name, getattr(self, name), 0)
        if self.micro_batch is not None:
            _checks.integer(OP, "micro_batch", self.micro_batch, 1)
        for name in ("rate", "weight_decay", "clip", "balance_alpha", "bias_speed"):
            value = getattr(self, name)
            _checks.number(OP, name, value)
            _checks.value(OP, name, value >= 0, value, "0 or more")
        _checks.value(OP, "sequence", self.sequence > 1, self.sequence, "at least 2 tokens")
        _checks.one_of(OP, "recipe", self.recipe, *train.RECIPES)
        grows = not self.ramp or self.micro_batch is not None
        _checks.value(OP, "micro_batch", grows, None, "a number: with ramp the batch grows by so many sequences a rank")


class Trainer:
    """Trains `start` on a stream of tokens; goes on from the last checkpoint in `out` where there is one.

    Args:
        start: a Config (fresh weights, drawn from the seed and each weight's name) or a checkpoint's folder.
        tokens: int [N], cut into windows at random places. documents: int [N], the document of each token, or None.
        options: see `Options`. out: folder for checkpoints, or None for none.
        device: where to train; torch.distributed, where it is initialised, gives the ranks.

    Raises:
        ValueError, TypeError: options, sizes or a checkpoint that do not fit, in words.
    """

    def __init__(
        self,
        start: Config | str | Path,
        tokens: Tensor,
        options: Options,
        *,
        documents: Tensor | None = None,
        out: str | Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.options, self.tokens, self.documents = options, tokens, documents
        self.out = None if out is None else Path(out)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.config = start if isinstance(start, Config) else Config.load(start)
        self._check()
        share = options.batch // self.world
        self.micro = options.micro_batch or share
        self.schedule = Schedule(options.steps, options.rate, options.warm_up, options.batch, options.ramp)
        self.experts_group, self.replicas_group = self._groups()
        model = DeepSeekV3.sharded(self.config, self.experts_group, self.micro * options.sequence)
        self.model = model.allocate(device).train()
        if isinstance(start, Config):
            initialise(self.model, options.seed)
        else:
            fill(self.model, Checkpoint(start))
        experts = {id(m.experts.gate_up.weight) for m in train.moe_layers(model)}
        experts |= {id(m.experts.down.weight) for m in train.moe_layers(model)}
        parameters: list[tuple[str, Any]] = list(model.named_parameters())
        shared_out = options.expert_parallel > 1
        self.dense = [(n, p) for n, p in parameters if not shared_out or id(p) not in experts]
        self.local = [(n, p) for n, p in parameters if shared_out and id(p) in experts]
        self.optimizers = [self._optimizer(self.dense, dist.group.WORLD if self.world > 1 else None)]
        if self.local:
            self.optimizers.append(self._optimizer(self.local, self.replicas_group))
        self.step = 0
        last = last_checkpoint(self.out)
        if last is not None:
            self.load(last)

    def _check(self) -> None:
        o, config = self.options, self.config
        _checks.dtype(OP, "tokens", self.tokens, torch.int64, torch.int32, torch.uint8)
        _checks.shape(OP, "tokens", self.tokens, ("N",))
        longest = config.max_position_embeddings
        _checks.value(OP, "sequence", o.sequence <= longest, o.sequence, f"at most max_position_embeddings = {longest}")
        _checks.value(OP, "tokens", len(self.tokens) > o.sequence, len(self.tokens), f"more than one of {o.sequence}")
        top = int(self.tokens.max())
        _checks.value(OP, "tokens", top < config.vocab_size, top, f"ids below vocab_size = {config.vocab_size}")
        if self.documents is not None:
            _checks.shape(OP, "documents", self.documents, self.tokens.shape)
        groups = self.world % o.expert_parallel == 0
        _checks.value(OP, "expert_parallel", groups, o.expert_parallel, f"a divisor of the {self.world} ranks")
        unit = self.world * (o.micro_batch or 1)
        wanted = f"a multiple of {self.world} ranks times micro_batch = {o.micro_batch or 1}"
        _checks.value(OP, "batch", o.batch % unit == 0, o.batch, wanted)

    def _groups(self) -> tuple[Any, Any]:
        """(ranks that hold one set of experts, ranks that hold copies of this one's); None: this rank alone."""
        size, mine = self.options.expert_parallel, [None, None]
        if size == 1:
            return None, None
        sets = [list(range(first, first + size)) for first in range(0, self.world, size)]
        copies = [list(range(i, self.world, size)) for i in range(size)]
        for which, groups in enumerate((sets, copies)):
            for ranks in groups:
                group = dist.new_group(ranks)  # every rank makes every group
                if self.rank in ranks and len(ranks) > 1:
                    mine[which] = group
        return mine[0], mine[1]

    def _optimizer(self, parameters: list[tuple[str, Any]], group: Any) -> torch.optim.Optimizer:
        """AdamW; with a group, each rank keeps the moments of its share of the parameters."""
        decayed = [p for name, p in parameters if p.dim() > 1 and "embed_tokens" not in name]
        others = [p for name, p in parameters if not (p.dim() > 1 and "embed_tokens" not in name)]
        decay = ((decayed, self.options.weight_decay), (others, 0.0))
        groups = [{"params": params, "weight_decay": value} for params, value in decay if params]
        if group is None:
            return AdamW(groups)
        from torch.distributed.optim import ZeroRedundancyOptimizer  # takes a second to import

        return ZeroRedundancyOptimizer(groups, AdamW, process_group=group)

    # -- the loop ----------------------------------------------------------------------------------------------------
    def run(self) -> Iterator[dict[str, Any]]:
        """Train to the end, yielding a record after every step."""
        while self.step < self.options.steps:
            began = time.perf_counter()
            losses = self._accumulate(self.step)
            self._reduce_gradients()
            norm = self._clip()
            self._check_finite(losses, norm)
            rate = self.schedule.rate(self.step)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
            moving = self.schedule.balancing(self.step)
            loads = train.update_bias(self.model, self.options.bias_speed if moving else 0.0, self._world_group())
            self.step += 1
            yield {
                "step": self.step,
                **{name: float(value) for name, value in losses.items()},
                "grad_norm": float(norm),
                "rate": rate,
                "load": [round(float(load.max() / load.double().mean()), 3) for load in loads],
                "tokens": self.schedule.sequences(self.step - 1, self.world * self.micro) * self.options.sequence,
                "seconds": round(time.perf_counter() - began, 3),
            }
            if self.out is not None and (self.step % self.options.save_every == 0 or self.step == self.options.steps):
                self.save()

    def batch(self, step: int) -> tuple[Tensor, Tensor | None]:
        """This rank's share of a step: tokens and documents, [B, S]."""
        o = self.options
        generator = torch.Generator().manual_seed(o.seed * 1_000_003 + step)
        count = self.schedule.sequences(step, self.world * self.micro)
        starts = torch.randint(len(self.tokens) - o.sequence, (count,), generator=generator)
        share = count // self.world
        at = starts[self.rank * share : (self.rank + 1) * share, None] + torch.arange(o.sequence)
        device = self.model.device
        documents = None if self.documents is None else self.documents[at].to(device)
        return self.tokens[at].long().to(device), documents

    def _microbatches(self, step: int) -> list[tuple[Tensor, Tensor | None, int]]:
        tokens, documents = self.batch(step)
        cuts = [slice(first, first + self.micro) for first in range(0, len(tokens), self.micro)]
        return [(tokens[cut], None if documents is None else documents[cut], step) for cut in cuts]

    def _accumulate(self, step: int) -> dict[str, Tensor]:
        """Gradients of a step's mean loss in float32, microbatch by microbatch; the losses, over all ranks."""
        self.model.zero_grad(set_to_none=True)
        parts: list[dict[str, Tensor]] = []
        microbatches = self._microbatches(step)
        for some in microbatches:
            total, losses = self._loss(*some)
            (total / len(microbatches)).backward()
            parts.append(losses)
        mean = torch.stack([torch.stack(list(p.values())) for p in parts]).mean(0)
        if self.world > 1:
            dist.all_reduce(mean)
        return dict(zip(parts[0], mean / self.world, strict=True))

    def _loss(self, tokens: Tensor, documents: Tensor | None, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return train.loss(
            self.model,
            tokens,
            documents=documents,
            mtp_weight=self.schedule.mtp_weight(step),
            recipe=self.options.recipe,
            balance_alpha=self.options.balance_alpha,
        )

    def _reduce_gradients(self) -> None:
        """The mean over all ranks. An expert's gradient is the sum over its group already: rows came to it."""
        for parameters in (self.dense, self.local):
            for _, p in parameters:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
        if self.world == 1:
            return
        reduce_mean([p for _, p in self.dense], dist.group.WORLD, self.world)
        reduce_mean([p for _, p in self.local], self.replicas_group, self.world)

    def _clip(self) -> Tensor:
        """Clips the gradient's norm over all parameters of all ranks; returns what it was."""
        squares = [sum((p.grad.square().sum() for _, p in ps), torch.zeros((), device=self.model.device))
                   for ps in (self.dense, self.local)]  # fmt: skip
        if self.experts_group is not None:
            dist.all_reduce(squares[1], group=self.experts_group)
        norm = (squares[0] + squares[1]).sqrt()
        factor = (self.options.clip / (norm + 1e-6)).clamp(max=1.0)
        for _, p in (*self.dense, *self.local):
            p.grad.mul_(factor)
        return norm

    def _check_finite(self, losses: dict[str, Tensor], norm: Tensor) -> None:
        """NonFiniteError before anything is updated; losses and norm are those of all ranks, so all ranks come here."""
        bad = {name: float(x) for name, x in {**losses, "gradient norm": norm}.items() if not torch.isfinite(x)}
        if not bad:
            return
        where = self._first(bad_weight(self.model))
        if where is None:  # on all ranks: the pass exchanges rows
            found = [bad_result(self.model, partial(self._loss, *some)) for some in self._microbatches(self.step)]
            where = self._first(next((words for words in found if words), None))
        last = last_checkpoint(self.out)
        raise NonFiniteError(
            f"{OP}: step {self.step + 1}: {', '.join(f'{name} is {value}' for name, value in bad.items())}; "
            f"{where or 'no nan arises in the forward pass'}; nothing was updated, "
            + (f"the last good checkpoint is {last}" if last else "no checkpoint has been written")
        )

    def _first(self, words: str | None) -> str | None:
        """The words of the first rank that has any."""
        if self.world == 1:
            return words
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, words)
        return next((f"rank {r}: {some}" for r, some in enumerate(found) if some), None)

    def _world_group(self) -> Any:
        return dist.group.WORLD if self.world > 1 else None

    # -- checkpoints -------------------------------------------------------------------------------------------------
    def save(self) -> Path:
        """Write `out`/step-N: weights under released names (`from_pretrained` loads them), moments, what the run is.

        Each rank writes what it holds; the folder gets its name when all is in it, then older ones go.
        """
        if self.out is None:
            raise ValueError(f"{OP}: out: got None, wanted a folder for checkpoints")
        final = self.out / f"step-{self.step:06d}"
        fresh = self.out / f".{final.name}"
        if self.rank == 0:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
        self._barrier()
        first_set = self.rank < self.options.expert_parallel
        mine = [p for p in pieces(self.model) if first_set and (self.rank == 0 or p.expert is not None)]
        weights = {p.name: for_file(p.view(stored(p).detach())) for p in mine}
        moments: dict[str, Tensor] = {}
        for piece in pieces(self.model):
            state = self._state_of(stored(piece))
            moments |= {f"{piece.name}.{m}": for_file(piece.view(state[m])) for m in MOMENTS if state}
        file = f"model-{self.rank + 1:05d}-of-{self.options.expert_parallel:05d}.safetensors"
        if weights:
            save_file(weights, fresh / file, metadata={"format": "pt"})
        save_file(moments, fresh / f"optimizer-{self.rank + 1:05d}.safetensors")
        places: list[Any] = [dict.fromkeys(weights, file)]
        if self.world > 1:
            places = [None] * self.world
            dist.all_gather_object(places, dict.fromkeys(weights, file))
        if self.rank == 0:
            index = {name: place for some in places for name, place in some.items()}
            text = json.dumps({"metadata": {}, "weight_map": dict(sorted(index.items()))}, indent=2)
            (fresh / "model.safetensors.index.json").write_text(text + "\n")
            self.config.saved_as(False, "float32").save(fresh)
            run = {"step": self.step, "options": dataclasses.asdict(self.options), "tokens": self._digest()}
            (fresh / "trainer.json").write_text(json.dumps(run, indent=2) + "\n")
            shutil.rmtree(final, ignore_errors=True)
            fresh.rename(final)
            for old in checkpoints(self.out)[: -self.options.keep]:
                shutil.rmtree(old)
        self._barrier()
        return final

    def load(self, folder: str | Path) -> None:
        """Take up weights, moments and step of a checkpoint of this run, written by any number of ranks."""
        folder = Path(folder)
        run = json.loads((folder / "trainer.json").read_text())
        for name, value in dataclasses.asdict(self.options).items():
            was = run["options"].get(name)
            free = name in ("save_every", "keep", "expert_parallel", "micro_batch")
            _checks.value(OP, name, free or was == value, value, f"{was!r}, as {folder} has it (or another out)")
        _checks.value(
            OP, "tokens", run["tokens"] == self._digest(), "another text", f"the one that {folder} was made of"
        )
        whole = Checkpoint(folder)
        whole.check(list(pieces(DeepSeekV3.skeleton(self.config))), self.config.num_hidden_layers)
        fill(self.model, whole)
        self.step = run["step"]
        files = [safe_open(file, "pt") for file in sorted(folder.glob("optimizer-*.safetensors"))]
        places = {name: file for file in files for name in file.keys()}  # noqa: SIM118  (not a dict)
        for optimizer, parameters in zip(self.optimizers, (self.dense, self.local), strict=False):
            inner = getattr(optimizer, "optim", optimizer)
            owned = {id(p) for group in inner.param_groups for p in group["params"]}
            for _, p in parameters:
                if id(p) in owned:
                    inner.state[p] = fresh_state(p) | {"step": self.step}
        for piece in pieces(self.model):
            state = self._state_of(stored(piece))
            for moment in MOMENTS if state else ():
                name = f"{piece.name}.{moment}"
                if name not in places:
                    raise ValueError(f"{OP}: {folder} lacks {name}: a file of another rank is missing")
                piece.view(state[moment]).copy_(places[name].get_tensor(name))

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        """The moments of a parameter, where this rank keeps them."""
        for optimizer in self.optimizers:
            state = getattr(optimizer, "optim", optimizer).state
            if parameter in state:
                return state[parameter]
        return {}

    def _digest(self) -> str:
        return hashlib.sha256(self.tokens.to(torch.int32).cpu().numpy().tobytes()).hexdigest()[:16]

    def _barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def stored(piece: Piece) -> Tensor:
    return getattr(piece.module, piece.attribute)


def reduce_mean(parameters: list[Tensor], group: Any, over: int) -> None:
    """Gradients summed over the group (None: this rank alone) and divided by `over`, some at a time."""
    bucket: list[Tensor] = []
    for i, p in enumerate(parameters):
        bucket.append(p.grad)  # type: ignore[arg-type]
        if sum(g.numel() for g in bucket) < BUCKET and i + 1 < len(parameters):
            continue
        flat = torch.cat([g.flatten() for g in bucket])
        if group is not None:
            dist.all_reduce(flat, group=group)
        flat /= over
        for grad, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            grad.copy_(part.view_as(grad))
        bucket = []


def checkpoints(out: Path) -> list[Path]:
    """The whole ones, oldest first."""
    found = [p for p in out.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and (p / "trainer.json").is_file()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def last_checkpoint(out: Path | None) -> Path | None:
    found = checkpoints(out) if out is not None and out.is_dir() else []
    return found[-1] if found else None
