"""The text that the demo checkpoint is trained on: the King James Bible (1611, public domain), as bytes.

Source: the Debian package `bible-kjv-text` 4.38. Its reader prints one verse a line, each behind a reference;
`from_reader` takes the references off and leaves a blank line between chapters.
"""

from __future__ import annotations

import lzma
import re
from importlib import resources

HELD_OUT_EVERY = 40  # each 40th chapter is never trained on


def from_reader(printed: str) -> str:
    """The text in what `echo gen1:1-rev22:21 | bible -f -l 100000` prints."""
    lines: list[str] = []
    chapter = None
    for line in printed.splitlines():
        match = re.fullmatch(r"([1-3]?[A-Za-z]+\d+):\d+ (.*)", line.rstrip())
        if match is None:
            continue  # greetings and prompts
        if chapter not in (None, match[1]):
            lines.append("")
        chapter = match[1]
        lines.append(match[2])
    return "\n".join(lines) + "\n"


def text() -> str:
    """The whole text, 4.1 MB of ASCII in 1189 chapters."""
    packed = resources.files(__package__).joinpath("demo/kjv.txt.xz").read_bytes()
    return lzma.decompress(packed).decode("ascii")


def split() -> tuple[bytes, bytes]:
    """`(training text, held-out text)`, cut by whole chapters."""
    chapters = text().rstrip("\n").split("\n\n")
    held_out = chapters[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    del chapters[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return ("\n\n".join(chapters) + "\n").encode(), ("\n\n".join(held_out) + "\n").encode()
