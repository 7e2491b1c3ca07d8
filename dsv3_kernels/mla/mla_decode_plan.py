"""mla_decode_plan: how the keys of a batch are shared among the multiprocessors."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from .._library import define
from ._cache import FLOATS, FP8_BYTES, LATENT, ROPE

OP = "mla_decode_plan"
KEY_BLOCK = 64  # keys that a kernel takes at a time; splits start at multiples
ROW_BLOCK = 64  # rows (queries x heads) that one multiprocessor takes
# Policy "fixed": a request is cut into pieces of 512 keys, and of more where these would be over 16.
FIXED_KEYS, FIXED_SPLITS = 512, 16
# What starting a request and merging its result costs, in blocks of 64 bfloat16 keys: the constant of FlashMLA's
# published scheduler. Not measured with kernels of this package.
START_COST = 5
# Sizes of the clusters that do without a plan; a cluster's CTAs lie in one GPC, of 16 or 18 multiprocessors.
CLUSTERS = (8, 4, 2)
GPC_SMS = 16
# What a plan's own launch, the one that joins partial results and the items that are looked up cost, in blocks of 64
# keys (1.3 us): docs/mla.md counts 6 us. Not measured.
LAUNCHES_COST = 4


class Plan(NamedTuple):
    """Work items in the order of requests and keys. An item is one request's keys [first, last): a split.

    Shapes follow from the batch and the number of multiprocessors alone; unused items are -1. A request without keys
    has one item without keys, so that its outputs are written.
    """

    work: Tensor  # [W, 4] int32: request, first key, last key, number of the split within its request
    splits: Tensor  # [B + 1] int32: request b has the items splits[b]:splits[b + 1]
    parts: Tensor  # [parts + 1] int32: multiprocessor p (of each block of rows) does the items parts[p]:parts[p + 1]


def mla_decode_plan(
    cache_seqlens: Tensor,
    *,
    num_queries: int,
    num_heads: int,
    kv_dtype: torch.dtype = torch.bfloat16,
    policy: Literal["balanced", "fixed"] = "balanced",
    num_sms: int | None = None,
) -> Plan:
    """Plan `mla_decode` once for all layers of a step. Made on the device, of fixed shape: safe to capture and replay.

    "balanced" gives every multiprocessor the same number of blocks of 64 keys (give or take one), whatever the lengths;
    where a request is cut depends on the others. "fixed" cuts a request by its own length alone, so that its result
    does not depend on the batch. A plan says who does what and changes results by rounding only; make it anew when
    the lengths change.

    Args:
        cache_seqlens: `[B]` int32, keys per request, this step's included.
        num_queries: queries per request. num_heads: heads per query.
        kv_dtype: of the cache: torch.uint8 for the FP8 format.
        policy: see above. num_sms: multiprocessors to use; by default the device's, 132 (H100, H200) for CPU tensors.

    Returns:
        The `Plan`.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape or number.
    """
    check.dtype(OP, "cache_seqlens", cache_seqlens, torch.int32)
    check.shape(OP, "cache_seqlens", cache_seqlens, ("B",))
    check.contiguous(OP, "cache_seqlens", cache_seqlens)
    check.integer(OP, "num_queries", num_queries, 1)
    check.integer(OP, "num_heads", num_heads, 1)
    if kv_dtype not in (*FLOATS, torch.uint8):
        raise TypeError(f"{OP}: kv_dtype: got {kv_dtype}, wanted a float dtype or torch.uint8")
    check.one_of(OP, "policy", policy, "balanced", "fixed")
    if num_sms is None:
        num_sms = multiprocessors(cache_seqlens)
    check.integer(OP, "num_sms", num_sms, 1)
    row_bytes = FP8_BYTES if kv_dtype == torch.uint8 else (LATENT + ROPE) * kv_dtype.itemsize
    start_cost = -(-START_COST * (LATENT + ROPE) * 2 // row_bytes)  # smaller rows pass faster, a start does not
    return Plan(*_op(cache_seqlens, parts(num_sms, num_queries * num_heads), start_cost, policy == "fixed"))


def multiprocessors(x: Tensor) -> int:
    """Of a tensor's device; CPU tensors stand for an H200's."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132


def parts(num_sms: int, rows: int) -> int:
    """Of a plan: each block of rows has multiprocessors of its own."""
    return max(num_sms // -(-rows // ROW_BLOCK), 1)


def cluster_size(requests: int, rows: int, longest: int, num_sms: int) -> int:
    """CTAs of the cluster that takes a request and 64 of its rows where no plan is given; 0: make one after all.

    `longest` is what the table has room for: nothing else is known of the lengths here. The largest cluster is taken of
    which enough fit the GPU at once, and only where no lengths make it slower by the count of tiles one CTA does after
    another (docs/mla.md): one request of `longest` keys and others without any are worst for it, since a plan would
    give that one to all multiprocessors.
    """
    row_blocks, blocks = -(-rows // ROW_BLOCK), -(-longest // KEY_BLOCK)
    for size in CLUSTERS:
        if requests * row_blocks <= num_sms // GPC_SMS * (GPC_SMS // size):
            planned = -(-(blocks + requests * START_COST) // parts(num_sms, rows))
            return size if -(-blocks // size) <= planned + LAUNCHES_COST else 0
    return 0


def items(requests: int, parts: int, fixed: bool) -> int:
    """Work items that any lengths fit in: each border between two parts cuts one request at most."""
    return requests * FIXED_SPLITS if fixed else requests + parts - 1


def _allocate(cache_seqlens: Tensor, parts: int, start_cost: int, fixed: bool) -> tuple[Tensor, Tensor, Tensor]:
    requests = cache_seqlens.shape[0]
    shapes = (items(requests, parts, fixed), 4), (requests + 1,), (parts + 1,)
    work, splits, bounds = (cache_seqlens.new_empty(shape) for shape in shapes)
    return work, splits, bounds


_op = define(
    "mla_decode_plan(Tensor cache_seqlens, int parts, int start_cost, bool fixed) -> (Tensor, Tensor, Tensor)",
    allocate=_allocate,
)
