"""DeepSeek's DeepGEMM (github.com/deepseek-ai/DeepGEMM) by its own names.

``from dsv3_kernels.compat import deep_gemm``. An FP8 operand is a pair `(codes, scales)`; results go to a given `d`.
Differences: scales may have any strides and no relayout is needed; rows of a group need no alignment; either kind of
weight scale serves either dtype of `d`, with and without `c`; scales are float32 (packed ones are Blackwell's); bad
arguments are errors in words. `compiled_dims` and `disable_ue8m0_cast` are accepted and mean nothing here: nothing is
compiled at run time. Operands must be contiguous along K, as on Hopper there. DeepGEMM's BF16, attention and Blackwell
functions have no counterpart.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import _checks as check
from ..gemm.fp8_gemm import fp8_gemm
from ..gemm.fp8_grouped_gemm import fp8_grouped_gemm
from ..gemm.fp8_masked_gemm import fp8_masked_gemm
from ..quant.quantize_1x128 import quantize_1x128
from ..quant.quantize_1x128_both import quantize_1x128_both
from ..quant.quantize_128x128 import quantize_128x128

Pair = tuple[Tensor, Tensor]
Recipe = tuple[int, int, int] | None
HalfRecipe = tuple[int, int] | None

__all__ = [
    "fp8_gemm_nn",
    "fp8_gemm_nt",
    "fp8_gemm_tn",
    "fp8_gemm_tt",
    "fp8_m_grouped_gemm_nt_masked",
    "get_mk_alignment_for_contiguous_layout",
    "get_mn_major_tma_aligned_tensor",
    "get_num_sms",
    "get_tma_aligned_size",
    "k_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nn_contiguous",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
    "per_block_cast_to_fp8",
    "per_channel_cast_to_fp8",
    "per_token_cast_to_fp8",
    "set_num_sms",
]

_num_sms: int | None = None


def set_num_sms(new_num_sms: int) -> None:
    """SMs that the functions below may take, process-wide, as there. Our own ops take `num_sms` per call instead."""
    global _num_sms
    check.integer("set_num_sms", "new_num_sms", new_num_sms, 1)
    _num_sms = new_num_sms


def get_num_sms() -> int:
    """What was set, else the current GPU's SMs.

    Raises:
        RuntimeError: nothing was set, and there is no GPU.
    """
    if _num_sms is not None:
        return _num_sms
    if not torch.cuda.is_available():
        raise RuntimeError("get_num_sms: nothing was set, and torch sees no GPU")
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count)


def fp8_gemm_nt(
    a: Pair,
    b: Pair,
    d: Tensor,
    c: Tensor | None = None,
    recipe: Recipe = None,
    recipe_a: HalfRecipe = None,
    recipe_b: HalfRecipe = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """d = a @ b.T (+ c): a `[M, K]` with 1x128 scales, b `[N, K]` with 128x128 or 1x128 ones, d bfloat16 or float32."""
    op = "fp8_gemm_nt"
    _check_recipes(op, recipe, recipe_a, recipe_b)
    a, b = _pair(op, "a", a), _pair(op, "b", b)
    if c is None:
        fp8_gemm(*a, *b, out=d, num_sms=_num_sms)
        return
    check.dtype(op, "c", c, d.dtype)
    check.shape(op, "c", c, d.shape)
    if c.data_ptr() != d.data_ptr():
        d.copy_(c)
    fp8_gemm(*a, *b, out=d, accumulate=True, num_sms=_num_sms)


def fp8_gemm_nn(a: Pair, b: Pair, d: Tensor, c: Tensor | None = None, *args: Any, **kwargs: Any) -> None:
    """As `fp8_gemm_nt` with b `[K, N]`, contiguous along K."""
    fp8_gemm_nt(a, _transposed("fp8_gemm_nn", "b", b), d, c, *args, **kwargs)


def fp8_gemm_tn(a: Pair, b: Pair, d: Tensor, c: Tensor | None = None, *args: Any, **kwargs: Any) -> None:
    """As `fp8_gemm_nt` with a `[K, M]` and b `[K, N]`, contiguous along K."""
    fp8_gemm_nt(_transposed("fp8_gemm_tn", "a", a), _transposed("fp8_gemm_tn", "b", b), d, c, *args, **kwargs)


def fp8_gemm_tt(a: Pair, b: Pair, d: Tensor, c: Tensor | None = None, *args: Any, **kwargs: Any) -> None:
    """As `fp8_gemm_nt` with a `[K, M]`, contiguous along K."""
    fp8_gemm_nt(_transposed("fp8_gemm_tt", "a", a), b, d, c, *args, **kwargs)


def m_grouped_fp8_gemm_nt_contiguous(
    a: Pair,
    b: Pair,
    d: Tensor,
    grouped_layout: Tensor,
    recipe: Recipe = None,
    recipe_a: HalfRecipe = None,
    recipe_b: HalfRecipe = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
) -> None:
    """d[rows of g] = a[rows of g] @ b[g].T, where `grouped_layout [M]` int32 names each row's group, -1 for padding.

    Groups rise along the rows, in segments of any length; what a padding row of d gets is unspecified, there as here.
    The names become offsets on the device, and nothing waits for it.

    Raises:
        ValueError: `use_psum_layout`; on the CPU also groups that do not rise.
    """
    op = "m_grouped_fp8_gemm_nt_contiguous"
    _check_recipes(op, recipe, recipe_a, recipe_b)
    check.value(op, "use_psum_layout", not use_psum_layout, use_psum_layout, "False: a group for each row")
    a, b = _pair(op, "a", a), _pair(op, "b", b)
    check.dtype(op, "grouped_layout", grouped_layout, torch.int32)
    check.shape(op, "grouped_layout", grouped_layout, a[0].shape[:1])
    fp8_grouped_gemm(*a, *b, _offsets(op, grouped_layout, b[0].shape[0]), out=d, num_sms=_num_sms)


def m_grouped_fp8_gemm_nn_contiguous(
    a: Pair, b: Pair, d: Tensor, grouped_layout: Tensor, *args: Any, **kwargs: Any
) -> None:
    """As `m_grouped_fp8_gemm_nt_contiguous` with b `[G, K, N]`, contiguous along K."""
    b = _transposed("m_grouped_fp8_gemm_nn_contiguous", "b", b)
    m_grouped_fp8_gemm_nt_contiguous(a, b, d, grouped_layout, *args, **kwargs)


def m_grouped_fp8_gemm_nt_masked(
    a: Pair,
    b: Pair,
    d: Tensor,
    masked_m: Tensor,
    expected_m: int,
    recipe: Recipe = None,
    recipe_a: HalfRecipe = None,
    recipe_b: HalfRecipe = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """d[g, :masked_m[g]] = a[g, :masked_m[g]] @ b[g].T; other rows of d stay as they are, for any Mmax."""
    op = "m_grouped_fp8_gemm_nt_masked"
    _check_recipes(op, recipe, recipe_a, recipe_b)
    a, b = _pair(op, "a", a), _pair(op, "b", b)
    fp8_masked_gemm(*a, *b, masked_m, expected_m=expected_m, out=d, num_sms=_num_sms)


fp8_m_grouped_gemm_nt_masked = m_grouped_fp8_gemm_nt_masked


def k_grouped_fp8_gemm_nt_contiguous(
    a: Pair,
    b: Pair,
    d: Tensor,
    ks_cpu: list[int],
    grouped_layout: Tensor,
    c: Tensor | None = None,
    recipe: Recipe = (1, 1, 128),
    compiled_dims: str = "mn",
    use_psum_layout: bool = False,
) -> None:
    """d[g] = a_g @ b_g.T (+ c[g]): a and b are flat, one `[M, K_g]` and `[N, K_g]` after the other.

    Scales are `[M, sum K / 128]` and `[N, sum K / 128]`; d and c `[G, M, N]` float32, or bfloat16. One launch per group
    with any K, as the layout has no matrix of all groups; `fp8_grouped_wgrad` takes one and needs a single launch.

    Raises:
        ValueError: a K_g is no multiple of 128, sizes disagree, `use_psum_layout`.
    """
    op = "k_grouped_fp8_gemm_nt_contiguous"
    check.value(op, "recipe", tuple(recipe or ()) == (1, 1, 128), recipe, "(1, 1, 128)")
    check.value(op, "use_psum_layout", not use_psum_layout, use_psum_layout, "False")
    check.shape(op, "d", d, (len(ks_cpu), "M", "N"))
    for k in ks_cpu:
        check.value(op, "ks_cpu", k >= 0 and k % 128 == 0, k, "multiples of 128")
    (a_flat, a_scale), (b_flat, b_scale) = _pair(op, "a", a), _pair(op, "b", b)
    _, m, n = d.shape
    for name, flat, rows in (("a", a_flat, m), ("b", b_flat, n)):
        check.contiguous(op, name, flat)
        check.value(op, name, flat.numel() == rows * sum(ks_cpu), flat.numel(), f"{rows} x {sum(ks_cpu)} elements")
    if c is None:
        d.zero_()
    elif c.data_ptr() != d.data_ptr():
        d.copy_(c)
    start = 0
    for group, k in enumerate(ks_cpu):
        if k == 0:
            continue
        tiles = slice(start // 128, (start + k) // 128)
        a_codes, b_codes = (
            flat.view(-1)[rows * start : rows * (start + k)].view(rows, k) for flat, rows in ((a_flat, m), (b_flat, n))
        )
        fp8_gemm(
            a_codes, a_scale[:, tiles], b_codes, b_scale[:, tiles], out=d[group], accumulate=True, num_sms=_num_sms
        )
        start += k


def per_token_cast_to_fp8(
    x: Tensor, use_ue8m0: bool, gran_k: int = 128, use_packed_ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """`quantize_1x128`; scales are stored column by column. (There x is multiplied by a rounded reciprocal: a code may
    differ by a step.)"""
    _check_cast("per_token_cast_to_fp8", gran_k, use_packed_ue8m0)
    check.shape("per_token_cast_to_fp8", "x", x, ("M", "N"))
    return quantize_1x128(x, pow2_scale=use_ue8m0)


def per_block_cast_to_fp8(x: Tensor, use_ue8m0: bool, gran_k: int = 128) -> tuple[Tensor, Tensor]:
    """`quantize_128x128`."""
    _check_cast("per_block_cast_to_fp8", gran_k, False)
    check.shape("per_block_cast_to_fp8", "x", x, ("M", "N"))
    return quantize_128x128(x, pow2_scale=use_ue8m0)


def per_channel_cast_to_fp8(x: Tensor, use_ue8m0: bool, gran_k: int = 128) -> tuple[Tensor, Tensor]:
    """Codes `[M, N]` and scales `[M / 128, N]`, one per 128 rows of a column; M a multiple of 128."""
    op = "per_channel_cast_to_fp8"
    _check_cast(op, gran_k, False)
    check.shape(op, "x", x, ("M", "N"))
    check.value(op, "x", x.shape[0] % 128 == 0, x.shape[0], "a multiple of 128 rows")
    _, _, q_t, scale_t, _ = quantize_1x128_both(x, pow2_scale=use_ue8m0)
    return q_t.view(torch.uint8).t().contiguous().view(q_t.dtype), scale_t.t()


def get_mk_alignment_for_contiguous_layout() -> int:
    """128, what DeepGEMM's users pad their groups to. Nothing here needs it."""
    return 128


def get_tma_aligned_size(x: int, element_size: int) -> int:
    """x rounded up to whole 16 bytes."""
    check.value("get_tma_aligned_size", "element_size", 16 % element_size == 0, element_size, "a divisor of 16")
    vector = 16 // element_size
    return (x + vector - 1) // vector * vector


def get_mn_major_tma_aligned_tensor(sf: Tensor) -> Tensor:
    """Scales `[..., M, K / 128]` stored column by column, columns 16 bytes apart. Nothing here needs it."""
    op = "get_mn_major_tma_aligned_tensor"
    check.dtype(op, "sf", sf, torch.float32)
    check.at_least(op, "sf", sf, 2)
    *leading, rows, blocks = sf.shape
    memory = sf.new_empty((*leading, blocks, get_tma_aligned_size(rows, 4)))
    return memory[..., :rows].mT.copy_(sf)


def _pair(op: str, argument: str, pair: Pair) -> Pair:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{op}: {argument}: got {type(pair).__name__}, wanted a pair (codes, scales)")
    check.dtype(op, f"{argument}[0]", pair[0], torch.float8_e4m3fn)
    check.dtype(op, f"{argument}[1]", pair[1], torch.float32)
    return pair[0], pair[1]


def _transposed(op: str, argument: str, pair: Pair) -> Pair:
    codes, scales = _pair(op, argument, pair)
    return codes.mT, scales.mT


def _check_recipes(op: str, recipe: Recipe, recipe_a: HalfRecipe, recipe_b: HalfRecipe) -> None:
    """What the scales' shapes say anyway."""
    if recipe is not None:
        check.value(op, "recipe", tuple(recipe) in ((1, 128, 128), (1, 1, 128)), recipe, "(1, 128, 128) or (1, 1, 128)")
    if recipe_a is not None:
        check.value(op, "recipe_a", tuple(recipe_a) == (1, 128), recipe_a, "(1, 128)")
    if recipe_b is not None:
        check.value(op, "recipe_b", tuple(recipe_b) in ((128, 128), (1, 128)), recipe_b, "(128, 128) or (1, 128)")


def _check_cast(op: str, gran_k: int, packed: bool) -> None:
    check.value(op, "gran_k", gran_k == 128, gran_k, "128")
    check.value(op, "use_packed_ue8m0", not packed, packed, "False: packed scales are Blackwell's")


def _offsets(op: str, groups: Tensor, count: int) -> Tensor:
    """Where each group begins, from the group of each row; padding counts to the group before it."""
    filled = groups.cummax(0).values if groups.numel() else groups
    if groups.device.type == "cpu" and bool(((groups >= 0) & (groups < filled)).any()):
        raise ValueError(f"{op}: grouped_layout: groups fall along the rows, wanted rising ones")
    # Rows in front of the first group are nobody's.
    return torch.searchsorted(filled, torch.arange(count + 1, device=groups.device, dtype=torch.int32), out_int32=True)


def __getattr__(name: str) -> NoReturn:
    raise AttributeError(f"dsv3_kernels.compat.deep_gemm has no {name!r}; it has {', '.join(__all__)}")
