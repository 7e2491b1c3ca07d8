"""PEP 517 hooks: setuptools' own, plus the build requirements that this machine needs."""

import sys
from collections.abc import Mapping
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from . import images, toolchain

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = Mapping[str, Any] | None


def _native_requirements() -> list[str]:
    """What the native part needs: nothing when it is not built, no compiler when every image is already there."""
    if not sys.platform.startswith("linux") or toolchain.build_mode() == "python":
        return []
    if toolchain.named_nvcc() or not images.stale():
        return [toolchain.PYBIND11]
    return [toolchain.PYBIND11, *toolchain.NVCC_PARTS]


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_native_requirements()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_native_requirements()]
