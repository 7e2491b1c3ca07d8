"""Adds the native part to setuptools' build: CUDA images as package data, the host module as an extension.

Both are built in the source tree (see build_backend), reused while current, and copied from there into a wheel.
"""

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from setuptools import Extension, setup  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402
from setuptools.command.build_py import build_py  # noqa: E402

from build_backend import host, native, toolchain  # noqa: E402


class BuildPython(build_py):
    """Makes the images before package data is collected; a Python-only wheel gets the manifest alone."""

    def run(self) -> None:
        native.build()
        self.__dict__.pop("data_files", None)  # setuptools caches the list
        if not native.wanted():
            self.package_data = {
                package: [p for p in patterns if p not in ("images/*.cubin", "images/*.ptx")]
                for package, patterns in self.package_data.items()
            }
        super().run()


class BuildHost(build_ext):
    """Takes the module that build_backend made; setuptools only decides on the wheel's tag and the place."""

    def build_extension(self, ext: Extension) -> None:
        built, target = host.build(), Path(self.get_ext_fullpath(ext.name)).resolve()
        if target != built.resolve():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(built, target)

    def copy_extensions_to_source(self) -> None:
        """The module is in the source tree already."""


linux = sys.platform.startswith("linux")
try:
    modules = [Extension("dsv3_kernels._host", sources=[])] if linux and native.wanted() else []
except toolchain.BuildError as error:
    sys.exit(f"error: {error}")

setup(ext_modules=modules, cmdclass={"build_py": BuildPython, "build_ext": BuildHost} if linux else {})
