"""Identity of a bundle on disk: what an engine opens is what was checked, also while an export puts
another bundle in its place.

An export exchanges folders in one step, but loading opens several files one after the other. So the
identity of all is compared again when the last is open, and loading begins anew where it is
another. Who begins anew holds a shared lock on the folder, which exports wait for: the second
attempt succeeds, however often the bundle is replaced.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeAlias, TypeVar

from mobilevlm.errors import ReplacedError

Identity: TypeAlias = dict[str, tuple[int, int, int, int]]
"""Device, inode, size and time of the last change of each file"""

ATTEMPTS = 5
READERS = 60.0
"""Seconds that an export waits for loads that have begun anew; it then goes on all the same."""
WRITERS = 10.0
"""Seconds that a load waits for an export that is just exchanging the folders"""
GAP = 2.0
"""Seconds that a load waits for a missing folder while an export is at work beside it. Where the
system cannot exchange folders in one step, an export renames twice."""

T = TypeVar("T")


def identity_of(folder: Path, names: Iterable[str]) -> Identity:
    """Return the identity of these files; what is missing is left out."""
    found = {}
    for name in names:
        try:
            status = (folder / name).stat()
        except OSError:
            continue
        found[name] = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    return found


@contextmanager
def unchanged(folder: Path, identity: Identity) -> Iterator[None]:
    """Check, when the block has opened files of a folder, that they still have this identity.

    Raises:
        ReplacedError: they have another, whatever else went wrong.
    """
    try:
        yield
    except Exception:
        if identity_of(folder, identity) != identity:
            raise replaced_error(folder) from None
        raise
    if identity_of(folder, identity) != identity:
        raise replaced_error(folder)


def steadily(folder: Path, open_all: Callable[[], T]) -> T:
    """Return what ``open_all`` opens, called again where it raises ReplacedError.

    Raises:
        ReplacedError: the bundle is replaced again and again.
    """
    _wait_for(folder)
    for attempt in range(1, ATTEMPTS + 1):
        with _reading(folder) if attempt > 1 else nullcontext():
            try:
                return open_all()
            except ReplacedError:
                if attempt == ATTEMPTS:
                    raise
        _wait_for(folder)
    raise AssertionError("unreachable")


@contextmanager
def without_readers(folder: Path) -> Iterator[None]:
    """Wait until nobody who has begun anew is loading the bundle, and hold off others."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        lock_file(handle, shared=False, seconds=READERS)
        yield
    finally:
        os.close(handle)


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Holds off exports. Where that does not work, the identity is checked all the same."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        lock_file(handle, shared=True, seconds=WRITERS)
        yield
    finally:
        os.close(handle)


def lock_file(handle: int, shared: bool, seconds: float) -> bool:
    """Lock an open file or folder until it is closed. False: others kept it for so long. Where
    there are no locks it is as if nobody else were there."""
    try:
        import fcntl
    except ImportError:
        return True
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        except OSError:  # a file system without locks
            return True


def work_folder_prefix(target: Path) -> str:
    """Return what names of exports' work folders beside a bundle begin with. Long names are cut;
    the token in the folder has all of it (export/workspace/work_folder.py)."""
    return f"{target.name[:60]}.partial-"


def _wait_for(folder: Path) -> None:
    end = time.monotonic() + GAP
    while not folder.exists() and time.monotonic() < end:
        try:
            beside = [path.name for path in folder.parent.iterdir()]
        except OSError:
            return
        if not any(name.startswith(work_folder_prefix(folder)) for name in beside):
            return
        time.sleep(0.02)


def replaced_error(folder: Path) -> ReplacedError:
    """Return the error for a bundle that is not the one that was opened."""
    return ReplacedError(
        f"{folder}: another bundle was put in its place while it was in use: load it again"
    )
