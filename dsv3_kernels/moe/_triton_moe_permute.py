"""moe_permute in Triton: counts of chunks, their prefix sums, then every token read once and written to its experts.

Three launches, since a grid cannot wait for itself; nothing waits on the host, and no atomics, so the order is fixed.
"""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton

CHUNK = 128  # choices of a program that counts: each is compared with each
MOST = 4096  # experts of the prefix sums' registers
COLUMNS = 2048  # of a program that copies: 16 bytes a load, 8 warps; unmeasured
FILLED = tl.constexpr(2048)  # rows of `source` that a program of the first launch clears


@triton.jit(do_not_specialize=["choices", "bound", "chunks", "num_experts", "token_stride", "choice_stride"])
def triton_moe_permute_count(
    experts, counts, rank, source, choices, bound, chunks, num_experts, token_stride, choice_stride,
    K: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """counts [chunks, E]; rank of each choice among those of its expert in its chunk; source is -1."""
    row = tl.program_id(0).to(tl.int64) * FILLED + tl.arange(0, FILLED)
    tl.store(source + row, tl.full(row.shape, -1, tl.int32), mask=row < bound)
    chunk = tl.program_id(0)
    if chunk < chunks:
        choice = chunk * CHUNK + tl.arange(0, CHUNK)
        place = (choice // K).to(tl.int64) * token_stride + (choice % K).to(tl.int64) * choice_stride
        expert = tl.load(experts + place, mask=choice < choices, other=-1).to(tl.int32)
        kept = (expert >= 0) & (expert < num_experts)
        number = tl.arange(0, CHUNK)
        before = (expert[:, None] == expert[None, :]) & (number[None, :] < number[:, None])
        tl.store(rank + choice, tl.sum(before.to(tl.int32), 1), mask=choice < choices)
        bins = tl.arange(0, EXPERTS)
        count = tl.histogram(expert, EXPERTS, mask=kept)
        tl.store(counts + chunk.to(tl.int64) * num_experts + bins, count, mask=bins < num_experts)


@triton.jit(do_not_specialize=["chunks", "num_experts", "alignment"])
def triton_moe_permute_scan(
    counts, bases, totals, offsets, chunks, num_experts, alignment, EXPERTS: tl.constexpr, ROWS: tl.constexpr
):
    """totals [E], offsets [E + 1] of the aligned segments, and bases [chunks, E]: each chunk's first row."""
    expert = tl.arange(0, EXPERTS)
    there = expert < num_experts
    total = tl.zeros((EXPERTS,), tl.int32)
    for start in range(0, chunks, ROWS):
        chunk = start + tl.arange(0, ROWS)
        place = chunk.to(tl.int64)[:, None] * num_experts + expert[None, :]
        inside = (chunk < chunks)[:, None] & there[None, :]
        total += tl.sum(tl.load(counts + place, mask=inside, other=0), 0)
    tl.store(totals + expert, total, mask=there)
    segment = (total + alignment - 1) // alignment * alignment
    ends = tl.cumsum(tl.where(there, segment, 0), 0)
    tl.store(offsets + 1 + expert, ends, mask=there)
    tl.store(offsets, 0)
    base = ends - segment
    for start in range(0, chunks, ROWS):
        chunk = start + tl.arange(0, ROWS)
        place = chunk.to(tl.int64)[:, None] * num_experts + expert[None, :]
        inside = (chunk < chunks)[:, None] & there[None, :]
        count = tl.load(counts + place, mask=inside, other=0)
        tl.store(bases + place, base[None, :] + tl.cumsum(count, 0) - count, mask=inside)
        base += tl.sum(count, 0)


@triton.jit(do_not_specialize=["tokens", "num_experts", "blocks", "token_stride", "choice_stride", "scale_stride"])
def triton_moe_permute_copy(
    x, scale, experts, bases, rank, totals, offsets, rows, row_scale, row_of, source,
    tokens, num_experts, columns, blocks, x_stride, scale_stride, scale_block, row_scale_stride, row_scale_block,
    token_stride, choice_stride,
    K: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Programs of tokens copy their row to those of their choices; programs of experts clear their padding."""
    across = tl.maximum(tl.cdiv(columns, COLUMNS), 1)
    item, part = tl.program_id(0) // across, tl.program_id(0) % across
    column, block = part * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, BLOCKS)
    inside, with_scale = column < columns, (block < blocks) & (part == 0)
    if item < tokens:
        token = item.to(tl.int64)
        value = tl.load(x + token * x_stride + column, mask=inside, other=0)
        if scale is not None:
            scales = tl.load(
                scale + token * scale_stride + block.to(tl.int64) * scale_block, mask=with_scale, other=0.0
            )
        for k in tl.static_range(K):
            choice = token * K + k
            expert = tl.load(experts + token * token_stride + k * choice_stride).to(tl.int32)
            kept = (expert >= 0) & (expert < num_experts)
            base = tl.load(bases + choice // CHUNK * num_experts + expert, mask=kept, other=0)
            row = base + tl.load(rank + choice)
            tl.store(row_of + choice, tl.where(kept, row, -1), mask=part == 0)
            tl.store(source + row, choice.to(tl.int32), mask=kept & (part == 0))
            row = row.to(tl.int64)
            tl.store(rows + row * columns + column, value, mask=inside & kept)
            if scale is not None:
                to = row_scale + row * row_scale_stride + block.to(tl.int64) * row_scale_block
                tl.store(to, scales, mask=with_scale & kept)
    else:
        expert = item - tokens
        end = tl.load(offsets + expert + 1)
        for padding in range(tl.load(offsets + expert) + tl.load(totals + expert), end):
            row = tl.cast(padding, tl.int64)
            tl.store(rows + row * columns + column, tl.zeros((COLUMNS,), rows.dtype.element_ty), mask=inside)
            if scale is not None:
                to = row_scale + row * row_scale_stride + block.to(tl.int64) * row_scale_block
                tl.store(to, tl.zeros((BLOCKS,), tl.float32), mask=with_scale)


def moe_permute_cannot(x: Tensor, experts: Tensor, scale: Tensor | None, num_experts: int, *_: object) -> str | None:
    if num_experts > MOST:
        return f"the Triton kernels take up to {MOST} experts, got {num_experts}"
    return None


def moe_permute(
    x: Tensor, experts: Tensor, scale: Tensor | None, num_experts: int, alignment: int,
    rows: Tensor, row_scale: Tensor, offsets: Tensor, counts: Tensor, row_of: Tensor, source: Tensor,
) -> None:  # fmt: skip
    tokens, choices = experts.shape
    bound, columns = rows.shape
    chunks = _triton.cdiv(tokens * choices, CHUNK)
    width = _triton.next_power_of_2(num_experts)
    scratch = torch.empty(2 * chunks * num_experts + tokens * choices, dtype=torch.int32, device=x.device)
    of_chunks, bases, rank = scratch.split([chunks * num_experts, chunks * num_experts, tokens * choices])
    grid = (max(chunks, _triton.cdiv(bound, FILLED.value)),)
    sizes = tokens * choices, bound, chunks, num_experts, *experts.stride()
    _triton.launch(
        triton_moe_permute_count, grid, experts, of_chunks, rank, source, *sizes, choices, width, CHUNK, num_warps=4
    )
    tall = max(1, 8192 // width)
    _triton.launch(
        triton_moe_permute_scan, (1,), of_chunks, bases, counts, offsets, chunks, num_experts, alignment, width, tall,
        num_warps=8,
    )  # fmt: skip
    if x.dtype == torch.float8_e4m3fn:  # copied as bytes, which every GPU knows
        x, rows = x.view(torch.uint8), rows.view(torch.uint8)
    wide = min(COLUMNS, max(32, _triton.next_power_of_2(columns)))
    blocks = scale.shape[1] if scale is not None else 0
    strides = (*scale.stride(), *row_scale.stride()) if scale is not None else (0, 0, 0, 0)
    grid = ((tokens + num_experts) * max(1, _triton.cdiv(columns, wide)),)
    tensors = x, scale, experts, bases, rank, counts, offsets, rows, row_scale, row_of, source
    sizes = tokens, num_experts, columns, blocks, x.stride(0), *strides, *experts.stride()
    _triton.launch(
        triton_moe_permute_copy, grid, *tensors, *sizes, choices, CHUNK, wide, _triton.next_power_of_2(blocks),
        num_warps=max(1, wide // 512),
    )  # fmt: skip
