"""The whole native part: which of it this machine builds, and the record of why the rest is missing."""

from collections.abc import Sequence
from pathlib import Path

from . import host, images, toolchain
from .toolchain import ROOT, BuildError, note


def wanted() -> bool:
    """Whether a distribution from here holds the native part: not where it is unwanted or nothing can build it."""
    return not reason_against()


def reason_against() -> str:
    """Why the native part is left out, or an empty string.

    A machine with an nvcc always builds: there, a missing C++ compiler or header is an error and no reason.
    """
    if toolchain.build_mode() == "python":
        return "DSV3_KERNELS_BUILD=python"
    if (lacking := host.missing()) and toolchain.find_nvcc() is None:
        return lacking
    return ""


def build(names: Sequence[str] | None = None, root: Path = ROOT) -> None:
    """Builds images and host module in the source tree, reusing what is current. BuildError says what failed."""
    if reason := reason_against():
        images.record(root, host=f"not built: {reason}", missing=f"not built: {reason}")
        note(f"Python-only: {reason}")
        return
    failure = None
    try:
        images.build(names, root)
    except BuildError as error:
        failure = error
    try:
        host.build(root)
    except BuildError as error:
        images.record(root, host="its build failed")
        raise (BuildError(f"{failure}\n\n{error}") if failure else error) from None
    images.record(root, host="")
    if failure:
        raise failure
    for name, why in images.read_manifest(root).get("missing", {}).items():
        note(f"image {name} is missing: {why}")
