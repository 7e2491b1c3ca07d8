"""Every environment variable the package reads, in one place (prefix ``DSV3_KERNELS_``)."""

from __future__ import annotations

import os

VARIABLES: dict[str, str] = {
    "DSV3_KERNELS_BACKEND": "backend for the whole process: eager, triton, cuda, sim, sim:cuda or sim:triton",
    "DSV3_KERNELS_CHECK_VALUES": "1: ops read lengths, tables, offsets and the like, and refuse wrong ones (waits)",
    "DSV3_KERNELS_DRIVER": "library that serves CPU tensors in place of libcuda.so.1 (the simulator, a test double)",
    "DSV3_KERNELS_SIM": "options of the simulator, for example timing=late,order=reverse (csrc/ptxsim/README.md)",
    "DSV3_KERNELS_NVCC": "nvcc that builds the CUDA images (build time)",
    "DSV3_KERNELS_BUILD": "'python' builds no native code, on purpose (build time)",
}


def get(name: str) -> str | None:
    """Value of a listed variable, ``None`` when unset or empty."""
    if name not in VARIABLES:
        raise KeyError(f"{name} is not a variable of dsv3_kernels")
    return os.environ.get(name) or None
