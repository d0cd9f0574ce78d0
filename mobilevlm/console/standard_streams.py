"""Standard streams that were closed before the program began (``<&-``, ``>&-``, ``2>&-``)."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def open_closed_streams() -> None:
    """Put the null device where a standard stream is closed.

    Else the next file that is opened gets the number of the stream, and what a library prints ends
    up in it; and Python's own stream is none, so that ``print`` to stderr goes to stdout.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
