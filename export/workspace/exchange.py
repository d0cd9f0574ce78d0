"""Two folders that change places in one step, where the system can do that."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
"""Flag of Linux' renameat2(2)"""
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}
"""Errors of a file system, or of a system, that has no exchange."""


def exchange(first: Path, second: Path) -> bool:
    """Make two existing folders change places: at no time is one of the names missing. False where
    the system cannot do that; nothing was changed then.

    Raises:
        OSError: one does not exist, or may not be renamed.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # no glibc of 2.28 or later
        return False
    names = os.fsencode(first), os.fsencode(second)
    if not renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))
