"""Child processes of the long runs."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

PROGRAM_CACHE = "XDG_CACHE_HOME"


def start(work: Callable[..., object], *arguments: object) -> int:
    """Fork a process that does ``work`` and exits with 0, or with 1 and a traceback."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(child: int) -> int:
    """Wait for a process; its exit code, or minus the signal that ended it."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def own_cache() -> Path:
    """Give this process and its children an empty cache folder."""
    folder = Path(tempfile.mkdtemp(prefix="cache-"))
    os.environ[PROGRAM_CACHE] = str(folder)
    return folder
