"""What `moe_permute` leaves behind for `moe_unpermute` and the gradients."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PermuteHandle(NamedTuple):
    """Where every row went. R rows, T tokens, K choices per token, E experts."""

    counts: Tensor  # [E] int32: rows of each expert, without padding
    row_of: Tensor  # [T, K] int32: row of each choice, -1 where it is dropped
    source: Tensor  # [R] int32: choice t * K + k that a row comes from, -1 for padding and past the last segment
