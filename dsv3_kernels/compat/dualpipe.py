"""DeepSeek's DualPipe package (github.com/deepseek-ai/DualPipe) by its own names, on
:class:`dsv3_kernels.pipeline.Pipeline`.

Differences: it runs on gloo and CPU tensors too; the shapes of messages are exchanged, so that
:func:`set_p2p_tensor_shapes` and :func:`set_p2p_tensor_dtype` need not be called; bad arguments are errors in words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..pipeline.executor import Pipeline
from ..pipeline.weight_grad import WeightGrad


class WeightGradStore:
    """Where a module leaves functions that accumulate weight gradients, if ``enabled``, for a later action to run."""

    enabled: bool = False
    cache: ClassVar[list[Callable[[], Any]]] = []
    funcs_queue: ClassVar[list[list[Callable[[], Any]]]] = []

    @classmethod
    def put(cls, func: Callable[[], Any]) -> None:
        cls.cache.append(func)

    @classmethod
    def flush(cls) -> None:
        cls.funcs_queue.append(list(cls.cache))
        cls.cache.clear()

    @classmethod
    def pop(cls) -> None:
        if not cls.funcs_queue:
            raise RuntimeError("WeightGradStore.pop: nothing was flushed")
        for func in cls.funcs_queue.pop(0):
            func()

    @classmethod
    def clear(cls) -> None:
        cls.cache.clear()
        cls.funcs_queue.clear()


def set_p2p_tensor_shapes(shapes: Sequence[Sequence[int]]) -> None:
    """Accepted and not needed: the first message of a step says its shapes."""


def set_p2p_tensor_dtype(dtype: torch.dtype) -> None:
    """Accepted and not needed: the first message of a step says its dtypes."""


def run_backward(tensors: Sequence[Tensor], grad_tensors: Sequence[Tensor]) -> None:
    torch.autograd.backward(tensors, grad_tensors)


class _StorePipeline(Pipeline):
    """Deferred functions come through :class:`WeightGradStore` as well as through the hook."""

    def _run_backward(
        self, loss: Tensor | None, outputs: list[Tensor], grads: list[Tensor], deferred_to: WeightGrad | None
    ) -> None:
        WeightGradStore.enabled = deferred_to is not None
        try:
            super()._run_backward(loss, outputs, grads, deferred_to)
        finally:
            WeightGradStore.enabled = False
            functions = list(WeightGradStore.cache)
            WeightGradStore.cache.clear()
        if deferred_to is not None:
            with deferred_to.deferring():
                for function in functions:
                    deferred_to.put(function)


class _TwoModules(nn.Module):
    _name: ClassVar[str]

    def __init__(
        self,
        modules: Sequence[nn.Module],
        batch_dim: int = 0,
        process_group: dist.ProcessGroup | None = None,
        rank_mapping: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.module = nn.ModuleList(modules)
        self.batch_dim = batch_dim
        self.pipeline = _StorePipeline(self.module, process_group, self._name, rank_mapping=rank_mapping)
        self.group = self.pipeline.group
        self.num_ranks = self.pipeline.num_ranks
        self.rank = self.pipeline.rank

    def step(
        self,
        *inputs: Tensor | None,
        num_chunks: int = 0,
        criterion: Callable[..., Tensor] | None = None,
        labels: Sequence[Tensor | None] | Tensor = (),
        return_outputs: bool = False,
    ) -> tuple[Tensor | None, Tensor | tuple[Tensor, ...] | None]:
        """Runs one step.

        Args:
            inputs: for "DualPipe" half of the batch on the first rank and the other half on the last; for "DualPipeV"
                the batch on the first rank. Other ranks give None or nothing.
            num_chunks: microbatches of the step, both halves together.
            criterion, labels: ``criterion(*outputs, *labels)``, on the ranks that hold a last stage: for "DualPipe" the
                first rank has the labels for the inputs of the last rank, and the other way round.

        Returns:
            (losses of the microbatches that end on this rank, their outputs if asked for), or None on other ranks. The
            gradients of the two copies of a stage are left apart, as in DualPipe.
        """
        schedule = self.pipeline.schedule(num_chunks)
        last_stage = schedule.num_stages - 1
        starts = [m for m in range(num_chunks) if schedule.rank_of(0, m) == self.rank]
        ends = [m for m in range(num_chunks) if schedule.rank_of(last_stage, m) == self.rank]
        if starts and (not inputs or all(x is None for x in inputs)):
            raise ValueError(f"{type(self).__name__}.step: inputs: got none, wanted some on rank {self.rank}")
        if isinstance(labels, Tensor):
            labels = (labels,)
        feeds = dict(zip(starts, self._scatter(inputs, len(starts)), strict=True))
        targets = dict(zip(ends, self._scatter(labels, len(ends)), strict=True))
        losses, results = self.pipeline.run(schedule, feeds, targets, criterion, return_outputs)
        loss = torch.stack([losses[m].detach() for m in ends]) if ends and losses else None
        if not results:
            return loss, None
        parts = zip(*(results[m] for m in ends), strict=True)
        outputs = tuple(torch.cat(tensors, self.batch_dim) for tensors in parts)
        return loss, outputs[0] if len(outputs) == 1 else outputs

    def _scatter(self, tensors: Sequence[Tensor | None], parts: int) -> list[Any]:
        present = [t for t in tensors if t is not None]
        if not parts or not present:
            return [()] * parts
        return list(zip(*(t.tensor_split(parts, self.batch_dim) for t in present), strict=True))


class DualPipe(_TwoModules):
    """Bidirectional pipeline: rank r of n holds stages r and n-1-r."""

    _name = "dualpipe"


class DualPipeV(_TwoModules):
    """V-shaped pipeline: rank r of n holds stages r and 2n-1-r."""

    _name = "dualpipev"


__all__ = [
    "DualPipe",
    "DualPipeV",
    "WeightGradStore",
    "run_backward",
    "set_p2p_tensor_dtype",
    "set_p2p_tensor_shapes",
]
