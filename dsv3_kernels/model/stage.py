"""The model cut into pipeline stages, a forward and a backward microbatch interleaved where a schedule pairs them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from . import mtp, train
from . import weights as storage
from .config import Config
from .fp8 import Recipe
from .layers import Phase, Step
from .model import DeepSeekV3


class Stage(nn.Module):
    """Consecutive blocks of a model, with its embedding before the first and its norm, head and MTP layers after the
    last: a module for `dk.pipeline.Pipeline`. Module paths are the released parameter names.

    The first stage takes tokens [B, S], others (update, residual) [B, S, H]; the last one gives what `loss` takes.
    Stages made together share the embedding, which the MTP layers read too: with MTP, the first and the last stage
    belong on one rank, as DualPipe has them.
    """

    def __init__(self, model: DeepSeekV3, layers: range, recipe: str, mtp_weight: float) -> None:
        super().__init__()
        _checks.one_of("Stage", "recipe", recipe, *train.RECIPES)
        self.config, self.recipe, self.mtp_weight = model.config, recipe, mtp_weight
        self._whole = (model,)  # in a tuple: no submodule
        backbone, own = model.model, nn.Module()
        count = model.config.num_hidden_layers
        self.first, self.last = layers.start == 0, layers.stop == count
        self.model = own
        extra = range(count, count + model.config.num_nextn_predict_layers if self.last else count)
        own.layers = nn.ModuleDict({str(i): backbone.layers[i] for i in (*layers, *extra)})
        if self.first or extra:
            own.embed_tokens = backbone.embed_tokens
        if self.last:
            own.norm, self.lm_head = backbone.norm, model.lm_head
        self.blocks: list[Any] = [backbone.layers[i] for i in layers]

    @property
    def whole(self) -> DeepSeekV3:
        """The model that this is a part of. Layers of other stages may have no memory."""
        return self._whole[0]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        program = self.program(*inputs)
        try:
            while True:
                next(program)
        except StopIteration as done:
            return done.value

    def program(self, *inputs: Tensor) -> Generator[str, None, tuple[Tensor, Tensor]]:
        """The forward pass, pausing while rows are under way. Its outputs carry the tape for `backward`."""
        model, shape = self.whole, inputs[0].shape[:2]
        step = self._step(inputs[0] if self.first else inputs[0].new_zeros(shape, dtype=torch.int64))
        if torch.is_grad_enabled():
            step.tape = []
        residual: Tensor | None = None
        if self.first:
            update = model.embed(step.tokens, step.dtype)
            step.note((), (), (update,), model.model.embed_tokens)
        else:
            start = step.cut(*inputs)
            update, residual = (x.flatten(0, 1) for x in start)
            step.note(inputs, start, (update, residual))
        for block in self.blocks:
            update, residual = yield from block.phases(update, residual, step)
        assert residual is not None
        before, norm = (update, residual), model.model.norm
        update, residual = start = step.cut(update, residual)
        if self.last:
            update, residual = norm(update, residual)
        outputs = update.view(*shape, -1), residual.view(*shape, -1)
        step.note(before, start, outputs, norm if self.last else None)
        outputs[0].tape = step.tape
        return outputs

    def loss(self, normed: Tensor, residual: Tensor, tokens: Tensor) -> Tensor:
        """The criterion of the last stage: main loss plus `mtp_weight` times that of the MTP layers."""
        tape: list[Phase] | None = getattr(normed, "tape", None)
        step = self._step(tokens)
        step.tape = None if tape is None else [*tape]
        before = (normed, residual)
        normed, residual = start = step.cut(normed, residual)
        parts = train.losses(self.whole, step, tokens, normed, residual)
        total = parts["main"] + self.mtp_weight * parts["mtp"]
        if tape is not None:
            layers = mtp.layers(self.whole)
            embedding = self.whole.model.embed_tokens if layers else None
            step.note(before, start, (total,), self.lm_head, embedding, *layers)
            total.tape = step.tape  # type: ignore[attr-defined]
        return total

    def backward(
        self, tape: list[Phase], roots: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> Generator[str, None, None]:
        """Gradients from `roots` to the stage's inputs and parameters, in `.grad`, pausing like `program`."""
        known = {id(root): grad for root, grad in zip(roots, grads, strict=True)}
        for i, phase in reversed([*enumerate(tape)]):
            ends = [t for t in phase.outputs if id(t) in known]
            wanted = [name for _, name in phase.inputs] + phase.parameters
            if ends and wanted:
                found = torch.autograd.grad(ends, wanted, [known.pop(id(t)) for t in ends], allow_unused=True)
                targets = [source for source, _ in phase.inputs] + phase.parameters
                for j, (tensor, grad) in enumerate(zip(targets, found, strict=True)):
                    if grad is None:
                        continue
                    if j < len(phase.inputs) and i > 0:
                        known[id(tensor)] = known[id(tensor)] + grad if id(tensor) in known else grad
                    elif tensor.grad is None:
                        tensor.grad = grad.clone()  # autograd may have given the same one twice
                    else:
                        tensor.grad += grad
            if phase.exchange:
                yield phase.exchange

    @classmethod
    def overlapped_forward_backward(
        cls,
        module0: Stage,
        inputs0: Sequence[Tensor],
        criterion0: Any,
        labels0: Sequence[Tensor],
        module1: Stage,
        loss1: Tensor | None,
        outputs1: Sequence[Tensor],
        output_grads1: Sequence[Tensor],
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """Forward of one microbatch and backward of another, each computing while the other's rows are under way."""
        from ..parallel.overlap import two_microbatch

        def forward() -> Generator[str, None, Any]:
            outputs = yield from module0.program(*inputs0)
            return outputs, None if criterion0 is None else criterion0(*outputs, *labels0)

        roots, grads = (outputs1, output_grads1) if loss1 is None else ([loss1], [torch.ones_like(loss1)])
        backward = module1.backward(roots[0].tape, roots, grads)  # type: ignore[attr-defined]
        programs: tuple[Any, Any] = forward(), backward
        result: Any = two_microbatch(lambda program: program, *programs)[0]
        return result

    def _step(self, tokens: Tensor) -> Step:
        step = self.whole.step(tokens)
        step.dtype = train.RECIPES[self.recipe]
        step.fp8 = Recipe(self.config.pow2_scale) if self.recipe == "fp8" else None
        return step


def stages(
    config: Config,
    which: Sequence[int],
    count: int,
    *,
    group: Any = None,
    max_tokens: int | None = None,
    recipe: str = "fp8",
    mtp_weight: float = 0.3,
    device: torch.device | str = "cpu",
) -> list[Stage]:
    """The stages `which` of `count`, with memory for these alone; `dk.model.weights` fills or draws their values.

    group: ranks that hold the same stages and share their experts out, each bringing its own sequences, at most
    `max_tokens` tokens of them in a microbatch. Layers are spread evenly, the later stages holding the fewer.

    ValueError: more stages than layers, a stage that does not exist, MTP layers with the embedding on another rank.
    """
    total = config.num_hidden_layers
    _checks.value("stages", "count", 1 <= count <= total, count, f"1 to {total}, one layer or more in each")
    _checks.value("stages", "which", all(0 <= i < count for i in which), list(which), f"stages 0 to {count - 1}")
    together = not config.num_nextn_predict_layers or (0 in which) == (count - 1 in which)
    wanted = "the first and the last stage on one rank: the MTP layers share the embedding"
    _checks.value("stages", "which", together, list(which), wanted)
    model = DeepSeekV3.sharded(config, group, max_tokens)
    bounds = [-(-total * i // count) for i in range(count + 1)]
    made = [Stage(model, range(bounds[i], bounds[i + 1]), recipe, mtp_weight) for i in which]
    storage.materialise(nn.ModuleList(made), "float32", torch.float32, torch.device(device))
    model._tabulate("float32", torch.float32, torch.device(device))
    model._finish("bf16")
    return made
