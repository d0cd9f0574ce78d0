"""Work folders beside a target: made under a name of their own, known by the token inside.

The token names the folder that it was made for, so that neither a copy nor a folder that somebody
else made counts. Nothing is followed through a link, and nothing of another user is looked at.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mobilevlm.bundle_identity import work_folder_prefix
from mobilevlm.errors import BundleError
from mobilevlm.export.workspace.ownership import check_owned, remove_owned

CONTENT = "bundle"
"""The bundle to be; after the exchange, the one that was replaced."""
TOKEN = "export.json"
_ASIDE = "older"
_REPLACING = "replacing.json"
"""Says which folder is the bundle to be, while it changes places with the older one."""
_LARGEST_TOKEN = 4096
_RANDOM = 8
"""Characters that mkdtemp adds to a name"""
_PATIENCE = 30.0
"""Seconds to wait until others have found or made their work folders beside the same target."""


@dataclass(frozen=True)
class WorkFolder:
    """A work folder whose token is locked by this process."""

    path: Path

    @property
    def aside(self) -> Path:
        """The place of the older bundle, where the system has no exchange."""
        return self.path / _ASIDE

    def note_content(self, folder: Path) -> None:
        """Write down which folder is the bundle to be."""
        status = folder.stat()
        draft = self.path / f"{_REPLACING}.draft"
        with draft.open("w", encoding="utf-8") as file:
            json.dump([status.st_dev, status.st_ino], file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.path / _REPLACING)

    def forget_content(self) -> None:
        """Undo :meth:`note_content`."""
        (self.path / _REPLACING).unlink(missing_ok=True)

    def is_content(self, folder: Path) -> bool:
        """Return whether a folder is the bundle to be, not the older one."""
        try:
            noted = json.loads((self.path / _REPLACING).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return True
        status = folder.lstat()
        return bool([status.st_dev, status.st_ino] == noted)


@contextmanager
def claim(target: Path) -> Iterator[WorkFolder]:
    """Hold the work folder of a target: one that a killed export left, or a new one.

    Raises:
        BundleError: another export holds it.
    """
    with ExitStack() as held:
        with _parent_lock(target):
            found = _stale(target, held)
            home, *more = found or [_make(target, held)]
            for other in more:
                settle(other, target)
                discard(other)
        yield home


def settle(home: WorkFolder, target: Path) -> None:
    """Finish or undo what a killed export had begun with the bundles of its target.

    Raises:
        BundleError: a file of someone else is among those of the older bundle.
    """
    if home.aside.is_dir():
        if not target.exists():
            home.aside.rename(target)
        else:
            remove_owned(home.aside, check_owned(home.aside))
    content = home.path / CONTENT
    if content.is_dir() and not home.is_content(content):
        remove_owned(content, check_owned(content))
    home.forget_content()


def discard(home: WorkFolder) -> None:
    """Remove a work folder, its token last."""
    for entry in [*home.path.iterdir()]:
        if entry.name != TOKEN:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    (home.path / TOKEN).unlink()
    try:
        home.path.rmdir()
    except FileNotFoundError:  # another export found it empty
        return


def restore_target(target: Path) -> None:
    """Put back a bundle that a killed export moved away, where the system has no exchange."""
    if not target.parent.is_dir():
        return
    with ExitStack() as held, _parent_lock(target):
        for home in _stale(target, held):
            settle(home, target)


def _stale(target: Path, held: ExitStack) -> list[WorkFolder]:
    """Work folders that killed exports to this target left, locked. Empty ones are removed."""
    found = []
    for path in sorted(target.parent.iterdir()):
        if not path.name.startswith(work_folder_prefix(target)):
            continue
        handle = _open_token(path, target)
        if handle is None:
            continue
        held.callback(os.close, handle)
        if not _lock(handle):
            raise BundleError(
                f"{target}: another export is working here: wait for it, or choose another output"
            )
        if os.fstat(handle).st_nlink:  # else it is just being removed
            found.append(WorkFolder(path))
    return found


def _make(target: Path, held: ExitStack) -> WorkFolder:
    path = Path(tempfile.mkdtemp(prefix=work_folder_prefix(target), dir=target.parent))
    status = path.stat()
    token = {"program": "mobilevlm export", "folder": [status.st_dev, status.st_ino]}
    content = json.dumps({**token, "target": _identity(target)}).encode()
    handle = os.open(path / TOKEN, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    held.callback(os.close, handle)
    _lock(handle)
    os.write(handle, content)
    os.fsync(handle)
    return WorkFolder(path)


def _open_token(path: Path, target: Path) -> int | None:
    """The token's file, opened, if the folder is a work folder for this target; None if not."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # no folder, a link, or not for us
        return None
    try:
        status = os.fstat(folder)
        if status.st_uid != os.geteuid():
            return None
        if _is_unfinished(folder, path, target):  # killed before its token was written
            _remove_unfinished(folder, path)
            return None
        handle = os.open(TOKEN, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError:
        return None
    finally:
        os.close(folder)
    try:
        token = os.fstat(handle)
        if stat.S_ISREG(token.st_mode) and token.st_size <= _LARGEST_TOKEN:
            data = json.loads(os.read(handle, _LARGEST_TOKEN))
            expected = {
                "program": "mobilevlm export",
                "folder": [status.st_dev, status.st_ino],
                "target": _identity(target),
            }
            if data == expected:
                return handle
    except (OSError, ValueError):
        pass
    os.close(handle)
    return None


def _is_unfinished(folder: int, path: Path, target: Path) -> bool:
    """Return whether a folder is as mkdtemp makes it and has nothing but perhaps an empty token, so
    that no data is in it."""
    names = os.listdir(folder)
    is_ours = len(path.name) == len(work_folder_prefix(target)) + _RANDOM
    if not is_ours or stat.S_IMODE(os.fstat(folder).st_mode) != 0o700:
        return False
    if names not in ([], [TOKEN]):
        return False
    if not names:
        return True
    status = os.stat(TOKEN, dir_fd=folder, follow_symlinks=False)
    return stat.S_ISREG(status.st_mode) and status.st_size == 0


def _remove_unfinished(folder: int, path: Path) -> None:
    if os.listdir(folder):
        os.unlink(TOKEN, dir_fd=folder)
    path.rmdir()


def _identity(target: Path) -> list[int | str]:
    """The target, whether it exists or not."""
    parent = target.parent.stat()
    return [parent.st_dev, parent.st_ino, target.name]


@contextmanager
def _parent_lock(target: Path) -> Iterator[None]:
    """Holds the folder of the target while work folders are found or made in it."""
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        end = time.monotonic() + _PATIENCE
        while not _lock(handle):
            if time.monotonic() > end:
                raise BundleError(
                    f"{target.parent}: another program keeps the folder locked: run the same "
                    f"command again, or choose another output"
                )
            time.sleep(0.02)
        yield
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    """Lock an open file, until it is closed or the process dies. False: another process has it."""
    try:
        import fcntl
    except ImportError:  # not on this system: exports to the same target are the person's care
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
