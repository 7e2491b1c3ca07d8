"""`dsv3 demo`."""

from __future__ import annotations

import argparse

HELP = "a checkpoint from disk to tokens"


def arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace) -> int:
    return 0
