"""Everything DeepSeek-V3 needs on Hopper GPUs: FP8 GEMMs, MLA attention, MoE and expert parallelism as torch ops.

Names are loaded when they are first used, so that `import dsv3_kernels` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

from ._library import NAMESPACE, OPS, module_of

__version__ = "0.1.0"

# Public names that are not ops: where each is defined.
_EXPORTS: dict[str, str] = {
    "Fp8Linear": "gemm.fp8_linear",
    "backend": "backends",
    "check_values": "backends",
    "early_launches": "backends",
    "explain": "backends",
    "fp8_grouped_linear": "gemm.fp8_grouped_linear",
    "fp8_linear": "gemm.fp8_linear",
    "is_supported": "backends",
    "launch_counts": "backends",
    "preload": "backends",
    "yarn_cos_sin": "mla.rope",
}
_SUBPACKAGES = ("model", "parallel", "pipeline", "compat")

__all__ = sorted([*_EXPORTS, *_SUBPACKAGES, *(name for name, row in OPS.items() if not row.internal)])


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{NAMESPACE}.{name}")
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f"{NAMESPACE}.{_EXPORTS[name]}"), name)
    elif name in OPS and not OPS[name].internal:
        value = getattr(importlib.import_module(module_of(name)), name)
    else:
        raise AttributeError(f"module {NAMESPACE!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
