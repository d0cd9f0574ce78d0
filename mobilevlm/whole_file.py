"""Files as wholes: one that appears whole or not at all, and its digest."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path, mode: int = 0o644, synced: bool = True) -> Iterator[Path]:
    """Give an empty file beside ``path`` to write to, under a name that nobody has, and put it in
    place of ``path`` in one step when the block is done. After an error nothing was changed.
    ``mode``: who may read it; ``synced``: it is whole after a power failure too.

    Raises:
        OSError: the folder cannot be written to.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:60]}.")
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        if synced:
            with draft.open("rb") as file:
                os.fsync(file.fileno())
        draft.chmod(mode)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def file_sha256(path: Path) -> str:
    """Return the digest of a file's bytes, read in pieces."""
    digest, buffer = hashlib.sha256(), bytearray(4 * 2**20)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()
