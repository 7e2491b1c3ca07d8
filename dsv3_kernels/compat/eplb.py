"""DeepSeek's EPLB by its own name: ``from dsv3_kernels.compat import eplb``."""

from __future__ import annotations

from ..parallel.eplb import rebalance_experts

__all__ = ["rebalance_experts"]
