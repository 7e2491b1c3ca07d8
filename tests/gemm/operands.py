"""FP8 operands in poisoned surroundings, their float64 products, and outputs that show what was written."""

from __future__ import annotations

from dataclasses import dataclass

import exact
import torch
from checks import close
from torch import Tensor

NAN_CODE = 0x7F


@dataclass
class Case:
    """Operands whose neighbours in memory are NaN, and what their product should be."""

    a: Tensor
    a_scale: Tensor
    b: Tensor
    b_scale: Tensor
    wanted: Tensor  # float64
    size: Tensor  # sum |a| |b| of scaled values, float64


def codes(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random finite E4M3 codes `[rows, columns]`, inside a larger tensor of NaN."""
    stride = (columns + 15) // 16 * 16 + 16
    memory = torch.full((rows + 2, stride), NAN_CODE, dtype=torch.uint8)
    values = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.int32)
    memory[:rows, :columns] = torch.where((values & 0x7F) == NAN_CODE, 0x38, values).to(torch.uint8)
    return memory.view(torch.float8_e4m3fn)[:rows, :columns]


def scales(rows: int, blocks: int, generator: torch.Generator, layout: str) -> Tensor:
    """Random scales `[rows, blocks]`: "mn" column by column, "k" row by row, "gaps" neither; NaN in between."""
    values = torch.rand(rows, blocks, generator=generator) + 0.5
    if layout == "k":
        return values
    memory = torch.full((blocks, 2 if layout == "gaps" else 1, rows + 3), torch.nan)
    view = memory[:, 0, :rows].t()
    view.copy_(values)
    return view


def expand(scale: Tensor, rows: int, columns: int) -> Tensor:
    if scale.shape[0] != rows:
        scale = scale.repeat_interleave(128, 0)[:rows]
    return scale.double().repeat_interleave(128, 1)[:, :columns]


def product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The product in float64, and the same of magnitudes."""
    x = a.float().double() * expand(a_scale, *a.shape)
    y = b.float().double() * expand(b_scale, *b.shape)
    return x @ y.t(), x.abs() @ y.abs().t()


def make(m: int, n: int, k: int, *, by_row: bool = False, layout: str = "mn", seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    blocks = (k + 127) // 128
    a, b = codes(m, k, generator), codes(n, k, generator)
    a_scale = scales(m, blocks, generator, layout)
    b_scale = scales(n if by_row else (n + 127) // 128, blocks, generator, layout)
    return Case(a, a_scale, b, b_scale, *product(a, a_scale, b, b_scale))


def canvas(shape: tuple[int, ...], dtype: torch.dtype, *, offset: int = 8) -> tuple[Tensor, Tensor]:
    """An output of NaN inside a larger tensor of NaN, and that tensor."""
    *leading, n = shape
    memory = torch.full((*leading[:-1], leading[-1] + 2, n + offset + 8), torch.nan, dtype=dtype)
    return memory[..., : leading[-1], offset : offset + n], memory


def check(out: Tensor, wanted: Tensor, size: Tensor, what: str = "out") -> None:
    bound = exact.SIMULATED * size
    if out.dtype == torch.bfloat16:
        bound = bound + wanted.abs() * 2**-8 + 1e-30
    close(out, wanted, bound, what)


def only_wrote(memory: Tensor, written: Tensor) -> None:
    """Everything else of the canvas is still NaN."""
    count = int((~memory.isnan()).sum())
    assert count == written.numel(), f"{count} elements written, wanted {written.numel()}"
