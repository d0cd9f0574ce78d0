"""Files that a person or a manifest names: regular ones only.

Opening a FIFO waits for a writer, reading a device may never end; neither holds a model.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

LFS_POINTER = b"version https://git-lfs"
"""Beginning of what Git LFS leaves in place of a large file."""
LFS_REMEDY = (
    "a Git LFS pointer, not the file itself: run 'git lfs pull' in its folder, or download the file"
)


class NotRegularError(OSError):
    """A FIFO, a device, a socket or a folder in place of a file."""


def read_regular(path: Path, most: int) -> bytes:
    """Return the content of a regular file of at most ``most`` bytes.

    Raises:
        NotRegularError: it is another kind of file.
        OSError: it is larger, or cannot be read.
    """
    _check_kind(path.stat())  # opening a device may already do something
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        _check_kind(status)
        if status.st_size > most:
            raise OSError(f"{path}: {status.st_size} bytes, the most is {most}")
        return file.read(status.st_size)  # so many bytes are allocated, whatever is there


def _check_kind(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise NotRegularError("not a regular file")


def leaves_folder(path: Path, folder: Path) -> bool:
    """Return whether a file below ``folder`` is behind a link that leads out of it. Links of the
    Hugging Face cache, from a snapshot to the blobs of the same repository, do not count."""
    place, home = path.resolve(), folder.resolve()
    if place.is_relative_to(home):
        return False
    return not (home.parent.name == "snapshots" and place.parent == home.parents[1] / "blobs")
