"""Text from files and models on its way to a terminal, which obeys control characters; and what a
person typed there."""

from __future__ import annotations

import os
import shutil
import textwrap
from typing import TextIO

_CONTROLS = (*range(0x20), *range(0x7F, 0xA0))
"""C0, DELETE and C1: they move the cursor, set titles, or begin sequences that do more."""
_DIRECTIONS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029)
"""Change the order in which a line is shown, or begin a new one."""
_SHOWN = {**dict.fromkeys((*_CONTROLS, *_DIRECTIONS), "\ufffd"), 9: " ", 10: " "}
_ANSWER = {code: None for code in _CONTROLS if chr(code) not in "\n\t"}


def typed(text: str) -> str:
    """Return what a person typed in UTF-8, also where Python takes the bytes for those of another
    encoding (``LC_ALL=C`` without its UTF-8 mode). Bytes that are no UTF-8 stay as they are."""
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(text).decode("utf-8")
        except UnicodeError:
            return text
    return text


def plain(text: object) -> str:
    """Return text as one line that a terminal only shows: U+FFFD for what it would obey.

    For names, errors, warnings and progress. Line breaks and tabs become spaces.
    """
    return str(text).replace("\r\n", " ").translate(_SHOWN)


def shown(text: object, limit: int = 200) -> str:
    """Return what others wrote (a person's argument, a library's error) for a message: as
    :func:`plain`, without space to spare, cut after ``limit`` characters."""
    line = " ".join(plain(text).split())
    return line if len(line) <= limit else f"{line[:limit]}…"


def plain_answer(text: str, stream: TextIO) -> str:
    """Return a piece of an answer as it is written to ``stream``: on a terminal without control
    characters except line breaks and tabs, elsewhere unchanged."""
    return text.translate(_ANSWER) if stream.isatty() else text


def columns() -> int:
    """Return the characters of a line of the terminal (COLUMNS, if that is set)."""
    return shutil.get_terminal_size().columns


def filled(line: str, stream: TextIO, indent: int = 2) -> str:
    """Return a line as lines that fit a terminal, broken between words alone and indented from the
    second on; unchanged in pipes and files, and where it ends with a command to copy."""
    if not stream.isatty() or len(line) <= columns() or line.startswith("next "):
        return line
    return textwrap.fill(
        line,
        columns(),
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
