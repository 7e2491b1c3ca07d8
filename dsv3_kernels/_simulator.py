"""Where the PTX simulator is, and how a call is led into it (`dk.backend("sim")`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from . import env

_BUILT = Path(__file__).resolve().parent.parent / "build" / "ptxsim" / "libptxsim.so"


def library() -> Path | None:
    """The simulator's library: the one named by DSV3_KERNELS_DRIVER, else the one that `make venv` builds."""
    named = env.get("DSV3_KERNELS_DRIVER")
    if named is not None:
        return Path(named)
    return _BUILT if _BUILT.exists() else None


def missing() -> str | None:
    """Why there is no simulator; `None` when there is one."""
    path = library()
    if path is None:
        return "the simulator is not built: run `make venv` in a source checkout, or set DSV3_KERNELS_DRIVER"
    return None if path.exists() else f"DSV3_KERNELS_DRIVER names {path}, which does not exist"


def adds_as_hardware() -> bool:
    """Whether simulated tensor cores add bit for bit as a GPU's do (DSV3_KERNELS_SIM), rather than in float32."""
    return "rounding=hardware" in (env.get("DSV3_KERNELS_SIM") or "").split(",")


@contextlib.contextmanager
def active(kind: str) -> Iterator[None]:
    """The launches inside the block, of `cuda` or of `triton` kernels, go to the simulator."""
    if kind == "triton":
        from . import _triton_simulator

        with _triton_simulator.active(str(library())):
            yield
    else:
        from . import _host

        with _host.use_driver(str(library())):
            yield
