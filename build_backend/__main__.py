"""`python -m build_backend [IMAGE ...]`: builds in place; `--requirements` prints what the build may need."""

import argparse
import sys

from . import host, native, toolchain


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m build_backend", description="Build in place, what is not current.")
    parser.add_argument("images", nargs="*", help="images to build, by name (default: all)")
    parser.add_argument("--requirements", action="store_true", help="print the build's package requirements and stop")
    parser.add_argument("--null-driver", action="store_true", help="build the tests' null driver as well")
    options = parser.parse_args()
    if options.requirements:
        print(*toolchain.NVCC_PARTS, sep="\n")
        return 0
    try:
        native.build(options.images or None)
        if options.null_driver:
            host.build_null_driver()
    except toolchain.BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
