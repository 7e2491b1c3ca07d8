"""Runs a pipeline schedule over torch.distributed point-to-point messages."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .actions import RECEIVES, SENDS, Action, Kind
from .schedule import Schedule
from .schedule import schedule as make_schedule
from .weight_grad import WeightGrad

Tensors = tuple[Tensor, ...]
Key = tuple[int, int]  # (stage, microbatch)
Layout = list[tuple[torch.dtype, bool, tuple[int, ...]]]  # of each tensor: dtype, whether it needs a gradient, shape

_DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip
_SENT_AS_BYTES = frozenset(_DTYPES[-3:])  # gloo takes none of these
_HEADER = 128
_SENDS_IN_FLIGHT = 8


class PipelineError(RuntimeError):
    """A message that did not come or could not be sent; says which action of which rank, and the peer."""


class _Step:
    """What one rank holds while it runs one list."""

    def __init__(
        self,
        schedule: Schedule,
        labels: Mapping[int, Tensors],
        criterion: Callable[..., Tensor] | None,
        return_outputs: bool,
    ) -> None:
        self.schedule = schedule
        self.labels = labels
        self.criterion = criterion
        self.return_outputs = return_outputs
        self.inputs: dict[Key, Tensors] = {}
        self.outputs: dict[Key, Tensors] = {}
        self.losses: dict[int, Tensor] = {}
        self.output_grads: dict[Key, Tensors] = {}
        self.input_grads: dict[Key, Tensors] = {}
        self.hooks: dict[Key, WeightGrad] = {}
        self.results: dict[int, Tensors] = {}
        self.layouts: dict[tuple[Kind, int, int], Layout] = {}  # by channel: what its first message said
        self.receiving: dict[tuple[Kind, int, int], tuple[list[dist.Work], Tensors, int]] = {}
        self.sending: deque[tuple[dist.Work, Tensor, Action]] = deque()


class Pipeline:
    """One rank's part of a model cut into stages, trained by a schedule.

    Args:
        modules: the stages of this rank: one module for "1f1b" and "zb1p"; for "dualpipe" stage r and stage n-1-r, for
            "dualpipev" stage r and stage 2n-1-r (r this rank, n ranks). A stage takes and returns one tensor or
            several.
        group: a process group (gloo or nccl), or None for the default one; rank r of the group is rank r of the
            pipeline.
        schedule: a name for :func:`dsv3_kernels.pipeline.schedule`, or a :class:`Schedule`.
        timeout: seconds to wait for a message (default: the group's).

    Weight gradients are deferred, where the schedule says so, for modules that use
    :class:`~dsv3_kernels.pipeline.WeightGrad`; others compute them in the backward for the inputs.

    A forward and a backward that the schedule overlaps run one after the other, unless both modules are of one class
    with the hook (the one of DualPipe)::

        @classmethod
        def overlapped_forward_backward(
            cls, module0, inputs0, criterion0, labels0, module1, loss1, outputs1, output_grads1
        ):
            return outputs0, loss0

    which runs ``module0(*inputs0)``, and ``criterion0(*outputs, *labels0)`` if ``criterion0`` is not None, interleaved
    with the backward of ``loss1`` if it is not None, else of ``outputs1`` with ``output_grads1``. Its weight gradients
    are not deferred.
    """

    def __init__(
        self,
        modules: nn.Module | Sequence[nn.Module],
        group: dist.ProcessGroup | None,
        schedule: str | Schedule = "dualpipe",
        *,
        timeout: float | None = None,
        rank_mapping: Sequence[int] | None = None,
    ) -> None:
        self.group = group if group is not None else dist.group.WORLD
        if self.group is None:
            raise RuntimeError("Pipeline: group is None and torch.distributed is not initialised")
        self.num_ranks = self.group.size()
        mapping = list(range(self.num_ranks)) if rank_mapping is None else list(rank_mapping)
        if sorted(mapping) != list(range(self.num_ranks)):
            raise ValueError(f"Pipeline: rank_mapping: got {mapping}, wanted a permutation of {self.num_ranks} ranks")
        self.rank = mapping[self.group.rank()]
        self._group_rank = [mapping.index(r) for r in range(self.num_ranks)]

        name = schedule.name if isinstance(schedule, Schedule) else schedule
        wanted = 2 if name in ("dualpipe", "dualpipev") else 1
        several = isinstance(modules, nn.ModuleList | nn.Sequential if wanted == 2 else nn.ModuleList)
        self.modules: list[nn.Module] = (
            [modules] if isinstance(modules, nn.Module) and not several else list(modules)  # type: ignore[arg-type]
        )
        if len(self.modules) != wanted:
            raise ValueError(
                f"Pipeline: modules: got {len(self.modules)}, wanted {wanted} (stages of a rank of {name})"
            )
        if isinstance(schedule, Schedule) and schedule.num_ranks != self.num_ranks:
            raise ValueError(f"Pipeline: schedule: got one for {schedule.num_ranks} ranks, wanted {self.num_ranks}")
        if isinstance(schedule, str):
            make_schedule(schedule, self.num_ranks, 4 * self.num_ranks)  # an unknown name or odd ranks: say so now
        self._schedule = schedule
        self._timeout = None if timeout is None else timedelta(seconds=timeout)
        parameter = next((p for m in self.modules for p in m.parameters()), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device
        first, last = type(self.modules[0]), type(self.modules[-1])
        self._overlaps = wanted == 2 and first is last and hasattr(first, "overlapped_forward_backward")

    def schedule(self, num_microbatches: int) -> Schedule:
        """The schedule of a step with so many microbatches."""
        if isinstance(self._schedule, Schedule):
            if self._schedule.num_microbatches != num_microbatches:
                raise ValueError(
                    f"Pipeline.step: num_microbatches: got {num_microbatches}, but the schedule is for "
                    f"{self._schedule.num_microbatches}"
                )
            return self._schedule
        return make_schedule(self._schedule, self.num_ranks, num_microbatches)

    def step(
        self,
        inputs: Tensor | Sequence[Tensor] | None = None,
        *,
        labels: Tensor | Sequence[Tensor] | None = None,
        criterion: Callable[..., Tensor] | None = None,
        num_microbatches: int,
        return_outputs: bool = False,
    ) -> tuple[Tensor | None, Tensor | Tensors | None]:
        """Runs one step over the whole batch and accumulates gradients in ``.grad``.

        The gradient is that of the sum of the microbatches' losses. For "dualpipe", whose stages exist twice, the
        gradients of both copies are summed and are the same, bit for bit, on both. Under ``torch.no_grad()`` only the
        forwards run.

        Args:
            inputs: the whole batch, [batch, ...] (several tensors in a sequence), cut along dim 0 into
                ``num_microbatches`` equal parts. Needed on the ranks that hold a first stage (rank 0; for "dualpipe"
                also the last rank, which feeds the second half); others may give None.
            labels: likewise for the ranks that hold a last stage (the last rank; for "dualpipe" also rank 0; for
                "dualpipev" rank 0).
            criterion: ``criterion(*outputs, *labels) -> loss`` of one microbatch; needed where ``labels`` are.
            return_outputs: whether to keep the outputs of the last stage.

        Returns:
            ``losses`` [num_microbatches], the same on every rank (None without a criterion), and ``outputs``: of the
            last stage, for the microbatches that end on this rank, or None.

        Raises:
            ValueError: bad sizes, or missing inputs or criterion.
            PipelineError: a peer that is gone or late.
        """
        schedule = self.schedule(num_microbatches)
        mine = [m for m in range(num_microbatches) if schedule.rank_of(0, m) == self.rank]
        ends = [m for m in range(num_microbatches) if schedule.rank_of(schedule.num_stages - 1, m) == self.rank]
        if mine and inputs is None:
            raise ValueError(
                f"Pipeline.step: inputs: got None, wanted a batch on rank {self.rank} (it holds a first stage)"
            )
        feeds = dict(zip(mine, (_split(inputs, num_microbatches, "inputs")[m] for m in mine), strict=True))
        targets = dict(zip(ends, (_split(labels, num_microbatches, "labels")[m] for m in ends), strict=True))

        if not (schedule.mirrored and torch.is_grad_enabled()):
            losses, results = self.run(schedule, feeds, targets, criterion, return_outputs)
        else:
            # Only this step's gradients are summed over the copies: those of earlier steps are set aside.
            parameters = [p for module in self.modules for p in module.parameters() if p.requires_grad]
            earlier = [p.grad for p in parameters]
            for p in parameters:
                p.grad = None
            try:
                losses, results = self.run(schedule, feeds, targets, criterion, return_outputs)
                self._sum_mirrored()
            finally:
                for p, grad in zip(parameters, earlier, strict=True):
                    if grad is not None:
                        p.grad = grad if p.grad is None else grad.add_(p.grad)
        outputs = None
        if results:
            parts = [torch.cat(tensors) for tensors in zip(*(results[m] for m in sorted(results)), strict=True)]
            outputs = parts[0] if len(parts) == 1 else tuple(parts)
        return self._share_losses(losses, num_microbatches), outputs

    def run(
        self,
        schedule: Schedule,
        inputs: Mapping[int, Tensors],
        labels: Mapping[int, Tensors],
        criterion: Callable[..., Tensor] | None,
        return_outputs: bool,
    ) -> tuple[dict[int, Tensor], dict[int, Tensors]]:
        """Runs this rank's list; inputs and labels by microbatch. Returns losses and outputs by microbatch."""
        if not torch.is_grad_enabled():
            schedule = schedule.forward_only()
        elif labels and criterion is None:
            raise ValueError(
                f"Pipeline.step: criterion: got None, wanted one on rank {self.rank} (it holds a last stage)"
            )
        step = _Step(schedule, labels, criterion, return_outputs)
        step.inputs.update({(0, m): tensors for m, tensors in inputs.items()})

        batch: list[Action] = []
        for action in schedule.actions[self.rank]:
            if action.is_communication:
                batch.append(action)
                continue
            self._communicate(step, batch, action)
            batch = []
            self._compute(step, action)
        self._communicate(step, batch, None)
        while step.sending:
            self._finish_send(step)
        return step.losses, step.results

    # Compute -------------------------------------------------------------------------------------------------------

    def _compute(self, step: _Step, action: Action) -> None:
        key = (action.stage, action.microbatch)
        if action.kind == Kind.FORWARD:
            self._forward(step, key)
        elif action.kind == Kind.WEIGHT:
            step.hooks.pop(key).run()
        elif action.backward is None:
            self._backward(step, key, defer=action.kind == Kind.INPUT)
        elif self._overlaps:
            self._overlapped(step, key, action.backward)
        else:
            self._forward(step, key)
            self._backward(step, action.backward, defer=False)

    def _module(self, step: _Step, stage: int) -> nn.Module:
        return self.modules[step.schedule.stages_of(self.rank).index(stage)]

    def _forward(self, step: _Step, key: Key) -> None:
        stage, microbatch = key
        hook = step.hooks[key] = WeightGrad()
        loss = None
        with hook.active():
            outputs = _as_tuple(self._module(step, stage)(*step.inputs[key]))
            if stage == step.schedule.num_stages - 1 and step.criterion is not None:
                loss = step.criterion(*outputs, *step.labels[microbatch])
        self._forward_done(step, key, outputs, loss)

    def _forward_done(self, step: _Step, key: Key, outputs: Tensors, loss: Tensor | None) -> None:
        stage, microbatch = key
        if stage == step.schedule.num_stages - 1:
            if step.return_outputs:
                step.results[microbatch] = tuple(o.detach() for o in outputs)
            if loss is not None:
                step.losses[microbatch] = loss
            outputs = ()
        elif step.schedule.rank_of(stage + 1, microbatch) == self.rank:
            step.inputs[stage + 1, microbatch] = tuple(o.detach().requires_grad_(o.requires_grad) for o in outputs)
        step.outputs[key] = outputs
        if not step.schedule.training:
            del step.inputs[key], step.hooks[key]

    def _roots(self, step: _Step, key: Key) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
        """What the backward of a stage starts from: a loss, or outputs and their gradients."""
        outputs = [o for o in step.outputs.pop(key) if o.requires_grad]
        if key[0] == step.schedule.num_stages - 1:
            return step.losses[key[1]], [], []
        return None, outputs, list(step.output_grads.pop(key))

    def _backward(self, step: _Step, key: Key, *, defer: bool) -> None:
        loss, outputs, grads = self._roots(step, key)
        hook = step.hooks[key]
        with hook.active():
            self._run_backward(loss, outputs, grads, hook if defer else None)
        self._backward_done(step, key, keep_hook=defer)

    def _run_backward(
        self, loss: Tensor | None, outputs: list[Tensor], grads: list[Tensor], deferred_to: WeightGrad | None
    ) -> None:
        with nullcontext() if deferred_to is None else deferred_to.deferring():
            if loss is not None:
                if loss.requires_grad:
                    loss.backward()
            elif outputs:
                torch.autograd.backward(outputs, grads)

    def _backward_done(self, step: _Step, key: Key, *, keep_hook: bool) -> None:
        stage, microbatch = key
        if stage == step.schedule.num_stages - 1:
            step.losses[microbatch] = step.losses[microbatch].detach()
        inputs = step.inputs.pop(key)
        if not keep_hook:
            del step.hooks[key]
        if stage == 0:
            return
        grads = tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in inputs if x.requires_grad)
        if step.schedule.rank_of(stage - 1, microbatch) == self.rank:
            step.output_grads[stage - 1, microbatch] = grads
        else:
            step.input_grads[key] = grads

    def _overlapped(self, step: _Step, forward: Key, backward: Key) -> None:
        module = self._module(step, forward[0])
        last = forward[0] == step.schedule.num_stages - 1 and step.criterion is not None
        loss, outputs, grads = self._roots(step, backward)
        hook = step.hooks[forward] = WeightGrad()
        with hook.active():
            new_outputs, new_loss = cast(Any, type(module)).overlapped_forward_backward(
                module,
                list(step.inputs[forward]),
                step.criterion if last else None,
                list(step.labels[forward[1]]) if last else [],
                self._module(step, backward[0]),
                loss,
                outputs,
                grads,
            )
        self._forward_done(step, forward, _as_tuple(new_outputs), new_loss)
        self._backward_done(step, backward, keep_hook=False)

    # Communication -------------------------------------------------------------------------------------------------

    def _communicate(self, step: _Step, batch: list[Action], before: Action | None) -> None:
        """Posts a batch, then waits for what the compute action ``before`` needs."""
        forwards = (Kind.SEND_FORWARD, Kind.RECV_FORWARD)
        headers = [a for a in batch if a.kind in forwards and (a.kind, a.stage, a.peer) not in step.layouts]
        if headers:
            self._exchange_headers(step, headers)
        ops: list[tuple[Action, Tensor]] = []
        for action in batch:
            ops += [(action, tensor) for tensor in self._payload(step, action)]
        for (action, tensor), work in zip(ops, self._post(ops), strict=True):
            if action.kind in SENDS:
                step.sending.append((work, tensor, action))
            else:
                step.receiving[action.kind, action.stage, action.microbatch][0].append(work)
        while len(step.sending) > _SENDS_IN_FLIGHT:
            self._finish_send(step)
        if before is not None:
            for kind, stage, microbatch in before.parts():
                if kind != Kind.WEIGHT:
                    self._finish_receive(step, kind, stage, microbatch)

    def _payload(self, step: _Step, action: Action) -> list[Tensor]:
        """The wire tensors of a communication action; for a receive they are allocated and remembered."""
        key = (action.stage, action.microbatch)
        layout = step.layouts.get((action.kind, action.stage, action.peer), [])
        if action.kind == Kind.SEND_FORWARD:
            tensors = step.outputs[key]
            if _layout(tensors) != layout:
                raise ValueError(
                    f"Pipeline.step: stage {action.stage} returned {_words(_layout(tensors))} for microbatch "
                    f"{action.microbatch}, but {_words(layout)} for the first one"
                )
            if not step.schedule.training:
                del step.outputs[key]
        elif action.kind == Kind.SEND_BACKWARD:
            tensors = step.input_grads.pop(key)
        elif action.kind == Kind.RECV_FORWARD:
            tensors = tuple(torch.empty(shape, dtype=dtype, device=self.device) for dtype, _, shape in layout)
        else:
            tensors = tuple(
                torch.empty_like(o, memory_format=torch.contiguous_format) for o in step.outputs[key] if o.requires_grad
            )
        if action.kind in RECEIVES:
            step.receiving[action.kind, *key] = ([], tensors, action.peer)
        wire = [t.detach().contiguous() for t in tensors]
        return [t.view(torch.uint8) if t.dtype in _SENT_AS_BYTES else t for t in wire if t.numel()]

    def _exchange_headers(self, step: _Step, actions: list[Action]) -> None:
        """The first message of a channel in a step says what all its messages look like."""
        ops: list[tuple[Action, Tensor]] = []
        for action in actions:
            header = torch.zeros(_HEADER, dtype=torch.int64)
            if action.kind == Kind.SEND_FORWARD:
                layout = _layout(step.outputs[action.stage, action.microbatch])
                words = [len(layout)]
                for dtype, needs_grad, shape in layout:
                    words += [_DTYPES.index(dtype), int(needs_grad), len(shape), *shape]
                if len(words) > _HEADER:
                    raise ValueError(f"Pipeline.step: stage {action.stage} returned {len(layout)} tensors: too many")
                header[: len(words)] = torch.tensor(words)
                step.layouts[action.kind, action.stage, action.peer] = layout
            ops.append((action, header.to(self.device)))
        for (action, header), work in zip(ops, self._post(ops), strict=True):
            if action.kind == Kind.SEND_FORWARD:
                step.sending.append((work, header, action))
            else:
                self._wait(work, action.peer, str(action))
                step.layouts[action.kind, action.stage, action.peer] = _read_layout(header.tolist())

    def _post(self, ops: Sequence[tuple[Action, Tensor]]) -> list[dist.Work]:
        """Posts sends and receives at once; one work for each."""
        if not ops:
            return []
        p2p = [
            dist.P2POp(
                dist.isend if action.kind in SENDS else dist.irecv,
                tensor,
                group=self.group,
                group_peer=self._group_rank[action.peer],
            )
            for action, tensor in ops
        ]
        try:
            works = dist.batch_isend_irecv(p2p)
        except RuntimeError as error:
            peers = ", ".join(str(p) for p in sorted({action.peer for action, _ in ops}))
            raise PipelineError(
                f"Pipeline: rank {self.rank} cannot exchange messages with rank {peers}: {error}"
            ) from error
        # A backend that coalesces (NCCL) gives one work for the whole batch.
        return works if len(works) == len(ops) else [works[-1]] * len(ops)

    def _wait(self, work: dist.Work, peer: int, what: str) -> None:
        try:
            done = work.wait() if self._timeout is None else work.wait(self._timeout)
        except RuntimeError as error:
            raise PipelineError(f"Pipeline: rank {self.rank}, {what}: rank {peer} is gone or late: {error}") from error
        if done is False:
            raise PipelineError(f"Pipeline: rank {self.rank}, {what}: rank {peer} is gone or late")

    def _finish_send(self, step: _Step) -> None:
        work, _, action = step.sending.popleft()
        self._wait(work, action.peer, str(action))

    def _finish_receive(self, step: _Step, kind: Kind, stage: int, microbatch: int) -> None:
        forward = kind == Kind.FORWARD
        received = Kind.RECV_FORWARD if forward else Kind.RECV_BACKWARD
        if (received, stage, microbatch) not in step.receiving:
            return
        works, tensors, peer = step.receiving.pop((received, stage, microbatch))
        for work in works:
            self._wait(work, peer, str(Action(received, stage, microbatch, peer=peer)))
        if not forward:
            step.output_grads[stage, microbatch] = tensors
            return
        for tensor, (_, needs_grad, _) in zip(tensors, step.layouts[received, stage, peer], strict=True):
            tensor.requires_grad_(needs_grad and step.schedule.training)
        step.inputs[stage, microbatch] = tensors

    # After the list -------------------------------------------------------------------------------------------------

    def _sum_mirrored(self) -> None:
        """Adds the gradients of a stage's two copies: rank r's first module is the other's second."""
        peer = self.num_ranks - 1 - self.rank
        mine = [[p for p in m.parameters() if p.requires_grad] for m in self.modules]
        send, receive = Action(Kind.SEND_BACKWARD, 0, 0, peer=peer), Action(Kind.RECV_BACKWARD, 0, 0, peer=peer)

        def swap(out: list[Tensor]) -> list[Tensor]:
            """Sends what belongs to (first, second) module; returns what the peer has for (first, second)."""
            back = [torch.empty_like(t) for t in out]
            # The peer's first module mirrors our second: its tensors come in its order, ours are filed crosswise.
            ops = [(send, out[0]), (send, out[1]), (receive, back[1]), (receive, back[0])]
            for work in self._post([(action, tensor) for action, tensor in ops if tensor.numel()]):
                self._wait(work, peer, "sum of mirrored gradients")
            return back

        there = swap(
            [torch.tensor([p.grad is not None for p in ps], dtype=torch.uint8, device=self.device) for ps in mine]
        )
        used = [
            [p for p, other in zip(ps, flags.tolist(), strict=True) if p.grad is not None or other]
            for ps, flags in zip(mine, there, strict=True)
        ]
        for dtype in dict.fromkeys(p.dtype for ps in mine for p in ps):
            chosen = [[p for p in ps if p.dtype == dtype] for ps in used]
            flat = [
                torch.cat([torch.zeros(0, dtype=dtype, device=self.device), *(_grad(p).flatten() for p in ps)])
                for ps in chosen
            ]
            for ps, own, other in zip(chosen, flat, swap(flat), strict=True):
                for p, total in zip(ps, (own + other).split([p.numel() for p in ps]), strict=True):
                    p.grad = total.view_as(p)

    def _share_losses(self, losses: Mapping[int, Tensor], num_microbatches: int) -> Tensor | None:
        """Every rank's losses to every rank: [losses..., dtype of the first, plus one]."""
        shared = torch.zeros(num_microbatches + 1, dtype=torch.float64, device=self.device)
        for microbatch, loss in losses.items():
            shared[microbatch] = loss.detach()
        if 0 in losses:
            shared[-1] = 1 + _DTYPES.index(losses[0].dtype)
        try:
            dist.all_reduce(shared, group=self.group)
        except RuntimeError as error:
            raise PipelineError(f"Pipeline: rank {self.rank} cannot share the losses: {error}") from error
        code = int(shared[-1])
        return shared[:-1].to(_DTYPES[code - 1]) if code else None


def _grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _as_tuple(outputs: Any) -> Tensors:
    tensors = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"Pipeline.step: a stage returned {type(tensor).__name__}, wanted tensors")
    return tensors


def _layout(tensors: Tensors) -> Layout:
    return [(t.dtype, t.requires_grad, tuple(t.shape)) for t in tensors]


def _read_layout(words: list[int]) -> Layout:
    layout: Layout = []
    at = 1
    for _ in range(words[0]):
        code, needs_grad, dims = words[at : at + 3]
        layout.append((_DTYPES[code], bool(needs_grad), tuple(words[at + 3 : at + 3 + dims])))
        at += 3 + dims
    return layout


def _words(layout: Layout) -> str:
    return ", ".join(f"{str(dtype).removeprefix('torch.')} {list(shape)}" for dtype, _, shape in layout)


def _split(tensors: Tensor | Sequence[Tensor] | None, parts: int, argument: str) -> list[Tensors]:
    """Cuts a batch into equal microbatches along dim 0."""
    if tensors is None:
        return [()] * parts
    whole = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
    for tensor in whole:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"Pipeline.step: {argument}: got {type(tensor).__name__}, wanted a tensor or several")
        if tensor.dim() == 0 or not tensor.shape[0] or tensor.shape[0] % parts:
            size = tensor.shape[0] if tensor.dim() else "none"
            raise ValueError(
                f"Pipeline.step: {argument}: got a batch of {size}, wanted a multiple of num_microbatches = {parts}"
            )
    return list(zip(*(t.tensor_split(parts) for t in whole), strict=True))
