"""The quant family in plain PyTorch: the definition of what is right."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantize_1x128 import blocks, empty_scale
from .quantize_1x128_both import width

E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4  # an all-zero block gets a finite scale, and zeros


def scale_of(amax: Tensor, pow2_scale: bool) -> Tensor:
    """Scale of blocks whose largest magnitude is `amax` (float32); NaN where that is not finite."""
    scale = amax.clamp(min=AMAX_FLOOR) / E4M3_MAX
    if pow2_scale:
        # The floor keeps scales normal, so carrying the mantissa into the exponent rounds up to a power of two.
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & ~0x7FFFFF).view(torch.float32)
    return torch.where(amax.isfinite(), scale, torch.nan)


def encode(x: Tensor, scale: Tensor) -> Tensor:
    """E4M3 codes of `x / scale` (broadcast); NaN is the positive one everywhere."""
    real = x / scale
    return torch.where(real.isnan(), torch.nan, real).to(torch.float8_e4m3fn)


def _pad(x: Tensor, amounts: tuple[int, ...]) -> Tensor:
    """Zeros around x, as F.pad has them; torch 2.8's refuses empty dimensions."""
    if not x.numel():
        grown = list(x.shape)
        for dim in range(len(amounts) // 2):
            grown[-1 - dim] += amounts[2 * dim] + amounts[2 * dim + 1]
        return x.new_zeros(grown)
    return F.pad(x, amounts)


def quantize_1x128(x: Tensor, pow2_scale: bool, scale_layout: str) -> tuple[Tensor, Tensor]:
    columns = x.shape[-1]
    padded = _pad(x.float(), (0, -columns % 128)).unflatten(-1, (blocks(columns), 128))
    scale = scale_of(padded.abs().amax(-1), pow2_scale)
    q = encode(padded, scale[..., None]).flatten(-2)[..., :columns].contiguous()
    return q, empty_scale(x, columns, scale_layout).copy_(scale)


def quantize_128x128(w: Tensor, pow2_scale: bool) -> tuple[Tensor, Tensor]:
    rows, columns = w.shape[-2:]
    padded = _pad(w.float(), (0, -columns % 128, 0, -rows % 128))
    tiles = padded.unflatten(-1, (blocks(columns), 128)).unflatten(-3, (blocks(rows), 128))
    scale = scale_of(tiles.abs().amax((-3, -1)), pow2_scale)
    q = encode(tiles, scale[..., :, None, :, None]).flatten(-2).flatten(-3, -2)
    return q[..., :rows, :columns].contiguous(), scale


def quantize_1x128_both(
    x: Tensor, offsets: Tensor | None, pow2_scale: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    columns = width(x, offsets)
    if offsets is None:
        tokens = _pad(x.float(), (0, 0, 0, columns - x.shape[0]))
        offsets_t = x.new_empty(0, dtype=torch.int32)
    else:
        source, offsets_t = _padded_segments(offsets, columns, x.shape[0])
        tokens = _pad(x.float(), (0, 0, 0, 1))[source]
    tiles = tokens.unflatten(0, (blocks(columns), 128))
    scale_t = scale_of(tiles.abs().amax(1), pow2_scale)
    q_t = encode(tiles, scale_t[:, None]).flatten(0, 1).t().contiguous()
    return *quantize_1x128(x, pow2_scale, "mn"), q_t, empty_scale(q_t, columns, "mn").copy_(scale_t.t()), offsets_t


def _padded_segments(offsets: Tensor, columns: int, nowhere: int) -> tuple[Tensor, Tensor]:
    """Where each place of segments padded to multiples of 128 comes from (`nowhere` for padding), and their offsets."""
    offsets_t = F.pad((offsets.diff() + 127).div(128, rounding_mode="floor").mul(128).cumsum(0), (1, 0))
    place = torch.arange(columns, device=offsets.device)
    group = torch.searchsorted(offsets_t[1:], place, right=True).clamp(max=offsets.shape[0] - 2)
    row = offsets[group] + place - offsets_t[group]
    owned = (place < offsets_t[-1]) & (row < offsets[group + 1])
    return torch.where(owned, row, nowhere), offsets_t.int()


@functools.cache
def _table(dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).to(dtype)


def decode(q: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that E4M3 codes stand for. On a CPU a table look-up is several times faster than `Tensor.to`."""
    if q.device.type != "cpu":
        return q.to(dtype)
    codes = q.contiguous().view(torch.uint8)
    return _table(dtype).index_select(0, codes.flatten().int()).view(q.shape)


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if q.dim() > 1 and scale.shape[-2] != q.shape[-2]:
        scale = scale.repeat_interleave(128, -2)[..., : q.shape[-2], :]
    real = decode(q)
    whole = q.shape[-1] // 128
    real[..., : 128 * whole].unflatten(-1, (whole, 128)).mul_(scale[..., :whole, None])
    real[..., 128 * whole :].mul_(scale[..., whole:])
    return real.to(dtype)


def silu_mul(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    """The SwiGLU activation in float32, times each row's weight."""
    gate, up = gate_up.float().chunk(2, -1)
    hidden = F.silu(gate) * up
    return hidden if weights is None else hidden * weights[..., None]


def silu_mul_quantize_1x128(gate_up: Tensor, weights: Tensor | None, pow2_scale: bool) -> tuple[Tensor, Tensor]:
    return quantize_1x128(silu_mul(gate_up, weights), pow2_scale, "mn")


def row_sum(terms: Tensor) -> Tensor:
    """Sum over the last dimension (kept, of size 1) in the order of the kernels, so that the bits are theirs.

    8 columns to a lane, 32 lanes to a warp, 8 warps to 2048 columns: each lane of each warp adds its columns up in
    order; the warps' sums are folded in halves, then the lanes'.
    """
    columns = terms.shape[-1]
    lanes = _pad(terms, (0, -columns % 2048)).unflatten(-1, (-(-columns // 2048), 8, 32, 8)).movedim((-4, -1), (0, 1))
    total = lanes.new_zeros(lanes.shape[2:])
    for step in lanes.flatten(0, 1):
        total = total + step
    return _folded(_folded(total, -2), -1)[..., 0]


def _folded(total: Tensor, dim: int) -> Tensor:
    """Sum over a dimension of 2^n, kept: its second half is added to the first until one is left."""
    while total.shape[dim] > 1:
        low, high = total.chunk(2, dim)
        total = low + high
    return total


def _column_sum(terms: Tensor) -> Tensor:
    """Sum over the rows of `[T, H]` in the order of the kernels: 256 slots in turn, 8 groups of slots, halves."""
    count = terms.shape[0]
    slots = _pad(terms, (0, 0, 0, -count % 256)).unflatten(0, (-(-count // 256), 32, 8))
    total = terms.new_zeros(32, 8, terms.shape[1])
    for rows in slots:
        total = total + rows
    groups = terms.new_zeros(8, terms.shape[1])
    for slot in total:
        groups = groups + slot
    return _folded(groups, 0)[0]


def _root(squares: Tensor, columns: int, eps: float) -> Tensor:
    """1 / sqrt(mean square + eps), each operation rounded to nearest: the root of float64, since that of float32 is not
    on every CPU."""
    return (squares / columns + eps).double().sqrt().float().reciprocal()


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    wide = total.float()
    rms = _root(row_sum(wide.square()), x.shape[-1], eps)
    normed = (wide * rms * weight.float()).to(x.dtype).contiguous()
    return normed, x.new_empty(0) if residual is None else total.contiguous()


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, grad_total: Tensor | None
) -> tuple[Tensor, Tensor]:
    wide, columns = x.float(), x.shape[-1]
    rms = _root(row_sum(wide.square()), columns, eps)
    pull = grad.float() * weight.float()
    mean = row_sum(pull * wide) / columns * rms  # of pull * unit
    unit = wide * rms
    grad_x = rms * (pull - unit * mean)
    if grad_total is not None:
        grad_x = grad_x + grad_total.float()
    grad_weight = _column_sum((grad.float() * unit).reshape(-1, columns))
    return grad_x.to(x.dtype).contiguous(), grad_weight.to(weight.dtype)


def rms_norm_quantize_1x128(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, pow2_scale: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    normed, total = rms_norm(x, weight, eps, residual)
    return *quantize_1x128(normed, pow2_scale, "mn"), normed, total
